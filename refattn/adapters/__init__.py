"""Other people's attention as candidates: one file per system, found by walking this package.

An adapter knows one system and nothing of the others.  Its docstring says what is called, what that call means (alignment, empty rows,
polarity, order) and what it cannot say.  It translates; it never computes attention itself: a feature is expressed through the system's
own documented means or refused with `refattn.candidate.Inexpressible`.  Frameworks are imported inside functions only.

Each file holds

    REQUIRES   modules that must be importable
    INSTALL    the command that provides them
    CANNOT     operand, parameter or dtype -> why the system has no way to say it
    DTYPES     element types the system computes in
    load()     -> Candidate
    convert(x) -> the framework's own array of a NumPy array
    vjp(function, leaves, cotangents) -> gradients, where the framework differentiates
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from ..candidate import Candidate, Inexpressible
from ..catalog import unknown
from ..errors import BackendUnavailableError, CandidateError, UnknownVariantError

#: The softmax variant's operands, and its parameters but `empty_rows`, which is how a system behaves.  A candidate takes these less CANNOT.
OPERANDS = frozenset({"q", "k", "v", "bias", "mask", "sinks"})
PARAMS = frozenset({"scale", "softcap", "causal", "window"})


def names() -> tuple[str, ...]:
    """Every adapter there is, as the command line spells it."""
    return tuple(sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__)))


def load(name: str) -> Candidate:
    """The candidate of an adapter.

    Parameters
    ----------
    name : str
        One of `names`.

    Returns
    -------
    Candidate
        Its ``name`` carries the framework's version.

    Raises
    ------
    UnknownVariantError
        With the nearest name there is.
    BackendUnavailableError
        When the framework, or the device it needs, is not there.
    """
    candidate: Candidate = _module(name).load()
    return candidate


def converter(framework: str) -> Callable[[np.ndarray], Any]:
    """What turns a NumPy array into a framework's own array, for callables that want those.

    Parameters
    ----------
    framework : str
        One of `names`.

    Returns
    -------
    callable
        Takes an array of any dtype of `refattn.precision` (or boolean, or integer), any strides, length zero included.  The result holds
        the same bits, and the same strides where the framework has such a thing; a read-only array is copied, never handed out writable.
        The way back is `refattn.foreign.as_numpy`.

    Raises
    ------
    UnknownVariantError, BackendUnavailableError
    """
    convert: Callable[[np.ndarray], Any] = _module(framework).convert
    return convert


def differentiator(framework: str) -> Callable[..., Mapping[str, Any]]:
    """A framework's reverse mode, for candidates that are to be differentiated by it.

    Parameters
    ----------
    framework : str
        One of `names`.

    Returns
    -------
    callable
        ``vjp(function, leaves, cotangents)``: `function` takes the framework's arrays of the NumPy arrays `leaves` by name and returns its
        outputs by name; gradients for `cotangents`, NumPy arrays by output, come back under ``"d_"`` and the name of a leaf.

    Raises
    ------
    UnknownVariantError, BackendUnavailableError, CandidateError
    """
    module = _module(framework)
    if not hasattr(module, "vjp"):
        raise CandidateError(f"{framework} differentiates nothing; pass the backward pass itself as gradients, or framework='torch' or 'jax'")
    vjp: Callable[..., Mapping[str, Any]] = module.vjp
    return vjp


def refuse(module: ModuleType | Any, operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> None:
    """Raise `Inexpressible` for what a file's CANNOT and DTYPES tables rule out."""
    for name, reason in module.CANNOT.items():
        if operands.get(name) is not None or params.get(name) not in (None, False):
            raise Inexpressible(reason)
    dtype = operands["q"].dtype.name
    if dtype not in module.DTYPES:
        raise Inexpressible(module.CANNOT.get(dtype, f"no attention in {dtype}"))


def _module(name: str) -> ModuleType:
    if name not in names():
        raise UnknownVariantError(unknown("adapter", name, names()))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    for package in module.REQUIRES:
        try:
            importlib.import_module(package)
        except ImportError as problem:
            reason = str(problem).partition("\n")[0]
            raise BackendUnavailableError(f"{name}: {package} cannot be imported ({reason}); install it with: {module.INSTALL}") from problem
    return module
