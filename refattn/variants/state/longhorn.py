"""Longhorn: the state that solves, for each token, a little regression exactly, with its transition cut down to a diagonal.

    delta_t = beta_t / (1 + beta_t |k_t|^2)                                            for each value channel y
    S_t     = (1 - delta_t(y) k_t(x)^2) S_{t-1} + delta_t(y) v_t(y) k_t(x)             entry (x, y), elementwise
    out_t   = scale * S_t^T q_t

S_t minimises |S - S_{t-1}|^2 + beta_t |S^T k_t - v_t|^2, whose exact solution is the delta rule of strength delta_t; the paper keeps only the
diagonal of k k^T, so that the state runs in parallel as Mamba's does.  Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state``
is S after the last token, so a sequence can be cut anywhere and carried on.  beta, in (0, 1) in the paper, is a sigmoid of the layer's
making.  The paper has one head of keys and queries for all its value channels, x, and the transposed state.  Query head h reads the state of
key-value head ``h // (Hq // Hkv)``.  There is no scale in the paper; it is 1 by default.

What people get wrong: erasing k_x (S^T k)_y instead of k_x^2 S_xy, which is the exact rule and not this one.  Summing the squares of the
key over tokens or channels other than its own.  A factor cannot leave [0, 1]: delta k_x^2 <= beta |k|^2 / (1 + beta |k|^2) < 1, as beta >= 0.

Checked against the exact minimiser where they must agree, keys with one entry, and against a composition of torch operations.  The published
code needs CUDA; its reference in PyTorch has this recurrence, but returns for the last state that of token D - 1.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


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
                size = 0.0  # |k|^2
                for x in range(d):
                    size += k[b, g, t, x] * k[b, g, t, x]
                for y in range(d_v):
                    delta = beta[b, g, t, y] / (1.0 + beta[b, g, t, y] * size)
                    for x in range(d):
                        kept = 1.0 - delta * k[b, g, t, x] * k[b, g, t, x]
                        state[b, g, x, y] = kept * state[b, g, x, y] + delta * v[b, g, t, y] * k[b, g, t, x]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def reduction(dims, params):
    """Gated linear attention with a state of its own for every value channel."""
    batch, n, d, d_v, kv_heads = (dims[axis] for axis in ("B", "T", "D", "E", "Hkv"))
    group = dims["Hq"] // kv_heads

    def operands(x):
        beta, squares = np.swapaxes(x["beta"], 2, 3)[..., None], (x["k"] * x["k"])[:, :, None]
        others = squares @ (1.0 - np.eye(d))  # of |k|^2, but for the row's own
        delta = beta / (1.0 + beta * np.sum(squares, axis=4, keepdims=True))
        queries = np.broadcast_to(x["q"].reshape(batch, kv_heads, 1, group, n, d), (batch, kv_heads, d_v, group, n, d))
        return {
            "q": queries.reshape(batch, kv_heads * d_v * group, n, d),
            "k": x["k"],
            "v": (delta[..., 0] * np.swapaxes(x["v"], 2, 3)).reshape(batch, kv_heads * d_v, n),
            # of 1 - delta k^2, which cancels
            "gate": -np.log1p(beta * squares / (1.0 + beta * others)).reshape(batch, kv_heads * d_v, n, d),
            "initial_state": np.swapaxes(x["initial_state"], 2, 3).reshape(batch, kv_heads * d_v, d),
        }

    def outputs(x, found):
        out = np.swapaxes(found["out"].reshape(batch, kv_heads, d_v, group, n), 2, 3)
        state = found["state"].reshape(batch, kv_heads, d_v, d)
        return {"out": np.swapaxes(out, 3, 4).reshape(batch, dims["Hq"], n, d_v), "state": np.swapaxes(state, 2, 3)}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), log_decay=("gate",), scale=params["scale"]),
        {"q": "B Hq T D", "k": "B Hkv T D", "v": "B H T", "gate": "B H T D", "initial_state": "B H D", "out": "B Hq T"},
        operands,
        outputs,
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def one_entry_solves_the_regression(run, x):
    """Keys with one entry other than 0 lose nothing by the diagonal: S minimises |S - S_old|^2 + beta |S^T k - v|^2, channel by channel."""
    batch, kv_heads, n, d = x["k"].shape
    k = x["k"] * np.eye(d)[np.arange(n) % d]
    state = np.zeros((batch, kv_heads, d, x["v"].shape[3]))
    for t in range(n):
        key, beta = k[:, :, t, None, :, None], x["beta"][:, :, t, :, None, None]
        normal = np.eye(d) + beta * key * np.swapaxes(key, -1, -2)
        wanted = np.swapaxes(state, -1, -2)[..., None] + beta * x["v"][:, :, t, :, None, None] * key
        state = np.swapaxes(np.linalg.solve(normal, wanted)[..., 0], -1, -2)
    return run({**x, "k": k}, returns="state"), state


def one_channel_of_key_is_delta(run, x):
    """With keys of width 1 there is nothing off the diagonal: the delta rule of strength beta / (1 + beta k^2)."""
    k, q = x["k"][..., :1], x["q"][..., :1]
    beta = x["beta"][..., :1]
    plain = {"q": q, "k": k, "v": x["v"], "beta": (beta / (1.0 + beta * k * k))[..., 0]}
    tied = {"q": q, "k": k, "v": x["v"], "beta": np.broadcast_to(beta, x["beta"].shape)}
    return run(tied, returns=("out", "state")), run(plain, name="delta", scale=1.0, returns=("out", "state"))


def without_writes(run, x):
    batch, kv_heads, _, d = x["k"].shape
    start = np.linspace(-1.0, 1.0, batch * kv_heads * d * x["v"].shape[3]).reshape(batch, kv_heads, d, -1)
    held = x["q"] @ np.repeat(start, x["q"].shape[1] // kv_heads, axis=1)
    return run({**x, "beta": 0.0 * x["beta"], "initial_state": start}, returns=("out", "state")), (held, start)


VARIANT = Variant(
    name="longhorn",
    family="state",
    summary="Longhorn: a regression solved anew with every token, its transition cut down to a diagonal.",
    equation="S_t = (1 - k_t^2 delta_t^T) * S_(t-1) + k_t (delta_t * v_t)^T, delta_t = beta_t / (1 + beta_t |k_t|^2), out_t = scale S_t^T q_t",
    paper=Paper(
        title="Longhorn: State Space Models are Amortized Online Learners",
        authors=(
            "Liu, Bo",
            "Wang, Rui",
            "Wu, Lemeng",
            "Feng, Yihao",
            "Stone, Peter",
            "Liu, Qiang",
        ),
        year=2024,
        arxiv="2407.14207",
        where="section 3.2, theorem 3.1 and algorithm 1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "beta",
            "B Hkv T E",
            "weight of the new token, per value channel",
            within=(0.0, math.inf),
            draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape),
        ),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q", tries=(0.37,)),),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*T*(Hkv*(2*D + E*(3 + 7*D)) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0]]]],
                "k": [[[[1.0, 1.0]]]],
                "v": [[[[8.0, 4.0]]]],
                "beta": [[[[0.5, 0.0]]]],
                "initial_state": [[[[4.0, 1.0], [0.0, 1.0]]]],
            },
            returns={"out": [[[[7.0, 2.0]]]], "state": [[[[5.0, 1.0], [2.0, 1.0]]]]},
            source="by hand: delta = 1/2 / (1 + 1) = 1/4 and 0; first column 3/4 (4, 0) + 2 (1, 1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys with one entry solve the regression exactly", one_entry_solves_the_regression),
        Identity("with keys of width 1 it is the delta rule of strength delta", one_channel_of_key_is_delta),
        Identity("with beta 0 nothing changes", without_writes),
    ),
)
