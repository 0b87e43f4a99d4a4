"""A problem's recurrence as arrays: every product multiplied out, every head and token in its place."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...problem import Problem
from ...spec import Factor, Product, Recurrence, shape

BATCH, HEADS, TOKENS, WRITES, WIDTH = range(5)


@dataclass(frozen=True, eq=False)
class Lowered:
    """float64 arrays of B batches, Hq query heads that share H states, N tokens, R writes a token, states [K, V].

    Attributes
    ----------
    q : ndarray
        [B, Hq, N, K]; rows that are no query are 0.
    b, w, e : ndarray
        Keys, values and erasures of the writes: [B, H, N, R, K], [B, H, N, R, V], [B, H, N, R, K].
    valued, erases, old : ndarray of bool
        By write: whether it has a value, an erasure, and one that reads the state as it was.
    g : ndarray
        Logarithm of the decay, [B, H, N, K], or [B, H, N, 1] where all rows fade alike.
    gate : ndarray or None
        Logarithm of the input gate, [B, H, N]; then a running maximum is carried.
    u : ndarray or None
        Bonus, [B, H, N, K].
    skip : ndarray or None
        Added to the output, [B, Hq, T, V].
    state, mass, maximum : ndarray
        Before the first token: [B, H, K, V], [B, H, K], [B, H].
    reads, wrote : slice
        Which tokens are queries, and which are keys.
    scale : float
    """

    q: np.ndarray
    b: np.ndarray
    w: np.ndarray
    e: np.ndarray
    valued: np.ndarray
    erases: np.ndarray
    old: np.ndarray
    g: np.ndarray
    gate: np.ndarray | None
    u: np.ndarray | None
    skip: np.ndarray | None
    state: np.ndarray
    mass: np.ndarray
    maximum: np.ndarray
    reads: slice
    wrote: slice
    scale: float
    rule: Recurrence = field(repr=False)

    @property
    def tokens(self) -> int:
        return int(self.q.shape[2])


@dataclass(frozen=True)
class Moved:
    """How operands that go through a map are moved, for the errors of its evaluation: by one rounding of each number, of random sign."""

    rng: np.random.Generator
    unit: float
    function: float  #: relative error of the map's result

    def __call__(self, x: np.ndarray, unit: float) -> np.ndarray:
        return x * (1 + unit * self.rng.choice((-1.0, 1.0), x.shape))


def operand(problem: Problem, name: str) -> np.ndarray:
    """An operand in float64; one that was not given is its neutral element, every axis of size 1."""
    declared = problem.variant.operand(name)
    if name not in problem.given:
        return np.full((1,) * len(declared.axes.split()), declared.absent, np.float64)
    return np.asarray(problem.given[name], np.float64)


def places_of(rule: Recurrence) -> dict[str, int]:
    """Which of the five axes an axis of that name is; every other is a width."""
    heads = (rule.heads,) if rule.heads else ("Hq", "Hkv", "H", "G")
    return {"B": BATCH, **dict.fromkeys(heads, HEADS), "T": TOKENS, "S": TOKENS, **({rule.steps: WRITES} if rule.steps else {})}


def _spread(x: np.ndarray, at: tuple[int, ...], axes: int) -> np.ndarray:
    """x with its axes in these places among so many, those in one place made one; the others have size 1."""
    sizes = [1] * axes
    for place, n in zip(at, x.shape, strict=True):
        sizes[place] *= n
    return np.transpose(x, np.argsort(at, kind="stable")).reshape(sizes) if at else x.reshape(sizes)


class Lowering:
    """The products of one problem.

    Parameters
    ----------
    problem : Problem
    rule : Recurrence
        The problem's, or a wrong one.
    tiled : bool
        Whether query head h reads state h mod H instead of h // (Hq / H).
    moved : Moved, optional
        Whether what goes through a map is rounded on the way.
    """

    def __init__(self, problem: Problem, rule: Recurrence, tiled: bool = False, moved: Moved | None = None) -> None:
        self.problem, self.rule, self.tiled, self.moved, self.places = problem, rule, tiled, moved, places_of(rule)

    def factor(self, factor: Factor | str) -> np.ndarray:
        """One factor over [B, heads, tokens, writes, width]."""
        rule = Factor(factor) if isinstance(factor, str) else factor
        x, piece, moved = operand(self.problem, rule.operand), rule.map, self.moved
        axes = self.problem.variant.operand(rule.operand).axes.split()
        if piece is not None:
            weights = tuple(operand(self.problem, name) for name in rule.weights)
            if moved is not None:
                along = moved.unit * np.sqrt(x.shape[-1] + 4) if weights else moved.unit
                x, weights = moved(x, along), tuple(moved(w, along) for w in weights)
            with np.errstate(all="ignore"):
                x = piece.apply(x, *rule.numbers) if hasattr(piece, "apply") else piece.features(x, *weights, *rule.numbers)
            if moved is not None:
                x = moved(x, moved.function)
                if piece.__name__.endswith("one_minus_exp"):  # the exponential is rounded before the difference
                    x = x + moved.function * moved.rng.choice((-1.0, 1.0), x.shape)
        return _spread(np.asarray(x, np.float64), tuple(self.places.get(axis, WIDTH) for axis in axes), 5)

    def product(self, product: Product) -> np.ndarray | None:
        """Factors multiplied, each repeated over the heads that share it; None of no factors."""
        factors = [self.factor(f) for f in product]
        if not factors:
            return None
        heads = max(f.shape[HEADS] for f in factors)
        found = self.heads(factors[0], heads)
        for f in factors[1:]:
            found = found * self.heads(f, heads)
        return found

    def heads(self, x: np.ndarray, heads: int) -> np.ndarray:
        """Each of x's heads as often as it is shared among so many."""
        if x.shape[HEADS] in (1, heads):
            return x
        times = heads // x.shape[HEADS]
        return np.tile(x, (1, times, 1, 1, 1)) if self.tiled else np.repeat(x, times, axis=HEADS)

    def lowered(self) -> Lowered:
        rule, problem = self.rule, self.problem
        query, decay, gate, bonus, skip = map(self.product, (rule.query, rule.log_decay, rule.input_gate, rule.bonus, rule.skip))
        writes = [(self.product(w.key), self.product(w.value), self.product(w.erase), w.old) for w in rule.writes]
        parts = [x for one in writes for x in one[:3] if x is not None]
        shared = [x for x in (decay, gate, bonus) if x is not None]
        states = max(x.shape[HEADS] for x in (*parts, *shared))
        query = np.ones((1,) * 5) if query is None else query
        every = max([states, query.shape[HEADS], *([skip.shape[HEADS]] if skip is not None else [])])
        batch = problem.dims.get("B", 1)
        n_keys = max(x.shape[WIDTH] for x in (query, *(x for one in writes for x in (one[0], one[2]) if x is not None), *shared))
        n_values = max(value.shape[WIDTH] for _, value, _, _ in writes if value is not None)
        n_queries = problem.dims["T"]
        n_writes = problem.dims.get("S", n_queries)
        if rule.causal:  # the last query is aligned with the last key
            tokens = max(n_queries, n_writes)
            reads, wrote = slice(tokens - n_queries, tokens), slice(tokens - n_writes, tokens)
        else:  # all is written before anything is read
            tokens = n_writes + n_queries
            wrote, reads = slice(0, n_writes), slice(n_writes, tokens)

        def full(x: np.ndarray | None, heads: int, where: slice, writes: int, width: int) -> np.ndarray:
            """In its place among all tokens, 0 elsewhere."""
            placed = np.zeros((batch, heads, tokens, writes, width))
            if x is not None:
                placed[:, :, where] = self.heads(x, heads)
            return placed

        keys, values, erasures, flags = [], [], [], []
        for key, value, erase, old in writes:
            n = max(x.shape[WRITES] for x in (key, value, erase) if x is not None)
            keys.append(full(key, states, wrote, n, n_keys))
            values.append(full(value, states, wrote, n, n_values))
            erasures.append(full(erase, states, wrote, n, n_keys))
            flags += [(value is not None, erase is not None, old)] * n
        valued, erases, old_ = (np.array(x) for x in zip(*flags, strict=True))

        def carried(name: str, there: bool, nothing: float, *widths: int) -> np.ndarray:
            """A carried array before the first token."""
            full = (batch, states, *widths)
            if not there or name not in problem.given:
                return np.full(full, nothing)
            at = square(problem, rule, problem.variant.operand(name).axes)
            return np.broadcast_to(_spread(operand(problem, name), at, 4).reshape(full[:2] + (-1,) * bool(widths) + widths[1:]), full)

        fades = full(decay, states, wrote, 1, 1 if decay is None else decay.shape[WIDTH])[:, :, :, 0]
        gates = None
        if gate is not None:
            gates = np.full((batch, states, tokens), -np.inf)
            gates[:, :, wrote] = self.heads(gate, states)[:, :, :, 0, 0]
        return Lowered(
            full(query, every, reads, 1, n_keys)[:, :, :, 0],
            np.concatenate(keys, axis=WRITES),
            np.concatenate(values, axis=WRITES),
            np.concatenate(erasures, axis=WRITES),
            valued,
            erases,
            old_,
            fades,
            gates,
            None if bonus is None else full(bonus, states, wrote, 1, n_keys)[:, :, :, 0],
            None if skip is None else full(skip, every, reads, 1, n_values)[:, :, reads, 0],
            carried(rule.initial, True, 0.0, n_keys, n_values),
            carried(rule.mass, bool(rule.normalizer), 0.0, n_keys),
            carried(rule.maximum, bool(rule.input_gate), -np.inf),
            reads,
            wrote,
            rule.scale,
            rule,
        )


