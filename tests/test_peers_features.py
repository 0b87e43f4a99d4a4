"""Linear attention by features against code of other people, and against compositions of PyTorch's operations in the quadratic form.

Both sides compute in float64 (what would convert to float32 is kept from it); each operation rounds once, by 2**-53 of what it computes, so that
the tolerance is the one of the identities (catalogue.rounding): as if the operands had been off by so much with every operation of ours, twice over.
Gradients are those of PyTorch's autograd; ours come with an estimate of their error.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from catalogue import flops, rounding
from peer_sources import fla, functions
from test_variant_peers import DOUBLE, FUNCTION, assert_within, numbers

import refattn as ra
from refattn import catalog
from refattn.pieces.feature_maps import favor
from refattn.spec import size

pytestmark = pytest.mark.peer


def performer():
    import torch
    from einops import rearrange, repeat
    from torch import nn

    names = ("softmax_kernel", "generalized_kernel", "linear_attention", "causal_linear_attention_noncuda")
    names += ("orthogonal_matrix_chunk", "gaussian_orthogonal_random_matrix")
    given = {"torch": torch, "nn": nn, "repeat": repeat, "rearrange": rearrange, "math": math, "TORCH_GE_1_8_0": True}
    return functions("performer_pytorch/performer_pytorch.py", *names, **given)


def tensors(operands):
    import torch

    return {name: torch.tensor(x, requires_grad=True) for name, x in operands.items()}


def agree(reference, name, operands, returns=("out",), gradients=True, **params):
    """The reference, a function of tensors by name, against ours: outputs, and on tiny operands gradients."""
    import torch

    def ours(x):
        results = ra.attend(name, **x, **params, returns=returns, backend="definition")
        return [results] if len(returns) == 1 else list(results)

    theirs = reference(**tensors(operands))
    theirs = theirs if isinstance(theirs, tuple | list) else (theirs,)
    tolerances = rounding(ours, operands, catalog.variant(name), 2 * flops(catalog.variant(name), operands, params))
    for a, b, tolerance in zip(theirs, ours(operands), tolerances, strict=True):
        assert_within(a.detach(), b, tolerance)
    if not gradients:
        return
    square = "k" in operands and operands["q"].shape[-2] == operands["k"].shape[-2]
    small = {operand: tiny(catalog.variant(name).operand(operand).axes, x, square) for operand, x in operands.items()}
    leaves = tensors(small)
    out = reference(**leaves)
    out = out[0] if isinstance(out, tuple | list) else out
    d_out = np.cos(np.arange(out.numel())).reshape(out.shape)
    (out * torch.from_numpy(d_out)).sum().backward()
    found = ra.gradients(name, **small, **params, d_out=d_out, backend="definition")
    for operand, leaf in leaves.items():
        if hasattr(found, "d_" + operand):
            expected = leaf.grad.numpy()
            rounded = DOUBLE * 4 * flops(catalog.variant(name), small, params) * max(np.abs(expected).max(), 1.0)
            assert_within(expected, getattr(found, "d_" + operand), found.errors["d_" + operand] + rounded)


#: Sizes of gradient checks: every axis short, two query heads to a state.
TINY = {"B": 1, "Hq": 2, "Hkv": 1, "T": 3, "S": 4, "D": 2, "E": 2, "F": 2, "M": 3, "R": 2}


def tiny(axes, x, square):
    sizes = {**TINY, "S": TINY["T"]} if square else TINY
    return x[tuple(slice(size(axis, sizes)) for axis in axes.split())].copy()


def grouped(x):
    """Keys or values for two query heads each."""
    return x.repeat_interleave(2, dim=1)


def qkv(n=7, keys=9, d=4, d_v=3):
    return {"q": numbers(1, 2, 4, n, d), "k": numbers(2, 2, 2, keys, d), "v": numbers(3, 2, 2, keys, d_v)}


def weighted(weights, values, causal, eps=0.0, least=None):
    """Normalised attention in the quadratic form."""
    if causal:
        weights = weights.tril(diagonal=weights.shape[-1] - weights.shape[-2])
    total = weights.sum(-1, keepdim=True) + eps
    return weights @ values / (total if least is None else total.clamp(min=least))


# ---- Performer -------------------------------------------------------------------------------------------------------------------


def with_projection(d=4, m=11):
    return {**qkv(), "w": favor.orthogonal(np.random.default_rng(5), (m, d))}


@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.5])
def test_performer_is_that_of_performer_pytorch(eps):
    peer = performer()

    def theirs(q, k, v, w):
        phi_q = peer.softmax_kernel(q, projection_matrix=w, is_query=True, eps=eps)
        phi_k = peer.softmax_kernel(grouped(k), projection_matrix=w, is_query=False, eps=eps)
        return peer.linear_attention(phi_q, phi_k, grouped(v))

    # The published code takes the stabiliser for a constant where it differentiates, which is so without eps.
    agree(theirs, "performer", with_projection(), eps=eps, stabilizer="published", gradients=eps == 0.0)


def test_performer_relu_is_that_of_performer_pytorch():
    peer = performer()

    def theirs(q, k, v, w):
        phi_q, phi_k = (peer.generalized_kernel(x, projection_matrix=w) for x in (q, grouped(k)))
        return peer.linear_attention(phi_q, phi_k, grouped(v))

    agree(theirs, "performer_relu", with_projection())


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("name", ["performer", "performer_relu"])
def test_causal_performer_is_that_of_performer_pytorch_in_chunks(name, chunk):
    """It adds 1e-6 to every feature's sum over keys: an initial mass."""
    peer = performer()
    operands = with_projection()
    operands["q"] = numbers(1, 2, 4, 9, 4)

    def theirs(q, k, v, w, initial_mass):
        kernel = {"performer": peer.softmax_kernel, "performer_relu": peer.generalized_kernel}[name]
        sides = {"is_query": True}, {"is_query": False}
        phi_q, phi_k = (
            kernel(x, projection_matrix=w, **(side if name == "performer" else {})) for x, side in zip((q, grouped(k)), sides, strict=True)
        )
        return peer.causal_linear_attention_noncuda(phi_q, phi_k, grouped(v), chunk_size=chunk)

    params = {"stabilizer": "published"} if name == "performer" else {}
    agree(theirs, name, {**operands, "initial_mass": np.full((2, 2, 11), 1e-6)}, causal=True, gradients=False, **params)


