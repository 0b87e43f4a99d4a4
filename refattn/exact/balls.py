"""Midpoint-radius arithmetic of any precision (Arb, through python-flint) for what two float64 leave open."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .task import Task

#: Bits of the first and the last attempt.
FIRST, LAST = 192, 6144
#: Magnitudes outside 2**-OUTSIDE .. 2**OUTSIDE round as these do, in any format.
OUTSIDE = 1200


def available() -> bool:
    return importlib.util.find_spec("flint") is not None


def precisions() -> Iterator[int]:
    bits = FIRST
    while bits <= LAST:
        yield bits
        bits *= 2


def precision(bits: int) -> Any:
    """A context in which flint computes with so many bits."""
    import flint

    return flint.ctx.workprec(bits)


@dataclass(frozen=True)
class Row:
    """One row as balls: scores, scaled products q . k and weights exp(s - top) by key, the sink's weight, the sink, and the sum of all weights."""

    scores: dict[int, Any]
    dots: dict[int, Any]
    weights: dict[int, Any]
    sink: Any
    sink_score: float
    total: Any
    top: float

    def share(self, j: int) -> Any:
        """The weight of a key; exactly 1 where there is no other."""
        alone = len(self.weights) == 1 and self.sink == 0
        return type(self.total)(1) if alone else self.weights[j] / self.total


class Balls:
    """A task's rows at any precision; matrices of one key-value head are kept from row to row."""

    def __init__(self, task: Task) -> None:
        import flint

        self.task, self.flint = task, flint
        self._at: tuple[int, int] | None = None

    def row(self, b: int, h: int, i: int) -> Row:
        """At flint's present precision, as all that is done with it must be; operands that are not finite count as 0."""
        task, arb, arb_mat = self.task, self.flint.arb, self.flint.arb_mat
        g = task.group(h)
        added = task.added(b, h, np.array([i]), task.shape[3])[0]
        seen = np.flatnonzero(added != -np.inf)
        if self._at != (b, g):
            self._k = arb_mat(np.nan_to_num(task.k[b, g], posinf=0.0, neginf=0.0).tolist())
            self._at = (b, g)
        products = (self._k * arb_mat([[x] for x in task.q[b, h, i].tolist()])).entries() if seen.size else []
        scores, dots = {}, {}
        for j in seen.tolist():
            if added[j] == np.inf:
                scores[j] = arb(task.fill)
                continue
            dots[j] = s = products[j] * arb(task.scale)
            if task.cap:
                s = arb(task.cap) * (s / arb(task.cap)).tanh()
            scores[j] = s + arb(float(added[j]))
        sink = float(task.sinks[h])
        top = max([*(float(s.mid()) for s in scores.values()), sink], default=0.0)
        top = top if math.isfinite(top) else 0.0
        weights = {j: (s - arb(top)).exp() for j, s in scores.items()}
        own = (arb(sink) - arb(top)).exp() if sink > -math.inf else arb(0)
        return Row(scores, dots, weights, own, sink, sum(weights.values(), own), top)

    def exponent(self, row: Row, j: int | None, key: Any) -> Any:
        """The score of a group of keys: exactly, where it is known as a rational number, or that of its member j, or the sink's."""
        if isinstance(key, Fraction):
            return self.flint.arb(self.flint.fmpq(key.numerator, key.denominator))
        return self.flint.arb(row.sink_score) if j is None else row.scores[j]

    def result(self, row: Row, b: int, h: int, name: str, n: int) -> Any:
        """One element of an output."""
        arb = self.flint.arb
        if name == "scores":
            return row.scores[n]
        if name == "weights":
            return row.share(n)
        if name == "lse":
            return row.total.log() + arb(row.top)
        column = self.task.v[b, self.task.group(h), :, n]
        return sum((w * arb(float(column[j])) for j, w in row.weights.items()), arb(0)) / row.total


def sign(terms: list[tuple[Any, Fraction]]) -> int | None:
    """The sign of a sum of c exp(s), given balls s and rational c; None where they do not tell."""
    if not terms:
        return 0
    top = max((s for s, _ in terms), key=lambda s: s.mid())
    total = sum((c.numerator * (s - top).exp() / c.denominator for s, c in terms), type(top)(0))
    return 1 if total > 0 else -1 if total < 0 else None


