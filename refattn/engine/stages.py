"""A user's function of one score, lifted into a stage: compiled code that a kernel calls once for a tile of scores, through its address.

Kernels are compiled once, whatever functions they are given; a new function compiles a loop of a few lines and nothing else.

    stage(s, step, n, first_key, b, heads, queries, width, aux) -> int64               every argument an int64

`s` is the address of scores, row r begins r * step elements after it, and the first `width` elements of n rows are used.  `heads` and `queries`
are addresses of int32 arrays, `aux` that of what `aux_table` returns, b the number of the batch.

    along       row r                                   element c of a row
    "queries"   key first_key + r                       query queries[c] of head heads[c]
    "keys"      query queries[r] of head heads[r]       key first_key + c

A score stage replaces s[r, c] by f(s[r, c], b, h, i, j, *aux).  A mask stage sets s[r, c] to 0 where g(b, h, i, j, *aux) is true, else to -inf.
What is returned is one more than how many were true, of which `call` makes that number again.

What the loops are made of decides their speed.  Vectors lie along a row; a row's vectors are taken one column at a time, rows inside, so that
what depends on lanes alone (a head's slope, a query's document) is gathered once per column and not once per score.  LLVM makes the vectors:
it is told that scores and aux do not overlap, and not to unroll the lanes before it has.

A function that raises has nobody to raise to: Numba prints the error as one that was ignored, the rest of the tile keeps its scores, and the
stage returns 0, by which `call` knows.  An index outside an aux array reads whatever is there, as everywhere in Numba; with NUMBA_BOUNDSCHECK=1
it raises.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler import Compiler
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..errors import ParameterError
from . import elementary
from .simd import register_bytes

Role = Literal["score", "mask"]
Along = Literal["queries", "keys"]

#: Stages kept.
KEPT = 256
#: Bytes of an array that a function may refer to; all are read, a millisecond per MiB, whenever it is to be seen whether the function is a known one.
LARGEST_CONSTANT = 2**20

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_ARGUMENTS = 9
_SIGNATURE = types.int64(*[types.int64] * _ARGUMENTS)
_INDEX = types.CPointer(types.int32)


@dataclass(frozen=True)
class Stage:
    """A compiled stage.  Its code lasts as long as this object."""

    address: int
    compiled: Any = field(repr=False, compare=False)


# ---- what kernels call -----------------------------------------------------------------------------------------------------------


@intrinsic
def call(typingctx, address, s, step, n, first_key, b, heads, queries, width, aux):  # type: ignore[no-untyped-def]
    """How many were true of what the stage at an address asked, 0 where it asks nothing, and -1 where the function raised.

    Nothing happens at the address 0, which stands for no stage.
    """
    given = (s, step, n, first_key, b, heads, queries, width, aux)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        numbers = [context.cast(builder, x, kind, types.int64) for x, kind in zip(args, signature.args, strict=True)]
        function = builder.inttoptr(numbers[0], ir.FunctionType(_I64, [_I64] * _ARGUMENTS).as_pointer())
        returned = cgutils.alloca_once_value(builder, ir.Constant(_I64, 0))
        with builder.if_then(builder.icmp_unsigned("!=", numbers[0], ir.Constant(_I64, 0)), likely=True):
            builder.store(builder.sub(builder.call(function, numbers[1:]), ir.Constant(_I64, 1)), returned)
        return builder.load(returned)

    return types.int64(address, *given), emit


def aux_table(aux: tuple[np.ndarray, ...]) -> np.ndarray:
    """Where the arrays stand and how long their axes are; it does not keep them alive."""
    return np.array([n for a in aux for n in (a.ctypes.data, *a.shape)] or [0], np.int64)


# ---- lifting -----------------------------------------------------------------------------------------------------------------------


def lifted(function: Callable[..., Any], role: Role, element: Any, along: Along, aux: tuple[np.ndarray, ...]) -> Stage:
    """A user's function as a stage.

    Parameters
    ----------
    function : callable
        A Python function, or one that Numba has compiled already, which is used as it is.  In a Python function exp, exp2, log, log2 and
        tanh of math and NumPy are those of `elementary`, and floats that it is written with or captures are of the kernel's element type, so that
        float32 scores stay float32.
    role : {"score", "mask"}
        ``f(s, b, h, i, j, *aux)``, which returns a score, or ``g(b, h, i, j, *aux)``, which returns a truth value.  s is of the kernel's element
        type; b, h, i and j are int32.
    element : dtype
        float32 or float64: the kernel's.
    along : {"queries", "keys"}
        What the elements of a row are.
    aux : tuple of ndarray
        What else the function reads: C-contiguous arrays of booleans, integers, float32 or float64.  The code depends on their
        formats and numbers of axes, and not on what is in them.

    Returns
    -------
    Stage
        The same object as last time for the same function: the same code, with the same values of everything it refers to.

    Raises
    ------
    ParameterError
        Numba does not compile the function, or its result is of no use.
    """
    kinds = tuple(types.Array(numba.from_dtype(a.dtype), a.ndim, "C", readonly=True) for a in aux)
    with _one_at_a_time:
        return _compiled(_Piece(_identity(function), function), role, np.dtype(element), along, kinds)


_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class _Piece:
    """A function that equals another of the same identity."""

    identity: Any
    function: Callable[..., Any] = field(compare=False)


@functools.lru_cache(maxsize=KEPT)
def _compiled(piece: _Piece, role: Role, element: np.dtype, along: Along, kinds: tuple[types.Array, ...]) -> Stage:
    number = numba.from_dtype(element)
    scalar = _scalar(piece.function, role, number, kinds)
    lanes = register_bytes() // element.itemsize
    strip, rest = _line(scalar, role, along, whole=True), _line(scalar, role, along, whole=False)
    tile = (_tile_along_queries if along == "queries" else _tile_along_keys)(strip, rest, lanes)
    scores, indices, arrays = _pointer(types.CPointer(number)), _pointer(_INDEX), _arrays(kinds)

    def stage(s, step, n, first_key, b, heads, queries, width, aux):  # type: ignore[no-untyped-def]
        return 1 + tile(scores(s), step, n, first_key, b, indices(heads), indices(queries), width, arrays(aux))

    code = numba.cfunc(_SIGNATURE, error_model="numpy")(stage)
    return Stage(code.address, code)


def _scalar(function: Callable[..., Any], role: Role, number: types.Type, kinds: tuple[types.Array, ...]) -> Dispatcher:
    """The function, ready to be compiled for one score; what else it reads comes as one tuple."""
    given = {"s": number} if role == "score" else {}
    given |= dict.fromkeys("bhij", types.int32) | {f"aux[{n}]": kind for n, kind in enumerate(kinds)}
    name = f"{role} function {getattr(function, '__name__', function)!r}"
    taken = inspect.signature(function.py_func if isinstance(function, Dispatcher) else function)
    try:
        taken.bind(*given)
        if any(p.kind is p.KEYWORD_ONLY for p in taken.parameters.values()):  # Numba would bind them by place
            raise TypeError
    except TypeError:
        raise ParameterError(f"{name} takes {taken}; it is called with ({', '.join(given)}) by place") from None
    if not isinstance(function, Dispatcher):
        function = _inlined(_with_elementary(function, number))
    try:
        result = types.Dispatcher(function).get_call_type(cpu_target.typing_context, tuple(given.values()), {}).return_type
    except Exception as error:  # Numba's own tree, and what else its passes raise
        called = ", ".join(f"{x}: {kind.dtype}, {kind.ndim} axes" if x.startswith("aux") else f"{x}: {kind}" for x, kind in given.items())
        raise ParameterError(f"{name} does not compile for ({called}): {_reason(error)}") from error
    useful = (types.Integer, types.Float) if role == "score" else (types.Integer, types.Float, types.Boolean)
    if not isinstance(result, useful):
        wanted = "a number" if role == "score" else "a truth value or a number"
        raise ParameterError(f"{name} returns {result}; it must return {wanted}")

    def of_score(s, b, h, i, j, aux):  # type: ignore[no-untyped-def]
        return function(s, b, h, i, j, *aux)

    def of_place(b, h, i, j, aux):  # type: ignore[no-untyped-def]
        return function(b, h, i, j, *aux)

    return _inlined(of_score if role == "score" else of_place)


def _inlined(function: Callable[..., Any]) -> Dispatcher:
    return numba.njit(error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def _reason(error: Exception) -> str:
    """What Numba says first that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    useful = [line for line in lines if line and not line.startswith(("Failed in nopython mode", "There are", "- Of which"))]
    if len(useful) > 1 and useful[1].startswith(">>>"):  # the call that has no implementation
        return f"{useful[0].rstrip(':')}: {useful[1].removeprefix('>>>').strip()}"
    return useful[0] if useful else type(error).__name__


