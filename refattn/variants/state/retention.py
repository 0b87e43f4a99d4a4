"""Retention: linear attention whose past fades by a fixed factor per head and token.

    S_t   = gamma_h S_{t-1} + k_t v_t^T,     out_t = scale * q_t^T S_t
          = sum_{j <= t} scale * gamma_h^(t - j) (q_t . k_j) v_j + scale * gamma_h^(t + 1) q_t^T S_{-1}

The first line is the definition, the second the paper's parallel form.  Always causal; tokens are counted from 0.  S_{-1} is ``initial_state``
(0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and carried on.  gamma is the operand ``decay``, one per
key-value head, from 0 (0**0 is 1: only the token itself counts) to 1 (nothing fades).  The paper fixes gamma_h = 1 - 2**(-5-h).  Query head h
reads key-value head ``h // (Hq // Hkv)``; the paper has Hq == Hkv.

This is the bare sum.  The paper's layer also rotates queries and keys (xPos, its Theta) before, and normalises each head (GroupNorm) and
multiplies by a swish gate after; none of that is here.

What people get wrong: fading the new token too (gamma^(t - j + 1)); comparing bare sums with torchscale, which like the paper's section 2.2 also
divides the rows of the decay mask by the square root of their sums and the scores by the larger of 1 and the absolute row sum, changes
that GroupNorm hides; the scale, 1/sqrt(D) here, which torchscale puts on the keys and MiniMax's lightning attention leaves out; powers
of gamma by exp2 of a rounded logarithm.

Checked against ONNX's reference evaluator (LinearAttention, update rule "gated") and the lightning attention layer of transformers' MiniMax.
"""

import numpy as np

from refattn.pieces.maps import log
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, decay, initial_state, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                for x in range(d):
                    for y in range(d_v):
                        state[b, g, x, y] = decay[g] * state[b, g, x, y] + k[b, g, t, x] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=("k",), value=("v",)),),
        log_decay=(Factor("decay", log),),
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
    )


def looking_back(run, x):
    """The paper's parallel form: scores under a mask of powers of the decay."""
    n, group = x["q"].shape[2], x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    back = np.arange(n)[:, None] - np.arange(n)
    mask = np.where(back >= 0, np.repeat(x["decay"], group)[:, None, None] ** np.maximum(back, 0), 0.0)
    return run(x, scale=1.0, returns="out"), (x["q"] @ np.swapaxes(k, -1, -2) * mask) @ v


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one = {**x, **{name: x[name][:, :, :half] for name in ("q", "k", "v")}}
    two = {**x, **{name: x[name][:, :, half:] for name in ("q", "k", "v")}}
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def unfaded_is_causal_scores(run, x):
    scores = run({name: x[name] for name in ("q", "k", "v")}, name="softmax", causal=True, returns="scores")
    values = np.repeat(x["v"], x["q"].shape[1] // x["v"].shape[1], axis=1)
    kept = {name: x[name] for name in ("q", "k", "v")}
    return run({**kept, "decay": np.ones_like(x["decay"])}, returns="out"), np.where(scores > -np.inf, scores, 0.0) @ values


def without_memory(run, x):
    group = x["q"].shape[1] // x["k"].shape[1]
    own = np.sum(x["q"] * np.repeat(x["k"], group, axis=1), axis=-1, keepdims=True)
    return run({**x, "decay": 0.0 * x["decay"]}, scale=0.5, returns="out"), 0.5 * own * np.repeat(x["v"], group, axis=1)


VARIANT = Variant(
    name="retention",
    family="state",
    summary="Retention (RetNet): a state that fades by a fixed factor per head.",
    equation="S_t = gamma S_(t-1) + k_t v_t^T, out_t = scale q_t^T S_t",
    paper=Paper(
        title="Retentive Network: A Successor to Transformer for Large Language Models",
        authors=(
            "Sun, Yutao",
            "Dong, Li",
            "Huang, Shaohan",
            "Ma, Shuming",
            "Xia, Yuqing",
            "Xue, Jilong",
            "Wang, Jianyong",
            "Wei, Furu",
        ),
        year=2023,
        arxiv="2307.08621",
        where="section 2.1, equations 5 and 6",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "decay",
            "Hkv",
            "gamma, the factor by which the past fades with every token",
            within=(0.0, 1.0),
            draw=lambda rng, shape: rng.uniform(0.8, 1.0, shape),
        ),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "retention output, before any normalisation or gate"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . S; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*T*E*(3*Hkv*D + Hq*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={"q": [[[[1.0], [1.0], [2.0]]]], "k": [[[[1.0], [1.0], [1.0]]]], "v": [[[[8.0], [4.0], [2.0]]]], "decay": [0.5]},
            returns={"out": [[[[8.0], [8.0], [12.0]]]], "state": [[[[6.0]]]]},
            source="by hand: S = 8, then 4 + 4 = 8, then 4 + 2 = 6",
        ),
        Example(
            operands={
                "q": [[[[1.0, 2.0], [3.0, 0.0]]]],
                "k": [[[[1.0, 0.0], [0.0, 1.0]]]],
                "v": [[[[4.0], [6.0]]]],
                "decay": [0.5],
                "initial_state": [[[[2.0], [10.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[15.0], [7.5]]]], "state": [[[[2.5], [8.5]]]]},
            source="by hand: S = (2, 10), then (1 + 4, 5), then (2.5, 2.5 + 6)",
        ),
    ),
    identities=(
        Identity("the parallel form is the same", looking_back),
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("with decay 1 it is causal softmax attention without the softmax", unfaded_is_causal_scores),
        Identity("with decay 0 a token sees only itself", without_memory),
    ),
)
