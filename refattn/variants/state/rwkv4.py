"""RWKV-4: in every channel a mean of the values, weighted by the exponential of their keys and of their age; the token itself has a bonus.

    out_t = (sum_{j < t} exp((t - 1 - j) gate + k_j) v_j + exp(bonus + k_t) v_t) / (sum_{j < t} exp((t - 1 - j) gate + k_j) + exp(bonus + k_t))

Channel by channel; there are no heads and no queries.  gate is -w and bonus is u of the paper's equation 16, its wkv; the receptance
sigmoid(r) that multiplies it, the mixing with the previous token and the projections are not here.  Nothing is divided when a token is read
for the first time: it alone has the bonus, and it fades only from the token after the next.

All exponents are taken relative to a running maximum (the paper's appendix on the recursive form):

    m_t = max(m_{t-1} + gate, k_t),   a_t = exp(m_{t-1} + gate - m_t) a_{t-1} + exp(k_t - m_t) v_t,   b_t the same of ones

``state``, ``mass`` and ``max`` are a, b and m after the last token, and ``initial_state``, ``initial_mass`` and ``initial_max`` those
before the first, so that a sequence can be cut anywhere.  The three go together: a state whose maximum is -inf counts for nothing.  A key
of -inf is a token that is not there; where there has been no other, the output is 0.  A gate of -inf forgets everything but the token
before.

What people get wrong: the gate is a natural logarithm here; transformers passes the parameter whose negative exponential it is, the rwkv
package the logarithm itself.  transformers starts the maximum at -1e38, which a key of -inf does not survive.  Fading the previous token
too.

Checked against transformers' rwkv_linear_attention_cpu (values, gradients, state) and the time mixing of the rwkv package.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Recurrence, Reduction, Variant, Write


def define(k, v, gate, bonus, initial_state, initial_mass, initial_max):
    batch, n, d = k.shape
    out = np.zeros((batch, n, d))
    state = np.zeros((batch, d))  # a
    mass = np.zeros((batch, d))  # b
    top = np.zeros((batch, d))  # m
    for b in range(batch):
        for x in range(d):
            state[b, x], mass[b, x], top[b, x] = initial_state[b, x], initial_mass[b, x], initial_max[b, x]
            for t in range(n):
                own = bonus[x] + k[b, t, x]
                high = top[b, x] if own <= top[b, x] else own  # NaN must win
                if high != -np.inf:
                    old, new = math.exp(top[b, x] - high), math.exp(own - high)
                    out[b, t, x] = (old * state[b, x] + new * v[b, t, x]) / (old * mass[b, x] + new)
                faded = top[b, x] + gate[x]
                high = faded if k[b, t, x] <= faded else k[b, t, x]
                old = new = 0.0
                if high != -np.inf:
                    old, new = math.exp(faded - high), math.exp(k[b, t, x] - high)
                state[b, x] = old * state[b, x] + new * v[b, t, x]
                mass[b, x] = old * mass[b, x] + new
                top[b, x] = high
    return out, state, mass, top


def reduction(dims, params):
    """A sum of values and one of ones, held at exp(-m), that are read before the token is written; the token's own share comes after."""

    def maxima(x):
        """m before the first token and after every one: the largest of all k_j + (t - j) gate."""
        ages = np.arange(dims["T"] + 1)[:, None] * x["gate"]
        forgetting = x["gate"] == -np.inf
        ages = np.where(forgetting, 0.0, ages)
        keys = np.concatenate([x["initial_max"][:, None], x["k"]], axis=1)
        return np.where(forgetting, keys, np.maximum.accumulate(keys - ages, axis=1) + ages)

    def operands(x):
        m = maxima(x)
        before, after = m[:, :-1], np.where(m[:, 1:] == -np.inf, 0.0, m[:, 1:])
        ones = np.ones(x["v"].shape)[..., None]
        return {
            "k": np.exp(x["k"] - after),
            "v": np.concatenate([x["v"][..., None], ones], axis=3),
            "gate": before + x["gate"] - after,
            "initial_state": np.concatenate([x["initial_state"][..., None], x["initial_mass"][..., None]], axis=2),
        }

    def outputs(x, found):
        m = maxima(x)
        before, own = m[:, :-1], x["bonus"] + x["k"]
        high = np.maximum(before, own)
        high = np.where(high == -np.inf, 0.0, high)
        old, new = np.exp(before - high), np.exp(own - high)
        mass = old * found["out"][..., 1] + new
        out = (old * found["out"][..., 0] + new * x["v"]) / np.where(mass == 0.0, np.inf, mass)
        return {"out": out, "state": found["state"][..., 0], "mass": found["state"][..., 1], "max": m[:, -1]}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), query=(), log_decay=("gate",), exclusive=True, heads="M"),
        {"k": "B T M", "v": "B T M 2", "gate": "B T M", "initial_state": "B M 2", "out": "B T M 2"},
        operands,
        outputs,
    )


CARRIED = ("state", "mass", "max")


def cut_and_carried_on(run, x):
    half = x["k"].shape[1] // 2
    one = {**x, **{name: x[name][:, :half] for name in ("k", "v")}}
    two = {**x, **{name: x[name][:, half:] for name in ("k", "v")}}
    out_1, *carried = run(one, returns=("out", *CARRIED))
    out_2, *carried = run({**two, **{"initial_" + name: c for name, c in zip(CARRIED, carried, strict=True)}}, returns=("out", *CARRIED))
    return run(x, returns=("out", *CARRIED)), (np.concatenate([out_1, out_2], axis=1), *carried)


