"""The backward pass of a reading: the textbook formulas of softmax over a dot product, in stages that may be read wrongly.

With scores s recomputed from operands, the forward pass's lse and output, and cotangents g of the output and l of lse:

    p = exp(s - lse),  d_v = p^T g,   d_p = g v^T,   delta = g . out,   d_s = p (d_p - delta + l),   d_raw = (1 - tanh^2) d_s,
    d_q = scale d_raw k,   d_k = scale d_raw^T q

summed over the query heads of a key-value head; d_bias is d_s summed over the axes of the bias, and d_sink = sum_i p_sink (l - delta).

A forward pass that is read wrongly is differentiated as it is read: its own weights, scale, heads and masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...problem import Problem
from ...spec import Plan
from ..profiles import Profile
from .evaluation import Evaluation, Rows, Scores, as_if_contiguous, cap_of, head_map, in_range, read_rows, score, sinks_of, tiles, working_format
from .reading import Reading


def knows(problem: Problem) -> bool:
    """Whether this file has the formulas of the problem's variant."""
    plan = problem.plan
    return (
        plan is not None
        and plan.normalizer in ("softmax", "sigmoid", "relu")
        and plan.similarity.__name__.endswith(".dot")
        and not (plan.projections or plan.residual or plan.weights)
        and len({plan.query, plan.key, plan.value}) == 3
    )


@dataclass(frozen=True)
class Parts:
    """What gradients are sums of: (B, Hq, T, S) but for `g`, which is (B, Hq, T, E), and `delta`, (B, Hq, T, 1)."""

    rows: Rows
    scores: Scores
    p: np.ndarray
    g: np.ndarray
    d_p: np.ndarray
    delta: np.ndarray
    d_s: np.ndarray
    slope: np.ndarray | float
    of_sinks: np.ndarray  # the cotangent of lse less delta, as sinks read both


