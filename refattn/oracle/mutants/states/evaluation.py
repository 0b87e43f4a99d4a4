"""What a kernel answers that reads a recurrence otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from .... import precision
from ....problem import Problem, output_dtype
from ....spec import Factor, Product, Recurrence
from ...bounds import recurrent as bounds
from ...bounds import spread
from ...profiles import Profile
from ...recurrences import roles
from ...recurrences.lowered import Lowered, Lowering, Moved
from ...recurrences.running import Form, Prepared, Result, prepared, run
from .reading import StateReading


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0.0, x + 1.0, np.exp(np.minimum(x, 0.0)))


#: How far a rough tolerance may be off: a single run with roundings may leave an element where it was, but hardly a row of channels.
ROUGHLY = 1e3

#: Feature maps that stand for another one.
MAPS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "elu + 1": _elu,
    "elu": lambda x: _elu(x) - 1.0,
    "exp": np.exp,
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(x, 0.0),
    "relu + 1": lambda x: np.maximum(x, 0.0) + 1.0,
    "square": np.square,
    "softmax": lambda x: np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True),
}


@dataclass(frozen=True, eq=False)
class StateAnswers:
    """The outputs of a reading, float64 in the variant's axes.

    Attributes
    ----------
    outputs : mapping of str to ndarray
    evaluation : Evaluation
        How they came about.
    """

    outputs: Mapping[str, np.ndarray]
    evaluation: Evaluation

    def beyond(self, dtype: np.dtype) -> float:
        """From where on, in a format, an answer may be infinite or NaN as it comes: terms on the way there are larger."""
        return float(precision.format_of(dtype).largest) * 1e-8

    def rough(self, profile: Profile, alpha: float) -> dict[str, np.ndarray]:
        """What the tolerance is about, within a factor of `ROUGHLY`."""
        return self.tolerance(profile, alpha, rough=True)

    def tolerance(self, profile: Profile, alpha: float, dtypes: Mapping[str, np.dtype] | None = None, rough: bool = False) -> dict[str, np.ndarray]:
        """Largest error of a correct computation of this reading, by output, but for a chance of alpha in this call."""
        found, problem = self.evaluation, self.evaluation.problem
        lam = spread(sum(self.outputs[name].size for name in problem.returns if name in self.outputs), alpha)
        with np.errstate(all="ignore"):
            errors = found.bounds(profile, lam, rough)
            lost = sum(problem.dims.values()) * float(np.finfo(np.float64 if found.double(profile) else np.float32).smallest_subnormal)
            own = 2.0 if found.double(profile) else 1.0
            return {
                name: _stored(own * (errors[name] + lost), x, (dtypes or {}).get(name) or output_dtype(problem, name))
                for name, x in self.outputs.items()
                if name in errors
            }


def _stored(bound: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Error after the result is rounded into its format."""
    target = precision.format_of(dtype)
    magnitude = np.where(np.isfinite(exact), np.abs(exact), 0.0)
    bound = np.where(np.isnan(bound), np.inf, bound)
    return bound + target.unit * (magnitude + bound) + target.tiny


def evaluate(problem: Problem, changes: Mapping[str, Any]) -> StateAnswers:
    """What a kernel answers that reads the recurrence with these changes.

    Parameters
    ----------
    problem : Problem
        A dense call of a variant with a recurrence.
    changes : mapping
        Fields of `StateReading` and their values; none of them is the specification.
    """
    found = Evaluation(problem, reading(tuple(sorted(changes.items()))))
    return StateAnswers(found.outputs(), found)


@functools.lru_cache(maxsize=4096)
def reading(changes: tuple[tuple[str, Any], ...]) -> StateReading:
    return StateReading(**dict(changes))


