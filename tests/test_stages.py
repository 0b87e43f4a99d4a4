"""User functions lifted into stages do to a tile what the function does to each of its scores, compile once, and fail in the user's language."""

import functools
import gc
import itertools
import math
import re
import sys
import threading
import weakref
from math import tanh as hyperbolic_tangent
from types import ModuleType

import numba
import numpy as np
import pytest
from numba import njit

from refattn.engine import stages
from refattn.engine.blocks import ALL, NONE, SOME, classes
from refattn.engine.simd import address, register_bytes
from refattn.engine.stages import LARGEST_CONSTANT, aux_table, call, lifted
from refattn.errors import ParameterError

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("element", [np.float32, np.float64])
ALONG = pytest.mark.parametrize("along", ["queries", "keys"])
PADDING = 3


@njit
def run(stage, s, first_key, b, heads, queries, width, aux):
    return call(
        stage, address(s, (0, 0)), s.strides[0] // s.itemsize, s.shape[0], first_key, b,
        address(heads, 0), address(queries, 0), width, address(aux, 0),
    )  # fmt: skip


def applied(function, role, along, s, first_key, b, heads, queries, aux):
    """What the stage makes of s, and what it returns; columns past those it may use are found as they were."""
    stage, table = lifted(function, role, s.dtype, along, aux), aux_table(aux)
    padded = np.full((s.shape[0], s.shape[1] + PADDING), 7.0, s.dtype)
    padded[:, :-PADDING] = s
    true = run(stage.address, padded, first_key, b, heads, queries, s.shape[1], table)
    same(padded[:, -PADDING:], 7.0)
    return padded[:, :-PADDING], true


def one_by_one(function, role, along, s, first_key, b, heads, queries, aux):
    """The same in Python, in float64: Numba's way with numbers of several formats."""
    wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in aux]
    out, true = np.empty_like(s), 0
    for r, c in np.ndindex(s.shape):
        lane, key = (c, r) if along == "queries" else (r, c)
        place = (b, int(heads[lane]), int(queries[lane]), first_key + key)
        if role == "score":
            out[r, c] = function(float(s[r, c]), *place, *wide)
        else:
            seen = bool(function(*place, *wide))
            out[r, c] = 0.0 if seen else -np.inf
            true += seen
    return out, true


def tile(element, rows, columns, along, seed=3):
    rng = np.random.default_rng(seed)
    lanes = columns if along == "queries" else rows
    heads, queries = rng.integers(0, 4, lanes, np.int32), rng.integers(0, 40, lanes, np.int32)
    return rng.normal(0, 20, (rows, columns)).astype(element), 5, 1, heads, queries


def identity(s, b, h, i, j):
    return s


def alibi(s, b, h, i, j, slopes):
    return s - slopes[h] * abs(i - j)


def relative_bias(s, b, h, i, j, table):
    return s + table[h, i - j]  # negative indices count from the end


def by_batch(s, b, h, i, j, signs, table):
    return s * signs[()] + table[b, h, min(j, 20)]


def integer(s, b, h, i, j):
    return i - 2 * j


def quarter_hidden(s, b, h, i, j):
    return s if (i + j) % 4 else -math.inf


def rounded(s, b, h, i, j, *rest):
    return math.floor(s) * 0.5 - math.fabs(s) + len(rest)


def causal(b, h, i, j):
    return j <= i


def window(b, h, i, j):
    return i - 7 <= j <= i + 3


def documents(b, h, i, j, document):
    return document[b, i] == document[b, j]


def listed(b, h, i, j, allowed, offsets):
    return allowed[h, i] and j + offsets[h] > i


def integer_truth(b, h, i, j):
    return (i + j) % 3


def number_truth(b, h, i, j, weights):
    return weights[i] * (j - i)


def always(b, h, i, j):
    return True


