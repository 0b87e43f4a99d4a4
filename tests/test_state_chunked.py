"""The chunked form against the recurrence in NumPy, its gradients against the recurrent form's: chunks' edges, odd widths, decays of any strength."""

from dataclasses import fields, replace

import numpy as np
import pytest

from refattn.engine.state import chunked, recurrent
from refattn.engine.state.chunks import CHUNK_BACK
from refattn.engine.state.lowered import Lowered
from refattn.engine.state.products import LOWER, LOWER_RESULT, ONE, UPPER, WHOLE, multiply, substitute, transpose

pytestmark = pytest.mark.compiled

UNIT = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}
ARRAYS = ("q", "b", "w", "S0", "g", "e", "u", "f")
#: Decay, erasure and read of every kind; the published recurrences are among them.
KINDS = {
    "linear": {},
    "retention": {"decay": "one"},
    "GLA": {"decay": "own"},
    "RWKV-6": {"decay": "own", "exclusive": True, "bonus": True},
    "delta": {"erase": True},
    "gated delta": {"decay": "one", "erase": True},
    "KDA": {"decay": "own", "erase": True},
    "old": {"decay": "own", "erase": True, "old": True},
    "old, one decay": {"decay": "one", "erase": True, "old": True},
    "exclusive": {"decay": "one", "erase": True, "exclusive": True, "bonus": True},
    "exclusive, old": {"decay": "own", "erase": True, "old": True, "exclusive": True, "bonus": True},
    "product": {"decay": "one", "erase": True, "steps": 2},
    "product of three": {"decay": "own", "erase": True, "steps": 3},
    "product, old": {"decay": "own", "erase": True, "steps": 3, "old": True, "exclusive": True},
    "many steps": {"decay": "own", "steps": 7},
    "columns": {"fade": True},
    "both ways": {"decay": "own", "fade": True},
    "one decay, and columns": {"decay": "one", "fade": True},
    "columns, three steps": {"fade": True, "steps": 3},
    "written first": {"written_first": True},
    "written first, three steps": {"written_first": True, "steps": 3},
}


