"""A checked call of a recurrence as numbers by head, token, write and channel; or a refusal that names what has no enclosure here.

Each part of a recurrence is a product of factors.  What lies where is said once, by arrays of indices into the factors' values; the values are
had in two float64 with bounds, or as balls of flint's present precision.  Both are one `Head`, made by the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ParameterError
from ..pieces.maps import log
from ..problem import Problem
from ..spec import Factor, Product, Recurrence
from . import balls, maps
from .enclosures import exactly, exponential, product
from .results import Enclosed

#: Places of axes.  States have the first two, then channels of keys and of values.
BATCH, HEADS, TOKENS, WRITES, WIDTH = range(5)

# ---- two arithmetics -------------------------------------------------------------------------------------------------------------


class Pairs:
    """Two float64 with a bound: see `enclosures`."""

    times, exp, numbers = staticmethod(product), staticmethod(exponential), staticmethod(exactly)

    @staticmethod
    def of(values: Values, at: np.ndarray) -> Enclosed:
        h, l, r = (x[at] for x in values.pairs)
        return h, l, r

    @staticmethod
    def joined(parts: list[Enclosed], axis: int) -> Enclosed:
        h, l, r = (np.concatenate(same, axis=axis) for same in zip(*parts, strict=True))
        return h, l, r

    @staticmethod
    def placed(x: Enclosed, full: tuple[int, ...]) -> Enclosed:
        h, l, r = (np.broadcast_to(part, full) for part in x)
        return h, l, r

    @staticmethod
    def at(x: Enclosed, where: Any) -> Enclosed:
        h, l, r = (part[where] for part in x)
        return h, l, r

    @staticmethod
    def from_balls(made: Callable[[], tuple[Any, ...]]) -> tuple[Enclosed, ...]:
        with balls.precision(balls.FIRST):
            return tuple(as_pairs(x) for x in made())


class InBalls:
    """Arrays of balls."""

    numbers = staticmethod(maps.to_balls)

    @staticmethod
    def times(x: Any, y: Any) -> Any:
        return x * y

    @staticmethod
    def exp(x: Any) -> Any:
        return maps.exponentials(x)

    @staticmethod
    def of(values: Values, at: np.ndarray) -> Any:
        return values.balls(at)

    @staticmethod
    def joined(parts: list[Any], axis: int) -> Any:
        return np.concatenate(parts, axis=axis)

    @staticmethod
    def placed(x: Any, full: tuple[int, ...]) -> Any:
        return np.broadcast_to(x, full)

    @staticmethod
    def at(x: Any, where: Any) -> Any:
        return x[where]

    @staticmethod
    def from_balls(made: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        return made()


def as_pairs(x: Any) -> Enclosed:
    """Balls in two float64; NaN and an infinite bound for what is not finite, or too large."""
    h, l, r = np.full(x.size, np.nan), np.zeros(x.size), np.full(x.size, np.inf)
    for n, ball in enumerate(x.reshape(-1).tolist()):
        high = float(ball.mid())
        if not (ball.is_finite() and math.isfinite(high)):
            if ball.is_exact() and not ball.is_nan() and not ball.is_finite():
                h[n], r[n] = high, 0.0
            continue
        low = float((ball - high).mid())
        high, low = high + low, low - ((high + low) - high)  # whichever way flint rounds, low is half a unit at most
        off = abs(ball - high - low)
        h[n], l[n], r[n] = high, low, 0.0 if off.is_zero() else math.nextafter(float(off.upper()), math.inf)
    return h.reshape(x.shape), l.reshape(x.shape), r.reshape(x.shape)


# ---- factors -----------------------------------------------------------------------------------------------------------------------


class Values:
    """A factor's values, in the order of its array once mapped."""

    shape: tuple[int, ...]

    def __init__(self, factor: Factor, raw: np.ndarray, weights: tuple[np.ndarray, ...]) -> None:
        self._factor, self._raw, self._weights = factor, raw, weights
        self._entrywise = maps.is_entrywise(factor.map)
        self._bits, self._features = 0, np.empty(0, object)
        if self._entrywise:
            self.shape = raw.shape
            self.pairs = exactly(raw.reshape(-1)) if factor.map is None else self._in_pairs()
        else:
            self.pairs = self._in_pairs()

    def balls(self, at: np.ndarray) -> Any:
        """At some places."""
        if self._entrywise:
            x = maps.to_balls(self._raw.reshape(-1)[at])
            return x if self._factor.map is None else maps.apply(self._factor.map, x, (), self._factor.numbers)
        return self._mapped().reshape(-1)[at]

    def _mapped(self) -> Any:
        import flint

        assert self._factor.map is not None
        if self._bits != flint.ctx.prec:
            weights = tuple(maps.to_balls(x) for x in self._weights)
            self._bits, self._features = flint.ctx.prec, maps.apply(self._factor.map, maps.to_balls(self._raw), weights, self._factor.numbers)
        return self._features

    def _in_pairs(self) -> Enclosed:
        with balls.precision(balls.FIRST):
            if self._entrywise:
                return as_pairs(self.balls(np.arange(self._raw.size)))
            self.shape = self._mapped().shape
            return as_pairs(self._features.reshape(-1))


