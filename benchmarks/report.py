"""What a run of versus.py shows: tables, who was not timed, which requirements are met, a CSV and a picture.

    python -m benchmarks.report FILE.csv [--plot FILE.png]

shows the CSV of an earlier run, its tables in Markdown.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases import DTYPES, READING, WAYS

OURS, CEILING = "refattn", "ceiling"
#: refattn asked for something else, to compare it with itself.
OURSELVES = ("bare", "1 thread")
#: Groups measured in processes of their own, without others.
ALONE = ("memory", "first call")
#: What stands under the cases of a group.
MEANS = ("geometric mean", "least")


@dataclass(frozen=True)
class Row:
    """One implementation on one case.

    Attributes
    ----------
    threads : int
    dtype, way, group : str
    B, Hq, Hkv, T, S, D : int
    implementation, form : str
        Who, and which of its ways of being called was the fastest.
    seconds : float
        Median of the samples; NaN where it was not timed.
    first : float
        Seconds of its first call in this process, what it compiles then included.
    ratio : float
        Median over the rounds of its seconds over refattn's.
    rate : float
        Operations (decode: bytes) per second; of a ceiling the highest.
    share : float
        Median over the rounds of its rate over the ceiling's.
    error : float
        Worst error over its tolerance.
    extra : float
        Peak bytes beyond operands and results.
    reason : str
        Why it was not timed; "" where it was.
    """

    threads: int
    dtype: str
    way: str
    group: str
    B: int
    Hq: int
    Hkv: int
    T: int
    S: int
    D: int
    implementation: str
    form: str = ""
    seconds: float = math.nan
    first: float = math.nan
    ratio: float = math.nan
    rate: float = math.nan
    share: float = math.nan
    error: float = math.nan
    extra: float = math.nan
    reason: str = ""

    @property
    def shape(self) -> str:
        heads = str(self.Hq) if self.Hq == self.Hkv else f"{self.Hq}/{self.Hkv}"
        lengths = str(self.T) if self.T == self.S else f"{self.T}x{self.S}"
        return f"{self.B} x {heads} x {lengths} x {self.D}"

    @property
    def reads(self) -> bool:
        return self.group in READING

    @property
    def refused(self) -> bool:
        """Its answer was wrong, or there was none."""
        return self.reason.startswith(("WRONG", "FAILED"))


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(x) for x in values if not math.isnan(x)]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


# ---- tables --------------------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each number of threads, dtype and way."""
    found = []
    for title, caption, columns, lines in _contents(rows):
        table = Table(title=title, caption=caption, box=None, padding=(0, 2, 0, 0))
        for n, column in enumerate(columns):
            table.add_column(column, justify="right" if n else "left")
        for line in lines:
            table.add_row(*line, style="bold" if line[1] in MEANS else None)
        found.append(table)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The same in Markdown."""
    parts = []
    for title, caption, columns, lines in _contents(rows):
        cells = [columns, ["---", *("---:" for _ in columns[1:])], *([Text.from_markup(cell).plain for cell in line] for line in lines)]
        parts.append("\n".join([f"**{title}** ({caption})", "", *(f"| {' | '.join(line)} |" for line in cells)]))
    return "\n\n".join(parts)


def _contents(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """Title, caption, names of the columns and lines of every table."""
    shown = [r for r in rows if r.group not in ALONE]
    shown = [r for r in shown if r.implementation in (CEILING, OURS) or not math.isnan(r.ratio) or r.refused]
    for key in dict.fromkeys((r.threads, r.dtype, r.way) for r in shown):
        yield _table(key, [r for r in shown if (r.threads, r.dtype, r.way) == key])


def _table(key: tuple[int, str, str], rows: Sequence[Row]) -> tuple[str, str, list[str], list[list[str]]]:
    threads, dtype, way = key
    peers = [name for name in dict.fromkeys(r.implementation for r in rows) if name not in (CEILING, OURS)]
    best: dict[bool, float] = {}
    for r in rows:
        if r.implementation == CEILING:
            best[r.reads] = max(best.get(r.reads, 0.0), r.rate / 1e9)
    caption = ", ".join(f"{x:.3g} {'GB' if reads else 'Gflop'}/s" for reads, x in sorted(best.items()))
    columns = ["mask", "B x H x T x D", "refattn ms", "G/s", "of ceiling", *(f"{name} ms" for name in peers[:1]), *peers]
    lines = []
    groups = list(dict.fromkeys(r.group for r in rows))
    for group in groups:
        of_group = [r for r in rows if r.group == group]
        for shape in dict.fromkeys(r.shape for r in of_group):
            found = {r.implementation: r for r in of_group if r.shape == shape}
            ours = found[OURS]
            first = [_milliseconds(found.get(name)) for name in peers[:1]]
            numbers = [_milliseconds(ours), _number(ours.rate / 1e9, ".3g"), _number(ours.share, ".0%")]
            lines.append([group, shape, *numbers, *first, *(_ratio(found.get(p)) for p in peers)])
    for name, included in (*((g, (g,)) for g in groups), ("full and causal", ("full", "causal"))):
        of_group = [r for r in rows if r.group in included]
        if len({(r.group, r.shape) for r in of_group}) > 1 and set(included) <= set(groups):
            share = _number(geometric_mean(r.share for r in of_group if r.implementation == OURS), ".0%")
            ratios = [[r.ratio for r in of_group if r.implementation == p and not math.isnan(r.ratio)] for p in peers]
            blank = ["" for _ in peers[:1]]
            lines.append([name, MEANS[0], "", "", share, *blank, *(_number(geometric_mean(x), ".2f") for x in ratios)])
            lines.append([name, MEANS[1], "", "", "", *blank, *(_number(min(x, default=math.nan), ".2f") for x in ratios)])
    return f"{way}, {dtype}, {threads} thread{'s' * (threads > 1)}: time of each over refattn's", f"ceiling: {caption}", columns, lines


def _number(x: float, how: str) -> str:
    return "-" if math.isnan(x) else format(x, how)


def _milliseconds(row: Row | None) -> str:
    if row is None or row.refused:
        return "-" if row is None else f"[red]{row.reason.split(':')[0].lower()}"
    return _number(1e3 * row.seconds, ".3g")


def _ratio(row: Row | None) -> str:
    if row is None or row.refused:
        return "-" if row is None else f"[red]{row.reason.split(':')[0].lower()}"
    return "-" if math.isnan(row.ratio) else f"[{'green' if row.ratio >= 1 else 'red'}]{row.ratio:.2f}"


def remarks(rows: Sequence[Row]) -> list[str]:
    """Who was not timed on what, and why."""
    missing: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r.refused or (r.reason and r.implementation not in OURSELVES):
            missing.setdefault((r.implementation, r.reason), []).append(f"{r.way} {r.dtype} {r.group} {r.shape}")
    return [
        f"{name} was not timed on {len(where)} case{'s' * (len(where) > 1)} ({where[0]}{', ...' * (len(where) > 1)}): {why}"
        for (name, why), where in missing.items()
    ]


# ---- requirements --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A requirement on a number of some rows, every one of which has to meet it.

    Attributes
    ----------
    says : str
        The requirement in words.
    wanted : callable
        Whether it is about a row.
    number : callable
        What of the row it is about.
    least, most : float
    unit : str
        How the number is shown.
    """

    says: str
    wanted: Callable[[Row], bool]
    number: Callable[[Row], float]
    least: float = -math.inf
    most: float = math.inf
    unit: str = ".2f"

    def worst(self, rows: Sequence[Row]) -> tuple[float, Row | None]:
        """The number nearest to missing it, or furthest beyond, with its row; NaN where none was measured."""
        found = [(self.number(r), r) for r in rows if self.wanted(r)]
        found = [(x, r) for x, r in found if not math.isnan(x)]
        if not found:
            return math.nan, None
        return (min if self.least > -math.inf else max)(found, key=lambda pair: pair[0])

    def refused(self, rows: Sequence[Row]) -> bool:
        """Whether an answer that it is about was wrong."""
        return any(r.refused for r in rows if self.wanted(r))


