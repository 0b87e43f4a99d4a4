"""The command line: reads the catalogue, asks the judge, prints tables.

Exit status: 0 it agrees (or the command did what it says), 1 it does not agree, 2 the call was wrong or a component is missing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from . import __version__, adapters, api, catalog, definition
from .errors import BackendUnavailableError, CandidateError, ParameterError, RefattnError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The ground truth for attention: look variants up, and judge implementations of them.",
)
screen = Console()
errors = Console(stderr=True)

_Variant = Annotated[str, typer.Argument(metavar="VARIANT", help="A name that `refattn list` shows.")]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter, its value as JSON or plain text: causal=true, window=[127,0].")
]
_Dtype = Annotated[str, typer.Option(help="float64, float32, float16, bfloat16, float8_e4m3fn, ...")]
_Profile = Annotated[str | None, typer.Option(help="How the implementation computes: math, flash, eager, ...; auto, in check, finds out.")]
_Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for standard output, without the table.")]
_Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page, with pictures of the errors.")]
_Returns = Annotated[str | None, typer.Option(metavar="NAMES", help="What it returns, in order: out,lse.")]


@app.command("list")
def list_variants(family: Annotated[str | None, typer.Option(help="Only this family.")] = None) -> None:
    """Show every variant."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("variant", "family", "year", "summary"):
        table.add_column(column, no_wrap=column != "summary")
    for name in catalog.names(family):
        v = catalog.variant(name)
        table.add_row(v.name, v.family, v.paper.date, v.summary)
    screen.print(table)


@app.command()
def show(variant: _Variant) -> None:
    """Show a variant: equation, operands, parameters, cost, and its documentation page."""
    found = api.describe(variant)
    screen.print(str(found), markup=False, highlight=False, soft_wrap=True)
    screen.print()
    screen.print(found.text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def cite(variant: _Variant) -> None:
    """Print the BibTeX entry of a variant's paper."""
    print(api.cite(variant))


@app.command()
def cost(
    variant: _Variant,
    sizes: Annotated[list[str], typer.Argument(metavar="AXIS=N...", help="Sizes by axis, and parameters: B=1 Hq=32 T=4096 D=128 causal=true.")],
    dtype: _Dtype = "float32",
) -> None:
    """Operations, traffic and memory of one forward call."""
    found = api.cost(variant, dtype=dtype, **_settings(sizes))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("floating-point operations", f"{found.flops:,}")
    table.add_row("bytes read and written", f"{found.bytes:,}")
    table.add_row("operations per byte", f"{found.intensity:,.1f}")
    for backend, amount in found.peak_memory.items():
        table.add_row(f"bytes allocated, {backend}", f"{amount:,}")
    screen.print(table)


@app.command()
def check(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="path/to/file.py:function, package.module:function, or an adapter: torch, torch-flex, jax, ...")
    ],
    variant: Annotated[str | None, typer.Option(help="What it claims to compute.", show_default="softmax")] = None,
    dtype: _Dtype = "float32",
    settings: _Set = None,
    framework: Annotated[str | None, typer.Option(help="Whose arrays it takes: torch, jax, mlx.", show_default="numpy")] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Its own name of an operand or parameter: causal=is_causal.")
    ] = None,
    returns: _Returns = None,
    profile: _Profile = None,
    suite: Annotated[str, typer.Option(help="quick, standard or full.")] = "standard",
    inputs: Annotated[Path | None, typer.Option(metavar="FILE", help="Judge on these operands (.npz or .safetensors).")] = None,
    seed: Annotated[int, typer.Option(help="Of the random operands.")] = 0,
    gradients: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="Judge its backward pass too: where that is, or auto to differentiate TARGET by its framework."),
    ] = None,
    html_file: _Html = None,
    json_file: _Json = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Write the operands of the smallest failing call.")] = None,
) -> None:
    """Judge an implementation: does it compute what it says?"""
    report = api.check(
        target,
        variant,
        dtype=dtype,
        suite=suite,
        framework=framework,
        rename=dict(_pair(r) for r in rename or []),
        returns=_names(returns),
        profile=profile,
        inputs=None if inputs is None else _read(inputs),
        seed=seed,
        gradients=True if gradients == "auto" else gradients,
        **_settings(settings or []),
    )
    if save is not None and not report.passed:
        report.save(str(save))
    _give(report, json_file, html_file)


