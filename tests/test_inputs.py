"""What is accepted gives the result of the same numbers in plain arrays, whatever holds them, and leaves them as they were."""

import ml_dtypes
import numpy as np
import pytest

import refattn as ra
from refattn.precision import round_to

#: More key heads than one, groups of three, T != S, D != E, odd lengths.
SHAPES = {"q": (2, 6, 5, 7), "k": (2, 2, 9, 7), "v": (2, 2, 9, 3)}
PARAMS = {"causal": True, "softcap": 4.0, "returns": ("out", "lse")}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def drawn(dtype=np.float64):
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x.astype(float), y.astype(float), equal_nan=True)


class ByArray:
    """Nothing but __array__."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.array(self.x, dtype, copy=copy)


class ByDLPack:
    """Nothing but DLPack, as a host array has it."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **keywords):
        return self.x.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


class Subclass(np.ndarray):
    """An array whose arithmetic and indexing are not to be trusted."""

    def __array_ufunc__(self, *_, **__):
        raise AssertionError("a subclass decided how to compute")

    def __getitem__(self, _):
        raise AssertionError("a subclass decided what its elements are")


def swapped(x):
    return x.astype(x.dtype.newbyteorder())


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def reversed_twice(x):
    return np.flip(x, (1, 3)).copy()[:, ::-1, :, ::-1]


