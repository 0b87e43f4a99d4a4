"""The judge on recurrences: its evaluation is the definitions', its tolerances hold, no right kernel is refused, and wrong ones are named."""

import dataclasses

import ml_dtypes
import numpy as np
import planted_delta
import planted_features
import pytest
from examination import codes

import refattn as ra
from refattn import catalog, definition
from refattn.oracle import designs, diagnose, mutants, probes, profiles
from refattn.oracle.judge import judge, ratio
from refattn.oracle.mutants import table
from refattn.oracle.mutants.score import everything, score
from refattn.oracle.recurrences.lowered import Lowering
from refattn.oracle.recurrences.running import CHUNKS, ORDERS, READS, Form, prepared, run
from refattn.oracle.tolerance import ALPHA, tolerances
from refattn.precision import as_dtype
from refattn.problem import bind
from refattn.spec import shape

pytestmark = pytest.mark.compiled

RECURRENT = tuple(name for name in ra.variants() if catalog.variant(name).recurrence is not None)
FLOAT32 = as_dtype("float32")
GATED = catalog.variant("gated_delta")
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "H": 4, "G": 2, "T": 9, "S": 13, "D": 6, "E": 5, "N": 6, "R": 2, "F": 4, "L": 5, "Z": 3, "M": 6, "A": 3}


def problems(name):
    """Small ones: with and without optional operands, and every other value of every parameter."""
    variant, rng = catalog.variant(name), np.random.default_rng(0)
    for params in ({}, *({p.name: value} for p in variant.params for value in p.tries)):
        for optional in (False, True):
            operands = {o.name: o.draw(rng, shape(o.axes, SIZES)) for o in variant.operands if optional or not o.optional}
            yield bind(variant, (), {**operands, **params}, [o.name for o in variant.outputs])


@pytest.mark.parametrize("name", RECURRENT)
def test_unchanged_it_is_the_definition(name):
    for problem in problems(name):
        truth, answers = definition.run(problem), mutants.evaluate(problem, {}).outputs
        assert set(answers) <= set(truth) and next(iter(truth)) in answers
        for output, x in answers.items():
            np.testing.assert_allclose(x, truth[output], rtol=1e-9, atol=1e-10, err_msg=f"{output} {problem.params}")