def square(problem: Problem, rule: Recurrence, axes: str) -> tuple[int, ...]:
    """Places of a carried array's axes in [B, H, K, V]; widths may lie in either order."""
    places = places_of(rule)
    keys, values = (_widths(problem, places, [getattr(w, part) for w in rule.writes]) for part in ("key", "value"))
    found: list[int] = []
    for axis in axes.split():
        is_value = axis in values and (axis not in keys or 2 in found)
        found.append(places.get(axis, 3 if is_value else 2))
    return tuple(found)


def _widths(problem: Problem, places: dict[str, int], products: list[Product]) -> set[str]:
    names = (f if isinstance(f, str) else f.operand for product in products for f in product)
    return {axis for name in names for axis in problem.variant.operand(name).axes.split() if axis not in places}


def released(problem: Problem, rule: Recurrence, name: str, x: np.ndarray) -> np.ndarray:
    """An output of an evaluation in the variant's own axes: of [B, Hq, T, V] where it is the first, else of [B, H, K, V] or the first of these."""
    output = next(o for o in problem.variant.outputs if o.name == name)
    places = places_of(rule)
    at = tuple(min(places.get(axis, WIDTH), 3) for axis in output.axes.split()) if name == "out" else square(problem, rule, output.axes)
    order = np.argsort(at, kind="stable")
    sizes = shape(output.axes, problem.dims)
    return np.ascontiguousarray(np.transpose(x.reshape([sizes[n] for n in order]), np.argsort(order)))
