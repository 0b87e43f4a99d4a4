"""The gated delta rule (Gated DeltaNet): a state that fades, and is then corrected by the error of its answer at the key.

    S~_t  = alpha_t S_{t-1},   S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T,   alpha_t = exp(gate_t)
    out_t = scale * S_t^T q_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and
carried on.  ``gate`` is the natural logarithm of the factor, one number per token and key-value head; -inf forgets everything.  Query head h
reads the state of key-value head ``h // (Hq // Hkv)``; models with more value heads than key heads (Qwen3-Next) repeat queries and keys.

The paper's S is the transpose of this one.  Its layer takes alpha = exp(-exp(A_log) softplus(a + dt_bias)), beta = sigmoid(b), and keys and
queries of length 1; none of that is here.

What people get wrong: reading the old state where the faded one must be corrected, alpha missing in the erasure only.  The order of
arguments: flash-linear-attention's recurrent reference takes (q, k, v, beta, g), its chunked one (q, k, v, g, beta).  The gate:
MLX-LM takes alpha itself, a state [V, K], and queries that the caller has scaled.  The scale: none in the paper, 1/sqrt(D) here as in
flash-linear-attention, transformers and ONNX.  The norm of keys: x / sqrt(sum x^2 + 1e-6) in transformers, where a flag asks for it, and in
flash-linear-attention's kernels; not x / max(|x|, 1e-12).  Ratios of summed gates formed as exp(G_i) exp(-G_j), which overflow where
exp(G_i - G_j) is at most 1.

Checked against flash-linear-attention's recurrent and chunked references, transformers' Qwen3-Next functions and MLX-LM.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, beta, initial_state, scale):
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
                for x in range(d):
                    for y in range(d_v):
                        state[b, g, x, y] *= alpha
                for y in range(d_v):
                    held = 0.0  # what the faded state answers at the key
                    for x in range(d):
                        held += k[b, g, t, x] * state[b, g, x, y]
                    change = beta[b, g, t] * (v[b, g, t, y] - held)
                    for x in range(d):
                        state[b, g, x, y] += k[b, g, t, x] * change
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
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def unfading_is_delta(run, x):
    plain = {name: x[name] for name in ("q", "k", "v", "beta")}
    return run({**x, "gate": 0.0 * x["gate"]}, returns=("out", "state")), run(plain, name="delta", returns=("out", "state"))


def as_a_triangular_system(run, x):
    """What each token changes, u, solves (I + tril(beta D k k^T, -1)) u = beta v, with D_ij the fading from j to i."""
    summed = np.cumsum(x["gate"], axis=-1)
    fading = np.tril(np.exp(np.tril(summed[..., :, None] - summed[..., None, :])))
    overlap = fading * (x["k"] @ np.swapaxes(x["k"], -1, -2))
    system = np.eye(overlap.shape[-1]) + np.tril(x["beta"][..., None] * overlap, -1)
    u = np.linalg.solve(system, x["beta"][..., None] * x["v"])
    group = x["q"].shape[1] // x["k"].shape[1]
    scores = x["q"] @ np.swapaxes(np.repeat(x["k"], group, axis=1), -1, -2) * np.repeat(fading, group, axis=1)
    state = np.swapaxes(x["k"] * fading[..., -1, :, None], -1, -2) @ u
    return run(x, scale=0.5, returns=("out", "state")), (0.5 * scores @ np.repeat(u, group, axis=1), state)


def without_writes(run, x):
    batch, kv_heads, _, d = x["k"].shape
    start = np.linspace(-1.0, 1.0, batch * kv_heads * d * x["v"].shape[3]).reshape(batch, kv_heads, d, -1)
    group = x["q"].shape[1] // kv_heads
    faded = np.exp(np.cumsum(x["gate"], axis=-1))
    out = 0.5 * np.repeat(faded, group, axis=1)[..., None] * (x["q"] @ np.repeat(start, group, axis=1))
    quiet = {**x, "beta": 0.0 * x["beta"], "initial_state": start}
    return run(quiet, scale=0.5, returns=("out", "state")), (out, faded[..., -1, None, None] * start)


def everything_forgotten(run, x):
    """With a factor of 0 only the token itself counts, whatever came before."""
    batch, kv_heads, _, d = x["k"].shape
    group = x["q"].shape[1] // kv_heads
    start = np.full((batch, kv_heads, d, x["v"].shape[3]), 1e300)
    own = np.sum(x["q"] * np.repeat(x["k"], group, axis=1), axis=-1, keepdims=True)
    written = np.repeat(x["beta"][..., None] * x["v"], group, axis=1)
    return run({**x, "gate": np.full_like(x["gate"], -np.inf), "initial_state": start}, scale=0.5, returns="out"), 0.5 * own * written


VARIANT = Variant(
    name="gated_delta",
    family="state",
    summary="Gated delta rule: a fading state corrected by the error of its own answer at the key.",
    equation="S~_t = exp(gate_t) S_(t-1), S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        authors=("Yang, Songlin", "Kautz, Jan", "Hatamizadeh, Ali"),
        year=2024,
        arxiv="2412.06464",
        where="section 3.1, equation 10",
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
                "q": [[[[1.0], [2.0]]]],
                "k": [[[[1.0], [1.0]]]],
                "v": [[[[8.0], [4.0]]]],
                "gate": [[[0.0, math.log(0.5)]]],
                "beta": [[[0.5, 0.25]]],
            },
            returns={"out": [[[[4.0], [5.0]]]], "state": [[[[2.5]]]]},
            source="by hand: S = 8/2, faded to 2, then 2 + (4 - 2)/4",
        ),
        Example(
            operands={
                "q": [[[[1.0, 0.0], [1.0, 2.0]]]],
                "k": [[[[1.0, 0.0], [1.0, 1.0]]]],
                "v": [[[[6.0], [3.0]]]],
                "gate": [[[math.log(0.5), -math.inf]]],
                "beta": [[[1.0, 0.5]]],
                "initial_state": [[[[2.0], [8.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[6.0], [4.5]]]], "state": [[[[1.5], [1.5]]]]},
            source="by hand: S = (1, 4) + (6 - 1) (1, 0) = (6, 4), all forgotten, then 3/2 (1, 1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("without fading it is the delta rule", unfading_is_delta),
        Identity("the changes solve a triangular system", as_a_triangular_system),
        Identity("with beta 0 the state only fades", without_writes),
        Identity("with a factor of 0 a token sees only itself", everything_forgotten),
    ),
)
