"""mLSTM (xLSTM): a matrix memory with a forget gate and an exponential input gate, read relative to a running maximum.

    C_t = exp(gate_t) C_{t-1} + exp(input_gate_t) scale k_t v_t^T,     n_t = exp(gate_t) n_{t-1} + exp(input_gate_t) scale k_t
    out_t = C_t^T q_t / (max(|n_t . q_t|, 1) + eps)

``gate`` is the logarithm of the forget gate, the paper's log sigmoid(f~) or f~ itself; ``input_gate`` is i~, unbounded.  C and n are kept
times exp(-m_t) with m_t = max(gate_t + m_{t-1}, input_gate_t) (the paper's equation 15), so that nothing overflows; the 1 of the floor
becomes exp(-m_t), and so eps counts exp(m_t) times what it says.  ``state``, ``mass`` and ``max`` are exp(-m) C, exp(-m) n and m after the
last token; they are carried together, and a state whose ``initial_max`` is -inf counts for nothing.  An input gate of -inf writes nothing,
a gate of -inf forgets everything.

Query head h reads memory ``h // (Hq // Hkv)``; the paper has Hq == Hkv.  ``scale`` multiplies the keys, and is 1/sqrt(D) if None.  The
paper has no eps.  The output gate sigmoid(o~), the group norm and the convolution around the cell are not here.

What people get wrong: a floor of 1 over a stabilised state, which makes the output depend on m; the scale on the queries instead of the
keys, which gives the same outputs and a state sqrt(D) times too large (the xlstm package's chunkwise form, not its other two, from which
its states cannot be carried on); the absolute value, and the floor inside or outside of eps (the package: max(...) + 1e-6); a forget gate
of sigmoid where exp was trained.

Checked against the parallel, recurrent and chunkwise cells of the xlstm package: values, gradients, state.
"""

import math

import numpy as np

from refattn.pieces.maps import times
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, input_gate, gate, initial_state, initial_mass, initial_max, scale, eps):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))  # exp(-m) C
    mass = np.zeros((batch, kv_heads, d))  # exp(-m) n
    top = np.zeros((batch, kv_heads))  # m
    for b in range(batch):
        for g in range(kv_heads):
            top[b, g] = initial_max[b, g]
            for x in range(d):
                mass[b, g, x] = initial_mass[b, g, x]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                faded = gate[b, g, t] + top[b, g]
                high = faded if input_gate[b, g, t] <= faded else input_gate[b, g, t]  # NaN must win
                old = new = 0.0
                if high != -np.inf:
                    old, new = math.exp(faded - high), math.exp(input_gate[b, g, t] - high)
                top[b, g] = high
                for x in range(d):
                    written = new * scale * k[b, g, t, x]
                    mass[b, g, x] = old * mass[b, g, x] + written
                    for y in range(d_v):
                        state[b, g, x, y] = old * state[b, g, x, y] + written * v[b, g, t, y]
                floor = math.exp(-high) if high > -709.0 else np.inf  # Python's exp raises where it overflows
                for h in range(g * group, (g + 1) * group):
                    total = 0.0
                    for x in range(d):
                        total += q[b, h, t, x] * mass[b, g, x]
                    divisor = (floor if abs(total) < floor else abs(total)) + eps
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] /= divisor
    return out, state, mass, top


def recurrence(dims, params):
    scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
    return Recurrence(
        writes=(Write(key=(Factor("k", times, (scale,)),), value=("v",)),),
        log_decay=("gate",),
        input_gate=("input_gate",),
        normalizer="floor",
        eps=params["eps"],
    )


CARRIED = ("state", "mass", "max")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    names = ("q", "k", "v", "input_gate", "gate")
    one = {**x, **{name: x[name][:, :, :half] for name in names}}
    two = {**x, **{name: x[name][:, :, half:] for name in names}}
    out_1, *carried = run(one, returns=("out", *CARRIED))
    out_2, *carried = run({**two, **{"initial_" + name: c for name, c in zip(CARRIED, carried, strict=True)}}, returns=("out", *CARRIED))
    return run(x, returns=("out", *CARRIED)), (np.concatenate([out_1, out_2], axis=2), *carried)


def without_stabiliser(run, x):
    group, d = x["q"].shape[1] // x["k"].shape[1], x["q"].shape[3]
    logarithms = np.cumsum(x["gate"], axis=2)
    weight = np.exp(logarithms[..., :, None] - logarithms[..., None, :] + x["input_gate"][..., None, :])
    scores = x["q"] @ np.swapaxes(np.repeat(x["k"], group, axis=1), -1, -2) * d**-0.5 * np.tril(np.repeat(weight, group, axis=1))
    divisor = np.maximum(np.abs(scores.sum(-1, keepdims=True)), 1.0)
    return run(x), scores / divisor @ np.repeat(x["v"], group, axis=1)


