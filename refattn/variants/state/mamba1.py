"""Mamba's selective scan: a state of N numbers for every channel, each fading at a rate that the token's step size scales.

    h_t   = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t         h, A and the product dt A are [M N], x and dt [M], B and C [N]
    out_t = h_t C_t + D x_t

Products are channel by channel; B_t and C_t are shared by all channels.  Always causal.  h_{-1} is ``initial_state`` (0 if absent), and
``state`` is h after the last token.  A must be negative for anything to fade; a step dt of 0 skips the token, a large one makes the state
forget.  The letters are the paper's, N its state size, M its number of channels; its Delta is dt.

dt is the step itself: the bias and the softplus that make it, and the gate silu(z) after, are not here.  Real A only; the paper keeps
complex ones for other modalities.

What people get wrong: the factor of B: dt here and in every code, where the paper's equation 4 writes the zero-order hold, (exp(dt A) -
1) / A; the bias added after the softplus; layouts: the authors' code has channels before tokens ([B M T], [B N T]); A stored as A_log
with A = -exp(A_log).

Checked against the authors' selective_scan_ref (values and gradients), transformers' scan and step, and mambapy's parallel scan.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Recurrence, Variant, Write


def define(x, dt, A, B, C, D, initial_state):
    batch, n, width = x.shape
    states = A.shape[1]
    out = np.zeros((batch, n, width))
    state = np.zeros((batch, width, states))
    for b in range(batch):
        for m in range(width):
            for s in range(states):
                state[b, m, s] = initial_state[b, m, s]
            for t in range(n):
                for s in range(states):
                    state[b, m, s] = math.exp(dt[b, t, m] * A[m, s]) * state[b, m, s] + dt[b, t, m] * x[b, t, m] * B[b, t, s]
                    out[b, t, m] += state[b, m, s] * C[b, t, s]
                out[b, t, m] += D[m] * x[b, t, m]
    return out, state


def recurrence(dims, params):
    return Recurrence(writes=(Write(key=("dt", "B"), value=("x",)),), query=("C",), log_decay=("dt", "A"), skip=("D", "x"), heads="M")


TOKENS = ("x", "dt", "B", "C")


def cut_and_carried_on(run, x):
    half = x["x"].shape[1] // 2
    one, two = ({**x, **{name: part(x[name]) for name in TOKENS}} for part in (lambda a: a[:, :half], lambda a: a[:, half:]))
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=1), state)


def one_head_a_channel(run, x):
    """gla with values of width 1, whose heads are the channels."""
    dt, width = np.swapaxes(x["dt"], 1, 2)[..., None], x["x"].shape[2]
    q, k = (np.repeat(x[name][:, None], width, axis=1) for name in ("C", "B"))
    apart = {"q": q, "k": dt * k, "v": np.swapaxes(x["x"], 1, 2)[..., None], "gate": dt * x["A"][:, None]}
    out, state = run(apart, name="gla", scale=1.0, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.swapaxes(out[..., 0], 1, 2), state[..., 0])


def one_rate_is_mamba2(run, x):
    """With one rate and one step for all channels they are the values of one head of Mamba-2."""
    A, dt = x["A"][0, 0], x["dt"][..., 0]
    skip = 0.5
    ours = {**x, "A": np.full_like(x["A"], A), "dt": np.repeat(dt[..., None], x["dt"].shape[2], axis=2), "D": np.full(x["x"].shape[2], skip)}
    theirs = {"x": x["x"][:, None], "dt": dt[:, None], "A": np.array([A]), "B": x["B"][:, None], "C": x["C"][:, None], "D": np.array([skip])}
    out, state = run(theirs, name="mamba2", returns=("out", "state"))
    return run(ours, returns=("out", "state")), (out[:, 0], np.swapaxes(state[:, 0], 1, 2))


def skipped_token(run, x):
    """A step of 0 leaves the state as it was."""
    middle = x["x"].shape[1] // 2
    kept = np.arange(x["x"].shape[1]) != middle
    dt = x["dt"].copy()
    dt[:, middle] = 0.0
    without = {**x, **{name: x[name][:, kept] for name in TOKENS}}
    out, state = run({**x, "dt": dt}, returns=("out", "state"))
    return (out[:, kept], state), run(without, returns=("out", "state"))


VARIANT = Variant(
    name="mamba1",
    family="state",
    summary="Mamba's selective scan: every channel has a state of its own, fading at rates that the step size scales.",
    equation="h_t = exp(dt_t A) * h_(t-1) + (dt_t x_t) B_t, out_t = h_t C_t + D x_t",
    paper=Paper(
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        authors=("Gu, Albert", "Dao, Tri"),
        year=2023,
        arxiv="2312.00752",
        where="section 3, algorithm 2",
    ),
    operands=(
        Operand("x", "B T M", "inputs"),
        Operand("dt", "B T M", "step sizes, after bias and softplus", draw=lambda rng, shape: rng.exponential(0.5, shape)),
        Operand("A", "M N", "rates, negative to fade", draw=lambda rng, shape: -rng.exponential(1.0, shape)),
        Operand("B", "B T N", "how the input enters the state"),
        Operand("C", "B T N", "how the state is read"),
        Operand("D", "M", "weight of the input in the output", absent=0.0),
        Operand("initial_state", "B M N", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B T M", "output, before any gate"),
        Output("state", "B M N", "state after the last token", wide=True),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(flops="B*T*M*(8*N + 2)", memory="B*M*(T + N)"),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "x": [[[4.0], [8.0]]],
                "dt": [[[1.0], [2.0]]],
                "A": [[-math.log(2.0), 0.0]],
                "B": [[[1.0, 1.0], [1.0, 0.5]]],
                "C": [[[1.0, 1.0], [1.0, 2.0]]],
                "D": [0.5],
                "initial_state": [[[8.0, 1.0]]],
            },
            returns={"out": [[[15.0], [48.0]]], "state": [[[18.0, 13.0]]]},
            source="by hand: h = (4 + 4, 1 + 4), then (8/4 + 16, 5 + 8); out = 8 + 5 + 2, then 18 + 26 + 4",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is gla with one head a channel, keys dt B, values x and gates dt A", one_head_a_channel),
        Identity("channels of one rate and step are one head of mamba2", one_rate_is_mamba2),
        Identity("a token of step 0 is skipped", skipped_token),
    ),
)