def every_other(x):
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    y = memory[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    assert not y.flags.aligned
    return y


def field_of_a_record(x):
    records = np.zeros(x.shape, [("tag", "u1"), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


HOLDERS = [
    *(swapped, read_only, np.asfortranarray, reversed_twice, every_other, unaligned, field_of_a_record),
    *(ByArray, ByDLPack, lambda x: x.view(Subclass), lambda x: ByArray(x.view(Subclass))),
]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("holder", HOLDERS, ids=lambda f: f.__name__)
def test_whatever_holds_the_numbers_the_result_is_the_same(holder, dtype):
    x = drawn(dtype)
    expected = ra.attention(**x, **PARAMS)
    held = {name: holder(array) for name, array in x.items()}
    results = ra.attention(**held, **PARAMS)
    assert all(type(y) is np.ndarray and y.dtype == dtype and y.dtype.isnative for y in results)
    assert all(same(y, z) for y, z in zip(results, expected, strict=True))


def test_results_are_in_the_machines_byte_order_even_when_all_operands_are_not():
    v = drawn(np.float32)["v"][0]
    result = ra.attend("cosine_residual", swapped(v))
    assert result.dtype.isnative and same(result, ra.attend("cosine_residual", v))


def test_an_array_on_disk_is_read_in_place(tmp_path):
    x = drawn(np.float32)
    np.save(tmp_path / "k.npy", x["k"])
    on_disk = np.load(tmp_path / "k.npy", mmap_mode="r")
    assert isinstance(on_disk, np.memmap)
    assert same(ra.attention(x["q"], on_disk, x["v"]), ra.attention(**x))


def test_a_stride_of_zero_repeats_a_head():
    x = drawn()
    one = {name: np.broadcast_to(x[name][:, :1], x[name].shape) for name in ("k", "v")}
    assert 0 in one["k"].strides
    assert same(ra.attention(x["q"], **one), ra.attention(x["q"], x["k"][:, :1], x["v"][:, :1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_results_are_the_float64_result_of_the_same_values_rounded_once(dtype):
    x = drawn(dtype)
    out, lse = ra.attention(**x, **PARAMS, backend="definition")
    exact_out, exact_lse = ra.attention(**{name: y.astype(np.float64) for name, y in x.items()}, **PARAMS, backend="definition")
    wide = np.dtype(dtype) if np.dtype(dtype).itemsize >= 4 else np.dtype(np.float32)
    assert same(out, round_to(exact_out, np.dtype(dtype)))
    assert same(lse, round_to(exact_lse, wide))


@pytest.mark.parametrize(
    ("one", "other", "result"),
    [
        (np.float32, np.float64, np.float64),
        (np.float16, np.float32, np.float32),
        (ml_dtypes.bfloat16, np.float32, np.float32),
        (ml_dtypes.float8_e4m3fn, np.float32, np.float32),
    ],
)
def test_operands_of_two_formats_give_the_one_that_holds_both(one, other, result):
    x = drawn(one)
    mixed = {**x, "k": x["k"].astype(other)}
    exact = ra.attention(**{name: y.astype(np.float64) for name, y in mixed.items()}, backend="definition")
    assert same(ra.attention(**mixed, backend="definition"), exact.astype(result))


def test_the_format_of_an_optional_operand_does_not_widen_the_result():
    assert ra.attention(**drawn(np.float16), bias=np.zeros((5, 9)), sinks=np.zeros(6)).dtype == np.float16


@pytest.mark.parametrize("bits", [np.uint32(0x7F800001), np.uint16(0x7F81)], ids=["float32", "bfloat16"])
def test_a_signalling_nan_is_a_nan(bits):
    """Converting it raises a floating-point flag, which NumPy turns into a warning."""
    x = drawn(np.float32 if bits.itemsize == 4 else ml_dtypes.bfloat16)
    x["v"].view(bits.dtype)[0, 0, 0, 0] = bits
    out = ra.attention(**x).astype(float)
    assert np.isnan(out[0, :3, :, 0]).all()
    assert not np.isnan(out[1]).any() and not np.isnan(out[..., 1:]).any()


@pytest.mark.peer
def test_torchs_pending_negation_is_not_lost():
    """torch 2.13 exports such a tensor through DLPack with the wrong sign, so only NumPy's protocol may be believed."""
    import torch

    q = torch.ones(1, 1, 1, 2, dtype=torch.cfloat).mul(1j).conj().imag
    assert q.is_neg() and q[0, 0, 0, 0] == -1
    with pytest.raises(ra.DtypeError, match=r"softmax: q: Tensor could not be read.*negative bit"):
        ra.attention(q, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))


@pytest.mark.parametrize("axis", ["B", "T", "S"])
def test_an_axis_may_be_empty(axis):
    sizes = {"B": 2, "T": 5, "S": 9, axis: 0}
    axes = {"q": ("B", 6, "T", 7), "k": ("B", 2, "S", 7), "v": ("B", 2, "S", 3), "out": ("B", 6, "T", 3), "lse": ("B", 6, "T")}
    shape = {name: tuple(sizes.get(n, n) for n in names) for name, names in axes.items()}
    out, lse = ra.attention(*(np.ones(shape[name], np.float32) for name in "qkv"), returns=("out", "lse"))
    assert out.shape == shape["out"] and lse.shape == shape["lse"]
    assert (out == 0).all() and (lse == -np.inf).all()


def test_layouts_differ_in_the_order_of_axes_only():
    x = drawn(np.float32)
    mask = np.random.default_rng(3).random((2, 1, 5, 9)) < 0.7
    turned = {name: np.swapaxes(y, 1, 2) for name, y in x.items()}
    names = ("out", "lse", "weights")
    out, lse, weights = ra.attention(**x, mask=mask, returns=names)
    turned_out, *others = ra.attention(**turned, mask=mask, returns=names, layout="BTHD")
    assert turned_out.flags.c_contiguous and same(np.swapaxes(turned_out, 1, 2), out)
    assert all(same(y, z) for y, z in zip(others, (lse, weights), strict=True))  # neither has the axes that change places


def test_a_query_head_reads_the_key_head_of_its_group():
    x = drawn()
    repeated = {name: np.repeat(x[name], 3, axis=1) for name in ("k", "v")}
    assert same(ra.attention(**x, backend="definition"), ra.attention(x["q"], **repeated, backend="definition"))


@pytest.mark.parametrize("shape", [(), (9,), (5, 1), (5, 9), (6, 1, 9), (1, 5, 9), (1, 1, 1, 9), (2, 1, 5, 1), (2, 6, 5, 9)], ids=str)
def test_masks_and_biases_broadcast_as_in_numpy(shape):
    """Leading axes may be missing, and any axis may have size one."""
    full = (2, 6, 5, 9)
    rng = np.random.default_rng(5)
    bias, mask = np.asarray(rng.standard_normal(shape)), np.asarray(rng.random(shape) < 0.8)
    x = drawn()
    assert same(
        ra.attention(**x, bias=bias, mask=mask),
        ra.attention(**x, bias=np.broadcast_to(bias, full).copy(), mask=np.broadcast_to(mask, full).copy()),
    )


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"scale": np.float32(0.5)}, {"scale": 0.5}),
        ({"scale": ml_dtypes.bfloat16(0.5)}, {"scale": 0.5}),
        ({"scale": np.int8(-2)}, {"scale": -2.0}),
        ({"scale": -0.0}, {"scale": 0.0}),
        ({"softcap": np.float16(2)}, {"softcap": 2.0}),
        ({"softcap": 10**30}, {"softcap": 1e30}),
        ({"causal": np.True_}, {"causal": True}),
        ({"causal": np.str_("top_left")}, {"causal": "top_left"}),
        ({"window": (np.int64(3), None)}, {"window": (3, None)}),
        ({"window": [np.uint8(1), 0]}, {"window": (1, 0)}),
        ({"window": (10**30, 2)}, {"window": (None, 2)}),
        ({"window": (None, None)}, {"window": None}),
        ({"bias": np.float32(3), "mask": np.True_}, {}),
        ({"bias": None, "mask": None, "sinks": None, "scale": None, "softcap": None, "window": None, "returns": None}, {}),
    ],
    ids=str,
)
def test_parameters_may_be_numpys_scalars_and_none_is_absent(given, plain):
    x = drawn(np.float32)
    expected = ra.attention(**x, **plain, backend="definition")
    result = ra.attention(**x, **given, backend="definition")
    if "bias" in given and given["bias"] is not None:  # a constant bias changes rounding and nothing else
        assert np.abs(result - expected).max() <= np.finfo(np.float32).eps * np.abs(expected).max()
    else:
        assert same(result, expected)


def test_outputs_come_in_the_order_asked_for():
    x = drawn()
    names = ("out", "lse", "weights", "scores")
    one_by_one = {name: ra.attention(**x, returns=name, backend="definition") for name in names}
    for order in (names, names[::-1], ["lse", "out"], ("scores",)):
        results = ra.attention(**x, returns=order, backend="definition")
        assert all(same(y, one_by_one[name]) for name, y in zip(order, results if len(order) > 1 else (results,), strict=True))


@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_out_is_written_in_place_and_returned(layout):
    turn = (lambda y: np.swapaxes(y, 1, 2)) if layout == "BTHD" else (lambda y: y)
    x = {name: turn(y) for name, y in drawn(ml_dtypes.bfloat16).items()}
    expected = ra.attention(**x, layout=layout, returns=("out", "lse"))
    memory = np.zeros((*expected[0].shape[:-1], 6), ml_dtypes.bfloat16)
    targets = (memory[..., ::-2], np.zeros(expected[1].shape, np.float32))  # negative strides, and room between elements
    results = ra.attention(**x, layout=layout, returns=("out", "lse"), out=targets)
    assert results[0] is targets[0] and results[1] is targets[1]
    assert all(same(y, z) for y, z in zip(results, expected, strict=True))
    assert (memory[..., ::2] == 0).all()


def test_one_out_needs_no_tuple():
    x = drawn(np.float32)
    out = np.empty((2, 6, 5, 3), np.float32)
    assert ra.attention(**x, out=out) is out and same(out, ra.attention(**x))


def test_out_may_lie_between_the_elements_of_an_operand():
    x = drawn(np.float32)
    memory = np.zeros((2, 2, 9, 6), np.float32)
    memory[..., ::2] = x["v"]
    q = x["q"][:, :2, :9].repeat(2, axis=2)[:, :, :9]
    expected = ra.attention(q, x["k"], x["v"])
    assert same(ra.attention(q, x["k"], memory[..., ::2], out=memory[..., 1::2]), expected)
    assert np.array_equal(memory[..., ::2], x["v"])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_operands_are_never_modified(dtype, layout):
    x = drawn(dtype)
    x |= {"bias": np.ones((5, 9), dtype), "sinks": np.ones(6, dtype), "mask": np.tri(5, 9, 4, bool)}
    if layout == "BTHD":
        x |= {name: np.swapaxes(x[name], 1, 2).copy() for name in "qkv"}
    before = {name: y.tobytes() for name, y in x.items()}
    out = ra.attention(**x, layout=layout, empty_rows="uniform", window=(2, 1))
    out[...] = 0  # nor is the result a view of one
    assert {name: y.tobytes() for name, y in x.items()} == before
