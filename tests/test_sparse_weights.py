"""Sparsemax, 1.5-entmax and ReLU where they differ from softmax: kinks, thresholds, absolute errors, infinities."""

import functools

import numpy as np
import pytest

import refattn as ra
from refattn import catalog
from refattn.oracle import profiles
from refattn.oracle.bounds import Bound
from refattn.oracle.bounds.beyond import beyond_threshold
from refattn.precision import as_dtype, round_to

pytestmark = pytest.mark.compiled

CERTAIN = 1e9  # so many standard deviations that only the worst case counts
POWERS = {"sparsemax": 1, "entmax15": 2}
same = np.testing.assert_array_equal


# ---- implementations in the scores' own precision ----------------------------------------------------------------------------------


def sorted_out(s, power):
    """tau from running sums of the sorted scores, squares less the squared mean included."""
    top = s.max(-1, keepdims=True)
    z = (s - top) / s.dtype.type(power)
    falling, n = -np.sort(-z, axis=-1), np.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    sums, squares = np.cumsum(falling, -1), np.cumsum(falling**2, -1)
    taus = (sums - 1) / n if power == 1 else sums / n - np.sqrt(np.maximum((1 - (squares - sums**2 / n)) / n, 0))
    tau = np.take_along_axis(taus, np.sum(falling >= taus, -1, keepdims=True) - 1, -1)
    return np.maximum(z - tau, 0) ** power, (tau + top / s.dtype.type(power))[..., 0]


def bisected(s, power):
    """tau by halving an interval on scores as they are, and weights divided by their sum."""
    z = s / s.dtype.type(power)
    low, width = z.max(-1, keepdims=True) - 1, 1.0
    for _ in range(40):
        width /= 2
        middle = low + s.dtype.type(width)
        low = np.where(np.sum(np.maximum(z - middle, 0) ** power, -1, keepdims=True) >= 1, middle, low)
    p = np.maximum(z - low, 0) ** power
    return p / p.sum(-1, keepdims=True), low[..., 0]


def by_newton(s, power):
    """tau by Newton's method from below, where it cannot overshoot."""
    top = s.max(-1, keepdims=True)
    z = (s - top) / s.dtype.type(power)
    tau = np.full_like(top, -1.0)
    for _ in range(60):
        beyond = np.maximum(z - tau, 0)
        slope = power * np.sum(beyond ** (power - 1), -1, keepdims=True, where=beyond > 0)
        tau += (np.sum(beyond**power, -1, keepdims=True) - 1) / slope
    return np.maximum(z - tau, 0) ** power, (tau + top / s.dtype.type(power))[..., 0]


def summed_in_order(q, k, v, weigh, stored):
    """Attention of one head in float32, every sum from left to right."""
    s = np.zeros((len(q), len(k)), np.float32)
    for x in range(q.shape[1]):
        s += q[:, x, None] * k[:, x]
    p, tau = weigh(s * np.float32(q.shape[1] ** -0.5))
    p = p.astype(stored)
    out = np.zeros((len(q), v.shape[1]), np.float32)
    for j in range(len(k)):
        out += p.astype(np.float32)[:, j, None] * v[j]
    return out.astype(stored), p, tau


def drawn(data, n, dtype):
    rng = np.random.default_rng(n)
    q, k, v = (rng.standard_normal((m, 32)) for m in (24, n, n))
    if data == "peaked":
        q *= 8.0
    if data == "flat":
        q *= 0.01
    if data == "one key":
        k[:] = k[0]
    if data == "five keys":
        q, k = 0.3 * q, k[np.arange(n) % 5]
    if data in ("one key", "five keys", "positive"):
        v = np.abs(v) + 0.5
    if data == "far from zero":
        q, k = 10 * (1 + q / 64), 4 + k / 64
    return tuple(round_to(x, as_dtype(dtype))[None, None] for x in (q, k, v))


DATA = ["normal", "peaked", "flat", "positive", "one key", "five keys", "far from zero"]


def worst_ratio(name, weigh, operands, **params):
    heads = (x[0, 0].astype(np.float32) for x in operands)
    answers = [x[None, None] for x in summed_in_order(*heads, weigh, operands[2].dtype) if x is not None]
    returns = ("out", "weights", "threshold")[: len(answers)]
    return ra.compare(answers, name, *operands, **params, returns=returns).worst.ratio


WAYS = [sorted_out, bisected, by_newton]


@pytest.mark.parametrize("n", [60, 500, 2000])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", POWERS)
def test_every_way_to_a_threshold_stays_within_the_tolerance_and_within_reach_of_it(name, dtype, data, n):
    operands = drawn(data, n, dtype)
    ratios = [worst_ratio(name, lambda s, way=way: way(s, POWERS[name]), operands) for way in WAYS]
    assert all(r < 1 for r in ratios), ratios
    assert max(ratios) > 5e-3, ratios


