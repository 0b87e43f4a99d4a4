"""AFT-conv: AFT with one key per head, and position biases that depend on the distance alone: a convolution over the near and a sum over all.

    near_i(y) = sum_{r = 0 .. W-1} (exp(w_r) - 1) y_(i + S - T + r - (W - 1) // 2)                      (0 outside the sequence)
    m_i       = (near_i(exp(k) v) + sum_j exp(k_j) v_j) / (near_i(exp(k)) + sum_j exp(k_j))
    out_i     = m_i / (1 + exp(-q_i)),       lse_i = log(near_i(exp(k)) + sum_j exp(k_j))

per head: k_j and w_r are numbers, q_i, v_j and m_i vectors.  Collected by key, the weight of key j is exp(k_j + w_r) inside the kernel and exp(k_j)
outside, which is what is computed: no difference of exponentials, nothing negative.  The kernel is a cross-correlation, as convolutions of
networks are, with its middle tap on the query's own position ``i + S - T``.  Not causal.

The paper's kernels are two-dimensional, for images; the operation is the same along one axis.

What people get wrong: keys per channel, where there is one per head; a kernel that hides what lies outside; forming exp(w) - 1 with large keys, which
needs a common maximum first.

Checked against PyTorch's conv1d put together as in the paper (aft_pytorch's AFTConv is empty).
"""

import math

import numpy as np

from refattn.pieces.arrays import mixed, sigmoid
from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Variant


def define(q, k, v, w):
    batch, heads, n_q, width = q.shape
    n_k, taps = k.shape[2], w.shape[1]
    out = np.zeros((batch, heads, n_q, width))
    lse = np.full((batch, heads, n_q), -np.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_q):
                first = i + n_k - n_q - (taps - 1) // 2  # the key of tap 0
                top = -np.inf
                for j in range(n_k):
                    s = k[b, h, j] + (w[h, j - first] if 0 <= j - first < taps else 0.0)
                    if s > top or math.isnan(s):  # NaN must win
                        top = s
                if top == -np.inf:
                    continue
                total = 0.0
                for j in range(n_k):
                    weight = math.exp(k[b, h, j] + (w[h, j - first] if 0 <= j - first < taps else 0.0) - top)
                    total += weight
                    for x in range(width):
                        out[b, h, i, x] += weight * v[b, h, j, x]
                for x in range(width):
                    if q[b, h, i, x] >= 0.0:
                        gate = 1.0 / (1.0 + math.exp(-q[b, h, i, x]))
                    else:  # the same number, with an exponential that cannot overflow
                        gate = math.exp(q[b, h, i, x])
                        gate = gate / (1.0 + gate)
                    out[b, h, i, x] *= gate / total
                lse[b, h, i] = top + math.log(total)
    return out, lse


def vectorized(x, params):
    means, lse = mixed(x["k"][..., None], biases_of_the_kernel(x), x["v"])
    return {"out": sigmoid(x["q"]) * means, "lse": lse[..., 0]}


def as_full(run, x, w):
    """Each head by aft_full, its key given to every channel."""
    heads = range(x["q"].shape[1])
    keys = np.repeat(x["k"][..., None], x["v"].shape[3], axis=3)
    return np.stack([run({"q": x["q"][:, h], "k": keys[:, h], "v": x["v"][:, h], "w": w[h]}, name="aft_full", returns="out") for h in heads], axis=1)


def biases_of_the_kernel(x):
    n_q, n_k, taps = x["q"].shape[2], x["k"].shape[2], x["w"].shape[1]
    tap = np.arange(n_k) - (np.arange(n_q)[:, None] + n_k - n_q) + (taps - 1) // 2
    return np.where((tap >= 0) & (tap < taps), x["w"][:, np.clip(tap, 0, taps - 1)], 0.0)


def zero_kernel(run, x):
    batch, heads, n_q, width = x["q"].shape
    flat = {name: x[name].swapaxes(1, 2).reshape(batch, -1, heads * width) for name in ("q", "v")}
    simple = run({**flat, "k": np.repeat(x["k"].swapaxes(1, 2), width, axis=2)}, name="aft_simple", returns="out")
    return run({**x, "w": 0.0 * x["w"]}), simple.reshape(batch, n_q, heads, width).swapaxes(1, 2)


