"""The gated delta rule in NumPy, token by token and in chunks, as replaceable stages, and thirty mistakes as one stage replaced each.

Arithmetic is float32 whatever the operands are stored in.  The chunked form solves the triangular system of Gated DeltaNet's appendix (the WY form):
what every token of a chunk changes, as far as it follows from the chunk alone and as far as it follows from the state before.  Names begin with the
fault's number in the project's catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from refattn.candidate import Candidate

F32 = np.float32


def kept(x):
    """What is stored, as it is."""
    return x


def in_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(F32)


def grouped(x, heads):
    return np.repeat(x, heads // x.shape[1], axis=1)


def tiled(x, heads):
    return np.tile(x, (1, heads // x.shape[1]) + (1,) * (x.ndim - 2))


def no_change(q, k, v, gate, beta, state):
    return q, k, v, gate, beta, state


def solved(overlap, beta):
    """(I + A)^-1 by substitution, A strictly lower triangular."""
    size = overlap.shape[-1]
    found = np.broadcast_to(np.eye(size, dtype=F32), overlap.shape).copy()
    for i in range(1, size):
        found[..., i, :i] = -(overlap[..., i, None, :i] @ found[..., :i, :i])[..., 0, :]
    return found


@dataclass(frozen=True)
class Stages:
    """What a kernel of the gated delta rule is made of.

    chunk
        Tokens per chunk; 0 for the recurrent form.
    stored
        Rounding of operands of products and of what is kept between them, in the chunked form.
    state
        Rounding of the state, after every token or chunk.
    """

    chunk: int = 0
    stored: Callable = kept
    state: Callable = kept
    read: Callable = no_change
    group: Callable = grouped
    factor: Callable = lambda scale, d: d**-0.5 if scale is None else scale
    faded: Callable = np.exp
    write_beta: Callable = lambda beta: beta
    erase_beta: Callable = lambda beta: beta
    erased: Callable = lambda before, faded: faded  # which state the erasure reads
    sign: float = 1.0  # of the erasure
    late_fade: bool = False  # the state fades after the write
    readout: Callable = lambda before, after: after
    inverse: Callable = solved
    own: int = 0  # diagonal of what queries read of their chunk
    diagonal: int = -1  # of what erasures read of their chunk
    read_fade: Callable = np.exp  # of the state before the chunk, as queries read it
    total_fade: Callable = lambda summed: np.exp(summed[..., -1:])  # of the state before the chunk, when it is carried on
    own_fade: Callable = lambda summed, gate: np.exp(summed[..., -1:] - summed)  # of what the chunk wrote
    fading: Callable = lambda summed: np.exp(np.minimum(summed[..., :, None] - summed[..., None, :], 0))
    begin: Callable = lambda state, number: state  # the state a chunk begins with
    tail: Callable = lambda tokens, chunk: tokens  # how many tokens are carried into the last state
    final: Callable = lambda state, before: state


@np.errstate(all="ignore")
def attend(stages, q, k, v, gate, beta, initial_state=None, scale=None):
    """out in the operands' format and the last state in float32."""
    kept_in, heads, d = v.dtype, q.shape[1], q.shape[3]
    state = np.zeros((*k.shape[:2], d, v.shape[3]), F32) if initial_state is None else initial_state.astype(F32)
    q, k, v, gate, beta, state = stages.read(*(x.astype(F32) for x in (q, k, v, gate, beta)), state)
    run = in_chunks if stages.chunk else token_by_token
    out, state = run(stages, q, k, v, gate, beta, state.copy(), heads)
    return (F32(stages.factor(scale, d)) * out).astype(kept_in), state


