"""Mesa layer: every query is answered by the ridge regression from keys to values over all tokens so far.

    G_t = exp(gate_t) G_{t-1} + beta_t k_t k_t^T,     H_t = exp(gate_t) H_{t-1} + beta_t k_t v_t^T
    out_t = H_t^T (G_t + diag(ridge))^{-1} q_t

H_t^T (G_t + diag(ridge))^{-1} is the matrix W with the least sum_j weight_j |W k_j - v_j|^2 + sum_x ridge_x |W[:, x]|^2 where weight_j is
beta_j, faded.  There is no scale.  ``gram`` and ``state`` are G and H after the last token, ``initial_gram`` and ``initial_state`` those
before the first (0 if absent).  Query head h reads head ``h // (Hq // Hkv)``.

``solver="cholesky"`` solves exactly, and reads no more of an ``initial_gram`` than its lower triangle.  ``solver="conjugate gradients"``
takes ``steps`` of Hestenes and Stiefel's iteration, as the paper does, from 0 (``start="zero"``) or from q divided by the diagonal of G +
diag(ridge) (``start="diagonal"``); ``eps`` is added to both of its divisors, 0 on paper.  After as many steps as keys are wide it is exact
but for rounding.

What people get wrong: two starts and 1e-5 in the divisors within one package (flash-linear-attention), so that few steps give different
numbers; beta in G alone; inverting in half precision, ridge being what keeps the matrix from singular; a ridge per head and not per channel
of the keys.

Checked against flash-linear-attention: naive_mesa_net_exact (values, gradients, state), naive_mesa_net_CG and the decoding step, at few
steps and many.
"""

import math

import numpy as np

from refattn.pieces.arrays import sums_between
from refattn.spec import Choice, Cost, Example, Identity, Integer, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, gate, beta, ridge, initial_gram, initial_state, solver, steps, start, eps):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    gram = np.zeros((batch, kv_heads, d, d))  # G
    state = np.zeros((batch, kv_heads, d, d_v))  # H
    factor = np.zeros((d, d))  # lower triangular: factor factor^T = G + diag(ridge)
    solution = np.zeros(d)
    residual = np.zeros(d)
    direction = np.zeros(d)
    image = np.zeros(d)  # of the direction
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for w in range(d):
                    gram[b, g, x, w] = initial_gram[b, g, x, w]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                fade = math.exp(gate[b, g, t])
                for x in range(d):
                    written = beta[b, g, t] * k[b, g, t, x]
                    for w in range(d):
                        gram[b, g, x, w] = fade * gram[b, g, x, w] + written * k[b, g, t, w]
                    for y in range(d_v):
                        state[b, g, x, y] = fade * state[b, g, x, y] + written * v[b, g, t, y]
                if solver == 0:  # cholesky
                    for x in range(d):
                        for w in range(x + 1):
                            rest = gram[b, g, x, w]
                            if w == x:
                                rest += ridge[g, x]
                            for m in range(w):
                                rest -= factor[x, m] * factor[w, m]
                            factor[x, w] = rest / factor[w, w] if w < x else math.sqrt(rest) if rest >= 0.0 else np.nan
                for h in range(g * group, (g + 1) * group):
                    if solver == 0:
                        for x in range(d):
                            solution[x] = q[b, h, t, x]
                            for w in range(x):
                                solution[x] -= factor[x, w] * solution[w]
                            solution[x] /= factor[x, x]
                        for x in range(d - 1, -1, -1):
                            for w in range(x + 1, d):
                                solution[x] -= factor[w, x] * solution[w]
                            solution[x] /= factor[x, x]
                    else:  # conjugate gradients
                        for x in range(d):
                            solution[x] = 0.0
                            if start == 1:
                                solution[x] = q[b, h, t, x] / (gram[b, g, x, x] + ridge[g, x])
                        size = 0.0
                        for x in range(d):
                            residual[x] = q[b, h, t, x]
                            if start == 1:
                                residual[x] -= ridge[g, x] * solution[x]
                                for w in range(d):
                                    residual[x] -= gram[b, g, x, w] * solution[w]
                            direction[x] = residual[x]
                            size += residual[x] * residual[x]
                        for step in range(steps):
                            curvature = eps
                            for x in range(d):
                                image[x] = ridge[g, x] * direction[x]
                                for w in range(d):
                                    image[x] += gram[b, g, x, w] * direction[w]
                                curvature += direction[x] * image[x]
                            length = size / (curvature if curvature != 0.0 else 1.0)  # a residual of 0 stays
                            before = size
                            size = 0.0
                            for x in range(d):
                                solution[x] += length * direction[x]
                                residual[x] -= length * image[x]
                                size += residual[x] * residual[x]
                            before += eps
                            ratio = size / (before if before != 0.0 else 1.0)
                            for x in range(d):
                                direction[x] = residual[x] + ratio * direction[x]
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += solution[x] * state[b, g, x, y]
    return out, gram, state


