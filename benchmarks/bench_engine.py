"""The CPU engine: time, memory, rate and accuracy of what it runs.

What takes long or much memory is in `Long`; a quick run leaves it out with ``--bench '^bench_engine.(?!Long)'``.
"""

from __future__ import annotations

import time
from types import FunctionType
from typing import Any

import numpy as np

import refattn as ra
from refattn import backends, catalog, precision

from . import fresh, workload
from .cases import Case, alibi
from .ceilings import MultiplyAdd

#: Those that the engine has a kernel for.
VARIANTS = tuple(name for name in workload.VARIANTS if "cpu" in backends.of(catalog.variant(name)))
if not VARIANTS:
    raise RuntimeError("no variant runs on the CPU engine: there is nothing to measure, and an empty run would look like a fast one")

SHAPES = {
    "8 x 128 x 64": Case("", 1, 8, 8, 128, 128, 64),
    "8 x 1024 x 64": Case("", 1, 8, 8, 1024, 1024, 64),
    "8/2 x 512 x 128": Case("", 1, 8, 2, 512, 512, 128),
    "1 x 2048 x 64": Case("", 1, 1, 1, 2048, 2048, 64),
}
CACHES = {"4096": Case("", 1, 32, 8, 1, 4096, 128), "32768": Case("", 1, 32, 8, 1, 32768, 128)}
#: What is given beside q, k and v, for T = S = n.
PLANS: dict[str, Any] = {
    "full": lambda n: {},
    "causal": lambda n: {"causal": True},
    "window": lambda n: {"window": (n // 8, 0)},
    "softcap": lambda n: {"softcap": 5.0},
    "bias": lambda n: {"bias": np.linspace(-1, 1, n * n, dtype=np.float32).reshape(n, n)},
    "mask": lambda n: {"mask": np.arange(n)[:, None] % 7 != np.arange(n) % 5},
}
DTYPES = ("float32", "float64", "bfloat16")


class Plans:
    """Every plan at one length, T = S = 512, and eight heads of width 64, float32."""

    params = (tuple(PLANS),)
    param_names = ("plan",)

    def setup(self, plan):
        work = Case("", 1, 8, 8, 512, 512, 64).work("forward", "float32", 1)
        self.given, self.d_out = {**work.operands, **PLANS[plan](512)}, work.d_out
        self.time_forward(plan)
        self.time_training(plan)

    def time_forward(self, plan):
        """Seconds of one call."""
        ra.attention(**self.given, backend="cpu")

    def time_training(self, plan):
        """Seconds of a forward and a backward pass."""
        ra.gradients("softmax", **self.given, d_out=self.d_out, backend="cpu")


class Shapes:
    """One call without masks, by shape (heads x length x width) and dtype."""

    params = (tuple(SHAPES), DTYPES)
    param_names = ("shape", "dtype")

    def setup(self, shape, dtype):
        self.work = SHAPES[shape].work("forward", dtype, 1)
        self.time_forward(shape, dtype)
        self.time_training(shape, dtype)

    def time_forward(self, shape, dtype):
        """Seconds of one call."""
        ra.attention(**self.work.operands, backend="cpu")

    def time_training(self, shape, dtype):
        """Seconds of a forward and a backward pass."""
        ra.gradients("softmax", **self.work.operands, d_out=self.work.d_out, backend="cpu")


class Decode:
    """One query against a cache, 32 heads on 8, width 128, by length of the cache and dtype."""

    params = (tuple(CACHES), DTYPES)
    param_names = ("length", "dtype")

    def setup(self, length, dtype):
        self.given = CACHES[length].work("forward", dtype, 1).operands
        self.time_step(length, dtype)

    def time_step(self, length, dtype):
        """Seconds of one call, the cache warm where it fits the processor's."""
        ra.attention(**self.given, backend="cpu")


class Small:
    """A call so small that the way to the kernel is what it costs."""

    def setup(self):
        self.given = Case("", 1, 8, 8, 16, 16, 64).work("forward", "float32", 1).operands
        self.time_small()

    def time_small(self):
        """Seconds of one call at T = S = 16, eight heads of width 64, float32."""
        ra.attention(**self.given, backend="cpu")


class First:
    """What a process pays once, compiled code being on disk."""

    def setup(self):
        x = np.ones((1, 8, 128, 64), np.float32)
        ra.attention(x, x, x, backend="cpu")

    def timeraw_first_call(self):
        """Imports and the first call of the engine."""
        return """
        import numpy as np
        import refattn as ra
        x = np.ones((1, 8, 128, 64), np.float32)
        ra.attention(x, x, x, backend="cpu")
        """


class Functions:
    """A function of scores (ALiBi) at T = S = 1024, eight heads of width 64, float32."""

    def setup(self):
        work = Case("", 1, 8, 8, 1024, 1024, 64, kind="alibi").work("forward", "float32", 1)
        self.given = {name: work.operands[name] for name in ("q", "k", "v")}
        self.aux = work.functions.aux
        self.time_function()

    def time_function(self):
        """Seconds of one call."""
        ra.attention(**self.given, score_mod=alibi, aux=self.aux, backend="cpu")

    def time_bare(self):
        """Seconds of one call without it."""
        ra.attention(**self.given, backend="cpu")

    def track_compile(self):
        """Seconds that the first call with a new function takes beyond the second."""
        new = FunctionType(alibi.__code__.replace(co_name=f"new_{time.perf_counter_ns()}"), alibi.__globals__)
        first, second = (self.seconds(new) for _ in range(2))
        return first - second

    track_compile.unit = "seconds"

    def seconds(self, function):
        start = time.perf_counter()
        ra.attention(**self.given, score_mod=function, aux=self.aux, backend="cpu")
        return time.perf_counter() - start


class Rate:
    """How near one thread comes to nothing but multiply-adds: T = S = 1024, eight heads of width 64, no mask."""

    params = (("float32", "float64"), ("forward", "training"))
    param_names = ("dtype", "way")

    def setup(self, dtype, way):
        self.work = Case("", 1, 8, 8, 1024, 1024, 64).work(way, dtype, 1)
        self.ceiling = MultiplyAdd(np.dtype(dtype), 1)
        self.call()
        self.ceiling()

    def call(self):
        if self.work.way == "forward":
            ra.attention(**self.work.operands, backend="cpu")
        else:
            ra.gradients("softmax", **self.work.operands, d_out=self.work.d_out, backend="cpu")

    def track_share_of_peak(self, dtype, way):
        """Percent of the multiply-adds per second that registers alone allow, the fastest of five in turns."""
        ra.set_num_threads(1)
        seconds = [(self.seconds(self.call), self.seconds(self.ceiling)) for _ in range(5)]
        fastest, bare = (min(x) for x in zip(*seconds, strict=True))
        return 100 * (self.work.flops / fastest) / (self.ceiling.flops / bare)

    track_share_of_peak.unit = "percent"

    @staticmethod
    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class Variants:
    """Every variant that the engine runs, on T = S = length positions, float32."""

    params = (VARIANTS, (256, 1024))
    param_names = ("variant", "length")

    def setup(self, variant, length):
        self.operands = workload.operands(variant, length, "float32")
        self.time_forward(variant, length)

    def time_forward(self, variant, length):
        """Seconds of one call."""
        ra.attend(variant, **self.operands, returns="out", backend="cpu")

    def peakmem_forward(self, variant, length):
        """Peak resident bytes of a process that makes one call: interpreter and compiler included, so only differences mean anything."""
        ra.attend(variant, **self.operands, returns="out", backend="cpu")


class Accuracy:
    """Errors of every variant that the engine runs against its definition."""

    params = (VARIANTS, DTYPES, (64, 256))
    param_names = ("variant", "dtype", "length")

    def setup(self, variant, dtype, length):
        self.operands = workload.operands(variant, length, dtype)
        exact = {name: x.astype(np.float64) if x.dtype == precision.as_dtype(dtype) else x for name, x in self.operands.items()}
        self.exact = ra.attend(variant, **exact, returns="out", backend="definition")

    def track_worst_ulp(self, variant, dtype, length):
        """Largest error, in units in the last place of the row's largest value."""
        return self.ulp(variant, dtype).max()

    def track_mean_ulp(self, variant, dtype, length):
        """Root mean square error, in the same units."""
        return np.sqrt((self.ulp(variant, dtype) ** 2).mean())

    track_worst_ulp.unit = track_mean_ulp.unit = "ulp"

    def ulp(self, variant, dtype):
        found = ra.attend(variant, **self.operands, returns="out", backend="cpu").astype(np.float64)
        largest = np.abs(self.exact).max(-1, keepdims=True)
        one = 2.0 * precision.format_of(dtype).unit * 2.0 ** np.floor(np.log2(largest))
        return np.abs(found - self.exact) / one


class Long:
    """One long head, T = S = length, width 64, float32: memory has to grow with the length, not with its square."""

    params = ((8192, 131072),)
    param_names = ("length",)
    timeout = 900

    def setup(self, length):
        work = Case("", 1, 1, 1, length, length, 64).work("forward", "float32", 1)
        self.given, self.d_out = work.operands, work.d_out

    def peakmem_forward(self, length):
        """Peak resident bytes of a process that makes one call, interpreter and compiler included; the scores alone would be 4 length^2."""
        ra.attention(**self.given, backend="cpu")

    def peakmem_training(self, length):
        """Peak resident bytes of a process that makes a forward and a backward pass."""
        ra.gradients("softmax", **self.given, d_out=self.d_out, backend="cpu")

    def track_extra_forward(self, length):
        """Peak bytes beyond operands and results."""
        return fresh.memory("forward", length, 1)[0]

    def track_extra_training(self, length):
        """Peak bytes beyond operands and results, of both passes."""
        return fresh.memory("training", length, 1)[0]

    track_extra_forward.unit = track_extra_training.unit = "bytes"