class Part:
    """A product: each factor with the indices of its values at [B, heads, tokens, writes, width], axes it lacks of size 1."""

    def __init__(self, factors: list[tuple[Values, np.ndarray]]) -> None:
        self.factors = factors

    def __bool__(self) -> bool:
        return bool(self.factors)

    def size(self, axis: int) -> int:
        return max((at.shape[axis] for _, at in self.factors), default=1)

    def values(self, how: Any, b: int, heads: slice, n_heads: int) -> Any:
        """Of some heads of so many, [heads, tokens, writes, width], axes it lacks of size 1; 1 where there are no factors."""
        found = None
        for values, at in self.factors:
            full = at if at.shape[HEADS] in (1, n_heads) else np.repeat(at, n_heads // at.shape[HEADS], axis=HEADS)
            own = full[min(b, full.shape[BATCH] - 1)]
            one = how.of(values, own if len(own) == 1 else own[heads])
            found = one if found is None else how.times(found, one)
        return how.numbers(np.ones((1, 1, 1, 1))) if found is None else found


# ---- a call ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """One state and the queries that read it, in one of the two arithmetics.

    Attributes
    ----------
    key, value, erase
        [S, W, K], [S, W, V] and [S, W, K] or None; a mass is the last value.
    decay
        Factors, [S, 1] or [S, K]; None where nothing fades.
    initial
        [K, V].
    past, own
        Of an exclusive read: what the state counts, [S], or None where it counts 1; and the token's own key, [S, K], or None.
    floor
        exp(-m), [S + 1], before the first token and after each; None without an input gate.
    tops
        m, likewise.
    """

    key: Any
    value: Any
    erase: Any
    decay: Any
    initial: Any
    past: Any
    own: Any
    floor: Any
    tops: Any


class Tokens:
    """A call of a recurrence, checked.

    Attributes
    ----------
    batch, states, heads
        Query head h reads state h // group.
    n_keys, n_values
        K and V, without the mass.
    after
        The last key that each query sees, -1 for none.

    Raises
    ------
    ParameterError
        When something in it has no enclosure in this room.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.recurrence is not None
        self.problem, self.rule = problem, problem.recurrence
        reason = reason_against(problem, self.rule)
        if reason:
            raise ParameterError(f"{problem.variant.name}: cannot be certified: {reason}")
        rule = self.rule
        heads = (rule.heads,) if rule.heads else ("Hq", "Hkv", "H", "G")
        steps = {rule.steps: WRITES} if rule.steps else {}
        self._places = {"B": BATCH, **dict.fromkeys(heads, HEADS), "T": TOKENS, "S": TOKENS, **steps}
        self._known: dict[tuple[Factor, bool], Values] = {}
        self.query, self.bonus, self.gate, self.skip = map(self._part, (rule.query, rule.bonus, rule.input_gate, rule.skip))
        self._is_factor = _is_factor(rule)
        self.decay = self._part((rule.log_decay[0],), plain=True) if self._is_factor else self._part(rule.log_decay)
        self._writes = [tuple(map(self._part, (w.key, w.value, w.erase))) for w in rule.writes]
        self.steps = [max(part.size(WRITES) for part in parts) for parts in self._writes]
        #: Of each write of a token, whether it erases what the state was before the token.
        self.old = np.repeat([w.old for w in rule.writes], self.steps)
        self.erases = any(erase for _, _, erase in self._writes)
        keyed = [self.decay, self.bonus, *(part for key, _, erase in self._writes for part in (key, erase))]
        self.states = max(part.size(HEADS) for part in (*keyed, self.gate, *(value for _, value, _ in self._writes)))
        self.heads = max(self.states, self.query.size(HEADS), self.skip.size(HEADS))
        self.group = self.heads // self.states
        self.batch = problem.dims.get("B", 1)
        self.n_keys = max(part.size(WIDTH) for part in (self.query, *keyed))
        self.n_values = max(value.size(WIDTH) for _, value, _ in self._writes)
        self.n_reads = problem.dims["T"]
        self.n_tokens = problem.dims.get("S", self.n_reads)
        last = np.arange(self.n_reads) + self.n_tokens - self.n_reads if rule.causal else np.full(self.n_reads, self.n_tokens - 1)
        self.after = np.maximum(last, -1)

    # ---- in either arithmetic -----------------------------------------------------------------------------------------------------

    def head(self, how: Any, b: int, g: int, columns: list[int] | None = None) -> Head:
        """A state and what it is made of; of some columns only, if they are named."""
        rule = self.rule
        width = self.n_values + bool(rule.normalizer)
        chosen: Any = slice(None) if columns is None else columns
        parts: tuple[list[Any], ...] = ([], [], [])
        for (key, value, erase), n in zip(self._writes, self.steps, strict=True):
            for found, part, n_width in ((parts[0], key, self.n_keys), (parts[1], value, self.n_values), (parts[2], erase, self.n_keys)):
                empty = part is not key and not part
                one = how.numbers(np.zeros((1, 1, 1, 1))) if empty else self._of_state(how, part, b, g)
                one = how.placed(one, (1, self.n_tokens, n, n_width))
                if part is value and rule.normalizer:
                    one = how.joined([one, how.numbers(np.full((1, self.n_tokens, n, 1), float(bool(value))))], 3)
                found.append(one)
        key, value, erase = (how.at(how.joined(found, 2), 0) for found in parts)
        decay = past = floor = tops = None
        if self.gate:
            fade, rise, past, alone, floor, tops = how.from_balls(lambda: self._stabilised(b, g))
            raised = how.at(rise, (slice(None), None, None))
            own_key = how.times(key, how.at(alone, (slice(None), None, None)))
            key, decay = how.times(key, raised), how.at(fade, (slice(None), None))
        else:
            own_key = key
            if rule.log_decay:
                decay = self._of_state(how, self.decay, b, g)
                decay = decay if self._is_factor else how.exp(decay)
                decay = how.at(how.placed(decay, (1, self.n_tokens, 1, self.decay.size(WIDTH))), (0, slice(None), 0))
        own = None
        if self.bonus:
            bonus = how.placed(self._of_state(how, self.bonus, b, g), (1, self.n_tokens, 1, self.n_keys))
            own = how.times(how.at(own_key, (slice(None), 0)), how.at(bonus, (0, slice(None), 0)))
        initial = self._initial(rule.initial, b, g, self.n_values)
        if rule.normalizer:
            initial = np.concatenate([initial, self._initial(rule.mass, b, g, 1)], axis=1)
        value = how.at(value, (..., np.arange(width)[chosen]))
        return Head(key, value, erase if self.erases else None, decay, how.numbers(initial[:, chosen]), past, own, floor, tops)

    def queries(self, how: Any, b: int, g: int) -> Any:
        """Of the heads that read a state, [group, T, K]."""
        heads = slice(g * self.group, (g + 1) * self.group)
        found = self.query.values(how, b, heads, self.heads)
        return how.at(how.placed(found, (self.group, self.n_reads, 1, self.n_keys)), (slice(None), slice(None), 0))

    def skipped(self, how: Any, b: int, g: int) -> Any:
        """What is added to the outputs of the heads that read a state, [group, T, V]."""
        heads = slice(g * self.group, (g + 1) * self.group)
        found = self.skip.values(how, b, heads, self.heads)
        return how.at(how.placed(found, (self.group, self.n_reads, 1, self.n_values)), (slice(None), slice(None), 0))

    def _of_state(self, how: Any, part: Part, b: int, g: int) -> Any:
        return part.values(how, b, slice(g, g + 1), self.states)

    def _stabilised(self, b: int, g: int) -> tuple[Any, ...]:
        """Balls of one state: by token, how the state fades, what keys are multiplied by, what the state counts in an exclusive read, and the token's
        own key; and exp(-m) and m before the first token and after each.  None stands for -inf."""
        import flint

        nothing, zero = flint.arb("-inf"), flint.arb(0)
        one = (1, self.n_tokens, 1, 1)
        gates = np.broadcast_to(self._of_state(InBalls, self.gate, b, g), one).reshape(-1).tolist() if self.n_tokens else []
        fades = [zero] * self.n_tokens
        if self.decay and self.n_tokens:
            fades = np.broadcast_to(self._of_state(InBalls, self.decay, b, g), one).reshape(-1).tolist()
        top = flint.arb(float(self._initial(self.rule.maximum, b, g, 1)[0, 0]))
        found: tuple[list[Any], ...] = ([], [], [], [], [flint.arb("inf") if _is_nothing(top) else (-top).exp()], [top])
        for gate, fade in zip(gates, fades, strict=True):
            faded = nothing if _is_nothing(top) or _is_nothing(fade) else fade + top
            beside = _larger(top, gate)
            now = _larger(faded, gate)
            row = [_relative(faded, now), _relative(gate, now), _relative(top, beside), _relative(gate, beside)]
            row += [flint.arb("inf") if _is_nothing(now) else (-now).exp(), now]
            for x, part in zip(row, found, strict=True):
                part.append(x)
            top = now
        return tuple(_array(part) for part in found)

    # ---- shapes --------------------------------------------------------------------------------------------------------------------

    def square(self, axes: str) -> tuple[int, ...]:
        """Places of a carried array's axes in [B, H, K, V]; widths may lie in either order."""
        keys, values = (self._widths([getattr(w, part) for w in self.rule.writes]) for part in ("key", "value"))
        found: list[int] = []
        for axis in axes.split():
            is_value = axis in values and (axis not in keys or 2 in found)
            found.append(self._places.get(axis, 3 if is_value else 2))
        return tuple(found)

    def out_at(self, axes: str) -> tuple[int, ...]:
        """Places of the axes of `out` in [B, H, T, V]."""
        return tuple(min(self._places.get(axis, WIDTH), 3) for axis in axes.split())

    def _widths(self, products: list[Product]) -> set[str]:
        names = (f if isinstance(f, str) else f.operand for product in products for f in product)
        return {axis for name in names for axis in self.problem.variant.operand(name).axes.split() if axis not in self._places}

    def _initial(self, name: str, b: int, g: int, n_values: int) -> np.ndarray:
        """A carried array of a state before the first token, [K, V], or [1, 1] of a maximum."""
        full = (1, 1) if name == self.rule.maximum else (self.n_keys, n_values)
        if name not in {o.name for o in self.problem.variant.operands}:
            return np.full(full, -np.inf if name == self.rule.maximum else 0.0)
        x = self._raw(name)
        x = _spread(x, self.square(self.problem.variant.operand(name).axes), 4)
        return np.broadcast_to(x[min(b, len(x) - 1), min(g, x.shape[1] - 1)], full)

    def _raw(self, name: str) -> np.ndarray:
        operand = self.problem.variant.operand(name)
        if name not in self.problem.given:
            return np.full((1,) * len(operand.axes.split()), float(operand.absent))  # type: ignore[arg-type]
        return np.asarray(self.problem.given[name], np.float64)

    def _part(self, product_: Product, plain: bool = False) -> Part:
        factors = []
        for factor in product_:
            rule = Factor(factor) if isinstance(factor, str) else factor
            raw = self._raw(rule.operand)
            if plain:
                rule, raw = Factor(rule.operand), np.where(raw < 0.0, np.nan, raw)
            if (rule, plain) not in self._known:
                self._known[rule, plain] = Values(rule, raw, tuple(self._raw(name) for name in rule.weights))
            values = self._known[rule, plain]
            at = tuple(self._places.get(axis, WIDTH) for axis in self.problem.variant.operand(rule.operand).axes.split())
            factors.append((values, _spread(np.arange(math.prod(values.shape)).reshape(values.shape), at, 5)))
        return Part(factors)


def after_name(name: str) -> str:
    """The output that an operand of what is carried becomes."""
    return name.removeprefix("initial_")


def _is_factor(rule: Recurrence) -> bool:
    """Whether the decay is the exponential of one logarithm, which need not be taken."""
    first = rule.log_decay[0] if len(rule.log_decay) == 1 else ""
    return isinstance(first, Factor) and first.map is log and not rule.input_gate


def _spread(x: np.ndarray, at: tuple[int, ...], axes: int) -> np.ndarray:
    """x with its axes in these places among so many; the others have size 1, and axes in one place are made one."""
    sizes = [1] * axes
    for place, n in zip(at, x.shape, strict=True):
        sizes[place] *= n
    return np.transpose(x, np.argsort(at, kind="stable")).reshape(sizes) if at else x.reshape(sizes)


def folded(x: np.ndarray, at: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """An array whose axes lie in such places, as one of those sizes."""
    order = np.argsort(at, kind="stable")
    return np.transpose(x.reshape([sizes[n] for n in order]), np.argsort(order))


# ---- maxima ------------------------------------------------------------------------------------------------------------------------


def _is_nothing(x: Any) -> bool:
    return not x.is_finite() and not x.is_nan() and float(x.mid()) == -math.inf


def _larger(x: Any, y: Any) -> Any:
    return y if _is_nothing(x) else x if _is_nothing(y) else x.max(y)


def _relative(x: Any, top: Any) -> Any:
    """exp(x - top), 0 where there is nothing."""
    return type(x)(0) if _is_nothing(x) else (x - top).exp()


def _array(x: list[Any]) -> Any:
    found = np.empty(len(x), object)
    found[:] = x
    return found


# ---- refusals ----------------------------------------------------------------------------------------------------------------------


def reason_against(problem: Problem, rule: Recurrence) -> str:
    """What has no enclosure here, or the empty string."""
    products = [rule.query, rule.log_decay, rule.bonus, rule.skip, rule.input_gate, *(p for w in rule.writes for p in (w.key, w.value, w.erase))]
    factors = [f for product_ in products for f in product_ if isinstance(f, Factor)]
    unknown = [f.map.__name__.rpartition(".")[2] for f in factors if f.map is not None and not maps.has(f.map)]
    names = ["out", rule.initial, *([rule.mass] if rule.normalizer else []), *([rule.maximum] if rule.input_gate else [])]
    known = [after_name(name) for name in names]
    others = [name for name in problem.returns if name not in known]
    needs_balls = bool(rule.input_gate) or any(f.map is not None for f in (() if _is_factor(rule) else factors))
    reasons = {
        f"{type(problem.sequences).__name__} sequences have no enclosure; pass one sequence at a time": problem.sequences is not None,
        f"the map {unknown[0] if unknown else ''!r} has no enclosure": bool(unknown),
        f"{others[0] if others else ''} has no enclosure; {', '.join(known)} have": bool(others),
        "an exclusive read of several writes has no enclosure": rule.exclusive and (len(rule.writes) > 1 or bool(rule.steps)),
        "an exclusive read of fewer or more keys has no enclosure": rule.exclusive and problem.dims.get("S") not in (None, problem.dims["T"]),
        "an exclusive read with an input gate and eps has no enclosure": rule.exclusive and bool(rule.input_gate) and rule.eps != 0.0,
        "its maps need python-flint, which is not installed (pip install 'refattn[exact]')": needs_balls and not balls.available(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
