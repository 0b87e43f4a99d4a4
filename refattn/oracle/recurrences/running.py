"""Runs a lowered recurrence token by token, as it is or wrong in one of the ways kernels are: values, worst errors, and values with larger roundings.

The state is kept in two parts, what was there when the chunk began and what was written since: what goes wrong between chunks, or within one,
is then one part read or faded otherwise.  Without a chunk there is one of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from .lowered import Lowered

#: When the state fades; which state a query reads; what is wrong about chunks.
ORDERS = ("fade, write, read", "write, fade, read", "write, read, fade")
READS = ("after the write", "before the token", "faded, before the write")
CHUNKS = (
    "right",
    "forgets",  # the state begins every chunk at 0
    "read unfaded",  # queries read what came before the chunk as it was then
    "carried unfaded",  # what came before the chunk does not fade from its beginning to its end
    "erased within",  # erasures read only what the chunk wrote
    "erased from before",  # erasures read only what came before the chunk
    "erased to first order",  # what erasures within the chunk change is not erased again
    "last token lost",  # the next chunk does not know the last token of this one
    "own token hidden",  # queries do not read their own token
    "own token erased",  # a token's erasure reads its own write too
    "tail lost",  # tokens beyond the last whole chunk are neither written nor read
    "read within",  # queries do not read what came before the chunk
    "read one fade late",  # queries read what came before the chunk, less the fading of their own token
    "unfaded throughout",  # queries and erasures read what came before the chunk as it was then
    "mass forgets",  # the normaliser's sum begins every chunk at 0
    "carried fading once more",  # what a chunk wrote fades by its own tokens' factors too when it is carried on
    "first token lost",  # the first token of every chunk but the first is not written
    "starts before",  # queries read what the chunk before began with
    "tail unfaded",  # the last chunk, where it is not whole, fades by nothing when it is carried on
)
_TINY = 2.0**-36  # roundings are made at least this large where they are made larger on purpose


@dataclass(frozen=True)
class Form:
    """How a recurrence is run.

    Attributes
    ----------
    order, read, wrong : str
        Of `ORDERS`, `READS` and `CHUNKS`; `read` is "" for what the recurrence says.
    chunk : int
        Tokens of a chunk, where something is wrong about them.
    tiled : bool
        Whether query head h reads state h mod H.
    """

    order: str = ORDERS[0]
    read: str = ""
    wrong: str = CHUNKS[0]
    chunk: int = 0
    tiled: bool = False


@dataclass(frozen=True)
class Rounding:
    """Unit roundoffs of a way to compute, and over how many tokens.

    Attributes
    ----------
    sums, products, operands, state, function : float
        Of sums; of sums of products; of operands of products stored before; of the state where it is stored; relative error of exp.
    every : int
        Tokens between which the state is stored.
    chunk : int
        Tokens whose logarithms of decays are added up before they are exponentiated; 0 for all.
    tiny : float
        Below which a decay may be 0.
    """

    sums: float
    products: float
    operands: float
    state: float
    function: float
    every: int = 1
    chunk: int = 0
    tiny: float = 0.0

    @property
    def units(self) -> np.ndarray:
        return np.array([self.sums, self.products, self.operands, self.state, self.function, self.tiny])

    def times(self, factor: float) -> Rounding:
        names = ("sums", "products", "operands", "state", "function", "tiny")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


EXACT = Rounding(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Result:
    """out [B, Hq, T, V], state [B, H, K, V], mass [B, H, K] or None, maximum [B, H] or None."""

    out: np.ndarray
    state: np.ndarray
    mass: np.ndarray | None
    maximum: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """Arrays for the loops: stabilised where there is an input gate, with a channel for the mass where there is a normaliser."""

    lowered: Lowered
    q: np.ndarray
    b: np.ndarray
    w: np.ndarray
    e: np.ndarray
    g: np.ndarray
    u: np.ndarray
    state: np.ndarray
    maxima: np.ndarray | None


_NONE = np.empty((0, 0, 0, 0))


def prepared(x: Lowered) -> Prepared:
    rule, b, w, g, state, maxima = x.rule, x.b, x.w, x.g, x.state, None
    if x.gate is not None:
        fades = np.broadcast_to(g[..., 0], x.gate.shape)
        maxima = np.empty((*x.gate.shape[:2], x.tokens + 1))
        maxima[..., 0] = x.maximum
        with np.errstate(invalid="ignore"):
            for t in range(x.tokens):
                maxima[..., t + 1] = np.maximum(fades[..., t] + maxima[..., t], x.gate[..., t])
            before, after = maxima[..., :-1], maxima[..., 1:]
            nothing = np.isneginf(after)
            shift = np.where(nothing, 0.0, after)
            b = b * np.exp(x.gate - shift)[..., None, None]
            g = np.where(np.isneginf(before), np.where(nothing, 0.0, -np.inf), fades + before - shift)[..., None]
    if rule.normalizer:
        ones = np.broadcast_to(x.valued[:, None].astype(float), (*w.shape[:4], 1))
        w = np.concatenate([w, ones], axis=4)
        state = np.concatenate([state, x.mass[..., None]], axis=3)
    q, b, w, e, g, state = (np.require(y, np.float64, ["C", "W"]) for y in (x.q, b, w, x.e, g, state))
    u = _NONE if x.u is None else np.require(x.u, np.float64, ["C", "W"])
    return Prepared(x, q, b, w, e, g, u, state, maxima)


def _arguments(p: Prepared, form: Form) -> tuple[object, ...]:
    x = p.lowered
    read = form.read or (READS[1] if x.rule.exclusive else READS[0])
    flags = np.array(
        [
            form.tiled,
            ORDERS.index(form.order),
            READS.index(read),
            form.chunk or x.tokens + 1,
            CHUNKS.index(form.wrong),
            bool(x.rule.normalizer),
            x.wrote.start,
            x.wrote.stop,
        ],
        np.int64,
    )
    return (p.q, p.b, p.w, p.e, x.erases, x.old, p.g, p.u, flags)


def run(p: Prepared, form: Form, rounding: Rounding = EXACT, seed: int = 0, steady: int = 0, apart: bool = False) -> Result:
    """The outputs; with roundings of random sign.

    Parameters
    ----------
    p : Prepared
    form : Form
    rounding : Rounding
    seed : int
        Of the signs.
    steady : int
        Which roundings are the same for every token: none (0), those of decays (1), all (2).
    apart : bool
        Whether erasures do not correct what roundings wrote since the chunk began: a triangular system is solved before anything is written.
    """
    return _finished(p, *undivided(p, form, rounding, seed, steady, apart))


def undivided(
    p: Prepared, form: Form, rounding: Rounding = EXACT, seed: int = 0, steady: int = 0, apart: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """What queries read of the state, and the state after the last token; of a normaliser's sum too, which is the last column."""
    x = p.lowered
    state = p.state.copy()
    read = np.zeros((*x.q.shape[:3], state.shape[3]))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), 4093 + p.w.shape[4]) if rounding is not EXACT else np.zeros(1)
    periods = np.array([rounding.every, rounding.chunk or x.tokens + 1, steady, apart], np.int64)
    with np.errstate(all="ignore"):
        _run(*_arguments(p, form), rounding.units, periods, signs, state, read)
    return read[:, :, x.reads], state


