"""Performer: softmax attention estimated by positive random features (FAVOR+).

    phi(x)_r = (exp(w_r . x' - |x'|^2 / 2) + eps) / sqrt(m),   x' = sqrt(scale) x,   r = 1..m
    out_i = phi(q_i)^T Z_i / (phi(q_i) . z_i),   Z_i = sum_(j visible) phi(k_j) v_j^T,   z_i = sum_(j visible) phi(k_j)

Without eps the mean of phi(q) . phi(k) over normal w_r is exp(scale q . k).  The rows w_r of ``w`` are an operand: nothing is drawn inside.  They are
drawn for tests as the paper has them, orthogonal in blocks of D, with the lengths of normal vectors.  An exponent is at most |w_r|^2 / 2, so that
nothing overflows for widths in use, but all features of a long vector may vanish; eps then makes them equal.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

``stabilizer="published"`` subtracts from the exponents what the published code subtracts: from a query's its largest w_r . x', from all keys' the
largest over all features and all keys.  Without eps that changes nothing but the range of the numbers (and the units of the state).

What people get wrong: the published stabiliser in a causal run, where it looks at keys to come: eps is added after it, so that a large key
changes the outputs before it.  Drawing orthogonal rows by a QR decomposition without the signs of R's diagonal: the first entry of each
block's first row then never changes its sign, and the estimate is biased; performer-pytorch does.  Different features under the same
name: idiap's Favor has exp(w . x) and exp(-w . x) side by side.

Checked against performer-pytorch's softmax_kernel with its causal and its full attention, and statistically against softmax.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import favor
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, w, initial_state, initial_mass, scale, eps, stabilizer, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    m = w.shape[0]
    group = heads // kv_heads
    root, root_m = math.sqrt(scale), math.sqrt(m)
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, m, d_v))
    mass = np.zeros((batch, kv_heads, m))
    phi = np.zeros(m)
    scaled = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for f in range(m):
                mass[b, g, f] = initial_mass[b, g, f]
                for y in range(d_v):
                    state[b, g, f, y] = initial_state[b, g, f, y]
            top_k = 0.0
            if stabilizer == 1:  # over keys to come as well
                top_k = -np.inf
                for j in range(n_k):
                    for f in range(m):
                        projected = 0.0
                        for x in range(d):
                            projected += w[f, x] * root * k[b, g, j, x]
                        top_k = max(projected, top_k)
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    square = 0.0
                    for x in range(d):
                        scaled[x] = root * k[b, g, j, x]
                        square += scaled[x] * scaled[x]
                    for f in range(m):
                        phi[f] = 0.0
                        for x in range(d):
                            phi[f] += w[f, x] * scaled[x]
                    for f in range(m):
                        phi[f] = (math.exp(phi[f] - square / 2.0 - top_k) + eps) / root_m
                    for f in range(m):
                        mass[b, g, f] += phi[f]
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    square = 0.0
                    for x in range(d):
                        scaled[x] = root * q[b, h, i, x]
                        square += scaled[x] * scaled[x]
                    for f in range(m):
                        phi[f] = 0.0
                        for x in range(d):
                            phi[f] += w[f, x] * scaled[x]
                    top = 0.0
                    if stabilizer == 1:
                        top = phi[0]
                        for f in range(m):
                            top = max(phi[f], top)
                    for f in range(m):
                        phi[f] = (math.exp(phi[f] - square / 2.0 - top) + eps) / root_m
                    total = 0.0
                    for f in range(m):
                        total += phi[f] * mass[b, g, f]
                        for y in range(d_v):
                            out[b, h, i, y] += phi[f] * state[b, g, f, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state, mass


def recurrence(dims, params):
    scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
    stabilized = params["stabilizer"] == "published"
    key, query = ((scale, params["eps"], stabilized * n) for n in (favor.SEQUENCE, favor.TOKEN))
    return Recurrence(
        writes=(Write(key=(Factor("k", favor, key, ("w",)),), value=("v",)),),
        query=(Factor("q", favor, query, ("w",)),),
        normalizer="sum",
        causal=params["causal"],
    )


def cut_and_carried_on(run, x):
    n, keys = x["q"].shape[2], x["k"].shape[2]
    first = max(n // 2, n - keys)  # queries of the first part; in both parts the last query stands at the last key
    one = {**x, "q": x["q"][:, :, :first], **{name: x[name][:, :, : first + keys - n] for name in ("k", "v")}}
    two = {**x, "q": x["q"][:, :, first:], **{name: x[name][:, :, first + keys - n :] for name in ("k", "v")}}
    results = {"causal": True, "returns": ("out", "state", "mass")}
    out_1, state, mass = run(one, **results)
    out_2, state, mass = run({**two, "initial_state": state, "initial_mass": mass}, **results)
    return run(x, **results), (np.concatenate([out_1, out_2], axis=2), state, mass)


def keys_in_two_parts(run, x):
    half = x["k"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("k", "v")}} for part in (slice(half), slice(half, None)))
    state, mass = run(one, causal=False, returns=("state", "mass"))
    return run(x, causal=False), run({**two, "initial_state": state, "initial_mass": mass}, causal=False)


def ones_give_one(run, x):
    return run({**x, "v": np.ones_like(x["v"])}, causal=False), 1.0


def stabilizer_cancels(run, x):
    return tuple(run(x, eps=0.0, stabilizer=stabilizer, causal=False) for stabilizer in ("none", "published"))


def turned_together(run, x):
    turn = np.linalg.qr(np.sin(np.arange(1.0, 1.0 + x["w"].shape[1] ** 2)).reshape(x["w"].shape[1], -1))[0]
    return run(x), run({**x, **{name: x[name] @ turn for name in ("q", "k", "w")}})


VARIANT = Variant(
    name="performer",
    family="feature",
    summary="Performer: softmax attention estimated by positive random features (FAVOR+), projection given.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)), phi(x)_r = exp(w_r . x - |x|^2 / 2)",
    paper=Paper(
        title="Rethinking Attention with Performers",
        authors=(
            "Choromanski, Krzysztof",
            "Likhosherstov, Valerii",
            "Dohan, David",
            "Song, Xingyou",
            "Gane, Andreea",
            "Sarlos, Tamas",
            "Hawkins, Peter",
            "Davis, Jared",
            "Mohiuddin, Afroz",
            "Kaiser, Lukasz",
            "Belanger, David",
            "Colwell, Lucy",
            "Weller, Adrian",
        ),
        year=2020,
        arxiv="2009.14794",
        where="sections 2.2 to 2.4 and lemma 1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("w", "F D", "random projection, a feature a row", draw=favor.orthogonal),
        Operand("initial_state", "B Hkv F E", "sum of features times values of earlier keys", absent=0.0),
        Operand(
            "initial_mass",
            "B Hkv F",
            "sum of features of earlier keys",
            absent=0.0,
            draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv F E", "sum of features times values, after the last key", wide=True),
        Output("mass", "B Hkv F", "sum of features, after the last key", wide=True),
    ),
    params=(
        Param(
            "scale",
            Number(above=0.0, optional=True),
            None,
            "multiplies q . k; None is 1/sqrt(D)",
            absent=lambda dims: dims["D"] ** -0.5,
            tries=(0.37,),
        ),
        Param("eps", Number(at_least=0.0), 1e-4, "added to every exponential", tries=(0.0,)),
        Param("stabilizer", Choice(("none", "published")), "none", "what is subtracted from the exponents"),  # has kinks where keys are equal
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="2 + B*(Hkv*S*(3*D + F*(2*D + 2*E + 7) + 3*F*D*(stabilizer == 1)) + Hq*T*(3*D + F*(2*D + 2*E + 8) + E))",
        memory="B*(Hq*T*E + Hkv*F*(E + 1)) + F + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True, "stabilizer": "none"},
    examples=(
        Example(
            operands={"q": [[[[0.0]]]], "k": [[[[0.0], [1.0]]]], "v": [[[[4.0], [8.0]]]], "w": [[1.0]]},
            params={"eps": 0.0},
            returns={"out": [[[[(4.0 + 8.0 * math.exp(0.5)) / (1.0 + math.exp(0.5))]]]]},
            source="by hand: phi(q) = 1, phi(k) = 1 and exp(1 - 1/2)",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "k": [[[[0.0], [2.0]]]], "v": [[[[4.0], [8.0]]]], "w": [[1.0], [1.0]]},
            params={"eps": 0.5, "causal": True},
            returns={"out": [[[[4.0], [6.0]]]], "state": [[[[18.0 / math.sqrt(2.0)]] * 2]], "mass": [[[3.0 / math.sqrt(2.0)] * 2]]},
            source="by hand: exp(2 - 4/2) = 1, so both keys have features 1.5 / sqrt(2)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("values all one give one", ones_give_one),
        Identity("without eps the stabiliser cancels", stabilizer_cancels),
        Identity("turning queries, keys and projection together changes nothing", turned_together),
    ),
)
