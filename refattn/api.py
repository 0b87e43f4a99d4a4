"""The public calls: a few lines each, on top of the rooms that do the work."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import backends, catalog, costs, definition, precision, problem, repeats
from .costs import Cost
from .describe import Description, bibtex, described
from .errors import Disagreement, OperandError, ParameterError
from .functions import KEYWORDS as FUNCTION_KEYWORDS
from .functions import BlockMask, bind_mask
from .spec import Integer, Variant

if TYPE_CHECKING:
    from .oracle.report import Report
    from .sequences import Sequences


def attend(
    name: str,
    /,
    *operands: Any,
    returns: str | Sequence[str] | None = None,
    layout: str | Sequences = "BHTD",
    backend: str = "auto",
    form: str | None = None,
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
    layout : {"BHTD", "BTHD"} or Packed or Paged
        Order of head and sequence axes, in operands and outputs alike; or where sequences of different lengths lie.
    backend : {"auto", "definition", "cpu", "cuda"}
        Only ``"auto"`` chooses; a backend named and not there is an error.
    form : {"recurrent", "quadratic", "chunked"}, optional
        How the CPU engine computes a variant that has a recurrence: token by token, every token looking back at every other, or chunk by chunk.
        They agree up to rounding; unless said, the engine chooses.
    out : ndarray or tuple of ndarray, optional
        Where to write the outputs.
    **keywords
        The variant's parameters, operands by name, and functions of your own (see Notes).

    Returns
    -------
    ndarray or tuple of ndarray
        In the operands' common dtype and layout; log-sum-exps and states at least float32.

    Raises
    ------
    UnknownVariantError, ShapeError, DtypeError, OperandError, ParameterError, BackendUnavailableError

    Notes
    -----
    Variants whose scores are scaled dot products (softmax, sigmoid, ...) take Python functions of one score, or ones compiled by Numba, as functions
    that these call have to be:

    ``score_mod(score, b, h, i, j, *aux)``
        The number that takes the place of a score, after scale and soft-cap, before bias, masks and normaliser.  -inf hides a key.
    ``mask_mod(b, h, i, j, *aux)``
        Whether query i of head h may attend key j; beside all other masks.
    ``block_mask``
        A `BlockMask` made of a mask_mod, which it stands for.
    ``slope(score, b, h, i, j, *aux)``
        The derivative of score_mod with respect to the score, for `gradients`.
    ``aux``
        Arrays that functions read: one, or several that a function takes all or none of, or a mapping from parameter names.  They
        get no gradient.

    b counts batches (or sequences), h query heads, i queries and j keys, all from 0, and the last two within their sequence.
    """
    variant = catalog.variant(name)
    key = repeats.key_of(variant, backend, returns, layout, operands, keywords) if variant.plan is not None and out is None and form is None else None
    if (known := repeats.known(key)) is not None:
        return known(operands, keywords)
    call = problem.bind(variant, operands, keywords, returns, layout)
    targets = None if out is None else problem.check_out(call, out)
    found = problem.release(call, backends.run(call, backend, form), targets)
    repeats.remember(key, call, backend, operands, keywords)
    return found