class Evaluation:
    """One reading of one problem, in the order: operands, products, arrays, the run, what is returned."""

    def __init__(self, problem: Problem, reading: StateReading) -> None:
        assert problem.recurrence is not None
        self.reading = reading
        self.right = problem.recurrence
        self.problem = replace(problem, given=self._given(problem))
        self.rule = self._rule()
        self.form = Form(
            order=reading.order,
            read="" if reading.read == "given" else reading.read,
            wrong=reading.wrong,
            chunk=reading.chunk,
            tiled=reading.heads == "tiled",
        )

    def outputs(self) -> dict[str, np.ndarray]:
        return self._released(self._values)

    @functools.cached_property
    def _arrays(self) -> Prepared:
        return self._drawn(None)

    @functools.cached_property
    def _values(self) -> Result:
        return self._run(self._arrays)

    def bounds(self, profile: Profile, lam: float, rough: bool = False) -> dict[str, np.ndarray]:
        """Errors before they are stored."""
        mapped = any(not isinstance(f, str) and f.map is not None for f in roles.factors(self.rule))
        plain = run(self._arrays, self.form)
        errors = bounds.bounds(self._drawn, self.form, plain, profile, lam, mapped, rough)
        n = self._returned
        if n is not None:
            cut = run(self._first(self._arrays, n), self.form)
            earlier = bounds.bounds(lambda moved: self._first(self._drawn(moved), n), self.form, cut, profile, lam, mapped, rough)
            errors = replace(errors, state=earlier.state)
        if self.reading.normalizer == "count":
            errors = replace(errors, out=errors.out / np.maximum(self._seen, 1.0))
        if self.reading.initial == "unfaded" or self.reading.lookahead:  # nothing is known of those sums beyond their sizes
            errors = replace(errors, out=errors.out + 2**-20 * lam * np.abs(plain.out))
        return self._released(errors, values=False)

    @staticmethod
    def double(profile: Profile) -> bool:
        return profile.accumulate <= float(np.finfo(np.float64).eps)

    # ---- operands ----------------------------------------------------------------------------------------------------------------

    def _given(self, problem: Problem) -> Mapping[str, np.ndarray]:
        reading, given = self.reading, dict(problem.given)
        q, k, v = (roles.wide(problem.variant, self.right, p) for p in (self.right.query, self.right.writes[-1].key, self.right.writes[-1].value))

        def change(name: str, how: str) -> None:
            x = np.asarray(given[name], np.float64)
            axes = problem.variant.operand(name).axes.split()
            if how == "one late" and {"T", "S"} & set(axes):
                given[name] = _late(x, axes.index("T" if "T" in axes else "S"))
            elif how == "batch 0" and axes[0] == "B":
                given[name] = np.broadcast_to(x[:1], x.shape)
            elif how == "first head":
                at = next((n for n, axis in enumerate(axes) if axis in ("Hkv", "H", "G")), None)
                given[name] = x if at is None else np.broadcast_to(np.take(x, [0], axis=at), x.shape)
            elif how == "unit":
                given[name] = _unit(x)

        for name, how in ((q, reading.queries), (k, reading.keys), (v, reading.values)):
            if name:
                change(name, how)
        if reading.exchanged and q and k and given[q].shape == given[k].shape:
            given[q], given[k] = given[k], given[q]
        for name in roles.strengths(problem.variant, self.right):
            if name in given:
                change(name, reading.strength)
        initial = self.right.initial
        if initial in given and reading.initial in ("batch 0", "first head"):
            change(initial, reading.initial)
        if reading.initial in ("none", "none of the state"):
            for name in (initial, *((self.right.mass, self.right.maximum) if reading.initial == "none" else ())):
                given.pop(name, None)
        if initial in given and reading.initial == "transposed":
            given[initial] = _turned(given[initial])
        return given

    # ---- products ----------------------------------------------------------------------------------------------------------------

    def _rule(self) -> Recurrence:
        reading, rule = self.reading, self.right
        names = roles.strengths(self.problem.variant, rule)

        def without(product: Product) -> Product:
            return tuple(f for f in product if roles.name_of(f) not in names)

        def only(product: Product) -> Product:
            return tuple(f for f in product if roles.name_of(f) in names)

        writes = []
        for w in rule.writes:
            key, value, erase = w.key, w.value, w.erase
            strong = only(key) + only(value)
            if reading.strength == "none":
                key, value = without(key), without(value)
            elif reading.strength == "values" and value:
                key, value = without(key), without(value) + strong
            elif reading.strength == "erasures" and erase:
                key, value, erase = without(key), without(value), erase + strong
            elif reading.strength == "squared":
                key = key + strong
            elif reading.strength == "twice for values" and value:
                value = value + strong
            if reading.erase == "none" and erase and value:
                erase = ()
            if reading.erase == "with queries" and erase and self._alike:
                erase = rule.query
            if reading.key_map != "given":
                key, erase = _mapped(key, reading.key_map), _mapped(erase, reading.key_map)
            writes.append(replace(w, key=key, value=value, erase=erase, old=w.old or (reading.erase == "old" and bool(erase))))
        if reading.erase == "none":
            writes = [w for w in writes if w.value] or writes
        if reading.erase == "faded":
            writes = [replace(w, old=False) for w in writes]
        query = rule.query if reading.query_map == "given" else _mapped(rule.query, reading.query_map)
        normalizer = {"given": rule.normalizer, "none": "", "count": ""}.get(reading.normalizer, reading.normalizer)
        eps = {"none": 0.0, "given": rule.eps}.get(reading.eps, rule.eps)
        causal = {"always": True, "never": False}.get(reading.causal, rule.causal)
        return replace(
            rule,
            writes=tuple(writes),
            query=query,
            log_decay=() if reading.gate == "none" else rule.log_decay,
            bonus=() if reading.bonus == "none" else rule.bonus,
            skip=() if reading.skip == "none" else rule.skip,
            scale=self._scale(rule),
            normalizer=normalizer,
            eps=eps,
            causal=causal,
        )

    @property
    def _alike(self) -> bool:
        """Whether as many states are there as queries have heads."""
        return bool(self.problem.dims.get("Hq", 1) == self.problem.dims.get("Hkv", 1))

    def _scale(self, rule: Recurrence) -> float:
        given = self.problem.params.get("scale") is not None
        scale = {
            "none": 1.0,
            "none by default": rule.scale if given else 1.0,
            "twice": rule.scale**2,
            "width of values": rule.scale if given else self.problem.dims.get("E", 1) ** -0.5,
        }.get(self.reading.scale, rule.scale)
        return scale * self.reading.scale_factor

    # ---- arrays ------------------------------------------------------------------------------------------------------------------

    def _drawn(self, moved: Moved | None) -> Prepared:
        x = Lowering(self.problem, self.rule, self.reading.heads == "tiled", moved).lowered()
        return prepared(self._lowered(x))

    def _lowered(self, x: Lowered) -> Lowered:
        reading = self.reading
        g, b, e, u, state = x.g, x.b, x.e, x.u, x.state
        with np.errstate(all="ignore"):
            if reading.gate == "base 2":
                g = g * np.log(2.0)
            elif reading.gate == "factor":  # negative: every other token changes signs, which are the writes' and the reads' as well
                signs = (-1.0) ** (np.arange(x.tokens) + 1)[:, None]
                x = replace(x, q=x.q * (-signs if x.rule.exclusive else signs), w=x.w * signs[..., None])
                u = -u if u is not None else None
                g = np.log(-g)
            elif reading.gate == "one late":
                g = _late(g, 2)
            elif reading.gate == "one early":
                g = np.flip(_late(np.flip(g, 2), 2), 2)
            elif reading.gate == "first channel":
                g = g[..., :1]
            elif reading.gate == "mean channel":
                g = g.mean(axis=-1, keepdims=True)
            elif reading.gate == "first head":
                g = np.broadcast_to(g[:, :1], g.shape)
            if reading.gate_factor != 1.0:
                g = np.where(g == 0.0, 0.0, g * reading.gate_factor)
        if reading.strength == "doubled":
            b = 2.0 * b
        if reading.erase == "negated":
            e = -e
        if reading.keys in ("unit in erasures", "unit in writes") and e.any():
            b, e = (b, _unit(e)) if reading.keys == "unit in erasures" else (_unit(b) * np.linalg.norm(b, axis=-1, keepdims=True) ** 0, e)
        if reading.bonus == "ones" and u is not None:
            u = np.ones_like(u)
        if reading.initial == "unfaded" and x.tokens:
            g = g.copy()
            g[:, :, 0] = 0.0
        if reading.lookahead and x.tokens > reading.lookahead:
            n = reading.lookahead
            q = np.concatenate([np.zeros_like(x.q[:, :, :n]), x.q], axis=2)
            b, w, e = (np.concatenate([y, np.zeros_like(y[:, :, :n])], axis=2) for y in (b, x.w, e))
            g = np.concatenate([g, np.zeros_like(g[:, :, :n])], axis=2)
            u = None if u is None else np.concatenate([u, np.zeros_like(u[:, :, :n])], axis=2)
            gate = None if x.gate is None else np.concatenate([x.gate, np.full_like(x.gate[..., :n], -np.inf)], axis=-1)  # nothing is written there
            return replace(x, q=q, b=b, w=w, e=e, g=g, u=u, gate=gate, reads=slice(x.reads.start + n, x.reads.stop + n))
        if reading.normalizer == "count":
            x = replace(x, rule=replace(x.rule, normalizer=""))
        return replace(x, g=g, b=b, e=e, u=u, state=state)

    # ---- the run -------------------------------------------------------------------------------------------------------------------

    def _run(self, p: Prepared) -> Result:
        found = run(p, self.form)
        if self.reading.normalizer == "count":
            found = replace(found, out=found.out / np.maximum(self._seen, 1.0))
        if self.reading.overflow:
            found = self._overflowed(p, found)
        return found

    @functools.cached_property
    def _seen(self) -> np.ndarray:
        """How many keys every query has seen, over [B, Hq, T, V]."""
        x = self._arrays.lowered
        wrote = np.any(x.b != 0.0, axis=(3, 4)).any(axis=(0, 1))
        return np.cumsum(wrote)[x.reads][None, None, :, None].astype(np.float64)

    def _overflowed(self, p: Prepared, found: Result) -> Result:
        """Nothing where exp(-G_j) is beyond the format, and nothing after it that erasures carry on."""
        x, chunk = p.lowered, self.reading.overflow
        limit = 709.0 if self.problem.dtype == np.float64 else 88.7
        spoilt = np.zeros((*p.g.shape[:2], x.tokens), bool)
        for start in range(0, x.tokens, chunk):
            g = np.where(np.isfinite(p.g[:, :, start : start + chunk]), p.g[:, :, start : start + chunk], 0.0)
            spoilt[:, :, start : start + chunk] = (np.cumsum(g, axis=2) < -limit).any(axis=-1)
            if x.erases.any():  # zeros of the mask times what is NaN
                spoilt[:, :, start : start + chunk] |= spoilt[:, :, start : start + chunk].any(axis=2, keepdims=True)
        lost = np.maximum.accumulate(spoilt, axis=2) if x.erases.any() else spoilt
        rows = np.repeat(lost, x.q.shape[1] // lost.shape[1], axis=1)[:, :, x.reads, None]
        state = found.state
        if x.erases.any() and x.tokens:
            state = np.where(lost[:, :, -1, None, None], np.nan, state)
        return replace(found, out=np.where(rows, np.nan, found.out), state=state)

    # ---- what is returned ----------------------------------------------------------------------------------------------------------

    def _released(self, found: Result, values: bool = True) -> dict[str, np.ndarray]:
        how = self.reading.state
        if self.reading.gate == "factor" and values and self._arrays.lowered.tokens % 2:
            found = replace(found, state=-found.state)
        if how == "transposed":
            found = replace(found, state=_turned(found.state))
        elif how == "zero":
            found = replace(found, state=np.zeros_like(found.state))
        elif how == "initial":
            found = replace(found, state=self._arrays.lowered.state if values else np.zeros_like(found.state))
        if self._returned is not None and values:
            found = replace(found, state=run(self._first(self._arrays, self._returned), self.form).state)
        names = {o.name for o in self.problem.variant.outputs}
        outputs = bounds.outputs(self.problem, found)
        if self.right.normalizer and "mass" in names and found.mass is None:
            outputs["mass"] = self._mass(values)
        return outputs

    @property
    def _returned(self) -> int | None:
        """After how many tokens the state is what is returned, where that is not after the last."""
        how, tokens = self.reading.state, self._arrays.lowered.tokens
        if how == "one early":
            return max(tokens - 1, 0)
        if how.startswith("whole chunks"):
            chunk = int(how.rpartition(" ")[2])
            return tokens // chunk * chunk
        return None

    @staticmethod
    def _first(p: Prepared, n: int) -> Prepared:
        """The first n tokens."""
        x = p.lowered
        cut = replace(
            x,
            **{name: getattr(x, name)[:, :, :n] for name in ("q", "b", "w", "e", "g")},
            gate=None if x.gate is None else x.gate[:, :, :n],
            u=None if x.u is None else x.u[:, :, :n],
            skip=None,
            reads=slice(0, n),
            wrote=slice(0, n),
        )
        return prepared(cut)

    def _mass(self, values: bool) -> np.ndarray:
        """What a variant that does not divide still returns: the right sum, so that only the output is wrong."""
        right = Evaluation(self.problem, replace(self.reading, normalizer="given"))
        return right.outputs()["mass"] * (1.0 if values else 2**-20)


# ---- numbers ---------------------------------------------------------------------------------------------------------------------


def _mapped(product: Product, name: str) -> Product:
    """A product whose factors of features go through another map."""

    def change(f: Factor | str) -> Factor | str:
        if isinstance(f, str) or not roles.is_mapped(f):
            return f
        return Factor(f.operand) if name == "none" else Factor(f.operand, SimpleNamespace(__name__=name, features=MAPS[name]))  # type: ignore[arg-type]

    return tuple(change(f) for f in product)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=-1, keepdims=True) + 1e-6)


def _turned(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(x, -1, -2)) if x.shape[-1] == x.shape[-2] else x


def _late(x: np.ndarray, axis: int) -> np.ndarray:
    """Every entry that of the one before; the first its own."""
    if x.shape[axis] < 2:
        return x
    return np.concatenate([np.take(x, [0], axis), np.take(x, range(x.shape[axis] - 1), axis)], axis)
