"""A call cut into blocks, the threads that work on them, and the bar that says how far they are."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numba
import numpy as np

from .prepared import columns_of
from .task import Task

T = TypeVar("T")

#: Bytes of scores that one block of work keeps in two float64 with their bounds.
BLOCK_BYTES = 1 << 20
#: Query-key-channel products from which a progress bar is worth its line.
PROGRESS_FROM = 2e9


@dataclass(frozen=True)
class Block:
    """Some rows of one head: the work of one call of the kernels."""

    b: int
    h: int
    rows: np.ndarray
    columns: int


def blocks(asked: Task) -> Iterator[Block]:
    """The call cut into rows whose scores fit a cache."""
    batch, heads, n_q, n_k = asked.shape
    step = max(2, min(64, BLOCK_BYTES // (24 * max(1, n_k)) // 2 * 2))
    for b in range(batch):
        for h in range(heads):
            for first in range(0, n_q, step):
                part = np.arange(first, min(first + step, n_q))
                seen = int(np.max(asked.last[part], initial=0)) if asked.fill == -math.inf else n_k
                yield Block(b, h, part, columns_of(max(1, min(seen, n_k))))


def each(do: Callable[[Any], None], work: list[Any], text: str, cost: float) -> None:
    """Do all blocks, by as many threads as Numba may use, with a progress bar on a terminal where it takes a while."""
    threads = min(int(numba.get_num_threads()), len(work))
    if threads <= 1 or numba.config.DISABLE_JIT:
        for _ in progress(map(do, work), len(work), text, cost):
            pass
        return
    do(work[0])  # compiles, which threads would do one after the other
    with ThreadPoolExecutor(threads) as pool:
        for _ in progress(pool.map(do, work[1:]), len(work) - 1, text, cost):
            pass


def progress(items: Iterable[T], total: int, text: str, cost: float) -> Iterable[T]:
    """The items, with a bar on a terminal where they cost at least `PROGRESS_FROM`."""
    if not sys.stderr.isatty() or cost < PROGRESS_FROM:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, text, total=total, console=Console(stderr=True), transient=True)
