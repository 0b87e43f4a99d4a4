"""AFT, Fastformer, separable attention and the softmax relatives with decay, against code by other people.

flash-linear-attention's naive functions cast to float32; here they run in float64, the cast itself replaced, so that they are judged at float64's
rounding.  A tolerance is what both sides' operations can do: 2**-53 for each, times how much the result answers to a relative change of its
operands, which is measured on the peer (catalogue.rounding).  Operations are counted over all outputs, though an error reaches its own head only;
that leaves room for the references' detours.  Gradients are the peer's automatic differentiation against the definition's numerical one, whose
error estimates are added.
"""

import math
import sys
import warnings
from types import ModuleType

import numpy as np
import peer_sources
import pytest
from catalogue import arrays_of, draw, flops, rounding

import refattn as ra
from refattn import catalog

pytestmark = pytest.mark.peer

#: Values are compared at the first size and gradients at the second; seven tokens fill no chunk of four.
SIZES = (
    {"B": 2, "Hq": 6, "Hkv": 2, "H": 3, "T": 7, "S": 7, "D": 4, "E": 3, "M": 5, "L": 4, "W": 3},
    {"B": 1, "Hq": 2, "Hkv": 1, "H": 2, "T": 5, "S": 5, "D": 2, "E": 2, "M": 3, "L": 3, "W": 3},
)


@pytest.fixture(autouse=True)
def in_double(monkeypatch):
    import torch

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_within(actual, desired, tolerance, what):
    excess = np.abs(actual - desired) - tolerance
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert np.all(np.isfinite(desired)) and np.any(desired)
    assert np.all(excess <= 0), f"{what} at {worst}: theirs {actual[worst]}, ours {desired[worst]}, tolerance {tolerance[worst]}"


def agree(name, theirs, drawn=lambda x: x, outputs=("out",), tied=None, one_width=False, **params):
    """`theirs` maps our operands by name, as tensors, to our outputs; of tied operands, ours to ours, it takes the second only.

    A peer of one width takes values as wide as keys.
    """
    import torch

    variant, tied = catalog.variant(name), tied or {}
    for dims, differentiated in zip(SIZES, (False, True), strict=True):
        operands = drawn(draw(variant, {**dims, "E": dims["D"]} if one_width else dims, seed=7))
        operands |= {one: operands[other] for one, other in tied.items()}
        cotangents = {o: np.random.default_rng(8).standard_normal(np.shape(ra.attend(name, **operands, **params, returns=o))) for o in outputs}

        def run(x, cotangents=cotangents, differentiated=differentiated):
            leaves = {one: torch.tensor(y, requires_grad=differentiated) for one, y in x.items() if one not in tied}
            results = theirs(**leaves)
            if not differentiated:
                return tuple(y.numpy() for y in results)
            sum((y * torch.tensor(d)).sum() for y, d in zip(results, cotangents.values(), strict=True)).backward()
            return tuple(y.grad.numpy() for y in leaves.values())

        tolerances = rounding(run, operands, variant, 2 * flops(variant, operands, params) * (3 if differentiated else 1))
        if differentiated:
            found = ra.gradients(name, **operands, **params, **{f"d_{o}": d for o, d in cotangents.items()}, backend="definition")
            total = {one: getattr(found, f"d_{one}").copy() for one in operands}
            errors = {one: found.errors[f"d_{one}"].copy() for one in operands}
            for one, other in tied.items():
                total[other] += total[one]
                errors[other] += errors[one]
            names = [one for one in operands if one not in tied]
            ours, tolerances = [total[one] for one in names], [t + errors[one] for t, one in zip(tolerances, names, strict=True)]
        else:
            names, ours = outputs, arrays_of(ra.attend(name, **operands, **params, returns=outputs))
        for what, a, b, tolerance in zip(names, run(operands), ours, tolerances, strict=True):
            assert_within(a, b, tolerance, f"{name}, {'gradient of ' if differentiated else ''}{what}")


def first(*tensors):
    """Tokens before heads."""
    return [x.transpose(1, 2) for x in tensors]


def gates(strength):
    """The gates of a draw made weaker or stronger: down to factors of exp(-30) a token."""
    return lambda x: {name: strength * y if name in ("gate", "forget") else y for name, y in x.items()}


STRENGTHS = pytest.mark.parametrize("strength", [0.01, 1.0, 25.0])


# ---- softmax relatives of flash-linear-attention -----------------------------------------------------------------------------------


@STRENGTHS
def test_forgetting_is_flas_forgetting_attention(strength):
    def theirs(q, k, v, gate):
        [out] = first(peer_sources.fla("forgetting_attn").naive_forgetting_attn(*first(q, k, v, gate)))
        return [out]

    agree("forgetting", theirs, gates(strength))


