"""What a judgement costs: the quick suite on an implementation in NumPy."""

import numpy as np

import refattn as ra


def implementation(q, k, v, scale=None, causal=False):
    """Attention with grouped heads and the bottom-right causal mask; a row that sees nothing is zero."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    n_q, n_k = q.shape[2], k.shape[2]
    scores = q @ np.swapaxes(k, -1, -2) * q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        offset = 0 if causal == "top_left" else n_k - n_q
        scores = np.where(np.tri(n_q, n_k, offset, dtype=bool), scores, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total == 0, 1, total) @ v).astype(q.dtype)


class Check:
    """``ra.check`` of a correct implementation, float32."""

    def setup(self):
        self.time_check_quick()  # definitions and bounds are compiled

    def time_check_quick(self):
        """Seconds of one check with the quick suite."""
        report = ra.check(implementation, "softmax", dtype="float32", suite="quick")
        if not report.passed:
            raise AssertionError(str(report))  # a failing check takes another path
