"""Each variant against something nobody here wrote.

Where a library has the whole operation, it is called: torch's nn.MultiheadAttention, its scaled_dot_product_attention for luong_dot, ONNX's
reference evaluator, transformers' MiniMax layer, the normalisers of the entmax package.  For the rest the operation is composed from a
library's own operations in another formulation than the definition's: batched matrix products, masked_fill, nn.Linear, F.bilinear,
F.cosine_similarity, elu, sigmoid, relu.

Both sides round, so a tolerance is twice the worst-case error of one: unit roundoff x roundings x the sum of the absolute values of what is
added, to first order.  An error e in a score is a relative error of at most 2e in a softmax weight (numerator and denominator), of at
most e in a sigmoid.
"""

import math

import numpy as np
import pytest

import refattn as ra
from refattn.pieces.similarities import additive, bilinear, concat, cosine, dot

pytestmark = pytest.mark.peer

DOUBLE, SINGLE = 2.0**-53, 2.0**-24
FUNCTION = 4  # roundings that an exp, tanh or sigmoid of a library counts for: 4 half units in the last place


def numbers(seed, *shape):
    """Seeded normals with an outlier."""
    x = np.random.default_rng(seed).standard_normal(shape)
    x.flat[-1] *= 5.0
    return x


def assert_within(theirs, ours, tolerance):
    error = np.abs(np.asarray(theirs, np.float64) - ours)
    tolerance = np.broadcast_to(tolerance, error.shape)
    assert error.shape == ours.shape
    assert np.all(np.isfinite(ours))
    worst = np.unravel_index(np.argmax(error - tolerance), error.shape)
    assert np.all(error <= tolerance), f"at {worst}: theirs {np.asarray(theirs)[worst]}, ours {ours[worst]}, tolerance {tolerance[worst]}"


def softmax_tolerance(score_error, weights, v, axis=-1):
    """For the weights, and for the output as the sum of weights times `v`; `score_error` is one side's, in units of DOUBLE."""
    n = weights.shape[axis]
    relative = 2 * DOUBLE * (2 * np.max(score_error, axis=axis, keepdims=True) + FUNCTION + n + 2)
    of_weights = relative * weights
    return of_weights, of_weights @ np.abs(v) + 2 * DOUBLE * weights.shape[-1] * (weights @ np.abs(v))


