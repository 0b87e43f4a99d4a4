"""Outputs of one block by the first two rungs: kernels called, their bounds put together, what they decide written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import rows, single
from .blocks import Block
from .double_double import TINY, UU
from .prepared import Prepared, norms
from .results import Draft, Enclosed
from .task import Task

#: A score so far below the largest that its weight rounds to 0 in any format.
GONE = -760.0


@dataclass(frozen=True)
class Weighed:
    """The weights of a block's rows in two float64, not divided by their sum, and what is known of them; the number of rows is even.

    Attributes
    ----------
    q, added : ndarray
        Queries, and what is added to scores (`Task.added`).
    scores : tuple of ndarray
        In two float64; empty unless asked for.
    slack : ndarray
        Bound of each score.
    high, low, top, sum_high, sum_low, eta : ndarray
        As `rows.weights` leaves them.
    empty, spoilt : ndarray of bool
        Rows that see no key and have no sink; rows of which nothing is known.
    """

    q: np.ndarray
    added: np.ndarray
    scores: tuple[np.ndarray, ...]
    slack: np.ndarray
    high: np.ndarray
    low: np.ndarray
    top: np.ndarray
    sum_high: np.ndarray
    sum_low: np.ndarray
    eta: np.ndarray
    empty: np.ndarray
    spoilt: np.ndarray

    @property
    def share_error(self) -> np.ndarray:
        """Relative error of each row's weights over their sum: theirs, of which the sum has as much at most, the sum's own, and the division."""
        return 2.1 * self.eta + 1.02 * rows.sum_error(self.high.shape[1]) + 13.0 * UU


def fill(task: Task, keys: Prepared, block: Block, drafts: Mapping[str, Draft]) -> None:
    """Write down what the first rung decides, where all results are narrow enough for it, and what the second does."""
    wide = "weights" in drafts or "scores" in drafts or any(x.dtype == np.float64 for x in drafts.values())
    if not wide:
        _in_one(task, keys, block, drafts)
        at = (block.b, block.h, block.rows)
        still_open = np.any([~x.rounded[at].all(axis=-1) for x in drafts.values()], axis=0)
        block = Block(block.b, block.h, block.rows[still_open], block.columns)
    if len(block.rows):
        _in_two(task, keys, block, drafts)


def weighed(task: Task, keys: Prepared, block: Block, keep_scores: bool = False) -> Weighed:
    """Scores and weights in two float64."""
    q, q_size, added = _padded(task, block, len(block.rows) + len(block.rows) % 2)
    high, low, slack = (np.empty(added.shape) for _ in range(3))
    top, sum_high, sum_low, eta = (np.empty(len(q)) for _ in range(4))
    sink, error = float(task.sinks[block.h]), rows.score_error(q.shape[1])
    with np.errstate(all="ignore"):
        rows.scores(q, q_size, *_keys(keys, block), added, task.scale, task.cap, task.fill, error, high, low, slack)
        scores = (high.copy(), low.copy()) if keep_scores else ()
        rows.weights(high, low, slack, sink, top, sum_high, sum_low, eta)
    empty, spoilt = _condition(keys, sink, added, top, eta)
    return Weighed(q, added, scores, slack, high, low, top, sum_high, sum_low, eta, empty, spoilt)


def _padded(task: Task, block: Block, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, powers of two above their norms, and what is added to their scores, with rows that see nothing up to a number of rows."""
    n_q = len(block.rows)
    q, q_size, added = np.zeros((n_rows, task.q.shape[3])), np.ones(n_rows), np.full((n_rows, block.columns), -np.inf)
    q[:n_q] = task.q[block.b, block.h, block.rows]
    q_size[:n_q] = norms(q[:n_q])
    added[:n_q] = task.added(block.b, block.h, block.rows, block.columns)
    return q, q_size, added


