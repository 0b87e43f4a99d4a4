"""The example's Jacobians are the derivatives of its outputs, and what it says of them is so."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "long_range.py"
pytestmark = pytest.mark.compiled  # thousands of gradients in one call


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("long_range", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shares(example):
    x = example.tokens(np.random.default_rng(1))
    return {name: example.influence(jacobian(x)) for name, (_, jacobian) in example.mechanisms().items()}


@pytest.mark.parametrize("n", range(5))
def test_a_jacobian_is_what_outputs_change_by(example, n):
    rng = np.random.default_rng(5)
    x = example.tokens(rng)[:24]
    outputs, jacobian = list(example.mechanisms().values())[n]
    direction = rng.standard_normal(x.shape)
    step = 2.0**-10
    coarse, fine = ((outputs(x + h * direction) - outputs(x - h * direction)) / (2 * h) for h in (step, step / 2))
    extrapolated = (4 * fine - coarse) / 3  # what is left is of the order of step**4, and of rounding / step
    predicted = np.einsum("icjd,jd->ic", jacobian(x), direction)
    tolerance = np.abs(fine - coarse) * 2.0**-4 + 2.0**-53 * 2**14 / step * np.max(np.abs(outputs(x)))
    assert np.all(np.abs(predicted - extrapolated) <= tolerance + 2.0**-30 * np.max(np.abs(predicted)))


def test_no_token_has_a_share_in_an_earlier_output(shares):
    for x in shares.values():
        assert not np.triu(x, 1).any()
        np.testing.assert_allclose(x.sum(axis=1), 1.0)


def test_a_convolution_sees_no_further_than_its_kernel(example, shares):
    distances = example.by_distance(shares["convolution"])
    assert (distances[: example.KERNEL] > 0).all() and not np.nan_to_num(distances[example.KERNEL :]).any()


def test_attention_finds_a_repeated_token_and_a_recurrent_network_does_not(example, shares):
    again = {name: example.found_again(x) for name, x in shares.items()}
    assert again["softmax"] > 10.0
    assert 0.1 < again["GRU"] < 10.0
    distances = example.by_distance(shares["GRU"])
    assert distances[64] < 1e-6 * distances[0]
    attention = example.by_distance(shares["softmax"])
    assert attention[64] > 1e-3 * attention[1]


def test_it_draws(example, shares, tmp_path):
    example.draw(shares, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
