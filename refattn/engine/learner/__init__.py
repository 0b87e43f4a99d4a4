"""Variants of the `learner` family, and others that are no recurrence: modules of kernels, for hardly two share their inner loop, or of arrays."""
