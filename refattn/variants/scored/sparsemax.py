"""Sparsemax attention: the scores of a row projected onto the probability simplex, so that most weights are exactly 0.

    s_ij  = cap * tanh(scale * q_i . k_j / cap) + bias_ij      (without a cap: scale * q_i . k_j + bias_ij)
    p_i   = argmin over p >= 0 with sum_j p_j = 1 of |p - s_i|^2
    p_ij  = max(s_ij - tau_i, 0),                   tau_i such that sum_{j visible} p_ij = 1
    out_i = sum_{j visible} p_ij v_j

tau is found exactly, by the paper's algorithm 1: with the row's scores in falling order z_(1) >= z_(2) >= ..., the support is the largest k with
1 + k z_(k) > z_(1) + ... + z_(k), and tau = (z_(1) + ... + z_(k) - 1) / k; the loops below keep the mean in place of the sum.
Heads, alignment, ``causal``, ``window``, ``mask``, ``bias`` and ``softcap`` mean what they mean in `softmax`.  A row that sees nothing is 0, with a
threshold of -inf.  A score of NaN or +inf makes its row NaN: its threshold, its output, and the weights of the keys it sees.

What people get wrong: scores grow with the width, and sparsemax of large scores is a hard argmax, so the scale matters more than in
softmax.  A key of weight 0 is visible nevertheless: NaN in its value is NaN in the output, unless a kernel skips what it need not read.  A
mask of -1e9 serves while some score of the row is moderate; where everything is masked, the masked keys share the weight.  Sums over
scores that were not moved by the row's maximum first lose digits that the threshold needs.  The gradient is constant between the kinks
at which a key enters or leaves the support; there it has two sides.

Checked against the PyTorch package entmax (`sparsemax`, values and gradients; `entmax_bisect` with alpha = 2).
"""

import math

import numpy as np

from refattn.pieces.masks import causal as causal_mask
from refattn.pieces.masks import window as window_mask
from refattn.pieces.score_mods import softcap as softcap_mod
from refattn.pieces.similarities import dot
from refattn.spec import UNBOUNDED, Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Plan, Stage, Variant, Window


def define(q, k, v, bias, mask, scale, softcap, causal, window):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    left, right = window
    out = np.zeros((batch, heads, n_q, d_v))
    threshold = np.full((batch, heads, n_q), -np.inf)
    weights = np.zeros((batch, heads, n_q, n_k))
    scores = np.full((batch, heads, n_q, n_k), -np.inf)
    z = np.zeros(n_k)  # the scores of one row less their maximum, in falling order
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i if causal == 2 else i + n_k - n_q  # causal: 0 no, 1 bottom-right, 2 top-left
                first, last = position - left, position + right
                if causal != 0:
                    last = min(last, position)
                top = -np.inf
                for j in range(n_k):
                    if first <= j <= last and mask[b, h, i, j] and bias[b, h, i, j] != -np.inf:
                        s = 0.0
                        for x in range(d):
                            s += q[b, h, i, x] * k[b, g, j, x]
                        s *= scale
                        if softcap > 0.0:  # 0: no cap
                            s = softcap * math.tanh(s / softcap)
                        s += bias[b, h, i, j]
                        scores[b, h, i, j] = s
                        if s > top or math.isnan(s):  # NaN must win
                            top = s
                if top == -np.inf:
                    continue
                seen = 0
                for j in range(n_k):
                    if scores[b, h, i, j] != -np.inf:
                        below = scores[b, h, i, j] - top
                        place = seen
                        while place > 0 and z[place - 1] < below:
                            z[place] = z[place - 1]
                            place -= 1
                        z[place] = below
                        seen += 1
                tau, mean = np.nan, 0.0
                for n in range(seen):
                    mean += (z[n] - mean) / (n + 1)  # of equal scores exact, as a sum of many would not be
                    candidate = mean - 1.0 / (n + 1)
                    if z[n] > candidate:  # never where top is NaN or infinite
                        tau = candidate
                threshold[b, h, i] = top + tau
                for j in range(n_k):
                    if scores[b, h, i, j] != -np.inf:
                        p = scores[b, h, i, j] - top - tau
                        weights[b, h, i, j] = 0.0 if p <= 0.0 else p  # NaN stays
                        for y in range(d_v):
                            out[b, h, i, y] += weights[b, h, i, j] * v[b, g, j, y]
    return out, threshold, weights, scores


def plan(dims, params):
    offset = 0 if params["causal"] == "top_left" else dims["S"] - dims["T"]
    masks = [Stage(causal_mask, (offset,))] if params["causal"] else []
    if params["window"] is not None:
        left, right = (UNBOUNDED if side is None else side for side in params["window"])
        masks.append(Stage(window_mask, (offset, left, right)))
    return Plan(
        similarity=dot,
        normalizer="sparsemax",
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        score_mods=() if params["softcap"] is None else (Stage(softcap_mod, (params["softcap"],)),),
        masks=tuple(masks),
        bias="bias",
        mask="mask",
    )


def constant_bias(run, x):
    out, threshold = run(x, returns=("out", "threshold"))
    return (out, threshold + 3.0), run({**x, "bias": np.array(3.0)}, returns=("out", "threshold"))


def relu_beyond_the_threshold(run, x):
    out, threshold, weights = run(x, returns=("out", "threshold", "weights"))
    return run({**x, "bias": -threshold[..., None]}, name="relu", divisor=1.0, returns=("out", "weights")), (out, weights)


