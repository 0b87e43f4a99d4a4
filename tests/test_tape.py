"""Gradients by recording NumPy, against numerical differentiation of the same NumPy."""

import numpy as np
import pytest
from scipy.differentiate import jacobian

from refattn.engine import tape
from refattn.engine.tape import Traced, collect

RNG = np.random.default_rng(0)
#: Arguments at which the functions that cannot take every number are differentiated.
WITHIN = {np.log: (0.5, 2.0), np.sqrt: (0.5, 2.0), np.log1p: (-0.5, 2.0), np.power: (0.5, 2.0), np.divide: (0.5, 2.0), np.absolute: (-2.0, -0.8)}


def agrees(f, *arguments):
    """All gradients of sum(weights * f), by recording and numerically, to eight digits."""
    weights = np.random.default_rng(1).standard_normal(np.shape(f(*arguments)))
    leaves = {str(n): Traced(x) for n, x in enumerate(arguments)}
    found = collect([(f(*leaves.values()), weights)], leaves)
    for n, x in enumerate(arguments):

        def phi(flat, n=n, x=x):  # [elements, points] -> [points]
            calls = np.moveaxis(flat.reshape(x.size, -1), -1, 0)
            values = [np.sum(weights * f(*arguments[:n], one.reshape(x.shape), *arguments[n + 1 :])) for one in calls]
            return np.reshape(values, flat.shape[1:])

        assert found[str(n)].shape == x.shape
        np.testing.assert_allclose(found[str(n)].ravel(), jacobian(phi, x.ravel()).df, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ufunc", tape.SLOPES, ids=lambda f: f.__name__)
def test_every_function_of_numbers_has_its_slope(ufunc):
    shapes = ((2, 3), (3,))[: ufunc.nin]
    agrees(ufunc, *(RNG.uniform(*WITHIN.get(ufunc, (-2.0, 2.0)), shape) for shape in shapes))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: np.cumsum(x, axis=1),
        lambda x: np.logaddexp.accumulate(x, axis=1),
        lambda x: np.maximum.accumulate(x, axis=0),
        lambda x: np.sum(x, axis=0),
        lambda x: np.sum(x, axis=1, keepdims=True) * x,
        lambda x: np.repeat(x, 3, axis=0),
        lambda x: np.swapaxes(x, 0, 1)[:, 1:],
        lambda x: np.concatenate([x[:1], np.ones((1, 4)), x * x], axis=0),
        lambda x: np.where(x > 0.0, x, x**2.0),
        lambda x: np.broadcast_to(x[:, None], (3, 2, 4)) * 2.0,
        lambda x: np.reshape(x, (2, 6))[..., 0],
        lambda x: 3.0 / (2.0 - x) + (x - 1.0) * x.reshape(3, 4),
        lambda x: np.max(x, axis=1, keepdims=True) * np.max(x * x, axis=0),
        lambda x: x[np.array([[0], [2]]), np.array([1, 1, 3])] * x[:2, :3],
        lambda x: np.linalg.solve(x[:, :3] @ np.swapaxes(x[:, :3], 0, 1) + np.eye(3), x),
    ],
)
def test_every_function_of_arrays_passes_gradients_on(f):
    agrees(f, RNG.uniform(-1.5, 1.5, (3, 4)))


@pytest.mark.parametrize("shapes", [((3, 4), (4, 2)), ((2, 3, 4), (4, 2)), ((1, 2, 3), (5, 3, 2))])
def test_products_of_matrices_pass_gradients_on(shapes):
    agrees(np.matmul, *map(RNG.standard_normal, shapes))


def test_a_singular_matrix_solves_nothing_and_leaves_the_others_alone():
    x = Traced(np.array([[[1.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 4.0]]]))
    y = np.linalg.solve(x, np.ones((2, 2, 1)))
    assert np.isnan(y.value[0]).all() and y.value[1].ravel().tolist() == [0.5, 0.25]


def test_what_is_used_twice_gets_both_gradients():
    agrees(lambda x, y: x * y + np.exp(x) * x[::-1], RNG.standard_normal(3), RNG.standard_normal(3))


def test_what_does_not_depend_on_a_leaf_leaves_it_without_gradient():
    x = Traced([1.0, 2.0])
    assert (collect([(np.ones(2), np.ones(2))], {"x": x})["x"] == 0.0).all()
    assert type(x > 1.0) is type(np.where(x > 1.0, 1.0, 0.0)) is np.ndarray


def test_a_share_of_nothing_is_no_nan():
    x = Traced([-np.inf, -np.inf, 0.0, 1.0])
    d = collect([(np.logaddexp.accumulate(x, axis=0), np.ones(4))], {"x": x})["x"]
    assert np.isfinite(d).all() and abs(d.sum() - 2.0) < 1e-15


@pytest.mark.parametrize("f", [np.tan, np.linalg.norm, np.add.reduce, lambda x: np.multiply(x, 2.0, where=True)])
def test_what_is_not_there_is_refused(f):
    with pytest.raises(TypeError):
        f(Traced([1.0, 2.0]))
