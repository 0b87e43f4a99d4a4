"""How many threads a kernel gets, and when it may have them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .kernels import kernel

#: Query-key-channel products from which a second thread pays for being woken.
PARALLEL_FROM = 500_000


class _Pool:
    """Numba's threads.  Its workqueue layer aborts the process when two callers enter, and its OpenMP layer a forked child that does."""

    def __init__(self) -> None:
        self.started = self.lost = False
        self.one_at_a_time = threading.Lock()

    def after_fork(self) -> None:
        """A child inherits no threads: it computes alone, to the same bits."""
        self.lost = self.lost or self.started
        self.one_at_a_time = threading.Lock()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.after_fork)


def launch(
    alone: Any, together: Any, element: np.dtype, arguments: tuple[Any, ...], work: float, threads: int | None, compiled: Callable[..., Any] = kernel
) -> None:
    """Call one of two entry points: that for several threads, with their number, if there are several and the work is worth them."""
    if work >= PARALLEL_FROM and not _pool.lost:
        threads = available_threads() if threads is None else threads
        if threads > 1:
            with _pool.one_at_a_time:
                _pool.started = True
                compiled(together, element)(*arguments, threads)
            return
    compiled(alone, element)(*arguments)


def available_threads() -> int:
    """What the caller set, or OMP_NUM_THREADS where it says less than Numba."""
    import numba

    limit = os.environ.get("OMP_NUM_THREADS", "")
    available = int(numba.get_num_threads())
    return min(available, int(limit)) if limit.isdecimal() and int(limit) else available
