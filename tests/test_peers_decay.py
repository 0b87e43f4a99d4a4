"""The variants whose past fades and is never erased, against code of other people.

A tolerance is twice the unit roundoff of the reference's arithmetic, times the roundings that a term of the result goes through, times the sum of the
absolute values of all terms, which is the same operation on absolute values.  A term is rounded when it is made, at most `STEP` times with
every token, and when it is read: one inner product.  Where a reference rounds what it exponentiates, the error of an exponent is a relative
one of its term; `exponents` counts it.  Operands are float32 numbers, so that a reference that converts to float32 rounds none of them.

Gradients are taken in float64: references that call ``.float()`` are kept from it.  Ours come with an estimate of their error, to which the
reference's rounding is added in the same way, twice over for the way back.
"""

import functools
import math

import numpy as np
import pytest
from catalogue import arrays_of, problem_of
from peer_sources import fla, functions, load
from test_variant_peers import DOUBLE, FUNCTION, SINGLE, assert_within

import refattn as ra
from refattn import catalog

pytestmark = pytest.mark.peer

STEP = FUNCTION + 3  # an exponential; its product with the term, the sum with a new one, and that one's own product
SIGNED = ("gate", "slope", "A", "angle", "decay_logit")  # what decays are made of keeps its sign


def numbers(seed, *shape):
    """Seeded normals with an outlier, float32 numbers."""
    x = np.random.default_rng(seed).standard_normal(shape)
    x.flat[-1] *= 5.0
    return rounded(x)


def rounded(x):
    return np.asarray(x, np.float32).astype(np.float64)


def gates(seed, *shape, strength=0.3):
    """Logarithms of decays, one of them 0."""
    x = -np.random.default_rng(seed).exponential(strength, shape)
    x.flat[0] = 0.0
    return rounded(x)


#: A typical decay, one that forgets nearly all within a token, and one of both, with a token at which all is forgotten.
STRENGTHS = {"weak": 0.05, "strong": 40.0, "mixed": 3.0}


def forgetting(strength, seed, *shape):
    gate = gates(seed, *shape, strength=STRENGTHS[strength])
    if strength == "mixed":
        gate[:, :, shape[2] // 2] = -np.inf
    return gate


def qkv(heads=6, n=11, d=4, d_v=3):
    return {
        "q": numbers(1, 2, heads, n, d),
        "k": numbers(2, 2, heads, n, d),
        "v": numbers(3, 2, heads, n, d_v),
        "initial_state": numbers(4, 2, heads, d, d_v),
    }


defined = functools.partial(ra.attend, backend="definition")


def absolute(operands):
    return {name: x if name in SIGNED else np.abs(x) for name, x in operands.items()}


def agree(theirs, name, operands, unit=SINGLE, extra=0.0, returns=("out", "state"), **params):
    """Outputs of a reference against ours; `extra` more roundings of every term."""
    ours, sizes = (arrays_of(defined(name, **x, **params, returns=returns)) for x in (operands, absolute(operands)))
    dims = problem_of(catalog.variant(name), operands, params).dims
    roundings = STEP * dims["T"] + dims.get("D", dims.get("N", 1)) + 8 + extra
    for a, b, size in zip(theirs, ours, sizes, strict=True):
        assert_within(np.asarray(a, np.float64), b, 2 * unit * roundings * size)


def torch_of(x):
    import torch

    return torch.from_numpy(np.array(x))


def tokens_first(x):
    """[B H T ...] as [B T H ...], and back."""
    return x.swapaxes(1, 2)


@pytest.fixture
def kept_wide(monkeypatch):
    """References that convert to float32 stay in float64."""
    import torch

    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)


def gradients_agree(name, operands, reference, returns=("out", "state"), bound=None, **params):
    """Gradients of a reference, a function of tensors by name returning outputs, against ours, for cotangents of all outputs.

    `bound(sum of all absolute cotangents)` is what no term's size exceeds, where absolute values of the operands would let terms cancel.
    """
    tensors = {operand: torch_of(x).requires_grad_() for operand, x in operands.items()}
    outputs = reference(**tensors)
    cotangents = {f"d_{output}": numbers(90 + n, *theirs.shape) for n, (output, theirs) in enumerate(zip(returns, outputs, strict=True))}
    sum((theirs * torch_of(d)).sum() for theirs, d in zip(outputs, cotangents.values(), strict=True)).backward()
    ours = ra.gradients(name, **operands, **cotangents, **params, backend="definition")
    positive = {d: np.abs(x) for d, x in cotangents.items()}
    if bound is None:
        sizes = ra.gradients(name, **absolute(operands), **positive, **params, backend="definition")._asdict()
    else:
        sizes = dict.fromkeys(("d_" + operand for operand in operands), bound(sum(x.sum() for x in positive.values())))
    summed = max(x.size for x in operands.values())  # an operand shared by all tokens and batches gathers a term from each
    longest = max(max(x.shape) for x in operands.values())
    for operand, tensor in tensors.items():
        d = "d_" + operand
        budget = ours.errors[d] + 2 * DOUBLE * (2 * STEP * longest + summed) * np.abs(sizes[d])
        assert_within(tensor.grad.numpy(), getattr(ours, d), budget)


# ---- ONNX --------------------------------------------------------------------------------------------------------------------


@functools.cache
def onnx_cases():
    from onnx.backend.test.case import node
    from onnx.backend.test.case.node import linear_attention  # noqa: F401 - puts its cases on the list; collect_testcases() makes those of all operators

    return {case.name: case for case in node._NodeTestCases if case.name.startswith("test_linear_attention_")}


@functools.cache
def onnx_names():
    import inspect

    from onnx.backend.test.case.node.linear_attention import LinearAttention

    exports = (name.removeprefix("export_") for name, _ in inspect.getmembers(LinearAttention) if name.startswith("export_"))
    return tuple(f"test_linear_attention_{name}" for name in exports)


