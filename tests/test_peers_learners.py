"""Normalised, slotted, turning, hierarchical and learning states against code that nobody here wrote, or PyTorch's autograd of an inner loss.

Reference functions that convert to float32 inside are run with float32 standing for float64 (`in_double`), so that everything is compared
in float64.  A tolerance is twice what `catalogue.rounding` gives for the definition: one rounding per operation of the whole call, times
how much the outputs answer to such changes, which is measured.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import peer_sources
import pytest
from catalogue import flops, outputs, rounding

import refattn as ra
from refattn import catalog
from refattn.spec import shape

torch, F = peer_sources.later("torch"), peer_sources.later("torch.nn.functional")

pytestmark = pytest.mark.peer

DOUBLE = 2.0**-53
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "H": 4, "G": 2, "T": 7, "D": 3, "E": 4, "M": 3, "R": 2, "Z": 3, "F": 3, "L": 4}
#: Offsets of the logarithms of decay factors.
DECAYS = {"weak": 0.0, "strong": -30.0}

decays = pytest.mark.parametrize("decay", DECAYS)


@pytest.fixture(autouse=True)
def in_double(monkeypatch):
    """float32 is float64, for code that converts to it."""
    import torch

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)


def drawn(name, *absent, decay="weak", **sizes):
    """A variant's operands but for the absent ones."""
    rng = np.random.default_rng(7)
    operands = {}
    for o in catalog.variant(name).operands:
        if o.name not in absent:
            operands[o.name] = np.asarray(o.draw(rng, shape(o.axes, {**SIZES, **sizes})))
    if "gate" in operands:
        operands["gate"] = operands["gate"] + DECAYS[decay]
    return operands


def tensors(operands):
    return {name: torch.tensor(x, requires_grad=x.dtype.kind == "f") for name, x in operands.items()}


def close(theirs, ours, tolerance, name):
    theirs = theirs.detach().numpy()
    assert theirs.shape == ours.shape and np.isfinite(ours).all(), name
    error = np.abs(theirs - ours)
    worst = np.unravel_index(np.argmax(error - tolerance), error.shape)
    assert np.all(error <= tolerance), f"{name} at {worst}: theirs {theirs[worst]}, ours {ours[worst]}, tolerance {tolerance[worst]}"


def agrees(name, operands, theirs, **params):
    """Our outputs with theirs, given by name."""
    variant = catalog.variant(name)

    def ours(x):
        found = outputs(variant, x, params)
        return [found[output] for output in theirs]

    tolerances = rounding(ours, operands, variant, 2 * flops(variant, operands, params))
    for output, mine, tolerance in zip(theirs, ours(operands), tolerances, strict=True):
        close(theirs[output], mine, tolerance, output)


def gradients_agree(name, operands, leaves, theirs, **params):
    """Of a random combination of the given outputs: their autograd with the differences of our definition."""
    rng = np.random.default_rng(11)
    cotangents = {"d_" + output: rng.standard_normal(tuple(x.shape)) for output, x in theirs.items()}
    sum((x * torch.from_numpy(cotangents["d_" + output])).sum() for output, x in theirs.items()).backward()
    found = ra.gradients(name, **operands, **params, **cotangents, backend="definition")
    rounded = DOUBLE * flops(catalog.variant(name), operands, params)
    compared = 0
    for operand, leaf in leaves.items():
        if leaf.grad is not None:
            tolerance = found.errors["d_" + operand] + rounded * leaf.grad.abs().max().item()
            close(leaf.grad, getattr(found, "d_" + operand), tolerance, "d_" + operand)
            compared += 1
    assert compared


def swapped(x):
    """Between (B, H, T, ...) and (B, T, H, ...)."""
    return x.transpose(1, 2)


