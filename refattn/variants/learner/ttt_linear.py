"""TTT-Linear: a linear model that is trained on the tokens it reads, one step of gradient descent per mini-batch.

    f(x; W, c) = LN(W^T x + c),      LN(z) = norm_weight (z - mean(z)) / sqrt(var(z) + eps) + norm_bias
    loss_t(W, c) = |f(k_t; W, c) - (v_t - k_t)|^2 / 2
    W_t = W_0 - token_scale_t sum_j eta_j dloss_j/dW (W_0, c_0),    c_t alike,    over the tokens j <= t of t's mini-batch
    out_t = q_t + f(q_t; W_t, c_t)

W_0 and c_0 are the model before the mini-batch; all gradients of a mini-batch are taken there, and the model after its last token is what
the next one starts from.  Mini-batches are counted from the first token of the sequence.  The paper's f is x + LN(W x) on both sides (its
section 2.7): hence the target v - k and the q that is added.  The offset c is not in the paper's text but in its code.  ``eta`` is the step
of each token and ``token_scale`` a factor of all steps up to a token, learned by place in the mini-batch in that code and 1 in the text.

``memory`` is W_t^T q_t + c_t, before the normalisation.  What is carried: ``state`` and ``offset`` are W_0 and c_0 of the mini-batch that
is under way, ``gradient`` and ``offset_gradient`` its sums of eta dloss so far, and ``position`` the number of tokens.  After the last
token of a mini-batch the sums are 0 and ``state`` is the model; with the same names and ``initial_`` a sequence can be cut anywhere.  Query
head h reads model ``h // (Hq // Hkv)``.  No scale.

What people get wrong: which of the two steps multiplies rows and which columns (flash-linear-attention's eta is ``token_scale``, and its
steps are 1); the target v instead of v - k; adding the memory to its own normalisation instead of the query (flash-linear-attention);
filling up the last mini-batch with tokens of 0, which still move the offset (the same); the gradient through LN, of which mean and variance
are part.

Checked against PyTorch's autograd of the inner loss, token by token; and flash-linear-attention's chunk_ttt_linear_ref, values, gradients
and states.
"""

import math

import numpy as np

from refattn.pieces import training
from refattn.pieces.arrays import each_sequence
from refattn.spec import Cost, Example, Identity, Integer, Number, Operand, Output, Paper, Param, Variant


