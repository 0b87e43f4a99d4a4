"""Writes the generated pages: one per variant, the index of variants, and the reference of public names.

Everything comes from the catalogue and from ``refattn.__all__``; a new variant or a new public name gets its page without any change here.
"""

from __future__ import annotations

import inspect
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import refattn as ra
from refattn import catalog
from refattn.spec import AXES, Example, Operand, Output, Param, Variant, shape

#: Sizes of the mask pictures; every axis that is not named here has size 2.  T differs from S so that alignment can be seen.
PICTURE = {"T": 12, "S": 16}
#: Ink of a picture, by theme.
INK = {"light": "#1f2328", "dark": "#e6e6e6"}
VISIBLE = "#3d7fd9"


def write(docs: Path) -> None:
    """Write all generated pages and pictures below `docs`, and remove those of variants that are gone."""
    found = catalog.catalogue().values()
    files: dict[Path, str] = {
        docs / "variants" / "index.md": index(found),
        docs / "api" / "index.md": reference(),
    }
    for variant in found:
        files[docs / "variants" / f"{variant.name}.md"] = page(variant)
        for n, (label, seen) in enumerate(patterns(variant)):
            for theme, ink in INK.items():
                files[docs / "variants" / picture_name(variant, n, theme)] = picture(label, seen, "key" if has_keys(variant) else "token", ink)
    for folder in ("variants", "api"):
        (docs / folder).mkdir(exist_ok=True)
        for stale in set((docs / folder).iterdir()) - files.keys():
            stale.unlink()
    for path, text in files.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # an unchanged file is not built again
            path.write_text(text, encoding="utf-8")


# ---- pages -------------------------------------------------------------------------------------------------------------------


def page(variant: Variant) -> str:
    """The page of one variant, as MyST Markdown."""
    module = catalog.module(variant)
    sections = [
        f"# {variant.name}",
        prose(variant.summary),
        code(variant.equation, "text"),
        prose(inspect.getdoc(module) or ""),
        paper_line(variant),
        "## Operands",
        table(("name", "axes", "holds", "if absent", "meaning"), map(operand_row, variant.operands)),
        axis_legend(variant),
        "## Results",
        table(("name", "axes", "meaning"), (output_row(variant, o) for o in variant.outputs)),
    ]
    if variant.params:
        sections += ["## Parameters", table(("name", "default", "takes", "meaning"), map(param_row, variant.params))]
    sections += pictures(variant)
    if variant.examples:
        sections += ["## Worked examples", *(text for e in variant.examples for text in example(variant, e))]
    if variant.identities:
        sections += ["## Identities", "Each holds for every input, and is a test."]
        sections += ["\n".join(f"- {prose(identity.statement)}{setting(identity.params)}" for identity in variant.identities)]
    sections += [
        "## Cost",
        "Formulas in the axis names and the parameters; `pairs` is the number of query-key pairs of one head that the masks leave visible.",
        table(("quantity", "formula"), cost_rows(variant)),
        "## Definition",
        f"The whole of it, from `{module.__name__.replace('.', '/')}.py`:",
        code(inspect.getsource(variant.define), "python"),
        "## Cite",
        code(ra.cite(variant.name), "bibtex"),
    ]
    return "\n\n".join(sections) + "\n"


def index(found: Iterable[Variant]) -> str:
    """The table of all variants, a section per family."""
    families: dict[str, list[Variant]] = {}
    for variant in found:
        families.setdefault(variant.family, []).append(variant)
    sections = ["# Variants", "Every page is generated from the one file that defines the variant."]
    for family, members in sorted(families.items()):
        rows = ((f"[{v.name}]({v.name}.md)", cell(v.summary), cell(f"{surname(v)} {v.paper.date}")) for v in members)
        sections += [f"## {family}", table(("name", "what it is", "from"), rows)]
    names = sorted(v.name for members in families.values() for v in members)
    sections.append(code("\n".join((":hidden:", "", *names)), "{toctree}"))
    return "\n\n".join(sections) + "\n"


