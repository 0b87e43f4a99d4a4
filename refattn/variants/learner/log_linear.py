"""Log-linear attention: gated linear attention with one state for each level of a binary tree over the past, weighed as the query says.

    out_t = scale * sum_l level_scale_tl q_t^T S_t[l],     S_t[l] = sum_{j <= t of level l} exp(gate_{j+1} + ... + gate_t) k_j v_j^T

Level 0 is the token itself; level l > 0 are the tokens j whose positions first differ from t's, read in binary from the left, in bit l - 1:
l is the bit length of t xor j (the Fenwick tree of the paper's section 3).  So level l spans up to 2**(l-1) tokens, farther back the larger
l is, and log2(T) + 1 levels hold T tokens.  A step at position t, whose lowest set bit is bit r, merges levels 0 to r into level r + 1,
fades all, and writes the token into level 0.

With fewer levels than the sequence needs, the last one also takes in everything that is farther back.  ``state`` holds the levels after the
last token and ``position`` the number of tokens so far; with them as ``initial_state`` and ``initial_position`` a sequence can be cut
anywhere: the tree hangs on positions, and so the output does too, even with all gates 0.

``gate`` is the natural logarithm of the factor by which the past fades.  ``level_scale`` is the paper's lambda, one number per query head,
token and level; query head h reads the state of head ``h // (Hq // Hkv)``.  The paper has no scale: 1.0 here, as in flash-linear-attention.

What people get wrong: positions counted from 1, which moves every boundary of the tree; levels by distance t - j instead of t xor j; the
scale of the token itself forgotten (level 0); weighing by the key's lambda instead of the query's.

Checked against flash-linear-attention's naive_log_linear_attn, which builds the whole matrix of levels: values and gradients.
"""

import math

import numpy as np

from refattn.pieces.arrays import each_sequence, sums_between
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, gate, level_scale, initial_state, initial_position, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v, levels = v.shape[1], v.shape[3], level_scale.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, levels, d, d_v))
    position = np.zeros(batch)
    for b in range(batch):
        start = int(initial_position[b])
        position[b] = start + n
        for g in range(kv_heads):
            for level in range(levels):
                for x in range(d):
                    for y in range(d_v):
                        state[b, g, level, x, y] = initial_state[b, g, level, x, y]
            for t in range(n):
                into = 0  # the level that takes in all below it
                if start + t > 0:
                    into = min(1, levels - 1)
                    while into < levels - 1 and (start + t) % (1 << into) == 0:
                        into += 1
                fade = math.exp(gate[b, g, t])
                for x in range(d):
                    for y in range(d_v):
                        for level in range(into):
                            state[b, g, into, x, y] += state[b, g, level, x, y]
                            state[b, g, level, x, y] = 0.0
                        for level in range(levels):
                            state[b, g, level, x, y] *= fade
                        state[b, g, 0, x, y] += k[b, g, t, x] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for level in range(levels):
                            read = 0.0
                            for x in range(d):
                                read += q[b, h, t, x] * state[b, g, level, x, y]
                            out[b, h, t, y] += level_scale[b, h, t, level] * read
                        out[b, h, t, y] *= scale
    return out, state, position


def vectorized(x, params):
    """Chunk by chunk: what was in one level before a chunk stays together."""
    return each_sequence(lambda one: of_sequence(one, params["scale"]), x)


