"""refattn's CPU engine beside other implementations of softmax attention, on this machine.

    python benchmarks/versus.py [--threads 1 2] [--dtype float32] [--ways forward backward] [--only full causal] [--peers torch]
                                [--quick] [--csv FILE] [--plot FILE.png]

Everything a table shows was measured in one process, in turns: one sample of every implementation, then the next of every one, so that a slow
moment of the machine is slow for all.  A ratio is the median over the rounds of (its time / refattn's time in the same round): above 1, refattn is
faster.  The ceiling (multiply-adds per second; for decoding, bytes read per second) takes its turns too, and is the best of them.  An
implementation whose answer is wrong (see referee.py) is named and not timed.

One process per number of threads, bound to as many processors, because the pools of some implementations cannot be resized.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file

from benchmarks import ceilings, referee
from benchmarks.peers import PEERS, REFATTN, Declined, Peer, Work, asked
from refattn import precision
from refattn.engine.simd import register_bytes

DTYPES, WAYS = ("float32", "float64", "bfloat16"), ("forward", "backward")
#: Seconds of one sample at least, and of rest before it, in which the threads of whoever ran before go to sleep.
LEAST, REST = 0.02, 0.01
#: Groups whose ceiling is how fast memory is read.
READING = ("decode",)
#: Samples of each implementation.
ROUNDS, QUICK_ROUNDS = 7, 3


# ---- what is measured ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A shape with a mask."""

    group: str
    B: int
    Hq: int
    Hkv: int
    T: int
    S: int
    D: int
    causal: bool = False
    window: int = 0
    documents: int = 0
    bias: bool = False
    ways: tuple[str, ...] = ("forward",)

    def __str__(self) -> str:
        heads = str(self.Hq) if self.Hq == self.Hkv else f"{self.Hq}/{self.Hkv}"
        lengths = str(self.T) if self.T == self.S else f"{self.T}x{self.S}"
        return f"{self.B} x {heads} x {lengths} x {self.D}"

    def work(self, way: str, dtype: str, threads: int) -> Work:
        """Operands drawn from a normal distribution, the same ones every time."""
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> np.ndarray:
            return precision.round_to(rng.standard_normal(shape, np.float32), precision.as_dtype(dtype))

        q, k, v = draw(self.B, self.Hq, self.T, self.D), draw(self.B, self.Hkv, self.S, self.D), draw(self.B, self.Hkv, self.S, self.D)
        operands = {"q": q, "k": k, "v": v}
        if self.bias:
            operands["bias"] = draw(self.T, self.S)
        if self.documents:
            document = np.arange(self.T) * self.documents // self.T
            operands["mask"] = document[:, None] == document
        params: dict[str, Any] = {"causal": True} if self.causal else {"window": (self.window - 1, 0)} if self.window else {}
        return Work(way, operands, params, draw(self.B, self.Hq, self.T, self.D), threads)

    @property
    def reads(self) -> bool:
        """Whether memory is what limits it."""
        return self.group in READING

    def bytes(self, dtype: str) -> int:
        """Of keys and values."""
        return 2 * self.B * self.Hkv * self.S * self.D * precision.as_dtype(dtype).itemsize


