"""Gradients in two float64, block by block, and what they leave open in balls.

Blocks are those of the forward pass.  d_q is finished in each; what keys, values, biases and sinks receive is added up over the blocks of a key-value
head, in their order, and over heads where a bias is shared.  Sums over keys, and over the queries of a block, run on a grid as outputs do
(`refattn.exact.rows.combined`), so that each block's bound is a number of its row times a number of its channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import ParameterError
from ..problem import Problem
from . import balls, rows, trusted
from .blocks import Block, blocks, each
from .double_double import TINY, UU, grid_error
from .forward import weighed
from .prepared import Prepared, channels, norms, power_above, prepare, row_tiles
from .results import Certified, Draft, Enclosed, draft, released, unknown_are_nan
from .slopes import Total, capped_slopes, sink_slopes, slopes, without_fixed
from .task import RANGE, Task, task

#: Query-key pairs of a key-value head up to which its gradients are taken to balls: above, some minutes and gigabytes.
BALL_PAIRS = 1 << 20


@dataclass(frozen=True)
class Cotangents:
    """d_out, axes B Hq T E, and d_lse, axes B Hq T; zeros where not given."""

    out: np.ndarray
    lse: np.ndarray


def certify_gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], names: tuple[str, ...]) -> dict[str, Certified]:
    """Gradients with respect to the operands named (``d_q``, ...), in BHTD and in the shapes they were given in.

    Raises
    ------
    ParameterError, BackendUnavailableError
    """
    trusted.check()
    asked = task(problem)
    if asked.empty_rows != "zero":
        raise ParameterError(f"{problem.variant.name}: gradients with empty_rows={asked.empty_rows!r} cannot be certified; only 'zero' can")
    for output in cotangents:
        if output not in ("out", "lse"):
            raise ParameterError(f"{problem.variant.name}: gradients of {output} cannot be certified; those of out and lse can")
    full = (*asked.q.shape[:3], asked.v.shape[3])
    d_out = np.asarray(cotangents.get("out", np.zeros(full)), np.float64).reshape(full)
    d_lse = np.asarray(cotangents.get("lse", np.zeros(full[:3])), np.float64).reshape(full[:3])
    plan = problem.plan
    assert plan is not None
    parts = {plan.query: "q", plan.key: "k", plan.value: "v", plan.bias: "bias", plan.sinks: "sinks"}
    wanted = {name: parts[name[2:]] for name in names}
    shapes = {part: problem.given[name[2:]].shape for name, part in wanted.items()}
    found = _backward(asked, Cotangents(np.ascontiguousarray(d_out), d_lse), shapes, problem.dtype, problem.variant.name)
    axes = {name: problem.variant.operand(name[2:]).axes for name in names}
    return {name: released(found[part], shapes[part], axes[name], problem.layout) for name, part in wanted.items()}


@dataclass(frozen=True)
class _Head:
    """What the queries of one batch and key-value head read, and where what they contribute is added up.

    `values` are rows as products read them, with `value_norms`; `key_channels` are keys as sums of products read them, with the channels' sizes.
    """

    task: Task
    given: Cotangents
    keys: Prepared
    values: np.ndarray
    value_norms: np.ndarray
    key_channels: tuple[np.ndarray, np.ndarray]
    d_q: Total
    totals: Mapping[str, Total]


def _backward(asked: Task, given: Cotangents, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, name: str) -> dict[str, Draft]:
    groups = list(asked.groups())
    work: dict[tuple[int, int], list[Block]] = {at: [] for at in groups}
    for block in blocks(asked):
        work[block.b, asked.group(block.h)].append(block)
    sums: dict[tuple[int, int], Mapping[str, Total]] = {}
    totals = {"q": Total(asked.q.shape), "k": Total(asked.k.shape), "v": Total(asked.v.shape)}
    bias_shape = ((1, 1, 1, 1, *shapes["bias"])[-4:]) if "bias" in shapes else ()

    def do(at: tuple[int, int]) -> None:
        head = _head(asked, given, at, bias_shape, totals["q"])
        with np.errstate(all="ignore"):
            for block in work[at]:
                _block(head, block)
        sums[at] = head.totals

    each(do, groups, f"certifying gradients of {name}", 3.0 * math.prod(asked.shape) * (asked.q.shape[3] + asked.v.shape[3]))
    if bias_shape:
        totals["bias"] = Total(bias_shape)
    if "sinks" in shapes:
        totals["sinks"] = Total(asked.sinks.shape)
    for (b, g), found in sorted(sums.items()):
        for part in ("k", "v"):
            totals[part].add((b, g), *found[part].result())
        own = [h for h in range(asked.q.shape[1]) if asked.group(h) == g]
        for n, h in enumerate(own):
            if bias_shape:
                totals["bias"].add((b % bias_shape[0], h % bias_shape[1]), *(x[n] for x in found["bias"].result()))
            if "sinks" in shapes:
                totals["sinks"].add(h, *(x[n] for x in found["sinks"].result()))
    drafts = {}
    for part in shapes:
        drafts[part] = draft(totals[part].high.shape, dtype)
        drafts[part].write(..., totals[part].result(), 1)
    if balls.available():
        _finish(asked, given, drafts)
    unknown_are_nan(drafts)
    return drafts


def _head(asked: Task, given: Cotangents, at: tuple[int, int], bias_shape: tuple[int, ...], d_q: Total) -> _Head:
    keys, (values, value_norms) = prepare(asked, *at), row_tiles(asked.v[at])
    per_group = asked.q.shape[1] // asked.k.shape[1]
    totals = {"k": Total(asked.k.shape[2:]), "v": Total(asked.v.shape[2:]), "sinks": Total((per_group,))}
    if bias_shape:
        totals["bias"] = Total((per_group, *(n if own > 1 else 1 for n, own in zip(asked.shape[2:], bias_shape[2:], strict=True))))
    return _Head(asked, given, keys, values, value_norms, channels(np.where(keys.bad[: asked.shape[3], None], 0.0, asked.k[at])), d_q, totals)


def _block(head: _Head, block: Block) -> None:
    asked, keys, totals = head.task, head.keys, head.totals
    b, h, at = block.b, block.h, block.rows
    n_q, n_k, tiles = len(at), min(block.columns, asked.shape[3]), block.columns // rows.TILE
    n = h % (asked.q.shape[1] // asked.k.shape[1])
    x = weighed(asked, keys, block)
    even, wide = len(x.top), x.added.shape
    d_out, d_lse = np.zeros((even, asked.v.shape[3])), np.zeros(even)
    d_out[:n_q], d_lse[:n_q] = head.given.out[b, h, at], head.given.lse[b, h, at]
    d_lse[x.empty] = 0.0  # lse is -inf there, whatever the operands
    # weights and dP
    spoilt = x.spoilt | keys.spoilt_channels(x.added).any(axis=1)
    p_error = np.where(spoilt, np.inf, x.share_error)
    p_high, p_low = rows.shares(x.high, x.low, x.sum_high, x.sum_low)
    visible = x.added != -np.inf
    only = (visible.sum(axis=1) == 1) & (asked.sinks[h] == -np.inf) & ~spoilt
    d_size = np.where(np.any(d_out != 0.0, axis=1), norms(d_out), 0.0)
    dp_high, dp_low = np.empty(wide), np.empty(wide)
    rows.products(d_out, d_size, head.values[:tiles], head.value_norms, dp_high, dp_low)
    dp_error = 4.0 * grid_error(d_out.shape[1]) * d_size[:, None] * head.value_norms[: block.columns]
    dp_error += np.where(d_size > 0.0, TINY * d_out.shape[1], 0.0)[:, None]
    g_high, g_low, g_error = (np.empty(wide) for _ in range(3))
    shift, shift_error = np.empty((even, 2)), np.empty(even)
    slopes(p_high, p_low, dp_high, dp_low, dp_error, p_error, x.added, d_lse, only, g_high, g_low, g_error, shift, shift_error)
    without_fixed(x.added, g_high, g_low, g_error)
    g_high[spoilt[:, None] & visible] = np.nan
    # values: sums over queries of p d_out
    weight_error = np.where(visible & ~only[:, None], p_error[:, None] * p_high + rows.DROPPED, 0.0)
    totals["v"].add(slice(0, n_k), *_over_queries(p_high, p_low, weight_error, d_out, n_k))
    if "bias" in totals:
        _add_bias(totals["bias"], n, at, n_k, g_high[:n_q, :n_k], g_low[:n_q, :n_k], g_error[:n_q, :n_k])
    if asked.sinks[h] > -np.inf:
        received = np.empty((even, 3))
        sink_slopes(float(asked.sinks[h]), x.top, x.sum_high, x.sum_low, p_error, shift, shift_error, received)
        for r in range(n_q):
            totals["sinks"].add(n, *received[r])
    # products q . k, and from them queries and keys
    if asked.cap > 0.0:
        s_high, s_low = np.empty(wide), np.empty(wide)
        rows.products(x.q, norms(x.q), keys.k[:tiles], keys.k_size, s_high, s_low)
        capped_slopes(s_high, s_low, x.slack, x.added, asked.scale, asked.cap, g_high, g_low, g_error)
    by_keys = (head.key_channels[0][:, : block.columns], head.key_channels[1])
    head.d_q.add((b, h, at), *(y[:n_q] for y in _scaled(asked.scale, _combined(g_high, g_low, g_error, *by_keys, asked.q.shape[3]))))
    totals["k"].add(slice(0, n_k), *_scaled(asked.scale, _over_queries(g_high, g_low, g_error, x.q, n_k)))


def _combined(high: np.ndarray, low: np.ndarray, error: np.ndarray, values: np.ndarray, value_size: np.ndarray, width: int) -> Enclosed:
    """Sums of products with coefficients known up to `error`, and their bounds."""
    total = np.abs(high).sum(axis=1) * (1.0 + 2.0**-30)
    size = power_above(total, 2 * RANGE)
    found_high, found_low = (np.empty((len(high), value_size.size)) for _ in range(2))
    rows.combined(high, low, size, values, value_size, found_high, found_low)
    share = np.where(total == 0.0, 0.0, rows.combine_error(high.shape[1]) * size) + error.sum(axis=1) * (1.0 + 2.0**-30)
    nothing = (share[:, None] == 0.0) | ((value_size == 0.0) & np.isfinite(share[:, None]))
    bound = np.where(nothing, 0.0, share[:, None] * value_size + TINY)
    return found_high[:, :width], found_low[:, :width], bound[:, :width]


def _over_queries(high: np.ndarray, low: np.ndarray, error: np.ndarray, queries: np.ndarray, n_k: int) -> Enclosed:
    """Sums over the queries of a block for each key: of coefficients times what the queries hold."""
    values, size = channels(queries)

    def turned(x: np.ndarray) -> np.ndarray:
        out = np.zeros((x.shape[1], values.shape[1]))
        out[:, : len(x)] = x.T
        return out

    one, two, three = _combined(turned(high), turned(low), turned(error), values, size, queries.shape[1])
    return one[:n_k], two[:n_k], three[:n_k]


def _scaled(scale: float, found: Enclosed) -> Enclosed:
    """Times scale, 3 u**2 more; what is exactly 0 stays so."""
    high, low, bound = found
    h, low = rows.multiplied(high, low, scale)
    return h, low, np.where((bound == 0.0) & (h == 0.0), 0.0, (bound * abs(scale) + 3.1 * UU * np.abs(h) + TINY) * 1.001)


def _add_bias(total: Total, n: int, at: np.ndarray, n_k: int, high: np.ndarray, low: np.ndarray, error: np.ndarray) -> None:
    """Add to what a bias receives, over the axes it does not have."""
    if total.high.shape[2] > 1:
        if total.high.shape[1] > 1:
            total.add((n, at, slice(0, n_k)), high, low, error)
            return
        for one in zip(high, low, error, strict=True):
            total.add((n, 0, slice(0, n_k)), *one)
        return
    for j in range(n_k):
        if total.high.shape[1] > 1:
            total.add((n, at, 0), high[:, j], low[:, j], error[:, j])
            continue
        for one in zip(high[:, j], low[:, j], error[:, j], strict=True):
            total.add((n, 0, 0), *one)


def _finish(asked: Task, given: Cotangents, drafts: Mapping[str, Draft]) -> None:
    """Take what is undecided to balls, key-value head by key-value head."""
    left = {part: {tuple(at) for at in np.argwhere(~x.rounded).tolist()} for part, x in drafts.items()}
    per_group = asked.q.shape[1] // asked.k.shape[1]
    if asked.shape[2] * asked.shape[3] * per_group > BALL_PAIRS:
        return
    higher = balls.Slopes(asked, given.out, given.lse, drafts["bias"].value.shape if "bias" in drafts else ())
    for bits in balls.precisions():
        for part, open_ones in left.items():
            for at in sorted(open_ones):
                ends = balls.ends(higher.gradient(part, at, bits))
                if ends is not None and drafts[part].settle(at, *ends, 2):
                    open_ones.discard(at)
        if not any(left.values()):
            return
