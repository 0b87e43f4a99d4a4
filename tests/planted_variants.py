"""Every variant but softmax as a few lines of NumPy in the operands' own precision, each with mistakes that `fault` switches on.

With no fault each is a transcription of the paper's formula in matrices, sharing nothing with the loops it is judged by.
"""

from __future__ import annotations

import functools
import math

import numpy as np


def softmax(s, axis=-1):
    """Over the entries that are not -inf; 0 where there are none."""
    top = s.max(axis, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isneginf(top), 0, top).astype(s.dtype))
    total = p.sum(axis, keepdims=True)
    return p / np.where(total > 0, total, s.dtype.type(1))


def hidden(s, mask):
    return s if mask is None else np.where(mask, s, s.dtype.type(-np.inf))


def aligned(n_q, n_k, causal, late=0):
    """The pairs that causality allows; `late` more keys for every query."""
    offset = 0 if causal == "top_left" else n_k - n_q
    return np.tri(n_q, n_k, offset + late, dtype=bool) if causal else np.ones((n_q, n_k), bool)


def per_query_head(x, heads, axis=1):
    return np.repeat(x, heads // x.shape[axis], axis=axis)


# ---- scores of other kinds -------------------------------------------------------------------------------------------------------


def luong_dot(q, k, v, mask=None, *, fault=""):
    s = q @ k.swapaxes(1, 2)
    if fault == "scaled":
        s = s / math.sqrt(q.shape[2])
    if fault == "keys backwards":
        s = s[..., ::-1]
    return softmax(hidden(s, mask)) @ v


def luong_general(q, k, v, w, mask=None, *, fault=""):
    if fault == "map left out":
        w = np.eye(*w.shape, dtype=w.dtype)
    return softmax(hidden(q @ w @ k.swapaxes(1, 2), mask)) @ v


def network(inner, w, mask, v, fault):
    """w . tanh(inner), softmax, values."""
    s = (inner if fault == "tanh left out" else np.tanh(inner)) @ w
    return softmax(hidden(s, mask)) @ v


def luong_concat(q, k, v, weight, w, mask=None, *, fault=""):
    d = k.shape[2] if fault == "keys first" else q.shape[2]
    w_q, w_k = (weight[:, d:], weight[:, :d]) if fault == "keys first" else (weight[:, :d], weight[:, d:])
    return network((q @ w_q.T)[:, :, None] + (k @ w_k.T)[:, None], w, mask, v, fault)


def additive(q, k, v, w_q, w_k, w, b=None, mask=None, *, fault=""):
    inner = (q @ w_q.T)[:, :, None] + (k @ w_k.T)[:, None]
    if b is not None and fault != "bias dropped":
        inner = inner + b
    if fault == "product for sum":
        inner = (q @ w_q.T)[:, :, None] * (k @ w_k.T)[:, None]
    return network(inner, w, mask, v, fault)


def cosine_residual(v, *, fault=""):
    norms = np.linalg.norm(v, axis=2, keepdims=True)
    unit = v / np.where(norms > 0, norms, v.dtype.type(1))
    p = softmax(unit @ (v if fault == "one side not normalised" else unit).swapaxes(1, 2))
    attended = p @ (unit if fault == "unit vectors averaged" else v)
    return attended if fault == "residual left out" else v + attended


def article_sdpa(q, k, v, mask=None, *, axis=1, fault=""):
    s = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[2])
    if mask is not None:
        s = np.where((mask == 0) != (fault == "mask inverted"), s.dtype.type(-1e9), s)
    axis = 2 if fault == "the axis that was meant" else 1 if fault == "axis ignored" else axis
    p = softmax(s, axis)
    return p @ v, p


def sigmoid(q, k, v, bias=None, mask=None, *, scale=None, shift=None, causal=False, fault=""):
    n_q, n_k = q.shape[2], k.shape[2]
    if fault == "shift left out":
        shift = 0.0
    if fault == "shift of the number of queries" and shift is None:
        shift = -math.log(max(n_q, 1))
    k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    s = q @ k.swapaxes(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale) - (math.log(max(n_k, 1)) if shift is None else -shift)
    s = s if bias is None else s + bias
    seen = aligned(n_q, n_k, causal) if mask is None else aligned(n_q, n_k, causal) & mask
    if fault == "hidden scores of zero":
        return (1 / (1 + np.exp(-np.where(seen, s, s.dtype.type(0))))) @ v
    p = np.where(seen, 1 / (1 + np.exp(-s)), s.dtype.type(0))
    return (p / p.sum(-1, keepdims=True) if fault == "normalised" else p) @ v


