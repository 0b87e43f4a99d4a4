"""The delta family, whose states are corrected by what they answer at a key, against code by other people.

References that cast to float32 are kept from it, so that they are judged at float64's rounding.  A tolerance is what both sides' operations
can do: 2**-53 for each, times how much the result answers to a relative change of its operands, which is measured (catalogue.rounding).
Operations are counted over all outputs, though an error reaches its own head only; that leaves room for the detours of chunked references.
Gradients are the reference's automatic differentiation against the definition's numerical one, whose error estimates are added.

A reference is a function of our operands by name, as tensors with as many state heads as query heads, returning our outputs.
"""

import math
from typing import Optional

import numpy as np
import pytest
from catalogue import draw, flops, outputs, rounding
from peer_sources import fla, functions, load
from test_variant_peers import assert_within

import refattn as ra
from refattn import catalog

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def in_double(monkeypatch):
    import torch

    usual = torch.get_default_dtype()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


# ---- references --------------------------------------------------------------------------------------------------------------------


def first(x):
    """Tokens before heads, and back."""
    return x.transpose(1, 2)


def tokens_first(function, order, state="initial_state", **fixed):
    """A reference in [B, T, H, ...]: the names of its arguments in order, ours after the equals sign where they differ."""
    names = [name.split("=") for name in order.split()]

    def run(**x):
        out, last, *_ = function(**{name[0]: first(x[name[-1]]) for name in names}, **{state: x["initial_state"]}, output_final_state=True, **fixed)
        return first(out), last

    return run


def heads_first(function, order, **fixed):
    """A reference in [B, H, T, ...]."""
    names = [name.split("=") for name in order.split()]
    return lambda **x: function(**{name[0]: x[name[-1]] for name in names}, initial_state=x["initial_state"], output_final_state=True, **fixed)


def gated_delta_recurrent():
    return tokens_first(fla("gated_delta_rule").naive_recurrent_gated_delta_rule, "q k v beta g=gate")


def gated_delta_chunked():
    return tokens_first(fla("gated_delta_rule").naive_chunk_gated_delta_rule, "q k v g=gate beta", chunk_size=4)


def qwen3_next(function, **fixed):
    from transformers.models.qwen3_next import modeling_qwen3_next

    return tokens_first(getattr(modeling_qwen3_next, function), "query=q key=k value=v g=gate beta", **fixed)


def kimi_linear(function, **fixed):
    from transformers.models.kimi_linear import modeling_kimi_linear

    return tokens_first(getattr(modeling_kimi_linear, function), "query=q key=k value=v g=gate beta", **fixed)


def attention_gym(function, **fixed):
    """Gates of base 2 and the state transposed."""
    run = tokens_first(getattr(load("attn_gym/linear/kda/naive.py"), function), "q k v g=gate beta", **fixed)

    def ours(**x):
        out, last = run(**{**x, "gate": x["gate"] / math.log(2.0), "initial_state": x["initial_state"].mT})
        return out, last.mT

    return ours


def delta_product(q, k, v, beta, gate, initial_state):
    def interleaved(x):  # [B H T R ...] as [B T*R H ...]
        return first(x.flatten(2, 3))

    out, last = fla("gated_delta_product").naive_recurrent_gated_delta_product(
        first(q), interleaved(k), interleaved(v), first(gate), interleaved(beta), q.shape[-1] ** -0.5, None, initial_state, True, k.shape[3]
    )
    return first(out), last


def delta_chunked(q, k, v, beta):
    return fla("delta_rule").delta_rule_chunkwise(q, k, v, beta, chunk_size=4)


def delta_parallel(q, k, v, beta):
    return fla("delta_rule").delta_rule_parallel(q, k, v, beta, BM=4, BN=2)[:1]


def rwkv7_as_dplr(function, **fixed):
    def run(q, k, v, gate, kappa, a, initial_state):
        scaled = q * q.shape[-1] ** 0.5  # it multiplies by 1/sqrt(D)
        general = getattr(fla("generalized_delta_rule/dplr"), function)
        return general(scaled, k, v, -kappa, a * kappa, gate, initial_state=initial_state, output_final_state=True, **fixed)

    return run