def test_onnx_publishes_these_node_cases_of_linear_attention():
    assert len(onnx_names()) == 14
    assert set(onnx_cases()) == {name + form for name in onnx_names() for form in ("", "_expanded")}


@pytest.mark.parametrize("form", ["", "_expanded"])
@pytest.mark.parametrize("number", range(14))
def test_every_update_rule_agrees_with_the_published_onnx_node_cases(number, form):
    """The operator as one node, whose outputs are published; and the graph of elementary operators that it stands for, run."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    case = onnx_cases()[onnx_names()[number]]
    node = case.model.graph.node[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    heads, kv_heads = attributes["q_num_heads"], attributes["kv_num_heads"]
    [(inputs, published)] = case.data_sets
    if form:
        expanded = onnx_cases()[onnx_names()[number] + form].model
        published = ReferenceEvaluator(expanded).run(None, dict(zip((i.name for i in expanded.graph.input), inputs, strict=True)))
    given = dict(zip(filter(None, node.input), (np.asarray(x, np.float64) for x in inputs), strict=True))

    def unpacked(x, count):
        return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)

    operands = {"q": unpacked(given["query"], heads), "k": unpacked(given["key"], kv_heads), "v": unpacked(given["value"], kv_heads)}
    if "past_state" in given:
        operands["initial_state"] = given["past_state"]
    if "beta" in given:
        operands["beta"] = np.broadcast_to(given["beta"].swapaxes(1, 2), operands["k"].shape[:3])
    by_channel = "decay" in given and given["decay"].shape[2] > kv_heads
    if "decay" in given:
        operands["gate"] = unpacked(given["decay"], kv_heads) if by_channel else given["decay"].swapaxes(1, 2)
    rule = attributes.get("update_rule", b"gated_delta").decode()
    if rule == "linear":
        operands["gate"] = np.zeros(operands["k"].shape[:3])
    name = {
        "linear": "simple_gla",
        "gated": "gla" if by_channel else "simple_gla",
        "delta": "delta",
        "gated_delta": "kda" if by_channel else "gated_delta",
    }[rule]

    scale = attributes.get("scale") or None
    ours = defined(name, **operands, scale=scale, returns=("out", "state"))
    # Of absolute values an erasure must add: -beta k (-v - k . S) = beta k (v + k . S).
    grown = absolute(operands) | {n: -np.abs(operands[n]) for n in ("v", "beta") if "beta" in operands}
    sizes = defined(name, **grown, scale=scale, returns=("out", "state"))
    n, d = operands["q"].shape[2:]
    roundings = (STEP + (d + 3 if "beta" in operands else 0)) * n + d + 8
    out, state = published
    last_unit = np.finfo(out.dtype).eps / 2  # to which the results were rounded
    for theirs, a, size in zip((unpacked(out, heads), state), ours, sizes, strict=True):
        assert_within(np.asarray(theirs, np.float64), a, 2 * SINGLE * roundings * size + last_unit * np.abs(a))


# ---- decays by head and by channel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS)
def test_gla_is_the_recurrence_of_flash_linear_attention(strength):
    x = {**qkv(), "gate": forgetting(strength, 9, 2, 6, 11, 4)}
    given = [torch_of(tokens_first(x[name])) for name in ("q", "k", "v", "gate")]
    out, state = fla("gla").naive_recurrent_gla(*given, torch_of(x["initial_state"]), output_final_state=True)
    agree((tokens_first(out.numpy()), state.numpy()), "gla", x)


def test_gla_has_the_gradients_of_flash_linear_attention(kept_wide):
    x = {**qkv(heads=2, n=3, d=2, d_v=2), "gate": gates(9, 2, 2, 3, 2)}

    def reference(q, k, v, gate, initial_state):
        out, state = fla("gla").naive_recurrent_gla(*(a.transpose(1, 2) for a in (q, k, v, gate)), initial_state, output_final_state=True)
        return out.transpose(1, 2), state

    gradients_agree("gla", x, reference)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_simple_gla_is_the_recurrence_of_flash_linear_attention(strength, scale):
    x = {**qkv(), "gate": forgetting(strength, 9, 2, 6, 11)}
    given = [torch_of(tokens_first(x[name])) for name in ("q", "k", "v", "gate")]
    out, state = fla("simple_gla").naive_recurrent_simple_gla(*given, scale, torch_of(x["initial_state"]))
    agree((tokens_first(out.numpy()), state.numpy()), "simple_gla", x, scale=scale)


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_simple_gla_is_the_chunked_and_the_parallel_form_of_flash_linear_attention(strength):
    """Both exponentiate differences of summed gates: each sum is rounded for every token, by half a unit of the largest."""
    x = {**qkv(), "gate": forgetting(strength, 9, 2, 6, 11)}
    summed = 2 * 11 * np.max(np.abs(x["gate"]).sum(-1))
    q, k, v, gate = (torch_of(tokens_first(x[name])) for name in ("q", "k", "v", "gate"))
    start = torch_of(x["initial_state"]).float()
    out, state = fla("simple_gla").naive_chunk_simple_gla(q, k, v, gate, start, output_final_state=True, chunk_size=4)
    agree((tokens_first(out.numpy()), state.numpy()), "simple_gla", x, extra=summed)
    out, _ = fla("simple_gla").naive_parallel_simple_gla(q, k, v, gate)
    del x["initial_state"]
    agree((tokens_first(out.numpy()),), "simple_gla", x, extra=summed, returns=("out",))


def test_simple_gla_has_the_gradients_of_flash_linear_attention(kept_wide):
    x = {**qkv(heads=2, n=4, d=2, d_v=2), "gate": gates(9, 2, 2, 4)}

    def reference(q, k, v, gate, initial_state):
        given = (a.transpose(1, 2) for a in (q, k, v, gate))
        out, state = fla("simple_gla").naive_recurrent_simple_gla(*given, initial_state=initial_state)
        return out.transpose(1, 2), state

    gradients_agree("simple_gla", x, reference)


def test_lightning_is_the_layer_of_minimax():
    """In blocks of 4 tokens, which the definition does not know, with slopes as MiniMax-01 has them."""
    import torch
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    heads, layers, layer_index = 6, 3, 1
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    config = MiniMaxConfig(hidden_size=10, num_attention_heads=heads, head_dim=4, num_hidden_layers=layers, block_size=4, layer_types=kinds)
    torch.manual_seed(0)
    layer = MiniMaxLightningAttention(config, layer_idx=layer_index).double()
    h = np.arange(heads)
    slope = 2.0 ** (-8.0 * (h + 1) / heads) * (1.0 - layer_index / (layers - 1 + 1e-5) + 1e-5)
    assert_within(layer.slope_rate.ravel(), slope, 4 * SINGLE * slope)
    slope = rounded(layer.slope_rate.ravel())  # as the layer has it, which computes it in float32
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)  # again, now in float64
    layer.norm = layer.out_proj = torch.nn.Identity()
    torch.nn.init.zeros_(layer.output_gate.weight)  # a gate of 1/2
    hidden = torch_of(numbers(1, 2, 11, 10))
    with torch.no_grad():
        torch.nn.init.normal_(layer.qkv_proj.weight)
        halved, last = layer(hidden, None, None)
        projected = layer.act_fn(layer.qkv_proj(hidden)).reshape(2, 11, heads, 12).transpose(1, 2).numpy()
    out = 2.0 * halved.reshape(2, 11, heads, 4).transpose(1, 2).numpy()
    q, k, v = np.split(projected, 3, axis=-1)
    agree((out, last), "lightning", {"q": q, "k": k, "v": v, "slope": slope}, unit=DOUBLE)


def test_lightning_is_simple_gla_of_flash_linear_attention_with_the_slopes_of_transnormer():
    heads, layers, layer_index = 6, 4, 1
    slope = rounded(8.0 * np.arange(heads) / heads * (1.0 - layer_index / layers))  # head 0 never forgets
    x = {**qkv(), "slope": slope}
    gate = torch_of(np.broadcast_to(-slope, (2, 11, heads)))
    given = [torch_of(tokens_first(x[name])) for name in ("q", "k", "v")]
    out, state = fla("simple_gla").naive_recurrent_simple_gla(*given, gate, scale=1.0, initial_state=torch_of(x["initial_state"]))
    agree((tokens_first(out.numpy()), state.numpy()), "lightning", x)
    start = torch_of(x["initial_state"]).float()
    out, state = fla("simple_gla").naive_chunk_simple_gla(*given, gate, start, output_final_state=True, chunk_size=4, scale=1.0)
    agree((tokens_first(out.numpy()), state.numpy()), "lightning", x, extra=2 * 11 * 11 * np.max(slope))


# ---- keys that the gates make ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS)
def test_hgrn_is_the_recurrence_of_flash_linear_attention(strength):
    """Whose input is (1 - f) x."""
    x = {"x": numbers(1, 2, 11, 5), "gate": forgetting(strength, 2, 2, 1, 11, 5)[:, 0], "initial_state": numbers(3, 2, 5)}
    entering = torch_of(-np.expm1(x["gate"]) * x["x"])
    out, state = fla("hgrn").naive_recurrent_hgrn(entering, torch_of(x["gate"]), torch_of(x["initial_state"]), output_final_state=True)
    agree((out, state), "hgrn", x, extra=1)


def test_hgrn_in_chunks_of_flash_linear_attention_needs_one_chunk_for_all():
    x = {"x": numbers(1, 2, 8, 5), "gate": gates(2, 2, 8, 5)}
    entering, gate = torch_of(-np.expm1(x["gate"]) * x["x"]), torch_of(x["gate"])
    out, _ = fla("hgrn").naive_chunk_hgrn(entering, gate, chunk_size=8)
    agree((out,), "hgrn", x, returns=("out",), extra=1)
    with pytest.raises(RuntimeError, match=r"shape '\[2, 4, 5\]' is invalid"):
        fla("hgrn").naive_chunk_hgrn(entering, gate, chunk_size=4)


def test_hgrn_has_the_gradients_of_flash_linear_attention(kept_wide):
    x = {"x": numbers(1, 2, 4, 3), "gate": gates(2, 2, 4, 3), "initial_state": numbers(3, 2, 3)}

    def reference(x, gate, initial_state):
        import torch

        return fla("hgrn").naive_recurrent_hgrn(-torch.expm1(gate) * x, gate, initial_state, output_final_state=True)

    largest = max(np.abs(x[name]).max() for name in ("x", "initial_state"))  # of the inputs and of what averages them
    gradients_agree("hgrn", x, reference, bound=lambda total: 2 * (largest + 1) * total)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_hgrn2_is_gla_of_flash_linear_attention_with_the_keys_it_makes(strength):
    x = {**qkv(), "gate": forgetting(strength, 9, 2, 6, 11, 4)}
    del x["k"]
    keys = -np.expm1(x["gate"])
    given = [torch_of(tokens_first(a)) for a in (x["q"], keys, x["v"], x["gate"])]
    out, state = fla("gla").naive_recurrent_gla(*given, torch_of(x["initial_state"]), output_final_state=True)
    agree((tokens_first(out.numpy()), state.numpy()), "hgrn2", x, extra=1, scale=0.5)  # 1/sqrt(4), which is all the scale that function knows


def test_lightnet_is_gla_of_flash_linear_attention_on_a_running_softmax():
    import torch

    x = qkv()
    del x["initial_state"]
    x["k"] *= 6.0  # weights from 1e-10 to 1
    mass = torch.logcumsumexp(torch_of(x["k"]), dim=2)
    before = torch.nn.functional.pad(mass[:, :, :-1], (0, 0, 1, 0), value=-math.inf)
    given = [a.transpose(1, 2) for a in (torch_of(x["q"]), torch.exp(torch_of(x["k"]) - mass), torch_of(x["v"]), before - mass)]
    out, state = fla("gla").naive_recurrent_gla(*given, output_final_state=True)
    # Keys and gates become float32 numbers: half a unit of either, and the gate is an exponent.
    exponents = np.max(np.abs(np.diff(mass.numpy(), axis=2)).sum(2))
    ours = ("out", "state")
    scale = x["q"].shape[3] ** -0.5
    agree((tokens_first(out.numpy()), state.numpy()), "lightnet", x, extra=1 + exponents, returns=ours, scale=scale)
    assert_within(mass[:, :, -1].numpy(), defined("lightnet", **x, returns="log_mass"), 2 * DOUBLE * 11 * FUNCTION * np.abs(mass.numpy()).max())


def test_lightnet_has_the_gradients_of_pytorch_logcumsumexp():
    import torch

    x = qkv(heads=2, n=3, d=2, d_v=2)
    del x["initial_state"]

    def reference(q, k, v):
        mass = torch.logcumsumexp(k, dim=2)
        visible = torch.tril(torch.ones(3, 3, dtype=torch.bool))[:, :, None]
        weights = torch.exp((k[:, :, None] - mass[:, :, :, None]).masked_fill(~visible, -math.inf))  # [B H T S D]
        return (torch.einsum("bhtd,bhtsd,bhse->bhte", q, weights, v),)

    # A weight w of a key moves a mean m by w (v - m): no more than twice the largest value, times what the query makes of it.
    largest = 2 * np.abs(x["v"]).max() * (1 + np.abs(x["q"]).sum(-1).max())
    gradients_agree("lightnet", x, reference, returns=("out",), bound=lambda total: largest * total)


@pytest.mark.parametrize("strength", [0.3, 20.0])
def test_rodimus_is_gla_of_flash_linear_attention_with_tempered_gates(strength):
    import torch

    rng = np.random.default_rng(9)
    x = {**qkv(heads=2), "selection": rounded(rng.exponential(strength, (2, 2, 11, 4)))}
    x["temperature"] = rounded(rng.uniform(0.0, 1.0, x["selection"].shape))
    g, tau = torch_of(x["selection"]), torch_of(x["temperature"])
    given = [a.transpose(1, 2) for a in (torch_of(x["q"]), torch_of(x["k"]) * torch.pow(g, tau), torch_of(x["v"]), -g * tau)]
    out, state = fla("gla").naive_recurrent_gla(*given, torch_of(x["initial_state"]), output_final_state=True)
    exponents = np.max(np.abs(x["selection"] * x["temperature"]).sum(2))  # gates become float32 numbers
    agree((tokens_first(out.numpy()), state.numpy()), "rodimus", x, extra=1 + exponents, scale=0.5)


# ---- RWKV ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_rwkv6_is_the_recurrence_of_flash_linear_attention(strength, scale):
    x = {**qkv(), "gate": forgetting(strength, 9, 2, 6, 11, 4), "bonus": numbers(10, 6, 4)}
    given = [torch_of(x[name]) for name in ("q", "k", "v", "gate", "bonus")]
    out, state = fla("rwkv6", "recurrent_naive").naive_recurrent_rwkv6(*given, scale, torch_of(x["initial_state"]), output_final_state=True)
    agree((out, state), "rwkv6", x, scale=scale)


def test_rwkv6_in_chunks_of_flash_linear_attention_has_no_scale_and_its_recurrence_has_one():
    x = {**qkv(n=12), "gate": gates(9, 2, 6, 12, 4), "bonus": numbers(10, 6, 4)}
    del x["initial_state"]
    given = [torch_of(x[name]) for name in ("q", "k", "v", "gate", "bonus")]
    chunked = fla("rwkv6", "chunk_naive").naive_chunk_rwkv6(*given, chunk_size=4)
    summed = 2 * 12 * np.max(np.abs(x["gate"]).sum(2))
    agree((chunked,), "rwkv6", x, extra=summed, returns=("out",))
    recurrent, _ = fla("rwkv6", "recurrent_naive").naive_recurrent_rwkv6(*given)
    agree((recurrent,), "rwkv6", x, returns=("out",), scale=0.5)


def test_rwkv6_has_the_gradients_of_flash_linear_attention_automatic_and_by_hand(kept_wide):
    x = {**qkv(heads=2, n=4, d=2, d_v=2), "gate": gates(9, 2, 2, 4, 2), "bonus": numbers(10, 2, 2)}
    naive = fla("rwkv6", "recurrent_naive")

    def reference(q, k, v, gate, bonus, initial_state):
        return naive.naive_recurrent_rwkv6(q, k, v, gate, bonus, 1.0, initial_state, output_final_state=True)

    gradients_agree("rwkv6", x, reference)

    d_out = numbers(90, 2, 2, 4, 2)
    given = [torch_of(x[name]) for name in ("q", "k", "v", "gate", "bonus")]
    theirs = naive.naive_recurrent_rwkv6_bwd(*given, torch_of(d_out), torch_of(d_out), torch_of(x["initial_state"]))  # reads no output
    ours = ra.gradients("rwkv6", **x, d_out=d_out, backend="definition")
    sizes = ra.gradients("rwkv6", **absolute(x), d_out=np.abs(d_out), backend="definition")
    # That of the gate is a running difference of two sums, each no smaller than the gradient itself and no larger than all of q . d_q.
    whole = np.sum(absolute(x)["q"] * sizes.d_q)
    for name, gradient in zip(("q", "k", "v", "gate", "bonus", "initial_state"), theirs, strict=True):
        d = "d_" + name
        size = whole if name == "gate" else np.abs(getattr(sizes, d))
        assert_within(gradient.numpy(), getattr(ours, d), ours.errors[d] + 2 * DOUBLE * (2 * STEP * 4 + 16) * size)


def time_mixing(*names):
    """Functions of the rwkv package, of which the recurrence is left: norms and gates do nothing, and all stays in the precision given.

    The first norm gives its weight, so that the tokens are given as that; what the function adds its result to can then be zeros.
    """
    from types import SimpleNamespace

    import torch

    stand_ins = SimpleNamespace(
        layer_norm=lambda x, shape, weight, bias: weight, group_norm=lambda x, **rest: x, silu=torch.ones_like, pad=torch.nn.functional.pad
    )
    return functions("rwkv/model.py", *names, torch=torch, F=stand_ins, matmul=lambda a, b, *rest, **more: a @ b)


@pytest.mark.parametrize("version", ["v5", "v5_1", "v5_2"])
def test_rwkv5_is_the_time_mixing_of_the_rwkv_package(version):
    """As a whole sequence; and token by token where the package has that too.  Before 5.2, decay and bonus are one number a head."""
    import torch

    heads, n, d = 3, 11, 4
    rng = np.random.default_rng(5)
    one_a_head, gated = version != "v5_2", version != "v5"
    gate = np.broadcast_to(-rng.exponential(0.5, (heads, 1 if one_a_head else d)), (heads, d))
    bonus = np.broadcast_to(rng.standard_normal((heads, 1 if one_a_head else d)), (heads, d))
    decay, first = (torch_of(a[:, :1] if one_a_head else a)[:, :, None] for a in (np.exp(gate), bonus))
    tokens, start = torch_of(numbers(1, n, heads * d)), torch_of(numbers(2, heads, d, d))
    w_k, w_v, w_r = (torch_of(numbers(seed, heads * d, heads * d)) for seed in (3, 4, 5))
    ones, identity = torch.ones(heads * d, dtype=torch.float64), torch.eye(heads * d, dtype=torch.float64)

    def run(function, tokens, state):
        mixes, projections = ((ones,) * 4, (w_k, w_v, w_r, identity, identity)) if gated else ((ones,) * 3, (w_k, w_v, w_r, identity))
        none = (None,) * 4 * len(projections)
        out, _, state = function(None, 0 * tokens, 0 * ones, state, tokens, None, None, None, *mixes, decay, first, *projections, *none)
        return out, state

    def by_head(weight):
        return (tokens @ weight).reshape(n, heads, d).transpose(0, 1)[None].numpy()

    x = {"q": by_head(w_r), "k": by_head(w_k), "v": by_head(w_v), "gate": gate, "bonus": bonus, "initial_state": start[None].numpy()}
    package = time_mixing(f"att_seq_{version}", *([f"att_one_{version}"] if one_a_head else []))
    out, state = run(getattr(package, f"att_seq_{version}"), tokens, start)
    powers = FUNCTION * (n + 1)  # of the decay, rounded itself, as one more function
    agree((out.reshape(1, n, heads, d).transpose(1, 2), state[None]), "rwkv5", x, unit=DOUBLE, extra=powers)
    if one_a_head:
        state, rows = start, []
        for t in range(n):
            row, state = run(getattr(package, f"att_one_{version}"), tokens[t], state)
            rows.append(row.reshape(heads, d))
        agree((torch.stack(rows, dim=1)[None], state[None]), "rwkv5", x, unit=DOUBLE)


def test_rwkv6_is_the_time_mixing_of_the_rwkv_package(kept_wide):
    """With factors that its low-rank projection makes of every token, and no token shift."""
    import torch

    heads, n, d = 3, 11, 4
    width = heads * d
    tokens, start = torch_of(numbers(1, n, width)), torch_of(numbers(2, heads, d, d))
    w_k, w_v, w_r = (torch_of(numbers(seed, width, width)) for seed in (3, 4, 5))
    down, up = torch_of(numbers(6, width, 2)), torch_of(numbers(7, 2, width))
    resting, bonus = torch_of(numbers(8, heads, d)), torch_of(numbers(9, heads, d))
    zeros, identity = torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    shift = (torch.zeros(width, 5 * 2, dtype=torch.float64), torch.zeros(5, 2, width, dtype=torch.float64))
    mixes, projections = (zeros,) * 6, (w_k, w_v, w_r, identity, identity)
    time_first = (resting[:, :, None], bonus[:, :, None])
    given = (0 * tokens, zeros, start, tokens, None, None, None, *mixes, *shift, down, up, *time_first, *projections, *(None,) * 20)
    out, _, state = time_mixing("att_seq_v6_0").att_seq_v6_0(None, *given)

    def by_head(a):
        return a.reshape(n, heads, d).transpose(0, 1)[None].numpy()

    exponent = resting.reshape(-1) + torch.tanh(tokens @ down) @ up
    x = {"q": by_head(tokens @ w_r), "k": by_head(tokens @ w_k), "v": by_head(tokens @ w_v), "gate": by_head(-torch.exp(exponent))}
    x |= {"bonus": bonus.numpy(), "initial_state": start[None].numpy()}
    # exp of exp: both sides have the inner one from the same function, so that the logarithm of the factor is rounded alike.
    agree((out.reshape(1, n, heads, d).transpose(1, 2), state[None]), "rwkv6", x, unit=DOUBLE)


# ---- Mamba -------------------------------------------------------------------------------------------------------------------------------


def selective_scan(n=11, width=3, states=4, strength=0.5):
    rng = np.random.default_rng(7)
    return {
        "x": numbers(1, 2, n, width),
        "dt": rounded(rng.exponential(strength, (2, n, width))),
        "A": rounded(-rng.exponential(1.0, (width, states))),
        "B": numbers(2, 2, n, states),
        "C": numbers(3, 2, n, states),
        "D": numbers(4, width),
    }


def selective_scan_ref():
    import torch
    from einops import rearrange, repeat

    return functions(
        "mamba_ssm/ops/selective_scan_interface.py", "selective_scan_ref", torch=torch, F=torch.nn.functional, rearrange=rearrange, repeat=repeat
    ).selective_scan_ref


def channels_first(x):
    """The authors' layout, [B M T] and [B N T]."""
    return {name: a.transpose(1, 2) if a.ndim == 3 else a for name, a in x.items()}


