"""The CPU kernels against the definition, within the computed tolerance, and against themselves, to the bit."""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refattn as ra
from refattn import backends, catalog, definition
from refattn.engine.run import run
from refattn.oracle.profiles import resolve
from refattn.oracle.tolerance import tolerances
from refattn.problem import bind

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SOFTMAX = catalog.variant("softmax")


def operands(dtype=np.float32, seed=0, *, B=1, Hq=2, Hkv=1, T=5, S=7, D=3, E=4):
    """Queries, keys and values with an outlier each, so that running maxima rise late and fall short."""
    rng = np.random.default_rng(seed)
    drawn = [rng.standard_normal(shape) for shape in ((B, Hq, T, D), (B, Hkv, S, D), (B, Hkv, S, E))]
    for x in drawn:
        if x.size:
            x.flat[rng.integers(x.size)] *= 8
    return [x.astype(dtype) for x in drawn]


def call_of(q, k, v, **keywords):
    return bind(SOFTMAX, (q, k, v), keywords, ("out", "lse"))


def agrees(call, threads=1):
    """Both outputs lie within the tolerance of the definition's; where that is not finite they are the same."""
    truth, found = definition.run(call), run(call, threads)
    allowed = tolerances(call, truth, resolve("flash", call.dtype))
    for name, x in found.items():
        finite = np.isfinite(truth[name])
        same(np.where(finite, 0, x), np.where(finite, 0, truth[name]), name)
        excess = np.abs(np.subtract(x, truth[name], where=finite, out=np.zeros(x.shape))) - allowed[name]
        assert not (excess > 0).any(), f"{name} at {np.unravel_index(excess.argmax(), excess.shape)}: past the tolerance by {excess.max():g}"
    return found


# ---- against the definition ----------------------------------------------------------------------------------------------------

SIZES = (0, 1, 2, 15, 16, 17, 47, 48, 49, 127, 128, 129, 130, 193)  # about a vector, a panel, a tile


@FORMATS
@pytest.mark.parametrize("n_q", SIZES)
def test_every_size_gives_what_the_definition_gives(n_q, dtype):
    for n_k in SIZES:
        q, k, v = operands(dtype, n_k, T=n_q, S=n_k)
        bias = np.linspace(-2, 2, n_q * n_k).reshape(n_q, n_k)[:, ::-1]
        agrees(call_of(q, k, v))
        agrees(call_of(q, k, v, causal=True, bias=bias, softcap=2.0, window=(20, None)))


@FORMATS
@pytest.mark.parametrize("width", [1, 3, 40, 65, 128, 130])
def test_every_width_gives_what_the_definition_gives(width, dtype):
    for d, e, group in ((width, 5, 1), (5, width, 2), (width, width, 7)):
        agrees(call_of(*operands(dtype, D=d, E=e, T=19, S=35, B=2, Hkv=2, Hq=2 * group), causal=True))


OPTIONS = {
    "causal": (False, True, "top_left"),
    "window": (None, (5, 0), (2, 9)),
    "softcap": (None, 3.0),
    "bias": (None, (), (33,), (1, 4, 1, 1), (2, 1, 21, 33)),
    "mask": (None, (33,), (2, 4, 21, 33)),
    "sinks": (False, True),
}


@FORMATS
@pytest.mark.parametrize("empty_rows", ["zero", "nan", "uniform"])
def test_every_combination_of_options_gives_what_the_definition_gives(empty_rows, dtype):
    rng = np.random.default_rng(7)
    q, k, v = operands(dtype, B=2, Hq=4, Hkv=2, T=21, S=33, D=6, E=5)
    for chosen in itertools.product(*OPTIONS.values()):
        params = dict(zip(OPTIONS, chosen, strict=True), empty_rows=empty_rows)
        bias, mask, sinks = params.pop("bias"), params.pop("mask"), params.pop("sinks")
        if bias is not None:
            params["bias"] = rng.standard_normal(bias).astype(dtype)
        if mask is not None:
            params["mask"] = rng.random(mask) > 0.4
            params["mask"][1:, :, :4] = False  # rows that see nothing
        if sinks:
            params["sinks"] = np.array([-np.inf, 0.0, 3.0, -40.0], dtype)
        agrees(call_of(q, k, v, **params))
