"""The damped multi-dimensional exponential moving average of Mega: every channel is averaged at N rates at once.

    u_t   = beta x_t                                     channel by channel, N numbers for one
    h_t   = alpha * u_t + (1 - alpha * delta) * h_{t-1}
    out_t = eta . h_t                                    back to one number a channel

All of alpha, delta, beta, eta are [M N].  Always causal.  h_{-1} is ``initial_state`` (0 if absent), and ``state`` is h after the last
token.  alpha is the weight of the new, delta in [0, 1] damps how much of the old that weight takes away: at delta = 1 it is the usual
average, at 0 a sum.

This is the averaging alone, which Mega uses to make queries and keys; the attention of its gated layer is another matter.  The authors'
code divides eta by sqrt(N), adds omega * x and applies SiLU, and averages in both directions where not causal; none of that is here.

What people get wrong: the damping.  The mega-pytorch package fades by (1 - alpha) damping where the paper has 1 - alpha delta: damped, it
forgets faster than the usual average, which is a delta above 1, and the paper's slower; it also has one alpha and one delta for all
channels.

Checked against the mega-pytorch package's MultiHeadedEMA, with its damping translated, and a convolution in PyTorch (gradients).
"""

import numpy as np

from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Recurrence, Reduction, Variant, Write


def define(x, alpha, delta, beta, eta, initial_state):
    batch, n, width = x.shape
    rates = alpha.shape[1]
    out = np.zeros((batch, n, width))
    state = np.zeros((batch, width, rates))
    for b in range(batch):
        for m in range(width):
            for s in range(rates):
                state[b, m, s] = initial_state[b, m, s]
            for t in range(n):
                for s in range(rates):
                    u = beta[m, s] * x[b, t, m]
                    state[b, m, s] = alpha[m, s] * u + (1.0 - alpha[m, s] * delta[m, s]) * state[b, m, s]
                    out[b, t, m] += eta[m, s] * state[b, m, s]
    return out, state


def reduction(dims, params):
    """Every average a row of its channel's state, with a factor that is the same at all tokens; a negative one changes a sign with every token."""

    def operands(x):
        factor = 1.0 - x["alpha"] * x["delta"]
        signs = np.where(factor < 0.0, -1.0, 1.0) ** np.arange(dims["T"])[:, None, None]  # T M N
        return {
            "x": x["x"],
            "k": signs * (x["alpha"] * x["beta"]),
            "q": signs * x["eta"],
            "gate": np.log(np.abs(factor)),
            "initial_state": np.where(factor < 0.0, -1.0, 1.0) * x["initial_state"],
        }

    def outputs(x, found):
        factor = 1.0 - x["alpha"] * x["delta"]
        return {"out": found["out"], "state": np.where(factor < 0.0, -1.0, 1.0) ** (dims["T"] - 1) * found["state"]}

    return Reduction(
        Recurrence((Write(("k",), ("x",)),), query=("q",), log_decay=("gate",), heads="M"),
        {"x": "B T M", "k": "T M N", "q": "T M N", "gate": "M N", "initial_state": "B M N", "out": "B T M"},
        operands,
        outputs,
    )


def cut_and_carried_on(run, x):
    half = x["x"].shape[1] // 2
    out_1, state = run({**x, "x": x["x"][:, :half]}, returns=("out", "state"))
    out_2, state = run({**x, "x": x["x"][:, half:], "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=1), state)


def a_convolution(run, x):
    n = x["x"].shape[1]
    distance = np.arange(n)[:, None, None]
    kernel = np.sum(x["eta"] * x["alpha"] * x["beta"] * (1.0 - x["alpha"] * x["delta"]) ** distance, axis=-1)
    padded = np.concatenate([np.zeros_like(x["x"]), x["x"]], axis=1)
    return run(x), sum(kernel[j] * padded[:, n - j : 2 * n - j] for j in range(n))


def undamped_is_hgrn(run, x):
    """At delta 1 each average is hgrn with the constant gate log(1 - alpha)."""
    one = np.ones_like(x["alpha"])
    alpha = np.minimum(x["alpha"], 0.875)
    plain = {**x, "alpha": alpha, "delta": one, "beta": one}
    batch, _, width = x["x"].shape
    inputs = np.repeat(x["x"], alpha.shape[1], axis=2)
    gate = np.broadcast_to(np.log1p(-alpha).ravel(), inputs.shape)
    state = run({"x": inputs, "gate": gate}, name="hgrn", returns="state")
    return run(plain, returns="state"), state.reshape(batch, width, -1)


def without_memory(run, x):
    one = np.ones_like(x["alpha"])
    return run({**x, "alpha": one, "delta": one}), np.sum(x["eta"] * x["beta"], axis=1) * x["x"]


def between(low, high):
    return lambda rng, shape: rng.uniform(low, high, shape)


VARIANT = Variant(
    name="ema",
    family="state",
    summary="Damped multi-dimensional exponential moving average (Mega): every channel averaged at several rates at once.",
    equation="h_t = alpha beta x_t + (1 - alpha delta) h_(t-1), out_t = eta . h_t",
    paper=Paper(
        title="Mega: Moving Average Equipped Gated Attention",
        authors=(
            "Ma, Xuezhe",
            "Zhou, Chunting",
            "Kong, Xiang",
            "He, Junxian",
            "Gui, Liangke",
            "Neubig, Graham",
            "May, Jonathan",
            "Zettlemoyer, Luke",
        ),
        year=2022,
        arxiv="2209.10655",
        where="section 3.1",
    ),
    operands=(
        Operand("x", "B T M", "inputs"),
        Operand("alpha", "M N", "weight of the new", within=(0.0, 1.0), draw=between(0.0, 1.0)),
        Operand("delta", "M N", "damping, from 0 to 1 in the paper", draw=between(0.0, 1.0)),
        Operand("beta", "M N", "expansion of a channel to its averages"),
        Operand("eta", "M N", "reduction of the averages to a channel"),
        Operand("initial_state", "B M N", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B T M", "averaged inputs"),
        Output("state", "B M N", "state after the last token", wide=True),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(flops="8*B*T*M*N", memory="B*M*(T + N)"),
    ordered=lambda params: "T",
    causal={},
    linear_in="eta",
    examples=(
        Example(
            operands={
                "x": [[[4.0], [8.0]]],
                "alpha": [[0.5, 1.0]],
                "delta": [[1.0, 0.5]],
                "beta": [[1.0, 2.0]],
                "eta": [[1.0, 0.5]],
                "initial_state": [[[2.0, 4.0]]],
            },
            returns={"out": [[[8.0], [16.0]]], "state": [[[5.5, 21.0]]]},
            source="by hand: h = (2 + 1, 8 + 2), then (4 + 1.5, 16 + 5); out = 3 + 5, then 5.5 + 10.5",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is a convolution with a sum of exponentials", a_convolution),
        Identity("undamped it is hgrn with the gate log(1 - alpha)", undamped_is_hgrn),
        Identity("at alpha and delta 1 it has no memory", without_memory),
    ),
)
