"""Error bounds of the exponential, proved: every rounding of the evaluation is followed through balls over the whole reduced range.

The range of r, all numbers of magnitude up to log 2 / 128 and a little, is covered by balls without a gap.  In each, names stand for sizes of what
the code computes, and `err_...` for distances to what it would be without rounding.  What is sampled afterwards shows that the code is the one
meant.
"""

import math
import struct
from fractions import Fraction

import flint
import numpy as np
import pytest
from numba import njit

from refattn.exact import double_double as dd
from refattn.exact import elementary, lanes

arb = flint.arb
pytestmark = pytest.mark.compiled
U = Fraction(1, 2**53)
PIECES = 2000


@pytest.fixture(autouse=True)
def precision():
    with flint.ctx.workprec(300):
        yield


def q(x):
    x = Fraction(x)
    return arb(flint.fmpq(x.numerator, x.denominator))


def most(x):
    """A number no element of a ball exceeds in magnitude."""
    return abs(x).upper()


def reduction(largest):
    """Bounds of |k|, |r| and of the error of r for |x| up to `largest`, after checking that the steps taken to be exact are."""
    ln2 = arb(2).log()
    k = q(largest) * 64 / ln2 + 1
    for step in (elementary.STEP_1, elementary.STEP_2):
        numerator = abs(Fraction(step)).numerator
        assert numerator.bit_length() <= 35 and bool(k < 2**17)  # products with k have 52 bits
    # x - k STEP_1, for k != 0: |x| > 1/256, so its last bit is at least 2**-60 and that of STEP_1 is 2**-41 or more; the difference is below 2**-7
    assert Fraction(elementary.STEP_1).denominator <= 2**41
    left_out = most(ln2 / 64 - q(elementary.STEP_1) - q(elementary.STEP_2) - q(elementary.STEP_3))
    r = ln2 / 128 + k * q(U) * 2 + q(U) * q(largest) + k * abs(q(elementary.STEP_2))
    return k, r, left_out


def pieces(r):
    """Balls that cover [-r, r]."""
    edge = q(Fraction(math.nextafter(float(r.upper()), 1.0)))
    for n in range(PIECES):
        yield ((2 * q(n) + 1) / PIECES - 1) * edge + arb(0, float((edge / PIECES).upper()) * (1 + 2**-40))


def test_exp_in_two_parts_is_as_accurate_as_it_says():
    u = q(U)
    k, largest, left_out = reduction(701)
    low_of_x = u * 701
    # r: fma(-k, STEP_3, xl) and its sum with the error of the second step, itself at most u |r|
    third = k * abs(q(elementary.STEP_3)) + low_of_x
    err_r = most(u * third + u * (u * largest + third * (1 + u)) + k * left_out)
    worst = arb(0)
    for r in pieces(largest):
        size = most(r)
        z, y = size**2, size**3
        rl = u * size  # of a normalised pair
        # y + ye = r**3
        err_y = u * (u * z * size + u * y) * (1 + 4 * u)
        ye = (2 * u * y) * (1 + 4 * u)
        # g + ge = 1/6 + r/24
        m, g = size / 24 * (1 + u), q(Fraction(1, 6)) + size / 24
        constants = abs(q(Fraction(1, 6) - Fraction(elementary.THIRD_HIGH) - Fraction(elementary.THIRD_LOW)))
        constants += size * abs(q(Fraction(1, 24) - Fraction(elementary.FOURTH_HIGH) - Fraction(elementary.FOURTH_LOW)))
        one = size * abs(q(elementary.FOURTH_LOW)) + u * m  # rh FOURTH_LOW + me
        two = one * (1 + u) + abs(q(elementary.THIRD_LOW))
        ge = u * g * (1 + u) + two * (1 + u)
        err_g = u * one + u * two + u * ge + constants
        # w + we = (y + ye)(g + ge): ye ge is left out
        yg = y * (1 + u) * g * (1 + u)
        first = ye * g * (1 + u) + u * yg
        second = y * (1 + u) * ge + first * (1 + u)
        we = second * (1 + u)
        err_w = u * first + u * second + ye * ge + err_y * g * (1 + u) + (y + err_y) * err_g
        # tail = y z (C5 + ... + C10 r**5), Horner
        value, err_q = q(Fraction(1, math.factorial(10))), u * q(Fraction(1, math.factorial(10)))
        for n in range(9, 4, -1):
            c = q(Fraction(1, math.factorial(n)))
            value = value * size + c
            err_q = err_q * size + u * c + u * (value + err_q * size + u * c)
        tail = size**5 * value
        err_tail = tail * ((1 + u) ** 5 - 1) + size**5 * (1 + u) ** 5 * err_q
        cut = size**11 / math.factorial(11) * (1 + size)
        # s and low
        e1 = e2 = u * size * q("1.01")
        s = size * q("1.01")
        a = (e1 + e2) * (1 + u)
        b = (u * z / 2 + we) * (1 + u)
        c = rl * (1 + s) * (1 + u)
        err_rl = rl * (tail + err_tail + e1 + e2 + we + cut) + rl**2  # (exp(rl) - 1) exp(rh) - rl (1 + s)
        d, f = (b + c) * (1 + u), (a + b + c) * (1 + 2 * u)
        low = (tail + err_tail + f) * (1 + u)
        err_low = u * (e1 + e2) + u * (u * z / 2 + we) + u * c + u * (b + c) + u * (a + d) + u * low
        err = err_w + err_tail + cut + err_rl + err_low
        # 2**(k/64) (1 + s + low), relative to the power
        i1 = 2 * u * s * (1 + u)
        i2 = (low + i1) * (1 + u)
        i3 = (u + i2) * (1 + u)
        i4 = u * q("1.01") + i3
        err_product = u * i1 + u * (low + i1) + u * (u + i2) + u * i4 + u * low + u * u * (1 + s + low)
        worst = max(worst, most((err + err_product) / (r.exp() * (1 - u)).lower()))
    total = worst + err_r * q("1.001")
    assert bool(total < q(elementary.EXP)), math.log2(float(total))
    assert bool(total > q(elementary.EXP) / 16)  # and the bound is no more than that much larger