def rwkv7_by_mlx(q, k, v, gate, kappa, a, initial_state):
    """MLX-LM's step is written in operators alone, which tensors have too."""
    import torch

    step = functions("mlx_lm/models/rwkv7.py", "_wkv7_step_ops")._wkv7_step_ops
    state, outs = initial_state.mT, []
    for t in range(q.shape[2]):
        out, state = step(q[:, :, t], gate[:, :, t].exp(), k[:, :, t], v[:, :, t], -kappa[:, :, t], (kappa * a)[:, :, t], state)
        outs.append(out[..., 0])
    return torch.stack(outs, dim=2), state.mT


def oja_by_kda(function, **fixed):
    """Keys and values exchanged, the state is the transpose of ours; its reading, in the other direction, is left to us."""

    def run(q, k, v, gate, beta, initial_state):
        import torch

        outs = []
        for n in range(1, q.shape[2] + 1):
            seen = [first(x[:, :, :n]) for x in (torch.zeros_like(v), v, k, gate, beta)]
            _, last = getattr(fla("kda"), function)(*seen, initial_state=initial_state.mT, output_final_state=True, **fixed)
            outs.append(q.shape[-1] ** -0.5 * (q[:, :, n - 1, None] @ last.mT)[:, :, 0])
        return torch.stack(outs, dim=2), last.mT

    return run


def longhorn_unrolled(q, k, v, beta, initial_state):
    """Every token meets every earlier one: what is written, times the running products of what is kept."""
    import torch

    delta = beta / (1 + beta * k.square().sum(-1, keepdim=True))
    kept = 1 - torch.einsum("bhtx,bhty->bhtxy", k.square(), delta)
    written = torch.einsum("bhtx,bhty->bhtxy", k, delta * v)
    states = []
    for t in range(q.shape[2]):
        since = [kept[:, :, j + 1 : t + 1].prod(dim=2) for j in range(-1, t + 1)]
        states.append(since[0] * initial_state + sum(fading * written[:, :, j] for j, fading in enumerate(since[1:])))
    return torch.einsum("bhtx,tbhxy->bhty", q, torch.stack(states)), states[-1]


def momentum(function, beta_less=0.0, **fixed):
    order = ("q", "k", "v", "p", "log_alpha=gate", "log_mu=momentum_gate", "beta", "eta")

    def run(**x):
        named = {name.split("=")[0]: first(x[name.split("=")[-1]]) for name in order}
        named["beta"] = named["beta"] - beta_less
        starts = {"initial_S": x["initial_state"], "initial_M": x["initial_momentum"]}
        out, both = getattr(fla("momentum_delta_rule"), function)(**named, **starts, output_final_state=True, **fixed)
        return first(out), both[0], both[1]

    return run


def preconditioned(operation, function, normalises):
    def run(**x):
        if normalises:  # queries and keys both; ours come with keys of length 1
            length = x["q"].norm(dim=-1, keepdim=True)
            x["gate"] = x["gate"][..., 0]
        names = {"q": "q", "k": "k", "v": "v", "g_atk": "curvature_gate", "g": "gate", "beta_atk": "curvature_beta", "beta": "beta"}
        given = {theirs: first(x[ours]) for theirs, ours in names.items()}
        starts = {"initial_state": x["initial_state"], "initial_A_state": x["initial_curvature"], "log_atk_scale": x["center"]}
        out, last, moments = getattr(fla(operation), function)(**given, **starts, output_final_state=True)
        return first(out) * length if normalises else first(out), last, moments

    return run


