"""Attention residuals: a layer's input is attention over the depth, with a learned query, in place of the sum of all earlier outputs.

    s_lt  = scale * w . (gain * h_lt / sqrt(mean(h_lt^2) + eps))
    p_lt  = exp(s_lt) / sum_l' exp(s_l't)
    out_t = sum_l p_lt h_lt,       lse_t = log sum_l exp(s_lt)

h_lt is what source l (the embedding, then each earlier layer or block) holds at token t; tokens do not see one another.  Keys are normalised
(RMSNorm, ``gain`` its weight, 1 if absent), values are not.  The query w is a parameter of the reading layer; at w = 0 the sources are averaged.

What people get wrong: normalising the values too; a query from the data; 1/sqrt(M), which is not there (``scale`` is 1); eps outside the root.
flash-linear-attention can normalise the result as well (``output_rms_weight``): that is the next layer's norm.

Checked against flash-linear-attention's attnres.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(h, w, gain, scale, eps):
    batch, sources, n, width = h.shape
    out = np.zeros((batch, n, width))
    lse = np.full((batch, n), -np.inf)
    weights = np.zeros((batch, sources, n))
    for b in range(batch):
        for t in range(n):
            top = -np.inf
            for a in range(sources):
                s = 0.0
                squares = 0.0
                for m in range(width):
                    s += w[m] * gain[m] * h[b, a, t, m]
                    squares += h[b, a, t, m] * h[b, a, t, m]
                weights[b, a, t] = scale * s / math.sqrt(squares / width + eps)
                if weights[b, a, t] > top or math.isnan(weights[b, a, t]):  # NaN must win
                    top = weights[b, a, t]
            total = 0.0
            for a in range(sources):
                weights[b, a, t] = math.exp(weights[b, a, t] - top)
                total += weights[b, a, t]
            for a in range(sources):
                weights[b, a, t] /= total
                for m in range(width):
                    out[b, t, m] += weights[b, a, t] * h[b, a, t, m]
            lse[b, t] = top + math.log(total)
    return out, lse, weights


def vectorized(x, params):
    h = np.swapaxes(x["h"], 1, 2)
    length = np.sqrt(np.sum(h * h, axis=-1) / h.shape[-1] + params["eps"])
    weights, lse = softmax(params["scale"] * np.sum(x["w"] * x["gain"] * h, axis=-1) / length)
    return {"out": (weights[:, :, None] @ h)[:, :, 0], "lse": lse, "weights": np.swapaxes(weights, 1, 2)}


def sources_are_keys(run, x):
    """One query per token over the sources; keys normalised, values not."""
    keys = x["h"] / np.sqrt(np.mean(x["h"] ** 2, axis=-1, keepdims=True) + 1e-6)
    batch, sources, n, width = x["h"].shape
    depth = [y.transpose(0, 2, 1, 3).reshape(batch * n, 1, sources, width) for y in (keys, x["h"])]
    query = np.broadcast_to(x["w"], (batch * n, 1, 1, width))
    out, lse = run({"q": query, "k": depth[0], "v": depth[1]}, name="softmax", scale=1.0, returns=("out", "lse"))
    return run(x, returns=("out", "lse")), (out.reshape(batch, n, width), lse.reshape(batch, n))


def two_parts_of_the_depth(run, x):
    half = (x["h"].shape[1] + 1) // 2
    near, far = x["h"][:, :half], x["h"][:, half:] if x["h"].shape[1] > 1 else x["h"]
    (one, lse_1), (two, lse_2) = (run({**x, "h": part}, returns=("out", "lse")) for part in (near, far))
    lse = np.logaddexp(lse_1, lse_2)
    both = {**x, "h": np.concatenate([near, far], axis=1)}
    return run(both, returns=("out", "lse")), (np.exp(lse_1 - lse)[..., None] * one + np.exp(lse_2 - lse)[..., None] * two, lse)


VARIANT = Variant(
    name="attention_residuals",
    family="scored",
    summary="Attention residuals (AttnRes): a learned query attends over the outputs of all earlier layers, token by token.",
    equation="out_t = sum_l softmax_l(scale w . RMSNorm(h_lt)) h_lt",
    paper=Paper(
        title="Attention Residuals",
        authors=(
            "Chen, Guangyu",
            "Zhang, Yu",
            "Su, Jianlin",
            "Xu, Weixin",
            "Pan, Siyuan",
            "Wang, Yaoyu",
            "Wang, Yucheng",
            "Chen, Guanduo",
            "Yin, Bohong",
            "Chen, Yutian",
            "Yan, Junjie",
            "Wei, Ming",
            "Zhang, Y.",
            "Meng, Fanqing",
            "Hong, Chao",
            "Xie, Xiaotong",
            "Liu, Shaowei",
            "Lu, Enzhe",
            "Tai, Yunpeng",
            "Chen, Yanru",
            "Men, Xin",
            "Guo, Haiqing",
            "Charles, Y.",
            "Lu, Haoyu",
            "Sui, Lin",
            "Zhu, Jinguo",
            "Zhou, Zaida",
            "He, Weiran",
            "Huang, Weixiao",
            "Xu, Xinran",
            "Wang, Yuzhi",
            "Lai, Guokun",
            "Du, Yulun",
            "Wu, Yuxin",
            "Yang, Zhilin",
            "Zhou, Xinyu",
        ),
        year=2026,
        arxiv="2603.15031",
        where="the full form, before its blocks",
    ),
    operands=(
        Operand("h", "B L T M", "what every source holds"),
        Operand("w", "M", "query of the reading layer"),
        Operand("gain", "M", "weight of the keys' RMSNorm", absent=1.0),
    ),
    outputs=(
        Output("out", "B T M", "the layer's input"),
        Output("lse", "B T", "natural log of the sum of exponentials", wide=True),
        Output("weights", "B L T", "p_lt"),
    ),
    params=(
        Param("scale", Number(), 1.0, "multiplies the scores", tries=(0.37,)),
        Param("eps", Number(at_least=0.0), 1e-6, "added to the mean square", tries=(0.5,)),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops="B*T*(L*(7*M + 9) + 2)", memory="B*T*(M + 1 + L)"),
    examples=(
        Example(
            operands={
                "h": [[[[3.0, 3.0]], [[-1.0, 1.0]]]],
                "w": [0.5 * math.log(3.0), 0.5 * math.log(3.0)],
            },
            params={"eps": 0.0},
            returns={"out": [[[2.0, 2.5]]], "lse": [[math.log(4.0)]], "weights": [[[0.75], [0.25]]]},
            source="by hand: the keys are (1, 1) and (-1, 1), so the scores are log 3 and 0",
        ),
        Example(
            operands={"h": [[[[4.0], [0.0]], [[8.0], [6.0]]]], "w": [0.0], "gain": [5.0]},
            returns={"out": [[[6.0], [3.0]]], "weights": [[[0.5, 0.5], [0.5, 0.5]]]},
            source="by hand: a query of 0 averages",
        ),
    ),
    identities=(
        Identity("it is softmax attention over the depth, one query per token", sources_are_keys),
        Identity("two parts of the depth merge by their lse", two_parts_of_the_depth),
        Identity("each token's weights sum to one", lambda run, x: (run(x, returns="weights").sum(1), 1.0)),
        Identity("a query of 0 averages the sources", lambda run, x: (run({**x, "w": 0.0 * x["w"]}), x["h"].mean(axis=1))),
        Identity(
            "without eps the length of a source scales its value only",
            lambda run, x: (run({**x, "h": 4.0 * x["h"]}, eps=0.0), 4.0 * run(x, eps=0.0)),
        ),
    ),
)
