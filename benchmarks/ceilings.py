"""What the machine can do at best: multiply-adds per second and bytes read per second, with the engine's own vectors.

No kernel of attention can do better than the first, and none that reads every key from memory better than the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numba import njit, prange

from refattn.engine.simd import add, fill, fma, lanes, load, store

#: Independent sums, more than any core needs to hide the latency of a multiply-add, and few enough for 16 registers with two operands.
SUMS = 12
#: Bytes read, many times what caches hold.
READ = 2**28


@njit(error_model="numpy", nogil=True, cache=True)
def multiply_adds(a, n):
    """n times twelve independent multiply-adds of whole vectors, in registers."""
    x, y = load(a, 0), load(a, lanes(a))
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = s10 = s11 = fill(a, 0.0)
    for _ in range(n):
        s0, s1, s2, s3 = fma(x, s0, y), fma(x, s1, y), fma(x, s2, y), fma(x, s3, y)
        s4, s5, s6, s7 = fma(x, s4, y), fma(x, s5, y), fma(x, s6, y), fma(x, s7, y)
        s8, s9, s10, s11 = fma(x, s8, y), fma(x, s9, y), fma(x, s10, y), fma(x, s11, y)
    one, two, three = add(add(s0, s1), add(s2, s3)), add(add(s4, s5), add(s6, s7)), add(add(s8, s9), add(s10, s11))
    store(a, 2 * lanes(a), add(add(one, two), three))  # a result nobody stores would not be computed


@njit(error_model="numpy", nogil=True, parallel=True, cache=True)
def multiply_adds_together(a, n, threads):
    for t in prange(threads):
        multiply_adds(a[t], n)


@njit(error_model="numpy", nogil=True, cache=True)
def sum_of(a, result):
    """Reads every element once, four quarters at a time: one after the other they come from a cache at two thirds of the speed."""
    step, quarter = lanes(a), a.size // 4
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = fill(a, 0.0)
    for at in range(0, quarter - 2 * step + 1, 2 * step):
        s0, s1 = add(s0, load(a, at)), add(s1, load(a, at + step))
        s2, s3 = add(s2, load(a, quarter + at)), add(s3, load(a, quarter + at + step))
        s4, s5 = add(s4, load(a, 2 * quarter + at)), add(s5, load(a, 2 * quarter + at + step))
        s6, s7 = add(s6, load(a, 3 * quarter + at)), add(s7, load(a, 3 * quarter + at + step))
    store(result, 0, add(add(add(s0, s1), add(s2, s3)), add(add(s4, s5), add(s6, s7))))


@njit(error_model="numpy", nogil=True, parallel=True, cache=True)
def sum_together(a, results, threads):
    for t in prange(threads):
        sum_of(a[t], results[t])


class MultiplyAdd:
    """Calls that do nothing but multiply and add.

    Parameters
    ----------
    dtype : dtype
        float32 or float64.
    threads : int
    """

    def __init__(self, dtype: np.dtype, threads: int) -> None:
        self.a, self.threads = np.full((threads, 3 * 64), 0.5, dtype), threads
        self.n = 4_000_000  # some 10 ms, so that waking a thread does not count

    def __call__(self) -> None:
        if self.threads == 1:
            multiply_adds(self.a[0], self.n)
        else:
            multiply_adds_together(self.a, self.n, self.threads)

    @property
    def flops(self) -> int:
        """Floating-point operations of one call: two for each lane of a multiply-add."""
        return 2 * SUMS * _lanes(self.a) * self.n * self.threads


class Read:
    """Calls that do nothing but read memory.

    Parameters
    ----------
    threads : int
    turns : sequence of sequence of ndarray, optional
        What one call reads, what the next, and so on around; contiguous, and each of a size that `threads` divides.  An array of its own unless said.
        What another call reads in its turns is what it should be compared on: how fast memory is read depends on where the system has put it.
    """

    def __init__(self, threads: int, turns: Sequence[Sequence[np.ndarray]] | None = None) -> None:
        self.threads, turns = threads, [[np.ones(READ // 4, np.float32)]] if turns is None else turns
        self.turns = [[x.reshape(threads, -1).view(np.float32) for x in arrays] for arrays in turns]
        self.next = itertools.cycle(self.turns)
        self.results = np.zeros((threads, 16), np.float32)

    def __call__(self) -> None:
        for a in next(self.next):
            if self.threads == 1:
                sum_of(a[0], self.results[0])
            else:
                sum_together(a, self.results, self.threads)

    @property
    def bytes(self) -> int:
        """Bytes read by one call."""
        return sum(a.nbytes for a in self.turns[0])


@njit(error_model="numpy", cache=True)
def _lanes(a):
    return lanes(a)
