"""Sequences of different lengths in one call, packed or in pages: each is a call of its own, and malformed ones are refused."""

import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from test_bad_input import ODD_THINGS

import refattn as ra
from refattn import BackendUnavailableError, DtypeError, OperandError, ParameterError, ShapeError, catalog
from refattn.problem import bind, split

HQ, HKV, D, E = 6, 2, 5, 4
#: Queries and keys of sequences: equal, fewer queries, more queries, no queries, no keys, nothing, one each.
LENGTHS = ((4, 4), (3, 7), (6, 2), (0, 3), (2, 0), (0, 0), (1, 1))
CU_Q, CU_K = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in zip(*LENGTHS, strict=True))
T, S = int(CU_Q[-1]), int(CU_K[-1])
TAKERS = ["softmax", "sigmoid", "linear"]
#: Parameters that a sequence's own sizes give a meaning to.
OPTIONS = {
    "softmax": ({}, {"causal": True}, {"window": (2, 0)}, {"softcap": 2.0, "sinks": np.linspace(-1, 1, HQ)}, {"empty_rows": "nan"}),
    "sigmoid": ({}, {"causal": True}, {"causal": "top_left", "shift": -1.0}),
    "linear": ({},),
}
CALLS = [(name, options) for name, tried in OPTIONS.items() for options in tried]


def packed(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((T, HQ, D), (S, HKV, D), (S, HKV, E)))


def each(q, k, v):
    """The sequences by themselves, [1, H, length, width]."""
    for n in range(len(LENGTHS)):
        rows = slice(CU_Q[n], CU_Q[n + 1]), slice(CU_K[n], CU_K[n + 1]), slice(CU_K[n], CU_K[n + 1])
        yield tuple(np.swapaxes(x[where], 0, 1)[None] for x, where in zip((q, k, v), rows, strict=True))


def alibi(score, b, h, i, j, slopes):
    return score + slopes[b, h] * (j - i)


def even(b, h, i, j):
    return (b + i + j) % 2 == 0


SLOPES = np.random.default_rng(9).standard_normal((len(LENGTHS), HQ))

# ---- packed --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", CALLS)
def test_packed_sequences_are_calls_of_their_own(name, options):
    returns = [o.name for o in catalog.variant(name).outputs if "T" in o.axes.split() and "S" not in o.axes.split()]
    call = {**options, "returns": returns, "backend": "definition"}
    found = ra.attend(name, *packed(), layout=ra.Packed(CU_Q, CU_K), **call)
    alone = [ra.attend(name, *one, **call) for one in each(*packed())]
    for output, x in enumerate([found] if len(returns) == 1 else found):
        parts = [part if len(returns) == 1 else part[output] for part in alone]
        together = np.concatenate(parts, axis=2)[0]
        np.testing.assert_array_equal(x, np.swapaxes(together, 0, 1) if returns[output] == "out" else together)
        assert x.shape == {"out": (T, HQ, E), "lse": (HQ, T)}[returns[output]]


def test_functions_are_told_the_sequence_and_positions_within_it():
    found = ra.attention(*packed(), layout=ra.Packed(CU_Q, CU_K), score_mod=alibi, mask_mod=even, aux={"slopes": SLOPES}, backend="definition")
    for n, (q, k, v) in enumerate(each(*packed())):
        i, j = np.ogrid[: q.shape[2], : k.shape[2]]
        bias = SLOPES[n][:, None, None] * (j - i)
        alone = ra.attention(q, k, v, bias=bias, mask=(n + i + j) % 2 == 0, backend="definition")
        allowed = ra.tolerance("softmax", q, k, v, bias=bias, mask=(n + i + j) % 2 == 0, returns="out").out
        assert (np.abs(np.swapaxes(found[CU_Q[n] : CU_Q[n + 1]], 0, 1) - alone[0]) <= allowed[0]).all()