def _keys(keys: Prepared, block: Block) -> tuple[np.ndarray, np.ndarray]:
    return keys.k[: block.columns // rows.TILE], keys.k_size


def _condition(keys: Prepared, sink: float, added: np.ndarray, top: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows without a visible key or a sink; rows of which nothing is known.  `top` is -inf in both, where no score is a number."""
    without = top == -np.inf
    empty = without & np.all(added == -np.inf, axis=1) if sink == -np.inf and without.any() else np.zeros(len(top), np.bool_)
    return empty, ~np.isfinite(eta) | keys.spoilt(added) | (without & ~empty)


# ---- the first rung --------------------------------------------------------------------------------------------------------------


def _in_one(task: Task, keys: Prepared, block: Block, drafts: Mapping[str, Draft]) -> None:
    n_q, at = len(block.rows), (block.b, block.h, block.rows)
    q, q_size, added = _padded(task, block, -(-n_q // single.ROWS) * single.ROWS)
    high, slack = np.empty(added.shape), np.empty(added.shape)
    top, sums, eta, lse, bound = (np.empty(len(q)) for _ in range(5))
    sink = float(task.sinks[block.h])
    with np.errstate(all="ignore"):
        single.scores(q, q_size, *_keys(keys, block), added, task.scale, task.cap, task.fill, high, slack)
        single.weights(high, slack, sink, top, sums, eta)
    empty, spoilt = _condition(keys, sink, added, top, eta)
    if "lse" in drafts:
        single.log_sums(top, sums, eta, single.sum_error(block.columns), lse, bound)
        bound[spoilt] = np.inf
        drafts["lse"].write(at, (lse[:n_q, None], np.zeros((n_q, 1)), bound[:n_q, None]), 0)
    if "out" in drafts:
        out = np.empty((len(q), keys.v_size.size))
        with np.errstate(all="ignore"):
            single.mixed(high, sums, keys.v[:, : block.columns], out)
        bounds = _out_bound(keys, 2.01 * eta + single.mix_error(block.columns), spoilt | empty, added)
        _write_out(task, drafts["out"], at, (out, np.zeros(out.shape), bounds), empty, 0)


# ---- the second rung -------------------------------------------------------------------------------------------------------------


def _in_two(task: Task, keys: Prepared, block: Block, drafts: Mapping[str, Draft]) -> None:
    n_q, at = len(block.rows), (block.b, block.h, block.rows)
    x = weighed(task, keys, block, keep_scores="weights" in drafts or "scores" in drafts)
    if "scores" in drafts:
        slack = np.where(keys.bad[: block.columns] & (x.added != -np.inf), np.inf, x.slack)
        known = (x.scores[0], -np.inf), (x.scores[1], 0.0), (slack, 0.0)
        drafts["scores"].write(at, _of_all_keys(task, n_q, *known), 1)
    if "weights" in drafts:
        _write_weights(task, x, drafts["weights"], at)
    if "lse" in drafts:
        lse, rest, bound = (np.empty(len(x.top)) for _ in range(3))
        rows.log_sums(x.top, x.sum_high, x.sum_low, x.eta, rows.sum_error(block.columns), lse, rest, bound)
        bound[x.spoilt] = np.inf
        drafts["lse"].write(at, (lse[:n_q, None], rest[:n_q, None], bound[:n_q, None]), 1)
    if "out" in drafts:
        high, low = (np.empty((len(x.top), keys.v_size.size)) for _ in range(2))
        with np.errstate(all="ignore"):
            rows.mixed(x.high, x.low, x.sum_high, x.sum_low, keys.v[:, : block.columns], keys.v_size, high, low)
        bounds = _out_bound(keys, 2.01 * x.eta + rows.mix_error(block.columns), x.spoilt | x.empty, x.added)
        _write_out(task, drafts["out"], at, (high, low, bounds), x.empty, 1)


def _of_all_keys(task: Task, n_q: int, *known: tuple[np.ndarray, float]) -> Enclosed:
    """Rows of a block, its columns those of all keys: the rest is filled."""

    def widened(x: np.ndarray, filling: float) -> np.ndarray:
        out = np.full((n_q, task.shape[3]), filling)
        n_k = min(x.shape[1], task.shape[3])
        out[:, :n_k] = x[:n_q, :n_k]
        return out

    high, low, bound = (widened(*one) for one in known)
    return high, low, bound


def _out_bound(keys: Prepared, share: np.ndarray, unknown: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Bounds of outputs: a share of each channel's size, and 0 in a channel of zeros."""
    share = np.where(unknown, np.inf, share)[:, None]
    with np.errstate(invalid="ignore"):  # an infinite share of nothing
        bound = np.where((keys.v_size == 0.0) & np.isfinite(share), 0.0, share * keys.v_size + TINY * added.shape[1])
    if keys.bad_v is not None:
        spoilt = keys.spoilt_channels(added)
        bound[:, : spoilt.shape[1]][spoilt] = np.inf
    return bound


def _write_out(task: Task, out: Draft, at: Any, known: Enclosed, empty: np.ndarray, tier: int) -> None:
    n_q, width = len(at[2]), out.value.shape[3]
    high, low, bound = (y[:n_q, :width] for y in known)
    out.write(at, (high, low, bound), tier)
    out.declare(at, empty[:n_q], task.empty_rows)


def _write_weights(task: Task, x: Weighed, out: Draft, at: Any) -> None:
    n_q = len(at[2])
    hidden = x.added == -np.inf
    with np.errstate(all="ignore"):
        high, low = rows.shares(x.high, x.low, x.sum_high, x.sum_low)
        bound = high * x.share_error[:, None] + TINY
        gone = (x.high == 0.0) & ~(hidden | x.spoilt[:, None]) & (x.scores[0] - x.top[:, None] + x.slack < GONE)
    bound[(x.high == 0.0) & ~hidden] = rows.DROPPED
    bound[gone] = 0.0
    bound[x.spoilt] = np.inf
    bound[hidden] = 0.0
    bound[x.empty] = np.inf
    high, low, bound = _of_all_keys(task, n_q, (high, 0.0), (low, 0.0), (bound, 0.0))
    out.write(at, (high, low, bound), 1)
    n_k = min(gone.shape[1], task.shape[3])
    out.bound[(*at, slice(0, n_k))] = np.where(gone[:n_q, :n_k], 5e-324, out.bound[(*at, slice(0, n_k))])  # above 0, if only just
    out.declare(at, x.empty[:n_q], task.empty_rows)
