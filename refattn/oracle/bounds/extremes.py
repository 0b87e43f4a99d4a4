"""What a recurrence loses where numbers on the way leave the formats they are kept in: at the small end an amount, at the large end everything.

below
    A product below the smallest normal number is off by up to the smallest number there is, and that counts with whatever is multiplied by it
    afterwards.  Products may be taken in any order, so each is charged with the largest product of factors that may still be to come: every
    factor of it, or 1 where that is smaller, and 0 where the factor is, since nothing is lost of nothing.  The recurrence carries these
    amounts to the outputs as it carries any error.
beyond
    A sum of terms that may exceed the largest number is infinite, or NaN in the next difference or product with 0, in one order of summation
    and a number in another.  Whatever reads it is undecidable: its error is infinite.  In the chunked and the quadratic forms masked weights
    multiply what later tokens of the chunk write, and so do the entries of the inverse, which may exceed it where no state does.

Operands that are infinite or NaN themselves count for nothing here: what becomes of them is part of the truth.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit

from ... import precision
from ...problem import Problem
from ...spec import Factor, Recurrence
from ..recurrences.lowered import Lowered, Lowering, operand
from ..recurrences.running import Form, Prepared, Result, Rounding, divisor_of, faded, prepared, undivided

#: Patterns of signs of what is lost; as many again are the same for all tokens, as where everything is flushed to zero.
_PATTERNS = 3

#: Tokens of a triangular system that is solved as a whole, where a profile says nothing.
_SOLVED = 64


class Range(NamedTuple):
    """The smallest and the largest positive number of a format."""

    smallest: float
    largest: float


#: Formats by their unit roundoff, as profiles name them.
_RANGES = {
    known.unit: Range(known.tiny, known.largest)
    for known in map(precision.format_of, ("float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "float32", "float64"))
}


def range_of(unit: float) -> Range:
    """Of the format of that unit roundoff; float32's for any other, and none for 0, which is for what is not stored."""
    return _RANGES.get(unit, _RANGES[2.0**-24]) if unit else Range(0.0, np.inf)


def of_numbers(problem: Problem) -> bool:
    """Whether no operand holds NaN or an infinity, but for a minus infinity that belongs to its domain."""
    for o in problem.variant.operands:
        if o.kind == "real" and o.name in problem.given:
            x = np.asarray(problem.given[o.name], np.float64)
            domain = (o.absent, *(o.within or ()))
            if not np.all(np.isfinite(x) | ((x == -np.inf) & (-np.inf in domain))):
                return False
    return True


class Elsewhere(Lowering):
    """With maps evaluated in another format than float64: float32, or long double for a profile in float64."""

    def __init__(self, problem: Problem, rule: Recurrence, units: Rounding) -> None:
        super().__init__(problem, rule)
        self.dtype = np.dtype(np.float32 if units.sums > 2.0**-53 else np.longdouble)

    def factor(self, factor: Factor | str) -> np.ndarray:
        if isinstance(factor, str) or factor.map is None:
            return super().factor(factor)
        return super().factor(replace(factor, map=cast(ModuleType, _In(factor.map, self.dtype))))


class _In:
    """A map in a format."""

    def __init__(self, piece: ModuleType, dtype: np.dtype) -> None:
        self.piece, self.dtype = piece, dtype

    def features(self, x: np.ndarray, *rest: Any) -> np.ndarray:
        function = self.piece.apply if hasattr(self.piece, "apply") else self.piece.features
        arguments = (y.astype(self.dtype) if isinstance(y, np.ndarray) else y for y in (x, *rest))
        return np.asarray(function(*arguments)).astype(self.dtype).astype(np.float64)  # which may have been float64, by a number


class _Ceilings(Elsewhere):
    """Every factor's magnitude, or 1 where that is smaller, or 0 where nothing is: no product of some of the factors is larger."""

    def factor(self, factor: Factor | str) -> np.ndarray:
        value = super().factor(factor)
        known = np.isfinite(operand(self.problem, factor if isinstance(factor, str) else factor.operand)).all()
        ceiling = np.where(value == 0.0, 0.0, np.maximum(np.abs(value), 1.0))
        return np.where(np.isfinite(value), ceiling, np.inf if known else 1.0)


