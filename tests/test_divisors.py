"""Tolerances of quotients whose divisor cancels: infinite where its rounding is as large as it is, as wide as that makes them where it is not."""

import numpy as np
import pytest

import refattn as ra

pytestmark = pytest.mark.compiled

FORMS = ("recurrent", "chunked", "quadratic")
UNITS = {np.float32: 2.0**-24, np.float64: 2.0**-53}


def random_fourier(dtype, excess):
    """cos(w (q - k)), summed over keys at 0 and 1: cos(w q) + cos(w (q - 1)) is 0 at q = 1/2 + pi / 2 w; relatively to its terms, `excess`."""
    q = 0.5 + np.pi / 2.0 - excess
    k, v = np.array([0.0, 1.0]).reshape(1, 1, 2, 1), np.array([1.0, -2.0]).reshape(1, 1, 2, 1)
    return {name: np.asarray(x, dtype) for name, x in {"q": np.full((1, 1, 1, 1), q), "k": k, "v": v, "w": np.ones((1, 1))}.items()}


def mlstm(dtype, excess):
    """Two keys that cancel, held far above the floor exp(-max)."""
    k, v = np.array([1.0, excess - 1.0]).reshape(1, 1, 2, 1) / 3.0, np.array([1.0, -2.0]).reshape(1, 1, 2, 1)
    gates = {"input_gate": np.full((1, 1, 2), 60.0), "gate": np.full((1, 1, 2), 0.0)}
    return {name: np.asarray(x, dtype) for name, x in {"q": np.full((1, 1, 2, 1), 0.7), "k": k, "v": v, **gates}.items()}


CASES = {
    "random_fourier": (random_fourier, {"eps": 0.0, "causal": False, "kernel": "gaussian"}),
    "mlstm": (mlstm, {"eps": 0.0}),
}


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("name", CASES)
def test_a_divisor_allows_what_its_rounding_makes_of_the_output(name, dtype):
    make, params = CASES[name]
    for excess, known in ((0.25, False), (8.0, False), (2.0**10, True), (2.0**20, True)):  # the divisor, in what its terms are rounded by
        x = make(dtype, excess * UNITS[dtype])
        wide = {name: a.astype(np.float64) for name, a in x.items()}
        size = np.abs(ra.attend(name, **wide, **params, backend="definition").ravel()[-1])
        tolerance = ra.tolerance(name, **x, **params).out.ravel()[-1]
        assert size / excess < tolerance < 2.0**9 * size / excess if known else tolerance > size  # some roundings, each some deviations
        for form in FORMS:
            assert ra.compare(ra.attend(name, **x, **params, form=form), name, **x, **params).passed


def test_what_a_divisor_does_not_fall_below_limits_what_is_allowed():
    """mlstm's divisor is at least exp(-max) + eps, and a sum of any rounding over that is a number."""
    x = mlstm(np.float32, 0.25 * UNITS[np.float32])
    assert np.isinf(ra.tolerance("random_fourier", **random_fourier(np.float32, 0.0), **CASES["random_fourier"][1]).out).all()
    assert ra.tolerance("mlstm", **x, eps=0.0).out.ravel()[-1] < 2.0 * np.exp(60.0)
    assert ra.tolerance("mlstm", **x, eps=0.5).out.ravel()[-1] < 1e-5
