"""Diagonal plus low rank: the delta rule's general form, in which what is read from the old state, where and to what effect, are free vectors.

    S_t   = diag(alpha_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,   alpha_t = exp(gate_t)
    out_t = scale * S_t^T q_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and
carried on.  ``gate`` is the natural logarithm of the factors, one per key channel; -inf forgets the channel.  Query head h reads the
state of key-value head ``h // (Hq // Hkv)``.  With a = 0 this is gated linear attention; with a = alpha * k, b = -beta k and beta k for k it
is Kimi Delta Attention; with a = -kappa and b = kappa * (RWKV-7's a) it is RWKV-7.

What people get wrong: a is asked of the state before it fades, so the transition is diag(alpha) + b a^T and not (I + b a^T) diag(alpha); the
comment S (I + alpha beta^T) at the head of flash-linear-attention's file leaves the fading out.  There a is called alpha and b is
called beta, and the functions are head-first and know no scale but 1/sqrt(D), the default here.  The sign: plus, here and there.

Checked against flash-linear-attention's recurrent and chunked references.
"""

import math

import numpy as np

from refattn.pieces.maps import negative
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, a, b, initial_state, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    fading = np.zeros(d)
    for i in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[i, g, x, y] = initial_state[i, g, x, y]
            for t in range(n):
                for x in range(d):
                    fading[x] = math.exp(gate[i, g, t, x])
                for y in range(d_v):
                    held = 0.0  # what the old state answers at a
                    for x in range(d):
                        held += a[i, g, t, x] * state[i, g, x, y]
                    for x in range(d):
                        state[i, g, x, y] = fading[x] * state[i, g, x, y] + b[i, g, t, x] * held + k[i, g, t, x] * v[i, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[i, h, t, y] += q[i, h, t, x] * state[i, g, x, y]
                        out[i, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=("b",), erase=(Factor("a", negative),), old=True), Write(key=("k",), value=("v",))),
        log_decay=("gate",),
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def as_kda(run, x):
    beta = np.abs(x["a"][..., 0])
    tied = {**x, "a": np.exp(x["gate"]) * x["k"], "b": -beta[..., None] * x["k"], "k": beta[..., None] * x["k"]}
    plain = {name: x[name] for name in ("q", "k", "v", "gate")}
    return run(tied, returns=("out", "state")), run({**plain, "beta": beta}, name="kda", returns=("out", "state"))


def nothing_read_is_gated_linear_attention(run, x):
    plain = {name: x[name] for name in ("q", "k", "v", "gate")}
    return run({**x, "a": 0.0 * x["a"]}, returns=("out", "state")), run(plain, name="gla", returns=("out", "state"))


def unfading_is_identity_plus_low_rank(run, x):
    plain = {name: x[name] for name in ("q", "k", "v", "a", "b")}
    return run({**x, "gate": 0.0 * x["gate"]}, returns=("out", "state")), run(plain, name="iplr", returns=("out", "state"))


def as_products_of_transitions(run, x):
    """Everything written, carried to each token by the product of the transitions in between."""
    fading = np.exp(x["gate"])[..., None, :]
    transition = np.eye(fading.shape[-1]) * fading + x["b"][..., :, None] * x["a"][..., None, :]
    written = x["k"][..., :, None] * x["v"][..., None, :]
    states = np.zeros_like(written)
    for t in range(written.shape[2]):
        product = np.eye(written.shape[3])
        for j in range(t, -1, -1):
            states[:, :, t] += product @ written[:, :, j]
            product = product @ transition[:, :, j]
    out = 0.5 * np.einsum("bhtx,bhtxy->bhty", x["q"], np.repeat(states, x["q"].shape[1] // states.shape[1], axis=1))
    return run(x, scale=0.5, returns=("out", "state")), (out, states[:, :, -1])


VARIANT = Variant(
    name="dplr",
    family="state",
    summary="Diagonal plus low rank: a state that fades row by row, plus what one vector reads of it, written at another.",
    equation="S_t = diag(exp(gate_t)) S_(t-1) + b_t (S_(t-1)^T a_t)^T + k_t v_t^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="FLA: A Triton-Based Library for Hardware-Efficient Implementations of Linear Attention Mechanism",
        authors=(
            "Yang, Songlin",
            "Zhang, Yu",
        ),
        year=2024,
        url="https://github.com/fla-org/flash-linear-attention",
        where="generalized_delta_rule/dplr",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the factors alpha by which rows of the state fade",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
        ),
        Operand(
            "a",
            "B Hkv T D",
            "where the old state is read",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(2.0 * x, axis=-1, keepdims=True),
        ),
        Operand(
            "b",
            "B Hkv T D",
            "where what was read is written",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(2.0 * x, axis=-1, keepdims=True),
        ),
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
        flops="B*T*(Hkv*(D + 7*D*E) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E) + D",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 2.0]]]],
                "k": [[[[1.0, -1.0]]]],
                "v": [[[[3.0]]]],
                "gate": [[[[math.log(0.5), -math.inf]]]],
                "a": [[[[1.0, 0.5]]]],
                "b": [[[[2.0, 1.0]]]],
                "initial_state": [[[[4.0], [2.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[19.0]]]], "state": [[[[15.0], [2.0]]]]},
            source="by hand: read 4 + 1 = 5; S = (2, 0) + 5 (2, 1) + 3 (1, -1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("with a and b tied to the key it is KDA", as_kda),
        Identity("with nothing read it is gated linear attention", nothing_read_is_gated_linear_attention),
        Identity("without fading it is identity plus low rank", unfading_is_identity_plus_low_rank),
        Identity("what is written is carried on by products of transitions", as_products_of_transitions),
    ),
)