def below_the_floor_it_is_linear(run, x):
    """With input gates so small that the floor holds, they are factors of the output."""
    small = {**x, "input_gate": x["input_gate"] - 40.0}
    return run(small), math.exp(-10.0) * run({**x, "input_gate": x["input_gate"] - 30.0})


def far_above_the_floor_gates_are_relative(run, x):
    """Where nothing is near the floor, a constant added to all input gates changes nothing."""
    x = {**x, "q": np.abs(x["q"]) + 0.1, "k": np.abs(x["k"]) + 0.1}
    return run({**x, "input_gate": x["input_gate"] + 40.0}), run({**x, "input_gate": x["input_gate"] + 50.0})


def ones_give_one(run, x):
    x = {**x, "q": np.abs(x["q"]) + 0.1, "k": np.abs(x["k"]) + 0.1, "input_gate": x["input_gate"] + 40.0}
    return run({**x, "v": np.ones_like(x["v"])}), 1.0


VARIANT = Variant(
    name="mlstm",
    family="state",
    summary="mLSTM (xLSTM): matrix memory with forget and exponential input gates, normalised and stabilised.",
    equation="C_t = f_t C_(t-1) + i_t k_t v_t^T, n_t = f_t n_(t-1) + i_t k_t, out_t = C_t^T q_t / max(|n_t . q_t|, 1)",
    paper=Paper(
        title="xLSTM: Extended Long Short-Term Memory",
        authors=(
            "Beck, Maximilian",
            "Pöppel, Korbinian",
            "Spanring, Markus",
            "Auer, Andreas",
            "Prudnikova, Oleksandra",
            "Kopp, Michael",
            "Klambauer, Günter",
            "Brandstetter, Johannes",
            "Hochreiter, Sepp",
        ),
        year=2024,
        arxiv="2405.04517",
        where="section 2.3, equations 19 to 27, stabilised as in equations 15 to 17",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("input_gate", "B Hkv T", "logarithm of the factor of what is written; unbounded"),
        Operand(
            "gate",
            "B Hkv T",
            "natural logarithm of the forget gate",
            draw=lambda rng, shape: -np.log1p(np.exp(-2.0 * rng.standard_normal(shape))),
        ),
        Operand("initial_state", "B Hkv D E", "memory before the first token, times exp(-initial_max)", absent=0.0),
        Operand("initial_mass", "B Hkv D", "normaliser before the first token, times exp(-initial_max)", absent=0.0),
        Operand("initial_max", "B Hkv", "logarithm that they are relative to", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B Hq T E", "what is read, before the output gate"),
        Output("state", "B Hkv D E", "memory after the last token, times exp(-max)", wide=True),
        Output("mass", "B Hkv D", "normaliser after the last token, times exp(-max)", wide=True),
        Output("max", "B Hkv", "largest logarithm of a factor so far, faded", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies the keys; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
        Param("eps", Number(at_least=0.0), 0.0, "added to the divisor, that of the stabilised state", tries=(1e-6,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*T*(Hkv*(6 + D*(4 + 3*E)) + Hq*(2*D + 1 + E*(2*D + 1)))",
        memory="B*(Hq*T*E + Hkv*(D*E + D + 1))",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [0.25]]]],
                "k": [[[[1.0], [1.0], [0.0]]]],
                "v": [[[[8.0], [2.0], [5.0]]]],
                "input_gate": [[[math.log(2.0), math.log(4.0), 0.0]]],
                "gate": [[[0.0, -math.log(2.0), -math.log(2.0)]]],
            },
            returns={"out": [[[[8.0], [3.2], [2.0]]]], "state": [[[[4.0]]]], "mass": [[[1.25]]], "max": [[math.log(2.0)]]},
            source="by hand: C = 16, 8 + 8, 8 and n = 2, 1 + 4, 2.5; n q = 2, 5 and 0.625, the last below the floor of 1; m = log 2, log 4, log 2",
        ),
        Example(
            operands={
                "q": [[[[1.0], [1.0], [1.0]]]],
                "k": [[[[1.0], [1.0], [1.0]]]],
                "v": [[[[8.0], [2.0], [5.0]]]],
                "input_gate": [[[-1000.0, 1000.0, -math.inf]]],
                "gate": [[[0.0, 0.0, -math.inf]]],
            },
            returns={"out": [[[[0.0], [2.0], [0.0]]]], "state": [[[[0.0]]]], "mass": [[[0.0]]], "max": [[-math.inf]]},
            source="by hand: far below the floor, far above it, and then all forgotten and nothing written",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state, mass and maximum", cut_and_carried_on),
        Identity("it is the quotient of unstabilised sums over pairs", without_stabiliser),
        Identity("below the floor it is linear attention whose input gates are factors", below_the_floor_it_is_linear),
        Identity("far above the floor a constant added to all input gates changes nothing", far_above_the_floor_gates_are_relative),
        Identity("above the floor, values all one give one", ones_give_one),
    ),
)
