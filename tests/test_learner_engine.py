"""The learner engine against the definitions: at chunks' edges, in the middle of mini-batches, cut, packed, and on any number of threads."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from catalogue import CALLS, GENERAL, LADDER, VARIANTS, draw, flops, rounding
from test_catalogue import close
from test_state_engine import FORMATS, bound, by_definition, cut, in_format
from test_vectorized import assert_gradients

import refattn as ra
from refattn import catalog
from refattn.engine import vectorized
from refattn.engine.learner import run as engine
from refattn.engine.learner.forgetting import running_sums
from refattn.spec import shape

pytestmark = pytest.mark.compiled

LEARNERS = [v for v in VARIANTS if v.values[0].name in engine.MODULES]
#: Those that a sequence can be cut in, what they carry handed on.
CARRIED = [v for v in LEARNERS if v.values[0].carried]
LEARNER_CALLS = [c for c in CALLS if c.values[0].name in engine.MODULES]
#: One state for two query heads; widths small enough for long sequences, none of them whole vectors.
LONG = {**GENERAL, "B": 1, "Hq": 2, "Hkv": 1, "D": 5, "E": 3, "F": 9, "L": 9}


def names_of(variant):
    """All outputs but the matrix of weights, which kernels do not return."""
    return tuple(o.name for o in variant.outputs if o.name != "weights")


def check_values(variant, params, dims, dtype, seed=0, optional=True, **changed):
    operands = {**draw(variant, dims, seed, optional), **changed}
    narrow, returns = in_format(operands, dtype), names_of(variant)
    if reason := engine.reason_against(bound(variant, params, narrow, returns)):
        assert reason == "an axis is empty" and any(x.size == 0 for x in operands.values())
        return
    exact = in_format(narrow, np.float64)
    expected = by_definition(variant, params, returns)(exact)
    tolerances = rounding(by_definition(variant, params, returns), exact, variant, flops(variant, exact, params))
    found = engine.run(bound(variant, params, narrow, returns))
    for name, wanted, tolerance in zip(returns, expected, tolerances, strict=True):
        close(found[name], wanted, tolerance * FORMATS[dtype] * 2.0**53, name)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant, params", LEARNER_CALLS)
def test_every_call_is_the_definition(variant, params, dtype):
    for dims in LADDER.values():
        for optional in (True, False):
            check_values(variant, params, dims, dtype, optional=optional)


@pytest.mark.parametrize("segment", [1, 5, 63, 64, 65, 100, 130, 1000])
@pytest.mark.parametrize("update", ["delta", "linear"])
def test_segments_of_any_length(segment, update):
    for dtype in FORMATS:
        check_values(catalog.variant("infini"), {"segment": segment, "update": update}, {**LONG, "T": 200, "S": 200}, dtype)


@pytest.mark.parametrize("more", [None, -1, 0, 1, 66])
@pytest.mark.parametrize("variant", LEARNERS)
def test_lengths_around_those_of_chunks(variant, more):
    n = 0 if more is None else getattr(engine.module_of(variant), "CHUNK", 64) + more
    check_values(variant, {}, {**LONG, "T": n, "S": n}, np.float64)


@pytest.mark.parametrize("start", [0, 1, 62, 64, 100, 2**40 - 3])
@pytest.mark.parametrize("variant, params", [c for c in LEARNER_CALLS if "position" in c.values[0].carried])
def test_positions_before_the_first_token(variant, params, start):
    for n in (1, 3, 66):
        check_values(variant, params, {**LONG, "T": n, "S": n}, np.float64, initial_position=np.array([float(start)]))


@pytest.mark.parametrize("length", [2, 16, 63, 64, 65, 100])
@pytest.mark.parametrize("variant", ["titans", "ttt_linear", "ttt_mlp"])
def test_gradients_at_one_model_for_any_number_of_tokens(variant, length):
    variant = catalog.variant(variant)
    [name] = {p.name for p in variant.params} & {"chunk", "mini_batch"}
    check_values(variant, {name: length}, {**LONG, "T": 140, "S": 140}, np.float64)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("queries, keys", [(70, 70), (1, 200), (5, 70), (70, 5), (3, 0), (0, 3), (1, 1)])
@pytest.mark.parametrize("closed", [0.0, 0.02, 1.0])
def test_gates_between_a_key_and_a_query(closed, queries, keys, dtype):
    variant, dims = catalog.variant("forgetting"), {**LONG, "Hq": 4, "Hkv": 2, "T": queries, "S": keys}
    gate = np.array(draw(variant, dims)["gate"])
    gate[np.random.default_rng(6).random(gate.shape) < closed] = -np.inf
    check_values(variant, {}, dims, dtype, gate=gate)


@pytest.mark.parametrize("queries, keys", [(9, 9), (1, 20), (5, 12), (12, 5), (1, 1)])
@pytest.mark.parametrize("closed", [0.0, 0.1])
def test_gradients_of_gates_are_those_of_dual_numbers(closed, queries, keys):
    variant, dims = catalog.variant("forgetting"), {**LONG, "B": 2, "Hq": 4, "Hkv": 2, "D": 3, "T": queries, "S": keys}
    x = draw(variant, dims, seed=8)
    x["gate"] = np.where(np.random.default_rng(6).random(x["gate"].shape) < closed, -np.inf, x["gate"])
    assert_gradients(variant, x, {}, engine.gradients)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant, params", [c for c in LEARNER_CALLS if c.values[0].name in engine.GRADIENTS])
def test_gradients_are_those_back_through_whole_arrays(variant, params, dtype):
    rng, dims = np.random.default_rng(9), {**LONG, "B": 2, "Hq": 4, "Hkv": 2, "T": 150, "S": 170}
    shapes, names = {o.name: shape(o.axes, dims) for o in variant.outputs}, names_of(variant)
    for outputs, optional in itertools.product([names, *((name,) for name in names[1:])], (True, False)):
        narrow = in_format(draw(variant, dims, seed=8, optional=optional), dtype)
        cotangents = in_format({name: rng.standard_normal(shapes[name]) for name in outputs}, dtype)

        def gradients(x, cotangents=cotangents, outputs=outputs):
            return tuple(vectorized.gradients(bound(variant, params, x, outputs), in_format(cotangents, np.float64)).values())

        exact = in_format(narrow, np.float64)
        wanted = vectorized.gradients(bound(variant, params, exact, outputs), in_format(cotangents, np.float64))
        one, two = (engine.gradients(bound(variant, params, narrow, outputs), cotangents, n) for n in (1, 2))
        operations = 3 * flops(variant, exact, params)
        allowed = dict(zip(wanted, rounding(gradients, exact, variant, operations), strict=True))
        assert one.keys() == wanted.keys()
        for name, tolerance in allowed.items():
            np.testing.assert_array_equal(one[name], two[name], name)
            assert one[name].shape == wanted[name].shape
            close(one[name], wanted[name], tolerance * FORMATS[dtype] * 2.0**53, name)
    assert ra.describe(variant.name).gradients == "kernels"


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 50, 1000])
def test_running_sums_are_exact_to_the_last_bit_of_the_second_number(n):
    gates = np.random.default_rng(n).standard_normal((2, 3, n)) * 10.0 ** np.random.default_rng(0).integers(-12, 6, (2, 3, n))
    for one, high, low in zip(*(x.reshape(6, n) for x in (gates, *running_sums(gates))), strict=True):
        exact, size = Fraction(0), Fraction(0)
        for x, a, b in zip(one, high, low, strict=True):
            exact, size = exact + Fraction(x), size + abs(Fraction(x))
            assert abs(Fraction(a) + Fraction(b) - exact) <= size * n / 2**104
            assert a == a + b


@pytest.mark.parametrize("dtype", FORMATS)
def test_gates_without_running_sums_go_to_the_definition(dtype):
    variant, dims = catalog.variant("forgetting"), {**LONG, "T": 20, "S": 20}
    x = in_format(draw(variant, dims), dtype)
    for spoilt in (np.nan, np.inf, -1e300 if dtype == np.float64 else -1e37):
        gate = np.array(x["gate"])
        gate[0, 0, 5:7] = spoilt
        with pytest.raises(ra.BackendUnavailableError, match=r"forgetting: .*'cpu' does not run this call: its gates are NaN, infinite, or sum to"):
            ra.attend("forgetting", **{**x, "gate": gate}, backend="cpu")
        found, expected = (ra.attend("forgetting", **{**x, "gate": gate}, backend=backend) for backend in ("auto", "definition"))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["aft_full", "aft_local", "article_sdpa", "fastformer"])
def test_numbers_that_whole_arrays_would_lose_go_to_the_loops(name):
    variant = catalog.variant(name)
    x = draw(variant, {**LONG, "T": 20, "S": 20, "M": 6})
    spoilt = [("v", np.inf, "v is not finite"), ("k", np.nan, "k is not finite")]
    spoilt += [("w", 101.0, "w has elements beyond 100"), ("k", -101.0, "k has elements beyond 100")] if name.startswith("aft") else []
    for operand, number, reason in spoilt:
        changed = np.array(x[operand])
        changed.flat[7] = number
        given = {**x, operand: changed}
        with pytest.raises(ra.BackendUnavailableError, match=f"{name}: backend 'cpu' does not run this call: {reason}"):
            ra.attend(name, **given, returns="out", backend="cpu")
        found, expected = (ra.attend(name, **given, returns="out", backend=backend) for backend in ("auto", "definition"))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("levels", [1, 2, 6, 7, 8, 60])
def test_any_number_of_levels(levels):
    check_values(catalog.variant("log_linear"), {}, {**LONG, "T": 200, "S": 200, "L": levels}, np.float64)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_gate_that_forgets_everything(dtype):
    for name in ("log_linear", "mesa"):
        variant, dims = catalog.variant(name), {**LONG, "T": 70, "S": 70}
        gate = np.array(draw(variant, dims)["gate"])
        gate[np.random.default_rng(4).random(gate.shape) < 0.1] = -np.inf
        check_values(variant, {}, dims, dtype, gate=gate)


@pytest.mark.parametrize("start", ["zero", "diagonal"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_few_steps_of_conjugate_gradients(steps, start):
    params = {"solver": "conjugate gradients", "steps": steps, "start": start, "eps": 1e-3}
    check_values(catalog.variant("mesa"), params, {**LONG, "T": 40, "S": 40, "D": 7}, np.float64)


@pytest.mark.parametrize("keys", [1, 8, 9, 16, 17, 33])
def test_factors_of_any_width(keys):
    check_values(catalog.variant("mesa"), {}, {**LONG, "Hq": 19, "T": 5, "S": 5, "D": keys}, np.float64)


def test_a_matrix_that_is_not_positive_has_no_factor():
    variant, dims = catalog.variant("mesa"), {**LONG, "T": 3, "S": 3}
    x = draw(variant, dims) | {"initial_gram": -100.0 * np.eye(5)[None, None]}
    assert np.isnan(engine.run(bound(variant, {}, x, ("out",)))["out"]).all()
    assert np.isnan(by_definition(variant, {}, "out")(x)).all()


@pytest.mark.parametrize("solver", ["cholesky", "conjugate gradients"])
def test_what_is_carried_need_not_be_symmetric(solver):
    variant, dims = catalog.variant("mesa"), {**LONG, "T": 40, "S": 40}
    gram = draw(variant, dims)["initial_gram"] + np.triu(np.full((5, 5), 0.25), 1)
    params = {"solver": solver, "steps": 3, "start": "diagonal"}
    check_values(variant, params, dims, np.float64, initial_gram=gram)


def ending_at(variant, n):
    """Parameters under which a sequence can be cut after n tokens: where a segment ends, in a variant that has segments."""
    return {"segment": n} if any(p.name == "segment" for p in variant.params) else {}


@pytest.mark.parametrize("n", [33, 64, 65])
@pytest.mark.parametrize("variant", CARRIED)
def test_a_sequence_is_carried_on_by_what_it_carries(variant, n):
    dims, returns, params = {**LONG, "T": 80, "S": 80}, names_of(variant), ending_at(variant, n)
    operands = draw(variant, dims)
    whole = engine.run(bound(variant, params, operands, returns))
    one, two = cut(variant, operands, n)
    first = engine.run(bound(variant, params, one, returns))
    second = engine.run(bound(variant, params, {**two, **{"initial_" + name: first[name] for name in variant.carried}}, returns))
    tolerances = rounding(by_definition(variant, params, returns), operands, variant, flops(variant, operands, params))
    for o, tolerance in zip(variant.outputs, tolerances, strict=True):
        axes = o.axes.split()
        joined = np.concatenate([first[o.name], second[o.name]], axes.index("T")) if "T" in axes else second[o.name]
        close(joined, whole[o.name], tolerance, o.name)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant", LEARNERS)
def test_results_do_not_depend_on_the_number_of_threads(variant, dtype):
    dims = {**GENERAL, "B": 1, "T": 130, "S": 130, "D": 40, "E": 40, "F": 40}
    call = bound(variant, {}, in_format(draw(variant, dims), dtype), names_of(variant))
    one, two = (engine.run(call, threads) for threads in (1, 2))
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("variant", LEARNERS)
def test_what_was_given_is_not_written_to(variant):
    operands = draw(variant, {**LONG, "T": 20, "S": 20})
    before = {name: x.tobytes() for name, x in operands.items()}
    engine.run(bound(variant, {}, operands, names_of(variant)))
    assert before == {name: x.tobytes() for name, x in operands.items()}


# ---- what a caller may ask for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", LEARNERS)
def test_calls_that_are_not_tiny_go_to_the_engine(variant, monkeypatch):
    assert ra.describe(variant.name).backends == ("definition", "cpu")
    module, asked = engine.module_of(variant), []
    monkeypatch.setattr(module, "outputs", lambda problem, threads, real=module.outputs: asked.append(problem) or real(problem, threads))
    x = draw(variant, {**LONG, "T": 20, "S": 20})
    found = [ra.attend(variant.name, **x, returns="out", backend=backend) for backend in ("auto", "cpu")]
    np.testing.assert_array_equal(*found)
    assert len(asked) == 2
    ra.attend(variant.name, **x, returns="out", backend="definition")
    assert len(asked) == 2


@pytest.mark.parametrize("variant", CARRIED)
def test_a_step_goes_on_from_what_is_carried(variant):
    returns, operands = names_of(variant), in_format(draw(variant, {**LONG, "T": 20, "S": 20}), np.float32)
    (one, two), params = cut(variant, operands, 15), ending_at(variant, 15)
    state = {name: np.array(one.pop("initial_" + name), np.float32) for name in variant.carried}
    kept = dict(state)
    _, state = ra.step(variant.name, state, **one, **params, returns="out", backend="cpu")
    found, state = ra.step(variant.name, state, **two, **params, returns="out", backend="cpu")
    assert all(state[name] is kept[name] for name in variant.carried)
    exact = in_format(operands, np.float64)
    expected = by_definition(variant, params, returns)(exact)
    tolerances = rounding(by_definition(variant, params, returns), exact, variant, flops(variant, exact, params))
    for name, wanted, tolerance in zip(returns, expected, tolerances, strict=True):
        if name in ("out", *variant.carried):
            allowed = tolerance[:, :, 15:] if name == "out" else tolerance
            close(found if name == "out" else state[name], wanted[:, :, 15:] if name == "out" else wanted, allowed * 2.0**29, name)


@pytest.mark.parametrize("variant", CARRIED)
def test_packed_sequences_are_calls_of_their_own(variant):
    bounds = np.array([0, 5, 5, 70])
    x = draw(variant, {**LONG, "T": 70, "S": 70}, optional=False)
    axes = {o.name: o.axes.split() for o in (*variant.operands, *variant.outputs)}
    packed = {}
    for name, one in x.items():
        packed[name] = np.swapaxes(one, 1, 2)[0] if "T" in axes[name] else np.repeat(one, 3, axis=0) if axes[name][0] == "B" else one
    out = ra.attend(variant.name, **packed, layout=ra.Packed(bounds), backend="cpu")
    for first, last in ((0, 5), (5, 70)):
        part = {name: one[:, :, first:last] if "T" in axes[name] else one for name, one in x.items()}
        np.testing.assert_array_equal(out[first:last], np.swapaxes(ra.attend(variant.name, **part, backend="cpu"), 1, 2)[0])


def test_what_the_engine_does_not_run_is_said():
    x = in_format(draw(catalog.variant("ttt_linear"), {**LONG, "T": 20, "S": 20}), np.float32)
    with pytest.raises(ra.BackendUnavailableError, match="ttt_linear: backend 'cpu' does not run this call: eps=1e-60 is beyond float32"):
        ra.attend("ttt_linear", **x, eps=1e-60, backend="cpu")
    with pytest.raises(ra.ParameterError, match="ttt_linear: form='chunked'; it has no recurrence"):
        ra.attend("ttt_linear", **x, form="chunked")