def token_by_token(s, q, k, v, gate, beta, state, heads):
    out = np.zeros((*q.shape[:3], v.shape[3]), F32)
    last = state
    for t in range(q.shape[2]):
        before = last = state
        alpha = s.faded(gate[:, :, t])[..., None, None]
        faded = before if s.late_fade else alpha * before
        held = np.einsum("bhk,bhkv->bhv", k[:, :, t], s.erased(before, faded))
        change = s.write_beta(beta[:, :, t])[..., None] * v[:, :, t] - F32(s.sign) * s.erase_beta(beta[:, :, t])[..., None] * held
        state = faded + k[:, :, t, :, None] * change[:, :, None]
        state = s.state(alpha * state if s.late_fade else state).astype(F32)
        out[:, :, t] = np.einsum("bhk,bhkv->bhv", q[:, :, t], s.group(s.readout(before, state), heads))
    return out, s.final(state, last)


def in_chunks(s, q, k, v, gate, beta, state, heads):
    out = np.zeros((*q.shape[:3], v.shape[3]), F32)
    n, last = q.shape[2], state
    for number, start in enumerate(range(0, n, s.chunk)):
        at = slice(start, min(start + s.chunk, n))
        state = s.begin(state, number)
        summed = np.cumsum(gate[:, :, at], axis=-1, dtype=F32)
        keys, values, fading = k[:, :, at], v[:, :, at], s.fading(summed)
        size = keys.shape[2]
        products = s.erase_beta(beta[:, :, at])[..., None] * (keys @ np.swapaxes(keys, -1, -2))
        overlap = np.where(np.tri(size, k=s.diagonal, dtype=bool), products * fading, 0)
        inverse = s.stored(s.inverse((F32(s.sign) * overlap).astype(F32), beta[:, :, at]))
        from_values = inverse @ s.stored(s.write_beta(beta[:, :, at])[..., None] * values)
        from_state = inverse @ s.stored(s.erase_beta(beta[:, :, at])[..., None] * keys * np.exp(summed)[..., None])
        changes = s.stored(from_values - F32(s.sign) * s.stored(from_state) @ s.stored(state))
        products = q[:, :, at] @ np.swapaxes(s.group(keys, heads), -1, -2)
        scores = s.stored(np.where(np.tri(size, k=s.own, dtype=bool), products * s.group(fading, heads), 0).astype(F32))
        faded_q = s.stored(q[:, :, at] * s.group(s.read_fade(summed), heads)[..., None])
        out[:, :, at] = faded_q @ s.stored(s.group(state, heads)) + scores @ s.group(changes, heads)
        if s.tail(n, s.chunk) < at.stop:
            continue
        carried = s.stored(keys * s.own_fade(summed, gate[:, :, at])[..., None])
        state = s.state(s.total_fade(summed)[..., None] * state + np.swapaxes(carried, -1, -2) @ changes).astype(F32)
    return out, s.final(state, last)


OPERANDS = frozenset({"q", "k", "v", "gate", "beta", "initial_state"})


def candidate(stages, name="planted", profile=""):
    return Candidate(
        name,
        lambda operands, params: attend(stages, **operands, **params),
        OPERANDS,
        frozenset({"scale"}),
        returns=("out", "state"),
        variant="gated_delta",
        profile=profile,
    )


RIGHT = {
    "recurrent": Stages(),
    "chunks of 16": Stages(16),
    "chunks of 32": Stages(32),
    "chunks of 64": Stages(64),
}


# ---- wrong stages --------------------------------------------------------------------------------------------------------------


def reading(**changes):
    """A `read` stage that changes operands by name."""

    def read(q, k, v, gate, beta, state):
        given = {"q": q, "k": k, "v": v, "gate": gate, "beta": beta, "state": state}
        return tuple((given | {name: change(**given) for name, change in changes.items()}).values())

    return read


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + F32(1e-6))


def late(x):
    """Of the token before, and the first one's own."""
    return np.concatenate([x[:, :, :1], x[:, :, :-1]], axis=2) if x.shape[2] else x


def turned(state):
    return np.ascontiguousarray(np.swapaxes(state, -1, -2)) if state.shape[-1] == state.shape[-2] else state


