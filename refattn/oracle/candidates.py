"""Finds the implementation to be judged and makes a Candidate of it: a callable, an adapter's name, a module or a file."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import adapters
from ..candidate import Candidate, Inexpressible
from ..errors import CandidateError
from ..spec import Variant


def candidate(
    target: Any,
    variant: Variant,
    framework: str | None = None,
    rename: Mapping[str, str] | None = None,
    returns: str | Sequence[str] | None = None,
    gradients: Any = None,
) -> Candidate:
    """The implementation `target` stands for.

    Parameters
    ----------
    target : callable, Candidate or str
        A string is an adapter's name, ``package.module:function`` or ``path/to/file.py:function``.
    variant : Variant
        What it claims to compute.
    framework : str, optional
        Whose arrays it takes; NumPy's unless said.
    rename : mapping, optional
        Its own names of operands and parameters: ``{"causal": "is_causal"}``.
    returns : str or sequence of str, optional
        What it returns, in order; ``"out"`` unless said.
    gradients : callable, str or bool, optional
        Its backward pass, or where that is; True differentiates the candidate by its framework.

    Raises
    ------
    CandidateError, BackendUnavailableError, UnknownVariantError
    """
    if isinstance(target, Candidate) or (isinstance(target, str) and ":" not in target):
        if isinstance(target, str) and target.endswith(".py"):
            raise CandidateError(f"{target}: which function? Say {target}:FUNCTION")
        ready = adapters.load(target) if isinstance(target, str) else target
        for option, value in (("framework", framework), ("rename", rename), ("returns", returns)):
            if value:
                raise CandidateError(f"{ready.name} says itself what it takes and returns; {option}={value!r} is for functions")
        return _asked_for_gradients(ready, gradients, isinstance(target, str))
    if isinstance(target, str):
        function, name = _located(target), target
    else:
        function, name = target, _name(target)
    if not callable(function):
        raise CandidateError(f"{name} is a {type(function).__name__}; it must be callable")
    outputs = ("out",) if returns is None else (returns,) if isinstance(returns, str) else tuple(returns)
    known = [o.name for o in variant.operands] + [p.name for p in variant.params] + ["d_" + o.name for o in variant.outputs]
    renamed = dict(rename) if isinstance(rename, Mapping) else {} if rename is None else {repr(rename): ""}
    strange = [n for n in renamed if n not in known]
    if strange:
        raise CandidateError(f"{name}: rename has {strange[0]!r}, which is no operand or parameter of {variant.name}; known are {', '.join(known)}")
    unknown = [o for o in outputs if o not in [x.name for x in variant.outputs]]
    if unknown:
        raise CandidateError(f"{name} is said to return {unknown[0]!r}; {variant.name} returns {', '.join(o.name for o in variant.outputs)}")
    found = _wrapped(function, name, variant, framework, renamed, outputs)
    if gradients is None or gradients is False:
        return found
    if gradients is True:
        return _differentiated(found, function, variant, framework, renamed)
    backward = _located(gradients) if isinstance(gradients, str) else gradients
    if not callable(backward):
        raise CandidateError(f"{name}: gradients is a {type(backward).__name__}; it must be callable, or True")
    return _with_backward(found, backward, variant, framework, renamed)


def returning(found: Candidate, variant: Variant, operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Candidate:
    """A function that did not say what it returns, asked once: more than one array are the output and all that is carried on."""
    try:
        answer = found.call(operands, params)
    except Exception:  # what it is about shows in the calls that are judged
        return found
    several = isinstance(answer, tuple | list) and len(answer) == 1 + len(variant.carried)
    return replace(found, returns=("out", *variant.carried)) if several else found


def _wrapped(function: Any, name: str, variant: Variant, framework: str | None, rename: Mapping[str, str], returns: tuple[str, ...]) -> Candidate:
    convert = adapters.converter(framework or "numpy")
    required = [o.name for o in variant.operands if not o.optional]
    optional = [o.name for o in variant.operands if o.optional]
    named, needs, anything = _keywords(function, len(required))
    worth_asking = {*optional, *rename, *(p.name for p in variant.params if p.tries)}  # all that is said to whoever takes any keyword
    known = [*optional, *(p.name for p in variant.params)]
    taken = {n for n in known if rename.get(n, n) in named or (anything and n in worth_asking)}
    lost = [n for n in rename if n not in taken and n not in required and n in known]
    if lost:
        raise CandidateError(f"{name} takes no {rename[lost[0]]!r}, which rename says it calls {lost[0]}")

    def call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Any:
        positional, keywords = _arguments(variant, operands, params, convert, rename, needs)
        return function(*positional, **keywords)

    operands, params = frozenset([*required, *taken & set(optional)]), frozenset(taken - set(optional))
    return Candidate(name, call, operands, params, returns, variant=variant.name, words=False)


def _arguments(
    variant: Variant,
    operands: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    convert: Callable[[np.ndarray], Any],
    rename: Mapping[str, str],
    needs: Set[str],
) -> tuple[list[Any], dict[str, Any]]:
    """What a function is given: required operands by position, the rest by its own names; None only where it has no default."""
    optional = [o.name for o in variant.operands if o.optional]
    positional = [convert(operands[o.name]) for o in variant.operands if not o.optional]
    keywords: dict[str, Any] = {rename.get(n, n): convert(operands[n]) for n in optional if n in operands}
    keywords |= {spelled: None for spelled in (rename.get(n, n) for n in optional if n not in operands) if spelled in needs}
    declared = {p.name: p for p in variant.params}
    for n, value in params.items():
        spelled = rename.get(n, n)
        if value is not None:
            keywords[spelled] = value
        elif spelled in needs:  # it has no default of its own, so a number that follows from the sizes is worked out for it
            keywords[spelled] = declared[n].encode(None, _dims(variant, operands)) if callable(declared[n].absent) else None
    return positional, keywords


# ---- backward passes ---------------------------------------------------------------------------------------------------------------


def _asked_for_gradients(ready: Candidate, gradients: Any, adapter: bool) -> Candidate:
    """A ready candidate with its own backward pass, or without: an adapter's is asked only when that is wanted."""
    if gradients is None or gradients is False:
        return replace(ready, gradients=None) if adapter else ready
    if gradients is not True:
        raise CandidateError(f"{ready.name} says itself what its gradients are; gradients={gradients!r} is for functions")
    if ready.gradients is None:
        raise CandidateError(f"{ready.name} has no gradients that could be asked for")
    return ready


