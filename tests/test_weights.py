"""What makes weights of a panel's scores, and gradients of theirs: against exact numbers, within bounds that follow from the roundings.

u is half the distance from 1 to the next number.  `exp2` is within 1.27 u (tests/test_simd.py), every other operation rounds once, and `SLACK` covers
products of errors.  Results below the smallest normal number may be 0.
"""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from mpmath import mpf
from test_simd import width as lanes

from refattn.engine.panels import VECTORS
from refattn.engine.weights import (
    ENTMAX15,
    RELU,
    ROOT,
    SIGMOID,
    SOFTMAX,
    SPARSEMAX,
    SUPPORT,
    beyond,
    exponentials,
    one_by_one,
    score_gradients,
    thresholds,
)

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
POWERS = {SPARSEMAX: 1, ENTMAX15: 2}
SLACK, EXP2_ERROR, UNTOUCHED = 1.01, 1.27, 7.0


@pytest.fixture(autouse=True)
def precise():
    with mpmath.workprec(300):
        yield


def width(dtype):
    return VECTORS * lanes(dtype)


def unit(dtype):
    return float(np.finfo(dtype).eps) / 2


def exact(x):
    """Numbers with digits to spare."""
    return np.array([mpf(float(one)) for one in np.ravel(x)], object).reshape(np.shape(x))


def each(function, *arrays):
    return np.frompyfunc(function, len(arrays), 1)(*arrays)


def power_of_two(x):
    return mpmath.power(2, x)


def within(found, expected, relative, dtype):
    """|found - expected| <= relative * |expected|, and what may be lost below the normal numbers."""
    error = np.abs(exact(found) - expected)
    allowed = SLACK * relative * np.abs(expected) + 8 * mpf(float(np.finfo(dtype).smallest_normal))
    assert np.all(error <= allowed), worst(found, expected, error, allowed)


def worst(found, expected, error, allowed):
    at = np.unravel_index(np.argmax(error / allowed), np.shape(found))
    return f"{found[at]!r} at {at} is {float(error[at])} from {float(expected[at])}; {float(allowed[at])} is allowed"


def in_rows(rows, at, row_step):
    """A flat array in which they are row_step apart, with other numbers before, between and behind."""
    flat = np.full(at + len(rows) * row_step + 5, UNTOUCHED, rows.dtype)
    for r, row in enumerate(rows):
        flat[at + r * row_step :][: row.size] = row
    return flat


def out_of_rows(flat, rows, at, row_step):
    """Those rows again, after a look at what should have stayed."""
    found = np.array([flat[at + r * row_step :][: rows.shape[1]] for r in range(len(rows))], rows.dtype).reshape(rows.shape)
    same(flat, in_rows(found, at, row_step))
    return found


# ---- entry by entry ------------------------------------------------------------------------------------------------------------


def sigmoid_error(y, p, dtype):
    """Of 1 / (1 + exp(-y)), relative to it: of the exponent's three roundings and the power's error, what reaches the quotient, and two more."""
    return ((1 - p) * (3 * np.abs(y) + EXP2_ERROR) + 2) * unit(dtype)


def logistic(y):
    return 1 / (1 + mpmath.exp(-y))


@FORMATS
def test_sigmoids_of_scores_and_their_shift(dtype):
    limit = math.log(2) * np.finfo(dtype).maxexp
    scores = np.random.default_rng(1).uniform(-1.5 * limit, 1.5 * limit, (4, width(dtype))).astype(dtype)
    scores[:2] /= dtype(20)
    for shift in (0.0, -2.5):
        s = np.append(scores.ravel(), UNTOUCHED).astype(dtype)
        one_by_one(s, 0, 4, SIGMOID, dtype(shift), 1)
        y = exact(scores) + shift
        p = each(logistic, y)
        within(s[:-1].reshape(scores.shape), p, sigmoid_error(y, p, dtype), dtype)
        assert s[-1] == UNTOUCHED