def of_sequence(x, scale):
    n, levels, group, chunk = x["q"].shape[1], x["level_scale"].shape[2], x["q"].shape[0] // x["k"].shape[0], 64
    state, outs = x["initial_state"], []
    start = int(x["initial_position"])
    for first in range(0, n, chunk):
        q, k, v, gate, weights = (x[name][:, first : first + chunk] for name in ("q", "k", "v", "gate", "level_scale"))
        many = k.shape[1]
        own, moved = levels_of(start + first, many, levels)
        tokens = np.arange(many)[:, None]
        faded = np.where(np.tri(many, dtype=bool), np.exp(sums_between(gate)), 0.0)
        kept = np.exp(np.cumsum(gate, axis=1))
        within = q @ np.repeat(np.swapaxes(k, -1, -2), group, axis=0) * np.repeat(faded, group, axis=0) * weights[:, tokens, own]
        read = within @ np.repeat(v, group, axis=0)
        before = np.repeat(kept, group, axis=0)[..., None]
        ended = []
        for level in range(levels):
            read = read + before * weights[:, tokens, moved[:, level : level + 1]] * (q @ np.repeat(state[:, level], group, axis=0))
            here = np.where(own[-1] == level, 1.0, 0.0)[:, None] * faded[:, -1, :, None]
            stays = np.where(moved[-1] == level, 1.0, 0.0)[:, None, None]
            ended.append((np.swapaxes(here * k, -1, -2) @ v + kept[:, -1, None, None] * np.sum(stays * state, axis=1))[:, None])
        state = np.concatenate(ended, axis=1)
        outs.append(scale * read)
    return {"out": np.concatenate(outs, axis=1), "state": state, "position": x["initial_position"] + float(n)}


def levels_of(start, many, levels):
    """Of tokens from a position on: the level of one of them to another, and where what was in a level before them has gone."""
    own = [[min(((start + t) ^ (start + j)).bit_length(), levels - 1) for j in range(many)] for t in range(many)]
    moved, now = [], list(range(levels))
    for t in range(start, start + many):
        into = 0
        if t > 0:
            into = min(1, levels - 1)
            while into < levels - 1 and t % (1 << into) == 0:
                into += 1
        now = [max(level, into) for level in now]
        moved.append(now)
    return np.array(own), np.array(moved)


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    names = ("q", "k", "v", "gate", "level_scale")
    one = {**x, **{name: x[name][:, :, :half] for name in names}}
    two = {**x, **{name: x[name][:, :, half:] for name in names}}
    every = ("out", "state", "position")
    out_1, state, position = run(one, returns=every)
    out_2, state, position = run({**two, "initial_state": state, "initial_position": position}, returns=every)
    return run(x, returns=every), (np.concatenate([out_1, out_2], axis=2), state, position)


def weights_by_level(run, x):
    """The causal scores without softmax, times decays and the lambda of bit_length(t xor j)."""
    n, levels = x["q"].shape[2], x["level_scale"].shape[3]
    group = x["q"].shape[1] // x["k"].shape[1]
    scores = run({"q": x["q"], "k": x["k"]} | {"v": x["v"]}, name="softmax", causal=True, scale=1.0, returns="scores")
    total = np.repeat(np.cumsum(x["gate"], axis=2), group, axis=1)
    level = np.array([[min((t ^ j).bit_length(), levels - 1) for j in range(n)] for t in range(n)]).reshape(n, n)
    weight = np.take_along_axis(x["level_scale"], np.broadcast_to(level, (*x["q"].shape[:2], n, n)), axis=3)
    faded = np.exp(np.minimum(total[..., :, None] - total[..., None, :], 0.0))
    return run(x), np.where(scores > -np.inf, scores, 0.0) * weight * faded @ np.repeat(x["v"], group, axis=1)


def equal_levels(run, x):
    kept = {name: x[name] for name in ("q", "k", "v", "gate")}
    return run({**x, "level_scale": np.full_like(x["level_scale"], 0.75)}), 0.75 * run(kept, name="simple_gla", scale=1.0, returns="out")


def levels_add_up(run, x):
    """Whatever their number, the levels' sum is the state of gated linear attention."""
    kept = {name: x[name] for name in ("q", "k", "v", "gate")}
    return run(x, returns="state").sum(axis=2), run(kept, name="simple_gla", returns="state")


def only_the_token_itself(run, x):
    if x["level_scale"].shape[3] == 1:
        return 0.0, 0.0
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    own = np.zeros_like(x["level_scale"])
    own[..., 0] = 1.0
    return run({**x, "level_scale": own}), np.sum(x["q"] * k, axis=-1, keepdims=True) * v


