"""Fast weights with DPFP: the delta rule on products of neighbouring rectified channels, without parameters.

    r      = [max(x, 0), max(-x, 0)],   2 D numbers, indices going round
    phi(x) = r_i r_(i + n) for all i and the shifts n = 1 .. nu, divided by their sum
    S_t    = S_(t-1) + beta_t phi(k_t) (v_t - S_(t-1)^T phi(k_t))^T,   out_t = S_t^T phi(q_t)

Always causal.  The paper's nu is here the length of ``taps``, a factor for the products of each shift, all ones in the paper: it sizes the state,
[nu 2D E] per head.  Query head h reads state head ``h // (Hq // Hkv)``.  S starts at ``initial_state`` (0 if absent) and is returned after the
last token, so that a sequence can be cut anywhere and carried on.  A vector without two neighbouring channels of r above 0 has no features.

What people get wrong: the division by the sum, with which beta = 1 replaces what is stored under a key of a single feature; without it the
state grows.  There is no other normaliser and no scale.  Channels are neighbours by their indices, so that their order matters, and the last of
r is the first one's neighbour.  Indices i + n here, i - n where a library rolls: the same features in another order, which shows in a state
that is handed over.

Checked against flash-linear-attention's recurrent delta rule on features by PyTorch's relu and roll.
"""

import numpy as np

from refattn.pieces.feature_maps import dpfp
from refattn.spec import Cost, Example, Factor, Identity, Operand, Output, Paper, Recurrence, Variant, Write


def define(q, k, v, beta, taps, initial_state):
    batch, heads, n, d = q.shape
    kv_heads, d_v, nu = v.shape[1], v.shape[3], taps.shape[0]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, nu, 2 * d, d_v))
    r = np.zeros(2 * d)
    phi = np.zeros((nu, 2 * d))
    for b in range(batch):
        for g in range(kv_heads):
            for s in range(nu):
                for x in range(2 * d):
                    for y in range(d_v):
                        state[b, g, s, x, y] = initial_state[b, g, s, x, y]
            for t in range(n):
                for x in range(d):
                    r[x], r[d + x] = max(k[b, g, t, x], 0.0), max(-k[b, g, t, x], 0.0)
                total = 0.0
                for s in range(nu):
                    for x in range(2 * d):
                        phi[s, x] = taps[s] * r[x] * r[(x + s + 1) % (2 * d)]
                        total += phi[s, x]
                if total == 0.0:  # no features
                    total = np.inf
                for s in range(nu):
                    for x in range(2 * d):
                        phi[s, x] /= total
                for y in range(d_v):
                    held = 0.0  # what the state answers at the key
                    for s in range(nu):
                        for x in range(2 * d):
                            held += phi[s, x] * state[b, g, s, x, y]
                    change = beta[b, g, t] * (v[b, g, t, y] - held)
                    for s in range(nu):
                        for x in range(2 * d):
                            state[b, g, s, x, y] += phi[s, x] * change
                for h in range(g * group, (g + 1) * group):
                    for x in range(d):
                        r[x], r[d + x] = max(q[b, h, t, x], 0.0), max(-q[b, h, t, x], 0.0)
                    total = 0.0
                    for s in range(nu):
                        for x in range(2 * d):
                            phi[s, x] = taps[s] * r[x] * r[(x + s + 1) % (2 * d)]
                            total += phi[s, x]
                    if total == 0.0:  # no features
                        total = np.inf
                    for s in range(nu):
                        for x in range(2 * d):
                            phi[s, x] /= total
                    for s in range(nu):
                        for x in range(2 * d):
                            for y in range(d_v):
                                out[b, h, t, y] += phi[s, x] * state[b, g, s, x, y]
    return out, state


