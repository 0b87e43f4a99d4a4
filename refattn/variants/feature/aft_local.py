"""AFT-local: AFT-full whose position biases reach only so far; beyond, keys count without one.

    w'_ij  = w_ij if |i + S - T - j| < window else 0
    m_ix   = sum_{j visible} exp(k_jx + w'_ij) v_jx / sum_{j visible} exp(k_jx + w'_ij)
    out_ix = m_ix / (1 + exp(-q_ix)),       lse_ix = log sum_{j visible} exp(k_jx + w'_ij)

The window is no mask: far keys keep a bias of 0 and are averaged in.  Query i stands at position ``i + S - T`` among the keys, and ``causal``
hides what comes after.  The rest is `aft_full`.

What people get wrong: hiding what lies outside the window; counting the window's edge in.  window = 0 is AFT-simple, window = 1 biases the own
position only.

The paper's window is a hyper-parameter; 256 is aft_pytorch's.  Checked against aft_pytorch's AFTLocal, which overwrites its parameter by the cut
one at every call.
"""

import math

import numpy as np

from refattn.pieces.arrays import mixed, sigmoid, up_to_query
from refattn.spec import Choice, Cost, Example, Identity, Integer, Operand, Output, Paper, Param, Variant


def define(q, k, v, w, window, causal):
    batch, n_q, width = q.shape
    n_k = k.shape[1]
    out = np.zeros((batch, n_q, width))
    lse = np.full((batch, n_q, width), -np.inf)
    for b in range(batch):
        for i in range(n_q):
            position = i + n_k - n_q
            visible = n_k if causal == 0 else max(position + 1, 0)
            for x in range(width):
                top = -np.inf
                for j in range(visible):
                    s = k[b, j, x] + (w[i, j] if abs(position - j) < window else 0.0)
                    if s > top or math.isnan(s):  # NaN must win
                        top = s
                if top == -np.inf:
                    continue
                total = 0.0
                for j in range(visible):
                    weight = math.exp(k[b, j, x] + (w[i, j] if abs(position - j) < window else 0.0) - top)
                    total += weight
                    out[b, i, x] += weight * v[b, j, x]
                if q[b, i, x] >= 0.0:
                    gate = 1.0 / (1.0 + math.exp(-q[b, i, x]))
                else:  # the same number, with an exponential that cannot overflow
                    gate = math.exp(q[b, i, x])
                    gate = gate / (1.0 + gate)
                out[b, i, x] *= gate / total
                lse[b, i, x] = top + math.log(total)
    return out, lse


def vectorized(x, params):
    n_q, n_k = x["w"].shape
    distances = np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k)
    biases = np.where(np.abs(distances) < params["window"], x["w"], 0.0)
    means, lse = mixed(x["k"], np.where(up_to_query(n_q, n_k) | (not params["causal"]), biases, -np.inf), x["v"])
    return {"out": sigmoid(x["q"]) * means, "lse": lse}


def full_of_a_band(run, x):
    n_q, n_k = x["w"].shape
    near = np.abs(np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k)) < 2
    sides = [
        (run(x, window=2, causal=causal), run({**x, "w": np.where(near, x["w"], 0.0)}, name="aft_full", causal=causal)) for causal in (False, True)
    ]
    return tuple(zip(*sides, strict=True))


def no_window(run, x):
    kept = {name: x[name] for name in ("q", "k", "v")}
    return run(x, window=0), run(kept, name="aft_simple")


#: Visible pairs, and queries that see a key.
PAIRS = "(T*S if causal == 0 else T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"
ROWS = "(T if causal == 0 or T <= S else S)"

VARIANT = Variant(
    name="aft_local",
    family="feature",
    summary="AFT-local: attention free transformer with position biases inside a window.",
    equation="out_i = sigmoid(q_i) * sum_j exp(k_j + w'_ij) v_j / sum_j exp(k_j + w'_ij), w'_ij = w_ij where |i - j| < window, else 0",
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
        where="AFT-local",
    ),
    operands=(
        Operand("q", "B T M", "queries, whose sigmoid gates"),
        Operand("k", "B S M", "keys"),
        Operand("v", "B S M", "values"),
        Operand("w", "T S", "position biases, read inside the window"),
    ),
    outputs=(
        Output("out", "B T M", "output"),
        Output("lse", "B T M", "natural log of each channel's sum of exponentials; -inf where nothing is seen", wide=True),
    ),
    params=(
        Param("window", Integer(), 256, "distance from which on a key has no bias", tries=(0, 2)),
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops=f"B*M*({PAIRS}*7 + {ROWS}*7)", memory="2*B*T*M"),
    ordered=lambda params: "T S",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[0.0], [0.0]]],
                "k": [[[0.0], [0.0], [0.0]]],
                "v": [[[2.0], [4.0], [12.0]]],
                "w": [[9.0, math.log(2.0), 9.0], [9.0, 9.0, math.log(4.0)]],
            },
            params={"window": 1},
            returns={"out": [[[2.75], [4.5]]], "lse": [[[math.log(4.0)], [math.log(6.0)]]]},
            source="by hand: T=2, S=3, so the own keys are 1 and 2: (2 + 2*4 + 12)/4 and (2 + 4 + 4*12)/6, both gated by 1/2",
        ),
    ),
    identities=(
        Identity("it is aft_full with a band of biases", full_of_a_band),
        Identity("without a window it is aft_simple", no_window),
        Identity("a window of everything is aft_full", lambda run, x: (run(x, window=1000), run(x, name="aft_full"))),
    ),
)
