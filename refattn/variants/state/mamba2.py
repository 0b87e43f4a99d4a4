"""Mamba-2's state space dual: a state per head that fades at a rate which the token's step size scales.

    S_t   = exp(dt_t A_h) S_{t-1} + (dt_t B_t) x_t^T
    out_t = S_t^T C_t + D_h x_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, [N E] a head as everywhere in this
house; the authors' code and transformers hold its transpose, [E N] (they write P for E).  C is the query, dt B the key, x the value, dt A
the gate of `simple_gla`.  Head h reads B and C of group ``h // (H // G)``.  A must be negative for anything to fade.  The letters are the
paper's; there is no scale.

dt is the step itself: bias, softplus and the clamp to time_step_limit that make it are not here, nor the convolution before and the gated
RMSNorm after.

What people get wrong: giving x and A to functions that want dt x and dt A (the paper's listing, ssd_minimal_discrete) or the reverse; dt
multiplied into the skip D x too; groups tiled (h mod G) instead of repeated; the clamp of dt, 0 to infinity by default in the authors'
code and transformers, 0.001 to 100 in MLX-LM, which changes small steps; the norm before or after the gate.

Checked against the authors' ssd_minimal_discrete (values and gradients), transformers' chunked and single-step functions, and MLX-LM's
ssm_attn.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Recurrence, Variant, Write


def define(x, dt, A, B, C, D, initial_state):
    batch, heads, n, d_v = x.shape
    groups, states = B.shape[1], B.shape[3]
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, heads, states, d_v))
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for s in range(states):
                for y in range(d_v):
                    state[b, h, s, y] = initial_state[b, h, s, y]
            for t in range(n):
                faded = math.exp(dt[b, h, t] * A[h])
                for s in range(states):
                    key = dt[b, h, t] * B[b, g, t, s]
                    for y in range(d_v):
                        state[b, h, s, y] = faded * state[b, h, s, y] + key * x[b, h, t, y]
                for y in range(d_v):
                    for s in range(states):
                        out[b, h, t, y] += state[b, h, s, y] * C[b, g, t, s]
                    out[b, h, t, y] += D[h] * x[b, h, t, y]
    return out, state


def recurrence(dims, params):
    return Recurrence(writes=(Write(key=("dt", "B"), value=("x",)),), query=("C",), log_decay=("dt", "A"), skip=("D", "x"))


TOKENS = ("x", "dt", "B", "C")


def cut_and_carried_on(run, x):
    half = x["x"].shape[2] // 2
    one, two = ({**x, **{name: part(x[name]) for name in TOKENS}} for part in (lambda a: a[:, :, :half], lambda a: a[:, :, half:]))
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def as_simple_gla(run, x):
    share = x["x"].shape[1] // x["B"].shape[1]
    q, k = (np.repeat(x[name], share, axis=1) for name in ("C", "B"))
    given = {"q": q, "k": x["dt"][..., None] * k, "v": x["x"], "gate": x["dt"] * x["A"][:, None]}
    return run(x, returns=("out", "state")), run(given, name="simple_gla", scale=1.0, returns=("out", "state"))


def skip_is_added(run, x):
    skip = np.linspace(-1.0, 2.0, x["x"].shape[1])
    return run({**x, "D": skip}), run(x) + skip[:, None, None] * x["x"]


def skipped_token(run, x):
    middle = x["x"].shape[2] // 2
    kept = np.arange(x["x"].shape[2]) != middle
    dt = x["dt"].copy()
    dt[:, :, middle] = 0.0
    without = {**x, **{name: x[name][:, :, kept] for name in TOKENS}}
    out, state = run({**x, "dt": dt}, returns=("out", "state"))
    return (out[:, :, kept], state), run(without, returns=("out", "state"))


VARIANT = Variant(
    name="mamba2",
    family="state",
    summary="Mamba-2 (SSD): a state per head that fades at a rate which the step size scales, heads in groups sharing keys and queries.",
    equation="S_t = exp(dt_t A) S_(t-1) + (dt_t B_t) x_t^T, out_t = S_t^T C_t + D x_t",
    paper=Paper(
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        authors=("Dao, Tri", "Gu, Albert"),
        year=2024,
        arxiv="2405.21060",
        where="sections 6 and 7, listing 1",
    ),
    operands=(
        Operand("x", "B H T E", "inputs"),
        Operand("dt", "B H T", "step sizes, after bias, softplus and clamp", draw=lambda rng, shape: rng.exponential(0.5, shape)),
        Operand("A", "H", "rates, negative to fade", draw=lambda rng, shape: -rng.exponential(1.0, shape)),
        Operand("B", "B G T N", "how the input enters the state"),
        Operand("C", "B G T N", "how the state is read"),
        Operand("D", "H", "weight of the input in the output", absent=0.0),
        Operand("initial_state", "B H N E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B H T E", "output, before any normalisation or gate"),
        Output("state", "B H N E", "state after the last token", wide=True),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(flops="B*H*T*(2 + N*(3*E + 1) + E*(2*N + 2))", memory="B*H*E*(T + N)"),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "x": [[[[4.0], [8.0]]]],
                "dt": [[[1.0, 2.0]]],
                "A": [-math.log(2.0)],
                "B": [[[[1.0, 0.0], [1.0, 0.5]]]],
                "C": [[[[1.0, 1.0], [1.0, 2.0]]]],
                "D": [0.5],
                "initial_state": [[[[8.0], [4.0]]]],
            },
            returns={"out": [[[[12.0], [39.0]]]], "state": [[[[18.0], [8.5]]]]},
            source="by hand: S = (4 + 4, 2), then (8/4 + 16, 2/4 + 8); out = 8 + 2 + 2, then 18 + 17 + 4",
        ),
        Example(
            operands={
                "x": [[[[1.0]], [[2.0]], [[3.0]], [[4.0]]]],
                "dt": [[[1.0], [1.0], [1.0], [1.0]]],
                "A": [0.0, 0.0, 0.0, 0.0],
                "B": [[[[1.0]], [[1.0]]]],
                "C": [[[[1.0]], [[10.0]]]],
            },
            returns={"out": [[[[1.0]], [[2.0]], [[30.0]], [[40.0]]]], "state": [[[[1.0]], [[2.0]], [[3.0]], [[4.0]]]]},
            source="by hand: of four heads the first two read group 0",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is simple_gla with keys dt B, values x and gates dt A", as_simple_gla),
        Identity("D adds the input to the output", skip_is_added),
        Identity("a token of step 0 is skipped", skipped_token),
    ),
)
