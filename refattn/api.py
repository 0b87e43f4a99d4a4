"""The public calls: a few lines each, on top of the rooms that do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import catalog, definition, problem
from .errors import BackendUnavailableError, ParameterError

BACKENDS = ("auto", "definition", "cpu", "cuda")


def attend(
    name: str,
    *operands: Any,
    returns: str | Sequence[str] | None = None,
    layout: str = "BHTD",
    backend: str = "auto",
    out: Any = None,
    **keywords: Any,
) -> Any:
    """Any variant of the catalogue.

    Parameters
    ----------
    name : str
        A name from `variants()`.
    *operands : array_like
        In the variant's order (`describe`); optional ones may also be given by name.
    returns : str or sequence of str, optional
        Outputs wanted, such as ``("out", "lse")``.
    layout : {"BHTD", "BTHD"}
        Order of head and sequence axes, in operands and outputs alike.
    backend : {"auto", "definition", "cpu", "cuda"}
        Only ``"auto"`` chooses; a backend named and not there is an error.
    out : ndarray or tuple of ndarray, optional
        Where to write the outputs.
    **keywords
        The variant's parameters, and operands by name.

    Returns
    -------
    ndarray or tuple of ndarray
        In the operands' common dtype and layout; log-sum-exps and states at least float32.

    Raises
    ------
    UnknownVariantError, ShapeError, DtypeError, OperandError, ParameterError, BackendUnavailableError
    """
    call = problem.bind(catalog.variant(name), operands, keywords, returns, layout)
    targets = None if out is None else problem.check_out(call, out)
    _choose(name, backend)
    return problem.release(call, definition.run(call), targets)


def attention(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
    """Softmax attention, the everyday door: ``attend("softmax", q, k, v, ...)``.

    Parameters
    ----------
    q : array_like, shape (B, Hq, T, D)
    k : array_like, shape (B, Hkv, S, D)
    v : array_like, shape (B, Hkv, S, E)
    **keywords
        ``causal``, ``window``, ``mask``, ``bias``, ``scale``, ``softcap``, ``sinks``, ``empty_rows``, and what `attend` takes.

    Returns
    -------
    ndarray, shape (B, Hq, T, E), or what ``returns`` asks for

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> q = np.zeros((1, 1, 1, 4)); k = np.ones((1, 1, 2, 4)); v = np.array([3.0, 5.0]).reshape(1, 1, 2, 1)
    >>> float(ra.attention(q, k, v)[0, 0, 0, 0])
    4.0
    """
    return attend("softmax", q, k, v, **keywords)


def _choose(name: str, backend: str) -> str:
    if backend not in BACKENDS:
        raise ParameterError(f"{name}: {catalog.unknown('backend', backend, BACKENDS)}")
    if backend in ("cpu", "cuda"):
        raise BackendUnavailableError(f"{name}: backend {backend!r} is not part of this version; use 'definition' or 'auto'")
    return "definition"


def variants(family: str | None = None) -> tuple[str, ...]:
    """Names of all variants, or of one family's."""
    return catalog.names(family)