@pytest.mark.parametrize("self_attention", [True, False])
def test_multi_head_is_torch_multihead_attention(self_attention):
    import torch

    heads, width, n_q, n_k = 3, 12, 5, 5 if self_attention else 7
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.in_proj_bias)
    torch.nn.init.normal_(layer.out_proj.bias)
    query = numbers(1, 2, n_q, width)
    key, value = (query, query) if self_attention else (numbers(2, 2, n_k, width), numbers(3, 2, n_k, width))
    visible = np.random.default_rng(4).random((n_q, n_k)) < 0.6
    visible[:, 0] = True
    inputs = (torch.from_numpy(x) for x in (query, key, value))
    with torch.no_grad():
        out, weights = layer(*inputs, attn_mask=torch.from_numpy(~visible), average_attn_weights=False)  # there True hides
    parameters = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    w_q, w_k, w_v = (w.reshape(heads, -1, width).transpose(0, 2, 1) for w in np.split(parameters["in_proj_weight"], 3))
    b_q, b_k, b_v = (b.reshape(heads, -1) for b in np.split(parameters["in_proj_bias"], 3))
    w_o, b_o = parameters["out_proj.weight"].T.reshape(heads, -1, width), parameters["out_proj.bias"]
    ours, our_weights = ra.attend("multi_head", query, key, value, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, mask=visible, returns=("out", "weights"))

    largest_q, largest_k, largest_v = (
        np.einsum("bnm,hmd->bhnd", np.abs(x), np.abs(w)) + np.abs(b)[:, None] for x, w, b in ((query, w_q, b_q), (key, w_k, b_k), (value, w_v, b_v))
    )
    d = width // heads
    score_error = (2 * (width + 1) + d + 2) * dot.amplitude(largest_q, largest_k) / math.sqrt(d)
    of_weights, of_heads = softmax_tolerance(np.where(visible, score_error, 0.0), our_weights, largest_v)
    of_heads += 2 * DOUBLE * (width + 1) * (our_weights @ largest_v)
    summed = np.einsum("bhne,hem->bnm", our_weights @ largest_v, np.abs(w_o)) + np.abs(b_o)
    assert_within(weights, our_weights, of_weights)
    assert_within(out, ours, np.einsum("bhne,hem->bnm", of_heads, np.abs(w_o)) + 2 * DOUBLE * (width + 1) * summed)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_article_sdpa_is_the_printed_class(training, masked):
    import torch
    from torch import nn

    class Attention(nn.Module):  # as the article prints it, section 4, with the import it lacks
        def __init__(self, embed_dim):
            super().__init__()
            self.embed_dim = embed_dim
            self.linear = nn.Linear(embed_dim, embed_dim)

        def forward(self, q, k, v, mask=None):
            scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.embed_dim)
            if mask is not None:
                scores = scores.masked_fill(mask == 0, -1e9)
            p_attn = torch.softmax(scores, dim=1)
            attn_weights = torch.softmax(scores, dim=1) if self.training else p_attn
            output = torch.matmul(attn_weights, v)
            return output, attn_weights

    q, k, v = numbers(1, 2, 5, 8), numbers(2, 2, 7, 8), numbers(3, 2, 7, 3)
    mask = np.random.default_rng(4).integers(0, 2, (2, 5, 7))
    mask[0, :, 2] = 0  # a key hidden from every query
    mask[1, 3, :] = 0  # a query to which every key is hidden
    given = (mask,) if masked else ()
    with torch.no_grad():
        out, weights = Attention(8).train(training)(*(torch.from_numpy(x) for x in (q, k, v, *given)))
    ours, our_weights = ra.attend("article_sdpa", q, k, v, *given)
    score_error = (dot.roundings(8, 8) + 2) * dot.amplitude(q, k) / math.sqrt(8)
    if masked:
        score_error[mask == 0] = 0.0  # -1e9 exactly, on both sides
    of_weights, of_out = softmax_tolerance(score_error, our_weights, v, axis=1)
    assert_within(weights, our_weights, of_weights)
    assert_within(out, ours, of_out)
    if masked:
        assert np.all(our_weights[0, :, 2] == 0.2)
        assert np.all(np.asarray(weights)[0, :, 2] == 0.2)


