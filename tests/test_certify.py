"""Certified results against a transcription of the definition in Arb balls that shares no code with the package, rounding included."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import flint
import ml_dtypes
import numpy as np
import pytest

import refattn as ra
from refattn.exact import trusted

arb = flint.arb

pytestmark = pytest.mark.compiled

DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn")
BITS = 400


# ---- the independent side --------------------------------------------------------------------------------------------------------


def balls(q, k, v, *, scale=None, cap=None, bias=None, seen=None, sink=None):
    """Scores, weights, outputs and lse of one head, as balls; `seen` is a boolean matrix, a row may see nothing."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[1] ** -0.5 if scale is None else scale
    rows = []
    for i in range(len(q)):
        s = {}
        for j in range(len(k)):
            if (seen is None or seen[i, j]) and (bias is None or bias[i, j] != -np.inf):
                x = sum((arb(float(a)) * arb(float(b)) for a, b in zip(q[i], k[j], strict=True)), arb(0)) * arb(scale)
                x = x if cap is None else arb(cap) * (x / arb(cap)).tanh()
                s[j] = x if bias is None else x + arb(float(bias[i, j]))
        m = max((float(x.mid()) for x in s.values()), default=0.0)
        if sink is not None:
            m = max(m, sink)
        m = m if math.isfinite(m) else 0.0
        e = {j: (x - arb(m)).exp() for j, x in s.items()}
        total = sum(e.values(), arb(0)) + (arb(0) if sink is None else (arb(sink) - arb(m)).exp())
        w = {j: x / total for j, x in e.items()}
        out = [sum((w[j] * arb(float(v[j, c])) for j in w), arb(0)) for c in range(v.shape[1])] if w else [arb(0)] * v.shape[1]
        rows.append((s, w, out, arb(m) + total.log() if w or sink is not None else None))
    return rows


def is_nearest(value, ball):
    """Whether a number of a format is the one nearest to what a ball encloses, ties to even; None where the ball does not tell."""
    dtype = value.dtype
    info = ml_dtypes.finfo(dtype)
    largest, step = Fraction(float(info.max)), None
    x = float(value)
    if not math.isfinite(x):  # from half a step above the largest number on
        below = Fraction(float(step_of(np.array(info.max, dtype), -1)))
        edge = largest + (largest - below) / 2
        return bool(abs(ball) >= fraction(edge)) if math.isnan(x) or (x > 0) == bool(ball > 0) else False
    at = Fraction(x)
    step = [Fraction(float(y)) if math.isfinite(float(y)) else None for y in (step_of(value, -1), step_of(value, +1))]
    lower = at - (largest - Fraction(float(step_of(np.array(info.max, dtype), -1)))) / 2 if step[0] is None else (at + step[0]) / 2
    upper = at + (largest - Fraction(float(step_of(np.array(info.max, dtype), -1)))) / 2 if step[1] is None else (at + step[1]) / 2
    if bool(ball > fraction(lower)) and bool(ball < fraction(upper)):
        return True
    if bool(ball < fraction(lower)) or bool(ball > fraction(upper)):
        return False
    return None


def step_of(value, direction):
    """The neighbour of a number in its format, upwards or downwards, by counting in its bits."""
    bits = np.array(value).view({1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[value.dtype.itemsize])
    n = int(bits) if int(bits) >= 0 else -(int(bits) + 2 ** (8 * value.dtype.itemsize - 1))  # a line of whole numbers, both zeros at 0
    n += direction
    if n < 0:
        n = -n - 2 ** (8 * value.dtype.itemsize - 1)
    return np.array(n, bits.dtype).view(value.dtype)


def fraction(x):
    return arb(flint.fmpq(x.numerator, x.denominator))


def even(value):
    return int(np.array(value).view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[value.dtype.itemsize])) % 2 == 0


def agrees(found, at, ball, exact=None):
    """A certified element against a ball, or against the rational number that it is."""
    assert found.rounded[at], (at, found.value[at], found.tier[at])
    value, bound = found.value[at], found.bound[at]
    verdict = is_nearest(value, ball)
    if verdict is None:  # a tie, or so near one that the ball does not tell: both neighbours are as near
        assert found.tier[at] == 3, (at, value, "undecided at this many bits")
        assert even(value), (at, value)
        verdict = True
    assert verdict, (at, value, ball)
    if math.isfinite(bound):
        assert not bool(abs(ball - arb(float(value))) > arb(float(bound))), (at, value, bound, ball)
        info = ml_dtypes.finfo(value.dtype)
        assert bound <= float(info.eps) * abs(float(value)) + float(info.smallest_subnormal)  # and it is no more than the rounding


