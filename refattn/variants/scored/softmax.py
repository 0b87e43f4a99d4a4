"""Scaled dot-product attention, with everything the softmax family hangs on it.

    s_ij  = cap * tanh(scale * q_i . k_j / cap) + bias_ij      (without a cap: scale * q_i . k_j + bias_ij)
    p_ij  = exp(s_ij) / (exp(sink) + sum_{j' visible} exp(s_ij'))
    out_i = sum_{j visible} p_ij v_j,       lse_i = log(exp(sink) + sum_{j visible} exp(s_ij))

Query head h reads key-value head ``h // (Hq // Hkv)``.  Query i stands at position ``i + S - T`` among the keys: queries are the last T of
S tokens.  ``causal=True`` lets it see keys up to its position; ``causal="top_left"`` puts query i at position i instead.
``window=(left, right)`` counts keys beside the position, which is not counted.  A key whose score is -inf, by mask or by bias, is never
read, so NaN may stand there.  A sink is a logit that takes part in the denominator only; it is neither scaled nor capped, and it counts
in lse.

What people get wrong: the alignment when T != S (PyTorch's ``is_causal`` and JAX are top-left; flash-attention since 2.1, MLX and
FlashInfer bottom-right); one key too many or too few in a window; capping after the mask, which makes -inf finite; key-value heads
tiled (``h % Hkv``) instead of grouped; rows that see nothing, which are 0 here, NaN in xformers' reference and the mean of all values,
hidden ones included, in JAX and wherever a mask is a large negative number (``empty_rows`` chooses).

Checked against PyTorch SDPA and FlexAttention, JAX, ONNX's reference evaluator and ONNX Runtime.
"""

import math

import numpy as np

from refattn.pieces.masks import causal as causal_mask
from refattn.pieces.masks import window as window_mask
from refattn.pieces.score_mods import softcap as softcap_mod
from refattn.pieces.similarities import dot
from refattn.spec import UNBOUNDED, Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Plan, Stage, Variant, Window


def define(q, k, v, bias, mask, sinks, scale, softcap, causal, window, empty_rows):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    left, right = window
    out = np.zeros((batch, heads, n_q, d_v))
    lse = np.full((batch, heads, n_q), -np.inf)
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
                top = sinks[h]
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
                    for j in range(n_k):
                        weight = 0.0 if empty_rows == 0 else np.nan if empty_rows == 1 else 1.0 / n_k
                        weights[b, h, i, j] = weight
                        if empty_rows != 0:
                            for y in range(d_v):
                                out[b, h, i, y] += weight * v[b, g, j, y]
                    continue
                total = math.exp(sinks[h] - top)
                for j in range(n_k):
                    if scores[b, h, i, j] != -np.inf:
                        weights[b, h, i, j] = math.exp(scores[b, h, i, j] - top)
                        total += weights[b, h, i, j]
                for j in range(n_k):
                    if scores[b, h, i, j] != -np.inf:
                        weights[b, h, i, j] /= total
                        for y in range(d_v):
                            out[b, h, i, y] += weights[b, h, i, j] * v[b, g, j, y]
                lse[b, h, i] = top + math.log(total)
    return out, lse, weights, scores


def plan(dims, params):
    offset = 0 if params["causal"] == "top_left" else dims["S"] - dims["T"]
    masks = [Stage(causal_mask, (offset,))] if params["causal"] else []
    if params["window"] is not None:
        left, right = (UNBOUNDED if side is None else side for side in params["window"])
        masks.append(Stage(window_mask, (offset, left, right)))
    return Plan(
        similarity=dot,
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        score_mods=() if params["softcap"] is None else (Stage(softcap_mod, (params["softcap"],)),),
        masks=tuple(masks),
        bias="bias",
        mask="mask",
        sinks="sinks",
    )


def constant_bias(run, x):
    return run(x, returns="out"), run({**x, "bias": np.array(3.0)}, returns="out")


def two_halves(run, x):
    half = x["k"].shape[2] // 2
    one, lse_1 = run({**x, "k": x["k"][:, :, :half], "v": x["v"][:, :, :half]}, returns=("out", "lse"))
    two, lse_2 = run({**x, "k": x["k"][:, :, half:], "v": x["v"][:, :, half:]}, returns=("out", "lse"))
    lse = np.logaddexp(lse_1, lse_2)
    return run(x, returns="out"), np.exp(lse_1 - lse)[..., None] * one + np.exp(lse_2 - lse)[..., None] * two


