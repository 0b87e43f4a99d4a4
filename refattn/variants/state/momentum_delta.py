"""Momentum DeltaNet: the delta rule's correction gathers speed, as gradient descent with momentum does.

    w_t   = p_t^T S_{t-1} - v_t                                        the error of the state at p, a row
    M_t   = mu_t M_{t-1} + eta_t k_t w_t,   mu_t = exp(momentum_gate_t)
    S_t   = alpha_t S_{t-1} - beta_t M_t,   alpha_t = exp(gate_t)
    out_t = scale * S_t^T q_t

Always causal.  S_{-1} and M_{-1} are ``initial_state`` and ``initial_momentum`` (0 if absent); ``state`` and ``momentum`` are S and M after
the last token, so a sequence can be cut anywhere and carried on with both.  Query head h reads the state of key-value head
``h // (Hq // Hkv)``.  Keys are taken as they come.

What people get wrong: the error is that of the old state, not yet faded, so the gated delta rule is mu = 0 with p = alpha k, not p = k.
The sign of M: it holds the gradient, and is subtracted.  Carrying S alone across a cut.  flash-linear-attention takes (q, k, v,
log_alpha, log_mu, p, beta, eta) in its recurrent reference and (q, k, v, p, log_alpha, log_mu, beta, eta) in its chunked one, which
adds 1e-6 to beta and loses all digits where much is forgotten, a difference of sums; it stacks S and M in one array.  The scale is
1/sqrt(D) there and here.

Checked against flash-linear-attention's recurrent reference, and where little is forgotten its chunked one, called with beta less 1e-6.
"""

import math

import numpy as np

