"""Elementary functions that vectorise: errors against numbers with more digits, special points, and that vectors are what comes out."""

import math
import re

import mpmath
import numpy as np
import pytest
from numba import njit

from refattn.engine import elementary
from refattn.engine.elementary import IN_PLACE_OF

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
NAMES = pytest.mark.parametrize("name", ["exp", "exp2", "log", "log2", "tanh"])
#: In units of the last place, as the module's docstring says.
LARGEST_ERROR = {
    (name, dtype): error
    for dtype, errors in ((np.float32, (1.2, 1.0, 1.0, 1.9, 1.5)), (np.float64, (1.2, 1.0, 1.2, 2.0, 1.5)))
    for name, error in zip(("exp", "exp2", "log", "log2", "tanh"), errors, strict=True)
}


def over_arrays(name):
    function = getattr(elementary, name)

    @njit(error_model="numpy")
    def each(x, out):
        for n in range(x.size):
            out[n] = function(x[n])

    return each


def exact(name, x):
    """In float64 for float32, whose last place it does not see; else a number of 40 digits less its float64 neighbour, in two parts."""
    if x.dtype == np.float32:
        with np.errstate(all="ignore"):
            return getattr(np, name)(x.astype(np.float64)), np.zeros(x.shape)
    functions = {"exp2": lambda t: mpmath.power(2, t), "log2": lambda t: mpmath.log(t, 2)}
    with mpmath.workdps(40):
        values = [functions.get(name, getattr(mpmath, name, None))(mpmath.mpf(float(t))) for t in x]
        near = [float(y) for y in values]
        return np.array(near), np.array([float(y - z) if math.isfinite(z) else 0.0 for y, z in zip(values, near, strict=True)])


def points(name, dtype):
    """All exponents, then evenly where the result is neither 0, 1 nor infinite, then close to special points."""
    rng = np.random.default_rng(5)
    few, many = (2_000, 4_000) if dtype is np.float64 else (200_000, 400_000)
    limits = np.finfo(dtype)
    integer = np.dtype(f"u{np.dtype(dtype).itemsize}")
    anything = rng.integers(0, np.iinfo(integer).max, few, integer, endpoint=True).view(dtype)
    least = math.log2(limits.smallest_subnormal) - 2
    low, high = {"exp": (least * math.log(2), limits.maxexp * math.log(2)), "exp2": (least, limits.maxexp), "tanh": (-20, 20)}.get(name, (0, 4))
    anything = anything[np.isfinite(anything)]
    evenly = rng.uniform(low, high, many).astype(dtype)
    close = [c + rng.uniform(-1, 1, few) * 2.0**-k for c in (0.0, 0.625, -0.625, 1.0, math.sqrt(0.5), math.sqrt(2)) for k in (0, 5, 15)]
    tiny = rng.uniform(0, 3 * limits.smallest_normal, few)
    x = np.concatenate([anything, evenly, np.concatenate(close).astype(dtype), tiny.astype(dtype), [low, high]]).astype(dtype)
    return x[x > 0] if name.startswith("log") else x


@FORMATS
@NAMES
def test_errors_are_as_small_as_the_docstring_says(name, dtype):
    x = points(name, dtype)
    found = np.empty_like(x)
    over_arrays(name)(x, found)
    value, rest = exact(name, x)
    with np.errstate(over="ignore"):
        nearest = value.astype(dtype)
    finite = np.isfinite(nearest) & np.isfinite(found)
    same(found[~finite], nearest[~finite])
    assert finite.sum() > x.size / 2
    x, found, value, rest = x[finite], found[finite].astype(np.float64), value[finite], rest[finite]
    error = np.abs(found - value - rest) / np.spacing(np.abs(nearest[finite])).astype(np.float64)
    worst = int(np.argmax(error))
    assert error[worst] <= LARGEST_ERROR[name, dtype] <= 4, f"{name}({x[worst]!r}) is {error[worst]:.2f} units off"


def test_the_docstring_states_these_errors():
    for dtype in (np.float32, np.float64):
        row = next(line for line in elementary.__doc__.splitlines() if line.split()[:1] == [dtype.__name__])
        assert [float(x) for x in row.split()[1:]] == [LARGEST_ERROR[name, dtype] for name in ("exp", "exp2", "log", "log2", "tanh")]


@FORMATS
@NAMES
def test_special_points_are_as_in_c(name, dtype):
    limits = np.finfo(dtype)
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, -limits.smallest_subnormal, -limits.max], dtype)
    found = np.empty_like(x)
    over_arrays(name)(x, found)
    with np.errstate(all="ignore"):
        expected = getattr(np, name)(x)
    exactly = ~np.isfinite(expected) | (expected == 0) | (np.abs(expected) == 1)
    same(found[exactly], expected[exactly])
    same(np.signbit(found[exactly & (expected == 0)]), np.signbit(expected[exactly & (expected == 0)]))


@FORMATS
def test_powers_and_logarithms_to_base_two_are_exact_where_they_can_be(dtype):
    limits = np.finfo(dtype)
    n = np.arange(int(math.log2(limits.smallest_subnormal)), limits.maxexp)
    powers, back = np.empty(n.size, dtype), np.empty(n.size, dtype)
    over_arrays("exp2")(n.astype(dtype), powers)
    same(powers, np.ldexp(dtype(1), n))
    over_arrays("log2")(powers, back)
    same(back, n)


@NAMES
def test_numbers_of_other_kinds_become_float64_and_arrays_go_to_numpy(name):
    function = getattr(elementary, name)

    @njit
    def apply(x):
        return function(x)

    for x in (np.int32(3), np.int64(2), np.uint8(1), True):
        assert isinstance(apply(x), float)
        assert math.isclose(apply(x), getattr(math, name)(x), rel_tol=4 * 2**-52)
    assert isinstance(apply(np.float32(0.3)), float)
    array = np.array([0.25, 0.5])
    same(apply(array), apply.py_func(array))


@NAMES
def test_in_python_they_are_numpys(name):
    assert getattr(elementary, name)(0.3) == getattr(np, name)(0.3)
    assert IN_PLACE_OF[getattr(math, name)] is IN_PLACE_OF[getattr(np, name)] is getattr(elementary, name)


@FORMATS
@NAMES
def test_a_loop_over_numbers_becomes_vectors_and_calls_nothing(name, dtype):
    each = over_arrays(name)
    each(np.ones(8, dtype), np.ones(8, dtype))
    code = each.inspect_llvm(each.signatures[0])
    width = r"<\d+ x " + ("float" if dtype is np.float32 else "double") + ">"
    assert re.search(rf"call (fast |reassoc )*{width} @llvm\.fma\.", code)
    called = set(re.findall(r"call [^@\n]*@([\w.]+)", code))
    assert not called & {name, name + "f", "ldexp", "ldexpf", "fma", "fmaf"}
