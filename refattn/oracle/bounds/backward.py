"""Gradients of softmax over dot products, exactly, and the rounding errors of a backward pass that computes them.

    P_ij  = exp(s_ij - lse_i)            dP_ij = dO_i . v_j           D_i = sum_j P_ij dP_ij = dO_i . O_i
    dS_ij = P_ij (dP_ij - D_i + dlse_i)  dX_ij = dS_ij c'(x_ij)       (c' the slope of a soft-cap, 1 without)
    dV_j  = sum_i P_ij dO_i              dQ_i  = scale sum_j dX_ij k_j        dK_j = scale sum_i dX_ij q_i
    dbias = dS                           dsink = sum_i P_i,sink (dlse_i - D_i)

where sums over i run over all queries of the heads that share a key.  How an error reaches a gradient depends on what it is common to:

    one pair     of a weight, of dP, of the rounded dS        sum of squares over pairs
    one row      of lse: P is recomputed from it, so it does not cancel as it does in the forward pass; of D, which is taken from the
                 rounded output, and moves dQ_i by D's error times sum_j P_ij k_j exactly
    one call     scale and log2(e) are rounded once: a sum with its signs, times one roundoff

so a row's common error meets |sum_j ...|, not sum_j |...|, and a call's common error is kept linear in both versions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ... import precision
from ...pieces.score_mods import softcap
from ...pieces.similarities import dot
from ...problem import Problem, output_dtype
from .bound import Bound
from .rows import RowSums, row_sums
from .scored import Scored

#: Roundings of a constant that is multiplied to all scores of a call: the scale, log2(e), and their product.
_CONSTANT = 2


def applies(problem: Problem, cotangents: Mapping[str, Any]) -> bool:
    """Whether the formulas above are the gradients of a problem for cotangents of these outputs."""
    plan, functions = problem.plan, problem.functions
    if plan is None or not cotangents.keys() <= {"out", "lse"} or (functions is not None and functions.score_mod is not None):
        return False
    parts = {plan.query, plan.key, plan.value}
    modified = [stage for stage in plan.score_mods if stage.piece is not softcap]
    plain = plan.similarity is dot and plan.normalizer == "softmax" and not (plan.projections or plan.residual or modified or plan.weights)
    return plain and len(parts) == 3 and len(plan.score_mods) < 2 and problem.sequences is None


class Backward:
    """Gradients of one problem for cotangents by output (BHTD), and bounds on their errors."""

    def __init__(self, scored: Scored, cotangents: Mapping[str, np.ndarray]) -> None:
        self.scored, self.plan, self.profile, self.lam = scored, scored.plan, scored.profile, scored.lam
        self.problem, self.u, self.heads = scored.problem, scored.u, scored.heads
        self.q, self.k, self.v = (np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (scored.q, scored.k, scored.v))
        rows = scored.weights.shape[:3]
        self.d_out = np.zeros((*rows, self.v.shape[3]))
        if "out" in cotangents:
            self.d_out = np.asarray(cotangents["out"], np.float64).reshape(self.d_out.shape)
        self.d_lse = np.asarray(cotangents.get("lse", np.zeros(rows)), np.float64).reshape(rows)
        self.visible = scored.visible
        self.through = scored.scored & (scored.scores != self.plan.fill)  # where a score, and not a fill, is
        self.p = np.where(self.visible, scored.weights, 0.0)
        self.lse = scored.log_sum
        with np.errstate(all="ignore"):
            self.dp = np.where(self.visible, self.d_out @ np.swapaxes(self._heads(scored.v), -1, -2), 0.0)
            self.delta = np.sum(self.p * self.dp, axis=-1)
            self.ds = np.where(self.through, self.p * (self.dp - (self.delta - self.d_lse)[..., None]), 0.0)
            self.dx = self.ds * self.slope

    # ---- exactly -----------------------------------------------------------------------------------------------------------------

    def gradients(self) -> dict[str, np.ndarray]:
        """Of every real operand that was given, in its shape: float64."""
        plan, scale = self.plan, self.plan.scale
        with np.errstate(all="ignore"):
            found = {
                plan.query: scale * (self.dx @ self._heads(self.k)),
                plan.key: scale * self._shared(np.swapaxes(self.dx, -1, -2) @ self.q),
                plan.value: self._shared(np.swapaxes(self.p, -1, -2) @ self.d_out),
                plan.bias: self.ds,
                plan.sinks: (self.p_sink * (self.d_lse - self.delta)).sum(axis=(0, 2)),
            }
        return self._named(found)

    def _named(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those of operands that were given, under the names of gradients."""
        given = {o.name: self.problem.given[o.name] for o in self.problem.variant.operands if o.kind == "real" and o.name in self.problem.given}
        summed = {name: self._to_shape(x, given[name].shape) if name == self.plan.bias else x for name, x in found.items() if name in given}
        return {"d_" + name: summed[name].reshape(x.shape) for name, x in given.items()}

    @functools.cached_property
    def slope(self) -> Any:
        """Of the soft-cap at each score: 1 - tanh^2, without its cancellation."""
        if not self.plan.score_mods:
            return 1.0
        (cap,) = self.plan.score_mods[0].numbers
        with np.errstate(all="ignore"):
            return np.where(self.through, np.cosh(np.minimum(np.abs(self._raw), 300.0 * cap) / cap) ** -2.0, 0.0)

    @functools.cached_property
    def _raw(self) -> np.ndarray:
        """Scaled products."""
        return np.where(self.through, self.plan.scale * (self.scored.q @ np.swapaxes(self._heads(self.scored.k), -1, -2)), 0.0)

    @functools.cached_property
    def p_sink(self) -> np.ndarray:
        """Weights of sinks, (B, Hq, T)."""
        sinks = self.scored.operands[self.plan.sinks] if self.plan.sinks else np.full(self.heads, -np.inf)
        with np.errstate(all="ignore"):
            return np.nan_to_num(np.exp(sinks[:, None] - self.lse), nan=0.0)

    def _heads(self, x: np.ndarray) -> np.ndarray:
        """Rows of keys or values for each query head."""
        return x if x.shape[1] == self.heads else np.repeat(x, self.heads // x.shape[1], axis=1)

    def _shared(self, x: np.ndarray) -> np.ndarray:
        """The sum over the query heads that share keys."""
        batch, heads, *rest = x.shape
        kv_heads = self.k.shape[1]
        return x if heads == kv_heads else x.reshape(batch, kv_heads, heads // kv_heads, *rest).sum(axis=2)

    def _folded(self, x: np.ndarray) -> np.ndarray:
        """(B, Hq, T, n) as (B, Hkv, G T, n): all queries that share keys, one after another."""
        batch, heads, n_q, n = x.shape
        kv_heads = self.k.shape[1]
        return np.ascontiguousarray(x).reshape(batch, kv_heads, heads // kv_heads * n_q, n)

    def _by_key(self, x: np.ndarray) -> np.ndarray:
        """(B, Hq, T, S) as (B, Hkv, S, G T)."""
        return np.ascontiguousarray(np.swapaxes(self._folded(x), -1, -2))

    def _to_shape(self, x: np.ndarray, wanted: tuple[int, ...], root: bool = False) -> np.ndarray:
        """Summed over the axes that an operand of that shape was broadcast along; or the root of the sum of squares."""
        axes = _summed_axes(x.shape, wanted)
        total = (x**2 if root else x).sum(axis=axes, keepdims=True)
        return (np.sqrt(total) if root else total).reshape(wanted)

    # ---- errors of weights, rows and scores --------------------------------------------------------------------------------------

    @functools.cached_property
    def weight(self) -> Bound:
        """Relative error of each recomputed weight, but for what its row or the call shares."""
        own = self.scored.weight[0]
        away = np.where(self.visible, np.abs(self.scored.scores - np.where(np.isfinite(self.lse), self.lse, 0.0)[..., None]), 0.0)
        away = np.where(np.isfinite(away), away, 0.0) * self.u
        found = Bound((1 + own.worst) * (1 + away) - 1, np.hypot(own.likely, self.lam * away))
        return found.linear(self.scored.weight[1]) if self.profile.weights_kept else found

    @functools.cached_property
    def row(self) -> Bound:
        """Relative error common to a row's recomputed weights: that of exp(-lse)."""
        kept = self.profile.lse * np.where(np.isfinite(self.lse), np.abs(self.lse), 0.0)
        error = self.scored.lse.linear(kept)
        return Bound(np.expm1(np.minimum(error.worst, 300.0)), np.expm1(np.minimum(error.likely, 300.0)))

    @functools.cached_property
    def dp_error(self) -> Bound:
        amplitude = np.where(self.visible, np.abs(self.d_out) @ np.swapaxes(np.abs(self._heads(self.v)), -1, -2), 0.0)
        stored = self.profile.gradient_weights * np.abs(self.dp)
        return self.scored.products(self.v.shape[3]) * amplitude + Bound(stored, self.lam * stored)

    @functools.cached_property
    def delta_error(self) -> Bound:
        """Of D less the cotangent of lse, whether it is summed from weights or from the rounded output; what the call shares apart."""
        profile, lam, n_keys = self.profile, self.lam, self.p.shape[3]
        apart, size, term = np.abs(self.dp - self.delta[..., None]), np.abs(self.dp), self.p * np.abs(self.dp)
        alike = _multiplicity(self.p)
        total, width = self.scored.products(n_keys + 2 * self.scored.steps + 2), self.scored.roundings(self.v.shape[3] + 1)
        own, dp = self.weight, self.dp_error
        lost = np.minimum(np.sum(self.p * own.worst, axis=-1), 1.0)
        with np.errstate(all="ignore"):
            worst = np.sum(self.p * (own.worst * apart + (1 + own.worst) * (profile.probabilities * size + dp.worst)), axis=-1) / (1 - lost)
        worst = worst + total.worst * term.sum(-1)
        each = np.hypot(np.hypot(own.likely * apart, lam * profile.probabilities * size), dp.likely) * self.p
        peak = np.max(np.abs(np.cumsum(self.p * self.dp, axis=-1)), axis=-1, initial=0.0)
        likely = np.hypot(np.sqrt(alike) * np.sqrt(np.sum(each**2, axis=-1)), total.likely * np.maximum(peak, np.sqrt(np.sum(term**2, axis=-1))))

        out = self.p @ self._heads(self.v)
        summed = np.sum(np.abs(self.d_out * out), axis=-1)
        stored = precision.format_of(output_dtype(self.problem, "out")).unit * summed
        gathered = np.sqrt(np.sum((self.d_out * np.maximum(np.abs(out), np.sqrt(self.p**2 @ self._heads(self.v) ** 2))) ** 2, axis=-1))
        magnitude = np.sum(np.abs(self.d_out) * (self.p @ np.abs(self._heads(self.v))), axis=-1)
        likely = np.sqrt(likely**2 + (total.likely * gathered) ** 2 + (width.likely * summed) ** 2)
        error = Bound(worst + total.worst * magnitude + width.worst * summed, likely)
        rounded = self.u * (np.abs(self.delta) + np.abs(self.d_lse))
        return error.linear(stored + rounded + 2 * self.u * np.abs(self.delta))

    @functools.cached_property
    def ds_error(self) -> Bound:
        """Of each dS, but for what its row or the call shares."""
        profile, lam = self.profile, self.lam
        kept = profile.probabilities if profile.weights_kept else 0.0
        of_p, of_dp, size = self.weight, self.dp_error, np.abs(self.ds)
        roundings = 3 * self.u + profile.gradient_scores + kept
        worst = size * ((1 + of_p.worst) * (1 + roundings) * (1 + self.u) ** 2 - 1) + (1 + of_p.worst) * (1 + roundings) * self.p * of_dp.worst
        squares = of_p.likely**2 + lam**2 * (3 * self.u**2 + profile.gradient_scores**2 + kept**2)
        likely = np.hypot(size * np.sqrt(squares), self.p * of_dp.likely)
        return Bound(worst, likely).where(self.through)

    @functools.cached_property
    def slope_error(self) -> Any:
        """Absolute error of the soft-cap's slope as 1 - tanh^2."""
        if not self.plan.score_mods:
            return Bound(0.0, 0.0)
        (cap,) = self.plan.score_mods[0].numbers
        tanh = np.tanh(self._raw / cap)
        function = self.profile.tanh_error * np.abs(tanh)
        moved = self.scored.score * (1 / cap)
        worst, likely = (2 * np.abs(tanh) * (function + by) + (function + by) ** 2 + 2 * self.u for by in (moved.worst, moved.likely))
        return Bound(worst, likely)

    @functools.cached_property
    def dx_error(self) -> Bound:
        own, slope, size = self.ds_error, self.slope_error, np.abs(self.ds)
        operands = self.profile.operands * np.abs(self.dx)
        return Bound(
            own.worst * (self.slope + slope.worst) + size * slope.worst + operands,
            np.hypot(np.hypot(own.likely * self.slope, size * slope.likely), self.lam * operands),
        )

    def _patterns(self) -> Iterator[np.ndarray]:
        """By what factor weights change with each constant that is rounded once, (B, Hq, T, S)."""
        scores = np.where(self.through, self.scored.scores, 0.0)
        yield scores
        lse = np.where(np.isfinite(self.lse), self.lse, 0.0)[..., None]
        yield np.where(self.through, lse, 0.0)
        if self.plan.bias in self.problem.given or self.plan.score_mods:
            yield self.slope * self._raw

    # ---- gradients ---------------------------------------------------------------------------------------------------------------

    def bounds(self) -> dict[str, np.ndarray]:
        """Largest error of each gradient before it is stored, by its name, in its operand's shape."""
        plan = self.plan
        found = {plan.query: self._d_q(), plan.key: self._d_k(), plan.value: self._d_v()}
        if plan.bias in self.problem.given:
            found[plan.bias] = self._d_bias(self.problem.given[plan.bias].shape)
        if plan.sinks in self.problem.given:
            found[plan.sinks] = self._d_sinks()
        given = self.problem.given
        return {"d_" + name: found[name].smaller.reshape(x.shape) for name, x in given.items() if name in found}

    def _d_q(self) -> Bound:
        row, delta, own = self.row, self.delta_error, self.dx_error
        through_d = self.p * self.slope * self.through
        worst = self._worst(own, self.dx, through_d)
        sums = row_sums(self.dx, self.through, worst, own.likely, np.zeros_like(worst), self.k, False)
        mean = np.abs(through_d @ self._heads(self.k))
        common = Bound(0.0, np.hypot(row.likely[..., None] * np.abs(sums.out), delta.likely[..., None] * mean))
        of_call = sum(np.abs(x @ self._heads(self.k)) for x in self._of_call())
        return self._summed(sums, common, of_call, abs(self.plan.scale), self.profile.gradient_scores, self.p.shape[3])

    def _d_k(self) -> Bound:
        row, delta, own = self.row, self.delta_error, self.dx_error
        through_d = self.p * self.slope * self.through
        worst = self._worst(own, self.dx, through_d)
        likely = np.sqrt(own.likely**2 + (row.likely[..., None] * self.dx) ** 2 + (delta.likely[..., None] * through_d) ** 2)
        sums = self._over_queries(self.dx, self.through, worst, likely, self.q)
        of_call = sum(np.abs(self._shared(np.swapaxes(x, -1, -2) @ self.q)) for x in self._of_call())
        parts = np.swapaxes(self.dx, -1, -2) @ self.q
        return self._summed(sums, self._parts(parts), of_call, abs(self.plan.scale), self.profile.gradient_scores, *self._queries)

    def _d_v(self) -> Bound:
        row, own, profile = self.row, self.weight, self.profile
        worst = self.p * ((1 + own.worst) * (1 + row.worst[..., None]) * (1 + profile.probabilities) - 1)
        likely = self.p * np.sqrt(own.likely**2 + row.likely[..., None] ** 2 + (self.lam * profile.probabilities) ** 2)
        sums = self._over_queries(self.p, self.visible, worst, likely, self.d_out)
        of_call = sum(np.abs(self._shared(np.swapaxes(self.p * x, -1, -2) @ self.d_out)) for x in self._patterns())
        parts = np.swapaxes(self.p, -1, -2) @ self.d_out
        return self._summed(sums, self._parts(parts), of_call, 1.0, profile.probabilities, *self._queries)

    def _worst(self, own: Bound, exact: np.ndarray, through_d: np.ndarray) -> np.ndarray:
        """Largest error of each dS or dX, with what its row shares: a factor, and an error of D that meets it by `through_d`."""
        row, delta = (error.worst[..., None] for error in (self.row, self.delta_error))
        return np.asarray((own.worst + delta * through_d) * (1 + row) + row * np.abs(exact))

    @property
    def _queries(self) -> tuple[int, int]:
        """How many queries each head has, and how many heads share a key."""
        return self.p.shape[2], self.heads // self.k.shape[1]

    def _over_queries(self, weights: np.ndarray, seen: np.ndarray, worst: np.ndarray, likely: np.ndarray, values: np.ndarray) -> RowSums:
        weights, seen, worst, likely = (self._by_key(x) for x in (weights, seen, worst, likely))
        return row_sums(weights, seen, worst, likely, np.zeros_like(worst), self._folded(values), False)

    def _summed(self, sums: RowSums, common: Bound, of_call: Any, scale: float, stored: float, length: int, group: int = 1) -> Bound:
        """Error of a sum over keys or over the queries of a group of heads, from that of its terms."""
        profile, lam = self.profile, self.lam
        n, steps = group * length, group * math.ceil(length / profile.gradient_tile) if profile.gradient_tile else 0
        total = self.scored.products(n + 2)
        out = np.abs(sums.out)
        kept = profile.intermediate * sums.partial  # what is stored between steps, and before it is scaled or added to other heads'
        worst = (1 + total.worst) * sums.worst + total.worst * sums.magnitude + profile.intermediate * (steps + 1) * sums.magnitude + common.worst
        of_stored = lam**2 * (steps * kept**2 + (profile.intermediate * out) ** 2)
        likely = np.sqrt(sums.likely + common.likely**2 + (total.likely * sums.partial) ** 2 + of_stored)
        vanished = (0.5 * profile.smallest_probability if stored else 0.0) * sums.plain + float(np.finfo(np.float32).tiny) * sums.plain
        of_call = _CONSTANT * self.u * of_call + 3 * self.u * out
        return Bound(worst, likely).linear(of_call + vanished) * scale

    def _parts(self, parts: np.ndarray) -> Bound:
        """Of one part per query head, stored before those of one key are added, one after another, and their sums."""
        group = self.heads // self.k.shape[1]
        if group == 1:
            return Bound(0.0, 0.0)
        u = self.profile.intermediate
        sums = np.cumsum(parts.reshape(parts.shape[0], parts.shape[1] // group, group, *parts.shape[2:]), axis=2)
        return Bound(u * group * self._shared(np.abs(parts)), self.lam * u * np.sqrt(self._shared(parts**2) + (sums**2).sum(axis=2)))

    def _of_call(self) -> Iterator[np.ndarray]:
        """How dX answers to each constant that is rounded once."""
        return (x * self.slope for x in self._scores_of_call())

    def _scores_of_call(self) -> Iterator[np.ndarray]:
        """How dS does: weights change by a pattern, and D with them."""
        for pattern in self._patterns():
            moved = np.sum(self.p * pattern * (self.dp - self.delta[..., None]), axis=-1, keepdims=True)
            yield np.where(self.through, pattern * self.ds - self.p * moved, 0.0)

    def _d_bias(self, wanted: tuple[int, ...]) -> Bound:
        row, delta, own = self.row, self.delta_error, self.ds_error
        axes = _summed_axes(self.ds.shape, wanted)
        weights = np.where(self.through, self.p, 0.0)
        worst = self._to_shape(self._worst(own, self.ds, weights), wanted)
        over_keys = 3 in axes
        of_row = np.abs(self.ds.sum(-1, keepdims=True) if over_keys else self.ds) * row.likely[..., None]
        of_delta = (weights.sum(-1, keepdims=True) if over_keys else weights) * delta.likely[..., None]
        likely = self._to_shape(own.likely, wanted, root=True)
        for part in (of_row, of_delta):
            likely = np.hypot(likely, self._to_shape(part, wanted, root=True))
        of_call = _CONSTANT * self.u * sum(np.abs(self._to_shape(x, wanted)) for x in self._scores_of_call())
        n = int(np.prod([self.ds.shape[a] for a in axes], initial=1))
        if n > 1:
            total = self.scored.roundings(n)
            magnitude = self._to_shape(np.abs(self.ds), wanted)
            worst, likely = worst * (1 + total.worst) + total.worst * magnitude, np.hypot(likely, total.likely * magnitude)
        return Bound(worst, likely).linear(of_call + 0.5 * self.profile.smallest_probability * n)

    def _d_sinks(self) -> Bound:
        row, delta = self.row, self.delta_error
        sinks = self.scored.operands[self.plan.sinks]
        with np.errstate(invalid="ignore"):
            away = np.abs(sinks[:, None] - self.lse)
        away = np.where(np.isfinite(away), away, 0.0)
        size = self.p_sink * np.abs(self.d_lse - self.delta)
        own = self.profile.exp_error + self.u * (3 + 3 * away)
        worst = size * ((1 + own) * (1 + row.worst) - 1) + self.p_sink * (1 + own) * (1 + row.worst) * delta.worst
        likely = np.sqrt((size * self.lam * own) ** 2 + (size * row.likely) ** 2 + (self.p_sink * delta.likely) ** 2)
        total = self.scored.roundings(size.shape[0] * size.shape[2] + 2)
        summed = size.sum(axis=(0, 2))
        return Bound(
            (1 + total.worst) * worst.sum(axis=(0, 2)) + total.worst * summed, np.hypot(np.sqrt((likely**2).sum(axis=(0, 2))), total.likely * summed)
        )


def _summed_axes(full: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Axes along which an array of shape `wanted` is broadcast to `full`."""
    padded = (1,) * (len(full) - len(wanted)) + tuple(wanted)
    return tuple(axis for axis, (n, m) in enumerate(zip(full, padded, strict=True)) if n != m)


def _multiplicity(p: np.ndarray) -> np.ndarray:
    """How many keys of a row weigh the same at most: most often one key repeated, whose roundings all go one way."""
    if p.shape[-1] < 2:
        return np.ones(p.shape[:-1])
    ordered = np.sort(p, axis=-1)
    same = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] > 0)
    runs = np.cumsum(same, axis=-1)
    ends = np.maximum.accumulate(np.where(same, 0, runs), axis=-1)
    return 1.0 + np.max(runs - ends, axis=-1)