def test_the_keys_lie_where_the_queries_do_unless_said():
    q, k, v = packed()
    k, v = k[np.arange(T) % S], v[np.arange(T) % S]
    both = ra.attention(q, k, v, layout=ra.Packed(CU_Q, CU_Q), causal=True, backend="definition")
    np.testing.assert_array_equal(ra.attention(q, k, v, layout=ra.Packed(CU_Q), causal=True, backend="definition"), both)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_packed_calls_return_has_the_dtype_and_goes_where_it_is_told(dtype):
    layout = ra.Packed(CU_Q.astype(np.uint8), CU_K.astype(np.int32))
    expected = ra.attention(*packed(dtype), layout=layout, returns=("out", "lse"), backend="definition")
    assert [x.dtype for x in expected] == [dtype, np.float32] and all(x.flags.c_contiguous for x in expected)
    targets = np.empty((T, HQ, E), dtype), np.empty((HQ, T), np.float32)
    returned = ra.attention(*packed(dtype), layout=layout, returns=("out", "lse"), out=targets, backend="definition")
    for x, target, value in zip(returned, targets, expected, strict=True):
        assert x is target
        np.testing.assert_array_equal(x, value)


def test_no_sequences_give_no_rows():
    nothing = tuple(np.zeros((0, *x.shape[1:])) for x in packed())
    assert ra.attention(*nothing, layout=ra.Packed(np.array([0])), backend="definition").shape == (0, HQ, E)
    assert ra.attention(*nothing, layout=ra.Packed(np.array([0, 0, 0])), backend="definition").shape == (0, HQ, E)


def test_later_writes_to_the_callers_arrays_change_no_layout():
    bounds = CU_Q.copy()
    layout = ra.Packed(bounds)
    bounds[:] = 0
    np.testing.assert_array_equal(layout.cu_seqlens_q, CU_Q)
    assert layout.cu_seqlens_k is layout.cu_seqlens_q and layout.cu_seqlens_q.dtype == np.int64


@pytest.mark.compiled
@pytest.mark.parametrize("name, functions", [("softmax", {}), ("sigmoid", {}), ("softmax", {"score_mod": alibi, "aux": SLOPES})])
def test_gradients_of_packed_sequences_are_each_ones_own_and_sums_of_what_they_share(name, functions):
    q, k, v = packed()
    d_out = np.random.default_rng(1).standard_normal((T, HQ, E))
    sinks = {"sinks": np.linspace(-1, 1, HQ)} if name == "softmax" else {}
    call = {**sinks, "causal": True, "backend": "definition"}
    found = ra.gradients(name, q, k, v, d_out=d_out, layout=ra.Packed(CU_Q, CU_K), **functions, **call)
    expected = {"d_q": np.zeros_like(q), "d_k": np.zeros_like(k), "d_v": np.zeros_like(v), "d_sinks": np.zeros(HQ)}
    errors = {name: np.zeros_like(x) for name, x in expected.items()}
    for n, one in enumerate(each(q, k, v)):
        rows = {"d_q": slice(CU_Q[n], CU_Q[n + 1]), "d_k": slice(CU_K[n], CU_K[n + 1])}
        cotangent = np.swapaxes(d_out[rows["d_q"]], 0, 1)[None]
        *_, i, j = np.ogrid[:1, :HQ, : one[0].shape[2], : one[1].shape[2]]
        bias = {"bias": SLOPES[n][:, None, None] * (j - i)[0]} if functions else {}
        alone = ra.gradients(name, *one, d_out=cotangent, **bias, **call)
        for field in found._fields:
            part, error = getattr(alone, field), alone.errors[field]
            for total, x in ((expected, part), (errors, error)):
                total[field][rows.get(field if field != "d_v" else "d_k", ...)] += x if x.ndim == 1 else np.swapaxes(x[0], 0, 1)
    for field in found._fields:
        assert (np.abs(getattr(found, field) - expected[field]) <= found.errors[field] + errors[field]).all(), field
        assert errors[field].max() < 1e-8


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_tolerance_of_packed_sequences_judges_them(name):
    x, layout = packed(np.float32), ra.Packed(CU_Q, CU_K)
    out = ra.attend(name, *x, layout=layout, causal=True, backend="definition")
    allowed = ra.tolerance(name, *x, layout=layout, causal=True)
    assert "weights" not in allowed._fields and allowed.out.shape == out.shape
    ra.assert_matches(out, name, *x, layout=layout, causal=True)
    aligned_by_the_longest = np.concatenate(
        [np.swapaxes(ra.attend(name, *one, causal="top_left", backend="definition")[0], 0, 1) for one in each(*x)]
    )
    with pytest.raises(AssertionError, match="out"):
        ra.assert_matches(aligned_by_the_longest, name, *x, layout=layout, causal=True)


# ---- pages -------------------------------------------------------------------------------------------------------------------------

PAGES, PAGE = 11, 4
COUNTS = np.array([9, 0, 4, 13])


