"""ReLU attention: each weight is what of its own score is positive, or a power of it, divided by a constant.

    s_ij  = cap * tanh(scale * q_i . k_j / cap) + bias_ij      (without a cap: scale * q_i . k_j + bias_ij)
    p_ij  = max(s_ij, 0)^power / n
    out_i = sum_{j visible} p_ij v_j

The paper divides by the length L of the sequence, with power 1; n is S here, all keys, hidden ones included, unless ``divisor`` says otherwise.
Heads, alignment, ``causal``, ``window``, ``mask``, ``bias`` and ``softcap`` mean what they mean in `softmax`.  A hidden key has weight 0, and
a row that sees nothing is 0.  Infinities and NaN go the way of ordinary arithmetic: a score of NaN is a weight of NaN.

What people get wrong: n.  The paper's images have as many queries as keys and hide none, so it does not say which of them L is.  With
causality some divide by the keys a query sees, which is another operation (a row of weights that no longer depends on S), and some by the
number of queries.  With a growing key cache S changes from step to step: pass ``divisor`` then.  Earlier ReLU attentions do not divide at
all: ``divisor=1``.  Gated attention units (arXiv:2202.10447) square ReLU of q . k / n, which divides by n twice: ``scale=1, power=2,
divisor=n**2``.  GELU and SiLU in place of ReLU are other curves, which the paper compares.

Checked against a composition of PyTorch's matmul, relu and pow.
"""

import math

import numpy as np

from refattn.pieces.masks import causal as causal_mask
from refattn.pieces.masks import window as window_mask
from refattn.pieces.score_mods import softcap as softcap_mod
from refattn.pieces.similarities import dot
from refattn.spec import UNBOUNDED, Choice, Cost, Example, Identity, Integer, Number, Operand, Output, Paper, Param, Plan, Stage, Variant, Window