#: Merges of one state up to position T: how often each bit below L - 1 changes to 1.
MERGES = "(2*(T - 1) - (T - 1).bit_count() - 2*((T - 1) >> (L - 1)) + ((T - 1) >> (L - 1)).bit_count())"

VARIANT = Variant(
    name="log_linear",
    family="learner",
    summary="Log-linear attention: gated linear attention over the levels of a Fenwick tree, each with a weight per query.",
    equation="out_t = scale sum_l level_scale_tl q_t^T S_t[l], S_t[l] = sum_{j<=t, bit_length(t xor j)=l} exp(G_t - G_j) k_j v_j^T",
    paper=Paper(
        title="Log-Linear Attention",
        authors=("Guo, Han", "Yang, Songlin", "Goel, Tarushii", "Xing, Eric P.", "Dao, Tri", "Kim, Yoon"),
        year=2025,
        arxiv="2506.04761",
        where="section 3, and section 3.3 for the gated form",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T",
            "natural logarithm of the factor by which the past fades with every token",
            draw=lambda rng, shape: -rng.exponential(0.5, shape),
        ),
        Operand("level_scale", "B Hq T L", "lambda, the weight of each level", draw=lambda rng, shape: rng.uniform(0.2, 1.5, shape)),
        Operand("initial_state", "B Hkv L D E", "levels before the first token", absent=0.0),
        Operand(
            "initial_position",
            "B",
            "number of tokens before the first",
            kind="number",
            absent=0.0,
            within=(0.0, 2.0**52),
            draw=lambda rng, shape: rng.integers(0, 9, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv L D E", "levels after the last token", wide=True),
        Output("position", "B", "number of tokens so far", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q . S", tries=(0.37,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops=f"B*(Hkv*(D*E*({MERGES} if T > 0 else 0) + T*(1 + D*E*(L + 2))) + Hq*T*E*(L*(2*D + 2) + 1))",
        memory="B*(Hq*T*E + Hkv*L*D*E + 1)",
    ),
    ordered=lambda params: "T L",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [1.0], [1.0]]]],
                "k": [[[[1.0], [1.0], [1.0], [1.0]]]],
                "v": [[[[1.0], [2.0], [4.0], [8.0]]]],
                "gate": [[[0.0, 0.0, 0.0, 0.0]]],
                "level_scale": [[[[1.0, 10.0, 100.0]] * 4]],
            },
            returns={
                "out": [[[[1.0], [12.0], [304.0], [348.0]]]],
                "state": [[[[[8.0]], [[4.0]], [[3.0]]]]],
                "position": [4.0],
            },
            source="by hand: 1; 2 + 10 x 1; 4 + 100 x (1 + 2), for 10 differs from 00 and 01 in bit 1; 8 + 10 x 4 + 100 x 3",
        ),
        Example(
            operands={
                "q": [[[[1.0]]]],
                "k": [[[[1.0]]]],
                "v": [[[[3.0]]]],
                "gate": [[[-math.log(2.0)]]],
                "level_scale": [[[[1.0, 10.0]]]],
                "initial_state": [[[[[2.0]], [[6.0]]]]],
                "initial_position": [4.0],
            },
            params={"scale": 2.0},
            returns={"out": [[[[2.0 * (3.0 + 40.0)]]]], "state": [[[[[3.0]], [[4.0]]]]], "position": [5.0]},
            source="by hand: at position 4 all goes into the last of two levels: (2 + 6)/2, and then the token into level 0",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its levels and its position", cut_and_carried_on),
        Identity("it is causal attention without softmax, weighed by decays and by the level of t xor j", weights_by_level),
        Identity("with equal weights for all levels it is gated linear attention", equal_levels),
        Identity("the levels add up to the state of gated linear attention", levels_add_up),
        Identity("level 0 is the token itself", only_the_token_itself),
    ),
)
