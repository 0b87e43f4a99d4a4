"""A caller's own functions of scores and positions: what they mean, against compositions in NumPy and FlexAttention, and what is refused."""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from test_bad_input import ODD_THINGS

import refattn as ra
from refattn import DtypeError, OperandError, ParameterError, ShapeError, catalog, entrywise, functions
from refattn.problem import bind

TAKERS = [name for name, variant in catalog.catalogue().items() if functions.takes_functions(variant)]
#: Three query heads to a key-value head, T and S differ, D and E differ.
B, HQ, HKV, T, S, D, E = 2, 6, 2, 9, 13, 5, 4


def operands(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": (B, HQ, T, D), "k": (B, HKV, S, D), "v": (B, HKV, S, E)}
    drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    for x in drawn.values():
        x.flat[-1] *= 8
    return {name: x.astype(dtype) for name, x in drawn.items()}


INDICES = tuple(np.ogrid[:B, :HQ, :T, :S])
SLOPES = 2.0 ** -np.arange(1.0, HQ + 1)
TABLE = np.random.default_rng(1).standard_normal((HQ, T + S))
DOCUMENTS = np.sort(np.random.default_rng(2).integers(0, 3, (B, S)), axis=1)


def alibi(score, b, h, i, j, slopes):
    return score + slopes[h] * (j - i)


def relative(score, b, h, i, j, table):
    return score + table[h, j - i + 9]


def capped(score, b, h, i, j):
    return 3.0 * math.tanh(score / 3.0)


def hidden_thirds(score, b, h, i, j):
    return -math.inf if j % 3 == 2 else score


def squeezed(score, b, h, i, j, slopes):
    return score / (1.0 + slopes[h] * abs(score)) - 0.25 * b


def squeezed_slope(score, b, h, i, j, slopes):
    return 1.0 / (1.0 + slopes[h] * abs(score)) ** 2


def same_document(b, h, i, j, documents):
    return documents[b, i] == documents[b, j]


def sees_nothing_at_times(b, h, i, j):
    return i != 4 and (i + j + h) % 2 == 0


#: A function, its arrays, and the same of whole arrays: scores and the four indices.
SCORE_MODS = {
    "alibi": (alibi, (SLOPES,), lambda s, b, h, i, j: s + SLOPES[h] * (j - i)),
    "relative bias": (relative, (TABLE,), lambda s, b, h, i, j: s + TABLE[h, j - i + 9]),
    "soft-cap": (capped, (), lambda s, b, h, i, j: 3.0 * np.tanh(s / 3.0)),
    "hides": (hidden_thirds, (), lambda s, b, h, i, j: np.where(j % 3 == 2, -np.inf, s)),
    "squeezed": (squeezed, (SLOPES,), lambda s, b, h, i, j: s / (1.0 + SLOPES[h] * np.abs(s)) - 0.25 * b),
}
MASK_MODS = {
    "documents": (same_document, (DOCUMENTS,), lambda b, h, i, j: DOCUMENTS[b, i] == DOCUMENTS[b, j]),
    "empty rows": (sees_nothing_at_times, (), lambda b, h, i, j: (i != 4) & ((i + j + h) % 2 == 0)),
}


def composed(x, normaliser, score_mod=None, mask_mod=None, bias=0.0, mask=True, causal=False, sinks=-math.inf, dtype=np.float64):
    """Attention of whole arrays in one format, as one writes it on a blackboard: outputs by name."""
    q, k, v = x["q"].astype(dtype), *(np.repeat(x[name].astype(dtype), HQ // HKV, axis=1) for name in "kv")
    scores = (q @ np.swapaxes(k, 2, 3)) * dtype(1 / math.sqrt(D))
    scores = (scores if score_mod is None else score_mod(scores, *INDICES).astype(dtype)) + dtype(bias)
    *_, i, j = INDICES
    seen = np.broadcast_to(mask, scores.shape) & (j <= i + S - T if causal else True) & (True if mask_mod is None else mask_mod(*INDICES))
    scores = np.where(seen, scores, dtype(-np.inf))
    if normaliser == "sigmoid":
        weights = 1 / (1 + np.exp(-(scores - dtype(math.log(S)))))
        return {"out": weights @ v, "weights": weights, "scores": scores - dtype(math.log(S))}
    sinks = np.broadcast_to(np.asarray(sinks, dtype), HQ)[:, None, None]
    top = np.maximum(scores.max(-1, keepdims=True), sinks)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + np.exp(sinks - top)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return {"out": weights @ v, "lse": lse, "weights": weights, "scores": scores}


def assert_within(found, expected, allowed):
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.where(finite, 0, found), np.where(finite, 0, expected))
    excess = np.where(finite, np.abs(np.subtract(found, expected, where=finite, out=np.zeros(found.shape))) - allowed, 0)
    assert (excess <= 0).all(), f"at {np.unravel_index(excess.argmax(), excess.shape)}: past the tolerance by {excess.max():g}"


def judged(name, x, expected, **call):
    """The definition's answer lies within the tolerance of `expected`, which is computed in float64 as well."""
    returns = tuple(expected)
    found = ra.attend(name, **x, **call, returns=returns, backend="definition")
    allowed = ra.tolerance(name, **x, **call, returns=returns, profile="math")
    for output, one, most in zip(returns, found, allowed, strict=True):
        assert_within(one, expected[output], most)
    return found


# ---- what they mean ----------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "alone": {},
    "causal": {"causal": True},
    "bias, mask": {"bias": np.linspace(-2.0, 2.0, HQ * S).reshape(HQ, 1, S), "mask": np.arange(S) % 5 != 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mod", SCORE_MODS)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_score_mod_takes_the_place_of_scores_before_bias_and_masks(name, mod, options):
    function, aux, whole = SCORE_MODS[mod]
    expected = composed(operands(), name, whole, **options)
    judged(name, operands(), expected, score_mod=function, aux=aux or None, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mod", MASK_MODS)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_mask_mod_hides_beside_all_other_masks(name, mod, options):
    function, aux, whole = MASK_MODS[mod]
    judged(name, operands(), composed(operands(), name, mask_mod=whole, **options), mask_mod=function, aux=aux or None, **options)


def test_both_with_sinks_and_rows_that_see_nothing():
    sinks = np.array([-np.inf, 0.0, 3.0, -40.0, 1.0, 0.5])
    for given in ({}, {"sinks": sinks}):
        expected = composed(operands(), "softmax", SCORE_MODS["squeezed"][2], MASK_MODS["empty rows"][2], **given)
        found = judged("softmax", operands(), expected, score_mod=squeezed, mask_mod=sees_nothing_at_times, aux=SLOPES, **given)
        assert (found[0][:, :, 4] == 0).all()
    out = ra.attention(**operands(), mask_mod=sees_nothing_at_times, empty_rows="uniform", backend="definition")
    mean = np.repeat(operands()["v"].mean(2), HQ // HKV, axis=1)
    np.testing.assert_allclose(out[:, :, 4], mean, rtol=0, atol=S * 2.0**-50 * np.abs(operands()["v"]).max())


def test_a_soft_cap_by_hand_is_the_soft_cap_of_the_variant():
    expected = dict(zip(("out", "lse"), ra.attention(**operands(), softcap=3.0, returns=("out", "lse"), backend="definition"), strict=True))
    judged("softmax", operands(), expected, score_mod=capped)


def test_a_score_mod_comes_after_the_soft_cap():
    whole = lambda s, b, h, i, j: 3.0 * np.tanh(s / 3.0) + SLOPES[h] * (j - i)  # noqa: E731
    judged("softmax", operands(), composed(operands(), "softmax", whole), score_mod=alibi, aux=SLOPES, softcap=3.0)


@pytest.mark.parametrize("name", TAKERS)
def test_every_variant_takes_a_function_that_adds_as_it_takes_a_bias_and_one_that_hides_as_a_mask(name):
    *_, h, i, j = INDICES
    bias, mask = SLOPES[h] * (j - i), MASK_MODS["documents"][2](*INDICES)
    returns = [o.name for o in catalog.variant(name).outputs]
    expected = ra.attend(name, **operands(), bias=bias[0], mask=mask, returns=returns, backend="definition")
    aux = {"slopes": SLOPES, "documents": DOCUMENTS}
    found = ra.attend(name, **operands(), score_mod=alibi, mask_mod=same_document, aux=aux, returns=returns, backend="definition")
    allowed = ra.tolerance(name, **operands(), bias=bias[0], mask=mask, profile="math")
    for one, other, most in zip(found, expected, allowed, strict=True):
        assert_within(one, other, most)


def test_hidden_entries_are_not_evaluated():
    asked, scored = [], []

    def asks(b, h, i, j):
        asked.append((b, h, i, j))
        return j != 3

    def scores(score, b, h, i, j):
        scored.append((b, h, i, j))
        return score

    x = operands()
    x["k"][:, :, 3] = x["v"][:, :, 3] = np.nan
    mask = np.arange(S) > 1
    out = ra.attention(**x, causal=True, mask=mask, mask_mod=asks, score_mod=scores, backend="definition")
    *_, i, j = INDICES
    allowed = np.broadcast_to((j <= i + S - T) & mask, (B, HQ, T, S))
    assert sorted(asked) == [tuple(index) for index in np.argwhere(allowed).tolist()]
    assert sorted(scored) == [index for index in sorted(asked) if index[3] != 3]
    assert np.isfinite(out).all()


def test_the_first_functions_of_python_and_those_numba_compiled_mean_the_same(monkeypatch):
    import numba

    for mod, (function, aux, _) in SCORE_MODS.items():
        plain = ra.attention(**operands(), score_mod=function, aux=aux or None, backend="definition")
        jitted = numba.njit(function)
        monkeypatch.setattr(entrywise, "PLAIN_ENTRIES", 0)
        for given in (function, jitted):
            compiled = ra.attention(**operands(), score_mod=given, aux=aux or None, backend="definition")
            most = ra.tolerance("softmax", **operands(), score_mod=function, aux=aux or None, returns="out", profile="math").out
            assert (np.abs(plain - compiled) <= most).all(), mod
        monkeypatch.undo()


@pytest.mark.compiled
def test_arithmetic_that_python_refuses_is_infinite_or_nan_as_in_compiled_code():
    def beyond(score, b, h, i, j):
        return math.exp(1e4 * (j == 2)) + math.log(j) + 0 * score

    *_, scores = ra.attention(**operands(), score_mod=beyond, returns=("out", "scores"), backend="definition")
    np.testing.assert_array_equal(scores[..., 0], -np.inf)
    np.testing.assert_array_equal(scores[..., 2], np.inf)


def test_a_layout_with_heads_inside_tells_functions_the_same_positions():
    turned = {name: np.swapaxes(x, 1, 2) for name, x in operands().items()}
    call = {"score_mod": alibi, "mask_mod": same_document, "aux": {"slopes": SLOPES, "documents": DOCUMENTS}, "backend": "definition"}
    np.testing.assert_array_equal(np.swapaxes(ra.attention(**turned, layout="BTHD", **call), 1, 2), ra.attention(**operands(), **call))


# ---- arrays of aux -----------------------------------------------------------------------------------------------------------------


def bound(**keywords):
    return bind(catalog.variant("softmax"), (), {**operands(), **keywords}).functions


def are(found, *expected):
    """Whether arrays are those given, not copies."""
    return len(found) == len(expected) and all(x.shape == y.shape and np.shares_memory(x, y) for x, y in zip(found, expected, strict=True))


def test_a_function_takes_all_arrays_or_none_or_those_it_names():
    def two(score, b, h, i, j, one, other):
        return score

    def hidden(b, h, i, j):
        return True

    def any_number(score, b, h, i, j, *arrays):
        return score

    def with_default(score, b, h, i, j, factor=2.0):
        return factor * score

    def mixed(b, h, i, j, documents, limit=3):
        return True

    one, other = SLOPES, TABLE
    taken = bound(score_mod=two, mask_mod=hidden, slope=any_number, aux=[one, other])
    assert [len(x) for x in (taken.score_aux, taken.mask_aux, taken.slope_aux)] == [2, 0, 2]
    assert are(taken.score_aux, one, other)
    assert are(bound(score_mod=alibi, aux=SLOPES).score_aux, SLOPES)
    assert bound(score_mod=with_default).score_aux == ()
    assert bound(score_mod=any_number).score_aux == ()
    named = bound(score_mod=two, mask_mod=mixed, slope=with_default, aux={"other": other, "documents": DOCUMENTS, "one": one, "more": one})
    assert are(named.score_aux, one, other) and are(named.mask_aux, DOCUMENTS) and are(named.slope_aux)
    assert bound() is None and bound(score_mod=None, aux=None) is None


def test_arrays_come_to_functions_in_types_compiled_code_knows():
    def any_number(score, b, h, i, j, *arrays):
        return score

    given = [
        np.ones(4, ml_dtypes.bfloat16), np.ones(4, np.float16), np.ones((4, 4), ">f8").T, np.ones(4, np.uint64), np.ones(4, bool), np.ones(4, "i2"),
        np.ones(8)[::2], np.array(3.0),
    ]  # fmt: skip
    arrays = bound(score_mod=any_number, aux=given).score_aux
    assert [x.dtype.name for x in arrays] == ["float32", "float32", "float64", "int64", "bool", "int16", "float64", "float64"]
    for x, original in zip(arrays, given, strict=True):
        assert x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative
        np.testing.assert_array_equal(x, original.astype(x.dtype))


def test_narrow_arrays_are_read_in_double_precision():
    slopes = SLOPES.astype(np.float32) * np.float32(1.1)
    for entries in (0, 10**6):  # compiled, and plain Python, whose float32 times an integer would be float32
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(entrywise, "PLAIN_ENTRIES", entries)
            scores = ra.attention(**operands(), score_mod=lambda s, b, h, i, j, x: x[h] * (j - i), aux=slopes, returns="scores", backend="definition")
        *_, h, i, j = INDICES
        np.testing.assert_array_equal(scores, np.broadcast_to(slopes.astype(np.float64)[h] * (j - i), scores.shape))


def test_a_captured_number_counts_as_it_is_at_the_call(monkeypatch):
    monkeypatch.setattr(entrywise, "PLAIN_ENTRIES", 0)  # compiled code would keep it

    def scores(factor):
        def mod(score, b, h, i, j):
            return factor

        def change(new):
            nonlocal factor
            factor = new

        def ask():
            return ra.attention(**operands(), score_mod=mod, returns="scores", backend="definition")

        return change, ask

    change, ask = scores(2.0)
    assert (ask() == 2.0).all()
    change(5)
    assert (ask() == 5.0).all()


# ---- gradients -----------------------------------------------------------------------------------------------------------------------


def test_gradients_of_the_definition_need_no_slope():
    x = {name: y[:1, :3, :4] if name == "q" else y[:1, :1, :5] for name, y in operands().items()}
    d_out = np.random.default_rng(3).standard_normal((1, 3, 4, E))
    i, j = np.ogrid[:4, :5]
    bias = np.ascontiguousarray(SLOPES[:3, None, None] * (j - i))
    expected = ra.gradients("softmax", **x, d_out=d_out, bias=bias, causal=True, backend="definition")
    found = ra.gradients("softmax", **x, d_out=d_out, score_mod=alibi, aux=SLOPES, causal=True, backend="definition")
    for name in ("d_q", "d_k", "d_v"):
        difference = np.abs(getattr(found, name) - getattr(expected, name))
        assert (difference <= found.errors[name] + expected.errors[name]).all(), name
        assert found.errors[name].max() < 1e-9
    assert found._fields == ("d_q", "d_k", "d_v")


def test_gradients_by_backpropagation_say_what_slope_is_for():
    for backend in ("auto", "cpu"):
        with pytest.raises(ParameterError, match=r"^softmax: score_mod has no slope; pass slope=\.\.\., or backend='definition'"):
            ra.gradients("softmax", **operands(), d_out=np.zeros((B, HQ, T, E)), score_mod=capped, backend=backend)


# ---- tolerance ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mod", SCORE_MODS)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_single_precision_is_within_the_tolerance_and_mistakes_are_not(name, mod):
    function, aux, whole = SCORE_MODS[mod]
    x = operands(np.float32)
    call = {"score_mod": function, "aux": aux or None, "bias": np.linspace(-1, 1, S, dtype=np.float32)}
    returns = ("out", "weights", "scores")
    found = composed(x, name, whole, bias=call["bias"], dtype=np.float32)
    report = ra.compare([found[n] for n in returns], name, **x, **call, returns=returns, profile="math")
    assert report.passed, report
    assert report.worst.ratio > 1e-3, "the tolerance says something"
    before = composed(x, name, lambda s, *at: whole(s * math.sqrt(D), *at), bias=call["bias"], dtype=np.float32)
    shifted = composed(x, name, lambda s, b, h, i, j: whole(s, b, h, i, np.maximum(j - 1, 0)) + s * 1e-3, bias=call["bias"], dtype=np.float32)
    for wrong in (composed(x, name, bias=call["bias"], dtype=np.float32), before, shifted):
        assert not ra.compare(wrong["out"], name, **x, **call, profile="math").passed


def test_the_tolerance_follows_the_steepness_of_a_function():
    def steep(score, b, h, i, j):
        return 50.0 * score

    x = operands(np.float32)
    exact = ra.attention(**{n: y.astype(np.float64) for n, y in x.items()}, score_mod=steep, returns="scores", backend="definition")
    found = composed(x, "softmax", lambda s, *_: np.float32(50) * s, dtype=np.float32)["scores"]
    allowed = ra.tolerance("softmax", **x, score_mod=steep, returns="scores", profile="math").scores
    assert (np.abs(found - exact) <= allowed).all()
    flat = ra.tolerance("softmax", **x, returns="scores", profile="math").scores
    assert (allowed > 10 * flat).all()


# ---- block masks -------------------------------------------------------------------------------------------------------------------


def counted(whole, shape, block):
    """The class of each tile, by counting."""
    visible = np.broadcast_to(whole(*np.ogrid[tuple(map(slice, shape))]), shape)
    classes = np.zeros((*shape[:2], -(-shape[2] // block[0]), -(-shape[3] // block[1])), np.int8)
    for b, h, m, n in np.ndindex(classes.shape):
        tile = visible[b, h, m * block[0] : (m + 1) * block[0], n * block[1] : (n + 1) * block[1]]
        classes[b, h, m, n] = 2 if tile.all() else 1 if tile.any() else 0
    return classes


MASKS = {
    "causal": (lambda b, h, i, j: j <= i, (1, 1, 300, 300), None),
    "by head": (lambda b, h, i, j: i - j >= 40 * h, (1, 3, 130, 257), None),
    "by batch": (lambda b, h, i, j: (i // 50 + j // 30) % (b + 2) == 0, (2, 1, 131, 70), None),
    "nothing": (lambda b, h, i, j: False, (1, 1, 20, 30), None),
    "everything": (lambda b, h, i, j: True, (1, 1, 129, 30), None),
    "no keys": (lambda b, h, i, j: True, (1, 1, 20, 0), None),
    "an array": (lambda b, h, i, j, x: x[i] == x[j], (1, 1, 200, 200), np.repeat(np.arange(5), 40)),
}


@pytest.mark.parametrize("block", [(128, 128), (32, 16), (1, 7)])
@pytest.mark.parametrize("mask", MASKS)
def test_a_block_mask_classes_tiles_as_counting_does(mask, block):
    function, shape, array = MASKS[mask]
    whole = (lambda b, h, i, j: function(b, h, i, j, array)) if array is not None else lambda b, h, i, j: np.asarray(function(b, h, i, j))
    blocks = ra.block_mask(function, **dict(zip(("B", "Hq", "T", "S"), shape, strict=True)), aux=array, block=block)
    expected = counted(whole, shape, block)
    assert blocks.classes.dtype == np.int8
    np.testing.assert_array_equal(blocks.classes, expected)
    np.testing.assert_array_equal(entrywise.tile_classes(function, blocks.aux, shape, block), expected)


def test_a_block_mask_shows_its_sizes_and_what_it_skips():
    shown = repr(ra.block_mask(sees_nothing_at_times, T=40, S=30, Hq=2, block=(10, 10)))
    assert shown == "BlockMask(sees_nothing_at_times, B=1, Hq=2, T=40, S=30, block=(10, 10), 0.0% of 24 tiles skipped)"
    assert "37.5% of 16 tiles" in repr(ra.block_mask(lambda b, h, i, j: j <= i, T=512, S=512))
    assert repr(ra.block_mask(lambda b, h, i, j: True, T=0, S=3)).endswith("no tiles)")


def test_a_block_mask_implies_its_function_and_arrays_as_they_were():
    documents = DOCUMENTS.copy()
    blocks = ra.block_mask(same_document, T=T, S=S, B=B, aux=documents, block=(4, 4))
    expected = ra.attention(**operands(), mask_mod=same_document, aux=DOCUMENTS, backend="definition")
    np.testing.assert_array_equal(
        ra.attention(**operands(), mask_mod=same_document, aux=documents, block_mask=blocks, backend="definition"), expected
    )
    documents[:] = 0
    for given in ({}, {"mask_mod": same_document}):
        np.testing.assert_array_equal(ra.attention(**operands(), block_mask=blocks, backend="definition", **given), expected)
    both = ra.attention(**operands(), block_mask=blocks, score_mod=alibi, aux=SLOPES, backend="definition")
    named = {"slopes": SLOPES, "documents": DOCUMENTS}
    np.testing.assert_array_equal(both, ra.attention(**operands(), score_mod=alibi, mask_mod=same_document, aux=named, backend="definition"))


def test_the_definition_asks_the_function_and_not_the_map():
    blocks = ra.block_mask(sees_nothing_at_times, T=T, S=S, block=(4, 4), Hq=HQ)
    wrong = dataclasses.replace(blocks, classes=np.zeros_like(blocks.classes))
    expected = ra.attention(**operands(), mask_mod=sees_nothing_at_times, backend="definition")
    np.testing.assert_array_equal(ra.attention(**operands(), block_mask=wrong, backend="definition"), expected)


# ---- what is refused -----------------------------------------------------------------------------------------------------------------

GLOBAL = np.ones(4)


def reads_a_global(score, b, h, i, j):
    return score + GLOBAL[h]


def helper(h):
    return GLOBAL[h]


def calls_a_helper(score, b, h, i, j):
    return score + helper(h)


def captures(array):
    def mod(score, b, h, i, j):
        return score + array[h]

    return mod


def reads_a_global_inside(score, b, h, i, j):
    return score + sum(GLOBAL[n] for n in range(h))


def jitted(function):
    import numba

    return numba.njit(function)


class Tensor:
    def __array__(self, dtype=None, copy=None):
        return np.ones(4)


def ok(score, b, h, i, j):
    return score


def shown(b, h, i, j):
    return True


MAP = ra.block_mask(shown, T=T, S=S)


def with_keyword(score, b, h, i, j, *, x):
    return score


REFUSED = {
    "a name": ({"score_mod": "alibi"}, ParameterError, ["score_mod is a str", "a Python function", "numba.njit"]),
    "a built-in": ({"score_mod": max}, ParameterError, ["score_mod is a builtin_function_or_method", "a Python function"]),
    "a ufunc": ({"mask_mod": np.add}, ParameterError, ["mask_mod is a ufunc", "a Python function"]),
    "a partial": ({"score_mod": functools.partial(ok)}, ParameterError, ["score_mod is a partial", "a Python function"]),
    "a method": ({"score_mod": Tensor().__array__}, ParameterError, ["score_mod is a method", "a Python function"]),
    "too few parameters": ({"score_mod": lambda s, b, h: s}, ParameterError, [r"\(s, b, h\) takes 3", r"must take 5, \(score, b, h, i, j\)"]),
    "a mask of scores": ({"mask_mod": ok}, ParameterError, [r"mask_mod ok\(score, b, h, i, j\) takes 5", r"must take 4, \(b, h, i, j\)"]),
    "a score of positions": ({"score_mod": shown}, ParameterError, ["score_mod shown", "takes 4", "must take 5"]),
    "arrays it is not given": ({"score_mod": alibi}, ParameterError, ["score_mod alibi", "takes 6", "must take 5"]),
    "more arrays than it takes": (
        {"score_mod": alibi, "aux": (SLOPES, TABLE)},
        ParameterError,
        ["score_mod alibi", "takes 6", "must take 5", "or 7 with the arrays of aux"],
    ),
    "a name aux lacks": ({"score_mod": alibi, "aux": {"slope": SLOPES}}, ParameterError, ["array of aux named 'slopes'", "did you mean 'slope'"]),
    "keyword-only": ({"score_mod": with_keyword, "aux": {"x": SLOPES}}, ParameterError, ["with_keyword", "keyword-only", "by position"]),
    "aux nobody takes": ({"score_mod": ok, "aux": SLOPES}, ParameterError, ["aux is given", "no function takes it"]),
    "aux and no function": ({"aux": SLOPES}, ParameterError, ["aux is given", "no function takes it"]),
    "aux a number": ({"score_mod": alibi, "aux": 1.0}, DtypeError, ["aux is a float", "not an array"]),
    "aux a list of numbers": ({"score_mod": alibi, "aux": [1.0]}, DtypeError, [r"aux\[0\] is a float", "not an array"]),
    "aux of text": ({"score_mod": alibi, "aux": np.array(["a"])}, DtypeError, ["aux is <U1", "floating point, integer or boolean"]),
    "aux complex": ({"score_mod": alibi, "aux": {"slopes": 1j * SLOPES}}, DtypeError, [r"aux\['slopes'\] is complex128", "integer or boolean"]),
    "aux beyond int64": ({"score_mod": alibi, "aux": np.array([2**64 - 1], np.uint64)}, OperandError, ["18446744073709551615", r"2\*\*63"]),
    "aux with names that are none": ({"score_mod": alibi, "aux": {1: SLOPES}}, ParameterError, ["aux maps names", "1 is no name"]),
    "slope alone": ({"slope": ok}, ParameterError, ["slope is the derivative of a score_mod, and none is given"]),
    "captured by a closure": ({"score_mod": captures(np.ones(4))}, ParameterError, ["score_mod captures array", "as it is today", "pass it as aux"]),
    "captured, a foreign array": ({"score_mod": captures(Tensor())}, ParameterError, ["score_mod captures array", "pass it as aux"]),
    "captured, in a tuple": ({"score_mod": captures((1.0, np.ones(2)))}, ParameterError, ["score_mod captures array", "pass it as aux"]),
    "a global of an inner function": ({"score_mod": reads_a_global_inside}, ParameterError, ["score_mod captures GLOBAL"]),
    "captured as a default": ({"mask_mod": lambda b, h, i, j, x=GLOBAL: x[h] > 0}, ParameterError, ["mask_mod captures x, an array"]),
    "a global": ({"score_mod": reads_a_global}, ParameterError, ["score_mod captures GLOBAL", "pass it as aux"]),
    "a global of a helper": ({"score_mod": calls_a_helper}, ParameterError, ["score_mod captures GLOBAL", "pass it as aux"]),
    "captured by a compiled function": ({"score_mod": jitted(captures(np.ones(4)))}, ParameterError, ["score_mod captures array"]),
    "block_mask a function": ({"block_mask": shown}, ParameterError, ["block_mask is a function", "refattn.block_mask"]),
    "block_mask of another function": (
        {"block_mask": MAP, "mask_mod": sees_nothing_at_times},
        ParameterError,
        ["block_mask was made of shown", "mask_mod is sees_nothing_at_times", "one of the two"],
    ),
    "block_mask of other arrays": (
        {"block_mask": ra.block_mask(same_document, T=T, S=S, aux=DOCUMENTS), "mask_mod": same_document, "aux": DOCUMENTS + 1},
        ParameterError,
        ["block_mask was made with other arrays", "make it again"],
    ),
    "block_mask, T": ({"block_mask": ra.block_mask(shown, T=T + 1, S=S)}, ShapeError, [f"block_mask has T={T + 1}", f"operands have T={T}"]),
    "block_mask, S": ({"block_mask": ra.block_mask(shown, T=T, S=1)}, ShapeError, ["block_mask has S=1", f"operands have S={S}"]),
    "block_mask, B": ({"block_mask": ra.block_mask(shown, T=T, S=S, B=3)}, ShapeError, ["block_mask has B=3", "must be 1 or B=2"]),
    "block_mask, Hq": ({"block_mask": ra.block_mask(shown, T=T, S=S, Hq=2)}, ShapeError, ["block_mask has Hq=2", f"must be 1 or Hq={HQ}"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case):
    changes, exception, fragments = REFUSED[case]
    with pytest.raises(exception) as caught:
        ra.attention(**operands(), **changes, backend="definition")
    assert type(caught.value) is exception
    assert re.match("softmax: ", str(caught.value)) and "\n" not in str(caught.value)
    assert [f for f in fragments if not re.search(f, str(caught.value))] == []


@pytest.mark.parametrize("keyword", sorted(functions.KEYWORDS))
def test_an_odd_thing_in_any_place_is_refused_by_an_error_of_ours_or_understood(keyword):
    rest = {"aux": {"score_mod": alibi}, "slope": {"score_mod": capped}}.get(keyword, {})
    for thing in ODD_THINGS:
        try:
            out = ra.attention(**operands(), **{keyword: thing}, **rest, backend="definition")
        except ra.RefattnError as refusal:
            assert str(refusal).startswith(("softmax", "score_mod alibi"))
        else:
            assert out.shape == (B, HQ, T, E)


MAPS_REFUSED = {
    "T": ({"T": -1}, ["T=-1", "from 0"]),
    "S a fraction": ({"S": 2.5}, ["S=2.5", "whole number"]),
    "no batch": ({"B": 0}, ["B=0", "from 1"]),
    "heads": ({"Hq": "all"}, ["Hq='all'", "from 1"]),
    "block a number": ({"block": 128}, ["block=128", "a pair of whole numbers"]),
    "block of zero": ({"block": (128, 0)}, [r"block=\(128, 0\)", "from 1"]),
    "no function": ({"mask_mod": None}, ["mask_mod is a NoneType", "a Python function"]),
    "aux nobody takes": ({"aux": SLOPES}, ["aux is given", "mask_mod does not take it"]),
    "an array captured": ({"mask_mod": lambda b, h, i, j, x=GLOBAL: x[h] > 0}, ["mask_mod captures x"]),
}


@pytest.mark.parametrize("case", MAPS_REFUSED)
def test_a_block_mask_of_the_wrong_things_says_why(case):
    changes, fragments = MAPS_REFUSED[case]
    with pytest.raises(ParameterError) as caught:
        ra.block_mask(**{"mask_mod": shown, "T": 4, "S": 4, **changes})
    assert str(caught.value).startswith("block_mask: ")
    assert [f for f in fragments if not re.search(f, str(caught.value))] == []


@pytest.mark.parametrize("keyword", sorted(functions.KEYWORDS))
def test_a_variant_whose_scores_are_its_own_affair_says_which_take_functions(keyword):
    given = {"score_mod": ok, "slope": ok, "mask_mod": shown, "aux": SLOPES, "block_mask": MAP}[keyword]
    x = operands()
    for name in ("linear", "luong_dot"):
        arrays = list(x.values()) if name == "linear" else [y[:, 0] for y in x.values()]
        with pytest.raises(ParameterError, match=f"^{name} takes no {keyword}; variants that do are .*softmax"):
            ra.attend(name, *arrays, **{keyword: given})


def test_check_asks_calls_of_its_own_sizes():
    with pytest.raises(ParameterError, match=r"^softmax: check asks calls of its own sizes and takes no score_mod; judge arrays with compare"):
        ra.check(ra.attention, score_mod=ok)


def not_a_number(score, b, h, i, j):
    return "high"


def undefined(score, b, h, i, j):
    return score + no_such_name  # noqa: F821 - the mistake under test


@pytest.mark.parametrize("entries", [0, 10**6])
@pytest.mark.parametrize("function", [not_a_number, undefined])
def test_a_function_that_cannot_be_evaluated_is_named_in_one_line(monkeypatch, function, entries):
    monkeypatch.setattr(entrywise, "PLAIN_ENTRIES", entries)
    with pytest.raises(ParameterError, match=f"^score_mod {function.__name__} cannot be evaluated: .") as caught:
        ra.attention(**operands(), score_mod=function, backend="definition")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


# ---- without a compiler, and with the engine ---------------------------------------------------------------------------------------

PLAIN = """
import numpy as np, refattn as ra
x = np.linspace(-1, 1, 2 * 3 * 20 * 8).reshape(2, 3, 20, 8)
slopes = np.array([0.5, 0.25, 0.125])
def alibi(score, b, h, i, j, slopes):
    return score + slopes[h] * (j - i)
def even(b, h, i, j):
    return (i + j) % 2 == 0
i, j = np.ogrid[:20, :20]
expected = ra.attention(x, x, x, bias=slopes[:, None, None] * (j - i), mask=(i + j) % 2 == 0, backend="definition")
blocks = ra.block_mask(even, T=20, S=20, block=(1, 1))
assert (blocks.classes[0, 0] == 2 * ((i + j) % 2 == 0)).all()
found = ra.attention(x, x, x, score_mod=alibi, block_mask=blocks, aux=slopes)
assert np.abs(found - expected).max() <= ra.tolerance("softmax", x, x, x, score_mod=alibi, block_mask=blocks, aux=slopes).out.max()
print("right")
"""


def test_without_a_compiler_functions_run_as_plain_python():
    done = subprocess.run([sys.executable, "-c", PLAIN], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "right", done.stderr[-2000:]


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mod", SCORE_MODS)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_usual_backend_agrees_with_the_definition(name, mod, dtype):
    function, aux, _ = SCORE_MODS[mod]
    rng = np.random.default_rng(4)
    shapes = ((B, HQ, 70, 16), (B, HKV, 130, 16), (B, HKV, 130, 24))
    x = dict(zip("qkv", (rng.standard_normal(shape).astype(dtype) for shape in shapes), strict=True))
    aux = tuple(np.concatenate([y] * 30, axis=-1) for y in aux)  # positions go further than above
    blocks = ra.block_mask(shown_by_stripes, T=70, S=130, block=(32, 16))
    for call in ({"causal": True}, {"block_mask": blocks}, {"mask_mod": shown_by_stripes}):
        call = {**call, "score_mod": function, "aux": aux or None}  # noqa: PLW2901
        truth = ra.attend(name, **{n: y.astype(np.float64) for n, y in x.items()}, **call, backend="definition")
        found = ra.attend(name, **x, **call)
        assert found.dtype == dtype
        assert_within(found.astype(np.float64), truth, ra.tolerance(name, **x, **call, returns="out").out)


def shown_by_stripes(b, h, i, j):
    return (i // 32 + j // 48) % 2 == 0


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_gradients_of_the_usual_backend_agree_with_the_definition(name):
    x, d_out = operands(np.float64, 5), np.random.default_rng(6).standard_normal((B, HQ, T, E))
    call = {"d_out": d_out, "score_mod": squeezed, "slope": squeezed_slope, "aux": SLOPES, "causal": True}
    expected, found = ra.gradients(name, **x, **call, backend="definition"), ra.gradients(name, **x, **call)
    for field in ("d_q", "d_k", "d_v"):
        exact, error = getattr(expected, field), expected.errors[field]
        roundings = (D + E + 2 * S * HQ) * 2.0**-52 * np.abs(exact).max()  # of the sums a gradient is made of, to first order
        assert (np.abs(getattr(found, field) - exact) <= error + 8 * roundings).all(), field


# ---- somebody else's ----------------------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mask", [None, *MASK_MODS])
@pytest.mark.parametrize("mod", SCORE_MODS)
def test_flex_attention_means_the_same(mod, mask):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x = {name: torch.from_numpy(y) for name, y in operands().items()}
    slopes, table, documents = (torch.from_numpy(y) for y in (SLOPES, TABLE, DOCUMENTS))
    theirs = {
        "alibi": lambda s, b, h, i, j: s + slopes[h] * (j - i),
        "relative bias": lambda s, b, h, i, j: s + table[h, j - i + 9],
        "soft-cap": lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0),
        "hides": lambda s, b, h, i, j: torch.where(j % 3 == 2, -math.inf, s),
        "squeezed": lambda s, b, h, i, j: s / (1.0 + slopes[h] * torch.abs(s)) - 0.25 * b,
        "documents": lambda b, h, i, j: documents[b, i] == documents[b, j],
        "empty rows": lambda b, h, i, j: (i != 4) & ((i + j + h) % 2 == 0),
    }
    blocks = None if mask is None else create_block_mask(theirs[mask], B, HQ, T, S, device="cpu")
    out, lse = flex_attention(query=x["q"], key=x["k"], value=x["v"], score_mod=theirs[mod], block_mask=blocks, enable_gqa=True, return_lse=True)
    function, aux, _ = SCORE_MODS[mod]
    call = {"score_mod": function}
    names = dict(zip(("slopes", "table", "documents"), (SLOPES, TABLE, DOCUMENTS), strict=True))
    if mask is not None:
        call["mask_mod"] = MASK_MODS[mask][0]
    if aux or mask == "documents":
        call["aux"] = names
    judged("softmax", operands(), {"out": out.numpy(), "lse": lse.numpy()}, **call)