@pytest.mark.parametrize("n", [60, 500, 2000])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("power", [1, 2, 8])
def test_powers_of_relu_stay_within_the_tolerance_and_within_reach_of_it(power, dtype, data, n):
    operands = drawn(data, n, dtype)
    ratio = worst_ratio("relu", lambda s: (np.maximum(s, 0) ** power / np.float32(n), None), operands, power=power)
    assert 5e-3 < ratio < 1


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", [*POWERS, "relu"])
def test_the_worst_case_holds_alone(monkeypatch, name, data):
    monkeypatch.setattr("refattn.oracle.tolerance.spread", lambda count, alpha: CERTAIN)
    operands = drawn(data, 300, "float32")
    ways = [lambda s, way=way: way(s, POWERS[name]) for way in WAYS] if name in POWERS else [lambda s: (np.maximum(s, 0) / np.float32(300), None)]
    assert all(worst_ratio(name, way, operands) < 1 for way in ways)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", *POWERS, "relu"])
def test_errors_that_repeated_keys_repeat_stay_within_the_tolerance(name):
    """Five keys, hundreds of times each: the roundings of a weight stored in bfloat16 are the same each time, and add up with the values."""
    q, k, v = operands = drawn("five keys", 2000, "bfloat16")
    exact = ra.attend(name, *(x.astype(np.float64) for x in operands), returns="weights")
    stored = round_to(exact, v.dtype).astype(np.float64)
    out = round_to(stored @ v.astype(np.float64), v.dtype)
    assert 0.1 < ra.compare(out, name, q, k, v).worst.ratio < 1


def from_the_package(function):
    """Attention by a normaliser of the entmax package, in the operands' own precision throughout."""
    import torch

    def attend(q, k, v, bias=None, mask=None, scale=None, softcap=None):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias
        seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
        if not scores.shape[-1]:
            raise NotImplementedError("it has no maximum of nothing")
        empty = ~seen.any(-1, keepdim=True)  # it raises an error at a row of -inf
        weights = function(scores.masked_fill(~seen & ~empty, -torch.inf)).masked_fill(empty, 0)
        return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)

    return attend


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", POWERS)
def test_the_entmax_package_agrees_whatever_the_draw(name, dtype):
    import entmax

    ways = [getattr(entmax, name)]
    if dtype in ("float64", "float32"):  # in half precision its interval of 1 vanishes beside a large score, and 0 / 0 is what is left
        ways.append(functools.partial(entmax.entmax_bisect, alpha=1 + 1 / POWERS[name]))
    for way in ways:
        for seed in range(2):
            report = ra.check(from_the_package(way), name, dtype=dtype, framework="torch", profile="eager", suite="quick", seed=seed)
            assert report.passed, f"seed {seed}\n{report}"


# ---- the analysis of a threshold -----------------------------------------------------------------------------------------------------


