"""What the weights of a row sum to, and along which axis they sum to one: normalisation, padding, sinks, log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ...spec import Choice
from ..findings import Fact
from .asking import Answer, Asked, Kernel, Reading, Resolution, fact, listed, read, stated
from .curves import in_order, ramp
from .visible import LONG, SHORT, empty, seen, weights


def facts(kernel: Kernel) -> Iterator[Fact]:
    """Row sums of the plain call at two lengths and of a masked one; the axis of normalisation; sinks; lse."""
    alone = [kernel.weights(kernel.sizes(**sizes)) for sizes in ((SHORT,) if kernel.one_sequence else (SHORT, LONG))]
    choices = [p.name for p in kernel.variant.params if isinstance(p.kind, Choice)]
    masked = [kernel.weights(kernel.sizes(**SHORT), params=params) for name in choices for params in kernel.tries(name)[:1]]
    tile = _tile(alone)
    for asked in (*alone, *masked):
        for f in read("sum of a row's weights", kernel, asked, _mass):
            yield f if not tile or f.agrees else replace(f, found=f"{f.found} (a tile of {tile})")
    yield from _axis(kernel)
    yield from _sinks(kernel)
    yield from _lse(kernel)


def _tile(plain: list[Asked | None]) -> int:
    """The largest tile whose padding, with scores of 0 in the denominator, gives the row sums of calls that hide nothing; 0 if none does."""
    tiles: set[int] | None = None
    for asked in plain:
        if asked is None:
            return 0
        n_k = asked.problem.dims.get("S", asked.problem.dims["T"])
        sums = weights(asked, asked.found).sum(-1)
        if not np.isfinite(sums).all() or (sums <= 0).any():
            return 0
        lanes = round(float(np.median(n_k / sums)))
        fitting = {t for t in range(2, lanes + 1) if lanes > n_k and -(-n_k // t) * t == lanes}
        tiles = fitting if tiles is None else tiles & fitting
    return max(tiles) if tiles else 0


def _mass(kernel: Kernel, asked: Asked, answer: Answer) -> Reading | None:
    """Row sums as a law in the number n of visible keys where there is one."""
    p, rows = weights(asked, answer), ~empty(asked)
    sums, n = p.sum(-1)[rows], seen(asked, answer).sum(-1)[rows]
    if not rows.any():
        return None
    if not np.isfinite(sums).all():
        lost = ~np.isfinite(sums)
        return Reading("NaN" if lost.all() else f"NaN in {lost.sum()} of {lost.size} rows", sums, 0.0)
    error = _summed(kernel.resolution_of(answer), p)[1][rows]
    for words, law in _laws(sums, n, p.shape, error):
        if (np.abs(law - sums) <= error).all():
            return Reading(words, sums, error)
    least, most = (stated(float(x), float(error.max())) for x in (sums.min(), sums.max()))
    return Reading(f"from {least} to {most}", sums, error)


def _laws(sums: np.ndarray, n: np.ndarray, shape: tuple[int, ...], error: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Likely laws of row sums, simplest first."""
    n_q, n_k = shape[2:]
    n = np.maximum(n, 1)
    yield "1", np.ones_like(sums)
    yield "0", np.zeros_like(sums)
    yield f"S / T = {n_k}/{n_q}", np.full_like(sums, n_k / n_q)
    if n.min() != n.max():
        yield f"n / {n_k}, where n keys are seen", n / n_k
    yield "n, the number of keys seen", n.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        more = np.median(n / sums - n)
    if np.isfinite(more) and 0.02 < more < 256:
        whole = round(float(more))
        near = (np.abs(n / (n + whole) - sums) <= error).all()
        if near and whole:
            yield f"n / (n + {whole}), as if {whole} more key{'s' * (whole > 1)} of score 0 were there (n seen)", n / (n + whole)
        yield f"n / (n + {more:.3g}), where n keys are seen", n / (n + more)
    if sums.min() == sums.max() or np.ptp(sums) <= 2 * error.max():
        yield stated(float(np.median(sums)), float(error.max())), np.full_like(sums, np.median(sums))


def _axis(kernel: Kernel) -> Iterator[Fact]:
    """With scores that differ: along which axis weights sum to one."""
    asked = ramp(kernel)
    yield from read("weights sum to one over", kernel, asked, _normalised)


def _normalised(kernel: Kernel, asked: Asked, answer: Answer) -> Reading | None:
    p = weights(asked, answer)
    if not np.isfinite(p).all():
        return None
    resolution = kernel.resolution  # for both: what misses 1 by less than the implementation can tell is no difference
    names = ("batches", "heads", "queries", "keys")
    along = []
    for axis in (3, 2, 1, 0):
        sums = p.sum(axis)
        error = resolution.relative + p.shape[axis] * (resolution.absolute + resolution.smallest * p.max())
        if (np.abs(sums - 1) <= error * np.maximum(1.0, sums)).all():
            along.append(names[axis])
    return Reading(" and ".join(along) or "nothing", np.array([name in along for name in names]))