def define(q, k, v, bias, mask, scale, softcap, causal, window, power, divisor):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    left, right = window
    out = np.zeros((batch, heads, n_q, d_v))
    weights = np.zeros((batch, heads, n_q, n_k))
    scores = np.full((batch, heads, n_q, n_k), -np.inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i if causal == 2 else i + n_k - n_q  # causal: 0 no, 1 bottom-right, 2 top-left
                first, last = position - left, position + right
                if causal != 0:
                    last = min(last, position)
                for j in range(n_k):
                    if first <= j <= last and mask[b, h, i, j] and bias[b, h, i, j] != -np.inf:
                        s = 0.0
                        for x in range(d):
                            s += q[b, h, i, x] * k[b, g, j, x]
                        s *= scale
                        if softcap > 0.0:  # 0: no cap
                            s = softcap * math.tanh(s / softcap)
                        scores[b, h, i, j] = s + bias[b, h, i, j]
                    if scores[b, h, i, j] != -np.inf:
                        r = 0.0 if scores[b, h, i, j] <= 0.0 else scores[b, h, i, j]  # NaN stays
                        p = r
                        for _ in range(power - 1):
                            p *= r
                        weights[b, h, i, j] = p / divisor
                        for y in range(d_v):
                            out[b, h, i, y] += weights[b, h, i, j] * v[b, g, j, y]
    return out, weights, scores


def all_keys(dims):
    return float(max(dims["S"], 1))


def plan(dims, params):
    offset = 0 if params["causal"] == "top_left" else dims["S"] - dims["T"]
    masks = [Stage(causal_mask, (offset,))] if params["causal"] else []
    if params["window"] is not None:
        left, right = (UNBOUNDED if side is None else side for side in params["window"])
        masks.append(Stage(window_mask, (offset, left, right)))
    return Plan(
        similarity=dot,
        normalizer="relu",
        power=params["power"],
        divisor=all_keys(dims) if params["divisor"] is None else params["divisor"],
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        score_mods=() if params["softcap"] is None else (Stage(softcap_mod, (params["softcap"],)),),
        masks=tuple(masks),
        bias="bias",
        mask="mask",
    )


def both_signs(run, x):
    weights, scores = run(x, divisor=1.0, returns=("weights", "scores"))
    return weights - run({**x, "q": -x["q"]}, divisor=1.0, returns="weights"), scores


def scores_tripled(run, x):
    return run(x, scale=3.0, power=3, returns="out"), 27.0 * run(x, scale=1.0, power=3, returns="out")


def powers_multiply(run, x):
    one, two = (run(x, power=n, divisor=1.0, returns="weights") for n in (1, 2))
    return run(x, power=3, divisor=1.0, returns="weights"), one * two


def halves_add(run, x):
    half = x["k"].shape[2] // 2
    one = run({**x, "k": x["k"][:, :, :half], "v": x["v"][:, :, :half]}, divisor=5.0, returns="out")
    two = run({**x, "k": x["k"][:, :, half:], "v": x["v"][:, :, half:]}, divisor=5.0, returns="out")
    return run(x, divisor=5.0, returns="out"), one + two


def divisor_is_all_keys(run, x):
    return run(x, causal=True, returns="out"), run(x, causal=True, divisor=1.0, returns="out") / x["k"].shape[2]


def decode_is_the_last_row(run, x):
    n = min(x["q"].shape[2], x["k"].shape[2])
    last = {**x, "q": x["q"][:, :, -1:], "k": x["k"][:, :, :n], "v": x["v"][:, :, :n]}
    return run({**last, "q": x["q"][:, :, -n:]}, causal=True, returns="out")[:, :, -1:], run(last, causal=True, returns="out")


VARIANT = Variant(
    name="relu",
    family="scored",
    summary="ReLU attention: every weight the positive part of its own score, or a power of it, divided by the number of keys.",
    equation="out_i = sum_j max(scale q_i . k_j + bias_ij, 0)^power / S v_j",
    paper=Paper(
        title="Replacing softmax with ReLU in Vision Transformers",
        authors=("Wortsman, Mitchell", "Lee, Jaehoon", "Gilmer, Justin", "Kornblith, Simon"),
        year=2023,
        arxiv="2309.08586",
        where="section 3",
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
        Output("weights", "B Hq T S", "p_ij, 0 where hidden or where the score is not positive"),
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
        Param("power", Integer(at_least=1, at_most=8), 1, "power of the positive part", tries=(2, 3)),
        Param("divisor", Number(above=0.0, optional=True), None, "divides every weight; None is S", absent=all_keys, tries=(1.0, 12.5)),
    ),
    define=define,
    plan=plan,
    cost=Cost(
        flops="B*Hq*pairs*(2*D + 2*E + 2 + power + 3*(softcap > 0))",
        memory="B*Hq*T*(E + 2*S)",
    ),
    ordered=lambda params: "T S" if params["causal"] or params["window"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[2.0]]]], "k": [[[[1.0], [-1.0], [3.0], [0.0]]]], "v": [[[[4.0], [99.0], [2.0], [99.0]]]]},
            params={"scale": 1.0},
            returns={"out": [[[[5.0]]]], "weights": [[[[0.5, 0.0, 1.5, 0.0]]]], "scores": [[[[2.0, -2.0, 6.0, 0.0]]]]},
            source="by hand: the positive parts 2 and 6, divided by four keys",
        ),
        Example(
            operands={"q": [[[[2.0]]]], "k": [[[[1.0], [-1.0], [3.0], [0.0]]]], "v": [[[[4.0], [99.0], [2.0], [99.0]]]]},
            params={"scale": 1.0, "power": 2, "divisor": 8.0},
            returns={"out": [[[[11.0]]]], "weights": [[[[0.5, 0.0, 4.5, 0.0]]]]},
            source="by hand: the squares 4 and 36, divided by 8",
        ),
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[6.0], [3.0], [9.0]]]], "v": [[[[1.0], [2.0], [5.0]]]]},
            params={"scale": 1.0, "causal": True},
            returns={"out": [[[[4.0], [19.0]]]], "weights": [[[[2.0, 1.0, 0.0], [2.0, 1.0, 3.0]]]]},
            source="by hand: query 0 sees two keys and divides by three all the same",
        ),
    ),
    identities=(
        Identity("weights of a score less those of its negative are the score", both_signs),
        Identity("scores three times as large give the power of three", scores_tripled),
        Identity("powers of weights multiply", powers_multiply),
        Identity("two halves of the keys add up under a common divisor", halves_add),
        Identity("the divisor counts all keys, hidden ones too", divisor_is_all_keys),
        Identity("a window without limits is no window", lambda run, x: (run(x, window=(None, None)), run(x))),
        Identity("the last query of a causal prefill is the decode step", decode_is_the_last_row),
    ),
)