def shifted_keys(run, x):
    shift = np.linspace(-3.0, 3.0, x["k"].shape[2])
    out, state, mass, top = run(x, returns=("out", *CARRIED))
    return (out, state, mass, top + shift), run({**x, "k": x["k"] + shift}, returns=("out", *CARRIED))


def softmax_with_ages(run, x):
    batch, n, d = x["k"].shape
    age = np.arange(n)[:, None] - np.arange(n)
    faded = (age - 1) * x["gate"][:, None, None]
    bias = np.swapaxes(x["k"], 1, 2)[:, :, None] + np.where(age > 0, faded, x["bonus"][:, None, None])
    nothing = np.zeros((batch, d, n, 1))
    values = np.swapaxes(x["v"], 1, 2)[..., None]
    out = run({"q": nothing, "k": nothing, "v": values, "bias": bias}, name="softmax", causal=True, returns="out")
    return run(x), np.swapaxes(out[..., 0], 1, 2)


def first_token(run, x):
    return run(x)[:, :1], x["v"][:, :1]


VARIANT = Variant(
    name="rwkv4",
    family="state",
    summary="RWKV-4's wkv: per channel a mean of the values, weighted by the exponentials of key and age, with a bonus for the token itself.",
    equation="out_t = (sum_{j<t} e^((t-1-j) gate + k_j) v_j + e^(bonus + k_t) v_t) / (sum_{j<t} e^((t-1-j) gate + k_j) + e^(bonus + k_t))",
    paper=Paper(
        title="RWKV: Reinventing RNNs for the Transformer Era",
        authors=(
            "Peng, Bo",
            "Alcaide, Eric",
            "Anthony, Quentin",
            "Albalak, Alon",
            "Arcadinho, Samuel",
            "Biderman, Stella",
            "Cao, Huanqi",
            "Cheng, Xin",
            "Chung, Michael",
            "Derczynski, Leon",
            "Du, Xingjian",
            "Grella, Matteo",
            "GV, Kranthi Kiran",
            "He, Xuzheng",
            "Hou, Haowen",
            "Kazienko, Przemysław",
            "Kocoń, Jan",
            "Kong, Jiaming",
            "Koptyra, Bartłomiej",
            "Lau, Hayden",
            "Lin, Jiaju",
            "Mantri, Krishna Sri Ipsit",
            "Mom, Ferdinand",
            "Saito, Atsushi",
            "Song, Guangyu",
            "Tang, Xiangru",
            "Wind, Johan S.",
            "Woźniak, Stanisław",
            "Zhang, Zhenyuan",
            "Zhou, Qinghua",
            "Zhu, Jian",
            "Zhu, Rui-Jie",
        ),
        year=2023,
        arxiv="2305.13048",
        where="section 3, the wkv operator, and the appendix on its recursive form",
    ),
    operands=(
        Operand("k", "B T M", "keys: logarithms of the weights"),
        Operand("v", "B T M", "values"),
        Operand(
            "gate",
            "M",
            "-w, natural logarithm of the factor by which the past fades with every token",
            draw=lambda rng, shape: -rng.uniform(0.0, 2.0, shape),
        ),
        Operand("bonus", "M", "u, added to the key of the token itself"),
        Operand("initial_state", "B M", "weighted sum of the values before the first token", absent=0.0),
        Operand("initial_mass", "B M", "sum of their weights", absent=0.0, draw=lambda rng, shape: rng.uniform(0.5, 2.0, shape)),
        Operand("initial_max", "B M", "logarithm that state and mass are relative to", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B T M", "weighted means, before the receptance"),
        Output("state", "B M", "weighted sum of the values after the last token, times exp(-max)", wide=True),
        Output("mass", "B M", "sum of their weights, times exp(-max)", wide=True),
        Output("max", "B M", "largest logarithm of a weight so far, faded", wide=True),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(flops="B*T*M*21", memory="B*M*(T + 3)"),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={"k": [[[0.0], [math.log(2.0)], [0.0]]], "v": [[[4.0], [7.0], [6.0]]], "gate": [-math.log(2.0)], "bonus": [math.log(3.0)]},
            returns={
                "out": [[[4.0], [46.0 / 7.0], [34.0 / 5.5]]],
                "state": [[14.0]],
                "mass": [[2.25]],
                "max": [[0.0]],
            },
            source="by hand: (4 + 6 x 7)/(1 + 6), then (2 + 14 + 3 x 6)/(1/2 + 2 + 3); state 1 + 7 + 6, mass 1/4 + 1 + 1",
        ),
        Example(
            operands={"k": [[[-1000.0], [1000.0], [1000.0]]], "v": [[[5.0], [2.0], [8.0]]], "gate": [0.0], "bonus": [0.0]},
            returns={"out": [[[5.0], [2.0], [5.0]]], "state": [[10.0]], "mass": [[2.0]], "max": [[1000.0]]},
            source="by hand: the last two weigh the same, and exp(2000) times the first",
        ),
        Example(
            operands={"k": [[[-math.inf], [0.0], [-math.inf]]], "v": [[[5.0], [2.0], [9.0]]], "gate": [-math.inf], "bonus": [0.0]},
            returns={"out": [[[0.0], [2.0], [2.0]]], "state": [[0.0]], "mass": [[0.0]], "max": [[-math.inf]]},
            source="by hand: the first and the last token are not there, and the second is forgotten after the last",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state, mass and maximum", cut_and_carried_on),
        Identity("a constant added to every key of a channel is added to the maximum and changes nothing else", shifted_keys),
        Identity("it is causal softmax attention per channel, with keys and ages for a bias and no other score", softmax_with_ages),
        Identity("the first token returns its value", first_token),
    ),
)
