"""Infini-attention: causal softmax attention within a segment, beside a linear-attention memory of all segments before.

    phi(x) = elu(x) + 1
    mem_t  = phi(q_t)^T M_{s-1} / (phi(q_t) . z_{s-1}),     dot_t = softmax_j(scale q_t . k_j) v_j over the tokens j <= t of t's segment s
    out_t  = sigmoid(mix) mem_t + (1 - sigmoid(mix)) dot_t
    M_s    = M_{s-1} + sum_{j in s} phi(k_j) (v_j - phi(k_j)^T M_{s-1} / (phi(k_j) . z_{s-1}))^T,     z_s = z_{s-1} + sum_{j in s} phi(k_j)

The memory is read before its segment is written, and not at all within it.  ``update="delta"`` is the line above; ``update="linear"``
writes v_j itself.  An empty memory, whose z is 0, answers 0: the paper's equations divide 0 by 0 in the first segment, and its output is
then (1 - sigmoid(mix)) dot.

``state`` and ``mass`` are M and z after the last token, whose segment ends there however short it is; ``initial_state`` and
``initial_mass`` are those before the first, which begins a segment.  So a sequence can be cut where a segment ends, and nowhere
else.  ``mix`` is the paper's beta, one number per query head; query head h reads keys and memory of head ``h // (Hq // Hkv)``.  ``scale``
multiplies the softmax's scores and is 1/sqrt(D) if None; the memory has none.

What people get wrong: sigmoid(mix) on the softmax and the rest on the memory (the infini-transformer package, whose mix starts at +10); all
keys of a segment read the memory before the segment, not one another's writes; rotary positions in the memory, where the paper has none.

Checked against infini-transformer-pytorch's FastweightMemory, with its gate mirrored, and PyTorch's scaled_dot_product_attention; values
and gradients.
"""

import math

import numpy as np

from refattn.pieces.arrays import sigmoid, softmax
from refattn.spec import Choice, Cost, Example, Identity, Integer, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, mix, initial_state, initial_mass, segment, update, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))  # M
    mass = np.zeros((batch, kv_heads, d))  # z
    phi = np.zeros(d)
    recalled = np.zeros(d_v)
    written = np.zeros((d, d_v))
    summed = np.zeros(d)
    weight = np.zeros(min(segment, n))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                mass[b, g, x] = initial_mass[b, g, x]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for first in range(0, n, segment):
                last = min(first + segment, n)
                for h in range(g * group, (g + 1) * group):
                    share = 1.0 / (1.0 + math.exp(-mix[h])) if mix[h] > -700.0 else 0.0
                    for t in range(first, last):
                        # The softmax within the segment.
                        top = -np.inf
                        for j in range(first, t + 1):
                            weight[j - first] = 0.0  # the score first
                            for x in range(d):
                                weight[j - first] += q[b, h, t, x] * k[b, g, j, x]
                            weight[j - first] *= scale
                            top = top if weight[j - first] <= top else weight[j - first]  # NaN must win
                        total = 0.0
                        for j in range(first, t + 1):
                            weight[j - first] = math.exp(weight[j - first] - top)
                            total += weight[j - first]
                        for j in range(first, t + 1):
                            for y in range(d_v):
                                out[b, h, t, y] += weight[j - first] * v[b, g, j, y]
                        # The memory of the segments before.
                        divisor = 0.0
                        for y in range(d_v):
                            recalled[y] = 0.0
                        for x in range(d):
                            feature = q[b, h, t, x] + 1.0 if q[b, h, t, x] > 0.0 else math.exp(q[b, h, t, x])
                            divisor += feature * mass[b, g, x]
                            for y in range(d_v):
                                recalled[y] += feature * state[b, g, x, y]
                        for y in range(d_v):
                            recalled[y] /= divisor if divisor != 0.0 else 1.0
                            out[b, h, t, y] = share * recalled[y] + (1.0 - share) * (out[b, h, t, y] / total)
                # What the segment leaves in the memory.
                for x in range(d):
                    summed[x] = 0.0
                    for y in range(d_v):
                        written[x, y] = 0.0
                for j in range(first, last):
                    divisor = 0.0
                    for y in range(d_v):
                        recalled[y] = 0.0
                    for x in range(d):
                        phi[x] = k[b, g, j, x] + 1.0 if k[b, g, j, x] > 0.0 else math.exp(k[b, g, j, x])
                        summed[x] += phi[x]
                        if update == 0:  # delta
                            divisor += phi[x] * mass[b, g, x]
                            for y in range(d_v):
                                recalled[y] += phi[x] * state[b, g, x, y]
                    for y in range(d_v):
                        if update == 0:
                            recalled[y] /= divisor if divisor != 0.0 else 1.0
                        for x in range(d):
                            written[x, y] += phi[x] * (v[b, g, j, y] - recalled[y])
                for x in range(d):
                    mass[b, g, x] += summed[x]
                    for y in range(d_v):
                        state[b, g, x, y] += written[x, y]
    return out, state, mass


