"""How much memory a call takes beside its operands: what the engine allocates, counted without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...spec import Dims, Factor, Product, Recurrence, Variant, shape
from .lowered import HEADS, WIDTH, WRITES, places_of


def allocated(variant: Variant, dims: Dims, params: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of arrays that the state engine allocates in a forward call, for operands of that itemsize; optional ones are absent.

    The threads' own room for a chunk or a token is not counted: it does not grow with the sequences.
    """
    if variant.recurrence is None:
        return _reduced(variant, dims, params, itemsize)
    axes, absent = {o.name: o.axes for o in variant.operands}, {o.name for o in variant.operands if o.optional}
    return _recurrent(_Sizes(axes, absent, variant.recurrence(dims, params), dims), itemsize)


def _reduced(variant: Variant, dims: Dims, params: Mapping[str, Any], itemsize: int) -> int:
    """Of a reduction, which says the sizes of what it makes when it is asked for one token.

    These are operands in float64, those made of them, there and in the kernels' format, what the recurrence takes, and outputs in both formats; not
    what comes and goes on the way.
    """
    kernel, many = max(itemsize, 4), {"B": dims.get("B", 1), "T": dims["T"], "S": dims.get("S", dims["T"])}
    one = {axis: 1 if axis in many else n for axis, n in dims.items()}
    rounded = kernel if kernel < 8 else 0
    assert variant.reduction is not None
    reduction = variant.reduction(one, params)
    assert reduction is not None
    x: dict[str, Any] = {o.name: np.full(shape(o.axes, one), o.absent or 0.0) for o in variant.operands}
    taken = sum(8 * math.prod(shape(o.axes, dims)) for o in variant.operands if not o.optional and itemsize < 8)
    most = 0
    for rule in reduction.passes:
        with np.errstate(all="ignore"):
            made = rule.operands(x)
        found = {axis: n for name, a in made.items() for axis, n in zip(rule.axes[name].split(), a.shape, strict=True) if axis.isidentifier()}
        whole = {**dims, **{axis: n * many.get(axis, 1) for axis, n in found.items()}}
        for name, a in made.items():
            as_it_was = any(a is own for own in x.values())
            each = (0 if itemsize == kernel else rounded) if as_it_was else 8 + rounded
            taken += each * math.prod(shape(rule.axes[name], whole))
        most = max(most, _recurrent(_Sizes(rule.axes, set(), rule.recurrence, whole), kernel))
        ends = {name.removeprefix("initial_"): np.zeros(shape(axes, {**dims, **found})) for name, axes in rule.axes.items()}
        with np.errstate(all="ignore"):
            finished = rule.outputs(x, ends)
        x |= finished
    for o in variant.outputs:
        if o.name in variant.returns and (rounded or all(finished[o.name] is not end for end in ends.values())):
            taken += (8 + rounded) * math.prod(shape(o.axes, dims))
    return taken + most