def extremes(problem: Problem, rule: Recurrence, units: Rounding, exact: Result) -> Result:
    """What every output of a recurrence may lose beside its roundings; infinite where it is undecidable.

    Parameters
    ----------
    problem : Problem
    rule : Recurrence
    units : Rounding
        Of which the formats follow.
    exact : Result
        Without roundings.
    """
    p, most = prepared(Lowering(problem, rule).lowered()), _Ceilings(problem, rule, units).lowered()
    sums, stored = range_of(units.sums), range_of(max(units.operands, units.state))
    w = _with_mass(most, most.w) if rule.normalizer else most.w
    ceilings = tuple(np.ascontiguousarray(x) for x in (most.q, most.b, w, most.e, p.u if most.u is None else most.u))
    plain = tuple(np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (p.q, p.b, p.w, p.e, p.u, p.state))
    fades = np.nan_to_num(p.g, nan=0.0, posinf=0.0, neginf=-np.inf)
    limits = np.array([sums.smallest, sums.largest, stored.smallest, stored.largest, max(abs(rule.scale), 1.0)])
    how = np.array([rule.exclusive, units.chunk or p.lowered.tokens + 1, min(units.chunk or _SOLVED, _SOLVED)], np.int64)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (4093, 2 * _PATTERNS))
    read, state = np.zeros((*p.q.shape[:3], p.w.shape[4])), np.zeros(p.state.shape)
    with np.errstate(all="ignore"):
        _lost(*plain, fades, *ceilings, p.lowered.erases, p.lowered.old, limits, how, signs, read, state)
        return _finished(p, most, units, sums, exact, read[:, :, p.lowered.reads], state)


def _with_mass(x: Lowered, w: np.ndarray) -> np.ndarray:
    return np.concatenate([w, np.broadcast_to(x.valued[:, None].astype(float), (*w.shape[:4], 1))], axis=4)


def _finished(p: Prepared, most: Lowered, units: Rounding, sums: Range, exact: Result, read: np.ndarray, state: np.ndarray) -> Result:
    """After the normaliser, the scale and what is added to the output."""
    rule, mass = p.lowered.rule, None
    if rule.normalizer:
        read, of_divisor = read[..., :-1], read[..., -1:]
        state, mass = state[..., :-1], state[..., -1]
        divisor = np.abs(divisor_of(p, undivided(p, Form())[0][..., -1:]))
        size = np.abs(np.nan_to_num(exact.out if p.lowered.skip is None else exact.out - p.lowered.skip, posinf=0.0, neginf=0.0))
        if p.maxima is not None:  # a floor of exp(-maximum) may be 0
            of_divisor = of_divisor + units.tiny
        left = divisor - of_divisor
        moved = np.where(left > 0.0, (abs(rule.scale) * read + size * of_divisor) / left, np.where(of_divisor > 0.0, np.inf, 0.0))
        infinite = (divisor >= sums.largest) & np.isfinite(read) & np.isfinite(of_divisor)  # the floor, of numbers
        read = np.where(infinite, size, moved)
    else:
        read = max(abs(rule.scale), 1.0) * read
    if most.skip is not None:
        read = read + np.where(most.skip < sums.largest, sums.smallest * most.skip, np.inf)
    maximum = None if p.maxima is None else np.zeros(p.maxima.shape[:2])
    return Result(_known(read), _known(state), None if mass is None else _known(mass), maximum)


def _known(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.inf, x)


@njit(cache=True, error_model="numpy")
def _largest(off, x, y):  # type: ignore[no-untyped-def]
    """Over the patterns of signs."""
    found = 0.0
    for d in range(off.shape[2]):
        found = max(found, abs(off[x, y, d]))
    return found