def define(
    q,
    k,
    v,
    eta,
    norm_weight,
    norm_bias,
    token_scale,
    initial_state,
    initial_offset,
    initial_gradient,
    initial_offset_gradient,
    initial_position,
    mini_batch,
    eps,
):
    batch, heads, n, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d))
    memory = np.zeros((batch, heads, n, d))
    state = np.zeros((batch, kv_heads, d, d))  # W_0
    offset = np.zeros((batch, kv_heads, d))  # c_0
    gradient = np.zeros((batch, kv_heads, d, d))
    offset_gradient = np.zeros((batch, kv_heads, d))
    position = np.zeros(batch)
    z = np.zeros(d)
    slope = np.zeros(d)  # dloss/dz
    for b in range(batch):
        start = int(initial_position[b])
        position[b] = start + n
        for g in range(kv_heads):
            for y in range(d):
                offset[b, g, y], offset_gradient[b, g, y] = initial_offset[b, g, y], initial_offset_gradient[b, g, y]
                for x in range(d):
                    state[b, g, x, y], gradient[b, g, x, y] = initial_state[b, g, x, y], initial_gradient[b, g, x, y]
            for t in range(n):
                # The gradient of the loss at the model before the mini-batch.
                mean = var = 0.0
                for y in range(d):
                    z[y] = offset[b, g, y]
                    for x in range(d):
                        z[y] += k[b, g, t, x] * state[b, g, x, y]
                    mean += z[y]
                mean /= d
                for y in range(d):
                    z[y] -= mean
                    var += z[y] * z[y]
                std = math.sqrt(var / d + eps)
                along_ones = along_z = 0.0
                for y in range(d):
                    z[y] /= std
                    slope[y] = norm_weight[g, y] * (norm_weight[g, y] * z[y] + norm_bias[g, y] - (v[b, g, t, y] - k[b, g, t, y]))
                    along_ones += slope[y]
                    along_z += slope[y] * z[y]
                for y in range(d):
                    slope[y] = (slope[y] - along_ones / d - z[y] * along_z / d) / std
                    offset_gradient[b, g, y] += eta[b, g, t] * slope[y]
                    for x in range(d):
                        gradient[b, g, x, y] += eta[b, g, t] * k[b, g, t, x] * slope[y]
                # The query reads the model after that step.
                for h in range(g * group, (g + 1) * group):
                    mean = var = 0.0
                    for y in range(d):
                        z[y] = offset[b, g, y] - token_scale[b, g, t] * offset_gradient[b, g, y]
                        for x in range(d):
                            z[y] += q[b, h, t, x] * (state[b, g, x, y] - token_scale[b, g, t] * gradient[b, g, x, y])
                        memory[b, h, t, y] = z[y]
                        mean += z[y]
                    mean /= d
                    for y in range(d):
                        z[y] -= mean
                        var += z[y] * z[y]
                    std = math.sqrt(var / d + eps)
                    for y in range(d):
                        out[b, h, t, y] = q[b, h, t, y] + norm_weight[g, y] * z[y] / std + norm_bias[g, y]
                if (start + t + 1) % mini_batch == 0:
                    for y in range(d):
                        offset[b, g, y] -= token_scale[b, g, t] * offset_gradient[b, g, y]
                        offset_gradient[b, g, y] = 0.0
                        for x in range(d):
                            state[b, g, x, y] -= token_scale[b, g, t] * gradient[b, g, x, y]
                            gradient[b, g, x, y] = 0.0
    return out, memory, state, offset, gradient, offset_gradient, position


def vectorized(x, params):
    """Mini-batch by mini-batch in its dual form: gradients of all tokens at one model, and what they add up to for a query by products of tokens."""
    return each_sequence(lambda one: of_sequence(one, **params), x, ("norm_weight", "norm_bias"))


def of_sequence(x, mini_batch, eps):
    n, group, start = x["q"].shape[1], x["q"].shape[0] // x["k"].shape[0], int(x["initial_position"])
    layer = tuple(x["initial_" + name] for name in ("state", "offset", "gradient", "offset_gradient"))
    weight, bias, outs, memories = x["norm_weight"][:, None], x["norm_bias"][:, None], [], []

    def read_by(y, *rest):
        return tuple(np.repeat(a, group, axis=0) for a in (y, *rest))

    for first, last, ends in training.stretches(start, n, mini_batch):
        q, k, v, eta, scale = (x[name][:, first:last] for name in ("q", "k", "v", "eta", "token_scale"))
        steps = eta[..., None] * training.loss_slope(k @ layer[0] + layer[1][:, None], v - k, weight, bias, eps)
        own_scale, own_keys, own_steps = read_by(scale[..., None], k, steps)
        memories.append(training.under_way(q, read_by(*layer), own_scale, own_keys, own_steps))
        own_weight, own_bias = read_by(weight, bias)
        outs.append(q + own_weight * training.normalised(memories[-1], eps)[0] + own_bias)
        layer = training.after(layer, scale[:, -1:], k, steps, ends)
    carried = dict(zip(("state", "offset", "gradient", "offset_gradient"), layer, strict=True))
    out, memory = (np.concatenate(parts, axis=1) for parts in (outs, memories))
    return {"out": out, "memory": memory, **carried, "position": x["initial_position"] + float(n)}


TOKENS = ("q", "k", "v", "eta", "token_scale")
CARRIED = ("state", "offset", "gradient", "offset_gradient", "position")


def with_scale(x):
    """An optional operand that changes from token to token."""
    return {**x, "token_scale": 1.0 / (1.0 + np.arange(x["k"].shape[2])) + 0.0 * x["eta"]}


