"""Numerical gradients of definitions against the same loops run on dual numbers, which carry a derivative exactly."""

import math
import types
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from catalogue import CALLS, GENERAL, draw, flops, problem_of

import refattn as ra
from refattn import definition, derivatives
from refattn.precision import round_to

pytestmark = pytest.mark.compiled

SMALL = {**GENERAL, "B": 1, "Hq": 4, "T": 3, "S": 4, "D": 2, "E": 3, "M": 3}
same = np.testing.assert_array_equal


@dataclass(frozen=True, eq=False)
class Dual:
    """A number and its derivative along one direction."""

    value: float
    slope: float

    def __add__(self, other):
        other = dual(other)
        return Dual(self.value + other.value, self.slope + other.slope)

    def __mul__(self, other):
        other = dual(other)
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def __truediv__(self, other):
        other = dual(other)
        return Dual(self.value / other.value, (self.slope - self.value / other.value * other.slope) / other.value)

    def __rtruediv__(self, other):
        return dual(other) / self

    def __neg__(self):
        return Dual(-self.value, -self.slope)

    def __sub__(self, other):
        return self + -dual(other)

    def __rsub__(self, other):
        return dual(other) + -self

    def __pow__(self, other):
        other, power = dual(other), self.value ** dual(other).value
        slope = other.value * self.value ** (other.value - 1) * self.slope
        return Dual(power, slope + (power * math.log(self.value) * other.slope if other.slope else 0.0))

    def __rpow__(self, other):
        return dual(other) ** self

    def __abs__(self):
        return -self if self.value < 0 else self

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other):
        return self.value < dual(other).value

    def __le__(self, other):
        return self.value <= dual(other).value

    def __gt__(self, other):
        return self.value > dual(other).value

    def __ge__(self, other):
        return self.value >= dual(other).value

    def __eq__(self, other):
        return self.value == dual(other).value

    def __hash__(self):
        return hash(self.value)


def dual(x):
    return x if isinstance(x, Dual) else Dual(float(x), 0.0)


def lifted(f, slope):
    def apply(x):
        x = dual(x)
        return Dual(f(x.value), slope(x.value) * x.slope if x.slope else 0.0)

    return apply


MATH = types.SimpleNamespace(
    exp=lifted(math.exp, math.exp),
    log=lifted(math.log, lambda x: 1 / x),
    sqrt=lifted(math.sqrt, lambda x: 0.5 / math.sqrt(x)),
    tanh=lifted(math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    expm1=lifted(math.expm1, math.exp),
    log1p=lifted(math.log1p, lambda x: 1 / (1 + x)),
    sin=lifted(math.sin, math.cos),
    cos=lifted(math.cos, lambda x: -math.sin(x)),
    erf=lifted(math.erf, lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x)),
    isnan=lambda x: math.isnan(dual(x).value),
    isinf=lambda x: math.isinf(dual(x).value),
)
NUMPY = types.SimpleNamespace(
    zeros=lambda shape: np.full(shape, 0.0, object),
    full=lambda shape, value: np.full(shape, value, object),
    inf=math.inf,
    nan=math.nan,
)


def directional(problem, cotangents, directions):
    """Derivative of the sum of cotangent * output along a direction, and the sum of the magnitudes of its terms."""
    arrays = []
    for o, x in zip(problem.variant.operands, problem.arrays, strict=True):
        along = np.broadcast_to(directions.get(o.name, 0.0), x.shape)
        arrays.append(np.vectorize(Dual, otypes=[object])(x, along) if o.name in directions and x.size else x)
    define = problem.variant.define
    results = types.FunctionType(define.__code__, {**define.__globals__, "np": NUMPY, "math": MATH})(*arrays, *problem.arguments)
    results = results if isinstance(results, tuple) else (results,)
    terms = [
        cotangents[o.name] * np.vectorize(lambda y: dual(y).slope if math.isfinite(dual(y).value) else 0.0)(y)
        for o, y in zip(problem.variant.outputs, results, strict=True)
        if o.name in cotangents
    ]
    return sum(np.sum(t) for t in terms), sum(np.sum(np.abs(t)) for t in terms)


