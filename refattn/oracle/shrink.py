"""A failing call as small as possible that still fails: what is not needed is taken away, a part at a time.

Delta debugging (Zeller & Hildebrandt, IEEE TSE 28(2), 2002): parameters go back to their defaults, optional operands are left out, axes are cut
to their first entries, and numbers become small integers, as long as the call still fails in the same way.  Each pass starts again with what
the last one left, until nothing more can go.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..candidate import Candidate
from ..errors import RefattnError
from ..spec import Variant
from .judge import Case, judge
from .probes import Probe
from .profiles import Profile

#: Calls made at most, and seconds spent at most.
CALLS, SECONDS = 400, 2.0


def minimal(
    variant: Variant,
    candidate: Candidate,
    case: Case,
    profile: Profile,
    alpha: float,
    *,
    keep: Collection[str] = (),
    same: Callable[[Case], bool] | None = None,
    calls: int = CALLS,
    seconds: float = SECONDS,
) -> Case:
    """The smallest call found that still fails.

    Parameters
    ----------
    variant : Variant
    candidate : Candidate
    case : Case
        A failing call that fails by itself.
    profile : Profile
    alpha : float
    keep : collection of str
        Parameters that stay as they are, beside those the candidate says are how it behaves.
    same : callable, optional
        Whether a smaller failing call fails for the same reason; any that ends alike (differs, NaN or not; raises the same error) unless said.
    calls, seconds : int, float
        Most that may be spent; the smallest found by then is the result.

    Returns
    -------
    Case
        `case` itself where it does not fail when asked again.
    """
    reason, kept = same or _alike(case), {*keep, *candidate.fixed}
    until = time.perf_counter() + seconds
    left = calls

    def fails(probe: Probe) -> Case | None:
        nonlocal left
        if left <= 0 or time.perf_counter() > until:
            return None
        left -= 1
        try:
            tried = judge(variant, candidate, probe, profile, alpha)
        except RefattnError:  # a call that the variant itself refuses
            return None
        return tried if tried.failed and reason(tried) else None

    smallest = fails(replace(case.probe, decides=True))
    if smallest is None:
        return case
    going = True
    while going and left > 0 and time.perf_counter() < until:
        going = False
        for attempts in (functools.partial(_fewer_features, kept), _fewer_entries, _plainer_numbers):
            again = True
            while again:
                again = False
                for probe in attempts(variant, smallest):
                    found = fails(probe)
                    if found is not None:
                        smallest, again, going = found, True, True
                        break
    title = ", ".join([_sizes(smallest), *(f"{n}={v!r}" for n, v in _changed(variant, smallest.probe).items())])
    return replace(smallest, probe=replace(smallest.probe, title=title))


def _alike(case: Case) -> Callable[[Case], bool]:
    nan = _has_nan(case)
    return lambda tried: tried.outcome == case.outcome and tried.reason == case.reason and _has_nan(tried) == nan


def _has_nan(case: Case) -> bool:
    return any(bool(np.isnan(x.astype(np.float64)).any()) for x in case.answers.values())


def _changed(variant: Variant, probe: Probe) -> dict[str, Any]:
    return {p.name: probe.params[p.name] for p in variant.params if probe.params.get(p.name, p.default) != p.default}


def _sizes(case: Case) -> str:
    return " ".join(f"{axis}={n}" for axis, n in case.problem.dims.items()) if case.problem else "a smaller call"


def _fewer_features(kept: Collection[str], variant: Variant, case: Case) -> Iterator[Probe]:
    """One parameter at its default, or one optional operand left out."""
    probe = case.probe
    for name in (n for n in _changed(variant, probe) if n not in kept):
        yield replace(probe, params={n: v for n, v in probe.params.items() if n != name})
    for o in variant.operands:
        if o.optional and o.name in probe.operands:
            yield replace(probe, operands={n: x for n, x in probe.operands.items() if n != o.name})
    for output in probe.cotangents:
        yield replace(probe, cotangents={n: x for n, x in probe.cotangents.items() if n != output})


def _fewer_entries(variant: Variant, case: Case) -> Iterator[Probe]:
    """One axis cut: to one entry, to half, by one.  Query heads go by whole groups, and with their key-value heads."""
    dims = dict(case.problem.dims) if case.problem else {}
    for axis in dims:
        if axis == "Hkv" and "Hq" in dims:
            continue
        for n in _smaller(dims[axis]):
            if axis == "Hq" and "Hkv" in dims:
                group = dims["Hq"] // max(dims["Hkv"], 1)
                heads = {(n, 1), (n, n), (n, n // group)} if group and n % group == 0 else {(n, 1), (n, n)}
                for h, g in sorted(heads):
                    if 0 < g <= dims["Hkv"]:
                        yield _cut(variant, case.probe, dims, {"Hq": h, "Hkv": g})
            else:
                yield _cut(variant, case.probe, dims, {axis: n})
    if dims.get("Hkv", 1) > 1 and "Hq" in dims:
        yield _cut(variant, case.probe, dims, {"Hkv": 1})


def _smaller(n: int) -> list[int]:
    return sorted({m for m in (1, 2, 3, n // 4, n // 2, 3 * n // 4, n - 1) if 0 < m < n})


def _cut(variant: Variant, probe: Probe, dims: Mapping[str, int], sizes: Mapping[str, int]) -> Probe:
    """The first entries of operands and cotangents along axes; along one that is a sum of others, or of size one by broadcasting, all of them."""

    def first(x: np.ndarray, names: str) -> np.ndarray:
        shape, axes = x.shape, names.split()
        for at, axis in enumerate(axes[len(axes) - x.ndim :]):
            if axis in sizes and shape[at] == dims[axis] > sizes[axis]:
                x = x[(slice(None),) * at + (slice(0, sizes[axis]),)]
        return np.ascontiguousarray(x).reshape(x.shape)

    operands = {o.name: first(probe.operands[o.name], o.axes) for o in variant.operands if o.name in probe.operands}
    cotangents = {o.name: first(probe.cotangents[o.name], o.axes) for o in variant.outputs if o.name in probe.cotangents}
    return replace(probe, operands=operands, cotangents=cotangents)


def _plainer_numbers(variant: Variant, case: Case) -> Iterator[Probe]:
    """One operand or cotangent of integers, of ones, or of zeros; a mask that allows all."""
    operands, cotangents = dict(case.probe.operands), dict(case.probe.cotangents)
    for kept, name, x in [(held, name, x) for held in (operands, cotangents) for name, x in held.items()]:
        if not x.size:
            continue
        plain = [np.ones_like(x)] if x.dtype == np.bool_ else [np.zeros_like(x), np.ones_like(x), np.rint(x.astype(np.float64)).astype(x.dtype)]
        here = next((n for n, y in enumerate(plain) if np.array_equal(x, y)), len(plain))  # never back to what is less plain
        for y in plain[:here]:
            changed = {**kept, name: y}
            yield replace(case.probe, operands=changed) if kept is operands else replace(case.probe, cotangents=changed)
