"""Gated DeltaProduct: several steps of the delta rule for each token, so that its transition is a product of Householder-like matrices.

    S~_{t,0} = alpha_t S_{t-1},   alpha_t = exp(gate_t)
    S~_{t,r} = S~_{t,r-1} + beta_{t,r} k_{t,r} (v_{t,r} - S~_{t,r-1}^T k_{t,r})^T      r = 1 .. R
    out_t    = scale * S_t^T q_t,   S_t = S~_{t,R}

Always causal.  Keys, values and strengths have an axis R for the steps (n_h of the paper); the gate is one number per token, applied before
the first step, and 0 if absent: plain DeltaProduct.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, so a
sequence can be cut anywhere and carried on.  Query head h reads the state of key-value head ``h // (Hq // Hkv)``.  Keys are taken as they come; the
paper's have length 1, with beta up to 2 for negative eigenvalues: two steps of strength 2 make a rotation.

What people get wrong: fading before every step instead of once a token; reading after each step.  flash-linear-attention interleaves the
steps along the tokens, k of shape [B, T * R, H, D] with the step as the faster index, and requires a scale; its version 0.5.2 ignored it.  The
scale: none in the paper, 1/sqrt(D) here.

Checked against flash-linear-attention's reference.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, beta, gate, initial_state, scale):
    batch, heads, n, d = q.shape
    kv_heads, steps, d_v = v.shape[1], v.shape[3], v.shape[4]
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
                for x in range(d):
                    for y in range(d_v):
                        state[b, g, x, y] *= alpha
                for r in range(steps):
                    for y in range(d_v):
                        held = 0.0  # what the state answers at this step's key
                        for x in range(d):
                            held += k[b, g, t, r, x] * state[b, g, x, y]
                        change = beta[b, g, t, r] * (v[b, g, t, r, y] - held)
                        for x in range(d):
                            state[b, g, x, y] += k[b, g, t, r, x] * change
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=("beta", "k"), value=("v",), erase=("k",)),),
        log_decay=("gate",),
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        steps="R",
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def one_step_is_gated_delta(run, x):
    batch, kv_heads, n = x["k"].shape[:3]
    gate = -np.linspace(0.0, 1.0, batch * kv_heads * n).reshape(batch, kv_heads, n)
    first = {**x, "gate": gate, "k": x["k"][:, :, :, :1], "v": x["v"][:, :, :, :1], "beta": x["beta"][..., :1]}
    plain = {"q": x["q"], "k": x["k"][:, :, :, 0], "v": x["v"][:, :, :, 0], "gate": gate, "beta": x["beta"][..., 0]}
    return run(first, returns=("out", "state")), run(plain, name="gated_delta", returns=("out", "state"))


def steps_are_tokens_in_between(run, x):
    """R tokens of the delta rule for one of DeltaProduct, read at the last of each."""
    batch, kv_heads, n, steps = x["beta"].shape
    row = {name: x[name].reshape(batch, kv_heads, n * steps, -1) for name in ("k", "v")}
    plain = {"q": np.repeat(x["q"], steps, axis=2), **row, "beta": x["beta"].reshape(batch, kv_heads, n * steps)}
    out, state = run(plain, name="delta", returns=("out", "state"))
    return run(x, returns=("out", "state")), (out[:, :, steps - 1 :: steps], state)


def two_reflections_rotate(run, x):
    """With v = 0 and beta = 2, keys at angles 0 and half an angle turn two rows of the state by that angle."""
    batch, kv_heads, n = x["k"].shape[:3]
    group = x["q"].shape[1] // kv_heads
    angle = np.linspace(0.1, 3.0, n)
    k = np.zeros((batch, kv_heads, n, 2, 2))
    k[..., 0, 0] = 1.0
    k[..., 1, 0], k[..., 1, 1] = np.cos(angle / 2), np.sin(angle / 2)
    start = np.concatenate([x["v"][:, :, 0, :1, :], 0.0 * x["v"][:, :, 0, :1, :]], axis=2)
    q = np.broadcast_to(np.eye(2)[0], (batch, kv_heads * group, n, 2))
    turned = {"q": q, "k": k, "v": np.zeros((batch, kv_heads, n, 2, start.shape[3])), "beta": np.full((batch, kv_heads, n, 2), 2.0)}
    turned["initial_state"] = start
    summed = np.cumsum(angle)
    out = np.cos(summed)[:, None] * np.repeat(start, group, axis=1)[:, :, :1]
    state = np.array([[np.cos(summed[-1])], [np.sin(summed[-1])]]) * start[:, :, :1]
    return run(turned, scale=1.0, returns=("out", "state")), (out, state)


VARIANT = Variant(
    name="delta_product",
    family="state",
    summary="Gated DeltaProduct: several steps of the delta rule per token.",
    equation="S~ = exp(gate_t) S_(t-1), then R times S~ += beta_tr k_tr (v_tr - S~^T k_tr)^T, S_t = S~, out_t = scale S_t^T q_t",
    paper=Paper(
        title="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
        authors=(
            "Siems, Julien",
            "Carstensen, Timur",
            "Zela, Arber",
            "Hutter, Frank",
            "Pontil, Massimiliano",
            "Grazzi, Riccardo",
        ),
        year=2025,
        arxiv="2502.10297",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand(
            "k",
            "B Hkv T R D",
            "keys, not normalised here",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand("v", "B Hkv T R E", "values"),
        Operand("beta", "B Hkv T R", "write strengths", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand(
            "gate",
            "B Hkv T",
            "natural logarithm of the factor alpha by which the state fades",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
            absent=0.0,
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
        flops="B*T*(Hkv*(1 + E*(D + R*(4*D + 2))) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T R",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0]]]],
                "k": [[[[[1.0, 0.0], [1.0, 1.0]]]]],
                "v": [[[[[6.0], [3.0]]]]],
                "beta": [[[[1.0, 0.5]]]],
                "gate": [[[math.log(0.5)]]],
                "initial_state": [[[[2.0], [2.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[3.0]]]], "state": [[[[4.0], [-1.0]]]]},
            source="by hand: faded to (1, 1); (1 + (6 - 1), 1) = (6, 1); then + (3 - 7)/2 (1, 1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("with one step it is the gated delta rule", one_step_is_gated_delta),
        Identity("its steps are tokens of the delta rule that nobody reads", steps_are_tokens_in_between),
        Identity("two reflections rotate the state", two_reflections_rotate),
    ),
)
