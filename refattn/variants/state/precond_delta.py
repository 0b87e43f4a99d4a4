"""Preconditioned DeltaNet: the delta rule whose write is longer along key channels that were rarely used, by a running estimate of curvature.

    A_t   = exp(curvature_gate_t) A_{t-1} + curvature_beta_t k_t^2                         per key channel
    r_t   = log(A_t + eps) - center,   m_t = base^(-r_t / (1 + |r_t|))                     between 1/base and base
    S~_t  = diag(exp(gate_t)) S_{t-1},   S_t = S~_t + beta_t (m_t * k_t) (v_t - S~_t^T k_t)^T
    out_t = scale * S_t^T q_t

A is the diagonal of the keys' second moments, and m the bounded stand-in for its inverse.  The gate is per key channel as in Kimi Delta
Attention (the preconditioned KDA), alike for all channels in the preconditioned gated DeltaNet, and 0 if absent.  Always causal.  S_{-1} and
A_{-1} are ``initial_state`` and ``initial_curvature`` (0 if absent); ``state`` and ``curvature`` are S and A after the last token, so a
sequence can be cut anywhere and carried on with both.  Query head h reads the state of key-value head ``h // (Hq // Hkv)``.

What people get wrong: preconditioning the key that the state is asked at, too: only the written one is.  Using the curvature of before
the token: A_t has k_t already.  The normalisation of keys and queries: flash-linear-attention's gated reference divides both by
max(|x|, 1e-12) inside, its KDA reference does not, and neither does this.  Its defaults, base 1.5, center -0.2 and eps 1e-6, are those here;
its center may be one number per head, as here.  The scale is 1/sqrt(D) there and here.

Checked against flash-linear-attention's two recurrent references.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, curvature_gate, curvature_beta, beta, gate, center, initial_state, initial_curvature, scale, base, eps):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    curvature = np.zeros((batch, kv_heads, d))
    longer = np.zeros(d)  # m
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                curvature[b, g, x] = initial_curvature[b, g, x]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                kept = math.exp(curvature_gate[b, g, t])
                for x in range(d):
                    curvature[b, g, x] = kept * curvature[b, g, x] + curvature_beta[b, g, t] * k[b, g, t, x] * k[b, g, t, x]
                    r = math.log(curvature[b, g, x] + eps) - center[g]
                    longer[x] = math.exp(-r / (1.0 + abs(r)) * math.log(base))
                    alpha = math.exp(gate[b, g, t, x])
                    for y in range(d_v):
                        state[b, g, x, y] *= alpha
                for y in range(d_v):
                    held = 0.0  # what the faded state answers at the key
                    for x in range(d):
                        held += k[b, g, t, x] * state[b, g, x, y]
                    change = beta[b, g, t] * (v[b, g, t, y] - held)
                    for x in range(d):
                        state[b, g, x, y] += longer[x] * k[b, g, t, x] * change
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state, curvature


def reduction(dims, params):
    """Kimi Delta Attention with longer keys to write at, once all curvatures are known."""

    def curvatures(x):
        """Before the first token and after every one: sums over twice as many tokens each time, and what they fade by."""
        gained = x["curvature_beta"][..., None] * x["k"] * x["k"]
        total = np.concatenate([x["initial_curvature"][:, :, None], gained], axis=2)
        fading = np.concatenate([np.zeros((dims["B"], dims["Hkv"], 1)), x["curvature_gate"]], axis=2)[..., None]
        tokens = 1
        while tokens <= dims["T"]:
            earlier = np.exp(fading[:, :, tokens:]) * total[:, :, :-tokens]
            total = np.concatenate([total[:, :, :tokens], total[:, :, tokens:] + earlier], axis=2)
            fading = np.concatenate([fading[:, :, :tokens], fading[:, :, tokens:] + fading[:, :, :-tokens]], axis=2)
            tokens *= 2
        return total

    def operands(x):
        r = np.log(curvatures(x)[:, :, 1:] + params["eps"]) - x["center"][:, None, None]
        longer = np.exp(-r / (1.0 + np.abs(r)) * math.log(params["base"]))
        return {**{name: x[name] for name in ("q", "k", "v", "beta", "gate", "initial_state")}, "longer": longer * x["k"]}

    def outputs(x, found):
        return {"out": found["out"], "state": found["state"], "curvature": curvatures(x)[:, :, -1]}

    return Reduction(
        Recurrence(
            (Write(("beta", "longer"), ("v",), erase=("k",)),),
            log_decay=("gate",),
            scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        ),
        {
            "q": "B Hq T D",
            **dict.fromkeys(("k", "longer", "gate"), "B Hkv T D"),
            "v": "B Hkv T E",
            "beta": "B Hkv T",
            "initial_state": "B Hkv D E",
            "out": "B Hq T E",
        },
        operands,
        outputs,
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    returns = ("out", "state", "curvature")
    out_1, state, curvature = run({name: a[:, :, :half] for name, a in x.items()}, returns=returns)
    rest = {name: a[:, :, half:] for name, a in x.items()}
    out_2, state, curvature = run({**rest, "initial_state": state, "initial_curvature": curvature}, returns=returns)
    return run(x, returns=returns), (np.concatenate([out_1, out_2], axis=2), state, curvature)


def base_one_is_kda(run, x):
    batch, kv_heads, n, d = x["k"].shape
    gate = -np.linspace(0.0, 1.0, batch * kv_heads * n * d).reshape(batch, kv_heads, n, d)
    plain = {"q": x["q"], "k": x["k"], "v": x["v"], "gate": gate, "beta": x["beta"]}
    return run({**x, "gate": gate}, base=1.0, returns=("out", "state")), run(plain, name="kda", returns=("out", "state"))


def erasing_and_writing_apart_is_gdn2(run, x):
    """With the preconditioner worked out beforehand: Gated DeltaNet-2 writes at the longer keys and, by `erase`, asks at the plain ones."""
    kept, gained = np.exp(x["curvature_gate"])[..., None], x["curvature_beta"][..., None] * x["k"] ** 2
    moments = np.zeros_like(x["k"])
    for t in range(moments.shape[2]):
        moments[:, :, t] = gained[:, :, t] + (kept[:, :, t] * moments[:, :, t - 1] if t > 0 else 0.0)
    r = np.log(moments + 1e-6) + 0.2
    longer = 1.5 ** (-r / (1.0 + np.abs(r)))
    beta = x["beta"][..., None]
    plain = {"q": x["q"], "k": longer * x["k"], "v": x["v"], "gate": 0.0 * x["k"]}
    apart = {**plain, "erase": beta / longer, "write": np.broadcast_to(beta, x["v"].shape)}
    return run(x, returns=("out", "state", "curvature")), (*run(apart, name="gdn2", returns=("out", "state")), moments[:, :, -1])


def a_curvature_at_the_center_changes_nothing(run, x):
    steady = {**x, "curvature_gate": 0.0 * x["curvature_gate"], "curvature_beta": 0.0 * x["curvature_beta"]}
    steady["initial_curvature"] = np.full((*x["k"].shape[:2], x["k"].shape[3]), 0.25)
    steady["center"] = np.full(x["k"].shape[1], math.log(0.75))
    plain = {name: x[name] for name in ("q", "k", "v", "beta")}
    return run(steady, eps=0.5, returns=("out", "state")), run(plain, name="delta", returns=("out", "state"))


VARIANT = Variant(
    name="precond_delta",
    family="state",
    summary="Preconditioned DeltaNet: the delta rule with writes bounded and stretched by the curvature of past keys.",
    equation="S~_t = diag(exp(gate_t)) S_(t-1), S_t = S~_t + beta_t (m_t * k_t) (v_t - S~_t^T k_t)^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="Preconditioned DeltaNet: Curvature-aware Sequence Modeling for Linear Recurrences",
        authors=(
            "Tumma, Neehal",
            "Loo, Noel",
            "Rus, Daniela",
        ),
        year=2026,
        arxiv="2604.21100",
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
            "curvature_gate",
            "B Hkv T",
            "natural logarithm of the factor by which the curvature fades",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
        ),
        Operand("curvature_beta", "B Hkv T", "weight of the new key in the curvature", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("beta", "B Hkv T", "write strength", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the factors by which rows of the state fade",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
            absent=0.0,
        ),
        Operand(
            "center", "Hkv", "logarithm of the curvature at which nothing changes", draw=lambda rng, shape: rng.uniform(-1.0, 0.5, shape), absent=-0.2
        ),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
        Operand("initial_curvature", "B Hkv D", "curvature before the first token", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape), absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
        Output("curvature", "B Hkv D", "curvature after the last token", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
        Param("base", Number(at_least=1.0), 1.5, "bound on the preconditioner and on its inverse", tries=(1.0, 4.0)),
        Param("eps", Number(above=0.0), 1e-6, "added to the curvature", tries=(0.5,)),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*T*(Hkv*(1 + D*(13 + E) + E*(5*D + 2)) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*(E + 1)) + D",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0]]]],
                "k": [[[[2.0]]]],
                "v": [[[[9.0]]]],
                "curvature_gate": [[[-math.inf]]],
                "curvature_beta": [[[0.0]]],
                "beta": [[[0.5]]],
                "center": [-1.0],
                "initial_state": [[[[4.0]]]],
                "initial_curvature": [[[7.0]]],
            },
            params={"base": 4.0, "eps": 1.0},
            returns={"out": [[[[4.5]]]], "state": [[[[4.5]]]], "curvature": [[[0.0]]]},
            source="by hand: A = 0, r = log 1 + 1 = 1, m = 4^(-1/2) = 1/2; S = 4 + 1/2 (1/2 2) (9 - 8)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state and its curvature", cut_and_carried_on),
        Identity("with base 1 it is KDA", base_one_is_kda),
        Identity("with the preconditioner given it is Gated DeltaNet-2", erasing_and_writing_apart_is_gdn2),
        Identity("a curvature at the center changes nothing", a_curvature_at_the_center_changes_nothing),
    ),
)
