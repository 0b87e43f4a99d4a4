"""Asking an implementation and the definition the same question, and how finely the answers can be read.

Whatever a variant calls its operands and however many axes they have, a question here is put in queries (B, Hq, T, D), keys (B, Hkv, S, D) and
values (B, Hkv, S, E).  With values that are the identity matrix, the output of a query *is* its row of weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ... import definition, precision
from ...candidate import Candidate
from ...problem import Problem, bind
from ...spec import Dims, Operand, Plan, Variant, every_size, shape
from ..findings import Fact
from ..judge import checked
from ..profiles import Profile, resolve

#: Widths that every kernel has been built for, and at least as many channels as there are keys, so that one call shows all weights.
WIDE: Dims = every_size({"B": 2, "Hq": 4, "Hkv": 2, "T": 24, "S": 40, "D": 64, "E": 64, "Dq": 64, "Dk": 64, "A": 64, "M": 64})


@dataclass(frozen=True)
class Answer:
    """What one side said: out (B, Hq, T, E) and lse (B, Hq, T) where there is one, as float64; the definition's is as exact as that."""

    out: np.ndarray
    lse: np.ndarray | None
    exact: bool


@dataclass(frozen=True)
class Asked:
    """One question and both answers; `truth` is all that the definition says."""

    found: Answer
    specified: Answer
    problem: Problem
    call: str
    truth: Mapping[str, np.ndarray]

    @property
    def sides(self) -> tuple[Answer, Answer]:
        return self.found, self.specified


@dataclass(frozen=True)
class Reading:
    """Something read off an answer: in words, as numbers, and how far the numbers may be off (0: they are counted, not measured)."""

    words: str
    value: np.ndarray
    error: np.ndarray | float = 0.0

    def agrees(self, other: Reading) -> bool:
        if self.value.shape != other.value.shape:
            return False
        with np.errstate(invalid="ignore"):
            one, two = (np.asarray(x, np.float64) for x in (self.value, other.value))
            near = np.abs(one - two) <= np.add(self.error, other.error)
        same = (one == two) | (np.isnan(one) & np.isnan(two))
        return bool((near | same).all())


def fact(subject: str, call: str, found: Reading, specified: Reading) -> Fact:
    """Both readings side by side."""
    return Fact(subject, found.words, specified.words, found.agrees(specified), call, {"found": found.value, "specified": specified.value})


#: What is added to a wrong fact that comes out right before anything else was asked at the same sizes.
FIRST_CALL = "; right in a call of a shape never asked before"


