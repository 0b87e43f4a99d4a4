"""Gradients are exact, their tolerances hold for a backward pass rounded step by step and are not far above it, and wrong ones are found."""

import collections
import json

import backward
import numpy as np
import planted
import pytest

import refattn as ra
from refattn import catalog, definition, derivatives
from refattn.candidate import Candidate, Inexpressible
from refattn.oracle import candidates, judge, probes, profiles
from refattn.oracle.gradients import backpropagated
from refattn.oracle.tolerance import tolerances
from refattn.precision import as_dtype, round_to
from refattn.problem import bind

pytestmark = pytest.mark.compiled

SOFTMAX = catalog.variant("softmax")
F32 = np.dtype(np.float32)


def normal(rng, n):
    shapes = (1, 2, min(n, 128), 32), (1, 1, n, 32), (1, 1, n, 32), (1, 2, min(n, 128), 32)
    return tuple(rng.standard_normal(shape) for shape in shapes)


def peaked(rng, n):
    q, k, v, d_out = normal(rng, n)
    return 8 * q, k, v, d_out


def one_signed(rng, n):
    q, k, v, d_out = normal(rng, n)
    return q, k, np.abs(v) + 0.5, d_out + 1


def equal_queries(rng, n):
    q, k, v, d_out = normal(rng, n)
    return np.broadcast_to(q[:, :, :1], q.shape), k, v, np.broadcast_to(d_out[:, :, :1], d_out.shape)


def all_equal(rng, n):
    return tuple(np.broadcast_to(x[:, :, :1], x.shape) for x in normal(rng, n))


def drawn(data, n, dtype, seed=0):
    q, k, v, d_out = (round_to(np.ascontiguousarray(x), as_dtype(dtype)) for x in data(np.random.default_rng(seed), n))
    return (q, k, v), d_out


def ratios(got, operands, d_out, **params):
    names = tuple(got)
    report = ra.compare(tuple(got.values()), "softmax", *operands, d_out=d_out, returns=names, **params)
    return {name: float(x.max()) for name, x in report.cases[0].ratios.items()}


# ---- exact ------------------------------------------------------------------------------------------------------------------------------


def small(rng, **optional):
    shapes = {"q": (2, 4, 5, 3), "k": (2, 2, 7, 3), "v": (2, 2, 7, 4)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()} | optional