def tables(element):
    rng = np.random.default_rng(11)
    return {
        alibi: (rng.random(4).astype(element),),
        relative_bias: (rng.random((4, 300)).astype(element),),
        by_batch: (np.array(-1, np.int64), rng.random((2, 4, 21))),
        documents: (rng.integers(0, 4, (2, 300)).astype(np.uint16),),
        listed: (rng.random((4, 40)) > 0.3, np.array([0, -3, 5, 9], np.int8)),
        rounded: (np.zeros(1), np.zeros((1, 1))),
        number_truth: (rng.integers(-1, 2, 40).astype(np.float32),),
    }


def sizes(element):
    lanes = register_bytes() // np.dtype(element).itemsize
    return [(1, 1), (5, 7), (9, lanes), (3, 3 * lanes), (4, 3 * lanes + 5), (2, 100), (0, 4), (4, 0)]


@FORMATS
@ALONG
@pytest.mark.parametrize("function", [identity, alibi, relative_bias, by_batch, integer, quarter_hidden, rounded], ids=lambda f: f.__name__)
def test_a_score_stage_does_what_the_function_does_to_every_score(function, along, element):
    aux = tables(element).get(function, ())
    for rows, columns in sizes(element):
        given = tile(element, rows, columns, along)
        found, returned = applied(function, "score", along, *given, aux)
        same(found, one_by_one(function, "score", along, *given, aux)[0])
        assert returned == 0


@FORMATS
@ALONG
@pytest.mark.parametrize("function", [causal, window, documents, listed, integer_truth, number_truth, always], ids=lambda f: f.__name__)
def test_a_mask_stage_hides_what_the_function_does_not_allow_and_counts_the_others(function, along, element):
    aux = tables(element).get(function, ())
    for rows, columns in sizes(element):
        given = tile(element, rows, columns, along)
        given[0].flat[::2] = np.nan  # what stood there does not matter
        found, true = applied(function, "mask", along, *given, aux)
        expected, count = one_by_one(function, "mask", along, *given, aux)
        same(found, expected)
        assert true == count


def capped_by_attribute(s, b, h, i, j):
    return 20.0 * math.tanh(s / 20.0)


def capped_by_numpy(s, b, h, i, j):
    return 20.0 * np.tanh(s / 20.0)


def capped_by_name(s, b, h, i, j):
    return 20.0 * hyperbolic_tangent(s / 20.0)


def capped_inside(s, b, h, i, j):
    def cap(x):
        return 20.0 * math.tanh(x / 20.0)

    return cap(s)


def capped_by_closure():
    function = math.tanh

    def capped(s, b, h, i, j):
        return 20.0 * function(s / 20.0)

    return capped


CAPS = [capped_by_attribute, capped_by_numpy, capped_by_name, capped_inside, capped_by_closure()]


