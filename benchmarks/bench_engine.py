"""The CPU engine's kernels: time, memory, rate and accuracy.

`--quick` runs every parameter once; what takes long or much memory is in LONG only, whose benchmarks a quick run can leave out with
``--bench '^bench_engine.(?!Long)'``.
"""

from __future__ import annotations

import time

import numpy as np

import refattn as ra
from refattn import catalog, definition, precision, problem

from .ceilings import MultiplyAdd
from .peers import REFATTN, Work
from .versus import flops

#: Plans by name: what is given beside q, k and v.
PLANS = {
    "full": lambda n: {},
    "causal": lambda n: {"causal": True},
    "window": lambda n: {"window": (n // 8, 0)},
    "softcap": lambda n: {"softcap": 5.0},
    "bias": lambda n: {"bias": np.linspace(-1, 1, n * n).reshape(n, n).astype(np.float32)},
    "mask": lambda n: {"mask": np.arange(n)[:, None] % 7 != np.arange(n) % 5},
}
#: B, Hq, Hkv, T, S, D.
SHAPES = {"128": (1, 8, 8, 128, 128, 64), "1024": (1, 8, 8, 1024, 1024, 64), "grouped": (1, 8, 2, 512, 512, 128), "decode": (1, 32, 8, 1, 4096, 128)}
DTYPES = ("float32", "float64")
LONG = (16384, 65536)


def operands(shape: tuple[int, ...], dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch, heads, kv_heads, n_q, n_k, d = shape
    shapes = {"q": (batch, heads, n_q, d), "k": (batch, kv_heads, n_k, d), "v": (batch, kv_heads, n_k, d)}
    return {name: rng.standard_normal(s).astype(dtype) for name, s in shapes.items()}


class Plans:
    """Every plan at one length, T = S = 512, and eight heads of width 64, float32."""

    params = (tuple(PLANS),)
    param_names = ("plan",)

    def setup(self, plan):
        self.given = operands((1, 8, 8, 512, 512, 64), "float32")
        self.options = PLANS[plan](512)
        self.d_out = self.given["q"]
        self.time_forward(plan)
        self.time_gradients(plan)

    def time_forward(self, plan):
        """Seconds of one call."""
        ra.attention(**self.given, **self.options, backend="cpu")

    def time_gradients(self, plan):
        """Seconds of the gradients of one call, its forward pass included."""
        ra.gradients("softmax", **self.given, **self.options, d_out=self.d_out, backend="cpu")


class Shapes:
    """One call without masks, by shape and dtype."""

    params = (tuple(SHAPES), DTYPES)
    param_names = ("shape", "dtype")

    def setup(self, shape, dtype):
        self.given = operands(SHAPES[shape], dtype)
        self.time_forward(shape, dtype)
        self.time_gradients(shape, dtype)

    def time_forward(self, shape, dtype):
        """Seconds of one call."""
        ra.attention(**self.given, backend="cpu")

    def time_gradients(self, shape, dtype):
        """Seconds of the gradients of one call, its forward pass included."""
        ra.gradients("softmax", **self.given, d_out=self.given["q"], backend="cpu")


class Rate:
    """How near one thread comes to nothing but multiply-adds: T = S = 1024, eight heads of width 64, no mask."""

    params = (DTYPES, ("forward", "backward"))
    param_names = ("dtype", "way")

    def setup(self, dtype, way):
        given = operands((1, 8, 8, 1024, 1024, 64), dtype)
        work = Work(way, given, {}, given["q"], 1)
        self.call, self.flops = REFATTN.prepare(work)[0], flops(work)
        self.ceiling = MultiplyAdd(np.dtype(dtype), 1)
        self.call()
        self.ceiling()

    def track_share_of_peak(self, dtype, way):
        """Percent of the multiply-adds per second that registers alone allow, the fastest of five in turns."""
        seconds = [(self.seconds(self.call), self.seconds(self.ceiling)) for _ in range(5)]
        fastest, bare = (min(x) for x in zip(*seconds, strict=True))
        return 100 * (self.flops / fastest) / (self.ceiling.flops / bare)

    track_share_of_peak.unit = "percent"

    @staticmethod
    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class Accuracy:
    """Errors of the output against the definition: T = S = 128, two heads of width 64."""

    params = (tuple(PLANS), DTYPES)
    param_names = ("plan", "dtype")

    def setup(self, plan, dtype):
        self.call = problem.bind(catalog.variant("softmax"), (), {**operands((1, 2, 2, 128, 128, 64), dtype), **PLANS[plan](128)}, ("out",))
        self.truth = definition.run(self.call)["out"]
        self.given = {**self.call.given, **PLANS[plan](128)}

    def track_worst_error(self, plan, dtype):
        """Largest error, in units roundoff of the row's largest value."""
        return self.errors(dtype).max()

    def track_mean_error(self, plan, dtype):
        """Root mean square error, in units roundoff of the row's largest value."""
        return np.sqrt((self.errors(dtype) ** 2).mean())

    track_worst_error.unit = track_mean_error.unit = "units roundoff"

    def errors(self, dtype):
        found = ra.attention(**self.given, backend="cpu").astype(np.float64)
        return np.abs(found - self.truth) / (precision.format_of(dtype).unit * np.abs(self.truth).max(-1, keepdims=True))


class Long:
    """One long head, T = S = length, width 64, float32: memory has to grow with the length, not with its square."""

    params = (LONG,)
    param_names = ("length",)
    timeout = 600

    def setup(self, length):
        self.given = operands((1, 1, 1, length, length, 64), "float32")

    def peakmem_forward(self, length):
        """Peak resident bytes of a process that makes one call, interpreter and compiler included; the scores alone would be 4 length^2."""
        ra.attention(**self.given, backend="cpu")

    def peakmem_gradients(self, length):
        """Peak resident bytes of a process that asks for gradients once."""
        ra.gradients("softmax", **self.given, d_out=self.given["q"], backend="cpu")
