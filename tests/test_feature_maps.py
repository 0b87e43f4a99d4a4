"""Feature maps: their derivatives, the kernels they stand for, extreme inputs, and the recurrences that variants say with them."""

import importlib
import math
import pkgutil

import numpy as np
import pytest
from catalogue import CALLS as CATALOGUE_CALLS
from catalogue import GENERAL, draw, flops, outputs, problem_of, rounding
from test_costs import counts

import refattn.pieces.feature_maps as package
from refattn import catalog, costs
from refattn.pieces.feature_maps import (
    cosine_reweight,
    dpfp,
    elu_plus_one,
    exp,
    favor,
    favor_trig,
    focused,
    hedgehog,
    l2_unit,
    power,
    projection,
    random_relu,
    rebased,
    relu,
    rfa,
    silu,
    softmax_features,
    t2r,
    taylor2,
)

UNIT = 2.0**-53


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


W, W_HEADS, B_HEADS = numbers(1, 6, 3), numbers(2, 4, 6, 3), numbers(3, 4, 6)
GAMMA, BETA = numbers(4, 4, 3), numbers(5, 4, 3)

#: Every map with weights and numbers: on x of [2 4 5 3], 4 heads and 5 tokens.
CALLS = [
    (elu_plus_one, (), ()),
    (relu, (), (0.25,)),
    (exp, (), ()),
    (silu, (), ()),
    (softmax_features, (), ()),
    (l2_unit, (), ()),
    (projection, (W,), ()),
    (projection, (W_HEADS,), ()),
    (t2r, (W_HEADS, B_HEADS), ()),
    (t2r, (W, B_HEADS[0]), ()),
    *((hedgehog, (W_HEADS, B_HEADS), (form,)) for form in range(3)),
    *((favor, (W,), (0.5, eps, stabilizer)) for eps in (0.0, 0.125) for stabilizer in range(3)),
    *((favor_trig, (W,), (0.5, power)) for power in (0.0, 1.0)),
    (random_relu, (W,), (0.5, 0.25)),
    (rfa, (W, numbers(6, 3)), ()),
    (cosine_reweight, (np.arange(1.0, 6.0),), (7.0,)),
    (dpfp, (np.array([1.0, 0.5, 2.0, 1.0]),), ()),
    *((power, (), (p, 0.5)) for p in (1, 2, 4)),
    (taylor2, (), (0.5,)),
    (rebased, (GAMMA, BETA), (1e-5, 0.5)),
    (focused, (), (3.0,)),
]
IDS = [f"{piece.__name__.rpartition('.')[2]}-{n}" for n, (piece, _, _) in enumerate(CALLS)]


def test_every_map_is_here():
    found = {importlib.import_module(info.name) for info in pkgutil.iter_modules(package.__path__, package.__name__ + ".")}
    assert found == {piece for piece, _, _ in CALLS}


@pytest.mark.parametrize("piece, weights, settings", CALLS, ids=IDS)
def test_a_pullback_is_the_derivative_by_a_complex_step(piece, weights, settings):
    """f(x + ih) = f(x) + ih f'(x) to rounding for a step that cannot be seen beside x: nothing is subtracted."""
    arguments = [numbers(7, 2, 4, 5, 3), *weights]
    y = piece.features(*arguments, *settings)
    d = numbers(8, *y.shape)
    found = piece.pullback(d, *arguments, *settings)
    assert len(found) == len(arguments)
    step = 2.0**-200
    for n, gradient in enumerate(found):
        assert gradient.shape == arguments[n].shape
        for at in list(np.ndindex(gradient.shape))[::7]:
            moved = [x.astype(complex) if m == n else x for m, x in enumerate(arguments)]
            moved[n][at] += 1j * step
            terms = d * piece.features(*moved, *settings).imag / step
            # Sums of fewer than 2 * 4 * 5 * 54 terms; the terms' own errors are those of a few dozen operations on numbers of their size.
            assert abs(gradient[at] - terms.sum()) <= UNIT * (y.size + 64) * max(np.abs(terms).sum(), np.abs(gradient).max()), at


def kernel(piece, x, y, *arguments):
    return piece.features(x, *arguments) @ piece.features(y, *arguments).mT


def assert_close(actual, desired, roundings, size):
    """`size` is what the sum of the absolute values of the terms is at most."""
    assert np.all(np.abs(actual - desired) <= UNIT * roundings * size)