def convolution_and_sum(run, x):
    """As the paper writes it, with np.convolve of the turned kernel."""
    n_q, n_k, taps = x["q"].shape[2], x["k"].shape[2], x["w"].shape[1]
    top = x["k"].max(axis=2, keepdims=True)
    mass = np.exp(x["k"] - top)[..., None] * np.concatenate([np.ones_like(x["v"][..., :1]), x["v"]], axis=3)
    kernel = np.expm1(x["w"])[:, ::-1]
    near = np.apply_along_axis(lambda line: [np.convolve(line, turned)[taps - 1 - (taps - 1) // 2 :][:n_k] for turned in kernel], 2, mass)
    near = np.stack([near[:, h, h] for h in range(x["q"].shape[1])], axis=1)  # every head by its own kernel
    first = max(n_k - n_q, 0)
    whole = (near + mass.sum(axis=2, keepdims=True))[:, :, first:]
    inside = slice(max(n_q - n_k, 0), None)
    gate = np.exp(-np.logaddexp(0.0, -x["q"][:, :, inside]))
    out, lse = run(x, returns=("out", "lse"))
    return (out[:, :, inside], lse[:, :, inside]), (gate * whole[..., 1:] / whole[..., :1], top + np.log(whole[..., 0]))


VARIANT = Variant(
    name="aft_conv",
    family="feature",
    summary="AFT-conv: attention free transformer whose position biases are a kernel per head, a convolution plus a global sum.",
    equation="out_i = sigmoid(q_i) * (conv(exp(k) v, exp(w) - 1)_i + sum_j exp(k_j) v_j) / (conv(exp(k), exp(w) - 1)_i + sum_j exp(k_j))",
    paper=Paper(
        title="An Attention Free Transformer",
        authors=(
            "Zhai, Shuangfei",
            "Talbott, Walter",
            "Srivastava, Nitish",
            "Huang, Chen",
            "Goh, Hanlin",
            "Zhang, Ruixiang",
            "Susskind, Josh",
        ),
        year=2021,
        arxiv="2105.14103",
        where="AFT-conv",
    ),
    operands=(
        Operand("q", "B H T E", "queries, whose sigmoid gates"),
        Operand("k", "B H S", "keys, one number per head"),
        Operand("v", "B H S E", "values"),
        Operand("w", "H W", "logarithms of the kernel"),
    ),
    outputs=(
        Output("out", "B H T E", "output"),
        Output("lse", "B H T", "natural log of the summed weights; -inf where there is no key", wide=True),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops="B*H*T*(S*(2*E + 5) + (5*E + 2 if S > 0 else 0))", memory="B*H*T*(E + 1)"),
    ordered=lambda params: "T S W",
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[[0.0], [0.0]]]],
                "k": [[[0.0, 0.0, 0.0]]],
                "v": [[[[2.0], [4.0], [12.0]]]],
                "w": [[0.0, 0.0, math.log(3.0)]],
            },
            returns={"out": [[[[4.2], [3.0]]]], "lse": [[[math.log(5.0), math.log(3.0)]]]},
            source="by hand: T=2, S=3; the last tap triples the key after the own: (2 + 4 + 36)/5, and nothing for the last query: 18/3; gated 1/2",
        ),
        Example(
            operands={"q": [[[[math.log(3.0)]]]], "k": [[[math.log(2.0), 0.0]]], "v": [[[[4.0], [8.0]]]], "w": [[math.log(2.0)]]},
            returns={"out": [[[[4.5]]]], "lse": [[[math.log(4.0)]]]},
            source="by hand: one tap, on the own key, doubles it: weights 2 and 2, mean 6, gated by 3/4",
        ),
    ),
    identities=(
        Identity("it is aft_full with a bias of the distance", lambda run, x: (run(x), as_full(run, x, biases_of_the_kernel(x)))),
        Identity("with a kernel of 0 it is aft_simple", zero_kernel),
        Identity("it is a convolution and a sum", convolution_and_sum),
    ),
)
