"""Double attention, of A2-Nets: features of all tokens are gathered by attention maps, and handed out to every token by others.

    A = X w_a + b_a,   B = X w_b + b_b,   V = X w_v + b_v                      three convolutions of size 1
    G = sum_j softmax over tokens(B)_j A_j^T,     out_i = G^T softmax over channels(V_i)

Gathering pools D descriptors of width E, each a mean over tokens by its own map; distributing mixes them per token.  It is `efficient`
attention with V, B and A for queries, keys and values.  No heads, not causal; the convolution and the residual around it are the block's.  The
means and the logarithms of their sums of exponentials start at ``initial_state`` (0 if absent) and ``initial_log_mass`` (-inf if absent) and are
returned, so that further tokens can be gathered later, for tokens to come.

What people get wrong: which softmax runs over what: gathering's over tokens, distributing's over the D maps.  The paper's matrices have tokens for
columns.

Checked against a composition of PyTorch's conv1d, softmax and matmul.
"""

import math

import numpy as np

from refattn.pieces.arrays import log_sum_exp
from refattn.pieces.feature_maps import softmax_features
from refattn.spec import Cost, Example, Factor, Identity, Operand, Output, Paper, Recurrence, Reduction, Variant, Write


def define(x, w_a, w_b, w_v, b_a, b_b, b_v, initial_state, initial_log_mass):
    batch, n, width = x.shape
    d_v, d = w_a.shape[1], w_b.shape[1]
    out = np.zeros((batch, n, d_v))
    state = np.zeros((batch, d, d_v))
    log_mass = np.zeros((batch, d))
    feature = np.zeros(d_v)
    attention = np.zeros(d)
    for b in range(batch):
        for c in range(d):
            log_mass[b, c] = initial_log_mass[b, c]
            for y in range(d_v):
                state[b, c, y] = initial_state[b, c, y]
        for j in range(n):  # gather
            for y in range(d_v):
                feature[y] = b_a[y]
                for z in range(width):
                    feature[y] += x[b, j, z] * w_a[z, y]
            for c in range(d):
                score = b_b[c]
                for z in range(width):
                    score += x[b, j, z] * w_b[z, c]
                before = log_mass[b, c]
                top = max(before, score)
                if top == -np.inf:  # nothing has come yet
                    continue
                after = top + math.log(math.exp(before - top) + math.exp(score - top))
                kept, weight = math.exp(before - after), math.exp(score - after)
                log_mass[b, c] = after
                for y in range(d_v):
                    state[b, c, y] = kept * state[b, c, y] + weight * feature[y]
        for i in range(n):  # distribute
            for c in range(d):
                attention[c] = b_v[c]
                for z in range(width):
                    attention[c] += x[b, i, z] * w_v[z, c]
            top = attention[0]
            for c in range(d):
                top = max(attention[c], top)
            total = 0.0
            for c in range(d):
                attention[c] = math.exp(attention[c] - top)
                total += attention[c]
            for c in range(d):
                attention[c] /= total
                for y in range(d_v):
                    out[b, i, y] += attention[c] * state[b, c, y]
    return out, state, log_mass


def reduction(dims, params):
    """Linear attention without a denominator, of projections that go through their softmaxes."""

    def maps(x):
        return x["x"] @ x["w_b"] + x["b_b"]

    def log_mass(x):
        return log_sum_exp(np.concatenate([x["initial_log_mass"][:, None], maps(x)], axis=1), axis=1)

    def operands(x):
        after = log_mass(x)
        nothing = after == -np.inf
        after = np.where(nothing, 0.0, after)
        kept = np.where(nothing, 1.0, np.exp(x["initial_log_mass"] - after))
        return {
            "q": (x["x"] @ x["w_v"] + x["b_v"])[:, None],
            "k": np.exp(maps(x) - after[:, None])[:, None],
            "v": (x["x"] @ x["w_a"] + x["b_a"])[:, None],
            "initial_state": (kept[..., None] * x["initial_state"])[:, None],
        }

    def outputs(x, found):
        return {"out": found["out"][:, 0], "state": found["state"][:, 0], "log_mass": log_mass(x)}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), query=(Factor("q", softmax_features),), causal=False),
        {"q": "B Hq T D", "k": "B Hkv S D", "v": "B Hkv S E", "initial_state": "B Hkv D E", "out": "B Hq T E"},
        operands,
        outputs,
    )


