"""From a problem to a `Lowered`, and back: products of operands along axes of one name, and the gradients that come out of them.

On the way every array has the axes [B, heads, tokens, writes, width], of size 1 where an operand lacks one.

A running maximum m stands for nothing: S and n hold exp(-m) times what they stand for, and what is read does not depend on m.  So the gradient
takes every m for a constant, and adds what does depend on m: eps beside a denominator, and states that are returned with their scale.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...problem import Problem
from ...spec import Factor, Product, Recurrence, shape
from ..run import format_of
from . import maxima
from .lowered import HEADS, TOKENS, WIDTH, WRITES, Lowered, places_of

Numbers = dict[str, np.ndarray]

# ---- axes --------------------------------------------------------------------------------------------------------------------


@functools.cache
def _at(axes: str, own_heads: str, steps_axis: str) -> tuple[int, ...]:
    """The places of an operand's axes."""
    places = places_of(own_heads, steps_axis)
    return tuple(places.get(axis, WIDTH) for axis in axes.split())


def spread(x: np.ndarray, at: tuple[int, ...], axes: int) -> np.ndarray:
    """x with its axes in these places among so many; the others have size 1, and axes in one place are made one."""
    sizes = [1] * axes
    for place, n in zip(at, x.shape, strict=True):
        sizes[place] *= n
    return x.transpose(_order(at)).reshape(sizes)