def drawn(
    T, K=5, V=7, B=1, H=2, group=1, steps=1, decay="", erase=False, old=False, exclusive=False, bonus=False, fade=False, gate=-0.3,
    written_first=False, dtype=np.float64, seed=0,
):  # fmt: skip
    """Normal operands; keys of length one, of which an erasure takes from none to twice what is there; gates from 0 to `gate`."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    reads, T = T, T + 5 * written_first
    b = normal(B, H, T, steps, K)
    b /= np.sqrt(np.sum(b * b, axis=-1, keepdims=True))
    beta = rng.choice([0.0, 0.5, 1.0, 2.0], (B, H, T, steps, 1)).astype(dtype)
    g = (gate * rng.uniform(0.0, 1.0, (B, H, T, 1 if decay == "one" else K))).astype(dtype) if decay else None
    f = (gate * rng.uniform(0.0, 1.0, (B, H, T, V))).astype(dtype) if fade else None
    return Lowered(
        q=normal(B, H * group, reads, K), b=b, w=normal(B, H, T, steps, V), S0=normal(B, H, K, V), g=g, e=beta * b if erase else None,
        u=normal(B, H, T, K) if bonus else None, f=f, old=old, exclusive=exclusive, scale=0.5,
        written_first=written_first,
    )  # fmt: skip


def token_by_token(lowered):
    """Output and last state as the docstring of `Lowered` says them."""
    if lowered.written_first:
        out, state = token_by_token(lowered.in_a_row())
        return out[:, :, lowered.b.shape[2] :], state
    q, b, w, S, g, e, u, f = (None if getattr(lowered, name) is None else getattr(lowered, name).astype(np.float64) for name in ARRAYS)
    S = S.copy()
    out, group = np.zeros((*q.shape[:3], w.shape[4])), q.shape[1] // b.shape[1]
    for t in range(q.shape[2]):
        before = S.copy()
        if g is not None:
            S = np.exp(g[:, :, t])[..., None] * S
        if f is not None:
            S = S * np.exp(f[:, :, t])[:, :, None]
        for r in range(b.shape[3]):
            change = w[:, :, t, r]
            if e is not None:
                change = change - np.einsum("bhk,bhkv->bhv", e[:, :, t, r], before if lowered.old else S)
            S = S + b[:, :, t, r, :, None] * change[:, :, None]
        read = before if lowered.exclusive else S
        if u is not None:
            read = read + np.einsum("bhk,bhrk,bhrv->bhkv", u[:, :, t], b[:, :, t], w[:, :, t])
        out[:, :, t] = lowered.scale * np.einsum("bhk,bhkv->bhv", q[:, :, t], np.repeat(read, group, axis=1))
    return out, S


def roundings(lowered):
    """Roundings between an operand and a result within one chunk: sums over keys, values and steps, products of decays, and the substitution."""
    tokens, _ = chunked.sizes(lowered, CHUNK_BACK)
    rows = tokens * lowered.b.shape[3]
    return lowered.q.shape[3] + lowered.w.shape[4] + 4 * rows


def moved(lowered, seed):
    """In float64, every number off by 2**-26 of itself, and gates by as much beside, as rounding their exponential does."""
    rng = np.random.default_rng(seed)

    def one(name):
        x = getattr(lowered, name)
        if x is None:
            return None
        sign = rng.choice([-1.0, 1.0], x.shape)
        return x * (1 + 2.0**-26 * sign) + (2.0**-26 * rng.choice([-1.0, 1.0], x.shape) if name in ("g", "f") else 0.0)

    return replace(lowered, **{name: one(name) for name in ARRAYS})


def exactly(lowered):
    return replace(lowered, **{name: None if getattr(lowered, name) is None else getattr(lowered, name).astype(np.float64) for name in ARRAYS})


def check(lowered, computed, expected):
    """Arrays of `computed(lowered)` beside those of `expected` in float64.

    A rounding is to first order as if an operand had been off by as much.  What results answer to operands that are off is measured, the most
    sensitive element counting for all: a computation may be off by that, times the roundings there are between an operand and a result.
    """
    exact = exactly(lowered)
    wanted = expected(exact)
    answers = [expected(moved(exact, seed)) for seed in range(3)]
    for n, (found, there) in enumerate(zip(computed(lowered), wanted, strict=True)):
        assert found.shape == there.shape and found.dtype == lowered.q.dtype
        if not there.size:
            continue
        answer = 2.0**26 * max(float(np.max(np.abs(other[n] - there))) for other in answers)
        size = max(answer, float(np.max(np.abs(there))))
        tolerance = roundings(lowered) * (UNIT[lowered.q.dtype] * size + float(np.finfo(lowered.q.dtype).smallest_subnormal))
        error = np.abs(found - there)
        assert np.all(error <= tolerance), (
            f"array {n}: {np.max(error):.3g} at {np.unravel_index(np.argmax(error), error.shape)}, may be {tolerance:.3g}"
        )


def check_values(lowered, threads=1):
    assert not chunked.reason_against(lowered)
    check(lowered, lambda x: chunked.forward(x, threads), token_by_token)


def check_gradients(lowered, threads=1):
    rng = np.random.default_rng(1)
    d_out, d_state = rng.standard_normal((*lowered.q.shape[:3], lowered.w.shape[4])), rng.standard_normal(lowered.S0.shape)
    present = [name for name in ARRAYS if getattr(lowered, name) is not None]

    def by(form, threads):
        return lambda x: [getattr(form.backward(x, d_out.astype(x.q.dtype), d_state.astype(x.q.dtype), threads), name) for name in present]

    d_out, d_state = d_out.astype(lowered.q.dtype).astype(np.float64), d_state.astype(lowered.q.dtype).astype(np.float64)
    check(lowered, by(chunked, threads), by(recurrent, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_values_at_the_edges_of_chunks(kind, dtype):
    for T in (0, 1, 31, 32, 33, 64, 65, 200):
        check_values(drawn(T, dtype=dtype, **KINDS[kind]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_the_edges_of_chunks(kind, dtype):
    for T in (0, 1, 63, 65, 129):
        check_gradients(drawn(T, dtype=dtype, **KINDS[kind]))


@pytest.mark.parametrize(("K", "V", "H", "group"), [(1, 1, 1, 1), (16, 16, 2, 1), (17, 31, 1, 3), (64, 64, 1, 2), (3, 100, 3, 1), (96, 5, 1, 1)])
@pytest.mark.parametrize("kind", ["GLA", "gated delta", "KDA", "product, old", "columns", "both ways", "written first"])
def test_any_width(kind, K, V, H, group):
    lowered = drawn(70, K=K, V=V, H=H, group=group, B=2, dtype=np.float32, **KINDS[kind])
    check_values(lowered)
    check_gradients(lowered)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gate", [-50.0, -1e4, -np.inf])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.get("decay") or kind.get("fade")])
def test_strong_decays(kind, gate, dtype):
    """Neither overflow nor NaN, and what stands after a decay of 0 is as exact as if the sequence began there."""
    lowered = drawn(130, gate=-0.5, dtype=dtype, **KINDS[kind])
    decays = [name for name in ("g", "f") if getattr(lowered, name) is not None]
    for name in decays:
        getattr(lowered, name)[:, :, ::3] = gate
        getattr(lowered, name)[:, :, 70:75] = gate
    check_values(lowered)
    check_gradients(lowered)
    found = chunked.backward(lowered, np.ones((1, 2, 130, 7)), np.ones((1, 2, 5, 7)), 1)
    for name in decays:
        assert np.all(getattr(found, name)[getattr(lowered, name) == -np.inf] == 0)


def test_gates_that_differ_by_thousands_keep_every_digit():
    """Sums of gates would lose them: -1e4 at one token, then hundredths, in float32."""
    lowered = drawn(64, dtype=np.float32, **KINDS["GLA"])
    lowered.g[:, :, 10] = -1e4
    later = replace(
        lowered, **{name: np.ascontiguousarray(getattr(lowered, name)[:, :, 10:]) for name in ("q", "b", "w", "g")}, S0=np.zeros_like(lowered.S0)
    )  # fmt: skip
    whole, cut = chunked.forward(lowered, 1)[0][:, :, 10:], token_by_token(later)[0]
    assert np.max(np.abs(whole - cut)) <= 2.0**-24 * roundings(lowered) * np.max(np.abs(cut))


@pytest.mark.parametrize("kind", ["RWKV-6", "gated delta", "KDA", "product of three", "both ways", "written first"])
@pytest.mark.parametrize(("H", "group"), [(1, 1), (1, 3), (5, 1)])
def test_bits_do_not_depend_on_the_number_of_threads(kind, H, group):
    lowered = drawn(300, K=32, V=80, H=H, group=group, dtype=np.float32, **KINDS[kind])
    d_out, d_state = np.ones((1, H * group, 300, 80), np.float32), np.ones((1, H, 32, 80), np.float32)
    one, several = chunked.forward(lowered, 1), chunked.forward(lowered, 2)
    assert all(np.array_equal(x, y) for x, y in zip(one, several, strict=True))
    one, several = chunked.backward(lowered, d_out, d_state, 1), chunked.backward(lowered, d_out, d_state, 2)
    for field in fields(Lowered):
        x, y = getattr(one, field.name), getattr(several, field.name)
        assert x is None and y is None if x is None else np.array_equal(x, y), field.name


@pytest.mark.parametrize("kind", ["GLA", "KDA", "columns"])
def test_gradients_across_states_that_are_not_kept(kind):
    """More chunks than the backward pass keeps states of at a time."""
    from refattn.engine.state.chunked_backward import KEPT

    tokens, _ = chunked.sizes(drawn(1, **KINDS[kind]))
    check_gradients(drawn(tokens * (2 * KEPT + 1) + 5, K=2, V=2, H=1, gate=-2.0, **KINDS[kind]))


@pytest.mark.parametrize("kind", ["KDA", "both ways"])
def test_operands_stay_as_they_were(kind):
    lowered = drawn(70, **KINDS[kind])
    before = {name: None if getattr(lowered, name) is None else getattr(lowered, name).copy() for name in ARRAYS}
    d_state = np.ones_like(lowered.S0)
    chunked.forward(lowered, 1)
    chunked.backward(lowered, np.ones((1, 2, 70, 7)), d_state, 1)
    assert all(x is None or np.array_equal(x, getattr(lowered, name)) for name, x in before.items()) and np.all(d_state == 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["gated delta", "KDA", "product of three", "both ways", "written first"])
def test_what_one_head_does_not_know_of_another(kind, dtype):
    """NaN in one head leaves the others, which the same thread computes after it in the same memory, as they were."""
    lowered = drawn(70, H=3, dtype=dtype, **KINDS[kind], **({} if KINDS[kind].get("fade") else {"bonus": True, "exclusive": True}))
    clean = chunked.forward(lowered, 1), chunked.backward(lowered, np.ones((1, 3, 70, 7)), np.ones((1, 3, 5, 7)), 1)
    for name in ARRAYS:
        if getattr(lowered, name) is not None:
            getattr(lowered, name)[:, 0] = np.nan
    odd = chunked.forward(lowered, 1), chunked.backward(lowered, np.ones((1, 3, 70, 7)), np.ones((1, 3, 5, 7)), 1)
    assert all(np.array_equal(x[:, 1:], y[:, 1:]) for x, y in zip(clean[0], odd[0], strict=True))
    for name in ARRAYS:
        if getattr(lowered, name) is not None:
            assert np.array_equal(getattr(clean[1], name)[:, 1:], getattr(odd[1], name)[:, 1:]), name


def test_erasures_of_a_state_whose_columns_fade_are_refused():
    assert chunked.reason_against(drawn(2, fade=True, erase=True)) == "columns of its state fade, and something is erased"
    assert not chunked.reason_against(drawn(2, fade=True))


def test_many_writes_are_refused():
    assert "17 writes" in chunked.reason_against(drawn(2, steps=17))
    assert not chunked.reason_against(drawn(2, steps=16))
    check_values(drawn(20, steps=16, **{name: value for name, value in KINDS["KDA"].items() if name != "steps"}))


# ---- products ------------------------------------------------------------------------------------------------------------------------


def placed(x):
    """A copy whose rows begin where vectors do, its address and the bytes from row to row."""
    wide = -(-x.shape[1] * x.itemsize // 64) * 64
    room = np.zeros(x.shape[0] * wide + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + x.shape[0] * wide].view(x.dtype).reshape(x.shape[0], -1)
    copy[:, : x.shape[1]] = x
    return copy, copy.ctypes.data, wide


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [16, 32, 48, 64, 80])
def test_products(columns, dtype):
    """Every part of a product, plain and transposed, is that of the matrices, whole numbers being exact."""
    rng = np.random.default_rng(0)
    rows, n = 24, 24
    whole = rng.integers(-9, 10, (rows, n)).astype(dtype)
    right = rng.integers(-9, 10, (n, columns)).astype(dtype)
    vectors = columns // _lanes(dtype)
    like, one = np.empty(1, dtype), np.dtype(dtype).type(1)
    _kept, b_at, b_row = placed(right)
    size = np.dtype(dtype).itemsize
    for part, left in ((WHOLE, whole), (LOWER, np.tril(whole)), (UPPER, np.triu(whole))):
        for turned in (False, True):
            _also_kept, a_at, a_row = placed(left.T if turned else left)
            steps = (size, a_row) if turned else (a_row, size)
            c, c_at, c_row = placed(np.ones((rows, columns), dtype))
            multiply(like, c_at, c_row, a_at, *steps, b_at, b_row, rows, vectors, n, -one, 1, part, ONE)
            assert np.array_equal(c[:, :columns], 1 - left @ right)
    c, c_at, c_row = placed(np.full((rows, columns), np.nan, dtype))
    _also_kept, a_at, a_row = placed(whole)
    multiply(like, c_at, c_row, a_at, a_row, size, b_at, b_row, rows, vectors, n, one, 0, LOWER_RESULT, ONE)
    assert np.array_equal(np.tril(c[:, :columns]), np.tril(whole @ right))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [16, 32, 48, 64, 80])
def test_substitution(columns, dtype):
    """A triangular system of whole numbers, forwards and, read backwards, its transpose; what stands on and above the diagonal is not read."""
    rng = np.random.default_rng(0)
    n, size = 16, np.dtype(dtype).itemsize
    strict = np.tril(rng.integers(-1, 2, (n, n)), -1).astype(dtype)
    solution = rng.integers(-3, 4, (n, columns)).astype(dtype)
    like, vectors = np.empty(1, dtype), columns // _lanes(dtype)
    _kept, a_at, a_row = placed(strict + np.triu(np.full((n, n), np.nan, dtype)))
    x, x_at, x_row = placed(solution + strict @ solution)
    substitute(like, x_at, x_row, a_at, a_row, size, n, vectors)
    assert np.array_equal(x[:, :columns], solution)
    x, x_at, x_row = placed(solution + strict.T @ solution)
    substitute(like, x_at + (n - 1) * x_row, -x_row, a_at + (n - 1) * (a_row + size), -size, -a_row, n, vectors)
    assert np.array_equal(x[:, :columns], solution)


def test_transposition():
    x = np.arange(32.0 * 48, dtype=np.float32).reshape(32, 48)
    _kept, at, row = placed(x)
    turned, turned_at, turned_row = placed(np.zeros((48, 32), np.float32))
    transpose(np.empty(1, np.float32), at, row, turned_at, turned_row, 32, 48)
    assert np.array_equal(turned[:, :32], x.T)


def _lanes(dtype):
    from refattn.engine.simd import register_bytes

    return register_bytes() // np.dtype(dtype).itemsize