def _ratio_to(name: str, *groups: str, ways: Sequence[str] = ("forward",), dtypes: Sequence[str] = DTYPES) -> Callable[[Row], bool]:
    return lambda r: r.implementation == name and r.group in groups and r.way in ways and r.dtype in dtypes


def _ours(*groups: str, way: str = "forward", dtype: str = "float32") -> Callable[[Row], bool]:
    return lambda r: r.implementation == OURS and r.group in groups and r.way == way and r.dtype == dtype


def _long(dtype: str) -> Callable[[Row], bool]:
    return lambda r: _ours("full", dtype=dtype)(r) and r.threads == 1 and r.T >= 2048


def _the_ratio(row: Row) -> float:
    return row.ratio


def _the_cost(row: Row) -> float:
    return 1 / row.ratio


def _the_seconds(row: Row) -> float:
    return row.seconds


_GRID = [
    Target(
        f"{way}, {dtype}: ahead of torch on every shape of the grid",
        _ratio_to("torch", "full", "causal", ways=(way,), dtypes=(dtype,)),
        _the_ratio,
        least=1.0,
    )
    for dtype in DTYPES
    for way in WAYS
]
_FUNCTIONS = ("alibi", "relative", "tanh cap")
TARGETS = (
    *_GRID,
    Target("window 256 at S = 4096: ahead of torch", _ratio_to("torch", "window 256"), _the_ratio, least=1.0),
    Target("window 256 at S = 4096: ahead of compiled FlexAttention", _ratio_to("flex", "window 256"), _the_ratio, least=1.0),
    Target("documents: ahead of torch", _ratio_to("torch", "documents"), _the_ratio, least=1.0),
    Target("documents: ahead of compiled FlexAttention", _ratio_to("flex", "documents"), _the_ratio, least=1.0),
    Target("functions of scores: ahead of torch", _ratio_to("torch", *_FUNCTIONS), _the_ratio, least=1.0),
    Target("functions of scores: ahead of compiled FlexAttention", _ratio_to("flex", *_FUNCTIONS), _the_ratio, least=1.0),
    Target("a function of scores: at most 1.3 times the bare kernel", _ratio_to("bare", *_FUNCTIONS), _the_cost, most=1.3),
    Target("a function of scores: compiled in at most 1 s", _ours(*_FUNCTIONS), lambda r: r.first - r.seconds, most=1.0, unit=".2f s"),
    Target("a dense bias: at most 1.15 times the bare kernel", _ratio_to("bare", "bias"), _the_cost, most=1.15),
    Target("one thread, float32, T >= 2048, full: at least 80 % of multiply-add peak", _long("float32"), lambda r: r.share, least=0.80, unit=".0%"),
    Target("one thread, float64, T >= 2048, full: at least 70 % of multiply-add peak", _long("float64"), lambda r: r.share, least=0.70, unit=".0%"),
    Target(
        "fewer heads than threads: at least three quarters of the ideal gain",
        _ratio_to("1 thread", "one head", ways=("forward", "training")),
        lambda r: r.ratio / r.threads,
        least=0.75,
        unit=".0%",
    ),
    Target("T = S = 16: under 60 microseconds", _ours("latency"), lambda r: 1e6 * r.seconds, most=60.0, unit=".0f us"),
    Target("decode, float32: at least 3 times as fast as torch", _ratio_to("torch", "decode", dtypes=("float32",)), _the_ratio, least=3.0),
    Target("decode, float32: at least 85 % of read bandwidth", _ours("decode"), lambda r: r.share, least=0.85, unit=".0%"),
    *(
        Target(
            f"{way}, T = S = 131072: at most 1 GiB beyond operands and results",
            lambda r, way=way: _ours("memory", way=way)(r) and r.T >= 131072,
            lambda r: r.extra / 2**30,
            most=1.0,
            unit=".2f GiB",
        )
        for way in ("forward", "training")
    ),
    Target("first call of a process, cached: under 1 s with imports", _ours("first call", way="cached"), _the_seconds, most=1.0, unit=".2f s"),
    Target("first call of a process, nothing cached: under 15 s", _ours("first call", way="compiling"), _the_seconds, most=15.0, unit=".1f s"),
)


