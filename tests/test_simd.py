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

import ml_dtypes
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


def unaligned(x):
    """The same numbers from an odd address on."""
    room = np.zeros(x.nbytes + 2, np.uint8)
    start = 1 - room.ctypes.data % 2
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


# ---- memory --------------------------------------------------------------------------------------------------------------------


@FORMATS
def test_a_vector_fills_a_register(dtype):
    @njit
    def count(a):
        return simd.lanes(a)

    assert count(np.empty(0, dtype)) == width(dtype)


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


def place_of(a, index):
    return a.ctypes.data + sum(n * step for n, step in zip(index, a.strides, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.uint8, np.int32, np.int64])
def test_addresses_are_those_of_elements_of_any_type_and_strides(dtype):
    @njit
    def address(a, at):
        return simd.address(a, at)

    whole = np.zeros((4, 5, 6), dtype)
    views = whole[::-2, 1::3], whole.transpose(2, 0, 1), whole[..., ::-2], np.broadcast_to(whole[:1, :, 2:3], (3, 5, 6)), whole[1:, 2, ::5]
    for a in (whole, *views):
        for index in itertools.product(*((0, n - 1) for n in a.shape)):
            assert address(a, index) == place_of(a, index)
    for line in (whole[1, 2], whole[1, ::-2, 3]):
        for at in (0, np.int32(2), np.uint8(1)):
            assert address(line, at) == place_of(line, (int(at),))


@FORMATS
def test_what_stands_at_an_address_may_be_unaligned(dtype):
    @njit
    def move(a, place, target):
        simd.store(a, 0, simd.load_at(a, place))
        simd.store(a, simd.lanes(a), simd.splat_at(a, place))
        simd.put_at(target, simd.number_at(a, place))

    n = width(dtype)
    source = unaligned(np.arange(1, 2 * n + 1, dtype=dtype))
    for at in range(n + 1):
        out, target = np.empty(2 * n, dtype), unaligned(np.zeros(3, dtype))
        move(out, place_of(source, (at,)), place_of(target, (1,)))
        same(out.reshape(2, n), [source[at : at + n], np.full(n, source[at])])
        same(target, [0, source[at], 0])


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), np.uint8(255), np.int32(-(2**31)), np.int64(2**62 + 1)])
def test_any_number_is_put_at_an_address_and_nothing_else_is_written(number):
    @njit
    def put(place, x):
        simd.put_at(place, x)

    target = unaligned(np.zeros(3, number.dtype))
    put(place_of(target, (1,)), number)
    same(target, [0, number, 0])


def test_a_byte_is_a_number_without_a_sign():
    @njit
    def read(places, out):
        for n in range(places.size):
            out[n] = simd.byte_at(places[n])

    stored, found = np.arange(256, dtype=np.uint8), np.empty(256, np.int64)
    read(stored.ctypes.data + np.arange(256), found)
    same(found, np.arange(256))


#: Numbers of two bytes that vectors are read from.
STORED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@FORMATS
@pytest.mark.parametrize("name", ["load", *STORED])
def test_parts_of_vectors_are_read_to_their_end_and_no_further(name, dtype, last_of_a_page):
    part = getattr(simd, f"{name}_part_at")

    @njit
    def read(place, n, out):
        simd.store(out, 0, part(out, place, n))

    n, stored = width(dtype), np.dtype(STORED.get(name, dtype))
    numbers = np.arange(1, n + 4).astype(stored)
    for count in range(1, n + 1):  # the page ends where the part does
        a, out = last_of_a_page(count, stored), np.full(n, np.nan, dtype)
        a[:] = numbers[:count]
        read(a.ctypes.data, count, out)
        same(out, np.where(np.arange(n) < count, numbers[:n].astype(dtype), 0))
    for count in range(-1, n + 3):
        a, out = unaligned(numbers), np.full(n, np.nan, dtype)
        read(a.ctypes.data, np.int32(count), out)
        same(out, np.where(np.arange(n) < count, numbers[:n].astype(dtype), 0))