def _finished(p: Prepared, read: np.ndarray, state: np.ndarray) -> Result:
    x, rule = p.lowered, p.lowered.rule
    mass = None
    if rule.normalizer:
        divisor = divisor_of(p, read[..., -1:])
        mass, state = state[..., -1], state[..., :-1]
        with np.errstate(all="ignore"):
            read = np.where(divisor == 0.0, 0.0, read[..., :-1] / np.where(divisor == 0.0, 1.0, divisor))
    with np.errstate(all="ignore"):
        out = rule.scale * read if x.skip is None else rule.scale * read + x.skip
    return Result(out, state, mass, None if p.maxima is None else p.maxima[..., -1])


def divisor_of(p: Prepared, mass: np.ndarray) -> np.ndarray:
    rule = p.lowered.rule
    if rule.normalizer == "sum":
        return mass + rule.eps
    if rule.normalizer == "clamp":
        return np.maximum(mass, rule.eps)
    return np.maximum(np.abs(mass), _floor(p)) + rule.eps


def _floor(p: Prepared) -> np.ndarray:
    x = p.lowered
    if p.maxima is None:
        return np.ones(1)
    maxima = p.maxima[:, :, 1:]
    maxima = np.repeat(maxima, x.q.shape[1] // maxima.shape[1], axis=1)[:, :, x.reads, None]
    return np.exp(-np.where(np.isneginf(maxima), 0.0, maxima))


@njit(cache=True, error_model="numpy")
def faded(a, x):  # type: ignore[no-untyped-def]
    """Nothing is left of anything by a factor of 0."""
    return 0.0 if a == 0.0 else a * x


@njit(cache=True, error_model="numpy")
def fade(fading, past, own, rough, last, squares):  # type: ignore[no-untyped-def]
    """Every part of the state, by row."""
    for x in range(len(past)):
        a = fading[min(x, len(fading) - 1)]
        for y in range(past.shape[1]):
            past[x, y] = faded(a, past[x, y])
            own[x, y] = faded(a, own[x, y])
            rough[x, y] = faded(a, rough[x, y])
            last[x, y] = faded(a, last[x, y])
            squares[x, y] = faded(a * a, squares[x, y])


@njit(cache=True, error_model="numpy")
def _run(q, b, w, e, erases, old, g, u, flags, units, periods, signs, state, read):  # type: ignore[no-untyped-def]
    tiled, order, reading, chunk, wrong, masses, start, stop = flags[0], flags[1], flags[2], flags[3], flags[4], flags[5], flags[6], flags[7]
    u_sum, u_product, u_operand, u_state, u_function, tiny = units[0], units[1], units[2], units[3], units[4], units[5]
    every, restart, steady, apart = periods[0], periods[1], periods[2], periods[3]
    noisy = u_sum > 0.0  # `order`, `reading` and `wrong` are places in ORDERS, READS and CHUNKS
    batch, heads, n, n_keys = q.shape
    states, writes, n_values = state.shape[1], b.shape[3], w.shape[4]
    spare = max(len(signs) - n_values, 1)  # where a row of signs may begin
    group, rows = heads // states, g.shape[3]
    first = np.zeros((n_keys, n_values))  # when the chunk began
    earlier = np.zeros((n_keys, n_values))  # when the chunk before began
    past, late = np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values))  # that, faded; less the last fading
    own = np.zeros((n_keys, n_values))  # written in the chunk
    rough = np.zeros((n_keys, n_values))  # the same with what erasures from before leave
    last = np.zeros((n_keys, n_values))  # by the chunk's last token
    before, written = np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values))
    squares = np.zeros((n_keys, n_values))  # of all that was written, faded
    summed, fading, steadily = np.zeros(rows), np.zeros(rows), np.zeros(rows)
    change, slip, held, square, rough_held = np.zeros(n_values), np.zeros(n_values), np.zeros(n_values), np.zeros(n_values), np.zeros(n_values)
    astray = np.zeros((n_keys, n_values))  # what roundings wrote that erasures of the same chunk do not read
    at = 0
    whole = start + (stop - start) // chunk * chunk
    for i in range(batch):
        for h in range(states):
            first[:] = state[i, h]
            earlier[:] = first
            past[:] = first
            late[:] = first
            own[:] = 0.0
            rough[:] = 0.0
            last[:] = 0.0
            squares[:] = first**2
            astray[:] = 0.0
            summed[:] = 0.0
            for r in range(rows):
                steadily[r] = signs[at % spare]
                at += 1
            base = at
            for t in range(n):
                lost = (wrong == 10 and t >= whole) or (wrong == 16 and start < t < stop and (t - start) % chunk == 0)
                if start < t < stop and (t - start) % chunk == 0:  # a chunk begins
                    earlier[:] = first
                    if wrong == 1:
                        first[:] = 0.0
                    elif wrong == 3:
                        first += own
                    elif wrong == 7:
                        first[:] = past + own - last
                    else:
                        first[:] = past + own
                    if wrong == 15:
                        first[:] = past + rough
                    if wrong == 14 and masses:
                        first[:, n_values - 1] = state[i, h, :, n_values - 1]
                    past[:] = first
                    late[:] = first
                    own[:] = 0.0
                    rough[:] = 0.0
                if t % restart == 0:
                    summed[:] = 0.0
                    own += astray
                    astray[:] = 0.0
                before[:] = past + own
                if steady == 2:
                    at = base
                # 1. fade
                for r in range(rows):
                    gate = g[i, h, t, r]
                    fading[r] = np.exp(gate)
                    if noisy and gate > -np.inf:
                        summed[r] += abs(gate)
                        sign = steadily[r] if steady else signs[at % spare]
                        at += 1
                        if gate != 0.0:
                            fading[r] *= 1.0 + sign * (u_function + u_sum * (1.0 + abs(gate) + 2.0 * summed[r]))
                            fading[r] += sign * tiny
                    elif noisy:
                        summed[r] = 0.0
                late[:] = past
                if apart:
                    for x in range(n_keys):
                        astray[x] *= fading[min(x, rows - 1)]
                if order == 0:
                    fade(fading, past, own, rough, last, squares)
                written[:] = past + own
                # 2. write
                last[:] = 0.0
                for r in range(writes):
                    if lost:
                        continue
                    slip[:] = 0.0
                    held[:] = 0.0
                    if erases[r]:
                        square[:] = 0.0
                        rough_held[:] = 0.0
                        for x in range(n_keys):
                            key = e[i, h, t, r, x]
                            if key == 0.0:
                                continue
                            for y in range(n_values):
                                if old[r]:
                                    there = before[x, y]
                                elif wrong == 4:
                                    there = own[x, y]
                                elif wrong == 5:
                                    there = past[x, y]
                                elif wrong == 6:
                                    there = past[x, y] + rough[x, y]
                                elif wrong == 13:
                                    there = first[x, y] + own[x, y]
                                else:
                                    there = past[x, y] + own[x, y]
                                held[y] += key * there
                                if wrong == 6:
                                    rough_held[y] += key * past[x, y]
                                if noisy:
                                    square[y] += key**2 * max(there**2, squares[x, y])
                        if noisy:
                            at = at % spare
                            unit = u_product * np.sqrt(n_keys + min(t, chunk) + 2.0) + 2.0 * u_operand
                            for y in range(n_values):
                                slip[y] -= signs[at + y] * unit * max(abs(held[y]), np.sqrt(square[y]), abs(w[i, h, t, r, y]))
                            at += n_values
                    for y in range(n_values):
                        change[y] = w[i, h, t, r, y] - held[y]
                    if wrong == 9 and erases[r]:
                        overlap = 1.0
                        for x in range(n_keys):
                            overlap += e[i, h, t, r, x] * b[i, h, t, r, x]
                        change /= overlap
                    if wrong == 6:
                        for x in range(n_keys):
                            for y in range(n_values):
                                rough[x, y] += b[i, h, t, r, x] * (w[i, h, t, r, y] - (rough_held[y] if erases[r] else 0.0))
                    if noisy:
                        at = at % spare
                        for y in range(n_values):
                            slip[y] += change[y] * signs[at + y] * (u_sum + 2.0 * u_operand)
                            if not apart:
                                change[y] += slip[y]
                        at += n_values
                    for x in range(n_keys):
                        key = b[i, h, t, r, x]
                        if key == 0.0:
                            continue
                        if noisy:
                            at = at % spare
                            key *= 1.0 + signs[at] * (2.0 * u_sum + u_operand)
                            at += 1
                        for y in range(n_values):
                            part = key * change[y]
                            own[x, y] += part
                            last[x, y] += part
                            squares[x, y] += part**2
                        if wrong == 15:
                            for y in range(n_values):
                                rough[x, y] += fading[min(x, rows - 1)] * key * change[y]
                        if apart:
                            for y in range(n_values):
                                astray[x, y] += key * slip[y]
                if order == 1:
                    fade(fading, past, own, rough, last, squares)
                if noisy:
                    stored = u_state if (t + 1) % every == 0 or t == n - 1 else 0.0
                    for x in range(n_keys):
                        at = at % spare
                        for y in range(n_values):
                            there = abs(past[x, y] + own[x, y])
                            own[x, y] += signs[at + y] * (u_sum * (np.sqrt(squares[x, y]) + there) + stored * there)
                        at += n_values
                # 3. read
                for m in range(group):
                    j = h + m * states if tiled else h * group + m
                    if lost and wrong == 10:
                        continue
                    held[:] = 0.0
                    square[:] = 0.0
                    for x in range(n_keys):
                        key = q[i, j, t, x]
                        if key == 0.0:
                            continue
                        for y in range(n_values):
                            if wrong in (2, 13):
                                there = first[x, y] + own[x, y]
                            elif wrong == 11:
                                there = own[x, y]
                            elif wrong == 12:
                                there = late[x, y] + own[x, y]
                            elif wrong == 17:
                                there = earlier[x, y] + own[x, y] if t >= chunk else past[x, y] + own[x, y]
                            elif reading == 1:
                                there = before[x, y]
                            elif reading == 2 or wrong == 8:
                                there = written[x, y]
                            else:
                                there = past[x, y] + own[x, y]
                            held[y] += key * (there + astray[x, y])
                            if noisy:
                                square[y] += key**2 * max(there**2, squares[x, y])
                    if u.shape[3] > 0 and reading != 0:
                        for r in range(writes):
                            overlap, size = 0.0, 0.0
                            for x in range(n_keys):
                                part = q[i, j, t, x] * u[i, h, t, x] * b[i, h, t, r, x]
                                overlap += part
                                size += part**2
                            if noisy:
                                at = at % spare
                                amount = u_product * np.sqrt(n_keys + 3.0) * max(abs(overlap), np.sqrt(size)) + 2.0 * u_operand * np.sqrt(size)
                                overlap += signs[at] * amount
                                at += 1
                            for y in range(n_values):
                                held[y] += overlap * w[i, h, t, r, y]
                    if noisy:
                        at = at % spare
                        unit = u_product * np.sqrt(n_keys + t + 2.0) + 2.0 * u_operand
                        for y in range(n_values):
                            held[y] += signs[at + y] * unit * max(abs(held[y]), np.sqrt(square[y]))
                        at += n_values
                    for y in range(n_values):
                        read[i, j, t, y] = held[y]
                if order == 2:
                    fade(fading, past, own, rough, last, squares)
            state[i, h] = past + own + astray
            if wrong == 3 or (wrong == 18 and whole != stop):
                state[i, h] = first + own
            elif wrong == 15:
                state[i, h] = past + rough