def grouped(x, heads):
    return x.repeat_interleave(heads // x.shape[1], dim=1)


# ---- means and memories with a running maximum -------------------------------------------------------------------------------


def rwkv_of_transformers(x):
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    state = [x[name] for name in ("initial_state", "initial_mass", "initial_max")] if "initial_max" in x else None
    out, (state, mass, top) = rwkv_linear_attention_cpu(torch.log(-x["gate"]), x["bonus"], x["k"], x["v"], state, return_state=True)
    return {"out": out, "state": state, "mass": mass, "max": top}


@decays
@pytest.mark.parametrize("cut", [False, True])
def test_rwkv4_is_the_linear_attention_of_transformers(decay, cut):
    operands = drawn("rwkv4", *(() if cut else ("initial_state", "initial_mass", "initial_max")), decay=decay)
    leaves = tensors(operands)
    theirs = rwkv_of_transformers(leaves)
    agrees("rwkv4", operands, theirs)
    gradients_agree("rwkv4", operands, leaves, {"out": theirs["out"], "state": theirs["state"]})


def test_rwkv4_of_transformers_does_not_survive_a_token_that_is_not_there():
    operands = drawn("rwkv4", "initial_state", "initial_mass", "initial_max")
    operands["k"][:, 0] = -np.inf
    theirs = rwkv_of_transformers(tensors(operands))["out"].detach().numpy()
    ours = ra.attend("rwkv4", **operands)
    np.testing.assert_array_equal(ours[:, 0], 0.0)
    assert np.isnan(theirs[:, 0]).all() and np.isfinite(ours).all()


def test_rwkv4_is_the_time_mixing_of_the_rwkv_package():
    """Token by token, with its normalisation, its mixing with the token before and its projections taken out, and a receptance of 1/2."""
    plain = SimpleNamespace(layer_norm=lambda x, *_, **__: x)
    peer = peer_sources.functions("rwkv/model.py", "att_one", torch=torch, F=plain, matmul=lambda a, b, *_, **__: a @ b)
    operands = drawn("rwkv4")
    x = tensors(operands)
    eye = torch.eye(6)
    norm, mixing, times = [None] * 2, [1.0] * 3, [x["gate"], x["bonus"]]
    projections = [eye[:, :3], eye[:, 3:], torch.zeros(6, 3), eye[:3]]  # a token is its key and its value
    outs, finals = [], []
    for b in range(2):
        state = [x[name][b] for name in ("initial_state", "initial_mass", "initial_max")]
        for t in range(7):
            token = torch.cat([x["k"][b, t], x["v"][b, t]])
            out, _, *state = peer.att_one(None, token, 0.0, *state, *norm, *mixing, *times, *projections, *[None] * 16)
            outs.append(2.0 * (out - token)[:3])
        finals.append(torch.stack(state))
    state, mass, top = torch.stack(finals).unbind(1)
    agrees("rwkv4", operands, {"out": torch.stack(outs).reshape(2, 7, 3), "state": state, "mass": mass, "max": top})


def xlstm():
    return peer_sources.load("xlstm/blocks/mlstm/backends.py")


def mlstm_operands(decay, **sizes):
    operands = drawn("mlstm", decay=decay, **{"Hq": 2, "E": 3, **sizes})
    operands["input_gate"] *= 5.0
    return operands


def forget_preactivation(x):
    """log(f / (1 - f)), whose log sigmoid is our gate."""
    return x["gate"] - torch.log(-torch.expm1(x["gate"]))


@decays
def test_mlstm_is_the_parallel_and_the_recurrent_cell_of_xlstm(decay):
    operands = mlstm_operands(decay)
    fresh = {name: x for name, x in operands.items() if not name.startswith("initial")}
    leaves = tensors(fresh)
    gates = (leaves["input_gate"][..., None], forget_preactivation(leaves)[..., None])
    theirs = xlstm().parallel_stabilized_simple(leaves["q"], leaves["k"], leaves["v"], *gates)
    agrees("mlstm", fresh, {"out": theirs}, eps=1e-6)
    gradients_agree("mlstm", fresh, leaves, {"out": theirs}, eps=1e-6)

    x = tensors(operands)
    preact = forget_preactivation(x)
    state = (x["initial_state"], x["initial_mass"][..., None], x["initial_max"][..., None, None])
    outs = []
    for t in range(7):
        tokens = [x[name][:, :, t : t + 1].clone() for name in ("q", "k", "v")]
        gates = (x["input_gate"][:, :, t, None, None], preact[:, :, t, None, None])
        out, state = xlstm().recurrent_step_stabilized_simple(*state, *tokens, *gates)
        outs.append(out)
    theirs = {"out": torch.cat(outs, dim=2), "state": state[0], "mass": state[1][..., 0], "max": state[2][..., 0, 0]}
    agrees("mlstm", operands, theirs, eps=1e-6)


@decays
def test_mlstm_is_the_chunkwise_cell_of_xlstm_whose_state_is_not_scaled(decay):
    operands = mlstm_operands(decay, T=8)
    x = tensors(operands)
    memory = (math.sqrt(3) * x["initial_state"], math.sqrt(3) * x["initial_mass"], x["initial_max"])
    out, (state, mass, top) = xlstm().chunkwise_simple(
        x["q"], x["k"], x["v"], x["input_gate"], forget_preactivation(x), *memory, chunk_size=4, return_last_state=True, eps=0.0
    )
    theirs = {"out": out, "state": state / math.sqrt(3), "mass": mass / math.sqrt(3), "max": top[..., 0, 0]}
    agrees("mlstm", operands, theirs)


# ---- slots -------------------------------------------------------------------------------------------------------------------


def test_abc_is_both_references_of_flash_linear_attention():
    operands = drawn("abc", "initial_slot_keys", "initial_slot_values", "initial_mass", "initial_max")
    operands["write"] *= 4.0
    leaves = tensors(operands)
    naive = peer_sources.fla("abc")
    out, (keys, values) = naive.naive_recurrent_abc(leaves["q"], leaves["k"], leaves["v"], leaves["write"], output_final_state=True)
    agrees("abc", operands, {"out": out})
    gradients_agree("abc", operands, leaves, {"out": out})
    ours = outputs(catalog.variant("abc"), operands, {})
    for theirs, mine in ((keys.mT, ours["slot_keys"]), (values, ours["slot_values"])):
        mean = mine / ours["mass"][..., None]
        close(theirs, mean, 2 * DOUBLE * 7 * 8 * np.abs(mean).max() + 0.0 * mean, "slots")  # 7 tokens, 8 roundings each
    cumulative, _ = naive.naive_cumsum_abc(leaves["q"], *(grouped(leaves[name], 4) for name in ("k", "v", "write")))
    agrees("abc", operands, {"out": cumulative})


def test_abc_of_flash_linear_attention_cannot_be_cut():
    """It carries means without their mass, so that the first token after the cut weighs as much as all before."""
    operands = drawn("abc", "initial_slot_keys", "initial_slot_values", "initial_mass", "initial_max")
    x = tensors(operands)
    naive = peer_sources.fla("abc").naive_recurrent_abc
    one, two = ([x[name][:, :, half] for name in ("q", "k", "v", "write")] for half in (slice(3), slice(3, None)))
    _, state = naive(*one, output_final_state=True)
    theirs, _ = naive(*two, initial_state=state)
    whole = ra.attend("abc", **operands)[:, :, 3:]
    assert np.abs(theirs.detach().numpy() - whole).max() > 0.1 * np.abs(whole).max()


@decays
def test_gated_slot_is_the_gsa_of_flash_linear_attention(decay):
    operands = drawn("gated_slot", decay=decay)
    leaves = tensors(operands)
    x = {name: swapped(leaf) for name, leaf in leaves.items() if not name.startswith("initial")}
    state = (leaves["initial_slot_keys"].mT, leaves["initial_slot_values"])
    out, (keys, values) = peer_sources.fla("gsa").naive_recurrent_gsa(
        x["q"], x["k"], x["v"], -torch.expm1(x["gate"]), x["gate"], initial_state=state, output_final_state=True
    )
    theirs = {"out": swapped(out), "slot_keys": keys.mT, "slot_values": values}
    agrees("gated_slot", operands, theirs)
    gradients_agree("gated_slot", operands, leaves, theirs)


def cyfa_of_fla(*more, **given):
    """Its recurrence and what that is made of, and the table of Fourier functions, from a file that needs Triton to be imported."""
    checks = ("validate_num_slots", "validate_cyfa_inputs", "validate_initial_state", "prepare_cu_seqlens")
    known = {"torch": torch, "CyFAState": tuple, **given}
    shared = peer_sources.functions("fla/ops/cyfa/utils.py", *checks, "_readout_basis", "build_readout_table", **known)
    names = ("_rotation_terms", "_rotate_atom", "_rotate_modal_pos", "_rotate_modal_neg", "naive_recurrent_cyfa", *more)
    return peer_sources.functions("fla/ops/cyfa/naive.py", *names, **vars(shared), **known), shared.build_readout_table


@decays
@pytest.mark.parametrize("slots, started", [(1, 0.0), (3, 0.0), (7, 2.6)])
def test_cyfa_is_the_recurrence_by_a_clock_of_flash_linear_attention(decay, slots, started):
    """Whatever the clock has come to before the first token.  Keys and queries are given as it has them once they are normalised."""
    peer, table = cyfa_of_fla(_rmsnorm_forward=lambda x, weight, eps: x)
    operands = drawn("cyfa", decay=decay, Z=slots)
    leaves = tensors(operands)
    x = {name: grouped(leaf, 4) for name, leaf in leaves.items() if name != "readout"}
    basis = table(torch.eye(slots)[None])[0]

    def turned(held, clock, turn):
        """Coefficients (B, H, Z + 1, width), column by column."""
        return torch.stack([turn(clock, column, slots + 1) for column in held.unbind(dim=3)], dim=3)

    before = torch.full((2, 4), started)
    keys, values = (turned(basis.mT @ x["initial_slot_" + name], before, peer._rotate_modal_neg) for name in ("keys", "values"))
    out, (keys, values, clock) = peer.naive_recurrent_cyfa(
        *(swapped(x[name]) for name in ("q", "k", "v", "gate", "delta", "beta")),
        *(leaves["readout"], None, None, 0.0, 0.0),
        initial_state=(keys.mT, values, before),
        output_final_state=True,
    )
    keys, values = (basis @ turned(held, clock, peer._rotate_modal_pos)[:, ::2] for held in (keys.mT, values))
    theirs = {"out": swapped(out), "slot_keys": keys, "slot_values": values}
    agrees("cyfa", operands, theirs)
    gradients_agree("cyfa", operands, leaves, theirs)


def test_cyfa_of_flash_linear_attention_normalises_keys_and_queries_first():
    peer, _ = cyfa_of_fla("_rmsnorm_forward")
    operands = drawn("cyfa", "initial_slot_keys", "initial_slot_values")
    x = {name: swapped(grouped(leaf, 4)) for name, leaf in tensors(operands).items() if name != "readout"}
    weight = np.array([1.0, 2.0, 0.5])
    given = (*(x[name] for name in ("q", "k", "v", "gate", "delta", "beta")), torch.tensor(operands["readout"]))
    out, _ = peer.naive_recurrent_cyfa(*given, *2 * [torch.tensor(weight)], 0.1, 0.1)
    for name in ("q", "k"):
        operands[name] = operands[name] / np.sqrt(np.mean(operands[name] ** 2, axis=-1, keepdims=True) + 0.1) * weight
    agrees("cyfa", operands, {"out": swapped(out)})


# ---- levels ------------------------------------------------------------------------------------------------------------------


@decays
@pytest.mark.parametrize("tokens", [1, 8, 13])
def test_log_linear_is_the_matrix_of_levels_of_flash_linear_attention(decay, tokens):
    levels = max(int(np.ceil(np.log2(tokens))), 0) + 1
    operands = drawn("log_linear", "initial_state", "initial_position", decay=decay, T=tokens, L=levels)
    leaves = tensors(operands)
    grouped_leaves = (swapped(grouped(leaves[name], 4)) for name in ("q", "k", "v", "gate", "level_scale"))
    out = swapped(peer_sources.fla("log_linear_attn").naive_log_linear_attn(*grouped_leaves))
    agrees("log_linear", operands, {"out": out})
    if tokens == 8:
        gradients_agree("log_linear", operands, leaves, {"out": out})


# ---- regressions -------------------------------------------------------------------------------------------------------------


def mesa_operands(decay, **sizes):
    operands = drawn("mesa", decay=decay, Hq=2, E=3, **sizes)
    operands["beta"] += 0.1
    return operands


def mesa_arguments(x):
    return [swapped(x[name]) for name in ("q", "k", "v", "gate")] + [x["ridge"], swapped(x["beta"])]


@decays
def test_mesa_is_the_exact_solution_of_flash_linear_attention(decay):
    operands = mesa_operands(decay)
    leaves = tensors(operands)
    naive = peer_sources.fla("mesa_net").naive_mesa_net_exact
    out, gram, state = naive(*mesa_arguments(leaves), leaves["initial_gram"], leaves["initial_state"])
    theirs = {"out": swapped(out), "gram": gram, "state": state}
    agrees("mesa", operands, theirs)
    del leaves["initial_gram"]  # of a symmetric matrix, torch's gradient is symmetric and ours that of the triangle which is read
    gradients_agree("mesa", operands, leaves, theirs)


@decays
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_mesa_by_conjugate_gradients_is_that_of_flash_linear_attention(decay, steps):
    operands = mesa_operands(decay, T=8)
    x = tensors(operands)
    out, gram, state = peer_sources.fla("mesa_net").naive_mesa_net_CG(
        *mesa_arguments(x), 4, steps, h_kk_init=x["initial_gram"], h_kv_init=x["initial_state"]
    )
    theirs = {"out": swapped(out), "gram": gram, "state": state}
    agrees("mesa", operands, theirs, solver="conjugate gradients", steps=steps, eps=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_mesa_from_the_diagonal_is_the_decoding_step_of_flash_linear_attention(steps):
    operands = mesa_operands("weak")
    x = tensors(operands)
    gram, state, outs = x["initial_gram"], x["initial_state"], []
    for t in range(7):
        token = [x[name][:, :, t] for name in ("q", "k", "v", "gate")] + [x["ridge"], x["beta"][:, :, t]]
        out, gram, state = peer_sources.fla("mesa_net").naive_mesa_net_decoding_one_step(*token, gram, state, steps)
        outs.append(out)
    theirs = {"out": torch.stack(outs, dim=2), "gram": gram, "state": state}
    agrees("mesa", operands, theirs, solver="conjugate gradients", steps=steps, start="diagonal", eps=1e-5)


# ---- inner losses ------------------------------------------------------------------------------------------------------------


def normalised(z, weight, bias, eps=1e-6):
    return F.layer_norm(z, z.shape[-1:], eps=eps) * weight[None, :, None] + bias[None, :, None]


def gelu_network(x, w1, c1, w2, c2):
    return F.gelu(x @ w1 + c1[:, :, None], approximate="tanh") @ w2 + c2[:, :, None]


def linear_network(x, w, c):
    return x @ w + c[:, :, None]


def trained(x, network, weights, gradients, mini_batch):
    """TTT with the gradients of autograd; one (B, H, 1, D) token at a time."""
    outs, reads = [], []
    start = int(x["initial_position"][0])
    for t in range(x["k"].shape[2]):
        q, k, v = (x[name][:, :, t : t + 1] for name in ("q", "k", "v"))
        with torch.enable_grad():
            at = [w if w.requires_grad else w.requires_grad_() for w in weights]
            loss = ((normalised(network(k, *at), x["norm_weight"], x["norm_bias"]) - (v - k)) ** 2).sum(dim=(2, 3)) / 2
            found = torch.autograd.grad((x["eta"][:, :, t] * loss).sum(), at, create_graph=True)
        gradients = [a + b for a, b in zip(gradients, found, strict=True)]
        scale = x["token_scale"][:, :, t]
        now = [w - scale.reshape(*scale.shape, *[1] * (w.ndim - 2)) * g for w, g in zip(weights, gradients, strict=True)]
        z = network(q, *(grouped(w, q.shape[1]) for w in now))
        reads.append(z)
        weight, bias = (x[name].repeat_interleave(q.shape[1] // k.shape[1], dim=0) for name in ("norm_weight", "norm_bias"))
        outs.append(q + normalised(z, weight, bias))
        if (start + t + 1) % mini_batch == 0:
            weights, gradients = now, [torch.zeros_like(g) for g in gradients]
    return torch.cat(outs, dim=2), torch.cat(reads, dim=2), weights, gradients


NETWORKS = {"ttt_linear": (linear_network, ("state", "offset")), "ttt_mlp": (gelu_network, ("w1", "c1", "w2", "c2"))}
GRADIENTS = {"state": "gradient", "offset": "offset_gradient", "w1": "w1_gradient", "c1": "c1_gradient", "w2": "w2_gradient", "c2": "c2_gradient"}


@pytest.mark.parametrize("mini_batch", [1, 3, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_ttt_follows_the_autograd_of_its_inner_loss(name, mini_batch):
    operands = drawn(name, T=5)
    operands["initial_position"][:] = 1
    leaves = tensors(operands)
    network, weights = NETWORKS[name]
    given = [[leaves["initial_" + w] for w in names] for names in (weights, [GRADIENTS[w] for w in weights])]
    out, memory, after, sums = trained(leaves, network, *given, mini_batch)
    states = dict(zip(weights, after, strict=True)) | dict(zip([GRADIENTS[w] for w in weights], sums, strict=True))
    agrees(name, operands, {"out": out, "memory": memory, **states}, mini_batch=mini_batch)
    if mini_batch == 3:
        gradients_agree(name, operands, leaves, {"out": out}, mini_batch=mini_batch)


def ttt_of_fla(leaves, mini_batch):
    q, k, v, eta = (swapped(leaves[name]).clone() for name in ("q", "k", "v", "token_scale"))  # it multiplies the caller's q in place
    return peer_sources.fla("ttt").chunk_ttt_linear_ref(
        q, k, v, leaves["norm_weight"], leaves["norm_bias"], eta[..., None], 1.0, 1e-6, mini_batch, leaves["initial_state"].clone(),
        leaves["initial_offset"][:, :, None], True,
    )  # fmt: skip


def ttt_operands():
    operands = drawn("ttt_linear", "initial_gradient", "initial_offset_gradient", "initial_position", Hq=2, T=8)
    operands["eta"] = np.ones_like(operands["eta"])
    operands["token_scale"] = 0.2 + 0.1 * np.abs(operands["token_scale"])
    return operands


def test_ttt_linear_is_that_of_flash_linear_attention_but_for_its_residual():
    """It adds the memory, not the query, to the normalised memory."""
    operands = ttt_operands()
    leaves = tensors(operands)
    out, state, offset = ttt_of_fla(leaves, 4)
    variant, params = catalog.variant("ttt_linear"), {"mini_batch": 4}

    def ours(x):
        found = outputs(variant, x, params)
        return [found["memory"] + (found["out"] - x["q"]), found["state"], found["offset"]]

    tolerances = rounding(ours, operands, variant, 2 * flops(variant, operands, params))
    for theirs, mine, tolerance in zip((swapped(out), state, offset[:, :, 0]), ours(operands), tolerances, strict=True):
        close(theirs, mine, tolerance, "ttt_linear")
    del leaves["eta"]  # theirs is 1
    theirs = {"state": state, "offset": offset[:, :, 0]}
    gradients_agree("ttt_linear", operands, leaves, theirs, mini_batch=4)


def test_the_offset_of_flash_linear_attention_learns_from_the_tokens_that_fill_up_its_last_mini_batch():
    operands = ttt_operands()
    tokens = ("q", "k", "v", "eta", "token_scale")
    short = {name: x[:, :, :7] if name in tokens else x for name, x in operands.items()}
    filled = {name: np.concatenate([x[:, :, :7], 0.0 * x[:, :, :1]], axis=2) if name in tokens else x for name, x in operands.items()}
    filled["eta"] = operands["eta"]
    filled["token_scale"] = np.concatenate([short["token_scale"], short["token_scale"][:, :, -1:]], axis=2)
    _, state, offset = ttt_of_fla(tensors(short), 4)
    agrees("ttt_linear", filled, {"state": state, "offset": offset[:, :, 0]}, mini_batch=4)
    ours = outputs(catalog.variant("ttt_linear"), short, {"mini_batch": 4})
    last = short["token_scale"][:, :, -1, None] * ours["offset_gradient"]
    assert np.abs(offset[:, :, 0].detach().numpy() - (ours["offset"] - last)).max() > 1e-3


def memorised(x, loss, chunk):
    """Titans with the gradients of autograd."""
    memory, surprise, anchor = x["initial_state"], x["initial_surprise"], x["initial_anchor"]
    start, memories = int(x["initial_position"][0]), []
    for t in range(x["k"].shape[2]):
        if (start + t) % chunk == 0:
            anchor = memory
        at = anchor if anchor.requires_grad else anchor.requires_grad_()
        k, v = x["k"][:, :, t : t + 1], x["v"][:, :, t : t + 1]
        [found] = torch.autograd.grad(loss(k @ at, k, v).sum(), [at], create_graph=True)
        eta, theta, alpha = (x[name][:, :, t, None, None] for name in ("eta", "theta", "alpha"))
        surprise = eta * surprise - theta * found
        memory = (1 - alpha) * memory + surprise
        memories.append(memory)
    reads = [x["q"][:, :, t : t + 1] @ grouped(m, x["q"].shape[1]) for t, m in enumerate(memories)]
    return torch.cat(reads, dim=2), memory, surprise, anchor


@pytest.mark.parametrize("chunk", [1, 3])
def test_titans_follows_the_autograd_of_its_inner_loss(chunk):
    operands = drawn("titans")
    operands["initial_position"][:] = 1
    leaves = tensors(operands)
    out, state, surprise, anchor = memorised(leaves, lambda recalled, k, v: (recalled - v) ** 2, chunk)
    agrees("titans", operands, {"out": out, "state": state, "surprise": surprise, "anchor": anchor}, chunk=chunk)
    gradients_agree("titans", operands, leaves, {"out": out, "state": state}, chunk=chunk)


@pytest.mark.parametrize("steps", [0.0, 1.0])
def test_titans_of_flash_linear_attention_does_not_descend_its_own_loss(steps):
    """|LN(M^T k) - (v - k)|^2, by autograd; without steps of the gradient the two are one."""
    peer = peer_sources.functions("fla/ops/titans/naive.py", "titans_linear", torch=torch)
    operands = drawn("titans", Hq=2, E=3)
    operands["theta"] *= steps
    operands["initial_position"][:] = 0
    operands["initial_surprise"][:] = 0.0
    x = tensors(operands)
    weight, bias = torch.from_numpy(np.random.default_rng(3).uniform(0.5, 1.5, (2, 2, 3)))
    each = [x[name][..., None] for name in ("theta", "alpha", "eta")]
    theirs, last = peer.titans_linear(x["q"], x["k"], x["v"], weight, bias, *each, 1e-6, 1, x["initial_state"], True)
    read, state, _, _ = memorised(x, lambda recalled, k, v: (normalised(recalled, weight, bias) - (v - k)) ** 2, 1)
    out = read + normalised(read, weight, bias)
    for their, true in ((theirs, out), (last, state)):
        error = (their - true).abs().max() / true.abs().max()
        assert error > 0.1 if steps else error < 1e-13


# ---- a turning state ---------------------------------------------------------------------------------------------------------


def turning(x):
    """Mamba-3 of several ranks with complex states that turn, and keys and queries that do not."""

    def parts(y, dim):
        return torch.stack([y.real, y.imag], dim=dim + 1).flatten(dim, dim + 1)

    def complexes(y, bias):
        y = grouped(y, x["x"].shape[1]) + bias[:, None]
        return torch.complex(y[..., 0::2], y[..., 1::2])

    reads, writes = complexes(x["C"], x["C_bias"]), complexes(x["B"], x["B_bias"])
    values = x["x"][:, :, :, None] * x["x_weight"][:, None]
    back = torch.polar(torch.ones_like(x["initial_phase"]), -x["initial_phase"])
    state = back[..., None] * torch.complex(x["initial_state"][:, :, 0::2], x["initial_state"][:, :, 1::2])
    last = back[:, :, None] * torch.complex(x["initial_last_key"][..., 0::2], x["initial_last_key"][..., 1::2])
    value, phase, outs = x["initial_last_value"], x["initial_phase"], []
    for t in range(x["x"].shape[2]):
        dt, mix, gate = (x[name][:, :, t, None] for name in ("dt", "mix", "gate"))
        turn = torch.exp(torch.complex(gate.expand_as(phase), -dt * x["angle"][:, :, t]))
        old = state + ((1 - mix) * dt)[..., None] * (last.mT @ value.to(last.dtype))
        last, value = writes[:, :, t], values[:, :, t]
        state = turn[..., None] * old + (mix * dt)[..., None] * (last.mT @ value.to(last.dtype))
        phase = phase + dt * x["angle"][:, :, t]
        outs.append((reads[:, :, t].conj() @ state).real + x["skip"][:, None, None] * value)
    forth, read = torch.polar(torch.ones_like(phase), phase), torch.stack(outs, dim=2)
    return {
        "out": (read * x["out_weight"][:, None]).sum(dim=3),
        "read": read,
        "phase": phase,
        "state": parts(forth[..., None] * state, 2),
        "last_key": parts(forth[:, :, None] * last, 3),
        "last_value": value,
    }


@decays
def test_mamba3_mimo_is_a_complex_state_that_turns(decay):
    operands = drawn("mamba3_mimo", decay=decay, H=2, G=1, T=4, E=2, F=2)
    leaves = tensors(operands)
    theirs = turning(leaves)
    agrees("mamba3_mimo", operands, theirs)
    if decay == "weak":
        gradients_agree("mamba3_mimo", operands, leaves, {"out": theirs["out"], "state": theirs["state"]})


@decays
def test_mamba3_is_a_complex_state_that_turns(decay):
    operands = drawn("mamba3", decay=decay, E=2)
    leaves = tensors(operands)
    of_rank = {"C": 3, "B": 3, "C_bias": 1, "B_bias": 1, "initial_last_key": 2, "initial_last_value": 2}
    one = {name: leaf.unsqueeze(of_rank[name]) if name in of_rank else leaf for name, leaf in leaves.items()}
    theirs = turning({**one, "x_weight": torch.ones(4, 1, 2), "out_weight": torch.ones(4, 1, 2)})
    theirs = {name: x[:, :, 0] if name.startswith("last") else x for name, x in theirs.items() if name != "read"}
    agrees("mamba3", operands, theirs)
    if decay == "weak":
        gradients_agree("mamba3", operands, leaves, {"out": theirs["out"], "state": theirs["state"]})


# ---- segments ----------------------------------------------------------------------------------------------------------------


class Memories(NamedTuple):
    kv_mem: torch.Tensor
    k_norm: torch.Tensor


def fastweight_memory():
    from einops import einsum, rearrange, reduce

    names = ("retrieve_from_kv_memories", "create_new_memories", "retrieve_and_add_to_output", "exists")
    known = {"F": F, "Tensor": torch.Tensor, "Memories": Memories, "einsum": einsum, "rearrange": rearrange, "reduce": reduce}
    return peer_sources.functions("infini_transformer_pytorch/infini_transformer.py", *names, **known)


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("update", ["delta", "linear"])
def test_infini_is_the_fastweight_memory_of_infini_transformer_with_its_gate_mirrored(update, mirrored):
    peer = fastweight_memory()
    operands = drawn("infini", Hq=2)
    leaves = tensors(operands)
    layer = SimpleNamespace(use_mem_delta_rule=update == "delta", head_gates=-leaves["mix"] if mirrored else leaves["mix"])
    memories, outs = Memories(leaves["initial_state"], leaves["initial_mass"]), []
    for first in (0, 3, 6):
        q, k, v = (leaves[name][:, :, first : first + 3] for name in ("q", "k", "v"))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        outs.append(peer.retrieve_and_add_to_output(layer, out, q, memories))
        memories = peer.create_new_memories(layer, k, v, memories)
    theirs = {"out": torch.cat(outs, dim=2), "state": memories.kv_mem, "mass": memories.k_norm}
    if mirrored:
        agrees("infini", operands, theirs, segment=3, update=update)
        gradients_agree("infini", operands, leaves, theirs, segment=3, update=update)
    else:
        with pytest.raises(AssertionError, match=r"^out at"):
            agrees("infini", operands, theirs, segment=3, update=update)