@pytest.mark.parametrize("strength", [0.05, 0.5, 50.0])
def test_mamba1_is_the_selective_scan_of_its_authors(strength, kept_wide):
    x = selective_scan(strength=strength)
    given = channels_first({name: torch_of(a) for name, a in x.items()})
    out, state = selective_scan_ref()(*(given[name] for name in ("x", "dt", "A", "B", "C", "D")), return_last_state=True)
    exponents = np.max(np.einsum("btm,mn->bmn", x["dt"], -x["A"]))  # dt A, rounded, is an exponent
    agree((out.transpose(1, 2), state), "mamba1", x, unit=DOUBLE, extra=exponents)


def test_mamba1_has_the_gradients_of_its_authors_scan(kept_wide):
    x = selective_scan(n=4, width=2, states=2)
    scan = selective_scan_ref()

    def reference(**tensors):
        given = channels_first(tensors)
        out, state = scan(*(given[name] for name in ("x", "dt", "A", "B", "C", "D")), return_last_state=True)
        return out.transpose(1, 2), state

    gradients_agree("mamba1", x, reference, bound=growing("mamba1", x))


def growing(name, x):
    """More than the sum of all terms of all gradients: rates made positive, so that nothing cancels and nothing fades.

    Each gradient has the terms of an output, with an operand left out or, for the exponents, put in once for every token.
    """
    largest = {n: np.abs(a) for n, a in x.items()}
    sizes = defined(name, **largest, returns=("out", "state"))
    smallest = min(a[a > 0].min() for a in largest.values())
    top = max(a.max() for a in sizes)
    return lambda total: top * total * max(1 / smallest, max(a.max() for a in largest.values()) * max(x["x"].shape))


