"""Efficient attention: queries softmaxed over their channels, keys over tokens, so that values are gathered once and then handed out.

    rho_q(q_i) = softmax over channels of q_i,   rho_k(k)_j = softmax over tokens j, channel by channel
    out_i = scale * rho_q(q_i)^T sum_j rho_k(k)_j v_j^T

Each channel's sum is a mean of all values (a "global context"), of which a query mixes D.  Query head h reads state head ``h // (Hq // Hkv)``.
Not causal.  The means and the logarithms of their sums of exponentials are updated as keys come; they start at ``initial_state`` (0 if absent)
and ``initial_log_mass`` (-inf if absent) and are returned after the last key, so that keys can be taken in in several parts:

    log_mass' = log(exp(log_mass) + exp(k_j)),   state' = exp(log_mass - log_mass') state + exp(k_j - log_mass') v_j^T

Without keys the output is 0.

What people get wrong: scale, 1 here and in the paper; linear-attention-transformer multiplies by 1/sqrt(D) after the softmax, which makes
every output smaller.  Its causal function is another operation, not prefix sums of this: weights softmax(q) . exp(k)
with one denominator for all channels; with buckets longer than one it leaves out the query's own, and its first bucket is 0.

Checked against linear-attention-transformer's linear_attn.
"""

import math

import numpy as np

from refattn.pieces.arrays import log_sum_exp
from refattn.pieces.feature_maps import softmax_features
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, initial_state, initial_log_mass, scale):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    log_mass = np.zeros((batch, kv_heads, d))
    rho = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                log_mass[b, g, x] = initial_log_mass[b, g, x]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for j in range(n_k):
                for x in range(d):
                    before, key = log_mass[b, g, x], k[b, g, j, x]
                    top = max(before, key)
                    if top == -np.inf:  # nothing has come yet
                        continue
                    after = top + math.log(math.exp(before - top) + math.exp(key - top))
                    kept, weight = math.exp(before - after), math.exp(key - after)
                    log_mass[b, g, x] = after
                    for y in range(d_v):
                        state[b, g, x, y] = kept * state[b, g, x, y] + weight * v[b, g, j, y]
            for h in range(g * group, (g + 1) * group):
                for i in range(n_q):
                    top = q[b, h, i, 0]
                    for x in range(d):
                        top = max(q[b, h, i, x], top)
                    total = 0.0
                    for x in range(d):
                        rho[x] = math.exp(q[b, h, i, x] - top)
                        total += rho[x]
                    for x in range(d):
                        share = scale * rho[x] / total
                        for y in range(d_v):
                            out[b, h, i, y] += share * state[b, g, x, y]
    return out, state, log_mass


def reduction(dims, params):
    """Linear attention without a denominator, of queries and keys that go through their softmaxes."""

    def log_mass(x):
        return log_sum_exp(np.concatenate([x["initial_log_mass"][:, :, None], x["k"]], axis=2), axis=2)

    def operands(x):
        after = log_mass(x)
        nothing = after == -np.inf
        after = np.where(nothing, 0.0, after)
        kept = np.where(nothing, 1.0, np.exp(x["initial_log_mass"] - after))
        return {
            "q": x["q"],
            "k": np.exp(x["k"] - after[:, :, None]),
            "v": x["v"],
            "initial_state": kept[..., None] * x["initial_state"],
        }

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), query=(Factor("q", softmax_features),), scale=params["scale"], causal=False),
        {"q": "B Hq T D", "k": "B Hkv S D", "v": "B Hkv S E", "initial_state": "B Hkv D E", "out": "B Hq T E"},
        operands,
        lambda x, found: {**found, "log_mass": log_mass(x)},
    )


def keys_in_two_parts(run, x):
    half = x["k"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("k", "v")}} for part in (slice(half), slice(half, None)))
    everything = ("out", "state", "log_mass")
    _, state, log_mass = run(one, returns=everything)
    return run(x, returns=everything), run({**two, "initial_state": state, "initial_log_mass": log_mass}, returns=everything)


def ones_give_one(run, x):
    return run({**x, "v": np.ones_like(x["v"])}), 1.0


def softmax_of_both(run, x):
    keys, values = (np.repeat(x[name], x["q"].shape[1] // x["k"].shape[1], axis=1) for name in ("k", "v"))
    weights = {}
    for name, side, axis in (("q", x["q"], -1), ("k", keys, -2)):
        exponentials = np.exp(side - np.max(side, axis=axis, keepdims=True))
        weights[name] = exponentials / np.sum(exponentials, axis=axis, keepdims=True)
    return run(x, scale=0.5), 0.5 * (weights["q"] @ np.swapaxes(weights["k"], -1, -2)) @ values


def lightnet_at_the_last_key(run, x):
    exponentials = np.exp(x["q"][:, :, :1] - np.max(x["q"][:, :, :1], axis=-1, keepdims=True))
    mixed = exponentials / np.sum(exponentials, axis=-1, keepdims=True)
    everywhere = {**x, "q": np.repeat(mixed, x["k"].shape[2], axis=2)}
    return run(x)[:, :, :1], run(everywhere, name="lightnet", scale=1.0, returns="out")[:, :, -1:]


def shifts_cancel(run, x):
    return run(x), run({**x, "q": x["q"] + 3.0, "k": x["k"] - 2.0})


VARIANT = Variant(
    name="efficient",
    family="feature",
    summary="Efficient attention: queries softmaxed over channels, keys over tokens.",
    equation="out_i = scale softmax_channels(q_i)^T sum_j softmax_tokens(k)_j v_j^T",
    paper=Paper(
        title="Efficient Attention: Attention with Linear Complexities",
        authors=("Shen, Zhuoran", "Zhang, Mingyuan", "Zhao, Haiyu", "Yi, Shuai", "Li, Hongsheng"),
        year=2018,
        arxiv="1812.01243",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("initial_state", "B Hkv D E", "mean of the values of earlier keys, channel by channel", absent=0.0),
        Operand("initial_log_mass", "B Hkv D", "logarithm of the sum of exponentials of earlier keys", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D E", "mean of all values, channel by channel", wide=True),
        Output("log_mass", "B Hkv D", "logarithm of the sum of exponentials of all keys", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies the output", tries=(0.37,)),),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*(Hkv*S*D*(11 + 3*E) + Hq*T*D*(5 + 2*E))",
        memory="B*(Hq*T*E + Hkv*D*(E + 1)) + D",
    ),
    examples=(
        Example(
            operands={"q": [[[[0.0, 0.0]]]], "k": [[[[0.0, 0.0], [math.log(3.0), 0.0]]]], "v": [[[[4.0], [8.0]]]]},
            returns={"out": [[[[6.5]]]]},
            source="by hand: means 7 and 6, mixed evenly",
        ),
        Example(
            operands={
                "q": [[[[5.0]]]],
                "k": [[[[2.0]]]],
                "v": [[[[4.0]]]],
                "initial_state": [[[[8.0]]]],
                "initial_log_mass": [[[2.0 + math.log(3.0)]]],
            },
            returns={"out": [[[[7.0]]]], "state": [[[[7.0]]]], "log_mass": [[[2.0 + math.log(4.0)]]]},
            source="by hand: three earlier keys of the same number and mean value 8",
        ),
    ),
    identities=(
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("values all one give one", ones_give_one),
        Identity("it is two softmaxes, one over channels and one over tokens", softmax_of_both),
        Identity("it is LightNet on softmaxed queries, after the last key", lightnet_at_the_last_key),
        Identity("a shift of all queries or keys cancels", shifts_cancel),
    ),
)
