"""A flash attention backward pass in NumPy, tile by tile of keys, its arithmetic float32: weights recomputed from lse, D from the rounded output.

What it stores between steps (weights, dS) it rounds to the operands' format, as tensor-core kernels must.
"""

from __future__ import annotations

import numpy as np
import planted

F32 = np.float32


@np.errstate(all="ignore")
def gradients(
    q, k, v, bias=None, mask=None, sinks=None, scale=None, softcap=None, causal=False, window=None, *, d_out, d_lse=None, tile=16, change=None
):
    """d_q, d_k, d_v, d_bias, d_sinks by name, each in its operand's format; `change(name, array)` may tamper with what is computed on the way."""
    changed = change or (lambda name, x: x)
    stored, dtypes = v.dtype, {n: x.dtype for n, x in {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}.items() if x is not None}
    out, lse = planted.attend(planted.right(tile=tile), q, k, v, bias, mask, sinks, scale, softcap, causal, window)
    shapes = {n: x.shape for n, x in {"k": k, "bias": bias}.items() if x is not None}
    q, k, v, d_out, out = (x.astype(F32) for x in (q, k, v, d_out, out))
    heads, kv_heads, n_q, n_k = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    full = (q.shape[0], heads, n_q, n_k)
    seen = np.broadcast_to(planted.allowed(planted.visible(n_q, n_k, causal, window), mask), full)
    k, v = (np.where(seen.any(axis=2).reshape(full[0], kv_heads, heads // kv_heads, n_k).any(axis=2)[..., None], x, F32(0)) for x in (k, v))
    k, v = planted.grouped(k, heads), planted.grouped(v, heads)
    bias = np.broadcast_to(F32(0) if bias is None else bias.astype(F32), full)
    scale = F32(planted.factor(scale, q.shape[3], v.shape[3], heads))
    delta = changed("delta", (d_out * out).sum(-1))
    if d_lse is not None:
        delta = delta - d_lse.astype(F32)
    d_q, d_k, d_v, d_s_all = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(full, F32)
    for keys in planted.tiles(n_q, n_k, tile):
        raw = q @ np.swapaxes(k[:, :, keys], -1, -2) * scale
        capped = raw if softcap is None else F32(softcap) * np.tanh(raw / F32(softcap))
        s = np.where(seen[..., keys], capped + bias[..., keys], F32(-np.inf))
        p = np.where(np.isneginf(s), F32(0), np.exp(s - lse[..., None]))
        p = changed("p", p)
        d_v[:, :, keys] = np.swapaxes(p.astype(stored).astype(F32), -1, -2) @ d_out
        d_p = d_out @ np.swapaxes(v[:, :, keys], -1, -2)
        d_s = np.where(p == 0, F32(0), p * (d_p - delta[..., None]))
        d_s_all[..., keys] = d_s
        if softcap is not None:
            d_s = d_s * changed("slope", 1 - (capped / F32(softcap)) ** 2)
        d_s = d_s.astype(stored).astype(F32)
        d_q += d_s @ k[:, :, keys]
        d_k[:, :, keys] = np.swapaxes(d_s, -1, -2) @ q
    d_k, d_v = (changed("group", x.astype(stored).astype(F32).reshape(full[0], kv_heads, heads // kv_heads, *x.shape[2:]).sum(2)) for x in (d_k, d_v))
    found = {"d_q": changed("d_q", d_q * scale), "d_k": d_k * scale, "d_v": d_v}
    if "bias" in dtypes:
        padded = (1,) * (4 - len(shapes["bias"])) + shapes["bias"]
        axes = tuple(a for a in range(4) if padded[a] != full[a])
        found["d_bias"] = d_s_all.sum(axes, keepdims=True).reshape(shapes["bias"])
    if "sinks" in dtypes:
        found["d_sinks"] = -np.where(np.isfinite(lse), np.exp(sinks.astype(F32)[:, None] - lse) * delta, F32(0)).sum((0, 2))
    return {name: x.astype(dtypes[name[2:]]) for name, x in found.items()}
