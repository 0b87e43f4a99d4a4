"""Titans, linear memory: a matrix learns at test time to map keys to values, by gradient descent with momentum and forgetting.

    S_t = eta_t S_{t-1} - theta_t grad(M_{t'}; k_t, v_t),     M_t = (1 - alpha_t) M_{t-1} + S_t,     out_t = M_t^T q_t
    grad(M; k, v) = 2 k (M^T k - v)^T,  the gradient of |M^T k - v|^2

The paper's long-term memory for a memory that is one matrix: S is its surprise, eta the momentum, theta the step, alpha
what is forgotten.  The gradient is taken at t' = t - 1 if ``chunk`` is 1, and in general at the memory before the first token of the chunk
that t is in (section 3.2).  Chunks are counted from the first token of the sequence.  There is no scale, and nothing is normalised.

``state``, ``surprise``, ``anchor`` and ``position`` are M, S, M_{t'} and the number of tokens after the last token; with them as
``initial_...`` a sequence can be cut anywhere.  At the first token of a chunk the anchor is not read.  Query head h reads memory ``h // (Hq
// Hkv)``; steps are per head.

What people get wrong: the factor 2 of a loss that is not halved; the gradient at M_{t-1} where the chunk's first is meant; eta and theta
swapped (the paper writes eta for the momentum and theta for the step); momentum started afresh in every chunk.

flash-linear-attention's linear Titans adds a layer normalisation and the target v - k to the loss, as TTT does, and its gradient lacks a
pair of parentheses: it is not the gradient of its own loss.  Checked instead against PyTorch's autograd of the inner loss, by which that
package is shown wrong.
"""

import numpy as np

from refattn.pieces.arrays import each_sequence, products_between
from refattn.spec import Cost, Example, Identity, Integer, Operand, Output, Paper, Param, Variant