def targets(rows: Sequence[Row], undisturbed: bool = True) -> Table:
    """A line for each requirement: the worst number, whose it is, and whether it is met.

    Parameters
    ----------
    rows : sequence of Row
    undisturbed : bool
        Whether torch was as fast here as alone; where it was not, no requirement on a ratio to it can be met.
    """
    table = Table(title="requirements, each by its worst case", box=None, padding=(0, 2, 0, 0))
    for column, justify in (("requirement", "left"), ("worst", "right"), ("where", "left"), ("", "left")):
        table.add_column(column, justify=justify)
    for target in TARGETS:
        worst, row = target.worst(rows)
        refused = target.refused(rows)
        if row is None:
            verdict = "[red]no right answer" if refused else "not measured"
            table.add_row(target.says, "-", "", verdict)
            continue
        if row.implementation in ("torch", "flex") and not undisturbed:
            verdict = "[red]cannot be said: torch was slowed down"
        else:
            met = target.least <= worst <= target.most and not refused
            verdict = "[green]met" if met else "[red]not met"
        form, _, unit = target.unit.partition(" ")
        where = f"{row.dtype}, {row.threads} thread{'s' * (row.threads > 1)}, {row.group} {row.shape}"
        table.add_row(target.says, f"{worst:{form}} {unit}".strip(), where, verdict)
    return table


