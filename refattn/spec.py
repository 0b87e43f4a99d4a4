"""What a variant *is*: frozen data and plain functions.  Imports neither Numba nor any other room.

A variant states itself twice.  `define` is the mathematics, as loops; `plan` is the same operation as data.  Everything else here
(operands with named axes, parameters with their kinds, outputs, worked examples, identities, cost) is what the rest of the house
needs to validate, test, document, benchmark and judge it without being told again.

The shape language is a string of axis names, ``"B Hkv S D"``.  Equal names mean equal sizes; a sum (``"Dq+Dk"``) or a number is
computed, not bound.  `AXES` names the letters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

#: The glossary: one meaning per axis name, for errors, docs and tables.
AXES: Mapping[str, str] = MappingProxyType(
    {
        "B": "batch",
        "Hq": "query heads",
        "Hkv": "key-value heads",
        "T": "queries",
        "S": "keys",
        "D": "query-key width",
        "E": "value width",
        "Dq": "query width",
        "Dk": "key width",
        "A": "hidden width of the score network",
        "M": "model width",
        "H": "heads",
        "G": "groups of heads that share keys and queries",
        "N": "state width",
        "R": "steps of the state per token",
        "Z": "slots",
        "F": "features",
        "L": "levels",
        "W": "taps of a kernel",
    }
)


def every_size(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of every axis there is, where a table of sizes names the usual ones: the others follow from those, or are few."""
    follow = {"H": sizes["Hq"], "G": sizes["Hkv"], "N": sizes["D"], "F": sizes["D"] + 2, "Z": 5, "L": 5, "R": 2, "W": 3}
    return {**follow, **sizes}


#: Axes that may be empty; every other axis has at least one entry.
MAY_BE_EMPTY = frozenset({"B", "T", "S"})
#: Axes of heads, and of the groups of heads that share something: the second divides the first.
GROUPED = (("Hq", "Hkv"), ("H", "G"))

Dims = Mapping[str, int]


@dataclass(frozen=True)
class Paper:
    """Where a variant was published, enough for a BibTeX entry."""

    title: str
    authors: tuple[str, ...]
    year: int | None = None
    arxiv: str = ""
    doi: str = ""
    url: str = ""
    where: str = ""  # section, equation or algorithm

    @property
    def date(self) -> str:
        return "undated" if self.year is None else str(self.year)


# ---- operands and outputs ----------------------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Independent standard normals: how an operand is drawn unless it says otherwise."""
    return rng.standard_normal(shape)


@dataclass(frozen=True)
class Operand:
    """One array a variant takes.

    kind
        ``"real"`` floating point, ``"boolean"``, or ``"number"`` (boolean, integer or floating, read as a number).
    absent
        What stands for the operand when it is not given, as the neutral element of the mathematics (a bias of 0, a sink of -inf).
        An operand without it is required.
    broadcast
        Leading axes may be missing and any axis may have size 1, as in NumPy.
    within
        Closed interval the values must lie in; NaN is then refused too.
    draw
        Random values for tests, benchmarks and probes.
    """

    name: str
    axes: str
    meaning: str
    kind: str = "real"
    absent: float | bool | None = None
    broadcast: bool = False
    within: tuple[float, float] | None = None
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = normal

    @property
    def optional(self) -> bool:
        return self.absent is not None


@dataclass(frozen=True)
class Output:
    """One array a variant returns.  A `wide` output (a log-sum-exp, a state) is at least float32 whatever the operands are."""

    name: str
    axes: str
    meaning: str
    wide: bool = False


# ---- parameters --------------------------------------------------------------------------------------------------------------

#: What a definition receives for an unbounded side of a window: more than any index.
UNBOUNDED = 2**62


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)


def _is_real(value: object) -> bool:
    """Whether it is one real number, Python's, NumPy's or ml_dtypes', and no boolean."""
    narrow = isinstance(value, np.generic) and not isinstance(value, np.bool_) and np.can_cast(value.dtype, np.float64)
    return _is_whole(value) or narrow or isinstance(value, float | np.floating)