RNG = np.random.default_rng(3)
COMPOSED = {
    "plain": ({}, {}),
    "causal and windowed": ({}, {"causal": True, "window": (2, 1)}),
    "top-left, so that rows are empty": ({}, {"causal": "top_left", "window": (0, 0)}),
    "capped": ({}, {"softcap": 0.7, "causal": True}),
    "scaled": ({}, {"scale": -1.3}),
    "sinks and a mask": ({"sinks": RNG.standard_normal(4), "mask": RNG.random((2, 1, 5, 7)) < 0.4}, {}),
    "a bias by heads": ({"bias": RNG.standard_normal((4, 1, 7))}, {"softcap": 2.0}),
    "a bias by queries that hides": ({"bias": np.where(RNG.random((5, 1)) < 0.3, -np.inf, 0.5)}, {}),
    "one bias": ({"bias": np.array(0.3)}, {}),
    "empty rows are means": ({"mask": RNG.random((1, 4, 5, 7)) < 0.2}, {"empty_rows": "uniform"}),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_the_formulas_are_the_definitions_gradients(name):
    optional, params = COMPOSED[name]
    rng = np.random.default_rng(1)
    call = bind(SOFTMAX, (), {**small(rng, **optional), **params}, ["out", "lse"])
    truth = definition.run(call)
    cotangents = {n: rng.standard_normal(truth[n].shape) for n in call.returns}
    exact, numerical = backpropagated(call, truth, cotangents), derivatives.gradients(call, cotangents)
    allowed = tolerances(call, truth, profiles.resolve("math", np.dtype(np.float64)), backward=exact)
    assert not exact.errors and exact.values.keys() == numerical.values.keys()
    for n, x in numerical.values.items():
        assert np.all(np.abs(exact.values[n] - x) <= allowed[n] + numerical.errors[n]), n
        assert exact.values[n].shape == allowed[n].shape == call.given[n[2:]].shape


def test_sequences_have_the_gradients_and_tolerances_of_each():
    rng = np.random.default_rng(0)
    layout = ra.Packed(np.array([0, 3, 8]), np.array([0, 4, 10]))
    q, k, v, d_out = (rng.standard_normal((n, h, 8)).astype(np.float32) for n, h in ((8, 4), (10, 2), (10, 2), (8, 4)))
    found = ra.tolerance("softmax", q, k, v, d_out=d_out, layout=layout, causal=True)
    for queries, keys in ((slice(0, 3), slice(0, 4)), (slice(3, 8), slice(4, 10))):
        one = ra.tolerance("softmax", *(x[None] for x in (q[queries], k[keys], v[keys])), d_out=d_out[None, queries], layout="BTHD", causal=True)
        for name, rows in (("d_q", queries), ("d_k", keys), ("d_v", keys)):
            np.testing.assert_allclose(getattr(found, name)[rows], getattr(one, name)[0], rtol=0.1)  # fewer elements, a smaller spread
    grads = ra.gradients("softmax", q, k, v, d_out=d_out, layout=layout, causal=True)
    assert ra.compare(tuple(grads), "softmax", q, k, v, d_out=d_out, layout=layout, causal=True, returns=grads._fields).passed


# ---- tolerances hold, and are worth having ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [normal, peaked, one_signed, equal_queries, all_equal])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_errors_of_a_tiled_backward_pass_stay_within_the_tolerance_and_within_reach_of_it(dtype, data):
    largest = {}
    for n, seeds in ((96, 4), (700, 1)):
        for seed in range(seeds):
            operands, d_out = drawn(data, n, dtype, seed)
            for name, r in ratios(backward.gradients(*operands, d_out=d_out, tile=64), operands, d_out).items():
                assert r < 1, (name, n, seed)
                largest[name] = max(largest.get(name, 0.0), r)
    assert data is all_equal or min(largest.values()) > 0.02, f"a tolerance nothing comes near: {largest}"  # equal keys and values: dS is 0


@pytest.mark.parametrize("data", [normal, peaked, equal_queries])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_worst_case_holds_alone_and_is_never_below_the_tolerance(monkeypatch, dtype, data):
    operands, d_out = drawn(data, 300, dtype)
    usual = ra.tolerance("softmax", *operands, d_out=d_out)
    monkeypatch.setattr("refattn.oracle.tolerance.spread", lambda count, alpha: 1e9)
    certain = ra.tolerance("softmax", *operands, d_out=d_out)
    pairs = [(getattr(usual, name), getattr(certain, name)) for name in ("d_q", "d_k", "d_v")]
    assert all(np.all(few <= many) for few, many in pairs) and any(np.any(few < many) for few, many in pairs)
    assert max(ratios(backward.gradients(*operands, d_out=d_out), operands, d_out).values()) < 1


def test_partial_sums_larger_than_their_end_are_allowed_for():
    """dS of the first half of the keys is positive, of the second negative, and the keys are all alike: d_q is small, what it goes through is not."""
    rng = np.random.default_rng(0)
    n = 3000
    q = np.zeros((1, 1, 8, 8), np.float32)
    k = (1 + 0.1 * rng.random((1, 1, n, 8))).astype(np.float32)
    v = np.where(np.arange(n)[:, None] < n // 2, 1.0, -1.0).astype(np.float32)[None, None] + np.zeros((1, 1, n, 8), np.float32)
    d_out = rng.standard_normal((1, 1, 8, 8)).astype(np.float32)
    p = np.float32(1 / n)
    delta = (d_out * (p * v).sum(2, dtype=np.float32)[:, :, None]).sum(-1)
    d_s = p * (d_out @ np.swapaxes(v, -1, -2) - delta[..., None])
    d_q = np.zeros_like(q)
    for j in range(n):
        d_q += d_s[..., j, None] * k[:, :, j, None]
    assert ratios({"d_q": d_q * np.float32(8**-0.5)}, (q, k, v), d_out)["d_q"] < 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_more_is_allowed_to_whoever_rounds_more(dtype):
    operands, d_out = drawn(normal, 60, dtype)
    found = [ra.tolerance("softmax", *operands, d_out=d_out, profile=name) for name in ("math", "flash", "eager")]
    for name in ("d_q", "d_k", "d_v"):
        math_, flash, eager = (getattr(x, name).mean() for x in found)
        assert math_ < flash < eager, name


def test_a_variant_without_a_formula_is_differentiated_and_bounded_by_how_it_bends():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, 2, n, 3)).astype(np.float32) for n in (3, 4, 4, 3))
    grads = ra.gradients("sigmoid", q, k, v, d_out=d_out)
    report = ra.compare(tuple(grads), "sigmoid", q, k, v, d_out=d_out, returns=grads._fields)
    assert report.passed and report.worst.ratio > 0
    assert not ra.compare(grads.d_k * np.float32(1.001), "sigmoid", q, k, v, d_out=d_out, returns="d_k").passed