def test_the_published_causal_performer_answers_to_later_tokens():
    """Its stabiliser is the largest exponent of the whole sequence, and eps is added after; eight tokens stay what they are only without it."""
    import torch

    peer = performer()
    operands = {**{name: numbers(n, 1, 2, 16, 4) for n, name in enumerate("qkv")}, "w": favor.orthogonal(np.random.default_rng(5), (32, 4))}
    operands["k"][:, :, 12] *= 8.0
    first = {name: x if name == "w" else x[:, :, :8] for name, x in operands.items()}

    def theirs(q, k, v, w):
        q, k, v, w = map(torch.from_numpy, (q, k, v, w))
        phi_q, phi_k = (peer.softmax_kernel(x, projection_matrix=w, is_query=n == 0) for n, x in enumerate((q, k)))
        return peer.causal_linear_attention_noncuda(phi_q, phi_k, v).numpy()[:, :, :8]

    assert np.abs(theirs(**operands) - theirs(**first)).max() > 0.1
    ours = {
        s: [ra.attend("performer", **x, causal=True, stabilizer=s, backend="definition")[:, :, :8] for x in (operands, first)]
        for s in ("none", "published")
    }
    np.testing.assert_array_equal(*ours["none"])
    assert np.abs(ours["published"][0] - ours["published"][1]).max() > 0.1
    # A third derivation: weights in the quadratic form, of whose rows the first eight know nothing of later ones.
    q, k = (operands[name] * 4.0**-0.25 for name in "qk")
    phi_q, phi_k = (np.exp(x @ operands["w"].T - np.sum(x * x, -1, keepdims=True) / 2.0) + 1e-4 for x in (q, k))
    weights = np.tril(phi_q @ phi_k.mT)
    causal = (weights @ operands["v"] / weights.sum(-1, keepdims=True))[:, :, :8]
    variant, params = catalog.variant("performer"), {"causal": True}
    [tolerance] = rounding(
        lambda x: ra.attend("performer", **x, **params, backend="definition"), operands, variant, 2 * flops(variant, operands, params)
    )
    assert_within(causal, ours["none"][0], tolerance[:, :, :8])
    assert np.abs(causal - theirs(**operands)).max() > 0.1