def reference() -> str:
    """The reference of ``refattn.__all__``, by kind."""
    public = {name: getattr(ra, name) for name in ra.__all__}
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "Functions": ("autofunction", lambda x: not isinstance(x, type)),
        "Types": ("autoclass", lambda x: isinstance(x, type) and not issubclass(x, Exception)),
        "Exceptions": ("autoexception", lambda x: isinstance(x, type) and issubclass(x, Exception)),
    }
    sections = ["# Reference", "Every public name of `refattn`.  What is not on this page may change without notice."]
    for kind, (directive, belongs) in kinds.items():
        names = [name for name, x in public.items() if belongs(x)]
        if names:
            listing = [".. currentmodule:: refattn", "", ".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names)]
            entries = (line for name in names for line in ("", f".. {directive}:: {name}", *(["   :members:"] if directive == "autoclass" else [])))
            sections += [f"## {kind}", code("\n".join((*listing, *entries)), "{eval-rst}")]
    return "\n\n".join(sections) + "\n"


# ---- parts of a variant's page -------------------------------------------------------------------------------------------------


def paper_line(variant: Variant) -> str:
    paper = variant.paper
    places = [f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"] if paper.arxiv else []
    places += [f"[doi:{paper.doi}](https://doi.org/{paper.doi})"] if paper.doi else []
    places += [f"<{paper.url}>"] if paper.url else []
    places += [prose(paper.where)] if paper.where else []
    authors = ", ".join(" ".join(reversed(name.split(", "))) for name in paper.authors)
    return f"Paper: {prose(authors)}, *{prose(paper.title)}*, {paper.date}" + "".join(f", {place}" for place in places) + "."


def surname(variant: Variant) -> str:
    first, *others = variant.paper.authors
    return first.partition(",")[0] + (" and others" if len(others) > 1 else f" and {others[0].partition(',')[0]}" if others else "")


def operand_row(operand: Operand) -> tuple[str, ...]:
    holds = {"real": "floating point", "boolean": "booleans", "number": "numbers or booleans"}[operand.kind]
    if operand.within is not None:
        holds += f" from {operand.within[0]:g} to {operand.within[1]:g}"
    if operand.broadcast:
        holds += ", broadcast"
    absent = f"`{operand.absent}`" if operand.optional else "required"
    return f"`{operand.name}`", f"`{operand.axes}`", holds, absent, cell(operand.meaning)


def output_row(variant: Variant, output: Output) -> tuple[str, ...]:
    usual = " (returned unless `returns` names others)" if output.name in variant.returns else ""
    wide = " (at least float32)" if output.wide else ""
    return f"`{output.name}`", f"`{output.axes}`", cell(output.meaning) + wide + usual


def param_row(param: Param) -> tuple[str, ...]:
    return f"`{param.name}`", f"`{quoted(param.default)}`", cell(param.kind.rule), cell(param.meaning)


def axis_legend(variant: Variant) -> str:
    return "Axes: " + ", ".join(f"`{axis}` {AXES[axis]}" for axis in variant.axes if axis in AXES) + "."


def cost_rows(variant: Variant) -> tuple[tuple[str, str], ...]:
    return ("floating-point operations", f"`{variant.cost.flops}`"), ("numbers allocated", f"`{variant.cost.memory}`")


def example(variant: Variant, worked: Example) -> tuple[str, str]:
    """A worked example as a program that ends in the results it must give."""
    lines = ["import numpy as np", "import refattn as ra", ""]
    lines += [f"{name} = np.array({literal(value)})" for name, value in worked.operands.items()]
    arguments = [f'"{variant.name}"', *(f"{name}={name}" for name in worked.operands)]
    returns = tuple(worked.returns)
    settings = {**worked.params, "returns": returns if len(returns) > 1 else returns[0]}
    arguments += [f"{name}={quoted(value)}" for name, value in settings.items()]
    lines += ["", f"{', '.join(returns)} = {call('ra.attend', arguments)}"]
    lines += [f"np.testing.assert_allclose({name}, {literal(value)}, atol=1e-12)" for name, value in worked.returns.items()]
    return f"{prose(worked.source[:1].upper() + worked.source[1:])}:", code("\n".join(lines), "python")


def call(function: str, arguments: list[str]) -> str:
    """The call in one line, or an argument a line where that is wider than the page."""
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) <= 66 else "\n".join((f"{function}(", *(f"    {argument}," for argument in arguments), ")"))


def literal(value: Any) -> str:
    """Nested lists of numbers as Python text that NumPy reads."""
    return re.sub(r"\b(nan|inf)\b", r"np.\1", repr(np.asarray(value).tolist()))


def quoted(value: Any) -> str:
    """A parameter's value as this house writes it."""
    return repr(value).replace("'", '"')


def setting(params: Mapping[str, Any]) -> str:
    return (" (" + ", ".join(f"`{name}={quoted(value)}`" for name, value in params.items()) + ")") if params else ""


# ---- what a query sees ---------------------------------------------------------------------------------------------------------


def pictures(variant: Variant) -> list[str]:
    """The section of mask pictures; nothing for a variant whose queries always see every key."""
    drawn = patterns(variant)
    if not drawn:
        return []
    images = [
        f"![Keys seen by each query, {label}]({picture_name(variant, n, theme)}){{.mask .only-{theme}}}"
        for n, (label, _) in enumerate(drawn)
        for theme in INK
    ]
    rows, columns = drawn[0][1].shape
    sizes = f"{rows} queries and {columns} keys" if has_keys(variant) else f"{rows} tokens"
    key = "a key" if has_keys(variant) else "a token"
    text = f"Measured on the definition with {sizes}; filled where changing {key} changes the query's output."
    return ["## What a query sees", text, "\n".join(images)]


def picture_name(variant: Variant, n: int, theme: str) -> str:
    return f"{variant.name}-sees-{n}-{theme}.svg"


def patterns(variant: Variant) -> list[tuple[str, np.ndarray]]:
    """What each query sees: for the defaults, and for every value worth trying that changes it; empty when everything is always seen."""
    drawn = [("defaults", visible(variant, {}))]
    for param in variant.params:
        for value in param.tries:
            seen = visible(variant, {param.name: value})
            if not any(np.array_equal(seen, other) for _, other in drawn):
                drawn.append((f"{param.name}={quoted(value)}", seen))
    return [] if all(seen.all() for _, seen in drawn) else drawn


def visible(variant: Variant, params: Mapping[str, Any]) -> np.ndarray:
    """Query x key (or token): True where changing the key, with all that belongs to it, changes the query's output.

    The definition is asked, in one run: batch entry j has other numbers at key j, the last entry is unchanged.
    """
    axis = "S" if has_keys(variant) else "T"
    n_keys = PICTURE[axis]
    dims = {name: PICTURE.get(name, 2) for name in variant.axes} | {"B": n_keys + 1}
    rng = np.random.default_rng(0)
    operands = {}
    for operand in variant.operands:
        if operand.optional:
            continue
        axes = operand.axes.split()
        x, other = (operand.draw(rng, shape(operand.axes, {**dims, "B": 1})) for _ in range(2))
        if "B" in axes:
            x = np.repeat(x, n_keys + 1, axis=axes.index("B"))
        if "B" in axes and axis in axes:
            changed = np.eye(n_keys + 1, n_keys, dtype=bool)
            x = np.where(changed.reshape([dims[name] if name in ("B", axis) else 1 for name in axes]), other, x)
        operands[operand.name] = x
    output = variant.outputs[0]
    out = ra.attend(variant.name, **operands, **params, returns=output.name)
    others = tuple(n for n, name in enumerate(output.axes.split()) if name not in ("B", "T"))
    return np.asarray((out[:-1] != out[-1:]).any(axis=others).T)


def has_keys(variant: Variant) -> bool:
    """Whether keys have an axis of their own; otherwise queries and keys are the same tokens."""
    return "S" in variant.axes


def picture(label: str, seen: np.ndarray, columns: str, ink: str) -> str:
    """The query x key pattern as an SVG, on a transparent ground."""
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "refattn", "svg.fonttype": "none", "font.size": 9}):  # the same bytes on every build
        figure = Figure(figsize=(2.7, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.pcolormesh(seen, cmap=ListedColormap(["#00000000", VISIBLE]), vmin=0, vmax=1, edgecolors=ink + "40", linewidth=0.5)
        axes.set(aspect="equal", xlabel=columns, ylabel="query", xticks=[], yticks=[])
        axes.invert_yaxis()
        axes.set_title(label, color=ink, fontfamily="monospace", fontsize=9)
        axes.xaxis.label.set_color(ink)
        axes.yaxis.label.set_color(ink)
        axes.spines[:].set_color(ink)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


# ---- Markdown ------------------------------------------------------------------------------------------------------------------


def code(text: str, language: str) -> str:
    return f"```{language}\n{text.strip(chr(10))}\n```"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows))


