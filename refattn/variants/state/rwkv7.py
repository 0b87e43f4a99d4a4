"""RWKV-7's time mixing: a state that fades row by row, forgets what it held at a removal key, and takes in a value at a replacement key.

    S_t   = diag(w_t) S_{t-1} - (a_t * kappa_t) (S_{t-1}^T kappa_t)^T + k_t v_t^T,   w_t = exp(gate_t)
    out_t = scale * S_t^T q_t

In the paper's letters q is the receptance r, k the replacement key k~, kappa the removal key, of length 1 per head, and a the in-context
learning rate, per channel in (0, 1); its state is the transpose of this one.  Always causal.  S_{-1} is ``initial_state`` (0 if absent), and
``state`` is S after the last token, so a sequence can be cut anywhere and carried on.  ``gate`` is the natural logarithm of w; -inf forgets
the channel.  Query head h reads the state of key-value head ``h // (Hq // Hkv)``; the paper has Hq == Hkv.  The scale is 1 by default, as
in the paper.

This is the WKV operator.  The layer makes its operands: w = exp(-exp(-1/2) sigmoid(.)), so that the gate lies in (-0.6065, 0); kappa = k xi
normalised; k~ = k (1 + (a - 1) alpha); values mixed with the first layer's.  It normalises the output per head (eps 64e-5) and only then adds the
bonus (sum_x r_x k~_x rho_x) v, which is therefore no part of the state's answer.

What people get wrong: reading the removal from the faded state, as the delta family does; here it is the old one.  The sign and order of a and
b: kernels take -kappa and kappa * a.  The constant exp(-1/2), which the rwkv package rounds to 0.606531.  The scale: flash-linear-attention's
kernel takes 1/sqrt(D) when given None, its layer gives 1.

Checked against the loop of the rwkv package's model, MLX-LM's step and flash-linear-attention's DPLR references.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, kappa, a, initial_state, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    fading = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                for x in range(d):
                    fading[x] = math.exp(gate[b, g, t, x])
                for y in range(d_v):
                    held = 0.0  # what the old state answers at the removal key
                    for x in range(d):
                        held += kappa[b, g, t, x] * state[b, g, x, y]
                    for x in range(d):
                        removed = a[b, g, t, x] * kappa[b, g, t, x] * held
                        state[b, g, x, y] = fading[x] * state[b, g, x, y] - removed + k[b, g, t, x] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=("a", "kappa"), erase=("kappa",), old=True), Write(key=("k",), value=("v",))),
        log_decay=("gate",),
        scale=params["scale"],
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def as_dplr(run, x):
    plain = {name: x[name] for name in ("q", "k", "v", "gate")}
    general = {**plain, "a": -x["kappa"], "b": x["a"] * x["kappa"]}
    return run(x, returns=("out", "state")), run(general, name="dplr", scale=1.0, returns=("out", "state"))


def unfading_with_one_rate_is_delta(run, x):
    """Without fading, with removal and replacement key the same up to one rate per token, RWKV-7 is the delta rule."""
    rate = x["a"][..., 0]
    tied = {**x, "gate": 0.0 * x["gate"], "a": np.broadcast_to(rate[..., None], x["a"].shape), "k": rate[..., None] * x["kappa"]}
    plain = {"q": x["q"], "k": x["kappa"], "v": x["v"], "beta": rate}
    return run(tied, returns=("out", "state")), run(plain, name="delta", scale=1.0, returns=("out", "state"))


def nothing_removed_is_gated_linear_attention(run, x):
    plain = {name: x[name] for name in ("q", "k", "v", "gate")}
    return run({**x, "a": 0.0 * x["a"]}, returns=("out", "state")), run(plain, name="gla", scale=1.0, returns=("out", "state"))


def as_products_of_transitions(run, x):
    """Everything written, carried to each token by the product of the transitions in between."""
    fading = np.exp(x["gate"])[..., None, :]
    transition = np.eye(fading.shape[-1]) * fading - (x["a"] * x["kappa"])[..., :, None] * x["kappa"][..., None, :]
    written = x["k"][..., :, None] * x["v"][..., None, :]
    states = np.zeros_like(written)
    for t in range(written.shape[2]):
        product = np.eye(written.shape[3])
        for j in range(t, -1, -1):
            states[:, :, t] += product @ written[:, :, j]
            product = product @ transition[:, :, j]
    out = 0.5 * np.einsum("bhtx,bhtxy->bhty", x["q"], np.repeat(states, x["q"].shape[1] // states.shape[1], axis=1))
    return run(x, scale=0.5, returns=("out", "state")), (out, states[:, :, -1])


VARIANT = Variant(
    name="rwkv7",
    family="state",
    summary="RWKV-7: a state that fades row by row, forgets at a removal key and takes in at a replacement key.",
    equation="S_t = diag(exp(gate_t)) S_(t-1) - (a_t * kappa_t) (S_(t-1)^T kappa_t)^T + k_t v_t^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title='RWKV-7 "Goose" with Expressive Dynamic State Evolution',
        authors=(
            "Peng, Bo",
            "Zhang, Ruichong",
            "Goldstein, Daniel",
            "Alcaide, Eric",
            "Du, Xingjian",
            "Hou, Haowen",
            "Lin, Jiaju",
            "Liu, Jiaxing",
            "Lu, Janna",
            "Merrill, William",
            "Song, Guangyu",
            "Tan, Kaifeng",
            "Utpala, Saiteja",
            "Wilce, Nathan",
            "Wind, Johan S.",
            "Wu, Tianyi",
            "Wuttke, Daniel",
            "Zhou-Zheng, Christian",
        ),
        year=2025,
        arxiv="2503.14456",
        where="section 4",
    ),
    operands=(
        Operand("q", "B Hq T D", "receptances"),
        Operand("k", "B Hkv T D", "replacement keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the factors w by which rows of the state fade",
            draw=lambda rng, shape: rng.uniform(-0.6, 0.0, shape),
        ),
        Operand(
            "kappa",
            "B Hkv T D",
            "removal keys, not normalised here",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand("a", "B Hkv T D", "in-context learning rates", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q", tries=(0.37,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*T*(Hkv*(D + 8*D*E) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E) + D",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 2.0]]]],
                "k": [[[[1.0, -1.0]]]],
                "v": [[[[3.0]]]],
                "gate": [[[[math.log(0.5), 0.0]]]],
                "kappa": [[[[1.0, 0.5]]]],
                "a": [[[[1.0, 0.5]]]],
                "initial_state": [[[[4.0], [8.0]]]],
            },
            returns={"out": [[[[3.0]]]], "state": [[[[-3.0], [3.0]]]]},
            source="by hand: held 4 + 4 = 8; S = (2, 8) - 8 (1, 1/4) + 3 (1, -1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is diagonal plus low rank with a = -kappa and b = a kappa", as_dplr),
        Identity("without fading and with one rate it is the delta rule", unfading_with_one_rate_is_delta),
        Identity("with nothing removed it is gated linear attention", nothing_removed_is_gated_linear_attention),
        Identity("what is written is carried on by products of transitions", as_products_of_transitions),
    ),
)
