"""Which calls to ask: shapes where implementations differ, values that excite what is otherwise invisible, parameters one by one and together.

A probe is one call.  A suite is a list of them, made from the variant's declarations and from what the candidate says it takes; what it
cannot be asked is listed too, because a pass means nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import definition, precision
from ..candidate import Candidate
from ..catalog import unknown
from ..errors import ParameterError, UnknownVariantError
from ..foreign import as_numpy
from ..problem import bind
from ..spec import Dims, Operand, Plan, Product, Variant, Window, every_size, shape
from . import designs
from .cotangents import SMALL, with_cotangents
from .designs import Design
from .recurrences import roles

SUITES = ("quick", "standard", "full")

#: Poison for what must not be read: larger than anything that may be, small enough that no score overflows in float16.
_HIDDEN_KEY, _HIDDEN_VALUE = 700.0, 30000.0


@dataclass(frozen=True)
class Probe:
    """One call.

    Attributes
    ----------
    title : str
        What it is for.
    operands : mapping of str to ndarray
        BHTD, in the dtype under test.
    params : mapping
        Values of parameters, those left out at their default.
    examines : tuple of str
        Features the verdict of this call speaks about.
    decides : bool
        Whether disagreement is a failure, or an observation (`note` says what it means).
    repeatable : bool
        Whether the same operands, read from a file, make the same call; not where strides or earlier calls are the point.
    repeats : int
        How often the call is made again; every answer must be the same to the last bit.
    cotangents : mapping of str to ndarray
        By output, in the format the output is stored in; gradients for them are asked for too.
    cut : int
        After how many tokens the call is cut in two, the second part carried on by what the first returns; 0 if it is one.
    """

    title: str
    operands: Mapping[str, np.ndarray]
    params: Mapping[str, Any] = field(default_factory=dict)
    examines: tuple[str, ...] = ()
    decides: bool = True
    note: str = ""
    repeatable: bool = True
    repeats: int = 0
    cotangents: Mapping[str, np.ndarray] = field(default_factory=dict)
    cut: int = 0


@dataclass(frozen=True)
class Suite:
    """Probes, and features that could not be probed with the reason."""

    probes: tuple[Probe, ...]
    unexamined: Mapping[str, str]


def suite(name: str, variant: Variant, candidate: Candidate, dtype: np.dtype, fixed: Mapping[str, Any], seed: int = 0) -> Suite:
    """The calls of a suite.

    Parameters
    ----------
    name : {"quick", "standard", "full"}
        quick: each shape and each feature once; standard: features on a ladder of shapes; full: three draws, and long sequences.
    variant : Variant
    candidate : Candidate
    dtype : dtype
        Of the real operands.
    fixed : mapping
        Parameters that keep one value throughout.
    """
    if name not in SUITES:
        raise UnknownVariantError(unknown("suite", name, SUITES))
    rounds = 3 if name == "full" else 1
    maker = _Maker(variant, candidate, dtype, dict(fixed))
    probes = [p for r in range(rounds) for p in maker.probes(name, np.random.default_rng(seed + r))]
    return Suite(tuple(_differentiated(probes, maker, seed)), maker.unexamined)


def pool(variant: Variant, candidate: Candidate, dtype: np.dtype, seed: int = 0) -> tuple[Probe, ...]:
    """One call of every design there is, from which suites are chosen."""
    maker = _Maker(variant, candidate, dtype, {})
    probes = [*maker.designed(designs.POOL, np.random.default_rng(seed)), *maker.tokens("full")]
    return tuple(_differentiated(probes, maker, seed))


def on_inputs(variant: Variant, candidate: Candidate, dtype: np.dtype, fixed: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> Suite:
    """Calls on given operands: as they are, then with every parameter that the candidate takes at each of its other values."""
    names = [o.name for o in variant.operands]
    for name in inputs:
        if name not in names:
            raise ParameterError(f"{variant.name}: {unknown('operand', name, names)}")
    maker = _Maker(variant, candidate, dtype, dict(fixed))
    operands = {name: as_numpy(x, f"{variant.name}: {name}") for name, x in inputs.items()}
    for name, x in operands.items():
        if variant.operand(name).kind == "real" and precision.is_real(x.dtype):  # anything else is refused at the door
            operands[name] = precision.round_to(x.astype(np.float64), dtype)
    probes = [Probe("the given operands", operands, maker.params({}), ("given operands",))]
    for title, params in maker.settings():
        probes.append(Probe(f"the given operands, {title}", operands, maker.params(params), ("given operands", *params)))
    return Suite(tuple(_differentiated(probes, maker, 0)), maker.unexamined)


def _differentiated(probes: list[Probe], maker: _Maker, seed: int) -> list[Probe]:
    """The same calls, asked for gradients too where the candidate has any."""
    if maker.candidate.gradients is None:
        return probes
    rng = np.random.default_rng([seed, 1])  # beside the operands' generator, which they are drawn from with or without gradients

    def small() -> Iterator[Probe]:
        for title, chosen in ((("small", {})), *maker.settings()):
            yield Probe(f"{title}, small", maker.operands(rng, SMALL), maker.params(chosen), tuple(chosen))
        for o in maker.optional:
            yield Probe(f"with {o.name}, small", maker.operands(rng, SMALL, (o.name,)), maker.params({}), (o.name,))

    return with_cotangents(probes, maker.variant, maker.candidate, rng, small)


#: Sizes that differ along every axis, none a power of two but where it must be.
_BASE: Dims = {"B": 2, "Hq": 4, "Hkv": 2, "T": 24, "S": 40, "D": 12, "E": 12, "Dq": 12, "Dk": 10, "A": 9, "M": 22, "L": 12}

#: Sizes of calls in which tokens are the point.
_FEW: Dims = {"B": 1, "Hq": 2, "Hkv": 1, "D": 8, "E": 8, "F": 8, "M": 6}

#: (why, sizes): what the quick suite asks.
_SHAPES: tuple[tuple[str, Dims], ...] = (
    ("fewer queries than keys", {}),
    ("values wider than keys", {"E": 20}),
    ("more queries than keys", {"T": 41, "S": 23, "D": 16, "E": 16}),
    ("square, odd lengths", {"B": 1, "Hq": 3, "Hkv": 3, "T": 131, "S": 131, "D": 20, "E": 20}),
    ("one query, one key-value head", {"B": 1, "Hq": 7, "Hkv": 1, "T": 1, "S": 65, "D": 16, "E": 16}),
    ("one key", {"T": 3, "S": 1}),
    ("no keys", {"T": 3, "S": 0}),
    ("no queries", {"T": 0, "S": 5}),
)

#: Lengths around the edges of tiles and vectors, for the longer suites.
_LADDER: tuple[Dims, ...] = (
    *({"B": 1, "Hq": 2, "Hkv": 1, "T": n, "S": n, "D": 8, "E": 8} for n in (1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 129)),
    {"T": 7, "S": 64, "D": 32, "E": 32},
    {"T": 64, "S": 7, "D": 32, "E": 32},
    {"B": 3, "Hq": 7, "Hkv": 1, "T": 9, "S": 33, "D": 40, "E": 40},
    {"B": 1, "Hq": 14, "Hkv": 2, "T": 19, "S": 50, "D": 72, "E": 72},
    {"B": 1, "Hq": 1, "Hkv": 1, "T": 33, "S": 70, "D": 1, "E": 1},
    {"B": 1, "Hq": 2, "Hkv": 2, "T": 33, "S": 70, "D": 64, "E": 128},
    {"B": 1, "Hq": 2, "Hkv": 2, "T": 33, "S": 70, "D": 128, "E": 64},
    {"B": 0, "T": 3, "S": 4},
)
_LONG: tuple[Dims, ...] = (
    {"B": 1, "Hq": 1, "Hkv": 1, "T": 65, "S": 4100, "D": 64, "E": 64},
    {"B": 1, "Hq": 2, "Hkv": 1, "T": 1030, "S": 1030, "D": 64, "E": 64},
)


class _Maker:
    """Makes probes for one variant and candidate."""

    def __init__(self, variant: Variant, candidate: Candidate, dtype: np.dtype, fixed: dict[str, Any]) -> None:
        self.variant, self.candidate, self.dtype, self.fixed = variant, candidate, dtype, fixed
        self.optional = [o for o in variant.operands if o.optional and o.name in candidate.operands]
        self.unexamined = {o.name: "takes no such operand" for o in variant.operands if o.optional and o not in self.optional}
        free = [p for p in variant.params if p.tries and p.name not in fixed]
        self.unexamined |= {p.name: "takes no such parameter" for p in free if p.name not in candidate.params}
        self.tries = {p.name: tuple(v for v in p.tries if candidate.words or not isinstance(v, str)) for p in free if p.name in candidate.params}
        words = [f"{p.name}={v!r}" for p in free for v in p.tries if v not in self.tries.get(p.name, p.tries)]
        self.unexamined |= dict.fromkeys(words, "a value that may mean nothing to it; set it to ask")

    # ---- values ----------------------------------------------------------------------------------------------------------------

    def params(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.candidate.fixed, **self.fixed, **chosen}

    def settings(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every other value of every parameter the candidate takes, one at a time."""
        for name, values in self.tries.items():
            for value in values:
                yield f"{name}={value!r}", {name: value}

    def one_sided(self) -> Iterator[tuple[str, tuple[int | None, int | None]]]:
        """Windows with one bound: a missing one is none, and neither 0 nor the other."""
        for name, values in self.tries.items():
            if values and isinstance(self.variant.param(name).kind, Window):
                yield from ((name, (values[0][0], None)), (name, (None, values[-1][1])))

    def dims(self, sizes: Dims) -> dict[str, int]:
        dims = every_size({**_BASE, **sizes})
        if not any("S" in o.axes.split() for o in self.variant.operands):
            dims["T"] = max(dims["T"], dims["S"])  # a variant of one sequence
        return dims

    def operands(self, rng: np.random.Generator, sizes: Dims, optional: tuple[str, ...] = (), broadcast: bool = False) -> dict[str, np.ndarray]:
        """Random ones; optional operands, where `broadcast`, of size 1 along every other axis they may be repeated along."""
        dims = self.dims(sizes)
        drawn = {}
        for o in self.variant.operands:
            if o.optional and o.name not in optional:
                continue
            full = _repeated(o, shape(o.axes, dims)) if broadcast else shape(o.axes, dims)
            if o.kind == "boolean":
                drawn[o.name] = _mask(rng, full)
            elif o.kind == "number":
                drawn[o.name] = np.asarray(o.draw(rng, full)).astype(self.dtype)
            else:
                drawn[o.name] = precision.round_to(o.draw(rng, full), self.dtype)
        return drawn

    def spread(self, operands: dict[str, np.ndarray], factor: float = 6.0) -> dict[str, np.ndarray]:
        """The first operand larger, so that scores spread and a few keys dominate each row."""
        first = next(iter(operands))
        return {**operands, first: (operands[first].astype(np.float64) * factor).astype(self.dtype)}

    # ---- probes ------------------------------------------------------------------------------------------------------------------

    def probes(self, suite: str, rng: np.random.Generator) -> Iterator[Probe]:
        settings = list(self.settings())
        yield from self.designed(designs.named(designs.QUICK), rng)
        yield from self.tokens(suite)
        if suite == "quick":
            return
        for why, sizes in _SHAPES:
            yield Probe(why, self.operands(rng, sizes), self.params({}), ("shapes",))
        yield Probe("scores spread out", self.spread(self.operands(rng, {"T": 33, "S": 70})), self.params({}), ("large scores",))
        for title, chosen in settings:
            yield Probe(title, self.spread(self.operands(rng, {}), 2.0), self.params(chosen), tuple(chosen))
        for o in self.optional:
            yield Probe(f"with {o.name}", self.operands(rng, {}, (o.name,)), self.params({}), (o.name,))
        for n, sizes in enumerate((*_LADDER, *(_LONG if suite == "full" else ()))):
            title, chosen = settings[n % len(settings)] if settings else ("", {})
            yield Probe(_spelled(sizes), self.operands(rng, sizes), self.params({}), ("shapes",))
            if chosen:
                yield Probe(f"{_spelled(sizes)}, {title}", self.spread(self.operands(rng, sizes), 2.0), self.params(chosen), ("shapes", *chosen))
        for title, chosen in settings:
            for why, sizes in _SHAPES[1:5]:
                yield Probe(f"{title}, {why}", self.spread(self.operands(rng, sizes), 2.0), self.params(chosen), tuple(chosen))
        for o in self.optional:
            for title, chosen in settings:
                operands = self.operands(rng, {"T": 30, "S": 45}, (o.name,))
                yield Probe(f"{title} with {o.name}", operands, self.params(chosen), (*chosen, o.name))
        yield Probe("the same call several times", self.operands(rng, _SHAPES[3][1]), self.params({}), ("the same answer every time",), repeats=4)
        for name, window in self.one_sided():
            for why, sizes in (_SHAPES[0], _SHAPES[3]):  # some kernels have windows of square calls only
                yield Probe(f"{name}={window}, {why}", self.spread(self.operands(rng, sizes), 2.0), self.params({name: window}), (name,))

    def designed(self, asked: tuple[Design, ...], rng: np.random.Generator) -> Iterator[Probe]:
        """The calls of some designs, as far as the candidate takes what they are about, none of them twice."""
        first: dict[str, np.ndarray] | None = None
        made = set()
        for design in asked:
            chosen = design.chosen(self.tries)
            wanted = {o.name for o in self.optional} if design.operands == "all" else set(design.operands.split())
            optional = tuple(o.name for o in self.optional if o.name in wanted)
            about = design.operands != "all" and (design.params or design.operands)
            if about and not chosen and not optional:  # nothing of what it is about is taken
                continue
            sizes = {axis: n for axis, n in self.dims(design.sizes).items() if axis in self.variant.axes}
            key = (tuple(sorted(sizes.items())), repr(sorted(chosen.items())), optional, design.factor, design.level, design.kind)
            if key in made:
                continue
            made.add(key)
            examines = (*design.examines, *chosen, *optional)
            if design.kind == "emptied":
                yield from self.emptied(rng)
            elif design.kind == "poisoned":
                yield from self.poisoned(rng)
            elif design.kind == "again":
                if first is not None:
                    yield Probe(design.title, first, self.params({}), examines, repeatable=False)
            elif design.level:
                far = self.far_from_zero(rng, design.level)
                if far is not None:
                    yield Probe(design.title, far, self.params(chosen), examines)
            else:
                operands = self.operands(rng, design.sizes, optional, broadcast=design.kind == "broadcast")
                operands = self.spread(operands, design.factor) if design.factor != 1.0 else operands
                strided = design.kind == "strided"  # new values in the first call's shapes: a stale result shows too
                operands = {n: _strided(x) for n, x in operands.items()} if strided else operands
                first = operands if first is None else first
                yield Probe(design.title, operands, self.params(chosen), examines, repeatable=not strided)

    def tokens(self, suite: str) -> Iterator[Probe]:
        """Calls of a recurrence, around the edges of chunks and with values that random ones never take."""
        variant = self.variant
        if variant.recurrence is None:
            return
        names = [n for n in ("initial_" + name for name in variant.carried) if n in self.candidate.operands]
        whole = len(names) == len(variant.carried) and set(variant.carried) <= set(self.candidate.returns) and "S" not in variant.axes
        if variant.carried and not whole:
            self.unexamined["a sequence carried on"] = f"it does not take and return all of {', '.join(variant.carried)}"
        rng = np.random.default_rng(7)  # apart, so that other calls stay as they are
        for design in designs.TOKENS:
            if (design.cut and not (whole and names)) or (suite == "quick" and design.title not in designs.QUICK_TOKENS):
                continue
            operands = self.operands(rng, {**_FEW, "T": design.tokens, "S": design.tokens}, tuple(names) if design.carried else ())
            changed = self._as_designed(design, operands, rng)
            if changed is not None:
                examines = ("a sequence carried on",) if design.cut else ("chunks of tokens",)
                yield Probe(design.title, changed, self.params({}), examines, repeatable=not design.cut, cut=design.cut)

    def _as_designed(self, design: designs.Tokens, operands: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        """Operands changed as a design says; None where the variant has nothing of what it is about."""
        variant = self.variant
        assert variant.recurrence is not None
        rule = bind(variant, (), {**operands, **self.params({})}).recurrence
        assert rule is not None
        key, value = (roles.wide(variant, rule, p) for p in (rule.writes[-1].key, rule.writes[-1].value))
        found = {name: x.astype(np.float64) for name, x in operands.items()}
        if design.impulse >= 0:
            at = roles.token_axis(variant, value) if value else None
            if at is None:
                return None
            only = np.zeros(found[value].shape[at])
            only[design.impulse] = 1.0
            found[value] = found[value] * only.reshape([-1 if n == at else 1 for n in range(found[value].ndim)])
        if design.gate:
            if not rule.log_decay or not {roles.name_of(f) for f in rule.log_decay} <= found.keys():
                return None
            self._fading(design, found, rule.log_decay, rng)
        if design.strength >= 0.0:
            names = [n for n in roles.strengths(variant, rule) if variant.operand(n).within is None]
            if not names or not any(w.erase for w in rule.writes):
                return None
            for name in names:
                found[name] = np.full_like(found[name], design.strength)
        if design.lengths:
            for name in {key, roles.wide(variant, rule, rule.query)} - {""}:
                found[name] = found[name] * rng.uniform(0.2, 1.2, (*found[name].shape[:-1], 1))
        if design.repeated:
            at = roles.token_axis(variant, key) if key else None
            if at is None:
                return None
            found[key] = np.broadcast_to(np.take(found[key], [0], axis=at), found[key].shape)
        return {name: precision.round_to(x, operands[name].dtype) if x is not operands[name] else x for name, x in found.items()}

    def _fading(self, design: designs.Tokens, found: dict[str, np.ndarray], gates: Product, rng: np.random.Generator) -> None:
        """Logarithms of decays that are strong, nothing, or strong at one token alone."""
        factor = gates[0]
        name, piece = roles.name_of(factor), None if isinstance(factor, str) else factor.map
        at = roles.token_axis(self.variant, name)
        shape = found[name].shape
        if len(gates) == 1 and (piece is None or piece.__name__.endswith(".log")):
            logs = {"strong": -rng.uniform(5.0, 25.0, shape), "none": np.zeros(shape), "jump": np.zeros(shape)}[design.gate]
            if design.gate == "jump" and at is not None:
                logs[(slice(None),) * at + (design.at,)] = -6.0
            found[name] = logs if piece is None else np.exp(logs)
        else:  # of several factors the one that no token changes, if there is one
            names = [roles.name_of(f) for f in gates]
            constant = next((n for n in names if roles.token_axis(self.variant, n) is None), names[0])
            found[constant] = found[constant] * {"strong": 20.0, "none": 0.0, "jump": 1.0}[design.gate]

    def far_from_zero(self, rng: np.random.Generator, level: float) -> dict[str, np.ndarray] | None:
        """Queries and keys along one direction or its opposite, so that all scores are about `level`; None where they are not operands."""
        operands = self.operands(rng, {})
        if self.variant.plan is None:
            return None
        problem = bind(self.variant, (), {**operands, **self.params({})})
        plan = self.variant.plan(problem.dims, problem.params)
        if plan.projections or plan.query == plan.key or not {plan.query, plan.key} <= operands.keys():
            return None
        q, k = operands[plan.query], operands[plan.key]
        if plan.similarity.__name__.endswith("bilinear"):  # along what the map makes of a key
            return {**operands, **self._along_the_map(operands, plan, level)}
        product = min(abs(level) / (abs(plan.scale) or 1.0), precision.format_of(self.dtype).largest / 3)  # before the scale: some store that too
        factor = product / (4.0 * q.shape[-1])
        along = {plan.query: np.sign(level) * factor * (1.0 + q.astype(np.float64) / 64.0), plan.key: 4.0 + k.astype(np.float64) / 4.0}
        return {**operands, **{name: precision.round_to(x, self.dtype) for name, x in along.items()}}

    def _along_the_map(self, operands: Mapping[str, np.ndarray], plan: Plan, level: float) -> dict[str, np.ndarray]:
        """Queries and keys whose bilinear scores are about `level`."""
        q, k, matrix = (operands[name].astype(np.float64) for name in (plan.query, plan.key, plan.weights[0]))
        mapped = matrix @ np.full(k.shape[-1], 4.0)
        along = {plan.query: level / (mapped @ mapped) * mapped * (1.0 + q / 256.0), plan.key: 4.0 + k / 64.0}
        return {name: precision.round_to(x, self.dtype) for name, x in along.items()}

    def emptied(self, rng: np.random.Generator) -> Iterator[Probe]:
        """A row that sees no key, by mask where there is one, else by alignment."""
        title, examines = "a row that sees no key", ("rows that see no key",)
        alignment = dict(self.variant.causal or {})
        if "mask" in {o.name for o in self.optional}:
            operands = self.operands(rng, {}, ("mask",))
            operands["mask"][..., 1, :] = False
            yield Probe(title, operands, self.params({}), examines)
        elif alignment.keys() & self.tries.keys() and "S" in self.variant.axes:
            operands = self.operands(rng, {"T": 24, "S": 13})
            yield Probe(title, operands, self.params({n: v for n, v in alignment.items() if n in self.tries}), examines)
        elif self.variant.plan is not None or "S" in self.variant.axes:
            self.unexamined["rows that see no key"] = "no mask or alignment to empty a row with"

    def poisoned(self, rng: np.random.Generator) -> Iterator[Probe]:
        """Large numbers, then NaN, in keys and values that no query sees."""
        found = self._with_hidden_keys(rng)
        if found is None and self.variant.plan is None:  # nothing hides a key of a recurrence
            return
        if found is None:
            self.unexamined["hidden keys"] = "no mask, window or alignment to hide keys with"
            return
        operands, params, hidden, names = found
        large, nan = dict(operands), dict(operands)
        most = precision.format_of(self.dtype).largest
        for name, value in zip(names, (_HIDDEN_KEY, _HIDDEN_VALUE), strict=True):
            for poisoned, fill in ((large, min(value, most)), (nan, np.nan)):
                x = operands[name].copy()
                x[hidden] = fill
                poisoned[name] = x
        yield Probe("large numbers where hidden", large, params, ("hidden keys",))
        note = "NaN in a hidden key or value reaches the output: hidden entries are multiplied by zero, not skipped"
        yield Probe("NaN where hidden", nan, params, ("hidden keys",), decides=False, note=note)

    def _with_hidden_keys(self, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, Any], Any, tuple[str, str]] | None:
        """Operands and parameters under which some keys are seen by no query, and where they are."""
        if self.variant.plan is None:
            return None
        takes_mask = "mask" in {o.name for o in self.optional}
        ways: list[tuple[dict[str, Any], bool]] = [(c, False) for _, c in self.settings()] + ([({}, True)] if takes_mask else [])
        if self.fixed:
            ways.insert(0, ({}, False))
        for chosen, masked in reversed(ways):
            operands = self.operands(rng, {"T": 9, "S": 40}, ("mask",) if masked else ())
            if masked:
                operands["mask"][..., 25:] = False
            problem = bind(self.variant, (), {**operands, **self.params(chosen)})
            truth = definition.run(problem)
            if "scores" not in truth:
                return None
            plan = self.variant.plan(problem.dims, problem.params)
            if not {plan.key, plan.value} <= operands.keys() or plan.key == plan.value or plan.fill > -np.inf:
                return None
            scores = truth["scores"]
            hidden = np.isneginf(scores).all(axis=-2)  # (B, Hq, S) or (B, S)
            if hidden.ndim == 3:
                hidden = hidden.reshape(hidden.shape[0], operands[plan.key].shape[1], -1, hidden.shape[-1]).all(axis=2)
            if hidden.any():
                return operands, self.params(chosen), hidden, (plan.key, plan.value)
        return None


def _repeated(operand: Operand, full: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with every other axis 1, where the operand may be broadcast."""
    return tuple(n if at % 2 else min(n, 1) for at, n in enumerate(full)) if operand.broadcast else full


def _mask(rng: np.random.Generator, full: tuple[int, ...]) -> np.ndarray:
    """Random, with every query seeing at least one key: what a row that sees nothing returns is a convention, asked elsewhere."""
    mask = rng.random(full) < 0.6
    if full and full[-1]:
        mask[..., 0] = True
    return mask


def _strided(x: np.ndarray) -> np.ndarray:
    """The same values at other strides: heads and sequence swapped in memory, or every other element of a longer array."""
    if x.ndim == 4 and x.dtype != np.bool_:
        return np.ascontiguousarray(np.swapaxes(x, 1, 2)).swapaxes(1, 2)
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype) if x.ndim else x
    if x.ndim:
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def _spelled(sizes: Dims) -> str:
    return " ".join(f"{axis}={n}" for axis, n in sizes.items() if axis not in ("B", "Hkv") or n == 0)