def cache(dtype=np.float64, seed=0):
    """Queries, pages in which sequences lie in any order, NaN everywhere else, a table with rubbish it does not reach, and each one's keys."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((len(COUNTS), HQ, 3, D)).astype(dtype)
    rows = [(rng.standard_normal((HKV, n, D)).astype(dtype), rng.standard_normal((HKV, n, E)).astype(dtype)) for n in COUNTS]
    k_pages, v_pages = np.full((PAGES, HKV, PAGE, D), np.nan, dtype), np.full((PAGES, HKV, PAGE, E), np.nan, dtype)
    table = np.full((len(COUNTS), 5), 10**6)
    table[:, -1] = -1
    free = iter(rng.permutation(PAGES))
    for b, (k, v) in enumerate(rows):
        for n, start in enumerate(range(0, COUNTS[b], PAGE)):
            page = table[b, n] = next(free)
            filled = min(PAGE, COUNTS[b] - start)
            k_pages[page, :, :filled], v_pages[page, :, :filled] = k[:, start : start + filled], v[:, start : start + filled]
    return q, k_pages, v_pages, table, rows


@pytest.mark.parametrize("order", ["BHTD", "BTHD"])
@pytest.mark.parametrize("name, options", CALLS)
def test_sequences_in_pages_are_calls_of_their_own(name, options, order):
    q, k_pages, v_pages, table, rows = cache()
    turned = (np.swapaxes(x, 1, 2) if order == "BTHD" else x for x in (q, k_pages, v_pages))
    found = ra.attend(name, *turned, layout=ra.Paged(table, COUNTS, order=order), **options, backend="definition")
    found = np.swapaxes(found, 1, 2) if order == "BTHD" else found
    for b, (k, v) in enumerate(rows):
        np.testing.assert_array_equal(found[[b]], ra.attend(name, q[[b]], k[None], v[None], **options, backend="definition"))


def test_functions_are_told_positions_in_the_sequence_and_not_in_the_page():
    q, k_pages, v_pages, table, rows = cache()
    layout = ra.Paged(table.astype(np.int32), COUNTS.astype(np.uint16))
    call = {"score_mod": alibi, "mask_mod": even, "aux": {"slopes": SLOPES}, "returns": ("out", "lse"), "backend": "definition"}
    found = ra.attention(q, k_pages, v_pages, layout=layout, **call)
    for b, (k, v) in enumerate(rows):
        i, j = np.ogrid[:3, : COUNTS[b]]
        said = {"bias": SLOPES[b][:, None, None] * (j - i), "mask": (b + i + j) % 2 == 0}
        alone = ra.attention(q[[b]], k[None], v[None], **said, returns=("out", "lse"), backend="definition")
        allowed = ra.tolerance("softmax", q[[b]], k[None], v[None], **said, returns=("out", "lse"))
        for x, y, most in zip(found, alone, allowed, strict=True):
            same = x[[b]] == y  # both -inf
            assert (same | (np.abs(np.subtract(x[[b]], y, where=~same, out=np.zeros(y.shape))) <= most)).all()


def test_a_page_may_serve_several_sequences():
    q, k_pages, v_pages, table, _ = cache()
    shared = np.repeat(table[[3]], 2, axis=0)
    found = ra.attention(q[[3, 3]], k_pages, v_pages, layout=ra.Paged(shared, COUNTS[[3, 2]]), backend="definition")
    np.testing.assert_array_equal(found[[0]], ra.attention(q, k_pages, v_pages, layout=ra.Paged(table, COUNTS), backend="definition")[[3]])
    assert np.isfinite(found).all()


def test_the_tolerance_of_sequences_in_pages_judges_them():
    q, k_pages, v_pages, table, _ = cache(np.float32)
    layout = ra.Paged(table, COUNTS)
    out = ra.attention(q, k_pages, v_pages, layout=layout, causal=True, backend="definition")
    ra.assert_matches(out, "softmax", q, k_pages, v_pages, layout=layout, causal=True)
    last_key_forgotten = ra.attention(q, k_pages, v_pages, layout=ra.Paged(table, np.maximum(COUNTS - 1, 0)), causal=True, backend="definition")
    with pytest.raises(AssertionError, match="out"):
        ra.assert_matches(last_key_forgotten, "softmax", q, k_pages, v_pages, layout=layout, causal=True)


def test_sizes_of_a_problem_are_what_the_engine_is_promised():
    softmax = catalog.variant("softmax")
    given = packed()
    call = bind(softmax, given, {}, layout=ra.Packed(CU_Q, CU_K))
    assert dict(call.dims) == {"B": 1, "Hq": HQ, "T": T, "D": D, "Hkv": HKV, "S": S, "E": E}
    assert [call.given[name].shape for name in "qkv"] == [(1, HQ, T, D), (1, HKV, S, D), (1, HKV, S, E)]
    assert all(np.shares_memory(call.given[name], x) for name, x in zip("qkv", given, strict=True))
    q, k_pages, v_pages, table, _ = cache()
    paged = bind(softmax, (q, k_pages, v_pages), {}, layout=ra.Paged(table, COUNTS))
    assert dict(paged.dims) == {"B": 4, "Hq": HQ, "T": 3, "D": D, "Hkv": HKV, "S": 13, "E": E}
    assert paged.given["k"] is k_pages and paged.given["q"] is q
    sizes = [(one.dims["B"], one.dims["T"], one.dims["S"]) for one in split(call)]
    assert sizes == [(1, *lengths) for lengths in LENGTHS]


# ---- what is refused -----------------------------------------------------------------------------------------------------------------


class OnDevice:
    shape, dtype = (3,), "int32"

    def __dlpack__(self, **_):
        raise AssertionError("memory of a device was read")

    def __dlpack_device__(self):
        return (2, 0)


TABLE = cache()[3]

MALFORMED = {
    "bounds a list": (lambda: ra.Packed([0, 1]), DtypeError, ["Packed: cu_seqlens_q is a list", "not an array"]),
    "bounds on a device": (lambda: ra.Packed(OnDevice()), BackendUnavailableError, ["Packed: cu_seqlens_q is on a device"]),
    "bounds of fractions": (lambda: ra.Packed(CU_Q / 1), DtypeError, ["Packed: cu_seqlens_q is float64", "integers"]),
    "bounds of booleans": (lambda: ra.Packed(CU_Q > 0), DtypeError, ["Packed: cu_seqlens_q is bool", "integers"]),
    "bounds of two axes": (lambda: ra.Packed(CU_Q[None]), ShapeError, ["Packed: cu_seqlens_q has 2 axes", r"\(1, 8\)", "must have 1"]),
    "bounds of nothing": (lambda: ra.Packed(CU_Q[:0]), OperandError, ["Packed: cu_seqlens_q has no entry", "must begin with 0"]),
    "bounds from 1": (lambda: ra.Packed(CU_Q + 1), OperandError, ["Packed: cu_seqlens_q begins with 1", "must begin with 0"]),
    "bounds that fall": (
        lambda: ra.Packed(CU_Q, np.array([0, 5, 3, 9])),
        OperandError,
        [r"Packed: cu_seqlens_k\[2\]=3 is less than cu_seqlens_k\[1\]=5", "must not decrease"],
    ),
    "bounds of other sequences": (
        lambda: ra.Packed(CU_Q, CU_K[:-1]),
        ShapeError,
        ["Packed: cu_seqlens_k has 7 entries, but cu_seqlens_q has 8"],
    ),
    "a table of fractions": (lambda: ra.Paged(TABLE / 1, COUNTS), DtypeError, ["Paged: block_table is float64", "integers"]),
    "a table of one axis": (lambda: ra.Paged(TABLE[0], COUNTS), ShapeError, ["Paged: block_table has 1 axes", "must have 2"]),
    "lengths of two axes": (lambda: ra.Paged(TABLE, COUNTS[None]), ShapeError, ["Paged: lengths has 2 axes", "must have 1"]),
    "lengths of other sequences": (lambda: ra.Paged(TABLE, COUNTS[:2]), ShapeError, ["Paged: block_table has B=4, but lengths has B=2"]),
    "a length below zero": (lambda: ra.Paged(TABLE, COUNTS - 2), OperandError, [r"Paged: lengths\[1\]=-2", "at least 0"]),
    "an order unknown": (lambda: ra.Paged(TABLE, COUNTS, order="THD"), ParameterError, ["Paged: order='THD'", "BHTD, BTHD"]),
}


@pytest.mark.parametrize("place", ["cu_seqlens_q", "cu_seqlens_k", "block_table", "lengths", "order"])
def test_an_odd_thing_in_any_place_is_refused_by_an_error_of_ours_or_understood(place):
    good = {"cu_seqlens_q": CU_Q} if place.startswith("cu") else {"block_table": TABLE, "lengths": COUNTS}
    kind = ra.Packed if place.startswith("cu") else ra.Paged
    for thing in ODD_THINGS:
        try:
            kind(**{**good, place: thing})
        except ra.RefattnError as refusal:
            assert str(refusal).startswith(kind.__name__)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_layout_says_what_is_wrong(case):
    make, exception, fragments = MALFORMED[case]
    with pytest.raises(exception) as caught:
        make()
    assert type(caught.value) is exception
    assert [f for f in fragments if not re.search(f, str(caught.value))] == []


PACKED, PAGED = ra.Packed(CU_Q, CU_K), ra.Paged(TABLE, COUNTS)


def packed_call(name="softmax", layout=PACKED, **keywords):
    return ra.attend(name, *packed(), layout=layout, **keywords)


def paged_call(layout=PAGED, **keywords):
    return ra.attention(*cache()[:3], layout=layout, **keywords)


def used(place, value):
    table = TABLE.copy()
    table[place] = value
    return ra.Paged(table, COUNTS)


ONE_MORE = {n: bounds + (np.arange(len(bounds)) == len(bounds) - 1) for n, bounds in (("q", CU_Q), ("k", CU_K))}

REFUSED = {
    "queries end elsewhere": (
        lambda: packed_call(layout=ra.Packed(ONE_MORE["q"], CU_K)),
        ShapeError,
        [f"softmax: cu_seqlens_q ends at {T + 1}, but q has T={T}"],
    ),
    "keys end elsewhere": (
        lambda: packed_call(layout=ra.Packed(CU_Q, ONE_MORE["k"])),
        ShapeError,
        [f"softmax: cu_seqlens_k ends at {S + 1}, but k has S={S}"],
    ),
    "keys taken to lie as queries": (lambda: packed_call(layout=ra.Packed(CU_Q)), ShapeError, [f"cu_seqlens_k ends at {T}, but k has S={S}"]),
    "packed, with a batch": (
        lambda: ra.attention(*(x[None] for x in packed()), layout=PACKED),
        ShapeError,
        ["softmax: q has 4 axes", "must have 3", r"\[T Hq D\]"],
    ),
    "packed, other keys": (
        lambda: ra.attention(packed()[0], packed()[1], packed()[2][1:], layout=PACKED),
        ShapeError,
        [f"softmax: v has S={S - 1}, but k has S={S}"],
    ),
    "packed, heads that do not divide": (
        lambda: ra.attention(packed()[0][:, :5], *packed()[1:], layout=PACKED),
        ShapeError,
        ["k has Hkv=2, which does not divide q's Hq=5"],
    ),
    "packed, a bias": (
        lambda: packed_call(bias=np.zeros((T, S))),
        OperandError,
        ["softmax: bias has axes B Hq T S", "Packed sequences do not share", "score_mod"],
    ),
    "packed, a mask": (lambda: packed_call("sigmoid", mask=np.ones((T, S), bool)), OperandError, ["sigmoid: mask has axes B Hq T S", "mask_mod"]),
    "packed, weights": (lambda: packed_call(returns=("out", "weights")), ParameterError, ["softmax: weights of Packed sequences", "out, lse"]),
    "packed, another variant": (
        lambda: packed_call("luong_dot"),
        ParameterError,
        ["luong_dot takes no Packed sequences", "variants that do are", "softmax", "retention"],
    ),
    "packed, keys of their own": (
        lambda: ra.attend("retention", *packed(), np.ones(HKV), layout=PACKED),
        ShapeError,
        [f"retention: k has T={S}, but q has T={T}"],
    ),
    "packed, bounds of keys that are none": (
        lambda: ra.attend("retention", packed()[0], *(x[np.arange(T) % S] for x in packed()[1:]), np.ones(HKV), layout=PACKED),
        ParameterError,
        ["retention: cu_seqlens_k is given", "leave it out"],
    ),
    "packed, states of fewer sequences": (
        lambda: ra.attend(
            "retention", packed()[0], *(x[np.arange(T) % S] for x in packed()[1:]), np.ones(HKV), np.zeros((2, HKV, D, E)), layout=ra.Packed(CU_Q)
        ),
        ShapeError,
        ["retention: initial_state has sequences=2", f"cu_seqlens_q has sequences={len(LENGTHS)}"],
    ),
    "packed, a block mask": (
        lambda: packed_call(block_mask=ra.block_mask(even, T=T, S=S)),
        ParameterError,
        ["softmax: block_mask is of one T and S", "pass mask_mod alone"],
    ),
    "packed, out of a dense call": (
        lambda: packed_call(out=np.zeros((1, HQ, T, E))),
        ShapeError,
        [r"\(1, 6, 16, 4\)", r"must be \(16, 6, 4\)", "T Hq E"],
    ),
    "packed, out over q": (
        lambda: ra.attention(x := np.zeros((T, HKV, D)), np.zeros((S, HKV, D)), np.zeros((S, HKV, D)), layout=PACKED, out=x),
        OperandError,
        ["out for out overlaps the memory of q"],
    ),
    "packed, a cotangent of a dense call": (
        lambda: ra.gradients("softmax", *packed(), d_out=np.zeros((1, HQ, T, E)), layout=PACKED),
        ShapeError,
        ["softmax: d_out has 4 axes", r"\[T Hq E\]", f"T={T}"],
    ),
    "THD as a word": (lambda: packed_call(layout="THD"), ParameterError, ["softmax: layout='THD'", "BHTD, BTHD, or a Packed or Paged"]),
    "the class itself": (lambda: packed_call(layout=ra.Packed), ParameterError, ["softmax: layout=", "or a Packed or Paged"]),
    "pages of another batch": (
        lambda: paged_call(layout=ra.Paged(TABLE[:3], COUNTS[:3])),
        ShapeError,
        ["softmax: block_table has B=3, but q has B=4"],
    ),
    "a length beyond the table": (
        lambda: paged_call(layout=ra.Paged(TABLE[:, :3], COUNTS)),
        OperandError,
        [r"softmax: lengths\[3\]=13; 3 pages of 4 keys hold at most 12"],
    ),
    "a page that is not there": (
        lambda: paged_call(layout=used((3, 2), PAGES)),
        OperandError,
        [r"softmax: block_table\[3, 2\]=11; must be from 0 to 10, as k has P=11 pages"],
    ),
    "a page below zero": (lambda: paged_call(layout=used((0, 2), -1)), OperandError, [r"block_table\[0, 2\]=-1; must be from 0 to 10"]),
    "pages of two kinds": (
        lambda: ra.attention(*cache()[:2], cache()[2][:-1], layout=PAGED),
        ShapeError,
        ["softmax: v has P=10, but k has P=11"],
    ),
    "pages of two lengths": (
        lambda: ra.attention(*cache()[:2], cache()[2][:, :, :3], layout=PAGED),
        ShapeError,
        ["softmax: v has page=3, but k has page=4"],
    ),
    "pages without heads": (lambda: ra.attention(*cache()[:1], cache()[1][:, 0], cache()[2], layout=PAGED), ShapeError, [r"\[P Hkv page D\]"]),
    "pages in the other order": (
        lambda: ra.attention(*cache()[:1], cache()[1][:, 0], cache()[2], layout=ra.Paged(TABLE, COUNTS, order="BTHD")),
        ShapeError,
        [r"\[P page Hkv D\]"],
    ),
    "pages, a mask": (lambda: paged_call(mask=np.ones((3, 13), bool)), OperandError, ["softmax: mask has axes B Hq T S", "Paged sequences"]),
    "pages, scores": (lambda: paged_call(returns="scores"), ParameterError, ["softmax: scores of Paged sequences", "out, lse"]),
    "pages, gradients": (
        lambda: ra.gradients("softmax", *cache()[:3], d_out=np.zeros((4, HQ, 3, E)), layout=PAGED, backend="definition"),
        ParameterError,
        ["softmax: no gradients of Paged keys and values", "a cache"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_call_of_sequences_says_what_is_wrong(case):
    call, exception, fragments = REFUSED[case]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception and "\n" not in str(caught.value)
    assert [f for f in fragments if not re.search(f, str(caught.value))] == []


# ---- without a compiler, with the engine, and somebody else's -------------------------------------------------------------------------

PLAIN = """
import numpy as np, refattn as ra
x = np.linspace(-1, 1, 5 * 2 * 4).reshape(5, 2, 4)
found = ra.attention(x, x, x, layout=ra.Packed(np.array([0, 2, 5])), causal=True, mask_mod=lambda b, h, i, j: b == 1 or j == 0)
dense = [np.swapaxes(part, 0, 1)[None] for part in (x[:2], x[2:])]
mask = np.array([[True, False], [True, False]])
one, two = ra.attention(*[dense[0]] * 3, mask=mask, causal=True), ra.attention(*[dense[1]] * 3, causal=True)
assert (found == np.concatenate([np.swapaxes(part[0], 0, 1) for part in (one, two)])).all()
print("right")
"""


def test_without_a_compiler_sequences_run_as_plain_python():
    done = subprocess.run([sys.executable, "-c", PLAIN], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "right", done.stderr[-2000:]


def long(dtype, seed=7):
    """Sequences long enough for kernels, and where they begin."""
    rng = np.random.default_rng(seed)
    cu_q, cu_k = np.array([0, 1, 130, 130, 200]), np.array([0, 64, 200, 213, 300])
    return [rng.standard_normal(shape).astype(dtype) for shape in ((200, HQ, 16), (300, HKV, 16), (300, HKV, 24))], cu_q, cu_k


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("functions", [{}, {"score_mod": alibi, "mask_mod": even, "aux": {"slopes": SLOPES}}], ids=["alone", "functions"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_usual_backend_agrees_with_the_definition_of_packed_sequences(name, functions, dtype):
    x, cu_q, cu_k = long(dtype)
    call = {"layout": ra.Packed(cu_q, cu_k), "causal": True, **functions}
    truth = ra.attend(name, *(y.astype(np.float64) for y in x), **call, backend="definition")
    allowed = ra.tolerance(name, *x, **call).out
    assert (np.abs(ra.attend(name, *x, **call).astype(np.float64) - truth) <= allowed).all()


@pytest.mark.compiled
@pytest.mark.parametrize("functions", [{}, {"score_mod": alibi, "mask_mod": even, "aux": {"slopes": SLOPES}}], ids=["alone", "functions"])
@pytest.mark.parametrize("n_q", [1, 40])
def test_the_usual_backend_agrees_with_the_definition_of_sequences_in_pages(n_q, functions):
    rng = np.random.default_rng(8)
    lengths, table = np.array([500, 0, 7]), rng.permutation(40 * 3)[: 3 * 32].reshape(3, 32)
    q = rng.standard_normal((3, HQ, n_q, 16)).astype(np.float32)
    k, v = (rng.standard_normal((120, HKV, 16, width)).astype(np.float32) for width in (16, 24))
    call = {"layout": ra.Paged(table, lengths), "causal": True, **functions}
    truth = ra.attention(*(y.astype(np.float64) for y in (q, k, v)), **call, backend="definition")
    assert (np.abs(ra.attention(q, k, v, **call) - truth) <= ra.tolerance("softmax", q, k, v, **call).out).all()


@pytest.mark.compiled
def test_gradients_of_the_usual_backend_agree_with_the_definition_of_packed_sequences():
    x, d_out = packed(), np.random.default_rng(1).standard_normal((T, HQ, E))
    call = {"d_out": d_out, "layout": ra.Packed(CU_Q, CU_K), "causal": True}
    expected, found = ra.gradients("softmax", *x, **call, backend="definition"), ra.gradients("softmax", *x, **call)
    for field in found._fields:
        exact = getattr(expected, field)
        roundings = (D + E + 2 * 7 * HQ) * 2.0**-52 * np.abs(exact).max()  # of the sums a gradient is made of, to first order
        assert (np.abs(getattr(found, field) - exact) <= expected.errors[field] + 8 * roundings).all(), field


@pytest.mark.peer
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_what_torch_gives_for_each(causal):
    import torch
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    found = ra.attention(*packed(), layout=PACKED, causal=causal, backend="definition")
    allowed = ra.tolerance("softmax", *packed(), layout=PACKED, causal=causal, profile="math").out
    for n, one in enumerate(each(*packed())):
        n_q, n_k = LENGTHS[n]
        if not n_q or not n_k:
            continue  # torch has no softmax over nothing
        q, k, v = (torch.from_numpy(np.ascontiguousarray(x)) for x in one)
        bias = causal_lower_right(n_q, n_k) if causal and n_q <= n_k else None
        if causal and bias is None:
            continue  # torch gives NaN to rows that see nothing there
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).numpy()
        rows = slice(CU_Q[n], CU_Q[n + 1])
        assert (np.abs(found[rows] - np.swapaxes(out[0], 0, 1)) <= allowed[rows]).all()
