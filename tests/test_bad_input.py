"""A malformed call raises the exception promised for it, says what is wrong in the caller's words, and never reaches a kernel."""

import re
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import refattn as ra
from refattn import BackendUnavailableError, CandidateError, DtypeError, OperandError, ParameterError, RefattnError, ShapeError, UnknownVariantError


def f32(*shape):
    return np.zeros(shape, np.float32)


def boolean(*shape):
    return np.ones(shape, bool)


#: B=2 Hq=4 Hkv=2 T=5 S=7 D=8 E=6
GOOD = {"q": f32(2, 4, 5, 8), "k": f32(2, 2, 7, 8), "v": f32(2, 2, 7, 6)}
Q, K, V = GOOD.values()
OUT = f32(2, 4, 5, 6)
READ_ONLY = np.broadcast_to(np.float32(0), OUT.shape)
STACKED = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), OUT.shape, (0, 0, 0, 0))
SHARED = f32(2 * 4 * 5 * 8 + 1)


class OnDevice:
    shape, dtype = (2, 4, 5, 8), "float32"

    def __dlpack__(self, **_):
        raise AssertionError("memory of a device was read")

    def __dlpack_device__(self):
        return (2, 0)


class OnlyCuda:
    __cuda_array_interface__: ClassVar = {"shape": (2, 4, 5, 8), "typestr": "<f4", "data": (0, False), "version": 3}


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise KeyError("lost")


class BrokenCapsule:
    def __dlpack__(self, **_):
        return "no capsule"

    def __dlpack_device__(self):
        return (1, 0)


