"""Gated linear attention: every row of the state fades by a factor of its own, given with every token.

    S_t   = exp(gate_t) * S_{t-1} + k_t v_t^T       row x of S fades by exp(gate_tx), the paper's alpha
    out_t = scale * q_t^T S_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and
carried on.  gate is the natural logarithm of the factor, one per key channel; -inf forgets the row.  Query head h reads key-value head
``h // (Hq // Hkv)``.

The paper writes S_t = (alpha_t^T 1) * S_{t-1} + k_t^T v_t on row vectors, which is this, without a scale; codes multiply by 1/sqrt(D),
the default here.  The layer computes the gate as logsigmoid of a low-rank projection, divided by 16 (the paper's tau).

What people get wrong: the name (grouped latent attention is GLA too); decays as factors (MLX), as base-2 logarithms (attn-gym) and as
natural ones (here, flash-linear-attention, ONNX); fading the new token too; the parallel form (q * exp(G)) (k * exp(-G))^T with G the sum
of the gates, which overflows once |G| passes 88 in float32, where exp(G_i - G_j) does not; flash-linear-attention's naive function, which
knows no scale but 1/sqrt(D).

Checked against flash-linear-attention (naive_recurrent_gla, values and gradients) and ONNX's reference evaluator
(LinearAttention, update rule "gated").
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, initial_state, scale):
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
                    alpha = math.exp(gate[b, g, t, x])
                    for y in range(d_v):
                        state[b, g, x, y] = alpha * state[b, g, x, y] + k[b, g, t, x] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
    return Recurrence(writes=(Write(key=("k",), value=("v",)),), log_decay=("gate",), scale=scale)


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = {name: a[:, :, :half] for name, a in x.items()}, {name: a[:, :, half:] for name, a in x.items()}
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def one_gate_for_all_rows(run, x):
    gate = x["gate"][..., 0]
    everywhere = np.broadcast_to(gate[..., None], x["gate"].shape)
    return run({**x, "gate": everywhere}, returns=("out", "state")), run({**x, "gate": gate}, name="simple_gla", returns=("out", "state"))


def unfaded_is_causal_scores(run, x):
    q, k, v = x["q"], x["k"], x["v"]
    scores = run({"q": q, "k": k, "v": v}, name="softmax", causal=True, scale=1.0, returns="scores")
    values = np.repeat(v, q.shape[1] // k.shape[1], axis=1)
    return run({**x, "gate": 0.0 * x["gate"]}, scale=1.0), np.where(scores > -np.inf, scores, 0.0) @ values


def forgetting_all(run, x):
    group = x["q"].shape[1] // x["k"].shape[1]
    own = np.sum(x["q"] * np.repeat(x["k"], group, axis=1), axis=-1, keepdims=True)
    return run({**x, "gate": np.full_like(x["gate"], -np.inf)}, scale=0.5), 0.5 * own * np.repeat(x["v"], group, axis=1)


VARIANT = Variant(
    name="gla",
    family="state",
    summary="Gated linear attention: a state whose rows fade by factors given with every token.",
    equation="S_t = exp(gate_t) * S_(t-1) + k_t v_t^T, out_t = scale q_t^T S_t",
    paper=Paper(
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        authors=("Yang, Songlin", "Wang, Bailin", "Shen, Yikang", "Panda, Rameswar", "Kim, Yoon"),
        year=2023,
        arxiv="2312.06635",
        where="section 4",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the factor by which a row of the state fades",
            draw=lambda rng, shape: -rng.exponential(0.5, shape),
        ),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output, before any normalisation or output gate"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . S; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(flops="B*T*(Hkv*D*(3*E + 1) + Hq*E*(2*D + 1))", memory="B*(Hq*T*E + Hkv*D*E)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0], [2.0, 1.0]]]],
                "k": [[[[1.0, 2.0], [1.0, 1.0]]]],
                "v": [[[[4.0], [3.0]]]],
                "gate": [[[[0.0, 0.0], [-math.log(2.0), -math.log(4.0)]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[12.0], [15.0]]]], "state": [[[[5.0], [5.0]]]]},
            source="by hand: S = (4, 8), then (2 + 3, 2 + 3)",
        ),
        Example(
            operands={
                "q": [[[[1.0, 1.0]]]],
                "k": [[[[1.0, 1.0]]]],
                "v": [[[[1.0]]]],
                "gate": [[[[-math.inf, -math.log(2.0)]]]],
                "initial_state": [[[[7.0], [6.0]]]],
            },
            params={"scale": 2.0},
            returns={"out": [[[[10.0]]]], "state": [[[[1.0], [4.0]]]]},
            source="by hand: row 0 forgets its 7, row 1 keeps half of 6",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("one gate for all rows is simple_gla", one_gate_for_all_rows),
        Identity("with gate 0 it is causal softmax attention without the softmax", unfaded_is_causal_scores),
        Identity("with gate -inf a token sees only itself", forgetting_all),
    ),
)