# ---- functions: which are the same, and what theirs become --------------------------------------------------------------------------


def _identity(function: Callable[..., Any]) -> Any:
    """Equal for functions that compile to the same code."""
    if isinstance(function, Dispatcher):
        return function
    if not isinstance(function, FunctionType):
        raise ParameterError(f"{function!r} is no function that Numba compiles: give a Python function, or one it has compiled")
    return _identity_of_code(function, ())


def _identity_of_code(function: FunctionType, outer: tuple[FunctionType, ...]) -> Any:
    names, code = frozenset(_names(function.__code__)), function.__code__
    if function in outer:
        return outer.index(function)
    outer = (*outer, function)
    defaults = tuple(_identity_of_value(value, names, outer) for value in function.__defaults__ or ())
    cells = tuple(_identity_of_value(cell.cell_contents, names, outer) for cell in function.__closure__ or ())
    reads = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return code, defaults, cells, tuple((name, _identity_of_value(value, names, outer)) for name, value in reads.items())


def _identity_of_value(value: Any, names: frozenset[str], outer: tuple[FunctionType, ...]) -> Any:
    if isinstance(value, np.ndarray):
        if value.nbytes > LARGEST_CONSTANT:
            raise ParameterError(
                f"function {outer[0].__name__!r} refers to an array of {value.nbytes} bytes; {LARGEST_CONSTANT} are allowed: pass it as aux"
            )
        return value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, FunctionType):
        return _identity_of_code(value, outer)
    if isinstance(value, ModuleType):
        found = vars(value)
        return value.__name__, tuple((name, _identity_of_value(found[name], frozenset(), outer)) for name in sorted(names) if name in found)
    if isinstance(value, tuple):
        return type(value), tuple(_identity_of_value(x, names, outer) for x in value)
    if isinstance(value, int | float | complex | np.generic):
        return type(value), repr(value)  # -0.0 equals 0.0, True equals 1, and NaN nothing
    return _itself(value)


