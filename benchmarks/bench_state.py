"""Variants with a state on the CPU engine: time, memory and accuracy of the chunked form, and what a long sequence costs."""

from __future__ import annotations

import numpy as np

import refattn as ra

from .recurrences import CASES, RecurrenceCase

LINES = {case.group: case for case in CASES}
#: Tokens of a sequence on which accuracy is measured, and of a long one.
SHORT, LONG = 512, 131072


class Chunked:
    """Eight heads of 4096 tokens, keys and values of 64, float32."""

    params = (tuple(LINES),)
    param_names = ("variant",)

    def setup(self, group):
        self.work = LINES[group].work("forward", "float32", 1)
        self.time_forward(group)
        self.time_training(group)

    def time_forward(self, group):
        """Seconds of one call."""
        ra.attend(self.work.variant, **self.work.operands, backend="cpu", form="chunked")

    def time_training(self, group):
        """Seconds of a forward and a backward pass."""
        ra.gradients(self.work.variant, **self.work.operands, d_out=self.work.d_out, backend="cpu", form="chunked")


class Long:
    """One head of 131072 tokens, keys and values of 64, float32."""

    params = (("GLA", "gated delta"),)
    param_names = ("variant",)
    timeout = 300

    def setup(self, group):
        work = RecurrenceCase(group, Hq=1, T=LONG).work("forward", "float32", 1)
        self.variant, self.operands, self.d_out = work.variant, work.operands, work.d_out
        small = RecurrenceCase(group, Hq=1, T=SHORT).work("forward", "float32", 1)
        ra.gradients(small.variant, **small.operands, d_out=small.d_out, backend="cpu")

    def time_forward(self, group):
        """Seconds of one call."""
        ra.attend(self.variant, **self.operands, backend="cpu", form="chunked")

    def peakmem_forward(self, group):
        """Bytes of the process, operands included."""
        ra.attend(self.variant, **self.operands, backend="cpu", form="chunked")

    def peakmem_training(self, group):
        """Bytes of the process, operands included."""
        ra.gradients(self.variant, **self.operands, d_out=self.d_out, backend="cpu", form="chunked")


class Accuracy:
    """Two heads of 512 tokens in float32, beside the recurrence in float64."""

    params = (tuple(LINES),)
    param_names = ("variant",)

    def track_ulp(self, group):
        """The largest error, in units of 2**-24 of the largest number."""
        work = RecurrenceCase(group, Hq=2, T=SHORT).work("forward", "float32", 1)
        found = ra.attend(work.variant, **work.operands, backend="cpu", form="chunked")
        exact = ra.attend(work.variant, **{name: x.astype(np.float64) for name, x in work.operands.items()}, backend="cpu", form="recurrent")
        return float(np.max(np.abs(found - exact)) / np.max(np.abs(exact)) * 2.0**24)

    track_ulp.unit = "2**-24"