def test_mamba1_is_the_scan_of_transformers_and_its_step():
    """What they convert to float32 is that already."""
    import torch
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan, mamba_selective_state_update

    x = selective_scan()
    given = channels_first({name: torch_of(a) for name, a in x.items()})
    tokens = [given[name] for name in ("x", "dt", "B", "C")]
    exponents = np.max(np.einsum("btm,mn->bmn", x["dt"], -x["A"]))
    out, state = mamba_selective_scan(*tokens[:2], given["A"], *tokens[2:], given["D"], return_last_state=True)
    agree((out.transpose(1, 2), state), "mamba1", x, unit=DOUBLE, extra=exponents)

    held = torch.zeros_like(state)
    rows = [
        mamba_selective_state_update(held, *now[:2], given["A"], *now[2:], given["D"]) for now in zip(*(a.unbind(-1) for a in tokens), strict=True)
    ]
    agree((torch.stack(rows, dim=1), held), "mamba1", x, extra=exponents)  # the factors are made in float32


def test_mamba1_is_the_parallel_scan_of_mambapy():
    """Which takes the factors and what enters, [B T M N], and doubles the distance it looks back: factors are products of factors."""
    x = selective_scan()
    del x["D"]
    dt = x["dt"][..., None]
    states = load("mambapy/pscan.py").pscan(torch_of(np.exp(dt * x["A"])), torch_of(dt * x["B"][:, :, None] * x["x"][..., None])).numpy()
    exponents = np.max(np.einsum("btm,mn->bmn", x["dt"], -x["A"]))
    out = np.einsum("btmn,btn->btm", states, x["C"])
    agree((out, states[:, -1]), "mamba1", x, unit=DOUBLE, extra=exponents)


