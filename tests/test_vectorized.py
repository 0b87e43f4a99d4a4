"""Vectorized forms: their values are the definition's, and gradients back through them those of the definition run on dual numbers."""

import numpy as np
import pytest
from catalogue import CALLS, LADDER, draw, flops, problem_of, rounding
from test_gradients import SMALL, directional

import refattn as ra
from refattn import backends, catalog, definition
from refattn.engine import vectorized
from refattn.spec import Variant

WITH_FORM = [c for c in CALLS if c.values[0].vectorized is not None]


def values(variant: Variant, x, params):
    """All outputs by whole arrays, in the order of the definition's."""
    problem = problem_of(variant, x, params)
    with np.errstate(all="ignore"):
        found = variant.vectorized(vectorized.in_full(problem), vectorized.params_of(problem))
    assert found.keys() == {o.name for o in variant.outputs}
    return tuple(np.asarray(found[o.name]) for o in variant.outputs)


def assert_values(variant, x, params):
    allowed = rounding(lambda x: values(variant, x, params), x, variant, flops(variant, x, params))
    expected = definition.run(problem_of(variant, x, params))
    for (name, y), found, off in zip(expected.items(), values(variant, x, params), allowed, strict=True):
        assert found.shape == y.shape, name
        same = (found == y) | (np.isnan(found) & np.isnan(y))
        assert np.all(np.abs(np.subtract(found, y, where=~same, out=np.zeros(y.shape))) <= off), name


@pytest.mark.parametrize("dims", LADDER.values(), ids=LADDER)
@pytest.mark.parametrize("variant, params", WITH_FORM)
def test_values_are_those_of_the_definition(variant, params, dims):
    assert_values(variant, draw(variant, dims, seed=3), params)


@pytest.mark.compiled
@pytest.mark.parametrize("n", [63, 64, 130])
@pytest.mark.parametrize("variant, params", WITH_FORM)
def test_lengths_around_those_of_chunks(variant, params, n):
    assert_values(variant, draw(variant, {**SMALL, "D": 5, "T": n, "S": n}, seed=4), params)


def assert_gradients(variant, x, params, by=vectorized.gradients):
    """Along a random direction of each operand, within what gradients answer to rounded operands, of thrice the definition's operations.

    What cancels whatever operands are (a bias of all keys) answers to nothing and has its roundings all the same: those of every term of the sum that
    is differentiated, over the size of the operand.
    """
    problem, rng = problem_of(variant, x, params), np.random.default_rng(11)
    results = definition.run(problem)
    cotangents = {name: np.where((np.abs(y) < 1e6) | np.isinf(y), rng.standard_normal(y.shape), 0.0) for name, y in results.items()}

    def gradients(x):
        return tuple(by(problem_of(variant, x, params), cotangents).values())

    operations = 3 * flops(variant, x, params)
    allowed = rounding(gradients, x, variant, operations)
    terms = sum(np.sum(np.abs(cotangents[name] * np.where(np.isfinite(y), y, 0.0))) for name, y in results.items())
    found = by(problem, cotangents)
    assert list(found) == ["d_" + name for name in problem.given if variant.operand(name).kind == "real"]
    for (name, d), off in zip(found.items(), allowed, strict=True):
        given = x[name.removeprefix("d_")]
        assert d.shape == np.shape(given)
        direction = np.where(np.isfinite(given), rng.standard_normal(np.shape(given)), 0.0)
        exact, _ = directional(problem, cotangents, {name.removeprefix("d_"): direction})
        size = np.sqrt(np.mean(np.where(np.isfinite(given), given, 0.0) ** 2)) or 1.0
        tolerance = np.sum((off + 2.0**-53 * operations * terms / size) * np.abs(direction))
        assert abs(np.sum(d * direction) - exact) <= tolerance, name


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("variant, params", WITH_FORM)
def test_gradients_are_those_of_dual_numbers(variant, params, optional):
    # Two channels are all but +1 and -1 once they are normalised.
    assert_gradients(variant, draw(variant, {**SMALL, "D": 3}, seed=5, optional=optional), params)


@pytest.mark.parametrize("variant", dict.fromkeys(c.values[0] for c in WITH_FORM), ids=lambda v: v.name)
def test_a_call_takes_them_unless_the_definition_is_asked_for(variant):
    x = draw(variant, SMALL)
    problem = problem_of(variant, x, {})
    d_out = np.ones(definition.run(problem)["out"].shape)
    assert not backends.gradients(problem, {"out": d_out}, "auto").errors  # a definition's gradients have error estimates
    assert backends.gradients(problem, {"out": d_out}, "definition").errors


@pytest.mark.parametrize("name", ["aft_full", "aft_local", "aft_conv"])
def test_exponentials_that_would_underflow_apart(name):
    variant = catalog.variant(name)
    x = draw(variant, {**SMALL, "D": 3}, seed=6)
    x["w"] = 500.0 * x["w"]
    x["k"] = x["k"] - x["k"].max()
    x["k"][:, ..., 0] -= 400.0
    assert_values(variant, x, {})
    assert_gradients(variant, x, {})


def test_what_is_not_finite_is_a_constant():
    variant = catalog.variant("forgetting")
    x = draw(variant, SMALL, seed=1)
    x["gate"][..., 2] = -np.inf
    cotangents = {"out": np.ones((1, 4, 3, 3)), "lse": np.ones((1, 4, 3))}
    found = vectorized.gradients(problem_of(variant, x, {}), cotangents)
    assert np.all(found["d_gate"][..., 2] == 0.0) and all(np.isfinite(d).all() for d in found.values())


def test_an_empty_axis_is_left_to_the_definition():
    variant = catalog.variant("stick_breaking")
    x = draw(variant, {**SMALL, "S": 0})
    assert np.all(ra.gradients("stick_breaking", **x, d_out=np.ones((1, 4, 3, 3))).d_q == 0.0)


def test_packed_sequences_are_calls_of_their_own_and_may_be_empty():
    variant, bounds = catalog.variant("titans"), np.array([0, 3, 3, 7])
    parts = [draw(variant, {**SMALL, "T": n}, seed=n, optional=False) for n in np.diff(bounds)]
    packed = {name: np.concatenate([np.moveaxis(x[name][0], 1, 0) for x in parts], axis=0) for name in parts[0]}
    d_outs = [np.random.default_rng(8).standard_normal(ra.attend("titans", **x).shape) for x in parts]
    found = ra.gradients("titans", **packed, d_out=np.concatenate([np.moveaxis(d[0], 1, 0) for d in d_outs]), layout=ra.Packed(bounds))
    for first, last, x, d_out in zip(bounds, bounds[1:], parts, d_outs, strict=False):
        alone = ra.gradients("titans", **x, d_out=d_out)
        for name in found._fields:
            np.testing.assert_array_equal(getattr(found, name)[first:last], np.moveaxis(getattr(alone, name)[0], 1, 0))
