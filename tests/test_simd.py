"""Vectors as Numba values: every operation against NumPy, exact rationals or mpmath; the error of 2**x is proved."""

import ctypes
import itertools
import math
import mmap
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from mpmath import iv, mpf
from numba import njit
from numba.np.numpy_support import from_dtype

from refattn.engine import panels, simd
from refattn.engine.tasks import take

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
DIGITS = {np.float32: 24, np.float64: 53}


def width(dtype):
    return simd.register_bytes() // np.dtype(dtype).itemsize


# ---- memory --------------------------------------------------------------------------------------------------------------------


@FORMATS
def test_a_vector_fills_a_register(dtype):
    @njit
    def about(a):
        return simd.lanes(a), simd.is_double(a)

    assert about(np.empty(0, dtype)) == (width(dtype), dtype is np.float64)


@FORMATS
def test_load_and_store_move_a_vector_between_any_two_places_and_touch_nothing_else(dtype):
    @njit
    def move(a, at, out, place):
        simd.store(out, place, simd.load(a, at))

    n = width(dtype)
    source = np.arange(1, 3 * n + 1, dtype=dtype)
    for at in range(2 * n):
        out, expected = np.zeros(3 * n, dtype), np.zeros(3 * n, dtype)
        move(source, at, out, 2 * n - at)
        expected[2 * n - at : 3 * n - at] = source[at : at + n]
        same(out, expected)


@FORMATS
def test_indices_may_be_tuples_and_outer_axes_may_have_any_stride(dtype):
    @njit
    def read(a, i, j, at, out):
        simd.store(out, (0, 0), simd.load(a, (i, j, at)))
        simd.store(out, (1, 0), simd.splat(a, (i, j, at)))

    n = width(dtype)
    whole = np.arange(6 * 5 * 3 * n, dtype=dtype).reshape(6, 5, 3 * n)
    for a in (whole, whole[::-2, 1::3], whole.transpose(1, 0, 2)[:, ::-1], np.broadcast_to(whole[:1], (3, 5, 3 * n))):
        for i, j, at in itertools.product((0, a.shape[0] - 1), (0, a.shape[1] - 1), (0, 1, 2 * n)):
            out = np.empty((2, n), dtype)
            read(a, i, j, at, out)
            same(out, [a[i, j, at : at + n], np.full(n, a[i, j, at])])