def dual(n=11, heads=6, groups=2, d_v=3, states=4, strength=0.5):
    rng = np.random.default_rng(7)
    return {
        "x": numbers(1, 2, heads, n, d_v),
        "dt": rounded(rng.exponential(strength, (2, heads, n))),
        "A": rounded(-rng.exponential(1.0, heads)),
        "B": numbers(2, 2, groups, n, states),
        "C": numbers(3, 2, groups, n, states),
        "D": numbers(4, heads),
        "initial_state": numbers(5, 2, heads, states, d_v),
    }


def summed_exponents(x):
    """Errors of differences of summed gates dt A, in units of the last place: every sum rounds, and so did every gate."""
    n = x["dt"].shape[2]
    return (2 * n + 1) * np.max((x["dt"] * -x["A"][:, None]).sum(2))


@functools.cache
def ssd_minimal():
    import torch
    from einops import rearrange, repeat

    return functions(
        "mamba_ssm/modules/ssd_minimal.py",
        "segsum",
        "ssd_minimal_discrete",
        torch=torch,
        F=torch.nn.functional,
        rearrange=rearrange,
        repeat=repeat,
    ).ssd_minimal_discrete


def by_minimal_listing(x, dt, A, B, C, initial_state, block):
    """Their function of the operands as we name them, tensors: B and C repeated for the heads of a group, dt multiplied in."""
    share = x.shape[1] // B.shape[1]
    B, C = (a.repeat_interleave(share, dim=1).transpose(1, 2) for a in (B, C))
    out, state = ssd_minimal()((dt[..., None] * x).transpose(1, 2), (dt * A[:, None]).transpose(1, 2), B, C, block, initial_state.mT[:, None])
    return out.transpose(1, 2), state.mT


