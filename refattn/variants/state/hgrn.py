"""HGRN: a gated linear recurrence of every channel by itself, whose forget gate also says how much of the input comes in.

    h_t   = f_t * h_{t-1} + (1 - f_t) * x_t,     f_t = exp(gate_t)
    out_t = h_t

All products are channel by channel.  Always causal.  h_{-1} is ``initial_state`` (0 if absent), and ``state`` is h after the last token.
gate is the natural logarithm of the forget gate; -inf replaces the channel by its input, 0 holds it.  The paper computes f = lb +
(1 - lb) * sigmoid(.) with a lower bound lb that grows with depth, and multiplies by an output gate after, neither of which is here.

This is the real recurrence, which the authors' later work and flash-linear-attention use.  In the paper h turns too, by a learned angle
theta per channel (f_t exp(i theta)), with an input of real and imaginary part; see `gateloop` for a recurrence that turns.

What people get wrong: giving x to functions that expect (1 - f) * x, as flash-linear-attention's do, or the reverse; computing 1 - f
after rounding f, which loses the digits of a gate near 0; its naive_chunk_hgrn, which runs only where one chunk holds the whole sequence.

Checked against flash-linear-attention (naive_recurrent_hgrn, values and gradients).
"""

import math

import numpy as np

from refattn.pieces.maps import one_minus_exp
from refattn.spec import Cost, Example, Factor, Identity, Operand, Output, Paper, Recurrence, Variant, Write


def define(x, gate, initial_state):
    batch, n, width = x.shape
    out = np.zeros((batch, n, width))
    state = np.zeros((batch, width))
    for b in range(batch):
        for m in range(width):
            state[b, m] = initial_state[b, m]
            for t in range(n):
                state[b, m] = math.exp(gate[b, t, m]) * state[b, m] - math.expm1(gate[b, t, m]) * x[b, t, m]
                out[b, t, m] = state[b, m]
    return out, state


def recurrence(dims, params):
    return Recurrence(writes=(Write(key=(Factor("gate", one_minus_exp),), value=("x",)),), query=(), log_decay=("gate",), heads="M")


def cut_and_carried_on(run, x):
    half = x["x"].shape[1] // 2
    out_1, state = run({name: a[:, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=1), state)


def one_head_a_channel(run, x):
    def heads(a):
        return np.swapaxes(a, 1, 2)[..., None]

    apart = {"q": np.ones_like(heads(x["x"])), "k": heads(-np.expm1(x["gate"])), "v": heads(x["x"]), "gate": heads(x["gate"])}
    out, state = run(apart, name="gla", scale=1.0, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.swapaxes(out[..., 0], 1, 2), state[:, :, 0, 0])


def constant_input(run, x):
    first = x["x"][:, 0]
    everywhere = np.broadcast_to(first[:, None], x["x"].shape)
    return run({**x, "x": everywhere, "initial_state": first}), everywhere


VARIANT = Variant(
    name="hgrn",
    family="state",
    summary="HGRN: a gated linear recurrence of every channel by itself (the real one).",
    equation="h_t = exp(gate_t) h_(t-1) + (1 - exp(gate_t)) x_t, out_t = h_t",
    paper=Paper(
        title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
        authors=("Qin, Zhen", "Yang, Songlin", "Zhong, Yiran"),
        year=2023,
        arxiv="2311.04823",
        where="section 3",
    ),
    operands=(
        Operand("x", "B T M", "inputs"),
        Operand("gate", "B T M", "natural logarithm of the forget gate", draw=lambda rng, shape: -rng.exponential(0.5, shape)),
        Operand("initial_state", "B M", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B T M", "the state after every token, before any output gate"),
        Output("state", "B M", "state after the last token", wide=True),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(flops="5*B*T*M", memory="B*M*(T + 1)"),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={"x": [[[8.0], [4.0], [2.0]]], "gate": [[[-math.log(2.0)], [-math.log(4.0)], [-math.inf]]], "initial_state": [[16.0]]},
            returns={"out": [[[12.0], [6.0], [2.0]]], "state": [[2.0]]},
            source="by hand: 16/2 + 8/2, then 12/4 + 3 * 4/4, then the input alone",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is gla with one head a channel, keys 1 - exp(gate) and queries 1", one_head_a_channel),
        Identity("an input that never changes is held, whatever the gates", constant_input),
    ),
)