def vectorized(x, params):
    """Segment by segment."""
    n, group, scale, segment = x["q"].shape[2], x["q"].shape[1] // x["k"].shape[1], params["scale"], params["segment"]
    state, mass, outs = x["initial_state"], x["initial_mass"], []
    share = sigmoid(x["mix"])[:, None, None]

    def phi(a):
        return np.where(a > 0.0, a + 1.0, np.exp(np.minimum(a, 0.0)))

    def recalled(features, state, mass):
        divisor = features @ mass[..., None]
        return features @ state / np.where(divisor == 0.0, 1.0, divisor)

    for first in range(0, n, segment):
        q, k, v = (x[name][:, :, first : first + segment] for name in ("q", "k", "v"))
        keys, values, states, masses = (np.repeat(a, group, axis=1) for a in (k, v, state, mass))
        scores = scale * (q @ np.swapaxes(keys, -1, -2))
        weights, _ = softmax(np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf))
        outs.append(share * recalled(phi(q), states, masses) + (1.0 - share) * (weights @ values))
        written = v - recalled(phi(k), state, mass) if params["update"] == "delta" else v
        state, mass = state + np.swapaxes(phi(k), -1, -2) @ written, mass + np.sum(phi(k), axis=2)
    return {"out": np.concatenate(outs, axis=2), "state": state, "mass": mass}


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 4 * 2  # where a segment of 2 ends
    one = {**x, **{name: x[name][:, :, :half] for name in ("q", "k", "v")}}
    two = {**x, **{name: x[name][:, :, half:] for name in ("q", "k", "v")}}
    every = ("out", "state", "mass")
    out_1, state, mass = run(one, segment=2, returns=every)
    out_2, state, mass = run({**two, "initial_state": state, "initial_mass": mass}, segment=2, returns=every)
    return run(x, segment=2, returns=every), (np.concatenate([out_1, out_2], axis=2), state, mass)


def one_segment_is_softmax(run, x):
    rest = 1.0 / (1.0 + np.exp(x["mix"]))
    out = run({name: x[name] for name in ("q", "k", "v")}, name="softmax", causal=True, returns="out")
    return run(x, segment=1000), rest[:, None, None] * out


