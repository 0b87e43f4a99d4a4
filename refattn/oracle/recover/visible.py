"""Which keys each query sees, with every score alike: masks, windows, alignment, dropped tiles; and what a query that sees none returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ...spec import Choice, Window
from ..findings import Fact
from .asking import FIRST_CALL, Answer, Asked, Kernel, Reading, fact, spans, stated

#: Fewer queries than keys, and more: alignments differ in both, and only the second leaves rows without a key.
SHORT, LONG = {"T": 24, "S": 40}, {"T": 41, "S": 23}


def facts(kernel: Kernel) -> Iterator[Fact]:
    """Visible keys of the plain call, under each mask-like parameter, and under a mask; then rows that see nothing."""
    empties: dict[str, Fact] = {}
    for params, sizes in _calls(kernel):
        asked = kernel.weights(kernel.sizes(**sizes), params=params)
        if asked is not None:
            f = _visible(kernel, asked)
            if params and not f.agrees and not kernel.coarser:
                fresh = kernel.weights(kernel.unheard(kernel.sizes(**sizes)), params=params)
                if fresh is not None and _visible(kernel, fresh).agrees:
                    f = replace(f, found=f.found + FIRST_CALL)
            yield f
            empties |= {f.call: f for f in _empty_rows(asked)}
    if kernel.optional("mask"):
        for f in _mask(kernel):
            if f.subject == "visible keys":
                yield f
            else:
                empties = {f.call: f}
    yield from list(empties.values())[:1]


def _calls(kernel: Kernel) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """Every setting with fewer queries than keys; the first of each parameter with more, too."""
    names = [p.name for p in kernel.variant.params if isinstance(p.kind, Choice | Window)]
    yield {}, SHORT
    if not kernel.one_sequence:
        yield {}, LONG
    for name in names:
        for n, params in enumerate(kernel.tries(name)):
            yield params, SHORT
            if n == 0 and not kernel.one_sequence:
                yield params, LONG
    for capped in kernel.tries("softcap")[:1]:  # a mask before the cap leaves hidden keys with a weight
        for params in kernel.tries("causal")[:1]:
            yield {**capped, **params}, SHORT


def weights(asked: Asked, answer: Answer) -> np.ndarray:
    """(B, Hq, T, S)."""
    return answer.out[..., : asked.problem.dims.get("S", asked.problem.dims["T"])]


def empty(asked: Asked) -> np.ndarray:
    """Which rows see nothing by the definition, (B, Hq, T)."""
    p = weights(asked, asked.specified)
    plan, mask = asked.problem.plan, asked.problem.operands.get("mask")
    if plan is not None and plan.fill > -np.inf:  # hidden scores are numbers there
        return np.zeros(p.shape[:3], bool) if mask is None else np.broadcast_to(~(mask.reshape(p.shape) != 0).any(-1), p.shape[:3])
    scores = asked.truth.get("scores")
    hidden = p == 0 if scores is None else np.isneginf(scores.reshape(p.shape))
    return np.asarray(hidden.all(-1))


def seen(asked: Asked, answer: Answer) -> np.ndarray:
    """Which weights are more than nothing, (B, Hq, T, S); a row that is empty by the definition counts as such whatever fills it evenly."""
    p = weights(asked, answer)
    some = np.isfinite(p) & (p != 0)
    with np.errstate(invalid="ignore"):
        even = np.ptp(np.where(np.isfinite(p), p, 0.0), axis=-1) <= 0.25 * np.abs(p).max(-1, initial=0.0)
    filled = empty(asked) & even & some.all(-1)
    return some & ~filled[..., None]


def _visible(kernel: Kernel, asked: Asked) -> Fact:
    """The weights of a row that fade below what their format can hold say nothing about the keys beyond."""
    right = seen(asked, asked.specified)
    p, pairs = weights(asked, asked.found), seen(asked, asked.found)
    limit = 16 * (kernel.resolution.absolute + kernel.resolution.smallest * np.nanmax(np.where(np.isfinite(p), p, 0.0), -1, keepdims=True))
    faded = (pairs & (p < limit)).any(-1, keepdims=True) & ~pairs & right
    found = _reading(pairs | faded, p, right)
    if faded.any():
        found = replace(found, words=f"{found.words}, as far as weights can be told from 0")
    return _pictured(fact("visible keys", asked.call, found, _reading(right, weights(asked, asked.specified), right)))


def _pictured(f: Fact) -> Fact:
    """With pictures of the batch that differs most, (Hq, T, S)."""
    found, specified = f.values["found"], f.values["specified"]
    worst = int((found != specified).sum(axis=(1, 2, 3)).argmax())
    return replace(f, values={"found": found[worst], "specified": specified[worst]})


def _reading(pairs: np.ndarray, p: np.ndarray, right: np.ndarray) -> Reading:
    flat, lost = pairs.reshape(-1, *pairs.shape[2:]), np.isnan(p).any(-1)
    if (flat == flat[0]).all():
        words = pattern(flat[0], lost[0, 0])
    elif (pairs == pairs[:1]).all():
        words = "; ".join(f"head {h}: {pattern(one)}" for h, one in enumerate(pairs[0][:4]))
    else:
        words = "; ".join(f"batch {b}: {pattern(one)}" for b, one in enumerate(pairs[:4, 0]))
    if lost.all():
        words = "NaN in every row"
    elif lost.any():
        words += f"; NaN for queries {spans(np.flatnonzero(lost.any((0, 1))))}"
    words += _faint(p, right & pairs, ~right & right.any(-1, keepdims=True) & pairs)
    return Reading(words, pairs)


def _faint(p: np.ndarray, visible: np.ndarray, hidden: np.ndarray) -> str:
    """What share of a visible key's weight one has that should be hidden, where it is not the same."""
    rows = visible.any(-1) & hidden.any(-1)
    if not rows.any():
        return ""
    one, two = (np.where(pairs, p, 0.0)[rows].sum(-1) / pairs[rows].sum(-1) for pairs in (hidden, visible))
    ratio = float((one / two).mean())
    return "" if abs(ratio - 1) < 0.1 else f"; a key that should be hidden has {ratio:.2g} times the weight of one that should not"