def sink_is_a_key_of_value_zero(run, x):
    batch, heads, n_q = x["q"].shape[:3]
    n_k = x["k"].shape[2]
    sinks = np.linspace(-1.0, 2.0, heads)
    wider = {name: np.concatenate([x[name], 0.0 * x[name][:, :, :1]], axis=2) for name in ("k", "v")}
    bias = np.zeros((batch, heads, n_q, n_k + 1))
    bias[..., -1] = sinks[:, None]
    return run({**x, "sinks": sinks}, returns=("out", "lse")), run({**x, **wider, "bias": bias}, returns=("out", "lse"))


def decode_is_the_last_row(run, x):
    n = min(x["q"].shape[2], x["k"].shape[2])
    last = {**x, "q": x["q"][:, :, -1:], "k": x["k"][:, :, :n], "v": x["v"][:, :, :n]}
    return run({**last, "q": x["q"][:, :, -n:]}, causal=True, returns="out")[:, :, -1:], run(last, causal=True, returns="out")


VARIANT = Variant(
    name="softmax",
    family="scored",
    summary="Scaled dot-product attention: causal, windows, masks, bias, soft-cap, sinks, grouped heads.",
    equation="out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j",
    paper=Paper(
        title="Attention Is All You Need",
        authors=(
            "Vaswani, Ashish",
            "Shazeer, Noam",
            "Parmar, Niki",
            "Uszkoreit, Jakob",
            "Jones, Llion",
            "Gomez, Aidan N.",
            "Kaiser, Lukasz",
            "Polosukhin, Illia",
        ),
        year=2017,
        arxiv="1706.03762",
        where="section 3.2.1, equation 1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("bias", "B Hq T S", "added to the scores after scale and soft-cap", absent=0.0, broadcast=True),
        Operand("mask", "B Hq T S", "True where a query may attend", kind="boolean", absent=True, broadcast=True),
        Operand("sinks", "Hq", "logit per query head that takes part in the denominator only", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("lse", "B Hq T", "natural log of the row's sum of exponentials, sink included; -inf for a row that sees nothing", wide=True),
        Output("weights", "B Hq T S", "p_ij, 0 where hidden"),
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
        Param("empty_rows", Choice(("zero", "nan", "uniform")), "zero", "what a row that sees no key returns"),
    ),
    define=define,
    plan=plan,
    cost=Cost(
        flops="B*Hq*(pairs*(2*D + 2*E + 6 + 3*(softcap > 0)) + 4*T)",
        memory="B*Hq*T*(E + 1 + 2*S)",
    ),
    ordered=lambda params: "T S" if params["causal"] or params["window"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[0.0], [math.log(3.0)]]]], "v": [[[[4.0], [8.0]]]]},
            params={"scale": 1.0},
            returns={"out": [[[[7.0]]]], "lse": [[[math.log(4.0)]]], "weights": [[[[0.25, 0.75]]]], "scores": [[[[0.0, math.log(3.0)]]]]},
        ),
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[0.0], [0.0], [math.log(2.0)]]]], "v": [[[[3.0], [5.0], [9.0]]]]},
            params={"scale": 1.0, "causal": True},
            returns={"out": [[[[4.0], [6.5]]]]},
            source="by hand: T=2, S=3, so query 0 sees keys 0 and 1",
        ),
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[0.0], [0.0], [0.0]]]], "v": [[[[3.0], [5.0], [7.0]]]]},
            params={"causal": "top_left", "window": (0, 0)},
            returns={"out": [[[[3.0], [5.0]]]]},
            source="by hand: each query sees only the key of its own index",
        ),
        Example(
            operands={"q": [[[[0.0]]]], "k": [[[[1.0], [2.0]]]], "v": [[[[3.0], [6.0]]]], "sinks": [0.0]},
            returns={"out": [[[[3.0]]]], "lse": [[[math.log(3.0)]]]},
            source="by hand: two keys and a sink, one third each",
        ),
    ),
    identities=(
        Identity("each row of weights sums to one", lambda run, x: (run(x, returns="weights").sum(-1), 1.0)),
        Identity("a constant bias changes nothing but lse", constant_bias),
        Identity("two halves of the keys merge by their lse", two_halves),
        Identity("a sink is one more key, of score sink and value zero", sink_is_a_key_of_value_zero),
        Identity("a window without limits is no window", lambda run, x: (run(x, window=(None, None)), run(x))),
        Identity("the last query of a causal prefill is the decode step", decode_is_the_last_row),
        Identity(
            "lse is the log of the summed exponentials",
            lambda run, x: (run(x, returns="lse"), np.logaddexp.reduce(run(x, returns="scores"), axis=-1)),
        ),
    ),
)
