"""Correct implementations, written by other people, pass: the judge's tolerance is for everybody's arithmetic, not for ours."""

import importlib
from dataclasses import replace

import planted
import pytest

import refattn as ra
from refattn import adapters

pytestmark = pytest.mark.peer

#: Adapter -> dtypes it computes in, and draws judged in each.
ADAPTERS = {
    "numpy": (("float64", "float32", "float16", "bfloat16"), 6),
    "torch": (("float64", "float32", "float16", "bfloat16"), 6),
    "torch-flex": (("float64", "float32", "float16", "bfloat16"), 3),
    "jax": (("float32", "float16", "bfloat16"), 5),
    "onnxruntime": (("float32", "float16"), 5),
    "mlx": (("float32", "float16", "bfloat16"), 5),
}


def llama(q, k, v, bias=None, mask=None, scale=None, causal=False):
    return hugging_face("llama", q, k, v, bias, mask, scale, causal)


def gemma2(q, k, v, bias=None, mask=None, scale=None, causal=False, softcap=None):
    return hugging_face("gemma2", q, k, v, bias, mask, scale, causal, softcap=softcap)


def gpt_oss(q, k, v, bias=None, mask=None, sinks=None, scale=None, causal=False):
    if sinks is None:
        raise NotImplementedError("it always has sinks")
    return hugging_face("gpt_oss", q, k, v, bias, mask, scale, causal, sinks=sinks)


def hugging_face(model, q, k, v, bias, mask, scale, causal, sinks=None, **options):
    """A model's eager attention with the additive mask its own code would build: the least number of the dtype over what is hidden."""
    import torch

    modelling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")

    class Module:
        num_key_value_groups, training, head_dim = q.shape[1] // k.shape[1], False, q.shape[3]

    Module.sinks = sinks
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    seen = torch.ones(full[2:], dtype=torch.bool).tril(full[3] - full[2] if causal else full[3])
    seen = seen if mask is None else seen & mask
    added = torch.where(seen, torch.zeros((), dtype=q.dtype) if bias is None else bias, torch.finfo(q.dtype).min)
    out, _ = modelling.eager_attention_forward(Module, q, k, v, added, scaling=q.shape[3] ** -0.5 if scale is None else scale, dropout=0.0, **options)
    return out.transpose(1, 2)


@pytest.mark.parametrize("name, dtype", [(name, dtype) for name, (dtypes, _) in ADAPTERS.items() for dtype in dtypes])
def test_an_adapter_agrees_whatever_the_draw(name, dtype):
    for seed in range(ADAPTERS[name][1]):
        report = ra.check(name, dtype=dtype, seed=seed)
        assert report.passed, f"seed {seed}\n{report}"


#: PyTorch's kernels on the CPU, and how each computes.
KERNELS = {"MATH": "math", "FLASH_ATTENTION": "torch-cpu-flash"}


def forced(kernel):
    """PyTorch's attention and its gradients by one of its kernels; calls that the kernel does not take are not asked."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch = adapters.load("torch")

    def by(function):
        def asked(*arguments):
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                try:
                    return function(*arguments)
                except RuntimeError as trouble:
                    if "No available kernel" in str(trouble):
                        raise NotImplementedError(f"{kernel} does not take it") from None
                    raise

        return asked

    return replace(torch, name=f"torch {kernel}", call=by(torch.call), gradients=by(torch.gradients), profile=KERNELS[kernel])


@pytest.mark.filterwarnings("ignore:Flash attention")
@pytest.mark.parametrize("dtype", ADAPTERS["torch"][0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_of_torch_and_its_gradients_agree(kernel, dtype):
    for seed in range(4):
        report = ra.check(forced(kernel), dtype=dtype, seed=seed, gradients=True)
        assert report.passed, f"seed {seed}\n{report}"
        assert sum("d_q" in case.ratios for case in report.cases) > 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_tiled_kernels_of_our_own_agree(tile, dtype):
    for seed in range(4):
        report = ra.check(planted.candidate(planted.right(tile=tile)), dtype=dtype, seed=seed)
        assert report.passed, f"seed {seed}\n{report}"


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_dtypes_here_are_all_that_the_adapter_has(name):
    assert set(ADAPTERS[name][0]) == set(importlib.import_module(f"refattn.adapters.{name.replace('-', '_')}").DTYPES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", [llama, gemma2, gpt_oss])
def test_transformers_eager_attention_agrees(model, dtype):
    for seed in range(4):
        report = ra.check(model, dtype=dtype, framework="torch", profile="eager", empty_rows="uniform", seed=seed)
        assert report.passed, f"seed {seed}\n{report}"


def test_transformers_eager_attention_with_a_soft_cap_left_out_is_noticed():
    def capless(q, k, v, softcap=None, scale=None):
        return gemma2(q, k, v, scale=scale)

    for dtype in ("float32", "bfloat16"):
        report = ra.check(capless, dtype=dtype, framework="torch", profile="eager")
        assert not report.passed and report.finding is not None and "with softcap" in report.finding.text