def pattern(pairs: np.ndarray, unknown: np.ndarray | None = None) -> str:
    """Visible pairs (T, S) in words: the first and the last key of each row as functions of the query's index i, but for `unknown` ones."""
    n_q, n_k = pairs.shape
    if pairs.all():
        return "every key"
    rows = np.flatnonzero(pairs.any(axis=1))
    if not len(rows):
        return "no key"
    first = pairs[rows].argmax(axis=1)
    last = n_k - 1 - pairs[rows][:, ::-1].argmax(axis=1)
    if not (pairs[rows].sum(axis=1) == last - first + 1).all():
        return f"{pairs.sum()} of {pairs.size} pairs, with gaps"
    low, high = (_edge(x, rows, end, n_k - n_q) for x, end in ((first, 0), (last, n_k - 1)))
    if low is None or high is None:
        return f"keys {first[0]}..{last[0]} for query {rows[0]} to {first[-1]}..{last[-1]} for query {rows[-1]}, not evenly"
    words = f"query i sees keys {low}..{high}" if low != high else f"query i sees key {low} only"
    words = "every key" if (low, high) == ("0", "S-1") else words
    whole = set(range(rows[0], rows[-1] + 1)) == set(rows.tolist())
    if whole and n_k != n_q and "i" in (low + high):
        words += " (aligned with the last key)" if "S-T" in low + high else " (aligned with the first key)"
    none = np.flatnonzero(~pairs.any(axis=1) if unknown is None else ~pairs.any(axis=1) & ~unknown)
    if len(none):
        words += f"; queries {spans(none)} see none"
    return words