@njit(cache=True, error_model="numpy")
def _inverse_leaves(b, w, e, erases, old, g, start, stop, largest):  # type: ignore[no-untyped-def]
    """Whether the inverse of a chunk's triangular system, or its product with values or erasures, may exceed the largest number.

    An entry is what a unit change by one write makes of a later one's: what is left of the first one's key, as the second erases it.
    """
    writes, n_keys = b.shape[1:]
    n_values, rows = w.shape[2], g.shape[1]
    columns = (stop - start) * writes
    amplified, key, erasure, value = 1.0, 1.0, 1.0, 1.0
    for t in range(start, stop):
        for r in range(writes):
            written, erased = 0.0, 0.0
            for x in range(n_keys):
                written, erased = np.hypot(written, b[t, r, x]), np.hypot(erased, e[t, r, x])
            for y in range(n_values):
                value = max(value, abs(w[t, r, y]))
            if erases[r]:
                amplified *= 1.0 + written * erased
            key, erasure = max(key, written), max(erasure, erased)
    if amplified * key * erasure * max(value, erasure) * columns < largest:  # no entry exceeds the product of norms
        return False
    left, before, entries = np.zeros((n_keys, columns)), np.zeros((n_keys, columns)), np.zeros(columns)
    for t in range(start, stop):
        for x in range(n_keys):
            a = np.exp(g[t, min(x, rows - 1)])
            for j in range((t - start) * writes):
                left[x, j] = faded(a, left[x, j])
                before[x, j] = left[x, j]
        for r in range(writes):
            here = (t - start) * writes + r
            for j in range(here):
                entries[j] = 0.0
            if erases[r]:
                for x in range(n_keys):
                    for j in range(here):
                        entries[j] += e[t, r, x] * (before[x, j] if old[r] else left[x, j])
                for y in range(n_values + n_keys):
                    total = 0.0
                    for j in range(here):
                        s, m = start + j // writes, j % writes
                        total += abs(entries[j]) * max(1.0, abs(w[s, m, y] if y < n_values else e[s, m, y - n_values]))
                    if not total < largest:
                        return True
            for x in range(n_keys):
                for j in range(here):
                    left[x, j] -= b[t, r, x] * entries[j]
                left[x, here] = b[t, r, x]
    return False