# ---- judging ------------------------------------------------------------------------------------------------------------------------------


def planted_gradients(change=None):
    def call(operands, params, cotangents):
        return backward.gradients(**operands, **params, **{"d_" + n: x for n, x in cotangents.items()}, change=change)

    return Candidate("planted", planted.candidate(planted.RIGHT).call, planted.OPERANDS, planted.PARAMS, ("out", "lse"), gradients=call,
                     cotangents=("out", "lse"))  # fmt: skip


def failures(candidate, dtype="float32", suite="quick", profile=None, seed=0, **params):
    """Names of outputs and gradients that differ in some call."""
    how = profiles.resolve(profile, as_dtype(dtype))
    asked = probes.suite(suite, SOFTMAX, candidate, as_dtype(dtype), params, seed).probes
    cases = [judge.judge(SOFTMAX, candidate, p, how, 1e-5) for p in asked if p.decides]
    assert {c.outcome for c in cases} <= {"agrees", "differs", "declined"}
    assert sum(c.outcome != "declined" and not c.refused for c in cases) > 3
    return {name for c in cases for name, x in c.ratios.items() if np.any(x > 1)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_right_backward_pass_is_right_in_every_call(dtype):
    assert not failures(planted_gradients(), dtype, "quick" if dtype == "float32" else "standard")


FAULTS = {
    "D is left out": ({"delta": np.zeros_like}, {"d_q", "d_k"}),
    "D of another row": ({"delta": lambda x: np.roll(x, 1, axis=-1)}, {"d_q", "d_k"}),
    "the first head of a group only": ({"group": lambda x: x / 2}, {"d_k", "d_v"}),
    "no slope of the soft-cap": ({"slope": np.ones_like}, {"d_q", "d_k"}),
    "d_q is not scaled": ({"d_q": lambda x: x * np.sqrt(np.float32(x.shape[-1]))}, {"d_q"}),
    "weights by base two": ({"p": lambda x: x ** np.float32(np.log(2))}, {"d_q", "d_k", "d_v"}),
    "d_q in float16": ({"d_q": lambda x: x.astype(np.float16).astype(np.float32)}, {"d_q"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backward_pass_is_found_in_the_gradients_it_spoils(fault):
    changes, spoiled = FAULTS[fault]
    found = failures(planted_gradients(lambda name, x: changes[name](x) if name in changes else x))
    assert spoiled <= found and not found & {"out", "lse"}
    assert spoiled == found or "delta" in changes or "p" in changes or "slope" in changes


def test_a_cotangent_of_lse_that_is_dropped_is_found():
    right = planted_gradients()

    def dropping(operands, params, cotangents):
        return right.gradients(operands, params, {"out": cotangents.get("out", np.zeros((*operands["q"].shape[:3], operands["v"].shape[3]), F32))})

    dropped = Candidate("dropped", right.call, right.operands, right.params, right.returns, gradients=dropping, cotangents=("out", "lse"))
    assert {"d_q", "d_k"} <= failures(dropped)


def kernel(q, k, v, causal=False):
    return planted.attend(planted.RIGHT, q, k, v, causal=causal)[0]


def kernel_gradients(q, k, v, causal=False, *, d_out):
    return backward.gradients(q, k, v, causal=causal, d_out=d_out)


Grads = collections.namedtuple("Grads", "d_q d_k d_v")


@pytest.mark.parametrize("form", [dict, lambda g: Grads(**g), lambda g: tuple(g.values()), lambda g: list(g.values())])
def test_gradients_come_by_name_or_in_order(form):
    report = ra.check(kernel, suite="quick", gradients=lambda q, k, v, *, d_out, causal=False: form(kernel_gradients(q, k, v, causal, d_out=d_out)))
    assert report.passed and "gradients" in report.examined
    assert {"out", "d_q", "d_k", "d_v"} == set.union(*(set(c.ratios) for c in report.cases))


def asked(gradients, **operands):
    """One judged call."""
    rng = np.random.default_rng(0)
    made = candidates.candidate(kernel, SOFTMAX, gradients=gradients)
    x = {n: rng.standard_normal((1, 1, m, 4)).astype(np.float32) for n, m in (("q", 3), ("k", 5), ("v", 5))}
    probe = probes.Probe("one", x, {}, cotangents={"out": rng.standard_normal((1, 1, 3, 4)).astype(np.float32)})
    return judge.judge(SOFTMAX, made, probe, profiles.resolve(None, F32), 1e-3)


@pytest.mark.parametrize(
    "answer, says",
    [
        (lambda g: tuple(g.values())[:2], "2 gradients for 3 real operands (d_q, d_k, d_v); name them in a mapping"),
        (lambda g: {**g, "dq": g["d_q"]}, "a gradient named 'dq'; expected are d_q, d_k, d_v"),
        (lambda g: {**g, "d_k": g["d_q"]}, "d_k has shape (1, 1, 3, 4); must be (1, 1, 5, 4), that of k"),
        (lambda g: {**g, "d_v": g["d_v"].astype(int)}, "must be floating point"),
        (lambda g: {}, "it returned no gradient"),
    ],
)
def test_gradients_of_another_form_are_malformed(answer, says):
    case = asked(lambda q, k, v, *, d_out: answer(kernel_gradients(q, k, v, d_out=d_out)))
    assert case.outcome == "malformed" and says in case.reason


def test_a_backward_pass_may_decline_raise_and_must_not_write():
    def declines(q, k, v, *, d_out):
        raise Inexpressible("no odd lengths")

    def raises(q, k, v, *, d_out):
        raise ZeroDivisionError("oh")

    def writes(q, k, v, *, d_out):
        d_out[...] = 0
        return {"d_q": q}

    case = asked(declines)
    assert (case.outcome, case.refused, set(case.ratios)) == ("agrees", "no odd lengths", {"out"})
    assert (asked(raises).outcome, asked(raises).reason) == ("raised", "ZeroDivisionError: oh")
    assert asked(writes).reason == "it wrote into its operand d_out"


def test_what_is_not_given_is_said_to_be_unexamined():
    calls = []

    def partial(q, k, v, *, d_out):
        if not calls:
            calls.append(q.shape)
            raise NotImplementedError("not yet")
        return {"d_q": kernel_gradients(q, k, v, d_out=d_out)["d_q"], "d_k": None}

    report = ra.check(kernel, suite="quick", gradients=partial, causal=False)
    assert report.passed
    assert report.unexamined["d_v"] == report.unexamined["d_k"] == "it returned no such gradient"
    assert report.unexamined["gradients of 1 calls"] == "not yet"


def test_a_parameter_the_backward_pass_does_not_take_is_not_asked_of_it():
    report = ra.check(kernel, suite="quick", gradients=lambda q, k, v, *, d_out: kernel_gradients(q, k, v, d_out=d_out))
    assert report.passed and any("takes no causal" in reason for reason in report.unexamined.values())


@pytest.mark.parametrize(
    "options, says",
    [
        ({"gradients": 3}, "gradients is a int; it must be callable, or True"),
        ({"gradients": lambda q, k, v: None}, "takes no d_out, the cotangent"),
        ({"gradients": True}, "numpy differentiates nothing"),
        ({"gradients": "nowhere.py:f"}, "there is no file nowhere.py"),
    ],
)
def test_a_backward_pass_that_is_none_is_refused(options, says):
    with pytest.raises(ra.CandidateError, match=says):
        ra.check(kernel, suite="quick", **options)


def test_an_adapter_without_gradients_says_so_and_others_are_only_asked_when_that_is_wanted():
    with pytest.raises(ra.CandidateError, match="no gradients that could be asked for"):
        ra.check("numpy", gradients=True)
    assert not any(c.probe.cotangents for c in ra.check("numpy", suite="quick").cases)


def test_cotangents_may_have_names_of_their_own():
    report = ra.check(
        kernel,
        suite="quick",
        rename={"d_out": "upstream"},
        gradients=lambda q, k, v, causal=False, *, upstream: kernel_gradients(q, k, v, causal, d_out=upstream),
    )
    assert report.passed and "gradients" in report.examined


def test_every_deciding_call_and_kind_of_cotangent_is_asked():
    asked = probes.suite("standard", SOFTMAX, planted_gradients(), F32, {}).probes
    without = probes.suite("standard", SOFTMAX, planted.candidate(planted.RIGHT), F32, {}).probes
    assert [p.title for p in asked[: len(without)]] == [p.title for p in without]
    for p, q in zip(asked, without, strict=False):
        assert all(np.array_equal(p.operands[n], x, equal_nan=True) for n, x in q.operands.items())
        assert bool(p.cotangents) == p.decides
    kinds = {p.title: p.cotangents["out"] for p in asked[len(without) :]}
    assert kinds.keys() == {"d_out zero", "d_out one", "d_out ones", "d_out proportional to out", "d_out strided"}
    assert np.count_nonzero(kinds["d_out one"]) == 1 and not np.any(kinds["d_out zero"]) and not kinds["d_out strided"].flags.c_contiguous


def test_large_hidden_values_leave_room_for_their_products_in_float16():
    asked = probes.suite("quick", SOFTMAX, planted_gradients(), np.dtype(np.float16), {}).probes
    (probe,) = [p for p in asked if p.title == "large numbers where hidden"]
    d_p = np.abs(probe.cotangents["out"].astype(float)).sum(-1).max() * np.abs(probe.operands["v"].astype(float)).max()
    assert 0 < d_p < 65504


def test_axes_of_gradients_are_their_operands():
    assert [judge.axes_of(SOFTMAX, n) for n in ("out", "lse", "d_k", "d_sinks")] == ["B Hq T E", "B Hq T", "B Hkv S D", "Hq"]


# ---- arrays that exist already ------------------------------------------------------------------------------------------------------------


def test_given_gradients_are_judged_in_any_layout():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((2, n, h, 4)).astype(np.float32) for n, h in ((5, 4), (6, 2), (6, 2), (5, 4)))
    options = {"d_out": d_out, "layout": "BTHD", "causal": True}
    grads = ra.gradients("softmax", q, k, v, **options)
    ra.assert_matches((ra.attention(q, k, v, layout="BTHD", causal=True), grads.d_k), "softmax", q, k, v, returns=("out", "d_k"), **options)
    wrong = ra.compare(np.roll(grads.d_k, 1, axis=2), "softmax", q, k, v, returns="d_k", **options)
    assert not wrong.passed and wrong.worst.output == "d_k"
    with pytest.raises(ra.OperandError, match="d_q for which cotangent"):
        ra.compare(grads.d_q, "softmax", q, k, v, returns="d_q", layout="BTHD")
    with pytest.raises(ra.CandidateError, match="d_k has shape"):
        ra.compare(grads.d_q, "softmax", q, k, v, returns="d_k", **options)
    with pytest.raises(ra.CandidateError, match="no d_sinks, because no sinks was given"):
        ra.compare(grads.d_q, "softmax", q, k, v, returns="d_sinks", **options)


def test_the_command_line_judges_gradients(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from refattn.cli import app

    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, 1, n, 4)).astype(np.float32) for n in (3, 5, 5, 3))
    grads = ra.gradients("softmax", q, k, v, d_out=d_out)
    monkeypatch.chdir(tmp_path)
    np.savez("arrays.npz", q=q, k=k, v=v, d_out=d_out, out=ra.attention(q, k, v), **grads._asdict())
    told = CliRunner().invoke(app, ["compare", "arrays.npz", "--json", "-"])
    assert told.exit_code == 0 and "gradients" not in json.loads(told.stdout)["unexamined"]
    np.savez("arrays.npz", q=q, k=k, v=v, d_out=d_out, d_q=grads.d_q * 2)
    assert CliRunner().invoke(app, ["compare", "arrays.npz"]).exit_code == 1
    (tmp_path / "mine.py").write_text(
        "import refattn as ra\n\n\ndef attention(q, k, v):\n    return ra.attention(q, k, v)\n\n\n"
        "def gradients(q, k, v, *, d_out):\n    return ra.gradients('softmax', q, k, v, d_out=d_out)\n"
    )
    told = CliRunner().invoke(app, ["check", "mine.py:attention", "--suite", "quick", "--gradients", "mine.py:gradients", "--json", "-"])
    assert told.exit_code == 0 and "gradients" in json.loads(told.stdout)["examined"]


# ---- overflow -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, each, right, wrong",
    [
        ("float16", 32768.0, (np.inf, 65504.0), (np.nan, -np.inf, -65504.0, 49152.0)),  # three times as much is beyond 65504
        ("float16", 8192.0, (24576.0,), (np.inf, np.nan, 65504.0)),
        ("float8_e4m3fn", 224.0, (np.nan, 448.0), (-448.0, 320.0)),  # beyond 448, without infinities
        ("float8_e5m2", 28672.0, (np.inf, 57344.0), (np.nan, -np.inf)),
    ],
)
def test_an_answer_beyond_its_format_may_overflow_or_saturate(dtype, each, right, wrong):
    q, d_out = np.zeros((1, 1, 3, 1)), np.full((1, 1, 3, 1), each)
    q, k, v, d_out = (x.astype(as_dtype(dtype)) for x in (q, q[:, :, :1], q[:, :, :1], d_out))
    for value in (*right, *wrong):
        given = np.full((1, 1, 1, 1), value).astype(as_dtype(dtype))
        assert ra.compare(given, "softmax", q, k, v, d_out=d_out, returns="d_v").passed == (value in right), value