def cut_and_carried_on(run, x):
    x = with_scale(x)
    half = x["q"].shape[2] // 2
    one = {**x, **{name: x[name][:, :, :half] for name in TOKENS}}
    two = {**x, **{name: x[name][:, :, half:] for name in TOKENS}}
    sides = []
    for mini_batch in (2, 3):
        out_1, *carried = run(one, mini_batch=mini_batch, returns=("out", *CARRIED))
        given = {"initial_" + name: c for name, c in zip(CARRIED, carried, strict=True)}
        out_2, *carried = run({**two, **given}, mini_batch=mini_batch, returns=("out", *CARRIED))
        sides.append((run(x, mini_batch=mini_batch, returns=("out", *CARRIED)), (np.concatenate([out_1, out_2], axis=2), *carried)))
    (whole_2, cut_2), (whole_3, cut_3) = sides
    return (*whole_2, *whole_3), (*cut_2, *cut_3)


def one_batch_is_linear_attention(run, x):
    """From a model of 0 all gradients of one mini-batch are known beforehand: -norm_weight (v - k - norm_bias), centred, over sqrt(eps)."""
    x = with_scale(x)
    group = x["q"].shape[1] // x["k"].shape[1]
    pull = x["norm_weight"][:, None] * (x["v"] - x["k"] - x["norm_bias"][:, None])
    values = x["eta"][..., None] * (pull - pull.mean(axis=-1, keepdims=True)) / math.sqrt(0.5)
    ones = np.ones((*x["k"].shape[:3], 1))
    scores = run(
        {"q": np.concatenate([x["q"], np.repeat(ones, group, axis=1)], 3), "k": np.concatenate([x["k"], ones], 3), "v": x["v"]},
        name="softmax",
        causal=True,
        scale=1.0,
        returns="scores",
    )
    read = np.where(scores > -np.inf, scores, 0.0) @ np.repeat(values, group, axis=1)
    return run(x, mini_batch=1000, eps=0.5, returns="memory"), np.repeat(x["token_scale"], group, axis=1)[..., None] * read


def steps_and_scale_are_a_product(run, x):
    x = with_scale(x)
    return run(x, mini_batch=2), run({**x, "eta": 0.25 * x["eta"], "token_scale": 4.0 * x["token_scale"]}, mini_batch=2)