def _with_backward(found: Candidate, backward: Any, variant: Variant, framework: str | None, rename: Mapping[str, str]) -> Candidate:
    """A candidate whose backward pass is a function of its own: it takes what the candidate takes, as far as it names it, and cotangents."""
    convert = adapters.converter(framework or "numpy")
    named, needs, anything = _keywords(backward, sum(not o.optional for o in variant.operands))
    cotangents = tuple(o.name for o in variant.outputs if rename.get("d_" + o.name, "d_" + o.name) in named)
    cotangents = cotangents or (("out",) if anything else ())
    if not cotangents:
        raise CandidateError(f"{_name(backward)} takes no {rename.get('d_out', 'd_out')}, the cotangent it is to be given")
    optional = {o.name for o in variant.operands if o.optional}

    def gradients(operands: Mapping[str, np.ndarray], params: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> Any:
        told = {n: value for n, value in params.items() if rename.get(n, n) in named or anything}
        for n, value in {**params, **{n: x for n, x in operands.items() if n in optional}}.items():
            if not (rename.get(n, n) in named or anything) and (n in optional or value != variant.param(n).default):
                raise Inexpressible(f"{_name(backward)} takes no {n}")
        positional, keywords = _arguments(variant, operands, told, convert, rename, needs - {rename.get("d_" + n, "d_" + n) for n in given})
        return backward(*positional, **keywords, **{rename.get("d_" + n, "d_" + n): convert(x) for n, x in given.items()})

    return replace(found, gradients=gradients, cotangents=cotangents)


def _differentiated(found: Candidate, function: Any, variant: Variant, framework: str | None, rename: Mapping[str, str]) -> Candidate:
    """A candidate that its framework differentiates."""
    convert, vjp = adapters.converter(framework or "numpy"), adapters.differentiator(framework or "numpy")
    _, needs, _ = _keywords(function, sum(not o.optional for o in variant.operands))
    real = {o.name for o in variant.operands if o.kind == "real"}

    def gradients(operands: Mapping[str, np.ndarray], params: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> Any:
        def forward(leaves: Mapping[str, Any]) -> dict[str, Any]:
            made = {n: leaves[n] if n in leaves else convert(x) for n, x in operands.items()}
            positional, keywords = _arguments(variant, made, params, lambda x: x, rename, needs)
            answer = function(*positional, **keywords)
            return dict(zip(found.returns, answer if isinstance(answer, tuple | list) else (answer,), strict=True))

        return vjp(forward, {n: x for n, x in operands.items() if n in real}, given)

    return replace(found, gradients=gradients, cotangents=tuple(n for n in ("out", "lse") if n in found.returns) or found.returns[:1])


def _dims(variant: Variant, operands: Mapping[str, np.ndarray]) -> dict[str, int]:
    known = [o for o in variant.operands if o.name in operands and not o.broadcast]
    return {axis: n for o in known for axis, n in zip(o.axes.split(), operands[o.name].shape, strict=True)}


def _keywords(function: Any, positional: int) -> tuple[frozenset[str], frozenset[str], bool]:
    """The keywords a function names, those of them it has no default for, and whether it takes any other."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin that tells nothing: it is given its operands only
        return frozenset(), frozenset(), False
    first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:positional]
    free = [p for p in parameters if p not in first and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needs = frozenset(p.name for p in free if p.default is p.empty)
    return frozenset(p.name for p in free), needs, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _located(target: str) -> Any:
    place, _, attribute = target.rpartition(":")
    module = _from_file(Path(place), target) if place.endswith(".py") else _from_name(place, target)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        there = ", ".join(sorted(n for n, x in vars(module).items() if inspect.isfunction(x) and not n.startswith("_")))
        raise CandidateError(f"{target}: {place} has no {attribute!r}; its functions are {there or 'none'}") from None


def _from_file(path: Path, target: str) -> Any:
    if not path.is_file():
        raise CandidateError(f"{target}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:  # a script may well call sys.exit
        raise CandidateError(f"{target}: {path} could not be run: {type(problem).__name__}: {problem}") from problem
    finally:
        sys.path.pop(0)
    return module


def _from_name(name: str, target: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as problem:
        raise CandidateError(f"{target}: module {name} could not be imported: {type(problem).__name__}: {problem}") from problem
    finally:
        sys.path.pop(0)


def _name(function: Any) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module}.{name}" if module and module != "__main__" else name
