"""Adapters with their frameworks: what they express agrees with the definition, what they refuse is listed here."""

import importlib.metadata
import inspect
import itertools
import sys
import types
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

import refattn as ra
from refattn import adapters, precision
from refattn.candidate import Inexpressible
from refattn.foreign import as_numpy

pytestmark = pytest.mark.peer

D = 6
SIZES = ((4, 7), (7, 4), (5, 5))
HEADS = ((2, 2), (7, 1), (4, 2))
WIDE, NARROW = ("float64", "float32"), ("float16", "bfloat16")

#: Element types each system computes attention in; every other type of the four is refused.
COMPUTES = {
    "numpy": (*WIDE, *NARROW),
    "torch": (*WIDE, *NARROW),
    "torch-flex": (*WIDE, *NARROW),
    "jax": ("float32", *NARROW),
    "onnxruntime": ("float32", "float16"),
    "mlx": ("float32", *NARROW),
}

#: Axes of length zero that each system refuses.
REFUSES_EMPTY = {"numpy": "", "torch": "", "jax": "", "mlx": "", "torch-flex": "S", "onnxruntime": "BTS"}

#: Element types a framework has no array of.
NO_ARRAY = {
    "torch": ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    "torch-flex": ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    "mlx": tuple(name for name in precision._FORMATS if name.startswith("float8")),
}


@dataclass(frozen=True)
class Call:
    """One call of the grid."""

    n_q: int
    n_k: int
    heads: tuple[int, int]
    width: int
    causal: bool | str
    window: tuple[int, int] | None
    softcap: float | None
    scale: float | None
    mask: bool
    bias: bool
    sinks: bool

    @property
    def params(self):
        return {name: getattr(self, name) for name in ("causal", "window", "softcap", "scale")}

    def operands(self, dtype):
        rng = np.random.default_rng(7)
        (heads, kv_heads), (n_q, n_k) = self.heads, (self.n_q, self.n_k)
        x = {"q": (2, heads, n_q, D), "k": (2, kv_heads, n_k, D), "v": (2, kv_heads, n_k, self.width)}
        x |= {"bias": (heads, n_q, 1) if self.sinks else (2, 1, 1, n_k)} if self.bias else {}
        x |= {"sinks": (heads,)} if self.sinks else {}
        x = {name: precision.round_to(rng.standard_normal(shape), precision.as_dtype(dtype)) for name, shape in x.items()}
        if self.mask:
            x["mask"] = rng.random((1, heads, n_q, n_k)) < 0.6
            x["mask"][0, 0, 1] = False  # a row that sees nothing
        for array in x.values():
            array.flags.writeable = False
        return x


def grid():
    choices = (SIZES, (False, True, "top_left"), (None, (2, 1)), (None, 2.0), (None, 0.37), (False, True), (False, True), (False, True))
    for n, (sizes, *rest) in enumerate(itertools.product(*choices)):
        yield Call(*sizes, HEADS[n % 3], D if n % 5 < 3 else 4, *rest)


def expressible(name, call, emptied):
    """What each system can be told.  `emptied`: some row sees no key."""
    square = call.n_q == call.n_k
    if name == "torch":
        return not (call.softcap or call.window or call.sinks)
    if name in ("torch-flex", "onnxruntime"):
        return not call.sinks
    if name == "jax":
        top_left = square or not (call.causal is True or (call.window and not call.causal))
        return top_left and call.width == D and not (call.softcap or call.sinks)
    if name == "mlx":
        bottom_right = square or call.causal != "top_left"
        return bottom_right and not (call.softcap or call.window) and not (call.bias and emptied)
    return True


def wide(operands):
    return {name: x if x.dtype == np.bool_ else x.astype(np.float64) for name, x in operands.items()}