def draw_cotangents(problem):
    """Random ones for every output, infinite elements included; 0 for the huge finite ones that stand for a hidden score."""
    rng = np.random.default_rng(7)
    results = definition.run(problem)
    return {name: np.where((np.abs(y) < 1e6) | np.isinf(y), rng.standard_normal(y.shape), 0.0) for name, y in results.items()}


def assert_gradients_follow_duals(variant, operands, params):
    """Along a random direction of each operand, within the error estimates and the rounding of the dual numbers."""
    problem = problem_of(variant, operands, params)
    cotangents = draw_cotangents(problem)
    found = derivatives.gradients(problem, cotangents)
    assert list(found.values) == ["d_" + o.name for o in variant.operands if o.name in operands and o.kind == "real"]
    rng = np.random.default_rng(11)
    largest = max(np.abs(gradient).max(initial=0.0) for gradient in found.values.values())
    for name, x in operands.items():
        if "d_" + name in found.values:
            gradient, errors = found.values["d_" + name], found.errors["d_" + name]
            assert gradient.shape == errors.shape == x.shape
            finite = np.isfinite(x)
            direction = np.where(finite, rng.standard_normal(x.shape), 0.0)
            exact, size = directional(problem, cotangents, {name: direction})
            tolerance = np.sum(errors * np.abs(direction)) + 2.0**-53 * flops(variant, operands, params) * size
            assert abs(np.sum(gradient * direction) - exact) <= tolerance, name
            assert np.all(errors[~finite] == 0.0) and np.all(gradient[~finite] == 0.0)
            assert errors.max(initial=0.0) <= 2.0**-30 * largest, f"the estimate for {name} is no use"


@pytest.mark.parametrize("variant, params", CALLS)
def test_gradients_are_those_of_dual_numbers(variant, params):
    assert_gradients_follow_duals(variant, draw(variant, SMALL), params)


@pytest.mark.parametrize("size", [1e-3, 20.0])
@pytest.mark.parametrize("name", ["softmax", "cosine_residual"])
def test_steep_and_flat_definitions_are_differentiated_as_well(name, size):
    variant = next(c.values[0] for c in CALLS if c.id == name)
    operands = draw(variant, SMALL, optional=False)
    assert_gradients_follow_duals(variant, {n: size * x for n, x in operands.items()}, {})


def softmax_call(rng, shape_of_bias=(4, 1, 5)):
    q, k, v = (rng.standard_normal(s) for s in ((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 3)))
    bias, sinks = rng.standard_normal(shape_of_bias), rng.standard_normal(4)
    return {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}


def test_the_gradient_of_summed_outputs_by_values_is_the_column_sums_of_weights():
    x = softmax_call(np.random.default_rng(1))
    found = ra.gradients("softmax", **x, d_out=np.ones((2, 4, 3, 3)), backend="definition")
    columns = ra.attend("softmax", **x, returns="weights").reshape(2, 2, 2, 3, 5).sum((2, 3))
    assert np.all(np.abs(found.d_v - columns[..., None]) <= found.errors["d_v"] + 2.0**-53 * 8 * columns[..., None])


def test_scores_shifted_as_one_change_nothing_but_lse():
    x = softmax_call(np.random.default_rng(2), (2, 4, 3, 5))
    del x["sinks"]
    rng = np.random.default_rng(3)
    found = ra.gradients("softmax", **x, d_out=rng.standard_normal((2, 4, 3, 3)), backend="definition")
    assert np.all(np.abs(found.d_bias.sum(-1)) <= found.errors["d_bias"].sum(-1)) and np.abs(found.d_bias).min() > 1e-4
    d_lse = rng.standard_normal((2, 4, 3))
    found = ra.gradients("softmax", **x, d_lse=d_lse, backend="definition")
    expected = d_lse[..., None] * ra.attend("softmax", **x, returns="weights")
    assert np.all(np.abs(found.d_bias - expected) <= found.errors["d_bias"] + 2.0**-53 * 64 * np.abs(expected))