# ---- inputs that are unkind --------------------------------------------------------------------------------------------------------


def inputs(kind, rng, n_q=5, n_k=9, d=8, e=4):
    q, k, v = rng.standard_normal((n_q, d)), rng.standard_normal((n_k, d)), rng.standard_normal((n_k, e))
    keywords = {}
    if kind == "peaked":
        q, k = 12.0 * q, 6.0 * k
    elif kind == "tied":  # equal scores in whole rows and in parts of rows, values whose means are ties of narrow formats
        q[0] = 0.0
        k[1] = k[0]
        k[4:] = k[3]
        v = rng.integers(-9, 10, v.shape) * 2.0**-3 + 1.0
        v[:, 0] = 1.0 + 2.0**-9
        v[:2, 1] = 1.0
        q[1], k[:] = q[1] * 0.0, k
    elif kind == "huge":
        q, v = 1e3 * q, v * 10.0 ** rng.integers(-3, 5, v.shape)
    elif kind == "tiny":
        q, k, v = q * 1e-30, k * 1e-30, v * 10.0 ** rng.integers(-44, -3, v.shape)
    elif kind == "masked":
        seen = rng.random((n_q, n_k)) < 0.5
        seen[:, 0] |= ~seen.any(axis=1)
        seen[0] = False
        bias = np.where(rng.random((n_q, n_k)) < 0.15, -1e9, rng.standard_normal((n_q, n_k)))
        bias[1, 3] = -np.inf
        keywords = {"mask": seen, "bias": bias}
    elif kind == "capped":
        q, keywords = 4.0 * q, {"softcap": 3.0}
    elif kind == "sink":
        keywords = {"sinks": np.array([0.75])}
    return q, k, v, keywords


KINDS = ("random", "peaked", "tied", "huge", "tiny", "masked", "capped", "sink")