def test_kernels_in_closed_form():
    x, y = numbers(1, 5, 4), 2.0 * numbers(2, 7, 4)
    s, size = 0.5 * x @ y.T, 0.5 * np.abs(x) @ np.abs(y).T
    for p in (1, 2, 4):
        assert_close(kernel(power, x, y, p, 0.5), s**p, 4**p + 8 * p, size**p)
    assert_close(kernel(taylor2, x, y, 0.5), 1.0 + s + s * s / 2.0, 64, 1.0 + size + size * size)
    positions = np.arange(1.0, 8.0)
    waves = cosine_reweight.features(x, positions[:5], 9.0) @ cosine_reweight.features(y, positions, 9.0).T
    r = np.maximum(x, 0.0) @ np.maximum(y, 0.0).T
    assert_close(waves, r * np.cos(np.pi / 2.0 * (positions[:5, None] - positions) / 9.0), 40, r + 1e-300)
    signed = np.sign(np.diag([1.0, -2.0, 3.0]))
    assert np.all(dpfp.features(signed, np.array([1.0])) == 0.0)  # one part alone has no neighbour to be multiplied with


def test_the_powers_inner_product_keeps_the_length():
    x = numbers(1, 6, 5)
    lengths = np.linalg.norm(np.maximum(x, 0.0), axis=-1)
    assert_close(np.linalg.norm(focused.features(x, 3.0), axis=-1), lengths, 40, lengths)
    assert_close(focused.features(x, 1.0), np.maximum(x, 0.0), 40, lengths[:, None])


def test_random_features_estimate_their_kernels():
    """The mean of m independent products, each of variance below a bound in closed form, lies within 6 standard deviations.

    Orthogonal rows have no more variance than independent ones (the paper's theorem 2), the normal bound on the probability of more is 2e-9.
    """
    m, d = 8192, 4
    rng = np.random.default_rng(3)
    w = favor.orthogonal(rng, (m, d))
    x, y = 0.7 * rng.standard_normal((5, d)), 0.7 * rng.standard_normal((6, d))
    scale = 0.5
    s = scale * x @ y.T
    x_x, y_y = scale * np.sum(x * x, axis=-1)[:, None], scale * np.sum(y * y, axis=-1)
    # E exp(2 w . (x' + y')) exp(-|x'|^2 - |y'|^2) = exp(2 |x' + y'|^2 - |x'|^2 - |y'|^2)
    variance = np.exp(x_x + y_y + 4.0 * s) - np.exp(2.0 * s)
    estimate = kernel(favor, x, y, w, scale, 0.0, 0)
    assert np.all(np.abs(estimate - np.exp(s)) <= 6.0 * np.sqrt(variance / m))
    assert np.any(np.abs(estimate - np.exp(s)) > 1e-4)  # it is an estimate
    for power_of, exact in ((0.0, np.exp(s - (x_x + y_y) / 2.0)), (1.0, np.exp(s))):
        trig = kernel(favor_trig, x, y, w, scale, power_of)
        largest = np.exp(power_of * (x_x + y_y) / 2.0)  # a product cos(w . (x' - y')) is at most 1
        assert np.all(np.abs(trig - exact) <= 6.0 * largest / math.sqrt(m))
    unit_x, unit_y = l2_unit.features(x), l2_unit.features(y)
    assert np.all(np.abs(kernel(rfa, 9.0 * x, y, w, np.ones(d)) - np.exp(unit_x @ unit_y.T - 1.0)) <= 6.0 / math.sqrt(m))


def test_a_drawn_projection_is_orthogonal_in_blocks():
    w = favor.orthogonal(np.random.default_rng(1), (11, 4))
    for block in (w[:4], w[4:8], w[8:]):
        lengths = np.linalg.norm(block, axis=-1)
        assert_close(block @ block.T, np.diag(lengths**2), 64, np.outer(lengths, lengths))


def test_extreme_inputs_stay_finite_where_the_map_is_bounded():
    x = np.array([[1e300, -1e300, 0.0], [-800.0, 800.0, 1.0], [0.0, 0.0, 0.0], [1e-300, 3e-300, 0.0]])
    with np.errstate(over="ignore", invalid="ignore"):
        for piece, arguments in (
            (elu_plus_one, ()),
            (relu, ()),
            (silu, ()),
            (softmax_features, ()),
            (focused, (3.0,)),
            (hedgehog, (np.eye(3), np.zeros(3), 0)),
            (hedgehog, (np.eye(3), np.zeros(3), 2)),
            (t2r, (np.eye(3), np.zeros(3))),
        ):
            assert np.isfinite(piece.features(x, *arguments)).all(), piece.__name__
        for piece, arguments in ((l2_unit, ()), (dpfp, (np.array([1.0]),)), (favor, (np.eye(3), 1.0, 0.0, 0)), (favor, (np.eye(3), 1.0, 0.0, 1))):
            assert np.isfinite(piece.features(x[1:3], *arguments)).all(), piece.__name__


