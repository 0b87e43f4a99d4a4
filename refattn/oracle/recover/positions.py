"""Where scores depend on positions though no operand says so: biases that grow with distance, rotations inside; and who influences whom.

A rotation turns channels in pairs by an angle that grows with the position, so a query along channel c meets a key along channel c with
the cosine, and a key along c's partner with the sine, of angle times distance: pairs, angles and alignment follow from one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ... import definition, precision
from ...problem import bind
from ...spec import Choice, Window, shape
from ..findings import Fact
from ..judge import checked
from .asking import EXACT, Answer, Asked, Kernel, Reading, Resolution, fact, listed, read, slope, stated
from .curves import link
from .visible import pattern, weights


def facts(kernel: Kernel) -> Iterator[Fact]:
    """Weights at equal scores; whether equal queries and keys score alike everywhere; and the rotation if they do not."""
    flat = kernel.weights(kernel.sizes())
    yield from read("weights at equal scores", kernel, flat, _by_distance)
    if flat is None or link(kernel) != "log":  # elsewhere a row's weights depend on the level of its scores
        return
    dims = kernel.sizes()
    products = np.resize(_levels(kernel, dims["D"]), dims["T"])
    q = np.broadcast_to((products / dims["D"] / _KEY)[:, None], (dims["B"], dims["Hq"], dims["T"], dims["D"]))
    k = np.full((dims["B"], dims["Hkv"], dims["S"], dims["D"]), _KEY)
    level = kernel.weights(dims, q, k)
    if level is None:
        return
    pairs = zip(level.sides, flat.sides, strict=True)
    found, specified = (_even(kernel, kernel.resolution_of(one), weights(level, one), weights(flat, plain), products) for one, plain in pairs)
    yield fact("weights of equal keys", level.call, found, specified)
    if (found.value == _UNEVEN).any() and not (specified.value == _UNEVEN).any():
        yield from _rotation(kernel)


ROTATION = "rotation of queries and keys"
_KEY = 8.0
_NO_TURN = "none"
_UNEVEN, _GONE, _LOST = 1, 2, 3


def _levels(kernel: Kernel, d: int) -> np.ndarray:
    """Products of either sign from small ones to what overflows an exponential, and passes for minus infinity in some kernels."""
    stored = precision.format_of(kernel.dtype).largest
    sizes = 2.0 ** np.array([-7, -5, -3, -1, 1, 3, 5, 6, 7, 8, 9, 10])
    products = np.minimum(sizes, stored / 2) * d * _KEY
    products = products[products <= max(stored, 65504.0) / 3]  # some store them in half precision before the scale
    return np.asarray(np.stack([products, -products], 1).ravel())


def _even(kernel: Kernel, resolution: Resolution, p: np.ndarray, plain: np.ndarray, products: np.ndarray) -> Reading:
    """What becomes of each row of equal keys, whose weights should be those of scores of 0."""
    (one, error), (base, more) = (resolution.logs(x) for x in (p, plain))
    off = error + more + resolution.score * np.abs(products * (kernel.plan.scale if kernel.plan else 1.0))[:, None]
    uneven = (np.isfinite(off) & (np.abs(one - base) > off)).any(-1)
    gone = (np.isinf(error) & np.isfinite(more) & np.isfinite(p)).any(-1)
    state = np.where(~np.isfinite(p).all(-1), _LOST, np.where((p == 0).all(-1), _GONE, np.where(uneven | gone, _UNEVEN, 0))).max((0, 1))
    words = []
    for kind, name in ((_UNEVEN, "other than at scores of 0"), (_GONE, "all 0"), (_LOST, "NaN")):
        at = products[state == kind]
        parts = [f"{at[at < 0].max():g} and below"] if (at < 0).any() else []
        parts += [f"{at[at > 0].min():g} and above"] if (at > 0).any() else []
        words += [f"{name} where q . k is {' or '.join(parts)}"] if parts else []
    return Reading("; ".join(words) or "those of scores of 0, however large q . k", state)


def _by_distance(kernel: Kernel, asked: Asked, answer: Answer) -> Reading | None:
    """Slopes per head of a law in the distance or the key's index; 0 where all visible keys of a row weigh the same."""
    logs, errors = kernel.resolution_of(answer).logs(weights(asked, answer))
    n_q, n_k = logs.shape[2:]
    ahead = np.arange(n_k) - np.arange(n_q)[:, None]
    laws = {
        "per token between key and query i+S-T" if n_q != n_k else "per token between them": -np.abs(ahead - (n_k - n_q)),
        "per token between key and query i": -np.abs(ahead),
        "per key from the last one back": ahead - n_k,
    }
    rows = np.isfinite(errors).sum(-1) > 1
    if not rows.any():
        return None
    heads = logs.shape[1]
    fitted: list[tuple[str, np.ndarray, np.ndarray]] = []
    for words, distance in laws.items():
        slopes, off = np.array([_slope(logs[:, h], errors[:, h], distance) for h in range(heads)]).T
        if not np.isnan(off).any():
            fitted.append((words, slopes, off))
    if not fitted:
        return Reading("uneven, by no law of the distance", np.array(np.nan))
    words, slopes, off = fitted[0]
    if (np.abs(slopes) <= off).all():
        return Reading("all alike", np.zeros(heads))
    fall = "fall" if slopes.sum() > 0 else "rise"
    return Reading(f"their logarithms {fall} by {listed(np.abs(slopes), off)} {words} (heads 0..{heads - 1})", slopes, off)