def _itself(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return object()  # what may change never is what it was
    return value


def _names(code: CodeType) -> Iterator[str]:
    """Globals and attributes that a function and those inside it read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _with_elementary(function: Any, number: types.Type) -> Any:
    """The same function, for which exp and its like are those that vectorise, and numbers it is written with have the scores' format."""
    names = {"__name__", "__builtins__", *_names(function.__code__)}  # not all of them: a stage would keep the user's arrays alive
    known = {name: _substitute(value, number) for name, value in function.__globals__.items() if name in names}
    closure = function.__closure__ and tuple(type(cell)(_substitute(cell.cell_contents, number)) for cell in function.__closure__)
    code = function.__code__.replace(co_consts=tuple(_in_format(x, number) for x in function.__code__.co_consts))
    copy = FunctionType(code, known, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _substitute(value: Any, number: types.Type) -> Any:
    if value is math or value is np:
        return _room_with_elementary(value)
    value = elementary.IN_PLACE_OF.get(value, value) if callable(value) and isinstance(value, Hashable) else value
    return _in_format(value, number)


def _in_format(value: Any, number: types.Type) -> Any:
    return np.float32(value) if type(value) is float and number is types.float32 else value


@functools.cache
def _room_with_elementary(room: ModuleType) -> ModuleType:
    """math or NumPy with functions that vectorise among the others."""
    copy = ModuleType(f"{room.__name__} with elementary functions")  # Numba tells modules apart by what they print as
    for name, value in vars(room).items():
        if name not in vars(copy):
            setattr(copy, name, value if isinstance(value, ModuleType) else _substitute(value, types.float64))
    return copy


# ---- loops -----------------------------------------------------------------------------------------------------------------------


class _Apart(Compiler):
    """What the arguments point at does not overlap."""

    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):  # type: ignore[no-untyped-def]
        flags.noalias = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


_tile = functools.partial(numba.njit, error_model="numpy", pipeline_class=_Apart, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _tile_along_queries(strip: Any, rest: Any, lanes: int) -> Dispatcher:
    @_tile()
    def tile(s, step, n, first_key, b, heads, queries, width, aux):  # type: ignore[no-untyped-def]
        true, whole = 0, width - width % lanes
        for c in range(0, whole, lanes):
            for r in range(n):
                true += strip(s, r * step + c, lanes, b, heads, queries, c, first_key + r, aux)
        if whole < width:
            for r in range(n):
                true += rest(s, r * step + whole, width - whole, b, heads, queries, whole, first_key + r, aux)
        return true

    return tile


def _tile_along_keys(strip: Any, rest: Any, lanes: int) -> Dispatcher:
    @_tile()
    def tile(s, step, n, first_key, b, heads, queries, width, aux):  # type: ignore[no-untyped-def]
        true, whole = 0, width - width % lanes
        for r in range(n):
            for c in range(0, whole, lanes):
                true += strip(s, r * step + c, lanes, b, heads, queries, r, first_key + c, aux)
            if whole < width:
                true += rest(s, r * step + whole, width - whole, b, heads, queries, r, first_key + whole, aux)
        return true

    return tile


def _line(scalar: Dispatcher, role: Role, along: Along, whole: bool) -> Any:
    """A loop over `count` scores from s[at] on: queries from the index `at_query`, or the keys from `key`; `whole` where they fill a vector."""

    @intrinsic
    def line(typingctx, s, at, count, b, heads, queries, at_query, key, aux):  # type: ignore[no-untyped-def]
        number, function = s.dtype, types.Dispatcher(scalar)
        numbers = (number,) if role == "score" else ()
        inner = typingctx.resolve_function_type(function, (*numbers, *[types.int32] * 4, aux), {})

        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            apply = context.get_function(function, inner)
            context.add_linking_libs(getattr(apply, "libs", ()))
            scores, start, length, batch, head_of, query_of, place, first_key, arrays = args
            start, length, batch, place, first_key = (
                context.cast(builder, x, kind, types.int64)
                for x, kind in ((start, at), (length, count), (batch, b), (place, at_query), (first_key, key))
            )
            length, batch, first_key = (builder.trunc(x, _I32) for x in (length, batch, first_key))
            true = cgutils.alloca_once_value(builder, ir.Constant(_I32, 0))
            with cgutils.for_range(builder, length) as loop:
                c = builder.zext(loop.index, _I64)
                n = builder.add(place, c) if along == "queries" else place
                h, i = (builder.load(builder.gep(table, [n])) for table in (head_of, query_of))
                j = first_key if along == "queries" else builder.add(first_key, loop.index)
                # None is negative, which spares every index of an aux array a branch and lets differences stay in 32 bits.
                h, i, j = (builder.and_(x, ir.Constant(_I32, 2**31 - 1)) for x in (h, i, j))
                score = builder.gep(scores, [builder.add(start, c)])
                if role == "score":
                    result = apply(builder, [builder.load(score), batch, h, i, j, arrays])
                    builder.store(context.cast(builder, result, inner.return_type, number), score)
                else:
                    result = context.is_true(builder, inner.return_type, apply(builder, [batch, h, i, j, arrays]))
                    shown, hidden = (ir.Constant(score.type.pointee, x) for x in (0.0, -math.inf))
                    builder.store(builder.select(result, shown, hidden), score)
                    builder.store(builder.add(builder.load(true), builder.zext(result, _I32)), true)
                latch = builder.basic_block
            _advise(builder.module, latch.terminator, vectorise=whole)
            return builder.zext(builder.load(true), _I64)

        return types.int64(s, at, count, b, heads, queries, at_query, key, aux), emit

    return line


def _advise(module: ir.Module, branch: Any, vectorise: bool) -> None:
    """Tells LLVM what to do with the loop that a branch closes."""
    hints = [module.add_metadata(["llvm.loop.unroll.disable"])]
    if not vectorise:
        hints.append(module.add_metadata(["llvm.loop.vectorize.enable", ir.Constant(_I1, 0)]))
    loop = ir.MDValue(module, [], name=str(len(module.metadata)))
    loop.operands = (loop, *hints)  # LLVM knows a loop's hints by their naming themselves first
    branch.set_metadata("llvm.loop", loop)


def _pointer(kind: types.CPointer) -> Any:
    @intrinsic
    def pointer(typingctx, address):  # type: ignore[no-untyped-def]
        return kind(address), lambda context, builder, signature, args: builder.inttoptr(args[0], context.get_value_type(kind))

    return pointer


def _arrays(kinds: tuple[types.Array, ...]) -> Any:
    """The arrays that an `aux_table` describes."""

    @intrinsic
    def arrays(typingctx, table):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            entry, made = builder.inttoptr(args[0], _I64.as_pointer()), []
            for kind in kinds:
                address, *shape = (builder.load(builder.gep(entry, [ir.Constant(_I64, n)])) for n in range(1 + kind.ndim))
                entry = builder.gep(entry, [ir.Constant(_I64, 1 + kind.ndim)])
                data = context.get_data_type(kind.dtype)
                size = item = ir.Constant(_I64, context.get_abi_sizeof(data))
                strides: list[Any] = []
                for length in reversed(shape):
                    strides.insert(0, size)
                    size = builder.mul(size, length)
                array = context.make_array(kind)(context, builder)
                populate_array(array, builder.inttoptr(address, data.as_pointer()), shape, strides, item, None)
                made.append(array._getvalue())
            return context.make_tuple(builder, signature.return_type, made)

        return types.Tuple(kinds)(table), emit

    return arrays
