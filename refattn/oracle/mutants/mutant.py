"""What a mutant is: a fault, and the fields of `Reading` it changes; and in which calls it can show at all."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...problem import Problem
from ...spec import Plan, Variant
from ..findings import Fault
from .reading import Reading
from .states.reading import StateReading

#: Keys per tile of kernels: where a fault depends on it, there is a mutant for each.
TILES = (4, 8, 16, 32, 64, 128)

#: Features a fault may need, beside operands and parameters that are given and outputs that are returned (by their names).
FEATURES: Mapping[str, str] = {
    "softmax": "weights are a softmax",
    "sigmoid": "weights are sigmoids",
    "relu": "weights are powers of positive parts",
    "sparsemax": "weights by sparsemax",
    "entmax15": "weights by 1.5-entmax",
    "softmax over queries": "weights of one key sum to one",
    "dot": "scores are inner products",
    "cosine": "scores are cosines",
    "bilinear": "scores are bilinear forms",
    "additive": "scores are a network of a sum",
    "concat": "scores are a network of a concatenation",
    "projections": "operands are projected first",
    "residual": "an operand is added to the output",
    "B>1": "several batches",
    "Hq>1": "several query heads",
    "Hkv>1": "several key-value heads",
    "Hq>Hkv": "fewer key-value heads than query heads",
    "T!=S": "other numbers of queries than of keys",
    "D!=E": "values of another width than keys",
    "E>16": "values of more than 16 channels",
    "default scale": "no scale is given",
    "masks": "there is something that may hide scores",
    "heads": "operands have heads",
    "hidden pairs": "some scores are skipped by the specification, or may be",
    "no keys": "S = 0",
    "finite fill": "hidden scores are filled with a number",
    "strided": "operands that are not contiguous",
    "NaN": "NaN in an operand",
    "gradients": "cotangents are given",
    "d_lse": "a cotangent of lse is given",
    "strided d_out": "a cotangent of the output that is not contiguous",
    "earlier call": "a call of the same shapes before",
    "any NAME": "operand or parameter NAME is given in this call or may have been in the earlier one",
}


@dataclass(frozen=True)
class Mutant:
    """The specification with a fault.

    Attributes
    ----------
    fault : Fault
        Several mutants may have the same one: what it depends on besides (the width of a tile, the order of two steps) is in `changes`.
    changes : mapping of str to value
        Fields of `Reading`.
    prior : float
        How often it was met, relative to others.
    needs : frozenset of str
        What a call must have for the fault to show: names of operands, parameters and outputs, and `FEATURES`.
    """

    fault: Fault
    changes: Mapping[str, Any]
    prior: float = 1.0
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Family:
    """A fault with a number in it that has to be found.

    Attributes
    ----------
    fault : Fault
    field : str
        Of `Reading`, that the number replaces; what it is when right is ``Reading()``'s.
    values : tuple of float, optional
        All there are to try, where the number is whole.
    bounds : (float, float), optional
        Between which it lies, where it is not.
    logarithmic : bool
        Whether the number is searched for by its logarithm.
    changes : mapping
        Other fields the fault changes.
    """

    fault: Fault
    field: str
    values: tuple[float, ...] | None = None
    bounds: tuple[float, float] | None = None
    logarithmic: bool = False
    prior: float = 0.5
    needs: frozenset[str] = frozenset()
    changes: Mapping[str, Any] = None  # type: ignore[assignment]

    def at(self, value: float) -> dict[str, Any]:
        """The changes for one number."""
        return {**(self.changes or {}), self.field: value}


def right_value(family: Family) -> float:
    """The number of a family's field that is no fault."""
    return float(getattr(Reading(), family.field) if hasattr(Reading(), family.field) else getattr(StateReading(), family.field))