def _slope(logs: np.ndarray, errors: np.ndarray, distance: np.ndarray) -> tuple[float, float]:
    """The slope of logs (B, T, S) along `distance` (T, S) within rows, and how far it may be off; NaN where it does not explain them."""
    best = np.argmin(errors, axis=-1)[..., None]
    base, base_error = np.take_along_axis(logs, best, -1), np.take_along_axis(errors, best, -1)
    run = distance - np.take_along_axis(np.broadcast_to(distance, logs.shape), best, -1)
    return slope(run.ravel(), (logs - base).ravel(), (errors + base_error).ravel())


def _rotation(kernel: Kernel) -> Iterator[Fact]:
    """Batch c asks with channel c; key j answers in channel j mod D."""
    width = 16
    dims = kernel.sizes(B=width, D=width)
    level = 4.0
    q = np.broadcast_to(level * np.eye(width)[:, None, None], (width, dims["Hq"], dims["T"], width))
    channel = np.arange(dims["S"]) % width
    k = np.broadcast_to(level * np.eye(width)[channel], (width, dims["Hkv"], dims["S"], width))
    asked, flat = kernel.weights(dims, q, k), kernel.weights(dims)
    if asked is None or flat is None:
        return
    readings = []
    for answer, bare in zip(asked.sides, flat.sides, strict=True):
        (one, error), (base, more) = (kernel.resolution_of(side).logs(weights(a, side)[:, :1]) for a, side in ((asked, answer), (flat, bare)))
        off = error + more
        scores = np.where(np.isfinite(off), one - base, np.nan)[:, 0]
        if np.isnan(scores).all(-1).any():
            return
        scores = scores - np.nanmedian(scores, axis=-1, keepdims=True)  # most keys answer in channels that no pair joins with the query's
        readings.append(_pairs(scores, channel, float(np.min(off)), dims))
    if readings[1].words == _NO_TURN:
        yield fact(ROTATION, asked.call, *readings)


