"""LightNet: linear attention with keys that are a running softmax over the tokens, channel by channel.

    z_t   = log(sum_{j <= t} exp(k_j))
    S_t   = exp(z_{t-1} - z_t) * S_{t-1} + exp(k_t - z_t) v_t^T          = sum_{j <= t} exp(k_j - z_t) v_j^T
    out_t = scale * q_t^T S_t

Row x of S is the mean of the values so far, weighted by exp(k_jx); nothing is ever forgotten, it is outweighed (the paper: an additive
recurrence instead of a multiplicative one).  Always causal.  What is carried is S and z, here ``state`` and ``log_mass``; before the
first token they are ``initial_state`` (0 if absent) and ``initial_log_mass`` (-inf if absent).  Query head h reads key-value head
``h // (Hq // Hkv)``.

The paper has no scale and neither has this by default; flash-linear-attention, where this is a gate kernel before its GLA kernels,
divides by sqrt(D) unless told.  Its layer puts SiLU on queries, and a norm and a gate after, none of which is here.

What people get wrong: exponentiating before summing, which overflows; carrying S without z (S alone is a mean that does not know of how
much); the first token's factor, exp(-inf - z_0) = 0, which must not become NaN; confusing it with a gate given with the token: here gates
and keys are one array.

Checked against flash-linear-attention's naive_recurrent_gla with keys and gates from PyTorch's logcumsumexp, and its gradients.
"""

import math

import numpy as np

from refattn.pieces.arrays import log_sum_exp
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, initial_state, initial_log_mass, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    log_mass = np.zeros((batch, kv_heads, d))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                log_mass[b, g, x] = initial_log_mass[b, g, x]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                for x in range(d):
                    before, key = log_mass[b, g, x], k[b, g, t, x]
                    top = max(before, key)
                    if top == -np.inf:  # nothing has come yet
                        continue
                    z = top + math.log(math.exp(before - top) + math.exp(key - top))
                    faded, weight = math.exp(before - z), math.exp(key - z)
                    log_mass[b, g, x] = z
                    for y in range(d_v):
                        state[b, g, x, y] = faded * state[b, g, x, y] + weight * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state, log_mass


def reduction(dims, params):
    """Gated linear attention with keys exp(k - z) and the gates z_(t-1) - z_t."""

    def scores(x):
        return np.concatenate([x["initial_log_mass"][:, :, None], x["k"]], axis=2)

    def operands(x):
        z = np.logaddexp.accumulate(scores(x), axis=2)
        before, after = z[:, :, :-1], np.where(z[:, :, 1:] == -np.inf, 0.0, z[:, :, 1:])
        gate = np.where(z[:, :, 1:] == -np.inf, 0.0, before - after)  # nothing has come yet
        return {"q": x["q"], "k": np.exp(x["k"] - after), "v": x["v"], "gate": gate, "initial_state": x["initial_state"]}

    def outputs(x, found):
        return {"out": found["out"], "state": found["state"], "log_mass": log_sum_exp(scores(x), axis=2)}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), log_decay=("gate",), scale=params["scale"]),
        {"q": "B Hq T D", "k": "B Hkv T D", "v": "B Hkv T E", "gate": "B Hkv T D", "initial_state": "B Hkv D E", "out": "B Hq T E"},
        operands,
        outputs,
    )


ALL = ("out", "state", "log_mass")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = {name: a[:, :, :half] for name, a in x.items()}, {name: a[:, :, half:] for name, a in x.items()}
    out_1, state, log_mass = run(one, returns=ALL)
    out_2, state, log_mass = run({**two, "initial_state": state, "initial_log_mass": log_mass}, returns=ALL)
    return run(x, returns=ALL), (np.concatenate([out_1, out_2], axis=2), state, log_mass)


def as_gla(run, x):
    z = np.logaddexp.accumulate(x["k"], axis=2)
    before = np.concatenate([np.full_like(z[:, :, :1], -np.inf), z[:, :, :-1]], axis=2)
    given = {**x, "k": np.exp(x["k"] - z), "gate": before - z}
    return run(x, returns=("out", "state")), run(given, name="gla", scale=1.0, returns=("out", "state"))


def shifted_keys(run, x):
    out, state, log_mass = run({**x, "k": x["k"] + 3.0}, returns=ALL)
    return (out, state, log_mass), tuple(a + b for a, b in zip(run(x, returns=ALL), (0.0, 0.0, 3.0), strict=True))


def ones_stay_one(run, x):
    return run({**x, "v": np.ones_like(x["v"])}, returns="state"), 1.0


def equal_keys_give_means(run, x):
    group, n = x["q"].shape[1] // x["k"].shape[1], x["q"].shape[2]
    means = np.cumsum(x["v"], axis=2) / np.arange(1, n + 1)[:, None]
    return run({**x, "k": np.full_like(x["k"], 2.0)}), x["q"].sum(-1, keepdims=True) * np.repeat(means, group, axis=1)


VARIANT = Variant(
    name="lightnet",
    family="state",
    summary="LightNet: linear attention whose keys are a running softmax over the tokens, channel by channel.",
    equation="z_t = logaddexp(z_(t-1), k_t), S_t = exp(z_(t-1) - z_t) * S_(t-1) + exp(k_t - z_t) v_t^T, out_t = scale q_t^T S_t",
    paper=Paper(
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        authors=("Qin, Zhen", "Mao, Yuxin", "Shen, Xuyang", "Li, Dong", "Zhang, Jing", "Dai, Yuchao", "Zhong, Yiran"),
        year=2024,
        arxiv="2405.21022",
        where="additive linear recurrence",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "logarithms of the keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
        Operand("initial_log_mass", "B Hkv D", "log_mass before the first token", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output, before any normalisation or gate"),
        Output("state", "B Hkv D E", "state after the last token, means of the values", wide=True),
        Output("log_mass", "B Hkv D", "natural logarithm of the summed exponentials of the keys", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q . S", tries=(0.37,)),),
    define=define,
    reduction=reduction,
    cost=Cost(flops="B*T*(Hkv*D*(3*E + 11) + Hq*E*(2*D + 1))", memory="B*(Hq*T*E + Hkv*D*(E + 1))"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [2.0]]]],
                "k": [[[[0.0], [math.log(3.0)], [math.log(4.0)]]]],
                "v": [[[[8.0], [4.0], [2.0]]]],
            },
            returns={"out": [[[[8.0], [5.0], [7.0]]]], "state": [[[[3.5]]]], "log_mass": [[[math.log(8.0)]]]},
            source="by hand: 8, then (8 + 3 * 4)/4, then (8 + 12 + 4 * 2)/8",
        ),
        Example(
            operands={
                "q": [[[[1.0], [1.0]]]],
                "k": [[[[-math.inf], [math.log(3.0)]]]],
                "v": [[[[8.0], [4.0]]]],
                "initial_state": [[[[2.0]]]],
                "initial_log_mass": [[[0.0]]],
            },
            returns={"out": [[[[2.0], [3.5]]]], "state": [[[[3.5]]]], "log_mass": [[[math.log(4.0)]]]},
            source="by hand: a key of weight 0, then (2 + 3 * 4)/4",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state and mass", cut_and_carried_on),
        Identity("it is gla with keys exp(k - z) and the gates z_(t-1) - z_t", as_gla),
        Identity("adding a number to all keys changes the mass alone", shifted_keys),
        Identity("equal keys give the means of the values so far", equal_keys_give_means),
        Identity("values all one leave a state of ones", ones_stay_one),
    ),
)
