"""How an implementation is found, asked and heard: signatures, names, files, and answers that are no answers."""

import builtins
import functools
import types

import numpy as np
import planted
import pytest

import refattn as ra
from refattn.candidate import Candidate, Inexpressible
from refattn.catalog import variant
from refattn.oracle.candidates import candidate

pytestmark = pytest.mark.compiled

SOFTMAX = variant("softmax")


def kernel(q, k, v, **options):
    return planted.attend(planted.RIGHT, q, k, v, **options)[0]


def wrapped(function, **options):
    return candidate(function, SOFTMAX, **options)


def one_reason(report):
    assert not report.passed
    (reason,) = {c.reason for c in report.failures}
    return reason


# ---- signatures ----------------------------------------------------------------------------------------------------------------------


def test_only_what_a_function_takes_is_asked_of_it():
    def plain(q, k, v):
        return kernel(q, k, v)

    def some(q, k, v, mask=None, *, causal=False):
        return kernel(q, k, v, mask=mask, causal=causal)

    assert wrapped(plain).operands == {"q", "k", "v"} and wrapped(plain).params == set()
    assert wrapped(some).operands == {"q", "k", "v", "mask"} and wrapped(some).params == {"causal"}
    assert ra.check(plain, suite="quick").passed and ra.check(some, suite="quick").passed


def test_whoever_takes_any_keyword_is_asked_everything():
    def everything(q, k, v, **options):
        assert options.keys() <= {"bias", "mask", "sinks", "scale", "softcap", "causal", "window"}
        assert all(x is not None for x in options.values()), "what is absent is left out"
        return kernel(q, k, v, **options)

    report = ra.check(everything, suite="quick")
    assert report.passed
    assert {"bias", "mask", "sinks", "scale", "softcap", "causal", "window"} <= set(report.examined)


def test_a_parameter_without_default_is_always_given():
    seen = []

    def strict(q, k, v, scale, causal, window, softcap, sinks):
        seen.append((scale, causal, window, softcap, sinks is None))
        return kernel(q, k, v, scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks)

    report = ra.check(strict, suite="quick")
    assert report.passed and {"scale", "sinks"} <= set(report.examined)
    assert (12**-0.5, False, None, None, True) in seen, "an absent scale is worked out, what is absent otherwise is None"


def test_names_may_be_the_functions_own():
    def theirs(query, key, value, attn_mask=None, is_causal=False, sm_scale=None):
        return kernel(query, key, value, mask=attn_mask, causal=is_causal, scale=sm_scale)

    report = ra.check(theirs, suite="quick", rename={"mask": "attn_mask", "causal": "is_causal", "scale": "sm_scale"})
    assert report.passed and {"mask", "causal", "scale"} <= set(report.examined)
    assert "mask" not in ra.check(theirs, suite="quick").examined


@pytest.mark.parametrize(
    "rename, says",
    [
        ({"cuasal": "is_causal"}, "rename has 'cuasal', which is no operand or parameter of softmax"),
        ({"causal": "is_cuasal"}, "takes no 'is_cuasal', which rename says it calls causal"),
        (["causal"], "rename has"),
    ],
)
def test_a_rename_that_means_nothing_is_refused(rename, says):
    with pytest.raises(ra.CandidateError, match=says):
        ra.check(lambda q, k, v, is_causal=False: q, rename=rename)


def test_a_builtin_that_tells_nothing_of_its_signature_is_given_its_operands():
    class Silent:
        __signature__ = "none"

        def __call__(self, *operands):
            assert len(operands) == 3
            return kernel(*operands)

    assert wrapped(Silent()).params == set()
    assert ra.check(Silent(), suite="quick").passed
    assert "raised" in {c.outcome for c in ra.check(builtins.max, suite="quick").cases}


def test_methods_partials_and_objects_are_functions_too():
    class Model:
        def attend(self, q, k, v, causal=False):
            return kernel(q, k, v, causal=causal)

        __call__ = attend

    for function in (Model().attend, Model(), functools.partial(kernel, softcap=None)):
        assert ra.check(function, suite="quick").passed
    assert "softcap" not in ra.check(functools.partial(kernel, softcap=2.0), suite="quick", softcap=2.0).unexamined


def test_a_fixed_parameter_is_what_the_function_does_of_itself():
    def always_causal(q, k, v):
        return kernel(q, k, v, causal=True)

    assert ra.check(always_causal, suite="quick", causal=True).passed
    assert not ra.check(always_causal, suite="quick").passed


def test_positional_only_operands_work():
    def short(q, k, v, /, scale=None):
        return kernel(q, k, v, scale=scale)

    assert ra.check(short, suite="quick").passed


# ---- answers ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [NotImplementedError("no odd lengths"), Inexpressible("no odd lengths")])
def test_a_call_may_be_declined(refusal):
    def even_only(q, k, v):
        if q.shape[2] % 2:
            raise refusal
        return kernel(q, k, v)

    report = ra.check(even_only)
    assert report.passed and set(report.declined) == {"no odd lengths"}


