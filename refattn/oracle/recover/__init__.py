"""What an implementation computes, read off its answers to a few small questions, without a catalogue of what might be wrong.

The definition is asked the same questions and read in the same way, so that a fact comes with what it should be; nothing here knows what the
right answer to any question is.  Masks show where weights are zero; routing, where a marked value goes; scale and soft-cap, in how a
weight's logarithm grows with q . k; normalisation and sinks, in what rows sum to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ... import precision
from ...candidate import Candidate
from ...spec import Variant
from .. import profiles
from ..findings import Fact
from . import curves, positions, repeats, routing, rows, visible
from .asking import WIDE, Kernel


def facts(
    variant: Variant, candidate: Candidate, dtype: Any, fixed: Mapping[str, Any] | None = None, profile: str | profiles.Profile | None = None
) -> tuple[Fact, ...]:
    """Facts about an implementation, each beside what the variant says.

    Parameters
    ----------
    variant : Variant
    candidate : Candidate
        Asked some twenty small calls; those that it declines, or fails in, tell nothing.
    dtype : dtype
        Of the operands.
    fixed : mapping, optional
        Parameters that keep one value throughout.
    profile : str or Profile, optional
        Its arithmetic, which bounds how finely numbers can be read; its own or the usual one of the dtype if not said.

    Returns
    -------
    tuple of Fact
        Empty where the implementation answers nothing, or its answers are no weighted sums of values.
    """
    if not _weighs(variant):
        return ()
    storage = precision.as_dtype(dtype)
    kernel = Kernel(variant, candidate, storage, dict(fixed or {}), profiles.resolve(profile or candidate.profile or None, storage))
    if kernel.roles is not None:
        kernel = _answering(kernel)
    found = _read(kernel)
    for unit in _UNITS:
        if any(not f.agrees for f in found) and unit > 4 * kernel.resolution.relative:
            right = {(f.subject, f.call) for f in _read(replace(kernel, coarser=unit)) if f.agrees}
            found = [f if f.agrees or (f.subject, f.call) not in right else _nearly(f, unit) for f in found]
    return (*found, *repeats.facts(kernel)) if kernel.roles is not None else tuple(found)


def _weighs(variant: Variant) -> bool:
    """Whether outputs are sums of values with weights that do not depend on them: not where writes erase, or nobody has said what is computed."""
    if variant.plan is not None:
        return True
    if variant.recurrence is None or not {"q", "k", "v"} <= {o.name for o in variant.operands}:
        return False
    rule = variant.recurrence(dict.fromkeys(variant.axes, 2), {p.name: p.kind.read(p.default) for p in variant.params})
    return not any(w.erase for w in rule.writes)


#: Roundings that answers are read with once more where they do not fit those of their format: of float32, float16 and bfloat16.
_UNITS = (2.0**-22, 2.0**-10, 2.0**-7)


def _answering(kernel: Kernel) -> Kernel:
    """The kernel with the optional operand it cannot do without, if it is one that answers nothing otherwise."""
    parts = [()] + [(name,) for name in (kernel.optional(part) for part in ("mask", "bias", "sinks")) if name]
    return next((one for one in (replace(kernel, always=given) for given in parts) if one.weights(one.sizes()) is not None), kernel)


def _read(kernel: Kernel) -> list[Fact]:
    """All facts; of an implementation whose output channels are not the values', only those that do not need them."""
    if kernel.roles is None:
        return list(positions.influence(kernel))
    first = list(routing.channels(kernel, WIDE["D"], WIDE["E"]))
    if not all(f.agrees for f in first):
        return first
    found = [*first, *(f for question in (visible, routing, rows, curves, positions) for f in question.facts(kernel))]
    turned = any(f.subject == positions.ROTATION and not f.agrees for f in found)
    return [f for f in found if not (turned and f.subject in _BEFORE_ROTATION)]


#: What is read off scores as if they depended on q . k alone.
_BEFORE_ROTATION = (routing.KEY_SOURCE, routing.KEY_TOKEN, curves.SCORE, curves.SCORE_BY_CHANNEL)


def _nearly(f: Fact, unit: float) -> Fact:
    """A fact that is right to a coarser rounding only is still wrong, and is said to be no more than that."""
    said = "; right if rounded to a relative"
    return f if said in f.found else replace(f, found=f"{f.found}{said} {unit:.1g}")
