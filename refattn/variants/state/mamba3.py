"""Mamba-3 (single input, single output): a state that fades and turns, and is written by trapezia between two tokens.

    phi_t = phi_{t-1} + dt_t angle_t,     B~_t = R(phi_t) (B_t + B_bias),     C~_t = R(phi_t) (C_t + C_bias)
    S_t   = exp(gate_t) S_{t-1} + (1 - mix_t) dt_t exp(gate_t) B~_{t-1} x_{t-1}^T + mix_t dt_t B~_t x_t^T
    out_t = S_t^T C~_t + skip x_t

The paper's exponential-trapezoidal rule: mix (its lambda) is 1 for Mamba-2's Euler steps and 1/2 for the trapezoid.  R(phi) turns the
channels 2i and 2i + 1 of a state by phi[i]: in the complex plane, where each such pair is one number, the state itself turns by dt angle
with every token, and only differences of phi count.  Operands are those of the recurrence: ``gate`` is dt A, the natural logarithm of the
decay (A is negative, and per token here), ``dt`` and ``mix`` come after their softplus and sigmoid, and ``angle`` is turned by as it is
(the published layer takes pi tanh of its projection).  Normalisation of B and C, the gate SiLU(z) and the layer around are not here, nor is
the form of several inputs and outputs.

``C`` and ``B`` are the queries and keys, shared by the heads ``h // (H // G)``; their biases are per head.  There is no scale, and ``skip``
is 0 if absent.  ``phase``, ``state``, ``last_key`` and ``last_value`` are phi, S, B~ and x after the last token, and with them as
``initial_...`` a sequence can be cut anywhere.  phi is not reduced to one turn.

What people get wrong: turning by halves (i and i + N/2) instead of neighbours; the decay left out of the previous token's write; dt of the
previous token in it; the phase added to after it is used.

Checked against a complex recurrence that turns the state instead of keys and queries, written for the test in PyTorch: values, gradients,
states.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Recurrence, Reduction, Variant, Write


def define(
    C,
    B,
    x,
    gate,
    dt,
    mix,
    angle,
    C_bias,
    B_bias,
    skip,
    initial_phase,
    initial_state,
    initial_last_key,
    initial_last_value,
):
    batch, heads, n, width = x.shape
    pairs = angle.shape[3]
    group = heads // C.shape[1]
    out = np.zeros((batch, heads, n, width))
    phase = np.zeros((batch, heads, pairs))
    state = np.zeros((batch, heads, 2 * pairs, width))
    last_key = np.zeros((batch, heads, 2 * pairs))
    last_value = np.zeros((batch, heads, width))
    key = np.zeros(2 * pairs)
    query = np.zeros(2 * pairs)
    for b in range(batch):
        for h in range(heads):
            g = h // group
            for i in range(pairs):
                phase[b, h, i] = initial_phase[b, h, i]
            for y in range(width):
                last_value[b, h, y] = initial_last_value[b, h, y]
            for c in range(2 * pairs):
                last_key[b, h, c] = initial_last_key[b, h, c]
                for y in range(width):
                    state[b, h, c, y] = initial_state[b, h, c, y]
            for t in range(n):
                for i in range(pairs):
                    phase[b, h, i] += dt[b, h, t] * angle[b, h, t, i]
                    cos, sin = math.cos(phase[b, h, i]), math.sin(phase[b, h, i])
                    first, second = B[b, g, t, 2 * i] + B_bias[h, 2 * i], B[b, g, t, 2 * i + 1] + B_bias[h, 2 * i + 1]
                    key[2 * i], key[2 * i + 1] = cos * first - sin * second, sin * first + cos * second
                    first, second = C[b, g, t, 2 * i] + C_bias[h, 2 * i], C[b, g, t, 2 * i + 1] + C_bias[h, 2 * i + 1]
                    query[2 * i], query[2 * i + 1] = cos * first - sin * second, sin * first + cos * second
                alpha = math.exp(gate[b, h, t])
                beta = (1.0 - mix[b, h, t]) * dt[b, h, t] * alpha
                gamma = mix[b, h, t] * dt[b, h, t]
                for c in range(2 * pairs):
                    for y in range(width):
                        written = beta * last_key[b, h, c] * last_value[b, h, y] + gamma * key[c] * x[b, h, t, y]
                        state[b, h, c, y] = alpha * state[b, h, c, y] + written
                    last_key[b, h, c] = key[c]
                for y in range(width):
                    out[b, h, t, y] = skip[h] * x[b, h, t, y]
                    for c in range(2 * pairs):
                        out[b, h, t, y] += query[c] * state[b, h, c, y]
                    last_value[b, h, y] = x[b, h, t, y]
    return out, phase, state, last_key, last_value


def reduction(dims, params):
    """A fading state with two writes, of the token before and of the token itself, whose keys and queries have been turned."""
    each = dims["H"] // dims["G"]

    def turned(a, cos, sin):
        pairs = a.reshape(*a.shape[:-1], dims["F"], 2)
        first, second = pairs[..., 0], pairs[..., 1]
        both = [(cos * first - sin * second)[..., None], (sin * first + cos * second)[..., None]]
        return np.concatenate(both, axis=-1).reshape(*a.shape)

    def keys(x, turns):
        return turned(np.repeat(x["B"], each, axis=1) + x["B_bias"][:, None], *turns)

    def operands(x):
        phases = x["initial_phase"][:, :, None] + np.cumsum(x["dt"][..., None] * x["angle"], axis=2)
        turns = np.cos(phases), np.sin(phases)
        own = keys(x, turns)
        return {
            "q": turned(np.repeat(x["C"], each, axis=1) + x["C_bias"][:, None], *turns),
            "k": own,
            "v": x["x"],
            "last_k": np.concatenate([x["initial_last_key"][:, :, None], own[:, :, :-1]], axis=2),
            "last_v": np.concatenate([x["initial_last_value"][:, :, None], x["x"][:, :, :-1]], axis=2),
            "weight": x["mix"] * x["dt"],
            "last_weight": (1.0 - x["mix"]) * x["dt"] * np.exp(x["gate"]),
            "gate": x["gate"],
            "skip": x["skip"],
            "initial_state": x["initial_state"],
        }

    def outputs(x, found):
        if dims["T"] == 0:
            return {**found, **{name: x["initial_" + name] for name in ("phase", "last_key", "last_value")}}
        phase = x["initial_phase"] + np.sum(x["dt"][..., None] * x["angle"], axis=2)
        last = {**x, "B": x["B"][:, :, -1:]}
        key = keys(last, (np.cos(phase)[:, :, None], np.sin(phase)[:, :, None]))
        return {**found, "phase": phase, "last_key": key[:, :, 0], "last_value": x["x"][:, :, -1]}

    key, value, weight = "B H T F+F", "B H T E", "B H T"
    return Reduction(
        Recurrence((Write(("last_weight", "last_k"), ("last_v",)), Write(("weight", "k"), ("v",))), log_decay=("gate",), skip=("skip", "v")),
        {
            "q": key,
            "k": key,
            "v": value,
            "last_k": key,
            "last_v": value,
            "weight": weight,
            "last_weight": weight,
            "gate": weight,
            "skip": "H",
            "initial_state": "B H F+F E",
            "out": value,
        },
        operands,
        outputs,
    )


TOKENS = ("C", "B", "x", "gate", "dt", "mix", "angle")
CARRIED = ("phase", "state", "last_key", "last_value")


def cut_and_carried_on(run, x):
    half = x["x"].shape[2] // 2
    one = {**x, **{name: x[name][:, :, :half] for name in TOKENS}}
    two = {**x, **{name: x[name][:, :, half:] for name in TOKENS}}
    out_1, *carried = run(one, returns=("out", *CARRIED))
    out_2, *carried = run({**two, **{"initial_" + name: c for name, c in zip(CARRIED, carried, strict=True)}}, returns=("out", *CARRIED))
    return run(x, returns=("out", *CARRIED)), (np.concatenate([out_1, out_2], axis=2), *carried)


def euler_steps_are_gated_linear_attention(run, x):
    """With mix 1 and no angles: the queries C, the keys dt B and the values x of each head."""
    heads = x["x"].shape[1]
    queries, keys = (np.repeat(x[name], heads // x[name].shape[1], axis=1) for name in ("C", "B"))
    kept = {"q": queries, "k": x["dt"][..., None] * keys, "v": x["x"], "gate": x["gate"]}
    still = {**x, "mix": np.ones_like(x["mix"]), "angle": np.zeros_like(x["angle"])}
    return run(still, returns=("out", "state")), run(kept, name="simple_gla", scale=1.0, returns=("out", "state"))


def only_turns_between_tokens_count(run, x):
    turned = {**x, "initial_phase": np.linspace(-3.0, 3.0, x["angle"][:, :, 0].size).reshape(x["angle"][:, :, 0].shape)}
    return run(x), run(turned)


def whole_turns_are_none(run, x):
    """Phases of multiples of 2 pi, up to the rounding of cos and sin at pi."""
    turned = {**x, "angle": np.round(x["angle"]) * 2.0 * math.pi / x["dt"][..., None]}
    return run({**x, "angle": np.zeros_like(x["angle"])}), run(turned)


def trapezoids_are_two_euler_steps(run, x):
    """Half of the writes are Euler's, the other half come a token late: the state is linear in what is written."""
    heads = x["x"].shape[1]
    still = {**x, "angle": np.zeros_like(x["angle"])}
    queries, keys = (np.repeat(x[name], heads // x[name].shape[1], axis=1) for name in ("C", "B"))
    late = {name: np.concatenate([np.zeros_like(y[:, :, :1]), y[:, :, :-1]], axis=2) for name, y in (("k", keys), ("v", x["x"]))}
    on_time = {"q": queries, "k": (x["mix"] * x["dt"])[..., None] * keys, "v": x["x"], "gate": x["gate"]}
    late = {"q": queries, "k": ((1.0 - x["mix"]) * x["dt"] * np.exp(x["gate"]))[..., None] * late["k"], "v": late["v"], "gate": x["gate"]}
    sides = [run(y, name="simple_gla", scale=1.0, returns="out") for y in (on_time, late)]
    return run(still), sides[0] + sides[1]


VARIANT = Variant(
    name="mamba3",
    family="state",
    summary="Mamba-3, single input and output: a state that fades and turns, written by a trapezoidal rule over two tokens.",
    equation="S_t = a_t S_(t-1) + (1 - mix_t) dt_t a_t B~_(t-1) x_(t-1)^T + mix_t dt_t B~_t x_t^T, out_t = S_t^T C~_t + skip x_t",
    paper=Paper(
        title="Mamba-3: Improved Sequence Modeling using State Space Principles",
        authors=(
            "Lahoti, Aakash",
            "Li, Kevin Y.",
            "Chen, Berlin",
            "Wang, Caitlin",
            "Bick, Aviv",
            "Kolter, J. Zico",
            "Dao, Tri",
            "Gu, Albert",
        ),
        year=2026,
        arxiv="2603.15569",
        where="the exponential-trapezoidal recurrence and its complex states",
    ),
    operands=(
        Operand("C", "B G T F+F", "read vectors: queries"),
        Operand("B", "B G T F+F", "write vectors: keys"),
        Operand("x", "B H T E", "inputs: values"),
        Operand(
            "gate",
            "B H T",
            "dt A, natural logarithm of the factor by which the state fades",
            draw=lambda rng, shape: -rng.exponential(0.5, shape),
        ),
        Operand("dt", "B H T", "length of a token's step", draw=lambda rng, shape: rng.uniform(0.1, 1.0, shape)),
        Operand(
            "mix",
            "B H T",
            "lambda, the share of the token itself beside that of the one before",
            within=(0.0, 1.0),
            draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape),
        ),
        Operand("angle", "B H T F", "angle by which each pair of channels turns in a step of 1"),
        Operand("C_bias", "H F+F", "added to the read vectors", absent=0.0),
        Operand("B_bias", "H F+F", "added to the write vectors", absent=0.0),
        Operand("skip", "H", "D, the part of the input that is added to the output", absent=0.0),
        Operand("initial_phase", "B H F", "angles before the first token", absent=0.0),
        Operand("initial_state", "B H F+F E", "state before the first token", absent=0.0),
        Operand("initial_last_key", "B H F+F", "turned write vector of the token before the first", absent=0.0),
        Operand("initial_last_value", "B H E", "input before the first", absent=0.0),
    ),
    outputs=(
        Output("out", "B H T E", "what is read, before the gate"),
        Output("phase", "B H F", "angles after the last token", wide=True),
        Output("state", "B H F+F E", "state after the last token", wide=True),
        Output("last_key", "B H F+F", "turned write vector of the last token", wide=True),
        Output("last_value", "B H E", "last input", wide=True),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*H*T*(20*F + 5 + 2*F*E*7 + E*(1 + 4*F))",
        memory="B*H*(T*E + 3*F + 2*F*E + E) + 4*F",
    ),
    ordered=lambda params: "T F",
    causal={},
    examples=(
        Example(
            operands={
                "C": [[[[1.0, 0.0], [1.0, 0.0]]]],
                "B": [[[[1.0, 0.0], [1.0, 0.0]]]],
                "x": [[[[4.0], [8.0]]]],
                "gate": [[[0.0, -math.log(2.0)]]],
                "dt": [[[1.0, 0.5]]],
                "mix": [[[0.5, 0.25]]],
                "angle": [[[[0.0], [math.pi]]]],
                "skip": [3.0],
            },
            returns={
                "out": [[[[14.0], [25.0]]]],
                "phase": [[[math.pi / 2]]],
                "state": [[[[1.75], [1.0]]]],
                "last_key": [[[0.0, 1.0]]],
                "last_value": [[[8.0]]],
            },
            source="by hand: S = 0.5 x 4, then half of it and 0.75 x 0.5 x 0.5 x 4 beside 0.25 x 0.5 x 8 a quarter turn away; skip adds 12 and 24",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its angles, its state and its last token", cut_and_carried_on),
        Identity("Euler steps without angles are gated linear attention", euler_steps_are_gated_linear_attention),
        Identity("without angles it is two gated linear attentions, one a token late", trapezoids_are_two_euler_steps),
        Identity("only turns between tokens count", only_turns_between_tokens_count),
        Identity("whole turns are none", whole_turns_are_none),
    ),
)