from refattn.pieces.arrays import sums_between
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, p, gate, momentum_gate, eta, beta, initial_state, initial_momentum, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    momentum = np.zeros((batch, kv_heads, d, d_v))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
                    momentum[b, g, x, y] = initial_momentum[b, g, x, y]
            for t in range(n):
                alpha = math.exp(gate[b, g, t])
                mu = math.exp(momentum_gate[b, g, t])
                for y in range(d_v):
                    held = 0.0  # what the old state answers at p
                    for x in range(d):
                        held += p[b, g, t, x] * state[b, g, x, y]
                    error = held - v[b, g, t, y]
                    for x in range(d):
                        momentum[b, g, x, y] = mu * momentum[b, g, x, y] + eta[b, g, t] * k[b, g, t, x] * error
                        state[b, g, x, y] = alpha * state[b, g, x, y] - beta[b, g, t] * momentum[b, g, x, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state, momentum


def vectorized(x, params):
    """In pieces of 64 tokens, whose errors read one another: a triangular system."""
    n, group = x["q"].shape[2], x["q"].shape[1] // x["k"].shape[1]
    state, momentum, outs = x["initial_state"], x["initial_momentum"], []
    for first in range(0, n, 64):
        names = ("q", "k", "v", "p", "gate", "momentum_gate", "eta", "beta")
        q, k, v, p, gate, momentum_gate, eta, beta = (x[name][:, :, first : first + 64] for name in names)
        many = k.shape[2]
        seen = np.tri(many, dtype=bool)
        remaining, kept = (np.where(seen, np.exp(sums_between(a)), 0.0) for a in (gate, momentum_gate))
        # What M and S after each token owe to the piece's errors, to M and to S before it.
        of_errors, of_momentum, of_state = kept * eta[:, :, None], np.exp(np.cumsum(momentum_gate, axis=2)), np.exp(np.cumsum(gate, axis=2))
        steps = remaining * beta[:, :, None]
        written, from_momentum = steps @ of_errors, (steps @ of_momentum[..., None])[..., 0]
        none = np.zeros((*k.shape[:2], 1))
        before = [np.concatenate([none + start, a[:, :, :-1]], axis=2) for a, start in ((of_state, 1.0), (from_momentum, 0.0))]
        reads = np.concatenate([np.zeros((*k.shape[:2], 1, many)), written[:, :, :-1]], axis=2) * (p @ np.swapaxes(k, -1, -2))
        found = before[0][..., None] * (p @ state) - before[1][..., None] * (p @ momentum) - v
        errors = np.linalg.solve(np.eye(many) + reads, found)
        arrays = (written, k, errors, of_state, from_momentum, state, momentum)
        own, keys, changes, by_state, by_momentum, s, m = (np.repeat(a, group, axis=1) for a in arrays)
        read = by_state[..., None] * (q @ s) - by_momentum[..., None] * (q @ m) - own * (q @ np.swapaxes(keys, -1, -2)) @ changes
        outs.append(params["scale"] * read)
        faded = of_state[:, :, -1, None, None] * state - from_momentum[:, :, -1, None, None] * momentum
        state = faded - np.swapaxes(written[:, :, -1, :, None] * k, -1, -2) @ errors
        momentum = of_momentum[:, :, -1, None, None] * momentum + np.swapaxes(of_errors[:, :, -1, :, None] * k, -1, -2) @ errors
    return {"out": np.concatenate(outs, axis=2), "state": state, "momentum": momentum}


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    returns = ("out", "state", "momentum")
    out_1, state, momentum = run({name: a[:, :, :half] for name, a in x.items()}, returns=returns)
    rest = {name: a[:, :, half:] for name, a in x.items()}
    out_2, state, momentum = run({**rest, "initial_state": state, "initial_momentum": momentum}, returns=returns)
    return run(x, returns=returns), (np.concatenate([out_1, out_2], axis=2), state, momentum)


def without_momentum_is_gated_delta(run, x):
    plain = {name: x[name] for name in ("q", "k", "v", "gate")}
    tied = {**x, "p": np.exp(x["gate"])[..., None] * x["k"], "momentum_gate": np.full_like(x["gate"], -np.inf)}
    strength = x["eta"] * x["beta"]
    return run(tied, returns=("out", "state")), run({**plain, "beta": strength}, name="gated_delta", returns=("out", "state"))


def everything_gathers(run, x):
    """Without forgetting of either kind and with p = 0, M is minus the summed writes, and S the sum of its sums."""
    start = {**x, "p": 0.0 * x["p"], "gate": 0.0 * x["gate"], "momentum_gate": 0.0 * x["gate"], "beta": np.ones_like(x["beta"])}
    gathered = np.cumsum(np.einsum("bgt,bgtx,bgty->bgtxy", x["eta"], x["k"], x["v"]), axis=2)
    states = np.cumsum(gathered, axis=2)
    out = 0.5 * np.einsum("bhtx,bhtxy->bhty", x["q"], np.repeat(states, x["q"].shape[1] // states.shape[1], axis=1))
    return run(start, scale=0.5, returns=("out", "state", "momentum")), (out, states[:, :, -1], -gathered[:, :, -1])


def in_one_state_twice_as_high(run, x):
    """S above M is one state of a linear recurrence; everything written is carried on by products of its transitions."""
    d = x["k"].shape[3]
    eye = np.eye(d)
    alpha, mu = (np.exp(x[name])[..., None, None] for name in ("gate", "momentum_gate"))
    beta = x["beta"][..., None, None]
    asked = x["eta"][..., None, None] * x["k"][..., :, None] * x["p"][..., None, :]
    told = -x["eta"][..., None, None] * x["k"][..., :, None] * x["v"][..., None, :]
    upper = np.concatenate([alpha * eye - beta * asked, -beta * mu * eye], axis=-1)
    transition = np.concatenate([upper, np.concatenate([asked, mu * eye], axis=-1)], axis=-2)
    written = np.concatenate([-beta * told, told], axis=-2)
    states = np.zeros_like(written)
    for t in range(written.shape[2]):
        product = np.eye(2 * d)
        for j in range(t, -1, -1):
            states[:, :, t] += product @ written[:, :, j]
            product = product @ transition[:, :, j]
    group = x["q"].shape[1] // states.shape[1]
    out = 0.5 * np.einsum("bhtx,bhtxy->bhty", x["q"], np.repeat(states[..., :d, :], group, axis=1))
    return run(x, scale=0.5, returns=("out", "state", "momentum")), (out, states[:, :, -1, :d], states[:, :, -1, d:])


VARIANT = Variant(
    name="momentum_delta",
    family="state",
    summary="Momentum DeltaNet: the delta rule as gradient descent with momentum.",
    equation="M_t = exp(momentum_gate_t) M_(t-1) + eta_t k_t (p_t^T S_(t-1) - v_t), S_t = exp(gate_t) S_(t-1) - beta_t M_t, out_t = scale S_t^T q_t",
    paper=Paper(
        title="MDN: Parallelizing Stepwise Momentum for Delta Linear Attention",
        authors=(
            "Huang, Yulong",
            "Liu, Xiang",
            "Huang, Hongxiang",
            "Lin, Xiaopeng",
            "Liu, Zunchang",
            "Chu, Xiaowen",
            "Xie, Zeke",
            "Cheng, Bojun",
        ),
        year=2026,
        arxiv="2605.05838",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand(
            "k",
            "B Hkv T D",
            "keys, not normalised here",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "p",
            "B Hkv T D",
            "where the old state is asked for its error",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand(
            "gate", "B Hkv T", "natural logarithm of the factor alpha by which the state fades", draw=lambda rng, shape: -rng.exponential(0.2, shape)
        ),
        Operand(
            "momentum_gate",
            "B Hkv T",
            "natural logarithm of the factor mu by which the momentum fades",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
        ),
        Operand("eta", "B Hkv T", "how much of the error goes into the momentum", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("beta", "B Hkv T", "how much of the momentum goes into the state", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
        Operand("initial_momentum", "B Hkv D E", "momentum before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
        Output("momentum", "B Hkv D E", "momentum after the last token", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies q; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops="B*T*(Hkv*(2 + E*(9*D + 1)) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + 2*Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0]]]],
                "k": [[[[1.0], [2.0]]]],
                "v": [[[[8.0], [3.0]]]],
                "p": [[[[1.0], [1.0]]]],
                "gate": [[[0.0, math.log(0.5)]]],
                "momentum_gate": [[[0.0, math.log(0.25)]]],
                "eta": [[[1.0, 0.5]]],
                "beta": [[[0.5, 1.0]]],
                "initial_state": [[[[2.0]]]],
                "initial_momentum": [[[[2.0]]]],
            },
            returns={"out": [[[[4.0], [2.0]]]], "state": [[[[2.0]]]], "momentum": [[[[0.0]]]]},
            source="by hand: M = 2 + (2 - 8) = -4, S = 2 + 2 = 4; then M = -1 + (4 - 3) = 0, S = 2 - 0",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state and its momentum", cut_and_carried_on),
        Identity("without momentum and with p = alpha k it is the gated delta rule", without_momentum_is_gated_delta),
        Identity("without fading and with p = 0 the state sums up the sums of what is written", everything_gathers),
        Identity("state and momentum are one linear recurrence", in_one_state_twice_as_high),
    ),
)