def _sinks(kernel: Kernel) -> Iterator[Fact]:
    name, dims = kernel.optional("sinks"), kernel.sizes()
    if not name:
        return
    sinks = np.array([1.0, 3.0, 2.0, 4.0])[: dims["Hq"]]
    asked, bare = kernel.weights(dims, operands={name: sinks}), kernel.weights(dims)
    if asked is not None and bare is not None:
        pairs = zip(asked.sides, bare.sides, strict=True)
        yield fact("a sink adds to the denominator", asked.call, *(_denominator(kernel, asked, one, bare, plain, sinks) for one, plain in pairs))


def _summed(resolution: Resolution, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row sums, and how far they may be off."""
    sums = p.sum(-1)
    top = np.nanmax(np.where(np.isfinite(p), np.abs(p), 0.0), axis=-1, initial=0.0)
    small = resolution.absolute + resolution.smallest * top
    return sums, resolution.relative * np.abs(sums) + small * p.shape[-1]


def _denominator(kernel: Kernel, asked: Asked, answer: Answer, bare: Asked, plain: Answer, sinks: np.ndarray) -> Reading:
    """n / m less n / m' for row sums m with sinks and m' without, over n keys of score 0: as a function of the sink."""
    n = seen(asked, answer).sum(-1)
    resolution = kernel.resolution_of(answer)
    (sums, error), (alone, more_error) = (_summed(resolution, weights(a, side)) for a, side in ((asked, answer), (bare, plain)))
    with np.errstate(divide="ignore", invalid="ignore"):
        more = np.median((n / sums - n / alone).transpose(1, 0, 2).reshape(len(sinks), -1), axis=1)
        off = np.max((n * (error / sums**2 + more_error / alone**2)).transpose(1, 0, 2).reshape(len(sinks), -1), axis=1)
    if not np.isfinite(more).all():
        return Reading("NaN", more, 0.0)
    laws = {
        "exp(sink)": np.exp(sinks),
        "nothing": np.zeros_like(sinks),
        "the sink itself, not its exponential": sinks,
    }
    for words, law in laws.items():
        if (np.abs(more - law) <= off).all():
            return Reading(words, more, off)
    nearest = np.abs(more[:, None] - np.exp(sinks)).argmin(1)
    if (np.abs(more - np.exp(sinks)[nearest]) <= off).all():
        return Reading(f"exp(sink) of heads {' '.join(map(str, nearest))}", more, off)
    rate = np.median(np.log(np.maximum(more, 1e-9)) / sinks)
    if (np.abs(more - np.exp(rate * sinks)) <= off).all():
        return Reading(f"exp({rate:.3g} sink)", more, off)
    return Reading(f"{listed(more, off)} for sinks {listed(sinks)}", more, off)


def _lse(kernel: Kernel) -> Iterator[Fact]:
    """lse beside -log of the weight of a key of score 0, which it must equal; and beside the row's largest score."""
    asked = ramp(kernel)
    yield from read("lse", kernel, asked, _law_of_lse)
    for params in kernel.tries("causal")[:1]:
        yield from read("lse of a query that sees no key", kernel, kernel.weights(kernel.sizes(**LONG), params=params), _lse_of_empty)


def _lse_of_empty(kernel: Kernel, asked: Asked, answer: Answer) -> Reading | None:
    rows = empty(asked) & ~seen(asked, asked.found).any(-1)
    if answer.lse is None or not rows.any():
        return None
    values = answer.lse[rows]
    words = stated(float(values[0])) if (values == values[0]).all() or np.isnan(values).all() else f"from {values.min():.4g} to {values.max():.4g}"
    return Reading(words, values)


def _law_of_lse(kernel: Kernel, asked: Asked, answer: Answer) -> Reading | None:
    if answer.lse is None:
        return None
    p, lse = in_order(weights(asked, answer)), in_order(answer.lse)
    resolution = kernel.resolution_of(answer)
    logs, errors = resolution.logs(p)
    natural, off = -logs[..., 0], errors[..., 0]  # the first key's score is 0
    usable = np.isfinite(off) & np.isfinite(lse)
    if not usable.any():
        return Reading("NaN or infinite", np.array(np.nan)) if not np.isfinite(lse).any() else None
    natural, off, lse = natural[usable], off[usable], lse[usable]
    largest, whole = natural + logs.max(-1)[usable], np.log(p[usable].sum(-1))
    size = 16 * resolution.accumulate * (np.abs(lse) + np.abs(natural)) + resolution.score * np.abs(lse)
    for words, factor in {"natural": 1.0, "base 2": 1 / np.log(2)}.items():
        for less, name in ((0.0, ""), (1.0, " of the row less its largest score")):
            for shift, what in ((0.0, ""), (whole, ", of weights brought to the sum of 1")):
                if (np.abs(lse - factor * (natural + shift - less * largest)) <= factor * (off + size)).all():
                    return Reading(f"{words}{name}{what}", np.array([factor, -less, float(np.any(shift))]), 0.0)
    solution, *_ = np.linalg.lstsq(np.stack([natural, largest], 1), lse, rcond=None)
    return Reading(f"{solution[0]:.3g} times the natural one {solution[1]:+.3g} times the row's largest score", solution, 0.0)