@dataclass(frozen=True)
class Resolution:
    """How finely weights can be read in a format and arithmetic.

    relative
        Of every weight: rounded itself, multiplied by a value, rounded as an output.
    absolute
        What the output's format cannot tell from 0; `smallest`, what the weights' cannot, relative to the row's largest.
    score
        Of every score.
    accumulate
        Of sums, lse among them.
    """

    relative: float
    absolute: float
    smallest: float
    score: float
    accumulate: float

    @staticmethod
    def of(dtype: np.dtype, profile: Profile) -> Resolution:
        stored = precision.format_of(dtype)
        sums = WIDE["D"] * profile.accumulate
        relative = stored.unit + profile.probabilities + profile.exp_error + profile.tanh_error + sums
        score = profile.scores + profile.operands + 8 * profile.accumulate
        return Resolution(relative, stored.tiny / 2, profile.smallest_probability / 2, score, profile.accumulate)

    def coarser(self, unit: float) -> Resolution:
        """As if there were one more rounding, of unit roundoff `unit`, to a format of float32's range at most."""
        least = precision.format_of(np.float32).tiny / 2 if unit else 0.0
        return Resolution(self.relative + unit, max(self.absolute, least), self.smallest, self.score + unit, self.accumulate + unit)

    def of_weights(self, p: np.ndarray) -> np.ndarray:
        """Relative error that each weight of a row may have; infinite where it cannot be told from 0."""
        top = np.nanmax(np.where(np.isfinite(p), p, 0.0), axis=-1, keepdims=True, initial=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = self.relative + (self.absolute + self.smallest * top) / p
        return np.where(np.isfinite(p) & (p > 0) & (error < 0.5), error, np.inf)

    def logs(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of weights and how far they may be off, infinite where there is none."""
        error = self.of_weights(p)
        usable = np.isfinite(error)
        return np.log(np.where(usable, p, 1.0)), np.where(usable, -np.log1p(-np.where(usable, error, 0.0)), np.inf)


#: How finely the definition can be read.
EXACT = Resolution.of(np.dtype(np.float64), resolve("math", np.dtype(np.float64)))

#: What reads one side's answer to a question; None where there is nothing to read.
Reader = Callable[["Kernel", Asked, Answer], Reading | None]


def read(subject: str, kernel: Kernel, asked: Asked | None, reader: Reader) -> list[Fact]:
    """The fact a reader finds in both answers; none where either cannot be read."""
    found, specified = (None, None) if asked is None else (reader(kernel, asked, answer) for answer in asked.sides)
    return [fact(subject, asked.call, found, specified)] if asked is not None and found is not None and specified is not None else []


@dataclass(frozen=True)
class Kernel:
    """An implementation of a variant, as its questions know it.

    coarser
        A relative rounding that its answers are read with beyond what its format and profile have.
    always : tuple of str
        Optional operands that it answers nothing without: every question has them, with values that change nothing.
    overwritten
        Names of operands that it has written into.
    """

    variant: Variant
    candidate: Candidate
    dtype: np.dtype
    fixed: Mapping[str, Any]
    profile: Profile
    coarser: float = 0.0
    always: tuple[str, ...] = ()
    _heard: dict[Any, Asked | None] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)
    _lengths: Iterator[int] = field(default_factory=itertools.count)

    @property
    def resolution(self) -> Resolution:
        """How finely its answers can be read."""
        return Resolution.of(self.dtype, self.profile).coarser(self.coarser)

    def resolution_of(self, answer: Answer) -> Resolution:
        """How finely an answer can be read: the implementation's, or the definition's."""
        return EXACT if answer.exact else self.resolution

    @property
    def plan(self) -> Plan | None:
        """The variant as data, at its defaults."""
        return None if self.variant.plan is None else self.variant.plan(WIDE, self._defaults())

    def _defaults(self) -> dict[str, Any]:
        return {p.name: p.kind.read(self.settled.get(p.name, p.default)) for p in self.variant.params}

    @property
    def settled(self) -> dict[str, Any]:
        """Parameters that keep one value throughout."""
        return {**self.candidate.fixed, **self.fixed}

    @property
    def roles(self) -> tuple[str, str, str] | None:
        """Names of queries, keys and values; None where they are not three operands of their own."""
        names = ("q", "k", "v") if self.plan is None else (self.plan.query, self.plan.key, self.plan.value)
        known = {o.name for o in self.variant.operands}
        separate = len(set(names)) == 3 and known.issuperset(names) and not (self.plan and self.plan.projections)
        return names if separate else None

    @property
    def one_sequence(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return not any("S" in o.axes.split() for o in self.variant.operands)

    def optional(self, part: str) -> str:
        """Name of the operand that plays an optional part ("bias", "mask", "sinks") and that the implementation takes, or ""."""
        name = "" if self.plan is None else getattr(self.plan, part)
        return name if name in self.candidate.operands else ""

    def tries(self, *names: str) -> list[dict[str, Any]]:
        """Other values of parameters than their default, one at a time, as far as the implementation understands them."""
        return [
            {p.name: value}
            for p in self.variant.params
            if p.name in names and p.name in self.candidate.params and p.name not in self.settled
            for value in p.tries
            if self.candidate.words or not isinstance(value, str)
        ]

    def sizes(self, **changes: int) -> dict[str, int]:
        dims = {**WIDE, **changes}
        dims |= dict.fromkeys(("Dq", "Dk"), dims["D"])
        if "Hq" not in self.variant.axes:
            dims |= {"Hq": 1, "Hkv": 1}
        if self.one_sequence:
            dims["T"] = dims["S"] = max(dims["T"], dims["S"])
        return dims

    def unheard(self, dims: Dims) -> dict[str, int]:
        """Sizes that no question was asked at before."""
        return self.sizes(**{**dims, "T": dims["T"] + 1 + next(self._lengths)})

    def flat(self, dims: Dims) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys under which every score is the same: 0, or where scores of 0 have no weight, that of ones."""
        level = 1.0 if self.plan is None or self.plan.normalizer == "relu" else 0.0
        return np.full((dims["B"], dims["Hq"], dims["T"], dims["D"]), level), np.full((dims["B"], dims["Hkv"], dims["S"], dims["D"]), level)

    def weights(self, dims: Dims, q: np.ndarray | None = None, k: np.ndarray | None = None, **rest: Any) -> Asked | None:
        """The question whose output is the matrix of weights: values are the identity."""
        v = np.zeros((dims["B"], dims["Hkv"], dims["S"], dims["E"]))
        v[..., np.arange(dims["S"]), np.arange(dims["S"])] = 1.0
        flat_q, flat_k = self.flat(dims)
        return self.ask(dims, flat_q if q is None else q, flat_k if k is None else k, v, **rest)

    def ask(
        self,
        dims: Dims,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        params: Mapping[str, Any] | None = None,
        operands: Mapping[str, np.ndarray] | None = None,
        again: bool = False,
    ) -> Asked | None:
        """Put a question, once unless `again`; None where the implementation does not take it, fails, or answers in another shape."""
        assert self.roles is not None
        chosen = {**self.settled, **(params or {})}
        given = {name: self._neutral(name, dims) for name in self.always}
        given |= dict(zip(self.roles, (q, k, v), strict=True)) | dict(operands or {})
        key = (tuple((n, x.shape, x.tobytes()) for n, x in sorted(given.items())), repr(sorted(chosen.items(), key=lambda item: item[0])))
        if again or key not in self._heard:
            drawn = {o.name: self._operand(o, given.get(o.name), dims) for o in self.variant.operands if not o.optional or o.name in given}
            self._heard[key] = self._hear(drawn, chosen, dims, sorted(operands or {}))
        return self._heard[key]

    def _neutral(self, name: str, dims: Dims) -> np.ndarray:
        """An optional operand that changes nothing; for one that is minus infinity when absent, a number whose exponential is 0."""
        o = self.variant.operand(name)
        full = shape(o.axes, dims)
        if o.kind == "boolean":
            return np.ones(full, bool)
        return np.full(full, max(float(o.absent or 0.0), -precision.format_of(self.dtype).largest, -30000.0))

    def _operand(self, o: Operand, x: np.ndarray | None, dims: Dims) -> np.ndarray:
        """An operand in its own axes and format; one that no question speaks of is drawn, or twice the identity where it maps keys to queries."""
        axes = o.axes.split()
        if x is None:
            full = shape(o.axes, dims)
            x = 2.0 * np.eye(full[0], full[-1]) if axes == ["Dq", "Dk"] else o.draw(np.random.default_rng(0), full)
        elif x.ndim == 4 and len(axes) == 3:
            x = x[:, 0]
        return x if o.kind == "boolean" else precision.round_to(np.ascontiguousarray(x, np.float64), self.dtype)

    def _hear(self, operands: dict[str, np.ndarray], chosen: dict[str, Any], dims: Dims, extra: list[str]) -> Asked | None:
        returns = tuple(o.name for o in self.variant.outputs)
        lent = {name: x.copy() for name, x in operands.items()}
        try:
            problem = bind(self.variant, (), {**operands, **chosen}, returns=returns)
            params = {name: value for name, value in problem.params.items() if name in self.candidate.params}
            with np.errstate(all="ignore"):
                answer = self.candidate.call(lent, params)
            several = tuple(answer) if isinstance(answer, tuple | list) else (answer,)
            axes = {o.name: o.axes for o in self.variant.outputs}
            said = {name: checked(problem, name, x, axes[name]) for name, x in zip(self.candidate.returns, several, strict=True)}
        except Exception:  # somebody else's code may raise anything, and answer in any shape: then this question has no answer
            return None
        self.overwritten.update(name for name, x in lent.items() if x.tobytes() != operands[name].tobytes())
        if "out" not in said:
            return None
        shown = [f"{name}={value!r}" for name, value in chosen.items()] + [f"with {name}" for name in extra]
        unusual = [axis for axis in ("D", "E") if axis in self.variant.axes and dims[axis] != WIDE[axis]]
        sizes = [f"{axis}={dims[axis]}" for axis in ("T", "S", *unusual)]
        truth = definition.run(problem)
        return Asked(_answer(said, False), _answer({name: truth[name] for name in said}, True), problem, ", ".join(shown + sizes), truth)


def _answer(outputs: Mapping[str, np.ndarray], exact: bool) -> Answer:
    out = outputs["out"].astype(np.float64)
    lse = outputs["lse"].astype(np.float64) if "lse" in outputs else None
    return Answer(out[:, None] if out.ndim == 3 else out, lse, exact)


def stated(value: float, error: float = 0.0) -> str:
    """A number with as many digits as can be known."""
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "infinity" if value > 0 else "-infinity"
    if error <= 0 or not np.isfinite(error):
        return f"{value:.4g}"
    digits = max(0, min(6, int(np.ceil(-np.log10(error)))))
    return f"{value:.{digits}f}"


def listed(values: np.ndarray, errors: np.ndarray | float = 0.0) -> str:
    """Numbers in a row, one where all are alike."""
    values, errors = np.atleast_1d(values), np.broadcast_to(errors, np.shape(values))
    words = [stated(float(x), float(e)) for x, e in zip(values, errors, strict=True)]
    return words[0] if len(set(words)) == 1 else " ".join(words)


def spans(indices: Sequence[int] | np.ndarray) -> str:
    """Indices in words, runs shortened: ``0..17, 20``."""
    runs: list[list[int]] = []
    for n in sorted(int(i) for i in indices):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    shown = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    return ", ".join(shown if len(shown) < 9 else [*shown[:8], "..."])


def slope(x: np.ndarray, y: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """The slopes with which every |y - slope x| <= error, as their middle and half their range; the range is NaN where there is none."""
    usable = np.isfinite(error) & (x != 0)
    if not usable.any():
        return 0.0, np.inf
    x, y, error = x[usable], y[usable], error[usable]
    low, high = float(((y - error * np.sign(x)) / x).max()), float(((y + error * np.sign(x)) / x).min())
    if low > high:
        return float(((x / error**2) * y).sum() / ((x / error**2) * x).sum()), np.nan
    return (low + high) / 2, (high - low) / 2
