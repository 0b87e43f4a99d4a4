"""How far back does a token reach?  Attention beside a convolution, a recurrent network and two kinds of linear attention, by exact Jacobians.

Every mechanism maps the same tokens x_0 ... x_{T-1} to outputs y_0 ... y_{T-1}, y_i of tokens up to i.  What token j has to say in output i is

    influence(i, j) = |d y_i / d x_j|_F / sum_j' |d y_i / d x_j'|_F

its share of all that output i answers to.  The Jacobians are not estimated: attention's come from `refattn.gradients`, one call for all of
them, with a batch entry for every element of y; the convolution's and the recurrent network's are written out here.

The last token repeats one far back (`REPEATED`).  A convolution cannot see it, beyond its kernel there is nothing.  A recurrent network and a fading
state see it as faintly as its neighbours, by distance.  Attention finds it by what it is: distance does not matter.

    python examples/long_range.py                    prints the table
    python examples/long_range.py --picture out.png  draws the influences too (needs matplotlib)

Weights are drawn, not trained, at the sizes usual at the start of a training.  So this is what each mechanism makes easy, not what it can learn.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import expit

import refattn as ra

#: Tokens, their width, and the token that the last one repeats.
TOKENS, WIDTH, REPEATED = 96, 16, 12
#: Tokens that a convolution's kernel spans; four, as in the layers of Mamba.
KERNEL = 4

#: A mechanism: tokens [T, M] to outputs [T, M], and to the Jacobian [T, M, T, M] of outputs by tokens.
Outputs = Callable[[np.ndarray], np.ndarray]
Mechanism = tuple[Outputs, Outputs]


def tokens(rng: np.random.Generator) -> np.ndarray:
    """Independent tokens of length about sqrt(M), the last one again what an early one was."""
    x = rng.standard_normal((TOKENS, WIDTH))
    x[-1] = x[REPEATED]
    return x


def orthogonal(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]


# ---- attention, from refattn -----------------------------------------------------------------------------------------------------


def projected(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """One head of projected tokens, [B=1, H=1, T, M]."""
    return (x @ matrix)[None, None]


def one_for_each_output(x: np.ndarray) -> np.ndarray:
    """The cotangents that pick out one element of the outputs each: [T*M, 1, T, M]."""
    return np.eye(x.size).reshape(x.size, 1, *x.shape)


def repeated(x: np.ndarray, times: int) -> np.ndarray:
    """The same operand for every entry of a batch."""
    return np.repeat(x, times, axis=0)


def attention(variant: str, rng: np.random.Generator) -> Mechanism:
    """Attention of one head in which a token looks for its like, ``variant`` being one that takes q, k and v alone."""
    alike, values = orthogonal(rng), orthogonal(rng)

    def outputs(x: np.ndarray) -> np.ndarray:
        q = k = projected(x, alike)
        return ra.attend(variant, q, k, projected(x, values), causal=True)[0, 0]

    def jacobian(x: np.ndarray) -> np.ndarray:
        q, v = (repeated(projected(x, matrix), x.size) for matrix in (alike, values))
        found = ra.gradients(variant, q, q, v, d_out=one_for_each_output(x), causal=True)
        by_token = (found.d_q + found.d_k) @ alike.T + found.d_v @ values.T
        return by_token.reshape(*x.shape, *x.shape)

    return outputs, jacobian


def gated_delta(rng: np.random.Generator) -> Mechanism:
    """The gated delta rule with keys of length one; every token says how fast the state fades (about 2 in 100) and how strongly it is written."""
    alike, values, fading, writing = orthogonal(rng), orthogonal(rng), rng.standard_normal(WIDTH) / WIDTH, rng.standard_normal(WIDTH) / WIDTH

    def gates(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return -np.logaddexp(0.0, x @ fading - 4.0)[None, None], expit(x @ writing)[None, None]  # -softplus, sigmoid

    def unit(x: np.ndarray) -> np.ndarray:
        found = projected(x, alike)
        return found / np.linalg.norm(found, axis=-1, keepdims=True)

    def outputs(x: np.ndarray) -> np.ndarray:
        key = unit(x)
        return ra.attend("gated_delta", key, key, projected(x, values), *gates(x))[0, 0]

    def jacobian(x: np.ndarray) -> np.ndarray:
        key, (gate, beta) = unit(x), gates(x)
        operands = [repeated(a, x.size) for a in (key, key, projected(x, values), gate, beta)]
        found = ra.gradients("gated_delta", *operands, d_out=one_for_each_output(x))
        d_key = found.d_q + found.d_k
        d_key -= np.sum(d_key * key, axis=-1, keepdims=True) * key  # a key of length one moves along the sphere only
        by_token = d_key / np.linalg.norm(projected(x, alike), axis=-1, keepdims=True) @ alike.T + found.d_v @ values.T
        by_token -= (found.d_gate * expit(x @ fading - 4.0))[..., None] * fading
        by_token += (found.d_beta * beta * (1.0 - beta))[..., None] * writing
        return by_token.reshape(*x.shape, *x.shape)

    return outputs, jacobian


# ---- what attention is compared with ------------------------------------------------------------------------------------------------


def convolution(rng: np.random.Generator) -> Mechanism:
    """y_i = sum_r W_r x_{i-r} over the last `KERNEL` tokens."""
    weights = rng.standard_normal((KERNEL, WIDTH, WIDTH)) / np.sqrt(KERNEL * WIDTH)

    def outputs(x: np.ndarray) -> np.ndarray:
        y = np.zeros_like(x)
        for r in range(KERNEL):
            y[r:] += x[: len(x) - r] @ weights[r].T
        return y

    def jacobian(x: np.ndarray) -> np.ndarray:
        found = np.zeros((*x.shape, *x.shape))
        for r in range(KERNEL):
            for i in range(r, len(x)):
                found[i, :, i - r] = weights[r]
        return found

    return outputs, jacobian


def gated_recurrent_unit(rng: np.random.Generator) -> Mechanism:
    """A gated recurrent unit (Cho et al., arXiv:1406.1078), its recurrent product gated after the matrix; weights as PyTorch draws them.

    z = sigmoid(Wz x + Uz h),  r = sigmoid(Wr x + Ur h),  n = tanh(Wn x + r * (Un h)),  h' = (1 - z) n + z h
    """
    w = rng.uniform(-1.0, 1.0, (6, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    of_token, of_state = w[:3], w[3:]

    def steps(x: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        found, h = [], np.zeros(WIDTH)
        for token in x:
            z, r = (expit(of_token[n] @ token + of_state[n] @ h) for n in (0, 1))
            recurrent = of_state[2] @ h
            n = np.tanh(of_token[2] @ token + r * recurrent)
            found.append((z, r, n, recurrent, h))
            h = (1.0 - z) * n + z * h
        return found

    def outputs(x: np.ndarray) -> np.ndarray:
        return np.array([(1.0 - z) * n + z * h for z, _, n, _, h in steps(x)])

    def jacobian(x: np.ndarray) -> np.ndarray:
        found = np.zeros((*x.shape, *x.shape))
        d_h = np.zeros((*x.shape, WIDTH))  # of every output by the state that it is followed back to
        done = steps(x)
        for t in range(len(x) - 1, -1, -1):
            z, r, n, recurrent, h = done[t]
            d_h[t] += np.eye(WIDTH)
            d_n = d_h * (1.0 - z) * (1.0 - n * n)
            d_z = d_h * (h - n) * z * (1.0 - z)
            d_r = d_n * recurrent * r * (1.0 - r)
            found[:, :, t] = d_z @ of_token[0] + d_r @ of_token[1] + d_n @ of_token[2]
            d_h = d_h * z + d_z @ of_state[0] + d_r @ of_state[1] + (d_n * r) @ of_state[2]
        return found

    return outputs, jacobian


# ---- what is shown ------------------------------------------------------------------------------------------------------------------


def mechanisms(seed: int = 0) -> dict[str, Mechanism]:
    """All of them by name, from the same seed."""
    return {
        "softmax": attention("softmax", np.random.default_rng(seed)),
        "linear": attention("linear", np.random.default_rng(seed)),
        "gated delta": gated_delta(np.random.default_rng(seed)),
        "GRU": gated_recurrent_unit(np.random.default_rng(seed)),
        "convolution": convolution(np.random.default_rng(seed)),
    }


def influence(jacobian: np.ndarray) -> np.ndarray:
    """Shares [T, T]: of output i (row) that token j (column) has."""
    sizes: np.ndarray = np.sqrt(np.sum(jacobian**2, axis=(1, 3)))
    return sizes / sizes.sum(axis=1, keepdims=True)


def by_distance(shares: np.ndarray) -> np.ndarray:
    """Median share of the token n places back, for n = 0 ... T - 1, without the output of the repeated token."""
    return np.array([np.median(np.diagonal(shares[:-1], -n)) if n < len(shares) - 1 else np.nan for n in range(len(shares))])


def found_again(shares: np.ndarray) -> float:
    """How many times the share of its neighbours (three on either side) the repeated token has in the last output; 1 where nobody has any."""
    row = shares[-1]
    neighbours = np.median([row[REPEATED + n] for n in (-3, -2, -1, 1, 2, 3)])
    return float(row[REPEATED] / neighbours) if neighbours else 1.0


def table(shares: dict[str, np.ndarray]) -> Table:
    places = (0, 1, 4, 16, 64)
    found = Table(
        title="share of an output's influences, by how many tokens back",
        caption=f"medians over the outputs of {TOKENS} tokens; last column: the token that the last one repeats, against its neighbours",
    )
    found.add_column("mechanism")
    for n in places:
        found.add_column("own token" if n == 0 else f"{n} back", justify="right")
    found.add_column("its like", justify="right")
    for name, x in shares.items():
        medians = by_distance(x)
        again = found_again(x)
        found.add_row(name, *(f"{medians[n]:.2g}" if medians[n] else "0" for n in places), f"x {again:.3g}")
    return found


def draw(shares: dict[str, np.ndarray], path: Path) -> None:
    """A map of influences for each mechanism, and below all of them by distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    figure = plt.figure(figsize=(14, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 1.15))
    scale, colours = LogNorm(1e-6, 1.0, clip=False), plt.get_cmap("magma").with_extremes(under="black", bad="#888888")
    for n, (axes, (name, x)) in enumerate(zip(top.subplots(1, len(shares), sharey=True), shares.items(), strict=True)):
        hidden = np.triu(np.ones_like(x, bool), 1)
        picture = axes.imshow(np.ma.array(np.maximum(x, 1e-9), mask=hidden), norm=scale, cmap=colours, interpolation="nearest")
        axes.annotate(
            "its like",
            (REPEATED, TOKENS - 1),
            (REPEATED + 14, TOKENS - 28),
            color="white",
            fontsize=8,
            arrowprops={"arrowstyle": "->", "color": "white"},
        )
        axes.set(title=name, xlabel="token j", **({"ylabel": "output i"} if n == 0 else {}))
    top.colorbar(picture, ax=top.axes, label="influence(i, j)", shrink=0.9)
    axes = bottom.subplots()
    for name, x in shares.items():
        distances = by_distance(x)
        line = axes.plot(np.where(distances > 0.0, distances, np.nan), label=name, linewidth=2)[0]
        axes.plot([TOKENS - 1 - REPEATED], [x[-1, REPEATED] or np.nan], marker="o", color=line.get_color(), markersize=8)
    axes.set(yscale="log", ylim=(1e-8, 1.5), xlabel="tokens back, i - j", ylabel="median influence", xlim=(-1, TOKENS))
    axes.axvline(TOKENS - 1 - REPEATED, color="grey", linewidth=0.8, linestyle=":")
    axes.text(TOKENS - 2 - REPEATED, 3e-8, "dots: the token that the last one repeats", ha="right", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", ncols=len(shares))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    chosen = parser.parse_args(arguments)
    x = tokens(np.random.default_rng(chosen.seed + 1))
    shares = {name: influence(jacobian(x)) for name, (_, jacobian) in mechanisms(chosen.seed).items()}
    Console().print(table(shares))
    if chosen.picture:
        draw(shares, chosen.picture)
        print(f"drawn: {chosen.picture}")


if __name__ == "__main__":
    main()