@STRENGTHS
def test_forgetting_is_flas_attention_with_gates(strength):
    def theirs(q, k, v, gate):
        [out] = first(peer_sources.fla("attn").naive_parallel_attn(*first(q, k, v), scale=0.3, g=gate.transpose(1, 2))[0])
        return [out]

    agree("forgetting", theirs, gates(strength), scale=0.3)


@pytest.mark.parametrize("scaled", [False, True])
def test_forgetting_decodes_as_fla_does(scaled):
    import torch

    variant = catalog.variant("forgetting")
    x = draw(variant, {**SIZES[0], "B": 1, "T": 1})
    q, k, v, gate = first(*(torch.tensor(y) for y in x.values()))
    theirs = peer_sources.fla("attn").naive_attn_decoding(q, k, v, gate, cu_seqlens=torch.tensor([0, 7]), do_gate_scale=scaled)
    ours = {**x, "gate": x["gate"] * 4**-0.5 if scaled else x["gate"]}
    [tolerance] = rounding(lambda y: ra.attend("forgetting", **y), ours, variant, 2 * flops(variant, ours, {}))
    assert_within(theirs.transpose(1, 2).numpy(), ra.attend("forgetting", **ours), tolerance, "decoding")


def test_forgetting_is_data_dependent_alibi():
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it compiles by torch.jit.script when imported
        from x_transformers.x_transformers import DataDependentAlibi

    torch.manual_seed(0)
    layer = DataDependentAlibi(dim=4, heads=6)
    torch.nn.init.normal_(layer.to_forget_gates[0].weight)
    tokens = torch.randn(2, 7, 4)
    with torch.no_grad():
        gate, bias = layer.to_forget_gates(tokens), layer(tokens)

    def theirs(q, k, v):
        k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(torch.ones(7, 7).triu(1) > 0, -math.inf))

    variant = catalog.variant("forgetting")
    x = {**draw(variant, SIZES[0]), "gate": gate.numpy()}
    ours = ra.attend("forgetting", **x)
    [tolerance] = rounding(lambda y: ra.attend("forgetting", **y), x, variant, 2 * flops(variant, x, {}))
    assert_within(theirs(*(torch.tensor(x[name]) for name in ("q", "k", "v"))).numpy(), ours, tolerance, "forgetting")


def test_a_closed_gate_is_where_running_sums_fail():
    import torch

    x = draw(catalog.variant("forgetting"), SIZES[0])
    x["gate"][:, :, 3] = -np.inf
    theirs = peer_sources.fla("forgetting_attn").naive_forgetting_attn(*first(*(torch.tensor(y) for y in x.values())))
    ours = ra.attend("forgetting", **x)
    assert torch.isnan(theirs[:, 3:]).all()
    assert np.isfinite(ours).all()


def fla_path(q, k, v, w, beta, gate, scale):
    [out] = first(peer_sources.fla("path_attn").naive_path_attn(*first(q, k, v, w, beta, gate), scale=scale, chunk_size=4))
    return [out]


@STRENGTHS
def test_path_is_flas_path_attention_of_a_gate_divided_by_the_scale(strength):
    agree("path", lambda gate, **x: fla_path(gate=gate / 0.3, scale=0.3, **x), gates(strength), scale=0.3)


def test_flas_path_attention_scales_the_gate():
    """Which of the two the paper means shows against a third derivation: matrices multiplied out, and the gate of its FoX."""
    import torch

    x = draw(catalog.variant("path"), SIZES[0])
    theirs = fla_path(**{name: torch.tensor(y) for name, y in x.items()}, scale=0.3)[0].numpy()
    assert np.max(np.abs(theirs - ra.attend("path", **x, scale=0.3))) > 0.01
    without_w = fla_path(**{name: torch.tensor(0.0 * y if name == "beta" else y) for name, y in x.items()}, scale=0.3)[0].numpy()
    plain = {name: x[name] for name in ("q", "k", "v", "gate")}
    scaled = {**plain, "gate": 0.3 * x["gate"]}
    variant = catalog.variant("forgetting")
    [tolerance] = rounding(lambda y: ra.attend("forgetting", **y, scale=0.3), scaled, variant, 2 * flops(catalog.variant("path"), x, {}))
    assert_within(without_w, ra.attend("forgetting", **scaled, scale=0.3), tolerance, "path without w")
    assert np.max(np.abs(without_w - ra.attend("forgetting", **plain, scale=0.3))) > 0.01