def vectorized(x, params):
    """Chunk by chunk: G of each of its tokens, and what they read of H without it."""
    batch, heads, n, d = x["q"].shape
    kv_heads, chunk = x["k"].shape[1], 32
    gram, state, outs = x["initial_gram"], x["initial_state"], []
    lower = np.tri(d, dtype=bool)
    ridge = x["ridge"][:, None, :, None]
    for first in range(0, n, chunk):
        q, k, v, gate, beta = (x[name][:, :, first : first + chunk] for name in ("q", "k", "v", "gate", "beta"))
        many = k.shape[2]
        written = np.where(np.tri(many, dtype=bool), np.exp(sums_between(gate)), 0.0) * beta[:, :, None]
        kept = np.exp(np.cumsum(gate, axis=2))
        pairs = (k[..., None] * k[:, :, :, None]).reshape(batch, kv_heads, many, d * d)
        grams = (written @ pairs).reshape(batch, kv_heads, many, d, d) + kept[..., None, None] * gram[:, :, None]
        asked = np.swapaxes(np.swapaxes(q.reshape(batch, kv_heads, heads // kv_heads, many, d), 2, 4), 2, 3)  # a column for each head
        if params["solver"] == "cholesky":
            solution = np.linalg.solve(np.where(lower, grams, np.swapaxes(grams, -1, -2)) + ridge * np.eye(d), asked)
        else:
            solution = iterated(grams, ridge, asked, params)
        read = np.swapaxes(k[:, :, None] @ solution * written[..., None], -1, -2) @ v[:, :, None]
        read = read + kept[..., None, None] * (np.swapaxes(solution, -1, -2) @ state[:, :, None])
        outs.append(np.swapaxes(read, 2, 3).reshape(batch, heads, many, v.shape[3]))
        gram = grams[:, :, -1]
        state = kept[:, :, -1, None, None] * state + np.swapaxes(written[:, :, -1, :, None] * k, -1, -2) @ v
    return {"out": np.concatenate(outs, axis=2), "gram": gram, "state": state}


def iterated(grams, ridge, asked, params):
    """Conjugate gradients, of matrices [.. D D] and columns [.. D G], up to where the slopes of what is left would overflow."""

    def image_of(columns):
        return grams @ columns + ridge * columns

    def size_of(columns):
        return np.sum(columns * columns, axis=-2, keepdims=True)

    def share(one, other, going):
        other = np.where(going & (other != 0.0), other, 1.0)
        return np.where(going, one, 0.0) / other

    solution = 0.0 * asked
    if params["start"] == "diagonal":
        solution = asked / (np.sum(grams * np.eye(grams.shape[-1]), axis=-1, keepdims=True) + ridge)
    direction = residual = asked - image_of(solution)
    size = size_of(residual)
    least = 2.0**-900 * size_of(asked)
    for _ in range(params["steps"]):
        going, before = ~(size <= least), size  # NaN goes on
        image = image_of(direction)
        length = share(size, np.sum(direction * image, axis=-2, keepdims=True) + params["eps"], going)
        solution, residual = solution + length * direction, residual - length * image
        size = size_of(residual)
        direction = residual + share(size, before + params["eps"], going) * direction
    return solution


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    names = ("q", "k", "v", "gate", "beta")
    one = {**x, **{name: x[name][:, :, :half] for name in names}}
    two = {**x, **{name: x[name][:, :, half:] for name in names}}
    every = ("out", "gram", "state")
    out_1, gram, state = run(one, returns=every)
    out_2, gram, state = run({**two, "initial_gram": gram, "initial_state": state}, returns=every)
    return run(x, returns=every), (np.concatenate([out_1, out_2], axis=2), gram, state)


def enough_steps_are_exact(run, x):
    iterated = [run(x, solver="conjugate gradients", start=start, steps=30) for start in ("zero", "diagonal")]
    return (run(x), run(x)), tuple(iterated)


def in_the_space_of_tokens(run, x):
    """The same regression by the kernel trick, solved for tokens instead of channels, one query at a time."""
    group = x["q"].shape[1] // x["k"].shape[1]
    ridge = x["ridge"][:, None]
    outs = []
    for t in range(x["q"].shape[2]):
        k, v, beta, gate = (np.repeat(x[name][:, :, : t + 1], group, axis=1) for name in ("k", "v", "beta", "gate"))
        total = np.cumsum(gate, axis=2)
        weight = beta * np.exp(total[..., -1:] - total)
        over_ridge = k / np.repeat(ridge, group, axis=0)
        kernel = k @ np.swapaxes(over_ridge, -1, -2)
        alpha = np.linalg.solve(np.eye(t + 1) + weight[..., None] * kernel, weight[..., None] * v)
        outs.append(np.einsum("bhd,bhjd,bhje->bhe", x["q"][:, :, t], over_ridge, alpha))
    return run(x), np.stack(outs, axis=2)


def large_ridge_is_linear_attention(run, x):
    """Where G is nothing beside it, a ridge of 2**90 divides."""
    kept = {"q": x["q"], "k": x["k"], "v": x["beta"][..., None] * x["v"], "gate": x["gate"]}
    return 2.0**90 * run({**x, "ridge": np.full_like(x["ridge"], 2.0**90)}), run(kept, name="simple_gla", scale=1.0, returns="out")


def without_memory(run, x):
    """With a gate of -inf each token is a regression of its own: Sherman and Morrison's formula."""
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v, beta = (np.repeat(x[name], group, axis=1) for name in ("k", "v", "beta"))
    over_ridge = k / np.repeat(x["ridge"], group, axis=0)[:, None]
    own = beta * np.sum(x["q"] * over_ridge, -1) / (1.0 + beta * np.sum(k * over_ridge, -1))
    return run({**x, "gate": np.full_like(x["gate"], -np.inf)}), own[..., None] * v


def positive_definite(rng, shape):
    x = rng.standard_normal(shape)
    return x @ np.swapaxes(x, -1, -2)


VARIANT = Variant(
    name="mesa",
    family="learner",
    summary="Mesa layer (MesaNet): the optimal linear map from keys to values so far, by Cholesky or by conjugate gradients.",
    equation="out_t = H_t^T (G_t + diag(ridge))^(-1) q_t, G_t = a_t G_(t-1) + beta_t k_t k_t^T, H_t = a_t H_(t-1) + beta_t k_t v_t^T",
    paper=Paper(
        title="MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
        authors=(
            "von Oswald, Johannes",
            "Scherrer, Nino",
            "Kobayashi, Seijin",
            "Versari, Luca",
            "Yang, Songlin",
            "Schlegel, Maximilian",
            "Maile, Kaitlin",
            "Schimpf, Yanick",
            "Sieberling, Oliver",
            "Meulemans, Alexander",
            "Saurous, Rif A.",
            "Lajoie, Guillaume",
            "Frenkel, Charlotte",
            "Pascanu, Razvan",
            "Agüera y Arcas, Blaise",
            "Sacramento, João",
        ),
        year=2025,
        arxiv="2506.05233",
        where="the Mesa layer and its conjugate gradient solver",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T",
            "natural logarithm of the factor by which the past fades with every token",
            draw=lambda rng, shape: -rng.exponential(0.5, shape),
        ),
        Operand("beta", "B Hkv T", "weight of a token, not negative", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("ridge", "Hkv D", "what is added to the diagonal of G, positive", draw=lambda rng, shape: rng.uniform(0.5, 2.0, shape)),
        Operand("initial_gram", "B Hkv D D", "G before the first token, symmetric", absent=0.0, draw=positive_definite),
        Operand("initial_state", "B Hkv D E", "H before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "predicted values"),
        Output("gram", "B Hkv D D", "G after the last token", wide=True),
        Output("state", "B Hkv D E", "H after the last token", wide=True),
    ),
    params=(
        Param("solver", Choice(("cholesky", "conjugate gradients")), "cholesky", "exact, or iterated", tries=("conjugate gradients",)),
        Param("steps", Integer(), 30, "iterations of conjugate gradients"),
        Param("start", Choice(("zero", "diagonal")), "zero", "where conjugate gradients start: at 0, or at q divided by the diagonal"),
        Param("eps", Number(at_least=0.0), 0.0, "added to the divisors of conjugate gradients"),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops="B*T*(Hkv*(1 + D + 3*D*D + 3*D*E + ((D - 1)*D*(D + 1)//3 + D*(D + 1)//2 + D if solver == 0 else 0)) + Hq*(2*D*E"
        " + (2*D*D if solver == 0 else 2*D + (2*D + 2*D*D + 2*D)*start + steps*(D*(2*D + 11) + 3))))",
        memory="B*(Hq*T*E + Hkv*D*(D + E)) + D*(D + 4)",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[3.0], [5.0]]]],
                "k": [[[[1.0], [2.0]]]],
                "v": [[[[4.0], [6.0]]]],
                "gate": [[[0.0, -math.log(2.0)]]],
                "beta": [[[1.0, 0.5]]],
                "ridge": [[0.5]],
            },
            returns={"out": [[[[8.0], [40.0 / 3.0]]]], "gram": [[[[2.5]]]], "state": [[[[8.0]]]]},
            source="by hand: 4 x 3/(1 + 1/2); then G = 1/2 + 2, H = 2 + 6, and 8 x 5/(5/2 + 1/2)",
        ),
        Example(
            operands={
                "q": [[[[2.0, 3.0]]]],
                "k": [[[[1.0, 1.0]]]],
                "v": [[[[10.0]]]],
                "gate": [[[0.0]]],
                "beta": [[[1.0]]],
                "ridge": [[1.0, 1.0]],
            },
            params={"solver": "conjugate gradients", "steps": 1},
            returns={"out": [[[[10.0 * 5.0 * 13.0 / 38.0]]]]},
            source="by hand: the matrix is (2 1; 1 2); q^T q = 13 over q^T (7, 8) = 38 is the first length, and (1, 1) . q = 5",
        ),
        Example(
            operands={
                "q": [[[[2.0, 3.0]]]],
                "k": [[[[1.0, 1.0]]]],
                "v": [[[[12.0]]]],
                "gate": [[[0.0]]],
                "beta": [[[1.0]]],
                "ridge": [[1.0, 1.0]],
            },
            returns={"out": [[[[20.0]]]]},
            source="by hand: the inverse of (2 1; 1 2) is (2 -1; -1 2)/3, which takes q to (1/3, 4/3)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its two states", cut_and_carried_on),
        Identity("enough steps of conjugate gradients are exact", enough_steps_are_exact),
        Identity("it is kernel ridge regression", in_the_space_of_tokens),
        Identity("under a very large ridge it is gated linear attention", large_ridge_is_linear_attention),
        Identity("without memory a token answers alone", without_memory),
    ),
)
