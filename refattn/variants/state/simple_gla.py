"""Gated linear attention with one gate a head: the whole state fades by one factor, given with every token.

    S_t   = exp(gate_t) S_{t-1} + k_t v_t^T
    out_t = scale * q_t^T S_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token.  gate is the natural logarithm of the
factor, one per key-value head and token; -inf forgets everything.  Query head h reads key-value head ``h // (Hq // Hkv)``.

The gated linear attention paper (2312.06635) has a gate for every key channel, see `gla`; its one-number case is also the gated retention
of YOCO (2405.05254), cited here, and Mamba-2's recurrence, see `mamba2`.  Codes divide by sqrt(D), the default here, which neither paper
writes.

What people get wrong: decays as factors or base-2 logarithms where others want natural ones (see `gla`); the parallel form's difference
of summed gates, masked after the exponential instead of before, where it overflows above the diagonal.

Checked against flash-linear-attention (naive_recurrent_simple_gla, values and gradients; naive_chunk_simple_gla;
naive_parallel_simple_gla) and ONNX's reference evaluator (LinearAttention, update rule "gated").
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
                gamma = math.exp(gate[b, g, t])
                for x in range(d):
                    for y in range(d_v):
                        state[b, g, x, y] = gamma * state[b, g, x, y] + k[b, g, t, x] * v[b, g, t, y]
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


def constant_gate(run, x):
    gate = x["gate"][0, :, 0]
    everywhere = np.broadcast_to(gate[:, None], x["gate"].shape)
    given = {name: x[name] for name in ("q", "k", "v")}
    return run({**x, "gate": everywhere}, returns=("out", "state")), run({**given, "decay": np.exp(gate)}, name="retention", returns=("out", "state"))


def unfaded_is_causal_scores(run, x):
    q, k, v = x["q"], x["k"], x["v"]
    scores = run({"q": q, "k": k, "v": v}, name="softmax", causal=True, scale=1.0, returns="scores")
    values = np.repeat(v, q.shape[1] // k.shape[1], axis=1)
    return run({**x, "gate": 0.0 * x["gate"]}, scale=1.0), np.where(scores > -np.inf, scores, 0.0) @ values


def starting_afresh(run, x):
    middle = x["q"].shape[2] // 2
    gate = x["gate"].copy()
    gate[:, :, middle] = -np.inf
    later = {name: a[:, :, middle:] for name, a in x.items()}
    return run({**x, "gate": gate})[:, :, middle:], run(later)


VARIANT = Variant(
    name="simple_gla",
    family="state",
    summary="Gated linear attention with one gate a head, also called gated retention.",
    equation="S_t = exp(gate_t) S_(t-1) + k_t v_t^T, out_t = scale q_t^T S_t",
    paper=Paper(
        title="You Only Cache Once: Decoder-Decoder Architectures for Language Models",
        authors=(
            "Sun, Yutao",
            "Dong, Li",
            "Zhu, Yi",
            "Huang, Shaohan",
            "Wang, Wenhui",
            "Ma, Shuming",
            "Zhang, Quanlu",
            "Wang, Jianyong",
            "Wei, Furu",
        ),
        year=2024,
        arxiv="2405.05254",
        where="gated retention",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("gate", "B Hkv T", "natural logarithm of the factor by which the state fades", draw=lambda rng, shape: -rng.exponential(0.5, shape)),
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
    cost=Cost(flops="B*T*(Hkv*(3*D*E + 1) + Hq*E*(2*D + 1))", memory="B*(Hq*T*E + Hkv*D*E)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [2.0]]]],
                "k": [[[[1.0], [1.0], [1.0]]]],
                "v": [[[[8.0], [4.0], [2.0]]]],
                "gate": [[[0.0, -math.log(2.0), -math.log(4.0)]]],
            },
            returns={"out": [[[[8.0], [8.0], [8.0]]]], "state": [[[[4.0]]]]},
            source="by hand: S = 8, then 4 + 4 = 8, then 2 + 2 = 4",
        ),
        Example(
            operands={
                "q": [[[[1.0, 2.0]]]],
                "k": [[[[1.0, 0.0]]]],
                "v": [[[[4.0]]]],
                "gate": [[[-math.log(2.0)]]],
                "initial_state": [[[[2.0], [10.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[15.0]]]], "state": [[[[5.0], [5.0]]]]},
            source="by hand: S = (2, 10), then (1 + 4, 5)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("a gate that never changes is retention's decay", constant_gate),
        Identity("with gate 0 it is causal softmax attention without the softmax", unfaded_is_causal_scores),
        Identity("after a gate of -inf nothing is left of what was before", starting_afresh),
    ),
)
