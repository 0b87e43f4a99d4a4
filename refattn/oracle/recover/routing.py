"""Which query, key and value an output row is made from: by batch, head, token and channel.

Values that are the bits of a number tell which value was read whatever the weights are rounded to.  Queries and keys that are unit vectors
meet in one key only, so the weights show who met whom.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..findings import Fact
from .asking import Answer, Asked, Kernel, Reading, fact, read, spans
from .visible import weights

KEY_SOURCE, KEY_TOKEN = "key-value head and batch of a query head's keys", "key that a query's score is with"

_MIXED, _NONE = -1, -2


def facts(kernel: Kernel) -> Iterator[Fact]:
    """Value source of every head and batch; key source; tokens; output channels; bias source."""
    yield from _values(kernel)
    yield from _keys(kernel)
    yield from next((f for f in (list(channels(kernel, d, 44)) for d in (20, 44)) if f), [])
    yield from _bias(kernel)


def _values(kernel: Kernel) -> Iterator[Fact]:
    dims = kernel.sizes()
    codes = np.arange(dims["B"] * dims["Hkv"]).reshape(dims["B"], dims["Hkv"])
    bits = int(codes.max()).bit_length()
    v = np.zeros((dims["B"], dims["Hkv"], dims["S"], dims["E"]))
    v[..., 0] = 1.0
    for bit in range(bits):
        v[..., 1 + bit] = (codes >> bit & 1)[..., None]
    asked = kernel.ask(dims, *kernel.flat(dims), v)
    yield from read(
        "key-value head and batch of a query head's values", kernel, asked, lambda kernel, asked, answer: _sources(_decoded(answer.out, bits), dims)
    )


def _decoded(out: np.ndarray, bits: int) -> np.ndarray:
    """The number whose bits each head's rows show, (B, Hq); mixed where rows or bits are not clear."""
    total = out[..., :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = out[..., 1 : 1 + bits] / total
    clear = (np.abs(share) < 0.25) | (np.abs(share - 1) < 0.25)
    number = ((share > 0.5) * (1 << np.arange(bits))).sum(-1)
    shown = np.abs(total[..., 0]) > 0
    number = np.where(clear.all(-1), number, _MIXED)
    least = np.where(shown, number, 1 << bits).min(-1)
    most = np.where(shown, number, _NONE).max(-1)
    return np.where(most == _NONE, _NONE, np.where(least == most, most, _MIXED))


def _sources(codes: np.ndarray, dims: dict[str, int]) -> Reading:
    """Codes b * Hkv + g by batch and query head, in words."""
    kv_heads = dims["Hkv"]
    if (codes == _NONE).all():
        return Reading("none", codes)
    by_head = np.where(codes < 0, codes, codes % kv_heads)
    by_batch = np.where(codes < 0, codes, codes // kv_heads)
    heads = " ".join(_name(g) for g in by_head[0]) if (by_head == by_head[:1]).all() else "; ".join(" ".join(map(_name, row)) for row in by_head)
    own = (by_batch == np.arange(len(codes))[:, None]).all()
    batches = "its own batch" if own else "batch " + " ".join(_name(b) for b in by_batch[:, 0])
    if (codes == _MIXED).all():
        return Reading("several at once", codes)
    return Reading(f"{heads}, {batches}" if dims["Hq"] > 1 else batches, codes)


def _name(code: int) -> str:
    return {_MIXED: "mixed", _NONE: "none"}.get(int(code), str(int(code)))


def _keys(kernel: Kernel) -> Iterator[Fact]:
    """Every query is a unit vector of its own, every key too; keys are turned by another amount in every batch and head."""
    dims = kernel.sizes(T=8, S=64)
    if kernel.one_sequence:
        return
    each, size = 8, dims["S"]
    turn = size // (dims["B"] * dims["Hkv"])
    codes = np.arange(dims["B"] * dims["Hq"] * each).reshape(dims["B"], dims["Hq"], each)
    turns = turn * np.arange(dims["B"] * dims["Hkv"]).reshape(dims["B"], dims["Hkv"])
    q = 16.0 * np.eye(size)[codes]
    k = 16.0 * np.eye(size)[(np.arange(size) + turns[..., None]) % size]
    asked = kernel.weights(dims, q, k)
    if asked is None:
        return
    if not _clear(weights(asked, asked.specified)).any():
        return  # scores of another kind, or keys hidden
    distances = [_distances(weights(asked, answer), codes, size) for answer in asked.sides]
    readings = [_met(np.where(distances[1] != _NONE, distance, _NONE), turn, dims) for distance in distances]
    yield fact(KEY_SOURCE, asked.call, *(heads for heads, _ in readings))
    yield fact(KEY_TOKEN, asked.call, *(tokens for _, tokens in readings))


def _clear(p: np.ndarray) -> np.ndarray:
    """Rows with one weight of at least twice every other."""
    two = np.sort(np.nan_to_num(p), axis=-1)[..., -2:]
    return np.asarray(two[..., 1] > 2 * two[..., 0])


def _distances(p: np.ndarray, codes: np.ndarray, size: int) -> np.ndarray:
    """How far the heaviest key of each query is from the key of its own number, cyclically."""
    return np.where(_clear(p), (codes - np.argmax(np.nan_to_num(p), axis=-1)) % size, _NONE)


def _met(distance: np.ndarray, turn: int, dims: dict[str, int]) -> tuple[Reading, Reading]:
    """Whose keys each head meets, from how far they are turned; and which token's, from what remains."""
    known = distance != _NONE
    remain = np.where(known, (distance + turn // 2) % turn - turn // 2, _NONE)
    source = np.where(known, (distance + turn // 2) // turn % (dims["B"] * dims["Hkv"]), _NONE)
    alike = np.where(known, source, 10**6).min(-1) == np.where(known, source, _NONE).max(-1)
    codes = np.where(known.any(-1), np.where(alike, np.where(known, source, _NONE).max(-1), _MIXED), _NONE)
    steps = np.unique(remain[known])
    if len(steps) == 0:
        words = "none that can be told"
    elif len(steps) > 1 or not alike.all():
        words = "several"
    elif steps[0] == 0:
        words = "the key of the value"
    else:
        words = f"the key {abs(steps[0])} {'before' if steps[0] < 0 else 'after'} the value's"
    tokens = Reading(words, np.where(known, remain, 0) if len(steps) else np.zeros(0))
    return _sources(codes, dims), tokens


def channels(kernel: Kernel, d: int, width: int) -> Iterator[Fact]:
    """Which channel of the values each output channel is, at widths `d` and `width`: batch b holds bit b of the channel's number."""
    bits = width.bit_length()
    dims = kernel.sizes(B=bits + 1, D=d, E=width)
    if kernel.plan is not None and kernel.plan.residual:
        return
    v = np.ones((bits + 1, dims["Hkv"], dims["S"], width))
    v[:bits] = (np.arange(1, width + 1) >> np.arange(bits)[:, None] & 1)[:, None, None, :]
    asked = kernel.ask(dims, *kernel.flat(dims), v)
    yield from read("value channel of an output channel", kernel, asked, _channel_map)


def _channel_map(kernel: Kernel, asked: Asked, answer: Answer) -> Reading | None:
    bits = len(answer.out) - 1
    rows = np.moveaxis(answer.out, -1, 0).reshape(answer.out.shape[-1], bits + 1, -1)
    total = rows[:, bits]
    usable = np.isfinite(total).all(0) & np.isfinite(rows).all((0, 1))
    if not usable.any():
        return None
    total, rows = total[:, usable], rows[:, :, usable]
    usable = np.abs(total).max(0) > 0  # rows that something is written to, if there are any
    if usable.any():
        total, rows = total[:, usable], rows[:, :, usable]
    level = np.abs(total).max(0)
    present = np.abs(total) > 0.5 * level
    with np.errstate(invalid="ignore", divide="ignore"):
        ones = rows[:, :bits] / np.where(total == 0, 1.0, total)[:, None] > 0.5
    numbers = (ones * (1 << np.arange(bits))[:, None]).sum(1) - 1
    channels = np.where(present, numbers, _NONE)
    first = channels[:, 0]
    if not (channels == first[:, None]).all():
        return Reading("another in every row", first)
    own = np.arange(len(first))
    if (first == own).all():
        return Reading("its own", first)
    lost, moved = np.flatnonzero(first == _NONE), np.flatnonzero((first != own) & (first != _NONE))
    words = [f"none for channels {spans(lost)} of {len(first)}"] if len(lost) else []
    if len(moved):
        steps = first[moved] - moved
        if (steps == steps[0]).all():
            words.append(f"{abs(steps[0])} {'later' if steps[0] > 0 else 'earlier'} for channels {spans(moved)}")
        else:
            words.append(f"another for channels {spans(moved)}")
    return Reading(", ".join(words), first)


def _bias(kernel: Kernel) -> Iterator[Fact]:
    """A bias that raises another key in every batch and head."""
    name, dims = kernel.optional("bias"), kernel.sizes()
    if not name:
        return
    codes = np.arange(dims["B"] * dims["Hq"]).reshape(dims["B"], dims["Hq"])
    raised = np.where(np.arange(dims["S"]) == codes[..., None, None], 8.0, 0.0)
    bias = np.broadcast_to(raised, (dims["B"], dims["Hq"], dims["T"], dims["S"]))
    asked = kernel.weights(dims, operands={name: bias})
    yield from read("batch and head of a query head's bias", kernel, asked, _raised)


def _raised(kernel: Kernel, asked: Asked, answer: Answer) -> Reading | None:
    p = np.nan_to_num(weights(asked, answer)).sum(axis=2)
    codes = np.where(p.max(-1) > 1.05 * np.sort(p, axis=-1)[..., -2], p.argmax(-1), _NONE)
    own = np.arange(codes.size).reshape(codes.shape)
    if (codes == own).all():
        return Reading("its own", codes)
    if (codes == _NONE).all():
        return None  # that it has no effect, or the opposite one, is said elsewhere
    heads = codes.shape[1]
    shown = "; ".join(" ".join(_name(c) if c < 0 else f"{c // heads}.{c % heads}" for c in row) for row in codes)
    return Reading(f"batch.head {shown}", codes)