def first_order(overlap, beta):
    return np.eye(overlap.shape[-1], dtype=F32) - overlap


def identity(overlap, beta):
    return np.broadcast_to(np.eye(overlap.shape[-1], dtype=F32), overlap.shape)


def swapped(q, k, v, gate, beta, state):
    return (q, k, v, gate, beta, state) if q.shape != k.shape else (k, q, v, gate, beta, state)


def factored(summed):
    """exp(G_i) exp(-G_j) for exp(G_i - G_j)."""
    return np.exp(summed)[..., :, None] * np.exp(-summed)[..., None, :]


def first_head(x):
    return np.broadcast_to(x[:, :1], x.shape)


#: Name -> kernel; the first word is its code.
FAULTS = {
    "D3 no scale": Stages(factor=lambda scale, d: 1.0 if scale is None else scale),
    "D3 scale twice": Stages(64, factor=lambda scale, d: 1 / d if scale is None else scale**2),
    "D16 no decay": Stages(faded=np.ones_like),
    "D16 gate in base 2": Stages(faded=np.exp2),
    "D16 gate for the factor": Stages(faded=lambda gate: gate),
    "D4 gate of the token before": Stages(16, read=reading(gate=lambda gate, **_: late(gate))),
    "D4 fades after the write": Stages(late_fade=True),
    "D8 erases from the state that has not faded": Stages(erased=lambda before, faded: before),
    "D8 erasure of the wrong sign": Stages(sign=-1.0),
    "D6 no erasure": Stages(erase_beta=lambda beta: 0 * beta),
    "D7 no beta": Stages(64, write_beta=lambda beta: beta**0, erase_beta=lambda beta: beta**0),
    "D7 beta for values only": Stages(erase_beta=lambda beta: beta**0),
    "D7 beta for the erasure only": Stages(32, write_beta=lambda beta: beta**0),
    "D7 beta squared": Stages(write_beta=lambda beta: beta**2, erase_beta=lambda beta: beta**2),
    "D7 beta doubled": Stages(64, write_beta=lambda beta: 2 * beta, erase_beta=lambda beta: 2 * beta),
    "D9 reads the state before the token": Stages(readout=lambda before, after: before),
    "D18 initial state ignored": Stages(64, read=reading(state=lambda state, **_: 0 * state)),
    "D17 initial state transposed": Stages(64, read=reading(state=lambda state, **_: turned(state))),
    "D17 last state transposed": Stages(final=lambda state, before: turned(state)),
    "D17 last state one token early": Stages(final=lambda state, before: before),
    "D5 state unfaded as chunks read it": Stages(32, read_fade=np.ones_like),
    "D5 state unfaded from chunk to chunk": Stages(64, total_fade=lambda summed: np.ones_like(summed[..., -1:])),
    "D4 chunk's writes fade once more": Stages(64, own_fade=lambda summed, gate: np.exp(summed[..., -1:] - summed + gate)),
    "D1 state restarts in every chunk": Stages(16, begin=lambda state, number: state if number == 0 else 0 * state),
    "D10 own token hidden": Stages(64, own=-1),
    "D15 erasure to first order": Stages(32, inverse=first_order),
    "D15 no erasure within chunks": Stages(16, inverse=identity),
    "D13 last chunk of a state lost": Stages(16, tail=lambda tokens, chunk: tokens // chunk * chunk),
    "D19 keys of length one": Stages(read=reading(k=lambda k, **_: unit(k))),
    "D19 queries of length one": Stages(64, read=reading(q=lambda q, **_: unit(q))),
    "H1 heads tiled": Stages(group=tiled),
    "D11 gate of the first head": Stages(64, read=reading(gate=lambda gate, **_: first_head(gate))),
    "H12 queries and keys exchanged": Stages(read=swapped),
    "D20 decays factored": Stages(64, fading=factored),
}
