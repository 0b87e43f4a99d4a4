"""Rows of operands where they stand: what they decode to, to the bit, and their addresses in pages, sequences and groups."""

import itertools
import mmap

import ml_dtypes
import numpy as np
import pytest
from test_simd import last_of_a_page, place_of, unaligned, width  # noqa: F401 - a fixture

from refattn.engine.call import ONE_PAGE
from refattn.engine.stored import BFLOAT16, BYTE, FLOAT16, SAME, bytes_of, decode_row, decode_rows, find_keys, find_rows, point_to

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
ONE_BYTE = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
#: Codes, and what they stand for; None is the kernel's own format.
STORED = {SAME: None, BFLOAT16: ml_dtypes.bfloat16, FLOAT16: np.float16, BYTE: ONE_BYTE[0], BYTE + 1: ONE_BYTE[1]}
CODES = pytest.mark.parametrize("code", STORED, ids=["same", "bfloat16", "float16", "e4m3fn", "e5m2"])
UNTOUCHED = 7.0


def tables(dtype):
    return np.stack([np.arange(256, dtype=np.uint8).view(kind).astype(dtype) for kind in ONE_BYTE])


def stored(code, dtype):
    return np.dtype(STORED[code] or dtype)


def same_bits_of_numbers(found, expected):
    same(found, expected)
    same(np.signbit(found), np.signbit(expected))