def test_declining_everything_is_an_error_and_no_pass():
    def never(q, k, v):
        raise NotImplementedError("not today")

    with pytest.raises(ra.CandidateError, match="could not be asked a single call of softmax in float32: not today"):
        ra.check(never)


def test_an_exception_fails_the_call_and_is_quoted():
    def picky(q, k, v):
        assert k.shape[2] % 2 == 0, "keys must come in pairs"
        return kernel(q, k, v)

    report = ra.check(picky, suite="quick")
    assert one_reason(report) == "AssertionError: keys must come in pairs"
    assert {c.outcome for c in report.failures} == {"raised"}


@pytest.mark.parametrize(
    "answer, says",
    [
        (lambda out: out.swapaxes(1, 2), "must be"),
        (lambda out: out[..., None], "must be"),
        (lambda out: (out, out), 'it returned 2 arrays for 1 outputs (out); say what it returns: returns=("out", ...)'),
        (lambda out: (), "it returned 0 arrays for 1 outputs (out)"),
        (lambda out: None, "out is a NoneType, not an array"),
        (lambda out: out.astype(np.int32), "out is int32; must be floating point"),
        (lambda out: out.astype(complex), "out is complex128; must be floating point"),
        (np.ma.masked_array, "out is a masked array"),
    ],
)
def test_an_answer_of_another_form_is_malformed(answer, says):
    report = ra.check(lambda q, k, v: answer(kernel(q, k, v)), suite="quick")
    reasons = {c.reason for c in report.failures}
    assert not report.passed and {c.outcome for c in report.failures} == {"malformed"}
    assert any(says in reason for reason in reasons)


def test_a_wider_answer_is_judged_as_the_format_that_was_asked_for():
    assert ra.check(lambda q, k, v: kernel(*(x.astype(np.float32) for x in (q, k, v))), dtype="bfloat16", suite="quick").passed
    assert not ra.check(lambda q, k, v: kernel(q, k, v).astype(np.float16), dtype="float32", suite="quick").passed


def test_operands_that_were_written_to_fail_whatever_the_answer():
    def careless(q, k, v):
        out = kernel(q, k, v)
        k[...] = 0
        return out

    assert one_reason(ra.check(careless, suite="quick")) == "it wrote into its operand k"


def test_several_outputs_are_judged_under_their_names():
    def both(q, k, v, causal=False):
        return planted.attend(planted.RIGHT, q, k, v, causal=causal)

    assert ra.check(both, suite="quick", returns=("out", "lse")).passed
    assert not ra.check(both, suite="quick").passed, "two arrays for one output"
    assert ra.check(lambda q, k, v: both(q, k, v)[1], suite="quick", returns="lse").passed
    assert not ra.check(lambda q, k, v: both(q, k, v)[::-1], suite="quick", returns=("out", "lse")).passed
    with pytest.raises(ra.CandidateError, match="is said to return 'lze'; softmax returns out, lse, weights, scores"):
        ra.check(both, returns=("out", "lze"))


# ---- strings and ready candidates --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text(
        "import numpy as np\nimport beside\n\n\ndef attention(q, k, v):\n    return beside.attention(q, k, v)\n\n\n"
        "class Model:\n    def forward(self, q, k, v):\n        return beside.attention(q, k, v)\n\n\nmodel = Model()\nnumber = 3\n"
    )
    (tmp_path / "beside.py").write_text(
        "import numpy as np\n\n\ndef attention(q, k, v):\n    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))\n"
        "    s = q @ k.swapaxes(2, 3) * np.float32(q.shape[3] ** -0.5)\n    p = np.exp(s - s.max(-1, keepdims=True, initial=-1e30))\n"
        "    t = p.sum(-1, keepdims=True)\n    return p @ v / np.where(t > 0, t, np.float32(1))\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", ["good.py:attention", "./good.py:model.forward", "good:attention", "beside:attention"])
def test_a_function_is_found_in_a_file_or_a_module(files, target):
    assert ra.check(target, suite="quick").passed
    assert ra.check(str(files / "good.py") + ":attention", suite="quick").passed


@pytest.mark.parametrize(
    "target, says",
    [
        ("nowhere.py:attention", "there is no file nowhere.py"),
        ("good.py:atention", "good.py has no 'atention'; its functions are attention"),
        ("good.py:number", "good.py:number is a int; it must be callable"),
        ("good.py", "which function\\? Say good.py:FUNCTION"),
        ("broken.py:attention", "broken.py could not be run: ModuleNotFoundError"),
        ("script.py:attention", "script.py could not be run: SystemExit: 3"),
        ("nothing_of_that_name:attention", "module nothing_of_that_name could not be imported"),
        ("numpy:nothing.at.all", "numpy has no 'nothing.at.all'"),
    ],
)
def test_a_target_that_is_not_there_is_an_error_that_says_so(files, target, says):
    with pytest.raises(ra.CandidateError, match=says):
        ra.check(target)