# ---- files ---------------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line for each implementation and case; empty where nothing was measured."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if isinstance(x, float) and math.isnan(x) else x for name, x in asdict(row).items()})


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote."""
    with path.open(newline="") as file:
        kinds: dict[str, Callable[[str], object]] = {"int": int, "str": str, "float": lambda x: float(x or "nan")}
        return [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]


#: One colour per implementation, whoever takes part; from matplotlib's own cycle.
COLOURS = {"torch": "C3", "flex": "C1", "jax": "C0", "onnxruntime": "C4", "numpy": "C7"}


def write_plot(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Ratios by case: a panel for each dtype and way, a column of panels for each number of threads."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    timed = [r for r in rows if not math.isnan(r.ratio) and r.implementation in COLOURS]
    if not timed:
        raise SystemExit("nothing was timed against refattn: there is nothing to plot")
    panels = list(dict.fromkeys((r.dtype, r.way) for r in timed))
    columns = sorted({r.threads for r in timed})
    cases = {key: list(dict.fromkeys((r.group, r.shape) for r in timed if (r.dtype, r.way) == key)) for key in panels}
    heights = [len(cases[key]) + 3 for key in panels]
    figure = Figure(figsize=(3.2 + 4.2 * len(columns), 1.0 + 0.21 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), len(columns), squeeze=False, sharex=True, height_ratios=heights)
    for key, line in zip(panels, grid, strict=True):
        for threads, axes in zip(columns, line, strict=True):
            of_panel = [r for r in timed if (r.dtype, r.way, r.threads) == (*key, threads)]
            axes.axvspan(0, 1, color="0.93", zorder=0, linewidth=0)
            axes.axvline(1.0, color="0.3", linewidth=0.8, zorder=1)
            for peer, colour in COLOURS.items():
                points = [(r.ratio, cases[key].index((r.group, r.shape))) for r in of_panel if r.implementation == peer]
                if points:
                    axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4.5, label=peer, zorder=2)
            axes.set(xscale="log", ylim=(len(cases[key]) - 0.5, -0.5))
            axes.set_title(f"{key[1]}, {key[0]}, {threads} thread{'s' * (threads > 1)}", fontsize=9, loc="left")
            labels = [f"{group}   {shape}" for group, shape in cases[key]] if threads == columns[0] else []
            axes.set_yticks(range(len(cases[key])), labels or [""] * len(cases[key]), fontsize=7.5)
            axes.grid(axis="x", which="major", linewidth=0.4)
            axes.grid(axis="y", linewidth=0.2)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.tick_params(axis="y", length=0)
    low, high = min(r.ratio for r in timed), max(r.ratio for r in timed)
    for axes in grid[-1]:
        axes.set_xlim(min(0.8, low / 1.15), max(2.0, high * 1.15))
        wide = math.log10(axes.get_xlim()[1] / axes.get_xlim()[0]) > 1.5
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("time over refattn's: right of 1, refattn is faster", fontsize=8)
        axes.tick_params(axis="x", labelsize=8, labelbottom=True)
    handles = {label: handle for axes in np.ravel(grid) for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    figure.supxlabel(machine, fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables in Markdown, requirements and a picture of a run of versus.py.")
    parser.add_argument("csv", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--machine", default="", help="what the picture says below")
    chosen = parser.parse_args()
    rows = read_csv(chosen.csv)
    screen = Console(width=200)
    screen.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)
    screen.print()
    screen.print(targets(rows))
    if chosen.plot:
        write_plot(chosen.plot, rows, chosen.machine)


if __name__ == "__main__":
    main()
