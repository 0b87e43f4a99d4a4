"""DeltaNet: a state that is first read at the key, and then corrected by what it got wrong.

    S_t   = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    out_t = scale * S_t^T q_t

One step of gradient descent, of length beta_t, on |v_t - S^T k_t|^2 / 2: the delta rule of Widrow and Hoff.  Always causal.  S_{-1} is
``initial_state`` (0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and carried on.  Query head h
reads the state of key-value head ``h // (Hq // Hkv)``.

Schlag et al. write the rule (section 4.2), Yang et al. (2406.06484) train it in chunks.  Keys and queries are taken as they come: the
feature map and the normalisation are the layer's.  With |k_t| = 1 a beta_t of 1 replaces what is stored at k_t, and one up to 2 shrinks or
reflects; beyond beta_t |k_t|^2 = 2 the state grows without bound.

What people get wrong: the normalisation of keys.  flash-linear-attention's kernels and transformers compute x / sqrt(sum x^2 + 1e-6), MLX-LM
the same through an RMS norm whose eps is divided by D, PyTorch's normalize x / max(|x|, 1e-12); for small x these differ.  The scale: none
in either paper, 1/sqrt(D) in flash-linear-attention's layer and here.  Reading before the write, which answers with the state of the
token before.  Subtracting beta_t k_t (k_t . q) from a state that has the write already.

Checked against flash-linear-attention's recurrent, chunked and parallel references.
"""

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, beta, initial_state, scale):
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
                for y in range(d_v):
                    held = 0.0  # what the state answers at the key
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
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def as_a_triangular_system(run, x):
    """What each token changes, u, solves (I + tril(beta k k^T, -1)) u = beta v; the output is u under causal scores."""
    overlap = x["k"] @ np.swapaxes(x["k"], -1, -2)
    system = np.eye(overlap.shape[-1]) + np.tril(x["beta"][..., None] * overlap, -1)
    u = np.linalg.solve(system, x["beta"][..., None] * x["v"])
    group = x["q"].shape[1] // x["k"].shape[1]
    scores = np.tril(x["q"] @ np.swapaxes(np.repeat(x["k"], group, axis=1), -1, -2))
    return run(x, scale=0.5, returns=("out", "state")), (0.5 * scores @ np.repeat(u, group, axis=1), np.swapaxes(x["k"], -1, -2) @ u)


def orthonormal_keys_replace(run, x):
    batch, kv_heads, n, d = x["k"].shape
    group = x["q"].shape[1] // kv_heads
    k = np.broadcast_to(np.eye(d)[np.arange(n) % d], x["k"].shape)
    table = np.zeros((batch, kv_heads, d, x["v"].shape[3]))
    for t in range(n):
        table[:, :, t % d] = x["v"][:, :, t]
    told = {**x, "k": k, "q": np.repeat(k, group, axis=1), "beta": np.ones_like(x["beta"])}
    return run(told, scale=1.0, returns=("out", "state")), (np.repeat(x["v"], group, axis=1), table)


def without_writes(run, x):
    batch, kv_heads, _, d = x["k"].shape
    start = np.linspace(-1.0, 1.0, batch * kv_heads * d * x["v"].shape[3]).reshape(batch, kv_heads, d, -1)
    held = 0.5 * x["q"] @ np.repeat(start, x["q"].shape[1] // kv_heads, axis=1)
    return run({**x, "beta": 0.0 * x["beta"], "initial_state": start}, scale=0.5, returns=("out", "state")), (held, start)


VARIANT = Variant(
    name="delta",
    family="state",
    summary="DeltaNet: a state corrected by the error of its own answer at the key.",
    equation="S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="Linear Transformers Are Secretly Fast Weight Programmers",
        authors=("Schlag, Imanol", "Irie, Kazuki", "Schmidhuber, Jürgen"),
        year=2021,
        arxiv="2102.11174",
        where="section 4.2",
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
        flops="B*T*E*(Hkv*(4*D + 2) + Hq*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={"q": [[[[1.0], [2.0], [1.0]]]], "k": [[[[1.0], [1.0], [2.0]]]], "v": [[[[8.0], [4.0], [9.0]]]], "beta": [[[0.5, 1.0, 0.25]]]},
            returns={"out": [[[[4.0], [8.0], [4.5]]]], "state": [[[[4.5]]]]},
            source="by hand: S = 8/2, then 4 + (4 - 4) = 4, then 4 + 2/4 (9 - 2 * 4)",
        ),
        Example(
            operands={
                "q": [[[[1.0, 1.0], [1.0, -1.0]]]],
                "k": [[[[1.0, 0.0], [1.0, 1.0]]]],
                "v": [[[[6.0], [3.0]]]],
                "beta": [[[1.0, 0.5]]],
                "initial_state": [[[[2.0], [1.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[7.0], [5.0]]]], "state": [[[[4.0], [-1.0]]]]},
            source="by hand: S = (2 + (6 - 2), 1) = (6, 1), then (6, 1) + (3 - 7)/2 (1, 1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("the changes solve a triangular system", as_a_triangular_system),
        Identity("with beta 1, orthonormal keys store and replace values", orthonormal_keys_replace),
        Identity("with beta 0 nothing changes", without_writes),
    ),
)
