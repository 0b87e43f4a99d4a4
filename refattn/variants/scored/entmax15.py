"""1.5-entmax attention: sparse weights that are squares, halfway from softmax (alpha = 1) to sparsemax (alpha = 2).

    s_ij  = cap * tanh(scale * q_i . k_j / cap) + bias_ij      (without a cap: scale * q_i . k_j + bias_ij)
    p_i   = argmax over p >= 0 with sum_j p_j = 1 of p . s_i + (4/3) sum_j (p_j - p_j^1.5)
    p_ij  = max(s_ij / 2 - tau_i, 0)^2,             tau_i such that sum_{j visible} p_ij = 1
    out_i = sum_{j visible} p_ij v_j

tau is found exactly, by the paper's algorithm 2: with the row's halved scores in falling order z_(1) >= z_(2) >= ..., their running means M(k) and
summed squared deviations S(k), a support of k keys would have the threshold M(k) - sqrt((1 - S(k)) / k); the support is the largest k whose
threshold z_(k) still reaches.  Heads, alignment, ``causal``, ``window``, ``mask``, ``bias`` and ``softcap`` mean what they mean in
`softmax`.  A row that sees nothing is 0, with a threshold of -inf.  A score of NaN or +inf makes its row NaN: its threshold, its output,
and the weights of the keys it sees.

What people get wrong: the half.  The weights are squares of max(s/2 - tau, 0), alpha - 1 being 1/2; without it the result is 1.5-entmax at
twice the inverse temperature.  The threshold here is that of halved scores: s_ij itself is compared with 2 tau_i.  S(k) as the sum
of squares less k M(k)^2 loses digits that the threshold needs.  Bisection stops within its interval, so its weights sum to one only
after they are divided by their sum.  A key of weight 0 is visible nevertheless, as in `sparsemax`.

Checked against the authors' PyTorch package entmax (`entmax15`, values and gradients; `entmax_bisect` with alpha = 1.5).
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
    z = np.zeros(n_k)  # half of what the scores of one row are below their maximum, in falling order
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
                        below = (scores[b, h, i, j] - top) / 2.0
                        place = seen
                        while place > 0 and z[place - 1] < below:
                            z[place] = z[place - 1]
                            place -= 1
                        z[place] = below
                        seen += 1
                tau, mean, deviations = np.nan, 0.0, 0.0
                for n in range(seen):
                    off = z[n] - mean
                    mean += off / (n + 1)
                    deviations += off * (z[n] - mean)  # of the old mean and of the new one
                    left_over = 1.0 - deviations
                    candidate = mean - math.sqrt((0.0 if left_over < 0.0 else left_over) / (n + 1))
                    if z[n] >= candidate:  # never where top is NaN or infinite
                        tau = candidate
                threshold[b, h, i] = top / 2.0 + tau
                for j in range(n_k):
                    if scores[b, h, i, j] != -np.inf:
                        r = (scores[b, h, i, j] - top) / 2.0 - tau
                        r = 0.0 if r <= 0.0 else r  # NaN stays
                        weights[b, h, i, j] = r * r
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
        normalizer="entmax15",
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        score_mods=() if params["softcap"] is None else (Stage(softcap_mod, (params["softcap"],)),),
        masks=tuple(masks),
        bias="bias",
        mask="mask",
    )


def constant_bias(run, x):
    out, threshold = run(x, returns=("out", "threshold"))
    return (out, threshold + 1.5), run({**x, "bias": np.array(3.0)}, returns=("out", "threshold"))


def squared_relu_beyond_the_threshold(run, x):
    out, threshold, weights = run(x, returns=("out", "threshold", "weights"))
    half = 0.5 * x["q"].shape[3] ** -0.5
    return run({**x, "bias": -threshold[..., None]}, name="relu", scale=half, power=2, divisor=1.0, returns=("out", "weights")), (out, weights)


def two_keys(run, x):
    at = [0, x["k"].shape[2] // 2]
    weights, scores = run({**x, "k": x["k"][:, :, at], "v": x["v"][:, :, at]}, returns=("weights", "scores"))
    lead = np.clip((scores[..., 0] - scores[..., 1]) / 2.0, -1.0, 1.0)  # of two numbers whose squares sum to one
    return weights[..., 0], ((lead + np.sqrt(2.0 - lead**2)) / 2.0) ** 2


def support_of_sparsemax(run, x):
    kept = run(x, name="sparsemax", returns="weights") > 0.0
    return 1.0 * (kept & (run(x, returns="weights") > 0.0)), 1.0 * kept


def decode_is_the_last_row(run, x):
    n = min(x["q"].shape[2], x["k"].shape[2])
    last = {**x, "q": x["q"][:, :, -1:], "k": x["k"][:, :, :n], "v": x["v"][:, :, :n]}
    return run({**last, "q": x["q"][:, :, -n:]}, causal=True, returns="out")[:, :, -1:], run(last, causal=True, returns="out")


VARIANT = Variant(
    name="entmax15",
    family="scored",
    summary="1.5-entmax attention: sparse weights, squares of what of a halved score is beyond a threshold.",
    equation="out_i = sum_j max((scale q_i . k_j + bias_ij) / 2 - tau_i, 0)^2 v_j, tau_i such that the weights sum to 1",
    paper=Paper(
        title="Sparse Sequence-to-Sequence Models",
        authors=("Peters, Ben", "Niculae, Vlad", "Martins, André F. T."),
        year=2019,
        arxiv="1905.05702",
        where="section 3 and algorithm 2",
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
        Output("threshold", "B Hq T", "tau_i, the half of the score at and below which weights are 0; -inf for a row that sees nothing", wide=True),
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
        flops="B*Hq*(pairs*(2*D + 2*E + 18 + 3*(softcap > 0)) + 2*T)",
        memory="B*Hq*T*(E + 1 + 2*S) + S",
    ),
    ordered=lambda params: "T S" if params["causal"] or params["window"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[0.4], [0.0], [-1.4]]]], "v": [[[[25.0], [50.0], [99.0]]]]},
            params={"scale": 1.0},
            returns={"out": [[[[34.0]]]], "threshold": [[[-0.6]]], "weights": [[[[0.64, 0.36, 0.0]]]], "scores": [[[[0.4, 0.0, -1.4]]]]},
            source="by hand: 0.8^2 + 0.6^2 = 1, and half the lead of the first score is 0.8 - 0.6; the third half, -0.7, is below -0.6",
        ),
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[2.0], [0.0], [-1.0]]]], "v": [[[[4.0], [8.0], [99.0]]]]},
            params={"scale": 1.0},
            returns={"out": [[[[4.0]]]], "threshold": [[[0.0]]], "weights": [[[[1.0, 0.0, 0.0]]]]},
            source="by hand: a lead of 2 takes everything, half the second score being the threshold itself",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "k": [[[[1.0], [2.0], [3.0], [4.0]]]], "v": [[[[3.0], [5.0], [10.0], [2.0]]]]},
            params={"causal": "top_left"},
            returns={"out": [[[[3.0], [4.0]]]], "threshold": [[[-1.0, -math.sqrt(0.5)]]]},
            source="by hand: equal scores share equally; top-left, so query 1 sees two keys",
        ),
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[1.0]]]], "v": [[[[3.0]]]], "mask": [[[[False]]]]},
            returns={"out": [[[[0.0]]]], "threshold": [[[-math.inf]]], "weights": [[[[0.0]]]], "scores": [[[[-math.inf]]]]},
            source="by hand: a row that sees nothing",
        ),
    ),
    identities=(
        Identity("each row of weights sums to one", lambda run, x: (run(x, returns="weights").sum(-1), 1.0)),
        Identity("a constant bias moves the threshold by its half and nothing else", constant_bias),
        Identity("weights are squares of what of a halved score is beyond the threshold", squared_relu_beyond_the_threshold),
        Identity("two keys have a closed form", two_keys),
        Identity("every key that sparsemax keeps is kept", support_of_sparsemax),
        Identity("scores of zero share equally", lambda run, x: (run(x, scale=0.0, returns="weights"), 1.0 / x["k"].shape[2])),
        Identity("a single key has weight one", lambda run, x: (run({**x, "k": x["k"][:, :, :1], "v": x["v"][:, :, :1]}, returns="weights"), 1.0)),
        Identity("a window without limits is no window", lambda run, x: (run(x, window=(None, None)), run(x))),
        Identity("the last query of a causal prefill is the decode step", decode_is_the_last_row),
    ),
)