@njit(cache=True, error_model="numpy")
def _lost(q, b, w, e, u, state, g, q_most, b_most, w_most, e_most, u_most, erases, old, limits, how, signs, read, error):  # type: ignore[no-untyped-def]
    small, large, small_stored, large_stored, scale = limits[0], limits[1], limits[2], limits[3], limits[4]
    exclusive, chunk, solved = how[0], how[1], how[2]
    batch, heads, n, n_keys = q.shape
    states, writes, n_values = state.shape[1], b.shape[3], w.shape[4]
    group, rows, patterns = heads // states, g.shape[3], signs.shape[1]
    half = patterns // 2
    value, size, most = np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values))
    value_before, size_before = np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values))
    off, off_before = np.zeros((n_keys, n_values, patterns)), np.zeros((n_keys, n_values, patterns))
    gone, gone_before = np.zeros((n_keys, n_values), np.bool_), np.zeros((n_keys, n_values), np.bool_)
    changes, highest, change, whole = np.zeros(n_values), np.zeros(n_keys), np.zeros(n_values), np.zeros(n_values)
    slip, column, total = np.zeros((n_values, patterns)), np.zeros(n_values, np.bool_), np.zeros((1, 1, patterns))
    at = 0
    for i in range(batch):
        for h in range(states):
            for x in range(n_keys):
                for y in range(n_values):
                    value[x, y], size[x, y] = state[i, h, x, y], abs(state[i, h, x, y])
                    most[x, y] = max(size[x, y], 1.0) if size[x, y] > 0.0 else 0.0
                    gone[x, y] = size[x, y] >= large_stored
                    for d in range(patterns):
                        off[x, y, d] = 0.0
            for t in range(n):
                if t % chunk == 0:  # a chunk begins
                    for y in range(n_values):
                        changes[y], column[y] = 0.0, False
                    for x in range(n_keys):
                        highest[x] = 0.0
                lost = (
                    chunk > 1 and t % solved == 0 and _inverse_leaves(b[i, h], w[i, h], e[i, h], erases, old, g[i, h], t, min(t + solved, n), large)
                )
                # 1. fade
                for x in range(n_keys):
                    a = np.exp(g[i, h, t, min(x, rows - 1)])
                    for y in range(n_values):
                        gone[x, y] |= lost
                        value_before[x, y], size_before[x, y], gone_before[x, y] = value[x, y], size[x, y], gone[x, y]
                        value[x, y], size[x, y] = faded(a, value[x, y]), faded(a, size[x, y])
                        for d in range(patterns):
                            off_before[x, y, d] = off[x, y, d]
                            off[x, y, d] = faded(a, off[x, y, d])
                # 2. write
                for r in range(writes):
                    beyond = False
                    if erases[r] and chunk > 1:
                        overlap = 0.0
                        for x in range(n_keys):
                            overlap += e_most[i, h, t, r, x] * highest[x]
                        beyond = not overlap < large
                    for y in range(n_values):
                        held, terms, charged, kept, lost = 0.0, 0.0, 0.0, 0.0, beyond
                        for d in range(patterns):
                            slip[y, d] = 0.0
                        if erases[r]:
                            for x in range(n_keys):
                                lost |= gone[x, y]
                                key, ceiling = e[i, h, t, r, x], e_most[i, h, t, r, x]
                                if ceiling == 0.0:
                                    continue
                                there = size_before[x, y] if old[r] else size[x, y]
                                held += key * (value_before[x, y] if old[r] else value[x, y])
                                terms += ceiling * there
                                charged += ceiling * most[x, y]
                                kept += there + abs(key) if there > 0.0 else 0.0
                                for d in range(patterns):
                                    slip[y, d] -= key * (off_before[x, y, d] if old[r] else off[x, y, d])
                        change[y] = w[i, h, t, r, y] - held
                        whole[y] = max(w_most[i, h, t, r, y], abs(w[i, h, t, r, y]) + terms)
                        if lost or not whole[y] < large or not abs(change[y]) < large_stored:
                            column[y] = True
                            for x in range(n_keys):
                                gone[x, y] = True
                        amount = small * charged + small_stored * kept
                        for d in range(patterns):
                            slip[y, d] += amount * signs[y if d >= half else (at + y) % len(signs), d]
                        changes[y] += abs(change[y])
                    at += n_values
                    for x in range(n_keys):
                        key, ceiling = b[i, h, t, r, x], b_most[i, h, t, r, x]
                        if ceiling == 0.0:
                            continue
                        highest[x] = max(highest[x], ceiling)
                        for y in range(n_values):
                            value[x, y] += key * change[y]
                            size[x, y] += abs(key * change[y])
                            most[x, y] += ceiling * whole[y]
                            if not ceiling * whole[y] < large or not size[x, y] < large or not abs(value[x, y]) < large_stored:
                                gone[x, y] = True
                            amount = small * ceiling * whole[y]
                            if change[y] != 0.0:
                                amount += small_stored * (abs(key) + abs(change[y]))
                            for d in range(patterns):
                                place = x * n_values + y
                                off[x, y, d] += key * slip[y, d] + amount * signs[(place if d >= half else at + place) % len(signs), d]
                    at += n_keys * n_values
                # 3. read
                for m in range(group):
                    j = h * group + m
                    overlap = 0.0
                    for x in range(n_keys):
                        overlap += scale * q_most[i, j, t, x] * highest[x]
                    for y in range(n_values):
                        terms, charged, kept, lost = 0.0, 0.0, 0.0, chunk > 1 and not overlap < large
                        for d in range(patterns):
                            total[0, 0, d] = 0.0
                        for x in range(n_keys):
                            lost |= gone_before[x, y] if exclusive else gone[x, y]
                            key, ceiling = q[i, j, t, x], q_most[i, j, t, x]
                            if ceiling == 0.0:
                                continue
                            there = size_before[x, y] if exclusive else size[x, y]
                            terms += ceiling * there
                            charged += ceiling * most[x, y]
                            kept += there + abs(key) if there > 0.0 else 0.0
                            for d in range(patterns):
                                total[0, 0, d] += key * (off_before[x, y, d] if exclusive else off[x, y, d])
                            if u.shape[3] > 0:
                                for r in range(writes):
                                    part = ceiling * u_most[i, h, t, x] * b_most[i, h, t, r, x] * w_most[i, h, t, r, y]
                                    terms += part
                                    charged += part
                        if lost or not scale * terms < large:
                            read[i, j, t, y] = np.inf
                        else:
                            read[i, j, t, y] = _largest(total, 0, 0)
                            if charged > 0.0:  # else every product is 0
                                read[i, j, t, y] += small * charged + small_stored * (kept + changes[y])
                for y in range(n_values):
                    for x in range(n_keys):
                        column[y] |= gone[x, y]
                if (t + 1) % chunk == 0 or t == n - 1:  # masked weights times what tokens of the chunk wrote later
                    for s in range(t - t % chunk, t + 1 if chunk > 1 else 0):
                        for j in range(h * group, (h + 1) * group):
                            for y in range(n_values):
                                if column[y]:
                                    read[i, j, s, y] = np.inf
            for x in range(n_keys):
                for y in range(n_values):
                    error[i, h, x, y] = np.inf if gone[x, y] else _largest(off, x, y)
