"""Rodimus: gated linear attention in which one selection gate, tempered, says both what fades and what is written.

    S_t   = exp(-g_t tau_t) * S_{t-1} + (g_t^tau_t * k_t) v_t^T       row by row; g = selection >= 0, tau = temperature in [0, 1]
    out_t = scale * q_t^T S_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token.  A large g forgets and writes, a g of
0 holds and ignores (for tau > 0; 0^0 is 1).  Query head h reads state head ``h // (Hq // Hkv)``; the paper has one head with a small D.

The paper computes g = softplus(.) and tau = sigmoid(.) from the convolved token, divides k by its Euclidean norm, and takes sigmoid(.) *
x for v; keys here are as given.  It adds a weighted residual after, and has no scale; flash-linear-attention's layer, which calls its GLA
kernels, divides by sqrt(D).

What people get wrong: raising the decay to tau as well (it is the exponent that is multiplied); g^tau of a negative g, which is why g is
a softplus; normalising k after it was multiplied by g^tau, which undoes the selection.

Checked against flash-linear-attention's naive_recurrent_gla, with keys and gates from PyTorch's pow.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, selection, temperature, initial_state, scale):
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
                    alpha = math.exp(-selection[b, g, t, x] * temperature[b, g, t, x])
                    beta = max(selection[b, g, t, x], 0.0) ** temperature[b, g, t, x]  # negative only where differences step past 0
                    for y in range(d_v):
                        state[b, g, x, y] = alpha * state[b, g, x, y] + beta * k[b, g, t, x] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def reduction(dims, params):
    """Gated linear attention with the keys g^tau * k and the gates -g tau."""

    def operands(x):
        g = np.maximum(x["selection"], 0.0)
        k = g ** x["temperature"] * x["k"]
        return {"q": x["q"], "k": k, "v": x["v"], "gate": -x["selection"] * x["temperature"], "initial_state": x["initial_state"]}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), log_decay=("gate",), scale=params["scale"]),
        {"q": "B Hq T D", "k": "B Hkv T D", "v": "B Hkv T E", "gate": "B Hkv T D", "initial_state": "B Hkv D E", "out": "B Hq T E"},
        operands,
        lambda x, found: found,
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = {name: a[:, :, :half] for name, a in x.items()}, {name: a[:, :, half:] for name, a in x.items()}
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def as_gla(run, x):
    g, tau = x["selection"], x["temperature"]
    given = {"q": x["q"], "k": x["k"] * g**tau, "v": x["v"], "gate": -g * tau}
    return run(x, returns=("out", "state")), run(given, name="gla", scale=1.0, returns=("out", "state"))


def cold_is_a_sum(run, x):
    given = {name: x[name] for name in ("q", "k", "v")}
    cold = {**x, "temperature": np.zeros_like(x["temperature"])}
    decay = np.ones(x["k"].shape[1])
    return run(cold, returns=("out", "state")), run({**given, "decay": decay}, name="retention", scale=1.0, returns=("out", "state"))


def ignored_token(run, x):
    middle = x["q"].shape[2] // 2
    kept = np.arange(x["q"].shape[2]) != middle
    g = x["selection"].copy()
    g[:, :, middle] = 0.0
    x = {**x, "temperature": np.maximum(x["temperature"], 0.125)}
    out, state = run({**x, "selection": g}, returns=("out", "state"))
    return (out[:, :, kept], state), run({name: a[:, :, kept] for name, a in x.items()}, returns=("out", "state"))


VARIANT = Variant(
    name="rodimus",
    family="state",
    summary="Rodimus: gated linear attention in which one tempered selection gate says both what fades and what is written.",
    equation="S_t = exp(-g_t tau_t) * S_(t-1) + (g_t^tau_t * k_t) v_t^T, out_t = scale q_t^T S_t",
    paper=Paper(
        title="Rodimus*: Breaking the Accuracy-Efficiency Trade-Off with Efficient Attentions",
        authors=("He, Zhihao", "Yu, Hang", "Gong, Zi", "Liu, Shizhan", "Li, Jianguo", "Lin, Weiyao"),
        year=2024,
        arxiv="2410.06577",
        where="data-dependent tempered selection",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys, normalised by the caller"),
        Operand("v", "B Hkv T E", "values"),
        Operand("selection", "B Hkv T D", "selection gate g", within=(0.0, math.inf), draw=lambda rng, shape: rng.exponential(1.0, shape)),
        Operand("temperature", "B Hkv T D", "temperature gate tau", within=(0.0, 1.0), draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output, before residual, normalisation and gate"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q . S", tries=(0.37,)),),
    define=define,
    reduction=reduction,
    cost=Cost(flops="B*T*(Hkv*D*(4*E + 3) + Hq*E*(2*D + 1))", memory="B*(Hq*T*E + Hkv*D*E)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [2.0]]]],
                "k": [[[[1.0], [0.5]]]],
                "v": [[[[8.0], [4.0]]]],
                "selection": [[[[0.0], [4.0]]]],
                "temperature": [[[[0.5], [0.5]]]],
                "initial_state": [[[[6.0]]]],
            },
            returns={"out": [[[[6.0], [12.0 * math.exp(-2.0) + 8.0]]]], "state": [[[[6.0 * math.exp(-2.0) + 4.0]]]]},
            source="by hand: the first token is ignored; the second has factor exp(-2) and key 2 * 0.5",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is gla with keys g^tau k and gates -g tau", as_gla),
        Identity("at temperature 0 it is unfaded retention", cold_is_a_sum),
        Identity("a token of selection 0 is ignored", ignored_token),
    ),
)