def without_weight_nothing_is_learnt(run, x):
    bias = np.repeat(x["norm_bias"], x["q"].shape[1] // x["k"].shape[1], axis=0)
    return run({**x, "norm_weight": np.zeros_like(x["norm_weight"])}, mini_batch=2, returns=("out", "memory")), (x["q"] + bias[:, None], 0.0)


def a_perfect_model_learns_nothing(run, x):
    """Where the target is what the model says, its gradient is 0."""
    d = x["k"].shape[3]
    model = np.linspace(-1.0, 1.0, d * d).reshape(d, d) + np.eye(d)
    z = x["k"] @ model
    normal = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    values = x["k"] + x["norm_weight"][:, None] * normal + x["norm_bias"][:, None]
    start = {**x, "v": values, "initial_state": np.broadcast_to(model, (*x["k"].shape[:2], d, d))}
    return run(start, mini_batch=2, returns="memory"), x["q"] @ model


VARIANT = Variant(
    name="ttt_linear",
    family="learner",
    summary="TTT-Linear: a linear model trained on the tokens it reads, one gradient step per mini-batch.",
    equation="W_t = W_0 - token_scale_t sum_j eta_j d/dW |LN(W^T k_j + c) - (v_j - k_j)|^2 / 2, out_t = q_t + LN(W_t^T q_t + c_t)",
    paper=Paper(
        title="Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
        authors=(
            "Sun, Yu",
            "Li, Xinhao",
            "Dalal, Karan",
            "Xu, Jiarui",
            "Vikram, Arjun",
            "Zhang, Genghan",
            "Dubois, Yann",
            "Chen, Xinlei",
            "Wang, Xiaolong",
            "Koyejo, Sanmi",
            "Hashimoto, Tatsunori",
            "Guestrin, Carlos",
        ),
        year=2024,
        arxiv="2407.04620",
        where="sections 2.2 to 2.4 and 2.7",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries: the test view"),
        Operand("k", "B Hkv T D", "keys: the training view"),
        Operand("v", "B Hkv T D", "values: the label view"),
        Operand("eta", "B Hkv T", "step of a token's gradient", draw=lambda rng, shape: rng.uniform(0.05, 0.5, shape)),
        Operand("norm_weight", "Hkv D", "weight of the normalisation", draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
        Operand("norm_bias", "Hkv D", "bias of the normalisation", draw=lambda rng, shape: 0.5 * rng.standard_normal(shape)),
        Operand("token_scale", "B Hkv T", "factor of all steps of the mini-batch up to a token", absent=1.0),
        Operand("initial_state", "B Hkv D D", "W before the mini-batch under way", absent=0.0),
        Operand("initial_offset", "B Hkv D", "c before the mini-batch under way", absent=0.0),
        Operand("initial_gradient", "B Hkv D D", "its gradients of W so far, times their steps", absent=0.0),
        Operand("initial_offset_gradient", "B Hkv D", "its gradients of c so far, times their steps", absent=0.0),
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
        Output("out", "B Hq T D", "what the model makes of the queries"),
        Output("memory", "B Hq T D", "the same before the normalisation, without the query"),
        Output("state", "B Hkv D D", "W before the mini-batch under way", wide=True),
        Output("offset", "B Hkv D", "c before the mini-batch under way", wide=True),
        Output("gradient", "B Hkv D D", "its gradients of W so far, times their steps", wide=True),
        Output("offset_gradient", "B Hkv D", "its gradients of c so far, times their steps", wide=True),
        Output("position", "B", "number of tokens so far", wide=True),
    ),
    params=(
        Param("mini_batch", Integer(at_least=1), 16, "tokens whose gradients are taken at the same model", tries=(1, 3)),
        Param("eps", Number(above=0.0), 1e-6, "added to the variance", tries=(0.5,)),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops="B*(T*(Hkv*(5*D*D + 21*D + 4) + Hq*(4*D*D + 10*D + 4)) + Hkv*(T//mini_batch)*(2*D*D + 2*D))",
        memory="B*(2*Hq*T*D + 2*Hkv*D*(D + 1) + 1) + 2*D",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 0.0], [0.0, 1.0]]]],
                "k": [[[[1.0, 0.0], [0.0, 1.0]]]],
                "v": [[[[5.0, 0.0], [0.0, 1.0]]]],
                "eta": [[[0.25, 0.5]]],
                "norm_weight": [[1.0, 1.0]],
                "norm_bias": [[0.0, 0.0]],
            },
            params={"eps": 1.0, "mini_batch": 2},
            returns={
                "memory": [[[[1.0, -1.0], [0.5, -0.5]]]],
                "out": [[[[1.0 + 0.5**0.5, -(0.5**0.5)], [0.2**0.5, 1.0 - 0.2**0.5]]]],
                "state": [[[[0.5, -0.5], [0.0, 0.0]]]],
                "offset": [[[0.5, -0.5]]],
                "gradient": [[[[0.0, 0.0], [0.0, 0.0]]]],
            },
            source="by hand: at W = 0 the slope is -(v - k), centred: (-2, 2) and 0; steps (0.5, -0.5) in the first row of W and in c",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on, in the middle of a mini-batch too", cut_and_carried_on),
        Identity("one mini-batch from a model of 0 is causal linear attention", one_batch_is_linear_attention),
        Identity("only the product of steps and token scale counts", steps_and_scale_are_a_product),
        Identity("without a normalisation weight nothing is learnt", without_weight_nothing_is_learnt),
        Identity("a model that is right learns nothing", a_perfect_model_learns_nothing),
    ),
)
