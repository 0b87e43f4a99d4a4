"""Gradients of variants that are neither softmax of dot products nor a recurrence: back through whole arrays of NumPy, or by their own kernels."""

from __future__ import annotations

import numpy as np

import refattn as ra
from refattn import catalog

from .workload import LENGTHS, VARIANTS, operands


class Gradients:
    """Gradients of one output on T = S = length positions, float64."""

    params = (tuple(name for name in VARIANTS if catalog.variant(name).vectorized is not None), LENGTHS)
    param_names = ("variant", "length")

    def setup(self, variant, length):
        self.operands = operands(variant, length)
        self.d_out = np.ones_like(ra.attend(variant, **self.operands, returns="out"))

    def time_gradients(self, variant, length):
        """Seconds of a forward and a backward pass."""
        ra.gradients(variant, **self.operands, d_out=self.d_out)

    def peakmem_gradients(self, variant, length):
        """Peak resident bytes of a process that makes one call: everything recorded is kept until it has been gone back through."""
        ra.gradients(variant, **self.operands, d_out=self.d_out)