# ---- other people's ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_gradients_agree_whatever_the_draw(dtype):
    for seed in range(3):
        assert not failures(candidates.candidate("torch", SOFTMAX, gradients=True), dtype, profile="torch-cpu-flash", seed=seed)


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_gradients_on_the_path_of_single_operations_are_textbook(dtype):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert not failures(candidates.candidate("torch", SOFTMAX, gradients=True), dtype, profile="math")


@pytest.mark.peer
def test_jax_gradients_agree():  # in one dtype: it compiles every call
    made = candidates.candidate("jax", SOFTMAX, gradients=True)
    assert not failures(made, "bfloat16", profile=made.profile, **made.fixed)


@pytest.mark.peer
def test_a_function_of_a_framework_is_differentiated_by_it():
    import jax
    import torch

    def in_torch(q, k, v, causal=False):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def detached(q, k, v):
        return in_torch(q, k.detach(), v)

    def in_jax(q, k, v):
        k, v = (jax.numpy.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        s = jax.numpy.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
        return jax.numpy.einsum("bhts,bhse->bhte", jax.nn.softmax(s, axis=-1), v)

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, n, 4)).astype(np.float32) for h, n in ((4, 3), (2, 5), (2, 5)))
    probe = probes.Probe("one", {"q": q, "k": k, "v": v}, {}, cotangents={"out": rng.standard_normal((1, 4, 3, 4)).astype(np.float32)})
    for function, framework, wrong in ((in_torch, "torch", set()), (detached, "torch", {"d_k"}), (in_jax, "jax", set())):
        made = candidates.candidate(function, SOFTMAX, framework=framework, gradients=True)
        case = judge.judge(SOFTMAX, made, probe, profiles.resolve(None, F32), 1e-3)
        assert case.ratios.keys() == {"out", "d_q", "d_k", "d_v"}
        assert {name for name, x in case.ratios.items() if np.any(x > 1)} == wrong