def test_the_published_projections_are_not_uniform():
    """A QR decomposition alone leaves a row's sign to the algorithm: the first entry of each block's first row is never positive."""
    import torch

    torch.manual_seed(0)
    peer, rng = performer(), np.random.default_rng(0)
    theirs = [peer.gaussian_orthogonal_random_matrix(4, 4)[0, 0].item() for _ in range(64)]
    ours = [favor.orthogonal(rng, (4, 4))[0, 0] for _ in range(64)]
    assert len({sign > 0 for sign in theirs}) == 1  # a fair coin, 64 times, with probability 2**-63
    assert 8 < np.sum(np.array(ours) > 0) < 56  # fails with probability 5e-10
    # The estimate of exp(x . x) with x = (1/2, 0): biased, by more than six standard deviations of its mean.
    m = 2000
    sides = {"theirs": peer.gaussian_orthogonal_random_matrix(m, 2).double().numpy(), "ours": favor.orthogonal(rng, (m, 2))}
    deviation = math.sqrt((math.exp(1.5) - math.exp(0.5)) / m)
    errors = {side: abs(np.mean(np.exp(w[:, 0] - 0.25)) - math.exp(0.25)) for side, w in sides.items()}
    assert errors["ours"] <= 6.0 * deviation < errors["theirs"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["performer", "random_fourier"])
def test_with_many_features_it_is_softmax_attention(name, causal):
    """Every weight lies within six standard deviations of its mean; what that allows the quotient is the bound."""
    m, scale = 8192, 0.5
    operands = {axis: 0.3 * numbers(n, 1, 2, 6, 4) for n, axis in enumerate("qkv")}
    operands["w"] = favor.orthogonal(np.random.default_rng(7), (m, 4))
    params = {"performer": {"eps": 0.0}, "random_fourier": {"kernel": "softmax"}}[name]
    ours = ra.attend(name, **operands, causal=causal, scale=scale, **params, backend="definition")
    exact = ra.attend("softmax", operands["q"], operands["k"], operands["v"], scale=scale, causal=causal)
    s = scale * operands["q"] @ operands["k"].mT
    q_q, k_k = scale * np.sum(operands["q"] ** 2, -1)[..., None], scale * np.sum(operands["k"] ** 2, -1)[..., None, :]
    deviation = {"performer": np.sqrt(np.exp(q_q + k_k + 4.0 * s) - np.exp(2.0 * s)), "random_fourier": np.exp((q_q + k_k) / 2.0)}[name] / math.sqrt(
        m
    )
    seen = np.tril(np.ones((6, 6))) if causal else np.ones((6, 6))
    off, total = 6.0 * deviation * seen, np.sum(np.exp(s) * seen, -1, keepdims=True)
    bound = (off @ np.abs(operands["v"]) + np.sum(off, -1, keepdims=True) * np.abs(exact)) / (total - np.sum(off, -1, keepdims=True))
    assert np.all(np.sum(off, -1, keepdims=True) < total)
    assert_within(ours, exact, bound)


# ---- random sines and cosines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["gaussian", "softmax"])
def test_random_fourier_is_cosines_of_differences(kernel, causal):
    import torch

    def theirs(q, k, v, w):
        x, y = q / 4**0.25, grouped(k) / 4**0.25
        weights = torch.cos((x @ w.T)[..., :, None, :] - (y @ w.T)[..., None, :, :]).mean(-1)
        if kernel == "softmax":
            weights = weights * torch.exp((x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]) / 2.0)
        return weighted(weights, grouped(v), causal, eps=8.0)

    agree(theirs, "random_fourier", with_projection(), kernel=kernel, causal=causal, eps=8.0, scale=0.5)


