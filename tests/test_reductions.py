"""Reductions where their logarithms, factors and maxima end, against the definitions: values and gradients."""

import math

import numpy as np
import pytest
from catalogue import draw, flops, rounding
from test_catalogue import close
from test_state_engine import LONG, SMALL, by_definition

import refattn as ra
from refattn import catalog

pytestmark = pytest.mark.compiled

FORMS = ("recurrent", "chunked")
DIMS = {**LONG, "T": 70, "S": 70}


def agrees(name, operands, returns, **params):
    """Values in two forms."""
    variant = catalog.variant(name)
    define = by_definition(variant, params, returns)
    tolerances = rounding(define, operands, variant, flops(variant, operands, params))
    for form in FORMS:
        found = ra.attend(name, **operands, **params, returns=returns, form=form)
        for part, a, b, tolerance in zip(returns, found, define(operands), tolerances, strict=True):
            close(a, b, tolerance, f"{part}, {form}")


@pytest.mark.parametrize("largest", [0.0, 1.0, 1e9])
def test_factors_of_longhorn_between_zero_and_one(largest):
    """Tokens that write nothing, keys of one entry, and weights that leave nothing of the past."""
    variant, rng = catalog.variant("longhorn"), np.random.default_rng(1)
    x = draw(variant, SMALL)
    x["beta"] = np.where(rng.random(x["beta"].shape) < 0.3, 0.0, largest)
    x["k"][:, :, 1, 0] = 0.0
    agrees("longhorn", x, ("out", "state"))
    d_out = rng.standard_normal((1, 2, 3, 2))
    expected = ra.gradients("longhorn", **x, d_out=d_out, backend="definition")
    for form in FORMS:

        def gradients(operands, form=form):
            return tuple(ra.gradients("longhorn", **operands, d_out=d_out, form=form))

        tolerances = rounding(gradients, x, variant, 4 * flops(variant, x, {}))
        for name, d, wanted, tolerance in zip(x, gradients(x), expected, tolerances, strict=True):
            close(d, wanted, expected.errors["d_" + name] + tolerance, f"{name}, {form}")


@pytest.mark.parametrize("strength", [-50.0, -1e4, -math.inf])
def test_a_curvature_fades_without_overflow(strength):
    x = draw(catalog.variant("precond_delta"), DIMS)
    x["curvature_gate"][np.random.default_rng(4).random(x["curvature_gate"].shape) < 0.3] = strength
    agrees("precond_delta", x, ("out", "state", "curvature"))
    found = ra.gradients("precond_delta", **x, d_out=np.ones((1, 2, 70, 3)), form="recurrent")
    assert all(np.isfinite(d).all() for d in found)


@pytest.mark.parametrize("causal", [False, True])
def test_averages_of_keys_of_any_size(causal):
    x = draw(catalog.variant("aft_simple"), {**DIMS, "S": 50})
    nothing = np.random.default_rng(5).random(x["k"].shape) < 0.3
    x["k"], x["q"] = np.where(nothing, -np.inf, 700.0 * x["k"]), 500.0 * x["q"]
    agrees("aft_simple", x, ("out", "state", "mass", "max"), causal=causal)
    x["k"][:] = -np.inf  # nothing comes, and there may have been something
    agrees("aft_simple", x, ("out", "state", "mass", "max"), causal=causal)
    x["initial_max"][:] = -np.inf
    agrees("aft_simple", x, ("out", "state", "mass", "max"), causal=causal)
    assert (ra.attend("aft_simple", **x, causal=causal, form="recurrent") == 0.0).all()
