"""Rounding into storage formats, checked value by value, and arrays of other libraries read without importing them."""

import gc
import itertools

import ml_dtypes
import numpy as np
import pytest

import refattn as ra
from refattn.errors import DtypeError
from refattn.foreign import as_numpy
from refattn.precision import as_dtype, common, format_of, is_real, round_to

NARROW = [
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e3m4,
    ml_dtypes.float8_e4m3,
    ml_dtypes.float8_e4m3b11fnuz,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e5m2fnuz,
]
same = np.testing.assert_array_equal


def positive_numbers(dtype):
    """Every finite number from +0 up, in order: their bit patterns count up from 0."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore"):  # some patterns are signalling NaN
        values = np.arange(2 ** (8 * unsigned.itemsize - 1), dtype=unsigned).view(dtype).astype(np.float64)
    finite = values[: np.argmax(~np.isfinite(values)) or None]
    assert np.all(np.diff(finite) > 0)
    return finite


def rounded(x, dtype):
    result = round_to(np.asarray(x), np.dtype(dtype))
    assert result.dtype == np.dtype(dtype)
    return result.astype(np.float64)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_every_tie_and_both_its_neighbours_round_right(dtype):
    numbers = positive_numbers(dtype)
    below, above = numbers[:-1], numbers[1:]
    ties = below + (above - below) / 2
    assert np.all((below < ties) & (ties < above)), "float64 holds the ties exactly"
    even = np.where(np.arange(len(below)) % 2 == 0, below, above)
    for sign in (1.0, -1.0):
        same(rounded(sign * numbers, dtype), sign * numbers)
        same(rounded(sign * ties, dtype), sign * even)
        same(rounded(sign * np.nextafter(ties, 0.0), dtype), sign * below)
        same(rounded(sign * np.nextafter(ties, np.inf), dtype), sign * above)


@pytest.mark.parametrize("dtype", NARROW)
def test_overflow_goes_where_the_format_says(dtype):
    numbers = positive_numbers(dtype)
    largest, tie = numbers[-1], numbers[-1] + (numbers[-1] - numbers[-2]) / 2
    beyond = np.inf if np.isinf(rounded(np.inf, dtype)) else np.nan
    assert np.isnan(beyond) == ("fn" in np.dtype(dtype).name)
    last_is_even = len(numbers) % 2 == 1
    for sign in (1.0, -1.0):
        same(rounded(sign * np.nextafter(tie, 0.0), dtype), sign * largest)
        same(rounded(sign * tie, dtype), sign * largest if last_is_even else sign * beyond)
        for x in (np.nextafter(tie, np.inf), 1e39, 1e308, np.inf):
            same(rounded(sign * x, dtype), sign * beyond)
    assert np.isnan(rounded(np.nan, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_too_small_become_zero_and_keep_their_sign_where_zero_has_one(dtype):
    small = rounded([-1e-300, -5e-324, -0.0, 0.0, 5e-324, 1e-300], dtype)
    same(small, 0.0)
    signed = "fnuz" not in np.dtype(dtype).name
    same(np.signbit(small), [signed] * 3 + [False] * 3)


def test_float32_ties_round_to_even_and_float64_stays():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x7F7FFFFF, 4000, dtype=np.uint32)
    below, above = (b.view(np.float32).astype(np.float64) for b in (bits, bits + np.uint32(1)))
    tie = below + (above - below) / 2
    same(rounded(tie, np.float32), np.where(bits % 2 == 0, below, above))
    same(rounded(np.nextafter(tie, 0.0), np.float32), below)
    same(rounded(np.nextafter(tie, np.inf), np.float32), above)
    same(rounded(1e300, np.float32), np.inf)
    same(rounded(tie, np.float64), tie)


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
@pytest.mark.parametrize("size", [(), (0,), (2, 0, 3), (2, 3)])
def test_any_shape_is_rounded_and_the_input_kept(dtype, size):
    x = np.full(size, 1.3)
    x.flags.writeable = False
    assert round_to(x, np.dtype(dtype)).shape == size
    same(round_to(x, np.dtype(dtype)).astype(np.float64), np.full(size, 1.3).astype(dtype).astype(np.float64))
    same(x, 1.3)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_format_knows_its_own_numbers(dtype):
    numbers, found = positive_numbers(dtype), format_of(dtype)
    assert found.name == np.dtype(dtype).name and found.dtype == np.dtype(dtype)
    assert found.tiny == numbers[1] and found.largest == numbers[-1]
    assert found.unit == (numbers[numbers > 1.0][0] - 1.0) / 2


@pytest.mark.parametrize(
    "said, meant",
    [("fp64", "float64"), ("single", "float32"), ("half", "float16"), ("bf16", "bfloat16"), ("fp8", "float8_e4m3fn"), ("e5m2", "float8_e5m2")],
)
def test_the_usual_names_are_understood(said, meant):
    assert as_dtype(said).name == as_dtype(meant).name == as_dtype(as_dtype(meant)).name == meant


def test_a_byte_swapped_dtype_is_read_in_native_order():
    assert as_dtype(np.dtype(">f4")) == np.float32 and as_dtype(np.dtype(">f4")).isnative
    assert is_real(np.dtype(">f2")) and not is_real(np.dtype(np.longdouble)) and not is_real(np.dtype(np.complex64))


@pytest.mark.parametrize(
    "said, words",
    [
        ("flaot32", "did you mean 'float32'"),
        ("bfloat61", "did you mean 'bfloat16'"),
        ("quux", "known are float64"),
        (np.int32, "int32 is not a floating-point format"),
        (np.longdouble, "is not a floating-point format"),
        (bool, "bool is not a floating-point format"),
        (object(), "is not a dtype"),
    ],
)
def test_what_names_no_format_is_refused(said, words):
    with pytest.raises(DtypeError, match=words):
        as_dtype(said)


FORMATS = [np.dtype(t).name for t in (np.float64, np.float32, *NARROW)]


@pytest.mark.parametrize("names", [*itertools.product(FORMATS, repeat=2), ("float8_e4m3fn", "float16", "float8_e5m2")])
def test_the_common_format_is_the_one_that_holds_every_number_of_the_others(names):
    """Held is what comes back the same: every number of eight and sixteen bits is tried, and the corners of the wider formats."""
    dtypes = {name: as_dtype(name) for name in names}

    def held(by, dtype):
        with np.errstate(over="ignore", invalid="ignore"):
            if dtype.itemsize <= 2:
                x = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype).astype(np.float64)
            else:
                info = np.finfo(dtype)
                x = np.array([1 + info.eps, info.max, info.smallest_subnormal], np.float64)
            x = x[np.isfinite(x)]
            return np.array_equal(round_to(x, by).astype(np.float64), x)

    widest = [a for a in dtypes.values() if all(held(a, b) for b in dtypes.values())]
    for order in (dtypes, dict(reversed(dtypes.items()))):
        if widest:
            assert common(order, "softmax") == widest[0]
        else:
            with pytest.raises(DtypeError, match=f"softmax: the operands .*{names[0]}.* have no common format"):
                common(order, "softmax")


def test_the_common_format_of_integers():
    bf16, f32, f64, i8, i32 = (np.dtype(t) for t in (ml_dtypes.bfloat16, np.float32, np.float64, np.int8, np.int32))
    assert common({"q": i8}, "softmax") == common({"q": i32, "k": i8}, "softmax") == f64
    assert common({"q": i8, "k": f32}, "softmax") == f32
    assert common({"q": f32, "k": i32}, "softmax") == common({"q": i32, "k": bf16}, "softmax") == f64


# ---- arrays of other libraries -------------------------------------------------------------------------------------------------


class Capsule:
    """Something that speaks DLPack and nothing else."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **keywords):
        return self.x.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