@pytest.mark.parametrize("causal", [False, True])
def test_rfa_is_cosines_of_differences_of_directions(causal):
    import torch

    def theirs(q, k, v, w, sigma):
        x, y = (sigma * torch.nn.functional.normalize(side, dim=-1) @ (0.4 * w).T for side in (q, grouped(k)))
        return weighted(torch.cos(x[..., :, None, :] - y[..., None, :, :]).mean(-1), grouped(v), causal)

    operands = {**with_projection(), "sigma": np.linspace(0.5, 1.5, 4)}
    agree(lambda w, **rest: theirs(w=w / 0.4, **rest), "rfa", operands, causal=causal)


@pytest.mark.parametrize("strength", [0.05, 3.0, 40.0])
def test_rfa_gate_is_a_sum_of_faded_weights(strength):
    import torch

    def theirs(q, k, v, gate, w, sigma):
        x, y = (sigma * torch.nn.functional.normalize(side, dim=-1) @ w.T for side in (q, grouped(k)))
        faded = torch.cumsum(gate, -1)
        faded = torch.exp((faded[..., :, None] - faded[..., None, :]).tril()) * -torch.expm1(gate)[..., None, :]
        return weighted(torch.cos(x[..., :, None, :] - y[..., None, :, :]).mean(-1) * grouped(faded), grouped(v), True)

    operands = {**qkv(n=9), "w": 0.5 * numbers(5, 6, 4), "sigma": np.linspace(0.5, 1.5, 4)}
    gate = -np.random.default_rng(4).exponential(strength, (2, 2, 9))
    agree(theirs, "rfa_gate", {**operands, "gate": gate})


# ---- rectified and learned features --------------------------------------------------------------------------------------------------


def with_a_positive_channel(operands):
    """Queries and keys of which each has a feature."""
    for name in ("q", "k"):
        operands[name][..., 0] = np.abs(operands[name][..., 0])
    return operands


def test_relu_linear_is_timms():
    """Its denominator is a column of ones among the values."""
    import torch
    import torch.nn.functional as F

    layer = functions("timm/models/efficientvit_mit.py", "_attn")

    def theirs(q, k, v):
        padded = F.pad(grouped(v), (0, 1), value=1.0)
        out = layer._attn(SimpleNamespace(eps=1e-5), *(x.as_subclass(wide()) for x in (F.relu(q), F.relu(grouped(k)), padded)))
        return out.as_subclass(torch.Tensor)

    agree(theirs, "relu_linear", with_a_positive_channel(qkv()), eps=1e-5)


