"""Kimi Delta Attention: the gated delta rule with a gate for each key channel, so that each row of the state fades at its own rate.

    S~_t  = diag(alpha_t) S_{t-1},   S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T,   alpha_t = exp(gate_t) in R^D
    out_t = scale * S_t^T q_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and
carried on.  ``gate`` is the natural logarithm of the factors, one number per token, key-value head and key channel; -inf forgets the
channel.  Query head h reads the state of key-value head ``h // (Hq // Hkv)``.

The transition (I - beta k k^T) diag(alpha) is a diagonal plus a product of two vectors (`dplr`) with both vectors tied to k.  Kimi Linear's
layer takes alpha = exp(-exp(A_log) softplus(. + dt_bias)), newer models exp(bound * sigmoid(.)) with a lower bound on the gate, and keys and
queries of length 1; none of that is here.

What people get wrong: fading after the erasure, diag(alpha) (I - beta k k^T), which agrees only where all channels fade alike.  The base
of the gate: attention-gym's references take log2 of the factor and a state [V, K], MLX-LM the factor itself, flash-linear-attention and ONNX
the natural logarithm as here.  The scale: 1/sqrt(D) here as in flash-linear-attention and transformers, left to the caller in MLX-LM.
The norm of keys: x / sqrt(sum x^2 + 1e-6) where a library does it.  Pairwise fading formed as (q exp(G_i)) . (k exp(-G_j)), which overflows where
a channel fades strongly.

Checked against flash-linear-attention's, attention-gym's and transformers' (Kimi Linear) recurrent and chunked references and MLX-LM.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, beta, initial_state, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                for x in range(d):
                    alpha = math.exp(gate[b, g, t, x])
                    for y in range(d_v):
                        state[b, g, x, y] *= alpha
                for y in range(d_v):
                    held = 0.0  # what the faded state answers at the key
                    for x in range(d):
                        held += k[b, g, t, x] * state[b, g, x, y]
                    change = beta[b, g, t] * (v[b, g, t, y] - held)
                    for x in range(d):
                        state[b, g, x, y] += k[b, g, t, x] * change
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=("beta", "k"), value=("v",), erase=("k",)),),
        log_decay=("gate",),
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def one_gate_is_gated_delta(run, x):
    gate = x["gate"][..., 0]
    alike = {**x, "gate": np.broadcast_to(gate[..., None], x["gate"].shape)}
    return run(alike, returns=("out", "state")), run({**x, "gate": gate}, name="gated_delta", returns=("out", "state"))


def as_a_triangular_system(run, x):
    """What each token changes, u, solves (I + tril(beta k D k^T, -1)) u = beta v, with D_ij the fading of the channels from j to i."""
    summed = np.cumsum(x["gate"], axis=2)
    n = summed.shape[2]
    past = np.tril(np.ones((n, n)))[..., None]
    fading = past * np.exp(past * (summed[:, :, :, None] - summed[:, :, None, :]))
    overlap = np.einsum("bgix,bgijx,bgjx->bgij", x["k"], fading, x["k"])
    system = np.eye(n) + np.tril(x["beta"][..., None] * overlap, -1)
    u = np.linalg.solve(system, x["beta"][..., None] * x["v"])
    group = x["q"].shape[1] // x["k"].shape[1]
    k, faded, changes = (np.repeat(a, group, axis=1) for a in (x["k"], fading, u))
    scores = np.einsum("bhix,bhijx,bhjx->bhij", x["q"], faded, k)
    return run(x, scale=0.5, returns=("out", "state")), (0.5 * scores @ changes, np.swapaxes(x["k"] * fading[:, :, -1], -1, -2) @ u)


def without_writes(run, x):
    batch, kv_heads, _, d = x["k"].shape
    start = np.linspace(-1.0, 1.0, batch * kv_heads * d * x["v"].shape[3]).reshape(batch, kv_heads, d, -1)
    group = x["q"].shape[1] // kv_heads
    faded = np.exp(np.cumsum(x["gate"], axis=2))
    out = 0.5 * (x["q"] * np.repeat(faded, group, axis=1)) @ np.repeat(start, group, axis=1)
    quiet = {**x, "beta": 0.0 * x["beta"], "initial_state": start}
    return run(quiet, scale=0.5, returns=("out", "state")), (out, faded[:, :, -1, :, None] * start)


VARIANT = Variant(
    name="kda",
    family="state",
    summary="Kimi Delta Attention: the delta rule on a state whose rows fade each at their own rate.",
    equation="S~_t = diag(exp(gate_t)) S_(t-1), S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        authors=(
            "Zhang, Yu",
            "Lin, Zongyu",
            "Yao, Xingcheng",
            "Hu, Jiaxi",
            "Meng, Fanqing",
            "Liu, Chengyin",
            "Men, Xin",
            "Yang, Songlin",
            "Li, Zhiyuan",
            "Li, Wentao",
            "Lu, Enzhe",
            "Liu, Weizhou",
            "Chen, Yanru",
            "Xu, Weixin",
            "Yu, Longhui",
            "Wang, Yejie",
            "Fan, Yu",
            "Zhong, Longguang",
            "Yuan, Enming",
            "Zhang, Dehao",
            "Zhang, Yizhi",
            "Liu, T.Y.",
            "Wang, Haiming",
            "Fang, Shengjun",
            "He, Weiran",
            "Liu, Shaowei",
            "Li, Yiwei",
            "Su, Jianlin",
            "Qiu, Jiezhong",
            "Pang, Bo",
            "Yan, Junjie",
            "Jiang, Zhejun",
            "Huang, Weixiao",
            "Yin, Bohong",
            "You, Jiacheng",
            "Wei, Chu",
            "Wang, Zhengtao",
            "Hong, Chao",
            "Chen, Yutian",
            "Chen, Guanduo",
            "Wang, Yucheng",
            "Zheng, Huabin",
            "Wang, Feng",
            "Liu, Yibo",
            "Dong, Mengnan",
            "Zhang, Zheng",
            "Pan, Siyuan",
            "Wu, Wenhao",
            "Wu, Yuhao",
            "Guan, Longyu",
            "Tao, Jiawen",
            "Fu, Guohong",
            "Xu, Xinran",
            "Wang, Yuzhi",
            "Lai, Guokun",
            "Wu, Yuxin",
            "Zhou, Xinyu",
            "Yang, Zhilin",
            "Du, Yulun",
        ),
        year=2025,
        arxiv="2510.26692",
        where="section 3, equation 1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand(
            "k",
            "B Hkv T D",
            "keys, not normalised here",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the factors alpha by which rows of the state fade",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
        ),
        Operand("beta", "B Hkv T", "write strength", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies q; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*T*(Hkv*(D + E*(5*D + 2)) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 0.0], [1.0, 2.0]]]],
                "k": [[[[1.0, 1.0], [1.0, 0.0]]]],
                "v": [[[[8.0], [7.0]]]],
                "gate": [[[[math.log(0.5), 0.0], [math.log(0.25), -math.inf]]]],
                "beta": [[[0.5, 1.0]]],
                "initial_state": [[[[4.0], [2.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[4.0], [7.0]]]], "state": [[[[7.0], [0.0]]]]},
            source="by hand: (2, 2) + (8 - 4)/2 (1, 1) = (4, 4), faded to (1, 0), then (1 + (7 - 1), 0)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("with all channels fading alike it is the gated delta rule", one_gate_is_gated_delta),
        Identity("the changes solve a triangular system", as_a_triangular_system),
        Identity("with beta 0 the rows only fade", without_writes),
    ),
)