@pytest.mark.parametrize("view", [np.s_[...], np.s_[::-1], np.s_[1:, ::2], np.s_[:, ::-2], np.s_[:0], np.s_[1, 2, ...], np.s_[:, None, 1]])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int16, np.uint8, np.bool_])
def test_an_object_with_only_dlpack_is_read_in_place(view, dtype):
    x = np.arange(12).reshape(3, 4).astype(dtype)[view]
    read = as_numpy(Capsule(x), "softmax: q")
    assert read.dtype == x.dtype
    same(read, x)
    assert x.size == 0 or np.shares_memory(read, x)


def test_the_memory_behind_a_capsule_outlives_its_owner():
    owner = Capsule(np.arange(100_000.0))
    read = as_numpy(owner, "softmax: q")[::-1]
    del owner
    gc.collect()
    np.arange(100_000.0) * 2.0  # would take the freed block
    same(read, np.arange(100_000.0)[::-1])


@pytest.mark.parametrize("thing", [3.0, [1.0], None, "x", object()])
def test_what_is_no_array_is_refused_by_name(thing):
    with pytest.raises(DtypeError, match=r"softmax: q is a \w+, not an array"):
        as_numpy(thing, "softmax: q")


@pytest.mark.peer
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_torch_tensors_of_every_format_are_read_in_place(name):
    import torch

    dtype = getattr(torch, name)
    x = torch.linspace(-3, 3, 24).reshape(2, 3, 4).to(dtype)
    for tensor in (x, x.permute(2, 0, 1), x[:, 1:, ::2], x[:, :0], x[0, 0, 0], x.expand(2, 2, 3, 4)):
        read = as_numpy(tensor, "softmax: q")
        assert read.dtype.name == name and read.shape == tuple(tensor.shape)
        same(read.astype(np.float64), tensor.to(torch.float64).numpy())
        assert read.size == 0 or read.ctypes.data == tensor.data_ptr()


@pytest.mark.peer
def test_a_torch_tensor_that_requires_gradients_is_read_and_a_lone_reader_keeps_it_alive():
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        read = as_numpy(torch.full((1000,), 1.5, dtype=dtype).requires_grad_(), "softmax: q")
        gc.collect()
        torch.full((1000,), 7.0, dtype=dtype)
        same(read.astype(np.float64), 1.5)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float32"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_attention_of_another_librarys_arrays_is_that_of_their_values(library, name):
    rng = np.random.default_rng(1)
    q, k, v = (round_to(rng.standard_normal((1, 2, n, 4)), as_dtype(name)) for n in (3, 5, 5))
    if library == "torch":
        import torch

        theirs = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, name)) for x in (q, k, v)]
    else:
        import jax.numpy as jnp

        theirs = [jnp.asarray(x) for x in (q, k, v)]
    out = ra.attention(*theirs, causal=True)
    assert isinstance(out, np.ndarray) and out.dtype.name == name
    exact = ra.attention(*(x.astype(np.float64) for x in (q, k, v)), causal=True)
    same(out.astype(np.float64), round_to(exact, as_dtype(name)).astype(np.float64))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_mlx_arrays_are_read(name):
    import mlx.core as mx

    x = mx.arange(24, stream=mx.cpu).reshape(2, 3, 4, stream=mx.cpu).astype(getattr(mx, name), stream=mx.cpu)
    read = as_numpy(x, "softmax: q")
    assert read.dtype.name == name
    same(read.astype(np.float64), np.arange(24.0).reshape(2, 3, 4))