def test_cosine_residual_is_torch_cosine_similarity_softmaxed():
    import torch
    import torch.nn.functional as F

    v = numbers(1, 2, 7, 5)
    v[1, 3] = 0.0
    tokens = torch.from_numpy(v)
    scores = F.cosine_similarity(tokens[:, :, None], tokens[:, None, :], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    out = tokens + torch.bmm(weights, tokens)
    ours, our_weights, our_scores = ra.attend("cosine_residual", v, returns=("out", "weights", "scores"))
    score_error = cosine.roundings(5, 5) * cosine.amplitude(v, v)
    of_weights, of_out = softmax_tolerance(score_error, our_weights, v)
    assert_within(scores, our_scores, 2 * DOUBLE * score_error)
    assert_within(weights, our_weights, of_weights)
    assert_within(out, ours, of_out + 2 * DOUBLE * np.abs(ours))


def seq2seq(d_q, d_k):
    """Operands and a mask for the attentions of the recurrent age; every query sees key 0."""
    visible = np.random.default_rng(4).random((2, 5, 7)) < 0.6
    visible[:, :, 0] = True
    return numbers(1, 2, 5, d_q), numbers(2, 2, 7, d_k), numbers(3, 2, 7, 3), visible


def check_scored(scores, name, operands, score_error):
    """Softmax and context vector by torch from the given scores, against the variant of that name."""
    import torch

    v, visible = operands["v"], operands["mask"]
    hidden = torch.from_numpy(~visible)
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
    out = torch.bmm(weights, torch.from_numpy(v))
    ours, our_weights, our_scores = ra.attend(name, **operands, returns=("out", "weights", "scores"))
    of_weights, of_out = softmax_tolerance(np.where(visible, score_error, 0.0), our_weights, v)
    assert_within(scores.numpy()[visible], our_scores[visible], 2 * DOUBLE * score_error[visible])
    assert np.all(our_scores[~visible] == -np.inf)
    assert_within(weights, our_weights, of_weights)
    assert_within(out, ours, of_out)


@pytest.mark.parametrize("bias", [True, False])
def test_additive_is_two_torch_linears_and_a_tanh(bias):
    import torch

    q, k, v, visible = seq2seq(4, 6)
    torch.manual_seed(0)
    from_query = torch.nn.Linear(4, 9, bias=bias, dtype=torch.float64)  # any bias is the hidden layer's, put in with the query
    from_key = torch.nn.Linear(6, 9, bias=False, dtype=torch.float64)
    to_score = torch.nn.Linear(9, 1, bias=False, dtype=torch.float64)
    torch.nn.init.normal_(to_score.weight)
    with torch.no_grad():
        hidden = torch.tanh(from_query(torch.from_numpy(q))[:, :, None] + from_key(torch.from_numpy(k))[:, None])
        scores = to_score(hidden)[..., 0]
    w_q, w_k, w = from_query.weight.detach().numpy(), from_key.weight.detach().numpy(), to_score.weight.detach().numpy()[0]
    b = from_query.bias.detach().numpy() if bias else None
    absent = np.zeros(9) if b is None else b
    error = (additive.roundings(4, 6, 4, 6, 9, 9) + FUNCTION) * additive.amplitude(q, k, w_q, w_k, w, absent)
    check_scored(scores, "additive", {"q": q, "k": k, "v": v, "w_q": w_q, "w_k": w_k, "w": w, "b": b, "mask": visible}, error)


def test_luong_concat_is_a_torch_linear_on_the_concatenation():
    import torch

    q, k, v, visible = seq2seq(4, 6)
    weight, w = numbers(5, 9, 10) / 3.0, numbers(6, 9)
    pairs = torch.cat([torch.from_numpy(q)[:, :, None].expand(2, 5, 7, 4), torch.from_numpy(k)[:, None].expand(2, 5, 7, 6)], dim=-1)
    scores = torch.tanh(torch.nn.functional.linear(pairs, torch.from_numpy(weight))) @ torch.from_numpy(w)
    error = (concat.roundings(4, 6, 10, 9) + FUNCTION) * concat.amplitude(q, k, weight, w)
    check_scored(scores, "luong_concat", {"q": q, "k": k, "v": v, "weight": weight, "w": w, "mask": visible}, error)


def test_luong_general_is_torch_bilinear():
    import torch

    q, k, v, visible = seq2seq(4, 6)
    w = numbers(5, 4, 6)
    every_q = torch.from_numpy(q)[:, :, None].expand(2, 5, 7, 4).contiguous()
    every_k = torch.from_numpy(k)[:, None].expand(2, 5, 7, 6).contiguous()
    scores = torch.nn.functional.bilinear(every_q, every_k, torch.from_numpy(w)[None])[..., 0]
    error = bilinear.roundings(4, 6, 6) * bilinear.amplitude(q, k, w)
    check_scored(scores, "luong_general", {"q": q, "k": k, "v": v, "w": w, "mask": visible}, error)


def test_luong_dot_is_torch_sdpa_of_scale_1():
    import torch
    import torch.nn.functional as F

    q, k, v, visible = seq2seq(4, 4)
    operands = (torch.from_numpy(x) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*operands, attn_mask=torch.from_numpy(visible), scale=1.0)
    ours, our_weights = ra.attend("luong_dot", q, k, v, visible, returns=("out", "weights"))
    # torch multiplies queries and keys by sqrt(scale) each: two roundings more.
    score_error = np.where(visible, (dot.roundings(4, 4) + 2) * dot.amplitude(q, k), 0.0)
    assert_within(out, ours, softmax_tolerance(score_error, our_weights, v)[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [None, 0.25])
def test_sigmoid_is_torch_sigmoid_of_the_scores(causal, shift):
    import torch

    q, k, v, bias = numbers(1, 2, 4, 5, 8), numbers(2, 2, 2, 7, 8), numbers(3, 2, 2, 7, 3), numbers(4, 4, 5, 7)
    keys, values = (torch.from_numpy(x).repeat_interleave(2, dim=1) for x in (k, v))
    added = -math.log(7) if shift is None else shift
    logits = torch.from_numpy(q) @ keys.mT / math.sqrt(8) + torch.from_numpy(bias) + added
    weights = torch.sigmoid(logits)
    if causal:
        weights = weights.tril(diagonal=2)  # S - T
    out = weights @ values
    ours, our_weights = ra.attend("sigmoid", q, k, v, bias, causal=causal, shift=shift, returns=("out", "weights"))
    score_error = (dot.roundings(8, 8) + 4) * dot.amplitude(q, np.repeat(k, 2, axis=1)) / math.sqrt(8) + 2 * (np.abs(bias) + abs(added))
    of_weights = 2 * DOUBLE * (score_error + FUNCTION + 2) * our_weights
    size = np.abs(np.repeat(v, 2, axis=1))
    assert_within(weights, our_weights, of_weights)
    assert_within(out, ours, of_weights @ size + 2 * DOUBLE * 8 * (our_weights @ size))


def everyday_call():
    """Operands with two query heads to a key-value head, and scores by torch whose hidden entries, by causality and a mask, are -inf."""
    visible = np.random.default_rng(5).random((4, 5, 7)) < 0.7
    visible[..., 0] = True
    operands = {"q": numbers(1, 2, 4, 5, 8), "k": numbers(2, 2, 2, 7, 8), "v": numbers(3, 2, 2, 7, 3), "bias": numbers(4, 4, 5, 7)}
    return operands, visible


def everyday_scores(leaves, visible):
    import torch

    scores = leaves["q"] @ leaves["k"].repeat_interleave(2, dim=1).mT / math.sqrt(8) + leaves["bias"]
    return scores.masked_fill(~torch.from_numpy(np.tril(visible, 2)), -math.inf)  # S - T


def everyday_score_error(operands):
    return (dot.roundings(8, 8) + 4) * dot.amplitude(operands["q"], np.repeat(operands["k"], 2, axis=1)) / math.sqrt(8) + 2 * np.abs(operands["bias"])


def leaves_of(operands):
    import torch

    return {name: torch.tensor(x, requires_grad=True) for name, x in operands.items()}


def assert_gradients_agree(name, operands, leaves, out, **params):
    """Of a random combination of the outputs' elements, through torch and by differences of the definition."""
    import torch

    d_out = numbers(9, *out.shape)
    (out * torch.from_numpy(d_out)).sum().backward()
    found = ra.gradients(name, **operands, **params, d_out=d_out, backend="definition")
    for operand, leaf in leaves.items():
        expected = leaf.grad.numpy()
        # One element sums no more than B Hq T S products of score gradients, and those as many of E values and S weights.
        tolerance = found.errors["d_" + operand] + DOUBLE * (2 * 4 * 5 * 7 + 3 + 7) * np.abs(expected).max()
        assert_within(expected, getattr(found, "d_" + operand), tolerance)


@pytest.mark.parametrize("bisected", [False, True])
@pytest.mark.parametrize("name, power", [("sparsemax", 1), ("entmax15", 2)])
def test_sparse_weights_are_those_of_the_entmax_package(name, power, bisected):
    import entmax

    operands, visible = everyday_call()
    leaves = leaves_of(operands)
    scores = everyday_scores(leaves, visible)
    weights = entmax.entmax_bisect(scores, alpha=1 + 1 / power) if bisected else getattr(entmax, name)(scores, dim=-1)
    out = weights @ leaves["v"].repeat_interleave(2, dim=1)
    params = {"mask": visible, "causal": True}
    ours, our_weights, threshold = ra.attend(name, **operands, **params, returns=("out", "weights", "threshold"))
    seen = np.isfinite(scores.detach().numpy())
    # A threshold moves no more than the score that moves most.  Its own roundings: of at most 7 numbers within 1 of the maximum and their
    # squares, two at a time; three times that for a key at the threshold.  Bisection halves an interval of 1 fifty times.
    moved = 2 * DOUBLE * np.max(np.where(seen, everyday_score_error(operands), 0.0), axis=-1, keepdims=True)
    rounded = 2 * DOUBLE * (3 * (7 + 4) * (2 * 7 + 1) + np.abs(threshold[..., None])) + 2.0**-50 * 7 * bisected
    of_weights = np.where(seen, power * (2 * moved + rounded), 0.0)
    size = np.abs(np.repeat(operands["v"], 2, axis=1))
    assert 0.2 < np.mean(our_weights[np.broadcast_to(seen, our_weights.shape)] == 0.0) < 0.9
    assert_within(weights.detach(), our_weights, of_weights)
    assert_within(out.detach(), ours, of_weights @ size + 2 * DOUBLE * 8 * (our_weights @ size))
    if not bisected:
        assert_gradients_agree(name, operands, leaves, out, **params)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("divisor", [None, 2.5])
def test_relu_is_torch_relu_of_the_scores(divisor, power):
    import torch

    operands, visible = everyday_call()
    leaves = leaves_of(operands)
    scores = everyday_scores(leaves, visible)
    weights = torch.relu(scores).pow(power) / (7 if divisor is None else divisor)
    out = weights @ leaves["v"].repeat_interleave(2, dim=1)
    params = {"mask": visible, "causal": True, "power": power, "divisor": divisor}
    ours, our_weights, our_scores = ra.attend("relu", **operands, **params, returns=("out", "weights", "scores"))
    largest = np.where(np.isfinite(our_scores), np.abs(our_scores), 0.0)
    error = np.where(np.isfinite(our_scores), everyday_score_error(operands), 0.0)
    of_weights = 2 * DOUBLE * (power * error * largest ** (power - 1) + (FUNCTION + power) * largest**power) / (7 if divisor is None else divisor)
    size = np.abs(np.repeat(operands["v"], 2, axis=1))
    assert_within(weights.detach(), our_weights, of_weights)
    assert_within(out.detach(), ours, of_weights @ size + 2 * DOUBLE * 8 * (our_weights @ size))
    assert_gradients_agree("relu", operands, leaves, out, **params)


def features(x):
    return np.where(x > 0.0, x + 1.0, np.exp(np.minimum(x, 0.0)))


def linear_tolerance(q, k, v, causal, eps, unit, roundings):
    """For a quotient of sums of products of features, each of those within 4 units of max(feature, 1): elu + 1 is exp - 1 + 1 elsewhere."""
    phi_q, phi_k = features(q), np.repeat(features(k), 3, axis=1)
    size = np.abs(np.repeat(v, 3, axis=1))
    similarity, largest = phi_q @ phi_k.swapaxes(-1, -2), np.maximum(phi_q, 1.0) @ np.maximum(phi_k, 1.0).swapaxes(-1, -2)
    if causal:
        offset = k.shape[2] - q.shape[2]
        similarity, largest = np.tril(similarity, offset), np.tril(largest, offset)
    total = similarity.sum(-1, keepdims=True) + eps
    error = 2 * unit * (roundings + 8) * largest
    return (error @ size + error.sum(-1, keepdims=True) * (similarity @ size) / total) / total + 8 * unit * (similarity @ size) / total


@pytest.mark.parametrize("causal", [False, True])
def test_linear_is_torch_elu_and_matmul(causal):
    import torch
    import torch.nn.functional as F

    q, k, v = numbers(1, 2, 6, 5, 4), numbers(2, 2, 2, 7, 4), numbers(3, 2, 2, 7, 3)
    keys, values = (torch.from_numpy(x).repeat_interleave(3, dim=1) for x in (k, v))
    similarity = (F.elu(torch.from_numpy(q)) + 1) @ (F.elu(keys) + 1).mT
    if causal:
        similarity = similarity.tril(diagonal=2)  # S - T
    out = similarity @ values / (similarity.sum(-1, keepdim=True) + 1e-6)
    ours = ra.attend("linear", q, k, v, causal=causal, backend="definition")
    assert_within(out, ours, linear_tolerance(q, k, v, causal, 1e-6, DOUBLE, roundings=4 + 7 + 2))


def onnx_linear_attention(rule, q, k, v, decay=None, state=None):
    """ONNX's reference evaluator on (B, H, T, D) arrays, in float32 and with scale 1: output and state."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    def packed(x):
        return np.ascontiguousarray(x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1), np.float32)

    feeds = {"query": packed(q), "key": packed(k), "value": packed(v)}
    if state is not None:
        feeds["past_state"] = state.astype(np.float32)
    if decay is not None:
        feeds["decay"] = np.broadcast_to(np.log(decay), (q.shape[0], q.shape[2], len(decay))).astype(np.float32)
    names = ["query", "key", "value", "past_state" if state is not None else "", "decay" if decay is not None else ""]
    while not names[-1]:
        names.pop()
    node = helper.make_node("LinearAttention", names, ["out", "state"], update_rule=rule, q_num_heads=q.shape[1], kv_num_heads=k.shape[1], scale=1.0)
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in feeds]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("out", "state")]
    model = helper.make_model(helper.make_graph([node], "peer", inputs, outputs), opset_imports=[helper.make_opsetid("", 27)])
    out, state = ReferenceEvaluator(model).run(None, feeds)
    return out.reshape(q.shape[0], q.shape[2], q.shape[1], -1).swapaxes(1, 2).astype(np.float64), state


def test_linear_is_a_quotient_of_two_onnx_linear_attentions():
    q, k, v = (x.astype(np.float32).astype(np.float64) for x in (numbers(1, 2, 6, 5, 4), numbers(2, 2, 2, 5, 4), numbers(3, 2, 2, 5, 3)))
    numerator, _ = onnx_linear_attention("linear", features(q), features(k), v)
    denominator, _ = onnx_linear_attention("linear", features(q), features(k), np.ones((2, 2, 5, 1)))
    ours = ra.attend("linear", q, k, v, causal=True, eps=0.0, backend="definition")
    assert_within(numerator / denominator, ours, linear_tolerance(q, k, v, True, 0.0, SINGLE, roundings=4 + 5 + 2))


def retention_tolerance(q, k, v, decay, initial_state, scale, unit, per_step):
    """All terms have their absolute values' sum for a size; each goes through `per_step` roundings a token, and an inner product of D."""
    sizes = ra.attend("retention", np.abs(q), np.abs(k), np.abs(v), decay, np.abs(initial_state), scale=scale, returns=("out", "state"))
    n, d = q.shape[2:]
    return tuple(2 * unit * (per_step * n + d + 4) * size for size in sizes)


def test_retention_is_onnx_gated_linear_attention():
    q, k, v, state = numbers(1, 2, 6, 9, 4), numbers(2, 2, 2, 9, 4), numbers(3, 2, 2, 9, 3), numbers(4, 2, 2, 4, 3)
    q, k, v, state = (x.astype(np.float32).astype(np.float64) for x in (q, k, v, state))
    decay = np.array([0.8, 1.0])
    out, last = onnx_linear_attention("gated", q, k, v, decay, state)
    ours, our_last = ra.attend("retention", q, k, v, decay, state, scale=1.0, backend="definition", returns=("out", "state"))
    of_out, of_state = retention_tolerance(q, k, v, decay, state, 1.0, SINGLE, per_step=FUNCTION + 3)
    assert_within(out, ours, of_out)
    assert_within(last, our_last, of_state)


def test_retention_is_the_lightning_attention_of_minimax():
    """In blocks of 4 tokens, which the definition does not know."""
    import torch
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=10, num_attention_heads=3, head_dim=4, num_hidden_layers=2, block_size=4, layer_types=["linear_attention", "full_attention"]
    )
    torch.manual_seed(0)
    layer = MiniMaxLightningAttention(config, layer_idx=0).double()
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)  # again, now in float64
    layer.norm = layer.out_proj = torch.nn.Identity()
    torch.nn.init.zeros_(layer.output_gate.weight)  # a gate of 1/2
    hidden = torch.from_numpy(numbers(1, 2, 11, 10))
    with torch.no_grad():
        torch.nn.init.normal_(layer.qkv_proj.weight)
        halved, last = layer(hidden, None, None)
        projected = layer.act_fn(layer.qkv_proj(hidden)).reshape(2, 11, 3, 12).transpose(1, 2).numpy()
    out = 2.0 * halved.reshape(2, 11, 3, 4).transpose(1, 2).numpy()
    q, k, v = np.split(projected, 3, axis=-1)
    decay = np.exp(-layer.slope_rate.numpy().ravel())
    ours, our_last = ra.attend("retention", q, k, v, decay, scale=1.0, backend="definition", returns=("out", "state"))
    # A power of the decay is one exponential of slope x tokens there: FUNCTION and the rounded exponent, no more than one per token.
    of_out, of_state = retention_tolerance(q, k, v, decay, np.zeros((2, 3, 4, 4)), 1.0, DOUBLE, per_step=FUNCTION + 3)
    assert_within(out, ours, of_out)
    assert_within(last, our_last, of_state)
