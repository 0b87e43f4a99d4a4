"""One call as kernels take it: operands as bytes, sequences as a table, functions as addresses, results to be written."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ..costs import visible_range
from ..errors import ParameterError
from ..functions import Functions
from ..problem import Problem, sequence_dims
from ..sequences import Packed
from . import backward, decode, forward, rows, weights
from .panels import VECTORS
from .run import format_of, plans, similarity_of
from .simd import register_bytes
from .stages import Along, Role, aux_table, lifted
from .stored import BFLOAT16, BYTE, FLOAT16, SAME
from .threads import launch
from .tiles import BLOCKS_BEFORE, K_ROW, KEYS_BEFORE, N_K, N_Q, Q_BATCH, Q_ROW, RANGE_AT, How

#: Parts of a panel: a key-value head with no more rows than one of them has its keys read in order, a vector of a key at a time, and not a panel of
#: queries at a time; nor has one of so many rows.
FEW_OF_A_PANEL, FEW_ROWS = 2, 8
#: More rows than any page has: a sequence without pages.
ONE_PAGE = 2**62
#: Parts of a head's rows whose gradients of keys are summed apart, at most, and tasks that keep every thread busy.
MOST_PARTS, ENOUGH_TASKS = 8, 16

_KINDS = {name: getattr(weights, name.upper()) for name in ("softmax", "sigmoid", "relu", "sparsemax", "entmax15")}
#: The fields of `How` that functions fill, where there are none.
_NO_FUNCTIONS = dict.fromkeys(("raised", "score_mod", "score_aux", "slope", "slope_aux", "mask_mod", "mask_aux"), 0)
_NO_BYTES, _NO_MAP = np.empty((0, 0, 0, 0), np.uint8), np.empty((0, 0, 0, 0), np.int8)


class Call:
    """A problem, `out` and `lse`; `forward` may be followed by `backward`, any number of times.

    Parameters
    ----------
    problem : Problem
        One that run.py has nothing against.
    threads : int, optional
        As many as Numba uses, unless said.

    Attributes
    ----------
    out, lse : ndarray
        In the kernel's format; lse is what each row's normaliser found (weights.py).
    """

    def __init__(self, problem: Problem, threads: int | None = None) -> None:
        assert problem.plan is not None
        self.problem, self.threads = problem, threads
        self.plan = plan = problem.plan
        self.format = format_ = format_of(problem)
        given, functions = problem.given, problem.functions
        self.q, self.k, self.v = (_with_heads(given[name]) for name in (plan.query, plan.key, plan.value))
        if similarity_of(plan) == "cosine":
            self.q = _of_length_one(self.q, format_)
            self.k = self.q if plan.key == plan.query else _of_length_one(self.k, format_)
        elif similarity_of(plan) == "bilinear":
            self.q = self.q.astype(format_, copy=False) @ given[plan.weights[0]].astype(format_, copy=False)
        self.heads, self.kv_heads = self.q.shape[1], self.k.shape[1]
        self.group = self.heads // self.kv_heads
        d, e = self.q.shape[3], self.v.shape[3]
        self.tables: list[np.dtype] = []
        (q, q_code), (k, k_code), (v, v_code) = (_stored(x, format_, self.tables) for x in (self.q, self.k, self.v))
        bias, bias_code, same_bias = self._pairs(plan.bias)
        mask, _, same_mask = self._pairs(plan.mask)
        kind, self.lanes = _KINDS[plan.normalizer], register_bytes() // format_.itemsize
        sequences, first, last, pairs, pages, page_size, most_rows = self._sequences()
        self.decodes = kind == weights.SOFTMAX and 0 < most_rows <= max(FEW_ROWS, VECTORS * self.lanes // FEW_OF_A_PANEL) and self.k.shape[2] > 0
        self.whole_block = backward.PANELS * VECTORS * self.lanes
        if problem.sequences is None:
            shape = self.q.shape[0], self.q.shape[2], self.k.shape[2]
            sequences, block_rows = _dense_blocks(shape, kind, self.decodes, self.group, self.kv_heads, self.lanes)
        else:
            sequences, block_rows = _in_blocks(sequences, kind, self.decodes, self.group, self.kv_heads, self.lanes)
        self.stages = None if functions is None else _Stages(functions, format_)
        blocks = None if functions is None else functions.block_mask
        number = format_.type
        functions_at = _NO_FUNCTIONS if self.stages is None else self.stages.addresses("keys" if self.decodes else "queries")
        block_q, block_k = (1, 1) if blocks is None else blocks.block
        self.how = How(
            number(plan.scale), number(plan.score_mods[0].numbers[0] if plan.score_mods else 0.0), number(plan.shift), number(plan.divisor),
            kind, plan.power, d, e, q_code, k_code, v_code, bias_code, page_size, same_bias, same_mask, block_q, block_k,
            block_rows=block_rows, heads_first=int(self._shares_pairs()), **functions_at,
        )  # fmt: skip
        self.sinks = _sinks(given.get(plan.sinks), self.heads, format_)
        self.inputs = (
            q, k, v, bias, mask, self.sinks, first, last, sequences, pages, _tables(tuple(self.tables), format_),
            _NO_MAP if blocks is None else blocks.classes,
        )  # fmt: skip
        self.out, self.lse = np.empty((*self.q.shape[:3], e), format_), np.empty(self.q.shape[:3], format_)
        self.work = self.heads * pairs * (d + e)

    def forward(self) -> None:
        """Fill `out` and `lse`."""
        if self.lse.size:
            self._launch_forward(self.how, self.out, self.lse)
        rule = self.problem.params.get("empty_rows", "zero")
        if rule != "zero":
            _fill_empty(rule, self.out, self.lse, self.v, self.inputs[8])
        if self.plan.residual:
            np.add(self.out, _with_heads(self.problem.given[self.plan.residual]), out=self.out, casting="same_kind")

    def backward(self, d_out: np.ndarray | None, d_lse: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Gradients by ``d_<operand>``, in the kernel's format and the shapes operands were given in (BHTD); after `forward`."""
        plan, format_, given = self.plan, self.format, self.problem.given
        d_q, d_k, d_v = (np.zeros(x.shape, format_) for x in (self.q, self.k, self.v))
        d_lse = np.zeros(self.lse.shape, format_) if d_lse is None else d_lse.reshape(self.lse.shape).astype(format_)
        deltas = -d_lse  # as they are without keys
        bias_shape, way = self._bias_sums()
        d_bias = np.zeros(bias_shape, format_)
        if self.q.size and self.k.size:
            d_out = np.zeros(self.out.shape, format_) if d_out is None else d_out
            tables = list(self.tables)
            g, g_code = _stored(_with_heads(d_out), format_, tables)
            whole = self.whole_block // self.group * self.group if self.group <= self.whole_block else self.whole_block  # whole queries
            sequences = _with_blocks(self.inputs[8], self.group, whole)
            n_parts, n_keys = self._parts(sequences, way), int(sequences[-1, KEYS_BEFORE])
            if way == backward.OWN_SUMS:
                d_bias = np.zeros((n_parts, *bias_shape[1:]), format_)
            sums = (np.empty((n_parts, self.kv_heads, n_keys * self._padded(x.shape[3])), format_) for x in (self.k, self.v))
            functions = _NO_FUNCTIONS if self.stages is None else self.stages.addresses("queries")
            how = self.how._replace(block_rows=whole, g_code=g_code, way=way, **functions)
            inputs = (*self.inputs[:8], sequences, self.inputs[9], _tables(tuple(tables), format_), self.inputs[11])
            results = (d_q, d_k, d_v, d_bias, *sums, deltas)
            self._launch(backward.backward, backward.backward_parallel, (*inputs, how, g, self._mean(), self.lse, d_lse, *results), 2.5 * self.work)
        found = {plan.query: d_q, plan.key: d_k, plan.value: d_v}
        if way != backward.NO_BIAS:
            summed = d_bias[0] if len(d_bias) == 1 else d_bias.sum(axis=0, dtype=np.float64)
            found[plan.bias] = _summed_to(summed, _four_axes(given[plan.bias], self.problem.dims).shape)
        if plan.sinks in given:
            with np.errstate(invalid="ignore", over="ignore"):
                share = np.exp(self.sinks[:, None] - self.lse)
            found[plan.sinks] = -np.where(np.isneginf(self.lse), 0.0, share * deltas).sum(axis=(0, 2), dtype=np.float64)
        return {"d_" + name: found[name].reshape(x.shape) for name, x in given.items() if name in found}

    def forward_kernels(self) -> tuple[Any, Any]:
        """The entry points for one thread and for several."""
        if self.decodes:
            return decode.decode, decode.decode_parallel
        return (rows.rows, rows.rows_parallel) if self.how.kind >= weights.SPARSEMAX else (forward.forward, forward.forward_parallel)

    def _launch_forward(self, how: How, out: np.ndarray, lse: np.ndarray) -> None:
        self._launch(*self.forward_kernels(), (*self.inputs, how, out, lse), self.work)

    def _launch(self, alone: Any, together: Any, arguments: tuple[Any, ...], work: float) -> None:
        launch(alone, together, self.format, arguments, work, self.threads)
        if self.stages is not None and self.stages.raised[0]:
            self.stages.raised[0] = 0
            raise ParameterError(f"{self.problem.variant.name}: a score_mod, slope or mask_mod raised an error, which Numba has printed")

    # ---- how operands reach kernels ------------------------------------------------------------------------------------------------

    def _pairs(self, name: str) -> tuple[np.ndarray, int, int]:
        """A bias or mask as bytes with the axes B Hq T S, what they mean, and whether one element of a row stands for all keys."""
        x = self.problem.given.get(name)
        if x is None:
            return _NO_BYTES, SAME, 0
        dims = self.problem.dims
        x = _four_axes(x, dims)
        same = x.shape[3] != dims["S"] or dims["S"] == 1
        stored, code = (_bytes(x), SAME) if x.dtype == np.bool_ else _stored(x, self.format, self.tables)
        shape = (dims.get("B", 1), dims.get("Hq", 1), dims["T"], stored.shape[3])
        return np.broadcast_to(stored, shape), code, int(same)

    def _shares_pairs(self) -> bool:
        """Whether heads share the rows of a bias or mask, and read them a block at a time."""
        given = (self.problem.given.get(name) for name in (self.plan.bias, self.plan.mask))
        shapes = [_four_axes(x, self.problem.dims).shape for x in given if x is not None]
        return not self.decodes and any(shape[1] == 1 and shape[2] > 1 for shape in shapes)

    def _sequences(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray, int, int]:
        """The table of sequences, every query's range of keys, all visible pairs of a head, pages, their size, and the most rows of a group."""
        places = self.problem.sequences
        if places is None:
            batch, n_queries, n_keys = self.q.shape[0], self.q.shape[2], self.k.shape[2]
            table, pages = _dense(batch, n_queries, n_keys)
            first, last, pairs = visible_range(self.plan.masks, n_queries, n_keys)
            return table, first, last, batch * pairs, pages, ONE_PAGE, n_queries * self.group
        each = sequence_dims(self.problem)
        ranges = [visible_range(plan.masks, dims["T"], dims["S"]) for plan, dims in zip(plans(self.problem), each, strict=True)]
        first, last = (np.concatenate([np.zeros(0, np.int64), *(x[n] for x in ranges)]) for n in (0, 1))
        table = np.zeros((len(each) + 1, 8), np.int64)
        table[:-1, N_Q], table[:-1, N_K] = [dims["T"] for dims in each], [dims["S"] for dims in each]
        table[1:, KEYS_BEFORE] = np.cumsum(table[:-1, N_K])
        table[1:, RANGE_AT] = np.cumsum(table[:-1, N_Q])
        pairs, most_rows = sum(x[2] for x in ranges), int(table[:, N_Q].max()) * self.group
        if isinstance(places, Packed):
            table[:-1, Q_ROW], table[:-1, K_ROW] = places.cu_seqlens_q[:-1], places.cu_seqlens_k[:-1]
            return table, first, last, pairs, np.zeros((len(each), 1), np.int64), ONE_PAGE, most_rows
        table[:-1, Q_BATCH] = np.arange(len(each))
        return table, first, last, pairs, places.block_table, self.k.shape[2], most_rows

    # ---- how gradients are gathered ------------------------------------------------------------------------------------------------

    def _mean(self) -> np.ndarray:
        """What delta is the product of with d_out (weights.py): the output, or for sparse normalisers a mean over the support."""
        means = {weights.SPARSEMAX: weights.SUPPORT, weights.ENTMAX15: weights.ROOT}
        if self.how.kind not in means:
            return self.out
        out = np.empty_like(self.out)
        self._launch_forward(self.how._replace(kind=means[self.how.kind]), out, np.empty_like(self.lse))
        return out

    def _bias_sums(self) -> tuple[tuple[int, ...], int]:
        """Shape of d_bias, [parts, B, Hq, T, S] with 1 where it is broadcast, and who sums it (backward.py)."""
        bias = self.problem.given.get(self.plan.bias)
        if bias is None:
            return (0, 0, 0, 0, 0), backward.NO_BIAS
        shape = _four_axes(bias, self.problem.dims).shape
        if shape[2] != self.q.shape[2]:
            return (1, self.q.shape[0], self.heads, 1, shape[3]), backward.OWN_SUMS
        own = shape[:2] == self.q.shape[:2]
        return (1, *shape), backward.OWN_ROWS if own else backward.SHARED_ROWS

    def _parts(self, sequences: np.ndarray, way: int) -> int:
        """How many parts a head's rows are cut into."""
        blocks = int(np.diff(sequences[:, BLOCKS_BEFORE]).max(initial=1))
        if way == backward.SHARED_ROWS:
            return min(blocks, MOST_PARTS) if self.group <= self.whole_block else 1
        pairs = max((len(sequences) - 1) * self.kv_heads, 1)
        return min(blocks, MOST_PARTS, -(-ENOUGH_TASKS // pairs))

    def _padded(self, n: int) -> int:
        """n elements, rounded up to whole vectors."""
        return -(-n // self.lanes) * self.lanes


class Repeated:
    """What a problem's call is but for its queries, keys and values, which lie as kernels read them.

    Parameters
    ----------
    problem : Problem
        Without other operands and without functions.
    """

    def __init__(self, problem: Problem) -> None:
        call = Call(problem)
        self.names = (call.plan.query, call.plan.key, call.plan.value)
        self.kernels, self.format, self.work = call.forward_kernels(), call.format, call.work
        self.rest, self.out, self.lse = (*call.inputs[3:], call.how), call.out.shape, call.lse.shape

    def __call__(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """`out` of other operands."""
        operands = (_bytes(given[name]) for name in self.names)
        out, lse = np.empty(self.out, self.format), np.empty(self.lse, self.format)
        launch(*self.kernels, self.format, (*operands, *self.rest, out, lse), self.work, None)
        return out


class _Stages:
    """A call's functions compiled (stages.py), and the addresses that kernels take; it keeps alive what they point to."""

    def __init__(self, functions: Functions, format_: np.dtype) -> None:
        self.functions, self.format = functions, format_
        self.raised, self.kept = np.zeros(1, np.int64), list[Any]()

    def addresses(self, along: Along) -> dict[str, int]:
        """The fields of `How` that functions fill."""
        found = {"raised": self.raised.ctypes.data}
        found["score_mod"], found["score_aux"] = self._of("score_mod", "score_aux", "score", along)
        found["slope"], found["slope_aux"] = self._of("slope", "slope_aux", "score", along)
        found["mask_mod"], found["mask_aux"] = self._of("mask_mod", "mask_aux", "mask", along)
        return found

    def _of(self, name: str, aux: str, role: Role, along: Along) -> tuple[int, int]:
        function, arrays = getattr(self.functions, name), getattr(self.functions, aux)
        if function is None:
            return 0, 0
        stage, table = lifted(function, role, self.format, along, arrays), aux_table(arrays)
        self.kept += [stage, table]
        return stage.address, table.ctypes.data


@functools.lru_cache(maxsize=64)
def _dense(batch: int, n_queries: int, n_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """The table of sequences where each is an entry of the batch, and their pages: one each."""
    table = np.zeros((batch + 1, 8), np.int64)
    table[:-1, Q_BATCH] = np.arange(batch)
    table[:-1, N_Q], table[:-1, N_K] = n_queries, n_keys
    table[:, KEYS_BEFORE] = np.arange(batch + 1) * n_keys
    return table, np.arange(batch)[:, None]


@functools.lru_cache(maxsize=64)
def _dense_blocks(shape: tuple[int, int, int], *how: Any) -> tuple[np.ndarray, int]:
    """`_in_blocks` where each sequence is an entry of the batch: of so many entries, queries and keys."""
    return _in_blocks(_dense(*shape)[0], *how)


def _in_blocks(table: np.ndarray, kind: int, decodes: bool, group: int, kv_heads: int, lanes: int) -> tuple[np.ndarray, int]:
    """The table of sequences with the blocks before each, and the rows of a block."""
    rows = (table[:-1, N_Q] * group).tolist()
    if decodes:
        return _with_blocks(table, group, 0), max(rows, default=0)
    panels = 1 if kind >= weights.SPARSEMAX else forward.PANELS  # many, so that a tile is read seldom, while there are tasks enough
    while panels > 1 and kv_heads * sum(-(-n // (panels * VECTORS * lanes)) for n in rows) < ENOUGH_TASKS:
        panels //= 2
    return _with_blocks(table, group, panels * VECTORS * lanes), panels * VECTORS * lanes


def _with_blocks(table: np.ndarray, group: int, block_rows: int) -> np.ndarray:
    """The table with the number of blocks of all sequences before each: of so many rows, or with 0 of the keys that a task decodes."""
    table = table.copy()
    np.cumsum(-(-table[:-1, N_Q] * group // block_rows) if block_rows else -(-table[:-1, N_K] // decode.STRETCH), out=table[1:, BLOCKS_BEFORE])
    return table


def _sinks(sinks: np.ndarray | None, heads: int, format_: np.dtype) -> np.ndarray:
    if sinks is None:
        return _no_sinks(heads, format_)
    with np.errstate(over="ignore"):  # beyond the format is infinite
        return np.ascontiguousarray(sinks, format_)


@functools.lru_cache(maxsize=64)
def _no_sinks(heads: int, format_: np.dtype) -> np.ndarray:
    return np.full(heads, -np.inf, format_)


def _with_heads(x: np.ndarray) -> np.ndarray:
    return x[:, None] if x.ndim == 3 else x


def _of_length_one(x: np.ndarray, format_: np.dtype) -> np.ndarray:
    """Vectors over their lengths, which are taken in float64; those of length 0 stay what they are."""
    unit = np.array(x, format_)
    lengths = np.sqrt(np.einsum("...d,...d->...", unit, unit, dtype=np.float64))[..., None]
    lengths[lengths == 0.0] = 1.0
    return np.divide(unit, lengths, out=unit, casting="same_kind")


def _four_axes(x: np.ndarray, dims: Any) -> np.ndarray:
    """A bias or mask with the axes B Hq T S, 1 where it has none."""
    x = x[:, None] if x.ndim == 3 and "Hq" not in dims else x
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _stored(x: np.ndarray, format_: np.dtype, tables: list[np.dtype]) -> tuple[np.ndarray, int]:
    """An operand as bytes and what they mean (stored.py); converted first where no kernel reads its format."""
    dtype = x.dtype
    if dtype == format_ and dtype.isnative:
        return _bytes(x), SAME
    if dtype == ml_dtypes.bfloat16:
        return _bytes(x), BFLOAT16
    if dtype == np.float16 and dtype.isnative:
        return _bytes(x), FLOAT16
    if dtype.itemsize == 1:
        if dtype not in tables:
            tables.append(dtype)
        return _bytes(x), BYTE + tables.index(dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond the format is infinite
        return _bytes(x.astype(format_, order="C")), SAME  # left to itself a copy keeps the order of a transposed array


def _bytes(x: np.ndarray) -> np.ndarray:
    """The bytes of an array, which is copied where its last axis is not contiguous."""
    return (x if x.strides[3] == x.itemsize and x.size else np.ascontiguousarray(x)).view(np.uint8)


@functools.lru_cache(maxsize=64)
def _tables(formats: Sequence[np.dtype], format_: np.dtype) -> np.ndarray:
    """What every byte means in each of the formats."""
    every = np.arange(256, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        spelled = [every.view(dtype).astype(format_) for dtype in formats]
    return np.stack(spelled) if spelled else np.empty((0, 256), format_)


def _fill_empty(rule: str, out: np.ndarray, lse: np.ndarray, v: np.ndarray, sequences: np.ndarray) -> None:
    """What rows that see nothing return; the kernel left them 0, which they are where a sequence has no keys at all."""
    empty = np.isneginf(lse)
    for one in sequences[:-1][sequences[:-1, N_K] == 0]:
        empty[one[Q_BATCH], :, one[Q_ROW] : one[Q_ROW] + one[N_Q]] = False
    if not empty.any():
        return
    group = out.shape[1] // v.shape[1]
    filler = np.repeat(v.mean(axis=2, dtype=np.float64), group, axis=1)[:, :, None] if rule == "uniform" else np.nan
    np.copyto(out, np.broadcast_to(filler, out.shape).astype(out.dtype), where=empty[..., None])


def _summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes along which an array of that shape, of as many axes, was broadcast."""
    axes = tuple(n for n, size in enumerate(shape) if size != x.shape[n])
    summed: np.ndarray = x.sum(axis=axes, dtype=np.float64) if axes else x
    return summed