def folded(x: np.ndarray, at: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """The reverse of `spread`, to an array of those sizes."""
    order = _order(at)
    return x.reshape([sizes[n] for n in order]).transpose(_order(order))


@functools.cache
def _order(at: tuple[int, ...]) -> tuple[int, ...]:
    """Axes in the order of their places."""
    return tuple(sorted(range(len(at)), key=at.__getitem__))


def repeated(x: np.ndarray, heads: int) -> np.ndarray:
    """Each head as often as it is shared among so many."""
    return x if x.shape[HEADS] in (1, heads) else np.repeat(x, heads // x.shape[HEADS], axis=HEADS)


def gathered(x: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The reverse of `repeated` and of broadcasting, for gradients: sums."""
    heads = sizes[HEADS]
    if heads not in (1, x.shape[HEADS]):
        x = x.reshape(x.shape[0], heads, x.shape[HEADS] // heads, *x.shape[2:]).sum(axis=2)
    shared = tuple(axis for axis, n in enumerate(sizes) if n == 1 and x.shape[axis] != 1)
    return x.sum(axis=shared, keepdims=True, dtype=np.float64) if shared else x


# ---- products ----------------------------------------------------------------------------------------------------------------


def numbers_of(problem: Problem, name: str, format_: np.dtype) -> np.ndarray:
    """An operand in the kernels' format; one that was not given is its neutral element, every axis of size 1."""
    operand = problem.variant.operand(name)
    if name not in problem.given:
        return np.full((1,) * len(operand.axes.split()), operand.absent, format_)
    if problem.given[name].dtype == format_:
        return problem.given[name]
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(problem.given[name], format_)


class Mapped:
    """An operand in a product: its values through the map, and gradients back through it."""

    def __init__(self, factor: Factor | str, problem: Problem, rule: Recurrence, format_: np.dtype) -> None:
        self.rule = Factor(factor) if isinstance(factor, str) else factor
        self.at = _at(problem.variant.operand(self.rule.operand).axes, rule.heads, rule.steps)
        self.raw = numbers_of(problem, self.rule.operand, format_)
        self.weights = tuple(numbers_of(problem, name, format_) for name in self.rule.weights)
        mapped, piece, numbers = self.raw, self.rule.map, self.rule.numbers
        if piece is not None:
            with np.errstate(all="ignore"):
                mapped = piece.apply(mapped, *numbers) if hasattr(piece, "apply") else piece.features(mapped, *self.weights, *numbers)
        self.values, self.sizes = spread(np.asarray(mapped, format_), self.at, 5), mapped.shape

    def gradients(self, cotangent: np.ndarray) -> Numbers:
        """Of the operand, and of what its map takes."""
        found, piece, numbers = folded(cotangent, self.at, self.sizes), self.rule.map, self.rule.numbers
        if piece is None:
            return {self.rule.operand: found}
        with np.errstate(all="ignore"):
            if hasattr(piece, "slope"):
                return {self.rule.operand: found * piece.slope(self.raw, *numbers)}
            names = (self.rule.operand, *self.rule.weights)
            return dict(zip(names, piece.pullback(found, self.raw, *self.weights, *numbers), strict=True))


class Multiplied:
    """Factors multiplied, each repeated over the heads that share it."""

    def __init__(self, product: Product, problem: Problem, rule: Recurrence, format_: np.dtype) -> None:
        self.factors = [Mapped(factor, problem, rule, format_) for factor in product]
        self.sizes = tuple(map(max, zip(*(f.values.shape for f in self.factors), strict=True))) or (1, 1, 1, 1, 1)

    def values(self, heads: int) -> np.ndarray:
        """Over so many heads; an axis that no factor has is of size 1."""
        found = repeated(self.factors[0].values, heads)
        for factor in self.factors[1:]:
            found = found * repeated(factor.values, heads)
        return found

    def gradients(self, cotangent: np.ndarray, into: Numbers) -> None:
        """Add those of the operands; the cotangent has every axis in full."""
        for n, factor in enumerate(self.factors):
            own = cotangent
            for other in self.factors[:n] + self.factors[n + 1 :]:
                own = own * repeated(other.values, cotangent.shape[HEADS])
            for name, x in factor.gradients(gathered(own, factor.values.shape)).items():
                into[name] = into[name] + x if name in into else x


@dataclass(frozen=True)
class _Write:
    """The products of one write, and which of a token's writes are its."""

    key: Multiplied
    value: Multiplied
    erase: Multiplied
    where: slice


# ---- a problem ---------------------------------------------------------------------------------------------------------------


class Lowering:
    """One dense problem, lowered.

    Parameters
    ----------
    problem : Problem
        One that `run.reason_against` has nothing against.

    Attributes
    ----------
    lowered : Lowered
        What the forms of a recurrence take.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.recurrence is not None
        self.problem, self.rule, self.format = problem, problem.recurrence, format_of(problem)
        rule, self.places = self.rule, places_of(self.rule.heads, self.rule.steps)
        self.query, self.decay, self.fade, self.gate, self.bonus, self.skip = map(
            self._product, (rule.query, rule.log_decay, rule.log_value_decay, rule.input_gate, rule.bonus, rule.skip)
        )
        self.writes: list[_Write] = []
        for write in rule.writes:
            parts = self._product(write.key), self._product(write.value), self._product(write.erase)
            first = self.writes[-1].where.stop if self.writes else 0
            self.writes.append(_Write(*parts, slice(first, first + max(p.sizes[WRITES] for p in parts))))
        self.batch = problem.dims.get("B", 1)
        keyed = [self.decay, self.bonus, *(p for w in self.writes for p in (w.key, w.erase))]
        written = [*keyed, self.fade, self.gate, *(w.value for w in self.writes)]
        self.states = max(p.sizes[HEADS] for p in written)
        self.heads = max(self.states, self.query.sizes[HEADS], self.skip.sizes[HEADS])
        self.n_keys = max(p.sizes[WIDTH] for p in (self.query, *keyed))
        self.n_values = max(w.value.sizes[WIDTH] for w in self.writes)
        n_queries = problem.dims["T"]
        n_writes = problem.dims.get("S", n_queries)
        self.written_first = not rule.causal and not rule.input_gate
        if rule.causal:  # the last query is aligned with the last key
            self.tokens = max(n_queries, n_writes)
            self.reads, self.wrote = (slice(self.tokens - n, self.tokens) for n in (n_queries, n_writes))
        elif self.written_first:
            self.tokens = max(n_queries, n_writes)
            self.wrote, self.reads = slice(0, n_writes), slice(0, n_queries)
        else:  # that is so too, but states fade
            self.tokens = n_writes + n_queries
            self.wrote, self.reads = slice(0, n_writes), slice(n_writes, self.tokens)
        self.widths = tuple(self._widths([getattr(w, part) for w in rule.writes]) for part in ("key", "value"))
        self.lowered = self._lower()

    def outputs(self, out: np.ndarray, state: np.ndarray) -> Numbers:
        """All outputs of the variant that a recurrence has, of what one of its forms found."""
        rule, read = self.rule, out[:, :, self.reads]
        found: Numbers = {}
        if rule.normalizer:
            read, found[_after(rule.mass)], state = self._divided(read)[0], state[..., -1:], state[..., :-1]
        if rule.skip:
            read = read + self._full(self.skip, self.heads, 1, self.n_values)[:, :, :, 0]
        found[_after(rule.initial)] = state
        if rule.input_gate:
            found[_after(rule.maximum)] = self.maxima[:, :, -1:, None]
        places = {o.name: self._square(o.axes) for o in self.problem.variant.outputs if o.name in found} | {"out": self.out_at()}
        shapes = {o.name: shape(o.axes, self.problem.dims) for o in self.problem.variant.outputs}
        return {name: folded(x, places[name], shapes[name]) for name, x in {"out": read, **found}.items() if name in places}

    def home(self, homes: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray] | None:
        """The output that the state is, and its array as [B, H, K, V], where the kernels can update it in its place."""
        name = _after(self.rule.initial)
        x = self.problem.given.get(self.rule.initial)
        if x is None or homes.get(name) is not x or x.dtype != self.format or not x.flags.c_contiguous:
            return None
        square = spread(x, self._square(self.problem.variant.operand(self.rule.initial).axes), 4)
        if square.shape != self.lowered.S0.shape or not square.flags.c_contiguous or not np.shares_memory(square, x):
            return None
        return name, square

    # ---- forward ---------------------------------------------------------------------------------------------------------------------

    def _lower(self) -> Lowered:
        rule = self.rule
        q = self._placed(self._full(self.query, self.heads, 1, self.n_keys), self.reads)[:, :, :, 0]
        b, values = self._writes("key", self.n_keys), self._writes("value", self.n_values)
        e = self._writes("erase", self.n_keys) if any(w.erase.factors for w in self.writes) else None
        g = self._full(self.decay, self.states, 1, self.decay.sizes[WIDTH])[:, :, :, 0] if rule.log_decay else None
        u = self._full(self.bonus, self.states, 1, self.n_keys)[:, :, :, 0] if rule.bonus else None
        f = self._full(self.fade, self.states, 1, self.n_values)[:, :, :, 0] if rule.log_value_decay else None
        initial = self._initial(rule.initial, self.n_values)
        if rule.input_gate:
            b, g = self._stabilised(b, g)
        if rule.normalizer:
            ones = [np.full((*values.shape[:WRITES], w.where.stop - w.where.start, 1), bool(w.value.factors), self.format) for w in self.writes]
            values = np.concatenate([values, _joined(ones)], axis=WIDTH)
            initial = np.concatenate([initial, self._initial(rule.mass, 1)], axis=3)
        g, e, u, f = (None if x is None else np.ascontiguousarray(self._placed(x, self.wrote)) for x in (g, e, u, f))
        return Lowered(
            q=np.ascontiguousarray(q),
            b=np.ascontiguousarray(self._placed(b, self.wrote)),
            w=np.ascontiguousarray(self._placed(values, self.wrote)),
            S0=np.ascontiguousarray(initial),
            g=g,
            e=e,
            u=u,
            f=f,
            old=any(w.old for w in rule.writes),
            exclusive=rule.exclusive,
            scale=1.0 if rule.normalizer else rule.scale,
            written_first=self.written_first,
        )

    def _writes(self, part: str, width: int) -> np.ndarray:
        """Keys, values or what erases of all writes of a token."""
        return _joined([self._full(getattr(w, part), self.states, w.where.stop - w.where.start, width) for w in self.writes])

    def _product(self, product: Product) -> Multiplied:
        return Multiplied(product, self.problem, self.rule, self.format)

    def _full(self, product: Multiplied, heads: int, writes: int, width: int) -> np.ndarray:
        """A product's values with every axis in full; of no factors 0, but 1 for queries and keys."""
        part = self.reads if product in (self.query, self.skip) else self.wrote
        is_one = product is self.query or any(product is w.key for w in self.writes)
        values = product.values(heads) if product.factors else np.full((1, 1, 1, 1, 1), is_one, self.format)
        full = (self.batch, heads, part.stop - part.start, writes, width)
        return values if values.shape == full else np.broadcast_to(values, full)

    def _placed(self, x: np.ndarray, where: slice) -> np.ndarray:
        """Tokens in their places among all of them; 0 elsewhere."""
        if x.shape[TOKENS] == self.tokens or self.written_first:
            return x
        padded = np.zeros((*x.shape[:TOKENS], self.tokens, *x.shape[TOKENS + 1 :]), self.format)
        padded[:, :, where] = x
        return padded

    def _initial(self, name: str, n_values: int) -> np.ndarray:
        """A carried array before the first token, [B, H, K, V]; 0 where the variant has none."""
        full = (self.batch, self.states, self.n_keys, n_values)
        if name not in {o.name for o in self.problem.variant.operands}:
            return np.zeros(full, self.format)
        x = numbers_of(self.problem, name, self.format)
        return np.broadcast_to(spread(x, self._square(self.problem.variant.operand(name).axes), 4), full)

    def out_at(self) -> tuple[int, ...]:
        """Places of the axes of `out` in [B, Hq, T, V]."""
        return tuple(min(self.places.get(axis, WIDTH), 3) for axis in next(o.axes for o in self.problem.variant.outputs if o.name == "out").split())

    def _square(self, axes: str) -> tuple[int, ...]:
        """Places of a carried array's axes in [B, H, K, V]; widths may lie in either order."""
        keys, values = self.widths
        found: list[int] = []
        for axis in axes.split():
            is_value = axis in values and (axis not in keys or 2 in found)
            found.append(self.places.get(axis, 3 if is_value else 2))
        return tuple(found)

    def _widths(self, products: list[Product]) -> set[str]:
        names = (f if isinstance(f, str) else f.operand for product in products for f in product)
        return {axis for name in names for axis in self.problem.variant.operand(name).axes.split() if axis not in self.places}

    def _stabilised(self, b: np.ndarray, g: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Keys and decays that hold the state at exp(-m) times what it stands for."""
        self.gates = np.ascontiguousarray(self._full(self.gate, self.states, 1, 1)[:, :, :, 0, 0])
        self.fades = np.zeros_like(self.gates) if g is None else np.ascontiguousarray(g[..., 0])
        first = np.full((self.batch, self.states), -np.inf, self.format)
        if self.rule.maximum in self.problem.given:
            first[...] = self._initial(self.rule.maximum, 1)[:, :, 0, 0]
        self.maxima = maxima.running(self.fades, self.gates, first)
        before, after = self.maxima[..., :-1], np.where(np.isneginf(self.maxima[..., 1:]), 0.0, self.maxima[..., 1:]).astype(self.format)
        self.raised = np.exp(self.gates - after)[..., None, None]
        return b * self.raised, (self.fades + before - after)[..., None]

    def _divided(self, read: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What was read, divided; the divisor; its slope in the mass that was read; and how much of it, relatively, grows with m."""
        rule, mass = self.rule, read[..., -1:]
        eps = self.format.type(rule.eps)
        if rule.normalizer == "sum":
            divisor, slope, own = mass + eps, np.ones_like(mass), np.full_like(mass, eps)
        elif rule.normalizer == "clamp":
            divisor, slope = np.maximum(mass, eps), (mass > eps).astype(self.format)
            own = np.where(mass > eps, 0.0, eps)
        else:
            floor = np.exp(-self.maxima[:, :, 1:])
            floor = np.repeat(floor, self.heads // self.states, axis=HEADS)[:, :, self.reads, None]
            divisor, slope = np.maximum(np.abs(mass), floor) + eps, np.where(np.abs(mass) > floor, np.sign(mass), 0.0)
            own = np.full_like(mass, eps)
        nothing = divisor == 0.0
        divisor = np.where(nothing, 1.0, divisor).astype(self.format)
        out = read[..., :-1] / divisor if rule.scale == 1.0 else self.format.type(rule.scale) * read[..., :-1] / divisor
        if nothing.any():
            out = np.where(nothing, 0.0, out)
        return out, np.where(nothing, np.inf, divisor), slope, own / divisor

    # ---- backward --------------------------------------------------------------------------------------------------------------------

    @property
    def needs_outputs(self) -> bool:
        """Whether `cotangents` has to be given what a form found."""
        return bool(self.rule.normalizer or self.rule.input_gate)

    def cotangents(self, given: Mapping[str, np.ndarray], found: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        """Those of what a form finds, out and state, from those of the variant's outputs; to be followed by `gradients`."""
        rule, full = self.rule, (self.batch, self.heads, self.reads.stop - self.reads.start, self.n_values)
        d_read = np.zeros(full, self.format)
        if "out" in given:
            d_read = spread(np.asarray(given["out"], self.format), self.out_at(), 4).reshape(full)
        d_state = self._carried(given, rule.initial, (self.batch, self.states, self.n_keys, self.n_values))
        self.d_read = d_read
        if found is not None:
            d_read, d_state = self._undivided(given, d_read, d_state, *found)
        return np.ascontiguousarray(self._placed(d_read, self.reads), self.format), np.ascontiguousarray(d_state, self.format)

    def _undivided(
        self, given: Mapping[str, np.ndarray], d_out: np.ndarray, d_state: np.ndarray, out: np.ndarray, state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cotangents of sums and their mass, of both together; and `own`, what outputs do depend on every m."""
        rule, value = self.rule, out[:, :, self.reads]
        d_read, growth = d_out, np.ones((1, 1, 1, 1))
        if rule.normalizer:
            value, divisor, slope, growth = self._divided(value)
            d_mass = -np.sum(d_out * value, axis=3, keepdims=True) / divisor * slope
            d_read = np.concatenate([self.format.type(rule.scale) * d_out / divisor, d_mass], axis=3)
            d_state = np.concatenate([d_state, self._carried(given, rule.mass, (*d_state.shape[:3], 1))], axis=3)
        if rule.input_gate:
            self.own = np.zeros(self.maxima.shape)
            through = -np.sum(d_out * value, axis=3) * growth[..., 0]
            self.own[..., 1:] += through.reshape(self.batch, self.states, -1, self.tokens).sum(axis=2)
            self.own[..., -1] -= np.sum(d_state * state, axis=(2, 3))
            self.own[..., -1] += self._carried(given, rule.maximum, (*d_state.shape[:2], 1, 1))[..., 0, 0]
        return d_read, d_state

    def gradients(self, found: Lowered) -> Numbers:
        """Of every real operand that was given, by ``d_<operand>``, from those of the arrays of `lowered`."""
        rule, into = self.rule, dict[str, np.ndarray]()
        self.query.gradients(found.q[:, :, self.reads, None], into)
        if rule.skip:
            self.skip.gradients(self.d_read[:, :, :, None], into)
        d_b, d_w, d_initial = found.b[:, :, self.wrote], found.w[:, :, self.wrote, :, : self.n_values], found.S0
        d_g = np.zeros(0) if found.g is None else found.g[:, :, self.wrote]
        if rule.input_gate:
            d_b, d_g = self._unstabilised(d_b, d_g, into)
        for w in self.writes:
            w.key.gradients(d_b[:, :, :, w.where], into)
            w.value.gradients(d_w[:, :, :, w.where], into)
            if found.e is not None:
                w.erase.gradients(found.e[:, :, self.wrote, w.where], into)
        if rule.log_decay:
            self.decay.gradients(d_g[:, :, :, None], into)
        if found.f is not None:
            self.fade.gradients(found.f[:, :, self.wrote, None], into)
        if found.u is not None:
            self.bonus.gradients(found.u[:, :, self.wrote, None], into)
        into[rule.initial] = self._given(rule.initial, d_initial[..., : self.n_values])
        if rule.normalizer:
            into[rule.mass] = self._given(rule.mass, d_initial[..., -1:])
        real = {o.name for o in self.problem.variant.operands if o.kind == "real"}
        return {"d_" + name: np.asarray(into.get(name, np.zeros(x.shape))).reshape(x.shape) for name, x in self.problem.given.items() if name in real}

    def _carried(self, given: Mapping[str, np.ndarray], name: str, sizes: tuple[int, ...]) -> np.ndarray:
        """The cotangent of a carried array, [B, H, K, V]; 0 where there is none."""
        output = _after(name)
        if output not in given:
            return np.zeros(sizes, self.format)
        axes = next(o.axes for o in self.problem.variant.outputs if o.name == output)
        return spread(np.asarray(given[output], self.format), self._square(axes), 4)

    def _given(self, name: str, d_initial: np.ndarray) -> np.ndarray:
        """The gradient of a carried array, in the axes of its operand."""
        if name not in self.problem.given:
            return np.zeros(())
        return folded(d_initial, self._square(self.problem.variant.operand(name).axes), self.problem.given[name].shape)

    def _unstabilised(self, d_b: np.ndarray, d_g: np.ndarray, into: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """Gradients of keys and decays from those of what `_stabilised` made of them; adds those of the gate and of m before the first token."""
        b = self.lowered.b[:, :, self.wrote]
        d_fades = np.ascontiguousarray(d_g[..., 0], np.float64)
        d_gates = np.asarray(np.sum(d_b * b, axis=(3, 4), dtype=np.float64))
        d_first = d_fades[..., 0].copy() if self.tokens else np.zeros(self.maxima.shape[:2])
        maxima.unrun(self.fades, self.gates, self.maxima, self.own, d_fades, d_gates, d_first)
        self.gate.gradients(d_gates[..., None, None], into)
        if self.rule.maximum in self.problem.given:
            into[self.rule.maximum] = d_first
        return d_b * self.raised, d_fades[..., None]


def _joined(writes: list[np.ndarray]) -> np.ndarray:
    """All writes of a token, of each one's."""
    return writes[0] if len(writes) == 1 else np.concatenate(writes, axis=WRITES)


def _after(name: str) -> str:
    """The output that an operand of what is carried becomes."""
    return name.removeprefix("initial_")