SHAPES = (
    (1, 8, 8, 128, 64),
    (1, 8, 8, 512, 64),
    (1, 8, 8, 1024, 64),
    (1, 8, 8, 2048, 64),
    (1, 8, 8, 4096, 64),
    (1, 8, 8, 2048, 128),
    (4, 16, 16, 512, 64),
    (1, 32, 8, 1024, 128),
)
CASES = (
    *(Case("full", B, Hq, Hkv, T, T, D, ways=WAYS) for B, Hq, Hkv, T, D in SHAPES),
    *(Case("causal", B, Hq, Hkv, T, T, D, causal=True, ways=WAYS) for B, Hq, Hkv, T, D in SHAPES),
    Case("window 256", 1, 8, 8, 4096, 4096, 64, window=256),
    Case("documents", 1, 8, 8, 4096, 4096, 64, documents=8),
    Case("bias", 1, 8, 8, 2048, 2048, 64, bias=True),
    Case("latency", 1, 8, 8, 16, 16, 64),
    Case("decode", 1, 32, 8, 1, 4096, 128),
    Case("decode", 1, 32, 8, 1, 32768, 128),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


@dataclass(frozen=True)
class Row:
    """One implementation on one case.

    Attributes
    ----------
    seconds : float
        Median of the samples, of a ceiling the least; NaN where it was not timed.
    ratio : float
        Median over the rounds of its seconds over refattn's.
    rate : float
        Operations (decode: bytes) per second.
    share : float
        That over the ceiling, the best of the whole run.
    error : float
        Worst error over its tolerance.
    reason : str
        Why it was not timed; "" where it was.
    """

    threads: int
    dtype: str
    way: str
    group: str
    shape: str
    implementation: str
    seconds: float = math.nan
    ratio: float = math.nan
    rate: float = math.nan
    share: float = math.nan
    error: float = math.nan
    reason: str = ""


def measure(case: Case, dtype: str, way: str, threads: int, peers: Sequence[Peer], rounds: int, least: float = LEAST) -> list[Row]:
    """Every implementation, refattn first, on one case: judged, then timed in turns if its answer is right.

    Parameters
    ----------
    peers : sequence of Peer
        The first is the one the others are compared with.
    rounds : int
        Samples of each.
    least : float
        Seconds of a sample at least.
    """
    work = case.work(way, dtype, threads)
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for peer in peers:
        try:
            call, arrays = asked(peer, work)
        except Declined as declined:
            reasons[peer.name] = str(declined)
            continue
        errors[peer.name] = error = referee.worst(work, arrays(call()), peer.profile)
        if error <= 1.0:
            calls[peer.name] = call
        else:
            reasons[peer.name] = f"WRONG: its error is {error:.3g} times the tolerance"
    arithmetic = np.dtype(np.float64 if dtype == "float64" else np.float32)
    ceiling = ceilings.Read(threads) if case.reads else ceilings.MultiplyAdd(arithmetic, threads)
    samples = interleaved({**calls, "ceiling": ceiling}, rounds, least)
    key = (threads, dtype, way, case.group, str(case))
    least_seconds = min(samples["ceiling"])
    rows = [Row(*key, "ceiling", least_seconds, rate=(ceiling.bytes if case.reads else ceiling.flops) / least_seconds)]
    amount = case.bytes(dtype) if case.reads else flops(work)
    ours = samples.get(peers[0].name)
    for peer in peers:
        if peer.name not in calls:
            rows.append(Row(*key, peer.name, error=errors.get(peer.name, math.nan), reason=reasons[peer.name]))
            continue
        seconds = statistics.median(samples[peer.name])
        ratio = statistics.median(x / y for x, y in zip(samples[peer.name], ours, strict=True)) if ours else math.nan
        rows.append(Row(*key, peer.name, seconds, ratio, amount / seconds, error=errors[peer.name]))
    return rows


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Rates as fractions of the best that the machine did in the whole run: of each number of threads, arithmetic, and kind of ceiling."""

    def kind(row: Row) -> tuple[int, bool, bool]:
        reads = row.group in READING
        return row.threads, reads, not reads and row.dtype == "float64"

    best: dict[tuple[int, bool, bool], float] = {}
    for row in rows:
        if row.implementation == "ceiling":
            best[kind(row)] = max(best.get(kind(row), 0.0), row.rate)
    return [replace(row, share=row.rate / best[kind(row)]) for row in rows]


def flops(work: Work) -> int:
    """Of the products alone, for the pairs that are visible: two forward, five backward."""
    q, v, n_k = work.operands["q"], work.operands["v"], work.operands["k"].shape[2]
    pairs = q.shape[2] * n_k if work.visible is None else int(work.visible.sum())
    forward = 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[3] + v.shape[3])
    return forward if work.way == "forward" else forward * 5 // 2


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, least: float = LEAST, rest: float = REST) -> dict[str, list[float]]:
    """Seconds per call, one sample of each call a round; each begins with a call that is not timed, unless calls take long.

    The order turns by one from round to round, so that nobody always follows the same neighbour first.
    """
    times = {}
    for name, call in calls.items():
        call()
        times[name] = seconds_of(call, 1)
        times[name] = min(times[name], seconds_of(call, 1))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            time.sleep(rest)
            if times[name] < 10 * least:
                calls[name]()
            samples[name].append(seconds_of(calls[name], math.ceil(least / times[name])))
    return samples


def seconds_of(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


# ---- what is shown -------------------------------------------------------------------------------------------------------------


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(x) for x in values if not math.isnan(x)]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each number of threads, dtype and way."""
    keys = list(dict.fromkeys((r.threads, r.dtype, r.way) for r in rows))
    return [_table(key, [r for r in rows if (r.threads, r.dtype, r.way) == key]) for key in keys]


def _table(key: tuple[int, str, str], rows: Sequence[Row]) -> Table:
    threads, dtype, way = key
    peers = [name for name in dict.fromkeys(r.implementation for r in rows) if name not in ("ceiling", REFATTN.name)]
    title = f"{way}, {dtype}, {threads} thread{'s' * (threads > 1)}: its time / refattn's"
    best = {r.group in READING: r.rate / r.share / 1e9 for r in rows if r.share > 0}
    ceiling = ", ".join(f"{x:.3g} {'GB' if reads else 'Gflop'}/s" for reads, x in sorted(best.items()))
    table = Table(title=title, caption=f"ceiling: {ceiling}", box=None, padding=(0, 2, 0, 0))
    table.add_column("mask")
    for column in ("B x H x T x D", "refattn ms", "G/s", "of ceiling", *peers):
        table.add_column(column, justify="right")
    groups = list(dict.fromkeys(r.group for r in rows))
    for group in groups:
        of_group = [r for r in rows if r.group == group]
        for shape in dict.fromkeys(r.shape for r in of_group):
            found = {r.implementation: r for r in of_group if r.shape == shape}
            ours = found[REFATTN.name]
            numbers = [_number(1e3 * ours.seconds, ".3g"), _number(ours.rate / 1e9, ".3g"), _number(ours.share, ".0%")]
            if ours.reason:
                numbers[0] = "[red]wrong" if ours.reason.startswith("WRONG") else "-"
            table.add_row(group, shape, *numbers, *(_ratio(found[p]) for p in peers))
    for name, included in (*((g, (g,)) for g in groups), ("full and causal", ("full", "causal"))):
        of_group = [r for r in rows if r.group in included]
        if len({(r.group, r.shape) for r in of_group}) > 1 and set(included) <= set(groups):
            share = geometric_mean(r.share for r in of_group if r.implementation == REFATTN.name)
            means = (geometric_mean(r.ratio for r in of_group if r.implementation == p) for p in peers)
            table.add_row(name, "geometric mean", "", "", _number(share, ".0%"), *(_number(x, ".2f") for x in means), style="bold")
    return table


def _number(x: float, how: str) -> str:
    return "-" if math.isnan(x) else format(x, how)


def _ratio(row: Row) -> str:
    if row.reason.startswith("WRONG"):
        return "[red]wrong"
    return "-" if math.isnan(row.ratio) else f"[{'green' if row.ratio >= 1 else 'red'}]{row.ratio:.2f}"


def remarks(rows: Sequence[Row]) -> list[str]:
    """Who was not timed on what, and why."""
    missing: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r.reason:
            missing.setdefault((r.implementation, r.reason), []).append(f"{r.way} {r.dtype} {r.group} {r.shape}")
    return [
        f"{name} was not timed on {len(where)} case{'s' * (len(where) > 1)} ({where[0]}{', ...' * (len(where) > 1)}): {why}"
        for (name, why), where in missing.items()
    ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line for each implementation and case; empty where nothing was measured."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if isinstance(x, float) and math.isnan(x) else x for name, x in asdict(row).items()})


def write_plot(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Ratios by case, a panel for each number of threads, dtype and way."""
    from matplotlib.figure import Figure

    timed = [r for r in rows if not math.isnan(r.ratio) and r.implementation != REFATTN.name]
    keys = list(dict.fromkeys((r.threads, r.dtype, r.way) for r in timed))
    if not keys:
        raise SystemExit("nothing was timed against refattn: there is nothing to plot")
    peers = list(dict.fromkeys(r.implementation for r in timed))
    figure = Figure(figsize=(9, 1.2 + 4.2 * len(keys)), layout="constrained")
    for axes, key in zip(np.ravel(figure.subplots(len(keys), squeeze=False)), keys, strict=True):
        of_key = [r for r in timed if (r.threads, r.dtype, r.way) == key]
        cases = list(dict.fromkeys(f"{r.group}  {r.shape}" for r in of_key))
        for peer in peers:
            points = [(cases.index(f"{r.group}  {r.shape}"), r.ratio) for r in of_key if r.implementation == peer]
            if points:
                at, ratios = zip(*points, strict=True)
                axes.plot(ratios, at, "o", color=f"C{peers.index(peer)}", label=peer)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="its time / refattn's", yticks=range(len(cases)), yticklabels=cases)
        axes.set_title(f"{key[2]}, {key[1]}, {key[0]} thread{'s' * (key[0] > 1)}")
        axes.invert_yaxis()
        axes.grid(axis="x", which="both", linewidth=0.3)
        axes.legend()
    figure.suptitle(machine, fontsize=8)
    figure.savefig(path, dpi=150)


# ---- a run ---------------------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Processor, width of its vectors as the engine uses them, system, and how busy it was."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{name}, {os.cpu_count()} processors, vectors of {8 * register_bytes()} bits; {platform.system()}, Python {platform.python_version()}{load}"
    )


def installed(peers: Sequence[Peer], screen: Console) -> list[Peer]:
    """Those that can be asked, with a line for each that cannot."""
    there = [peer for peer in peers if not peer.missing()]
    for peer in peers:
        screen.print(
            f"{peer.name}: {peer.version()}" if peer in there else f"{peer.name}: left out, {peer.missing()} is not installed", highlight=False
        )
    return there


def session(threads: int, chosen: argparse.Namespace, peers: Sequence[Peer] = PEERS) -> list[Row]:
    """All that was asked for, with one number of threads, in this process; prints as it goes."""
    screen = Console(width=None if sys.stdout.isatty() else 150)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    screen.print(f"\n{machine()}\n{threads} thread{'s' * (threads > 1)}", highlight=False)
    there = installed([REFATTN, *(p for p in peers if p.name in chosen.peers)], screen)
    asked_for = itertools.product(chosen.dtype, chosen.ways, [case for case in CASES if case.group in chosen.only])
    todo = [(dtype, way, case) for dtype, way, case in asked_for if way in case.ways]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for dtype, way, case in progress.track(todo, description=f"{threads} threads"):
            rows += measure(case, dtype, way, threads, there, QUICK_ROUNDS if chosen.quick else ROUNDS)
    rows = with_shares(rows)
    for table in tables(rows):
        screen.print()
        screen.print(table)
    screen.print()
    for remark in remarks(rows):
        screen.print(remark, markup=False, highlight=False)
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="refattn's CPU engine beside other implementations of softmax attention.")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="numbers of threads, one process each")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--only", nargs="+", default=GROUPS, choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--peers", nargs="+", default=[p.name for p in PEERS], choices=[p.name for p in PEERS])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser.parse_args(arguments)


def limit_pools(threads: int) -> None:
    """The thread pools of a process that is about to start."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    rows: list[Row] = []
    for threads in chosen.threads:
        limit_pools(threads)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            rows += process.submit(session, threads, chosen).result()
    if chosen.csv:
        write_csv(chosen.csv, rows)
    if chosen.plot:
        write_plot(chosen.plot, rows, machine())


if __name__ == "__main__":
    main()