@FORMATS
@pytest.mark.parametrize("power", [1, 2, 3])
def test_powers_of_positive_scores(power, dtype):
    scores = np.random.default_rng(2).normal(0, 9, (3, width(dtype))).astype(dtype)
    s = scores.ravel().copy()
    one_by_one(s, 0, 3, RELU, dtype(0), power)
    for x, p in zip(map(float, scores.ravel()), map(float, s), strict=True):
        true = Fraction(max(x, 0.0)) ** power
        assert abs(Fraction(p) - true) <= (power - 1) * Fraction(SLACK * unit(dtype)) * true


@FORMATS
def test_weights_of_their_own_score_at_its_ends_and_only_of_the_rows_asked_for(dtype):
    w = width(dtype)
    scores = np.resize(np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, np.finfo(dtype).max, -np.finfo(dtype).max], dtype), 3 * w)
    sigmoids, powers = scores.copy(), scores.copy()
    one_by_one(sigmoids, w, 1, SIGMOID, dtype(0), 1)
    one_by_one(powers, w, 1, RELU, dtype(0), 2)
    for found, expected in ((sigmoids, [0, 1, np.nan, 0.5, 0.5, 1, 0]), (powers, [0, np.inf, np.nan, 0, 0, np.inf, 0])):
        same(found[w : 2 * w], np.resize(expected, 3 * w)[w : 2 * w])
        same(found[:w], scores[:w])
        same(found[2 * w :], scores[2 * w :])


# ---- softmax, tile by tile -----------------------------------------------------------------------------------------------------


@FORMATS
def test_exponentials_and_their_sums_over_tiles_whatever_their_maxima(dtype):
    """Errors are carried along: an element's is that of its exponent and of the power, and a sum's is that of all before it, faded."""
    w, u, rng, at = width(dtype), unit(dtype), np.random.default_rng(3), 5
    factor = dtype(0.7)
    per_unit = 2 * float(factor) * math.log(2) * u  # a difference and a product in the exponent
    top, old = np.full(w + at, -np.inf, dtype), np.full(w + at, -np.inf, dtype)
    total, shrink = np.zeros(w + at, dtype), np.empty(w + at, dtype)
    sums, error = exact(np.zeros(w)), exact(np.zeros(w))
    for n, spread in ((3, 1.0), (0, 1.0), (1, 30.0), (8, 3.0), (7, 100.0), (2, 0.1)):
        scores = rng.normal(0, spread, (n, w)).astype(dtype)
        scores[rng.random((n, w)) < 0.2] = -np.inf
        scores[:, 0] = -np.inf  # a lane that sees nothing
        before = top[at:].copy()
        top[at:] = np.maximum(before, scores.max(axis=0, initial=-np.inf))
        s = in_rows(scores, 3, w)
        exponentials(s, 3, n, factor, top, old, total, shrink, at)
        most, previous = exact(np.where(np.isinf(top[at:]), 0, top[at:])), exact(before)
        new, fade = each(power_of_two, float(factor) * (exact(scores) - most)), each(power_of_two, float(factor) * (previous - most))
        distance = np.where(np.isinf(scores), mpf(0), np.abs(exact(scores) - most))
        faded = np.where(np.isinf(before), mpf(0), np.abs(previous - most))
        within(out_of_rows(s, scores, 3, w), new, distance * per_unit + EXP2_ERROR * u, dtype)
        within(shrink[at:], fade, faded * per_unit + EXP2_ERROR * u, dtype)
        same(old, top)
        error = error * fade + sums * fade * (faded * per_unit + EXP2_ERROR * u)
        sums = sums * fade + new.sum(axis=0)
        error = error + (new * (distance * per_unit + EXP2_ERROR * u)).sum(axis=0) + (n + 2) * u * sums
        assert np.all(np.abs(exact(total[at:]) - sums) <= SLACK * error + 8 * (n + 1) * mpf(float(np.finfo(dtype).smallest_normal)))
    assert total[at] == 0 and shrink[at] == 0 and np.all(total[at + 1 :] >= 1)
    same(total[:at], 0)