@FORMATS
@pytest.mark.parametrize("name", STORED)
def test_all_numbers_of_two_bytes_are_read_exactly(name, dtype, last_of_a_page):
    whole, part = getattr(simd, f"{name}_at"), getattr(simd, f"{name}_part_at")

    @njit
    def read(place, out, parts):
        for at in range(0, out.size, simd.lanes(out)):
            simd.store(out, at, whole(out, place + 2 * at))
            simd.store(parts, at, part(out, place + 2 * at, simd.lanes(out)))

    patterns = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # converting a signalling NaN
        expected = patterns.view(STORED[name]).astype(dtype)
    assert np.isinf(expected).sum() == 2 and np.isnan(expected).sum() > 200
    for start in (0, 1):  # of a vector among the numbers
        rolled, wanted = unaligned(np.roll(patterns, start)), np.roll(expected, start)
        found, parts = np.empty_like(expected), np.empty_like(expected)
        read(rolled.ctypes.data, found, parts)
        for one in (found, parts):
            same(one, wanted)
            same(np.signbit(one), np.signbit(wanted))
    last, found = last_of_a_page(width(dtype), np.uint16), np.empty(width(dtype), dtype)
    last[:] = patterns[1 : 1 + last.size]
    read(last.ctypes.data, found, np.empty_like(found))
    same(found, expected[1 : 1 + last.size])


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
def test_blocks_are_transposed_in_and_out_by_any_table_of_addresses(dtype, view):
    @njit
    def in_and_out(rows, n, x, panel, at, step, back, column):
        simd.transpose_in(panel, rows, n, x, panel, at, step)
        simd.transpose_out(panel, at, step, back, n, x)
        simd.gather(panel, rows, n, x, column)

    n = width(dtype)
    whole = unaligned(np.arange(1.0, 3 * 2 * n * (n + 5) + 1).astype(dtype).reshape(3, 2 * n, n + 5))
    a = VIEWS[view](whole)
    places = np.random.default_rng(1).permutation(list(np.ndindex(a.shape[:2])))[: n + 3]
    for first, x, at, step in ((0, 0, 0, n), (3, 5, 7, n + 2), (1, 2, 1, 3 * n)):
        panel, column, back = np.zeros(at + n * step, dtype), np.zeros(n + 1, dtype), VIEWS[view](unaligned(np.zeros_like(whole)))
        rows = [np.array([place_of(one, (i, j, 0)) for i, j in places]) for one in (a, back)]
        in_and_out(rows[0], first, x, panel, at, step, rows[1], column)
        expected, written = np.zeros_like(panel), np.zeros_like(a)
        for lane, (i, j) in enumerate(places[first : first + n]):
            expected[at + lane :: step][:n] = written[i, j, x : x + n] = a[i, j, x : x + n]
            assert column[lane] == a[i, j, x]
        same(panel, expected)
        same(back, written)
        assert column[n] == 0


