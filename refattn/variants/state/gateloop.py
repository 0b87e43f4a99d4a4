"""GateLoop: gated linear attention with complex factors, which turn the rows of the state while they fade.

    S_t   = exp(gate_t + i angle_t) * S_{t-1} + k_t v_t^T        row by row, S complex
    out_t = scale * q_t^T Re(S_t)

Always causal.  The state's real and imaginary parts are carried as two arrays, ``state`` and ``imaginary``; before the first token they
are ``initial_state`` and ``initial_imaginary`` (0 if absent).  gate is the natural logarithm of the factor's magnitude, angle its phase
in radians; q, k and v are real.  Query head h reads state head ``h // (Hq // Hkv)``.

The paper's model has as many heads as channels (D = E = 1), magnitude sigmoid(.) and the phase as it comes, no scale, and a SiLU gate
after; its listing takes the real part, as here.

It is gated linear attention on queries and keys rotated by the sums of the angles so far, as rotary embeddings do with angles
proportional to the position.

What people get wrong: carrying the real part alone, which forgets how far the state has turned; rotating by the angle of the reading
token's own sum and not the difference; a magnitude as a factor where the logarithm is wanted.

Checked against the gateloop-transformer package (gate_loop_operator, values and gradients).
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, gate, angle, initial_state, initial_imaginary, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    imaginary = np.zeros((batch, kv_heads, d, d_v))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
                    imaginary[b, g, x, y] = initial_imaginary[b, g, x, y]
            for t in range(n):
                for x in range(d):
                    magnitude = math.exp(gate[b, g, t, x])
                    a_real, a_imaginary = magnitude * math.cos(angle[b, g, t, x]), magnitude * math.sin(angle[b, g, t, x])
                    for y in range(d_v):
                        re, im = state[b, g, x, y], imaginary[b, g, x, y]
                        state[b, g, x, y] = a_real * re - a_imaginary * im + k[b, g, t, x] * v[b, g, t, y]
                        imaginary[b, g, x, y] = a_real * im + a_imaginary * re
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state, imaginary


def reduction(dims, params):
    """States that do not turn, of queries and keys turned by the angles so far; the last state is turned back."""

    def operands(x):
        so_far = np.cumsum(x["angle"], axis=2)
        turns = np.cos(so_far), np.sin(so_far)
        return {
            "q": np.concatenate([x["q"] * np.repeat(turn, dims["Hq"] // dims["Hkv"], axis=1) for turn in turns], axis=-1),
            "k": np.concatenate([x["k"] * turn for turn in turns], axis=-1),
            "v": x["v"],
            "gate": np.concatenate([x["gate"], x["gate"]], axis=-1),
            "initial_state": np.concatenate([x["initial_state"], -x["initial_imaginary"]], axis=2),
        }

    def outputs(x, found):
        cos, sin = (f(np.sum(x["angle"], axis=2))[..., None] for f in (np.cos, np.sin))
        re, im = found["state"][:, :, : dims["D"]], -found["state"][:, :, dims["D"] :]
        return {"out": found["out"], "state": cos * re - sin * im, "imaginary": cos * im + sin * re}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), log_decay=("gate",), scale=params["scale"]),
        {"q": "B Hq T D+D", "k": "B Hkv T D+D", "v": "B Hkv T E", "gate": "B Hkv T D+D", "initial_state": "B Hkv D+D E", "out": "B Hq T E"},
        operands,
        outputs,
    )


ALL = ("out", "state", "imaginary")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = {name: a[:, :, :half] for name, a in x.items()}, {name: a[:, :, half:] for name, a in x.items()}
    out_1, state, imaginary = run(one, returns=ALL)
    out_2, state, imaginary = run({**two, "initial_state": state, "initial_imaginary": imaginary}, returns=ALL)
    return run(x, returns=ALL), (np.concatenate([out_1, out_2], axis=2), state, imaginary)


def unturned_is_gla(run, x):
    given = {name: x[name] for name in ("q", "k", "v", "gate")}
    return run({**x, "angle": 0.0 * x["angle"]}, returns=("out", "state")), run(given, name="gla", scale=1.0, returns=("out", "state"))


def rotated_gla(run, x):
    turned = np.cumsum(x["angle"], axis=2)
    group = x["q"].shape[1] // x["k"].shape[1]

    def rotated(a, by):
        return np.concatenate([a * np.cos(by), a * np.sin(by)], axis=-1)

    q, k = rotated(x["q"], np.repeat(turned, group, axis=1)), rotated(x["k"], turned)
    return run(x), run({"q": q, "k": k, "v": x["v"], "gate": np.tile(x["gate"], 2)}, name="gla", scale=1.0)


def half_turns_change_sign(run, x):
    """Turned by pi with every token, what was written an odd number of tokens ago counts negatively."""
    signs = (-1.0) ** np.arange(x["q"].shape[2])[:, None]
    given = {"q": signs * x["q"], "k": signs * x["k"], "v": x["v"], "gate": x["gate"]}
    return run({**x, "angle": np.full_like(x["angle"], math.pi)}), run(given, name="gla", scale=1.0)


VARIANT = Variant(
    name="gateloop",
    family="state",
    summary="GateLoop: gated linear attention with complex factors, which turn the rows of the state while they fade.",
    equation="S_t = exp(gate_t + i angle_t) * S_(t-1) + k_t v_t^T, out_t = scale q_t^T Re(S_t)",
    paper=Paper(
        title="GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling",
        authors=("Katsch, Tobias",),
        year=2023,
        arxiv="2311.01927",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the magnitude of the factor of a row of the state",
            draw=lambda rng, shape: -rng.exponential(0.5, shape),
        ),
        Operand("angle", "B Hkv T D", "phase of that factor, in radians"),
        Operand("initial_state", "B Hkv D E", "real part of the state before the first token", absent=0.0),
        Operand("initial_imaginary", "B Hkv D E", "imaginary part of the state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output, before any gate"),
        Output("state", "B Hkv D E", "real part of the state after the last token", wide=True),
        Output("imaginary", "B Hkv D E", "imaginary part of the state after the last token", wide=True),
    ),
    params=(Param("scale", Number(), 1.0, "multiplies q . S", tries=(0.37,)),),
    define=define,
    reduction=reduction,
    cost=Cost(flops="B*T*(Hkv*D*(8*E + 5) + Hq*E*(2*D + 1))", memory="B*(Hq*T*E + 2*Hkv*D*E)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [1.0]]]],
                "k": [[[[1.0], [1.0], [0.0]]]],
                "v": [[[[8.0], [4.0], [1.0]]]],
                "gate": [[[[0.0], [-math.log(2.0)], [-math.log(2.0)]]]],
                "angle": [[[[0.0], [math.pi / 2.0], [math.pi / 2.0]]]],
            },
            returns={"out": [[[[8.0], [4.0], [-2.0]]]], "state": [[[[-2.0]]]], "imaginary": [[[[2.0]]]]},
            source="by hand: S = 8, then 4i + 4, then half of it turned again, 2i - 2",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by both parts of its state", cut_and_carried_on),
        Identity("without angles it is gla", unturned_is_gla),
        Identity("it is gla on queries and keys rotated by the summed angles", rotated_gla),
        Identity("half a turn a token changes the sign of every other token", half_turns_change_sign),
    ),
)
