"""Mutants: without a change they are the definitions, every one of them is noticed, and each does what its words say."""

import math
from dataclasses import fields

import ml_dtypes
import numpy as np
import planted
import planted_backward
import pytest
from numpy.testing import assert_array_equal

import refattn as ra
from refattn import catalog, definition
from refattn.oracle import designs, mutants, probes, profiles
from refattn.oracle.bounds import spread
from refattn.oracle.gradients import backpropagated
from refattn.oracle.judge import ratio
from refattn.oracle.mutants import scope, table
from refattn.oracle.mutants.score import calls, everything, score
from refattn.oracle.profiles import Profile
from refattn.oracle.tolerance import ALPHA, tolerances
from refattn.precision import as_dtype
from refattn.problem import bind

pytestmark = pytest.mark.compiled

SCORED = tuple(name for name in ra.variants() if catalog.variant(name).plan is not None)
SOFTMAX = catalog.variant("softmax")
EXACT = Profile("float64 throughout", 2.0**-53, scores=2.0**-53, probabilities=2.0**-53, exp_error=2.0**-52, tanh_error=2.0**-51)
FLOAT32, BFLOAT16 = as_dtype("float32"), as_dtype("bfloat16")


def everything_of(variant, suite="standard", dtype=FLOAT32):
    return probes.suite(suite, variant, everything(variant), dtype, {}).probes


@pytest.mark.parametrize("name", SCORED)
def test_without_a_change_it_is_the_definition(name):
    variant = catalog.variant(name)
    for probe in everything_of(variant):
        problem = bind(variant, (), {**probe.operands, **probe.params}, tuple(o.name for o in variant.outputs))
        truth = definition.run(problem)
        double = {o.name: np.dtype(np.float64) for o in variant.outputs}
        tolerance = tolerances(problem, truth, EXACT, ALPHA, double)
        answers = mutants.evaluate(problem, {}).outputs
        assert answers.keys() == truth.keys()
        for output, exact in truth.items():
            assert np.all(ratio(answers[output], exact, tolerance[output]) <= 1), (probe.title, output)


def test_without_a_change_its_gradients_are_the_definitions():
    for probe in everything_of(SOFTMAX, "quick"):
        problem = bind(SOFTMAX, (), {**probe.operands, **probe.params}, ("out", "lse"))
        if not probe.cotangents:
            continue
        truth = definition.run(problem)
        exact = backpropagated(problem, truth, probe.cotangents)
        tolerance = tolerances(problem, truth, EXACT, ALPHA, {name: np.dtype(np.float64) for name in exact.values}, exact)
        answers = mutants.evaluate(problem, {}, probe.cotangents).outputs
        for name, right in exact.values.items():
            assert np.all(ratio(answers[name], right, tolerance[name]) <= 1), (probe.title, name)


@pytest.mark.parametrize("normalizer", ["sigmoid", "relu"])
def test_gradients_of_other_weights_are_the_definitions(normalizer):
    rng, variant = np.random.default_rng(0), catalog.variant(normalizer)
    x = {"q": rng.normal(size=(1, 2, 3, 4)), "k": rng.normal(size=(1, 1, 5, 4)), "v": rng.normal(size=(1, 1, 5, 3))}
    problem = bind(variant, (), {**x, "causal": True})
    g = {"out": rng.normal(size=(1, 2, 3, 3))}
    exact = backpropagated(problem, definition.run(problem), g)
    answers = mutants.evaluate(problem, {}, g).outputs
    for name, right in exact.values.items():
        assert np.all(np.abs(answers[name] - right) <= exact.errors[name] + 1e-12 * np.abs(right).max())


def test_every_field_is_some_mutants_and_every_change_is_one():
    changed = {False: set(), True: set()}  # of plans, and of recurrences
    for mutant in mutants.ALL:
        assert mutant.changes
        kind = mutants.StateReading if "recurrence" in mutant.needs else mutants.Reading
        right, own = kind(), changed["recurrence" in mutant.needs]
        for name, value in mutant.changes.items():
            inner = dict(value) if name == "recomputed" else {name: value}
            assert all(getattr(right, n) is not None for n in inner)
            own |= {name, *inner}
        assert kind(**mutant.changes) != right, mutant
    for family in mutants.FAMILIES:
        changed["recurrence" in family.needs] |= {family.field, *family.changes}
    assert changed[False] == {f.name for f in fields(mutants.Reading)}
    assert changed[True] == {f.name for f in fields(mutants.StateReading)}


def test_mutants_and_faults_are_told_apart():
    keys = [(m.fault.code, tuple(sorted(m.changes.items())), m.needs) for m in mutants.ALL]
    assert len(keys) == len(set(keys))
    for mutant in mutants.ALL:
        assert mutant.fault.words.endswith(".") and mutant.fault.right != mutant.fault.wrong and mutant.prior > 0
        known = {*mutants.FEATURES, *mutants.STATE_FEATURES, *(n for name in ra.variants() for n in mutants.may_show(catalog.variant(name)))}
        assert mutant.needs <= known, mutant.needs - known


