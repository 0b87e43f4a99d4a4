"""SimA: attention without softmax, every channel of queries and keys divided by the sum of its absolute values over tokens.

    q^_ic = q_ic / sum_i' |q_i'c|,   k^_jc = k_jc / sum_j' |k_j'c|
    out_i = q^_i^T sum_j k^_j v_j^T

Not causal: all queries and all keys are needed before the first output.  Query head h reads state head ``h // (Hq // Hkv)``.  The sums over keys
start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key, so that keys can be taken in in several parts;
the queries of a call are always all there are.  A channel that is 0 everywhere stays 0.

What people get wrong: the sums run over tokens, channel by channel, not over channels.  Weights may be negative and do not sum to 1.  More
tokens make every entry smaller.  The order of the products is free: (Q K^T) V where there are fewer tokens than channels.

Checked against a composition of PyTorch's normalize and matmul.
"""

import numpy as np

from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Recurrence, Reduction, Variant, Write


def define(q, k, v, initial_state, initial_mass):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    mass = np.zeros((batch, kv_heads, d))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                mass[b, g, x] = initial_mass[b, g, x]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
                for j in range(n_k):
                    mass[b, g, x] += abs(k[b, g, j, x])
                    for y in range(d_v):
                        state[b, g, x, y] += k[b, g, j, x] * v[b, g, j, y]
            for h in range(g * group, (g + 1) * group):
                for x in range(d):
                    total = 0.0
                    for i in range(n_q):
                        total += abs(q[b, h, i, x])
                    total *= mass[b, g, x]
                    if total == 0.0:  # a channel of zeros stays
                        total = np.inf
                    for i in range(n_q):
                        for y in range(d_v):
                            out[b, h, i, y] += q[b, h, i, x] * state[b, g, x, y] / total
    return out, state, mass


def reduction(dims, params):
    """Linear attention without a denominator, of queries that have been divided by both sums."""

    def mass(x):
        return x["initial_mass"] + np.sum(np.abs(x["k"]), axis=2)

    def operands(x):
        total = np.sum(np.abs(x["q"]), axis=2) * np.repeat(mass(x), dims["Hq"] // dims["Hkv"], axis=1)
        divisor = np.where(total == 0.0, np.inf, total)  # a channel of zeros stays
        return {"q": x["q"] / divisor[:, :, None], "k": x["k"], "v": x["v"], "initial_state": x["initial_state"]}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), causal=False),
        {"q": "B Hq T D", "k": "B Hkv S D", "v": "B Hkv S E", "initial_state": "B Hkv D E", "out": "B Hq T E"},
        operands,
        lambda x, found: {**found, "mass": mass(x)},
    )


def keys_in_two_parts(run, x):
    half = x["k"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("k", "v")}} for part in (slice(half), slice(half, None)))
    state, mass = run(one, returns=("state", "mass"))
    everything = ("out", "state", "mass")
    return run(x, returns=everything), run({**two, "initial_state": state, "initial_mass": mass}, returns=everything)


def product_of_normalised(run, x):
    keys, values = (np.repeat(x[name], x["q"].shape[1] // x["k"].shape[1], axis=1) for name in ("k", "v"))
    q, k = (side / np.sum(np.abs(side), axis=2, keepdims=True) for side in (x["q"], keys))
    return run(x), (q @ np.swapaxes(k, -1, -2)) @ values


def sizes_cancel(run, x):
    sizes = np.linspace(0.5, 2.0, x["q"].shape[3])
    return run(x), run({**x, "q": sizes * x["q"], "k": -sizes * x["k"], "v": -x["v"]})


def twice_the_tokens(run, x):
    twice = {name: np.concatenate([x[name], x[name]], axis=2) for name in ("k", "v")}
    return run(x), run({**x, **twice})


VARIANT = Variant(
    name="sima",
    family="feature",
    summary="SimA: attention without softmax, channels of queries and keys divided by their absolute sums over tokens.",
    equation="out_i = q^_i^T sum_j k^_j v_j^T, q^_ic = q_ic / sum_i' |q_i'c|, k^_jc = k_jc / sum_j' |k_j'c|",
    paper=Paper(
        title="SimA: Simple Softmax-free Attention for Vision Transformers",
        authors=("Koohpayegani, Soroush Abbasi", "Pirsiavash, Hamed"),
        year=2022,
        arxiv="2206.08898",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("initial_state", "B Hkv D E", "sum of earlier keys times values", absent=0.0),
        Operand(
            "initial_mass", "B Hkv D", "sum of absolute values of earlier keys", absent=0.0, draw=lambda rng, shape: rng.uniform(1.0, 2.0, shape)
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D E", "sum of keys times values, after the last key", wide=True),
        Output("mass", "B Hkv D", "sum of the keys' absolute values, after the last key", wide=True),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*D*(Hkv*S*(1 + 2*E) + Hq*(1 + T*(1 + 3*E)))",
        memory="B*(Hq*T*E + Hkv*D*(E + 1))",
    ),
    examples=(
        Example(
            operands={"q": [[[[1.0], [-3.0]]]], "k": [[[[1.0], [-1.0]]]], "v": [[[[4.0], [8.0]]]]},
            returns={"out": [[[[-0.5], [1.5]]]], "state": [[[[-4.0]]]], "mass": [[[2.0]]]},
            source="by hand: q^ = 1/4 and -3/4, k^ = 1/2 and -1/2, sum -2",
        ),
        Example(
            operands={"q": [[[[2.0, 0.0], [2.0, 4.0]]]], "k": [[[[1.0, 0.0], [3.0, 5.0]]]], "v": [[[[4.0], [8.0]]]]},
            returns={"out": [[[[3.5], [11.5]]]]},
            source="by hand: channel sums (4 + 24)/4 = 7 and 8, of queries (1/2, 0) and (1/2, 1)",
        ),
    ),
    identities=(
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("it is the product of the normalised matrices, in the other order", product_of_normalised),
        Identity("the sizes of channels cancel, and a sign of keys and values", sizes_cancel),
        Identity("every key twice changes nothing", twice_the_tokens),
    ),
)