@pytest.mark.parametrize("strength", [0.05, 0.5, 20.0])
def test_mamba2_is_the_minimal_listing_of_its_authors(strength):
    x = dual(n=12, strength=strength)
    del x["D"]
    agree(by_minimal_listing(**{n: torch_of(a) for n, a in x.items()}, block=4), "mamba2", x, unit=DOUBLE, extra=summed_exponents(x))


def test_mamba2_has_the_gradients_of_its_authors_minimal_listing():
    x = dual(n=4, heads=2, groups=1, d_v=2, states=2)
    del x["D"]
    gradients_agree("mamba2", x, functools.partial(by_minimal_listing, block=2), bound=growing("mamba2", x))


def test_mamba2_is_the_chunked_function_of_transformers_and_its_step():
    import torch
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan, mamba2_selective_state_update

    x = dual()
    given = {name: torch_of(a).float() for name, a in x.items()}
    tokens = [given[name].transpose(1, 2) for name in ("x", "dt", "B", "C")]
    start = given["initial_state"].mT
    out, state = mamba2_chunk_scan(
        tokens[0], tokens[1], given["A"], *tokens[2:], chunk_size=4, D=given["D"], initial_states=start, return_final_states=True
    )
    agree((out.transpose(1, 2), state.mT), "mamba2", x, extra=summed_exponents(x))

    held, rows = start.clone(), []
    rates, skip = given["A"][:, None, None].expand(6, 3, 4), given["D"][:, None].expand(6, 3)
    for inputs, dt, b, c in zip(*(a.unbind(1) for a in tokens), strict=True):
        rows.append(mamba2_selective_state_update(held, inputs, dt[..., None].expand(2, 6, 3), rates, b, c, D=skip))
    agree((torch.stack(rows, dim=2), held.mT), "mamba2", x, extra=summed_exponents(x))