def test_exp_in_one_part_is_as_accurate_as_it_says():
    u = q(U)
    k, largest, left_out = reduction(701)
    err_r = most(u * largest * 2 + k * (left_out + abs(q(elementary.STEP_3))))
    worst = arb(0)
    for r in pieces(largest):
        size = most(r)
        value, err = q(Fraction(1, 120)), u * q(Fraction(1, 120))
        for n in range(4, 0, -1):  # Horner: coefficients 1/24, 1/6, 1/2, 1
            c = q(Fraction(1, math.factorial(n)))
            value, err = value * size + c, err * size + u * c
            err += u * (value + err)
        p = size * value
        err_p = size * err + u * p + u * size * err
        cut = size**6 / 720 * (1 + size)
        # th + th p, rounded once, and th itself is rounded
        final = u * (1 + p) + u * (1 + p)
        worst = max(worst, most((err_p + cut + final * (1 + u)) / r.exp().lower()))
    total = worst + err_r * q("1.001")
    assert bool(total < q(elementary.EXP_SINGLE)), math.log2(float(total))


def test_the_table_holds_powers_of_two():
    for n in range(64):
        exact = arb(2) ** (q(n) / 64)
        assert float(exact.mid()) == elementary.TABLE_HIGH[n]
        error = abs(exact - arb(float(elementary.TABLE_HIGH[n])) - arb(float(elementary.TABLE_LOW[n])))
        assert bool(error < q(U * U) * exact)


# ---- the code is the one meant -----------------------------------------------------------------------------------------------------


@njit
def all_functions(x, y, out):
    for n in range(len(x)):
        out[n, 0], out[n, 1] = elementary.exp(x[n], y[n])
        out[n, 2], out[n, 3] = elementary.tanh(x[n], y[n])
        out[n, 4], out[n, 5] = elementary.log(-x[n] + 0.5, -y[n])
        out[n, 6] = elementary.exp_single(x[n])


@njit
def in_lanes(x, y, out):
    for n in range(0, len(x), lanes.WIDTH):
        h, low = elementary.exp(lanes.load(x, n), lanes.load(y, n))
        lanes.store(out, (0, n), h)
        lanes.store(out, (1, n), low)
        h, low = elementary.tanh(lanes.load(x, n), lanes.load(y, n))
        lanes.store(out, (2, n), h)
        lanes.store(out, (3, n), low)