def test_deltaformer_is_flas_with_queries_that_erase():
    def one_head_each(x):
        group = x["q"].shape[1] // x["k"].shape[1]
        return {name: np.repeat(y, group, axis=1) if name != "q" else y for name, y in x.items()}

    def theirs(q, k, v, beta):
        [out] = first(peer_sources.fla("deltaformer").naive_deltaformer_attn(*first(q, k, v, beta)))
        return [out]

    agree("deltaformer", theirs, one_head_each, tied={"w": "q"}, one_width=True)


@pytest.mark.parametrize("causal", [True, False])
def test_parallax_is_flas(causal):
    def theirs(q, r, k, v):
        return first(peer_sources.fla("parallax").naive_parallax(*first(q, r, k, v), causal=causal))

    agree("parallax", theirs, one_width=True, causal=causal)


def test_attention_residuals_are_flas():
    def theirs(h, w, gain):
        out, weights = peer_sources.fla("attnres").naive_attnres(w, [x.contiguous() for x in h.unbind(1)], gain, return_weights=True)
        return out, weights.transpose(0, 1)

    agree("attention_residuals", theirs, outputs=("out", "weights"))


def fla_wall(monkeypatch):
    """The naive function, which imports a running sum written for GPUs and a constant of nine digits: put in its place."""
    import torch

    modules = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.constant", "fla.ops.utils.cumsum")}
    modules["fla.ops.utils.constant"].RCP_LN2 = 1.0 / math.log(2.0)
    modules["fla.ops.utils.cumsum"].chunk_global_cumsum = lambda x, cu_seqlens=None, scale=1.0: scale * torch.cumsum(x, 1)
    with monkeypatch.context() as loading:
        for name, module in modules.items():
            loading.setitem(sys.modules, name, module)
        return peer_sources.fla("wall_attn").naive_wall_attn


@STRENGTHS
def test_wall_is_flas(strength, monkeypatch):
    naive = fla_wall(monkeypatch)

    def theirs(q, k, v, gate, forget, sinks):
        return first(naive(*first(q, k, v, gate), scale=0.3, sink_bias=sinks, g_scalar=forget.transpose(1, 2)))

    agree("wall", theirs, gates(strength), scale=0.3)


def test_gates_split_over_query_and_key_overflow_where_wall_does_not():
    x = draw(catalog.variant("wall"), SIZES[0], optional=False)
    x["gate"] = np.full_like(x["gate"], -150.0)
    up_to = np.cumsum(x["gate"], axis=2)
    with np.errstate(all="ignore"):
        scores = np.einsum("bhix,bhjx->bhij", x["q"] * np.exp(up_to), np.repeat(x["k"], 3, axis=1) * np.exp(-up_to))
    assert np.isnan(scores[:, :, 6, 6]).all()  # 0 * inf
    assert np.isfinite(ra.attend("wall", **x)).all()


@pytest.mark.parametrize("attend_current", [False, True])
def test_stick_breaking_is_flas(attend_current):
    def theirs(q, k, v):
        return first(*peer_sources.fla("stickbreaking_attn").naive_stickbreaking_attn(*first(q, k, v), attend_current=attend_current))

    agree("stick_breaking", theirs, outputs=("out", "rem"), attend_current=attend_current)


# ---- attention free and additive ------------------------------------------------------------------------------------------------------


