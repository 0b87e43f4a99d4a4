"""Every variant of the catalogue: time, memory and rate of its definition, compiled."""

import time

import refattn as ra
from refattn import catalog, costs, definition

from .workload import LENGTHS, VARIANTS, dims, operands

DTYPES = ("float64", "float32", "bfloat16")


def prepare(name: str, length: int, dtype: str = "float64") -> dict:
    """Operands, with the definition compiled, so that no benchmark measures the compiler."""
    definition.compiled(catalog.variant(name))
    return operands(name, length, dtype)


class Forward:
    """One forward call on T = S = length positions, float64."""

    params = (VARIANTS, LENGTHS)
    param_names = ("variant", "length")

    def setup(self, variant, length):
        self.operands = prepare(variant, length)

    def time_forward(self, variant, length):
        """Seconds of one call."""
        ra.attend(variant, **self.operands, backend="definition")

    def peakmem_forward(self, variant, length):
        """Peak resident bytes of a process that makes one call: interpreter and compiler included, so only differences mean anything."""
        ra.attend(variant, **self.operands, backend="definition")


class Rate:
    """Floating-point operations a second, operations counted by the variant's own formula."""

    params = (VARIANTS, LENGTHS[-1:])
    param_names = ("variant", "length")

    def setup(self, variant, length):
        self.operands = prepare(variant, length)
        defaults = {p.name: p.default for p in catalog.variant(variant).params}
        self.flops = costs.cost(catalog.variant(variant), dims(variant, length), defaults, itemsize=8).flops

    def track_flops_rate(self, variant, length):
        """Gflop/s of the fastest of five calls."""
        return self.flops / min(self.seconds(variant) for _ in range(5)) / 1e9

    track_flops_rate.unit = "Gflop/s"

    def seconds(self, variant):
        start = time.perf_counter()
        ra.attend(variant, **self.operands, backend="definition")
        return time.perf_counter() - start


class Dtypes:
    """What the conversion in and the rounding out add: the shortest length in every dtype."""

    params = (VARIANTS, DTYPES)
    param_names = ("variant", "dtype")

    def setup(self, variant, dtype):
        self.operands = prepare(variant, LENGTHS[0], dtype)

    def time_forward(self, variant, dtype):
        """Seconds of one call."""
        ra.attend(variant, **self.operands, backend="definition")
