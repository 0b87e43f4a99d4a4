"""HGRN2: gated linear attention whose keys are what the gates leave open.

    S_t   = f_t * S_{t-1} + (1 - f_t) v_t^T,     f_t = exp(gate_t)       row x of S fades by f_tx
    out_t = scale * q_t^T S_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token.  gate is the natural logarithm of the
paper's forget gate, v its input, q its output gate.  Query head h reads state head ``h // (Hq // Hkv)``; the paper has Hq == Hkv.

The paper has no scale and neither has this by default; flash-linear-attention's layer, which calls its GLA kernels, multiplies by
1/sqrt(D) (a following RMSNorm hides all but its eps).  There are no keys: the rows of the state compete for the input by their gates.

What people get wrong: computing 1 - f after rounding f, which loses the digits of a gate near 0 (a row that holds on); fading the new
input too.

Checked against flash-linear-attention (naive_recurrent_gla with keys 1 - exp(gate)).
"""

import math

import numpy as np

from refattn.pieces.maps import one_minus_exp
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, v, gate, initial_state, scale):
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
                    f, closed = math.exp(gate[b, g, t, x]), math.expm1(gate[b, g, t, x])  # f and f - 1
                    for y in range(d_v):
                        state[b, g, x, y] = f * state[b, g, x, y] - closed * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(writes=(Write(key=(Factor("gate", one_minus_exp),), value=("v",)),), log_decay=("gate",), scale=params["scale"])


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = {name: a[:, :, :half] for name, a in x.items()}, {name: a[:, :, half:] for name, a in x.items()}
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def as_gla(run, x):
    keys = -np.expm1(x["gate"])
    return run(x, returns=("out", "state")), run({**x, "k": keys}, name="gla", scale=1.0, returns=("out", "state"))


def rows_are_hgrn(run, x):
    """Each entry of the state is one channel of hgrn."""
    batch, heads, n, d = x["gate"].shape
    d_v = x["v"].shape[3]

    def channels(a):
        return np.moveaxis(np.broadcast_to(a, (batch, heads, n, d, d_v)), 2, 1).reshape(batch, n, heads * d * d_v)

    apart = {"x": channels(x["v"][:, :, :, None, :]), "gate": channels(x["gate"][..., None])}
    return run(x, returns="state"), run(apart, name="hgrn", returns="state").reshape(batch, heads, d, d_v)


VARIANT = Variant(
    name="hgrn2",
    family="state",
    summary="HGRN2: gated linear attention whose keys are 1 minus the forget gates.",
    equation="S_t = exp(gate_t) * S_(t-1) + (1 - exp(gate_t)) v_t^T, out_t = scale q_t^T S_t",
    paper=Paper(
        title="HGRN2: Gated Linear RNNs with State Expansion",
        authors=("Qin, Zhen", "Yang, Songlin", "Sun, Weixuan", "Shen, Xuyang", "Li, Dong", "Sun, Weigao", "Zhong, Yiran"),
        year=2024,
        arxiv="2404.07904",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, the paper's output gate"),
        Operand("v", "B Hkv T E", "values, the paper's input"),
        Operand("gate", "B Hkv T D", "natural logarithm of the forget gate", draw=lambda rng, shape: -rng.exponential(0.5, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output, before any normalisation"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q . S", tries=(0.37,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(flops="B*T*(Hkv*D*(3*E + 2) + Hq*E*(2*D + 1))", memory="B*(Hq*T*E + Hkv*D*E)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0], [2.0, 1.0]]]],
                "v": [[[[4.0], [8.0]]]],
                "gate": [[[[-math.inf, -math.log(2.0)], [-math.log(2.0), -math.log(4.0)]]]],
            },
            returns={"out": [[[[6.0], [18.5]]]], "state": [[[[6.0], [6.5]]]]},
            source="by hand: S = (4, 4/2), then (4/2 + 8/2, 2/4 + 3 * 8/4)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is gla with keys 1 - exp(gate)", as_gla),
        Identity("each entry of the state is a channel of hgrn", rows_are_hgrn),
    ),
)