def arguments():
    rng = np.random.default_rng(0)
    near_steps = -np.arange(1, 160) * math.log(2) / 128
    x = np.concatenate([-np.exp(rng.uniform(-40, 6.5, 400)), near_steps, np.nextafter(near_steps, 0), [0.0, -0.0, -699.9, -1e-300, -5e-324]])
    x = np.resize(x, -(-len(x) // 8) * 8)
    return x, x * rng.uniform(-1, 1, x.size) * 2.0**-54


def test_functions_keep_their_bounds():
    x, y = arguments()
    out, vectors = np.zeros((x.size, 7)), np.zeros((4, x.size))
    all_functions(x, y, out)
    in_lanes(x, y, vectors)
    np.testing.assert_array_equal(vectors, out[:, :4].T)  # a vector's lanes are numbers
    for a, b, found in zip(x.tolist(), y.tolist(), out.tolist(), strict=True):
        at = arb(a) + arb(b)
        assert bool(abs((arb(found[0]) + arb(found[1])) / at.exp() - 1) < q(elementary.EXP) + q(2.0**-1074) / at.exp())
        assert bool(abs(arb(found[2]) + arb(found[3]) - at.tanh()) < q(elementary.TANH))
        exact = (arb(-a + 0.5) + arb(-b)).log()
        assert bool(abs(arb(found[4]) + arb(found[5]) - exact) < q(elementary.LOG) + q(2.0**-104) * abs(exact))
        assert bool(abs(arb(found[6]) / arb(a).exp() - 1) < q(elementary.EXP_SINGLE) + q(2.0**-1074) / arb(a).exp())


@njit
def pairs(a, b, c, out):
    for n in range(len(a)):
        (ah, al), (bh, bl) = dd.two_sum(a[n], b[n]), dd.two_sum(c[n], a[n] * 2.0**-60)
        out[n, 0], out[n, 1], out[n, 2], out[n, 3] = ah, al, bh, bl
        out[n, 4], out[n, 5] = dd.plus(ah, al, bh, bl)
        out[n, 6], out[n, 7] = dd.times(ah, al, bh, bl)
        out[n, 8], out[n, 9] = dd.divided(ah, al, bh, bl)
        out[n, 10], out[n, 11] = dd.times_number(ah, al, c[n])
        out[n, 12], out[n, 13] = dd.plus_number(ah, al, c[n])


def test_pairs_keep_their_bounds():
    rng = np.random.default_rng(1)
    a, c = rng.standard_normal(2000) * np.exp(rng.uniform(-9, 9, 2000)), rng.standard_normal(2000)
    b = np.where(rng.random(2000) < 0.3, -c, a * rng.standard_normal(2000) * 2.0**-50)  # sums that cancel, too
    out = np.zeros((2000, 14))
    pairs(a, b, c, out)
    for row, by in zip(out.tolist(), c.tolist(), strict=True):
        f = [Fraction(x) for x in row]
        x, y, one = f[0] + f[1], f[2] + f[3], Fraction(by)
        size = abs(f[0]) + abs(f[2])
        assert abs(f[4] + f[5] - (x + y)) <= Fraction(4.1) * U * U * size
        assert abs(f[6] + f[7] - x * y) <= 7 * U * U * abs(x * y) * (1 + 4 * U)
        assert abs(f[8] + f[9] - x / y) <= 12 * U * U * abs(x / y)
        assert abs(f[10] + f[11] - x * one) <= 3 * U * U * abs(x * one) * (1 + 4 * U)
        assert abs(f[12] + f[13] - (x + one)) <= Fraction(2.01) * U * U * (abs(f[0]) + abs(one))


@njit
def on_a_grid(a, b, start, out):
    h, low = start, 0.0
    for n in range(len(a)):
        h, low = dd.grid_step(h, low, a[n], b[n])
    out[0], out[1] = h - start, low


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_sums_on_a_grid_keep_their_bound(n):
    for seed in range(20):
        rng = np.random.default_rng([n, seed])
        a, b = rng.standard_normal(n) * 10.0 ** rng.integers(-6, 3, n), rng.standard_normal(n)
        power = 2.0 ** math.ceil(math.log2(4 * float(np.abs(a * b).sum()) * 1.001))
        out = np.zeros(2)
        on_a_grid(a, b, 1.5 * power, out)
        exact = sum((Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)), Fraction(0))
        assert abs(Fraction(out[0]) + Fraction(out[1]) - exact) <= Fraction(dd.grid_error(n)) * Fraction(power)


def test_fma_without_a_compiler_rounds_once():
    @njit
    def compiled(x, y, z):
        return lanes.fma(x, y, z)

    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**64, (3, 3000), np.uint64).view(np.float64)
    near = rng.standard_normal((3, 3000)) * 2.0 ** rng.integers(-60, 60, (3, 3000))
    near[2, ::2] = -near[0, ::2] * near[1, ::2]
    for x, y, z in np.concatenate([bits, near], axis=1).T.tolist():
        one, two = lanes.exact_fma(x, y, z), compiled(x, y, z)
        assert struct.pack("<d", one) == struct.pack("<d", two) or (math.isnan(one) and math.isnan(two)), (x, y, z)