@FORMATS
@pytest.mark.parametrize("function", CAPS, ids=lambda f: f.__name__)
def test_the_hyperbolic_tangent_is_one_that_vectorises_however_it_is_named(function, element):
    given = tile(element, 6, 3 * register_bytes() // np.dtype(element).itemsize, "queries")
    found, _ = applied(function, "score", "queries", *given, ())
    expected = one_by_one(function, "score", "queries", *given, ())[0]
    units = 6  # a division and a product here and there, and two errors of tanh
    assert np.all(np.abs(found - expected) <= units * np.spacing(np.abs(expected)))
    assert "@tanh" not in code_of(function, "score", element)
    assert hyperbolic_tangent is math.tanh is not np.tanh  # the user's own names are as they were
    assert function(1.0, 0, 0, 0, 0) == pytest.approx(20 * math.tanh(0.05))


def test_functions_that_numba_has_compiled_are_used_as_they_are_and_may_be_called_by_others():
    jitted = njit(alibi)

    @njit
    def slope_of(x):
        return 3 * x

    def calls(s, b, h, i, j):
        return slope_of(s)

    given = tile(np.float64, 4, 19, "queries")
    same(applied(jitted, "score", "queries", *given, (np.ones(4),))[0], one_by_one(alibi, "score", "queries", *given, (np.ones(4),))[0])
    same(applied(calls, "score", "queries", *given, ())[0], 3 * given[0])
    stage = lifted(jitted, "score", np.float64, "queries", (np.ones(4),))
    assert lifted(jitted, "score", np.float64, "queries", (np.zeros(9),)) is stage is not lifted(alibi, "score", np.float64, "queries", (np.ones(4),))


def test_no_stage_is_called_at_address_zero():
    s, lanes = np.ones((2, 3)), np.zeros(3, np.int32)
    assert run(0, s, 0, 0, lanes, lanes, 3, aux_table(())) == 0
    same(s, 1)


# ---- which functions are the same ------------------------------------------------------------------------------------------------


def lift(function, aux=(), role="score", element=np.float32, along="queries"):
    return lifted(function, role, element, along, aux)


def times(factor):
    return lambda s, b, h, i, j: s * factor


def value(function):
    """What a stage makes of a score of 1 in the first place."""
    given = (np.ones((1, 1)), 0, 0, np.zeros(1, np.int32), np.zeros(1, np.int32))
    return float(applied(function, "score", "queries", *given, ())[0][0, 0])


def test_a_function_compiles_once_for_the_same_code_and_the_same_values():
    assert lift(times(2.5)) is lift(times(2.5))
    assert lift(alibi, (np.ones(4),)) is lift(alibi, (np.zeros(7),))
    others = [
        lift(alibi, (np.ones(4, np.float32),)),
        lift(alibi, (np.ones(4, np.int8),)),
        lift(alibi, (np.ones(4),), element=np.float64),
        lift(alibi, (np.ones(4),), along="keys"),
        lift(alibi, (np.ones(4),)),
    ]
    assert len({id(stage) for stage in others}) == len(others)
    assert lift(times(2.5), element=np.dtype("float32")) is lift(times(2.5))
    assert stages._compiled.cache_info().maxsize == stages.KEPT


@pytest.mark.parametrize("values", list(itertools.permutations([2, 2.0, True, np.float32(2), 3], 2)), ids=str)
def test_captured_values_are_part_of_a_function(values):
    one, other = map(times, values)
    assert lift(one) is not lift(other)
    assert [value(one), value(other)] == [float(x) for x in values]


def test_zeros_of_either_sign_differ():
    assert [math.copysign(1, value(times(x))) for x in (0.0, -0.0, 0.0)] == [1, -1, 1]


def defined(**names):
    """The same source, run again with other globals."""
    space = dict(names)
    exec("def f(s, b, h, i, j, x=1.0):\n    return s * FACTOR + x", space)
    return space["f"]


def test_a_function_defined_again_with_other_globals_or_defaults_is_another():
    two, three = defined(FACTOR=2.0), defined(FACTOR=3.0)
    assert [value(two), value(three), value(defined(FACTOR=2.0))] == [3.0, 4.0, 3.0]
    assert lift(two) is lift(defined(FACTOR=2.0))
    two.__globals__["FACTOR"] = 5.0
    assert value(two) == 6.0
    two.__defaults__ = (0.0,)
    assert value(two) == 5.0


def test_a_stage_keeps_none_of_the_globals_that_its_function_does_not_read():
    class Large:
        pass

    large = Large()
    function = defined(FACTOR=7.25, large=large)
    stage, there = lift(function), weakref.ref(large)
    function.__globals__.pop("large")
    del large
    gc.collect()
    assert there() is None
    assert lift(function) is stage


def test_arrays_attributes_and_functions_that_a_function_refers_to_are_part_of_it():
    table, room = np.array([4.0]), ModuleType("room")
    room.FACTOR = 2.0

    def looks_up(s, b, h, i, j):
        return table[i] * room.FACTOR

    assert value(looks_up) == 8.0
    first = lift(looks_up)
    table[0] = 5.0
    assert value(looks_up) == 10.0
    room.FACTOR = 3.0
    assert value(looks_up) == 15.0
    table[0], room.FACTOR = 4.0, 2.0
    assert lift(looks_up) is first

    def through(function):
        return lambda s, b, h, i, j: function(s)

    double, triple = njit(lambda x: 2 * x), njit(lambda x: 3 * x)
    assert [value(through(double)), value(through(triple))] == [2.0, 3.0]


def test_threads_that_want_the_same_function_at_once_get_the_same_stage():
    barrier, found = threading.Barrier(8), []

    def fresh(s, b, h, i, j):
        return s + 0.12345

    def take():
        barrier.wait()
        found.append(lift(fresh))

    before = stages._compiled.cache_info().misses
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(stage) for stage in found}) == 1
    assert stages._compiled.cache_info().misses == before + 1