def attention(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
    """Softmax attention, the everyday door: ``attend("softmax", q, k, v, ...)``.

    Parameters
    ----------
    q : array_like, shape (B, Hq, T, D)
    k : array_like, shape (B, Hkv, S, D)
    v : array_like, shape (B, Hkv, S, E)
    **keywords
        ``causal``, ``window``, ``mask``, ``bias``, ``scale``, ``softcap``, ``sinks``, ``empty_rows``, ``score_mod``, ``mask_mod``, and what
        `attend` takes.

    Returns
    -------
    ndarray, shape (B, Hq, T, E), or what ``returns`` asks for

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> q = np.zeros((1, 1, 1, 4)); k = np.ones((1, 1, 2, 4)); v = np.array([3.0, 5.0]).reshape(1, 1, 2, 1)
    >>> float(ra.attention(q, k, v)[0, 0, 0, 0])
    4.0
    >>> float(ra.attention(q, k, v, mask_mod=lambda b, h, i, j: j > 0)[0, 0, 0, 0])
    5.0
    """
    return attend("softmax", q, k, v, **keywords)


def block_mask(mask_mod: Any, *, T: int, S: int, B: int = 1, Hq: int = 1, aux: Any = None, block: Sequence[int] = (128, 128)) -> BlockMask:
    """Find out which tiles of queries and keys a mask_mod hides or shows whole: made once, it saves time in every call it is given to.

    Parameters
    ----------
    mask_mod : callable
        As `attend` takes it.
    T, S : int
        Queries and keys.
    B, Hq : int
        Batches and query heads; 1 where the mask is the same for all of them.
    aux : array_like, sequence or mapping of array_like, optional
        What mask_mod takes beside positions, as `attend` takes it; copied.
    block : (int, int)
        Queries and keys of a tile.

    Returns
    -------
    BlockMask

    Raises
    ------
    ParameterError, DtypeError, OperandError

    Examples
    --------
    >>> import refattn as ra
    >>> ra.block_mask(lambda b, h, i, j: j <= i, T=512, S=512)
    BlockMask(<lambda>, B=1, Hq=1, T=512, S=512, block=(128, 128), 37.5% of 16 tiles skipped)
    """
    arrays, tile = bind_mask(mask_mod, aux, {"B": B, "Hq": Hq, "T": T, "S": S}, block)
    shape = (int(B), int(Hq), int(T), int(S))
    return BlockMask(mask_mod, tile, backends.tile_classes(mask_mod, arrays, shape, tile), shape[2], shape[3], arrays)


def gradients(
    name: str,
    /,
    *operands: Any,
    d_out: Any = None,
    layout: str | Sequences = "BHTD",
    backend: str = "auto",
    form: str | None = None,
    **keywords: Any,
) -> Any:
    """Gradients of a variant with respect to every real operand given, for given cotangents of its outputs.

    Parameters
    ----------
    name : str
        A name from `variants()`.
    *operands : array_like
        As `attend` takes them.
    d_out : array_like, optional
        Cotangent of the output ``out``, of its shape.  Cotangents of other outputs are keywords (``d_lse``, ``d_state``, ...); at least one
        is needed.
    layout : {"BHTD", "BTHD"} or Packed
        Order of head and sequence axes, in operands, cotangents and gradients alike; or where sequences lie.
    backend : {"auto", "definition", "cpu", "cuda"}
        As in `attend`.
    form : {"recurrent", "chunked"}, optional
        As in `attend`; the quadratic form has no gradients.
    **keywords
        The variant's parameters, operands by name, cotangents, and functions as in `attend`; a score_mod needs its ``slope``, unless the
        definition is differentiated.

    Returns
    -------
    namedtuple of ndarray
        ``d_q, d_k, ...`` in operand order, each in the shape and dtype its operand was given in.  Its attribute ``errors`` maps those
        names to an estimate of the absolute error before rounding, per element, where a definition was differentiated.

    Raises
    ------
    UnknownVariantError, ShapeError, DtypeError, OperandError, ParameterError, BackendUnavailableError

    Notes
    -----
    The CPU engine recomputes weights from lse and needs memory proportional to the sequences.  Where it has no kernel for gradients they go back
    through the variant's whole arrays, in float64, which needs memory for all of these.  A definition is differentiated numerically
    (`refattn.derivatives`), about 17 evaluations for each element of each operand: made for small problems.  In both, elements and outputs
    that are not finite count as constants.

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> q = np.zeros((1, 1, 1, 4)); k = np.ones((1, 1, 2, 4)); v = np.array([3.0, 5.0]).reshape(1, 1, 2, 1)
    >>> ra.gradients("softmax", q, k, v, d_out=np.ones((1, 1, 1, 1))).d_v.ravel().round(9).tolist()
    [0.5, 0.5]
    """
    from . import derivatives  # SciPy, wanted here only

    variant = catalog.variant(name)
    cotangents, options = _cotangents(variant, d_out, keywords)
    if not cotangents:
        raise OperandError(f"{name}: no cotangent given; pass at least one of {', '.join('d_' + o.name for o in variant.outputs)}")
    call = problem.bind(variant, operands, options, tuple(cotangents), layout)
    checked = {output: derivatives.check_cotangent(call, output, x) for output, x in cotangents.items()}
    return derivatives.release(call, backends.gradients(call, checked, backend, form))


def initial_state(name: str, *, dtype: Any = "float32", **sizes: Any) -> dict[str, Any]:
    """What a variant carries before the first token, neutral: arrays by name, for `step`.

    Parameters
    ----------
    name : str
        A variant that carries something: with an operand ``initial_state``, say, and an output ``state``.
    dtype : str or dtype
        Of the operands; what is carried is at least float32.
    **sizes
        Axes of what is carried (``B=1, Hkv=8, D=128, E=128``).  A missing E is D, a missing Hkv is Hq.

    Returns
    -------
    dict of str to ndarray

    Raises
    ------
    UnknownVariantError, ShapeError, DtypeError, ParameterError

    Examples
    --------
    >>> import refattn as ra
    >>> {name: x.shape for name, x in ra.initial_state("linear", B=1, Hkv=2, D=4).items()}
    {'state': (1, 2, 4, 4), 'mass': (1, 2, 4)}
    """
    from . import steps

    return steps.neutral(catalog.variant(name), dtype, sizes)


def step(
    name: str,
    state: Mapping[str, Any] | None,
    /,
    *operands: Any,
    returns: str | Sequence[str] = ("out",),
    layout: str = "BHTD",
    backend: str = "auto",
    **keywords: Any,
) -> tuple[Any, ...]:
    """A variant of the next tokens, going on from what was carried: the memory of one state, however long the sequence has become.

    Parameters
    ----------
    name : str
        A variant that carries something from token to token.
    state : mapping of str to array_like, or None
        What an earlier `step`, `attend` or `initial_state` gave, by the outputs' names (``"state"``, ``"mass"``, ...); None before the first token.
        NumPy arrays of the carried dtype are updated in place: pass copies to keep them.
    *operands : array_like
        The new tokens, one or more, as `attend` takes them.
    returns : str or sequence of str
        Outputs wanted beside what is carried.
    layout : {"BHTD", "BTHD"}
        As in `attend`.
    backend : {"auto", "definition", "cpu", "cuda"}
        As in `attend`.
    **keywords
        The variant's parameters, and operands by name.

    Returns
    -------
    tuple
        The outputs, and a dict of what is carried now.

    Raises
    ------
    UnknownVariantError, ShapeError, DtypeError, OperandError, ParameterError, BackendUnavailableError

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> state, token = None, np.ones((1, 1, 1, 1))
    >>> for _ in range(3):
    ...     out, state = ra.step("retention", state, token, token, token, np.array([0.5]))
    >>> float(out[0, 0, 0, 0])
    1.75
    """
    from . import steps

    return steps.step(catalog.variant(name), state, operands, returns, layout, backend, keywords)


def _cotangents(variant: Variant, d_out: Any, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cotangents by output, and the keywords that are none."""
    outputs = {o.name for o in variant.outputs}
    taken = {o.name for o in variant.operands} | {p.name for p in variant.params}
    named = {word: x for word, x in keywords.items() if word.startswith("d_") and word[2:] in outputs and word not in taken}
    cotangents = {word[2:]: x for word, x in {"d_out": d_out, **named}.items() if x is not None}
    return cotangents, {word: x for word, x in keywords.items() if word not in named}


def set_num_threads(n: int) -> None:
    """How many threads the CPU engine uses; results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        From 1 to the limit with which the process started: the number of processors it may use, or ``NUMBA_NUM_THREADS``, or
        ``OMP_NUM_THREADS`` where that is less.

    Raises
    ------
    ParameterError

    Notes
    -----
    It holds for calls from the Python thread that made it, as `numba.set_num_threads` does; other threads begin at the limit.  Calls too small
    to gain from a second thread use one.

    Examples
    --------
    >>> import refattn as ra
    >>> ra.set_num_threads(1)
    """
    import numba

    from .engine.threads import available_threads

    before = numba.get_num_threads()
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    allowed = Integer(1, available_threads())
    if not allowed.accepts(n):
        numba.set_num_threads(before)
        raise ParameterError(f"set_num_threads: n={n!r}; must be {allowed.rule}")
    numba.set_num_threads(int(n))


# ---- know --------------------------------------------------------------------------------------------------------------------


def variants(family: str | None = None) -> tuple[str, ...]:
    """Names of all variants, or of one family's.

    Parameters
    ----------
    family : str, optional
        scored, feature, state, ...

    Returns
    -------
    tuple of str

    Raises
    ------
    UnknownVariantError
        When there is no such family.
    """
    return catalog.names(family)


def describe(name: str) -> Description:
    """What a variant is: paper, equation, operands with axes, parameters, backends, cost.

    Parameters
    ----------
    name : str

    Returns
    -------
    Description
        Its attributes are data; ``print`` shows it.

    Raises
    ------
    UnknownVariantError
    """
    variant = catalog.variant(name)
    return described(variant, backends.of(variant), backends.gradients_by(variant))


def cite(name: str) -> str:
    """BibTeX entry of a variant's paper.

    Parameters
    ----------
    name : str

    Returns
    -------
    str

    Raises
    ------
    UnknownVariantError
    """
    return bibtex(catalog.variant(name).paper)


def cost(name: str, *, dtype: Any = "float32", **sizes_and_params: Any) -> Cost:
    """Operations, traffic and memory of one forward call.

    Parameters
    ----------
    name : str
    dtype : str or dtype
        Of the operands.
    **sizes_and_params
        Every axis by name (``B=1, Hq=32, ...``), and parameters.  A missing E is D, a missing S is T, a missing Hkv is Hq.

    Returns
    -------
    Cost
        ``.flops``, ``.bytes``, ``.intensity``, ``.peak_memory`` by backend, ``.formulas``.

    Raises
    ------
    UnknownVariantError, ShapeError, ParameterError

    Examples
    --------
    >>> import refattn as ra
    >>> ra.cost("softmax", B=1, Hq=1, T=2, D=4, causal=True).flops
    74
    """
    variant = catalog.variant(name)
    dims = {axis: sizes_and_params.pop(axis) for axis in variant.axes if axis in sizes_and_params}
    bound, params = problem.bind_sizes(variant, dims, sizes_and_params)
    itemsize = precision.as_dtype(dtype).itemsize
    found = costs.cost(variant, bound, params, itemsize)
    return replace(found, peak_memory={**found.peak_memory, **backends.allocated(variant, bound, params, itemsize)})


# ---- judge -------------------------------------------------------------------------------------------------------------------


def certify(
    name: str,
    /,
    *operands: Any,
    returns: str | Sequence[str] | None = None,
    layout: str = "BHTD",
    dtype: Any = None,
    **keywords: Any,
) -> Any:
    """A variant's outputs or gradients correctly rounded, with a proven bound for each element: a ground truth that does not rest on float64.

    Parameters
    ----------
    name : str
        A name from `variants()`.  Gradients: one of softmax over scaled inner products (``"softmax"``, ``"luong_dot"``, ...).
    *operands : array_like
        As `attend` takes them; taken exactly as they are, in any format.
    returns : str or sequence of str, optional
        Outputs wanted, as in `attend`; given cotangents, gradients: ``("d_q", "d_k")``, those of all real operands given unless said.
    layout : {"BHTD", "BTHD"}
    dtype : str or dtype, optional
        What values are rounded to; float64 unless said.  A log-sum-exp is at least float32.
    **keywords
        Parameters, operands by name, a ``mask_mod``, and cotangents ``d_out`` and ``d_lse``.

    Returns
    -------
    Certified, or namedtuple of Certified
        ``.value``; ``.bound``, how far the exact number may be from it; ``.tier``, what decided each element (0 float64, 1 two float64,
        2 Arb, 3 rational numbers); ``.rounded``, where the value is the correctly rounded one.

    Raises
    ------
    UnknownVariantError, ShapeError, DtypeError, OperandError, ParameterError, BackendUnavailableError

    Notes
    -----
    The exact number is that of the plan or recurrence: a ``scale`` of None is the float64 number ``D ** -0.5``.  Variants with neither run their
    definition on balls, some microseconds an operation.  Elements that need tier 2 stay enclosed only where python-flint is not installed
    (``pip install 'refattn[exact]'``); elements that an infinite or NaN operand takes part in are NaN with an infinite bound.  What bounds rest
    on: `refattn.exact.trusted`.

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> q = np.zeros((1, 1, 1, 4)); k = np.ones((1, 1, 3, 4)); v = np.array([1.0, 1.0, 2.0]).reshape(1, 1, 3, 1)
    >>> found = ra.certify("softmax", q, k, v, dtype="bfloat16")
    >>> float(found.value[0, 0, 0, 0]), bool(found.rounded.all())
    (1.3359375, True)
    """
    from .exact import certify as ladder

    variant = catalog.variant(name)
    cotangents = {"d_" + o.name: keywords.pop("d_" + o.name, None) for o in variant.outputs}
    given = {word[2:]: x for word, x in cotangents.items() if x is not None}
    storage = precision.as_dtype("float64" if dtype is None else dtype)
    call = replace(problem.bind(variant, operands, keywords, tuple(given) or returns, layout), dtype=storage)
    if given:
        from . import derivatives  # SciPy, wanted here only
        from .exact import gradients as slopes

        known = tuple("d_" + o.name for o in variant.operands if o.kind == "real" and o.name in call.given)
        wanted = known if returns is None else (returns,) if isinstance(returns, str) else tuple(returns)
        for one in wanted:
            if one not in known:
                raise ParameterError(f"{name}: {catalog.unknown('gradient', one, known)}")
        found = slopes.certify_gradients(call, {output: derivatives.check_cotangent(call, output, x) for output, x in given.items()}, wanted)
    else:
        found = ladder.certify(call)
    return next(iter(found.values())) if len(found) == 1 else namedtuple("CertifiedResults", found)(**found)


def tolerance(
    name: str,
    /,
    *operands: Any,
    d_out: Any = None,
    profile: Any = None,
    returns: str | Sequence[str] | None = None,
    layout: str | Sequences = "BHTD",
    **keywords: Any,
) -> Any:
    """How far a correct implementation may be from the exact result, element by element.

    Parameters
    ----------
    name : str
    *operands : array_like
        As `attend` takes them; their dtype is what results are rounded to.
    d_out : array_like, optional
        Cotangent of ``out``, as `gradients` takes it (``d_lse``, ... are keywords): tolerances of the gradients are wanted too.
    profile : str or Profile, optional
        How the implementation computes: ``"math"``, ``"flash"`` (unless said), ``"eager"``, ..., with or without the dtype (``"flash-bf16"``).
    returns : str or sequence of str, optional
        Outputs wanted; all there are unless said.
    layout : {"BHTD", "BTHD"} or Packed or Paged
    **keywords
        Parameters, operands by name, and functions as in `attend`.

    Returns
    -------
    namedtuple of ndarray
        One float64 array per output, and per real operand for its gradient (``d_q``, ...), in its shape and the caller's layout.

    Raises
    ------
    UnknownVariantError, ShapeError, DtypeError, OperandError, ParameterError

    Notes
    -----
    The smaller of a worst-case and a statistical bound (`refattn.oracle.bounds`), the latter with a chance of 0.001 that any element of a
    correct result exceeds it.

    A score_mod is taken to be continuous and monotonous as far as a score may be off, and to be computed with an error of at most 16
    roundings of the largest of the score, its result and the change.
    """
    from . import derivatives  # SciPy, as below
    from .oracle import profiles
    from .oracle.gradients import backpropagated
    from .oracle.judge import axes_of
    from .oracle.tolerance import tolerances

    variant = catalog.variant(name)
    if returns is None:  # weights and scores of sequences have no shape
        returns = [o.name for o in variant.outputs if isinstance(layout, str) or "S" not in o.axes.split()]
    cotangents, options = _cotangents(variant, d_out, keywords)
    call = problem.bind(variant, operands, options, returns, layout)
    checked = {output: derivatives.check_cotangent(call, output, x) for output, x in cotangents.items()}
    how, truth = profiles.resolve(profile, call.dtype), definition.run(call)
    backward = backpropagated(call, truth, checked) if checked else None
    found = tolerances(call, truth, how, backward=backward)
    arrays = {n: problem.to_layout(axes_of(variant, n), x, call.layout, operand=n not in call.returns) for n, x in found.items()}
    return namedtuple("Tolerance", arrays)(**arrays)


def check(
    candidate: Any,
    name: str | None = None,
    *,
    dtype: Any = "float32",
    suite: str = "standard",
    framework: str | None = None,
    rename: Mapping[str, str] | None = None,
    returns: str | Sequence[str] | None = None,
    profile: Any = None,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
    gradients: Any = None,
    **params: Any,
) -> Report:
    """Judge an implementation: ask it a suite of calls and compare every answer with the definition.

    Parameters
    ----------
    candidate : callable or str
        Called as ``candidate(*operands, **params)`` with the variant's names; a string is an adapter (``"torch"``, ``"jax"``, ...),
        ``package.module:function`` or ``path/to/file.py:function``.
    name : str, optional
        What it claims to compute; ``"softmax"`` unless said.
    dtype : str or dtype
        Of the operands it is given.
    suite : {"quick", "standard", "full"}
    framework : str, optional
        Whose arrays it takes: ``"torch"``, ``"jax"``, ``"mlx"``; NumPy's unless said.
    rename : mapping, optional
        Its own names: ``{"causal": "is_causal"}``.
    returns : str or sequence of str, optional
        What it returns: ``("out", "lse")``; ``"out"`` unless said.
    profile : str or Profile, optional
        How it computes, which sets the tolerance (see `tolerance`); ``"auto"`` takes the tightest preset that explains a few plain calls.
    inputs : mapping of str to array_like, optional
        Operands by name to judge it on, in place of the suite's own.
    seed : int
        Of the suite's random operands.
    gradients : callable, str or bool, optional
        Its backward pass, to be judged too, or where that is: called as the candidate is, with ``d_out=`` (and ``d_lse=`` if it names it), it returns
        ``d_q``, ``d_k``, ... as a mapping or named tuple, or as a tuple in operand order.  True differentiates the candidate by its framework
        (torch, JAX).
    **params
        Parameters that keep one value.  One that the candidate does not take is what it does of itself.

    Returns
    -------
    Report
        ``.passed``, ``.worst``, ``.finding``, ``.investigation``, ``.examined``, ``.unexamined``; ``print`` shows it, ``.to_html(path)`` adds
        pictures, ``.to_dict()`` is for machines.

    Raises
    ------
    CandidateError, UnknownVariantError, DtypeError, ParameterError, BackendUnavailableError

    Notes
    -----
    A candidate that raises NotImplementedError declines a call, which then counts as not examined.

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> def attention(q, k, v):
    ...     s = np.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(q.shape[-1])
    ...     p = np.exp(s - s.max(-1, keepdims=True))
    ...     return np.einsum("bhts,bhse->bhte", p / p.sum(-1, keepdims=True), v)
    >>> ra.check(attention, "luong_dot", suite="quick", dtype="float64").passed  # scaled, so it is not Luong's
    False
    """
    from .oracle import check as judging

    functions = FUNCTION_KEYWORDS.intersection(params)
    if functions:
        raise ParameterError(f"{name or 'softmax'}: check asks calls of its own sizes and takes no {min(functions)}; judge arrays with compare")
    variant = None if name is None else catalog.variant(name)
    return judging.check(
        candidate, variant, dtype, params,
        suite=suite, framework=framework, rename=rename, returns=returns, profile=profile, inputs=inputs, seed=seed, gradients=gradients,
    )  # fmt: skip


def compare(
    out: Any,
    name: str,
    /,
    *operands: Any,
    d_out: Any = None,
    returns: str | Sequence[str] | None = None,
    layout: str | Sequences = "BHTD",
    profile: Any = None,
    **keywords: Any,
) -> Report:
    """Judge arrays that exist already.

    Parameters
    ----------
    out : array_like or tuple of array_like
        What an implementation returned, one array per name in `returns`.
    name : str
    *operands : array_like
        What it was given.
    d_out : array_like, optional
        Cotangent of ``out`` that gradients in `out` are for; of other outputs, ``d_lse``, ... are keywords.
    returns : str or sequence of str, optional
        ``"out"`` unless said; gradients may be among them: ``("out", "d_q", "d_k", "d_v")``.
    layout : {"BHTD", "BTHD"} or Packed or Paged
        Of operands and of `out`.
    profile : str or Profile, optional
        How it computes, which sets the tolerance (see `tolerance`).
    **keywords
        Parameters, operands by name, and functions as in `attend`.

    Returns
    -------
    Report

    Raises
    ------
    CandidateError, UnknownVariantError, ShapeError, DtypeError, OperandError, ParameterError
    """
    from .oracle import check as judging

    variant = catalog.variant(name)
    cotangents, options = _cotangents(variant, d_out, keywords)
    return judging.compare_arrays(out, variant, operands, options, cotangents, returns=returns, layout=layout, profile=profile)


def assert_matches(out: Any, name: str, /, *operands: Any, **keywords: Any) -> None:
    """Raise AssertionError with the report where `compare` does not pass: for tests.

    Parameters
    ----------
    out, name, *operands, **keywords
        As `compare` takes them.

    Raises
    ------
    AssertionError
        When the arrays differ by more than their tolerance.
    """
    __tracebackhide__ = True  # pytest then ends a traceback where this was called
    report = compare(out, name, *operands, **keywords)
    if not report.passed:
        raise Disagreement(report)