def test_mamba2_is_the_attention_of_mlx_whose_default_clamps_small_steps():
    """It makes the steps, softplus(raw); a limit of 0.001 by default makes them larger than they were."""
    import mlx.core as mx

    x = dual(strength=0.05)
    del x["D"]
    raw = rounded(np.log(np.expm1(x["dt"])))
    raw[:, :, 3:9] = -9.0  # steps of 0.000123
    x["dt"] = np.logaddexp(0.0, raw)
    tokens = [mx.array(np.ascontiguousarray(tokens_first(a)), mx.float32) for a in (x["x"], x["B"], x["C"], raw)]
    rates, start = (mx.array(a, mx.float32) for a in (np.log(-x["A"]), np.swapaxes(x["initial_state"], 2, 3)))
    none = mx.zeros(6)  # no skip, no bias

    def theirs(**limits):
        ssm_attn = load("mlx_lm/models/ssm.py").ssm_attn
        out, state = ssm_attn(tokens[0], rates, tokens[1], tokens[2], none, tokens[3], none, start, **limits, step=4)
        return tokens_first(np.array(out)), np.swapaxes(np.array(state), 2, 3)

    # The steps carry a softplus, the rates a logarithm and an exponential, each of which is an error of an exponent.
    functions_of_exponents = 1 + FUNCTION * (2 + np.abs(np.log(-x["A"])).max())
    extra = summed_exponents(x) * functions_of_exponents + FUNCTION
    agree(theirs(time_step_limit=(0.0, math.inf)), "mamba2", x, extra=extra)
    clamped = {**x, "dt": np.maximum(x["dt"], 0.001)}
    agree(theirs(), "mamba2", clamped, extra=extra)
    with pytest.raises(AssertionError, match="theirs"):
        agree(theirs(), "mamba2", x, extra=extra)


# ---- others ------------------------------------------------------------------------------------------------------------------------------


def rg_lru_layer(width, dtype):
    import torch
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    torch.manual_seed(0)
    layer = RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=width, lru_width=width, num_attention_heads=2)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        layer.recurrent_param -= 3.0  # of slow channels
    return layer


def rg_lru_operands(layer, hidden, first):
    """What the layer makes of its tokens: the gates, by its own matrices; -parameter; and inf at position 0."""
    import torch

    blocks = hidden.reshape(*hidden.shape[:2], 2, -1)
    gates = (
        torch.sigmoid(torch.einsum("bthi,hij->bthj", blocks, weight) + bias).reshape(hidden.shape)
        for weight, bias in ((layer.recurrent_gate_weight, layer.recurrent_gate_bias), (layer.input_gate_weight, layer.input_gate_bias))
    )
    recurrence, entering = gates
    if first == 0:
        recurrence = torch.cat([torch.full_like(recurrence[:, :1], math.inf), recurrence[:, 1:]], dim=1)
    return {"x": hidden, "recurrence_gate": recurrence, "input_gate": entering, "decay_logit": -layer.recurrent_param}


@pytest.mark.parametrize("first", [0, 3])
def test_rg_lru_is_the_layer_of_recurrent_gemma(first):
    """From position 0, where it starts afresh, and from a later one; it keeps its states in float32."""
    import torch

    layer = rg_lru_layer(6, torch.float64)
    hidden = torch_of(numbers(1, 2, 11, 6))
    with torch.no_grad():
        out = layer(hidden, torch.arange(first, first + 11)[None])
        x = {name: a.numpy() for name, a in rg_lru_operands(layer, hidden, first).items()}
    # The gates come from products of 3 and a sigmoid; 1 - a^2 loses as many digits as a is near 1, which is an error relative to the input.
    logarithm = 8.0 * np.logaddexp(0.0, -x["decay_logit"]) * x["recurrence_gate"]
    lost = np.max(1.0 / -np.expm1(-2.0 * logarithm))
    double = (3 + 3 * FUNCTION) * lost * DOUBLE / SINGLE
    agree((out, layer.recurrent_states), "rg_lru", x, extra=double)