@FORMATS
def test_rows_of_booleans_are_transposed_into_zeros_and_minus_infinities(dtype):
    @njit
    def hide(rows, n, x, panel, at, step):
        simd.transpose_hidden_in(rows, n, x, panel, at, step)

    n = width(dtype)
    seen = np.random.default_rng(2).choice(np.array([0, 0, 1, 255], np.uint8), (n + 3, n + 5))
    rows = seen.ctypes.data + np.random.default_rng(3).permutation(n + 3) * (n + 5)
    for first, x, at, step in ((0, 0, 0, n), (3, 5, 7, n + 2)):
        panel = np.full(at + n * step, 5.0, dtype)
        hide(rows, first, x, panel, at, step)
        expected = np.full_like(panel, 5.0)
        for lane, row in enumerate((rows[first : first + n] - seen.ctypes.data) // (n + 5)):
            expected[at + lane :: step][:n] = np.where(seen[row, x : x + n] > 0, 0.0, -np.inf)
        same(panel, expected)


@FORMATS
def test_blocks_end_where_their_rows_do(dtype, last_of_a_page):
    @njit
    def move(rows, x, booleans, panel, column):
        n = simd.lanes(panel)
        simd.transpose_in(panel, rows, 0, x, panel, 0, n)
        simd.transpose_out(panel, 0, n, rows, 0, x)
        simd.gather(panel, rows, 0, x + n - 1, column)
        simd.transpose_hidden_in(booleans, 0, 1, panel, 0, n)

    n = width(dtype)
    a = last_of_a_page(n + 1, dtype)
    a[:] = np.arange(n + 1)
    panel, column = np.empty(n * n, dtype), np.empty(n, dtype)
    booleans = np.full(n, a.ctypes.data + a.nbytes - n - 1)
    move(np.full(n, a.ctypes.data), 1, booleans, panel, column)
    same(a, np.arange(n + 1))
    same(column, n)
    same(panel.reshape(n, n)[:, 0] == 0, a.view(np.uint8)[-n:] > 0)


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
    "where_equal": (4, lambda x, mark, y, z: np.where(x == mark, y, z)),
    "where_less": (4, lambda x, limit, y, z: np.where(x < limit, y, z)),
    "between": (4, lambda v, x, low, high: hidden_where(~((x >= low) & (x < high)), v)),
    "bounded": (1, lambda x: np.where(x == -np.inf, np.zeros_like(x), x)),
    "plus_unless_hidden": (2, lambda x, y: hidden_where(y == -np.inf, x + y)),
    "larger": (2, lambda x, y: np.where(x > y, x, y)),
    "smaller": (2, lambda x, y: np.where(x < y, x, y)),
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


@FORMATS
def test_sums_of_sixteen_vectors_are_taken_in_one_order_and_within_its_rounding(dtype):
    """Neighbours are added, then neighbours among the sums: every number meets as many roundings as a register has halves."""

    @njit(error_model="numpy")
    def totals(x, s, at, step):
        a, b, c, d = simd.load(x, (0, 0)), simd.load(x, (1, 0)), simd.load(x, (2, 0)), simd.load(x, (3, 0))
        e, f, g, h = simd.load(x, (4, 0)), simd.load(x, (5, 0)), simd.load(x, (6, 0)), simd.load(x, (7, 0))
        i, j, k, l = simd.load(x, (8, 0)), simd.load(x, (9, 0)), simd.load(x, (10, 0)), simd.load(x, (11, 0))  # noqa: E741
        m, n, o, p = simd.load(x, (12, 0)), simd.load(x, (13, 0)), simd.load(x, (14, 0)), simd.load(x, (15, 0))
        simd.store_totals(s, at, step, (a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p))

    lanes, roundings = width(dtype), math.log2(width(dtype)) * Fraction(1, 2 ** DIGITS[dtype])
    rng = np.random.default_rng(7)
    alike = rng.standard_normal((16, lanes)).astype(dtype)
    apart = np.ldexp(alike, rng.integers(-40, 40, alike.shape)).astype(dtype)
    small = (rng.integers(-9, 9, alike.shape) * np.finfo(dtype).smallest_subnormal).astype(dtype)
    odd = alike.copy()
    odd[3, -1], odd[9, 0], odd[12, :2], odd[15, lanes // 2] = np.inf, np.nan, (np.inf, -np.inf), -np.inf
    for x in (alike, apart, small, odd):
        for at, step in ((0, 4), (5, 9)):
            s = np.full(at + 3 * step + 6, 7.0, dtype)
            totals(x, s, at, step)
            expected, written = x, np.full_like(s, 7.0)
            with np.errstate(invalid="ignore"):
                while expected.shape[1] > 1:
                    expected = expected[:, ::2] + expected[:, 1::2]
            for r in range(4):
                written[at + r * step :][:4] = expected[4 * r : 4 * r + 4, 0]
            same(s, written)
            for vector, one in zip(x, expected[:, 0], strict=True):
                if np.isfinite(vector).all():
                    exact = [Fraction(float(y)) for y in vector]
                    assert abs(Fraction(float(one)) - sum(exact)) <= roundings / (1 - roundings) * sum(map(abs, exact))


def test_a_hint_to_read_may_point_anywhere():
    @njit
    def hint(place):
        simd.prefetch_at(place)
        return place

    for place in (0, -1, 1, 10**15, -(10**15)):
        assert hint(place) == place


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


@FORMATS
def test_exp2_below_is_exp2_down_to_the_normal_numbers_and_then_rounds_once_more_or_is_0(dtype):
    info, rng = np.finfo(dtype), np.random.default_rng(8)
    least = dtype(info.minexp)
    x = np.concatenate([[-0.0, 0.0, -info.smallest_subnormal], -np.arange(-least), rng.uniform(least, 0, 3000), -(rng.uniform(0, 1, 500) ** 9)])
    x = x.astype(dtype)
    expected = lanewise(simd.exp2, x)
    alike = (expected >= 2 * info.smallest_normal) & ((x + dtype(0.5)) % 1 != 0)  # halves may be rounded the other way
    same(lanewise(simd.exp2_below, x)[alike], expected[alike])
    x = np.array([-0.5, -1.5, least, least - dtype(0.25), *rng.uniform(least - 0.5, least + 1, 500)], dtype)
    for a, y in zip(x, lanewise(simd.exp2_below, x), strict=True):
        exact = mpmath.power(2, mpf(float(a)))
        assert abs(mpf(float(y)) - exact) <= claim(simd.__doc__) * mpf(2) ** -DIGITS[dtype] * exact + mpf(float(info.smallest_subnormal)) / 2
    x = np.array([least - dtype(0.5), least - 1, dtype(1.5) * least, -info.max, -np.inf], dtype)
    same(lanewise(simd.exp2_below, x), 0)
    same(lanewise(simd.exp2_below, np.array([np.nan], dtype)), np.nan)


@FORMATS
def test_the_ratio_for_tanh_is_that_of_two_polynomials_by_horners_rule(dtype):
    rng = np.random.default_rng(6)
    z = np.concatenate([rng.uniform(0, 0.625**2, 100), rng.uniform(0, 1, 20) ** 40, [0.0, np.finfo(dtype).smallest_subnormal]]).astype(dtype)
    parts = []
    for coefficients in simd.TANH[from_dtype(np.dtype(dtype))]:
        *rest, last = map(dtype, coefficients)
        y = np.full_like(z, last)
        for c in reversed(rest):
            y = np.array([fused(float(a), float(x), float(c), dtype) for a, x in zip(y, z, strict=True)], dtype)
        parts.append(y)
    same(lanewise(simd.tanh_ratio, z), parts[0] / parts[1])


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
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # refattn is imported before pytest could rewrite its plugin
    tests = [str(here / f"test_{name}.py") for name in ("simd", "stored", "weights")]
    command = [sys.executable, "-c", code, *options, *tests, *sizes]
    run = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