def _pairs(scores: np.ndarray, channel: np.ndarray, off: float, dims: dict[str, int]) -> Reading:
    """Which channels are turned together, by what angle per position, and where query i stands; scores (channel, T, S)."""
    width, gap = len(scores), dims["S"] - dims["T"]
    strength = np.array([[np.nanmax(np.abs(scores[c][:, channel == other]), initial=0.0) for other in range(width)] for c in range(width)])
    np.fill_diagonal(strength, 0.0)
    turned = strength.max(1) > 8 * off
    partner = np.where(turned, strength.argmax(1), np.arange(width))
    angles: dict[int, float] = {}
    if not turned.any():
        return Reading(_NO_TURN, partner)
    ahead = np.arange(dims["T"])[:, None] - np.arange(dims["S"])
    misfit = np.zeros(2)
    for c in np.flatnonzero(turned & (partner > np.arange(width))):
        own, other = channel == c, channel == partner[c]
        fits = [_angle(scores[c], ahead + offset, own, other) for offset in (0, gap)]
        misfit += [fit[1] for fit in fits]
        angles[int(c)] = fits[0][0] if fits[0][1] < fits[1][1] else fits[1][0]
    first = sorted(angles)
    apart = {int(partner[c]) - c for c in first}
    if apart == {1}:
        words, order = "channels (2m, 2m+1)", {c: c // 2 for c in first}
    elif apart == {width // 2}:
        words, order = "channels (m, m+D/2)", {c: c for c in first}
    else:
        return Reading("channels " + ", ".join(f"({c}, {partner[c]})" for c in first), partner)
    words += f" by {', '.join(stated(angles[c], 1e-3) for c in first[:3])}, ... per position" if len(first) > 3 else ""
    slow = [c for c in first if order[c] > 0 and angles[c] > 0.02]
    if slow:
        bases = [math.exp(-math.log(angles[c]) * width / 2 / order[c]) for c in slow]
        words += f": theta {np.median(bases):.3g}"
    where = ("query i at position i", "query i at position i+S-T")[int(misfit[1] < misfit[0])] if gap else ""
    return Reading(f"{words}, {where}", np.array([*partner, *(angles.get(c, 0.0) for c in range(width))]), 1e-3)


def _angle(scores: np.ndarray, ahead: np.ndarray, own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The angle per position of one pair, from the cosine with its own channel and the sine with its partner; and the squared misfit."""
    cosines, sines = scores[:, own], scores[:, other]
    d_own, d_other = ahead[:, own], ahead[:, other]

    def misfit(angle: Any) -> Any:
        angle = np.asarray(angle)[..., None, None]
        c, s = np.cos(angle * d_own), np.sin(angle * d_other)
        size = np.nansum(cosines * c, axis=(-2, -1)) / np.nansum(np.where(np.isnan(cosines), 0, c * c), axis=(-2, -1))
        turn = np.sign(np.nansum(sines * s, axis=(-2, -1)))
        rest = np.nansum((cosines - size[..., None, None] * c) ** 2, axis=(-2, -1))
        return rest + np.nansum((sines - (turn * size)[..., None, None] * s) ** 2, axis=(-2, -1))

    grid = np.concatenate([np.geomspace(1e-4, 0.05, 120), np.arange(0.05, math.pi, 0.004)])
    for _ in range(6):
        values = misfit(grid)
        at = int(np.argmin(values))
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
        grid = np.linspace(low, high, 21)
    return float(grid[int(np.argmin(misfit(grid)))]), float(values.min())


def influence(kernel: Kernel) -> Iterator[Fact]:
    """For a variant whose values are no operand of their own: which tokens an output depends on.  Every batch has another token changed."""
    names = [p.name for p in kernel.variant.params if isinstance(p.kind, Choice | Window)]
    for params in ({}, *kernel.tries(*names)):
        both = _moved(kernel, params)
        if both is not None:
            readings = (_influenced(x, resolution.relative) for x, resolution in zip(both, (kernel.resolution, EXACT), strict=True))
            value = kernel.plan.value if kernel.plan else "v"
            yield fact(f"tokens of {value} that an output depends on", ", ".join(f"{n}={v!r}" for n, v in params.items()), *readings)


def _moved(kernel: Kernel, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Outputs (B, T, M) of a batch of copies: the first of each has the first token changed, and so on, the last none."""
    variant, n_k = kernel.variant, 13
    dims = {**kernel.sizes(B=1, T=9, S=n_k, D=8, E=8), "M": 8}
    rng = np.random.default_rng(7)
    operands: dict[str, np.ndarray] = {}
    for o in (o for o in variant.operands if not o.optional):
        x = o.draw(rng, shape(o.axes, dims))
        operands[o.name] = np.repeat(x, n_k + 1, axis=0) if o.axes.split()[0] == "B" else x
    tokens = np.arange(n_k)
    operands[kernel.plan.value if kernel.plan else "v"][tokens, ..., tokens, :] *= -2.0
    rounded = {name: precision.round_to(x, kernel.dtype) for name, x in operands.items()}
    try:
        problem = bind(variant, (), {**rounded, **kernel.settled, **params})
        said = {n: v for n, v in problem.params.items() if n in kernel.candidate.params}
        with np.errstate(all="ignore"):
            answer = kernel.candidate.call({n: x.copy() for n, x in rounded.items()}, said)
        answer = answer[kernel.candidate.returns.index("out")] if isinstance(answer, tuple | list) else answer
        found = checked(problem, "out", answer, next(o.axes for o in variant.outputs if o.name == "out")).astype(np.float64)
    except Exception:  # somebody else's code may raise anything, and answer in any shape: then this question has no answer
        return None
    return found, definition.run(problem)["out"]


def _influenced(out: np.ndarray, relative: float) -> Reading:
    """Which outputs move when a token does: (T, S)."""
    moved = np.abs(out[:-1] - out[-1:]) > 4 * relative * np.abs(out[-1:]).max()
    rows = moved.reshape(moved.shape[0], -1, *moved.shape[-2:]).any(axis=(1, 3)).T
    return Reading(pattern(rows).replace("sees", "depends on"), rows)