@njit(cache=True, error_model="numpy")
def _worst(q, b, w, e, erases, old, g, u, flags, units, periods, state, error, read, magnitudes):  # type: ignore[no-untyped-def]
    tiled, reading = flags[0], flags[2]
    u_sum, u_product, u_operand, u_state, u_function, tiny = units[0], units[1], units[2], units[3], units[4], units[5]
    every, restart = periods[0], periods[1]
    batch, heads, n, n_keys = q.shape
    states, writes, n_values = state.shape[1], b.shape[3], w.shape[4]
    group, rows = heads // states, g.shape[3]
    value, size, off = np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values))
    value_before, size_before, off_before = np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values)), np.zeros((n_keys, n_values))
    summed, change, uncertain = np.zeros(rows), np.zeros(n_values), np.zeros(n_values)
    for i in range(batch):
        for h in range(states):
            value[:] = state[i, h]
            size[:] = np.abs(value)
            off[:] = 0.0
            summed[:] = 0.0
            for t in range(n):
                if t % restart == 0:
                    summed[:] = 0.0
                value_before[:], size_before[:], off_before[:] = value, size, off
                for x in range(n_keys):
                    r = min(x, rows - 1)
                    gate = g[i, h, t, r]
                    a = np.exp(gate)
                    if gate > -np.inf:
                        if x < rows:
                            summed[r] += abs(gate)
                        relative = u_function + u_sum * (1.0 + abs(gate) + 2.0 * summed[r]) if gate != 0.0 else 0.0
                    else:
                        summed[r], relative = 0.0, 0.0
                    for y in range(n_values):
                        value[x, y], size[x, y] = faded(a, value[x, y]), faded(a, size[x, y])
                        missed = relative * size[x, y] + tiny * (size_before[x, y] + off_before[x, y])
                        off[x, y] = (1.0 + relative) * faded(a, off[x, y]) + missed
                if reading == 2:
                    value_before[:], size_before[:], off_before[:] = value, size, off
                for r in range(writes):
                    for y in range(n_values):
                        held, large, wrong = 0.0, 0.0, 0.0
                        if erases[r]:
                            for x in range(n_keys):
                                key = e[i, h, t, r, x]
                                if key != 0.0:
                                    held += key * (value_before[x, y] if old[r] else value[x, y])
                                    large += abs(key) * (size_before[x, y] if old[r] else size[x, y])
                                    wrong += abs(key) * (off_before[x, y] if old[r] else off[x, y])
                        change[y] = w[i, h, t, r, y] - held
                        uncertain[y] = wrong + (u_product * (n_keys + t + 2.0) + 3.0 * u_operand) * (large + wrong)
                        uncertain[y] += (2.0 * u_sum + 4.0 * u_operand) * (abs(w[i, h, t, r, y]) + large)
                    for x in range(n_keys):
                        key = b[i, h, t, r, x]
                        if key == 0.0:
                            continue
                        for y in range(n_values):
                            part = key * change[y]
                            value[x, y] += part
                            size[x, y] += abs(part)
                            off[x, y] += abs(key) * uncertain[y] + (3.0 * u_sum + u_operand) * (abs(part) + abs(key) * uncertain[y])
                stored = (t + 1) % every == 0 or t == n - 1
                for x in range(n_keys):
                    for y in range(n_values):
                        off[x, y] += (2.0 * u_sum + (u_state if stored else 0.0)) * (size[x, y] + off[x, y])
                for m in range(group):
                    j = h + m * states if tiled else h * group + m
                    for y in range(n_values):
                        large, wrong = 0.0, 0.0
                        for x in range(n_keys):
                            key = abs(q[i, j, t, x])
                            if key == 0.0:
                                continue
                            if reading == 0:
                                large += key * size[x, y]
                                wrong += key * off[x, y]
                            else:
                                large += key * size_before[x, y]
                                wrong += key * off_before[x, y]
                            if u.shape[3] > 0 and reading != 0:
                                for r in range(writes):
                                    large += key * abs(u[i, h, t, x] * b[i, h, t, r, x] * w[i, h, t, r, y])
                        magnitudes[i, j, t, y] = large
                        read[i, j, t, y] = wrong + (u_product * (n_keys + t + 5.0) + 4.0 * u_operand) * (large + wrong)
            error[i, h] = off