def cell(text: str) -> str:
    return prose(text).replace("|", r"\|")


def prose(text: str) -> str:
    """Docstring text as Markdown: indented blocks literal, code spans kept, everything else taken at its letter."""
    blocks: list[str] = []
    for block in re.split(r"\n[ ]*\n", textwrap.dedent(text).strip("\n")):
        literal_block = all(line.startswith("    ") for line in block.splitlines())
        if literal_block and blocks and blocks[-1].startswith("```text"):  # a blank line inside a literal block
            blocks[-1] = blocks[-1].removesuffix("\n```") + "\n\n" + textwrap.dedent(block) + "\n```"
        else:
            blocks.append(code(textwrap.dedent(block), "text") if literal_block else _escaped(block))
    return "\n\n".join(blocks)


def _escaped(text: str) -> str:
    """Everything but code spans and *emphasis* escaped; the name of a variant in single backticks leads to its page."""
    pieces = re.split(r"(``.+?``|`.+?`|(?<![\w*])\*\w[^*\n]*?\w\*(?![\w*]))", text, flags=re.DOTALL)
    return "".join(_linked(p) if p.startswith("`") else p if n % 2 else re.sub(r"([\\*_\[\]<>#$|~{}])", r"\\\1", p) for n, p in enumerate(pieces))


def _linked(span: str) -> str:
    name = span.strip("`")
    return f"[`{name}`]({name}.md)" if span == f"`{name}`" and name in catalog.catalogue() else span