#: Variant, reference, whether it demands whole chunks of 4 tokens, and how strong a forgetting it bears (see STRENGTHS).
CASES = {
    "fla recurrent": ("delta", lambda: heads_first(fla("delta_rule").delta_rule_recurrence, "q k v beta"), False, "weak"),
    "fla chunked": ("delta", lambda: delta_chunked, True, "weak"),
    "fla parallel": ("delta", lambda: delta_parallel, True, "weak"),
    "fla gated recurrent": ("gated_delta", gated_delta_recurrent, False, "weak strong mixed"),
    "fla gated chunked": ("gated_delta", gated_delta_chunked, False, "weak strong"),
    "qwen3_next recurrent": ("gated_delta", lambda: qwen3_next("torch_recurrent_gated_delta_rule"), False, "weak strong mixed"),
    "qwen3_next chunked": ("gated_delta", lambda: qwen3_next("torch_chunk_gated_delta_rule", chunk_size=4), False, "weak strong"),
    "fla kda recurrent": ("kda", lambda: tokens_first(fla("kda").naive_recurrent_kda, "q k v g=gate beta"), False, "weak strong mixed"),
    "fla kda chunked": ("kda", lambda: tokens_first(fla("kda").naive_chunk_kda, "q k v g=gate beta", chunk_size=4), True, "weak strong"),
    "kimi_linear recurrent": ("kda", lambda: kimi_linear("recurrent_kimi_delta_attention"), False, "weak strong mixed"),
    "kimi_linear chunked": ("kda", lambda: kimi_linear("chunk_kimi_delta_attention", chunk_size=4), False, "weak strong"),
    "attention-gym recurrent": ("kda", lambda: attention_gym("naive_recurrent_kda"), False, "weak strong mixed"),
    "attention-gym chunked": ("kda", lambda: attention_gym("naive_chunk_kda", chunk_size=4), False, "weak strong"),
    "fla product": ("delta_product", lambda: delta_product, False, "weak strong mixed"),
    "fla comba chunked": ("comba", lambda: tokens_first(fla("comba").naive_chunk_comba, "q k v p g=gate beta", chunk_size=4), False, "weak strong"),
    "fla gdn2 recurrent": (
        "gdn2",
        lambda: tokens_first(fla("gdn2").naive_recurrent_gdn2, "q k v g=gate b=erase w=write"),
        False,
        "weak strong mixed",
    ),
    "fla gdn2 chunked": (
        "gdn2",
        lambda: tokens_first(fla("gdn2").naive_chunk_gdn2, "q k v g=gate b=erase w=write", chunk_size=4),
        False,
        "weak strong",
    ),
    "fla kda exchanged": ("oja", lambda: oja_by_kda("naive_recurrent_kda"), False, "weak strong mixed"),
    "fla kda exchanged, chunked": ("oja", lambda: oja_by_kda("naive_chunk_kda", chunk_size=1), False, "weak strong"),
    "fla dplr recurrent": (
        "dplr",
        lambda: heads_first(fla("generalized_delta_rule/dplr").dplr_recurrence, "q k v alpha=a beta=b gk=gate"),
        False,
        "weak strong mixed",
    ),
    "fla dplr chunked": (
        "dplr",
        lambda: heads_first(fla("generalized_delta_rule/dplr").dplr_chunkwise, "q k v alpha=a beta=b gk=gate", chunk_size=4),
        True,
        "weak strong",
    ),
    "fla iplr recurrent": ("iplr", lambda: heads_first(fla("generalized_delta_rule/iplr").iplr_recurrence, "q k v alpha=a beta=b"), False, "weak"),
    "fla iplr chunked": (
        "iplr",
        lambda: heads_first(fla("generalized_delta_rule/iplr").iplr_chunkwise, "q k v alpha=a beta=b", chunk_size=4),
        True,
        "weak",
    ),
    "fla dplr": ("rwkv7", lambda: rwkv7_as_dplr("dplr_recurrence"), False, "weak strong mixed"),
    "fla dplr, chunked": ("rwkv7", lambda: rwkv7_as_dplr("dplr_chunkwise", chunk_size=4), True, "weak strong"),
    "mlx step": ("rwkv7", lambda: rwkv7_by_mlx, False, "weak strong mixed"),
    "torch products": ("longhorn", lambda: longhorn_unrolled, False, "weak"),
    "fla momentum recurrent": ("momentum_delta", lambda: momentum("recurrent_momentum_delta_rule_ref"), False, "weak strong mixed"),
    "fla momentum chunked": ("momentum_delta", lambda: momentum("chunk_momentum_delta_rule_ref", 1e-6, chunk_size=4), True, "weak"),
    "fla preconditioned gated": (
        "precond_delta",
        lambda: preconditioned("precond_gated_delta_rule", "naive_recurrent_precond_gated_delta_rule", normalises=True),
        False,
        "weak strong mixed",
    ),
    "fla preconditioned kda": (
        "precond_delta",
        lambda: preconditioned("precond_kda", "naive_recurrent_precond_kda", normalises=False),
        False,
        "weak strong mixed",
    ),
}

#: How fast the past fades: hardly, by a factor of e**-40 a token, and both, with a token that forgets all.
STRENGTHS = {"weak": 0.1, "strong": 200.0, "mixed": 5.0}


