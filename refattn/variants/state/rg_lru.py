"""RG-LRU, the real-gated linear recurrent unit of Griffin and Hawk: every channel fades by its own learned factor, raised to a gated power.

    a_t   = sigmoid(Lambda)^(c r_t) = exp(-c softplus(-Lambda) r_t),     r = recurrence_gate, c = 8
    h_t   = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t),               i = input_gate
    out_t = h_t

All products are channel by channel.  Always causal.  h_{-1} is ``initial_state`` (0 if absent), and ``state`` is h after the last token.
The gates are given after their sigmoids.  A recurrence gate of inf starts the channel afresh: it forgets and takes the input whole.

What people get wrong: the sign of Lambda: transformers computes log a_t = -8 softplus(parameter) r_t, so its parameter is minus the
Lambda of the paper's equations and of these.  1 - a^2 computed from a rounded a, which loses the digits of slow channels
(here -expm1 of twice the logarithm).  The first token: transformers forgets, and takes the input whole, wherever the position is 0, where
the equation has sqrt(1 - a_0^2); a recurrence gate of inf says that here.  It also clips the gradient of the square root.

Checked against transformers' RecurrentGemma (RecurrentGemmaRglru, values and gradients).
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(x, recurrence_gate, input_gate, decay_logit, initial_state, c):
    batch, n, width = x.shape
    out = np.zeros((batch, n, width))
    state = np.zeros((batch, width))
    for m in range(width):
        softplus = max(-decay_logit[m], 0.0) + math.log1p(math.exp(-abs(decay_logit[m])))
        for b in range(batch):
            state[b, m] = initial_state[b, m]
            for t in range(n):
                log_a = -c * softplus * recurrence_gate[b, t, m]
                room = max(-math.expm1(2.0 * log_a), 0.0)  # 1 - a^2; negative only where differences step past a gate of 0
                entering = math.sqrt(room) * (input_gate[b, t, m] * x[b, t, m])
                state[b, m] = math.exp(log_a) * state[b, m] + entering
                out[b, t, m] = state[b, m]
    return out, state


def reduction(dims, params):
    """Channels that fade by their own factors and are written sqrt(1 - a^2) of the gated input."""

    def operands(x):
        softplus = np.logaddexp(0.0, -x["decay_logit"])
        gate = -params["c"] * softplus * x["recurrence_gate"]
        room = -np.expm1(2.0 * gate)
        root = np.where(room > 0.0, np.sqrt(np.where(room > 0.0, room, 1.0)), 0.0)
        return {"x": root * (x["input_gate"] * x["x"]), "gate": gate, "initial_state": x["initial_state"]}

    return Reduction(
        Recurrence((Write((), ("x",)),), query=(), log_decay=("gate",), heads="M"),
        {"x": "B T M", "gate": "B T M", "initial_state": "B M", "out": "B T M"},
        operands,
        lambda x, found: found,
    )


TOKENS = ("x", "recurrence_gate", "input_gate")


def cut_and_carried_on(run, x):
    half = x["x"].shape[1] // 2
    one, two = ({**x, **{name: part(x[name]) for name in TOKENS}} for part in (lambda a: a[:, :half], lambda a: a[:, half:]))
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=1), state)


def as_hgrn(run, x):
    """The same recurrence, which lets in 1 - a where this lets in sqrt(1 - a^2)."""
    gate = -8.0 * np.logaddexp(0.0, -x["decay_logit"]) * np.maximum(x["recurrence_gate"], 0.125)
    inputs = np.sqrt(-np.expm1(2.0 * gate)) / -np.expm1(gate) * x["input_gate"] * x["x"]
    x = {**x, "recurrence_gate": np.maximum(x["recurrence_gate"], 0.125)}
    return run(x, returns=("out", "state")), run({"x": inputs, "gate": gate}, name="hgrn", returns=("out", "state"))


def held(run, x):
    start = np.linspace(-1.0, 1.0, x["x"].shape[0] * x["x"].shape[2]).reshape(x["x"].shape[0], -1)
    shut = {**x, "recurrence_gate": np.zeros_like(x["x"]), "initial_state": start}
    return run(shut), np.broadcast_to(start[:, None], x["x"].shape)


def afresh(run, x):
    start = np.full(x["x"][:, 0].shape, 3.0)
    return run({**x, "recurrence_gate": np.full_like(x["x"], np.inf), "initial_state": start}), x["input_gate"] * x["x"]


VARIANT = Variant(
    name="rg_lru",
    family="state",
    summary="RG-LRU (Griffin, Hawk): every channel fades by its own learned factor, raised to a gated power.",
    equation="a_t = sigmoid(Lambda)^(c r_t), h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t x_t, out_t = h_t",
    paper=Paper(
        title="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
        authors=(
            "De, Soham",
            "Smith, Samuel L.",
            "Fernando, Anushan",
            "Botev, Aleksandar",
            "Cristian-Muraru, George",
            "Gu, Albert",
            "Haroun, Ruba",
            "Berrada, Leonard",
            "Chen, Yutian",
            "Srinivasan, Srivatsan",
            "Desjardins, Guillaume",
            "Doucet, Arnaud",
            "Budden, David",
            "Teh, Yee Whye",
            "Pascanu, Razvan",
            "De Freitas, Nando",
            "Gulcehre, Caglar",
        ),
        year=2024,
        arxiv="2402.19427",
        where="section 2.4, equations 1 to 4",
    ),
    operands=(
        Operand("x", "B T M", "inputs"),
        Operand(
            "recurrence_gate",
            "B T M",
            "power of the factor, in units of c; inf starts afresh",
            within=(0.0, math.inf),
            draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape),
        ),
        Operand("input_gate", "B T M", "factor of the input", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("decay_logit", "M", "Lambda, logit of the factor", draw=lambda rng, shape: rng.normal(3.0, 2.0, shape)),
        Operand("initial_state", "B M", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B T M", "the state after every token"),
        Output("state", "B M", "state after the last token", wide=True),
    ),
    params=(Param("c", Number(above=0.0), 8.0, "multiplies the recurrence gate", tries=(1.0,)),),
    define=define,
    reduction=reduction,
    cost=Cost(flops="M*(3 + 10*B*T)", memory="B*M*(T + 1)"),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "x": [[[10.0], [2.0]]],
                "recurrence_gate": [[[1.0], [math.inf]]],
                "input_gate": [[[0.5], [0.5]]],
                "decay_logit": [math.log(1.5)],
                "initial_state": [[5.0]],
            },
            params={"c": 1.0},
            returns={"out": [[[7.0], [1.0]]], "state": [[1.0]]},
            source="by hand: sigmoid = 0.6 and sqrt(1 - 0.36) = 0.8, so 0.6 * 5 + 0.8 * 5; then the input alone",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is hgrn on inputs normalised otherwise", as_hgrn),
        Identity("a recurrence gate of 0 holds the state and shuts the input out", held),
        Identity("a recurrence gate of inf takes the input alone", afresh),
    ),
)
