"""refattn's CPU engine beside other implementations of softmax and of linear-time attention, on this machine.

    python benchmarks/versus.py [--threads 1 2] [--dtype float32] [--ways forward training] [--only full causal] [--peers torch]
                                [--targets] [--quick] [--csv FILE] [--plot FILE.png]

Everything a table shows was measured in one process, in turns: one sample of every implementation, then the next of every one, so that a slow
moment of the machine is slow for all.  A ratio is the median over the rounds of (its time / refattn's time in the same round): above 1, refattn is
faster.  A ceiling (multiply-adds per second; for decoding, bytes per second read from the very keys and values refattn decodes) takes its turns too,
and the share of it that an implementation reaches is the median over the rounds as well.  One whose answer is wrong (see referee.py) is named and not
timed.

One process per number of threads, bound to as many processors, because the pools of some implementations cannot be resized.  torch's threads are
started before Numba's (see peers.start_torch), and the program says how fast torch is in a process where nothing else runs, and how fast it was here.

Decoding steps take turns on several caches of keys and values, as the layers of a model have them, so that they are read from memory.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file

from benchmarks import ceilings, fresh, recurrences, referee, report
from benchmarks.cases import CASES, DTYPES, GROUPS, WAYS, Case
from benchmarks.peers import ALONE, BARE, PEERS, REFATTN, Declined, Peer, Prepared, asked, start_torch
from benchmarks.recurrences import RecurrenceCase
from benchmarks.report import Row
from refattn.engine.simd import register_bytes

#: Seconds of one sample at least, and of rest before it, in which the threads of whoever ran before go to sleep.
LEAST, REST = 0.02, 0.01
#: Samples of each implementation.
ROUNDS, QUICK_ROUNDS = 9, 3
#: Bytes of keys and values over which decoding steps take turns, more than caches hold.
CACHES = 2**28
#: All groups of variants with a state; not asked unless named.
STATE = "state"
#: torch here over torch alone, beyond which ratios to it mean nothing.
DISTURBED = 1.5
#: Length at which memory is measured.
LONG, QUICK_LONG = 131072, 16384


# ---- what is measured ----------------------------------------------------------------------------------------------------------


def measure(case: Case | RecurrenceCase, dtype: str, way: str, threads: int, peers: Sequence[Peer], rounds: int, least: float = LEAST) -> list[Row]:
    """A ceiling and every implementation on one case: judged, then timed in turns if the answer is right.

    Parameters
    ----------
    peers : sequence of Peer
        The first is the one the others are compared with.
    rounds : int
        Samples of each.
    least : float
        Seconds of a sample at least.
    """
    works = [case.work(way, dtype, threads)]
    if case.reads:
        works += [case.work(way, dtype, threads) for _ in range(math.ceil(CACHES / works[0].bytes) - 1)]
    work = works[0]
    key = (threads, dtype, way, case.group, case.B, case.Hq, case.Hkv, case.T, case.S, case.D)
    rows, calls = {}, {}
    for peer in peers:
        try:
            prepared = asked(peer, work)
            first, form = fastest(prepared)
            same = peer.same(work)
            judge = recurrences if case.group in recurrences.GROUPS else referee
            error = judge.worst(same, prepared.arrays(prepared.calls[form]()), peer.profile)
            rows[peer.name] = Row(*key, peer.name, form, first=first, error=error)
            if error <= 1.0:
                calls[peer.name] = in_turn([prepared.calls[form], *(asked(peer, other).calls[form] for other in works[1:])])
            else:
                rows[peer.name] = replace(rows[peer.name], reason=f"WRONG: its error is {error:.3g} times the tolerance")
        except Declined as declined:
            rows[peer.name] = Row(*key, peer.name, reason=str(declined))
        except Exception as failure:  # somebody else's, and the others' turn is not over
            lines = str(failure).splitlines() or [""]
            rows[peer.name] = Row(*key, peer.name, reason=f"FAILED: {type(failure).__name__}: {lines[0]}")
    ceiling: ceilings.Read | ceilings.MultiplyAdd
    if case.reads:
        ceiling = ceilings.Read(threads, [(one.operands["k"], one.operands["v"]) for one in works])
        most, amount = ceiling.bytes, work.bytes
    else:
        ceiling = ceilings.MultiplyAdd(np.dtype(np.float64 if dtype == "float64" else np.float32), threads)
        most, amount = ceiling.flops, work.flops
    samples = interleaved({**calls, report.CEILING: ceiling}, rounds, least)
    ours, at_best = samples.get(peers[0].name), samples[report.CEILING]
    for name in calls:
        times = samples[name]
        seconds = statistics.median(times)
        ratio = statistics.median(x / y for x, y in zip(times, ours, strict=True)) if ours else math.nan
        share = amount / most * statistics.median(y / x for x, y in zip(times, at_best, strict=True))
        rows[name] = replace(rows[name], seconds=seconds, ratio=ratio, rate=amount / seconds, share=share)
    top = Row(*key, report.CEILING, seconds=min(at_best), rate=most / min(at_best))
    return [top, *rows.values()]


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One after the other, a call a time."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)

    def call() -> Any:
        return next(turns)()

    return call


def fastest(prepared: Prepared) -> tuple[float, str]:
    """Seconds of the very first call, and the name of the form whose best of three calls, in turns, is the best."""
    firsts = {form: seconds_of(call, 1) for form, call in prepared.calls.items()}
    first = next(iter(firsts.values()))
    if len(firsts) == 1:
        return first, next(iter(firsts))
    best = dict.fromkeys(firsts, math.inf)
    for _ in range(3):
        for form, call in prepared.calls.items():
            best[form] = min(best[form], seconds_of(call, 1))
    return first, min(best, key=lambda form: best[form])


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, least: float = LEAST, rest: float = REST) -> dict[str, list[float]]:
    """Seconds per call, one sample of each call a round; each begins with a call that is not timed, unless calls take long.

    The order turns by one from round to round, so that nobody always follows the same neighbour first.
    """
    times = {}
    for name, call in calls.items():
        call()
        times[name] = seconds_of(call, 1)
        if times[name] < 10 * least:
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


def torch_seconds(threads: int) -> float:
    """Median seconds of torch on one case, (1, 8, 512, 64) in float32; in a process of its own what refattn is said not to disturb."""
    _bind(threads)
    torch = next(p for p in PEERS if p.name == "torch")
    case = next(c for c in CASES if (c.group, c.T) == ("full", 512))
    call = asked(torch, case.work("forward", "float32", threads)).calls[""]
    return statistics.median(interleaved({"torch": call}, 15)["torch"])


def in_processes(threads: int, quick: bool) -> list[Row]:
    """What only a fresh process shows: memory of a long call, and the first call."""
    length = QUICK_LONG if quick else LONG
    rows = []
    for way in ("forward", "training") if fresh.STATUS.exists() else ():
        extra, seconds = fresh.memory(way, length, threads)
        rows.append(Row(threads, "float32", way, "memory", 1, 1, 1, length, length, 64, report.OURS, seconds=seconds, extra=extra))
    for way, seconds in zip(("compiling", "cached"), fresh.first_call(threads), strict=True):
        rows.append(Row(threads, "float32", way, "first call", 1, 8, 8, 128, 128, 64, report.OURS, seconds=seconds))
    return rows


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


def _bind(threads: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _screen() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)


def session(threads: int, chosen: argparse.Namespace, alone: float = math.nan) -> tuple[list[Row], bool]:
    """All that was asked for, with one number of threads, in this process; prints as it goes.

    Parameters
    ----------
    threads : int
    chosen : argparse.Namespace
    alone : float
        `torch_seconds` of another process; NaN where torch does not take part.

    Returns
    -------
    rows : list of Row
    undisturbed : bool
        Whether torch was as fast here as alone.
    """
    screen = _screen()
    _bind(threads)
    screen.print(f"\n{machine()}\n{threads} thread{'s' * (threads > 1)}", highlight=False)
    there = installed([REFATTN, *(p for p in PEERS if p.name in chosen.peers)], screen)
    states = [recurrences.REFATTN]
    if set(chosen.only) & set(recurrences.GROUPS):
        states += installed([p for p in recurrences.PEERS if p.name in chosen.peers], screen)
    if "torch" in {package for peer in there + states for package in peer.packages}:
        start_torch(threads)
    there += [BARE, ALONE]
    cases = (*CASES, *recurrences.CASES)
    asked_for = itertools.product(chosen.dtype, chosen.ways, [case for case in cases if case.group in chosen.only])
    todo = [(dtype, way, case) for dtype, way, case in asked_for if way in case.ways and dtype in case.dtypes]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for dtype, way, case in progress.track(todo, description=f"{threads} threads"):
            peers = states if case.group in recurrences.GROUPS else there
            rows += measure(case, dtype, way, threads, peers, QUICK_ROUNDS if chosen.quick else ROUNDS)
    for table in report.tables(rows):
        screen.print()
        screen.print(table)
    screen.print()
    for remark in report.remarks(rows):
        screen.print(remark, markup=False, highlight=False)
    undisturbed = True
    if not math.isnan(alone):
        beside = torch_seconds(threads)
        undisturbed = beside <= DISTURBED * alone
        text = f"torch in a process of its own: {1e3 * alone:.3g} ms; here: {1e3 * beside:.3g} ms ({beside / alone:.2f} times)"
        screen.print(text if undisturbed else f"[red]{text}: it is slowed down, do not believe ratios to it", highlight=False)
    return rows, undisturbed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="refattn's CPU engine beside other implementations of softmax attention.")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, available)}), help="numbers of threads, one process each")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="float32 unless said, with --targets all")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    groups = (*GROUPS, STATE, *recurrences.GROUPS)
    parser.add_argument("--only", nargs="+", default=GROUPS, choices=groups, metavar="GROUP", help=", ".join(groups) + f"; {STATE} is those after it")
    names = [p.name for p in (*PEERS, *recurrences.PEERS)]
    parser.add_argument("--peers", nargs="+", default=names, choices=names)
    parser.add_argument("--targets", action="store_true", help="measure first calls and memory too, and say which requirements are met")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}, memory at {QUICK_LONG} instead of {LONG}")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    chosen = parser.parse_args(arguments)
    beyond = [n for n in chosen.threads if not 1 <= n <= available]
    if beyond:
        parser.error(f"--threads {beyond[0]}: this process may use 1 to {available}")
    chosen.only = tuple(group for name in chosen.only for group in (recurrences.GROUPS if name == STATE else (name,)))
    chosen.dtype = chosen.dtype or (DTYPES if chosen.targets else DTYPES[:1])
    return chosen


def limit_pools(threads: int) -> None:
    """The thread pools of a process that is about to start."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    rows: list[Row] = []
    undisturbed = True
    with_torch = "torch" in chosen.peers and not next(p for p in PEERS if p.name == "torch").missing()
    for threads in chosen.threads:
        limit_pools(threads)
        alone = _in_new_process(torch_seconds, threads) if with_torch else math.nan
        found, calm = _in_new_process(session, threads, chosen, alone)
        rows += found
        undisturbed &= calm
        if chosen.csv:
            report.write_csv(chosen.csv, rows)
    if chosen.targets:
        rows += in_processes(max(chosen.threads), chosen.quick)
        screen = _screen()
        screen.print()
        screen.print(report.targets(rows, undisturbed))
    if chosen.csv:
        report.write_csv(chosen.csv, rows)
    if chosen.plot:
        report.write_plot(chosen.plot, rows, machine())


if __name__ == "__main__":
    main()
