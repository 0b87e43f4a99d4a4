"""Rational numbers, for results that are: no precision decides a tie, and a tie is rational.

Scores without a soft-cap are rational numbers of the operands.  Let o be an output and g the sets of keys of equal score, a sink being a key of
value 0.  Then

    sum_g e**(s_g) sum_{j in g} (v_j - o) = 0,

and by the theorem of Lindemann and Weierstrass, the s_g being different rational numbers, a rational o makes every inner sum 0: it is the mean of
v over *each* set.  So an output is rational exactly where these means agree: one visible key, equal scores, a channel of one value, ...  Otherwise
it is transcendental, no tie, and balls decide it.  In the same way a weight is rational where all scores are equal, and lse where one key is seen.
With a soft-cap, keys of equal product and equal bias count as equal, which still proves what it finds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from .task import Task

if TYPE_CHECKING:
    from .results import Draft

#: Undecided elements of one row: the outputs' names and their last indices.
Wanted = Mapping[str, np.ndarray]


def open_rows(drafts: Mapping[str, Draft]) -> Iterator[tuple[tuple[int, int, int], dict[str, np.ndarray]]]:
    """Rows (b, h, i) in which something is undecided, with what."""
    any_open = np.any([~x.rounded.all(axis=-1) for x in drafts.values()], axis=0)
    for b, h, i in np.argwhere(any_open).tolist():
        found = {name: np.flatnonzero(~x.rounded[b, h, i]) for name, x in drafts.items()}
        yield (b, h, i), {name: at for name, at in found.items() if at.size}


class Exact:
    """Operands of a task as integers, kept from row to row of one key-value head."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._at: tuple[int, int] | None = None

    def row(self, b: int, h: int, i: int) -> Row | None:
        """The groups of a row, of keys and numbers that are finite; None where its query is not."""
        task, g = self.task, self.task.group(h)
        added = task.added(b, h, np.array([i]), task.shape[3])[0]
        seen = np.flatnonzero(added != -np.inf)
        scored = seen[added[seen] != np.inf]
        q, sink = task.q[b, h, i], float(task.sinks[h])
        if self._at != (b, g):
            self._finite = np.isfinite(task.k[b, g]).all(axis=1)
            self._k, self._k_exponent = integers(np.where(self._finite[:, None], task.k[b, g], 0.0))
            self._v, self._v_exponent = integers(np.nan_to_num(task.v[b, g], nan=0.0, posinf=0.0, neginf=0.0))
            self._at = (b, g)
        if not np.isfinite(q).all():
            return None
        known = scored[self._finite[scored] & ~np.isnan(added[scored])]
        spoilt, scored = len(known) < len(scored) or not sink < math.inf, known
        q_whole, q_exponent = integers(q)
        dots = self._k[scored] @ q_whole if np.any(q != 0.0) else [0] * len(scored)
        unit = Fraction(task.scale) * power(q_exponent + self._k_exponent)
        filled = seen[added[seen] == np.inf].tolist()
        keys: dict[int, Hashable] = dict.fromkeys(filled, ("fill",) if task.cap else Fraction(task.fill) if filled else None)
        for j, dot in zip(scored.tolist(), dots, strict=True):
            bias = Fraction(float(added[j]))
            keys[j] = (int(dot), bias) if task.cap else unit * int(dot) + bias
        groups: dict[Hashable, list[int]] = {}
        for j, key in keys.items():
            groups.setdefault(key, []).append(j)
        sinks: Hashable = None
        if math.isfinite(sink):
            sinks = ("sink",) if task.cap else Fraction(sink)
            groups.setdefault(sinks, [])
        return Row(task, b, g, keys, groups, sinks, spoilt, self._v, power(self._v_exponent))


