"""Backward passes written by hand: right ones pass, every fault is seen in the gradients it spoils and gets its name."""

import examination
import numpy as np
import planted
import planted_backward
import pytest

import refattn as ra

pytestmark = pytest.mark.compiled

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("tile", [5, 16, planted.FAR])
@pytest.mark.parametrize("n, dtype", list(enumerate(DTYPES)))
def test_the_right_backward_pass_passes(n, dtype, tile):
    stages = planted_backward.right(tile=tile, forward=planted.right(tile=tile))
    report = ra.check(planted_backward.candidate(stages), dtype=dtype, suite="quick", seed=n)
    assert report.passed, report
    assert {"d_q", "d_k", "d_v", "d_bias", "d_sinks"} <= {name for case in report.cases for name in case.ratios}


@pytest.mark.parametrize("n, fault", list(enumerate(planted_backward.FAULTS)))
def test_a_fault_is_seen_in_gradients_alone_and_named(n, fault):
    dtype = DTYPES[n % 2]
    report = ra.check(planted_backward.candidate(planted_backward.FAULTS[fault]), dtype=dtype, suite="quick")
    assert not report.passed
    assert {name[:2] for case in report.failures for name, r in case.ratios.items() if (r > 1).any()} == {"d_"}
    answer = examination.marked(fault, [fault.split()[0]], report)
    assert answer.outcome in ("unique", "class"), answer


@pytest.mark.peer
def test_the_right_backward_pass_is_autograd():
    import torch

    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal(s) for s in ((2, 4, 24, 12), (2, 2, 40, 12), (2, 2, 40, 20), (2, 4, 24, 20)))
    d_lse, bias, sinks = (rng.standard_normal(s) for s in ((2, 4, 24), (1, 4, 24, 1), (4,)))
    given = {name: torch.tensor(x, requires_grad=True) for name, x in {"q": 3 * q, "k": k, "v": v, "bias": bias, "sinks": sinks}.items()}
    keys, values = (given[name].repeat_interleave(2, 1) for name in ("k", "v"))
    s = 3.0 * torch.tanh(0.3 * given["q"] @ keys.mT / 3.0) + given["bias"]
    s = s.masked_fill(~torch.tensor(planted.visible(24, 40, True, (9, 3))), -np.inf)
    s = torch.cat([s, given["sinks"][None, :, None, None].expand(2, 4, 24, 1)], -1)
    out = torch.softmax(s, -1)[..., :-1] @ values
    ((out * torch.tensor(d_out)).sum() + (torch.logsumexp(s, -1) * torch.tensor(d_lse)).sum()).backward()
    operands = {name: x.detach().numpy().astype(np.float32) for name, x in given.items()}
    found = planted_backward.gradients(
        planted_backward.RIGHT, **operands, d_out=d_out.astype(np.float32), d_lse=d_lse.astype(np.float32),
        scale=0.3, softcap=3.0, causal=True, window=(9, 3),
    )  # fmt: skip
    for name, x in given.items():
        right = x.grad.numpy()
        assert np.abs(found[f"d_{name}"] - right).max() < 2e-6 * np.abs(right).max() + 1e-6, name