# ---- functions that are of no use --------------------------------------------------------------------------------------------------


def undefined(s, b, h, i, j):
    return s + nothing  # noqa: F821


def by_keyword(s, b, h, i, j, *, x=1.0):
    return s * x


def no_number(s, b, h, i, j):
    pass


def sometimes(s, b, h, i, j):
    if i > j:
        return s
    return None


def imaginary(s, b, h, i, j):
    return s * 1j


def text(s, b, h, i, j):
    return s + "a"


def opens(s, b, h, i, j):
    with open("x") as file:
        file.read()
    return s


def plain(x):
    return x


def calls_plain(s, b, h, i, j):
    return plain(s)


def writes(s, b, h, i, j, table):
    table[0] = s
    return s


LARGE = np.zeros(LARGEST_CONSTANT // 8 + 1)


def reads_large(s, b, h, i, j):
    return s + LARGE[i]


def lists(b, h, i, j):
    return [j]


@pytest.mark.parametrize(
    ("function", "role", "aux", "message"),
    [
        (alibi, "score", (), r"score function 'alibi' takes \(s, b, h, i, j, slopes\); it is called with \(s, b, h, i, j\) by place$"),
        (identity, "mask", (), r"mask function 'identity' takes \(s, b, h, i, j\); it is called with \(b, h, i, j\) by place$"),
        (njit(identity), "score", (np.ones(1),), r"takes \(s, b, h, i, j\); it is called with \(s, b, h, i, j, aux\[0\]\) by place$"),
        (causal, "score", (), r"score function 'causal' takes \(b, h, i, j\); it is called with \(s, b, h, i, j\) by place$"),
        (by_keyword, "score", (), r"takes \(s, b, h, i, j, \*, x=1.0\); it is called with \(s, b, h, i, j\) by place$"),
        (undefined, "score", (), r"'undefined' does not compile for \(s: float32, b: int32, .*\): NameError: name 'nothing' is not defined$"),
        (no_number, "score", (), r"score function 'no_number' returns none; it must return a number$"),
        (sometimes, "score", (), r"'sometimes' returns OptionalType\(float32\); it must return a number$"),
        (imaginary, "score", (), r"'imaginary' returns complex128; it must return a number$"),
        (lambda s, b, h, i, j: j <= i, "score", (), r"'<lambda>' returns bool; it must return a number$"),
        (lists, "mask", (), r"mask function 'lists' returns list\(int32\).*; it must return a truth value or a number$"),
        (text, "score", (), r"'text' does not compile .*: No implementation of function .*add.* found for signature: add\(float32, .*a.*\)$"),
        (opens, "score", (), r"'opens' does not compile .*: The 'with .*' construct is not supported"),
        (calls_plain, "score", (), r"'calls_plain' does not compile .*: Untyped global name 'plain'"),
        (writes, "score", (np.ones(3, np.int16),), r"'writes' does not compile for \(.*aux\[0\]: int16, 1 axes\): .*setitem\(readonly array"),
        (reads_large, "score", (), rf"'reads_large' refers to an array of {LARGE.nbytes} bytes; {LARGEST_CONSTANT} are allowed: pass it as aux$"),
        (math.exp, "score", (), r"<built-in function exp> is no function that Numba compiles: give a Python function, or one it has compiled$"),
        (functools.partial(alibi), "score", (), r"is no function that Numba compiles"),
        (3, "mask", (), r"^3 is no function that Numba compiles"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)  # fmt: skip
def test_what_cannot_be_a_stage_is_refused_in_a_line(function, role, aux, message):
    with pytest.raises(ParameterError) as caught:
        lift(function, aux, role)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_function_that_raises_leaves_the_rest_of_the_tile_and_is_reported_as_ignored(monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: ignored.append(report.exc_value))

    def refuses(s, b, h, i, j):
        if j == 2:
            raise ValueError("not this one")
        return s + 1

    found, returned = applied(refuses, "score", "keys", np.ones((1, 6)), 0, 0, np.zeros(1, np.int32), np.zeros(1, np.int32), ())
    same(found, [[2, 2, 1, 1, 1, 1]])
    assert returned == -1
    assert [(type(error), str(error)) for error in ignored] == [(ValueError, "not this one")]


# ---- speed that rests on what LLVM does ------------------------------------------------------------------------------------------


def code_of(function, role, element, aux=(), along="queries"):
    return lifted(function, role, element, along, aux).compiled.inspect_llvm()


@pytest.mark.skipif(register_bytes() < 32, reason="narrow registers: LLVM may find vectors not worth their while")
@pytest.mark.skipif(bool(numba.config.BOUNDSCHECK), reason="a loop that may raise takes one score after another")
@FORMATS
@ALONG
def test_stages_are_vectors(along, element):
    name = "float" if element is np.float32 else "double"
    cases = [
        (alibi, "score", (np.ones(4, element),)),
        (capped_by_attribute, "score", ()),
        (causal, "mask", ()),
    ]
    if along == "queries":  # what belongs to a query is gathered once for all keys
        cases.append((documents, "mask", (np.ones((1, 9), np.int32),)))
    for function, role, aux in cases:
        assert re.search(rf"store <\d+ x {name}>", code_of(function, role, element, aux, along)), function


# ---- block maps --------------------------------------------------------------------------------------------------------------------


def striped(b, h, i, j, stripes):
    return (i // 8 + j // 8 + h) % 3 == stripes[b]


@pytest.mark.parametrize("block", [(8, 8), (16, 5), (5, 16), (48, 128), (128, 128), (1, 1), (1000, 3)], ids=str)
@pytest.mark.parametrize("function", [causal, window, documents, striped, always], ids=lambda f: f.__name__)
def test_a_block_map_says_what_every_pair_says(function, block):
    aux = {documents: (np.repeat(np.arange(10), 16)[None, :].repeat(2, 0),), striped: (np.array([0, 2]),)}.get(function, ())
    B, Hq, T, S = 2, 2, 67, 130
    found = classes(function, aux, B, Hq, T, S, block)
    pairs = np.array([bool(function(*place, *aux)) for place in np.ndindex(B, Hq, T, S)]).reshape(B, Hq, T, S)
    rows, columns = (range(0, n, size) for n, size in zip((T, S), block, strict=True))
    assert found.dtype == np.int8
    assert found.shape == (B, Hq, len(rows), len(columns))
    for (m, i), (n, j) in itertools.product(enumerate(rows), enumerate(columns)):
        part = pairs[:, :, i : i + block[0], j : j + block[1]]
        expected = np.where(part.all((2, 3)), ALL, np.where(part.any((2, 3)), SOME, NONE))
        same(found[:, :, m, n], expected)


@pytest.mark.parametrize("sizes", [(0, 1, 3, 3), (1, 0, 3, 3), (1, 1, 0, 3), (1, 1, 3, 0)], ids=str)
def test_a_map_of_nothing_is_empty(sizes):
    assert classes(causal, (), *sizes).size == 0