class Slopes:
    """Gradients as balls, for cotangents d_out and d_lse; the rows of one key-value head are kept until another is asked for.

    `bias_shape` is that of d_bias, 1 along axes that the bias does not have.
    """

    def __init__(self, task: Task, d_out: np.ndarray, d_lse: np.ndarray, bias_shape: tuple[int, ...]) -> None:
        self._shared = bias_shape
        self._balls, self._task, self._d_out, self._d_lse = Balls(task), task, d_out, d_lse
        self._kept: dict[tuple[int, int], tuple[dict[int, Any], dict[int, Any], dict[int, Any], Any]] = {}
        self._for: tuple[int, ...] = ()

    def gradient(self, part: str, at: tuple[int, ...], bits: int) -> Any:
        """One element of d_q, d_k, d_v, d_bias (axes B Hq T S, 1 where it has none) or d_sinks."""
        with self._balls.flint.ctx.workprec(bits):
            return self._gradient(part, at, bits)

    def _gradient(self, part: str, at: tuple[int, ...], bits: int) -> Any:
        task, arb = self._task, self._balls.flint.arb
        batch, heads, n_q, _ = task.shape
        if part == "q":
            b, h, i, x = at
            _, _, products, _ = self._row(b, h, i, bits)
            return sum((y * arb(float(task.k[b, task.group(h), j, x])) for j, y in products.items()), arb(0)) * arb(task.scale)
        if part in ("k", "v"):
            b, g, j, x = at
            own = [h for h in range(heads) if task.group(h) == g]
            total = arb(0)
            for h, i in ((h, i) for h in own for i in range(n_q)):
                shares, _, products, _ = self._row(b, h, i, bits)
                if part == "k" and j in products:
                    total += products[j] * arb(float(task.q[b, h, i, x])) * arb(task.scale)
                elif part == "v" and j in shares:
                    total += shares[j] * arb(float(self._d_out[b, h, i, x]))
            return total
        if part == "sinks":
            return sum((self._row(b, at[0], i, bits)[3] for b in range(batch) for i in range(n_q)), arb(0))
        total = arb(0)
        shared = self._shared
        for b in range(batch) if shared[0] == 1 else (at[0],):
            for h in range(heads) if shared[1] == 1 else (at[1],):
                for i in range(n_q) if shared[2] == 1 else (at[2],):
                    slopes = self._row(b, h, i, bits)[1]
                    total += sum(slopes.values(), arb(0)) if shared[3] == 1 else slopes.get(at[3], arb(0))
        return total

    def _row(self, b: int, h: int, i: int, bits: int) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any], Any]:
        """Weights, slopes of scores and of products by key, and of the sink."""
        task, arb = self._task, self._balls.flint.arb
        g = task.group(h)
        if self._for != (b, g, bits):
            self._kept, self._for = {}, (b, g, bits)
        if (h, i) not in self._kept:
            row = self._balls.row(b, h, i)
            d_out, d_lse = self._d_out[b, h, i].tolist(), arb(float(self._d_lse[b, h, i]))
            if not (np.isfinite(task.q[b, h, i]).all() and np.isfinite(task.k[b, g, list(row.dots)]).all() and row.sink_score < math.inf):
                unknown = arb("nan")
                self._kept[h, i] = *(dict.fromkeys(row.weights, unknown) for _ in range(3)), unknown
                return self._kept[h, i]
            if not row.weights and row.sink == 0:
                self._kept[h, i] = {}, {}, {}, arb(0)
                return self._kept[h, i]
            shares = {j: row.share(j) for j in row.weights}
            values = task.v[b, g]
            products = {j: sum((arb(a) * arb(float(x)) for a, x in zip(d_out, values[j], strict=True)), arb(0)) for j in shares}
            shift = d_lse - sum((p * products[j] for j, p in shares.items()), arb(0))
            slopes = {j: shares[j] * (products[j] + shift) for j in row.dots}  # a score that is a fixed number hands nothing on
            cap = arb(task.cap) if task.cap else None
            inner = {j: slopes[j] if cap is None else slopes[j] * (1 - (x / cap).tanh() ** 2) for j, x in row.dots.items()}
            self._kept[h, i] = shares, slopes, inner, row.sink / row.total * shift
        return self._kept[h, i]


def ends(ball: Any) -> tuple[Fraction, Fraction] | None:
    """Both ends of a ball as rational numbers, or None where it is not finite."""
    if not ball.is_finite():
        return None
    return _end(ball.lower()), _end(ball.upper())


def _end(x: Any) -> Fraction:
    mantissa, exponent = (int(n) for n in x.man_exp())
    size = abs(mantissa).bit_length() + exponent
    if mantissa and abs(size) > OUTSIDE:
        exponent = (OUTSIDE if size > 0 else -OUTSIDE) - abs(mantissa).bit_length()
    return Fraction(mantissa) * Fraction(2) ** exponent
