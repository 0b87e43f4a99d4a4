"""Rounding errors of scored attention, from its plan: weights of similarities, by softmax over keys or queries or by another normaliser.

If the weights of a row are off by factors (1 + e_j), in numerator and denominator alike, then exactly

    o^ - o = sum_j p_j e_j (v_j - o) / (1 + sum_j p_j e_j)

so errors of scores and exponentials count with the spread |v_j - o| of the values.  What comes after the weights were summed (their
rounding, the sum with the values, the division) counts with |v_j|.  Nothing cancels where weights are not divided by their sum: sigmoids, and
what is beyond a threshold (beyond.py), count with |v_j| throughout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ... import definition, entrywise
from ...problem import Problem
from ...spec import Plan
from ..profiles import Profile
from .beyond import beyond_threshold, beyond_zero
from .bound import Bound, gamma
from .rows import RowSums, row_sums

#: Roundings that a caller's score_mod may take: an exp or tanh within four units in the last place, and eight operations.
OWN_ROUNDINGS = 16


class Scored:
    """Bounds for one problem; `bounds()` is the result, the methods are the stages an error goes through."""

    def __init__(self, problem: Problem, truth: Mapping[str, np.ndarray], plan: Plan, profile: Profile, lam: float) -> None:
        self.problem, self.plan, self.profile, self.lam = problem, plan, profile, lam
        self.u = profile.accumulate
        self.operands = problem.operands
        self.heads = problem.dims.get("Hq", 1)
        self.truth = {name: _with_heads(x) if x.ndim == 3 and name not in ("lse", "threshold") else x for name, x in truth.items()}
        rows = (self._rows(name, n) for n, name in enumerate((plan.query, plan.key, plan.value)))
        (self.q, self.q_error), (self.k, self.k_error), (self.v, self.v_error) = rows
        self.weights = self.truth["weights"]
        self.scores = self.truth["scores"] if "scores" in truth else self._scores()
        self.scored = np.isfinite(self.scores)
        self.visible = self.scored | (self.weights > 0)  # a row that sees nothing may still average everything
        self.k, self.k_error, self.v, self.v_error = map(self._read, (self.k, self.k_error, self.v, self.v_error))

    def bounds(self) -> dict[str, np.ndarray]:
        if self.plan.normalizer in ("sparsemax", "entmax15", "relu"):
            return self._beyond(self.score)
        weight, common, sink = self.weight
        normalised = weight if self.plan.normalizer == "sigmoid" else self._normalised(weight)
        centred = self.plan.normalizer == "softmax"
        used = weight if centred else normalised
        if centred and self.profile.sum_rounded:
            used += Bound(self.profile.probabilities, self.lam * self.profile.probabilities)
        worst, likely, common_part = (self.weights * error for error in (used.worst, used.likely, common))
        sums = row_sums(self.weights, self.visible, worst, likely, common_part, self.v, centred)
        found = {
            "out": self._finished(self._out(sums, used, sink, centred), sums),
            "weights": self.weights * (normalised.smaller + self.profile.probabilities) + np.finfo(np.float32).tiny,
            "scores": self.score.smaller,
        }
        if "lse" in self.truth:
            found["lse"] = self.lse.smaller
        return found

    def _beyond(self, score: Bound) -> dict[str, np.ndarray]:
        """Of weights with absolute errors."""
        profile, lam = self.profile, self.lam
        if self.plan.normalizer == "relu":
            weight = beyond_zero(self.plan, self.scores, self.scored, score, profile, lam)
        else:
            weight = beyond_threshold(self.plan, self.scores, self.scored, score, self.truth["threshold"], profile, lam)
        sums = row_sums(
            self.weights, self.visible, weight.own.worst + weight.shared.worst, weight.own.likely, weight.shared.likely, self.v, centred=False
        )
        total = self.products((weight.terms + self.steps + 2)[..., None])
        stored = (1 + profile.probabilities) * (1 + total.worst) - 1
        out, rms = np.abs(sums.out), np.sqrt(sums.square)
        worst = (1 + stored) * sums.worst + stored * sums.magnitude
        likely = np.hypot((1 + stored) * np.sqrt(sums.likely), np.hypot(lam * profile.probabilities * rms, total.likely * sums.partial))
        vanished = (0.5 * profile.smallest_probability + np.finfo(np.float32).tiny) * sums.plain
        error = Bound(worst, likely + sums.common + 2 * self.u * out).linear(vanished)
        error = error.where_roundings_repeat(self._equal_weights()[..., None])
        among = self._among(sums, (1 + stored) * (1 + weight.excess[..., None]) - 1)
        error = Bound(np.fmin(error.worst, among), np.fmin(error.likely, among))
        each = weight.own + weight.shared
        found = {
            "out": self._finished(error, sums),
            "weights": each.smaller + profile.probabilities * (self.weights + each.smaller) + np.finfo(np.float32).tiny,
            "scores": score.smaller,
        }
        if "threshold" in self.truth:
            found["threshold"] = weight.threshold.smaller
        return found

    # ---- rows of queries, keys and values ------------------------------------------------------------------------------------

    def _rows(self, name: str, n: int) -> tuple[np.ndarray, Bound]:
        """Rows with a head axis, and the errors they arrive with: none, unless they were projected."""
        x = self.operands[name]
        if not self.plan.projections:
            rows = _with_heads(x)
            return rows, Bound(np.zeros_like(rows), np.zeros_like(rows))
        matrix, bias = (self.operands[operand] for operand in self.plan.projections[n])
        made = np.einsum("btm,hmd->bhtd", x, matrix) + bias[:, None, :]
        magnitude = np.einsum("btm,hmd->bhtd", np.abs(x), np.abs(matrix)) + np.abs(bias)[:, None, :]
        error = self.roundings(x.shape[-1] + 1) * magnitude
        return made, error.linear(self.profile.intermediate * np.abs(made) + (x.shape[-1] + 1) * self._lost)

    @property
    def _lost(self) -> float:
        """What a product loses at most that is too small for the format sums are made in."""
        return float(np.finfo(np.float64 if self.u <= np.finfo(np.float64).eps else np.float32).tiny)

    def _read(self, x: Any) -> Any:
        """Rows of keys or values, or their errors, with 0 where no query looks: nothing that may stand there reaches a bound."""
        if isinstance(x, Bound):
            return Bound(self._read(x.worst), self._read(x.likely))
        batch, heads, n_q, n_k = self.visible.shape
        read = self.visible.reshape(batch, x.shape[1], heads // x.shape[1], n_q, n_k).any(axis=(2, 3))
        return np.where(read[..., None], x, 0.0)

    def _scores(self) -> np.ndarray:
        scores = self.plan.scale * (self.q @ np.swapaxes(self._per_query_head(self.k), -1, -2))
        return np.where(self.weights > 0, scores, -np.inf)

    def _per_query_head(self, x: np.ndarray) -> np.ndarray:
        return x if x.shape[1] == self.heads else np.repeat(x, self.heads // x.shape[1], axis=1)

    def roundings(self, k: Any) -> Bound:
        """Error of a sum of k numbers, relative to what is summed."""
        return Bound.roundings(_depth(k) if self.profile.order == "tree" else k, self.u, self.lam)

    def products(self, k: Any) -> Bound:
        """Error of a sum of k products, relative to what is summed."""
        profile, unit = self.profile, self.profile.products or self.u
        if not profile.block:
            return Bound.roundings(_depth(k) if profile.order == "tree" else k, unit, self.lam)
        blocks = np.ceil(np.asarray(k) / profile.block)
        step = 2 * unit * ((profile.block + 1) * 2.0**-profile.extra_bits + 1)  # the block and the sum carried in are cut off, then the result
        return Bound(gamma(blocks, step), np.minimum(blocks, blocks / 2 + self.lam * np.sqrt(blocks / 12)) * step)  # uniform: of mean one half

    @property
    def steps(self) -> int:
        """How often at most the running maximum rescales the sums of a row."""
        return math.ceil(self.weights.shape[3] / self.profile.tile) if self.profile.tile else 0

    # ---- scores ----------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def score(self) -> Bound:
        """Absolute error of each score."""
        plan, profile, u = self.plan, self.profile, self.u
        k = self._per_query_head(self.k)
        amplitude = abs(plan.scale) * plan.similarity.amplitude(self.q, k, *(self.operands[w] for w in plan.weights))
        terms = plan.similarity.roundings(self.q.shape[-1], k.shape[-1], *(self.operands[w].shape[-1] for w in plan.weights))
        error = self.products(terms + 2) * amplitude
        error += Bound(profile.operands, self.lam * profile.operands) * amplitude
        if plan.projections:
            error += self._carried(k)
        if plan.similarity.__name__.endswith("bilinear"):  # products of a query, or a key, and the map, each times one of the other
            of_queries, of_keys = (np.abs(x).sum(-1) for x in (self.q, k))
            error = error.linear(abs(plan.scale) * self._lost * (self.q.shape[-1] * of_keys[..., None, :] + k.shape[-1] * of_queries[..., None]))
        final = np.where(self.scored, self.scores, 0.0)
        bias = np.where(self.scored, self.operands[plan.bias], 0.0) if plan.bias else 0.0
        functions = self.problem.functions
        modified = functions is not None and functions.score_mod is not None
        raw = np.where(self.scored, definition.raw_scores(self.problem)[0], 0.0) if modified else final - bias
        before = np.abs(raw)
        each = 2 * u * before
        if plan.score_mods:  # a bounded modifier: its slope is at most one, its own evaluation adds a relative error
            each += (profile.tanh_error + 2 * u) * before
        error += Bound(each, self.lam * each)
        if modified:
            error = self._modified(error, raw)
        each = (u + profile.scores) * np.abs(final) + (u * np.abs(final - bias) if modified else 0.0)
        error += Bound(each, self.lam * each)
        return error.where(self.scored & (self.scores != plan.fill))

    def _modified(self, error: Bound, raw: np.ndarray) -> Bound:
        """Error after the caller's score_mod: what it makes of the score's, and of being evaluated in the kernel's format."""
        functions, unit = self.problem.functions, max(self.u, self.profile.scores)
        assert functions is not None and functions.score_mod is not None
        score_mod, aux, first = functions.score_mod, functions.score_aux, functions.first
        error = error.linear(self.profile.scores * np.abs(raw))
        at = entrywise.scores(score_mod, aux, raw, self.scored, first)

        def moved(by: np.ndarray) -> np.ndarray:
            ends = (entrywise.scores(score_mod, aux, raw + sign * by, self.scored, first) for sign in (-1.0, 1.0))
            return np.maximum(*(np.abs(end - at) for end in ends))

        largest = np.maximum(np.maximum(np.abs(raw), np.abs(at)), np.abs(at - raw))
        return Bound(moved(error.worst), moved(error.likely)) + Bound.roundings(OWN_ROUNDINGS, unit, self.lam) * largest

    def _carried(self, k: np.ndarray) -> Bound:
        """Error of q . k from errors of q and k."""
        q, k = np.abs(self.q), np.swapaxes(np.abs(k), -1, -2)
        k_error = Bound(*(np.swapaxes(self._per_query_head(x), -1, -2) for x in (self.k_error.worst, self.k_error.likely)))
        worst = self.q_error.worst @ k + q @ k_error.worst + self.q_error.worst @ k_error.worst
        likely = np.sqrt(self.q_error.likely**2 @ k**2 + q**2 @ k_error.likely**2)
        return Bound(worst, likely) * abs(self.plan.scale)

    # ---- weights ---------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def weight(self) -> tuple[Bound, np.ndarray, np.ndarray]:
        """Relative error of each unnormalised weight; the part common to a call; the relative error of the sink's weight."""
        profile, u, lam, score = self.profile, self.u, self.lam, self.score
        if self.plan.normalizer == "sigmoid":
            slope = 1.0 - self.weights
            function = 2 * profile.exp_error + 3 * u
            error = Bound(_factor(slope * score.worst) + function, _factor(slope * score.likely) + lam * function)
            return error, np.zeros_like(slope), np.zeros(slope.shape[:3])
        axis = 2 if self.plan.normalizer == "softmax over queries" else 3
        sinks = self.operands[self.plan.sinks] if self.plan.sinks else np.full(self.heads, -np.inf)
        top = np.max(np.where(self.scored, self.scores, -np.inf), axis=axis, keepdims=True, initial=-np.inf)
        top = np.maximum(top, sinks[:, None, None])
        top = np.where(np.isfinite(top), top, 0.0)
        below = np.where(self.scored, np.abs(self.scores - top), 0.0)
        nearest = np.min(below, axis=axis, keepdims=True, where=self.scored, initial=np.inf)
        nearest = np.where(np.isfinite(nearest), nearest, 0.0)
        apart = 2 * u * below + profile.distances * (below - nearest)
        together = _factor(profile.distances * nearest)  # scores that lie close to one another, far below a sink, are all rounded one way
        common = 3 * u * below + together  # scale and log2(e) are rounded once
        steps = max(0, math.ceil(self.weights.shape[axis] / profile.tile) - 1) if profile.tile else 0
        function = (steps + 1) * (profile.exp_error + u) + steps * u
        worst = _factor(score.worst + apart + function)
        likely = np.hypot(score.likely, lam * apart)
        likely = _factor(np.hypot(likely, lam * (profile.exp_error + u) * math.sqrt(steps + 1)))
        distance = np.where(np.isfinite(sinks), sinks, 0.0)[:, None] - (top[..., 0] if axis == 3 else 0.0)
        of_sink = function + 2 * u * np.abs(distance) + _factor(profile.distances * np.abs(distance))
        return Bound(worst, likely) * (1 + together), common, of_sink

    def _row(self, weight: Bound) -> Bound:
        """What each row's sum of weights may lose, as a part of it; at 1 nothing is known about the row."""
        worst = np.max(np.where(self.visible, weight.worst, 0.0), axis=-1, initial=0.0)
        likely = np.sqrt(np.sum((self.weights * weight.likely) ** 2, axis=-1))
        return Bound(np.minimum(worst, 1.0), np.minimum(likely, 1.0))

    def _normalised(self, weight: Bound) -> Bound:
        """Relative error of each weight after division by its sum."""
        axis = 2 if self.plan.normalizer == "softmax over queries" else 3
        worst = np.sum(self.weights * weight.worst, axis=axis, keepdims=True)
        likely = np.sqrt(np.sum((self.weights * weight.likely) ** 2, axis=axis, keepdims=True))
        return weight + Bound(worst, likely) + self.roundings(self.weights.shape[axis] + 3)

    # ---- outputs ---------------------------------------------------------------------------------------------------------------

    def _out(self, sums: RowSums, weight: Bound, sink: np.ndarray, centred: bool) -> Bound:
        """Error of weights times values, in the accumulator."""
        profile, lam, n_keys = self.profile, self.lam, self.weights.shape[3]
        terms = n_keys + 2 * self.steps + profile.splits + 1
        total, summed = self.products(terms), self.roundings(terms)
        row = self._row(weight)
        most, usual = row.worst[..., None], row.likely[..., None]
        rounded = 0.0 if profile.sum_rounded and centred else profile.probabilities
        stored = (1 + rounded) * (1 + total.worst) - 1
        out = np.abs(sums.out)
        rms = np.sqrt(sums.square)
        with np.errstate(all="ignore"):  # a row of which nothing is known: infinite, or NaN where all its values are equal
            worst = (1 + summed.worst) * (sums.worst + stored * (1 + most) * sums.magnitude) / (1 - most) + summed.worst * out
            likely = np.hypot(np.sqrt(sums.likely), lam * rounded * rms)
            likely = np.hypot(likely, np.maximum(total.likely * sums.partial, summed.likely * out)) / (1 - usual) + 2 * self.u * out
        if profile.splits > 1:
            worst, likely = self._merged(worst, likely, sums)
        vanished = (0.5 * profile.smallest_probability * self._stored_as_one + np.finfo(np.float32).tiny) * sums.plain
        mass = np.clip(1.0 - self.weights.sum(-1), 0.0, 1.0)[..., None] if self.plan.sinks else 0.0
        error = Bound(worst, likely).linear(sums.common + vanished + mass * sink[..., None] * out)
        if self.plan.projections:
            carried = Bound(*(self._per_query_head(x) for x in (self.v_error.worst, self.v_error.likely)))
            error += Bound((self.weights @ carried.worst) * (1 + total.worst), np.sqrt(self.weights**2 @ carried.likely**2))
        elif centred and not self.plan.sinks:  # a mean of visible values stays among them, whatever the weights
            among = self._among(sums, (1 + stored) / max(1 - total.worst, 2.0**-53) - 1)
            error = Bound(np.fmin(error.worst, among), np.fmin(error.likely, among))
        return error.where_roundings_repeat(self._repeats(sums))

    def _merged(self, worst: np.ndarray, likely: np.ndarray, sums: RowSums) -> tuple[np.ndarray, np.ndarray]:
        """Errors after parts of the keys were merged by exp(lse of the part - lse)."""
        lse = self.log_sum
        each = self.profile.exp_error + self.u * (4 + np.where(np.isfinite(lse), np.abs(lse), 0.0))[..., None]
        return worst * (1 + each) + 2 * each * sums.magnitude, np.hypot(likely, 2 * self.lam * each * sums.partial)

    @property
    def log_sum(self) -> np.ndarray:
        """The log-sum-exp, whether it is an output or not."""
        return self.truth["lse"] if "lse" in self.truth else np.logaddexp.reduce(self.scores, axis=-1)

    @property
    def _stored_as_one(self) -> Any:
        """What a stored weight of one stands for: itself, or the largest weight of its row."""
        if self.profile.normalised:
            return 1.0
        missing = np.clip(1.0 - self.weights.sum(-1), 0.0, 1.0)  # a sink, which may be the largest
        return np.maximum(self.weights.max(axis=-1, initial=0.0), missing)[..., None]

    def _among(self, sums: RowSums, summed: Any) -> np.ndarray:
        """How far from the output any mean of visible values is that is off by `summed` as a part of them."""
        seen = sums.low <= sums.high
        low, high = np.where(seen, sums.low, 0.0), np.where(seen, sums.high, 0.0)
        return np.maximum(high - sums.out, sums.out - low) + summed * np.maximum(np.abs(low), np.abs(high))

    def _repeats(self, sums: RowSums) -> np.ndarray:
        """Where every term of a sum is the same number, whose additions are all rounded the same way for long stretches."""
        return (sums.low == sums.high) & self._equal_weights()[..., None]

    def _equal_weights(self) -> np.ndarray:
        """Which rows weigh all keys alike that they weigh at all."""
        positive = self.weights > 0
        least = np.min(self.weights, axis=-1, where=positive, initial=np.inf)
        most = np.max(self.weights, axis=-1, where=positive, initial=-np.inf)
        return np.asarray(least == most)

    def _finished(self, error: Bound, sums: RowSums) -> np.ndarray:
        """Error after the output projection or the residual, where there is one."""
        if self.plan.residual:
            magnitude = np.abs(sums.out) + np.abs(_with_heads(self.operands[self.plan.residual]))
            return error.linear(self.u * magnitude).smaller
        if not self.plan.projections:
            return error.smaller
        matrix, bias = (self.operands[operand] for operand in self.plan.projections[3])
        error = error.linear(self.profile.intermediate * np.abs(sums.out) + self._lost)
        worst = np.einsum("bhte,hem->btm", error.worst, np.abs(matrix))
        likely = np.sqrt(np.einsum("bhte,hem->btm", error.likely**2, matrix**2))
        magnitude = np.einsum("bhte,hem->btm", np.abs(sums.out), np.abs(matrix)) + np.abs(bias)
        terms = matrix.shape[0] * matrix.shape[1] + 1
        return (Bound(worst, likely) + self.roundings(terms) * magnitude).linear(terms * self._lost).smaller

    @functools.cached_property
    def lse(self) -> Bound:
        """Absolute error of the log-sum-exp."""
        weight, common, sink = self.weight
        n_keys, u = self.weights.shape[3], self.u
        exact = self.log_sum
        mass = np.clip(1.0 - self.weights.sum(-1), 0.0, 1.0)
        row = self._row(weight)
        with np.errstate(all="ignore"):
            worst = (self.weights * weight.worst).sum(-1) / (1 - row.worst)
            likely = np.sqrt(((self.weights * weight.likely) ** 2).sum(-1)) / (1 - row.likely)
        error = Bound(worst, likely) + self.roundings(n_keys + self.profile.splits + 1)
        largest = np.max(np.where(self.scored, np.abs(self.scores), 0.0), axis=-1, initial=0.0)
        scale = np.where(np.isfinite(exact), np.abs(exact), 0.0) + largest + math.log(n_keys + 1)
        function = 4 * u * scale + self.profile.log_error * (2 if self.profile.splits > 1 else 1)
        return error.linear((self.weights * common).sum(-1) + mass * sink + function)


def _factor(error: np.ndarray) -> np.ndarray:
    """Relative error of exp(s) when s is off by `error`, held to where its square is finite: a weight of zero then makes it zero."""
    return np.expm1(np.minimum(error, 300.0))


def _depth(k: Any) -> Any:
    """Additions each term goes through when sums are made of halves."""
    return np.ceil(np.log2(np.maximum(k, 1))) + 1


def _with_heads(x: np.ndarray) -> np.ndarray:
    """(B, T, D) as (B, 1, T, D)."""
    return x[:, None] if x.ndim == 3 else x