def test_the_catalogue_is_whole_and_its_page_up_to_date():
    rows = [f"{letter}{n}" for letter, (_, count) in scope.LETTERS.items() for n in range(1, count + 1)]
    codes = {fault.code for fault in scope.faults()}
    assert not codes & scope.OUT_OF_SCOPE.keys()
    assert [row for row in rows if row not in codes and row not in scope.OUT_OF_SCOPE] == []
    page = (ra_root() / "docs" / "faults.md").read_text(encoding="utf-8")
    assert scope.tables() in page, "run python -m refattn.oracle.mutants.scope docs/faults.md"


def ra_root():
    from pathlib import Path

    return Path(__file__).resolve().parent.parent


def test_changes_combine_unless_they_disagree():
    assert mutants.combine({"scale": "omitted"}, {"tile": 16}) == {"scale": "omitted", "tile": 16}
    assert mutants.combine({"rescaled": "sum", "tile": 16}, {"padding": "zero", "tile": 16}) == {"rescaled": "sum", "tile": 16, "padding": "zero"}
    assert mutants.combine({"tile": 8, "padding": "zero"}, {"tile": 16, "rescaled": "sum"}) is None


def test_families_say_what_is_right_and_where_to_look():
    for family in mutants.FAMILIES:
        assert (family.values is None) != (family.bounds is None)
        right = mutants.right_value(family)
        assert family.values is None or right not in family.values
        assert math.isinf(right) or family.bounds is None or family.bounds[0] < right < family.bounds[1]


@pytest.mark.parametrize("name", ["softmax", "relu", "additive"])
def test_what_a_call_does_not_have_changes_nothing(name):
    variant = catalog.variant(name)
    for call in calls(variant, everything_of(variant, "quick"), profiles.resolve(None, FLOAT32)):
        for mutant in mutants.mutants(variant)[::8]:
            if not mutant.needs <= call.shown:
                wrong = mutants.evaluate(call.problem, mutant.changes, call.probe.cotangents, call.earlier).outputs
                right = mutants.evaluate(call.problem, {}, call.probe.cotangents).outputs
                for output in call.truth:
                    off = ratio(wrong[output], right[output], call.tolerance[output])
                    assert np.all(off <= 0.1), (mutant.fault.name, mutant.changes, call.probe.title, output)


@pytest.mark.parametrize("name, dtype", [("softmax", BFLOAT16), *((name, FLOAT32) for name in SCORED if name != "softmax")])
def test_the_quick_suite_refuses_whatever_any_call_would(name, dtype):
    variant = catalog.variant(name)
    found = list(score(variant, mutants.mutants(variant), dtype, "quick"))
    assert [(v.mutant.fault.name, dict(v.mutant.changes)) for v in table.survivors(found)] == []
    assert sum(bool(v.killed_by) for v in found) >= 20


def test_the_quick_suite_is_short():
    asked = probes.suite("quick", SOFTMAX, planted.candidate(planted.RIGHT), FLOAT32, {}).probes
    assert len(asked) < 15
    assert len({d.title for d in designs.POOL}) == len(designs.POOL)


#: Faults planted by hand in a kernel of its own, by the first words of their names, and the code of the mutants that should explain them.
HAND_MADE = ("S2", "S8", "M3", "M6", "W1", "W3", "H1", "X2", "X3", "X12", "T1", "L1", "P5", "X9", "S12", "N2")


@pytest.mark.parametrize("code, dtype", [*((code, BFLOAT16) for code in HAND_MADE), *((code, FLOAT32) for code in ("X2", "N2", "S12"))])
def test_a_mutant_explains_the_kernel_that_was_written_with_its_fault(code, dtype):
    """Within the tolerance of the mutant, in every call, and no mutant of most other codes does."""
    fault = next(name for name in planted.FAULTS if name.split()[0] == code)
    profile, candidate = profiles.resolve(None, dtype), planted.planted(fault)
    asked = calls(SOFTMAX, probes.suite("quick", SOFTMAX, candidate, dtype, {}).probes, profile)
    left = [m for m in mutants.mutants(SOFTMAX) if "gradients" not in m.needs]
    for call in asked:
        with np.errstate(all="ignore"):
            given = candidate.call(call.probe.operands, {n: x for n, x in call.problem.params.items() if n in candidate.params})
        given = dict(zip(candidate.returns, given, strict=True))
        left = [m for m in left if explains(m, call, given, profile)]
    assert code in {m.fault.code for m in left}
    assert len({m.fault for m in left}) <= 3, [m.fault.name for m in left]


def explains(mutant, call, given, profile):
    said = mutants.evaluate(call.problem, mutant.changes, None, call.earlier)
    tolerance = said.tolerance(profile, ALPHA / 100)
    return all(np.all(ratio(x.astype(np.float64), said.outputs[name], tolerance[name]) <= 1) for name, x in given.items())


