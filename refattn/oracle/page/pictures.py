"""Arrays as pictures: error / tolerance over two axes, and who sees whom, in one byte a cell.

The page draws them (`page.js`); what a byte means is said here and read there.  A picture larger than `SIDE` cells a side is pooled: a cell
shows the worst of the elements that fall into it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import words
from ..findings import Fact
from ..judge import Case, axes_of

SIDE = 256

#: Bytes of an error map: 0 is no error at all, `TOLERANCE` exactly the tolerance, five steps to a factor of two, `INFINITE` not finite.
TOLERANCE, STEPS, INFINITE = 64, 5, 255

#: Bytes of a mask: seen by neither, by both, only as specified, only as found.
NEITHER, BOTH, MISSING, EXTRA = range(4)


def errors(ratios: np.ndarray) -> np.ndarray:
    """Error / tolerance as bytes.  Rounding never moves one across the tolerance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.round(STEPS * np.log2(ratios)) + TOLERANCE
    level = np.where(ratios > 1, np.clip(level, TOLERANCE + 1, INFINITE - 1), np.clip(level, 1, TOLERANCE))
    level = np.where(ratios == 0, 0, np.where(np.isfinite(ratios), level, INFINITE))
    return level.astype(np.uint8)


def mask(found: np.ndarray, specified: np.ndarray) -> np.ndarray:
    """Two masks as one array of bytes."""
    return np.where(found, np.where(specified, BOTH, EXTRA), np.where(specified, MISSING, NEITHER)).astype(np.uint8)


def pooled(cells: np.ndarray, side: int = SIDE) -> np.ndarray:
    """At most `side` cells along each of two axes, each the largest of those it stands for."""
    for axis in (0, 1):
        n = cells.shape[axis]
        if n > side:
            cells = np.maximum.reduceat(cells, _edges(n, side), axis=axis)
    return cells


def _edges(n: int, side: int) -> np.ndarray:
    """Where the cells of a pooled axis begin; the page computes the same."""
    return np.arange(side) * n // side


def _picture(
    kind: str, title: str, axes: tuple[str, str], layers: Sequence[tuple[str, np.ndarray]], first: int = 0, side: int = SIDE, **more: Any
) -> dict[str, Any]:
    """A picture of ratios (kind ``"error"``) or of a mask's bytes, one layer for every name; `first` is shown first."""
    shape = layers[0][1].shape
    cells = [pooled(x, side) for _, x in layers]
    if kind == "error":
        cells = [errors(x) for x in cells]
        more["infinite"] = any(bool((x == INFINITE).any()) for x in cells)
        more["top"] = max((int(x[x < INFINITE].max(initial=0)) for x in cells), default=0)
    return {
        "kind": kind,
        "title": title,
        "axes": list(axes),
        "shape": list(shape),
        "size": list(cells[0].shape),
        "first": first,
        "layers": [{"name": name, "data": base64.b64encode(x.tobytes()).decode()} for (name, _), x in zip(layers, cells, strict=True)],
        **more,
    }


def fact(found: Fact) -> dict[str, Any] | None:
    """The mask that was recovered beside the specified one; None where the fact holds no masks."""
    pair = [np.asarray(found.values[n]) for n in ("found", "specified") if n in found.values]
    if len(pair) != 2 or any(x.dtype != bool or x.ndim not in (2, 3) or not x.size for x in pair) or pair[0].shape != pair[1].shape:
        return None
    cells = mask(*pair).reshape(-1, *pair[0].shape[-2:])
    alike = bool((cells == cells[:1]).all())
    layers = [("every head", cells[0])] if alike else [(f"query head {h}", x) for h, x in enumerate(cells)]
    differing = ((cells == MISSING) | (cells == EXTRA)).sum(axis=(1, 2))
    title = f"{found.subject} ({found.call})" if found.call else found.subject
    return _picture("mask", title, ("query", "key"), layers, 0 if alike else int(differing.argmax()))


def case(judged: Case, most_layers: int = 64, side: int = SIDE) -> Iterator[list[dict[str, Any]]]:
    """Error maps of a call, those of each output together, the worst output first: heads over queries, queries over channels, queries over keys."""
    if judged.problem is None:
        return
    for name, ratios in sorted(judged.ratios.items(), key=lambda item: -item[1].max(initial=0.0)):
        if ratios.size and ratios.ndim:
            letters = axes_of(judged.problem.variant, name).split()
            shown = list(_output(name, ratios, letters[len(letters) - ratios.ndim :], most_layers, side))
            laid = _over_keys(ratios, judged.truth.get("weights")) if name == "out" else None
            if laid is not None:
                title, lead = "out: rows' errors laid on the keys they weigh", ["batch", "query head"]
                shown.append(_picture("error", title, ("query", "key"), *_layers(laid, lead, most_layers), side=side))
            yield shown


def _output(name: str, ratios: np.ndarray, letters: list[str], most_layers: int, side: int) -> Iterator[dict[str, Any]]:
    spoken = [words.AXES.get(letter, letter) for letter in letters]
    by_row = ratios.ndim >= 2 and letters[-1] in ("T", "S") and letters[-2] not in ("T", "S")  # lse: a number a row
    rows = ratios if by_row else ratios.max(axis=-1) if ratios.ndim >= 2 else ratios
    if rows.ndim >= 2 or by_row:
        flat = rows.reshape(-1, rows.shape[-1])
        lead, along = spoken[: rows.ndim - 1], spoken[rows.ndim - 1]
        heads = _names(rows.shape[:-1], lead)
        more: dict[str, Any] = {"names": heads} if len(heads) <= side else {}
        if not by_row and ratios.ndim >= 3 and len(heads) <= most_layers:
            more["selects"] = True  # of the picture that follows, the layer of the chosen row
        yield _picture("error", f"{name}: every head", (" and ".join(lead), along), [("", flat)], side=side, **more)
    if by_row:
        return
    if ratios.ndim == 1:
        yield _picture("error", name, ("", spoken[-1]), [("", ratios[None])], side=side)
    else:
        yield _picture("error", f"{name}: one head", (spoken[-2], spoken[-1]), *_layers(ratios, spoken[:-2], most_layers), side=side)


def _layers(ratios: np.ndarray, lead: Sequence[str], most: int) -> tuple[list[tuple[str, np.ndarray]], int]:
    """One layer for every head, and which of them holds the worst element; where there are too many, that one and the worst of all."""
    flat = ratios.reshape(-1, *ratios.shape[-2:])
    names = _names(ratios.shape[:-2], lead)
    worst = int(np.argmax(flat.max(axis=(1, 2))))
    if len(names) <= most:
        return list(zip(names, flat, strict=True)), worst
    return [(names[worst], flat[worst]), ("the worst of all", flat.max(axis=0))], 0


def _names(shape: tuple[int, ...], axes: Sequence[str]) -> list[str]:
    """``batch 0, query head 3``"""
    return [", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True)) for index in np.ndindex(shape)]


def _over_keys(ratios: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
    """The worst error of each row times the true weights of the row, the largest of them taken as 1."""
    if weights is None or ratios.ndim != 4 or weights.ndim != 4 or ratios.shape[:3] != weights.shape[:3] or not weights.size:
        return None
    largest = weights.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(largest > 0, weights / largest, 0.0)
        laid = ratios.max(axis=-1)[..., None] * share
    return np.where(share > 0, laid, 0.0)


def size(picture: Mapping[str, Any]) -> int:
    """Characters of a picture's cells on the page."""
    return sum(len(layer["data"]) for layer in picture["layers"])
