"""Which operands of a recurrence play which part."""

from __future__ import annotations

from ...spec import Factor, Product, Recurrence, Variant
from .lowered import places_of

_TOKENS = frozenset({"T", "S"})


def factors(rule: Recurrence) -> list[Factor | str]:
    """All there are."""
    products = (rule.query, rule.log_decay, rule.bonus, rule.skip, rule.input_gate, *(p for w in rule.writes for p in (w.key, w.value, w.erase)))
    return [f for product in products for f in product]


def name_of(factor: Factor | str) -> str:
    return factor if isinstance(factor, str) else factor.operand


def is_mapped(factor: Factor | str) -> bool:
    """Whether it goes through a feature map."""
    return not isinstance(factor, str) and factor.map is not None and hasattr(factor.map, "features")


def has_width(variant: Variant, rule: Recurrence, name: str) -> bool:
    places = places_of(rule)
    return any(axis not in places for axis in variant.operand(name).axes.split())


def wide(variant: Variant, rule: Recurrence, product: Product) -> str:
    """The operand of a product that has a width, "" for none."""
    return next((name_of(f) for f in product if has_width(variant, rule, name_of(f))), "")


def strengths(variant: Variant, rule: Recurrence) -> frozenset[str]:
    """Operands of writes that are one number per token, beside one with a width: alone, as in a state per channel, they are the key or the value."""
    names = {name_of(f) for w in rule.writes for p in (w.key, w.value) if wide(variant, rule, p) for f in p}
    return frozenset(n for n in names if not has_width(variant, rule, n) and _TOKENS & set(variant.operand(n).axes.split()))


def token_axis(variant: Variant, name: str) -> int | None:
    """Where an operand has its tokens; None where it has none."""
    return next((n for n, axis in enumerate(variant.operand(name).axes.split()) if axis in _TOKENS), None)
