"""Random Fourier features: attention by a Gaussian or softmax kernel, estimated by random cosines and sines.

    phi(x) = a(x) [cos(w_1 . x') .. cos(w_m . x'), sin(w_1 . x') .. sin(w_m . x')] / sqrt(m),   x' = sqrt(scale) x
    out_i = phi(q_i)^T Z_i / (phi(q_i) . z_i + eps),   Z_i = sum_(j visible) phi(k_j) v_j^T,   z_i = sum_(j visible) phi(k_j)

For ``kernel="gaussian"`` a is 1 and the mean of phi(q) . phi(k) over normal w_r is exp(-scale |q - k|^2 / 2); for ``"softmax"`` a(x) is
exp(|x'|^2 / 2) and the mean is exp(scale q . k), the trigonometric estimate that the Performer paper compares with.  The rows w_r of ``w`` are an
operand.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: denominators are sums of estimates that may be negative or nearly 0, however positive their means.  The bandwidth:
exp(-scale |q - k|^2 / 2) has the 2.  The number of features is 2 m: libraries that are asked for n of them draw n / 2 rows.

Checked against a composition of PyTorch's matmul, cos and sin, and statistically against both kernels.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import favor, favor_trig
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, w, initial_state, initial_mass, scale, kernel, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    m = w.shape[0]
    group = heads // kv_heads
    root, root_m = math.sqrt(scale), math.sqrt(m)
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, 2 * m, d_v))
    mass = np.zeros((batch, kv_heads, 2 * m))
    phi = np.zeros(2 * m)
    scaled = np.zeros(d)
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
                        scaled[x] = root * k[b, g, j, x]
                        square += scaled[x] * scaled[x]
                    amplitude = math.exp(kernel * square / 2.0) / root_m
                    for f in range(m):
                        angle = 0.0
                        for x in range(d):
                            angle += w[f, x] * scaled[x]
                        phi[f] = amplitude * math.cos(angle)
                        phi[m + f] = amplitude * math.sin(angle)
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
                        scaled[x] = root * q[b, h, i, x]
                        square += scaled[x] * scaled[x]
                    amplitude = math.exp(kernel * square / 2.0) / root_m
                    for f in range(m):
                        angle = 0.0
                        for x in range(d):
                            angle += w[f, x] * scaled[x]
                        phi[f] = amplitude * math.cos(angle)
                        phi[m + f] = amplitude * math.sin(angle)
                    total = eps
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
    numbers = (dims["D"] ** -0.5 if params["scale"] is None else params["scale"], float(params["kernel"] == "softmax"))
    return Recurrence(
        writes=(Write(key=(Factor("k", favor_trig, numbers, ("w",)),), value=("v",)),),
        query=(Factor("q", favor_trig, numbers, ("w",)),),
        normalizer="sum",
        eps=params["eps"],
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


def only_differences_count(run, x):
    far = {**x, "q": x["q"] + 0.75, "k": x["k"] + 0.75}
    return run(x, kernel="gaussian"), run(far, kernel="gaussian")


def no_frequency_is_the_mean(run, x):
    mean = np.repeat(np.mean(x["v"], axis=2, keepdims=True), x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run({**x, "w": 0.0 * x["w"]}, kernel="gaussian", causal=False), mean


VARIANT = Variant(
    name="random_fourier",
    family="feature",
    summary="Random Fourier features: linear attention by random cosines and sines, projection given.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)), phi(x) = [cos(W x), sin(W x)] / sqrt(m)",
    paper=Paper(
        title="Random Features for Large-Scale Kernel Machines",
        authors=("Rahimi, Ali", "Recht, Benjamin"),
        year=2007,
        where="Advances in Neural Information Processing Systems 20, section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("w", "F D", "random frequencies, one a row", draw=favor.orthogonal),
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
    params=(
        Param(
            "scale",
            Number(above=0.0, optional=True),
            None,
            "multiplies q . k; None is 1/sqrt(D)",
            absent=lambda dims: dims["D"] ** -0.5,
            tries=(0.37,),
        ),
        Param("kernel", Choice(("gaussian", "softmax")), "gaussian", "what the features estimate", tries=("softmax",)),
        Param("eps", Number(), 0.0, "added to the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="2 + B*(Hkv*S*(3*D + 4 + F*(2*D + 4*E + 6)) + Hq*T*(3*D + 4 + F*(2*D + 4*E + 8) + E))",
        memory="B*(Hq*T*E + Hkv*2*F*(E + 1)) + 2*F + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[0.0]]]], "k": [[[[0.0], [math.pi / 3.0]]]], "v": [[[[4.0], [8.0]]]], "w": [[1.0]]},
            returns={"out": [[[[16.0 / 3.0]]]]},
            source="by hand: phi(q) = (1, 0), phi(k) = (1, 0) and (1/2, .), so weights 1 and 1/2",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "k": [[[[0.0], [math.pi]]]], "v": [[[[4.0], [8.0]]]], "w": [[1.0]]},
            params={"eps": 2.0, "causal": True},
            returns={"out": [[[[4.0 / 3.0], [-4.0 / 2.0]]]]},
            source="by hand: weights 1 and -1, denominators 1 + 2 and 0 + 2",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("only the differences of queries and keys count", only_differences_count),
        Identity("frequencies of zero give the mean of the values", no_frequency_is_the_mean),
    ),
)