def test_an_adapter_is_named_and_its_typing_errors_are_guessed():
    assert ra.check("numpy", suite="quick").passed
    with pytest.raises(ra.UnknownVariantError, match="no adapter named 'nunpy'; did you mean 'numpy'"):
        ra.check("nunpy")
    with pytest.raises(ra.UnknownVariantError, match="no adapter named 'torhc'; did you mean 'torch'"):
        ra.check(kernel, framework="torhc")


@pytest.mark.parametrize("options", [{"returns": "lse"}, {"framework": "torch"}, {"rename": {"causal": "c"}}])
def test_options_for_functions_are_refused_where_they_would_be_ignored(options):
    for target in ("numpy", planted.candidate(planted.RIGHT)):
        with pytest.raises(ra.CandidateError, match="says itself what it takes and returns"):
            ra.check(target, **options)


def test_a_candidate_made_by_hand_keeps_its_variant_and_its_ways():
    made = Candidate("mine", lambda o, p: kernel(**o), frozenset({"q", "k", "v"}), fixed={"causal": False})
    assert ra.check(made, suite="quick").passed
    with pytest.raises(ra.CandidateError, match="mine computes softmax, not luong_dot"):
        ra.check(made, "luong_dot")


@pytest.mark.parametrize("target", [3, None, "", types.SimpleNamespace()])
def test_what_cannot_be_called_is_no_candidate(target):
    with pytest.raises(ra.RefattnError):
        ra.check(target)


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"suite": "fast"}, ra.UnknownVariantError, "no suite named 'fast'"),
        ({"dtype": "float31"}, ra.DtypeError, "did you mean 'float32'"),
        ({"profile": "flush"}, ra.UnknownVariantError, "no profile named 'flush'; did you mean 'flash'"),
        ({"profile": "flash-bf16"}, ra.ParameterError, "is for bfloat16, but the operands are float32"),
        ({"seed": -1}, ra.ParameterError, "seed=-1"),
        ({"scale": "big"}, ra.ParameterError, "scale='big'"),
        ({"casual": True}, ra.ParameterError, "did you mean 'causal'"),
        ({"inputs": [1]}, ra.OperandError, "inputs is a list"),
        ({"inputs": {"q": np.ones(3)}}, ra.OperandError, "k, v missing"),
        ({"inputs": {"x": np.ones(3)}}, ra.ParameterError, "no operand named 'x'"),
        ({"inputs": dict.fromkeys("qkv", "text")}, ra.DtypeError, "q is a str, not an array"),
        ({"inputs": dict.fromkeys("qkv", np.ones((1, 1, 2, 2), int))}, ra.DtypeError, "q is int64"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_asked(options, error, says):
    asked = []
    with pytest.raises(error, match=says):
        ra.check(lambda q, k, v: asked.append(1), **options)
    assert not asked


def test_given_operands_are_asked_as_they_are_and_with_every_parameter():
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((1, h, m, 4)) for n, h, m in (("q", 2, 3), ("k", 1, 5), ("v", 1, 5))}
    shapes = set()

    def spy(q, k, v, causal=False, scale=None):
        shapes.add((q.shape, k.shape, q.dtype.name, causal, scale))
        return kernel(q, k, v, causal=causal, scale=scale)

    report = ra.check(spy, inputs=inputs, dtype="float32")
    assert report.passed and report.suite == ""
    assert shapes == {((1, 2, 3, 4), (1, 1, 5, 4), "float32", causal, scale) for causal, scale in ((False, None), (True, None), (False, 0.37))}


@pytest.mark.peer
def test_a_torch_function_is_given_tensors():
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def attention(q, k, v, mask=None, scale=None):
        assert all(isinstance(x, torch.Tensor) for x in (q, k, v)) and (mask is None or mask.dtype == torch.bool)
        return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    for dtype in ("float32", "bfloat16"):
        report = ra.check(attention, framework="torch", dtype=dtype)
        assert report.passed and {"mask", "scale"} <= set(report.examined)
    wrong = ra.check(lambda q, k, v: sdpa(q, k, v, scale=1.0, enable_gqa=True), framework="torch")
    assert not wrong.passed


@pytest.mark.peer
def test_operands_of_a_framework_are_read_where_they_are_given():
    import torch

    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.bfloat16) for n in (3, 5, 5))
    assert ra.check("torch", inputs={"q": q, "k": k, "v": v}, dtype="bfloat16").passed
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ra.assert_matches(out, "softmax", q, k, v)
    with pytest.raises(AssertionError):
        ra.assert_matches(out + 0.1, "softmax", q, k, v)