def test_chunks_in_which_nothing_is_wrong_change_nothing():
    operands = drawn("random", 40, np.random.default_rng(0))
    problem = bind(GATED, (), operands, ("out", "state"))
    p = prepared(Lowering(problem, problem.recurrence).lowered())
    whole = run(p, Form())
    for chunk in (1, 8, 39, 40, 41):
        parts = run(p, Form(chunk=chunk))
        np.testing.assert_allclose(parts.out, whole.out, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(parts.state, whole.state, rtol=1e-12, atol=1e-13)
    forms = [Form(order=o) for o in ORDERS[1:]] + [Form(read=r) for r in READS[1:]] + [Form(wrong=w, chunk=16) for w in CHUNKS[1:] if "mass" not in w]
    answers = [np.concatenate([x.ravel() for x in (r.out, r.state)]) for r in (run(p, form) for form in (Form(), *forms))]
    alike = [(a, b) for a in range(len(answers)) for b in range(a) if np.allclose(answers[a], answers[b], rtol=1e-9, atol=1e-9)]
    same = {frozenset((forms[a - 1], forms[b - 1])) for a, b in alike if b}
    assert all(b for _, b in alike), "a wrong form that is right"
    assert same == {frozenset((Form(read=READS[2]), Form(wrong="own token hidden", chunk=16)))}


# ---- tolerances ------------------------------------------------------------------------------------------------------------------


def drawn(kind, n, rng, dtype=np.float64):
    """Operands of the gated delta rule."""
    q, v, state = (rng.standard_normal(s) for s in ((1, 2, n, 16), (1, 1, n, 16), (1, 1, 16, 16)))
    k = rng.standard_normal((1, 1, n, 16))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gate, beta = -rng.exponential(0.2, (1, 1, n)), rng.uniform(0.0, 1.0, (1, 1, n))
    if kind == "strong decay":
        gate = -rng.uniform(5.0, 30.0, gate.shape)
    elif kind == "weak decay":
        gate = -rng.exponential(1e-3, gate.shape)
    elif kind == "one key":
        k = np.broadcast_to(k[:, :, :1], k.shape)
    elif kind == "strength 2":
        beta = 2.0 * beta
    elif kind == "all alike":
        gate, v = np.full_like(gate, -0.01), np.ones_like(v)
    elif kind == "cancelling":  # every token erases what the one before wrote, but for a thousandth
        v, k, beta, gate = 100.0 + v[:, :, :1] + 1e-3 * v, k[:, :, :1] + 1e-3 * k, np.ones_like(beta), 1e-4 * gate
    return {name: x.astype(dtype) for name, x in {"q": q, "k": k, "v": v, "gate": gate, "beta": beta, "initial_state": state}.items()}


KINDS = ("random", "strong decay", "weak decay", "one key", "strength 2", "all alike", "cancelling")
KERNELS = {
    "recurrent-f32": {"recurrent": planted_delta.Stages()},
    "chunked-f32": planted_delta.RIGHT,
    "flash-f32": planted_delta.RIGHT,
    "chunked-bf16": {f"chunks of {n}": planted_delta.Stages(n, stored=planted_delta.in_bfloat16) for n in (16, 32, 64)},
    "bf16-state": {
        "recurrent": planted_delta.Stages(state=planted_delta.in_bfloat16),
        "chunks of 32": planted_delta.Stages(32, state=planted_delta.in_bfloat16),
    },
}


@pytest.mark.parametrize("profile", KERNELS)
def test_tolerances_hold_and_are_not_absurdly_large(profile):
    """Whatever the inputs, and in every form that the profile is for."""
    dtype = np.dtype(ml_dtypes.bfloat16) if profile.endswith("bf16") else FLOAT32
    largest = []
    for kind in KINDS:
        for n in (1, 7, 63, 130):
            for seed in range(3):
                operands = drawn(kind, n, np.random.default_rng(seed), dtype)
                problem = bind(GATED, (), operands, ("out", "state"))
                truth = definition.run(problem)
                allowed = tolerances(problem, truth, profiles.resolve(profile, dtype))
                for name, stages in KERNELS[profile].items():
                    for output, x in zip(("out", "state"), planted_delta.attend(stages, **operands), strict=True):
                        found = ratio(x.astype(np.float64), truth[output], allowed[output]).max()
                        assert found < 1, (kind, n, seed, name, output, found)
                        largest.append(found)
    assert np.median(largest) > 0.005


@pytest.mark.parametrize("profile", ["recurrent", "chunked"])
def test_a_state_in_bfloat16_is_too_coarse_for_other_profiles(profile):
    operands = drawn("random", 63, np.random.default_rng(0), FLOAT32)
    problem = bind(GATED, (), operands, ("out", "state"))
    truth = definition.run(problem)
    allowed = tolerances(problem, truth, profiles.resolve(profile, FLOAT32))
    out, _ = planted_delta.attend(planted_delta.Stages(state=planted_delta.in_bfloat16), **operands)
    assert ratio(out.astype(np.float64), truth["out"], allowed["out"]).max() > 100


# ---- right kernels ---------------------------------------------------------------------------------------------------------------


def refused(candidate, dtype, seed, suite="quick", profile=None):
    """Deciding calls that a candidate fails in."""
    variant, storage = catalog.variant(candidate.variant), as_dtype(dtype)
    asked = probes.suite(suite, variant, candidate, storage, {}, seed).probes
    how = profiles.resolve(profile, storage)
    cases = [judge(variant, candidate, probe, how, ALPHA / len(asked)) for probe in asked]
    return [(c.probe.title, c.reason, c.worst) for c in cases if c.failed]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", planted_delta.RIGHT)
def test_right_kernels_are_not_refused(name, dtype):
    for seed in range(10 if dtype == "float32" else 3):
        assert refused(planted_delta.candidate(planted_delta.RIGHT[name]), dtype, seed) == []


@pytest.mark.parametrize("profile, stages", [(p, s) for p in ("chunked-bf16", "bf16-state") for s in KERNELS[p].values()])
def test_right_kernels_that_round_more_are_not_refused(profile, stages):
    for seed in range(10 if profile == "bf16-state" else 3):
        assert refused(planted_delta.candidate(stages), "bfloat16", seed, profile=profile.removesuffix("-bf16")) == []


@pytest.mark.parametrize("name", planted_features.RIGHT)
def test_right_feature_kernels_are_not_refused(name):
    for seed in range(10):
        assert refused(planted_features.candidate(planted_features.RIGHT[name]), "float32", seed) == []


def test_the_standard_suite_refuses_no_right_kernel():
    assert refused(planted_delta.candidate(planted_delta.RIGHT["chunks of 64"]), "float32", 0, "standard") == []
    asked = {p.title for p in probes.suite("standard", GATED, planted_delta.candidate(planted_delta.Stages()), FLOAT32, {}).probes}
    assert {d.title for d in designs.TOKENS} <= asked


# ---- wrong kernels ---------------------------------------------------------------------------------------------------------------


def named(candidate):
    """Whether the quick suite refuses a candidate, and the codes it is named by."""
    variant, how = catalog.variant(candidate.variant), profiles.resolve(None, FLOAT32)
    asked = probes.suite("quick", variant, candidate, FLOAT32, {}).probes
    cases = [judge(variant, candidate, probe, how, ALPHA / len(asked)) for probe in asked]
    found, _ = diagnose.diagnose(variant, cases, how, ALPHA / len(asked))
    return any(c.failed for c in cases), {f.code for e in found.explanations for f in (*e.faults, *e.alike)}


@pytest.mark.parametrize("fault", planted_delta.FAULTS)
def test_a_fault_of_the_gated_delta_rule_is_found_and_named(fault):
    seen, said = named(planted_delta.candidate(planted_delta.FAULTS[fault], fault))
    assert seen and said == {fault.split()[0]}


@pytest.mark.parametrize("fault", planted_features.FAULTS)
def test_a_fault_of_features_is_found_and_named(fault):
    seen, said = named(planted_features.candidate(planted_features.FAULTS[fault], fault))
    assert seen and said == {fault.split()[0]}


def test_the_faults_are_many():
    assert len(planted_delta.FAULTS) >= 30 and len(planted_features.FAULTS) >= 15


@pytest.mark.parametrize("name", ["gated_delta", "kda", "rwkv6", "mamba2", "linear"])
def test_the_quick_suite_refuses_whatever_any_call_would(name):
    variant = catalog.variant(name)
    found = list(score(variant, mutants.mutants(variant), FLOAT32, "quick"))
    assert [(v.mutant.fault.name, dict(v.mutant.changes)) for v in table.survivors(found)] == []
    assert sum(bool(v.killed_by) for v in found) >= 50


# ---- states going in and coming out ------------------------------------------------------------------------------------------------


def test_what_is_carried_on_wrongly_shows_where_a_call_is_cut():
    """Each half is right, with or without a state: only the one's last token is missing from what the other begins with."""
    right = planted_delta.Stages()

    def call(operands, params):
        out, state = planted_delta.attend(right, **operands, **params)
        return out, state

    kept = []

    def careless(operands, params):
        begins = operands.get("initial_state")
        if begins is not None and any(begins is x or np.array_equal(begins, x) for x in kept):
            operands = {**operands, "initial_state": np.zeros_like(begins)}
        out, state = call(operands, params)
        kept.append(state)
        return out, state

    candidate = dataclasses.replace(planted_delta.candidate(right), call=careless)
    titles = {title for title, _, _ in refused(candidate, "float32", 0)}
    assert titles and all(title.startswith("cut in two") for title in titles)
    assert refused(dataclasses.replace(candidate, call=call), "float32", 0) == []


def gated_delta(q, k, v, gate, beta, initial_state=None, scale=None):
    return planted_delta.attend(planted_delta.Stages(32), q, k, v, gate, beta, initial_state, scale)


def transposed(q, k, v, gate, beta, initial_state=None, scale=None):
    return planted_delta.attend(planted_delta.FAULTS["D17 last state transposed"], q, k, v, gate, beta, initial_state, scale)


def test_a_function_that_returns_its_state_need_not_say_so(tmp_path):
    report = ra.check(gated_delta, "gated_delta", suite="quick")
    assert report.passed and {name for c in report.cases for name in c.ratios} == {"out", "state"}
    assert "cut in two at token 64" in {c.probe.title for c in report.cases}
    wrong = ra.check(transposed, "gated_delta", suite="quick")
    assert not wrong.passed and codes(wrong) == (("D17",),)
    assert "last state transposed" in str(wrong)
    wrong.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "last state transposed" in page and "state" in page


def test_one_array_is_the_output_alone():
    report = ra.check(lambda q, k, v, gate, beta, scale=None: gated_delta(q, k, v, gate, beta, scale=scale)[0], "gated_delta", suite="quick")
    assert report.passed and {name for c in report.cases for name in c.ratios} == {"out"}
    assert "a sequence carried on" in report.unexamined


@pytest.mark.parametrize("name", sorted(n for n in ra.variants() if catalog.variant(n).plan is None))
def test_every_variant_can_be_checked(name):
    """Whether it has a recurrence or not: its own definition passes."""
    variant = catalog.variant(name)
    names = (variant.outputs[0].name, *variant.carried)
    candidate = dataclasses.replace(
        everything(variant),
        call=lambda operands, params: ra.attend(name, **operands, **params, returns=names, backend="definition"),
        returns=names,
        gradients=None,
    )
    assert refused(candidate, "float32", 0) == []


@pytest.mark.parametrize("name", RECURRENT)
def test_every_mutant_answers_in_the_shapes_of_the_definition(name):
    for problem in problems(name):
        shapes = {output: x.shape for output, x in definition.run(problem).items()}
        shown = mutants.shows(problem, problem.returns)
        for mutant in mutants.mutants(problem.variant):
            answers = mutants.evaluate(problem, mutant.changes).outputs if mutant.needs <= shown else {}
            assert all(sorted(x.shape) == sorted(shapes[output]) for output, x in answers.items()), mutant  # a state may be transposed
