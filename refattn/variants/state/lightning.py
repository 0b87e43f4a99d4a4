"""Lightning attention: linear attention whose past fades by a fixed slope per head, as TransNormerLLM and MiniMax-01 use it.

    S_t   = exp(-slope_h) S_{t-1} + k_t v_t^T
    out_t = scale * q_t^T S_t = scale * sum_{j <= t} exp(-slope_h (t - j)) (q_t . k_j) v_j + what is left of S_{-1}

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token.  Query head h reads key-value head
``h // (Hq // Hkv)``.  It is `retention` with another way to say the decay and a scale of 1.  The operation is named after the way its
kernels are tiled; that tiling does not change what is computed.

The slopes are what models differ in, with heads h from 0 to H-1 and layers l from 0 to L-1:

    TransNormerLLM          slope = 8 h / H * (1 - l / L)                                 head 0 never forgets
    MiniMax-01              slope = 2^(-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)

What people get wrong: taking one model's slopes for the other's, both being called lightning attention; a scale, which neither has;
forgetting that the layer puts SiLU on queries, keys and values before, and RMSNorm and a sigmoid gate after, none of which is here.

Checked against the lightning attention layer of transformers' MiniMax and flash-linear-attention (naive_recurrent_simple_gla and
naive_chunk_simple_gla with the gate -slope).
"""

import math

import numpy as np

from refattn.pieces.maps import negative
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, slope, initial_state, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    for b in range(batch):
        for g in range(kv_heads):
            lam = math.exp(-slope[g])
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                for x in range(d):
                    for y in range(d_v):
                        state[b, g, x, y] = lam * state[b, g, x, y] + k[b, g, t, x] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(writes=(Write(key=("k",), value=("v",)),), log_decay=(Factor("slope", negative),), scale=params["scale"])


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one = {**x, **{name: x[name][:, :, :half] for name in ("q", "k", "v")}}
    two = {**x, **{name: x[name][:, :, half:] for name in ("q", "k", "v")}}
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def as_retention(run, x):
    given = {name: x[name] for name in ("q", "k", "v")}
    return run(x, returns=("out", "state")), run({**given, "decay": np.exp(-x["slope"])}, name="retention", scale=1.0, returns=("out", "state"))


def paired_tokens(run, x):
    """The sum over pairs, its powers of the decay taken from the distance."""
    group = x["q"].shape[1] // x["k"].shape[1]
    n = x["q"].shape[2]
    distance = np.maximum(np.subtract.outer(np.arange(n), np.arange(n)), 0)
    faded = np.tril(np.exp(-np.repeat(x["slope"], group)[:, None, None] * distance))
    similarity = np.einsum("bhtd,bhsd->bhts", x["q"], np.repeat(x["k"], group, axis=1))
    return run(x), (faded * similarity) @ np.repeat(x["v"], group, axis=1)


VARIANT = Variant(
    name="lightning",
    family="state",
    summary="Lightning attention: a state that fades by a fixed slope per head.",
    equation="S_t = exp(-slope) S_(t-1) + k_t v_t^T, out_t = scale q_t^T S_t",
    paper=Paper(
        title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        authors=("Qin, Zhen", "Sun, Weigao", "Li, Dong", "Shen, Xuyang", "Sun, Weixuan", "Zhong, Yiran"),
        year=2024,
        arxiv="2401.04658",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("slope", "Hkv", "how much the logarithm of what is past falls with every token", draw=lambda rng, shape: rng.exponential(0.5, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output, before any normalisation or gate"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q . S", tries=(0.37,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(flops="B*(Hkv*(3*T*D*E + 1) + Hq*T*E*(2*D + 1))", memory="B*(Hq*T*E + Hkv*D*E)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [2.0]]]],
                "k": [[[[1.0], [1.0], [1.0]]]],
                "v": [[[[8.0], [4.0], [2.0]]]],
                "slope": [math.log(2.0)],
                "initial_state": [[[[16.0]]]],
            },
            returns={"out": [[[[16.0], [12.0], [16.0]]]], "state": [[[[8.0]]]]},
            source="by hand: S = 8 + 8, then 8 + 4 = 12, then 6 + 2 = 8",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is retention of decay exp(-slope) and scale 1", as_retention),
        Identity("every token reads every earlier one, faded by slope times their distance", paired_tokens),
    ),
)