@np.errstate(all="ignore")
def gradients(found: Evaluation, cotangents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``d_<operand>`` of every real operand that was given, for cotangents of out and lse; empty where the formulas are not known."""
    if not knows(found.problem) or not cotangents.keys() <= {"out", "lse"}:
        return {}
    problem, plan, reading = found.problem, found.plan, found.reading
    parts = parts_of(found, cotangents)
    rows, p, d_s = parts.rows, parts.p, parts.d_s
    raw = d_s * parts.slope * reading.d_factor
    factor = parts.scores.scale
    of_q = raw * reading.d_q_factor * (factor if reading.d_scale in ("both", "queries") else 1.0)
    of_k = raw * reading.d_k_factor * (factor if reading.d_scale in ("both", "keys") else 1.0)
    of_k = p * factor if reading.d_product == "weights" else of_k
    of_v = p
    n_q, n_k = p.shape[2:]
    if reading.d_stored in ("last", "last for queries"):
        of_q = np.where(_last_tile(n_k, reading.d_tile), of_q, 0.0)
    if reading.d_stored in ("last", "last for keys"):
        of_k, of_v = (np.where(_last_tile(n_q, reading.d_tile)[:, None], x, 0.0) for x in (of_k, of_v))
    result = {
        plan.query: of_q @ _finite(rows.k),
        plan.key: _grouped(found, parts, np.swapaxes(of_k, -1, -2) @ _finite(rows.q), "key"),
        plan.value: _grouped(found, parts, np.swapaxes(of_v, -1, -2) @ parts.g, "value"),
    }
    given = problem.given
    if plan.bias in given:
        of_bias = d_s * reading.d_bias_factor * (factor if reading.d_bias == "scaled" else reading.bias_factor)
        result[plan.bias] = _unbroadcast(of_bias, given[plan.bias].shape, reading.d_bias)
    if plan.sinks in given:
        result[plan.sinks] = _of_sinks(found, parts)
    return {"d_" + n: in_range(x.reshape(given[n].shape), working_format(problem)) for n, x in result.items()}


#: What the cotangent of lse is multiplied by in the gradient of the scores, and of the sinks.
_CONSIDERED = {
    "ignored": (0.0, 0.0),
    "negated": (-1.0, -1.0),
    "ignored by scores": (0.0, 1.0),
    "negated by scores": (-1.0, 1.0),
    "ignored by sinks": (1.0, 0.0),
}


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, 0.0)


def _last_tile(n: int, width: int) -> np.ndarray:
    """Whether each of n entries is in the last tile."""
    return np.arange(n) >= (max(n, 1) - 1) // width * width


def _kept(order: str, width: int, n: int, other: int) -> np.ndarray:
    """Which of n entries are in tiles that count, by the orders of `refattn.oracle.mutants.evaluation.tiles`."""
    keeps = np.zeros(n, bool)
    for tile in tiles(Reading(tile=width, order=order), other, n):
        keeps[tile] = True
    return keeps


def parts_of(found: Evaluation, cotangents: Mapping[str, np.ndarray]) -> Parts:
    """Everything up to the gradient of the scores."""
    problem, plan, reading = found.problem, found.plan, found.reading
    rows, scores, p = _recomputed(found)
    shape = (*p.shape[:3], rows.v.shape[3])
    g = np.zeros(shape)
    if "out" in cotangents:
        g = cotangents["out"]
        g = (as_if_contiguous(g) if reading.d_out == "contiguous" else g).astype(np.float64).reshape(shape)
    d_lse: np.ndarray | float = 0.0
    if "lse" in cotangents:
        d_lse = np.reshape(cotangents["lse"], (*p.shape[:3], 1)).astype(np.float64)
    of_scores, of_sink = _CONSIDERED.get(reading.d_lse, (1.0, 1.0))
    v = _finite(rows.v)
    delta, of_row = _delta(found, g, v)
    channels = reading.d_channels or v.shape[3]
    d_p = g[..., :channels] @ np.swapaxes(v[..., :channels], -1, -2)
    if plan.normalizer == "sigmoid":
        d_s = p * (1.0 - p) * d_p
    elif plan.normalizer == "relu":
        s = np.where(scores.seen, scores.s, 0.0)
        d_s = plan.power * np.maximum(s, 0.0) ** (plan.power - 1) * (s > 0) / plan.divisor * d_p
    else:
        d_s = in_range(p * (d_p - delta + of_scores * d_lse), working_format(problem))
    nothing = np.isneginf(scores.s).all(-1, keepdims=True) & np.isneginf(found.weights.top + np.log(found.weights.total))
    if reading.d_empty != "zero":
        d_s = np.where(nothing, np.nan, d_s)
        p = np.where(nothing, np.nan, p) if reading.d_empty == "nan weights" else p
    keeps = _kept(reading.d_queries, reading.d_tile, p.shape[2], p.shape[3])[:, None] & _kept(reading.d_keys, reading.d_tile, p.shape[3], p.shape[2])
    if not keeps.all():
        p, d_s = np.where(keeps, p, 0.0), np.where(keeps, d_s, 0.0)
    return Parts(rows, scores, p, g, d_p, delta, d_s, _slope(plan, reading, scores), of_sink * d_lse - of_row)


def _recomputed(found: Evaluation) -> tuple[Rows, Scores, np.ndarray]:
    """Rows, scores and weights as the backward pass finds them."""
    problem, plan, reading = found.problem, found.plan, found.reading
    as_forward = np.where(np.isneginf(found.scores.s), 0.0, np.nan_to_num(found.weights.p))
    if not (reading.recomputed or reading.d_lse_read != "natural" or reading.d_stuck.startswith("lse")):
        return found.rows, found.scores, as_forward
    again = replace(reading, **dict(reading.recomputed))
    rows = read_rows(problem, plan, again) if reading.recomputed else found.rows
    scores = score(problem, plan, again, rows) if reading.recomputed else found.scores
    lse = found.weights.top + np.log(found.weights.total)
    lse = lse * math.log(2.0) if reading.d_lse_read == "base 2" else _stuck(reading, lse) if reading.d_stuck.startswith("lse") else lse
    p = in_range(np.exp(scores.s - np.where(np.isneginf(lse), 0.0, lse)), working_format(problem))
    return rows, scores, np.where(np.isneginf(scores.s), 0.0, p)


def _stuck(reading: Reading, x: np.ndarray) -> np.ndarray:
    """A number per row that is another row's."""
    i = np.arange(x.shape[2])
    return x[:, :, i // reading.d_tile * reading.d_tile if reading.d_stuck.endswith("first row") else i % reading.d_tile]


def _delta(found: Evaluation, g: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row's sum of cotangent times output, as scores and as sinks read it: (B, Hq, T, 1) twice."""
    reading = found.reading
    forward = np.where(np.isneginf(found.scores.s), 0.0, np.nan_to_num(found.weights.p)) @ _finite(found.rows.v)
    delta: np.ndarray = (g * forward).sum(-1, keepdims=True)
    if reading.d_stuck:
        return _stuck(reading, delta), delta
    if reading.delta == "unnormalised":
        delta = delta * np.nan_to_num(found.weights.total)
    if reading.delta == "for every part":
        delta = delta * max(1, -(-v.shape[3] // reading.d_part))
    delta = delta * {"none": 0.0, "negated": -1.0, "twice": 2.0}.get(reading.delta, 1.0)
    return delta, delta


def _slope(plan: Plan, reading: Reading, scores: Scores) -> np.ndarray | float:
    """Of the soft-cap."""
    cap = cap_of(plan)
    if cap is None or reading.d_cap == "none" or reading.cap == "dropped":
        return 1.0
    tanh = np.abs(np.tanh(np.where(scores.seen, scores.plain, 0.0) / cap))
    return np.where(scores.seen, 1.0 - (tanh if reading.d_cap == "not squared" else tanh**2), 0.0)


def _grouped(found: Evaluation, parts: Parts, x: np.ndarray, what: str) -> np.ndarray:
    """Gradients of keys or values over the query heads that read them."""
    problem, reading = found.problem, replace(found.reading, **dict(found.reading.recomputed))
    kv_heads, heads = problem.dims.get("Hkv", 1), x.shape[1]
    mapped = reading.key_heads if what == "key" else reading.value_heads
    reads = parts.rows.heads if mapped else head_map("grouped", heads, kv_heads)
    if reading.d_group == "tiled":
        reads = head_map("tiled", heads, kv_heads)
    whose = [np.flatnonzero(reads == g) for g in range(kv_heads)]
    if reading.d_group in ("last", "first"):
        whose = [own[-1:] if reading.d_group == "last" else own[:1] for own in whose]
    share = heads // kv_heads if reading.d_group == "mean" else 1
    return np.stack([x[:, own].sum(1) for own in whose], axis=1) / share


def _unbroadcast(x: np.ndarray, wanted: tuple[int, ...], how: str) -> np.ndarray:
    """Summed over the axes along which an operand of shape `wanted` was repeated, or reduced otherwise."""
    full = (1,) * (x.ndim - len(wanted)) + wanted
    for axis, n in enumerate(full):
        if n == 1 and x.shape[axis] != 1:
            first = how == "first" or (how == "first head" and axis < 2)
            x = x.take([0], axis) if first else x.mean(axis, keepdims=True) if how == "mean" else x.sum(axis, keepdims=True)
    return x


def _of_sinks(found: Evaluation, parts: Parts) -> np.ndarray:
    p_sink = _weight_of_sinks(found)
    d_sink: np.ndarray = np.nan_to_num(p_sink * parts.of_sinks).sum((0, 2, 3))
    return d_sink * {"zero": 0.0, "negated": -1.0}.get(found.reading.d_sink, 1.0)


def _weight_of_sinks(found: Evaluation) -> np.ndarray:
    """(B, Hq, T, 1)."""
    sink = sinks_of(found.problem, found.plan, found.reading)
    return np.nan_to_num(np.exp(sink - found.weights.top) / found.weights.total)


def bounds(
    found: Evaluation, cotangents: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], profile: Profile, lam: float
) -> dict[str, np.ndarray]:
    """Errors of the gradients to first order, before they are stored.

    Every weight, its gradient and delta are off by the roundings they went through; sums by the root of the sum of squares, but for what a whole row
    has in common (the error of lse, of delta), which is added up.
    """
    if not any(name.startswith("d_") for name in outputs):
        return {}
    problem, plan, reading = found.problem, found.plan, found.reading
    parts = parts_of(found, cotangents)
    rows, scores = parts.rows, parts.scores
    u = profile.accumulate
    narrow = max(profile.probabilities, u)
    q, k, v = np.abs(_finite(rows.q)), np.abs(_finite(rows.k)), np.abs(_finite(rows.v))
    d, e, n_q, n_k = q.shape[3], v.shape[3], q.shape[2], k.shape[2]
    p, g = np.abs(np.nan_to_num(parts.p)), np.abs(parts.g)
    amplitude = abs(scores.scale) * (q @ np.swapaxes(k, -1, -2))
    s = np.where(scores.seen, np.abs(scores.s), 0.0)
    with np.errstate(all="ignore"):
        lse = np.nan_to_num(found.weights.top + np.log(found.weights.total), nan=0.0, posinf=0.0, neginf=0.0)
    of_score = (u * np.sqrt(d + 3) + profile.operands) * amplitude + (profile.scores + profile.tanh_error + 4 * u) * s + 4 * u * np.abs(lse)
    of_weight = np.expm1(np.minimum(np.nan_to_num(of_score) + 2 * profile.exp_error, 1.0))
    of_row = np.sqrt((np.nan_to_num(found.weights.p) ** 2 * of_weight**2).sum(-1, keepdims=True)) + u * math.sqrt(n_k + 1)
    of_p = p * (of_weight + of_row)
    size = g @ np.swapaxes(v, -1, -2)
    of_dp = (u * math.sqrt(e + 1) + profile.operands) * size
    out = np.maximum(p, np.abs(np.nan_to_num(found.weights.p))) @ v  # delta is of the forward pass, whose weights may be others
    of_delta = np.sqrt(((p * of_dp) ** 2 + (of_p * parts.d_p) ** 2).sum(-1, keepdims=True)) + (u * math.sqrt(e) + narrow) * (g * out).sum(
        -1, keepdims=True
    )
    d_s = np.abs(np.nan_to_num(parts.d_s))
    inner = np.abs(parts.d_p - parts.delta) + np.abs(parts.of_sinks + parts.delta)
    softmax = plan.normalizer == "softmax"
    of_ds = (
        of_p * inner + p * (of_dp + of_delta + u * (np.abs(parts.d_p) + np.abs(parts.delta)))
        if softmax
        else d_s * of_weight + of_dp * np.abs(of_p + p)
    )
    of_ds = np.nan_to_num(of_ds) + 3 * u * d_s
    slope = parts.slope
    raw, of_raw = d_s * slope, of_ds * slope + d_s * (narrow * slope + 4 * profile.tanh_error * (np.ndim(slope) > 0))
    factor = abs(scores.scale) * abs(reading.d_factor)
    of_q, of_k = (
        abs(own) * (factor if reading.d_scale in ("both", side) else abs(reading.d_factor))
        for own, side in ((reading.d_q_factor, "queries"), (reading.d_k_factor, "keys"))
    )

    def product(a: np.ndarray, of_a: np.ndarray, b: np.ndarray, terms: int) -> np.ndarray:
        return np.sqrt(of_a**2 @ b**2 + (u * math.sqrt(terms) * (a @ b)) ** 2) + narrow * np.sqrt(a**2 @ b**2) + 2 * u * (a @ b)

    def grouped(x: np.ndarray) -> np.ndarray:
        reads = [parts.rows.heads == h for h in range(problem.dims.get("Hkv", 1))]
        return (
            np.stack([x[:, own].sum(1) for own in reads], axis=1) if reading.d_group == "sum" else np.repeat(x.sum(1, keepdims=True), len(reads), 1)
        )

    def swap(x: np.ndarray) -> np.ndarray:
        return np.swapaxes(x, -1, -2)

    of_keys = product(swap(p), swap(of_p), q, n_q + 2) if reading.d_product == "weights" else product(swap(raw), swap(of_raw), q, n_q + 2)
    errors = {
        plan.query: of_q * product(raw, of_raw, k, n_k + 2),
        plan.key: of_k * grouped(of_keys),
        plan.value: grouped(product(swap(p), swap(of_p + narrow * p), g, n_q + 2)),
    }
    if plan.bias in problem.given:
        wanted = problem.given[plan.bias].shape
        of_bias = abs(reading.d_bias_factor) * max(abs(reading.bias_factor), 1e-30)
        errors[plan.bias] = of_bias * (np.sqrt(_unbroadcast(of_ds**2, wanted, "")) + 2 * u * _unbroadcast(d_s, wanted, ""))
    if plan.sinks in problem.given:
        p_sink, size_of_delta = _weight_of_sinks(found), np.abs(parts.delta) + np.abs(parts.of_sinks)
        away = np.abs(sinks_of(problem, plan, reading) - lse)
        of_sink = p_sink * (of_delta + size_of_delta * (of_row + 2 * profile.exp_error + u * (4 + np.where(np.isfinite(away), away, 0.0))))
        total = (p_sink * size_of_delta).sum((0, 2, 3))
        errors[plan.sinks] = np.sqrt((of_sink**2).sum((0, 2, 3))) + u * math.sqrt(n_q * p_sink.shape[0] + 2) * total
    known = {"d_" + name: lam * x for name, x in errors.items() if "d_" + name in outputs}
    return {name: x.reshape(outputs[name].shape) if x.size == outputs[name].size else np.zeros(outputs[name].shape) for name, x in known.items()}