@app.command()
def compare(
    arrays: Annotated[Path, typer.Argument(metavar="FILE", help=".npz or .safetensors that holds the operands and the outputs by name.")],
    variant: Annotated[str, typer.Option(help="What was computed.")] = "softmax",
    settings: _Set = None,
    returns: _Returns = None,
    layout: Annotated[str, typer.Option(help="BHTD or BTHD.")] = "BHTD",
    profile: _Profile = None,
    html_file: _Html = None,
    json_file: _Json = None,
) -> None:
    """Judge outputs that exist already."""
    held = _read(arrays)
    outputs_of, differentiated = catalog.variant(variant).outputs, ["d_" + o.name for o in catalog.variant(variant).operands]
    cotangents = [n for n in held if n in {"d_" + o.name for o in outputs_of}]
    names = _names(returns) or tuple(n for n in (*(o.name for o in outputs_of), *(differentiated if cotangents else ())) if n in held)
    missing = [n for n in names if n not in held]
    if missing or not names:
        raise ParameterError(f"{arrays} holds {', '.join(held) or 'nothing'}, but no output {missing[0] if missing else 'of ' + variant}")
    outputs = {n: held[n] for n in names}
    known = {*(o.name for o in outputs_of), *differentiated}
    held = {n: x for n, x in held.items() if n not in known}  # an output that is there and not asked about is left alone
    report = api.compare(
        tuple(outputs.values()), variant, returns=tuple(outputs), layout=layout, profile=profile, **held, **_settings(settings or [])
    )
    _give(report, json_file, html_file)


@app.command()
def vectors(
    variants: Annotated[list[str] | None, typer.Argument(metavar="VARIANT...", help="Which; all of them unless said.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write golden vectors.")] = None,
    verify: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="DIR OUTPUTS", help="Judge the outputs another program wrote for DIR's vectors.")
    ] = None,
    suite: Annotated[str, typer.Option(help="small, to be committed, or standard.")] = "small",
    dtype: _Dtype = "float32",
    profile: _Profile = None,
    seed: Annotated[int, typer.Option(help="Of the random operands.")] = 0,
    pages: Annotated[Path | None, typer.Option("--html", metavar="DIR", help="Write a page for each variant judged.")] = None,
    json_file: _Json = None,
) -> None:
    """Golden vectors for other languages: operands, exact outputs and per-element tolerances, in safetensors with a JSON manifest."""
    from .oracle import vectors as golden

    if (output is None) == (verify is None):
        raise ParameterError("vectors: give either -o DIR, to write, or --verify DIR OUTPUTS, to judge")
    if output is not None:
        manifest = golden.write(output, variants or catalog.names(), dtype, profile, suite=suite, seed=seed, certify=api.certify)
        screen.print(f"{len(manifest['cases'])} cases written to {output}")
        return
    assert verify is not None
    verdict = golden.verify(*verify)
    for report in verdict.reports:
        if pages is not None:
            pages.mkdir(parents=True, exist_ok=True)
            report.to_html(pages / f"{report.variant.name}.html")
    if json_file is not None:
        found = {"passed": verdict.passed, "strangers": verdict.strangers, "reports": [report.to_dict() for report in verdict.reports]}
        text = json.dumps(found, indent=2)
        print(text) if str(json_file) == "-" else json_file.write_text(text + "\n")
    if str(json_file) != "-":
        _show_vectors(verdict)
    raise typer.Exit(0 if verdict.passed else 1)