def parts(sizes):
    """Modules that take a joint input's parts, one each, in place of a layer's projections."""
    import torch

    class Part(torch.nn.Module):
        def __init__(self, start, stop):
            super().__init__()
            self.at = slice(start, stop)

        def forward(self, x):
            return x[..., self.at]

    ends = np.cumsum(sizes)
    return [Part(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def aft_layer(name, q, k, v, **sizes):
    """A layer of aft_pytorch without its projections, and its joint input."""
    import torch

    width = q.shape[-1]
    layer = getattr(peer_sources.load("aft_pytorch/aft_pytorch.py"), name)(max_seqlen=k.shape[1], dim=width, hidden_dim=width, **sizes)
    layer.to_q, layer.to_k, layer.to_v = parts([width] * 3)
    layer.project = torch.nn.Identity()
    return layer, torch.cat([q, k, v], dim=-1)


def test_aft_full_is_aft_pytorchs():
    def theirs(q, k, v, w):
        layer, tokens = aft_layer("AFTFull", q, k, v)
        del layer.wbias
        layer.wbias = w
        return [layer(tokens)]

    agree("aft_full", theirs)


def test_aft_simple_is_aft_pytorchs():
    def theirs(q, k, v):
        layer, tokens = aft_layer("AFTSimple", q, k, v)
        return [layer(tokens)]

    agree("aft_simple", theirs, lambda x: {name: x[name] for name in ("q", "k", "v")})


def test_aft_simple_runs_as_cumulative_sums_of_torch():
    import torch

    def theirs(q, k, v, initial_state, initial_mass, initial_max):
        top = torch.maximum(k.amax(1), initial_max)[:, None]
        before = torch.exp(initial_max - top[:, 0])[:, None]
        weights = torch.exp(k - top)
        mass = torch.cumsum(torch.cat([before * initial_mass[:, None], weights], 1), 1)
        state = torch.cumsum(torch.cat([before * initial_state[:, None], weights * v], 1), 1)
        return torch.sigmoid(q) * (state / mass)[:, 1:], state[:, -1], mass[:, -1], top[:, 0]

    agree("aft_simple", theirs, outputs=("out", "state", "mass", "max"), causal=True)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_aft_local_is_aft_pytorchs(window):
    import torch

    variant = catalog.variant("aft_local")
    x = draw(variant, SIZES[0])
    layer, tokens = aft_layer("AFTLocal", *(torch.tensor(x[name]) for name in ("q", "k", "v")), s=window)
    layer.wbias = torch.nn.Parameter(torch.tensor(x["w"]))
    with torch.no_grad():
        theirs = layer(tokens).numpy()
    params = {"window": window}
    [tolerance] = rounding(lambda y: ra.attend("aft_local", **y, **params), x, variant, 2 * flops(variant, x, params))
    assert_within(theirs, ra.attend("aft_local", **x, **params), tolerance, "aft_local")
    assert np.count_nonzero(layer.wbias.detach()) == np.sum(np.abs(np.subtract.outer(range(7), range(7))) < window)  # overwritten


def test_raw_exponentials_of_keys_overflow_where_aft_full_does_not():
    import torch

    x = draw(catalog.variant("aft_full"), SIZES[0])
    x["k"] += 800.0
    layer, tokens = aft_layer("AFTFull", *(torch.tensor(x[name]) for name in ("q", "k", "v")))
    with torch.no_grad():
        assert torch.isnan(layer(tokens)).all()
    assert np.isfinite(ra.attend("aft_full", **x)).all()


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_aft_conv_is_a_torch_convolution_and_a_sum(taps):
    import torch

    def with_taps(x):
        return {**x, "w": np.random.default_rng(3).standard_normal((x["w"].shape[0], taps))}

    def theirs(q, k, v, w):
        batch, heads, n, width = v.shape
        mass = torch.exp(k)[..., None] * torch.cat([torch.ones_like(v[..., :1]), v], dim=-1)  # batch, heads, tokens, 1 + width
        lines = mass.permute(0, 3, 1, 2).reshape(-1, heads, n)
        padded = torch.nn.functional.pad(lines, ((taps - 1) // 2, taps // 2))
        near = torch.nn.functional.conv1d(padded, (torch.exp(w) - 1.0)[:, None], groups=heads)
        whole = near.reshape(batch, 1 + width, heads, n).permute(0, 2, 3, 1) + mass.sum(2, keepdim=True)
        return torch.sigmoid(q) * whole[..., 1:] / whole[..., :1], torch.log(whole[..., 0])

    agree("aft_conv", theirs, with_taps, outputs=("out", "lse"))


def fastformer_by_torch(q, k, v, w_q, w_k, w, bias):
    import torch

    scale = q.shape[-1] ** -0.5
    query = torch.softmax(scale * (q @ w_q[..., None]), dim=2).transpose(2, 3) @ q
    marked = k * query
    key = torch.softmax(scale * (marked @ w_k[..., None]), dim=2).transpose(2, 3) @ marked
    return query, (key * v) @ w.transpose(1, 2) + bias[:, None] + q


def test_fastformer_is_two_torch_softmaxes():
    agree("fastformer", lambda **x: [fastformer_by_torch(**x)[1]])


def test_fast_transformer_pytorch_averages_keys_that_are_not_marked(monkeypatch):
    """Its output is ours with the values divided by the global query; what it leaves out is shown by the composition above."""
    import torch

    rotary = ModuleType("rotary_embedding_torch")  # imported, and used only with position embeddings
    rotary.apply_rotary_emb = rotary.RotaryEmbedding = None
    with monkeypatch.context() as loading:
        loading.setitem(sys.modules, "rotary_embedding_torch", rotary)
        peer = peer_sources.load("fast_transformer_pytorch/fast_transformer_pytorch.py")
    torch.manual_seed(0)
    layer = peer.FastAttention(12, heads=3, dim_head=4)
    layer.to_qkv, layer.to_out = torch.nn.Identity(), torch.nn.Identity()
    variant = catalog.variant("fastformer")
    x = draw(variant, SIZES[0])
    x |= {name: np.repeat(getattr(layer, f"to_{name[2]}_attn_logits").weight.detach().numpy(), 3, axis=0) for name in ("w_q", "w_k")}
    x |= {"w": np.repeat(layer.to_r.weight.detach().numpy()[None], 3, axis=0), "bias": np.repeat(layer.to_r.bias.detach().numpy()[None], 3, axis=0)}

    joint = np.concatenate([x[name].swapaxes(1, 2).reshape(2, 7, 12) for name in ("q", "k", "v")], axis=2)
    with torch.no_grad():
        theirs = layer(torch.tensor(joint), mask=torch.ones(2, 7, dtype=torch.bool)).reshape(2, 7, 3, 4).transpose(1, 2).numpy()
    query, composed = (y.numpy() for y in fastformer_by_torch(**{name: torch.tensor(y) for name, y in x.items()}))
    assert np.max(np.abs(theirs - composed)) > 0.1
    ours = {**x, "v": x["v"] / query}
    [tolerance] = rounding(lambda y: ra.attend("fastformer", **y), ours, variant, 2 * flops(variant, x, {}))
    assert_within(theirs, ra.attend("fastformer", **ours), tolerance, "fastformer")


def test_separable_additive_is_mobilevitv2():
    import torch
    from transformers import MobileViTV2Config
    from transformers.models.mobilevitv2.modeling_mobilevitv2 import MobileViTV2LinearSelfAttention

    def theirs(q, k, v):
        layer = MobileViTV2LinearSelfAttention(MobileViTV2Config(), embed_dim=k.shape[-1]).eval()
        layer.qkv_proj, layer.out_proj = torch.nn.Identity(), torch.nn.Identity()
        joint = torch.cat([q[..., None], k, v], dim=-1).permute(0, 2, 1)[:, :, None]  # batch, channels, pixels, patches
        return [layer(joint)[:, :, 0].permute(0, 2, 1)]

    agree("separable_additive", theirs)


@pytest.mark.parametrize("pooling", ["unit", "raw", "softmax"])
def test_efficient_additive_is_two_torch_normalizes_and_a_linear(pooling):
    import torch
    from torch.nn.functional import linear, normalize

    pools = {"unit": lambda a: normalize(a, dim=1), "raw": lambda a: a, "softmax": lambda a: torch.softmax(a, dim=1)}

    def theirs(q, k, w, w_o, bias):
        query, key = normalize(q, dim=-1), normalize(k, dim=-1)
        weights = pools[pooling](query @ w[:, None] * q.shape[-1] ** -0.5)
        return [linear((weights * query).sum(1, keepdim=True) * key, w_o, bias) + query]

    agree("efficient_additive", theirs, pooling=pooling)


def test_swiftformer_of_transformers_pools_with_weights_of_one():
    """Its softmax runs along an axis of length one: whatever w is, the queries are added up, which is T times their mean."""
    import torch
    from transformers import SwiftFormerConfig
    from transformers.models.swiftformer.modeling_swiftformer import SwiftFormerEfficientAdditiveAttention

    torch.manual_seed(0)
    layer = SwiftFormerEfficientAdditiveAttention(SwiftFormerConfig(), dim=4)
    layer.to_query, layer.to_key = parts([4, 4])
    layer.final = torch.nn.Identity()
    variant = catalog.variant("efficient_additive")
    x = draw(variant, SIZES[0])
    joint = torch.tensor(np.concatenate([x["q"], x["k"]], axis=2))
    x |= {"w_o": layer.proj.weight.detach().numpy(), "bias": layer.proj.bias.detach().numpy()}
    answers = []
    for w in (x["w"], -5.0 * x["w"]):
        layer.w_g = torch.nn.Parameter(torch.tensor(w)[:, None])
        with torch.no_grad():
            answers.append(layer(joint).numpy())
    assert np.array_equal(*answers)
    mean = {**x, "w": 0.0 * x["w"], "w_o": 7.0 * x["w_o"]}
    [tolerance] = rounding(lambda y: ra.attend("efficient_additive", **y, pooling="softmax"), mean, variant, 2 * flops(variant, x, {}))
    assert_within(answers[0], ra.attend("efficient_additive", **mean, pooling="softmax"), tolerance, "the sum of the queries")
    for pooling in ("unit", "raw", "softmax"):
        assert np.max(np.abs(answers[0] - ra.attend("efficient_additive", **x, pooling=pooling))) > 0.01
