"""Random feature attention (RFA): a softmax kernel of queries and keys of length one, estimated by random sines and cosines.

    phi(x) = [sin(w_1 . u) .. sin(w_m . u), cos(w_1 . u) .. cos(w_m . u)] / sqrt(m),   u = sigma x / |x|
    out_i = phi(q_i)^T Z_i / (phi(q_i) . z_i),   Z_i = sum_(j visible) phi(k_j) v_j^T,   z_i = sum_(j visible) phi(k_j)

The rows w_r of ``w`` are an operand; the paper draws them from the standard normal distribution and learns sigma, one per channel, which plays
the part of a temperature.  Between vectors of length one the Gaussian kernel is the softmax kernel but for a constant, which cancels.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: leaving the lengths in, which makes the kernel another one; the order of sines and cosines, which matters as soon as a state
is handed over; denominators, which are estimates and may come near 0.  The zero vector has no direction; here its angles are 0.

Checked against a composition of PyTorch's normalize, matmul, sin and cos, and statistically against its kernel.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import rfa
from refattn.spec import Choice, Cost, Example, Factor, Identity, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, w, sigma, initial_state, initial_mass, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    m = w.shape[0]
    group = heads // kv_heads
    root_m = math.sqrt(m)
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, 2 * m, d_v))
    mass = np.zeros((batch, kv_heads, 2 * m))
    phi = np.zeros(2 * m)
    stretched = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for f in range(2 * m):
                mass[b, g, f] = initial_mass[b, g, f]
                for y in range(d_v):
                    state[b, g, f, y] = initial_state[b, g, f, y]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    square = 0.0
                    for x in range(d):
                        square += k[b, g, j, x] * k[b, g, j, x]
                    length = math.sqrt(square)
                    if length == 0.0:  # no direction
                        length = np.inf
                    for x in range(d):
                        stretched[x] = sigma[x] * k[b, g, j, x] / length
                    for f in range(m):
                        angle = 0.0
                        for x in range(d):
                            angle += w[f, x] * stretched[x]
                        phi[f] = math.sin(angle) / root_m
                        phi[m + f] = math.cos(angle) / root_m
                    for f in range(2 * m):
                        mass[b, g, f] += phi[f]
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    square = 0.0
                    for x in range(d):
                        square += q[b, h, i, x] * q[b, h, i, x]
                    length = math.sqrt(square)
                    if length == 0.0:  # no direction
                        length = np.inf
                    for x in range(d):
                        stretched[x] = sigma[x] * q[b, h, i, x] / length
                    for f in range(m):
                        angle = 0.0
                        for x in range(d):
                            angle += w[f, x] * stretched[x]
                        phi[f] = math.sin(angle) / root_m
                        phi[m + f] = math.cos(angle) / root_m
                    total = 0.0
                    for f in range(2 * m):
                        total += phi[f] * mass[b, g, f]
                        for y in range(d_v):
                            out[b, h, i, y] += phi[f] * state[b, g, f, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state, mass


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=(Factor("k", rfa, (), ("w", "sigma")),), value=("v",)),),
        query=(Factor("q", rfa, (), ("w", "sigma")),),
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


def lengths_do_not_count(run, x):
    return run(x), run({**x, "q": 3.0 * x["q"], "k": 0.7 * x["k"]})


def random_fourier_of_directions(run, x):
    unit = {name: x[name] / np.linalg.norm(x[name], axis=-1, keepdims=True) for name in ("q", "k")}
    return run(x), run({**{name: x[name] for name in ("v", "w")}, **unit}, name="random_fourier", scale=1.0, returns="out")


VARIANT = Variant(
    name="rfa",
    family="feature",
    summary="Random feature attention (RFA): random sines and cosines of directions for features, frequencies given.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)), phi(x) = [sin(W x/|x|), cos(W x/|x|)] / sqrt(m)",
    paper=Paper(
        title="Random Feature Attention",
        authors=(
            "Peng, Hao",
            "Pappas, Nikolaos",
            "Yogatama, Dani",
            "Schwartz, Roy",
            "Smith, Noah A.",
            "Kong, Lingpeng",
        ),
        year=2021,
        arxiv="2103.02143",
        where="section 3.1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("w", "F D", "random frequencies, one a row"),
        Operand("sigma", "D", "learned stretch of each channel", absent=1.0, draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
        Operand("initial_state", "B Hkv F+F E", "sum of features times values of earlier keys", absent=0.0),
        Operand(
            "initial_mass",
            "B Hkv F+F",
            "sum of features of earlier keys",
            absent=0.0,
            draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv F+F E", "sum of features times values, after the last key", wide=True),
        Output("mass", "B Hkv F+F", "sum of features, after the last key", wide=True),
    ),
    params=(Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="1 + B*(Hkv*S*(4*D + 1 + F*(2*D + 4*E + 6)) + Hq*T*(4*D + 1 + F*(2*D + 4*E + 8) + E))",
        memory="B*(Hq*T*E + Hkv*2*F*(E + 1)) + 2*F + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[3.0]]]], "k": [[[[2.0], [-0.5]]]], "v": [[[[4.0], [8.0]]]], "w": [[math.pi / 6.0]]},
            returns={"out": [[[[16.0 / 3.0]]]]},
            source="by hand: angles 30, 30 and -30 degrees, so weights 1 and cos(60 degrees) = 1/2",
        ),
        Example(
            operands={"q": [[[[3.0], [1.0]]]], "k": [[[[2.0], [-0.5]]]], "v": [[[[4.0], [8.0]]]], "w": [[1.0]], "sigma": [math.pi / 6.0]},
            params={"causal": True},
            returns={"out": [[[[4.0], [16.0 / 3.0]]]]},
            source="by hand: the same angles, by way of sigma",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("the lengths of queries and keys do not count", lengths_do_not_count),
        Identity("it is random Fourier attention of directions", random_fourier_of_directions),
    ),
)
