"""The engine of `learner` variants, and of others that are no recurrence: modules of kernels, for hardly two of them share their inner loop."""
