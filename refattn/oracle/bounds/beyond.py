"""Errors of weights that are powers of what of a score is beyond a threshold: sparsemax, 1.5-entmax, and ReLU, whose threshold is 0.

    p_j = max(m_j, 0)^r / n,    m_j = z_j - tau,    z_j = s_j, or s_j / 2 for 1.5-entmax

A relative error means nothing at the kink, so these are absolute.  Let z_j be off by a_j and tau by t.  By the mean value theorem p_j is off
by at most r (m_j + a_j + t)^(r-1) (a_j + t) / n, and by nothing where m_j + a_j + t <= 0.  The a_j differ from key to key; t is one number
for the row.

Where the weights sum to one, tau follows the scores: d tau = sum g_j dz_j / sum g_j with g_j = max(m_j, 0)^(r-1), a mean over the support.
So it moves by at most the largest a_j of any key that may be in the support; statistically, by the root of the sum of (g_j a_j)^2 over
sum g_j, which is at least 1 because no weight is above 1.

Then tau is rounded.  From k keys of the support and their z less the row's maximum, it is (sum z - 1) / k for sparsemax.  For 1.5-entmax it is
mean z - sqrt((1 - S) / k), where S may be the difference of two sums, off by the roundings of 2 sum z^2, and the root by that over
sum g_j, because the exact root is sum g_j / k.  A key nearer to the threshold than these errors may be counted or not, which moves tau by
twice as much again.  A threshold that is not quite right leaves a sum that is not quite one; who divides by it then, as bisection
must, multiplies all weights by one factor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...spec import Plan
from ..profiles import Profile
from .bound import Bound


class Beyond(NamedTuple):
    """Absolute errors of the weights.

    own: of each key by itself, (B, Hq, T, S); shared: of one sign throughout a row, (B, Hq, T, S); threshold: of tau, (B, Hq, T);
    terms: how many keys may have a weight, (B, Hq, T); excess: by how much their sum may differ from one, infinite for ReLU, (B, Hq, T).
    """

    own: Bound
    shared: Bound
    threshold: Bound
    terms: np.ndarray
    excess: np.ndarray


def beyond_zero(plan: Plan, scores: np.ndarray, scored: np.ndarray, error: Bound, profile: Profile, lam: float) -> Beyond:
    """ReLU, from the absolute errors of the scores, which are read where `scored` only."""
    r, u = plan.power, profile.accumulate
    s = np.where(scored, scores, 0.0)
    function = (r + 1) * u + (2 * profile.exp_error if r > 1 else 0.0)  # products and the division, or a library's pow

    def own(a: np.ndarray, of_function: float) -> np.ndarray:
        above = np.where(scored, np.maximum(s + a, 0.0), 0.0)
        return (np.where(above > 0, r * above ** (r - 1) * a, 0.0) + of_function * above**r) / plan.divisor

    # A scale is rounded once for all keys, a query once for those that point the same way: nothing here cancels such errors, as softmax does.
    common = np.where(s > 0, r * s**r / plan.divisor * (u + profile.operands), 0.0)
    errors = Bound(own(error.worst, function), own(error.likely, lam * function))
    terms = np.sum(scored & (s + error.worst > 0), axis=-1)
    return Beyond(errors, Bound(0.0 * common, common), Bound(0.0, 0.0), terms, np.full(terms.shape, np.inf))


def beyond_threshold(plan: Plan, scores: np.ndarray, scored: np.ndarray, error: Bound, tau: np.ndarray, profile: Profile, lam: float) -> Beyond:
    """Sparsemax and 1.5-entmax, from the absolute errors of the scores, which are read where `scored` only."""
    r = {"sparsemax": 1, "entmax15": 2}[plan.normalizer]
    u, stored = profile.accumulate, profile.scores
    tau = np.where(np.isfinite(tau), tau, 0.0)
    z = np.where(scored, scores, -np.inf) / r
    top = np.max(z, axis=-1, keepdims=True, initial=-np.inf)
    m = z - tau[..., None]  # -inf where hidden, which nothing reaches
    below = np.where(scored, np.abs(z - np.where(np.isfinite(top), top, 0.0)), 0.0)
    differences = Bound.roundings(1, u + stored, lam) * np.where(scored, below + np.abs(m), 0.0)
    moved = error * (1 / r) + differences

    largest, reached = _largest(m, moved.worst)
    usual, _ = _largest(m, moved.likely)
    terms = np.sum(reached, axis=-1)
    support = np.maximum(np.sum(m > 0, axis=-1), 1)
    slopes = np.maximum(np.sum(_power(m, r - 1), axis=-1), 1.0)
    first, second = (np.sum(np.where(reached, below**n, 0.0), axis=-1) for n in (1, 2))
    summed = Bound.roundings(terms + 4, u, lam) + Bound.roundings(4, stored, lam)
    rounded = summed * ((first + 1) / support) if r == 1 else summed * ((first + slopes) / support) + summed * ((2 * second + 1) / slopes)
    rounded = Bound(3 * rounded.worst, 3 * rounded.likely).linear((u + stored) * (np.abs(tau) + 1))
    follows = Bound(largest, _mean(m, moved.likely, r)) + rounded

    weights = _power(m, r)

    def parts(a: np.ndarray, t: np.ndarray, t_rounded: np.ndarray, a_rounded: np.ndarray, of_sum: np.ndarray, likely: bool) -> Any:
        above = np.minimum(m + a + t[..., None], 1.0)  # no weight is above 1, whatever the errors
        slope = r * _power(above, r - 1)
        each = np.sqrt(np.sum((slope * a_rounded) ** 2, axis=-1)) if likely else np.sum(slope * a_rounded, axis=-1)
        lost = each + np.sum(slope, axis=-1) * t_rounded  # what the sum lacks
        own, shared = slope * a + of_sum[..., None] * _power(above, r), slope * t[..., None] + weights * lost[..., None]
        return np.minimum(own, 1.0), np.minimum(shared, 1.0), lost

    worst = parts(moved.worst, follows.worst, rounded.worst, differences.worst, summed.worst, False)
    likely = parts(moved.likely, follows.likely, rounded.likely, differences.likely, summed.likely, True)
    own, shared, excess = (Bound(a, b) for a, b in zip(worst, likely, strict=True))
    return Beyond(own, shared, Bound(largest, usual) + rounded, terms, excess.worst)  # tau itself moves with all scores where they move alike


def _power(m: np.ndarray, r: int) -> np.ndarray:
    """max(m, 0)^r, and 0 beyond the threshold where r is 0."""
    return np.where(m > 0, np.maximum(m, 0.0) ** r, 0.0)


def _largest(m: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest error of a key that can be in the support, and which keys can."""
    most = np.max(a, axis=-1, keepdims=True, initial=0.0)
    most = np.max(np.where(m + a + most > 0, a, 0.0), axis=-1, keepdims=True, initial=0.0)
    return most[..., 0], m + a + most > 0


def _mean(m: np.ndarray, a: np.ndarray, r: int) -> np.ndarray:
    """The error of the mean that tau follows: of all keys that can be in the support, over what those amount to that must be."""
    largest, reached = _largest(m, a)
    most = largest[..., None]
    above = np.where(reached, _power(m + a + most, r - 1) * a, 0.0)
    certain = np.maximum(np.sum(_power(m - a - most, r - 1), axis=-1), 1.0)
    return np.minimum(largest, np.sqrt(np.sum(above**2, axis=-1)) / certain)