def test_causal_relu_linear_is_a_triangular_product():
    import torch.nn.functional as F

    def theirs(q, k, v):
        return weighted(F.relu(q) @ F.relu(grouped(k)).mT, grouped(v), True, eps=1e-5)

    agree(theirs, "relu_linear", with_a_positive_channel(qkv()), eps=1e-5, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_focused_linear_is_torch_pow_and_norm(causal):
    def theirs(q, k, v):
        phi_q, phi_k = (x.relu() ** 3 * x.relu().norm(dim=-1, keepdim=True) / (x.relu() ** 3).norm(dim=-1, keepdim=True) for x in (q, grouped(k)))
        return weighted(phi_q @ phi_k.mT, grouped(v), causal, eps=0.25)

    agree(theirs, "focused_linear", with_a_positive_channel(qkv()), eps=0.25, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_cosformer_is_cosines_of_distances(causal):
    import torch

    def theirs(q, k, v):
        n, keys = q.shape[2], k.shape[2]
        distance = torch.arange(n, dtype=torch.float64)[:, None] + (keys - n if causal else 0) - torch.arange(keys)
        weights = torch.relu(q) @ torch.relu(grouped(k)).mT * torch.cos(math.pi / 2.0 * distance / max(n, keys))
        return weighted(weights, grouped(v), causal, least=0.125)

    agree(theirs, "cosformer", qkv(), causal=causal, eps=0.125)


def learned(m=5):
    return {**qkv(), "w_q": numbers(5, 4, m, 4), "w_k": numbers(6, 2, m, 4), "b_q": numbers(7, 4, m), "b_k": numbers(8, 2, m)}


def preactivations(q, k, w_q, w_k, b_q, b_k):
    return q @ w_q.mT + b_q[:, None], grouped(k @ w_k.mT + b_k[:, None])


@pytest.mark.parametrize("causal", [False, True])
def test_t2r_is_torch_linear_and_relu(causal):
    def theirs(v, **rest):
        y_q, y_k = preactivations(**rest)
        return weighted(y_q.relu() @ y_k.relu().mT, grouped(v), causal, eps=0.5)

    agree(theirs, "t2r", learned(), eps=0.5, causal=causal)


@functools.cache
def wide():
    """Tensors of float64 that stay so where a reference calls float()."""
    import torch

    return type("Wide", (torch.Tensor,), {"float": lambda self: self})


def linear_attention_of_fla():
    """fla's recurrent linear attention, kept from converting to float32."""
    import torch
    from einops import rearrange

    wide = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    return functions("fla/ops/linear_attn/naive.py", "naive_recurrent_linear_attn", torch=wide, rearrange=rearrange).naive_recurrent_linear_attn


@pytest.mark.parametrize("activation", ["softmax", "exp", "joint"])
def test_hedgehog_is_flas_linear_attention_of_torch_softmaxes(activation):
    import torch

    naive = linear_attention_of_fla()

    def theirs(v, initial_state=None, initial_mass=None, **rest):
        y = preactivations(**rest)
        both = [torch.cat([side, -side], -1) for side in y]
        halves = [torch.cat([side.softmax(-1), (-side).softmax(-1)], -1) for side in y]
        phi_q, phi_k = {"softmax": halves, "exp": [side.exp() for side in both], "joint": [side.softmax(-1) for side in both]}[activation]
        start = None if initial_state is None else (grouped(initial_state), grouped(initial_mass)[:, None])
        tokens = (x.transpose(1, 2) for x in (phi_q, phi_k, grouped(v)))
        out, carried = naive(*tokens, scale=1.0, initial_state=start, output_final_state=True, normalize=True)
        if start is None:
            return out.transpose(1, 2)
        return out.transpose(1, 2), carried[0][:, ::2], carried[1][:, 0, ::2]

    operands = learned()
    operands["q"], operands["w_q"], operands["w_k"] = numbers(1, 2, 4, 9, 4), operands["w_q"] / 2.0, operands["w_k"] / 2.0
    agree(theirs, "hedgehog", operands, activation=activation, eps=1e-10, gradients=activation != "joint")
    started = {**operands, "initial_state": numbers(9, 2, 2, 10, 3), "initial_mass": np.abs(numbers(10, 2, 2, 10))}
    agree(theirs, "hedgehog", started, ("out", "state", "mass"), activation=activation, eps=1e-10, gradients=activation == "exp")


def test_t2r_and_dpfp_features_are_flas():
    """By the definitions of its feature maps' forward functions, on the layer's own projections."""
    import torch

    from refattn.pieces.feature_maps import dpfp, hedgehog, t2r

    classes = {}
    source = functions_of_classes("fla/modules/feature_map.py", ("HedgehogFeatureMap", "T2RFeatureMap", "DPFPFeatureMap"), classes)
    torch.manual_seed(0)
    x = numbers(1, 2, 3, 5, 4)
    layers = {name: made(4).double() for name, made in source.items()}
    with torch.no_grad():
        for layer in (layers["HedgehogFeatureMap"], layers["T2RFeatureMap"]):
            layer.layer.weight.normal_()
        found = {name: layer(torch.from_numpy(x)).numpy() for name, layer in layers.items()}
    w = layers["HedgehogFeatureMap"].layer.weight.detach().numpy()
    unit = 64 * DOUBLE  # sums of 32 or fewer on both sides, a function and a quotient
    assert_within(found["HedgehogFeatureMap"], hedgehog.features(x, 2.0 * w, np.zeros(4), 2), unit * (1.0 + 4.0 * np.abs(x).max() * np.abs(w).max()))
    w = layers["T2RFeatureMap"].layer.weight.detach().numpy()
    assert_within(found["T2RFeatureMap"], t2r.features(x, w, np.zeros(4)), unit * (np.abs(x) @ np.abs(w).T))
    theirs = found["DPFPFeatureMap"] / found["DPFPFeatureMap"].sum(-1, keepdims=True)  # the paper's division is not there
    ours = dpfp.features(x, np.ones(4))
    for shift, (a, b) in enumerate(zip(np.split(theirs, 4, -1), np.split(ours, 4, -1), strict=True), 1):
        assert_within(np.roll(a, -shift, -1), b, unit)  # r_(i - n) r_i there


def functions_of_classes(file, names, found):
    import ast

    import torch
    from peer_sources import ROOT
    from torch import nn

    tree = ast.parse((ROOT / file).read_text())
    body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    exec(compile(ast.Module(body, []), file, "exec"), {"torch": torch, "nn": nn}, found)
    return found


# ---- products of channels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 11])
def test_based_is_flas(n):
    peer = fla("based")
    operands = qkv(n, n)

    def theirs(q, k, v):
        return peer.naive_parallel_based(q, grouped(k), grouped(v))

    agree(theirs, "based", operands, gradients=n == 11)
    if n == 12:
        agree(lambda q, k, v: peer.naive_chunk_based(q, grouped(k), grouped(v), chunk_size=4), "based", operands, gradients=False)


@pytest.mark.parametrize("half", [False, True])
def test_based_is_linear_attention_of_the_expansion_of_taylor_series_linear_attention(half):
    import torch
    from einops import pack, unpack

    given = {"torch": torch, "pack": pack, "unpack": unpack, "sqrt": math.sqrt, "Tensor": torch.Tensor, "einsum": torch.einsum}
    expansion = functions("taylor_series_linear_attention/attention.py", "second_taylor_expansion", **given).second_taylor_expansion

    def theirs(q, k, v):
        phi_q, phi_k = expansion(q / 2.0, half), expansion(grouped(k), half)
        return phi_q @ (phi_k.mT @ grouped(v)) / (phi_q @ phi_k.sum(-2)[..., None])

    agree(theirs, "based", qkv(), causal=False, eps=0.0, gradients=False)


def test_for_small_scores_based_is_softmax():
    """The exponential is the polynomial up to |s|^3 / 6 exp |s|."""
    q, k, v = numbers(1, 2, 2, 6, 4), 0.01 * numbers(2, 2, 2, 6, 4), numbers(3, 2, 2, 6, 3)
    exact, scores = ra.attend("softmax", q, k, v, causal=True, returns=("out", "scores"))
    seen = np.isfinite(scores)
    s = np.where(seen, scores, 0.0)
    off = seen * np.abs(s) ** 3 / 6.0 * np.exp(np.abs(s))
    total = np.sum(seen * np.exp(s), -1, keepdims=True)
    bound = (off @ np.abs(v) + np.sum(off, -1, keepdims=True) * np.abs(exact)) / (total - np.sum(off, -1, keepdims=True))
    ours = ra.attend("based", q, k, v, eps=0.0)
    # Both round as well: a product of 4, a function, sums of 6 and a quotient.
    assert_within(ours, exact, bound + DOUBLE * 2 * (4 + FUNCTION + 2 * 6 + 2) * np.max(np.abs(v), axis=-2, keepdims=True))
    assert np.max(bound) < 1e-3 and np.max(np.abs(ours - exact)) > 1e-9


@pytest.mark.parametrize("n", [11, 5])
def test_rebased_is_flas_behind_a_layer_norm(n):
    import torch

    peer = fla("rebased")

    def theirs(q, k, v, gamma_q, beta_q, gamma_k, beta_k):
        norm = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:])  # noqa: E731
        q = norm(q) * gamma_q[:, None] + beta_q[:, None]
        k = norm(k) * gamma_k[:, None] + beta_k[:, None]
        return peer.naive_parallel_rebased(q, grouped(k), grouped(v))

    operands = {**qkv(n, n, d=4), "gamma_q": numbers(5, 4, 4), "beta_q": numbers(6, 4, 4), "gamma_k": numbers(7, 2, 4), "beta_k": numbers(8, 2, 4)}
    agree(theirs, "rebased", operands, gradients=n == 11)