def operands_of(name, dims, strength, reference):
    """Drawn operands with the gates made weaker or stronger, and none that a reference has no place for."""
    x = draw(catalog.variant(name), dims, seed=3)
    for gate in x.keys() & {"gate", "momentum_gate", "curvature_gate"}:
        x[gate] = STRENGTHS[strength] * x[gate]
        if strength == "mixed":
            x[gate][:, :, dims["T"] // 2] = -np.inf
    if reference in ("fla chunked", "fla parallel"):
        del x["initial_state"]
    if reference == "fla preconditioned gated":  # one gate for all channels
        x["gate"] = np.repeat(x["gate"][..., :1], dims["D"], axis=-1)
    return x


def repeated(name, x, group):
    """Operands with a state head of its own for every query head."""
    axes = {o.name: o.axes.split() for o in catalog.variant(name).operands}
    return {one: y.repeat_interleave(group, dim=axes[one].index("Hkv")) if "Hkv" in axes[one] else y for one, y in x.items()}


def checked(reference, strength, gradients):
    """Operands, the reference as a function from them to our outputs or, for cotangents, to our gradients; and the names of the outputs."""
    import torch

    name, make, whole, _ = CASES[reference]
    few = {"B": 1, "Hq": 2, "Hkv": 1, "T": 8 if whole else 5, "D": 2, "E": 3, "R": 2}
    many = {"B": 2, "Hq": 4, "Hkv": 2, "T": 12 if whole else 11, "D": 4, "E": 3, "R": 3}
    run, group = make(), 2

    def theirs(x, cotangents=None):
        leaves = {one: torch.tensor(y, requires_grad=cotangents is not None) for one, y in x.items()}
        results = run(**repeated(name, leaves, group))
        ours = [results[0], *(y[:, ::group] for y in results[1:])]  # the states of a group are all the same
        if cotangents is None:
            return [y.numpy() for y in ours]
        sum((y * torch.tensor(d)).sum() for y, d in zip(ours, cotangents, strict=True)).backward()
        return [y.grad.numpy() for y in leaves.values()]

    x = operands_of(name, few if gradients else many, strength, reference)
    returned = [o.name for o in catalog.variant(name).outputs]
    return x, theirs, returned[:1] if reference == "fla parallel" else returned


@pytest.mark.parametrize("reference, strength", [(reference, strength) for reference, case in CASES.items() for strength in case[3].split()])
def test_values_are_the_references(reference, strength):
    name = CASES[reference][0]
    variant = catalog.variant(name)
    x, theirs, returned = checked(reference, strength, gradients=False)
    tolerances = rounding(lambda y: [outputs(variant, y, {})[output] for output in returned], x, variant, 2 * flops(variant, x, {}))
    ours = outputs(variant, x, {})
    for output, found, tolerance in zip(returned, theirs(x), tolerances, strict=True):
        assert_within(found, ours[output], tolerance)


@pytest.mark.parametrize("reference", [reference for reference in CASES if reference != "fla preconditioned gated"])  # it normalises inside
def test_gradients_are_the_references(reference):
    name = CASES[reference][0]
    variant = catalog.variant(name)
    x, theirs, returned = checked(reference, "weak", gradients=True)
    rng = np.random.default_rng(8)
    cotangents = {output: rng.standard_normal(outputs(variant, x, {})[output].shape) for output in returned}
    found = ra.gradients(name, **x, **{f"d_{output}": d for output, d in cotangents.items()}, backend="definition")
    # A backward pass has the operations of two forward ones.
    tolerances = rounding(lambda y: theirs(y, cotangents.values()), x, variant, 2 * 3 * flops(variant, x, {}))
    for operand, expected, tolerance in zip(x, theirs(x, cotangents.values()), tolerances, strict=True):
        assert_within(expected, getattr(found, "d_" + operand), tolerance + found.errors["d_" + operand])


def mlx_gated_delta(**x):
    """MLX-LM's operations, their decorators, which would compile them, taken off.  Gates are factors, queries scaled, the state transposed."""
    import mlx.core as mx

    def array(y):
        return mx.array(np.ascontiguousarray(np.swapaxes(y, 1, 2)), dtype=mx.float64)

    with mx.stream(mx.cpu):
        names = {"mx": mx, "Optional": Optional, "Tuple": tuple}
        operations = functions("mlx_lm/models/gated_delta.py", "gated_delta_ops", "_gated_delta_step_ops", **names)
        scaled = x["q"] * x["q"].shape[-1] ** -0.5
        state = mx.array(np.ascontiguousarray(np.swapaxes(x["initial_state"], -1, -2)), dtype=mx.float64)
        out, last = operations.gated_delta_ops(*map(array, (scaled, x["k"], x["v"], np.exp(x["gate"]), x["beta"])), state)
        return np.swapaxes(np.array(out), 1, 2), np.swapaxes(np.array(last), -1, -2)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", ["gated_delta", "kda"])
def test_values_are_mlx_lms(name, strength):
    variant = catalog.variant(name)
    x = operands_of(name, {"B": 2, "Hq": 3, "Hkv": 3, "T": 11, "D": 4, "E": 3}, strength, "mlx")
    tolerances = rounding(lambda y: list(outputs(variant, y, {}).values()), x, variant, 2 * flops(variant, x, {}))
    for found, ours, tolerance in zip(mlx_gated_delta(**x), outputs(variant, x, {}).values(), tolerances, strict=True):
        assert_within(found, ours, tolerance)


def test_rwkv7_is_the_time_mixing_of_the_rwkv_package():
    """The whole layer: its projections make our operands, and its group norm and bonus come after our output."""
    import torch
    import torch.nn.functional as F

    heads, width, n, low = 3, 4, 5, 2
    channels = heads * width
    generator = torch.Generator().manual_seed(1)

    def some(*shape):
        return torch.randn(*shape, generator=generator)

    mixes = [some(channels).sigmoid() for _ in "rwkvag"]
    w0, a0, v0 = some(3, channels)
    w1, a1, v1, g1 = some(4, channels, low)
    w2, a2, v2, g2 = some(4, low, channels)
    k_k, k_a, r_k, ln_w, ln_b = some(5, channels)
    projections = [some(channels, channels) / channels**0.5 for _ in "rkv"] + [torch.eye(channels)]
    x, before, start = some(n, channels), some(channels), some(heads, width, width)
    layer = functions("rwkv/model.py", "RWKV_x070_TMix_seq", torch=torch).RWKV_x070_TMix_seq
    weights = (*mixes, w0, w1, w2, a0, a1, a2, v0, v1, v2, g1, g2, k_k, k_a, r_k, *projections, ln_w, ln_b)
    theirs, _, last, _ = layer(0, heads, width, x, before, None, start, *weights)

    to_r, to_w, to_k, to_v, to_a, to_g = (x + (torch.cat([before[None], x[:-1]]) - x) * mix for mix in mixes)
    r, k, v = to_r @ projections[0], to_k @ projections[1], to_v @ projections[2]
    gate = -0.606531 * (w0 + torch.tanh(to_w @ w1) @ w2).sigmoid()
    a = (a0 + to_a @ a1 @ a2).sigmoid()
    by_head = [y.reshape(n, heads, width).transpose(0, 1)[None].numpy() for y in (r, k * (1 + (a - 1) * k_a), v, gate, k * k_k, a)]
    by_head[4] = by_head[4] / np.linalg.norm(by_head[4], axis=-1, keepdims=True)
    names = [o.name for o in catalog.variant("rwkv7").operands]
    operands = dict(zip(names, (*by_head, start.mT[None].numpy()), strict=True))
    ours = outputs(catalog.variant("rwkv7"), operands, {})

    def after(out):
        flat = torch.tensor(out[0].swapaxes(0, 1).reshape(n, channels))
        bonus = (r * operands_k * r_k).view(n, heads, width).sum(-1, keepdim=True) * v.view(n, heads, width)
        normalised = F.group_norm(flat, heads, ln_w, ln_b, eps=64e-5)
        return ((normalised + bonus.view(n, channels)) * ((to_g @ g1).sigmoid() @ g2)).numpy()

    operands_k = k * (1 + (a - 1) * k_a)
    variant = catalog.variant("rwkv7")
    operations = 2 * flops(variant, operands, {}) + 20 * n * channels * (4 * channels + 10)  # with the layer's products, 20 to an entry
    of_out, of_state = rounding(lambda y: [after(outputs(variant, y, {})["out"]), outputs(variant, y, {})["state"]], operands, variant, operations)
    assert_within(theirs.numpy(), after(ours["out"]), of_out)
    assert_within(last.mT[None].numpy(), ours["state"], of_state)


def test_flas_recurrent_comba_asks_the_faded_state():
    """Against its own chunked reference, the paper's scalar plus low rank, and us: it is ours at alpha p, far from ours at p."""
    import torch

    variant = catalog.variant("comba")
    x = draw(variant, {"B": 2, "Hq": 2, "Hkv": 2, "T": 11, "D": 4, "E": 3}, seed=3)
    leaves = {name: torch.tensor(y) for name, y in x.items()}
    recurrent = tokens_first(fla("comba").naive_recurrent_comba, "q k v p beta g=gate")(**leaves)
    transition = np.exp(x["gate"])[..., None, None] * np.eye(4) - np.einsum("bht,bhtx,bhtz->bhtxz", x["beta"], x["k"], x["p"])
    state, states = x["initial_state"], []
    for t in range(11):
        state = transition[:, :, t] @ state + np.einsum("bh,bhx,bhy->bhxy", x["beta"][:, :, t], x["k"][:, :, t], x["v"][:, :, t])
        states.append(state)
    by_matrices = 0.5 * np.einsum("bhtx,tbhxy->bhty", x["q"], np.stack(states)), state
    faded = outputs(variant, {**x, "p": np.exp(x["gate"])[..., None] * x["p"]}, {})
    tolerances = rounding(lambda y: list(outputs(variant, y, {}).values()), x, variant, 2 * flops(variant, x, {}))
    for wrong, right, found, asked_later, tolerance in zip(
        recurrent, by_matrices, outputs(variant, x, {}).values(), faded.values(), tolerances, strict=True
    ):
        assert_within(right, found, tolerance)
        assert_within(wrong, asked_later, tolerance)
        assert np.abs(wrong.numpy() - found).max() > 1e6 * np.max(tolerance)


def test_flas_chunked_momentum_cancels_where_much_is_forgotten():
    """Its own recurrent reference, which is ours to rounding, is far away: a difference of sums that have grown large is all that is left."""
    import torch

    x = operands_of("momentum_delta", {"B": 2, "Hq": 2, "Hkv": 2, "T": 12, "D": 4, "E": 3}, "strong", "fla")
    leaves = {name: torch.tensor(y) for name, y in x.items()}
    chunked, recurrent = (CASES[f"fla momentum {form}"][1]()(**leaves)[0].numpy() for form in ("chunked", "recurrent"))
    assert np.abs(chunked - recurrent).max() > 0.1 * np.abs(recurrent).max()


def normalised(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("function", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_qwen3_next_normalises_where_asked_and_repeats_key_heads(function):
    """Two value heads to a key head, and short keys, at which its eps counts."""
    import torch

    variant = catalog.variant("gated_delta")
    x = draw(variant, {"B": 2, "Hq": 4, "Hkv": 4, "T": 11, "D": 4, "E": 3}, seed=3)
    few = {**x, "q": 1e-3 * x["q"][:, :2], "k": 1e-3 * x["k"][:, :2]}
    theirs = qwen3_next(function, use_qk_l2norm_in_kernel=True)(**{name: torch.tensor(y) for name, y in few.items()})
    ours = {**x, **{name: np.repeat(normalised(few[name]), 2, axis=1) for name in ("q", "k")}}
    assert np.abs(np.linalg.norm(ours["k"], axis=-1) - 1.0).min() > 0.1  # where a plain norm would give 1
    tolerances = rounding(lambda y: list(outputs(variant, y, {}).values()), ours, variant, 2 * flops(variant, ours, {}) + 20 * ours["k"].size)
    for found, value, tolerance in zip(theirs, outputs(variant, ours, {}).values(), tolerances, strict=True):
        assert_within(found, value, tolerance)


def test_mlx_lm_normalises_like_transformers():
    import mlx.core as mx

    x = 1e-3 * np.random.default_rng(2).standard_normal((2, 3, 16))
    with mx.stream(mx.cpu):
        make = functions("mlx_lm/models/gated_delta.py", "normalize_qk", mx=mx, Tuple=tuple).normalize_qk
        q, k = make(mx.array(x, dtype=mx.float32), mx.array(x, dtype=mx.float32), inv_scale=16**-0.5, eps=1e-6)
        q, k = np.array(q, np.float64), np.array(k, np.float64)
    assert_within(k, normalised(x), 2.0**-24 * (16 + 8) * np.abs(normalised(x)))
    assert_within(q, 0.25 * normalised(x), 2.0**-24 * (16 + 8) * np.abs(normalised(x)))
