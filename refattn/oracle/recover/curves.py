"""How a weight's logarithm grows with q . k and with the bias: scale, soft-cap, order, channels.

Keys lie along one direction at powers of two, and queries are powers of two times it, so that the same product occurs in many rows.  A row
tells differences of scores only, and only between weights that its format can hold; from the row of the smallest products up, every row
shares a product with an earlier one, and the whole curve follows, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..findings import Fact
from .asking import FIRST_CALL, Asked, Kernel, Reading, Resolution, fact, listed, slope, spans, stated
from .visible import weights

SCORE, SCORE_BY_CHANNEL = "score as a function of q . k", "score per unit of q . k in each channel"

#: Positions of the keys along their direction: those that matter first, for the sake of queries that see few.
_STEPS = np.array([0.0, *(sign * 2.0**n for n in range(2, -7, -1) for sign in (1.0, -1.0))])
#: Lengths of the queries.
_LENGTHS = np.array([0.0, *(2.0**n for n in range(-3, 9))])


@dataclass(frozen=True)
class Curve:
    """Scores as a function of a product, up to what could be read.

    Attributes
    ----------
    x, y, error : ndarray
        Products in ascending order, scores less the score of 0, and how far those may be off.
    odds : float
        Largest contradiction between rows, relative to what rounding allows; above 1 the score is no function of the product.
    """

    x: np.ndarray
    y: np.ndarray
    error: np.ndarray
    odds: float


def facts(kernel: Kernel) -> Iterator[Fact]:
    """Scale by default, as told, and under a soft-cap; channels; bias, and bias under a soft-cap."""
    if link(kernel) is None:
        for params in ({}, *(p for name in _FREE for p in kernel.tries(name)[:1])):
            yield from _weights(kernel, params)
        return
    for params in ({}, *kernel.tries("scale")[:1], *kernel.tries("softcap")[:1]):
        yield from _scores(kernel, params)
    yield from _channels(kernel)
    for params in ({}, *kernel.tries("softcap")[:1]):
        yield from _bias(kernel, params)


#: Parameters whose effect on weights is asked one by one where weights do not tell scores.
_FREE = ("scale", "softcap", "power", "divisor")


def _weights(kernel: Kernel, params: Mapping[str, Any]) -> Iterator[Fact]:
    """Weights themselves, of products up to 64, where they do not tell scores."""
    dims = kernel.sizes()
    asked = ramp(kernel, params, dims)
    if asked is None:
        return
    rows = np.flatnonzero(np.abs(_lengths(dims["T"])) * np.abs(_STEPS).max() <= 64.0)
    readings = []
    for answer in asked.sides:
        p = in_order(weights(asked, answer))[:, :, rows]
        products = np.multiply.outer(_lengths(dims["T"])[rows], _steps(dims["S"]))
        power = kernel.plan.power if kernel.plan else 1
        resolution = kernel.resolution_of(answer)
        relative = min((resolution.relative + resolution.score * 64.0) * 4 * power, 0.05)
        error = relative * np.maximum(np.abs(p), 1.0 / dims["S"])
        row = int(np.argmax(products.max(axis=1)))
        shown = {f"{products[row, j]:g}": stated(float(p[0, 0, row, j]), float(error[0, 0, row, j])) for j in (1, 2, 5)}
        readings.append(Reading(", ".join(f"{weight} at {x}" for x, weight in shown.items()), p, error))
    yield fact("weight as a function of q . k", asked.call, *readings)


def link(kernel: Kernel) -> str | None:
    """What turns a weight into a score up to a constant of the row: its logarithm, or its odds' for a sigmoid; None if neither does."""
    return {"softmax": "log", "sigmoid": "odds"}.get(kernel.plan.normalizer) if kernel.plan else None


