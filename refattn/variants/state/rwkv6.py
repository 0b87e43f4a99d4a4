"""RWKV-6, the time mixing of Finch: a state whose rows fade by factors given with every token, read before the token is written.

    out_t = scale * q_t^T (S_{t-1} + (bonus * k_t) v_t^T)
    S_t   = exp(gate_t) * S_{t-1} + k_t v_t^T          row x of S fades by exp(gate_tx), the paper's w

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token.  The paper calls queries receptance r
and the bonus u, one per key channel; a token sees itself through the bonus only.  Its w = exp(-exp(d)) is the factor, so gate = -exp(d)
is w's natural logarithm, -inf to forget the row.  Query head h reads state head ``h // (Hq // Hkv)``; the paper has Hq == Hkv, and no
scale.

Token shift and the low-rank mixing that makes r, k, v, d, and the group norm (eps 64e-5) and SiLU gate after, are not here.

What people get wrong: reading after the write; fading by the token's own factor what that token reads (it fades for the next one); the
scale, 1 here and in the paper, 1/sqrt(D) by default in flash-linear-attention's recurrent reference and absent from its chunked one,
which therefore disagree unless told; giving exp(gate), or d, where its logarithm is wanted.

Checked against flash-linear-attention (naive_recurrent_rwkv6, values and gradients, its hand-written backward too; naive_chunk_rwkv6) and
the rwkv package (att_seq_v6_0).
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
                    w = math.exp(gate[b, g, t, x])
                    for y in range(d_v):
                        state[b, g, x, y] = w * state[b, g, x, y] + k[b, g, t, x] * v[b, g, t, y]
    return out, state


def recurrence(dims, params):
    writes = (Write(key=("k",), value=("v",)),)
    return Recurrence(writes=writes, log_decay=("gate",), scale=params["scale"], exclusive=True, bonus=("bonus",))


TOKENS = ("q", "k", "v", "gate")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = ({**x, **{name: part(x[name]) for name in TOKENS}} for part in (lambda a: a[:, :, :half], lambda a: a[:, :, half:]))
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def one_gate_for_all_tokens(run, x):
    gate = x["gate"][0, :, 0]
    everywhere = np.broadcast_to(gate[:, None], x["gate"].shape)
    return run({**x, "gate": everywhere}, returns=("out", "state")), run({**x, "gate": gate}, name="rwkv5", returns=("out", "state"))


def gla_of_the_token_before(run, x):
    """Without a bonus it is gla whose keys, values and gates come one token late."""
    late = {name: np.concatenate([np.zeros_like(x[name][:, :, :1]), x[name][:, :, :-1]], axis=2) for name in ("k", "v", "gate")}
    return run({**x, "bonus": np.zeros_like(x["bonus"])}), run({"q": x["q"], **late}, name="gla", scale=1.0)


def bonus_one_sees_itself(run, x):
    unfaded = {**x, "gate": np.zeros_like(x["gate"]), "bonus": np.ones_like(x["bonus"])}
    return run(unfaded, scale=0.5), run({name: unfaded[name] for name in TOKENS}, name="gla", scale=0.5)


VARIANT = Variant(
    name="rwkv6",
    family="state",
    summary="RWKV-6 (Finch): a state of fading rows, read before the token is written, which has a bonus instead.",
    equation="out_t = scale q_t^T (S_(t-1) + (bonus * k_t) v_t^T), S_t = exp(gate_t) * S_(t-1) + k_t v_t^T",
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
        where="section 4.2",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, the paper's receptance"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the factor by which a row of the state fades",
            draw=lambda rng, shape: -rng.exponential(0.5, shape),
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
                "gate": [[[[-math.inf], [-math.log(2.0)], [-math.log(4.0)]]]],
                "bonus": [[3.0]],
                "initial_state": [[[[1.0]]]],
            },
            returns={"out": [[[[25.0], [20.0], [28.0]]]], "state": [[[[4.0]]]]},
            source="by hand: reads 1 + 24, 8 + 12, 2 (8 + 6); S = 0 + 8, then 4 + 4, then 2 + 2",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("one gate for all tokens is rwkv5", one_gate_for_all_tokens),
        Identity("without a bonus it is gla with keys, values and gates one token late", gla_of_the_token_before),
        Identity("unfaded and of bonus 1 it is unfaded gla", bonus_one_sees_itself),
    ),
)