@FORMATS
def test_exponentials_of_one_lanes_nan_or_infinity_stay_in_it(dtype):
    w = width(dtype)
    scores = np.zeros((3, w), dtype)
    scores[1, 1], scores[2, 2], scores[:, 3] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        top = scores.max(axis=0)
    s, old, total, shrink = scores.ravel().copy(), np.full(w, -np.inf, dtype), np.zeros(w, dtype), np.empty(w, dtype)
    exponentials(s, 0, 3, dtype(1), top, old, total, shrink, 0)
    expected = np.full(w, 3.0)
    expected[1:4] = np.nan, np.nan, 0
    same(total, expected)
    same(np.delete(s.reshape(3, w), [1, 2, 3], axis=1), 1)


# ---- thresholds ----------------------------------------------------------------------------------------------------------------


def exact_threshold(z, power):
    """tau with sum max(z - tau, 0)**power = 1, from running sums of the sorted numbers (Martins and Astudillo; Peters et al.)."""
    tau, total, squares = None, mpf(0), mpf(0)
    for k, x in enumerate(sorted(z, reverse=True), 1):
        total, squares = total + x, squares + x * x
        rest = 1 - (squares - total**2 / k)
        if power == 2 and rest < 0:
            break
        candidate = (total - 1) / k if power == 1 else total / k - mpmath.sqrt(rest / k)
        if candidate >= x:
            break
        tau = candidate
    return tau


def check_threshold(found, scores, power, dtype):
    """Newton's method rises to tau from below, and stops when the computed sum no longer is above 1.

    Too high by what the last step was wrong by: the computed sum of at most n terms is n + 2 + power roundings off, of terms that are at most 1,
    and so is the slope it is divided by; a step is shorter than 1.  Too low while the sum is above 1 by no more than its own roundings and what
    rounds away when t is raised.
    """
    u = unit(dtype)
    z = (exact(scores[scores > -np.inf]) - mpf(float(scores.max()))) / power
    z = z[z > -1]
    tau, t, n = exact_threshold(z, power), mpf(float(found)), len(z)
    assert -1 <= t < 0
    if t > tau:
        assert t - tau <= SLACK * u * (2 * n + 8), (t, tau)
        return
    kept, kept_at_tau = z[z > t], z[z > tau]
    x = kept - t
    slope, slope_at_tau = power * np.sum(x ** (power - 1)), power * np.sum((kept_at_tau - tau) ** (power - 1))
    rounded = u * (power * np.sum(x ** (power - 1) * (np.abs(kept) + x)) + len(kept) * np.sum(x**power) + 2 * abs(t) * slope)
    assert np.sum(x**power) - 1 <= SLACK * rounded, (t, tau)
    assert tau - t <= SLACK * rounded / slope_at_tau, (t, tau)


def found_thresholds(scores, kind):
    """With room around the lanes' statistics that has to stay."""
    n, w = scores.shape
    at, dtype = 4, scores.dtype
    with np.errstate(invalid="ignore"):
        top = np.concatenate([np.zeros(at, dtype), scores.max(axis=0, initial=-np.inf)])
    tau, change = np.full(at + w, UNTOUCHED, dtype), np.empty(at + w, dtype)
    flat = np.append(scores.ravel(), dtype.type(UNTOUCHED))
    thresholds(flat, n, kind, top, tau, change, at)
    same(flat, np.append(scores.ravel(), UNTOUCHED))
    same(tau[:at], UNTOUCHED)
    return tau[at:]


