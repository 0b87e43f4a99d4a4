"""Whether an implementation's answer may be timed at all: the worst error over its tolerance, 1 or less where it is right.

Forward: a sample of the query rows, every head, against the definition within its computed tolerance.  The definition would take minutes on all
rows of a long sequence, and a row does not depend on the others.

Gradients: every element of the first and the last key-value head, with all query heads that read them, against the formulas in float64, within the
worst case of every rounding of a sum, and the likely one of roundings into a narrower format.  With s the scores, p the weights, delta_i =
sum_x d_out_ix out_ix:

    d_v = p^T d_out        d_s = p (d_out v^T - delta)        d_q = scale d_s k        d_k = scale d_s^T q

In a format of 16 bits a gradient may be kept in that format from tile to tile, as torch's CPU kernel keeps it, and is rounded then once per tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refattn import catalog, definition, precision, problem
from refattn.oracle.bounds.bound import gamma, spread
from refattn.oracle.profiles import Profile, resolve
from refattn.oracle.tolerance import tolerances

from .cases import Work

#: Query rows that are compared.
ROWS = 32
#: Query rows whose scores the backward referee keeps at a time.
BLOCK = 512
#: Rows or keys between two roundings of a gradient that is kept in the operands' format; the smallest tile in use.
TILE = 32
#: Chance that a right answer is refused.
ALPHA = 1e-6


def worst(work: Work, found: Sequence[np.ndarray], profile: str) -> float:
    """Largest error over its tolerance; infinite where the answer has another shape or is not finite.

    Parameters
    ----------
    work : Work
    found : sequence of ndarray
        out, or d_q, d_k and d_v.
    profile : str
        How the implementation rounds.
    """
    q, k, v = (work.operands[name].shape for name in ("q", "k", "v"))
    shapes = [(*q[:3], v[3])] if work.way == "forward" else [q, k, v]
    if [x.shape for x in found] != shapes or not all(np.isfinite(np.asarray(x, np.float64)).all() for x in found):
        return np.inf
    rounding = resolve(profile, precision.as_dtype(work.dtype))
    return _forward(work, found[0], rounding) if work.way == "forward" else _gradients(work, found, rounding)


def _forward(work: Work, out: np.ndarray, profile: Profile) -> float:
    n_q = out.shape[2]
    rows = np.unique(np.linspace(0, n_q - 1, ROWS).round().astype(int))
    some = {**work.operands, "q": work.operands["q"][:, :, rows]}
    visible = work.visible
    if visible is not None:
        some["mask"] = visible[rows]
    if "bias" in some:
        some["bias"] = some["bias"][..., rows, :]
    call = problem.bind(catalog.variant("softmax"), (), some | {"softcap": work.params.get("softcap")}, ("out",))
    truth = definition.run(call)
    allowed = tolerances(call, truth, profile, ALPHA)["out"]
    return float((np.abs(out[:, :, rows].astype(np.float64) - truth["out"]) / allowed).max())


def _gradients(work: Work, found: Sequence[np.ndarray], profile: Profile) -> float:
    batch, kv_heads = work.operands["k"].shape[:2]
    group = work.operands["q"].shape[1] // kv_heads
    largest = 0.0
    for b, g in {(0, 0), (batch - 1, kv_heads - 1)}:
        heads = slice(g * group, (g + 1) * group)
        for x, exact, allowed in zip((found[0][b, heads], found[1][b, g], found[2][b, g]), *gradients(work, b, g, profile), strict=True):
            largest = max(largest, float((np.abs(x.astype(np.float64) - exact) / allowed).max()))
    return largest


def gradients(work: Work, b: int, g: int, profile: Profile) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """d_q of the heads that share a key-value head, d_k and d_v of that head, and how far right ones may be from them."""
    k, v = (work.operands[name][b, g].astype(np.float64) for name in ("k", "v"))
    group = work.operands["q"].shape[1] // work.operands["k"].shape[1]
    heads = slice(g * group, (g + 1) * group)
    q, d_out = (x[b, heads].astype(np.float64) for x in (work.operands["q"], work.d_out))
    n_q, d, n_k, e = q.shape[1], q.shape[2], *v.shape
    scale, visible, bias = 1 / np.sqrt(d), work.visible, work.operands.get("bias")
    u, stored = profile.accumulate, precision.format_of(work.dtype)
    narrow = profile.probabilities + profile.intermediate
    lam = spread(q.size + k.size + v.size, ALPHA)
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    worst_q, worst_k, worst_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    square_q, square_k, square_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(group):
        for start in range(0, n_q, BLOCK):
            rows = slice(start, start + BLOCK)
            x, y = q[h, rows], d_out[h, rows]
            s = scale * x @ k.T
            off = (gamma(d + 2, u) + profile.operands) * scale * np.abs(x) @ np.abs(k).T
            if bias is not None:
                s += (bias[rows] if bias.ndim == 2 else bias[heads][h, rows]).astype(np.float64)
                off += u * np.abs(s)
            if visible is not None:
                s[~visible[rows]] = -np.inf
                off[~visible[rows]] = 0.0
            p = np.exp(s - s.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            d_p, out = y @ v.T, p @ v
            d_s = p * (d_p - (y * out).sum(1, keepdims=True))
            if stored.unit > 2.0**-24:
                square_q[h, rows] += stored.unit**2 * _squares_of_running_sums(d_s.T, scale * k)
                square_k += stored.unit**2 * _squares_of_running_sums(d_s, scale * x, d_k)
                square_v += stored.unit**2 * _squares_of_running_sums(p, y, d_v)
            d_q[h, rows] = scale * d_s @ k
            d_k += scale * d_s.T @ x
            d_v += p.T @ y
            # a weight's relative error: its score's and the largest of its row's, two exponentials', the sum's
            off_p = np.expm1(2 * off.max(1, keepdims=True)) + 2 * profile.exp_error + gamma(n_k, u)
            size = p @ np.abs(v)
            off_delta = (np.abs(y) * (off_p + gamma(e + n_k, u)) * size).sum(1, keepdims=True)
            off_delta += lam * stored.unit * np.sqrt((y * out) ** 2 @ np.ones((e, 1)))  # out was rounded when it was stored
            off_s = off_p * np.abs(d_s) + p * (off_delta + gamma(e + 2, u) * np.abs(y) @ np.abs(v).T)
            worst_q[h, rows] = scale * (off_s + gamma(n_k, u) * np.abs(d_s)) @ np.abs(k)
            worst_k += scale * (off_s + gamma(group * n_q, u) * np.abs(d_s)).T @ np.abs(x)
            worst_v += ((off_p + gamma(group * n_q, u)) * p).T @ np.abs(y)
            # roundings into a narrower format, independent of one another
            square_s = (narrow * scale) ** 2 * (d_s**2 + (p * d_p) ** 2)
            square_q[h, rows] += square_s @ k**2
            square_k += square_s.T @ x**2
            square_v += (narrow * p.T) ** 2 @ y**2
    exact = [d_q, d_k, d_v]
    offs = [w + lam * np.sqrt(s) for w, s in ((worst_q, square_q), (worst_k, square_k), (worst_v, square_v))]
    return exact, [off + stored.unit * (np.abs(x) + off) + stored.tiny for off, x in zip(offs, exact, strict=True)]


def _squares_of_running_sums(weights: np.ndarray, rows: np.ndarray, before: np.ndarray | float = 0.0) -> np.ndarray:
    """Sum, over the tiles of rows, of the square of what weights^T rows has come to with that tile."""
    running, squares = before, np.zeros((weights.shape[1], rows.shape[1]))
    for start in range(0, len(rows), TILE):
        running = running + weights[start : start + TILE].T @ rows[start : start + TILE]
        squares += running**2
    return squares