@pytest.fixture
def last_of_a_page():
    """The last elements before memory that ends the process when it is touched."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    forbidden = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(forbidden, mmap.PAGESIZE, 0) == 0
    yield lambda count, dtype: np.frombuffer(memory, dtype, count, mmap.PAGESIZE - count * np.dtype(dtype).itemsize)
    assert protect(forbidden, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@FORMATS
def test_parts_of_vectors_touch_nothing_past_their_end(dtype, last_of_a_page):
    @njit
    def double(a, n, out):
        v = simd.load_part(a, 0, n)
        simd.store(out, 0, v)
        simd.store_part(a, 0, n, simd.add(v, v))

    n = width(dtype)
    numbers = np.arange(1, n + 4, dtype=dtype)
    for count in range(1, n + 1):  # the page ends where the part does
        a, out = last_of_a_page(count, dtype), np.full(n, np.nan, dtype)
        a[:] = numbers[:count]
        double(a, count, out)
        same(out, np.where(np.arange(n) < count, numbers[:n], 0))
        same(a, 2 * numbers[:count])
    for count in range(-1, n + 3):  # what follows the part stands
        a, out, part = numbers.copy(), np.full(n, np.nan, dtype), np.arange(n + 3) < min(count, n)
        double(a, count, out)
        same(out, np.where(part, numbers, 0)[:n])
        same(a, np.where(part, 2 * numbers, numbers))


@FORMATS
def test_numbers_fill_vectors_and_lanes_are_numbers_again(dtype):
    @njit
    def through(a, out):
        n = simd.lanes(a)
        simd.store(out, 0, simd.fill(out, 3))
        simd.store(out, n, simd.fill(out, 0.1))
        v = simd.load(a, 0)
        for lane in range(n):
            out[2 * n + lane] = 2 * simd.lane(v, lane)

    n = width(dtype)
    a, out = np.arange(1, n + 1, dtype=dtype), np.empty(3 * n, dtype)
    through(a, out)
    same(out.reshape(3, n), [np.full(n, 3, dtype), np.full(n, 0.1, dtype), 2 * a])


VIEWS = {
    "whole": lambda x: x,
    "reversed": lambda x: x[::-1, ::-1],
    "transposed": lambda x: x.transpose(1, 0, 2),
    "every other": lambda x: x[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
@FORMATS
def test_blocks_are_transposed_in_and_out_by_any_table_of_rows(dtype, view):
    @njit
    def in_and_out(a, rows, n, x, panel, at, step, back, column):
        simd.transpose_in(a, rows, n, x, panel, at, step)
        simd.transpose_out(panel, at, step, back, rows, n, x)
        simd.gather(a, rows, n, x, column)

    n = width(dtype)
    whole = np.arange(1.0, 3 * 2 * n * (n + 5) + 1).astype(dtype).reshape(3, 2 * n, n + 5)
    a = VIEWS[view](whole)
    places = np.random.default_rng(1).permutation(list(np.ndindex(a.shape[:2])))[: n + 3]
    rows = places @ np.array(a.strides[:2])
    for first, x, at, step in ((0, 0, 0, n), (3, 5, 7, n + 2), (1, 2, 1, 3 * n)):
        panel, column, back = np.zeros(at + n * step, dtype), np.zeros(n + 1, dtype), VIEWS[view](np.zeros_like(whole))
        in_and_out(a, rows, first, x, panel, at, step, back, column)
        expected, written = np.zeros_like(panel), np.zeros_like(a)
        for lane, (i, j) in enumerate(places[first : first + n]):
            expected[at + lane :: step][:n] = written[i, j, x : x + n] = a[i, j, x : x + n]
            assert column[lane] == a[i, j, x]
        same(panel, expected)
        same(back, written)
        assert column[n] == 0


def test_every_task_is_taken_once_whoever_asks():
    @njit(nogil=True)
    def takes(counter, last, mine):
        task = take(counter)
        while task < last:
            mine[task] += 1
            task = take(counter)

    counter, last = np.zeros(1, np.int64), 200_000
    takes(counter, 0, np.zeros(1, np.int64))  # compiles, and takes number 0
    taken = np.zeros((4, last), np.int64)
    threads = [threading.Thread(target=takes, args=(counter, last, mine)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(taken.sum(axis=0), [0, *[1] * (last - 1)])
    assert counter[0] == last + len(threads)


# ---- arithmetic ----------------------------------------------------------------------------------------------------------------


def unkind(dtype, count):
    """Every combination of `count` awkward numbers, then random ones, of any magnitude and about 1."""
    info = np.finfo(dtype)
    edges = [0.0, info.smallest_subnormal, info.tiny, info.eps, 1.0, 1.0 + info.eps, 3.0, info.max, np.inf]
    edges = [*edges, *(-x for x in edges), np.nan] if count < 4 else [-np.inf, -1.0, -0.0, info.tiny, np.inf, np.nan]
    combined = np.array(list(itertools.product(edges, repeat=count)), dtype).T
    rng = np.random.default_rng(count)
    scattered = np.ldexp(rng.uniform(-2, 2, (count, 1500)), rng.integers(info.minexp - 20, info.maxexp - 1, (count, 1500))).astype(dtype)
    return np.concatenate([combined, scattered, rng.standard_normal((count, 1500)).astype(dtype)], axis=1)


def lanewise(operation, *arrays):
    """The operation on whole arrays of any length."""
    calls = {
        1: lambda x, at: operation(simd.load(x, (0, at))),
        2: lambda x, at: operation(simd.load(x, (0, at)), simd.load(x, (1, at))),
        3: lambda x, at: operation(simd.load(x, (0, at)), simd.load(x, (1, at)), simd.load(x, (2, at))),
        4: lambda x, at: operation(simd.load(x, (0, at)), simd.load(x, (1, at)), simd.load(x, (2, at)), simd.load(x, (3, at))),
    }
    call = njit(error_model="numpy")(calls[len(arrays)])

    @njit(error_model="numpy")
    def apply(x, out):
        for at in range(0, out.size, simd.lanes(out)):
            simd.store(out, at, call(x, at))

    x = np.stack(arrays)
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % width(x.dtype))))
    out = np.empty_like(x[0])
    apply(x, out)
    return out[: arrays[0].size]


def fused(x, y, z, dtype):
    """x * y + z rounded once, by rational arithmetic."""
    if not all(map(math.isfinite, (x, y, z))):
        return z if math.isfinite(x) and math.isfinite(y) else x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    info = np.finfo(dtype)
    least = Fraction(float(info.smallest_subnormal))
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length() - 1  # at most 1 below the right one
    exponent += abs(exact) >= Fraction(2) ** (exponent + 1)
    unit = max(Fraction(2) ** (exponent + 1 - DIGITS[dtype]), least)
    rounded = round(exact / unit) * unit  # ties to even
    return float(rounded) if abs(rounded) <= Fraction(float(info.max)) else math.inf if rounded > 0 else -math.inf


@FORMATS
def test_fma_rounds_once(dtype):
    x, y, z = unkind(dtype, 3)
    z[-1024:] = -(x[-1024:] * y[-1024:])  # leaves the rounding error of the product
    expected = [fused(float(a), float(b), float(c), dtype) for a, b, c in zip(x, y, z, strict=True)]
    same(lanewise(simd.fma, x, y, z), np.array(expected, dtype))


def hidden_where(condition, x):
    return np.where(condition, -np.inf, x).astype(x.dtype)


#: Operation, vectors it takes, and the same in NumPy.
LANEWISE = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "div": (2, np.divide),
    "absolute": (1, np.abs),
    "with_sign": (2, np.copysign),
    "where_less": (4, lambda x, limit, y, z: np.where(x < limit, y, z)),
    "between": (4, lambda v, x, low, high: hidden_where(~((x >= low) & (x < high)), v)),
    "bounded": (1, lambda x: np.where(x == -np.inf, np.zeros_like(x), x)),
    "plus_unless_hidden": (2, lambda x, y: hidden_where(y == -np.inf, x + y)),
    "times_unless_zero": (2, lambda x, y: np.where(x == 0, np.zeros_like(x), x * y)),
}


@FORMATS
@pytest.mark.parametrize("name", LANEWISE)
def test_lane_by_lane_is_what_numpy_computes_to_the_bit(name, dtype):
    count, reference = LANEWISE[name]
    arrays = unkind(dtype, count)
    with np.errstate(all="ignore"):
        expected = reference(*arrays)
    result = lanewise(getattr(simd, name), *arrays)
    same(result, expected)
    numbers = ~np.isnan(expected)
    same(np.signbit(result)[numbers], np.signbit(expected)[numbers])


@FORMATS
def test_the_maximum_is_nan_where_either_is_and_a_zero_among_zeros(dtype):
    x, y = unkind(dtype, 2)
    same(lanewise(simd.maximum, x, y), np.maximum(x, y))


@FORMATS
def test_lanes_are_summed_by_halves_and_the_largest_of_them_is_nan_where_any_is(dtype):
    @njit(error_model="numpy")
    def reduce(x, sums, tops):
        for n in range(sums.size):
            v = simd.load(x, (n, 0))
            sums[n], tops[n] = simd.total(v), simd.widest(v)

    rows = unkind(dtype, 1).ravel()
    rows = np.random.default_rng(5).permutation(np.concatenate([rows, rows[np.isfinite(rows)]] * 3))
    x = rows[: rows.size // width(dtype) * width(dtype)].reshape(-1, width(dtype))
    sums, tops = np.empty(len(x), dtype), np.empty(len(x), dtype)
    reduce(x, sums, tops)
    same(tops, x.max(axis=1))
    with np.errstate(all="ignore"):
        while x.shape[1] > 1:
            x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    same(sums, x[:, 0])
    assert np.isfinite(sums).any() and np.isnan(tops).any()


def test_a_hint_to_read_may_point_anywhere():
    @njit
    def hint(a, at):
        simd.prefetch(a, at)
        return a[0]

    for at in (0, 10**15, -(10**15)):
        assert hint(np.ones(1, np.float32), at) == 1


# ---- 2**x ----------------------------------------------------------------------------------------------------------------------

PIECES = 1024  # of the interval, each examined by interval arithmetic


def claim(page):
    """The error bound a docstring states, in units roundoff."""
    return float(re.search(r"(?:below|within) ([\d.]+) units", page)[1])


def largest(x):
    return mpf(abs(x).b)


def polynomial(coefficients, x):
    total = iv.mpf(0)
    for c in reversed(coefficients):
        total = total * x + c
    return total


def enclosed(coefficients, piece):
    """A polynomial's values on an interval, by the mean value theorem."""
    slope = [n * c for n, c in enumerate(coefficients)][1:]
    return polynomial(coefficients, piece.mid) + polynomial(slope, piece) * (piece - piece.mid)