def test_rg_lru_has_the_gradients_of_recurrent_gemma(monkeypatch):
    import torch

    layer = rg_lru_layer(4, torch.float64)
    monkeypatch.setattr(torch.Tensor, "type", lambda x, dtype: x)  # states too stay in float64
    hidden = torch_of(numbers(1, 2, 4, 4))
    d_out = numbers(90, 2, 4, 4)
    hidden.requires_grad_()
    (layer(hidden, torch.arange(3, 7)[None]) * torch_of(d_out)).sum().backward()

    # The way from our operands back to the tokens and the parameter is the layer's projections, differentiated by PyTorch.
    made = rg_lru_operands(layer, hidden, 3)
    ours = ra.gradients("rg_lru", **{name: a.detach().numpy() for name, a in made.items()}, d_out=d_out, backend="definition")
    chained = sum((a * torch_of(getattr(ours, "d_" + name))).sum() for name, a in made.items())
    d_hidden, d_parameter = torch.autograd.grad(chained, (hidden, layer.recurrent_param))
    weights = 1 + sum(p.abs().sum().item() for p in layer.parameters())  # no projection makes an error more than so many times as large
    sizes = sum(np.abs(getattr(ours, "d_" + name)).sum() for name in made)
    budget = weights * (sum(np.sum(ours.errors["d_" + name]) for name in made) + 2 * DOUBLE * (2 * STEP * 4 + 32) * sizes)
    assert_within(hidden.grad.numpy(), d_hidden.numpy(), budget)
    assert_within(layer.recurrent_param.grad.numpy(), d_parameter.numpy(), budget)


def gate_loop(q, k, v, gate, angle):
    """The package's operator, heads as batch; its factors are shared by all channels of a value, so they need a last axis."""
    import torch
    from torch import einsum

    scan = load("gateloop_transformer/associative_scan.py").associative_scan
    operator = functions("gateloop_transformer/gateloop_transformer.py", "gate_loop_operator", associative_scan=scan, einsum=einsum)
    factors = torch.polar(torch.exp(gate), angle)
    out = operator.gate_loop_operator(*(a.flatten(0, 1) for a in (q, k, v)), factors.flatten(0, 1)[..., None])
    return out.reshape(*q.shape[:3], -1)


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_gateloop_is_the_operator_of_the_gateloop_transformer_package(strength):
    x = {**qkv(), "gate": forgetting(strength, 9, 2, 6, 11, 4), "angle": numbers(10, 2, 6, 11, 4)}
    del x["initial_state"]
    out = gate_loop(*(torch_of(x[name]) for name in ("q", "k", "v", "gate", "angle")))
    # Complex products of complex factors: the sizes are those of the magnitudes, gla's; sine and cosine are two functions more.
    ours = defined("gateloop", **x)
    angle = x.pop("angle")
    sizes = defined("gla", **absolute(x), scale=1.0)
    roundings = (2 * STEP + 2 * FUNCTION) * angle.shape[2] + 4 + 8
    assert_within(out.numpy(), ours, 2 * DOUBLE * roundings * 2 * sizes)


def test_gateloop_has_the_gradients_of_the_gateloop_transformer_package():
    x = {**qkv(heads=2, n=4, d=2, d_v=2), "gate": gates(9, 2, 2, 4, 2), "angle": numbers(10, 2, 2, 4, 2)}
    del x["initial_state"]
    sizes = defined("gla", **{name: a for name, a in absolute(x).items() if name != "angle"}, scale=1.0)
    smallest = min(np.abs(x[name]).min() for name in ("q", "k", "v"))
    # A gradient has the terms of an output, an operand left out of each, or turned by a right angle, once for every token between.
    gradients_agree(
        "gateloop", x, lambda **t: (gate_loop(**t),), returns=("out",), bound=lambda total: 4 * max(1, 1 / smallest) * sizes.max() * total
    )


def test_ema_is_the_one_of_mega_pytorch_with_its_other_damping():
    """Theirs fades by (1 - alpha) damping, the paper's by 1 - alpha delta: a delta of 1 or more.  It convolves by Fourier transforms."""
    import torch

    torch.manual_seed(0)
    n, width, rates = 11, 3, 4
    layer = load("mega_pytorch/mega_pytorch.py").MultiHeadedEMA(dim=width, heads=rates).double()
    tokens = numbers(1, 2, n, width)
    with torch.no_grad():
        theirs = layer(torch_of(tokens)).numpy()
        alpha, damping = (torch.sigmoid(a).numpy() for a in (layer.alphas, layer.dampen_factors))
        beta, eta = (a.numpy().T for a in (layer.expansion, layer.reduction))
    delta = (1.0 - (1.0 - alpha) * damping) / alpha
    x = {"x": tokens, "alpha": np.tile(alpha, (width, 1)), "delta": np.tile(delta, (width, 1)), "beta": beta, "eta": eta}
    # An entry of a Fourier convolution has the error of the largest: each of its stages, no more than log2(2 n) + 1 of them and two ways, rounds all.
    whole = np.sum(defined("ema", **absolute(x)), axis=1, keepdims=True)
    stages = 3 * STEP * (math.log2(2 * n) + 1)
    assert_within(theirs, defined("ema", **x), 2 * DOUBLE * (STEP * n + rates + stages) * whole)
    assert np.max(np.abs(defined("ema", **{**x, "delta": np.tile(damping, (width, 1))}) - theirs)) > 0.1


def test_ema_has_the_gradients_of_a_convolution_in_pytorch():
    import torch

    rng = np.random.default_rng(3)
    x = {name: numbers(seed, 2, 2) for seed, name in enumerate(("beta", "eta"))}
    x |= {name: rng.uniform(0.25, 0.75, (2, 2)) for name in ("alpha", "delta")}
    x["x"] = numbers(5, 2, 4, 2)
    x = {name: x[name] for name in ("x", "alpha", "delta", "beta", "eta")}

    def reference(x, alpha, delta, beta, eta):
        distance = torch.arange(3, -1, -1, dtype=torch.float64)[:, None, None]
        kernel = (eta * alpha * beta * (1 - alpha * delta) ** distance).sum(-1)
        padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
        return (torch.nn.functional.conv1d(padded, kernel.T[:, None], groups=2).transpose(1, 2),)

    smallest = min(np.abs(a).min() for a in x.values())
    whole = np.max(defined("ema", **{n: np.abs(a) for n, a in x.items()}, returns="out"))
    gradients_agree("ema", x, reference, returns=("out",), bound=lambda total: 4 * whole / smallest * total)