def gathered_in_two_parts(run, x):
    half = x["x"].shape[1] // 2
    carried = ("state", "log_mass")
    before = run({**x, "x": x["x"][:, :half]}, returns=carried)
    later = {**x, "x": x["x"][:, half:], **{f"initial_{name}": part for name, part in zip(carried, before, strict=True)}}
    out, *after = run(x, returns=("out", *carried))
    return (out[:, half:], *after), run(later, returns=("out", *carried))


def efficient_attention_of_projections(run, x):
    projected = {role: (x["x"] @ x[f"w_{name}"])[:, None] for role, name in (("q", "v"), ("k", "b"), ("v", "a"))}
    return run(x), run(projected, name="efficient", returns="out")[:, 0]


def biases_of_maps_cancel(run, x):
    constant = {"b_b": np.full(x["w_b"].shape[1], 1.5), "b_v": np.full(x["w_v"].shape[1], -2.0)}
    return run(x), run({**x, **constant})


def the_same_everywhere(run, x):
    one = {**x, "x": np.broadcast_to(x["x"][:, :1], x["x"].shape).copy()}
    return run(one), np.broadcast_to(x["x"][:, :1] @ x["w_a"], (*x["x"].shape[:2], x["w_a"].shape[1]))


VARIANT = Variant(
    name="double_attention",
    family="feature",
    summary="Double attention (A2-Nets): features gathered by softmax over tokens, handed out by softmax over channels.",
    equation="out_i = G^T softmax_channels(V_i), G = sum_j softmax_tokens(B)_j A_j^T, (A, B, V) = X (w_a, w_b, w_v) + (b_a, b_b, b_v)",
    paper=Paper(
        title="A^2-Nets: Double Attention Networks",
        authors=("Chen, Yunpeng", "Kalantidis, Yannis", "Li, Jianshu", "Yan, Shuicheng", "Feng, Jiashi"),
        year=2018,
        arxiv="1810.11579",
        where="section 3",
    ),
    operands=(
        Operand("x", "B T M", "tokens"),
        Operand("w_a", "M E", "weights of the features"),
        Operand("w_b", "M D", "weights of the gathering maps"),
        Operand("w_v", "M D", "weights of the distributing maps"),
        Operand("b_a", "E", "biases of the features", absent=0.0),
        Operand("b_b", "D", "biases of the gathering maps", absent=0.0),
        Operand("b_v", "D", "biases of the distributing maps", absent=0.0),
        Operand("initial_state", "B D E", "descriptors of earlier tokens", absent=0.0),
        Operand("initial_log_mass", "B D", "logarithm of the sum of exponentials of earlier tokens", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B T E", "attention output"),
        Output("state", "B D E", "descriptors: means of the features", wide=True),
        Output("log_mass", "B D", "logarithm of the sum of exponentials", wide=True),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*T*(2*M*(E + 2*D) + D*(15 + 5*E))",
        memory="B*(T*E + D*(E + 1)) + D + E",
    ),
    examples=(
        Example(
            operands={
                "x": [[[0.0, 4.0], [1.0, 8.0]]],
                "w_a": [[0.0], [1.0]],
                "w_b": [[math.log(3.0), 0.0], [0.0, 0.0]],
                "w_v": [[0.0, 0.0], [0.0, 0.0]],
            },
            returns={"out": [[[6.5], [6.5]]], "log_mass": [[math.log(4.0), math.log(2.0)]]},
            source="by hand: features 4 and 8, means 7 and 6, mixed evenly",
        ),
    ),
    identities=(
        Identity("tokens can be gathered in two parts", gathered_in_two_parts),
        Identity("it is efficient attention of the projections", efficient_attention_of_projections),
        Identity("a constant bias of either map cancels", biases_of_maps_cancel),
        Identity("of equal tokens it is their feature", the_same_everywhere),
    ),
)
