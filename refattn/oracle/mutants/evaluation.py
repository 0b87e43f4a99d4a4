"""Attention as one function in named stages, each of which may be read wrongly: what a faulty kernel would answer.

Float64 NumPy on whole arrays, (B, Hq, T, S) throughout, with the range of the arithmetic that kernels use: where float32 overflows or vanishes, so
does this.  It calls no definition and no piece; with ``Reading()`` it must agree with the definitions to rounding, which is tested over the
standard suite of every variant with a plan.  A wrong reading is what `Reading` says: the stages below are the only truth for all mutants.

A variant without heads is one head; keys and values are read once per query head, so that a head map is an index.  Entries a kernel skips are
-inf in the scores and never read after that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ... import precision
from ...problem import Problem
from ...spec import Plan, shape
from .reading import Reading


def _padded(to: int, d: int, *others: int) -> float:
    return float((-(-d // to) * to) ** -0.5)


#: Values of ``scale``: what q . k is multiplied by when no scale is given, from the widths D and E, the heads Hq and Hkv, and the model width M.
SCALES: Mapping[str, Callable[[int, int, int, int, int], float]] = {
    "omitted": lambda d, e, hq, hkv, m: 1.0,
    "root": lambda d, e, hq, hkv, m: d**0.5,
    "value width": lambda d, e, hq, hkv, m: e**-0.5,
    "model width": lambda d, e, hq, hkv, m: m**-0.5,
    "key-value model width": lambda d, e, hq, hkv, m: (d * hkv) ** -0.5,
    **{f"padded to {n}": functools.partial(_padded, n) for n in (8, 16, 32, 64, 128)},
    "padded to a power of two": lambda d, e, hq, hkv, m: (2.0 ** math.ceil(math.log2(d))) ** -0.5,
}


@dataclass(frozen=True)
class Rows:
    """Queries, keys and values as they were read, one row of each per query head, and which key-value head each query head reads."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    heads: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Scores (B, Hq, T, S), -inf where skipped; the same before cap, bias and masks; which entries are visible; the factor they have."""

    s: np.ndarray
    plain: np.ndarray
    seen: np.ndarray
    scale: float