# ---- what variants say of themselves as data ------------------------------------------------------------------------------------

RECURRENT = [call for call in CATALOGUE_CALLS if call.values[0].family == "feature" and call.values[0].recurrence]


def product(factors, operands, per_head):
    """[B H T width] of a product's operands; [B H T 1] for those of heads and tokens alone."""
    result = 1.0
    for factor in factors:
        x = operands[factor if isinstance(factor, str) else factor.operand]
        if not isinstance(factor, str) and factor.map is not None:
            if hasattr(factor.map, "apply"):
                x = factor.map.apply(x, *factor.numbers)
            else:
                x = factor.map.features(x, *(operands[name] for name in factor.weights), *factor.numbers)
        result = result * (np.swapaxes(x, 1, 2)[..., None] if per_head else x if x.ndim == 4 else x[..., None])
    return result


@pytest.mark.parametrize("dims", [GENERAL, {**GENERAL, "T": 7, "S": 4}], ids=["general", "more queries than keys"])
@pytest.mark.parametrize("variant, params", RECURRENT)
def test_a_recurrence_of_pieces_is_the_definition(variant, params, dims):
    """Token by token with matrices, from the data alone."""

    def recurred(operands):
        call = problem_of(variant, operands, params)
        said, arrays = variant.recurrence(call.dims, call.params), dict(zip((o.name for o in variant.operands), call.arrays, strict=True))
        [write] = said.writes
        key, value, query = (product(part, arrays, bool(said.heads)) for part in (write.key, write.value, said.query))
        erase = product(write.erase, arrays, False) if write.erase else None
        kept = np.exp(product(said.log_decay, arrays, False)) if said.log_decay else np.ones((1, 1, key.shape[2], 1))
        state = arrays[said.initial].reshape(*key.shape[:2], key.shape[3], value.shape[3])
        mass = arrays[said.mass].reshape(*key.shape[:2], key.shape[3]) if said.normalizer else np.zeros((*key.shape[:2], key.shape[3]))
        states, masses = [state], [mass]
        for t in range(key.shape[2]):
            state, mass = kept[:, :, t, :, None] * state, kept[:, :, t] * mass + key[:, :, t]
            new = value[:, :, t] - (0.0 if erase is None else np.einsum("bhf,bhfe->bhe", erase[:, :, t], state))
            state = state + key[:, :, t, :, None] * new[:, :, None, :]
            states.append(state)
            masses.append(mass)
        n_q, n_k, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
        seen = [max(i + n_k - n_q + 1, 0) if said.causal else n_k for i in range(n_q)]
        read = said.scale * np.stack([np.einsum("bhf,bhfe->bhe", query[:, :, i], np.repeat(states[n], group, 1)) for i, n in enumerate(seen)], 2)
        total = np.stack([np.einsum("bhf,bhf->bh", query[:, :, i], np.repeat(masses[n], group, 1)) for i, n in enumerate(seen)], 2)[..., None]
        assert said.normalizer in ("", "sum")
        out = read / np.where(total + said.eps == 0.0, np.inf, total + said.eps) if said.normalizer else read
        return [out if not said.heads else np.swapaxes(out[..., 0], 1, 2), state, *([mass] if said.normalizer else [])]

    operands = draw(variant, dims)
    defined = list(outputs(variant, operands, params).values())
    tolerances = rounding(recurred, operands, variant, 2 * flops(variant, operands, params))
    for here, there, tolerance in zip(recurred(operands), defined, tolerances, strict=True):
        difference = np.abs(here.reshape(there.shape) - there)
        assert np.all(difference <= tolerance.reshape(there.shape)), difference.max()


def test_the_published_stabilizer_of_keys_costs_what_the_formula_says():
    """Ties between equal keys keep it from the parameters that are tried everywhere."""
    variant = catalog.variant("performer")
    call = problem_of(variant, draw(variant, GENERAL, optional=False), {"stabilizer": "published"})
    assert costs.flops(call) == counts(call)[0]