def tolerance(call, operands, exact, params, dtype):
    """First-order worst case of any order of evaluation in which sums are float32 (float64) and anything may be stored in `dtype`.

    A score is a sum of D products, scaled (by sqrt(scale) on either side at worst), capped, biased, shifted by the maximum and exponentiated,
    perhaps as a power of two: at most D + 16 roundings of magnitude a + |bias| in the sums' unit, 8 of them stored.  What weights share
    is counted once in numerator and denominator; weights, sums over S keys and the result are rounded on their own.
    """
    u = precision.format_of(dtype).unit
    sums = min(u, 2.0**-24)
    q, k, v = operands["q"], np.repeat(operands["k"], call.heads[0] // call.heads[1], 1), operands["v"]
    magnitude = (np.abs(q) @ np.abs(k).swapaxes(-1, -2)).max(-1, initial=0.0) * (call.scale or D**-0.5)
    magnitude = magnitude + max((np.abs(operands[name]).max() for name in ("bias", "sinks") if name in operands), default=0.0)
    shared = np.expm1((8 * u + (D + 16) * sums) * magnitude + 8 * sums)
    apart = 8 * u + (call.n_k + 8) * sums
    absolute = ra.attention(q, operands["k"], np.abs(v), **{n: x for n, x in operands.items() if n not in "qkv"}, **params)
    return {"out": (2 * shared + apart)[..., None] * absolute, "lse": shared + apart * (1 + np.abs(np.where(np.isinf(exact), 0.0, exact)))}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", COMPUTES)
def test_what_is_expressible_agrees_and_the_rest_is_refused(name, dtype):
    candidate = adapters.load(name)
    agreed = 0
    for call in grid():
        operands, exact = call.operands(dtype), wide(call.operands(dtype))
        params = {**call.params, **candidate.fixed}
        expected = dict(zip(("out", "lse"), ra.attention(**exact, **params, returns=("out", "lse")), strict=True))
        if dtype not in COMPUTES[name] or not expressible(name, call, np.isneginf(expected["lse"]).any()):
            with pytest.raises(Inexpressible):
                candidate.call(operands, call.params)
            continue
        before = {n: x.tobytes() for n, x in operands.items()}
        answer = candidate.call(operands, call.params)
        assert {n: x.tobytes() for n, x in operands.items()} == before, call
        allowed = tolerance(call, exact, expected["lse"], params, dtype)
        for output, returned in zip(candidate.returns, answer if isinstance(answer, tuple) else (answer,), strict=True):
            got = as_numpy(returned, output)
            assert got.shape == expected[output].shape, call
            assert output == "lse" or got.dtype == operands["q"].dtype, call
            with np.errstate(invalid="ignore"):
                error = np.where(got == expected[output], 0.0, np.abs(got.astype(np.float64) - expected[output]))
            assert (error <= allowed[output]).all(), (call, output, error.max(), allowed[output].min())
        agreed += 1
    assert (agreed > 0) == (dtype in COMPUTES[name])


@pytest.mark.parametrize("axis", "BTS")
@pytest.mark.parametrize("name", COMPUTES)
def test_axes_of_length_zero(name, axis):
    candidate = adapters.load(name)
    n = {"B": 2, "T": 3, "S": 4} | {axis: 0}
    q, k = np.ones((n["B"], 2, n["T"], D), np.float32), np.ones((n["B"], 2, n["S"], D), np.float32)
    operands = {"q": q, "k": k, "v": k}
    if axis in REFUSES_EMPTY[name]:
        with pytest.raises(Inexpressible):
            candidate.call(operands, {})
        return
    answer = candidate.call(operands, {})
    out = as_numpy(answer[0] if isinstance(answer, tuple) else answer, "out")
    assert out.shape == q.shape and not out.any()  # no element, or no key to average


@pytest.mark.parametrize("name", COMPUTES)
def test_the_name_carries_the_version_and_tables_match(name):
    candidate = adapters.load(name)
    version = importlib.metadata.version({"torch-flex": "torch"}.get(name, name))
    assert f" {version} " in candidate.name
    cannot = set(adapters._module(name).CANNOT)
    assert candidate.operands == adapters.OPERANDS - cannot
    assert candidate.params == adapters.PARAMS - cannot


# ---- the refusals are the systems' own: a version that can do more must be noticed ---------------------------------------------------


def test_torch_has_no_more_parameters():
    import torch

    spelled = torch.nn.functional.scaled_dot_product_attention.__doc__.strip().partition("(")[2].partition(")")[0]
    names = [part.partition("=")[0].strip() for part in spelled.split(",")]
    assert names == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


def test_flex_has_no_more_parameters_and_needs_keys():
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from refattn.adapters import torch_flex

    known = "query key value score_mod block_mask scale enable_gqa return_lse kernel_options return_aux"
    assert list(inspect.signature(flex_attention).parameters) == known.split()
    x = torch.zeros(1, 1, 2, 4)
    with torch_flex._eager(), pytest.raises(IndexError):
        flex_attention(x, x[:, :, :0], x[:, :, :0])


def test_jax_has_no_more_parameters_one_width_and_a_single_precision_softmax():
    import jax

    attend = jax.nn.dot_product_attention
    known = "query key value bias mask scale is_causal query_seq_lengths key_value_seq_lengths local_window_size implementation return_residual"
    assert list(inspect.signature(attend).parameters) == known.split()
    x = np.random.default_rng(0).standard_normal((1, 5, 1, 4))
    with pytest.raises(ValueError, match="value shape"):
        attend(x.astype(np.float32), x.astype(np.float32), x[..., :3].astype(np.float32))
    with jax.enable_x64(True):
        out = np.asarray(attend(*(adapters.converter("jax")(x),) * 3))
    assert out.dtype == np.float64
    assert np.abs(out - ra.attention(x, x, x, layout="BTHD")).max() > 2.0**-40


def test_mlx_has_no_more_parameters_and_a_single_precision_softmax():
    import mlx.core as mx

    attend = mx.fast.scaled_dot_product_attention
    spelled = attend.__doc__.partition("(")[2].partition(") ->")[0]
    names = [part.partition(":")[0].strip(" *") for part in spelled.split(",")]
    assert [n for n in names if n] == ["q", "k", "v", "scale", "mask", "sinks", "force_fused", "stream"]
    x = np.random.default_rng(0).standard_normal((1, 1, 5, 4))
    out = attend(*(adapters.converter("mlx")(x),) * 3, scale=0.5, stream=mx.cpu)
    assert np.abs(as_numpy(out, "out") - ra.attention(x, x, x)).max() > 2.0**-40


def test_onnxruntime_has_no_more_inputs_no_bfloat16_and_a_single_precision_scale():
    import onnx
    import onnxruntime

    schema = onnx.defs.get_schema("Attention", 25)
    assert [i.name for i in schema.inputs] == ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
    known = "is_causal kv_num_heads left_window_size q_num_heads qk_matmul_output_mode right_window_size scale softcap softmax_precision"
    assert sorted(schema.attributes) == known.split()

    def session(element):
        infos = [onnx.helper.make_tensor_value_info(n, element, list("bhtd")) for n in ("q", "k", "v", "out")]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Attention", ["q", "k", "v"], ["out"])], "g", infos[:3], infos[3:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        session(onnx.TensorProto.BFLOAT16)
    x = np.random.default_rng(0).standard_normal((1, 1, 5, 6))
    out = session(onnx.TensorProto.DOUBLE).run(None, dict.fromkeys("qkv", x))[0]
    assert np.abs(out - ra.attention(x, x, x)).max() > 2.0**-40


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_onnxruntime_takes_positive_scales_only(scale):
    x = np.ones((1, 1, 2, 4), np.float32)
    with pytest.raises(Inexpressible, match="positive"):
        adapters.load("onnxruntime").call({"q": x, "k": x, "v": x}, {"scale": scale})


def test_jax_refuses_rows_that_only_a_bias_empties():
    x = np.ones((1, 1, 3, 4), np.float32)
    bias = np.zeros((3, 3), np.float32)
    bias[1] = -np.inf
    jax = adapters.load("jax")
    with pytest.raises(Inexpressible, match="-inf"):
        jax.call({"q": x, "k": x, "v": x, "bias": bias}, {})
    bias[1, 0] = 0.0  # key 0 stays visible: a partial -inf is an ordinary mask
    np.testing.assert_array_equal(as_numpy(jax.call({"q": x, "k": x, "v": x, "bias": bias}, {"causal": True}), "out"), x)


def test_flex_puts_its_switch_back():
    import torch
    from torch.nn.attention import flex_attention as module

    assert torch is not None
    x = np.ones((1, 1, 2, 4), np.float32)
    before = module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    adapters.load("torch-flex").call({"q": x, "k": x, "v": x}, {})
    assert module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is before


def test_flex_without_a_way_to_ask_for_lse_is_unavailable(monkeypatch):
    from torch.nn.attention import flex_attention as module

    monkeypatch.delattr(module, "AuxRequest")
    with pytest.raises(ra.BackendUnavailableError, match=r"torch-flex: .* too old"):
        adapters.load("torch-flex")


# ---- converters ----------------------------------------------------------------------------------------------------------------------


def layouts(x):
    """The same kind of array at unkind strides."""
    read_only = x[:, ::2].view()
    read_only.flags.writeable = False
    yield from (x, x.T, x[::2, 1:], x[::-1], x[:, ::-1], read_only, np.broadcast_to(x[:1], (4, x.shape[1])), x[:0], x[:, :0], x[0, 0, ...])


@pytest.mark.parametrize("dtype", [*precision._FORMATS, "bool", "int64", "int32", "uint8", ">f4", ">f8", ">f2"])
@pytest.mark.parametrize("framework", COMPUTES)
def test_arrays_go_there_and_back_bit_for_bit(framework, dtype):
    convert = adapters.converter(framework)
    kind = np.dtype(precision._FORMATS.get(dtype, dtype))
    bits = np.random.default_rng(3).integers(0, 2 if kind == np.bool_ else 256, (5, 6 * kind.itemsize), np.uint8)
    x = np.ascontiguousarray(bits).view(kind)
    if dtype in NO_ARRAY.get(framework, ()):
        with pytest.raises(ra.DtypeError, match=dtype):
            convert(x)
        return
    for array in layouts(x):
        before = array.tobytes()
        there = convert(array)
        back = as_numpy(there, "x")
        assert back.shape == array.shape
        assert back.dtype == (array.dtype if framework == "numpy" else array.dtype.newbyteorder("="))
        assert (back.byteswap() if back.dtype.isnative != array.dtype.isnative else back).tobytes() == before
        assert array.tobytes() == before
        if framework == "torch" and array.size and array.dtype.isnative and all(step >= 0 for step in array.strides):
            assert [step * array.itemsize for step in there.stride()] == list(array.strides)


def test_a_read_only_array_is_never_handed_out_writable():
    x = np.zeros((2, 3), np.float32)
    x.flags.writeable = False
    tensor = adapters.converter("torch")(x)
    tensor += 1
    assert not x.any()


# ---- systems that need a GPU, through stand-ins that follow their documented signatures -------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch):
    import torch

    def attend(q, k, v, returns="out", **keywords):
        out = ra.attention(q, k, v, layout="BTHD", returns=returns, backend="definition", **keywords)
        return tuple(map(torch.from_numpy, out)) if isinstance(out, tuple) else torch.from_numpy(out)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, return_attn_probs=False):
        window = tuple(None if side == -1 else side for side in window_size)
        returns = ("out", "lse") if return_attn_probs else "out"
        answer = attend(q, k, v, returns, scale=softmax_scale, causal=causal, window=window, softcap=softcap or None)
        return (*answer, None) if return_attn_probs else answer

    @dataclass
    class LocalAttentionFromBottomRightMask:
        window_left: int
        window_right: int

    class LowerTriangularMask:
        pass

    class LowerTriangularFromBottomRightMask:
        pass

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        if query.ndim == 5:  # groups of query heads over expanded key-value heads
            q, k, v = (x.flatten(2, 3) for x in (query, key, value))
            bias = attn_bias.flatten(1, 2) if isinstance(attn_bias, torch.Tensor) else attn_bias
            return memory_efficient_attention(q, k, v, bias, p, scale).reshape(*query.shape[:4], -1)
        if isinstance(attn_bias, torch.Tensor):
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            return attend(query, key, value, scale=scale, bias=attn_bias, empty_rows="nan")
        causal = {LowerTriangularMask: "top_left", LowerTriangularFromBottomRightMask: True}.get(type(attn_bias), False)
        window = (attn_bias.window_left, attn_bias.window_right) if isinstance(attn_bias, LocalAttentionFromBottomRightMask) else None
        return attend(query, key, value, scale=scale, causal=causal, window=window, empty_rows="nan")

    kinds = {c.__name__: c for c in (LocalAttentionFromBottomRightMask, LowerTriangularMask, LowerTriangularFromBottomRightMask)}
    attn_bias = types.SimpleNamespace(**kinds)
    fakes = {
        "flash_attn": types.SimpleNamespace(__version__="0", flash_attn_func=flash_attn_func),
        "xformers": types.SimpleNamespace(__version__="0", __path__=[]),
        "xformers.ops": types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention, __path__=[]),
        "xformers.ops.fmha": types.SimpleNamespace(attn_bias=attn_bias),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_without_a_gpu_the_backend_is_unavailable(name, stand_ins, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ra.BackendUnavailableError, match=f"{name}: .*CUDA"):
        adapters.load(name)


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_gpu_adapters_translate_layout_masks_and_groups(name, stand_ins, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(adapters._module(name), "DEVICE", "cpu")
    candidate, agreed = adapters.load(name), 0
    for call in grid():
        operands = call.operands("float16")
        try:
            answer = candidate.call(operands, call.params)
        except Inexpressible:
            alone = not (call.causal or call.window or call.mask or call.bias)
            assert call.softcap or call.sinks or not alone or call.width != D, call
            continue
        expected = ra.attention(**operands, **call.params, **candidate.fixed, returns=candidate.returns, backend="definition")
        for got, want in zip(
            answer if isinstance(answer, tuple) else (answer,), expected if isinstance(expected, tuple) else (expected,), strict=True
        ):
            np.testing.assert_array_equal(as_numpy(got, "out"), want, err_msg=str(call))  # the stand-in is the definition: same bits
        agreed += 1
    assert agreed > 20


def test_bfloat16_has_the_bits_torch_means():
    import torch

    x = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    assert torch.equal(adapters.converter("torch")(x), torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