def rounding_by_horner(coefficients, piece, digits):
    """How far Horner's rule with fma may be from the polynomial: each step rounds once, by half a last place of the largest it can be."""
    y, error = iv.mpf(coefficients[-1]), iv.mpf(0)
    for c in reversed(coefficients[:-1]):
        y, error = y * piece + c, abs(piece) * error
        _, exponent = mpmath.frexp(largest(abs(y) + error))
        error += mpf(2) ** (exponent - digits - 1)
    return error


@pytest.fixture(autouse=True)
def precise():
    before, iv.prec = iv.prec, 120
    with mpmath.workprec(120):
        yield
    iv.prec = before


@FORMATS
def test_the_error_of_exp2_is_proved(dtype):
    """|computed / 2**f - 1| on [-1/2, 1/2]: polynomial against Taylor series, and roundings.  f, and adding n to the exponent, are exact."""
    coefficients, digits = simd.EXP2[from_dtype(np.dtype(dtype))], DIGITS[dtype]
    taylor = [iv.log(2) ** n / math.factorial(n) for n in range(25)]
    rest = 2 * (iv.log(2) / 2) ** 25 / math.factorial(25)  # its terms fall by more than half each
    difference = [c - t for c, t in itertools.zip_longest(map(iv.mpf, coefficients), taylor, fillvalue=iv.mpf(0))]
    worst = 0
    for n in range(PIECES):
        piece = iv.mpf([mpf(n) / PIECES - 0.5, mpf(n + 1) / PIECES - 0.5])
        off = abs(enclosed(difference, piece)) + rest + rounding_by_horner(coefficients, piece, digits)
        worst = max(worst, largest(off / iv.exp(piece * iv.log(2))))
    assert 1 < worst * mpf(2) ** digits < claim(simd.__doc__)


