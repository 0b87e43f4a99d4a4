"""Products of small matrices that lie in a thread's own room, in blocks of registers: what the chunked form is made of.

A matrix is an address, the bytes from row to row, and numbers of rows and of vectors; rows come in eights and hold whole vectors.  Of a product's two
factors the left one is read number by number, each into all lanes, so that its rows may be any distance apart and its columns too: a transposed
left factor is one whose steps have changed places, and one read backwards has negative ones.  A block of the result is as many vectors as registers
allow, and every number of it one chain of multiply-adds in the order of the sum: how a product is cut into blocks does not change a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..simd import VecType, call_llvm, element_bytes, lanes, register_bytes, sums_of_lanes, transpose_at

#: Vectors of a block at most, and rows of one by its vectors: sixteen sums where there are 32 registers (AVX-512), twelve where there may be sixteen.
WIDEST = 4 if register_bytes() == 64 else 3
HEIGHTS = {1: 8, 2: 8 if WIDEST == 4 else 4, 3: 4, 4: 4}
#: Rows come in multiples of this.
EIGHT = 8
#: A one that is no literal, for which Numba would compile every callee anew.
ONE = np.int64(1)
#: What part of a product is not zero: all of the left factor, its lower or upper triangle; or what is wanted: the lower triangle of the result.
WHOLE, LOWER, UPPER, LOWER_RESULT = np.int64(0), np.int64(1), np.int64(2), np.int64(3)

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def apart(typingctx):
    """Keeps the function it is called in from being inlined by LLVM, which would optimise it anew in every function that calls it."""

    def emit(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def rolled(typingctx):
    """Keeps LLVM from making copies of the loop it is called in: rows have a few vectors, and copies are compiled in every function that calls it."""

    def emit(context, builder, signature, args):
        nothing = builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], True)
        nothing.attributes.add("convergent")
        return context.get_dummy_value()

    return types.void(), emit


def _splat(builder: ir.IRBuilder, number: Any, vector: ir.VectorType) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def _number(builder: ir.IRBuilder, place: Any, vector: ir.VectorType) -> Any:
    """A number in memory, in every lane."""
    return _splat(builder, builder.load(builder.inttoptr(place, vector.element.as_pointer())), vector)


def _vector_place(builder: ir.IRBuilder, row: Any, x: int, vector: ir.VectorType) -> Any:
    """Pointer to vector x of a row; rows begin where vectors do, as LLVM then expects."""
    size = vector.count * (4 if vector.element == ir.FloatType() else 8)
    return builder.inttoptr(builder.add(row, ir.Constant(_I64, x * size)), vector.as_pointer())


@contextlib.contextmanager
def _rolled(builder: ir.IRBuilder, n: Any) -> Iterator[Any]:
    """A loop for j below n that LLVM is told to leave as it is: its body is as long as registers allow, and copies only take time to compile."""
    before, head, body, after = builder.block, *(builder.append_basic_block(name) for name in ("terms", "term", "sums"))
    builder.branch(head)
    builder.position_at_end(head)
    j = builder.phi(n.type)
    j.add_incoming(ir.Constant(n.type, 0), before)
    builder.cbranch(builder.icmp_signed("<", j, n), body, after)
    builder.position_at_end(body)
    yield j
    j.add_incoming(builder.add(j, ir.Constant(n.type, 1)), builder.block)
    back, module = builder.branch(head), builder.module
    loop = ir.MDValue(module, [], name=str(len(module.metadata)))
    loop.operands = (loop, module.add_metadata(["llvm.loop.unroll.disable"]))  # LLVM knows a loop's hints by their naming themselves first
    back.set_metadata("llvm.loop", loop)
    builder.position_at_end(after)


def _sums(builder: ir.IRBuilder, vector: ir.VectorType, rows: int, vectors: int, left: Any, right: Any, n: Any) -> list[list[Any]]:
    """Sums over n terms of left[r, j] * right[j], a block of them."""
    (a, a_row, a_column), (b, b_row) = left, right
    zero = ir.Constant(vector, [0.0] * vector.count)
    sums = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(rows)]
    for row in sums:
        for one in row:
            builder.store(zero, one)
    starts = [builder.add(a, builder.mul(a_row, ir.Constant(_I64, r))) for r in range(rows)]
    with _rolled(builder, n) as j:
        along, across = builder.add(b, builder.mul(j, b_row)), builder.mul(j, a_column)
        second = [builder.load(_vector_place(builder, along, x, vector)) for x in range(vectors)]
        for row, start in zip(sums, starts, strict=True):
            first = _number(builder, builder.add(start, across), vector)
            for one, y in zip(row, second, strict=True):
                builder.store(call_llvm(builder, "fma", first, y, builder.load(one)), one)
    return [[builder.load(one) for one in row] for row in sums]


def _multiplier(vectors: int) -> Any:
    """An intrinsic: eight rows of c = factor * (left times right), or added to c with `keep`."""

    @intrinsic
    def block(typingctx, like, c, c_row, a, a_row, a_column, b, b_row, n, factor, keep):
        kind = VecType(like.dtype)

        def emit(context, builder, signature, args):
            _, c, c_row, a, a_row, a_column, b, b_row, n, factor, keep = args
            vector = context.get_value_type(kind)
            every, rows = _splat(builder, factor, vector), HEIGHTS[vectors]
            kept = builder.icmp_signed("!=", keep, ir.Constant(_I64, 0))
            for top in range(0, EIGHT, rows):
                start = builder.add(a, builder.mul(a_row, ir.Constant(_I64, top)))
                sums = _sums(builder, vector, rows, vectors, (start, a_row, a_column), (b, b_row), n)
                numbered = [
                    (sums[r][x], builder.add(c, builder.mul(c_row, ir.Constant(_I64, top + r))), x) for r in range(rows) for x in range(vectors)
                ]
                for one, row, x in numbered:
                    place = _vector_place(builder, row, x, vector)
                    before = builder.select(kept, builder.load(place), ir.Constant(vector, None))
                    builder.store(call_llvm(builder, "fma", every, one, before), place)
            return context.get_dummy_value()

        return types.void(like, *(types.int64,) * 8, like.dtype, types.int64), emit

    return block


def _substituter(vectors: int) -> Any:
    """An intrinsic: rows n to n + 3 of x = (1 + a)**-1 x, a strictly lower triangular, in place; the rows before are done."""

    @intrinsic
    def block(typingctx, like, x, x_row, a, a_row, a_column, n):
        kind = VecType(like.dtype)

        def emit(context, builder, signature, args):
            _, x, x_row, a, a_row, a_column, n = args
            vector = context.get_value_type(kind)
            start = builder.add(a, builder.mul(a_row, n))
            sums = _sums(builder, vector, 4, vectors, (start, a_row, a_column), (x, x_row), n)
            done: list[list[Any]] = []
            for r in range(4):
                to = builder.add(x, builder.mul(x_row, builder.add(n, ir.Constant(_I64, r))))
                row = [builder.fsub(builder.load(_vector_place(builder, to, v, vector)), sums[r][v]) for v in range(vectors)]
                for before in range(r):
                    column = builder.mul(a_column, builder.add(n, ir.Constant(_I64, before)))
                    place = builder.add(builder.add(start, builder.mul(a_row, ir.Constant(_I64, r))), column)
                    minus = builder.fneg(_number(builder, place, vector))
                    row = [call_llvm(builder, "fma", minus, earlier, one) for earlier, one in zip(done[before], row, strict=True)]
                for v, one in enumerate(row):
                    builder.store(one, _vector_place(builder, to, v, vector))
                done.append(row)
            return context.get_dummy_value()

        return types.void(like, *(types.int64,) * 6), emit

    return block


def _fader(quarters: int) -> Any:
    """An intrinsic: sixteen numbers row . (a[j + 1] * ... * a[start]) * b[j], zero for j beyond start, which is one of the first 4 * quarters."""
    many = 4 * quarters

    @intrinsic
    def block(typingctx, like, to, row, a, b, k_row, vectors, start):
        kind = VecType(like.dtype)

        def emit(context, builder, signature, args):
            _, to, row, a, b, k_row, vectors, start = args
            vector = context.get_value_type(kind)
            element = 4 if vector.element == ir.FloatType() else 8
            zero = ir.Constant(vector, None)
            sums = [cgutils.alloca_once(builder, vector) for _ in range(many)]
            for one in sums:
                builder.store(zero, one)

            def load(base: Any, n: int, at: Any) -> Any:
                return builder.load(_vector_place(builder, builder.add(builder.add(base, builder.mul(k_row, ir.Constant(_I64, n))), at), 0, vector))

            with _rolled(builder, vectors) as x:
                at = builder.mul(x, ir.Constant(_I64, vector.count * element))
                begun, faded = load(row, 0, at), zero
                for j in reversed(range(many)):
                    if j + 1 < many:
                        faded = builder.fmul(faded, load(a, j + 1, at))
                    if j >= many - 5:
                        faded = builder.select(builder.icmp_signed("==", start, ir.Constant(_I64, j)), begun, faded)
                    sum_of = call_llvm(builder, "fma", faded, load(b, j, at), builder.load(sums[j]))
                    if j >= many - 4:  # beyond start may stand anything, which times 0 is not always 0
                        sum_of = builder.select(builder.icmp_signed("<=", ir.Constant(_I64, j), start), sum_of, zero)
                    builder.store(sum_of, sums[j])
            nothing = ir.Constant(vector, [-0.0] * vector.count)  # the zero that LLVM knows an addition of to change nothing
            found = [builder.load(one) for one in sums] + [nothing] * (16 - many)
            for first in range(0, 16, vector.count):
                summed = sums_of_lanes(builder, found[first : first + vector.count], element)
                place = builder.inttoptr(builder.add(to, ir.Constant(_I64, first * element)), vector.as_pointer())
                builder.store(summed, place, align=element)
            return context.get_dummy_value()

        return types.void(like, *(types.int64,) * 7), emit

    return block


_block1, _block2, _block3, _block4 = _multiplier(1), _multiplier(2), _multiplier(3), _multiplier(4)
_solve1, _solve2, _solve3, _solve4 = _substituter(1), _substituter(2), _substituter(3), _substituter(4)
_faded1, _faded2, _faded3, _faded4 = _fader(1), _fader(2), _fader(3), _fader(4)


@njit(error_model="numpy", cache=True)
def multiply(like, c, c_row, a, a_row, a_column, b, b_row, rows, vectors, n, factor, keep, part, slope):
    """c = factor * (a times b), or with `keep` added to c; n terms a sum.

    part
        LOWER: row r of a ends before column (r + 1) * slope; UPPER: column j of a ends before row (j + 1) * slope, seen from its rows: row r begins
        at column r // slope; LOWER_RESULT: of row r of c the first (r + 1) * slope numbers are wanted.  Whole eights of rows at a time, so what
        lies beyond in a must be zero, and in c it is overwritten at will.
    """
    apart()
    wide = lanes(like) * element_bytes(like)
    first_by, last_by, until_by = int(part == UPPER), slope * int(part == LOWER), slope * int(part == LOWER_RESULT)
    last_from, until_from = EIGHT * slope if part == LOWER else n, EIGHT * slope + lanes(like) - 1 if part == LOWER_RESULT else vectors * lanes(like)
    for r in range(0, rows, EIGHT):  # numbers, because of conditions LLVM would make several loops
        first, last = min(n, first_by * r // slope), min(n, last_from + last_by * r)
        until = min(vectors, (until_from + until_by * r) // lanes(like))
        left, right, out, terms = a + r * a_row + first * a_column, b + first * b_row, c + r * c_row, last - first
        x = 0
        while x < until:
            width = min(WIDEST, until - x)
            to, by = out + x * wide, right + x * wide
            if width == 4:
                _block4(like, to, c_row, left, a_row, a_column, by, b_row, terms, factor, keep)
            elif width == 3:
                _block3(like, to, c_row, left, a_row, a_column, by, b_row, terms, factor, keep)
            elif width == 2:
                _block2(like, to, c_row, left, a_row, a_column, by, b_row, terms, factor, keep)
            else:
                _block1(like, to, c_row, left, a_row, a_column, by, b_row, terms, factor, keep)
            x += width


@njit(error_model="numpy", cache=True)
def substitute(like, x, x_row, a, a_row, a_column, rows, vectors):
    """x = (1 + a)**-1 x, for a strictly lower triangular; for an upper one begin at the last row and column, with negative steps."""
    apart()
    wide = lanes(like) * element_bytes(like)
    v = 0
    while v < vectors:
        width = min(WIDEST, vectors - v)
        for r in range(0, rows, 4):
            if width == 4:
                _solve4(like, x + v * wide, x_row, a, a_row, a_column, r)
            elif width == 3:
                _solve3(like, x + v * wide, x_row, a, a_row, a_column, r)
            elif width == 2:
                _solve2(like, x + v * wide, x_row, a, a_row, a_column, r)
            else:
                _solve1(like, x + v * wide, x_row, a, a_row, a_column, r)
        v += width


@njit(error_model="numpy", cache=True)
def transpose(like, source, source_row, target, target_row, rows, columns):
    """target = source transposed; both numbers are multiples of a vector's lanes."""
    apart()
    step, size = lanes(like), element_bytes(like)
    for r in range(0, rows, step):
        for c in range(0, columns, step):
            transpose_at(like, source + r * source_row + c * size, source_row, target + c * target_row + r * size, target_row)


@njit(error_model="numpy", cache=True)
def faded_row(like, to, row, a, b, k_row, vectors, start):
    """Sixteen numbers row . (a[j + 1] * ... * a[start]) * b[j], element by element, for rows a and b of so many bytes; zero for j beyond start."""
    apart()
    if start < 4:
        _faded1(like, to, row, a, b, k_row, vectors, start)
    elif start < 8:
        _faded2(like, to, row, a, b, k_row, vectors, start)
    elif start < 12:
        _faded3(like, to, row, a, b, k_row, vectors, start)
    else:
        _faded4(like, to, row, a, b, k_row, vectors, start)
