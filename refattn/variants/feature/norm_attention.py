"""NormAttention, of TransNormer: linear attention without a denominator, its output divided by its root mean square instead.

    phi(x) = elu(x) + 1             (x + 1 for x > 0, exp(x) for x <= 0)
    o_i    = phi(q_i)^T Z_i,   Z_i = sum_(j visible) phi(k_j) v_j^T
    out_i  = weight * o_i / (rms(o_i) + eps),   rms(o) = |o| / sqrt(E)

The paper's point is the gradient: a denominator's is unbounded.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees
every key. Query head h reads state head ``h // (Hq // Hkv)``.  Z starts at ``initial_state`` (0 if absent) and is returned after the last key
as ``state``, so that a sequence can be cut anywhere and carried on.

What people get wrong: the norm comes after the sum over all visible keys, not before it is complete.  What it runs over: each head's E channels
here; the authors' code puts the heads side by side first and normalises across all.  Where eps stands: beside the root mean square, as in the RMSNorm
code of that time, not under the root.  Their later models (TransNormerLLM) have a decay and other activations.

Checked against a composition of PyTorch's elu and matmul in the quadratic form.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import elu_plus_one
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, weight, initial_state, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]

    group = heads // kv_heads
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    phi = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for f in range(d):
                for y in range(d_v):
                    state[b, g, f, y] = initial_state[b, g, f, y]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    for x in range(d):
                        phi[x] = k[b, g, j, x] + 1.0 if k[b, g, j, x] > 0.0 else math.exp(k[b, g, j, x])
                    for f in range(d):
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    for x in range(d):
                        phi[x] = q[b, h, i, x] + 1.0 if q[b, h, i, x] > 0.0 else math.exp(q[b, h, i, x])
                    for f in range(d):
                        for y in range(d_v):
                            out[b, h, i, y] += phi[f] * state[b, g, f, y]
                    square = 0.0
                    for y in range(d_v):
                        square += out[b, h, i, y] * out[b, h, i, y]
                    length = math.sqrt(square / d_v) + eps
                    for y in range(d_v):
                        out[b, h, i, y] *= weight[y] / length
    return out, state


def reduction(dims, params):
    """Linear attention without a denominator, divided by its root mean square."""
    phi = (Factor("q", elu_plus_one),), (Factor("k", elu_plus_one),)

    def outputs(x, found):
        square = np.sum(found["out"] * found["out"], axis=3, keepdims=True) / dims["E"]
        root = np.where(square == 0.0, 0.0, np.sqrt(np.where(square == 0.0, 1.0, square)))
        return {**found, "out": x["weight"] * found["out"] / (root + params["eps"])}

    return Reduction(
        Recurrence((Write(phi[1], ("v",)),), query=phi[0], causal=params["causal"]),
        {"q": "B Hq T D", "k": "B Hkv S D", "v": "B Hkv S E", "initial_state": "B Hkv D E", "out": "B Hq T E"},
        lambda x: {name: x[name] for name in ("q", "k", "v", "initial_state")},
        outputs,
    )


def cut_and_carried_on(run, x):
    n, keys = x["q"].shape[2], x["k"].shape[2]
    first = max(n // 2, n - keys)  # queries of the first part; in both parts the last query stands at the last key
    one = {**x, "q": x["q"][:, :, :first], **{name: x[name][:, :, : first + keys - n] for name in ("k", "v")}}
    two = {**x, "q": x["q"][:, :, first:], **{name: x[name][:, :, first + keys - n :] for name in ("k", "v")}}
    out_1, state = run(one, causal=True, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, causal=True, returns=("out", "state"))
    return run(x, causal=True, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def keys_in_two_parts(run, x):
    half = x["k"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("k", "v")}} for part in (slice(half), slice(half, None)))
    return run(x, causal=False), run({**two, "initial_state": run(one, causal=False, returns="state")}, causal=False)


def denominators_cancel(run, x):
    out = run(x, name="linear", eps=0.0, causal=False, returns="out")
    return run(x, eps=1e-300, causal=False), out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True))


def any_length_of_values(run, x):
    return run(x, eps=1e-300), run({**x, "v": 8.0 * x["v"]}, eps=1e-300)


VARIANT = Variant(
    name="norm_attention",
    family="feature",
    summary="NormAttention (TransNormer): linear attention divided by its output's root mean square, not by a sum of weights.",
    equation="out_i = weight o_i / (rms(o_i) + eps), o_i = phi(q_i)^T sum_j phi(k_j) v_j^T, phi(x) = elu(x) + 1",
    paper=Paper(
        title="The Devil in Linear Transformer",
        authors=(
            "Qin, Zhen",
            "Han, Xiaodong",
            "Sun, Weixuan",
            "Li, Dongxu",
            "Kong, Lingpeng",
            "Barnes, Nick",
            "Zhong, Yiran",
        ),
        year=2022,
        arxiv="2210.10340",
        where="section 4",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("weight", "E", "learned factor of each channel", absent=1.0),
        Operand("initial_state", "B Hkv D E", "sum of features times values of earlier keys", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D E", "sum of features times values, after the last key", wide=True),
    ),
    params=(
        Param("eps", Number(above=0.0), 1e-8, "added to the root mean square", tries=(0.5,)),
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*(Hkv*S*D*(2*E + 1) + Hq*T*(D*(2*E + 1) + 4*E + 3))",
        memory="B*(Hq*T*E + Hkv*D*E) + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[0.0]]]], "k": [[[[0.0], [2.0]]]], "v": [[[[1.0, 7.0], [3.0, 3.0]]]], "weight": [1.0, 0.5]},
            params={"eps": math.sqrt(178.0) - math.sqrt(0.5 * (100.0 + 256.0)) + 2.0},
            returns={"out": [[[[10.0 / (math.sqrt(178.0) + 2.0), 8.0 / (math.sqrt(178.0) + 2.0)]]]], "state": [[[[10.0, 16.0]]]]},
            source="by hand: o = (1 + 9, 7 + 9), of mean square (100 + 256) / 2",
        ),
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[0.0], [2.0]]]], "v": [[[[-4.0], [8.0]]]]},
            params={"eps": 8.0, "causal": True},
            returns={"out": [[[[-0.5], [40.0 / 48.0]]]]},
            source="by hand: o = -8, then 2 (-4 + 24) = 40; over |o| + 8",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("a denominator would cancel: it is the normalised linear attention", denominators_cancel),
        Identity("the length of all values cancels", any_length_of_values),
    ),
)