def test_exp2_in_float32_is_as_exact_as_proved_all_over_its_range():
    limits = np.array([-126, np.nextafter(np.float32(128), np.float32(0))], np.float32)
    negative, positive = limits.view(np.int32) & 0x7FFFFFFF
    for most, sign in ((negative, -1), (positive, 1)):
        x = sign * np.arange(0, most + 1, 211, dtype=np.int32).view(np.float32)
        x = np.append(x, limits)
        exact = np.exp2(x.astype(np.float64))  # its own error is 2**-29 of what is examined
        assert np.max(np.abs(lanewise(simd.exp2, x) / exact - 1)) < claim(simd.__doc__) * 2.0**-24


def test_exp2_in_float64_is_as_exact_as_proved_all_over_its_range():
    rng = np.random.default_rng(2)
    last = np.nextafter(1024.0, 0.0)
    edges = [-1022.0, last, -0.5, 0.5, -1.5, 2.5, 1e-300, 5e-324, -0.0, *(np.nextafter(n + 0.5, s * 2000) for n in (-3, 0, 7) for s in (-1, 1))]
    x = np.concatenate([edges, rng.uniform(-1022, last, 2000), rng.uniform(-0.5, 0.5, 2000), rng.uniform(-2, 2, 500) ** 21])
    x = x[(x >= -1022) & (x <= last)]
    errors = [abs(y / mpmath.power(2, mpf(a)) - 1) for a, y in zip(x, map(mpf, lanewise(simd.exp2, x)), strict=True)]
    assert max(errors) < claim(simd.__doc__) * mpf(2) ** -53