def _edge(ends: np.ndarray, rows: np.ndarray, limit: int, gap: int) -> str | None:
    """The first or last visible keys of rows as a formula in i, cut off at the sequence's end or before; None where there is none."""
    extreme, at_end = (int(ends.min()), "0") if limit == 0 else (int(ends.max()), "S-1")
    cut = np.maximum if limit == 0 else np.minimum
    moving = ends != extreme
    if not moving.any():
        return at_end if extreme == limit else str(extreme)
    shift = int(ends[moving][0] - rows[moving][0])
    if not (cut(rows + shift, extreme) == ends).all():
        return None
    formula = f"i+S-T{_signed(shift - gap)}" if gap and abs(shift - gap) <= abs(shift) else f"i{_signed(shift)}"
    beyond = rows[0] + shift < extreme if limit == 0 else rows[-1] + shift > extreme
    return f"{'max' if limit == 0 else 'min'}({formula}, {extreme})" if beyond and extreme != limit else formula


def _signed(n: int) -> str:
    return f"{n:+d}" if n else ""


def _mask(kernel: Kernel) -> Iterator[Fact]:
    """Visible keys under a mask that differs in every batch and head, and whose row 1 is empty."""
    name, dims = kernel.optional("mask"), kernel.sizes(**SHORT)
    full = (dims["B"], dims["Hq"], dims["T"], dims["S"])
    mask = np.random.default_rng(5).random(full) < 0.6
    mask[..., 0] = True
    mask[..., 1, :] = False
    kind = kernel.variant.operand(name).kind
    asked = kernel.weights(dims, operands={name: mask if kind == "boolean" else mask.astype(np.float64)})
    plain = kernel.weights(dims)
    if asked is None or plain is None:
        return
    rest = np.arange(dims["T"]) != 1
    readings = []
    for answer, bare in zip(asked.sides, plain.sides, strict=True):
        p, pairs, alone = weights(asked, answer), seen(asked, answer), seen(plain, bare)
        words = _by_mask(*(x[:, :, rest] for x in (pairs, mask, alone, p)))
        readings.append(Reading(words, pairs & rest[:, None]))
    found = _pictured(fact("visible keys", asked.call, *readings))
    yield found
    if found.agrees:
        yield from _empty_rows(asked)


def _by_mask(pairs: np.ndarray, mask: np.ndarray, alone: np.ndarray, p: np.ndarray) -> str:
    if np.isnan(p).any(-1).all():
        return "NaN in every row"
    known = {
        "the keys the mask allows": mask,
        "every key, whatever the mask says": np.ones_like(mask),
        "the complement of the mask": ~mask,
        "the keys the mask of batch 0 allows": np.broadcast_to(mask[:1], mask.shape),
        "the keys the mask of head 0 allows": np.broadcast_to(mask[:, :1], mask.shape),
    }
    for words, allowed in known.items():
        if (pairs == (allowed & alone)).all():
            return words + _faint(p, mask & pairs, ~mask & pairs) + ("" if alone.all() else ", of those seen without it")
    return f"keys that agree with the mask in {(pairs == (mask & alone)).mean():.0%} of the pairs"


def _empty_rows(asked: Asked) -> list[Fact]:
    rows = empty(asked)
    if not rows.any():
        return []
    readings = []
    for answer in asked.sides:
        p = weights(asked, answer)[rows]
        n_k = p.shape[-1]
        if np.isnan(p).all():
            reading = Reading("NaN", np.array(np.nan))
        elif (p == 0).all():
            reading = Reading("0", np.array(0.0))
        elif np.isfinite(p).all() and np.abs(p * n_k - 1).max() < 0.2:
            reading = Reading("the mean of all values, hidden ones included", np.array(1.0))
        else:
            total = float(np.nanmean(p.sum(-1)))
            reading = Reading(f"weights of {stated(total)} in all", np.array(total))
        readings.append(reading)
    return [fact("a query that sees no key returns", asked.call, *readings)]