def test_what_is_hidden_or_infinite_has_gradient_zero_and_leaks_no_nan():
    x = softmax_call(np.random.default_rng(4))
    x["bias"][:, :, 1] = -np.inf
    mask = np.ones((3, 5), bool)
    mask[:, 2] = False
    mask[0] = False
    x["sinks"][:] = -np.inf
    x["k"][:, :, 2], x["v"][:, :, 1] = np.nan, np.nan
    found = ra.gradients("softmax", **x, mask=mask, d_out=np.ones((2, 4, 3, 3)), d_lse=np.ones((2, 4, 3)))
    assert all(np.isfinite(g).all() for g in found)
    same(found.d_q[:, :, 0], 0.0)
    same(found.d_bias[..., 1:3], 0.0)
    same(found.d_sinks, 0.0)
    for gradient in (found.d_k, found.d_v):
        same(gradient[:, :, 1:3], 0.0)
        assert np.any(gradient[:, :, 0]) and np.any(gradient[:, :, 3:])


def test_a_gradient_below_the_rounding_of_the_outputs_is_within_its_estimate():
    q, k, v = np.ones((1, 1, 1, 1)), np.array([0.0, -1.0]).reshape(1, 1, 2, 1), np.ones((1, 1, 2, 1))
    found = ra.gradients("softmax", q, k, v, d_out=np.ones((1, 1, 1, 1)), scale=70.0, backend="definition")
    off = np.abs(found.d_v - ra.attention(q, k, v, scale=70.0, returns="weights").reshape(v.shape))
    assert off[0, 0, 1, 0] > 0.0 and np.all(off <= found.errors["d_v"]) and np.all(found.errors["d_v"] < 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_gradients_come_back_in_each_operands_dtype_and_shape(dtype):
    exact = softmax_call(np.random.default_rng(5))
    x = {name: round_to(a, np.dtype(dtype)) for name, a in exact.items()} | {"bias": exact["bias"].astype(">f8")}
    d_out = np.random.default_rng(6).standard_normal((2, 4, 3, 3))
    found = ra.gradients("softmax", **x, d_out=d_out, backend="definition")
    wide = ra.gradients("softmax", **{name: a.astype(np.float64) for name, a in x.items()}, d_out=d_out, backend="definition")
    for name, gradient in found._asdict().items():
        operand = x[name[2:]]
        assert gradient.shape == operand.shape and gradient.dtype == operand.dtype.newbyteorder("=")
        same(gradient, round_to(getattr(wide, name), gradient.dtype))


def test_the_other_layout_is_a_transpose():
    x = softmax_call(np.random.default_rng(7))
    d_out = np.random.default_rng(8).standard_normal((2, 4, 3, 3))
    expected = ra.gradients("softmax", **x, d_out=d_out, causal=True, backend="definition")
    turned = {name: np.swapaxes(a, 1, 2) if name in "qkv" else a for name, a in x.items()}
    found = ra.gradients("softmax", **turned, d_out=np.swapaxes(d_out, 1, 2), causal=True, layout="BTHD", backend="definition")
    for name in found._fields:
        back = np.swapaxes(getattr(found, name), 1, 2) if name[2:] in "qkv" else getattr(found, name)
        same(back, getattr(expected, name))
        assert found.errors[name].shape == getattr(found, name).shape


def test_nothing_given_is_changed_and_empty_operands_are_answered():
    x = softmax_call(np.random.default_rng(9))
    copies = {name: a.copy() for name, a in x.items()}
    ra.gradients("softmax", **x, d_out=np.ones((2, 4, 3, 3)))
    for name, a in x.items():
        same(a, copies[name])
    empty = ra.gradients("softmax", np.ones((1, 1, 2, 3)), np.ones((1, 1, 0, 3)), np.ones((1, 1, 0, 4)), d_out=np.ones((1, 1, 2, 4)))
    assert empty.d_k.shape == (1, 1, 0, 3)
    same(empty.d_q, 0.0)


@pytest.mark.parametrize(
    "error, words, cotangents",
    [
        (ra.OperandError, ("softmax", "d_out, d_lse"), {}),
        (ra.ShapeError, ("softmax", "d_out has T=5 and E=2", "T=3", "E=3"), {"d_out": np.ones((2, 4, 5, 2))}),
        (ra.ShapeError, ("softmax", "d_lse has 2 axes", "[B Hq T]"), {"d_lse": np.ones((2, 4))}),
        (ra.DtypeError, ("softmax", "d_out", "int64"), {"d_out": np.ones((2, 4, 3, 3), np.int64)}),
        (ra.ParameterError, ("softmax", "d_ot"), {"d_ot": 1.0, "d_lse": np.ones((2, 4, 3))}),
        (ra.BackendUnavailableError, ("softmax", "cuda"), {"d_out": np.ones((2, 4, 3, 3)), "backend": "cuda"}),
    ],
)
def test_a_wrong_cotangent_is_refused(error, words, cotangents):
    with pytest.raises(error) as refusal:
        ra.gradients("softmax", **softmax_call(np.random.default_rng(0)), **cotangents)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_shows_a_bar_on_a_terminal_and_nothing_in_a_pipe(terminal, monkeypatch, capsys):
    monkeypatch.setattr(derivatives, "PROGRESS_FROM", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    ra.gradients("softmax", **softmax_call(np.random.default_rng(0)), d_out=np.ones((2, 4, 3, 3)), backend="definition")
    shown = capsys.readouterr()
    assert shown.out == "" and ("gradients of softmax" in shown.err) == terminal


@pytest.mark.peer
@pytest.mark.parametrize("params", [{}, {"causal": True}, {"softcap": 2.0, "scale": 0.9}, {"window": (1, 0)}])
@pytest.mark.parametrize("bias_shape", [(2, 4, 3, 5), (4, 1, 5), (5,), ()])
def test_gradients_agree_with_torch_autograd(params, bias_shape):
    import torch

    rng = np.random.default_rng(12)
    x = softmax_call(rng, bias_shape)
    d_out, d_lse = rng.standard_normal((2, 4, 3, 3)), rng.standard_normal((2, 4, 3))
    found = ra.gradients("softmax", **x, **params, d_out=d_out, d_lse=d_lse, backend="definition")
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in x.items()}
    out, lse = torch_softmax(torch, **leaves, **params)
    ((out * torch.tensor(d_out)).sum() + (lse * torch.tensor(d_lse)).sum()).backward()
    for name, leaf in leaves.items():
        expected = leaf.grad.numpy()
        # torch sums at most 2*4*3*(2 + 5 + 3) products into one element, each rounded once
        tolerance = found.errors["d_" + name] + 2.0**-53 * 240 * np.abs(expected).max()
        assert np.all(np.abs(getattr(found, "d_" + name) - expected) <= tolerance), name


def torch_softmax(torch, q, k, v, bias, sinks, scale=None, softcap=None, causal=False, window=None):
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    n_q, n_k = q.shape[2], k.shape[2]
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + bias
    after = torch.arange(n_k) - torch.arange(n_q)[:, None] - (n_k - n_q)  # how far a key stands after the query
    hidden = (after > 0) & bool(causal or window)
    hidden |= (after < -window[0]) if window else False
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(torch.cat([scores, sinks[:, None, None].expand(*q.shape[:3], 1)], -1), -1)
    return torch.exp(scores - lse[..., None]) @ v, lse