def test_symmetric_power_is_the_closed_form():
    """Against fla's ReBased without its normalisation, and with a gate against weights in the quadratic form."""
    import torch

    peer = fla("rebased")
    operands = qkv(11, 11)
    agree(lambda q, k, v: peer.naive_parallel_rebased(q, grouped(k), grouped(v), scale=1.0), "symmetric_power", operands, eps=1e-6, gradients=False)

    def theirs(q, k, v, gate):
        faded = torch.cumsum(gate, -1)
        faded = torch.exp((faded[..., :, None] - faded[..., None, :]).tril())
        return weighted((q @ grouped(k).mT) ** 2 * grouped(faded), grouped(v), True, eps=0.5)

    for strength in (0.05, 3.0, 40.0):
        gate = -np.random.default_rng(4).exponential(strength, (2, 2, 11))
        agree(theirs, "symmetric_power", {**operands, "gate": gate}, eps=0.5, gradients=strength == 3.0)


def test_dpfp_is_flas_delta_rule_on_rolled_features():
    import torch
    from einops import rearrange

    peer = functions("fla/ops/delta_rule/naive.py", "delta_rule_recurrence", torch=torch, rearrange=rearrange)

    def theirs(q, k, v, beta, taps, initial_state=None):
        def phi(x):
            r = torch.cat([x.relu(), (-x).relu()], -1)
            products = torch.cat([tap * r * r.roll(-n, -1) for n, tap in enumerate(taps, 1)], -1)
            return products / products.sum(-1, keepdim=True)

        start = None if initial_state is None else grouped(initial_state).flatten(2, 3)
        width = 2 * q.shape[-1] * len(taps)
        arguments = (x.as_subclass(wide()) for x in (phi(q) * width**0.5, grouped(phi(k)), grouped(v), grouped(beta)))
        out, state = peer.delta_rule_recurrence(*arguments, initial_state=start)
        out, state = (x.as_subclass(torch.Tensor) for x in (out, state))
        return out if start is None else (out, state[:, ::2].unflatten(2, (len(taps), -1)))

    operands = {**qkv(9, 9), "beta": np.random.default_rng(4).uniform(0.1, 0.9, (2, 2, 9)), "taps": np.array([1.0, 0.5, 2.0])}
    agree(theirs, "dpfp", operands)
    agree(theirs, "dpfp", {**operands, "initial_state": numbers(6, 2, 2, 3, 8, 3)}, ("out", "state"), gradients=False)