class Row:
    """One query row: each visible key's score, or what stands for it, and the keys of equal ones.

    `keys` are those that are known, and only their scores are where the row is `spoilt` by others.
    """

    def __init__(
        self,
        task: Task,
        b: int,
        g: int,
        keys: dict[int, Hashable],
        groups: dict[Hashable, list[int]],
        sink: Hashable,
        spoilt: bool,
        values: np.ndarray,
        unit: Fraction,
    ) -> None:
        self._task, self._b, self._g, self.keys, self._groups, self._sink, self.spoilt = task, b, g, keys, groups, sink, spoilt
        self._values, self._unit = values, unit

    def found(self, name: str, n: int) -> Fraction | None:
        """A result that is rational, or None."""
        if name == "out":
            return self._output(n)
        if name == "lse":
            only = next(iter(self._groups)) if len(self._groups) == 1 else None
            one_member = only is not None and len(self._groups[only]) + (only == self._sink) == 1
            return only if one_member and isinstance(only, Fraction) else None
        key = self.keys.get(n)
        if name == "scores":
            return key if isinstance(key, Fraction) else key[1] if isinstance(key, tuple) and key[0] == 0 else None
        if len(self._groups) == 1 and key is not None:
            return Fraction(1, len(self.keys) + (self._sink is not None))
        return Fraction(1, self._task.shape[3]) if not self._groups and self._task.empty_rows == "uniform" else None

    def beyond(self, name: str, n: int, t: Fraction) -> dict[Hashable, Fraction] | None:
        """Coefficients, by group, of a sum of exponentials of scores that has the sign of a result minus t; None where there is no such sum.

        Groups whose coefficient is 0 are left out.  What remains can be told apart from 0 however far apart the exponents lie.
        """
        if not self._groups or name == "scores" or (name == "lse" and self._task.cap):
            return None
        found: dict[Hashable, Fraction] = {}
        for key, members in self._groups.items():
            sink = key == self._sink
            if name == "out":
                values = int(self._values[members, n].sum()) if members else 0
                found[key] = values * self._unit - t * (len(members) + sink)
            else:
                found[key] = Fraction(n in members) - t * (len(members) + sink) if name == "weights" else Fraction(len(members) + sink)
        if name == "lse":
            found[t] = found.get(t, Fraction(0)) - 1
        return {key: c for key, c in found.items() if c}

    def inside_cap(self, n: int, t: Fraction) -> int | None:
        """On which side of t a soft-capped score is, where t is its limit, bias and cap together, that it never reaches; None elsewhere."""
        key, cap, scale = self.keys[n], Fraction(self._task.cap), self._task.scale
        if not (cap and isinstance(key, tuple) and len(key) == 2 and key[0] and scale):
            return None
        upwards = 1 if (key[0] > 0) == (scale > 0) else -1
        return -upwards if t == upwards * cap + key[1] else None

    def member(self, key: Hashable) -> int | None:
        """A key of a group, or None of one that a sink or a number is alone in."""
        members = self._groups.get(key)
        return members[0] if members else None

    def _output(self, c: int) -> Fraction | None:
        groups, everything = self._groups, self._task.v[self._b, self._g, :, c]
        if not groups and self._task.empty_rows == "uniform":
            groups = {None: list(range(len(everything)))}
        common = None
        for key, members in groups.items():
            if not np.isfinite(everything[members]).all():
                return None
            count = len(members) + (key is not None and key == self._sink)
            mean = Fraction(int(self._values[members, c].sum()), count)
            if common is not None and mean != common:
                return None
            common = mean
        return None if common is None else common * self._unit


def integers(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Integers n and one exponent e such that x = n 2**e exactly."""
    mantissa, exponent = np.frexp(x)
    held = np.where(x != 0.0, exponent, 1 << 20)
    least = int(held.min(initial=1 << 20))
    least = 0 if least == 1 << 20 else least
    shifts = np.where(x != 0.0, exponent - least, 0)
    return (mantissa * 2.0**53).astype(np.int64).astype(object) << shifts.astype(object), least - 53


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent
