"""TTT-MLP: a two-layer network that is trained on the tokens it reads, one step of gradient descent per mini-batch.

    f(x; w1, c1, w2, c2) = LN(w2^T gelu(w1^T x + c1) + c2),     gelu(u) = u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) / 2
    loss_t = |f(k_t) - (v_t - k_t)|^2 / 2
    w_t    = w_0 - token_scale_t sum_j eta_j dloss_j/dw (w_0),  for each of the four,   over the tokens j <= t of t's mini-batch
    out_t  = q_t + f(q_t; w_t)

All is as in `ttt_linear` but the model: gradients are taken at the model before the mini-batch, mini-batches are counted from the first
token, LN has ``norm_weight``, ``norm_bias`` and ``eps``, and ``memory`` is the network's output before the normalisation.  The hidden
width, 4 D in the paper, is what the arrays say.

Carried are the four arrays of the model before the mini-batch under way, its four sums of eta times gradients (``w1_gradient`` ...), and
``position``.  A model of 0 stays where its second layer is 0 and its hidden units are gelu(0) = 0: only c2 then learns.  So ``initial_w1``
and ``initial_w2`` must be given.

What people get wrong: gelu by erf instead of tanh (the paper's code has tanh, in both directions); the gradient of the first layer through
the w2 of an earlier token; the rest as in `ttt_linear`.

Checked against PyTorch's autograd of the inner loss, token by token: values, states and gradients.
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
    initial_w1,
    initial_w2,
    token_scale,
    initial_c1,
    initial_c2,
    initial_w1_gradient,
    initial_c1_gradient,
    initial_w2_gradient,
    initial_c2_gradient,
    initial_position,
    mini_batch,
    eps,
):
    batch, heads, n, d = q.shape
    kv_heads, hidden = k.shape[1], initial_w1.shape[3]
    group = heads // kv_heads
    bend = 0.7978845608028654  # sqrt(2/pi)
    out = np.zeros((batch, heads, n, d))
    memory = np.zeros((batch, heads, n, d))
    w1 = np.zeros((batch, kv_heads, d, hidden))
    c1 = np.zeros((batch, kv_heads, hidden))
    w2 = np.zeros((batch, kv_heads, hidden, d))
    c2 = np.zeros((batch, kv_heads, d))
    w1_gradient = np.zeros((batch, kv_heads, d, hidden))
    c1_gradient = np.zeros((batch, kv_heads, hidden))
    w2_gradient = np.zeros((batch, kv_heads, hidden, d))
    c2_gradient = np.zeros((batch, kv_heads, d))
    position = np.zeros(batch)
    active = np.zeros(hidden)  # gelu(u)
    slope_1 = np.zeros(hidden)  # gelu'(u), then dloss/du
    z = np.zeros(d)
    slope_2 = np.zeros(d)  # dloss/dz
    for b in range(batch):
        start = int(initial_position[b])
        position[b] = start + n
        for g in range(kv_heads):
            for y in range(d):
                c2[b, g, y], c2_gradient[b, g, y] = initial_c2[b, g, y], initial_c2_gradient[b, g, y]
            for f in range(hidden):
                c1[b, g, f], c1_gradient[b, g, f] = initial_c1[b, g, f], initial_c1_gradient[b, g, f]
                for x in range(d):
                    w1[b, g, x, f], w1_gradient[b, g, x, f] = initial_w1[b, g, x, f], initial_w1_gradient[b, g, x, f]
                    w2[b, g, f, x], w2_gradient[b, g, f, x] = initial_w2[b, g, f, x], initial_w2_gradient[b, g, f, x]
            for t in range(n):
                # The gradient of the loss at the model before the mini-batch.
                for f in range(hidden):
                    u = c1[b, g, f]
                    for x in range(d):
                        u += k[b, g, t, x] * w1[b, g, x, f]
                    bent = math.tanh(bend * (u + 0.044715 * u * u * u))
                    active[f] = 0.5 * u * (1.0 + bent)
                    slope_1[f] = 0.5 * (1.0 + bent) + 0.5 * u * (1.0 - bent * bent) * bend * (1.0 + 3.0 * 0.044715 * u * u)
                mean = var = 0.0
                for y in range(d):
                    z[y] = c2[b, g, y]
                    for f in range(hidden):
                        z[y] += active[f] * w2[b, g, f, y]
                    mean += z[y]
                mean /= d
                for y in range(d):
                    z[y] -= mean
                    var += z[y] * z[y]
                std = math.sqrt(var / d + eps)
                along_ones = along_z = 0.0
                for y in range(d):
                    z[y] /= std
                    slope_2[y] = norm_weight[g, y] * (norm_weight[g, y] * z[y] + norm_bias[g, y] - (v[b, g, t, y] - k[b, g, t, y]))
                    along_ones += slope_2[y]
                    along_z += slope_2[y] * z[y]
                for y in range(d):
                    slope_2[y] = (slope_2[y] - along_ones / d - z[y] * along_z / d) / std
                    c2_gradient[b, g, y] += eta[b, g, t] * slope_2[y]
                    for f in range(hidden):
                        w2_gradient[b, g, f, y] += eta[b, g, t] * active[f] * slope_2[y]
                for f in range(hidden):
                    back = 0.0
                    for y in range(d):
                        back += w2[b, g, f, y] * slope_2[y]
                    slope_1[f] *= back
                    c1_gradient[b, g, f] += eta[b, g, t] * slope_1[f]
                    for x in range(d):
                        w1_gradient[b, g, x, f] += eta[b, g, t] * k[b, g, t, x] * slope_1[f]
                # The query reads the model after that step.
                scale = token_scale[b, g, t]
                for h in range(g * group, (g + 1) * group):
                    for f in range(hidden):
                        u = c1[b, g, f] - scale * c1_gradient[b, g, f]
                        for x in range(d):
                            u += q[b, h, t, x] * (w1[b, g, x, f] - scale * w1_gradient[b, g, x, f])
                        active[f] = 0.5 * u * (1.0 + math.tanh(bend * (u + 0.044715 * u * u * u)))
                    mean = var = 0.0
                    for y in range(d):
                        z[y] = c2[b, g, y] - scale * c2_gradient[b, g, y]
                        for f in range(hidden):
                            z[y] += active[f] * (w2[b, g, f, y] - scale * w2_gradient[b, g, f, y])
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
                        c2[b, g, y] -= scale * c2_gradient[b, g, y]
                        c2_gradient[b, g, y] = 0.0
                    for f in range(hidden):
                        c1[b, g, f] -= scale * c1_gradient[b, g, f]
                        c1_gradient[b, g, f] = 0.0
                        for x in range(d):
                            w1[b, g, x, f] -= scale * w1_gradient[b, g, x, f]
                            w2[b, g, f, x] -= scale * w2_gradient[b, g, f, x]
                            w1_gradient[b, g, x, f] = w2_gradient[b, g, f, x] = 0.0
    return out, memory, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, position


def vectorized(x, params):
    """Mini-batch by mini-batch in its dual form, both layers: gradients of all tokens at one model, and what they add up to by products of tokens."""
    return each_sequence(lambda one: of_sequence(one, **params), x, ("norm_weight", "norm_bias"))


def gelu(u):
    """And its slope."""
    bend = 0.7978845608028654  # sqrt(2/pi)
    bent = np.tanh(bend * (u + 0.044715 * u * u * u))
    return 0.5 * u * (1.0 + bent), 0.5 * (1.0 + bent) + 0.5 * u * (1.0 - bent * bent) * bend * (1.0 + 3.0 * 0.044715 * u * u)


def of_sequence(x, mini_batch, eps):
    n, group, start = x["q"].shape[1], x["q"].shape[0] // x["k"].shape[0], int(x["initial_position"])
    names = [[which + number + of for of in ("", "_gradient") for which in ("w", "c")] for number in "12"]
    first_layer, second_layer = (tuple(x["initial_" + name] for name in one) for one in names)
    weight, bias, outs, memories = x["norm_weight"][:, None], x["norm_bias"][:, None], [], []

    def read_by(*arrays):
        return tuple(np.repeat(a, group, axis=0) for a in arrays)

    for first, last, ends in training.stretches(start, n, mini_batch):
        q, k, v, eta, scale = (x[name][:, first:last] for name in ("q", "k", "v", "eta", "token_scale"))
        active, slope = gelu(k @ first_layer[0] + first_layer[1][:, None])
        back = training.loss_slope(active @ second_layer[0] + second_layer[1][:, None], v - k, weight, bias, eps)
        first_steps = eta[..., None] * slope * (back @ np.swapaxes(second_layer[0], -1, -2))
        steps = eta[..., None] * back
        own_scale, *own = read_by(scale[..., None], k, first_steps, active, steps)
        inner = gelu(training.under_way(q, read_by(*first_layer), own_scale, *own[:2]))[0]
        memories.append(training.under_way(inner, read_by(*second_layer), own_scale, *own[2:]))
        own_weight, own_bias = read_by(weight, bias)
        outs.append(q + own_weight * training.normalised(memories[-1], eps)[0] + own_bias)
        first_layer = training.after(first_layer, scale[:, -1:], k, first_steps, ends)
        second_layer = training.after(second_layer, scale[:, -1:], active, steps, ends)
    carried = dict(zip([name for one in names for name in one], first_layer + second_layer, strict=True))
    out, memory = (np.concatenate(parts, axis=1) for parts in (outs, memories))
    return {"out": out, "memory": memory, **carried, "position": x["initial_position"] + float(n)}


TOKENS = ("q", "k", "v", "eta", "token_scale")
CARRIED = ("w1", "w2", "c1", "c2", "w1_gradient", "c1_gradient", "w2_gradient", "c2_gradient", "position")


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


def steps_and_scale_are_a_product(run, x):
    x = with_scale(x)
    return run(x, mini_batch=2), run({**x, "eta": 0.25 * x["eta"], "token_scale": 4.0 * x["token_scale"]}, mini_batch=2)


def without_hidden_units_the_offset_learns(run, x):
    """With both layers 0 it is TTT-Linear whose keys are 0, but for the target."""
    nothing = {name: np.zeros_like(x[name]) for name in ("initial_w1", "initial_w2")}
    rest = {name: x[name] for name in ("q", "eta", "norm_weight", "norm_bias")}
    linear = {**rest, "k": np.zeros_like(x["k"]), "v": x["v"] - x["k"]}
    return run({**x, **nothing}, mini_batch=2, returns=("out", "c2")), run(linear, name="ttt_linear", mini_batch=2, returns=("out", "offset"))


def without_steps_it_is_the_network(run, x):
    group = x["q"].shape[1] // x["k"].shape[1]
    w1, w2 = (np.repeat(x[name], group, axis=1) for name in ("initial_w1", "initial_w2"))
    weight, bias = (np.repeat(x[name], group, axis=0) for name in ("norm_weight", "norm_bias"))
    u = x["q"] @ w1
    z = 0.5 * u * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3))) @ w2
    normal = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    return run({**x, "eta": np.zeros_like(x["eta"])}), x["q"] + weight[:, None] * normal + bias[:, None]


VARIANT = Variant(
    name="ttt_mlp",
    family="learner",
    summary="TTT-MLP: a two-layer network trained on the tokens it reads, one gradient step per mini-batch.",
    equation="w_t = w_0 - token_scale_t sum_j eta_j d/dw |LN(w2^T gelu(w1^T k_j + c1) + c2) - (v_j - k_j)|^2 / 2, out_t = q_t + LN(...(q_t; w_t))",
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
        where="section 2.7",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries: the test view"),
        Operand("k", "B Hkv T D", "keys: the training view"),
        Operand("v", "B Hkv T D", "values: the label view"),
        Operand("eta", "B Hkv T", "step of a token's gradient", draw=lambda rng, shape: rng.uniform(0.05, 0.5, shape)),
        Operand("norm_weight", "Hkv D", "weight of the normalisation", draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
        Operand("norm_bias", "Hkv D", "bias of the normalisation", draw=lambda rng, shape: 0.5 * rng.standard_normal(shape)),
        Operand("initial_w1", "B Hkv D F", "first layer before the mini-batch under way", draw=lambda rng, shape: 0.5 * rng.standard_normal(shape)),
        Operand("initial_w2", "B Hkv F D", "second layer before the mini-batch under way", draw=lambda rng, shape: 0.5 * rng.standard_normal(shape)),
        Operand("token_scale", "B Hkv T", "factor of all steps of the mini-batch up to a token", absent=1.0),
        Operand("initial_c1", "B Hkv F", "offset of the first layer", absent=0.0),
        Operand("initial_c2", "B Hkv D", "offset of the second layer", absent=0.0),
        Operand("initial_w1_gradient", "B Hkv D F", "the mini-batch's gradients of w1 so far, times their steps", absent=0.0),
        Operand("initial_c1_gradient", "B Hkv F", "the mini-batch's gradients of c1 so far, times their steps", absent=0.0),
        Operand("initial_w2_gradient", "B Hkv F D", "the mini-batch's gradients of w2 so far, times their steps", absent=0.0),
        Operand("initial_c2_gradient", "B Hkv D", "the mini-batch's gradients of c2 so far, times their steps", absent=0.0),
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
        Output("w1", "B Hkv D F", "first layer before the mini-batch under way", wide=True),
        Output("w2", "B Hkv F D", "second layer before the mini-batch under way", wide=True),
        Output("c1", "B Hkv F", "offset of the first layer", wide=True),
        Output("c2", "B Hkv D", "offset of the second layer", wide=True),
        Output("w1_gradient", "B Hkv D F", "the mini-batch's gradients of w1 so far, times their steps", wide=True),
        Output("c1_gradient", "B Hkv F", "the mini-batch's gradients of c1 so far, times their steps", wide=True),
        Output("w2_gradient", "B Hkv F D", "the mini-batch's gradients of w2 so far, times their steps", wide=True),
        Output("c2_gradient", "B Hkv D", "the mini-batch's gradients of c2 so far, times their steps", wide=True),
        Output("position", "B", "number of tokens so far", wide=True),
    ),
    params=(
        Param("mini_batch", Integer(at_least=1), 16, "tokens whose gradients are taken at the same model", tries=(1, 3)),
        Param("eps", Number(above=0.0), 1e-6, "added to the variance", tries=(0.5,)),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops="B*(T*(Hkv*(12*D*F + 25*F + 21*D + 4) + Hq*(8*D*F + 11*F + 10*D + 4)) + Hkv*(T//mini_batch)*2*(2*D*F + F + D))",
        memory="B*(2*Hq*T*D + 2*Hkv*(2*D*F + F + D) + 1) + 2*F + 2*D",
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
                "initial_w1": [[[[0.0], [0.0]]]],
                "initial_w2": [[[[0.0, 0.0]]]],
            },
            params={"eps": 0.75, "mini_batch": 2},
            returns={
                "memory": [[[[0.5 / 0.75**0.5, -0.5 / 0.75**0.5]] * 2]],
                "c2": [[[0.5 / 0.75**0.5, -0.5 / 0.75**0.5]]],
                "w1": [[[[0.0], [0.0]]]],
                "w2": [[[[0.0, 0.0]]]],
                "c2_gradient": [[[0.0, 0.0]]],
            },
            source="by hand: with layers of 0 only c2 learns: -(v - k), centred, is (-2, 2) and 0; a step of 1/4 over sqrt(eps)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on, in the middle of a mini-batch too", cut_and_carried_on),
        Identity("only the product of steps and token scale counts", steps_and_scale_are_a_product),
        Identity("with layers of 0 its offset is TTT-Linear's on keys of 0", without_hidden_units_the_offset_learns),
        Identity("without steps it is the network of its initial weights", without_steps_it_is_the_network),
    ),
)
