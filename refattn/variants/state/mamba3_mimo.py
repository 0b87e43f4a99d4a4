"""Mamba-3 with several inputs and outputs: as `mamba3`, but every token writes R vectors into the state of a head and reads with R.

    phi_t = phi_{t-1} + dt_t angle_t,     B~_tr = R(phi_t) (B_tr + B_bias_r),     C~_tr = R(phi_t) (C_tr + C_bias_r),     x_tr = x_weight_r * x_t
    S_t   = exp(gate_t) S_{t-1} + sum_r ((1 - mix_t) dt_t exp(gate_t) B~_{t-1,r} x_{t-1,r}^T + mix_t dt_t B~_tr x_tr^T)
    y_tr  = S_t^T C~_tr + skip x_tr,      out_t = sum_r out_weight_r * y_tr

Weights multiply channel by channel.  ``read`` is y, one output per rank: the published layer multiplies that by its gate
SiLU(z_weight_r * z_t) before the ranks are summed.  The rest is said in `mamba3`: operands after their activations, neighbouring channels
turned together, heads ``h // (H // G)`` of ``C`` and ``B``, and what is carried, here with the last vectors and inputs of every rank.

What people get wrong: R states, where there is one that all R vectors of a query read; summing the ranks before the gate; halves instead of
neighbours turned together, as the published package's kernels do for several inputs, and its reference does not; skip of the input instead
of its R projections.

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
    x_weight,
    out_weight,
    C_bias,
    B_bias,
    skip,
    initial_phase,
    initial_state,
    initial_last_key,
    initial_last_value,
):
    batch, heads, n, width = x.shape
    ranks, pairs = C.shape[3], angle.shape[3]
    group = heads // C.shape[1]
    out = np.zeros((batch, heads, n, width))
    read = np.zeros((batch, heads, n, ranks, width))
    phase = np.zeros((batch, heads, pairs))
    state = np.zeros((batch, heads, 2 * pairs, width))
    last_key = np.zeros((batch, heads, ranks, 2 * pairs))
    last_value = np.zeros((batch, heads, ranks, width))
    key = np.zeros((ranks, 2 * pairs))
    query = np.zeros((ranks, 2 * pairs))
    value = np.zeros((ranks, width))
    for b in range(batch):
        for h in range(heads):
            g = h // group
            for i in range(pairs):
                phase[b, h, i] = initial_phase[b, h, i]
            for r in range(ranks):
                for y in range(width):
                    last_value[b, h, r, y] = initial_last_value[b, h, r, y]
                for c in range(2 * pairs):
                    last_key[b, h, r, c] = initial_last_key[b, h, r, c]
            for c in range(2 * pairs):
                for y in range(width):
                    state[b, h, c, y] = initial_state[b, h, c, y]
            for t in range(n):
                for i in range(pairs):
                    phase[b, h, i] += dt[b, h, t] * angle[b, h, t, i]
                    cos, sin = math.cos(phase[b, h, i]), math.sin(phase[b, h, i])
                    for r in range(ranks):
                        first, second = B[b, g, t, r, 2 * i] + B_bias[h, r, 2 * i], B[b, g, t, r, 2 * i + 1] + B_bias[h, r, 2 * i + 1]
                        key[r, 2 * i], key[r, 2 * i + 1] = cos * first - sin * second, sin * first + cos * second
                        first, second = C[b, g, t, r, 2 * i] + C_bias[h, r, 2 * i], C[b, g, t, r, 2 * i + 1] + C_bias[h, r, 2 * i + 1]
                        query[r, 2 * i], query[r, 2 * i + 1] = cos * first - sin * second, sin * first + cos * second
                for r in range(ranks):
                    for y in range(width):
                        value[r, y] = x_weight[h, r, y] * x[b, h, t, y]
                alpha = math.exp(gate[b, h, t])
                beta = (1.0 - mix[b, h, t]) * dt[b, h, t] * alpha
                gamma = mix[b, h, t] * dt[b, h, t]
                for c in range(2 * pairs):
                    for y in range(width):
                        before = now = 0.0
                        for r in range(ranks):
                            before += last_key[b, h, r, c] * last_value[b, h, r, y]
                            now += key[r, c] * value[r, y]
                        state[b, h, c, y] = alpha * state[b, h, c, y] + beta * before + gamma * now
                for r in range(ranks):
                    for c in range(2 * pairs):
                        last_key[b, h, r, c] = key[r, c]
                    for y in range(width):
                        last_value[b, h, r, y] = value[r, y]
                        read[b, h, t, r, y] = skip[h] * value[r, y]
                        for c in range(2 * pairs):
                            read[b, h, t, r, y] += query[r, c] * state[b, h, c, y]
                        out[b, h, t, y] += out_weight[h, r, y] * read[b, h, t, r, y]
    return out, read, phase, state, last_key, last_value


def reduction(dims, params):
    """A fading state with two writes for every rank, of the token before and of the token itself, read by each rank as by a head of its own."""
    each, ranks = dims["H"] // dims["G"], dims["R"]

    def turned(a, phase):
        pairs = a.reshape(*a.shape[:-1], dims["F"], 2)
        first, second, cos, sin = pairs[..., 0], pairs[..., 1], np.cos(phase), np.sin(phase)
        both = [(cos * first - sin * second)[..., None], (sin * first + cos * second)[..., None]]
        return np.concatenate(both, axis=-1).reshape(*a.shape)

    def phases(x):
        return x["initial_phase"][:, :, None] + np.cumsum(x["dt"][..., None] * x["angle"], axis=2)

    def keys(x):
        """Turned, from the last ones before the first token on."""
        own = turned(np.repeat(x["B"], each, axis=1) + x["B_bias"][:, None], phases(x)[:, :, :, None])
        return np.concatenate([x["initial_last_key"][:, :, None], own], axis=2)

    def own_values(x):
        return x["x_weight"][:, None] * x["x"][:, :, :, None]

    def values(x):
        return np.concatenate([x["initial_last_value"][:, :, None], own_values(x)], axis=2)

    def operands(x):
        all_keys, all_values = keys(x), values(x)
        weight, last_weight = x["mix"] * x["dt"], (1.0 - x["mix"]) * x["dt"] * np.exp(x["gate"])
        queries = turned(np.repeat(x["C"], each, axis=1) + x["C_bias"][:, None], phases(x)[:, :, :, None])
        heads_of_ranks = np.swapaxes(queries, 2, 3).reshape(dims["B"], dims["H"] * ranks, dims["T"], 2 * dims["F"])
        written = last_weight[..., None, None] * all_keys[:, :, :-1], weight[..., None, None] * all_keys[:, :, 1:]
        return {
            "q": heads_of_ranks,
            "k": np.concatenate(written, axis=3),
            "v": np.concatenate([all_values[:, :, :-1], all_values[:, :, 1:]], axis=3),
            "gate": x["gate"],
            "initial_state": x["initial_state"],
        }

    def outputs(x, found):
        turns = np.concatenate([x["initial_phase"][:, :, None], phases(x)], axis=2)
        of_ranks = np.swapaxes(found["out"].reshape(dims["B"], dims["H"], ranks, dims["T"], dims["E"]), 2, 3)
        read = of_ranks + x["skip"][:, None, None, None] * own_values(x)
        return {
            "out": np.sum(x["out_weight"][:, None] * read, axis=3),
            "read": read,
            "phase": turns[:, :, -1],
            "state": found["state"],
            "last_key": keys(x)[:, :, -1],
            "last_value": values(x)[:, :, -1],
        }

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), log_decay=("gate",), steps="W"),
        {"q": "B Hq T F+F", "k": "B H T W F+F", "v": "B H T W E", "gate": "B H T", "initial_state": "B H F+F E", "out": "B Hq T E"},
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


def single(x, write, read):
    """Operands of `mamba3`: one rank writes and one reads."""
    kept = {name: x[name] for name in ("gate", "dt", "mix", "angle")}
    return {**kept, "C": x["C"][:, :, :, read], "B": x["B"][:, :, :, write], "x": x["x"] * x["x_weight"][:, None, write]}


def every_rank_reads_what_every_rank_wrote(run, x):
    ranks = x["C"].shape[3]
    states = sum(run(single(x, r, 0), name="mamba3", returns="state") for r in range(ranks))
    reads = [sum(run(single(x, write, read), name="mamba3", returns="out") for write in range(ranks)) for read in range(ranks)]
    out = sum(x["out_weight"][:, None, r] * reads[r] for r in range(ranks))
    return run(x, returns=("out", "read", "state")), (out, np.stack(reads, axis=3), states)


def one_rank_is_mamba3(run, x):
    one = {**x, **{name: x[name][:, :, :, :1] for name in ("C", "B")}, **{name: np.ones_like(x[name][:, :1]) for name in ("x_weight", "out_weight")}}
    one["skip"] = np.linspace(-1.0, 1.0, x["x"].shape[1])
    same = {name: x[name] for name in ("x", "gate", "dt", "mix", "angle")}
    return run(one), run({**same, "C": x["C"][:, :, :, 0], "B": x["B"][:, :, :, 0], "skip": one["skip"]}, name="mamba3", returns="out")


def only_turns_between_tokens_count(run, x):
    turned = {**x, "initial_phase": np.linspace(-3.0, 3.0, x["angle"][:, :, 0].size).reshape(x["angle"][:, :, 0].shape)}
    return run(x), run(turned)


VARIANT = Variant(
    name="mamba3_mimo",
    family="state",
    summary="Mamba-3 with several inputs and outputs: every token writes and reads a head's state with several vectors.",
    equation="S_t = a_t S_(t-1) + sum_r ((1 - mix_t) dt_t a_t B~_(t-1,r) x_(t-1,r)^T + mix_t dt_t B~_tr x_tr^T), out_t = sum_r w_r * S_t^T C~_tr",
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
        where="multi-input, multi-output state space models",
    ),
    operands=(
        Operand("C", "B G T R F+F", "read vectors: queries"),
        Operand("B", "B G T R F+F", "write vectors: keys"),
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
        Operand("x_weight", "H R E", "what each rank takes of the input"),
        Operand("out_weight", "H R E", "what each rank gives to the output"),
        Operand("C_bias", "H R F+F", "added to the read vectors", absent=0.0),
        Operand("B_bias", "H R F+F", "added to the write vectors", absent=0.0),
        Operand("skip", "H", "D, the part of each rank's input that is added to what it reads", absent=0.0),
        Operand("initial_phase", "B H F", "angles before the first token", absent=0.0),
        Operand("initial_state", "B H F+F E", "state before the first token", absent=0.0),
        Operand("initial_last_key", "B H R F+F", "turned write vectors of the token before the first", absent=0.0),
        Operand("initial_last_value", "B H R E", "input of each rank before the first", absent=0.0),
    ),
    outputs=(
        Output("out", "B H T E", "the ranks' outputs, weighed and summed"),
        Output("read", "B H T R E", "what each rank reads, before the gate"),
        Output("phase", "B H F", "angles after the last token", wide=True),
        Output("state", "B H F+F E", "state after the last token", wide=True),
        Output("last_key", "B H R F+F", "turned write vectors of the last token", wide=True),
        Output("last_value", "B H R E", "last input of each rank", wide=True),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*H*T*(F*(4 + 16*R) + R*E + 5 + 2*F*E*(4*R + 5) + R*E*(3 + 4*F))",
        memory="B*H*(T*E*(R + 1) + F + 2*F*E + R*(2*F + E)) + R*(4*F + E)",
    ),
    ordered=lambda params: "T F",
    causal={},
    examples=(
        Example(
            operands={
                "C": [[[[[1.0, 0.0], [0.0, 1.0]]]]],
                "B": [[[[[1.0, 0.0], [0.0, 1.0]]]]],
                "x": [[[[4.0]]]],
                "gate": [[[0.0]]],
                "dt": [[[0.5]]],
                "mix": [[[1.0]]],
                "angle": [[[[0.0]]]],
                "x_weight": [[[1.0], [3.0]]],
                "out_weight": [[[10.0], [1.0]]],
                "skip": [2.0],
            },
            returns={"out": [[[[130.0]]]], "read": [[[[[10.0], [30.0]]]]], "state": [[[[2.0], [6.0]]]], "last_value": [[[[4.0], [12.0]]]]},
            source="by hand: ranks of inputs 4 and 12 write 2 and 6 into a channel each, and read them with 8 and 24 from skip",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its angles, its state and its last token", cut_and_carried_on),
        Identity("every rank reads what every rank wrote", every_rank_reads_what_every_rank_wrote),
        Identity("one rank of weights 1 is Mamba-3 of one input and output", one_rank_is_mamba3),
        Identity("only turns between tokens count", only_turns_between_tokens_count),
    ),
)
