"""A state token by token in balls, for what two float64 leave open.

Balls bound every number of a state for itself, and lose up to a bit or two at each token that erases, where `states` does not; what they lose, the
next precision has.  They are exact as long as everything is: without exponentials or roots, results that are ties are decided too.
"""

from __future__ import annotations

from typing import Any

from .tokens import InBalls, Tokens, after_name

#: An element: of which output, and where, [B, H, ...].
Place = tuple[str, tuple[int, ...]]


class StateBalls:
    """One state from the first token to the last one that some elements need, at flint's present precision; only the columns they need."""

    def __init__(self, asked: Tokens, b: int, g: int, wanted: list[Place]) -> None:
        rule = asked.rule
        self._asked, self._mass = asked, asked.n_values
        mass = after_name(rule.mass)
        columns = {self._mass if name == mass else at[-1] for name, at in wanted if name != after_name(rule.maximum)}
        if rule.normalizer and any(name == "out" for name, _ in wanted):
            columns.add(self._mass)
        self._columns = {c: n for n, c in enumerate(sorted(columns))}
        self._first_head = g * asked.group
        self._head = asked.head(InBalls, b, g, sorted(columns))
        self._queries = asked.queries(InBalls, b, g)
        self._skip = asked.skipped(InBalls, b, g) if rule.skip else None
        rows = {(at[1], at[2]) for name, at in wanted if name == "out"}
        self._rows: dict[int, list[tuple[int, int]]] = {}
        for h, i in sorted(rows):
            self._rows.setdefault(int(asked.after[i]), []).append((h, i))
        self._reads: dict[tuple[int, int], list[Any]] = {}
        everything = any(name != "out" for name, _ in wanted)
        self._state: list[Any] = []
        if self._columns:
            self._run(asked.n_tokens if everything else max(self._rows, default=-1) + 1)

    def element(self, name: str, at: tuple[int, ...]) -> Any:
        """One element; None where something that is not finite is in it."""
        if name == "out":
            return self._output(at[1], at[2], at[3])
        if name == after_name(self._asked.rule.maximum):
            found = self._head.tops[-1]
        else:
            found = self._state[at[2]][self._columns[self._mass if name == after_name(self._asked.rule.mass) else at[3]]]
        return found if found.is_finite() else None

    def _run(self, n_tokens: int) -> None:
        import flint

        matrix, head, old = flint.arb_mat, self._head, self._asked.old
        state = matrix(head.initial.tolist())
        self._read(-1, state)
        for t in range(n_tokens):
            if self._asked.rule.exclusive:
                self._read(t, state)
            before = state
            if head.decay is not None:
                factors = head.decay[t].tolist()
                if len(factors) == 1:
                    state = state * factors[0]
                else:
                    state = matrix([[f * x for x in row] for f, row in zip(factors, state.tolist(), strict=True)])
            for w in range(len(old)):
                change = matrix([head.value[t, w].tolist()])
                if head.erase is not None:
                    change = change - matrix([head.erase[t, w].tolist()]) * (before if old[w] else state)
                state = state + matrix([[x] for x in head.key[t, w].tolist()]) * change
            if not self._asked.rule.exclusive:
                self._read(t, state)
        self._state = state.tolist()

    def _read(self, t: int, state: Any) -> None:
        import flint

        for h, i in self._rows.get(t, ()):
            self._reads[h, i] = (flint.arb_mat([self._queries[h - self._first_head, i].tolist()]) * state).entries()

    def _output(self, h: int, i: int, c: int) -> Any:
        rule, head, t = self._asked.rule, self._head, int(self._asked.after[i])
        n = self._columns[c]
        read, mass = self._reads[h, i][n], self._reads[h, i][-1]
        zero = type(read)(0)
        if rule.exclusive and head.past is not None:
            read, mass = read * head.past[t], mass * head.past[t]
        if head.own is not None:
            overlap = sum((x * y for x, y in zip(self._queries[h - self._first_head, i].tolist(), head.own[t].tolist(), strict=True)), zero)
            read, mass = read + overlap * head.value[t, 0, n], mass + overlap * head.value[t, 0, -1]
        skip = zero if self._skip is None else self._skip[h - self._first_head, i, c]
        if not (read.is_finite() and (not rule.normalizer or mass.is_finite()) and skip.is_finite()):
            return None
        out = read * rule.scale
        if rule.normalizer:
            if rule.normalizer == "floor":
                floor = head.floor[t + 1]
                if floor.is_exact() and not floor.is_finite():  # nothing has been written
                    return skip
                mass = abs(mass).max(floor)
            divisor = mass.max(rule.eps) if rule.normalizer == "clamp" else mass + rule.eps
            out = zero if divisor.is_zero() else out / divisor
        return out + skip