def unkind_rows(dtype):
    """One row of scores a lane, as columns."""
    rng, w = np.random.default_rng(4), width(dtype)
    ties = np.repeat(rng.normal(0, 1, (6, w)), 4, axis=0)
    steps = np.linspace(0, -3, 24)[:, None] * np.geomspace(1e-4, 3, w)
    return {
        "one": rng.normal(0, 50, (1, w)),
        "two": rng.normal(0, 1, (2, w)),
        "close": rng.normal(0, 0.3, (40, w)),
        "apart": rng.normal(0, 5, (40, w)),
        "a large mean": rng.normal(300, 0.5, (17, w)),
        "tied": np.ones((33, w)) * rng.normal(0, 9, w),
        "tied in fours": ties,
        "in steps": steps,
        "halving": -(0.5 ** np.arange(24))[:, None] * np.geomspace(0.1, 4, w),
        "one huge": np.concatenate([rng.normal(0, 1, (9, w)), np.full((1, w), 1e30), rng.normal(0, 1, (9, w))]),
        "some hidden": np.where(rng.random((30, w)) < 0.5, -np.inf, rng.normal(0, 1, (30, w))),
        "at the threshold": np.concatenate([np.zeros((2, w)), np.full((20, w), -0.5)]),
    }


@FORMATS
@pytest.mark.parametrize("kind", POWERS, ids=["sparsemax", "entmax15"])
@pytest.mark.parametrize("name", unkind_rows(np.float32))
def test_thresholds_are_those_of_the_sorted_scores(name, kind, dtype):
    scores = unkind_rows(dtype)[name].astype(dtype)
    for tau, column in zip(found_thresholds(scores, kind), scores.T, strict=True):
        check_threshold(tau, column, POWERS[kind], dtype)


@FORMATS
@pytest.mark.parametrize("kind", POWERS, ids=["sparsemax", "entmax15"])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5, 20.0])
def test_thresholds_of_thousands_of_scores(spread, kind, dtype):
    scores = np.random.default_rng(5).normal(0, spread, (5000, width(dtype))).astype(dtype)
    found = found_thresholds(scores, kind)
    for lane in (0, lanes(dtype), width(dtype) - 1):
        check_threshold(found[lane], scores[:, lane], POWERS[kind], dtype)


@FORMATS
@pytest.mark.parametrize("kind", POWERS, ids=["sparsemax", "entmax15"])
def test_a_lane_without_scores_or_with_odd_ones_leaves_the_others_alone(kind, dtype):
    w = width(dtype)
    same(found_thresholds(np.empty((0, w), dtype), kind), -1)
    same(found_thresholds(np.full((5, w), -np.inf, dtype), kind), -1)
    scores = np.random.default_rng(6).normal(0, 1, (21, w)).astype(dtype)
    plain = found_thresholds(scores, kind)
    odd = scores.copy()
    odd[:, 1], odd[20, 2], odd[0, 3], odd[7, w - 1] = -np.inf, np.nan, np.inf, np.nan
    expected = plain.copy()
    expected[[1, 2, 3, w - 1]] = -1, np.nan, np.nan, np.nan
    same(found_thresholds(odd, kind), expected)


@FORMATS
@pytest.mark.parametrize("kind", [SPARSEMAX, ENTMAX15, SUPPORT, ROOT], ids=["sparsemax", "entmax15", "support", "root"])
def test_weights_beyond_thresholds_and_their_sums_to_the_bit(kind, dtype):
    w, n, at, s_at, rng = width(dtype), 9, 3, 4, np.random.default_rng(7)
    scores = rng.normal(0, 1, (n, w)).astype(dtype)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[:, 0], scores[0, 1], scores[1, 2] = -np.inf, np.nan, np.inf
    with np.errstate(invalid="ignore"):
        top = scores.max(axis=0)
    tau, total = rng.uniform(-1, 0, w).astype(dtype), rng.uniform(0, 2, w).astype(dtype)
    tau[[1, 2]] = np.nan
    most = np.where(top == -np.inf, dtype(0), top)
    half = dtype(0.5 if kind in (ENTMAX15, ROOT) else 1.0)
    with np.errstate(invalid="ignore"):
        x = np.maximum((scores - most) * half - tau, dtype(0))
    expected = {SPARSEMAX: x, ENTMAX15: x * x, SUPPORT: np.where(x == x, (x > 0).astype(dtype), 0), ROOT: x}[kind]  # noqa: PLR0124 - NaN
    sums = total.copy()
    for row in expected:
        sums += row
    s, lane = in_rows(scores, s_at, w), np.zeros(at, dtype)
    gathered = np.concatenate([lane, total])
    beyond(s, s_at, n, kind, np.concatenate([lane, top]), np.concatenate([lane, tau]), gathered, at)
    same(out_of_rows(s, scores, s_at, w), expected)
    same(gathered, np.concatenate([lane, sums]))


# ---- gradients -----------------------------------------------------------------------------------------------------------------


def gradients(kind, scores, dp, statistic, delta, dtype, factor=1.0, shift=0.0, power=1, divisor=1.0):
    """p and d_s, of rows with gaps between them."""
    at, lane, row_step = 5, 3, scores.shape[1] + 7
    s, d, room = in_rows(scores, at, row_step), in_rows(dp, at, row_step), np.full(lane, np.nan, dtype)
    score_gradients(
        s, d, at, row_step, len(scores), kind, dtype(factor), dtype(shift), power, dtype(divisor),
        np.concatenate([room, statistic]), np.concatenate([room, delta]), lane,
    )  # fmt: skip
    return out_of_rows(s, scores, at, row_step), out_of_rows(d, dp, at, row_step)


def drawn(dtype, spread, n=4):
    rng, w = np.random.default_rng(9), width(dtype)
    scores = rng.normal(0, spread, (n, w)).astype(dtype)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    return scores, rng.normal(0, 1, (n, w)).astype(dtype), rng.normal(0, 1, w).astype(dtype), rng.normal(0, 1, w).astype(dtype)


def finished(g, dp, delta):
    return g * (exact(dp) - exact(delta))


def size(scores):
    """|score|, 0 where it is hidden."""
    return np.abs(exact(np.where(np.isinf(scores), 0, scores)))


@FORMATS
def test_gradients_of_softmax(dtype):
    scores, dp, statistic, delta = drawn(dtype, 9.0)
    statistic = np.abs(statistic) + scores.max(axis=0)  # never below a score
    for factor in map(dtype, (1.4426950408889634, 0.3)):
        p, ds = gradients(SOFTMAX, scores, dp, statistic, delta, dtype, factor=factor)
        true = each(power_of_two, float(factor) * (exact(scores) - exact(statistic)))
        distance = np.abs(exact(np.where(np.isinf(scores), statistic, scores)) - exact(statistic))
        error = (2 * float(factor) * math.log(2) * distance + EXP2_ERROR) * unit(dtype)
        within(p, true, error, dtype)
        within(ds, finished(true, dp, delta), error + 2 * unit(dtype), dtype)


@FORMATS
def test_a_score_that_roundings_left_above_lse_has_the_weight_1(dtype):
    scores = np.ones((2, width(dtype)), dtype)
    statistic = np.nextafter(scores[0], dtype(0))
    p, ds = gradients(SOFTMAX, scores, 3 * scores, statistic, np.zeros(width(dtype), dtype), dtype, factor=9.0)
    same(p, 1)
    same(ds, 3)


@FORMATS
def test_gradients_of_sigmoids(dtype):
    scores, dp, statistic, delta = drawn(dtype, 9.0)
    scores[-1] *= dtype(np.finfo(dtype).maxexp / 8)
    for shift in (0.0, -2.5):
        p, ds = gradients(SIGMOID, scores, dp, statistic, delta, dtype, shift=shift)
        y = exact(scores) + shift
        true = each(logistic, y)
        of_y = np.where(np.isinf(scores), mpf(0), np.abs(exact(np.where(np.isinf(scores), 0, scores)) + shift))
        error = sigmoid_error(of_y, true, dtype)
        within(p, true, error, dtype)
        slope = true * each(logistic, -y)
        within(ds, finished(slope, dp, delta), 2 * error + (3 * of_y + EXP2_ERROR + 4) * unit(dtype), dtype)


@FORMATS
@pytest.mark.parametrize("power", [1, 2, 3])
def test_gradients_of_powers_of_positive_scores(power, dtype):
    scores, dp, statistic, delta = drawn(dtype, 3.0)
    scores[0, :3] = 0.0, -0.0, np.finfo(dtype).smallest_subnormal
    p, ds = gradients(RELU, scores, dp, statistic, delta, dtype, power=power, divisor=37.0)
    x = np.maximum(exact(scores), mpf(0))
    within(p, x**power / 37, (power + 3) * unit(dtype), dtype)
    slope = np.where(x > 0, power * x ** (power - 1) / 37, mpf(0))
    within(ds, finished(slope, dp, delta), (power + 2) * unit(dtype), dtype)
    same(p[scores <= 0], 0)
    same(ds[scores <= 0], 0)


@FORMATS
def test_gradients_of_sparsemax_and_entmax(dtype):
    scores, dp, statistic, delta = drawn(dtype, 1.0)
    scores[0, :8] = statistic[:8]  # at the threshold: weight 0, slope 0
    scores[1, :8] = 2 * statistic[:8]
    p, ds = gradients(SPARSEMAX, scores, dp, statistic, delta, dtype)
    x = np.maximum(exact(scores) - exact(statistic), mpf(0))
    within(p, x, unit(dtype), dtype)
    within(ds, np.where(x > 0, exact(dp) - exact(delta), mpf(0)), unit(dtype), dtype)
    same(p > 0, scores > statistic)
    same(ds[scores <= statistic], 0)

    p, ds = gradients(ENTMAX15, scores, dp, statistic, delta, dtype)
    x = np.maximum(exact(scores) / 2 - exact(statistic), mpf(0))
    within(p, x * x, 3 * unit(dtype), dtype)
    within(ds, finished(x, dp, delta), 3 * unit(dtype), dtype)
    same(ds[scores / 2 <= statistic], 0)


@FORMATS
@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, RELU, SPARSEMAX, ENTMAX15], ids=["softmax", "sigmoid", "relu", "sparsemax", "entmax15"])
def test_where_a_slope_is_zero_nothing_comes_of_an_infinite_gradient(kind, dtype):
    """Hidden keys, and rows without keys, whose statistic is infinite."""
    w = width(dtype)
    scores = np.full((2, w), -np.inf, dtype)
    statistic = np.where(np.arange(w) % 2, np.inf, 0.5).astype(dtype)
    if kind not in (SIGMOID, RELU):
        scores[1, 1::2] = 3.0
    dp = np.resize(np.array([np.nan, np.inf, -np.inf], dtype), (2, w))
    p, ds = gradients(kind, scores, dp, statistic, np.zeros(w, dtype), dtype)
    same(p, 0)
    same(ds, 0)


@FORMATS
@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, RELU, SPARSEMAX, ENTMAX15], ids=["softmax", "sigmoid", "relu", "sparsemax", "entmax15"])
def test_a_score_that_is_nan_makes_its_own_weight_and_gradient_nan_and_no_other(kind, dtype):
    w = width(dtype)
    scores, ones = np.ones((3, w), dtype), np.ones((3, w), dtype)
    scores[1, 4] = np.nan
    p, ds = gradients(kind, scores, ones, np.zeros(w, dtype), np.zeros(w, dtype), dtype)
    alone = np.zeros((3, w), bool)
    alone[1, 4] = True
    same(np.isnan(p), alone)
    same(np.isnan(ds), alone)