def worst(p: Prepared, form: Form, rounding: Rounding, exact: Result) -> Result:
    """The largest error of every output, every rounding at its limit and of the worst sign; of a right order of steps."""
    x, rule = p.lowered, p.lowered.rule
    periods = np.array([rounding.every, rounding.chunk or x.tokens + 1], np.int64)
    error, read = np.zeros(p.state.shape), np.zeros((*x.q.shape[:3], p.state.shape[3]))
    sizes = np.zeros_like(read)
    with np.errstate(all="ignore"):
        _worst(*_arguments(p, form), rounding.units, periods, p.state, error, read, sizes)
        read, mass = read[:, :, x.reads], None
        value = exact.out if x.skip is None else exact.out - x.skip
        if rule.normalizer:
            divisor = np.abs(divisor_of(p, undivided(p, form)[0][..., -1:]))
            lost = read[..., -1:] + rounding.sums * divisor
            left = divisor - lost
            read = np.where(left > 0, (abs(rule.scale) * read[..., :-1] + np.abs(value) * lost) / left, np.inf)
            mass, error = error[..., -1], error[..., :-1]
        else:
            read = abs(rule.scale) * read
        read = read + 3 * rounding.sums * np.abs(value)
    if x.skip is not None:
        read = read + rounding.sums * (2 * np.abs(x.skip) + np.abs(exact.out))
    return Result(read, error, mass, None if p.maxima is None else _of_maxima(p, rounding))


def _of_maxima(p: Prepared, rounding: Rounding) -> np.ndarray:
    """A sum of logarithms, each at most as large as the largest so far."""
    assert p.maxima is not None
    finite = np.where(np.isfinite(p.maxima), np.abs(p.maxima), 0.0)
    return rounding.sums * (p.lowered.tokens + 2) * finite.max(axis=-1, initial=0.0)