def ramp(kernel: Kernel, params: Mapping[str, Any] | None = None, dims: dict[str, int] | None = None) -> Asked | None:
    """Queries and keys along channel 0, the queries in another order in every batch and head: see `in_order`."""
    dims = dims or kernel.sizes()
    q, k = np.zeros((dims["B"], dims["Hq"], dims["T"], dims["D"])), np.zeros((dims["B"], dims["Hkv"], dims["S"], dims["D"]))
    q[..., 0] = in_order(np.broadcast_to(_lengths(dims["T"]), q.shape[:3]), -1)
    k[..., 0] = _steps(dims["S"])
    k[1::2] = k[1::2, :, ::-1]
    return kernel.weights(dims, q, k, params=params)


def in_order(x: np.ndarray, way: int = 1) -> np.ndarray:
    """Queries of (B, Hq, T) or pairs of (B, Hq, T, S) put back in the order of lengths and steps; or with -1, into that of the question.

    Queries are turned by as many as batch and head count, keys of every other batch backwards, so that a head that answers for another, or a
    largest score that comes late, contradicts the rest.
    """
    turned = np.empty_like(x)
    for b, h in np.ndindex(x.shape[:2]):
        turned[b, h] = np.roll(x[b, h], -way * (b * x.shape[1] + h), axis=0)
    if x.ndim == 4:
        turned[1::2] = turned[1::2, ..., ::-1]
    return turned


def _lengths(n: int) -> np.ndarray:
    """Query lengths: up, then down again, so that a score that depends on the query's index contradicts itself."""
    return np.resize(np.concatenate([_LENGTHS, _LENGTHS[:0:-1]]), n)


def _steps(n: int) -> np.ndarray:
    return np.concatenate([_STEPS, np.zeros(n)])[:n]


def _scores(kernel: Kernel, params: Mapping[str, Any]) -> Iterator[Fact]:
    """The curve of the usual sizes; where it is wrong, whether it still is when the kernel has seen no call of these sizes before."""
    for f in _curve_of_scores(kernel, params, kernel.sizes()):
        fresh = [] if f.agrees or kernel.coarser else list(_curve_of_scores(kernel, params, kernel.unheard(kernel.sizes())))
        yield replace(f, found=f.found + FIRST_CALL) if fresh and all(g.agrees for g in fresh) else f


def _curve_of_scores(kernel: Kernel, params: Mapping[str, Any], dims: dict[str, int]) -> Iterator[Fact]:
    asked, flat = ramp(kernel, params, dims), kernel.weights(dims, params=params)
    if asked is None or flat is None:
        return
    products = np.multiply.outer(_lengths(dims["T"]), _steps(dims["S"]))
    yield from _shape_of(kernel, SCORE, asked, flat, products)


def _shape_of(kernel: Kernel, subject: str, asked: Asked, flat: Asked, products: np.ndarray) -> Iterator[Fact]:
    curves = []
    for answer, bare in zip(asked.sides, flat.sides, strict=True):
        resolution = kernel.resolution_of(answer)
        one, base = (scores_of(kernel, resolution, in_order(weights(a, side))) for a, side in ((asked, answer), (flat, bare)))
        curves.append(curve(one, base, products, resolution))
    what = subject.removeprefix("score as a function of ")
    if curves[1].odds > 1:  # a score of another kind
        if subject == SCORE:
            yield from _weights(kernel, {})
        return
    if any(len(c.x) < 3 for c in curves):
        if len(curves[1].x) >= 3:
            yield Fact(subject, "cannot be read from its answers", described(curves[1], kernel, what), False, asked.call)
        return
    found, specified = (described(c, kernel, what) for c in curves)
    common = np.intersect1d(curves[0].x, curves[1].x)
    y, error = (np.array([getattr(c, name)[np.searchsorted(c.x, common)] for c in curves]) for name in ("y", "error"))
    near = bool((np.abs(y[0] - y[1]) <= error.sum(0)).all())
    consistent = curves[0].odds <= 1
    if not consistent:
        found += f"; rows contradict each other by {curves[0].odds:.2g} times their rounding"
    yield Fact(subject, found, specified, near and consistent, asked.call, {"x": common, "found": y[0], "specified": y[1]})