def judged(kind, dtype, seed):
    """Every output of one call judged; how many elements that were."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    q, k, v, keywords = inputs(kind, rng)
    found = ra.certify("softmax", *(x[None, None] for x in (q, k, v)), dtype=dtype, returns=("out", "lse", "weights", "scores"), **keywords)
    sink = keywords.get("sinks")
    rows = balls(
        q, k, v, cap=keywords.get("softcap"), bias=keywords.get("bias"), seen=keywords.get("mask"), sink=None if sink is None else float(sink[0])
    )
    count = 0
    for i, (s, w, out, lse) in enumerate(rows):
        for c, ball in enumerate(out):
            agrees(found.out, (0, 0, i, c), ball)
        for j in range(len(k)):
            if j in s:
                agrees(found.scores, (0, 0, i, j), s[j])
                agrees(found.weights, (0, 0, i, j), w[j])
            else:
                assert found.scores.value[0, 0, i, j] == -np.inf or dtype.startswith("float8")
                assert found.weights.value[0, 0, i, j] == 0.0
        if lse is not None:
            agrees(found.lse, (0, 0, i), lse)
        else:
            assert found.lse.value[0, 0, i] == -np.inf
        count += len(out) + 2 * len(s) + 1
    return count


@pytest.fixture(autouse=True)
def precision():
    with flint.ctx.workprec(BITS):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_exact_numbers_rounded_once(kind, dtype):
    assert sum(judged(kind, dtype, seed) for seed in range(2)) > 100


# ---- gradients -------------------------------------------------------------------------------------------------------------------


def gradient_balls(q, k, v, d_out, d_lse, *, cap=None, bias=None, seen=None, sink=None):
    """d_q, d_k, d_v, d_bias and d_sink of one head by the chain rule, as balls."""
    n_q, n_k, scale = len(q), len(k), q.shape[1] ** -0.5
    rows = balls(q, k, v, cap=cap, bias=bias, seen=seen, sink=sink)
    zeros = lambda *full: {at: arb(0) for at in np.ndindex(*full)}  # noqa: E731
    found = {"d_q": zeros(*q.shape), "d_k": zeros(*k.shape), "d_v": zeros(*v.shape), "d_bias": zeros(n_q, n_k), "d_sinks": {(0,): arb(0)}}
    for i, (_, shares, _, _) in enumerate(rows):
        if not shares and sink is None:
            continue
        w = dict.fromkeys(shares, arb(1)) if len(shares) == 1 and sink is None else shares
        d_w = {j: sum((arb(float(a)) * arb(float(b)) for a, b in zip(d_out[i], v[j], strict=True)), arb(0)) for j in w}
        mean = sum((w[j] * d_w[j] for j in w), arb(0)) - arb(float(d_lse[i]))
        if sink is not None:
            found["d_sinks"][0,] -= (1 - sum(w.values(), arb(0))) * mean
        for j in w:
            d_s = w[j] * (d_w[j] - mean)
            found["d_bias"][i, j] = d_s
            for c in range(v.shape[1]):
                found["d_v"][j, c] += w[j] * arb(float(d_out[i, c]))
            product = sum((arb(float(a)) * arb(float(b)) for a, b in zip(q[i], k[j], strict=True)), arb(0)) * arb(scale)
            d_product = d_s * arb(scale) * (1 if cap is None else 1 - (product / arb(cap)).tanh() ** 2)
            for x in range(q.shape[1]):
                found["d_q"][i, x] += d_product * arb(float(k[j, x]))
                found["d_k"][j, x] += d_product * arb(float(q[i, x]))
    return found


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("kind", ["random", "peaked", "huge", "tiny", "masked", "capped", "sink"])
def test_gradients_are_the_exact_numbers_rounded_once(kind, dtype):
    rng = np.random.default_rng([7, KINDS.index(kind)])
    q, k, v, keywords = inputs(kind, rng)
    d_out, d_lse = rng.standard_normal((len(q), v.shape[1])), rng.standard_normal(len(q))
    sink = keywords.get("sinks")
    found = ra.certify("softmax", *(x[None, None] for x in (q, k, v)), d_out=d_out[None, None], d_lse=d_lse[None, None], dtype=dtype, **keywords)
    expected = gradient_balls(
        q, k, v, d_out, d_lse, cap=keywords.get("softcap"), bias=keywords.get("bias"), seen=keywords.get("mask"),
        sink=None if sink is None else float(sink[0]),
    )  # fmt: skip
    assert found._fields == ("d_q", "d_k", "d_v", *(("d_bias",) if "bias" in keywords else ()), *(("d_sinks",) if "sinks" in keywords else ()))
    for name in found._fields:
        result = getattr(found, name)
        for at, ball in expected[name].items():
            agrees(result, at if name == "d_sinks" else at if name == "d_bias" else (0, 0, *at), ball)


@pytest.mark.parametrize("full", [(), (5,), (3, 1), (4, 1, 5), (2, 1, 1, 5), (2, 4, 1, 1), (4, 3, 5)])
def test_what_a_bias_receives_is_summed_over_the_axes_it_lacks(full):
    rng = np.random.default_rng(3)
    q, k, v, d_out = (rng.standard_normal(x) for x in ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 4, 3, 4)))
    bias = rng.standard_normal(full)
    one = ra.certify("softmax", q, k, v, bias=bias, d_out=d_out, returns="d_bias")
    all_of_it = ra.certify("softmax", q, k, v, bias=np.broadcast_to(bias, (2, 4, 3, 5)), d_out=d_out, returns="d_bias")
    terms = np.array([Fraction(x) for x in all_of_it.value.ravel().tolist()]).reshape(2, 4, 3, 5)
    padded = (1,) * (4 - bias.ndim) + bias.shape
    axes = tuple(n for n in range(4) if padded[n] == 1)
    sums = np.asarray(terms.sum(axis=axes)).reshape(bias.shape)
    slack = all_of_it.bound.sum()
    assert one.rounded.all()
    for at in np.ndindex(*bias.shape):
        assert abs(Fraction(float(one.value[at])) - sums[at]) <= Fraction(slack) + Fraction(float(one.bound[at]))


# ---- forms of a call ---------------------------------------------------------------------------------------------------------------


def call(rng, batch=2, heads=4, kv_heads=2, n_q=6, n_k=11, d=8, e=5, dtype=np.float64):
    shapes = ((batch, heads, n_q, d), (batch, kv_heads, n_k, d), (batch, kv_heads, n_k, e))
    return tuple(rng.standard_normal(x).astype(dtype) for x in shapes)


@pytest.mark.parametrize(
    "params",
    [{}, {"causal": True}, {"causal": "top_left"}, {"window": (2, 1)}, {"causal": True, "window": (3, None), "softcap": 2.0}, {"scale": -0.4}],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_parameter_means_what_the_definition_says(params, dtype):
    q, k, v = call(np.random.default_rng(0), dtype=ml_dtypes.bfloat16)
    names = ("out", "lse", "weights", "scores")
    found = ra.certify("softmax", q, k, v, returns=names, dtype=dtype, **params)
    expected = ra.attend("softmax", *(x.astype(np.float64) for x in (q, k, v)), returns=names, backend="definition", **params)
    for one, other in zip(found, expected, strict=True):
        assert one.rounded.all()
        finite = np.isfinite(other)
        np.testing.assert_array_equal(one.value[~finite], other[~finite])
        assert np.all(np.abs(one.value[finite] - other[finite]) <= one.bound[finite] + 1e-13)


def test_gradients_of_grouped_heads_and_masks_agree_with_the_engine():
    rng = np.random.default_rng(1)
    q, k, v = call(rng, n_q=70, n_k=90)
    keywords = {"causal": True, "softcap": 3.0, "bias": rng.standard_normal((4, 1, 90)), "sinks": rng.standard_normal(4)}
    cotangents = {"d_out": rng.standard_normal((2, 4, 70, 5)), "d_lse": rng.standard_normal((2, 4, 70))}
    found = ra.certify("softmax", q, k, v, **keywords, **cotangents)
    expected = ra.gradients("softmax", q, k, v, **keywords, **cotangents)
    for name in expected._fields:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.rounded.all(), name
        assert np.max(np.abs(one.value - other)) <= 1e-12 * np.max(np.abs(other)), name


def test_layouts_and_other_variants():
    rng = np.random.default_rng(2)
    q, k, v = call(rng)
    turned = [np.swapaxes(x, 1, 2) for x in (q, k, v)]
    straight, other = ra.certify("softmax", q, k, v), ra.certify("softmax", *turned, layout="BTHD")
    for part in ("value", "bound", "tier", "rounded"):
        np.testing.assert_array_equal(getattr(other, part), np.swapaxes(getattr(straight, part), 1, 2))
    grads = ra.certify("softmax", *turned, layout="BTHD", d_out=np.swapaxes(straight.value, 1, 2), returns=("d_k",))
    np.testing.assert_array_equal(grads.value, np.swapaxes(ra.certify("softmax", q, k, v, d_out=straight.value, returns="d_k").value, 1, 2))
    for name, keywords in (("luong_dot", {}), ("article_sdpa", {"axis": 2, "mask": (rng.random((2, 6, 11)) < 0.7).astype(float)})):
        flat = [q[:, 0], k[:, 0], v[:, 0]]
        found = ra.certify(name, *flat, returns=("out", "weights", "scores"), **keywords)
        expected = ra.attend(name, *flat, returns=("out", "weights", "scores"), backend="definition", **keywords)
        for one, answer in zip(found, expected, strict=True):
            assert one.rounded.all()
            finite = np.isfinite(answer)
            assert np.all(np.abs(one.value[finite] - answer[finite]) <= 1e-13 * np.maximum(1.0, np.abs(answer[finite])))


@pytest.mark.parametrize("rule, expected", [("zero", 0.0), ("nan", np.nan), ("uniform", 3.0)])
def test_rows_that_see_nothing(rule, expected):
    q, k = np.ones((1, 1, 2, 4)), np.ones((1, 1, 2, 4))
    v = np.array([2.0, 4.0]).reshape(1, 1, 2, 1)
    mask = np.array([[False, False], [True, False]])
    out, lse = ra.certify("softmax", q, k, v, mask=mask, empty_rows=rule, returns=("out", "lse"))
    np.testing.assert_array_equal(out.value.ravel(), [expected, 2.0])
    assert out.rounded.all() and lse.rounded.all() and lse.value[0, 0, 0] == -np.inf


def test_what_is_not_finite_spoils_what_reads_it_and_nothing_else():
    rng = np.random.default_rng(4)
    q, k, v = call(rng, batch=1, heads=1, kv_heads=1)
    clean = ra.certify("softmax", q, k, v, causal=True, returns=("out", "lse"))
    k[0, 0, 9], v[0, 0, 10, 2] = np.inf, np.nan
    out, lse = ra.certify("softmax", q, k, v, causal=True, returns=("out", "lse"))  # keys 9 and 10 are seen by rows 4, 5 and by row 5
    np.testing.assert_array_equal(out.value[0, 0, :4], clean.out.value[0, 0, :4])
    assert np.isnan(out.value[0, 0, 4:]).all() and np.isinf(out.bound[0, 0, 4:]).all() and not out.rounded[0, 0, 4:].any()
    assert np.isnan(lse.value[0, 0, 4:]).all() and lse.rounded[0, 0, :4].all()
    k[0, 0, 9] = 0.0
    out = ra.certify("softmax", q, k, v, causal=True)
    assert out.rounded[0, 0, :5].all() and not out.rounded[0, 0, 5, 2] and out.rounded[0, 0, 5, [0, 1, 3, 4]].all()
    hidden = ra.certify("softmax", q, k, v, mask=np.arange(11) < 9)
    assert hidden.rounded.all()
    k[0, 0, 9] = np.inf
    grads = ra.certify("softmax", q, k, v, causal=True, d_out=np.ones((1, 1, 6, 5)))
    assert grads.d_q.rounded[0, 0, :4].all() and not grads.d_q.rounded[0, 0, 4:].any() and np.isnan(grads.d_q.value[0, 0, 4:]).all()
    assert not grads.d_v.rounded[0, 0, :10].any()  # rows 4 and 5 see these


@pytest.mark.parametrize("sizes", [{"n_k": 0}, {"n_q": 0}, {"batch": 0}, {"n_q": 1, "n_k": 1, "d": 1, "e": 1}, {"n_k": 33, "d": 3, "e": 17}])
def test_sizes_at_the_edges(sizes):
    q, k, v = call(np.random.default_rng(8), **sizes)
    for rule in ("zero", "uniform"):
        found = ra.certify("softmax", q, k, v, returns=("out", "lse", "weights"), empty_rows=rule)
        expected = ra.attend("softmax", q, k, v, returns=("out", "lse", "weights"), empty_rows=rule, backend="definition")
        for one, other in zip(found, expected, strict=True):
            assert one.rounded.all() and one.value.shape == other.shape
            np.testing.assert_allclose(one.value, other, rtol=1e-12, atol=1e-13)
    grads = ra.certify("softmax", q, k, v, d_out=np.ones((*q.shape[:3], v.shape[3])))
    for name, x in (("d_q", q), ("d_k", k), ("d_v", v)):
        assert getattr(grads, name).value.shape == x.shape and getattr(grads, name).rounded.all()


@pytest.mark.parametrize(
    "name, change, complaint",
    [
        ("sigmoid", {"score_mod": lambda s, b, h, i, j: s}, "score_mod"),
        ("softmax", {"score_mod": lambda s, b, h, i, j: s}, "score_mod"),
        ("softmax", {"layout": ra.Packed(np.array([0, 6]), np.array([0, 11]))}, "Packed"),
        ("softmax", {"d_out": 0, "returns": "d_x"}, "gradient named 'd_x'"),
        ("softmax", {"d_out": 0, "empty_rows": "nan"}, "empty_rows"),
    ],
)
def test_what_has_no_enclosure_is_refused_by_name(name, change, complaint):
    q, k, v = call(np.random.default_rng(0))
    change = dict(change)
    if "layout" in change:
        q, k, v = (np.swapaxes(x[0], 0, 1) for x in (q, k, v))
    if "d_out" in change:
        change["d_out"] = np.ones((2, 4, 6, 5))
    with pytest.raises(ra.ParameterError, match=complaint):
        ra.certify(name, q, k, v, **change)


def test_a_mask_mod_is_a_mask():
    q, k, v = call(np.random.default_rng(0))
    one = ra.certify("softmax", q, k, v, mask_mod=lambda b, h, i, j: j % 3 != 1)
    np.testing.assert_array_equal(one.value, ra.certify("softmax", q, k, v, mask=np.arange(11) % 3 != 1).value)


def test_ties_that_no_precision_decides_are_rational():
    v = np.array([1.0, 1.0 + 2.0**-7]).reshape(1, 1, 2, 1)  # their mean is half-way between two bfloat16
    for q in (np.zeros((1, 1, 1, 4)), np.ones((1, 1, 1, 4))):
        found = ra.certify("softmax", q, np.ones((1, 1, 2, 4)) / 3, v, dtype="bfloat16")
        assert (float(found.value.item()), int(found.tier.item()), bool(found.rounded.item())) == (1.0, 3, True)


def test_without_python_flint_the_rest_is_enclosed(monkeypatch):
    from refattn.exact import balls as higher

    rng = np.random.default_rng(0)
    q, k, v = call(rng, batch=1, heads=1, kv_heads=1)
    v[..., 0] = np.where(np.arange(11) == 0, 1e30, 1e-30)  # weights of 1e-60 beside it: more digits than two float64 have
    q[0, 0, 0], k[0, 0, 0] = 100.0, -1.0
    assert (ra.certify("softmax", q, k, v).tier == 2).any()
    monkeypatch.setattr(higher, "available", lambda: False)
    found = ra.certify("softmax", q, k, v)
    assert not found.rounded.all() and found.rounded[..., 1:].all()
    assert np.isfinite(found.bound).all()


def test_long_rows_are_cut_into_pieces():
    rng = np.random.default_rng(5)
    q, k, v = call(rng, batch=1, heads=2, kv_heads=1, n_q=150, n_k=700, d=16, e=20)
    expected = ra.attention(q, k, v, causal=True)
    for dtype in ("float64", "float32"):
        found = ra.certify("softmax", q, k, v, causal=True, dtype=dtype)
        assert found.rounded.all()
        assert np.all(np.abs(found.value - expected) <= found.bound + 1e-13)


@pytest.mark.parametrize("above", [1.0, -1.0])
def test_a_result_beside_a_tie_is_on_its_side_of_it(above):
    """A weight of exp(-100000) beside the mean of two bfloat16: no attainable precision, but a sign."""
    tie = 1.0 + 2.0**-8
    q, k = np.ones((1, 1, 1, 1)), np.array([0.0, -1e5]).reshape(1, 1, 2, 1)
    out, weights = ra.certify("softmax", q, k, np.array([tie, tie + above]).reshape(1, 1, 2, 1), dtype="bfloat16", returns=("out", "weights"))
    assert (float(out.value.item()), int(out.tier.item()), bool(out.rounded.item())) == (1.0 + 2.0**-7 if above > 0 else 1.0, 2, True)
    np.testing.assert_array_equal(weights.value.astype(float).ravel(), [1.0, 0.0])
    lse = ra.certify("softmax", q, np.array([tie, tie - 1e5]).reshape(1, 1, 2, 1), np.ones((1, 1, 2, 1)), dtype="float32", returns="lse")
    assert lse.rounded.all() and float(lse.value.item()) == tie
    for sign in (1.0, -1.0):  # a cap of 100, which is half-way between two float8, is never reached
        scores = ra.certify("softmax", q, k, k, softcap=100.0, scale=1e9 * sign * above, dtype="float8_e4m3fn", returns="scores")
        assert scores.rounded.all() and float(scores.value[..., 1].item()) == -96.0 * sign * above


def bit_patterns(rng, stored, full):
    """Numbers from all over a format: 1 where the bits are an infinity or NaN."""
    x = rng.integers(0, 256, (*full, stored.itemsize), np.uint8).view(stored)[..., 0]
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(x.astype(np.float64)), x, np.ones_like(x))


@pytest.mark.parametrize("seed", range(4))
def test_any_bit_patterns_as_operands(seed):
    """Operands from all over their formats: products of 1e300, weights of exp(-1e300), numbers below the smallest normal one."""
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(12):
        stored = np.dtype(rng.choice(["float64", "float32", "float16"]) if rng.random() < 0.5 else ml_dtypes.bfloat16)
        n_q, n_k, d = (int(n) for n in rng.integers(1, 6, 3))

        q, k, v = (bit_patterns(rng, stored, full) for full in ((n_q, d), (n_k, d), (n_k, 2)))
        dtype = str(rng.choice(DTYPES))
        found = ra.certify("softmax", *(x[None, None] for x in (q, k, v)), dtype=dtype, returns=("out", "lse", "weights", "scores"))
        for i, (s, w, out, lse) in enumerate(balls(q, k, v)):
            for name, at, ball in [
                *(("out", (0, 0, i, c), x) for c, x in enumerate(out)),
                ("lse", (0, 0, i), lse),
                *(("weights", (0, 0, i, j), w[j]) for j in w),
                *(("scores", (0, 0, i, j), s[j]) for j in s),
            ]:
                result = getattr(found, name)
                assert result.rounded[at], (name, at)
                verdict = is_nearest(result.value[at], ball) if ball.is_finite() else None
                count += verdict is not None
                assert verdict is not False, (name, at, result.value[at], ball)
    assert count > 200


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_enclosures_hold_before_anything_is_rounded(kind, dtype, monkeypatch):
    """What the kernels hand on, number and bound: of two float64 for float64, of one for float32."""
    from refattn.exact import results

    handed = []

    def spy(self, at, known, tier):
        handed.append((at, known, tier))
        original(self, at, known, tier)

    original = results.Draft.write
    monkeypatch.setattr(results.Draft, "write", spy)
    q, k, v, keywords = inputs(kind, np.random.default_rng([11, KINDS.index(kind)]))
    ra.certify("softmax", *(x[None, None] for x in (q, k, v)), dtype=dtype, returns=("lse", "out"), **keywords)
    sink = keywords.get("sinks")
    rows = balls(
        q, k, v, cap=keywords.get("softcap"), bias=keywords.get("bias"), seen=keywords.get("mask"), sink=None if sink is None else float(sink[0])
    )
    tiers, smallest = set(), math.inf
    for (_, _, places), (high, low, bound), tier in handed:
        tiers.add(tier)
        for r, i in enumerate(places.tolist()):
            _, w, out, lse = rows[i]
            exact = [lse] if high.shape[1] == 1 else out
            for c, ball in enumerate(exact):
                if (w or sink is not None) and np.isfinite(bound[r, c]):
                    error = abs(ball - arb(float(high[r, c])) - arb(float(low[r, c])))
                    assert not bool(error > arb(float(bound[r, c]))), (tier, i, c)
                    smallest = min(smallest, float(bound[r, c]) / max(abs(float(high[r, c])), 1e-300))
    assert tiers == ({1} if dtype == "float64" else {0, 1} if 1 in tiers else {0})
    assert smallest < (2.0**-80 if dtype == "float64" else 2.0**-38)  # relative to the number: they are tight, too


# ---- what it rests on --------------------------------------------------------------------------------------------------------------

TINY_CALL = """
import numpy as np, refattn as ra
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 2, 3, 4)) for _ in range(3))
out, lse = ra.certify("softmax", q, k, v, causal=True, softcap=2.0, returns=("out", "lse"))
narrow = ra.certify("softmax", q, k, v, sinks=np.zeros(2), dtype="bfloat16")
grads = ra.certify("softmax", q, k, v, causal=True, d_out=v)
for x in (out, lse, narrow, *grads):
    print(x.value.tobytes().hex(), x.bound.tobytes().hex(), x.tier.tobytes().hex(), x.rounded.all())
"""


def test_plain_python_gives_the_same_bits():
    with_jit, without = (
        subprocess.run(
            [sys.executable, "-c", TINY_CALL], env={**os.environ, "NUMBA_DISABLE_JIT": n}, capture_output=True, text=True, check=True
        ).stdout
        for n in ("0", "1")
    )
    values, others = ([line.split()[0] for line in text.splitlines()] for text in (with_jit, without))
    assert values == others and len(values) == 6
    assert all(line.endswith("True") for line in (with_jit + without).splitlines())


def test_arithmetic_that_does_not_round_as_written_is_refused(monkeypatch):
    trusted.check()

    def flushing(x, out):
        answers(x, out)
        out[7] = 0.0  # the subnormal result

    answers = trusted._answers
    monkeypatch.setattr(trusted, "_answers", flushing)
    trusted.check.cache_clear()
    with pytest.raises(ra.BackendUnavailableError, match="flush-to-zero"):
        trusted.check()
    trusted.check.cache_clear()
