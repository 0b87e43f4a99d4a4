"""Gradient calls: what forward calls become when a candidate has a backward pass.

Every deciding call is asked with a random cotangent, and the first one with cotangents that show what random ones hide: zero, which no NaN
may come out of; a single one, which one query alone answers to; ones, for which D is the sum of a row of the output; the output itself, for which
D is large; and a cotangent that does not lie in memory as the output does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import definition, precision
from ..candidate import Candidate
from ..problem import Problem, bind, output_dtype
from ..spec import Variant, every_size, shape
from .gradients import affordable

if TYPE_CHECKING:
    from .probes import Probe

#: Sizes at which a definition can be differentiated numerically.
SMALL: Mapping[str, int] = every_size({"B": 1, "Hq": 2, "Hkv": 1, "T": 4, "S": 6, "D": 4, "E": 3, "Dq": 4, "Dk": 3, "A": 3, "M": 5})


def with_cotangents(
    probes: Sequence[Probe], variant: Variant, candidate: Candidate, rng: np.random.Generator, small: Callable[[], Iterator[Probe]]
) -> list[Probe]:
    """The same calls with cotangents, and more of them.

    Parameters
    ----------
    probes : sequence of Probe
    variant : Variant
    candidate : Candidate
        With `gradients`.
    rng : Generator
    small : callable
        Makes calls of sizes `SMALL`, for variants whose gradients have no formula.
    """
    names = candidate.cotangents
    found: list[Probe] = []
    first: tuple[Probe, Problem] | None = None
    for probe in probes:
        problem = _bound(variant, probe, names)
        if not probe.decides or not affordable(problem, dict.fromkeys(names)):
            found.append(probe)
            continue
        found.append(_with(probe, random(problem, rng)))
        first = first or (probe, problem)
    if first is None:
        for probe in small():
            problem = _bound(variant, probe, names)
            found.append(_with(probe, random(problem, rng)))
            first = first or (probe, problem)
    if first is not None:
        probe, problem = first
        found += [_with(replace(probe, title=f"d_out {kind}", repeatable=kind != "strided"), x) for kind, x in _kinds(problem, rng)]
    return found


def random(problem: Problem, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Normal cotangents of the outputs the problem returns, in the format each is stored in: of deviation one, or less where products with
    large operands would leave the format.
    """
    axes = {o.name: o.axes for o in problem.variant.outputs}
    most = max((float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0)) for x in problem.arrays if x.dtype != np.bool_), default=0.0)
    room = precision.format_of(problem.dtype).largest / (8.0 * max(most, 1.0) * max(problem.dims.values()))
    size = min(1.0, 2.0 ** np.floor(np.log2(room)))
    drawn = {name: size * rng.standard_normal(shape(axes[name], problem.dims)) for name in problem.returns}
    return {name: precision.round_to(x, output_dtype(problem, name)) for name, x in drawn.items()}


def _kinds(problem: Problem, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    name = problem.returns[0]
    drawn = random(problem, rng)[name]
    one = np.zeros_like(drawn)
    one.reshape(-1)[one.size // 2 : one.size // 2 + 1] = 1
    out = precision.round_to(np.nan_to_num(definition.run(problem)[name]), drawn.dtype)
    wide = np.zeros((*drawn.shape[:-1], 2 * drawn.shape[-1]), drawn.dtype)
    wide[..., ::2] = drawn
    kinds = {"zero": np.zeros_like(drawn), "one": one, "ones": np.ones_like(drawn), "proportional to out": out, "strided": wide[..., ::2]}
    for kind, x in kinds.items():
        yield kind, {name: x}


def _bound(variant: Variant, probe: Probe, names: Sequence[str]) -> Problem:
    return bind(variant, (), {**probe.operands, **probe.params}, tuple(names))


def _with(probe: Probe, cotangents: Mapping[str, Any]) -> Probe:
    return replace(probe, cotangents=cotangents, examines=(*probe.examines, "gradients"))