def recurrence(dims, params):
    key = Factor("k", dpfp, (), ("taps",))
    return Recurrence(
        writes=(Write(key=("beta", key), value=("v",), erase=(key,)),),
        query=(Factor("q", dpfp, (), ("taps",)),),
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("q", "k", "v", "beta")}} for part in (slice(half), slice(half, None)))
    out_1, state = run(one, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def delta_rule_on_features(run, x):
    features = {}
    for name in ("q", "k"):
        r = np.concatenate([np.maximum(x[name], 0.0), np.maximum(-x[name], 0.0)], axis=-1)
        places = np.arange(r.shape[-1])
        products = np.concatenate([tap * r * r[..., (places + n) % r.shape[-1]] for n, tap in enumerate(x["taps"], 1)], axis=-1)
        total = np.sum(products, axis=-1, keepdims=True)
        features[name] = products / np.where(total == 0.0, np.inf, total)
    return run(x), run({**features, "v": x["v"], "beta": x["beta"]}, name="delta", scale=1.0, returns="out")


def lengths_do_not_count(run, x):
    return run(x), run({**x, "q": 4.0 * x["q"], "k": 0.5 * x["k"]})


def equal_taps_cancel(run, x):
    return tuple(run({**x, "taps": np.full_like(x["taps"], tap)}) for tap in (1.0, 3.0))


def nothing_written(run, x):
    return run({**x, "beta": 0.0 * x["beta"]}), 0.0


VARIANT = Variant(
    name="dpfp",
    family="feature",
    summary="Fast weights with DPFP: the delta rule on products of neighbouring rectified channels.",
    equation="S_t = S_(t-1) + beta_t phi(k_t) (v_t - S_(t-1)^T phi(k_t))^T, out_t = S_t^T phi(q_t), phi = r_i r_(i+n) / sum, r = max(+-x, 0)",
    paper=Paper(
        title="Linear Transformers Are Secretly Fast Weight Programmers",
        authors=("Schlag, Imanol", "Irie, Kazuki", "Schmidhuber, Jürgen"),
        year=2021,
        arxiv="2102.11174",
        where="sections 4.2 and 5",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("beta", "B Hkv T", "write strength", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("taps", "R", "factors of the products of each shift, ones in the paper", draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
        Operand("initial_state", "B Hkv R D+D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv R D+D E", "state after the last token", wide=True),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*T*(Hkv*(8*R*D + E*(8*R*D + 2)) + Hq*R*D*(8 + 4*E))",
        memory="B*(Hq*T*E + 2*Hkv*R*D*E) + 2*D*(R + 1)",
    ),
    ordered=lambda params: "T D",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0], [3.0, 1.0]]]],
                "k": [[[[2.0, 1.0], [1.0, 5.0]]]],
                "v": [[[[4.0], [8.0]]]],
                "beta": [[[1.0, 0.5]]],
                "taps": [1.0],
            },
            returns={"out": [[[[4.0], [6.0]]]], "state": [[[[[6.0], [0.0], [0.0], [0.0]]]]]},
            source="by hand: two positive channels have the one feature r_0 r_1, which is 1; S = 4, then 4 + (8 - 4)/2",
        ),
        Example(
            operands={"q": [[[[1.0, -1.0]]]], "k": [[[[1.0, -1.0]]]], "v": [[[[4.0]]]], "beta": [[[1.0]]], "taps": [3.0, 1.0, 1.0]},
            returns={"out": [[[[2.5]]]], "state": [[[[[0.0], [0.0], [0.0], [3.0]], [[0.0]] * 4, [[1.0], [0.0], [0.0], [0.0]]]]]},
            source="by hand: r = (1, 0, 0, 1), whose product r_3 r_0 comes with shifts 1 and 3, weighing 3/4 and 1/4",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is the delta rule on the features", delta_rule_on_features),
        Identity("the lengths of queries and keys do not count", lengths_do_not_count),
        Identity("only the ratios of taps count", equal_taps_cancel),
        Identity("without write strength nothing is answered", nothing_written),
    ),
)
