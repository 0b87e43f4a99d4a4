"""Runs a suite and puts the report together."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from .. import catalog, precision
from ..derivatives import check_cotangent
from ..errors import CandidateError, OperandError, ParameterError
from ..problem import bind, from_layout, spelled, to_layout
from ..sequences import Sequences
from ..spec import Integer, Variant, shape
from . import candidates, probes, profiles
from .calibrate import calibrated
from .diagnose import diagnose
from .findings import Investigation
from .investigate import investigate
from .judge import Case, Malformed, axes_of, checked, compare, judge, real
from .localise import localise
from .probes import Probe
from .report import Report
from .tolerance import ALPHA


def check(
    target: Any,
    variant: Variant | None,
    dtype: Any,
    params: Mapping[str, Any],
    *,
    suite: str = "standard",
    framework: str | None = None,
    rename: Mapping[str, str] | None = None,
    returns: str | Sequence[str] | None = None,
    profile: str | profiles.Profile | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    gradients: Any = None,
) -> Report:
    """See `refattn.check`."""
    default = variant if variant is not None else catalog.variant("softmax")
    candidate = candidates.candidate(target, default, framework, rename, returns, gradients)
    judged = variant if variant is not None else catalog.variant(candidate.variant)
    if candidate.variant != judged.name:
        raise CandidateError(f"{candidate.name} computes {candidate.variant}, not {judged.name}")
    storage = precision.as_dtype(dtype)
    if not Integer().accepts(seed):
        raise ParameterError(f"{judged.name}: seed={seed!r}; must be {Integer().rule}")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise OperandError(f"{judged.name}: inputs is a {type(inputs).__name__}; must map operand names to arrays")
    fixed = {**candidate.fixed, **params}
    _check_params(judged, fixed)
    if returns is None and candidate is not target and judged.carried and candidate.returns == ("out",):
        candidate = candidates.returning(candidate, judged, *_smallest(judged, storage, fixed, candidate))
    how = (
        calibrated(judged, candidate, storage, fixed, ALPHA, seed)
        if isinstance(profile, str) and profile == "auto"
        else profiles.resolve(profile or candidate.profile or None, storage)
    )
    asked = (
        probes.suite(suite, judged, candidate, storage, fixed, seed)
        if inputs is None
        else probes.on_inputs(judged, candidate, storage, fixed, inputs)
    )
    alpha = ALPHA / max(1, len(asked.probes))
    cases = tuple(judge(judged, candidate, probe, how, alpha) for probe in _progress(asked.probes, f"asking {candidate.name}"))
    if not any(c.failed or (c.elements and c.probe.decides) for c in cases):  # declined, or nothing but calls of no elements
        reasons = "; ".join(dict.fromkeys(c.reason for c in cases)) or "there is nothing to ask"
        raise CandidateError(f"{candidate.name} could not be asked a single call of {judged.name} in {storage.name}: {reasons}")
    return Report(
        candidate=candidate.name,
        variant=judged,
        dtype=storage.name,
        profile=how,
        cases=cases,
        unexamined={**asked.unexamined, **_without_gradients(cases)},
        finding=localise(cases),
        params={name: judged.param(name).kind.read(value) for name, value in params.items()},
        suite="" if inputs is not None else suite,
        target=target if isinstance(target, str) else "",
        options=_options(framework, rename, returns, profile, gradients),
        investigation=investigate(judged, candidate, cases, how, alpha, storage, fixed, suite="" if inputs is not None else suite, seed=seed),
    )


def _without_gradients(cases: Sequence[Case]) -> dict[str, str]:
    """Gradients that were asked for and not given, with the reason."""
    asked = [c for c in cases if c.probe.cotangents and c.problem is not None and c.outcome in ("agrees", "differs")]
    refused = Counter(c.refused for c in asked if c.refused)
    wanted = {name for c in asked if not c.refused for name in c.truth if name.startswith("d_")}
    lost = wanted - {name for c in asked for name in c.ratios}
    return {f"gradients of {n} calls": reason for reason, n in refused.items()} | dict.fromkeys(sorted(lost), "it returned no such gradient")


def _options(
    framework: str | None,
    rename: Mapping[str, str] | None,
    returns: str | Sequence[str] | None,
    profile: str | profiles.Profile | None,
    gradients: Any,
) -> dict[str, Any]:
    """What a repetition has to say again, as `refattn.check` takes it."""
    said: dict[str, Any] = {
        "framework": framework,
        "rename": dict(rename or {}),
        "returns": (returns,) if isinstance(returns, str) else tuple(returns or ()),
        "profile": profile,
        "gradients": gradients,
    }
    return {name: value for name, value in said.items() if value}


def compare_arrays(
    answers: Any,
    variant: Variant,
    operands: Sequence[Any],
    keywords: Mapping[str, Any],
    cotangents: Mapping[str, Any],
    *,
    returns: str | Sequence[str] | None = None,
    layout: str | Sequences = "BHTD",
    profile: str | profiles.Profile | None = None,
) -> Report:
    """See `refattn.compare`."""
    named = tuple(variant.returns) if returns is None else (returns,) if isinstance(returns, str) else tuple(returns)
    differentiated = [n for n in named if n in {"d_" + o.name for o in variant.operands if o.kind == "real"}]
    problem = bind(variant, operands, keywords, [n for n in named if n not in differentiated] or variant.returns, layout)
    checked_cotangents = {name: check_cotangent(problem, name, x) for name, x in cotangents.items()}
    if differentiated and not cotangents:
        raise OperandError(f"{variant.name}: {differentiated[0]} for which cotangent? Pass at least one of d_out, ...")
    given = tuple(answers) if isinstance(answers, tuple | list) else (answers,)
    if len(given) != len(named):
        raise CandidateError(f"{variant.name}: {len(given)} arrays for {len(named)} outputs ({', '.join(named)})")
    outputs = {name: _in_bhtd(problem, name, x) for name, x in zip(named, given, strict=True)}
    how = profiles.resolve(profile, problem.dtype)
    probe = Probe("the given arrays", problem.given, problem.params, ("given operands",), cotangents=checked_cotangents)
    cases: tuple[Case, ...] = (compare(problem, outputs, probe, how, ALPHA),)
    params = {name: problem.params[name] for name in keywords if name in problem.params}
    known = Investigation(diagnosis=diagnose(variant, cases, how, ALPHA, cotangents=tuple(checked_cotangents))[0])
    return Report(
        "the given output", variant, problem.dtype.name, how, cases, finding=localise(cases), params=params, given=True, investigation=known
    )


def _in_bhtd(problem: Any, name: str, x: Any) -> np.ndarray:
    axes, operand = axes_of(problem.variant, name), name.removeprefix("d_")
    if name != operand and operand not in problem.given:
        raise CandidateError(f"{problem.variant.name}: there is no {name}, because no {operand} was given")
    try:
        if name != operand:
            x = real(x, name, to_layout(axes, problem.given[operand], problem.layout, operand=True).shape, f"that of {operand}")
            return from_layout(axes, x, problem.layout, operand=True)
        return from_layout(axes, checked(problem, name, x, spelled(axes, problem.layout)), problem.layout)
    except Malformed as complaint:
        raise CandidateError(f"{problem.variant.name}: {complaint}") from complaint


def _check_params(variant: Variant, params: Mapping[str, Any]) -> None:
    """Refuse parameters before any call is made: bind them to the smallest problem there is."""
    dims = dict.fromkeys(variant.axes, 1)
    operands = {o.name: np.ones(shape(o.axes, dims)) for o in variant.operands if not o.optional}
    bind(variant, (), {**operands, **params})


def _smallest(variant: Variant, dtype: np.dtype, params: Mapping[str, Any], candidate: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Operands and parameters of the smallest call there is."""
    dims = dict.fromkeys(variant.axes, 1)
    operands = {o.name: np.ones(shape(o.axes, dims)).astype(dtype) for o in variant.operands if not o.optional}
    problem = bind(variant, (), {**operands, **params})
    return operands, {name: value for name, value in problem.params.items() if name in candidate.params}


def _progress(items: Sequence[Probe], text: str) -> Iterator[Probe]:
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        return iter(items)
    tracked: Iterable[Probe] = track(items, text, console=console, transient=True)
    return iter(tracked)