def everyday_scores(q, k, bias, mask, scale, softcap, causal, window, late=0):
    """Scores with -inf where hidden; a window of `late` more keys on either side."""
    n_q, n_k = q.shape[2], k.shape[2]
    s = q @ per_query_head(k, q.shape[1]).swapaxes(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    s = s if bias is None else s + bias
    seen = aligned(n_q, n_k, causal)
    if window is not None:
        ahead = np.arange(n_k) - np.arange(n_q)[:, None] - (0 if causal == "top_left" else n_k - n_q)
        left, right = (math.inf if side is None else side + late for side in window)
        seen = seen & (-left <= ahead) & (ahead <= right)
    return hidden(s, seen if mask is None else seen & mask)


def thresholded(s, power, every_key=False):
    """Weights max(s / power - tau, 0) ** power that sum to one, by sorting, and tau; where `every_key`, tau as if no weight were 0."""
    if not s.shape[-1]:
        return s, np.full(s.shape[:-1], -np.inf, s.dtype)
    top = s.max(-1, keepdims=True)
    z = (s - np.where(np.isneginf(top), 0, top)) / power
    falling, n = -np.sort(-z, axis=-1), np.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    mean = np.cumsum(falling, -1) / n
    squares = np.cumsum(falling**2, -1) / n
    taus = mean - (1 / n if power == 1 else np.sqrt(np.maximum(1 / n - squares + mean**2, 0)))
    support = np.isfinite(falling) & (every_key | (falling >= taus))
    tau = np.take_along_axis(taus, np.maximum(support.sum(-1, keepdims=True), 1) - 1, -1)
    p = np.where(z > tau, z - tau, s.dtype.type(0)) ** power
    return p, np.where(np.isneginf(top), top, tau + top / power)[..., 0]


def sparsemax(q, k, v, bias=None, mask=None, *, scale=None, softcap=None, causal=False, window=None, fault=""):
    s = everyday_scores(q, k, bias, mask, scale, softcap, causal, window, late=1 if fault == "window too wide" else 0)
    if fault == "hidden scores of zero":
        s = np.where(np.isneginf(s), s.dtype.type(0), s)
    if fault == "positive parts divided by their sum":
        p = np.maximum(s, 0)
        p, tau = p / np.maximum(p.sum(-1, keepdims=True), s.dtype.type(1e-30)), np.zeros(s.shape[:-1], s.dtype)
    elif fault == "1.5-entmax":
        p, tau = thresholded(s, 2)
    else:
        p, tau = thresholded(s, 1, every_key=fault == "every key in the support")
    if fault == "threshold less the maximum":
        tau = tau - np.where(np.isneginf(tau), 0, s.max(-1, initial=s.dtype.type(-np.inf)))
    return p @ per_query_head(v, q.shape[1]), tau


def entmax15(q, k, v, bias=None, mask=None, *, scale=None, softcap=None, causal=False, window=None, fault=""):
    s = everyday_scores(q, k, bias, mask, scale, softcap, causal, window)
    p, tau = thresholded(2 * s if fault == "scores not halved" else s, 2, every_key=fault == "every key in the support")
    if fault == "not squared":
        p = np.sqrt(p)
    if fault == "sparsemax of halves":
        p, tau = thresholded(s / 2, 1)
    if fault == "squared after sparsemax":
        p, tau = thresholded(s, 1)
        p = p**2
    if fault == "softmax":
        p = softmax(s)
    if fault == "threshold of whole scores":
        tau = 2 * tau
    return p @ per_query_head(v, q.shape[1]), tau


def relu(q, k, v, bias=None, mask=None, *, scale=None, softcap=None, causal=False, window=None, power=1, divisor=None, fault=""):
    s = everyday_scores(q, k, bias, mask, scale, softcap, causal, window)
    n = max(q.shape[2] if fault == "divided by the queries" else k.shape[2], 1) if divisor is None else divisor
    if fault == "divided by the keys seen" and divisor is None:
        n = np.maximum(np.isfinite(s).sum(-1, keepdims=True), 1).astype(s.dtype)
    if fault == "not divided" and divisor is None:
        n = 1
    if fault == "softplus":
        p = np.log1p(np.exp(s))
    elif fault == "magnitudes":
        p = np.where(np.isneginf(s), s.dtype.type(0), np.abs(s))
    else:
        p = np.maximum(s, 0)
    p = (p / n) ** power if fault == "divided before the power" else p ** (1 if fault == "power ignored" else power) / n
    return p @ per_query_head(v, q.shape[1])


def multi_head(query, key, value, w_q, w_k, w_v, w_o, b_q=None, b_k=None, b_v=None, b_o=None, mask=None, *, scale=None, causal=False, fault=""):
    def projected(x, w, b):
        made = np.einsum("bnm,hmd->bhnd", x, w)
        return made if b is None or fault == "biases dropped" else made + b[:, None]

    if fault == "value's tokens from the key":
        value = key
    q, k, v = projected(query, w_q, b_q), projected(key, w_k, b_k), projected(value, w_v, b_v)
    heads, n_q, n_k = q.shape[1], q.shape[2], k.shape[2]
    k, v = (np.tile(x, (1, heads // x.shape[1], 1, 1)) if fault == "heads tiled" else per_query_head(x, heads) for x in (k, v))
    width = query.shape[2] if fault == "root of the model width" else q.shape[3]
    s = q @ k.swapaxes(2, 3) * (width**-0.5 if scale is None else scale)
    seen = aligned(n_q, n_k, causal) if mask is None else aligned(n_q, n_k, causal) & mask
    out = np.einsum("bhte,hem->btm", softmax(hidden(s, seen)) @ v, w_o)
    return out if b_o is None or fault in ("biases dropped", "output bias dropped") else out + b_o


# ---- states and feature maps ---------------------------------------------------------------------------------------------------------


def linear(q, k, v, initial_state=None, initial_mass=None, *, causal=False, eps=1e-6, fault=""):
    def phi(x):
        if fault == "relu for elu + 1":
            return np.maximum(x, 0)
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    a = phi(q) @ (k if fault == "keys without feature map" else phi(k)).swapaxes(2, 3)
    a = np.where(aligned(q.shape[2], k.shape[2], causal, late=-1 if fault == "own key not seen" else 0), a, a.dtype.type(0))
    summed, total = a @ v, a.sum(-1, keepdims=True) + (0 if fault == "eps left out" else eps)
    if initial_state is not None:
        summed = summed + phi(q) @ per_query_head(initial_state, q.shape[1])
    if initial_mass is not None:
        total = total + phi(q) @ per_query_head(initial_mass, q.shape[1])[..., None]
    return summed if fault == "not normalised" else summed / np.where(total != 0, total, a.dtype.type(1))


def retention(q, k, v, decay, initial_state=None, *, scale=None, fault=""):
    batch, heads, n, d = q.shape
    state = np.zeros((batch, k.shape[1], d, v.shape[3]), q.dtype)
    if initial_state is not None and fault != "initial state ignored":
        state = state + initial_state
    gamma = decay[:, None, None]
    out = np.zeros((batch, heads, n, v.shape[3]), q.dtype)
    for t in range(n):
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        if fault == "decay off by one":  # the newest token fades too
            state = gamma * (state + write)
        elif fault == "decay dropped":
            state = state + write
        else:
            state = gamma * state + write
        read = state - write if fault == "own token not read" else state
        read = np.tile(read, (1, heads // k.shape[1], 1, 1)) if fault == "heads tiled" else per_query_head(read, heads)
        out[:, :, t] = np.einsum("bhd,bhde->bhe", q[:, :, t], read)
    out = out * (d**-0.5 if scale is None and fault != "scale omitted" else 1.0 if scale is None else scale)
    return out, state.swapaxes(2, 3).copy() if fault == "state transposed" and state.shape[2] == state.shape[3] else state


#: Variant -> (transcription, what it returns, its faults).
TRANSCRIPTIONS = {
    "additive": (additive, ("out",), ("tanh left out", "bias dropped", "product for sum")),
    "article_sdpa": (article_sdpa, ("out", "weights"), ("the axis that was meant", "axis ignored", "mask inverted")),
    "cosine_residual": (cosine_residual, ("out",), ("residual left out", "one side not normalised", "unit vectors averaged")),
    "entmax15": (
        entmax15,
        ("out", "threshold"),
        (
            "scores not halved",
            "every key in the support",
            "not squared",
            "sparsemax of halves",
            "squared after sparsemax",
            "softmax",
            "threshold of whole scores",
        ),
    ),
    "linear": (
        linear,
        ("out",),
        ("not normalised", "relu for elu + 1", "keys without feature map", "own key not seen", "eps left out"),
    ),
    "luong_concat": (luong_concat, ("out",), ("tanh left out", "keys first")),
    "luong_dot": (luong_dot, ("out",), ("scaled", "keys backwards")),
    "luong_general": (luong_general, ("out",), ("map left out",)),
    "multi_head": (
        multi_head,
        ("out",),
        ("biases dropped", "output bias dropped", "value's tokens from the key", "heads tiled", "root of the model width"),
    ),
    "relu": (
        relu,
        ("out",),
        (
            "divided by the keys seen",
            "divided by the queries",
            "not divided",
            "divided before the power",
            "power ignored",
            "softplus",
            "magnitudes",
        ),
    ),
    "retention": (
        retention,
        ("out", "state"),
        ("decay off by one", "decay dropped", "own token not read", "initial state ignored", "scale omitted", "heads tiled", "state transposed"),
    ),
    "sigmoid": (
        sigmoid,
        ("out",),
        ("shift left out", "shift of the number of queries", "hidden scores of zero", "normalised"),
    ),
    "sparsemax": (
        sparsemax,
        ("out", "threshold"),
        (
            "every key in the support",
            "hidden scores of zero",
            "positive parts divided by their sum",
            "1.5-entmax",
            "threshold less the maximum",
            "window too wide",
        ),
    ),
}


def transcription(variant: str, fault: str = ""):
    """The variant's transcription as `refattn.check` takes a function, with one fault or none."""
    function = TRANSCRIPTIONS[variant][0]
    return functools.partial(function, fault=fault) if fault else function