# ---- other normalisers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_norm_attention_is_torch_elu_and_rms(causal):
    import torch.nn.functional as F

    def theirs(q, k, v, weight):
        weights = (F.elu(q) + 1.0) @ (F.elu(grouped(k)) + 1.0).mT
        out = (weights.tril(diagonal=k.shape[2] - q.shape[2]) if causal else weights) @ grouped(v)
        return weight * out / (out.square().mean(-1, keepdim=True).sqrt() + 1e-8)

    agree(theirs, "norm_attention", {**qkv(), "weight": numbers(5, 3)}, causal=causal)


def linear_attention_transformer():
    import torch
    import torch.nn.functional as F

    def default(value, other):
        return other if value is None else value

    def split_at_index(dim, index, t):
        before = (slice(None),) * dim
        return t[(*before, slice(None, index))], t[(*before, slice(index, None))]

    given = {"torch": torch, "F": F, "einsum": torch.einsum, "exists": lambda x: x is not None, "default": default, "split_at_index": split_at_index}
    return functions("linear_attention_transformer/linear_attention_transformer.py", "linear_attn", "causal_linear_attn", **given)


def test_efficient_is_that_of_linear_attention_transformer():
    peer = linear_attention_transformer()
    operands = qkv(9, 9, d=4, d_v=4)  # it takes values of the queries' width
    # It divides by sqrt(D), after the softmaxes.
    agree(lambda q, k, v: peer.linear_attn(q, grouped(k), grouped(v)) * q.shape[-1] ** 0.5, "efficient", operands)