@pytest.mark.parametrize("code", ["B3", "B5", "H4", "T2", "L1"])
def test_a_mutant_explains_the_backward_pass_that_was_written_with_its_fault(code):
    fault = next(name for name in planted_backward.FAULTS if name.split()[0] == code)
    stages, profile = planted_backward.FAULTS[fault], profiles.resolve(None, FLOAT32)
    left = [m for m in mutants.mutants(SOFTMAX) if "gradients" in m.needs]
    for call in calls(SOFTMAX, everything_of(SOFTMAX, "quick"), profile):
        if call.probe.cotangents:
            names = {"d_" + n: x for n, x in call.probe.cotangents.items()}
            with np.errstate(all="ignore"):
                given = planted_backward.gradients(stages, **call.probe.operands, **{n: call.problem.params[n] for n in planted.PARAMS}, **names)
            left = [m for m in left if explains_gradients(m, call, given, profile)]
    assert {m.fault.code for m in left} == {code}


def explains_gradients(mutant, call, given, profile):
    said = mutants.evaluate(call.problem, mutant.changes, call.probe.cotangents)
    tolerance = said.tolerance(profile, ALPHA / 100)
    return all(np.all(ratio(x.astype(np.float64), said.outputs[name], tolerance[name]) <= 1) for name, x in given.items())


def test_what_was_kept_of_an_earlier_call_is_read_instead():
    rng = np.random.default_rng(0)
    one, two = ({n: rng.normal(size=(1, 1, 3, 4)) for n in "qkv"} for _ in range(2))
    earlier, now = (bind(SOFTMAX, (), {**x, "causal": causal}) for x, causal in ((one, True), (two, False)))
    for name, mixed in (("k", {**two, "k": one["k"]}), ("causal", {**two, "causal": True})):
        answers = mutants.evaluate(now, {"remembered": name}, earlier=earlier).outputs
        assert_array_equal(answers["out"], mutants.evaluate(bind(SOFTMAX, (), mixed), {}).outputs["out"])


@pytest.mark.parametrize(
    "taken, expected",
    [("-1", [[], [0], [1], [2]]), ("0", [[0], [0, 1], [1, 2], [2, 3]]), ("left", [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]])],
)
def test_no_bound_on_the_right_may_be_read_as_a_number(taken, expected):
    x = {"q": np.zeros((1, 1, 4, 1)), "k": np.zeros((1, 1, 4, 1)), "v": np.eye(4)[None, None]}  # weights are the output

    def seen(**params):
        out = mutants.evaluate(bind(SOFTMAX, (), {**x, **params}), {"window_right": f"{taken} where open"}).outputs["out"]
        return [np.flatnonzero(row).tolist() for row in out[0, 0]]

    assert seen(window=(1, None)) == expected
    assert seen(window=(1, None), causal=True) == seen(window=(1, 0)) == [[0], [0, 1], [1, 2], [2, 3]]
    assert seen(window=(None, None)) == seen() == [[0, 1, 2, 3]] * 4


def test_arrays_are_stored_one_by_one():
    rng = np.random.default_rng(0)

    def stored(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)

    q, k, v, bias, sinks = (stored(rng.normal(size=n)) for n in ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 3), (1, 2, 5, 7), (2,)))
    problem = bind(SOFTMAX, (), {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks, "scale": 0.37})
    scores = stored(stored(stored(q @ k.swapaxes(2, 3)) * 0.37) + bias)
    joined = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (1, 2, 5, 1))], 3)
    distance = joined - joined.max(3, keepdims=True)
    for changes, before in (({}, distance), ({"distance_format": "bfloat16"}, stored(distance))):
        weights = np.exp(before) / np.exp(before).sum(3, keepdims=True)
        out = mutants.evaluate(problem, {"arrays_format": "bfloat16", **changes}).outputs["out"]
        assert_array_equal(out, stored(weights)[..., :-1] @ v)


def test_a_tolerance_is_wider_where_more_elements_are_judged_and_never_zero():
    problem = bind(SOFTMAX, (), {n: np.ones((1, 1, 2, 2), np.float32) for n in "qkv"})
    said = mutants.evaluate(problem, {"scale": "omitted"})
    loose, tight = (said.tolerance(profiles.resolve(None, FLOAT32), alpha)["out"] for alpha in (1e-12, 1e-1))
    assert np.all(loose >= tight) and np.all(tight > 0) and spread(2, 1e-12) > spread(2, 1e-1)


def test_the_command_prints_the_score_and_its_status_says_whether_any_survived(capsys):
    found = table.verdicts(SOFTMAX, "float32", "quick", "L,X2")
    assert {v.mutant.fault.code[0] for v in found} == {"L", "X"} and all(v.killed_by for v in found if v.observable)
    from rich.console import Console

    Console(width=160).print(table.drawn(found))
    shown = capsys.readouterr().out
    assert "mutation score" in shown and "lse in base 2" in shown and "survived" not in shown
