"""RWKV-5, the time mixing of Eagle: a state whose rows fade by fixed factors, read before the token is written.

    out_t = scale * q_t^T (S_{t-1} + (bonus * k_t) v_t^T)
    S_t   = exp(gate) * S_{t-1} + k_t v_t^T            row x of S fades by exp(gate_x), the paper's w

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token.  The paper calls queries receptance r
and the bonus u, one per key channel; a token sees itself through the bonus only.  Its w = exp(-exp(omega)) is the factor, learned and the
same for every token, so gate = -exp(omega) is w's natural logarithm.  Query head h reads state head ``h // (Hq // Hkv)``; the paper has
Hq == Hkv, and no scale.

Token shift before, and the group norm (eps 64e-5) and SiLU gate after, are not here.

What people get wrong: reading after the write; the versions: 5.0 has one factor and one bonus a head and no gate, 5.1 adds the gate, 5.2,
the paper's Eagle, has a factor and a bonus for every channel; powers of the factor shifted by one between the score and the state (the
state of a token is read by the next one unfaded).

Checked against the rwkv package's functions, token by token (att_one_v5, att_one_v5_1) and as a whole sequence
(att_seq_v5, att_seq_v5_1, att_seq_v5_2).
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, bonus, initial_state, scale):
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
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * (state[b, g, x, y] + bonus[g, x] * k[b, g, t, x] * v[b, g, t, y])
                        out[b, h, t, y] *= scale
                for x in range(d):
                    w = math.exp(gate[g, x])
                    for y in range(d_v):
                        state[b, g, x, y] = w * state[b, g, x, y] + k[b, g, t, x] * v[b, g, t, y]
    return out, state


def recurrence(dims, params):
    writes = (Write(key=("k",), value=("v",)),)
    return Recurrence(writes=writes, log_decay=("gate",), scale=params["scale"], exclusive=True, bonus=("bonus",))


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one = {**x, **{name: x[name][:, :, :half] for name in ("q", "k", "v")}}
    two = {**x, **{name: x[name][:, :, half:] for name in ("q", "k", "v")}}
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def without_memory(run, x):
    """A gate of -inf leaves the token before, which fades only for the one after."""
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    own = np.sum(x["q"] * k * np.repeat(x["bonus"], group, axis=0)[:, None], axis=-1, keepdims=True) * v
    before = np.zeros_like(own)
    before[:, :, 1:] = np.sum(x["q"][:, :, 1:] * k[:, :, :-1], axis=-1, keepdims=True) * v[:, :, :-1]
    return run({**x, "gate": np.full_like(x["gate"], -np.inf)}), own + before


def bonus_one_is_retention(run, x):
    """One unfaded head of bonus 1 is retention, inclusive."""
    given = {name: x[name] for name in ("q", "k", "v")}
    unfaded = {**given, "gate": np.zeros_like(x["gate"]), "bonus": np.ones_like(x["bonus"])}
    decay = np.ones(x["k"].shape[1])
    return run(unfaded, returns=("out", "state")), run({**given, "decay": decay}, name="retention", scale=1.0, returns=("out", "state"))


def paired_tokens(run, x):
    """The sum over pairs, powers of the factor taken from the distance."""
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v, gate, bonus = (np.repeat(x[name], group, axis=1 if x[name].ndim == 4 else 0) for name in ("k", "v", "gate", "bonus"))
    n = x["q"].shape[2]
    distance = np.subtract.outer(np.arange(n), np.arange(n))
    weight = np.where(distance[..., None] > 0, np.exp(gate[:, None, None] * np.maximum(distance - 1, 0)[..., None]), 0.0)
    weight[:, np.arange(n), np.arange(n)] = bonus[:, None]
    return run(x), np.einsum("bhtd,htsd,bhsd,bhse->bhte", x["q"], weight, k, v)


VARIANT = Variant(
    name="rwkv5",
    family="state",
    summary="RWKV-5 (Eagle): a state whose rows fade by fixed factors, read before the token is written, which has a bonus instead.",
    equation="out_t = scale q_t^T (S_(t-1) + (bonus * k_t) v_t^T), S_t = exp(gate) * S_(t-1) + k_t v_t^T",
    paper=Paper(
        title="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
        authors=(
            "Peng, Bo",
            "Goldstein, Daniel",
            "Anthony, Quentin",
            "Albalak, Alon",
            "Alcaide, Eric",
            "Biderman, Stella",
            "Cheah, Eugene",
            "Du, Xingjian",
            "Ferdinan, Teddy",
            "Hou, Haowen",
            "Kazienko, Przemysław",
            "GV, Kranthi Kiran",
            "Kocoń, Jan",
            "Koptyra, Bartłomiej",
            "Krishna, Satyapriya",
            "McClelland, Ronald, Jr.",
            "Lin, Jiaju",
            "Muennighoff, Niklas",
            "Obeid, Fares",
            "Saito, Atsushi",
            "Song, Guangyu",
            "Tu, Haoqin",
            "Wirawan, Cahya",
            "Woźniak, Stanisław",
            "Zhang, Ruichong",
            "Zhao, Bingchen",
            "Zhao, Qihang",
            "Zhou, Peng",
            "Zhu, Jian",
            "Zhu, Rui-Jie",
        ),
        year=2024,
        arxiv="2404.05892",
        where="section 4.1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, the paper's receptance"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate", "Hkv D", "natural logarithm of the factor by which a row of the state fades", draw=lambda rng, shape: -rng.exponential(0.5, shape)
        ),
        Operand("bonus", "Hkv D", "weight of a token's own key, channel by channel"),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output, before any normalisation or gate"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q . S", tries=(0.37,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(flops="B*T*(Hkv*D*(3*E + 1) + Hq*E*(5*D + 1))", memory="B*(Hq*T*E + Hkv*D*E)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [2.0]]]],
                "k": [[[[1.0], [1.0], [1.0]]]],
                "v": [[[[8.0], [4.0], [2.0]]]],
                "gate": [[-math.log(2.0)]],
                "bonus": [[3.0]],
                "initial_state": [[[[2.0]]]],
            },
            returns={"out": [[[[26.0], [21.0], [29.0]]]], "state": [[[[6.25]]]]},
            source="by hand: reads 2 + 24, 9 + 12, 2 (8.5 + 6); S = 1 + 8, then 4.5 + 4, then 4.25 + 2",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("with gate -inf a token sees itself and the one before", without_memory),
        Identity("unfaded and of bonus 1 it is unfaded retention", bonus_one_is_retention),
        Identity("every token reads every earlier one, faded for the tokens between, and itself by the bonus", paired_tokens),
    ),
)