def _recurrent(sizes: _Sizes, itemsize: int) -> int:
    """Of a recurrence: operands that have to be converted, mapped, multiplied, turned or padded, the state before and after, and outputs."""
    kernel, rule, dims = max(itemsize, 4), sizes.rule, sizes.dims
    keys, values, erasures = ([getattr(write, part) for write in rule.writes] for part in ("key", "value", "erase"))
    written = [rule.log_decay, rule.bonus, *keys, *erasures]
    others = [rule.log_value_decay, rule.input_gate, *values]
    states = sizes.largest(HEADS, *written, *others)
    heads = max(states, sizes.largest(HEADS, rule.query, rule.skip))
    n_keys, n_values = sizes.largest(WIDTH, rule.query, *written), sizes.largest(WIDTH, *values)
    steps = sum(sizes.largest(WRITES, write.key, write.value, write.erase) for write in rule.writes)
    batch, reads, wrote = dims.get("B", 1), dims["T"], dims.get("S", dims["T"])
    summed = n_values + bool(rule.normalizer)  # the mass is one more column
    tokens_read, tokens = reads, wrote
    if rule.causal or rule.input_gate:
        tokens_read = tokens = max(reads, wrote) if rule.causal else reads + wrote
    of_token, gates = (batch, states, tokens), [rule.input_gate] if rule.input_gate else []
    arrays = (  # products side by side, and the array of them; masses and gates are no operand
        ([rule.query], (batch, heads, tokens_read, 1, n_keys)),
        ([*keys, *gates], (*of_token, steps, n_keys)),
        ([*values, (), *gates] if rule.normalizer else values, (*of_token, steps, summed)),
        (erasures, (*of_token, steps, n_keys)),
        ([rule.log_decay], (*of_token, 1, sizes.product(rule.log_decay)[WIDTH])),
        ([rule.bonus], (*of_token, 1, n_keys)),
        ([rule.log_value_decay], (*of_token, 1, n_values)),
    )
    made = sum(math.prod(full) for products, full in arrays if any(products) and not sizes.lies(products, full))
    made += sum(sizes.converted(factor, itemsize < kernel) for product in (rule.query, rule.skip, *written, *others) for factor in product)
    rows, held = batch * heads * reads, 2 * batch * states * n_keys * summed
    divided = rows * (n_values + 5) if rule.normalizer else 0  # with masses, divisors, their slopes and the like
    raised = 6 * math.prod(of_token) if rule.input_gate else 0
    return kernel * (made + held + batch * heads * tokens_read * summed + divided + raised + (2 * rows * n_values if rule.skip else 0))


class _Sizes:
    """Sizes of a recurrence's products over batch, heads, tokens, writes and width; of an operand that is absent 1."""

    def __init__(self, axes: Mapping[str, str], absent: set[str], rule: Recurrence, dims: Dims) -> None:
        self.axes, self.absent, self.rule, self.dims = axes, absent, rule, dims
        self.places = places_of(rule.heads, rule.steps)

    def largest(self, place: int, *products: Product) -> int:
        return max(self.product(product)[place] for product in products)

    def product(self, product: Product) -> tuple[int, ...]:
        found = [1] * 5
        for factor in product:
            sizes = [1] * 5
            for place, n in zip(self._at(factor), self._shape(factor), strict=True):
                sizes[place] *= n
            found = list(map(max, found, sizes))
        return tuple(found)

    def lies(self, products: list[Product], full: tuple[int, ...]) -> bool:
        """Whether an array is one operand, or what a map made of it, as it lies."""
        if len(products) > 1 or len(products[0]) > 1:
            return False
        at = self._at(products[0][0])
        return self.product(products[0]) == full and at == sorted(at)

    def converted(self, factor: Factor | str, narrow: bool) -> int:
        """Elements of a factor's operand in the kernels' format, and of what its map makes of it."""
        if isinstance(factor, str) or factor.map is None:
            return narrow * math.prod(self._shape(factor))
        return narrow * math.prod(self._shape(factor.operand)) + math.prod(self._shape(factor))

    def _at(self, factor: Factor | str) -> list[int]:
        return [self.places.get(axis, WIDTH) for axis in self.axes[factor if isinstance(factor, str) else factor.operand].split()]

    def _shape(self, factor: Factor | str) -> tuple[int, ...]:
        """That of an operand, or of its map, which says its width when it is asked for one token's."""
        if isinstance(factor, str) or not hasattr(factor.map, "features"):
            return self._given(factor if isinstance(factor, str) else factor.operand, self.dims)
        one = {**self.dims, **{axis: 1 for axis in ("B", "T", "S") if axis in self.dims}}
        arrays = (np.ones(self._given(name, one)) for name in (factor.operand, *factor.weights))
        return (*self._given(factor.operand, self.dims)[:-1], factor.map.features(*arrays, *factor.numbers).shape[-1])  # type: ignore[union-attr]

    def _given(self, name: str, dims: Dims) -> tuple[int, ...]:
        return (1,) * len(self.axes[name].split()) if name in self.absent else shape(self.axes[name], dims)