def scores_of(kernel: Kernel, resolution: Resolution, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores up to a constant of each row, and how far they may be off."""
    logs, errors = resolution.logs(p)
    if link(kernel) == "log":
        return logs, errors
    room = 1 - p
    usable = np.isfinite(errors) & (room > 4 * resolution.relative)
    return np.where(usable, logs - np.log(np.where(usable, room, 1.0)), 0.0), np.where(usable, errors / np.where(usable, room, 1.0), np.inf)


def curve(one: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray], products: np.ndarray, resolution: Resolution) -> Curve:
    """The curve that rows of scores (B, Hq, T, S) share, less the rows of an equal call whose products are all 0."""
    n_q, n_k = products.shape
    scores, errors = ((a + sign * b).reshape(-1, n_q, n_k) for a, b, sign in zip(one, base, (-1, 1), strict=True))
    known: dict[float, tuple[float, float]] = {0.0: (0.0, 0.0)}
    odds = 0.0
    for i in np.argsort(np.abs(products).max(axis=1), kind="stable"):
        x = products[i]
        held, doubt = np.array([known.get(v, (0.0, np.inf)) for v in x.tolist()]).T
        total = errors[:, i] + doubt
        r = np.argmin(total, axis=1)[:, None]  # the key that every row is told from best
        value = scores[:, i] - np.take_along_axis(scores[:, i], r, 1) + held[r]
        off = errors[:, i] + np.take_along_axis(total, r, 1)
        usable = np.isfinite(off)
        below = (
            np.where(usable, value, -np.inf).max(axis=1, keepdims=True, initial=-1e300) - value
        )  # what is left once the row's largest is subtracted
        rounded = np.abs(value) + np.abs(below)
        off = off + resolution.score * (rounded + np.take_along_axis(rounded, r, 1))
        for v in np.unique(x[usable.any(axis=0)]).tolist():
            here = usable & (x == v) & (np.arange(n_k) != r)
            if not here.any():
                continue
            values, offs = value[here], off[here]
            best = int(np.argmin(offs))
            middle, slack = known.get(v, (values[0], offs[0]))
            odds = max(odds, float((np.abs(values - middle) / (offs + slack)).max()))
            if v not in known or offs[best] < known[v][1]:
                known[v] = float(values[best]), float(offs[best])
    xs = sorted(known)
    values, offs = (np.array([known[v][n] for v in xs]) for n in (0, 1))
    return Curve(np.array(xs), values, offs, odds)


def described(c: Curve, kernel: Kernel, what: str) -> str:
    """The curve as a line, a tanh, or a few of its values."""
    from scipy.optimize import least_squares

    x, y, error = (a[c.x != 0] for a in (c.x, c.y, np.maximum(c.error, 1e-12)))
    top = float(np.abs(y).max())
    rate, off = slope(x, y, error)
    misfit = np.abs(y - rate * x)
    if not np.isnan(off):
        return f"{stated(rate, off)} times {what}, up to {stated(top, 1.0)}" if abs(rate) > off else f"none of {what} at all"
    least = np.argmin(np.abs(x))
    if abs(y[least]) > 0.9 * top:
        return f"the sign of {what} times {stated(float(y[least] * np.sign(x[least])), float(error[least]))}, whatever its size"
    start = [y[np.argmin(np.abs(x))] / x[np.argmin(np.abs(x))], top]
    fitted = least_squares(lambda s: (s[1] * np.tanh(s[0] * x / s[1]) - y) / error, start)
    a, cap = fitted.x
    if (np.abs(fitted.fun) <= 1 + kernel.profile.tanh_error * top / error).all():
        doubt = np.abs(np.linalg.pinv(fitted.jac)).sum(axis=1)
        return f"{stated(a, doubt[0])} times {what}, soft-capped at {stated(abs(cap), doubt[1])}"
    worst = float(misfit.max())
    if worst <= 0.02 * top:
        return f"{rate:.4g} times {what} to within {worst:.2g}"
    even = all(abs(y[x == v][0] - y[x == -v][0]) <= error[x == v][0] + error[x == -v][0] for v in x if -v in x)
    ends = dict.fromkeys(x[np.argmin(np.abs(x - v))] for v in (x.min(), -8.0, 8.0, x.max()))
    values = ", ".join(f"{stated(float(y[x == v][0]), float(error[x == v][0]))} at {v:g}" for v in ends)
    return f"neither a line nor a tanh of {what}{', the same for either sign' if even else ''}: {values}"


def _channels(kernel: Kernel) -> Iterator[Fact]:
    """Query i along channel i, keys along all: which channels count, at widths that fit no tile and differ for keys and values."""
    if "Dq" in kernel.variant.axes:
        return
    for width in (20, 44):  # of keys other than values; of both, where an implementation has one width only
        dims = kernel.sizes(T=width, D=width, E=44)
        if kernel.weights(dims) is not None:
            break
    level = 4.0
    q = np.broadcast_to(level * np.eye(width), (dims["B"], dims["Hq"], width, width))
    k = np.broadcast_to(_steps(dims["S"])[:, None], (dims["B"], dims["Hkv"], dims["S"], width))
    asked, flat = kernel.weights(dims, q, k), kernel.weights(dims)
    if asked is None or flat is None:
        return
    readings = []
    for answer, bare in zip(asked.sides, flat.sides, strict=True):
        resolution = kernel.resolution_of(answer)
        (one, off), (base, more) = (scores_of(kernel, resolution, weights(a, side)) for a, side in ((asked, answer), (flat, bare)))
        slopes, errors = _slopes(one - base, off + more, level * _steps(dims["S"]), resolution)
        if not np.isfinite(errors).all():
            return
        readings.append(Reading(_by_channel(slopes, errors), slopes, errors))
    yield fact(SCORE_BY_CHANNEL, asked.call, *readings)


def _slopes(scores: np.ndarray, errors: np.ndarray, x: np.ndarray, resolution: Resolution) -> tuple[np.ndarray, np.ndarray]:
    """One slope for each row of the first batch and head, from the two products that tell it best."""
    rise = scores[0, 0, :, :, None] - scores[0, 0, :, None, :]
    run = x[:, None] - x
    usable = np.isfinite(errors[0, 0])
    spread = np.ptp(np.where(usable, scores[0, 0], 0.0), axis=1)[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        off = (errors[0, 0, :, :, None] + errors[0, 0, :, None, :] + 4 * resolution.score * spread) / np.where(run > 0, run, np.nan)
        off = np.where(np.isfinite(off), off, np.inf).reshape(len(rise), -1)
        best = np.argmin(off, axis=1)
        rates = (rise / np.where(run > 0, run, np.nan)).reshape(len(rise), -1)
    rows = np.arange(len(rise))
    return rates[rows, best], off[rows, best]


def _by_channel(slopes: np.ndarray, errors: np.ndarray) -> str:
    middle = float(np.median(slopes))
    near = np.abs(slopes - middle) <= errors
    if near.all():
        return f"{stated(middle, float(errors.min()))} in every channel"
    far = ~near
    if far.sum() <= len(slopes) / 2:
        others = f"{listed(slopes[far], errors[far])} in channels {spans(np.flatnonzero(far))} of {len(slopes)}"
        return f"{stated(middle, float(errors.min()))}, but {others}"
    return "channel by channel " + listed(slopes, errors)


def _bias(kernel: Kernel, params: Mapping[str, Any]) -> Iterator[Fact]:
    name, dims = kernel.optional("bias"), kernel.sizes()
    if not name:
        return
    products = np.multiply.outer(_lengths(dims["T"]) / 8, _steps(dims["S"]))
    bias = in_order(np.broadcast_to(products, (dims["B"], dims["Hq"], dims["T"], dims["S"])), -1)
    asked = kernel.weights(dims, params=params, operands={name: bias})
    flat = kernel.weights(dims, params=params)
    if asked is not None and flat is not None:
        yield from _shape_of(kernel, "score as a function of the bias", asked, flat, products)