def _show_vectors(verdict: Any) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("case", "outcome", "error / tolerance", "worst element"):
        table.add_column(column, overflow="fold")
    for case in (case for report in verdict.reports for case in report.cases):
        worst = case.worst
        where = "" if worst is None else f"{worst.output}[{', '.join(map(str, worst.index))}]"
        where += f" is {worst.got:.6g}, should be {worst.expected:.6g}" if worst is not None and case.failed else ""
        outcome = "[red]" + escape(case.reason or case.outcome) if case.failed else "[green]agrees"
        table.add_row(escape(case.probe.title), outcome, "" if worst is None else f"{worst.ratio:.2g}", escape(where))
    for name in verdict.strangers:
        table.add_row(escape(name), "[red]answers no case", "", "")
    screen.print(table)
    for report in verdict.reports:
        screen.print(f"\n{'PASS' if report.passed else 'FAIL'}  {report.candidate} {report.verdict}", markup=False, highlight=False, soft_wrap=True)
        if report.finding:
            screen.print(f"      {report.finding}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def warmup() -> None:
    """Compile the CPU engine and every definition once, into Numba's cache on disk: no later process waits for the compiler."""
    import numba

    from .engine import warmup as engine

    if numba.config.DISABLE_JIT:
        raise BackendUnavailableError("warmup: NUMBA_DISABLE_JIT is set, so nothing would be compiled")
    jobs = {f"kernel: {job}": functools.partial(engine.compiled, job) for job in engine.JOBS}
    jobs |= {f"definition: {name}": functools.partial(definition.compiled, catalog.variant(name)) for name in catalog.names()}
    start = time.perf_counter()
    with Progress(*Progress.get_default_columns(), console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=len(jobs))
        for text, job in jobs.items():
            bar.update(task, description=text)
            job()
            bar.advance(task)
    folders = {str(engine.cache_folder())} | {definition.compiled(catalog.variant(name)).stats.cache_path for name in catalog.names()}
    counted = f"{len(engine.JOBS)} kernels and {len(catalog.names())} definitions"
    screen.print(f"{counted} are ready, after {time.perf_counter() - start:.0f} seconds; the cache is in", highlight=False)
    for folder in sorted(folders):
        screen.print(f"  {folder}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def mutants(
    variant: Annotated[str, typer.Option(help="Whose mistakes.")] = "softmax",
    family: Annotated[str | None, typer.Option(metavar="CODES", help="Only faults of these letters or codes: M,X2.")] = None,
    dtype: _Dtype = "float32",
    suite: Annotated[str, typer.Option(help="quick, standard or full.")] = "standard",
    profile: _Profile = None,
) -> None:
    """Ask a suite whether it notices every known mistake: each one is computed and judged as an implementation would be."""
    from .oracle.mutants import table

    found = table.verdicts(catalog.variant(variant), dtype, suite, family, profile)
    screen.print(table.drawn(found))
    raise typer.Exit(0 if not table.survivors(found) else 1)


@app.command()
def doctor() -> None:
    """Say what is installed, which backends and adapters work, and why the others do not."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("refattn", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    for package in ("numpy", "numba", "llvmlite", "scipy", "ml_dtypes", "python-flint", "safetensors", "matplotlib", "asv"):
        table.add_row(package, _version(package) or "[dim]not installed")
    table.add_row("variants", str(len(catalog.names())))
    table.add_row("backend definition", "[green]works" if importlib.util.find_spec("numba") else "[red]numba is missing")
    table.add_row("backend cpu", "[green]works" if importlib.util.find_spec("numba") else "[red]numba is missing")
    table.add_row("backend cuda", "[dim]not part of this version")
    for name in adapters.names():
        try:
            state = f"[green]works[/]  {adapters.load(name).name}"
        except BackendUnavailableError as missing:
            state = f"[dim]{missing}"
        table.add_row(f"adapter {name}", state)
    screen.print(table)


# ---- reading what was typed ------------------------------------------------------------------------------------------------------


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ParameterError(f"{text!r} is not NAME=VALUE")
    return name, value


def _settings(texts: list[str]) -> dict[str, Any]:
    """``causal=true`` as {"causal": True}: values are JSON where they parse as such, else text."""
    found = {}
    for text in texts:
        name, value = _pair(text)
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = {"None": None, "True": True, "False": False}.get(value, value)
    return found


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(n.strip() for n in text.split(","))


def _read(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name from an .npz or .safetensors file; never from a pickle."""
    if not path.is_file():
        raise CandidateError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        from .oracle.vectors import read_tensors

        return read_tensors(path)
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except (ValueError, OSError, AttributeError) as problem:
        raise CandidateError(f"{path} could not be read as .npz: {problem}") from problem


def _give(report: Any, json_file: Path | None, html_file: Path | None) -> None:
    """Print the report, write it, and leave with its status."""
    if html_file is not None:
        report.to_html(html_file)
    if json_file is not None and str(json_file) == "-":
        print(report.to_json())
    else:
        screen.print(report)
        if json_file is not None:
            json_file.write_text(report.to_json() + "\n")
    raise typer.Exit(0 if report.passed else 1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Run the command line; refattn's own errors are one line and exit status 2, and so are files that cannot be read or written."""
    try:
        app()
    except (RefattnError, OSError) as problem:
        errors.print(f"refattn: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception:  # a mistake of ours; Python would leave with 1, which says that an implementation does not agree
        traceback.print_exc()
        sys.exit(2)
