"""What is known about a variant, for reading: its description, and the BibTeX entry of its paper."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from . import catalog
from .spec import AXES, Operand, Output, Paper, Param, Variant


@dataclass(frozen=True)
class Description:
    """What a variant is; `str` makes it readable.

    Attributes
    ----------
    name, family, summary, equation : str
    text : str
        The variant's documentation page.
    paper : Paper
    operands, outputs, params : tuple
        Declarations, with axes, rules, defaults and meanings.
    axes : mapping of str to str
        Meaning of every axis name used.
    backends : tuple of str
        Which can run it.
    gradients : str
        What `refattn.gradients` takes, unless parameters want another: "kernels", "whole arrays" or "differences" (`refattn.backends`).
    formulas : mapping of str to str
        Cost in axis names; `refattn.cost` evaluates them.
    """

    name: str
    family: str
    summary: str
    equation: str
    text: str
    paper: Paper
    operands: tuple[Operand, ...]
    outputs: tuple[Output, ...]
    params: tuple[Param, ...]
    axes: Mapping[str, str]
    backends: tuple[str, ...]
    gradients: str
    formulas: Mapping[str, str]

    def __str__(self) -> str:
        paper = self.paper
        where = f", {paper.where}" if paper.where else ""
        place = f", arXiv:{paper.arxiv}" if paper.arxiv else f", {paper.doi or paper.url}" if paper.doi or paper.url else ""
        lines = [f"{self.name} ({self.family}): {self.summary}", "", f"    {self.equation}", "", f"{paper.title} ({paper.date}){place}{where}", ""]
        lines += _table("operands", [(o.name, f"[{o.axes}]", o.meaning + (", optional" if o.optional else "")) for o in self.operands])
        lines += _table("outputs", [(o.name, f"[{o.axes}]", o.meaning) for o in self.outputs])
        lines += _table("parameters", [(p.name, f"= {p.default!r}", f"{p.meaning}; {p.kind.rule}") for p in self.params])
        lines += _table("axes", [(axis, "", meaning) for axis, meaning in self.axes.items()])
        lines += _table("cost", [(name, "", formula) for name, formula in self.formulas.items()])
        lines += [f"backends: {', '.join(self.backends)}; gradients by {self.gradients}"]
        return "\n".join(lines)


def described(variant: Variant, backends: tuple[str, ...], gradients: str) -> Description:
    """Everything a variant declares, gathered for reading."""
    return Description(
        name=variant.name,
        family=variant.family,
        summary=variant.summary,
        equation=variant.equation,
        text=inspect.getdoc(catalog.module(variant)) or "",
        paper=variant.paper,
        operands=variant.operands,
        outputs=variant.outputs,
        params=variant.params,
        axes={axis: AXES[axis] for axis in variant.axes if axis in AXES},
        backends=backends,
        gradients=gradients,
        formulas={"flops": variant.cost.flops, "numbers allocated": variant.cost.memory},
    )


def bibtex(paper: Paper) -> str:
    """The paper as a BibTeX entry."""
    family = paper.authors[0].split(",")[0] if paper.authors else "anonymous"
    word = next((w for w in paper.title.split() if len(w) > 3), "paper")
    key = "".join(c for c in f"{family}{paper.date}{word}".lower() if c.isalnum())
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors), "year": str(paper.year or "")}
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archivePrefix": "arXiv"}
    fields |= {name: value for name, value in (("doi", paper.doi), ("url", paper.url)) if value}
    body = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items() if value)
    return f"@{'article' if paper.arxiv or paper.doi else 'misc'}{{{key},\n{body}}}"


def _table(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    return [f"{title}:", *(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows), ""]