def two_keys(run, x):
    at = [0, x["k"].shape[2] // 2]
    weights, scores = run({**x, "k": x["k"][:, :, at], "v": x["v"][:, :, at]}, returns=("weights", "scores"))
    return weights[..., 0], np.clip((scores[..., 0] - scores[..., 1] + 1.0) / 2.0, 0.0, 1.0)


def projected_twice(run, x):
    weights = run(x, returns="weights")
    return run({**x, "bias": weights}, scale=0.0, returns=("out", "weights")), (run(x, returns="out"), weights)


def decode_is_the_last_row(run, x):
    n = min(x["q"].shape[2], x["k"].shape[2])
    last = {**x, "q": x["q"][:, :, -1:], "k": x["k"][:, :, :n], "v": x["v"][:, :, :n]}
    return run({**last, "q": x["q"][:, :, -n:]}, causal=True, returns="out")[:, :, -1:], run(last, causal=True, returns="out")


VARIANT = Variant(
    name="sparsemax",
    family="scored",
    summary="Sparsemax attention: scores projected onto the probability simplex, most weights exactly 0.",
    equation="out_i = sum_j max(scale q_i . k_j + bias_ij - tau_i, 0) v_j, tau_i such that the weights sum to 1",
    paper=Paper(
        title="From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
        authors=("Martins, André F. T.", "Astudillo, Ramón Fernandez"),
        year=2016,
        arxiv="1602.02068",
        where="section 2, equation 2 and algorithm 1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("bias", "B Hq T S", "added to the scores after scale and soft-cap", absent=0.0, broadcast=True),
        Operand("mask", "B Hq T S", "True where a query may attend", kind="boolean", absent=True, broadcast=True),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("threshold", "B Hq T", "tau_i, the score at and below which weights are 0; -inf for a row that sees nothing", wide=True),
        Output("weights", "B Hq T S", "p_ij, 0 where hidden or beyond the support"),
        Output("scores", "B Hq T S", "s_ij after scale, soft-cap and bias, -inf where hidden"),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . k; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
        Param("softcap", Number(above=0.0, optional=True), None, "bound on a score's magnitude", absent=0.0, tries=(3.0,)),
        Param(
            "causal",
            Choice((False, True, "top_left")),
            False,
            "see no later position; True aligns the last query with the last key",
            tries=(True, "top_left"),
        ),
        Param("window", Window(), None, "keys seen left and right of a query's own position", tries=((5, 0), (2, 3))),
    ),
    define=define,
    plan=plan,
    cost=Cost(
        flops="B*Hq*(pairs*(2*D + 2*E + 10 + 3*(softcap > 0)) + T)",
        memory="B*Hq*T*(E + 1 + 2*S) + S",
    ),
    ordered=lambda params: "T S" if params["causal"] or params["window"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[1.0], [0.5], [-1.0]]]], "v": [[[[4.0], [8.0], [99.0]]]]},
            params={"scale": 1.0},
            returns={"out": [[[[5.0]]]], "threshold": [[[0.25]]], "weights": [[[[0.75, 0.25, 0.0]]]], "scores": [[[[1.0, 0.5, -1.0]]]]},
            source="by hand: two keys in the support, tau = (1 + 1/2 - 1) / 2 = 1/4; the third score is below it",
        ),
        Example(
            operands={"q": [[[[2.0]]]], "k": [[[[1.0], [0.5], [-1.0]]]], "v": [[[[4.0], [8.0], [99.0]]]]},
            params={"scale": 1.0},
            returns={"out": [[[[4.0]]]], "threshold": [[[1.0]]], "weights": [[[[1.0, 0.0, 0.0]]]]},
            source="by hand: the same scores doubled; a lead of 1 takes everything, the second score being the threshold itself",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "k": [[[[1.0], [2.0], [3.0], [4.0]]]], "v": [[[[3.0], [5.0], [10.0], [2.0]]]]},
            params={"causal": True},
            returns={"out": [[[[6.0], [5.0]]]], "threshold": [[[-1.0 / 3.0, -0.25]]]},
            source="by hand: equal scores share equally; T=2, S=4, so query 0 sees three keys",
        ),
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[1.0]]]], "v": [[[[3.0]]]], "mask": [[[[False]]]]},
            returns={"out": [[[[0.0]]]], "threshold": [[[-math.inf]]], "weights": [[[[0.0]]]], "scores": [[[[-math.inf]]]]},
            source="by hand: a row that sees nothing",
        ),
    ),
    identities=(
        Identity("each row of weights sums to one", lambda run, x: (run(x, returns="weights").sum(-1), 1.0)),
        Identity("a constant bias moves the threshold and nothing else", constant_bias),
        Identity("weights are what of a score is beyond the threshold", relu_beyond_the_threshold),
        Identity("of two keys the first has weight clip((s_1 - s_2 + 1) / 2, 0, 1)", two_keys),
        Identity("weights projected again stay as they are", projected_twice),
        Identity("scores of zero share equally", lambda run, x: (run(x, scale=0.0, returns="weights"), 1.0 / x["k"].shape[2])),
        Identity("a single key has weight one", lambda run, x: (run({**x, "k": x["k"][:, :, :1], "v": x["v"][:, :, :1]}, returns="weights"), 1.0)),
        Identity("a window without limits is no window", lambda run, x: (run(x, window=(None, None)), run(x))),
        Identity("the last query of a causal prefill is the decode step", decode_is_the_last_row),
    ),
)