def rows_at_kinks(rng, rows, n):
    """Scores of many spreads, with ties and with scores that are the threshold itself."""
    s = rng.standard_normal((1, 1, rows, n)) * 2.0 ** rng.integers(-6, 4, (rows, 1))
    s[..., : rows // 2, 1] = s[..., : rows // 2, 0]
    return s


@pytest.mark.parametrize("size", [1e-12, 1e-4, 0.03, 0.5])
@pytest.mark.parametrize("name", POWERS)
def test_scores_that_move_move_weights_and_threshold_within_the_worst_case(name, size):
    power, rng = POWERS[name], np.random.default_rng(1)
    profile = profiles.Profile("exact", 2.0**-53)
    nearest = 0.0
    for n in (2, 3, 7, 40):
        s = rows_at_kinks(rng, 400, n)
        _, tau = by_newton(s, power)
        s[..., ::3, -1] = power * tau[..., ::3]  # a key at the kink
        p, tau = by_newton(s, power)
        error = size * rng.uniform(0.0, 1.0, s.shape)
        bound = beyond_threshold(
            catalog.variant(name).plan({"D": 1, "S": n, "T": 400}, defaults(name)), s, np.ones(s.shape, bool), Bound(error, error), tau, profile, 1.0
        )
        for move in (error, -error, error * rng.choice([-1.0, 1.0], s.shape), np.where(p > 0, error, -error), np.where(p > 0, -error, error)):
            moved, moved_tau = by_newton(s + move, power)
            off, allowed = np.abs(moved - p), bound.own.worst + bound.shared.worst
            assert np.all(off <= allowed + 2.0**-48)
            assert np.all(np.abs(moved_tau - tau) <= bound.threshold.worst + 2.0**-48)
            nearest = max(nearest, np.max(off / (allowed + 2.0**-48)))
    assert nearest > 0.3


def defaults(name):
    return {p.name: p.default for p in catalog.variant(name).params}


@pytest.mark.parametrize("name", [*POWERS, "relu"])
def test_what_cannot_have_a_weight_has_no_tolerance(name):
    """Hidden keys, and keys that no error brings near the threshold; a key at the threshold, of weight 0, has one."""
    q, v = np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 4, 1), np.float32)
    k = np.array([1.0, 0.5, 1.0, -3.0], np.float32).reshape(v.shape)
    two = {"sparsemax": 0.25, "entmax15": 2.0 * ra.attend("entmax15", q, k[:, :, :2], v[:, :, :2], returns="threshold")[0, 0, 0], "relu": 0.0}
    bias = np.array([0.0, 0.0, two[name] - 1.0, 0.0], np.float32)
    for seen in (True, False):
        weights = ra.attend(name, q, k, v, bias, np.array([True, True, True, seen]), returns="weights")[0, 0, 0]
        allowed = ra.tolerance(name, q, k, v, bias, np.array([True, True, True, seen]), returns="weights").weights[0, 0, 0]
        assert weights[2] < 1e-12 and weights[3] == 0.0
        assert np.all(allowed[:3] > (1e-8, 1e-8, 1e-12))  # what is 0 within 1e-6 may have a square of 1e-12
        assert allowed[3] <= 2 * np.finfo(np.float32).tiny


# ---- what no tolerance is about -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", POWERS)
def test_a_score_of_nan_or_infinity_makes_its_row_nan_and_no_other(name, bad):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 3)) for n in (4, 6, 6))
    bias, mask = np.zeros((1, 2, 4, 6)), np.ones((1, 2, 4, 6), bool)
    mask[..., 5] = False
    usual = ra.attend(name, q, k, v, bias, mask, returns=("out", "threshold", "weights"))
    for at in range(5):
        bias[:] = 0.0
        bias[0, 1, 2, at], bias[0, 0, 0, 5] = bad, np.nan  # the second is hidden
        found = ra.attend(name, q, k, v, bias, mask, returns=("out", "threshold", "weights"))
        for one, two in zip(found, usual, strict=True):
            same(np.delete(one.reshape(8, -1), 6, 0), np.delete(two.reshape(8, -1), 6, 0))
        out, threshold, weights = (x[0, 1, 2] for x in found)
        assert np.isnan(out).all() and np.isnan(threshold) and np.isnan(weights[:5]).all() and weights[5] == 0.0


def test_relu_of_nan_is_nan_and_of_infinity_infinite():
    q, k, v = np.ones((1, 1, 1, 1)), np.ones((1, 1, 2, 1)), np.ones((1, 1, 2, 1))
    for bad in (np.nan, np.inf):
        out, weights = ra.attend("relu", q, k, v, np.array([bad, 0.0]), returns=("out", "weights"))
        same(out, np.full((1, 1, 1, 1), bad))
        same(weights[0, 0, 0], [bad, 0.5])


@pytest.mark.parametrize("name", POWERS)
def test_scores_far_below_do_not_disturb_the_threshold(name):
    """As large as a mask of finite fill makes them, and larger."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 3)) for n in (4, 6, 6))
    for fill in (-1e4, -1e9, np.finfo(np.float32).min, -1e300):
        bias = np.where(np.arange(6) < 4, 0.0, fill)
        found = ra.attend(name, q, k, v, bias, returns=("out", "threshold", "weights"))
        for one, two in zip(found, ra.attend(name, q, k, v, mask=np.arange(6) < 4, returns=("out", "threshold", "weights")), strict=True):
            same(one, two)


@pytest.mark.parametrize("name", POWERS)
def test_thousands_of_equal_scores_keep_the_sum_at_one(name):
    """tau has the roundings of n steps, which are as often up as down, and is off in all n weights; a running sum's all go one way here."""
    n, power = 20_000, POWERS[name]
    bias = np.full(n, -0.9 * power)
    bias[0] = 0.0
    q, k, v = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, n, 1)), np.ones((1, 1, n, 1))
    weights = ra.attend(name, q, k, v, bias, returns="weights")
    assert np.all(weights > 0.0)
    assert abs(float(weights.astype(np.longdouble).sum()) - 1.0) < n**1.5 * 2.0**-53
    assert abs(float(sorted_out(bias[None], power)[0].astype(np.longdouble).sum()) - 1.0) > n**1.5 * 2.0**-53
