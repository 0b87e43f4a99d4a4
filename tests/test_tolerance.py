"""Bounds hold for arithmetic emulated rounding by rounding, are not far larger than the errors, and tell real faults from rounding."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import planted
import pytest

import refattn as ra
from refattn import catalog, definition
from refattn.candidate import Candidate
from refattn.oracle import judge, probes, profiles
from refattn.oracle.bounds import recurrent as recurrent_bounds
from refattn.oracle.bounds import spread
from refattn.oracle.bounds.extremes import extremes
from refattn.oracle.bounds.perturbed import perturbed
from refattn.oracle.bounds.scored import Scored
from refattn.oracle.tolerance import tolerances
from refattn.precision import as_dtype, round_to
from refattn.problem import bind
from refattn.spec import UNBOUNDED, every_size, shape

pytestmark = pytest.mark.compiled

VARIANTS = ra.variants()
CERTAIN = 1e9  # so many standard deviations that only the worst case counts
TEXTBOOK, ONLINE = planted.right(tile=planted.FAR), planted.right(tile=64)


def normal(rng, n, d=64):
    return tuple(rng.standard_normal((1, 1, m, d)) for m in (32, n, n))


def peaked(rng, n):
    q, k, v = normal(rng, n)
    return 8 * q, k, v


def positive(rng, n):
    q, k, v = normal(rng, n)
    return q, k, np.abs(v) + 0.5


def equal_keys(rng, n):
    q, k, v = normal(rng, n)
    return q, np.broadcast_to(k[:, :, :1], k.shape), v


def drawn(data, n, dtype, seed=0):
    return tuple(round_to(np.ascontiguousarray(x), as_dtype(dtype)) for x in data(np.random.default_rng(seed), n))


def worst_ratio(stages, operands, **params):
    report = ra.compare(planted.attend(stages, *operands, **params), "softmax", *operands, returns=("out", "lse"), **params)
    return report.worst.ratio


def everything(variant):
    """The quick suite for an implementation that takes all there is, without NaN."""
    named = variant.operands, variant.params
    asked = Candidate("all", lambda operands, params: None, *(frozenset(x.name for x in names) for names in named))
    return [p for p in probes.suite("quick", variant, asked, np.dtype(np.float32), {}).probes if p.decides]


def bound_to(variant, probe):
    return bind(variant, (), {**probe.operands, **probe.params}, [o.name for o in variant.outputs])


# ---- bounds hold, and are worth having ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [128, 1024, 4096])
@pytest.mark.parametrize("data", [normal, peaked, positive, equal_keys])
@pytest.mark.parametrize("dtype, stages", [("float32", TEXTBOOK), ("float32", ONLINE), ("bfloat16", ONLINE), ("float16", ONLINE)])
def test_errors_stay_within_the_tolerance_and_within_reach_of_it(dtype, stages, data, n):
    ratio = worst_ratio(stages, drawn(data, n, dtype))
    assert 0.01 < ratio < 1


@pytest.mark.parametrize("data", [normal, peaked, positive, equal_keys])
@pytest.mark.parametrize("dtype, stages", [("float32", TEXTBOOK), ("float32", ONLINE), ("bfloat16", ONLINE)])
def test_the_worst_case_holds_alone_and_is_never_below_the_tolerance(monkeypatch, dtype, stages, data):
    operands = drawn(data, 512, dtype)
    usual = ra.tolerance("softmax", *operands)
    monkeypatch.setattr("refattn.oracle.tolerance.spread", lambda count, alpha: CERTAIN)
    certain = ra.tolerance("softmax", *operands)
    assert all(np.all(few <= many) for few, many in zip(usual, certain, strict=True))
    assert any(np.any(few < many) for few, many in zip(usual, certain, strict=True))  # in peaked rows one term is all, and the same
    assert worst_ratio(stages, operands) < 1


@pytest.mark.parametrize("n", [200, 3000])
@pytest.mark.parametrize("same_keys, same_values", [(True, True), (True, False), (False, True)])
def test_repeated_terms_whose_roundings_all_go_one_way_stay_within(n, same_keys, same_values):
    """Sums from left to right of one number over and over: their error grows with n, not with its root."""
    rng = np.random.default_rng(n)
    q, k, v = (rng.standard_normal((m, 8)).astype(np.float32) for m in (16, n, n))
    k[:], v[:] = (k[:1] if same_keys else k), (v[:1] if same_values else v)
    scores = np.zeros((16, n), np.float32)
    for x in range(8):
        scores += q[:, x, None] * k[:, x]
    weights = np.exp(scores * np.float32(8**-0.5) - (scores * np.float32(8**-0.5)).max(axis=1, keepdims=True))
    total, out = np.zeros((16, 1), np.float32), np.zeros((16, 8), np.float32)
    for j in range(n):
        total += weights[:, j, None]
        out += weights[:, j, None] * v[j]
    heads = (x[None, None] for x in (q, k, v))
    assert ra.compare((out / total)[None, None], "softmax", *heads).worst.ratio < 1


def test_errors_common_to_numerator_and_denominator_count_with_the_spread_of_the_values():
    """o^ - o = sum_j p_j e_j (v_j - o) / (1 + sum_j p_j e_j), whatever the e_j."""
    rng = np.random.default_rng(0)
    w, v, e = rng.exponential(size=50), rng.standard_normal(50), rng.uniform(-0.5, 0.5, 50)
    p, o = w / w.sum(), w @ v / w.sum()
    moved = (w * (1 + e)) @ v / (w * (1 + e)).sum()
    assert moved - o == pytest.approx((p * e) @ (v - o) / (1 + p @ e), rel=1e-12)
    constant = np.full(50, 3.0)
    assert (w * (1 + e)) @ constant / (w * (1 + e)).sum() == pytest.approx(3.0, rel=1e-15)


# ---- real faults are larger than rounding -------------------------------------------------------------------------------------------


def hide_the_last(n_q, n_k, width):
    return planted.tiles(n_q, n_k - 1, width)


@pytest.mark.parametrize(
    "fault, data, n, params",
    [
        ({"factor": lambda scale, d, d_v, heads: 1.01 * d**-0.5}, normal, 1024, {}),
        ({"tiles": hide_the_last}, normal, 2000, {}),
        ({"visible": planted.moved_window(more_left=1)}, normal, 1024, {"window": (255, 0), "causal": True}),
        ({"finished": planted.capped_as(lambda s, cap, scale: s)}, peaked, 1024, {"softcap": 50.0}),
        ({"finished": planted.scores_through(ml_dtypes.bfloat16)}, peaked, 1024, {}),
    ],
    ids=["scale 1 % wrong", "last of 2000 keys dropped", "window of 257 for 256", "soft-cap missing", "scores stored in bfloat16"],
)
def test_small_faults_show_through_bfloat16(fault, data, n, params):
    operands = drawn(data, n, "bfloat16")
    assert worst_ratio(ONLINE, operands, **params) < 1
    assert worst_ratio(dataclasses.replace(ONLINE, **fault), operands, **params) > 1


# ---- every variant ---------------------------------------------------------------------------------------------------------------------


class Arithmetic:
    """NumPy and math for a definition that is to run in another precision: arrays of `dtype`, and functions that return it."""

    inf, nan = np.inf, np.nan

    def __init__(self, dtype):
        self.dtype = dtype

    def zeros(self, size):
        return np.zeros(size, self.dtype)

    def full(self, size, value):
        return np.full(size, value, self.dtype)

    def __getattr__(self, name):
        return lambda *numbers: getattr(np, name)(*(self.dtype(x) for x in numbers))


def in_precision(problem, dtype):
    """All outputs of the definition, its source run on numbers of `dtype`."""
    define, kind = problem.variant.define, Arithmetic(dtype)
    known = {**define.__globals__, "np": kind, "math": kind}
    run = type(define)(define.__code__, known, define.__name__, define.__defaults__)
    arrays = (x if x.dtype == bool else x.astype(dtype) for x in problem.arrays)
    arguments = (dtype(a) if isinstance(a, float) else a for a in problem.arguments)
    with np.errstate(all="ignore"):
        results = run(*arrays, *arguments)
    results = results if isinstance(results, tuple) else (results,)
    return {o.name: x for o, x in zip(problem.variant.outputs, results, strict=True)}


SMALL = every_size({"B": 1, "Hq": 2, "Hkv": 1, "T": 4, "S": 37, "D": 6, "E": 5, "Dq": 6, "Dk": 5, "A": 7, "M": 9})


def small_problems(name):
    """The variant at its defaults and at each other value of each parameter, with and without its optional operands."""
    variant, rng = catalog.variant(name), np.random.default_rng(5)
    dims = SMALL if "S" in variant.axes else {**SMALL, "T": 21}
    for params in [{}, *({p.name: value} for p in variant.params for value in p.tries)]:
        for optional in (False, True):
            operands = {}
            for o in variant.operands:
                if optional or not o.optional:
                    x = np.asarray(o.draw(rng, shape(o.axes, dims)))
                    operands[o.name] = x > -1 if o.kind == "boolean" else x.astype(np.float32)
            yield bind(variant, (), {**operands, **params}, [o.name for o in variant.outputs])


def ratios(problem, got, truth, profile):
    allowed = tolerances(problem, truth, profile)
    return {name: judge.ratio(x.astype(np.float64), truth[name], allowed[name]).max(initial=0.0) for name, x in got.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_output_of_every_definition_in_float32_is_within_its_tolerance(name):
    largest: dict[str, float] = {}
    for problem in small_problems(name):
        found = ratios(problem, in_precision(problem, np.float32), definition.run(problem), profiles.resolve("math", np.dtype(np.float32)))
        for output, r in found.items():
            assert r < 1, (output, problem.params, r)
            largest[output] = max(largest.get(output, 0.0), r)
    assert all(r > 1e-3 or r == 0.0 for r in largest.values()), f"a tolerance nothing comes near: {largest}"  # 0: copied, or counted
    assert largest[next(iter(largest))] > 0.0


@pytest.mark.parametrize("name", VARIANTS)
def test_the_worst_case_holds_for_every_variant(monkeypatch, name):
    monkeypatch.setattr("refattn.oracle.tolerance.spread", lambda count, alpha: CERTAIN)
    for problem in small_problems(name):
        found = ratios(problem, in_precision(problem, np.float32), definition.run(problem), profiles.resolve("math", np.dtype(np.float32)))
        assert all(r < 1 for r in found.values()), (problem.params, found)


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 2.0**-60, reason="long double is double here")
@pytest.mark.parametrize("name", VARIANTS)
def test_against_float64_the_definitions_own_error_is_allowed_for(name):
    """Both it and a correct candidate may be off by half the tolerance."""
    profile = profiles.resolve("math", np.dtype(np.float64))
    for problem in small_problems(name):
        double = dataclasses.replace(problem, dtype=np.dtype(np.float64))
        truth, exact = definition.run(double), in_precision(double, np.longdouble)
        allowed = tolerances(double, truth, profile)
        for output, x in exact.items():
            seen = np.isfinite(truth[output])
            assert np.all(np.abs(x[seen] - truth[output][seen]) <= allowed[output][seen] / 2)


def test_a_float64_tolerance_is_twice_the_bound():
    operands = drawn(normal, 50, "float64")
    problem = bind(catalog.variant("softmax"), operands, {}, ["out"])
    truth, profile = definition.run(problem), profiles.resolve("math", np.dtype(np.float64))
    once = Scored(problem, truth, problem.variant.plan(problem.dims, problem.params), profile, spread(truth["out"].size, 1e-3)).bounds()["out"]
    unit, tiny = 2.0**-53, 2.0**-1074
    expected = 2 * once + unit * (np.abs(truth["out"]) + 2 * once) + tiny
    np.testing.assert_allclose(tolerances(problem, truth, profile)["out"], expected, rtol=1e-12)


#: Calls whose divisor of 4e39 float32 does not hold.
TOO_LARGE = [("random_fourier", "everything at once")]


@pytest.mark.parametrize("name", VARIANTS)
def test_tolerances_are_positive_and_finite_wherever_the_answer_is(name):
    variant = catalog.variant(name)
    for probe in everything(variant):
        problem = bound_to(variant, probe)
        truth = definition.run(problem)
        for output, allowed in tolerances(problem, truth, profiles.resolve(None, np.dtype(np.float32))).items():
            assert allowed.shape == truth[output].shape
            assert np.all(allowed > 0), (probe.title, output)
            finite = np.isfinite(allowed[np.isfinite(truth[output])])
            assert np.all(finite) == ((name, probe.title) not in TOO_LARGE or output != "out"), (probe.title, output)


@pytest.mark.parametrize("name", [n for n in VARIANTS if {"mask"} <= {o.name for o in catalog.variant(n).operands} and n != "article_sdpa"])
def test_what_no_query_sees_does_not_reach_a_tolerance(name):
    variant = catalog.variant(name)
    rng = np.random.default_rng(0)
    operands = {o.name: o.draw(rng, shape(o.axes, SMALL)) for o in variant.operands if not o.optional}
    mask = np.arange(SMALL["S"]) < 20
    plan = variant.plan(SMALL, {p.name: p.default for p in variant.params})
    found = []
    for fill in (0.0, np.nan, np.inf, 1e30):
        poisoned = {n: x.copy() for n, x in operands.items()}
        for part in {plan.key, plan.value}:
            poisoned[part][..., 20:, :] = fill
        problem = bind(variant, (), {**poisoned, "mask": mask}, ["out"])
        found.append(tolerances(problem, definition.run(problem), profiles.resolve("math", np.dtype(np.float32)))["out"])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_hidden_keys_and_values_do_not_move_a_causal_windowed_tolerance():
    q, k, v = drawn(normal, 64, "float32")
    hidden = np.s_[:, :, :20]
    usual = ra.tolerance("softmax", q, k, v, window=(5, 0))
    k[hidden], v[hidden] = np.nan, np.inf
    for one, two in zip(usual, ra.tolerance("softmax", q, k, v, window=(5, 0)), strict=True):
        np.testing.assert_array_equal(one, two)


# ---- families and options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_nobody_analysed_is_bounded_by_how_its_definition_bends(name):
    """The same definitions without plan or recurrence: the statistical bound by perturbation holds for them too."""
    for problem in small_problems(name):
        unknown = dataclasses.replace(problem, variant=dataclasses.replace(problem.variant, plan=None, recurrence=None))
        truth = definition.run(problem)
        found = ratios(unknown, in_precision(problem, np.float32), truth, profiles.resolve("math", np.dtype(np.float32)))
        assert found["out"] < 1, (problem.params, found)


def test_each_family_is_bounded_by_its_own_analysis():
    profile, f32 = profiles.resolve("math", np.dtype(np.float32)), np.dtype(np.float32)
    for name in ("linear", "retention"):
        problem = next(small_problems(name))
        truth = definition.run(problem)
        lam = spread(sum(truth[output].size for output in problem.returns), 1e-3)
        bound = recurrent_bounds.recurrent(problem, truth, profile, lam)["out"] * (1 + 2.0**-29)  # and the definition's own error in float64
        unit, tiny = np.finfo(f32).eps / 2, float(np.finfo(f32).smallest_subnormal)
        np.testing.assert_allclose(tolerances(problem, truth, profile)["out"], bound + unit * (np.abs(truth["out"]) + bound) + tiny, rtol=1e-12)
        loose = perturbed(problem, dict(truth), profile, lam)["out"]
        assert not np.allclose(bound, loose)


def test_how_many_deviations_are_allowed_follows_from_the_chance_of_a_false_alarm():
    assert spread(10**6, 1e-3) == pytest.approx(6.5, abs=0.1)
    assert spread(10**6, 1e-3) == math.sqrt(2 * math.log(2e9))
    assert spread(10, 1e-3) < spread(10, 1e-6) < spread(10**5, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_more_is_allowed_to_whoever_rounds_more(dtype):
    operands = drawn(normal, 40, dtype)
    math_, flash, eager = (ra.tolerance("softmax", *operands, profile=name).out.mean() for name in ("math", "flash", "eager"))
    assert math_ < flash < eager


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_eager_arithmetic_in_a_wide_format_is_the_textbooks(dtype):
    operands = drawn(normal, 40, dtype)
    np.testing.assert_array_equal(*(ra.tolerance("softmax", *operands, profile=name).out for name in ("math", "eager")))


def test_tolerances_come_in_the_callers_layout():
    q, k, v = (np.ones((2, n, 3, d), np.float32) for n, d in ((4, 6), (5, 6), (5, 7)))
    found = ra.tolerance("softmax", q, k, v, layout="BTHD")
    assert found.out.shape == (2, 4, 3, 7) and found.lse.shape == (2, 3, 4) and found.weights.shape == (2, 3, 4, 5)
    assert ra.tolerance("softmax", q, k, v, layout="BTHD", returns="lse")._fields == ("lse",)


def test_a_window_side_without_limit_is_allowed_as_much_as_no_window():
    operands = drawn(normal, 30, "float32")
    np.testing.assert_array_equal(ra.tolerance("softmax", *operands, window=(UNBOUNDED, None)).out, ra.tolerance("softmax", *operands).out)


# ---- numbers that leave the format ---------------------------------------------------------------------------------------------------

RECURRENT = [name for name in VARIANTS if catalog.variant(name).recurrence is not None]
STATES = [name for name in RECURRENT if catalog.variant(name).family == "state"]  # whose definitions evaluate no feature map in an order of their own
SINGLE = np.dtype(np.float32)
LEAST = 2.0**-149  # float32's smallest number


def extreme_problems(name, seeds=20):
    """Operands about the smallest and the large numbers of float32, and at the ends of their domains."""
    variant = catalog.variant(name)
    for seed in range(seeds):
        rng, operands = np.random.default_rng(seed), {}
        dims = {axis: int(rng.integers(1, 7)) for axis in variant.axes} | {"B": 1}
        dims |= {axis: dims[group] for axis, group in (("Hq", "Hkv"), ("H", "G")) if {axis, group} <= dims.keys()}
        for o in variant.operands:
            if not o.optional or rng.random() < 0.5:
                x = np.asarray(o.draw(rng, shape(o.axes, dims)), np.float64)
                size = rng.integers(3) if o.within is None else 0
                operands[o.name] = (x, LEAST * np.round(4 * x), 2.0**30 * x)[size].astype(np.float32)
        yield bind(variant, (), operands, [o.name for o in variant.outputs])


@pytest.mark.parametrize("name", STATES)
def test_what_float32_loses_of_extreme_operands_is_allowed_for(name):
    """A loop in float32 loses products below its smallest number, and states above its largest."""
    lost = 0.0
    for problem in extreme_problems(name):
        truth = definition.run(problem)
        allowed = tolerances(problem, truth, profiles.resolve("math", SINGLE))
        for output, x in in_precision(problem, np.float32).items():
            held = np.isfinite(allowed[output]) & (np.abs(truth[output]) < np.finfo(np.float32).max)
            r = judge.ratio(x.astype(np.float64), truth[output], allowed[output])[held].max(initial=0.0)
            assert r < 1, (output, problem.given, r)
            lost = max(lost, r)
    assert lost > 1e-3


@pytest.mark.parametrize("name", RECURRENT)
def test_nothing_is_lost_of_ordinary_numbers(name):
    for problem in small_problems(name):
        truth, units = definition.run(problem), recurrent_bounds.rounding(profiles.resolve("math", SINGLE))
        exact = recurrent_bounds.run(
            recurrent_bounds.prepared(recurrent_bounds.Lowering(problem, problem.recurrence).lowered()), recurrent_bounds.Form()
        )
        lost = recurrent_bounds.outputs(problem, extremes(problem, problem.recurrence, units, exact))
        allowed = tolerances(problem, truth, profiles.resolve("math", SINGLE))
        assert all(np.all(x <= 1e-6 * allowed[output] + 1e6 * LEAST) for output, x in lost.items())


def one_token(**operands):
    return {name: np.full((1,) * axes, x, np.float32) for name, (x, axes) in operands.items()}


def test_a_product_below_the_smallest_number_costs_what_it_is_multiplied_by():
    """beta k rounds from 0.9 to 1 times the smallest number, and the query makes a large number of the difference."""
    operands = one_token(q=(2.0**30, 4), k=(3 * LEAST, 4), v=(1.0, 4), beta=(0.3, 3))
    exact = ra.attend("delta", **{name: x.astype(np.float64) for name, x in operands.items()})
    kernel = operands["q"] * (operands["beta"][..., None] * operands["k"]) * operands["v"]
    error, (allowed,) = np.abs(kernel - exact).item(), ra.tolerance("delta", **operands, returns="out")
    assert error > 0.09 * LEAST * 2.0**30
    assert error < allowed.item() < 100 * LEAST * 2.0**30


def forgotten_overflow():
    """Token 66 writes what float32 cannot hold, and token 67 forgets it."""
    q, k, v = (np.ones((1, 1, 70, 2), np.float32) for _ in range(3))
    gate = np.full((1, 1, 70), -0.1, np.float32)
    k[:, :, 66] = v[:, :, 66] = 1e25
    gate[:, :, 67] = -200.0
    return {"q": q, "k": k, "v": v, "gate": gate}


@pytest.mark.parametrize("profile, first", [("recurrent", 66), ("chunked", 64), ("math", 0)])
def test_a_state_that_overflows_makes_undecidable_what_may_read_it(profile, first):
    operands = forgotten_overflow()
    exact = ra.attend("simple_gla", **{name: x.astype(np.float64) for name, x in operands.items()})
    assert np.abs(exact[:, :, 67:]).max() < 100
    found = ra.tolerance("simple_gla", **operands, profile=profile)
    undecidable = np.isinf(found.out).all(axis=(0, 1, 3))
    np.testing.assert_array_equal(undecidable, np.arange(70) >= first)
    assert np.isfinite(found.out[:, :, :first]).all() and np.isinf(found.state).all()


def test_the_same_state_in_float64_overflows_nowhere():
    wide = {name: x.astype(np.float64) for name, x in forgotten_overflow().items()}
    assert all(np.isfinite(x).all() for x in ra.tolerance("simple_gla", **wide))


def test_an_inverse_overflows_where_no_state_does():
    """Nothing is written, so that every state is 0; the chunked form multiplies that by powers of the squares of keys."""
    operands = {"q": np.ones((1, 1, 8, 2)), "k": np.full((1, 1, 8, 2), 1e10), "v": np.zeros((1, 1, 8, 2)), "beta": np.ones((1, 1, 8))}
    operands = {name: x.astype(np.float32) for name, x in operands.items()}
    assert np.isfinite(ra.tolerance("delta", **operands, profile="recurrent").out).all()
    assert np.isinf(ra.tolerance("delta", **operands, profile="chunked").out).all()


def test_what_is_no_number_because_an_operand_is_none_stays_decided():
    operands = forgotten_overflow()
    operands["k"][:, :, 66] = operands["v"][:, :, 66] = np.nan
    exact, found = ra.attend("simple_gla", **operands), ra.tolerance("simple_gla", **operands).out
    assert np.isnan(exact[:, :, 66:]).all() and np.isfinite(found).all()


def test_what_is_undecidable_may_be_anything_and_nothing_else_may():
    """A running sum that leaves float32 and comes back, token by token."""
    one = np.ones((1, 1, 3, 1), np.float32)
    v = np.array([3e38, 3e38, -3e38], np.float32).reshape(1, 1, 3, 1)
    call = {"q": one, "k": one, "v": v, "gate": np.zeros((1, 1, 3), np.float32), "scale": 1.0, "profile": "recurrent"}
    assert np.isinf(ra.tolerance("simple_gla", **call).out.ravel()).tolist() == [False, True, True]
    for last in (3e38, np.inf, np.nan):
        assert ra.compare(np.array([3e38, np.inf, last], np.float32).reshape(v.shape), "simple_gla", **call).passed
    for first in (2.9e38, np.inf, np.nan):
        assert not ra.compare(np.array([first, np.inf, 3e38], np.float32).reshape(v.shape), "simple_gla", **call).passed