@FORMATS
@CODES
def test_a_row_of_any_length_is_decoded_to_the_bit_and_followed_by_zeros_to_a_whole_vector(code, dtype):
    kind, step, spelled = stored(code, dtype), width(dtype), tables(dtype)
    rng = np.random.default_rng(1)
    for n, at in itertools.product(range(2 * step + 3), (0, 5)):
        numbers = unaligned(rng.normal(0, 3, n + 2 * step).astype(kind))
        numbers[n:] = np.nan  # follows the row, and is none of its business
        numbers[: min(n, 2)] = (-0.0, np.finfo(np.float32).tiny)[: min(n, 2)]
        target = np.full(at + n + 2 * step, UNTOUCHED, dtype)
        expected = target.copy()
        expected[at : at + -(-n // step) * step] = 0.0
        expected[at : at + n] = numbers[:n].astype(dtype)
        assert decode_row(numbers.ctypes.data, code, spelled, n, target, at) == 0.0
        same_bits_of_numbers(target, expected)


@FORMATS
@CODES
def test_nothing_past_a_row_is_read(code, dtype, last_of_a_page):  # noqa: F811
    kind, spelled = stored(code, dtype), tables(dtype)
    for n in range(2 * width(dtype) + 2):
        numbers = last_of_a_page(n, np.uint8 if kind.itemsize == 1 else np.uint16 if kind.itemsize == 2 else kind).view(kind) if n else None
        place = numbers.ctypes.data if n else last_of_a_page(1, np.uint8).ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
        target = np.empty(n + width(dtype), dtype)
        if n:
            numbers[:] = np.arange(1, n + 1).astype(kind)
        assert decode_row(place, code, spelled, n, target, 0) == 0.0
        same(target[:n], np.arange(1, n + 1).astype(kind).astype(dtype))


@FORMATS
@CODES
def test_one_number_that_is_not_finite_is_noticed_wherever_it_stands(code, dtype):
    kind, spelled = stored(code, dtype), tables(dtype)
    most = ml_dtypes.finfo(kind).max
    found = {odd for odd in (np.inf, -np.inf, np.nan) if not np.isfinite(np.array(odd).astype(kind).astype(dtype))}
    assert len(found) == 3
    for n in (1, width(dtype) - 1, width(dtype), 2 * width(dtype) + 1):
        target = np.empty(n + width(dtype), dtype)
        numbers = np.full(n, most, kind)
        assert decode_row(numbers.ctypes.data, code, spelled, n, target, 0) == 0.0
        for at, odd in itertools.product(range(n), found):
            numbers = np.full(n, most, kind)
            numbers[at] = odd
            assert np.isnan(decode_row(numbers.ctypes.data, code, spelled, n, target, 0))
            same(target[:n], numbers.astype(dtype))


@FORMATS
@CODES
def test_rows_are_decoded_to_places_of_their_own_and_all_are_looked_at(code, dtype):
    kind, spelled, step = stored(code, dtype), tables(dtype), width(dtype)
    n, d, row_step = 5, step + 1, 2 * step + 3
    a = np.random.default_rng(2).standard_normal((n, d + 4)).astype(kind)
    order = np.array([3, 0, 4, 1, 1])
    places = a.ctypes.data + order * a.strides[0]
    target = np.full(n * row_step, UNTOUCHED, dtype)
    assert decode_rows(places, n, code, spelled, d, target, row_step) == 0.0
    expected = np.full((n, row_step), UNTOUCHED, dtype)
    expected[:, : 2 * step] = 0.0
    expected[:, :d] = a[order, :d].astype(dtype)
    same(target.reshape(n, row_step), expected)
    for row in range(n):
        odd = a.copy()
        odd[row, d - 1] = np.nan
        result = decode_rows(odd.ctypes.data + order * odd.strides[0], n, code, spelled, d, target, row_step)
        assert np.isnan(result) == (row in order)

    pointers = np.zeros(n + 1, np.int64)
    point_to(target, n, row_step, pointers)
    same(pointers, [*(place_of(target, (r * row_step,)) for r in range(n)), 0])


@FORMATS
@CODES
def test_bytes_of_a_number(code, dtype):
    assert bytes_of(code, np.empty(0, dtype)) == stored(code, dtype).itemsize


#: Views of operands as bytes, whose last axis alone is contiguous.
VIEWS = {
    "whole": lambda x: x,
    "rows backwards": lambda x: x[:, :, ::-1],
    "every other head, entries backwards": lambda x: x[::-1, ::2],
    "rows before heads": lambda x: x.transpose(0, 2, 1, 3),
    "broadcast over heads": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "part of a row": lambda x: x[..., 3:9],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("page_size", [1, 3, 7])
def test_keys_are_found_in_pages_of_any_size_and_order(view, page_size):
    x = VIEWS[view](np.zeros((8, 8, 8, 12), np.uint8))
    pages = np.random.default_rng(3).integers(0, x.shape[0], (3, 8))
    for b, g, row in ((0, 0, 0), (2, x.shape[1] - 1, x.shape[2] - page_size)):
        for first, n in itertools.product((0, 1, page_size, page_size + 2), (0, 1, 2, page_size, 3 * page_size + 1)):
            if first + n > page_size * pages.shape[1]:
                continue
            places = np.zeros(n + 1, np.int64)
            find_keys(x, pages, page_size, b, g, row, first, n, places)
            keys = [divmod(j, page_size) for j in range(first, first + n)]
            same(places, [*(place_of(x, (pages[b, page], g, row + inside, 0)) for page, inside in keys), 0])


@pytest.mark.parametrize("view", VIEWS)
def test_keys_without_pages_follow_one_another(view):
    x = VIEWS[view](np.zeros((6, 6, 9, 12), np.uint8))
    pages = np.array([[0], [2], [2]])
    for b, row, first in ((0, 0, 0), (1, 2, 1), (2, 1, 2)):
        places = np.zeros(4, np.int64)
        find_keys(x, pages, ONE_PAGE, b, 1, row, first, 3, places)
        same(places, [*(place_of(x, (pages[b, 0], 1, row + first + r, 0)) for r in range(3)), 0])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("group", [1, 2, 3])
def test_rows_of_a_group_are_numbered_query_by_query_and_the_last_is_repeated(view, group):
    x = VIEWS[view](np.zeros((4, 12, 12, 12), np.uint8))
    for batch, row, g, begin, end, n in ((0, 0, 0, 0, 5, 5), (1, 2, 1, 4, 9, 8), (1, 1, 0, 0, 1, 3)):
        places = np.zeros(n + 1, np.int64)
        find_rows(x, batch, row, g, group, begin, end, n, places)
        rows = [min(r, end - 1) for r in range(begin, begin + n)]
        same(places, [*(place_of(x, (batch, g * group + r % group, row + r // group, 0)) for r in rows), 0])
