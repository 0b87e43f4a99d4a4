"""The engine of `learner` variants: a module of kernels each, for no two of them share their inner loop."""
