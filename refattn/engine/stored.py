"""Rows of operands where they stand: one after another or in pages, in the kernel's own format or a narrower one.

Operands reach kernels as bytes, four axes of which the last is contiguous, with a code for what the bytes mean.  A kernel asks for addresses of rows:
those of the operand itself where its elements are the kernel's, or those of a few rows decoded into the kernel's own memory.
"""

from __future__ import annotations

from numba import njit

from .simd import (
    add,
    address,
    bfloat16_at,
    bfloat16_part_at,
    byte_at,
    fill,
    float16_at,
    float16_part_at,
    lanes,
    load_at,
    load_part_at,
    prefetch_at,
    store,
    sub,
    total,
)

#: What bytes mean: elements of the kernel, or one of the others; BYTE + n stands for one-byte numbers that row n of a table spells out.
SAME, BFLOAT16, FLOAT16, BYTE = range(4)
PAD = 16  # elements between decoded rows, so that rows a power of two apart do not share cache sets, and vectors may end in them


@njit(error_model="numpy", cache=True)
def bytes_of(code, a):
    """Bytes of one stored number; `a` has the kernel's elements."""
    return a.itemsize if code == SAME else 2 if code < BYTE else 1


@njit(error_model="numpy", cache=True)
def vector_at(a, place, code):
    """A vector of stored numbers of more than one byte."""
    return load_at(a, place) if code == SAME else bfloat16_at(a, place) if code == BFLOAT16 else float16_at(a, place)


@njit(error_model="numpy", cache=True)
def vector_part_at(a, place, code, n):
    """The first n lanes of one, the others 0."""
    return load_part_at(a, place, n) if code == SAME else bfloat16_part_at(a, place, n) if code == BFLOAT16 else float16_part_at(a, place, n)


@njit(error_model="numpy", cache=True)
def decode_row(place, code, tables, n, target, at):
    """target[at:] = the n numbers at an address, then zeros up to a whole vector; returns 0, or NaN where one of them is not finite."""
    step, size = lanes(target), bytes_of(code, target)
    whole, rest = n // step * step, n % step
    odd = fill(target, 0.0)
    if code < BYTE:
        for x in range(0, whole, step):
            v = vector_at(target, place + x * size, code)
            store(target, at + x, v)
            odd = add(odd, sub(v, v))
        if rest:
            v = vector_part_at(target, place + whole * size, code, rest)
            store(target, at + whole, v)
            odd = add(odd, sub(v, v))
    else:
        target[at + whole : at + whole + step * (rest > 0)] = 0.0
        strange = target.dtype.type(0.0)
        for x in range(n):
            one = tables[code - BYTE, byte_at(place + x)]
            target[at + x] = one
            strange += one - one
        odd = fill(target, strange)
    return total(odd)


@njit(error_model="numpy", cache=True)
def find_keys(x, pages, page_size, b, g, row, first, n, places):
    """places[r] = address of key first + r of sequence b, for n keys.

    Page p of a sequence is entry pages[b, p] of x, whose rows from `row` on are its keys; a sequence without pages is one long page.
    """
    r = 0
    while r < n:
        page = (first + r) // page_size
        inside = first + r - page * page_size
        run = min(n - r, page_size - inside)
        start, stride, found = address(x, (pages[b, page], g, row + inside, 0)), x.strides[2], places[r : r + run]
        for here in range(run):
            found[here] = start + here * stride
        r += run


@njit(error_model="numpy", cache=True)
def call_for(place, width):
    """So many bytes will be read soon."""
    for x in range(0, width, 64):
        prefetch_at(place + x)


@njit(error_model="numpy", cache=True)
def decode_rows(places, n, code, tables, d, target, row_step):
    """Copy n rows of d numbers, in the kernel's format, to rows row_step apart; returns what `decode_row` does, for all."""
    odd = target.dtype.type(0.0)
    for r in range(n):
        odd += decode_row(places[r], code, tables, d, target, r * row_step)
    return odd


@njit(error_model="numpy", cache=True)
def point_to(target, n, row_step, places):
    """places[r] = address of row r of decoded rows."""
    start, size = address(target, 0), target.itemsize
    for r in range(n):
        places[r] = start + r * row_step * size


@njit(error_model="numpy", cache=True)
def find_rows(x, batch, row, g, group, begin, end, n, places):
    """places[r - begin] = address of row r of a head's group: query row + r // group of head r % group; past the end, of the last one."""
    for r in range(begin, begin + n):
        one = min(r, end - 1)
        places[r - begin] = address(x, (batch, g * group + one % group, row + one // group, 0))