@dataclass(frozen=True)
class Number:
    """A finite real parameter.  `above` excludes its bound, `at_least` includes it; `optional` allows None."""

    above: float = -math.inf
    at_least: float = -math.inf
    optional: bool = False
    machine = "float64"

    def accepts(self, value: object) -> bool:
        if value is None:
            return self.optional
        if not _is_real(value):
            return False
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:  # a whole number beyond any float
            return False
        return math.isfinite(number) and number > self.above and number >= self.at_least

    def read(self, value: Any) -> float | None:
        return None if value is None else float(value)

    @property
    def rule(self) -> str:
        bounds = [f"above {self.above:g}"] if self.above > -math.inf else []
        bounds += [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
        return "a finite number" + (", " if bounds else "") + " and ".join(bounds) + (", or None" if self.optional else "")


@dataclass(frozen=True)
class Integer:
    """A whole-number parameter of at least `at_least` and at most `at_most`."""

    at_least: int = 0
    at_most: int = 2**62
    machine = "int64"

    def accepts(self, value: object) -> bool:
        return _is_whole(value) and bool(self.at_least <= value <= self.at_most)  # type: ignore[operator]

    def read(self, value: Any) -> int:
        return int(value)

    @property
    def rule(self) -> str:
        return f"a whole number from {self.at_least}" + (f" to {self.at_most}" if self.at_most < 2**62 else "")


@dataclass(frozen=True)
class Choice:
    """One of a few values.  A definition receives its position in `values`."""

    values: tuple[Any, ...]
    machine = "int64"

    def accepts(self, value: object) -> bool:
        plain = self.read(value)
        return any(type(plain) is type(v) and plain == v for v in self.values)  # the type, because True == 1

    def read(self, value: Any) -> Any:
        """The value as the Python object of `values`: NumPy's scalars and subclasses of str and int are equal to theirs."""
        for plain, others in ((bool, bool | np.bool_), (int, int | np.integer), (str, str)):
            if isinstance(value, others):
                return plain(value)
        return value

    @property
    def rule(self) -> str:
        return "one of " + ", ".join(repr(v) for v in self.values)


@dataclass(frozen=True)
class Window:
    """How many keys beside a query's own position it sees: (left, right), None for no limit; None alone for no window."""

    machine = "int64 x 2"

    def accepts(self, value: object) -> bool:
        if value is None:
            return True
        if not isinstance(value, tuple | list) or len(value) != 2:
            return False
        return all(side is None or (_is_whole(side) and side >= 0) for side in value)

    def read(self, value: Any) -> tuple[int | None, int | None] | None:
        if value is None:
            return None
        left, right = (None if side is None else min(int(side), UNBOUNDED) for side in value)
        return left, right

    @property
    def rule(self) -> str:
        return "a pair (left, right) of whole numbers from 0, None for a side without limit; or None"


Kind = Number | Integer | Choice | Window


@dataclass(frozen=True)
class Param:
    """One keyword-only parameter.

    absent
        The number a definition receives when the value is None: a constant, or a function of the dims (``scale``).
    tries
        Other values worth examining, for tests and probes.
    """

    name: str
    kind: Kind
    default: Any
    meaning: str
    absent: float | Callable[[Dims], float] | None = None
    tries: tuple[Any, ...] = ()

    def encode(self, value: Any, dims: Dims) -> Any:
        """The value as a definition receives it: a float, an int, or a pair of ints."""
        if isinstance(self.kind, Choice):
            return next(n for n, v in enumerate(self.kind.values) if type(v) is type(value) and v == value)
        if isinstance(self.kind, Window):
            left, right = value or (None, None)
            return (UNBOUNDED if left is None else left, UNBOUNDED if right is None else right)
        if value is None:
            return float(self.absent(dims) if callable(self.absent) else self.absent)  # type: ignore[arg-type]
        return value


# ---- plans -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A piece (a module of pieces/) with the numbers it needs."""

    piece: ModuleType
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A `scored` variant as data, in order of application: similarity, scale, score modifiers, bias, masks, normaliser.

    similarity
        A piece of pieces/similarities.
    normalizer
        ``"softmax"``, ``"sparsemax"`` or ``"entmax15"`` over keys, ``"softmax over queries"``, or entry by entry ``"sigmoid"`` or
        ``"relu"``: max(score, 0)**power / divisor.
    power, divisor
        Of ``"relu"``; no other normaliser reads them.
    query, key, value, bias, mask, sinks, residual
        Names of the operands that play these parts; "" for a part the variant does not have.  A residual is added to the output.
    weights
        Names of the similarity's own operands, in its order.
    shift
        Added to every score after the scale.
    fill
        Score written over hidden entries where they are not skipped.
    projections
        (matrix, bias) operands that queries, keys and values are multiplied by first, one pair each; and one pair for the output.
    """

    similarity: ModuleType
    normalizer: str = "softmax"
    power: int = 1
    divisor: float = 1.0
    query: str = "q"
    key: str = "k"
    value: str = "v"
    weights: tuple[str, ...] = ()
    scale: float = 1.0
    shift: float = 0.0
    score_mods: tuple[Stage, ...] = ()
    masks: tuple[Stage, ...] = ()
    bias: str = ""
    mask: str = ""
    sinks: str = ""
    residual: str = ""
    fill: float = -math.inf
    projections: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Factor:
    """One operand of a product, through a map if there is one.

    map
        A piece of pieces/maps, number by number, or of pieces/feature_maps, which changes the width.
    numbers
        What the map needs beside its argument.
    weights
        Names of the operands that a feature map takes, in its order.
    """

    operand: str
    map: ModuleType | None = None
    numbers: tuple[float, ...] = ()
    weights: tuple[str, ...] = ()


#: Operands multiplied along axes of the same name; the empty product stands for a part that a recurrence does not have.
Product = tuple[Factor | str, ...]


@dataclass(frozen=True)
class Write:
    """One step of a state: ``S += key (value - erase^T S)^T``.

    key, value, erase
        Products, over the state's rows, its columns and its rows, beside heads and tokens; a key of none is 1.  Without a value only the
        erasure is written, without erase nothing is read.
    old
        Whether the erasure reads the state as it was before the token, not yet faded.
    """

    key: Product
    value: Product = ()
    erase: Product = ()
    old: bool = False


@dataclass(frozen=True)
class Recurrence:
    """A `state` or `feature` variant as data: a matrix S per head that fades, is written and is read once per token.

        S_t = exp(log_decay_t) * S_{t-1};   S_t += key (value - erase^T S)^T for each write in turn
        out_t = scale * query_t^T S_t                                              or, exclusive,
        out_t = scale * query_t^T (S_{t-1} + (bonus * key_t) value_t^T),           plus skip

    writes
        In their order; with `steps`, one write whose operands have that axis, done once for each of its entries before the read.
    heads
        Axis of states that are apart from each other, where it is not that of the heads: "M", if every channel has a state of its own.
    query, log_decay, bonus, skip
        Products; a query of none is 1.  A log_decay over heads and tokens alone is one number for the whole state; over "D" too, one for each of
        its rows.
    log_value_decay
        Product over heads, tokens and the state's columns, which fade by it as rows do by log_decay.  For recurrences that variants are reduced to:
        enclosures, tolerances and mutants, which go by a variant's own, do not know of it.
    input_gate
        Logarithm of a further factor of every key, so large that a running maximum m must be carried beside the state:
        m_t = max(log_decay_t + m_{t-1}, input_gate_t), and S and n hold exp(-m_t) times what they stand for.
    normalizer
        What the read is divided by, with n the state of values 1: nothing, ``"sum"`` (query . n + eps), ``"clamp"`` (max(query . n, eps)), or
        ``"floor"`` (max(|query . n|, exp(-m)) + eps).  Where it is 0, so is the output.
    causal
        Whether query i reads the state after key i + S - T; otherwise every query reads the state after the last key.
    initial, mass, maximum
        Operands that are the state, n and m before the first token, where the variant has them; the outputs after the last one have the same
        axes, and the same names without "initial_".
    """

    writes: tuple[Write, ...]
    query: Product = ("q",)
    log_decay: Product = ()
    scale: float = 1.0
    exclusive: bool = False
    bonus: Product = ()
    skip: Product = ()
    steps: str = ""
    heads: str = ""
    log_value_decay: Product = ()
    input_gate: Product = ()
    normalizer: str = ""
    eps: float = 0.0
    causal: bool = True
    initial: str = "initial_state"
    mass: str = "initial_mass"
    maximum: str = "initial_max"


@dataclass(frozen=True)
class Reduction:
    """A variant as a recurrence of operands that are made from its own, or as several, one after the other.

    recurrence
        Of what `operands` makes.
    axes
        Of all that, by name, and of ``out`` as the recurrence gives it.  What is carried is called ``initial_state`` and so on, as a recurrence
        says, and comes back without "initial_".
    operands
        ``operands(x) -> y``: by name, in float64 and with every axis in full, an absent one as its neutral element.  Written in NumPy as far as
        `engine/tape.py` has it, so that gradients pass.
    outputs
        ``outputs(x, found) -> outputs``: of the variant, from its operands and the recurrence's outputs.
    then
        What comes after it, if anything does.  Its functions are given what `outputs` gives here beside the variant's operands.
    """

    recurrence: Recurrence
    axes: Mapping[str, str]
    operands: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    outputs: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
    then: Reduction | None = None

    @property
    def passes(self) -> tuple[Reduction, ...]:
        """This one, and those after it."""
        return (self, *(self.then.passes if self.then else ()))


# ---- what can be said about a variant ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A worked example: operands small enough to follow by hand, and the outputs they must give."""

    operands: Mapping[str, Any]
    returns: Mapping[str, Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    source: str = "by hand"


#: `run(operands, name=other, returns=..., **params)` runs this variant, or another, on a dict of operands.
Run = Callable[..., Any]


@dataclass(frozen=True)
class Identity:
    """An equation that holds for every input.  `sides` returns both sides; they agree up to rounding."""

    statement: str
    sides: Callable[[Run, dict[str, np.ndarray]], tuple[Any, Any]]
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a definition does, as formulas in the axis names, ``pairs`` (visible query-key pairs of one head) and Python arithmetic.

    flops
        Floating-point additions, subtractions, multiplications, divisions and function values.
    memory
        Numbers allocated beyond the operands: outputs and row buffers.
    """

    flops: str
    memory: str


@dataclass(frozen=True, eq=False)  # a variant equals itself only, so that it can key a cache
class Variant:
    """One attention variant, whole.

    Parameters
    ----------
    name : str
        Equal to the file's name.
    family : str
        Which loop nest it belongs to: scored, selected, feature, state, learner, latent, bucketed, sampled, edges.
    summary : str
        One line.
    equation : str
        The mathematics in one plain-text line.
    paper : Paper
    operands, outputs, params
        What goes in, what comes out and how it may be bent, in the order `define` takes and returns them.
    define : callable
        ``define(*operands, *params) -> output or tuple of outputs``: loops over float64 arrays, nothing but arguments, NumPy and math.
    cost : Cost
    plan : callable, optional
        ``plan(dims, params) -> Plan``: the same operation as data, of a scored variant.
    recurrence : callable, optional
        ``recurrence(dims, params) -> Recurrence``: the same operation as data, of a state or feature variant.
    reduction : callable, optional
        ``reduction(dims, params) -> Reduction``: the same operation as a recurrence of other operands, where it is not one of its own; None where
        that is so for other sizes only.
    vectorized : callable, optional
        ``vectorized(x, params) -> outputs``, both by name: all outputs by whole arrays, where no kernel has gradients of them.  Operands come in
        float64 and with every axis in full, an absent one as its neutral element; parameters as `define` takes them, but choices by their
        values.  Written in NumPy as far as `engine/tape.py` has it, so that gradients pass.
    returns : tuple of str
        Outputs given when the caller names none.
    ordered : callable
        ``ordered(params) -> str``: axes along which order means something.  Along every other axis, permuting the operands
        permutes the outputs.
    causal : mapping, optional
        Parameters under which no output depends on a later position; None where there are none.
    linear_in : str
        Operand the first output is linear in, or "".
    dims : tuple of mappings
        Shapes the derived tests run at, beside the general ladder.
    """

    name: str
    family: str
    summary: str
    equation: str
    paper: Paper
    operands: tuple[Operand, ...]
    outputs: tuple[Output, ...]
    define: Callable[..., Any]
    cost: Cost
    params: tuple[Param, ...] = ()
    plan: Callable[[Dims, Mapping[str, Any]], Plan] | None = None
    recurrence: Callable[[Dims, Mapping[str, Any]], Recurrence] | None = None
    reduction: Callable[[Dims, Mapping[str, Any]], Reduction | None] | None = None
    vectorized: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] | None = None
    returns: tuple[str, ...] = ("out",)
    ordered: Callable[[Mapping[str, Any]], str] = lambda params: ""
    causal: Mapping[str, Any] | None = None
    linear_in: str = ""
    examples: tuple[Example, ...] = ()
    identities: tuple[Identity, ...] = ()
    dims: tuple[Mapping[str, int], ...] = ()

    def operand(self, name: str) -> Operand:
        return self._operands[name]

    @functools.cached_property
    def _operands(self) -> dict[str, Operand]:
        return {o.name: o for o in self.operands}

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    @property
    def recurs(self) -> bool:
        """Whether it is a recurrence, of its own operands or of others made from them, and so has forms."""
        return self.recurrence is not None or self.reduction is not None

    @functools.cached_property
    def carried(self) -> tuple[str, ...]:
        """Outputs after the last token that the operand ``initial_<name>`` takes before the first: what a sequence is carried on by."""
        operands = {o.name for o in self.operands}
        return tuple(o.name for o in self.outputs if "initial_" + o.name in operands)

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Every axis name of the operands, in order of first appearance."""
        names = (a for o in self.operands for a in o.axes.split() if a.isidentifier())
        return tuple(dict.fromkeys(names))


def size(axis: str, dims: Dims) -> int:
    """Size of one axis term: a name, a number, or a sum of them."""
    return sum(int(term) if term.isdigit() else dims[term] for term in axis.split("+"))


def shape(axes: str, dims: Dims) -> tuple[int, ...]:
    """Sizes of a shape string."""
    return tuple(size(axis, dims) for axis in axes.split())