@dataclass(frozen=True)
class Weights:
    """Weights (B, Hq, T, S); of each row the maximum that was subtracted and the sum, (B, Hq, T, 1); and the output where weights do not give it."""

    p: np.ndarray
    top: np.ndarray
    total: np.ndarray
    out: np.ndarray | None = None
    slack: np.ndarray | float = 0.0  # what roundings of a narrow format may move of the output, beside those of the arithmetic
    lse_slack: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Everything on the way, for outputs, gradients and tolerances."""

    problem: Problem
    plan: Plan
    reading: Reading
    rows: Rows
    scores: Scores
    weights: Weights
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)


@np.errstate(all="ignore")
def forward(problem: Problem, reading: Reading, earlier: Problem | None = None) -> Evaluation:
    """All outputs of the variant, float64, under a reading.

    Parameters
    ----------
    problem : Problem
        Of a variant with a plan, dense, without functions of the caller's.
    reading : Reading
    earlier : Problem, optional
        A call of the same shapes before it; what is ``remembered`` is that call's.
    """
    problem = as_remembered(problem, reading.remembered, earlier)
    plan = problem.plan
    if plan is None or problem.functions is not None or problem.sequences is not None:
        raise NotImplementedError(f"{problem.variant.name}: readings exist of dense calls of variants with a plan, without functions")
    rows = read_rows(problem, plan, reading)
    scores = score(problem, plan, reading, rows)
    if reading.unseen == "zero":
        met: np.ndarray = np.broadcast_to(visible(problem, plan, reading), scores.s.shape).max(axis=2, initial=False)
        rows = replace(rows, v=np.where(met[..., None], rows.v, 0.0))
    weights = weights_of(problem, plan, reading, rows, scores)
    return Evaluation(problem, plan, reading, rows, scores, weights, outputs_of(problem, plan, reading, rows, scores, weights))


def as_remembered(problem: Problem, name: str, earlier: Problem | None) -> Problem:
    """The problem with one operand or parameter of an earlier call."""
    if not name or earlier is None:
        return problem
    if name in earlier.params:
        return replace(problem, params={**problem.params, name: earlier.params[name]})
    given = {n: x for n, x in problem.given.items() if n != name}
    return replace(problem, given={**given, name: earlier.given[name]} if name in earlier.given else given)


# ---- operands ----------------------------------------------------------------------------------------------------------------------


def read_rows(problem: Problem, plan: Plan, reading: Reading) -> Rows:
    """Queries, keys and values with a head axis, keys and values once per query head."""
    names = (plan.query, plan.key, plan.value)
    q, k, v = ({n: _layout(problem, n, reading) for n in set(names)}[n] for n in names)
    q, k, v = _exchanged(reading, q, k, v)
    if plan.projections:
        q, k, v = (_projected(problem, plan.projections[n], x, reading) for n, x in enumerate((q, k, v)))
    else:
        q, k, v = (x[:, None] if x.ndim == 3 else x for x in (q, k, v))
    q, k, v = (_lanes(x, reading.lanes) for x in (q, k, v))
    if reading.values == "width of keys":
        v = np.where(np.arange(v.shape[3]) < k.shape[3], v, 0.0)
    if reading.store and v.shape[3] > reading.store:
        v = _stored(v, reading)
    heads = head_map(reading.heads, q.shape[1], k.shape[1])
    own = head_map("grouped", q.shape[1], k.shape[1])
    k = _per_query_head(k, heads if reading.key_heads else own, reading.heads == "time repeated" and reading.key_heads)
    v = _per_query_head(v, heads if reading.value_heads else own, reading.heads == "time repeated" and reading.value_heads)
    return Rows(q, k, v, heads)


def head_map(how: str, heads: int, kv_heads: int) -> np.ndarray:
    """Key-value head of every query head."""
    h = np.arange(heads)
    if how == "tiled":
        return h % kv_heads
    if how == "first":
        return 0 * h
    if how == "query stride":  # as if there were as many key-value heads as query heads; the memory runs out and wraps
        return h // (heads // kv_heads) * (heads // kv_heads) % kv_heads
    return kv_heads - 1 - h // (heads // kv_heads) if how == "reversed" else h // (heads // kv_heads)


def _layout(problem: Problem, name: str, reading: Reading) -> np.ndarray:
    x = problem.operands[name]
    if reading.layout == "contiguous" and name in problem.given:
        x = as_if_contiguous(problem.given[name]).astype(np.float64)
    if reading.layout == "reshaped" and x.ndim == 4:
        batch, heads, n, d = x.shape
        x = np.ascontiguousarray(x).reshape(batch, n, heads, d).swapaxes(1, 2)
    return x


def as_if_contiguous(x: np.ndarray) -> np.ndarray:
    """The memory from the first element on, in C order whatever the strides are; the array itself where it has too little memory for that."""
    low, high = np.lib.array_utils.byte_bounds(x)
    if any(step < 0 for step in x.strides) or high - low < x.nbytes:
        return x
    steps = np.empty(x.shape, np.uint8).strides
    return np.lib.stride_tricks.as_strided(x, x.shape, tuple(x.itemsize * step for step in steps))


def _exchanged(reading: Reading, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each operand as it is read: its own, another, or other rows of it."""

    def read(how: str, own: np.ndarray, others: Mapping[str, np.ndarray]) -> np.ndarray:
        if how == "batch 0":
            return np.broadcast_to(own[:1], own.shape)
        if how in others:
            return others[how] if others[how].shape == own.shape else own
        return {"one late": np.roll(own, 1, axis=-2), "one early": np.roll(own, -1, axis=-2), "backwards": np.flip(own, axis=-2)}.get(how, own)

    return (
        read(reading.queries, q, {}),
        read(reading.keys, k, {"queries": q, "values": v}),
        read(reading.values, v, {"keys": k}),
    )


def _projected(problem: Problem, names: tuple[str, str], x: np.ndarray, reading: Reading) -> np.ndarray:
    matrix, bias = (problem.operands[n] for n in names)
    rows: np.ndarray = np.einsum("btm,hmd->bhtd", x, matrix)
    return rows + bias[:, None, :] if reading.operand_biases else rows