def test_the_causal_attention_of_linear_attention_transformer_does_not_see_its_own_bucket():
    """In buckets of one it is attention by softmax(q) . exp(k); in longer ones a query sees what lies before its bucket, the first nothing."""
    import torch

    peer = linear_attention_transformer()
    q, k, v = (torch.from_numpy(numbers(n, 2, 3, 8, 4)) for n in range(3))
    weights = q.softmax(-1) @ k.exp().mT
    for bucket in (1, 2, 4):
        theirs = peer.causal_linear_attn(q, k, v, bucket_size=bucket).numpy()
        before = torch.arange(8)[:, None] // bucket > torch.arange(8) // bucket if bucket > 1 else torch.ones(8, 8).tril().bool()
        seen = weights * before / 2.0  # it divides queries by sqrt(D), in numerator and denominator
        total = seen.sum(-1, keepdim=True).clamp(min=1e-3)
        # A weight: two softmaxes' functions and sums of 4, an exponential, a product of 4; the quotient: sums of 8.
        roundings = 2 * (2 * (2 * FUNCTION + 4) + FUNCTION + 4 + 2 * 8 + 4)
        assert_within(theirs, (seen @ v / total).numpy(), DOUBLE * roundings * 2 * (seen @ v.abs() / total).numpy())
        assert np.all(theirs[:, :, :bucket] == 0.0) == (bucket > 1)
    assert np.abs(theirs - peer.causal_linear_attn(q, k, v, bucket_size=1).numpy()).max() > 0.5


def test_sima_is_torch_normalize():
    import torch.nn.functional as F

    def theirs(q, k, v):
        return F.normalize(q, p=1, dim=-2) @ (F.normalize(grouped(k), p=1, dim=-2).mT @ grouped(v))

    agree(theirs, "sima", qkv())


@pytest.mark.parametrize("causal", [False, True])
def test_hydra_is_torch_normalize_and_cumsum(causal):
    import torch.nn.functional as F

    def theirs(q, k, v):
        written = F.normalize(k, dim=-1) * v
        read = written.cumsum(1)[:, k.shape[1] - q.shape[1] :] if causal else written.sum(1, keepdim=True)
        return F.normalize(q, dim=-1) * read

    agree(theirs, "hydra", {"q": numbers(1, 2, 7, 5), "k": numbers(2, 2, 9, 5), "v": numbers(3, 2, 9, 5)}, causal=causal)


def test_double_attention_is_torch_conv1d_and_softmax():
    import torch.nn.functional as F

    def theirs(x, w_a, w_b, w_v, b_a, b_b, b_v):
        a, b, v = (F.conv1d(x.mT, w.T[..., None], bias) for w, bias in ((w_a, b_a), (w_b, b_b), (w_v, b_v)))
        return ((a @ b.softmax(-1).mT) @ v.softmax(-2)).mT

    operands = {"x": numbers(1, 2, 7, 5), "w_a": numbers(2, 5, 3), "w_b": numbers(3, 5, 4), "w_v": numbers(4, 5, 4)}
    agree(theirs, "double_attention", {**operands, "b_a": numbers(5, 3), "b_b": numbers(6, 4), "b_v": numbers(7, 4)})