def define(q, k, v, eta, theta, alpha, initial_state, initial_surprise, initial_anchor, initial_position, chunk):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))  # M
    surprise = np.zeros((batch, kv_heads, d, d_v))  # S
    anchor = np.zeros((batch, kv_heads, d, d_v))  # M at the start of the chunk
    position = np.zeros(batch)
    error = np.zeros(d_v)
    for b in range(batch):
        start = int(initial_position[b])
        position[b] = start + n
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
                    surprise[b, g, x, y] = initial_surprise[b, g, x, y]
                    anchor[b, g, x, y] = initial_anchor[b, g, x, y]
            for t in range(n):
                if (start + t) % chunk == 0:
                    for x in range(d):
                        for y in range(d_v):
                            anchor[b, g, x, y] = state[b, g, x, y]
                for y in range(d_v):
                    error[y] = -v[b, g, t, y]
                    for x in range(d):
                        error[y] += anchor[b, g, x, y] * k[b, g, t, x]
                kept = 1.0 - alpha[b, g, t]
                for x in range(d):
                    step = theta[b, g, t] * 2.0 * k[b, g, t, x]
                    for y in range(d_v):
                        surprise[b, g, x, y] = eta[b, g, t] * surprise[b, g, x, y] - step * error[y]
                        state[b, g, x, y] = kept * state[b, g, x, y] + surprise[b, g, x, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
    return out, state, surprise, anchor, position


def vectorized(x, params):
    """In pieces of 64 tokens: memories are sums of products of momentums and of what is kept, and updates that read one another a system."""
    return each_sequence(lambda one: of_sequence(one, params["chunk"]), x)


def of_sequence(x, chunk):
    n, group, start = x["q"].shape[1], x["q"].shape[0] // x["k"].shape[0], int(x["initial_position"])
    memory, surprise, anchor, outs = x["initial_state"], x["initial_surprise"], x["initial_anchor"], []
    for first in range(0, n, 64):
        q, k, v, eta, theta, alpha = (x[name][:, first : first + 64] for name in ("q", "k", "v", "eta", "theta", "alpha"))
        many, kept = k.shape[1], 1.0 - alpha
        nothing = np.zeros((k.shape[0], 1))
        momentum, remaining = products_between(eta), products_between(kept)
        of_surprise, of_memory = momentum[..., 0] * eta[:, :1], remaining[..., 0] * kept[:, :1]
        # Row t of each: what the memory before token t owes to the piece's updates, to the memory before it and to the surprise before it.
        written = np.concatenate([np.zeros((k.shape[0], 1, many)), remaining @ momentum], axis=1)
        from_memory = np.concatenate([nothing + 1.0, of_memory], axis=1)
        from_surprise = np.concatenate([nothing, (remaining @ of_surprise[..., None])[..., 0]], axis=1)
        begun = np.arange(many) - (start + first + np.arange(many)) % chunk  # where a token's chunk begins; below 0 in an earlier piece
        at, inside = np.maximum(begun, 0), (begun >= 0)[:, None]
        here = from_memory[:, at, None] * (k @ memory) + from_surprise[:, at, None] * (k @ surprise)
        step = -2.0 * theta[..., None]
        updates = step * (np.where(inside, here, k @ anchor) - v)
        if begun[-1] > 0:
            reads = np.where(inside, written[:, at], 0.0) * (k @ np.swapaxes(k, -1, -2))
            updates = np.linalg.solve(np.eye(many) - step * reads, updates)
        memories = [np.repeat(a, group, axis=0) for a in (written[:, 1:], k, updates, from_memory, from_surprise, memory, surprise)]
        own, keys, changes, by_memory, by_surprise, m, s = memories
        outs.append(own * (q @ np.swapaxes(keys, -1, -2)) @ changes + by_memory[:, 1:, None] * (q @ m) + by_surprise[:, 1:, None] * (q @ s))

        before = (from_memory, from_surprise, written)
        if begun[-1] >= 0:
            anchor = combined((a[:, begun[-1]] for a in before), memory, surprise, k, updates)
        last = combined((a[:, many] for a in before), memory, surprise, k, updates)
        surprise = combined((nothing[:, 0], of_surprise[:, -1], momentum[:, -1]), memory, surprise, k, updates)
        memory = last
    return {
        "out": np.concatenate(outs, axis=1),
        "state": memory,
        "surprise": surprise,
        "anchor": anchor,
        "position": x["initial_position"] + float(n),
    }


def combined(numbers, memory, surprise, k, updates):
    """Of one token's numbers: so much of the memory, of the surprise, and of each update k u^T."""
    by_memory, by_surprise, by_updates = numbers
    written = np.swapaxes(by_updates[..., None] * k, -1, -2) @ updates
    return by_memory[:, None, None] * memory + by_surprise[:, None, None] * surprise + written


TOKENS = ("q", "k", "v", "eta", "theta", "alpha")
CARRIED = ("state", "surprise", "anchor", "position")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one = {**x, **{name: x[name][:, :, :half] for name in TOKENS}}
    two = {**x, **{name: x[name][:, :, half:] for name in TOKENS}}
    sides = []
    for chunk in (1, 3):
        out_1, *carried = run(one, chunk=chunk, returns=("out", *CARRIED))
        given = {"initial_" + name: c for name, c in zip(CARRIED, carried, strict=True)}
        out_2, *carried = run({**two, **given}, chunk=chunk, returns=("out", *CARRIED))
        sides.append((run(x, chunk=chunk, returns=("out", *CARRIED)), (np.concatenate([out_1, out_2], axis=2), *carried)))
    (whole_1, cut_1), (whole_3, cut_3) = sides
    return (*whole_1, *whole_3), (*cut_1, *cut_3)


def delta_rule(run, x):
    """Without momentum and forgetting, and with a step of beta / 2."""
    kept = {name: x[name] for name in ("q", "k", "v")}
    nothing = np.zeros_like(x["eta"])
    learner = {**kept, "eta": nothing, "alpha": nothing, "theta": x["theta"] / 2.0}
    return run(learner, returns=("out", "state")), run({**kept, "beta": x["theta"]}, name="delta", scale=1.0, returns=("out", "state"))


def one_chunk_is_linear_attention(run, x):
    """From an empty memory, without momentum, the gradients of one chunk are those at 0: -2 k v^T."""
    kept = {"q": x["q"], "k": x["k"], "v": 2.0 * x["theta"][..., None] * x["v"], "gate": np.log1p(-x["alpha"])}
    return run({**x, "eta": np.zeros_like(x["eta"])}, chunk=1000), run(kept, name="simple_gla", scale=1.0, returns="out")


def momentum_of_two_linear_attentions(run, x):
    """In one chunk, S is linear attention that fades by eta, and M without forgetting the sum of all S."""
    kept = {"k": x["k"], "v": 2.0 * x["theta"][..., None] * x["v"], "gate": np.log(x["eta"])}
    n = x["q"].shape[2]
    each = [run({**kept, "q": np.repeat(x["q"][:, :, t : t + 1], n, axis=2)}, name="simple_gla", scale=1.0, returns="out") for t in range(n)]
    sums = [out[:, :, : t + 1].sum(axis=2) for t, out in enumerate(each)]
    return run({**x, "alpha": np.zeros_like(x["alpha"])}, chunk=1000), np.stack(sums, axis=2)


VARIANT = Variant(
    name="titans",
    family="learner",
    summary="Titans' long-term memory, one matrix: gradient descent on recalling values, with momentum and forgetting.",
    equation="S_t = eta_t S_(t-1) - 2 theta_t k_t (M_t'^T k_t - v_t)^T, M_t = (1 - alpha_t) M_(t-1) + S_t, out_t = M_t^T q_t",
    paper=Paper(
        title="Titans: Learning to Memorize at Test Time",
        authors=("Behrouz, Ali", "Zhong, Peilin", "Mirrokni, Vahab"),
        year=2025,
        arxiv="2501.00663",
        where="section 3.1, and section 3.2 for chunks",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys", draw=lambda rng, shape: 0.5 * rng.standard_normal(shape)),
        Operand("v", "B Hkv T E", "values"),
        Operand("eta", "B Hkv T", "momentum: the part of the last surprise that stays", draw=lambda rng, shape: rng.uniform(0.1, 0.9, shape)),
        Operand("theta", "B Hkv T", "step of the gradient descent", draw=lambda rng, shape: rng.uniform(0.1, 0.5, shape)),
        Operand("alpha", "B Hkv T", "part of the memory that is forgotten", draw=lambda rng, shape: rng.uniform(0.0, 0.5, shape)),
        Operand("initial_state", "B Hkv D E", "memory before the first token", absent=0.0),
        Operand("initial_surprise", "B Hkv D E", "surprise before the first token", absent=0.0),
        Operand("initial_anchor", "B Hkv D E", "memory before the first token of the chunk", absent=0.0),
        Operand(
            "initial_position",
            "B",
            "number of tokens before the first",
            kind="number",
            absent=0.0,
            within=(0.0, 2.0**52),
            draw=lambda rng, shape: rng.integers(0, 9, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "recalled values"),
        Output("state", "B Hkv D E", "memory after the last token", wide=True),
        Output("surprise", "B Hkv D E", "surprise after the last token", wide=True),
        Output("anchor", "B Hkv D E", "memory at which the last token's gradient was taken", wide=True),
        Output("position", "B", "number of tokens so far", wide=True),
    ),
    params=(Param("chunk", Integer(at_least=1), 1, "tokens whose gradients are taken at the same memory", tries=(3,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops="B*T*(Hkv*(1 + 2*D*E + D*(2 + 5*E)) + Hq*2*D*E)",
        memory="B*(Hq*T*E + 3*Hkv*D*E + 1) + E",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0], [1.0]]]],
                "k": [[[[1.0], [1.0], [2.0]]]],
                "v": [[[[4.0], [8.0], [9.0]]]],
                "eta": [[[0.5, 0.5, 0.5]]],
                "theta": [[[0.25, 0.25, 0.25]]],
                "alpha": [[[0.0, 0.5, 0.0]]],
            },
            returns={"out": [[[[2.0], [5.0], [6.0]]]], "state": [[[[6.0]]]], "surprise": [[[[1.0]]]], "anchor": [[[[5.0]]]]},
            source="by hand: S = 2, M = 2; S = 1 + 3, M = 1 + 4; the error is 2 x 5 - 9 = 1 and S = 2 - 0.5 x 2 x 1",
        ),
        Example(
            operands={
                "q": [[[[1.0], [1.0], [1.0]]]],
                "k": [[[[1.0], [1.0], [1.0]]]],
                "v": [[[[4.0], [8.0], [7.0]]]],
                "eta": [[[0.0, 0.0, 0.0]]],
                "theta": [[[0.25, 0.25, 0.25]]],
                "alpha": [[[0.0, 0.0, 0.0]]],
            },
            params={"chunk": 2},
            returns={"out": [[[[2.0], [6.0], [6.5]]]], "anchor": [[[[6.0]]]], "position": [3.0]},
            source="by hand: steps of half the error; the second error is taken at 0, the third at 6",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on, in the middle of a chunk too", cut_and_carried_on),
        Identity("without momentum and forgetting it is the delta rule", delta_rule),
        Identity("one chunk without momentum is gated linear attention", one_chunk_is_linear_attention),
        Identity("one chunk without forgetting adds up linear attentions that fade with the momentum", momentum_of_two_linear_attentions),
    ),
)