def all_memory_is_linear_attention(run, x):
    """With segments of one token and no softmax, the tokens before, each of weight phi(q) . phi(k)."""
    heads = len(x["mix"])
    phi = {name: np.where(x[name] > 0.0, x[name] + 1.0, np.exp(np.minimum(x[name], 0.0))) for name in ("q", "k")}
    keys, values = (np.repeat(y, heads // x["k"].shape[1], axis=1) for y in (phi["k"], x["v"]))
    similarity = np.tril(phi["q"] @ np.swapaxes(keys, -1, -2), -1)
    total = similarity.sum(-1, keepdims=True)
    out = run({**x, "mix": np.full(heads, 1000.0)}, segment=1, update="linear")
    return out, similarity @ values / np.where(total == 0.0, 1.0, total)


def two_segments_forget_order(run, x):
    """Reordering the tokens of a segment before changes nothing for those after."""
    n = x["k"].shape[2] // 2
    order = np.concatenate([np.arange(n)[::-1], np.arange(n, x["k"].shape[2])])
    moved = {**x, **{name: x[name][:, :, order] for name in ("k", "v")}}
    segment = max(n, 1)
    return run(x, segment=segment)[:, :, n:], run(moved, segment=segment)[:, :, n:]


#: Pairs of a query and a key of its segment.
PAIRS = "(T//segment*(segment*(segment + 1)//2) + T % segment*(T % segment + 1)//2)"

VARIANT = Variant(
    name="infini",
    family="state",
    summary="Infini-attention: softmax within a segment, beside a compressive memory of all segments before.",
    equation="out_t = sigmoid(mix) phi(q_t)^T M / (phi(q_t) . z) + (1 - sigmoid(mix)) sum_j softmax_j(scale q_t . k_j) v_j",
    paper=Paper(
        title="Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention",
        authors=("Munkhdalai, Tsendsuren", "Faruqui, Manaal", "Gopal, Siddharth"),
        year=2024,
        arxiv="2404.07143",
        where="section 2.1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("mix", "Hq", "beta, whose sigmoid is the share of the memory"),
        Operand("initial_state", "B Hkv D E", "memory before the first segment", absent=0.0),
        Operand(
            "initial_mass",
            "B Hkv D",
            "sum of the features of the keys before the first segment",
            absent=0.0,
            draw=lambda rng, shape: rng.uniform(0.5, 2.0, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D E", "memory after the last token", wide=True),
        Output("mass", "B Hkv D", "sum of the features of all keys", wide=True),
    ),
    params=(
        Param("segment", Integer(at_least=1), 2048, "tokens of a segment", tries=(1, 3)),
        Param("update", Choice(("delta", "linear")), "delta", "write what the memory lacks of a value, or the value", tries=("linear",)),
        Param("scale", Number(optional=True), None, "multiplies q . k; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops=f"B*(Hq*({PAIRS}*(2*D + 4 + 2*E) + (T + segment - 1)//segment*3 + T*(D*(3 + 2*E) + 6*E))"
        " + Hkv*(T*(D*(2 + 3*E) + (D*(2 + 2*E) + E if update == 0 else 0)) + (T + segment - 1)//segment*D*(1 + E)))",
        memory="B*(Hq*T*E + Hkv*D*(E + 1)) + D*(E + 2) + E + (segment if segment < T else T)",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={"q": [[[[0.0], [0.0], [2.0]]]], "k": [[[[0.0], [2.0], [0.0]]]], "v": [[[[4.0], [8.0], [6.0]]]], "mix": [0.0]},
            params={"segment": 1},
            returns={"out": [[[[2.0], [6.0], [0.5 * 16.0 / 4.0 + 3.0]]]], "state": [[[[16.0 + 2.0]]]], "mass": [[[5.0]]]},
            source="by hand: phi(k) = 1, 3, 1; M = 4, then 4 + 3 (8 - 4), then 16 + (6 - 16/4); z = 1, 4, 5",
        ),
        Example(
            operands={
                "q": [[[[0.0], [0.0]]]],
                "k": [[[[0.0], [0.0]]]],
                "v": [[[[4.0], [8.0]]]],
                "mix": [math.log(3.0)],
                "initial_state": [[[[6.0]]]],
                "initial_mass": [[[2.0]]],
            },
            params={"update": "linear"},
            returns={"out": [[[[3.25], [3.75]]]], "state": [[[[18.0]]]], "mass": [[[4.0]]]},
            source="by hand: the memory says 3 with weight 3/4, the softmax 4 and then 6 with weight 1/4",
        ),
    ),
    identities=(
        Identity("a sequence cut where a segment ends is carried on by its memory", cut_and_carried_on),
        Identity("one segment is causal softmax attention, and an empty memory beside it", one_segment_is_softmax),
        Identity("segments of one token and nothing but memory are linear attention to the tokens before", all_memory_is_linear_attention),
        Identity("the order of tokens within a segment means nothing to later segments", two_segments_forget_order),
    ),
)
