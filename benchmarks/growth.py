"""Time and memory of one head against the length of its sequence, up to a million tokens: softmax, windowed, linear, gated delta, Mamba-2.

    python benchmarks/growth.py [--threads 2] [--longest 1048576] [--csv FILE] [--plot FILE.png]

Every point is the median of calls in a process of its own, causal, float32, one head of width 64, and its peak of resident memory beyond the operands
(Linux).  Softmax is measured while a call takes less than `PATIENCE` seconds; beyond, a dotted line goes on at four times the time for twice the
length.

Two floors are drawn beside each line, from `refattn.cost` and what this machine was measured to do at best (ceilings.py): no program that does the
definition's operations is faster than operations / multiply-adds per second, and none that reads its operands and writes its results once is
faster than bytes / bytes per second.  The higher of the two is shown.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file

from benchmarks.fresh import resident

WIDTH, WINDOW = 64, 256
#: The shortest sequence, and the longest unless said.
SHORTEST, LONGEST = 2**7, 2**20
#: Seconds of a call beyond which nothing longer is asked of the same mechanism.
PATIENCE = 60.0
#: Samples of a call, and seconds after which there are no more.
SAMPLES, ENOUGH = 5, 2.0

Sizes = Mapping[str, int]


def token_sizes(length: int) -> dict[str, int]:
    return {"B": 1, "Hq": 1, "Hkv": 1, "T": length, "D": WIDTH, "E": WIDTH}


def pair_sizes(length: int) -> dict[str, int]:
    return {**token_sizes(length), "S": length}


def grouped_sizes(length: int) -> dict[str, int]:
    return {"B": 1, "H": 1, "G": 1, "T": length, "E": WIDTH, "N": WIDTH}


@dataclass(frozen=True)
class Mechanism:
    """What a line of the picture is: a variant, its parameters, and its sizes at a length."""

    variant: str
    sizes: Callable[[int], Sizes]
    params: Mapping[str, Any]


MECHANISMS: Mapping[str, Mechanism] = {
    "softmax": Mechanism("softmax", pair_sizes, {"causal": True}),
    f"window of {WINDOW}": Mechanism("softmax", pair_sizes, {"causal": True, "window": (WINDOW - 1, 0)}),
    "linear": Mechanism("linear", pair_sizes, {"causal": True}),
    "gated delta": Mechanism("gated_delta", token_sizes, {}),
    "Mamba-2": Mechanism("mamba2", grouped_sizes, {}),
}


@dataclass(frozen=True)
class Point:
    """One measurement: seconds, bytes beyond the operands, and the two floors in seconds."""

    mechanism: str
    length: int
    threads: int
    seconds: float
    memory: int
    operations_floor: float
    bytes_floor: float

    @property
    def floor(self) -> float:
        return max(self.operations_floor, self.bytes_floor)


def operands(mechanism: Mechanism, length: int) -> dict[str, np.ndarray]:
    """The required operands as their variant draws them, float32; keys of length one, or a delta rule would grow without bound."""
    from refattn.catalog import variant
    from refattn.spec import shape

    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for o in variant(mechanism.variant).operands:
        if not o.optional:
            full = shape(o.axes, mechanism.sizes(length))
            found[o.name] = rng.standard_normal(full, np.float32) if o.name in "qkvxBC" else np.asarray(o.draw(rng, full), np.float32)
    if "k" in found:
        found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
    return found


def measure(name: str, length: int) -> tuple[float, int]:
    """Median seconds of a call, and bytes that the first long one took beyond its operands; in a process of its own."""
    import refattn as ra

    mechanism = MECHANISMS[name]

    def call(given: Mapping[str, np.ndarray]) -> Any:
        return ra.attend(mechanism.variant, **given, **mechanism.params, backend="cpu")

    call(operands(mechanism, SHORTEST))  # kernels and threads are there
    given = operands(mechanism, length)
    before, seconds = resident("VmRSS"), []
    while len(seconds) < SAMPLES and sum(seconds) < ENOUGH:
        start = time.perf_counter()
        call(given)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), max(0, resident("VmHWM") - before)


def best_speeds(threads: int) -> tuple[float, float]:
    """Floating-point operations and bytes per second, the best of several samples; in a process of its own."""
    from benchmarks.ceilings import MultiplyAdd, Read

    def best(call: Callable[[], None]) -> float:
        call()
        found = []
        for _ in range(9):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return min(found)

    multiply, read = MultiplyAdd(np.dtype(np.float32), threads), Read(threads)
    return multiply.flops / best(multiply), read.bytes / best(read)


def in_new_process(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    for pool in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[pool] = str(threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def points(lengths: Sequence[int], threads: int) -> list[Point]:
    """Every measurement, in a fresh process each."""
    import refattn as ra

    speeds = in_new_process(threads, best_speeds, threads)
    found: list[Point] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("growth", total=len(MECHANISMS) * len(lengths))
        for name, mechanism in MECHANISMS.items():
            previous = 0.0
            for length in lengths:
                if 4.0 * previous < PATIENCE:
                    seconds, memory = in_new_process(threads, measure, name, length)
                    cost = ra.cost(mechanism.variant, **mechanism.sizes(length), **mechanism.params)
                    found.append(Point(name, length, threads, seconds, memory, cost.flops / speeds[0], cost.bytes / speeds[1]))
                    previous = seconds
                bar.advance(task)
    return found


def crossover(found: Sequence[Point], name: str, other: str = "softmax") -> float:
    """Length beyond which `name` is faster than `other`, on straight lines between measurements in logarithms; 0 if always, inf if never."""
    one, two = ({p.length: p.seconds for p in found if p.mechanism == which} for which in (name, other))
    lengths = sorted(one.keys() & two.keys())
    ahead = [math.log(one[n] / two[n]) for n in lengths]
    slower = [n for n, x in enumerate(ahead) if x > 0.0]
    if not slower:
        return 0.0
    if slower[-1] == len(lengths) - 1:
        return math.inf
    n = slower[-1]
    return float(lengths[n] * (lengths[n + 1] / lengths[n]) ** (ahead[n] / (ahead[n] - ahead[n + 1])))


def table(found: Sequence[Point]) -> Table:
    lengths = sorted({p.length for p in found})
    threads = found[0].threads
    shown = Table(
        title=f"one causal head of width {WIDTH}, float32, {threads} thread{'s' if threads > 1 else ''}: time, and memory beyond the operands"
    )
    shown.add_column("T", justify="right")
    for name in MECHANISMS:
        shown.add_column(name, justify="right")
    for length in lengths:
        row = {p.mechanism: p for p in found if p.length == length}
        cells = [f"{_seconds(row[name].seconds)}, {row[name].memory / 2**20:.0f} MiB" if name in row else "-" for name in MECHANISMS]
        shown.add_row(f"{length}", *cells)
    return shown


def _seconds(x: float) -> str:
    return f"{1e3 * x:.3g} ms" if x < 1.0 else f"{x:.3g} s"


def write_csv(path: Path, found: Sequence[Point]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(found[0])))
        writer.writeheader()
        writer.writerows(asdict(p) for p in found)


def write_plot(path: Path, found: Sequence[Point], longest: int) -> None:
    """Time on the left, memory on the right, both axes logarithmic; floors dashed, what was not measured dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    for name in MECHANISMS:
        own = [p for p in found if p.mechanism == name]
        lengths = [p.length for p in own]
        cross = crossover(found, name) if name != "softmax" else 0.0
        ahead = f", ahead of softmax from T = {cross:.0f}" if lengths[0] < cross < math.inf else ""
        (line,) = left.plot(lengths, [p.seconds for p in own], marker="o", markersize=4, label=name + ahead)
        left.plot(lengths, [p.floor for p in own], linestyle="--", linewidth=0.9, color=line.get_color(), alpha=0.7)
        right.plot(lengths, [max(p.memory, 2**16) for p in own], marker="o", markersize=4, color=line.get_color(), label=name)
        last = own[-1]
        if last.length < longest:
            left.plot([last.length, longest], [last.seconds, last.seconds * (longest / last.length) ** 2], linestyle=":", color=line.get_color())
        if ahead:
            at = math.exp(np.interp(math.log(cross), np.log(lengths), np.log([p.seconds for p in own])))
            left.plot([cross], [at], marker="D", color=line.get_color(), markersize=8, markeredgecolor="black", zorder=5)
    left.plot([], [], linestyle="--", color="grey", label="floor: operations or bytes at this machine's best")
    left.plot([], [], linestyle=":", color="grey", label="not measured: four times the time for twice the length")
    for axes, what in ((left, "seconds of a call"), (right, "bytes beyond the operands")):
        axes.set(xscale="log", yscale="log", xlabel="T, tokens", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.suptitle(f"One causal head of width {WIDTH}, float32, {found[0].threads} thread{'s' if found[0].threads > 1 else ''}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    chosen = parser.parse_args(arguments)
    lengths = [SHORTEST * 2**n for n in range(int(math.log2(chosen.longest / SHORTEST)) + 1)]
    found = points(lengths, chosen.threads)
    screen = Console(width=None if sys.stdout.isatty() else 140)
    screen.print(table(found))
    for name in MECHANISMS:
        if name != "softmax":
            cross = crossover(found, name)
            where = "at every length" if cross == 0.0 else "at no length measured" if cross == math.inf else f"from T = {cross:.0f} on"
            screen.print(f"{name}: faster than softmax {where}")
    if chosen.csv:
        write_csv(chosen.csv, found)
    if chosen.plot:
        write_plot(chosen.plot, found, lengths[-1])


if __name__ == "__main__":
    main()
