"""Random calls of the engine: a normaliser x masks x what is done to scores x a layout x a format, of unkind sizes and values."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

import refattn as ra
from refattn import catalog
from refattn.engine.run import STATISTICS, reason_against
from refattn.problem import bind
from refattn.strategies import broadcast

FORMATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
LAYOUTS = ("BHTD", "BTHD", "packed", "paged")


# ---- functions of a score, their slopes, and masks -------------------------------------------------------------------------------


def unchanged(score, b, h, i, j):
    return score


def one(score, b, h, i, j):
    return 1.0


def alibi(score, b, h, i, j, slopes):
    return score - slopes[b, h] * abs(i - j)


def one_with_slopes(score, b, h, i, j, slopes):
    return 1.0


def relative(score, b, h, i, j, table):
    return score + table[h, table.shape[1] // 2 + j - i]


def one_with_table(score, b, h, i, j, table):
    return 1.0


def capped(score, b, h, i, j):
    return 3.0 * math.tanh(score / 3.0)


def capped_slope(score, b, h, i, j):
    return 1.0 - math.tanh(score / 3.0) ** 2


def squeezed(score, b, h, i, j, slopes):
    return score / (1.0 + slopes[b, h] * abs(score))


def squeezed_slope(score, b, h, i, j, slopes):
    return 1.0 / (1.0 + slopes[b, h] * abs(score)) ** 2


def hides(score, b, h, i, j):
    return -math.inf if (i + 2 * j) % 5 == 0 else score


def same_document(b, h, i, j, documents):
    return documents[b, i] == documents[b, j]


def by_head(b, h, i, j):
    return (b + i + j) % (h + 2) != 0


def near(b, h, i, j):
    return abs(i - j) <= 9


def nothing(b, h, i, j):
    return False


def everything(b, h, i, j):
    return True


@dataclass(frozen=True)
class ScoreMod:
    """A function, its slope, and the array of `aux` that both take."""

    function: Callable[..., Any]
    slope: Callable[..., Any]
    array: str | None = None


SCORE_MODS = (
    ScoreMod(unchanged, one),
    ScoreMod(alibi, one_with_slopes, "slopes"),
    ScoreMod(relative, one_with_table, "table"),
    ScoreMod(capped, capped_slope),
    ScoreMod(squeezed, squeezed_slope, "slopes"),
    ScoreMod(hides, one),
)
#: Functions, the array of `aux` they take, and whether they depend on the batch and on the head.
MASK_MODS = (
    (same_document, "documents", True, False),
    (by_head, None, True, True),
    (near, None, False, False),
    (nothing, None, False, False),
    (everything, None, False, False),
)
BLOCKS = ((128, 128), (16, 8), (1, 7), (5, 3))


# ---- operands --------------------------------------------------------------------------------------------------------------------


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    """Normal ones with an outlier, so that running maxima rise late and fall short, and with a row that stands there twice."""
    x = rng.standard_normal(shape)
    if x.size:
        x.flat[rng.integers(x.size)] *= 8
        x[..., -1, :] = x[..., 0, :]
    return x.astype(dtype)


def in_pages(rng: np.random.Generator, rows: list[np.ndarray], page: int, table: np.ndarray, n_pages: int) -> np.ndarray:
    """Keys or values of sequences, [Hkv, length, width] each, in the pages a table names; NaN everywhere else."""
    heads, _, width = rows[0].shape
    pages = np.full((n_pages, heads, page, width), np.nan, rows[0].dtype)
    for b, x in enumerate(rows):
        for n, start in enumerate(range(0, x.shape[1], page)):
            own = x[:, start : start + page]
            pages[table[b, n], :, : own.shape[1]] = own
    return pages


def cumulative(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@st.composite
def compositions(draw, layouts=LAYOUTS, formats=FORMATS, most=70, widest=40, gradients=False):
    """A `Problem` that the engine runs, or, with `gradients`, one that it has gradients of."""
    variant = catalog.variant(draw(st.sampled_from([*STATISTICS])))
    dtype, layout = draw(st.sampled_from(formats)), draw(st.sampled_from(layouts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    few, many = st.integers(1, 3), st.integers(0, most)
    kv_heads, width, value_width = draw(st.integers(1, 2)), draw(st.integers(1, widest)), draw(st.integers(1, widest))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 5, 7]))
    batch = draw(st.integers(1, 3) if gradients else st.integers(0, 3))
    n_q, n_k = draw(few | many), draw(many | st.integers(most, 3 * most))
    places = layout
    if layout == "packed":
        lengths = draw(st.lists(st.tuples(few | many, many), max_size=4))
        queries, keys = [n for n, _ in lengths], [n for _, n in lengths]
        places = ra.Packed(cumulative(queries), cumulative(keys))
        q, k, v = (
            numbers(rng, (n, h, w), dtype)
            for n, h, w in ((sum(queries), heads, width), (sum(keys), kv_heads, width), (sum(keys), kv_heads, value_width))
        )
        batch, n_q, n_k = len(lengths), max(queries, default=0), max(keys, default=0)
    elif layout == "paged":
        page, order = draw(st.sampled_from([1, 3, 16, 33])), draw(st.sampled_from(["BHTD", "BTHD"]))
        keys = draw(st.lists(many, min_size=batch, max_size=batch))
        n_k = max(keys, default=0)
        widest_table = -(-n_k // page) + 1
        n_pages = batch * widest_table + 1
        table = rng.permutation(n_pages)[: batch * widest_table].reshape(batch, widest_table)
        places = ra.Paged(table, np.array(keys, np.int64), order=order)
        q = numbers(rng, (batch, heads, n_q, width), dtype)
        rows = ([numbers(rng, (kv_heads, n, w), dtype) for n in (keys or [0])] for w in (width, value_width))
        k, v = (in_pages(rng, x, page, table, n_pages) for x in rows)
        q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v)) if order == "BTHD" else (q, k, v)
    else:
        q, k, v = (numbers(rng, (batch, h, n, w), dtype) for h, n, w in ((heads, n_q, width), (kv_heads, n_k, width), (kv_heads, n_k, value_width)))
        q, k, v = (np.ascontiguousarray(np.swapaxes(x, 1, 2)) for x in (q, k, v)) if layout == "BTHD" else (q, k, v)
    dense = isinstance(places, str)
    keywords = draw(parameters(variant.name, dense, gradients)) | draw(functions(rng, batch, heads, n_q, n_k, dense))
    if dense:
        keywords |= draw(of_pairs(rng, (batch, heads, n_q, n_k), dtype))
    if variant.name == "softmax" and draw(st.booleans()):
        keywords["sinks"] = np.array(draw(st.lists(st.floats(-4, 4, width=16), min_size=heads, max_size=heads)), draw(st.sampled_from(formats)))
    statistic = STATISTICS[variant.name]
    call = bind(variant, (q, k, v), keywords, ("out", statistic) if statistic and not gradients else ("out",), places)
    assume(not reason_against(call))  # a number of some draws is beyond the format
    return call


@st.composite
def parameters(draw, name, dense, gradients):
    """Keywords that are numbers."""
    found = {"causal": draw(st.sampled_from([False, True, "top_left"])), "scale": draw(st.none() | st.floats(-2, 2, width=32))}
    if name != "sigmoid":
        found["window"] = draw(st.none() | st.tuples(*[st.none() | st.integers(0, 80)] * 2))
        found["softcap"] = draw(st.none() | st.floats(0.125, 50, width=32))
    if name == "softmax" and not gradients:
        found["empty_rows"] = draw(st.sampled_from(["zero", "nan", "uniform"] if dense else ["zero", "nan"]))
    if name == "sigmoid":  # the default differs from sequence to sequence
        found["shift"] = draw(st.none() | st.floats(-3, 3, width=32)) if dense else draw(st.floats(-3, 3, width=32))
    if name == "relu":
        found |= {"power": draw(st.integers(1, 3)), "divisor": draw(st.none() | st.floats(1, 9)) if dense else draw(st.floats(1, 9))}
    return found


@st.composite
def functions(draw, rng, batch, heads, n_q, n_k, dense):
    """Keywords that are functions, and the arrays they take."""
    longest = max(n_q, n_k, 1)
    arrays = {
        "slopes": np.abs(rng.standard_normal((max(batch, 1), heads))),
        "table": rng.standard_normal((heads, 2 * longest + 1)).astype(np.float32),
        "documents": np.sort(rng.integers(0, 3, (max(batch, 1), longest)), axis=1),
    }
    found, taken = {}, set()
    if draw(st.booleans()):
        mod = draw(st.sampled_from(SCORE_MODS))
        found |= {"score_mod": mod.function, "slope": mod.slope}
        taken.add(mod.array)
    if draw(st.booleans()):
        function, array, by_batch, of_heads = draw(st.sampled_from(MASK_MODS))
        if dense and batch and draw(st.booleans()):
            sizes = {"T": n_q, "S": n_k, "B": batch if by_batch else 1, "Hq": heads if of_heads else 1}
            found["block_mask"] = ra.block_mask(function, **sizes, aux=arrays.get(array), block=draw(st.sampled_from(BLOCKS)))
        else:
            found["mask_mod"] = function
            taken.add(array)
    aux = {name: arrays[name] for name in taken - {None}}
    return found | ({"aux": aux} if aux else {})


@st.composite
def of_pairs(draw, rng, shape, dtype):
    """A bias and a mask, broadcast along any axes or without the first of them."""
    found = {}
    if draw(st.booleans()):
        own = draw(st.sampled_from([dtype, np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]))
        bias = 10 * rng.standard_normal(shape)
        if np.isinf(np.array(-np.inf).astype(own).astype(float)):  # float8_e4m3fn has no infinity
            bias[rng.random(shape) < 0.1] = -np.inf
        found["bias"] = draw(broadcast(bias.astype(own)))
    if draw(st.booleans()):
        found["mask"] = draw(broadcast(rng.random(shape) < draw(st.floats(0, 1))))
    return found