class Negated:
    """As torch's tensors with a pending negation: NumPy is refused, and DLPack hands out the numbers without their sign."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("negative bit set")

    def __dlpack__(self, **_):
        return Q.__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)


class NamelessThing:
    def __repr__(self):
        raise RuntimeError


def retention(decay, **keywords):
    return ra.attend("retention", Q, f32(2, 2, 5, 8), f32(2, 2, 5, 6), np.array([0.5, decay], np.float32), **keywords)


#: Changes to a good call of softmax: what is passed instead, the exception, and what its text must hold.
CALLS = {
    # axes
    "q of three axes": ({"q": f32(4, 5, 8)}, ShapeError, ["q has 3 axes", r"\(4, 5, 8\)", "must have 4", "B Hq T D"]),
    "q of three axes, BTHD": ({"q": f32(4, 5, 8), "layout": "BTHD"}, ShapeError, ["q has 3 axes", "B T Hq D"]),
    "k of five axes": ({"k": f32(1, 2, 2, 7, 8)}, ShapeError, ["k has 5 axes", "must have 4", "B Hkv S D"]),
    "q a 0-d array": ({"q": np.array(1.0)}, ShapeError, ["q has 0 axes", r"shape \(\)", "B Hq T D"]),
    "q a NumPy scalar": ({"q": np.float32(1)}, ShapeError, ["q has 0 axes", "must have 4"]),
    "batches differ": ({"k": f32(3, 2, 7, 8)}, ShapeError, ["k has B=3", "q has B=2"]),
    "a batch of one is not broadcast": ({"k": f32(1, 2, 7, 8)}, ShapeError, ["k has B=1", "q has B=2"]),
    "key width": ({"k": f32(2, 2, 7, 9)}, ShapeError, ["k has D=9", "q has D=8"]),
    "lengths of keys and values": ({"v": f32(2, 2, 6, 6)}, ShapeError, ["v has S=6", "k has S=7"]),
    "heads of keys and values": ({"v": f32(2, 4, 7, 6)}, ShapeError, ["v has Hkv=4", "k has Hkv=2"]),
    "heads that do not divide": ({"q": f32(2, 5, 5, 8)}, ShapeError, ["Hkv=2", "does not divide", "Hq=5"]),
    "more key heads than query heads": ({"q": f32(2, 1, 5, 8)}, ShapeError, ["Hkv=2", "does not divide", "Hq=1"]),
    "no width": ({"q": f32(2, 4, 5, 0), "k": f32(2, 2, 7, 0)}, ShapeError, ["q has D=0", "at least 1"]),
    "no value width": ({"v": f32(2, 2, 7, 0)}, ShapeError, ["v has E=0", "at least 1"]),
    "no query heads": ({"q": f32(2, 0, 5, 8)}, ShapeError, ["q has Hq=0", "at least 1"]),
    "no key heads": ({"k": f32(2, 0, 7, 8), "v": f32(2, 0, 7, 6)}, ShapeError, ["k has Hkv=0", "at least 1"]),
    "the other layout": (
        {name: np.swapaxes(x, 1, 2) for name, x in GOOD.items()},
        ShapeError,
        ["k has Hkv=7", "does not divide q's Hq=5", "these shapes fit layout='BTHD'"],
    ),
    "BHTD shapes as BTHD": ({"layout": "BTHD"}, ShapeError, ["Hkv=7", "does not divide", "Hq=5", "these shapes fit layout='BHTD'"]),
    "mask of other keys": ({"mask": boolean(5, 6)}, ShapeError, ["mask has S=6", r"\(5, 6\)", "must be 1 or S=7"]),
    "mask of other queries": ({"mask": boolean(2, 1, 4, 7)}, ShapeError, ["mask has T=4", "must be 1 or T=5"]),
    "mask for key heads": ({"mask": boolean(2, 2, 5, 7)}, ShapeError, ["mask has Hq=2", "must be 1 or Hq=4"]),
    "mask of five axes": ({"mask": boolean(1, 2, 4, 5, 7)}, ShapeError, ["mask has 5 axes", "must have 4 or fewer", "B Hq T S"]),
    "bias of another batch": ({"bias": f32(3, 1, 1, 7)}, ShapeError, ["bias has B=3", "must be 1 or B=2"]),
    "sinks per key head": ({"sinks": f32(2)}, ShapeError, ["sinks has Hq=2", "q has Hq=4"]),
    "sinks of two axes": ({"sinks": f32(1, 4)}, ShapeError, ["sinks has 2 axes", "must have 1", "Hq"]),
    # what is no array, or of no use as one
    "a list": ({"q": Q.tolist()}, DtypeError, ["q is a list", "not an array"]),
    "a number": ({"k": 1.0}, DtypeError, ["k is a float", "not an array"]),
    "a string": ({"v": "v"}, DtypeError, ["v is a str", "not an array"]),
    "a dict": ({"v": {}}, DtypeError, ["v is a dict", "not an array"]),
    "a type": ({"v": np.ndarray}, DtypeError, ["v is a type", "not an array"]),
    "an array that cannot be read": ({"q": Unreadable()}, DtypeError, ["q: Unreadable could not be read", "lost"]),
    "an array whose DLPack leaves something out": ({"q": Negated()}, DtypeError, ["q: Negated could not be read", "negative bit"]),
    "a DLPack object without a capsule": ({"q": BrokenCapsule()}, DtypeError, ["q: BrokenCapsule could not be read"]),
    "a masked array": ({"k": np.ma.masked_invalid(K)}, DtypeError, ["k is a masked array", "would be ignored"]),
    "an array on a device": ({"q": OnDevice()}, BackendUnavailableError, ["q is on a device", "copy it to the host"]),
    "an array of CUDA only": ({"k": OnlyCuda()}, BackendUnavailableError, ["k is on a device", "copy it to the host"]),
    "whole numbers": ({"q": Q.astype(np.int32)}, DtypeError, ["q is int32", "float32"]),
    "complex numbers": ({"k": K.astype(np.complex64)}, DtypeError, ["k is complex64", "float32"]),
    "booleans": ({"v": V.astype(bool)}, DtypeError, ["v is bool", "float32"]),
    "objects": ({"q": Q.astype(object)}, DtypeError, ["q is object", "float32"]),
    "strings": ({"q": Q.astype(str)}, DtypeError, ["q is <U", "float32"]),
    "extended precision": ({"q": Q.astype(np.longdouble)}, DtypeError, [r"q is (float128|float96|float64)", "float32"]),
    "dates": ({"q": Q.astype("M8[s]")}, DtypeError, [r"q is datetime64\[s\]", "float32"]),
    "records": ({"q": np.zeros(Q.shape, [("re", "f4")])}, DtypeError, ["q is .*re", "float32"]),
    "formats without a common one": (
        {"q": Q.astype(np.float16), "k": K.astype(ml_dtypes.bfloat16), "v": V.astype(np.float16)},
        DtypeError,
        ["k bfloat16", "no common format", "q float16", "cast some"],
    ),
    "a mask of numbers to add": ({"mask": f32(5, 7)}, DtypeError, ["mask is float32", "must be boolean", "bias"]),
    "a mask of zeros and ones": ({"mask": np.ones((5, 7), np.int64)}, DtypeError, ["mask is int64", "must be boolean"]),
    "a boolean bias": ({"bias": boolean(5, 7)}, DtypeError, ["bias is bool", "float32"]),
    "a list of sinks": ({"sinks": [0.0] * 4}, DtypeError, ["sinks is a list", "not an array"]),
    # which operands
    "no v": ({"v": None}, OperandError, ["v missing", "q, k, v"]),
    "nothing": (dict.fromkeys("qkv"), OperandError, ["q, k, v missing"]),
    # parameters
    "unknown, close to one": ({"is_causal": True}, ParameterError, ["'is_causal'", "did you mean 'causal'"]),
    "unknown, close to an operand": ({"attn_mask": None}, ParameterError, ["'attn_mask'", "did you mean 'mask'"]),
    "unknown, a name of ours": ({"name": "softmax"}, ParameterError, ["'name'", "known are", "softcap"]),
    "unknown, close to none": ({"dropout_p": 0.0}, ParameterError, ["'dropout_p'", "known are", "softcap"]),
    "scale NaN": ({"scale": float("nan")}, ParameterError, ["scale=nan", "a finite number", "or None"]),
    "scale infinite": ({"scale": float("-inf")}, ParameterError, ["scale=-inf", "a finite number"]),
    "scale complex": ({"scale": 1j}, ParameterError, ["scale=1j", "a finite number"]),
    "scale a string": ({"scale": "0.5"}, ParameterError, ["scale='0.5'", "a finite number"]),
    "scale a boolean": ({"scale": True}, ParameterError, ["scale=True", "a finite number"]),
    "scale an array": ({"scale": np.ones(2)}, ParameterError, [r"scale=array\(\[1., 1.\]\)", "a finite number"]),
    "scale beyond any float": ({"scale": 10**400}, ParameterError, ["scale=<int>", "a finite number"]),
    "scale beyond printing": ({"scale": 10**5000}, ParameterError, ["scale=<int>", "a finite number"]),
    "scale without a name": ({"scale": NamelessThing()}, ParameterError, ["scale=<NamelessThing>", "a finite number"]),
    "softcap zero": ({"softcap": 0}, ParameterError, ["softcap=0", "above 0"]),
    "softcap minus zero": ({"softcap": -0.0}, ParameterError, ["softcap=-0.0", "above 0"]),
    "softcap negative": ({"softcap": -50.0}, ParameterError, ["softcap=-50.0", "above 0"]),
    "softcap NaN": ({"softcap": np.float32("nan")}, ParameterError, ["softcap=.*nan", "above 0"]),
    "causal another word": ({"causal": "bottom"}, ParameterError, ["causal='bottom'", "False, True, 'top_left'"]),
    "causal a number": ({"causal": 2}, ParameterError, ["causal=2", "False, True, 'top_left'"]),
    "causal 1": ({"causal": 1}, ParameterError, ["causal=1", "False, True, 'top_left'"]),
    "causal None": ({"causal": None}, ParameterError, ["causal=None", "False, True, 'top_left'"]),
    "causal a list": ({"causal": [True]}, ParameterError, [r"causal=\[True\]", "False, True, 'top_left'"]),
    "causal an array": ({"causal": np.array([True, False])}, ParameterError, ["causal=array", "False, True, 'top_left'"]),
    "empty_rows True": ({"empty_rows": np.True_}, ParameterError, ["empty_rows=.*True", "'zero', 'nan', 'uniform'"]),
    "window negative": ({"window": (-1, 0)}, ParameterError, [r"window=\(-1, 0\)", "from 0", "None for a side without limit"]),
    "window of three": ({"window": (1, 2, 3)}, ParameterError, [r"window=\(1, 2, 3\)", "a pair"]),
    "window of fractions": ({"window": (1.0, 0.0)}, ParameterError, [r"window=\(1.0, 0.0\)", "whole numbers"]),
    "window of booleans": ({"window": (True, False)}, ParameterError, [r"window=\(True, False\)", "whole numbers"]),
    "window a number": ({"window": 128}, ParameterError, ["window=128", "a pair"]),
    "window a string": ({"window": "64"}, ParameterError, ["window='64'", "a pair"]),
    "layout unknown": ({"layout": "BSHD"}, ParameterError, ["layout='BSHD'", "BHTD, BTHD"]),
    "layout an array": ({"layout": np.array(["BHTD", "BTHD"])}, ParameterError, ["layout=array", "BHTD, BTHD"]),
    "returns unknown": ({"returns": "outt"}, ParameterError, ["'outt'", "did you mean 'out'"]),
    "returns one unknown": ({"returns": ("out", "probs")}, ParameterError, ["'probs'", "known are out, lse, weights, scores"]),
    "returns nothing": ({"returns": ()}, ParameterError, ["returns is empty", "out, lse, weights, scores"]),
    "returns a number": ({"returns": 2}, ParameterError, ["returns=2", "out, lse, weights, scores"]),
    "returns numbers": ({"returns": [0]}, ParameterError, [r"returns=\[0\]", "out, lse, weights, scores"]),
    "returns a set": ({"returns": {"lse"}}, ParameterError, [r"returns=\{'lse'\}", "a tuple of names"]),
    "backend unknown": ({"backend": "gpu"}, ParameterError, ["no backend named 'gpu'", "did you mean 'cpu'"]),
    "backend None": ({"backend": None}, ParameterError, ["backend", "None", "cuda"]),
    "backend cuda": ({"backend": "cuda"}, BackendUnavailableError, ["'cuda'", "definition"]),
    "backend cpu": ({"backend": "cpu", "returns": "weights"}, BackendUnavailableError, ["'cpu'", "does not return weights", "definition"]),
    # out
    "out read-only": ({"out": READ_ONLY}, OperandError, ["out for out is read-only"]),
    "out of another shape": ({"out": f32(2, 4, 5, 8)}, ShapeError, [r"\(2, 4, 5, 8\)", r"must be \(2, 4, 5, 6\)", "B Hq T E"]),
    "out in BHTD for BTHD": (
        {**{name: np.swapaxes(x, 1, 2) for name, x in GOOD.items()}, "layout": "BTHD", "out": OUT},
        ShapeError,
        [r"\(2, 4, 5, 6\)", r"must be \(2, 5, 4, 6\)", "B T Hq E"],
    ),
    "out of another dtype": ({"out": OUT.astype(np.float64)}, DtypeError, ["out for out is float64", "must be float32"]),
    "out in the other byte order": ({"out": OUT.astype(OUT.dtype.newbyteorder())}, DtypeError, ["out for out is [<>]f4", "must be float32"]),
    "out a list": ({"out": [0.0]}, DtypeError, ["out for out is a float", "NumPy array"]),
    "out a device array": ({"out": OnDevice()}, DtypeError, ["out for out is a OnDevice", "NumPy array"]),
    "out a masked array": ({"out": np.ma.masked_invalid(OUT)}, DtypeError, ["out for out is a MaskedArray", "NumPy array"]),
    "out for one of two": ({"out": OUT, "returns": ("out", "lse")}, OperandError, ["out has 1 arrays for 2 outputs", "out, lse"]),
    "out for two of one": ({"out": (OUT, OUT)}, OperandError, ["out has 2 arrays for 1 outputs"]),
    "out over itself": ({"out": STACKED}, OperandError, ["out for out keeps several elements in one place"]),
    "out over q": (
        {"q": SHARED[1:].reshape(2, 4, 5, 8), "v": f32(2, 2, 7, 8), "out": SHARED[:-1].reshape(2, 4, 5, 8)},
        OperandError,
        ["out for out overlaps the memory of q"],
    ),
    "out twice the same": (
        {"out": (W := f32(2, 4, 5, 7), W[:, :, ::-1]), "returns": ("weights", "scores")},
        OperandError,
        ["out for scores overlaps the memory of out for weights"],
    ),
}

#: Calls that no change of keywords makes.
OTHER_CALLS = {
    "no such variant": (lambda: ra.attend("softmx", Q, K, V), UnknownVariantError, ["'softmx'", "did you mean 'softmax'"]),
    "no such variant, nothing near": (lambda: ra.attend("", Q, K, V), UnknownVariantError, ["''", "known are", "softmax"]),
    "an operand twice": (lambda: ra.attend("softmax", Q, K, V, k=K), OperandError, ["softmax: k is given twice"]),
    "too many operands": (lambda: ra.attend("softmax", *[Q] * 7), OperandError, ["softmax takes 6 operands", "q, k, v, bias, mask, sinks", "got 7"]),
    "too few operands": (lambda: ra.attend("softmax", Q), OperandError, ["softmax: k, v missing", "operands are q, k, v"]),
    "mask in the place of bias": (lambda: ra.attend("softmax", Q, K, V, boolean(5, 7)), DtypeError, ["softmax: bias is bool"]),
    "no such family": (lambda: ra.variants(family="scord"), UnknownVariantError, ["'scord'", "did you mean 'scored'"]),
    "gradients of nothing": (lambda: ra.gradients("softmax", Q, K, V), OperandError, ["softmax: no cotangent", "d_out", "d_lse"]),
    "gradients, other shape": (
        lambda: ra.gradients("softmax", Q, K, V, d_out=f32(2, 4, 7, 6)),
        ShapeError,
        ["softmax: d_out has T=7", "B Hq T E", "T=5"],
    ),
    "gradients, other axes": (lambda: ra.gradients("softmax", Q, K, V, d_lse=OUT), ShapeError, ["softmax: d_lse has 4 axes", "B Hq T"]),
    "gradients, whole numbers": (
        lambda: ra.gradients("softmax", Q, K, V, d_out=OUT.astype(int)),
        DtypeError,
        ["softmax: d_out is int64", "floating point"],
    ),
    "gradients, no such output": (
        lambda: ra.gradients("softmax", Q, K, V, d_out=OUT, d_weight=OUT),
        ParameterError,
        ["softmax", "'d_weight'"],
    ),
    "gradients on a backend that is not there": (
        lambda: ra.gradients("softmax", Q, K, V, d_out=OUT, backend="cuda"),
        BackendUnavailableError,
        ["softmax", "'cuda'"],
    ),
    "a decay above one": (lambda: retention(1.5), OperandError, ["retention: decay has values from 0.5 to 1.5", "from 0 to 1"]),
    "a decay below zero": (lambda: retention(-1e-9), OperandError, ["retention: decay has values from -1e-09 to 0.5", "from 0 to 1"]),
    "a decay NaN": (lambda: retention(np.nan), OperandError, ["retention: decay has values from nan", "from 0 to 1"]),
    "a state of another width": (
        lambda: retention(0.9, initial_state=f32(2, 2, 6, 8)),
        ShapeError,
        ["retention: initial_state has D=6", "q has D=8"],
    ),
    "tolerance, no such profile": (lambda: ra.tolerance("softmax", Q, K, V, profile="flsh"), UnknownVariantError, ["'flsh'", "did you mean 'flash'"]),
    "tolerance, a profile for another dtype": (
        lambda: ra.tolerance("softmax", Q, K, V, profile="flash-bf16"),
        ParameterError,
        ["'flash-bf16' is for bfloat16", "operands are float32"],
    ),
    "tolerance, a profile for no dtype": (
        lambda: ra.tolerance("softmax", Q, K, V, profile="flash-bf61"),
        DtypeError,
        ["'bf61'", "did you mean 'bf16'"],
    ),
    "compare, no such output": (lambda: ra.compare(OUT, "softmax", Q, K, V, returns="outt"), ParameterError, ["softmax", "did you mean 'out'"]),
    "compare, another shape": (
        lambda: ra.compare(Q, "softmax", Q, K, V),
        CandidateError,
        ["softmax: out", r"\(2, 4, 5, 8\)", r"must be \(2, 4, 5, 6\)", "B Hq T E"],
    ),
    "compare, one array for two": (
        lambda: ra.compare(OUT, "softmax", Q, K, V, returns=("out", "lse")),
        CandidateError,
        ["1 arrays for 2", "out, lse"],
    ),
    "compare, no array": (lambda: ra.compare("out", "softmax", Q, K, V), CandidateError, ["softmax: out is a str", "not an array"]),
    "compare, no such profile": (lambda: ra.compare(OUT, "softmax", Q, K, V, profile="x"), UnknownVariantError, ["'x'", "math, flash, eager"]),
    "check, no such suite": (lambda: ra.check(ra.attention, suite="quik"), UnknownVariantError, ["'quik'", "did you mean 'quick'"]),
    "check, no such profile": (lambda: ra.check(ra.attention, profile="x"), UnknownVariantError, ["'x'", "math, flash, eager"]),
    "check, no such dtype": (lambda: ra.check(ra.attention, dtype="bfloat61"), DtypeError, ["'bfloat61'", "did you mean 'bfloat16'"]),
    "check, whole numbers": (lambda: ra.check(ra.attention, dtype="int32"), DtypeError, ["'int32'", "float32"]),
    "check, no such framework": (lambda: ra.check(ra.attention, framework="torsch"), UnknownVariantError, ["'torsch'", "did you mean 'torch'"]),
    "check, no such adapter": (lambda: ra.check("tosch"), UnknownVariantError, ["'tosch'", "did you mean 'torch'"]),
    "check, no such module": (lambda: ra.check("no.such:thing"), CandidateError, ["no.such:thing", "could not be imported"]),
    "check, nothing to call": (lambda: ra.check(3), CandidateError, ["int", "must be callable"]),
    "check, no such parameter": (lambda: ra.check(ra.attention, causl=True), ParameterError, ["softmax", "'causl'", "did you mean 'causal'"]),
    "check, no such value": (lambda: ra.check(ra.attention, causal=2), ParameterError, ["softmax: causal=2", "'top_left'"]),
    "check, inputs that are too few": (lambda: ra.check(ra.attention, inputs={"q": Q}), OperandError, ["softmax: k, v missing"]),
    "check, inputs that do not fit": (lambda: ra.check(ra.attention, inputs={**GOOD, "v": f32(2, 2, 6, 6)}), ShapeError, ["v has S=6", "k has S=7"]),
    "check, inputs unknown": (lambda: ra.check(ra.attention, inputs={**GOOD, "z": Q}), ParameterError, ["softmax", "'z'", "q, k, v"]),
    "cost, an axis too few": (lambda: ra.cost("softmax", B=1, T=4), ShapeError, ["softmax: .*Hq", "missing", "B, Hq, T"]),
    "cost, no whole number": (lambda: ra.cost("softmax", B=1.5, Hq=3, T=4, D=4), ShapeError, ["softmax: B=1.5", "whole number"]),
    "cost, below zero": (lambda: ra.cost("softmax", B=-1, Hq=3, T=4, D=4), ShapeError, ["softmax: B=-1", "from 0"]),
    "cost, heads that do not divide": (lambda: ra.cost("softmax", B=1, Hq=3, Hkv=2, T=4, D=4), ShapeError, ["softmax: Hkv=2", "divide Hq=3"]),
    "cost, no such axis": (lambda: ra.cost("softmax", B=1, Hq=3, T=4, D=4, X=3), ParameterError, ["softmax", "'X'", "B, Hq, T"]),
}


@pytest.fixture
def no_kernel(monkeypatch):
    def kernel(*_):
        raise AssertionError("a malformed call reached a kernel")

    monkeypatch.setattr("refattn.definition.run", kernel)
    monkeypatch.setattr("refattn.definition.compiled", kernel)
    monkeypatch.setattr("refattn.engine.run.run", kernel)


def test_a_good_call_reaches_the_kernel_that_bad_ones_must_not(no_kernel):
    with pytest.raises(AssertionError, match="reached a kernel"):
        ra.attend("softmax", **GOOD)


@pytest.mark.parametrize("case", CALLS)
def test_a_malformed_call_of_softmax_says_what_is_wrong(no_kernel, case):
    changes, exception, fragments = CALLS[case]
    with pytest.raises(exception) as caught:
        ra.attend("softmax", **{**GOOD, **changes})
    assert type(caught.value) is exception
    assert re.match("softmax\\b", str(caught.value)) and "\n" not in str(caught.value)
    assert [f for f in fragments if not re.search(f, str(caught.value))] == []


@pytest.mark.parametrize("case", OTHER_CALLS)
def test_another_malformed_call_says_what_is_wrong(no_kernel, case):
    call, exception, fragments = OTHER_CALLS[case]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    assert [f for f in fragments if not re.search(f, str(caught.value))] == []


def test_a_bad_call_leaves_out_untouched():
    out = np.full(OUT.shape, 7, np.float32)
    with pytest.raises(BackendUnavailableError):
        ra.attend("softmax", **GOOD, out=out, backend="cuda")
    assert (out == 7).all()


KEYWORDS = ("q", "k", "v", "bias", "mask", "sinks", "scale", "softcap", "causal", "window", "empty_rows", "returns", "layout", "backend", "out")
ODD_THINGS = (
    *(Unreadable(), BrokenCapsule(), OnDevice(), OnlyCuda(), NamelessThing(), np.ndarray, float, len, ..., NotImplemented),
    *(10**400, -(10**5000), np.True_, np.int8(3), np.str_("x"), np.array(["a", "b"]), np.ma.masked, {"out"}, b"out", "\ud800", iter(())),
)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_an_odd_thing_in_any_place_is_refused_by_an_error_of_ours_or_understood(keyword):
    for thing in ODD_THINGS:
        _outcome({keyword: thing})


#: Anything a caller may pass by mistake, arrays that fit one of the tiny operands among them.
SHAPES = st.sampled_from([(), (0,), (1,), (2,), (1, 1), (2, 2), (1, 1, 1, 1), (1, 1, 1, 2), (1, 2, 1, 1), (1, 1, 2, 1), (0, 1, 1, 1), (1,) * 6])
DTYPES = ("f2", "f4", "f8", ">f4", "?", "i1", "u8", "c8", "O", "M8[s]", "S3", "U2", "V4", ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)
ARRAYS = st.builds(np.zeros, SHAPES, st.sampled_from(DTYPES)) | hnp.arrays("f4", SHAPES)
WORDS = st.sampled_from(["out", "lse", "weights", "BHTD", "BTHD", "top_left", "zero", "nan", "auto", "cuda"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text(max_size=3) | st.binary(max_size=3) | WORDS
TREES = st.recursive(SCALARS | ARRAYS, lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(WORDS, x, max_size=2), max_leaves=4)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYWORDS) | st.text(max_size=5), TREES, max_size=3))
def test_whatever_is_passed_nothing_but_errors_of_ours_comes_out(changes):
    _outcome(changes)


def _outcome(changes):
    tiny = dict.fromkeys("qkv", np.ones((1, 1, 1, 1), np.float32))
    try:
        results = ra.attend("softmax", **{**tiny, **changes})
    except RefattnError as problem:
        assert str(problem)
    else:
        assert all(isinstance(x, np.ndarray) for x in (results if isinstance(results, tuple) else (results,)))