@functools.cache
def may_show(variant: Variant) -> frozenset[str]:
    """What some call of the variant can have."""
    if variant.plan is None:
        return frozenset()
    defaults = {p.name: p.kind.read(p.default) for p in variant.params}
    settings = [defaults, *({**defaults, p.name: value} for p in variant.params for value in p.tries)]
    shown = set(_names(variant))
    for params in settings:
        shown |= _of_plan(variant.plan(dict.fromkeys({*variant.axes, "S", "T"}, 2), params))
    axes = set(variant.axes)
    by_axis = {"B": ("B>1",), "Hq": ("Hq>1",), "Hkv": ("Hkv>1", "Hq>Hkv"), "S": ("T!=S", "no keys"), "E": ("D!=E", "E>16")}
    shown |= {feature for axis, features in by_axis.items() if axis in axes for feature in features}
    shown |= {"default scale", "strided", "NaN", "gradients", "strided d_out", "earlier call"} | ({"d_lse"} if "lse" in shown else set())
    shown |= {f"any {name}" for name in _names(variant)}
    hides = "finite fill" not in shown and {"causal", "window", "mask", "bias"} & shown
    return frozenset(shown | ({"hidden pairs", "masks"} if hides else set()) | ({"heads"} if "Hq" in axes else set()))


def _names(variant: Variant) -> list[str]:
    return [*(o.name for o in variant.operands), *(p.name for p in variant.params), *(o.name for o in variant.outputs)]


def _of_plan(plan: Plan) -> set[str]:
    shown = {plan.normalizer, plan.similarity.__name__.rpartition(".")[2]}
    shown |= {name for name, there in (("projections", plan.projections), ("residual", plan.residual)) if there}
    roles = {"mask": plan.mask, "bias": plan.bias, "sinks": plan.sinks}
    shown |= {role for role, there in roles.items() if there}
    return shown | ({"finite fill"} if np.isfinite(plan.fill) else set())


def shows(
    problem: Problem,
    returns: tuple[str, ...] = (),
    cotangents: Mapping[str, np.ndarray] | None = None,
    earlier: Problem | None = None,
) -> frozenset[str]:
    """What one call has: a mutant whose `needs` are not all among it answers as the specification does.

    Parameters
    ----------
    problem : Problem
    returns : tuple of str
        Outputs that are looked at; the problem's unless said.
    cotangents : mapping of str to ndarray, optional
        Where gradients are asked for.
    earlier : Problem, optional
        A call of the same shapes that came before.
    """
    plan, dims, given, params = problem.plan, problem.dims, problem.given, problem.params
    assert plan is not None
    shown = _of_plan(plan) - {"mask", "bias", "sinks"} | set(given) | set(returns or problem.returns)
    shown |= {role for role, name in (("mask", plan.mask), ("bias", plan.bias), ("sinks", plan.sinks)) if name in given}
    shown |= {name for name, value in params.items() if value is not None and value is not False}
    shown |= {f"any {name}" for name in (shown if earlier is None else _names(problem.variant))}
    bias = given[plan.bias].astype(np.float64) if plan.bias in given else np.zeros(0)
    hides = {"causal", "window", "mask"} & shown or bool(np.isneginf(bias).any())
    empty = dims.get("S", 1) == 0
    g = (cotangents or {}).get("out", np.zeros(0))
    conditions = {
        "default scale": params.get("scale") is None,
        "B>1": dims.get("B", 1) > 1,
        "Hq>1": dims.get("Hq", 1) > 1,
        "Hkv>1": dims.get("Hkv", 1) > 1,
        "Hq>Hkv": dims.get("Hq", 1) > dims.get("Hkv", dims.get("Hq", 1)),
        "T!=S": dims.get("T") != dims.get("S", dims.get("T")),
        "D!=E": dims.get("D") != dims.get("E", dims.get("D")),
        "E>16": dims.get("E", 0) > 16,
        "no keys": empty,
        "masks": not np.isfinite(plan.fill),
        "heads": "Hq" in dims,
        "hidden pairs": (bool(hides) and not np.isfinite(plan.fill)) or empty,
        "strided": any(not x.flags.c_contiguous for x in given.values()),
        "NaN": any(x.dtype != np.bool_ and bool(np.isnan(x.astype(np.float64)).any()) for x in given.values()),
        "gradients": bool(cotangents),
        "d_lse": "lse" in (cotangents or {}),
        "strided d_out": not g.flags.c_contiguous,
        "earlier call": earlier is not None,
    }
    return frozenset(shown | {name for name, there in conditions.items() if there})
