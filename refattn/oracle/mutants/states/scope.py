"""In which calls a mistake of a recurrence can show at all."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from ....problem import Problem
from ....spec import Recurrence, Variant
from ...recurrences import roles
from ...recurrences.lowered import places_of

#: Features a mistake may need, beside operands and parameters that are given and outputs that are returned (by their names).
STATE_FEATURES: Mapping[str, str] = {
    "recurrence": "a state is written and read token by token",
    "fades": "the state fades",
    "rows fade": "its rows fade each at their own rate",
    "heads fade": "each head fades at its own rate",
    "erases": "writes erase what the state holds at a key",
    "erases old": "erasures read the state as it was before the token",
    "strength": "writes have a strength, one number per token",
    "strong keys": "which multiplies keys of writes that erase",
    "bare": "the read is not divided",
    "normalised": "the read is divided by the state of values 1",
    "divided by a sum": "by the sum and eps",
    "divided by a clamp": "by the sum, or eps where that is less",
    "eps": "eps is not 0",
    "exclusive": "a query reads the state as it was before its token",
    "inclusive": "a query reads the state after its token",
    "bonus": "and its own token with a bonus",
    "skip": "something is added to the output",
    "maps": "keys and queries go through a feature map",
    "plain maps": "that takes nothing else and changes no width",
    "carried": "a state before the first token is given",
    "causal reads": "query i reads the state after key i",
    "reads of all": "queries read the state after the last key",
    "one shape": "queries and keys are of one shape",
    "square state": "keys are as wide as values",
    "states": "there are several states",
    "shared states": "query heads share states",
    "scaled": "there is a scale",
}


def of(problem: Problem) -> frozenset[str]:
    """What one call has, of `STATE_FEATURES`."""
    rule = problem.recurrence
    assert rule is not None
    found = _of_rule(problem.variant, rule)
    names = {n: _wide_of(problem, rule, n) for n in ("q", "k", "v")}
    shapes = {n: problem.given[name].shape for n, name in names.items() if name in problem.given}
    heads = {problem.dims[a] for a in ("Hkv", "H", "G", "M") if a in problem.dims and places_of(rule).get(a) == 1}
    conditions = {
        "carried": rule.initial in problem.given and bool(np.any(problem.given[rule.initial])),
        "one shape": "q" in shapes and shapes["q"] == shapes.get("k"),
        "square state": bool({"k", "v"} <= shapes.keys() and shapes["k"][-1:] == shapes["v"][-1:]) or "maps" in found,
        "states": any(n > 1 for n in heads),
        "shared states": problem.dims.get("Hq", 1) > problem.dims.get("Hkv", problem.dims.get("Hq", 1)) > 1,
    }
    return found | {name for name, there in conditions.items() if there}


def _wide_of(problem: Problem, rule: Recurrence, part: str) -> str:
    return roles.wide(problem.variant, rule, {"q": rule.query, "k": rule.writes[-1].key, "v": rule.writes[-1].value}[part])


def _of_rule(variant: Variant, rule: Recurrence) -> frozenset[str]:
    names = roles.strengths(variant, rule)
    gates = [roles.name_of(f) for f in rule.log_decay]
    strong = any(roles.name_of(f) in names for w in rule.writes if w.erase and w.value for f in w.key)
    conditions = {
        "recurrence": True,
        "fades": bool(gates),
        "rows fade": any(roles.has_width(variant, rule, n) for n in gates),
        "heads fade": bool(gates),
        "erases": any(w.erase for w in rule.writes),
        "erases old": any(w.old for w in rule.writes),
        "strength": bool(names),
        "strong keys": strong,
        "bare": not rule.normalizer,
        "normalised": bool(rule.normalizer),
        "divided by a sum": rule.normalizer == "sum",
        "divided by a clamp": rule.normalizer == "clamp",
        "eps": bool(rule.eps),
        "exclusive": rule.exclusive,
        "inclusive": not rule.exclusive,
        "bonus": bool(rule.bonus),
        "skip": bool(rule.skip),
        "maps": any(roles.is_mapped(f) for f in roles.factors(rule)),
        "plain maps": _plain_maps(variant, rule),
        "causal reads": rule.causal,
        "reads of all": not rule.causal,
        "scaled": rule.scale != 1.0,
    }
    return frozenset(name for name, there in conditions.items() if there)


def _plain_maps(variant: Variant, rule: Recurrence) -> bool:
    """Whether features are as many as channels, so that another map's may stand for them."""
    mapped = [f for f in roles.factors(rule) if not isinstance(f, str) and roles.is_mapped(f)]
    carried = next((o.axes.split() for o in variant.operands if o.name == rule.initial), [])
    widths = {variant.operand(f.operand).axes.split()[-1] for f in mapped}
    return bool(mapped) and all(not f.weights for f in mapped) and len(carried) == 4 and widths == {carried[-2]}


@functools.cache
def may_show(variant: Variant) -> frozenset[str]:
    """What some call of the variant can have."""
    assert variant.recurrence is not None
    defaults = {p.name: p.kind.read(p.default) for p in variant.params}
    settings = [defaults, *({**defaults, p.name: value} for p in variant.params for value in p.tries)]
    shown = {o.name for o in variant.operands} | {o.name for o in variant.outputs} | {p.name for p in variant.params}
    for params in settings:
        shown |= _of_rule(variant, variant.recurrence(dict.fromkeys({*variant.axes, "S", "T"}, 2), params))
    return frozenset(shown | {"carried", "one shape", "square state", "states", "shared states"})


def shows(problem: Problem, returns: tuple[str, ...] = ()) -> frozenset[str]:
    """What one call has: a mutant whose `needs` are not all among it answers as the specification does."""
    names = {name for name, value in problem.params.items() if value is not None and value is not False}
    return of(problem) | set(problem.given) | set(returns or problem.returns) | names
