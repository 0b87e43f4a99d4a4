"""Comba: a state that fades, and is corrected at the key by the error of what the old state answered at a vector of its own.

    S_t   = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,   alpha_t = exp(gate_t)
          = (alpha_t I - beta_t k_t p_t^T) S_{t-1} + beta_t k_t v_t^T
    out_t = scale * S_t^T q_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and
carried on.  ``gate`` is the natural logarithm of the factor.  Query head h reads the state of key-value head ``h // (Hq // Hkv)``.

The transition is a scalar plus low rank: what is erased was read before the state faded, so that the gated delta rule is p = alpha k and
not p = k.  The paper's state feedback makes p a learnt share of the key, b k with b in (0, 1) per head, so that less is erased than is
written.  Its output feedback, out = S^T (q - d k), is a matter of the query: subtract before calling.  Keys are taken as they come.

What people get wrong: asking the faded state at p, as flash-linear-attention's naive_recurrent_comba does (0.6.0), which computes
alpha p for p and so disagrees with that library's own chunked reference and kernels, and with the paper.  The order of arguments: that
function takes (q, k, v, p, beta, g), the chunked one (q, k, v, p, g, beta).  The scale: none in the paper, 1/sqrt(D) here as in
flash-linear-attention.  Expecting a contraction: the transition shrinks only where p is close to k.

Checked against flash-linear-attention's chunked reference, and against its recurrent one with the mistake allowed for.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, p, gate, beta, initial_state, scale):
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
                alpha = math.exp(gate[b, g, t])
                for y in range(d_v):
                    held = 0.0  # what the old state answers at p
                    for x in range(d):
                        held += p[b, g, t, x] * state[b, g, x, y]
                    change = beta[b, g, t] * (v[b, g, t, y] - held)
                    for x in range(d):
                        state[b, g, x, y] = alpha * state[b, g, x, y] + k[b, g, t, x] * change
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=("beta", "k"), value=("v",), erase=("p",), old=True),),
        log_decay=("gate",),
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def erased_at_the_faded_key_is_gated_delta(run, x):
    tied = {name: a for name, a in x.items() if name != "p"}
    return run({**x, "p": np.exp(x["gate"])[..., None] * x["k"]}, returns=("out", "state")), run(tied, name="gated_delta", returns=("out", "state"))


def without_erasure_is_linear_attention(run, x):
    """p = 0: causal scores that fade, times beta v."""
    summed = np.cumsum(x["gate"], axis=-1)
    fading = np.tril(np.exp(np.tril(summed[..., :, None] - summed[..., None, :])))
    group = x["q"].shape[1] // x["k"].shape[1]
    scores = x["q"] @ np.swapaxes(np.repeat(x["k"], group, axis=1), -1, -2) * np.repeat(fading, group, axis=1)
    return run({**x, "p": 0.0 * x["p"]}, scale=0.5, returns="out"), 0.5 * scores @ np.repeat(x["beta"][..., None] * x["v"], group, axis=1)


def as_a_triangular_system(run, x):
    """What each token changes, u, solves (I + beta D p k^T) u = beta v, with D_ij the fading from j to the token before i, 0 from j >= i."""
    summed = np.cumsum(x["gate"], axis=-1)
    fading = np.tril(np.exp(np.tril(summed[..., :, None] - summed[..., None, :])))
    asked = np.tril(np.exp(np.tril((summed - x["gate"])[..., :, None] - summed[..., None, :], -1)), -1)
    system = np.eye(fading.shape[-1]) + x["beta"][..., None] * asked * (x["p"] @ np.swapaxes(x["k"], -1, -2))
    u = np.linalg.solve(system, x["beta"][..., None] * x["v"])
    group = x["q"].shape[1] // x["k"].shape[1]
    scores = x["q"] @ np.swapaxes(np.repeat(x["k"], group, axis=1), -1, -2) * np.repeat(fading, group, axis=1)
    state = np.swapaxes(x["k"] * fading[..., -1, :, None], -1, -2) @ u
    return run(x, scale=0.5, returns=("out", "state")), (0.5 * scores @ np.repeat(u, group, axis=1), state)


def as_products_of_transitions(run, x):
    """Everything written, carried to each token by the product of the transitions in between."""
    eye = np.eye(x["k"].shape[-1])
    strength = x["beta"][..., None, None]
    transition = np.exp(x["gate"])[..., None, None] * eye - strength * x["k"][..., :, None] * x["p"][..., None, :]
    written = strength * x["k"][..., :, None] * x["v"][..., None, :]
    states = np.zeros_like(written)
    for t in range(written.shape[2]):
        product = np.eye(written.shape[3])
        for j in range(t, -1, -1):
            states[:, :, t] += product @ written[:, :, j]
            product = product @ transition[:, :, j]
    out = 0.5 * np.einsum("bhtx,bhtxy->bhty", x["q"], np.repeat(states, x["q"].shape[1] // states.shape[1], axis=1))
    return run(x, scale=0.5, returns=("out", "state")), (out, states[:, :, -1])


VARIANT = Variant(
    name="comba",
    family="state",
    summary="Comba: a fading state corrected by what it answered, before fading, at a vector of its own.",
    equation="S_t = exp(gate_t) S_(t-1) + beta_t k_t (v_t - S_(t-1)^T p_t)^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="Comba: Improving Bilinear RNNs with Closed-loop Control",
        authors=(
            "Hu, Jiaxi",
            "Pan, Yongqi",
            "Du, Jusen",
            "Lan, Disen",
            "Tang, Xiaqiang",
            "Wen, Qingsong",
            "Liang, Yuxuan",
            "Sun, Weigao",
        ),
        year=2025,
        arxiv="2506.02475",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand(
            "k",
            "B Hkv T D",
            "keys, not normalised here",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "p",
            "B Hkv T D",
            "where the old state is asked for what to erase",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand(
            "gate", "B Hkv T", "natural logarithm of the factor alpha by which the state fades", draw=lambda rng, shape: -rng.exponential(0.2, shape)
        ),
        Operand("beta", "B Hkv T", "write strength", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies q; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*T*(Hkv*(1 + E*(5*D + 2)) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 0.0], [1.0, 2.0]]]],
                "k": [[[[1.0, 0.0], [1.0, 1.0]]]],
                "v": [[[[6.0], [3.0]]]],
                "p": [[[[0.5, 0.0], [0.0, 0.5]]]],
                "gate": [[[0.0, math.log(0.5)]]],
                "beta": [[[1.0, 0.5]]],
                "initial_state": [[[[2.0], [4.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[7.0], [9.0]]]], "state": [[[[4.0], [2.5]]]]},
            source="by hand: S = (2 + (6 - 1), 4) = (7, 4), then (3.5, 2) + (3 - 2)/2 (1, 1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("erasing at the faded key it is the gated delta rule", erased_at_the_faded_key_is_gated_delta),
        Identity("without erasure it is linear attention that fades", without_erasure_is_linear_attention),
        Identity("the changes solve a triangular system", as_a_triangular_system),
        Identity("what is written is carried on by products of transitions", as_products_of_transitions),
    ),
)