@FORMATS
def test_exp2_of_whole_numbers_is_exact_and_beyond_the_normal_numbers_0_or_infinite(dtype):
    info = np.finfo(dtype)
    least, most = dtype(info.minexp), dtype(info.maxexp)

    def powers(x):
        return lanewise(simd.exp2, np.array(x, dtype))

    whole = np.arange(info.minexp, info.maxexp)
    same(powers(whole), np.ldexp(dtype(1), whole))
    same(powers([0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.tiny]), 1)
    same(powers([np.nextafter(least, -most), 2 * least, -info.max, -np.inf]), 0)
    same(powers([most, 2 * most, info.max, np.inf]), np.inf)
    same(powers([np.nan, -np.nan]), np.nan)
    below = powers([np.nextafter(most, dtype(0))])
    assert np.isfinite(below) and below > info.max / 1.001


# ---- tanh ----------------------------------------------------------------------------------------------------------------------


def tanh(x):
    @njit(error_model="numpy")
    def apply(x, out):
        for at in range(0, out.size, simd.lanes(out)):
            simd.store(out, at, panels.tanh(simd.load(x, at), out))

    padded = np.pad(x, (0, -x.size % width(x.dtype)))
    out = np.empty_like(padded)
    apply(padded, out)
    return out[: x.size]


def test_tanh_in_float32_is_within_its_bound_all_over_its_range():
    bits = np.arange(1, int(np.float32(np.inf).view(np.int32)), 97, dtype=np.int32)
    x = bits.view(np.float32)
    normal = x >= np.finfo(np.float32).tiny
    result, exact = tanh(x), np.tanh(x.astype(np.float64))
    assert np.max(np.abs(result[normal] / exact[normal] - 1)) < claim(panels.tanh.__doc__) * 2.0**-24
    same(result[~normal], x[~normal])
    same(tanh(-x), -result)


def test_tanh_in_float64_is_within_its_bound():
    rng = np.random.default_rng(3)
    near = [0.625, np.nextafter(0.625, 0), np.nextafter(0.625, 1)]
    x = np.concatenate([near, rng.uniform(0, 0.7, 3000), rng.uniform(0.6, 20, 3000), rng.uniform(0, 1, 1000) ** 40])
    result = tanh(x)
    errors = [abs(mpf(y) / mpmath.tanh(mpf(a)) - 1) for a, y in zip(x, result, strict=True)]
    assert max(errors) < claim(panels.tanh.__doc__) * mpf(2) ** -53
    same(tanh(-x), -result)


@FORMATS
def test_tanh_keeps_zeros_small_numbers_infinities_and_nan(dtype):
    info = np.finfo(dtype)
    small = [0.0, info.smallest_subnormal, info.tiny, 3 * info.tiny]
    x = np.array([*small, 100.0, info.max, np.inf, np.nan], dtype)
    expected = np.array([*small, 1.0, 1.0, 1.0, np.nan], dtype)
    for sign in (1, -1):
        same(tanh(sign * x), sign * expected)
        same(np.signbit(tanh(sign * x))[expected == 0], sign < 0)


# ---- widths --------------------------------------------------------------------------------------------------------------------

OTHER_WIDTHS = [n for n in (16, 32, 64) if n != simd.register_bytes()]


@pytest.mark.parametrize("bytes_", OTHER_WIDTHS)
def test_everything_here_and_the_kernels_hold_at_other_register_widths(bytes_, tmp_path):
    """LLVM splits or shortens vectors that are not the host's own, so every width runs anywhere."""
    here = Path(__file__).parent
    code = f"import sys, pytest; from refattn.engine import simd; simd.register_bytes = lambda: {bytes_}; sys.exit(pytest.main(sys.argv[1:]))"
    sizes = [f"{here / 'test_engine.py'}::test_every_size_gives_what_the_definition_gives[{n}-float32]" for n in (2, 49)]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not other_register_widths and not proved and not all_over_its_range"]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}  # the cache does not know the width
    command = [sys.executable, "-c", code, *options, str(here / "test_simd.py"), *sizes]
    run = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