def _lanes(x: np.ndarray, lanes: int) -> np.ndarray:
    width = x.shape[3]
    return x if width <= lanes else np.where(np.arange(width) < width // lanes * lanes, x, 0.0)


def _stored(v: np.ndarray, reading: Reading) -> np.ndarray:
    """Values as they end up in the output when every program stores its channels from 0 on."""
    width, found = reading.store, np.zeros_like(v)
    if not reading.store_last:
        second = v[..., width : 2 * width]
        found[..., : second.shape[3]] = second
        return found
    for start in range(0, v.shape[3], width):
        part = v[..., start : start + width]
        found[..., : part.shape[3]] = part
    return found


def _per_query_head(x: np.ndarray, heads: np.ndarray, time_repeated: bool) -> np.ndarray:
    if time_repeated:
        batch, kv_heads, n, d = x.shape
        return np.repeat(x, len(heads) // kv_heads, axis=2).reshape(batch, len(heads), n, d)
    return x if np.array_equal(heads, np.arange(x.shape[1])) else x[:, heads]


# ---- scores ------------------------------------------------------------------------------------------------------------------------


def score(problem: Problem, plan: Plan, reading: Reading, rows: Rows) -> Scores:
    """Similarity, scale, soft-cap, bias, masks, in the order specified or another."""
    factor = scale(problem, plan, reading, rows)
    bias: Any
    raw = similarity(problem, plan, reading, rows if not reading.folded_format else replace(rows, q=_folded(rows.q, factor, reading.folded_format)))
    bias, seen = biases(problem, plan, reading), visible(problem, plan, reading)
    s: np.ndarray
    skips = reading.hidden == "skipped" and plan.fill == -math.inf
    fill = plan.fill if reading.hidden == "skipped" else reading.fill
    if reading.bias == "before the scale":
        bias = bias * factor
    stored = functools.partial(rounded, name=reading.arrays_format)
    plain = stored(stored(raw) * factor) + _shift(problem, plan, reading)
    s = stored(plain + bias) if reading.bias == "before the cap" else plain
    if reading.mask == "added" and plan.mask in problem.given and reading.hidden_first:
        s = s + operand_mask(problem, plan, reading)
    if reading.hidden_first and reading.hidden in ("multiplied", "added"):
        s = s * seen if reading.hidden == "multiplied" else s + seen
    if reading.hidden == "before the cap":
        s = np.where(seen, s, -np.inf)
    s = stored(capped(reading, plan, s, factor))
    s = s if reading.bias == "before the cap" else stored(s + bias)
    if reading.mask == "added" and plan.mask in problem.given and not reading.hidden_first:
        s = s + operand_mask(problem, plan, reading)
    if not reading.hidden_first and reading.hidden in ("multiplied", "added"):
        s = s * seen if reading.hidden == "multiplied" else s + seen
    if reading.hidden == "filled by each":  # two masks of 0.7 times the least number are beyond the format together
        hiding = 1 * ~in_sight(problem, plan, reading) + (~operand_mask(problem, plan, reading) if plan.mask else 0) + np.isneginf(bias)
        least = -0.7 * precision.format_of(working_format(problem)).largest
        s = np.where(hiding == 0, s, np.where(hiding == 1, least, -np.inf))
    if skips:
        s = np.where(seen & (bias != -np.inf), s, -np.inf)
    elif reading.hidden in ("skipped", "filled"):
        s = np.where(seen, s, fill)
    s = rounded(s, reading.scores_format)
    return Scores(s, plain, s != -np.inf, factor)


def _folded(q: np.ndarray, factor: float, name: str) -> np.ndarray:
    """Queries stored as their product with the scale, which is divided out again for what follows."""
    with np.errstate(all="ignore"):
        return rounded((q.astype(np.float32) * np.float32(factor)).astype(np.float64), name) / factor


def scale(problem: Problem, plan: Plan, reading: Reading, rows: Rows) -> float:
    """What products are multiplied by."""
    d, e, heads, kv_heads = rows.q.shape[3], rows.v.shape[3], rows.q.shape[1], problem.dims.get("Hkv", 1)
    default = problem.params.get("scale") is None
    factor = plan.scale
    if reading.scale == "default always":
        factor = d**-0.5
    elif reading.scale == "squared":
        factor = plan.scale**2
    elif reading.scale in SCALES and default:
        factor = SCALES[reading.scale](d, e, heads, kv_heads, problem.dims.get("M", d * heads))
    return factor * reading.scale_factor


def similarity(problem: Problem, plan: Plan, reading: Reading, rows: Rows) -> np.ndarray:
    """Of every query with every key, before any scale."""
    q, k = rows.q, rows.k
    kind = plan.similarity.__name__.rpartition(".")[2]
    own = [problem.operands[w] for w in plan.weights]
    if kind in ("additive", "concat"):
        if kind == "concat":
            (weight, w), b = own, np.zeros(())
            d = k.shape[3] if reading.parts == "keys first" else q.shape[3]
            w_q, w_k = (weight[:, d:], weight[:, :d]) if reading.parts == "keys first" else (weight[:, :d], weight[:, d:])
        else:
            w_q, w_k, w, b = own
        of_q, of_k = (q @ w_q.T)[..., :, None, :], (k @ w_k.T)[..., None, :, :]
        inner = of_q * of_k if reading.hidden_layer.startswith("product") else of_q + of_k
        inner = inner if reading.hidden_layer.endswith("no bias") else inner + b
        return (inner if reading.hidden_layer == "linear" else np.tanh(inner)) @ w
    if kind == "bilinear":
        w = own[0]
        if reading.form == "identity":
            w = np.eye(*w.shape)
        elif reading.form == "transposed" and w.shape[0] == w.shape[1]:
            w = w.T
        k = k @ w.T
    if kind == "cosine":
        q = q / _norms(q) if reading.norms in ("both", "queries") else q
        k = k / _norms(k) if reading.norms in ("both", "keys") else k
    if reading.products_format:
        return _summed_in(reading.products_format, q, k)
    return q @ np.swapaxes(k, -1, -2)


def _norms(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.where(norms > 0, norms, 1.0)


def _summed_in(name: str, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Products rounded and summed one channel after another."""
    s = np.zeros((*q.shape[:3], k.shape[2]))
    q, k = rounded(q, name), rounded(k, name)
    for x in range(q.shape[3]):
        s = rounded(s + rounded(q[..., x][..., None] * k[..., x][:, :, None], name), name)
    return s


def rounded(x: np.ndarray, name: str) -> np.ndarray:
    """Through a storage format, "" for none."""
    return precision.round_to(x, precision.as_dtype(name)).astype(np.float64) if name else x


def _shift(problem: Problem, plan: Plan, reading: Reading) -> float:
    if reading.shift == "none":
        return 0.0
    if reading.shift == "queries" and problem.params.get("shift") is None:
        return -math.log(max(problem.dims["T"], 1))
    return -plan.shift if reading.shift == "negated" else plan.shift


def cap_of(plan: Plan) -> float | None:
    """The soft-cap, where there is one."""
    return next((stage.numbers[0] for stage in plan.score_mods if stage.piece.__name__.endswith("softcap")), None)


def capped(reading: Reading, plan: Plan, s: np.ndarray, factor: float) -> np.ndarray:
    cap = cap_of(plan)
    if cap is None or reading.cap == "dropped":
        return s
    cap *= reading.cap_factor
    if reading.cap == "unscaled":
        return factor * cap * np.tanh(s / factor / cap)
    if reading.cap == "score times tanh":
        return s * np.tanh(s / cap)
    if reading.cap == "clipped":
        return np.clip(s, -cap, cap)
    curve = rounded(np.tanh(rounded(s / cap, reading.arrays_format)), reading.arrays_format)
    return (1.0 if reading.cap == "not multiplied" else cap) * curve


def _four(x: np.ndarray) -> np.ndarray:
    """(B, T, S) with a head axis."""
    return x[:, None] if x.ndim == 3 else x


def biases(problem: Problem, plan: Plan, reading: Reading) -> Any:
    """The bias of every entry, or 0."""
    if plan.bias not in problem.given:
        return 0.0
    bias = _four(problem.operands[plan.bias])
    if reading.bias.endswith(" slopes"):
        even, interleaved = slopes(bias.shape[1])
        bias = bias * (even / interleaved if reading.bias == "even slopes" else interleaved / even)[:, None, None]
    bias = _of_another(problem, bias, reading.bias)
    return bias * reading.bias_factor if reading.bias_factor != 1.0 else bias


def slopes(heads: int) -> tuple[np.ndarray, np.ndarray]:
    """ALiBi's slope of each head: one geometric sequence, and as published, where powers of two are filled up with every second of twice as many."""

    def even(n: int) -> np.ndarray:
        return np.asarray(2.0 ** (-8.0 * np.arange(1, n + 1) / n))

    power = 2 ** (heads.bit_length() - 1)
    return even(heads), np.concatenate([even(power), even(2 * power)[::2][: heads - power]])


def _of_another(problem: Problem, x: np.ndarray, how: str) -> np.ndarray:
    """A (B, Hq, T, S) operand read at another batch, head or transposed."""
    heads = x.shape[1]
    if how == "batch 0":
        return x[:1]
    if how == "head 0":
        return x[:, :1]
    if how == "key-value head":
        return x[:, head_map("grouped", heads, problem.dims.get("Hkv", heads))]
    if how == "heads tiled":
        return x[:, head_map("tiled", heads, problem.dims.get("Hkv", heads))]
    return np.swapaxes(x, 2, 3) if how == "transposed" and x.shape[2] == x.shape[3] else x


def operand_mask(problem: Problem, plan: Plan, reading: Reading) -> np.ndarray:
    """The mask operand as it is read."""
    mask = _four(problem.operands[plan.mask]) != 0
    mask = _of_another(problem, mask, reading.mask)
    return ~mask if reading.mask == "inverted" and plan.mask in problem.given else mask


def visible(problem: Problem, plan: Plan, reading: Reading) -> np.ndarray:
    """Which pairs alignment, window and mask leave, of a shape that broadcasts to (B, Hq, T, S)."""
    sight = in_sight(problem, plan, reading)
    return sight if reading.mask in ("never", "added") or not plan.mask else sight & operand_mask(problem, plan, reading)


def in_sight(problem: Problem, plan: Plan, reading: Reading) -> np.ndarray:
    """Which pairs alignment and window leave, (T, S)."""
    n_q, n_k = problem.dims["T"], problem.dims.get("S", problem.dims["T"])
    lost = "" if plan.mask in problem.given else reading.lost_without_mask
    given = problem.params.get("causal", False)
    if given:
        others = {"bottom right": True, "never": False}
        causal = "top_left" if reading.causal.startswith("top left") else others.get(reading.causal, given)
        causal = False if "causal" in lost else causal
    else:
        causal = reading.causal == "always"
    offset = 0 if causal == "top_left" else n_k - n_q
    keys, queries = np.arange(n_k), np.arange(n_q)[:, None]
    ahead = keys - queries
    seen: np.ndarray = np.ones((n_q, n_k), bool)
    if causal:
        last = queries + offset + reading.causal_offset  # the last key seen
        if reading.causal_multiple > 1:
            last = np.minimum(last, np.maximum((last + 1) // reading.causal_multiple * reading.causal_multiple, reading.causal_least) - 1)
        seen = keys <= last
    if reading.causal == "top left but for the last query":
        seen[-1:] |= bool(causal)
    if reading.causal == "also top left":
        seen = seen & (ahead <= 0)
    window = problem.params.get("window")
    if window is None or reading.window == "never" or "window" in lost:
        return seen
    left, right = reversed(window) if reading.window == "exchanged" else window
    right = {"open": None, "closed": 0}.get(reading.window_right, right)
    if right is None and left is not None and not causal:
        right = {"-1 where open": -1, "0 where open": 0, "left where open": left}.get(reading.window_right)
    if not reading.causal_window:
        offset = 0 if given == "top_left" else n_k - n_q
    offset = 0 if reading.window == "top left" else offset
    seen = seen if right is None else seen & (ahead <= offset + right + reading.window_right_offset)
    if left is None:
        return seen
    first = queries + offset - left - reading.window_left_offset
    if reading.window_edge:
        first = _after_the_edge(seen & (keys >= first), first, reading.window_edge)
    return seen & (keys >= first)


def _after_the_edge(seen: np.ndarray, first: np.ndarray, width: int) -> np.ndarray:
    """The first key after the tile a window begins inside of, for rows that see keys beyond that tile."""
    n_k = seen.shape[1]
    last = n_k - 1 - np.argmax(seen[:, ::-1], axis=1)[:, None] if n_k else first
    start = np.maximum(first, 0)
    return np.where((start % width != 0) & seen.any(1, keepdims=True) & (start // width < last // width), (start // width + 1) * width, first)


# ---- weights -----------------------------------------------------------------------------------------------------------------------


def weights_of(problem: Problem, plan: Plan, reading: Reading, rows: Rows, scores: Scores) -> Weights:  # noqa: PLR0911
    """Weights of the scores, by the variant's function or another."""
    function = plan.normalizer if reading.function == "given" else reading.function
    specified = 2 if plan.normalizer == "softmax over queries" else 3
    axis = {"keys": 3, "queries": 2, "heads": 1, "batch": 0}.get(reading.axis, specified)
    if function in ("softmax", "softmax over queries"):
        if axis != 3:
            return _softmax_along(axis, problem, plan, reading, scores)
        found = _softmax(problem, plan, reading, rows, scores)
        sparse = THRESHOLDED.get(plan.normalizer)  # whose threshold is still returned
        return found if sparse is None else replace(found, total=_thresholded(scores.s, sparse[0], sparse[1], False)[1])
    s, nothing = scores.s, np.full((*scores.s.shape[:3], 1), np.nan)
    top = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
    working = working_format(problem)
    if function == "sigmoid":
        return Weights(np.where(scores.seen, 1.0 / (1.0 + np.exp(-s)), 0.0), top, nothing)
    if function.startswith("sigmoid normalised"):
        p = np.where(scores.seen, 1.0 / (1.0 + in_range(np.exp(-s), working)), 0.0)
        total = p.sum(-1, keepdims=True)
        return Weights(p / (total if function.endswith("unguarded") else np.where(total > 0, total, 1.0)), top, nothing)
    if function == "positive parts":
        p = np.maximum(s, 0.0)
        return Weights(p / np.maximum(p.sum(-1, keepdims=True), 1e-30), top, np.zeros_like(top))
    if function in POSITIVE:
        divisor = divisor_of(problem, plan, reading, scores)
        p = np.where(scores.seen, POSITIVE[function](np.where(scores.seen, s, 0.0), plan.power, divisor), 0.0)
        return Weights(np.where(in_range(np.exp(s), working) == np.inf, np.inf, p) if function.endswith("overflowing") else p, top, nothing)
    halves, power, outer, whole = THRESHOLDED[function]
    p, tau = _thresholded(s, halves, power, whole)
    return Weights(p**outer, top, tau)


#: Weights of a visible score entry by entry.
POSITIVE = {
    "relu": lambda s, power, n: np.maximum(s, 0.0) ** power / n,
    "divided before the power": lambda s, power, n: (np.maximum(s, 0.0) / n) ** power,
    "power ignored": lambda s, power, n: np.maximum(s, 0.0) / n,
    "softplus": lambda s, power, n: np.logaddexp(0.0, s) ** power / n,
    "softplus, overflowing": lambda s, power, n: np.logaddexp(0.0, s) ** power / n,
    "magnitude": lambda s, power, n: np.abs(s) ** power / n,
}

#: What the score is divided by, the power of what is beyond the threshold in the sum, the power afterwards, whether every key counts to the support.
THRESHOLDED = {
    "sparsemax": (1.0, 1, 1.0, False),
    "sparsemax, every key": (1.0, 1, 1.0, True),
    "sparsemax of halves": (2.0, 1, 1.0, False),
    "sparsemax squared": (1.0, 1, 2.0, False),
    "entmax15": (2.0, 2, 1.0, False),
    "entmax15, every key": (2.0, 2, 1.0, True),
    "entmax15 of whole scores": (1.0, 2, 1.0, False),
    "entmax15, not squared": (2.0, 2, 0.5, False),
}


def divisor_of(problem: Problem, plan: Plan, reading: Reading, scores: Scores) -> Any:
    """What powers of positive parts are divided by: a number, or one for each row."""
    if problem.params.get("divisor") is not None:
        return plan.divisor
    if reading.denominator == "visible keys":
        return np.maximum(scores.seen.sum(-1, keepdims=True), 1)
    return {"queries": max(problem.dims["T"], 1), "none": 1}.get(reading.denominator, plan.divisor)


def _thresholded(s: np.ndarray, halves: float, power: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights max(s / halves - tau, 0) ** power that sum to one, and tau, by sorting; as if no weight were 0 where `whole`."""
    if not s.shape[-1]:
        return s, np.full((*s.shape[:-1], 1), -np.inf)
    top = s.max(-1, keepdims=True)
    z = (s - np.where(np.isneginf(top), 0.0, top)) / halves
    falling, n = -np.sort(-z, axis=-1), np.arange(1, s.shape[-1] + 1)
    mean = np.cumsum(falling, -1) / n
    apart = np.cumsum((falling - mean) ** 2 * np.where(n > 1, n / np.maximum(n - 1, 1), 0.0), -1)  # sum of squared deviations, by Welford's update
    taus = mean - (1.0 / n if power == 1 else np.sqrt(np.maximum(1.0 - apart, 0.0) / n))
    support = np.isfinite(falling) & (whole | (falling >= taus))
    tau = np.take_along_axis(taus, np.maximum(support.sum(-1, keepdims=True), 1) - 1, -1)
    p = np.where(z > tau, z - tau, 0.0) ** power
    return p, np.where(np.isneginf(top), top, tau + top / halves)


def _softmax_along(axis: int, problem: Problem, plan: Plan, reading: Reading, scores: Scores) -> Weights:
    """Over another axis than the keys'; a sink then joins as if each row summed to one."""
    s = scores.s
    highest = s.max(axis, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isneginf(highest), 0.0, highest))
    total = p.sum(axis, keepdims=True)
    p = p / np.where(total > 0, total, 1.0)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    top, total, p = _with_sink(problem, plan, reading, top, np.ones_like(top), p, 1, scores.scale, working_format(problem))
    return _divided(problem, reading, top, total, p)


def working_format(problem: Problem) -> np.dtype:
    """The format whose range exponentials and sums have."""
    return np.dtype(np.float64 if problem.dtype == np.float64 else np.float32)


def in_range(x: np.ndarray, working: np.dtype) -> np.ndarray:
    """Infinite or zero where the format has no such number."""
    if working == np.float64:
        return x
    held = precision.format_of(working)
    return np.where(np.abs(x) < held.tiny / 2, 0.0, np.where(np.abs(x) > held.largest, np.copysign(np.inf, x), x))


def tiles(reading: Reading, n_q: int, n_k: int) -> Iterator[slice]:
    """The steps in which keys are taken."""
    width = reading.tile or max(n_k, 1)
    end = min(n_q, n_k) if reading.order == "queries' extent" else n_k
    if reading.order == "whole tiles" or (reading.order == "whole tiles or one" and n_k >= width):
        end = n_k // width * width
    first = (reading.order == "no first" and n_k > width) or (reading.order == "no first of many" and n_k > 2 * width)
    last = reading.order == "no last" and n_k > width
    starts = list(range(0, end, width))
    yield from (slice(start, min(start + width, end)) for start in starts[1 if first else 0 : len(starts) - 1 if last else None])


def _softmax(problem: Problem, plan: Plan, reading: Reading, rows: Rows, scores: Scores) -> Weights:
    """Over keys, step by step with a running maximum: `p` holds what each key's weight is by then."""
    s, working = scores.s, working_format(problem)
    full = (*s.shape[:3], 1)
    top, total = np.full(full, reading.start), np.zeros(full)
    if reading.distance_format and plan.sinks in problem.given and reading.sink != "dropped":
        top = np.maximum(top, sinks_of(problem, plan, reading))
    p, acc, moved = np.zeros(s.shape), np.zeros((*s.shape[:3], rows.v.shape[3])), 0.0
    lane = -precision.format_of(working).largest if reading.padding == "least" else 0.0
    n_tiles, on_lanes = 0, np.zeros(full)
    for tile in tiles(reading, s.shape[2], s.shape[3]):
        n_tiles += 1
        here, padded = s[..., tile], _padding(reading, s, tile)
        new = np.maximum(top, here.max(-1, keepdims=True, initial=-np.inf))
        new = np.maximum(new, lane) if padded else new
        new = new if reading.maximum else np.zeros_like(new)
        base = np.where(np.isneginf(new), 0.0, new) if reading.guarded else new
        weight = _power(reading, rounded(here - base, reading.distance_format), working)
        shrink = _power(reading, top - base, working) if reading.maximum else np.ones_like(new)
        fresh = in_range(weight.sum(-1, keepdims=True) + (padded * _power(reading, lane - base, working) if padded else 0.0), working)
        weight = rounded(weight, reading.weights_format)
        total = (total if reading.rescaled in ("accumulator", "neither") else shrink * total) + fresh
        kept = 1.0 if reading.rescaled in ("sum", "neither") else shrink
        p[..., : tile.start] *= kept
        p[..., tile] = weight
        on_lanes = kept * on_lanes + (padded * _power(reading, lane - base, working) if padded else 0.0)
        if reading.sums_format:
            total = rounded(total, reading.sums_format)
            acc = rounded(kept * acc + weighted(weight, scores.seen[..., tile], rows.v[:, :, tile], reading), reading.sums_format)
            moved = np.maximum(kept * moved, np.abs(acc))
        if reading.neighbour:
            paired = total.copy()
            paired[:, :, 0:-1:2] += total[:, :, 1::2]
            total = paired
        top = new
    before = top
    top, total, p = _with_sink(problem, plan, reading, top, total, p, n_tiles, scores.scale, working)
    found = _divided(problem, reading, top, total, p)
    if reading.arrays_format:
        found = replace(found, p=rounded(found.p, reading.arrays_format))
    if reading.distance_format:  # whose last place is another one where the arithmetic before it ends beyond a tie
        moves = 2 * precision.format_of(reading.distance_format).unit * found.p * np.where(found.p > 0, np.abs(s - top), 0.0)
        of_values = moves @ np.abs(np.where(np.isfinite(rows.v), rows.v, 0.0))
        found = replace(found, slack=of_values, lse_slack=float(moves.sum(-1).max(initial=0.0)))
    if reading.padding_value:
        of_lanes = on_lanes * np.exp(before - np.where(np.isneginf(top), 0.0, top)) / np.where(total > 0, total, 1.0) * reading.padding_value
        return replace(found, out=weighted(found.p, scores.seen, rows.v, reading) + of_lanes)
    if not reading.sums_format:
        return found
    shrink = np.exp(before - np.where(np.isneginf(top), 0.0, top)) / np.where(total > 0, total, 1.0)
    unit = precision.format_of(reading.sums_format).unit
    slack = 2 * unit * (n_tiles + 1)
    return replace(found, out=acc * shrink, slack=slack * (moved * shrink + np.abs(acc * shrink)), lse_slack=slack)


def _padding(reading: Reading, s: np.ndarray, tile: slice) -> int:
    """Lanes beyond the last key, where they count."""
    return reading.tile - (tile.stop - tile.start) if reading.padding and tile.stop == s.shape[3] else 0


def _power(reading: Reading, x: np.ndarray, working: np.dtype) -> np.ndarray:
    """The exponential, or what was taken for it."""
    if reading.base in ("2", "2 keys"):
        return in_range(np.exp2(x), working)
    return in_range(np.exp2(x * math.log2(math.e) ** 2) if reading.base == "e log2" else np.exp(x), working)


def sinks_of(problem: Problem, plan: Plan, reading: Reading) -> np.ndarray:
    """The sink of every query head as it is read, (Hq, 1, 1)."""
    sinks = problem.operands[plan.sinks]
    heads = np.arange(len(sinks))
    group = len(sinks) // problem.dims.get("Hkv", len(sinks))
    at = {"before": heads - 1, "next": (heads + 1) % len(sinks), "first": 0 * heads, "key-value head": heads // group}
    sinks = sinks[at.get(reading.sink_head, heads[::-1] if reading.sink_head == "reversed" else heads)]
    return (sinks * reading.sink_factor + reading.sink_offset)[:, None, None]


def _with_sink(  # noqa: PLR0911
    problem: Problem,
    plan: Plan,
    reading: Reading,
    top: np.ndarray,
    total: np.ndarray,
    p: np.ndarray,
    steps: int,
    factor: float,
    working: np.dtype,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sink joins the sum."""
    if plan.sinks not in problem.given or reading.sink == "dropped":
        return top, total, p
    sink = sinks_of(problem, plan, reading)
    base = np.where(np.isneginf(top), 0.0, top)
    if reading.sink == "number":
        return top, total + sink, p
    if reading.sink == "number unshifted":
        return top, total + sink * np.exp(-base), p
    if reading.sink == "base 2":
        return top, total * (1.0 + in_range(np.exp(sink - (top + np.log(total)) / math.log(2.0)), working)), p
    if reading.sink == "base 2 sum":
        return top, total * (1.0 + in_range(np.exp(sink - (top + np.log2(total))), working)), p
    if reading.sink == "not in the maximum, unguarded":
        return top, in_range(total + in_range(np.exp(sink - top), working), working), p
    if reading.sink == "not in the maximum":
        return top, in_range(total + in_range(np.exp(sink - base), working), working), p
    cap = cap_of(plan)
    if reading.sink == "scaled":
        sink = sink * factor
    if reading.sink == "capped" and cap is not None:
        sink = cap * np.tanh(sink / cap)
    new = np.maximum(top, sink)
    base = np.where(np.isneginf(new), 0.0, new)
    two = reading.base == "2"
    shrink = np.exp2(top - base) if two else np.exp(top - base)
    of_sink = np.exp2(sink - base) if two else np.exp(rounded(sink - base, reading.distance_format))
    return new, shrink * total + (steps if reading.sink == "in every tile" else 1) * of_sink, shrink * p


def _divided(problem: Problem, reading: Reading, top: np.ndarray, total: np.ndarray, p: np.ndarray) -> Weights:
    """Weights after the division, and on rows that have no weight."""
    n_k = p.shape[3]
    if reading.denominator == "none":
        return Weights(p, top, total)
    if reading.denominator == "keys":
        return Weights(p / max(n_k, 1), top, total)
    if reading.denominator == "largest":
        return Weights(p / np.maximum(p.max(-1, keepdims=True, initial=0.0), np.finfo(float).tiny), top, total)
    empty = total == 0
    convention = problem.params.get("empty_rows", "zero") if reading.empty == "given" else reading.empty
    if convention == "nan" and reading.empty == "nan":  # divided by a sum of zero
        return Weights(p / total, top, total)
    p = p / np.where(total > 0, total, 1.0)
    if convention == "nan":
        p = np.where(empty, np.nan, p)
    elif convention in ("uniform", "mean"):
        p = np.where(empty, 1.0 / max(n_k, 1), p)
    return Weights(p, top, total)


# ---- outputs -----------------------------------------------------------------------------------------------------------------------


def weighted(p: np.ndarray, seen: np.ndarray, v: np.ndarray, reading: Reading) -> np.ndarray:
    """Weights times values; a value that is not finite counts on the rows that see it, or on every row where hidden ones are multiplied by zero."""
    finite = np.isfinite(v)
    if finite.all() or reading.pad_values:
        return p @ v
    out: np.ndarray = p @ np.where(finite, v, 0.0)
    met = (seen | (p != 0)).astype(np.float64)
    high, low, nan = (met @ where.astype(np.float64) > 0 for where in (np.isposinf(v), np.isneginf(v), np.isnan(v)))
    out = np.where(high, np.inf, np.where(low, -np.inf, out))
    return np.where(nan | (high & low), np.nan, out)


def outputs_of(problem: Problem, plan: Plan, reading: Reading, rows: Rows, scores: Scores, weights: Weights) -> dict[str, np.ndarray]:
    """Every output of the variant by name, in its own axes."""
    v = rows.v / _norms(rows.v) if reading.averaged == "unit vectors" else rows.v
    out = weights.out if weights.out is not None else weighted(weights.p, scores.seen, v, reading)
    if problem.dims.get("S", 1) == 0 and (reading.empty in ("nan", "nan without keys")):
        out = np.full_like(out, np.nan)
    if plan.projections:
        matrix, bias = (problem.operands[n] for n in plan.projections[3])
        out = np.einsum("bhte,hem->btm", out, matrix) + (bias if reading.output_bias else 0.0)
    if plan.residual and reading.residual:
        out = out + problem.operands[plan.residual][:, None]
    held = {"out": out, "weights": weights.p, "scores": scores.s}
    names = {o.name: o.axes for o in problem.variant.outputs}
    if "lse" in names:
        lse = _lse(problem, plan, reading, scores, weights)[..., 0]
        held["lse"] = {"before": np.roll(lse, 1, axis=1), "next": np.roll(lse, -1, axis=1), "first": np.broadcast_to(lse[:, :1], lse.shape)}.get(
            reading.lse_head, lse
        )
    if "threshold" in names:
        held["threshold"] = _threshold(reading, weights)[..., 0]
    return {name: held[name].reshape(shape(axes, problem.dims)) for name, axes in names.items() if name in held}


def _lse(problem: Problem, plan: Plan, reading: Reading, scores: Scores, weights: Weights) -> np.ndarray:
    top, total, how = weights.top, weights.total, reading.lse
    lse = top + np.log(total)
    if how == "no scale":
        return top / scores.scale + np.log(total)
    if how in ("no sink", "of the rows"):
        highest = scores.s.max(-1, keepdims=True, initial=-np.inf)
        base = np.where(np.isneginf(highest), 0.0, highest)
        rows = highest + np.log(np.exp(scores.s - base).sum(-1, keepdims=True))
        return np.logaddexp(rows, sinks_of(problem, plan, reading)) if how == "of the rows" and plan.sinks in problem.given else rows
    if how in _WHERE_EMPTY:
        return np.where(total > 0, lse, _WHERE_EMPTY[how])
    others = {
        "base 2": lse / math.log(2.0),
        "base 2 sum": top + np.log2(total),
        "no maximum": np.log(total),
        "maximum": top,
        "zero": np.zeros_like(lse),
    }
    return others.get(how, lse)


#: What lse is on a row without weight.
_WHERE_EMPTY = {"zero where empty": 0.0, "plus infinity where empty": math.inf, "NaN where empty": math.nan}


def _threshold(reading: Reading, weights: Weights) -> np.ndarray:
    tau = weights.total
    if reading.threshold == "less the maximum":
        return tau - np.where(np.isneginf(tau), 0.0, weights.top)
    return 2.0 * tau if reading.threshold == "doubled" else tau
