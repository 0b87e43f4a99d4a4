"""What is read off an implementation's answers is what it computes: the right one as specified, the wrong ones with their own numbers."""

import dataclasses
import itertools
import re

import numpy as np
import planted
import planted_open
import planted_variants
import pytest
import test_false_alarms

from refattn import adapters, catalog
from refattn.candidate import Candidate, Inexpressible
from refattn.oracle import candidates, recover

pytestmark = pytest.mark.compiled

SOFTMAX = catalog.variant("softmax")
VISIBLE, SCORE, BIAS, SINK = "visible keys", "score as a function of q . k", "score as a function of the bias", "a sink adds to the denominator"
EMPTY, MASS, AXIS = "a query that sees no key returns", "sum of a row's weights", "weights sum to one over"
VALUES, KEYS, TOKEN = (f"key-value head and batch of a query head's {x}" for x in ("values", "keys", "score"))


def counted(candidate):
    """The candidate and a list that grows with every call."""
    calls = []
    return dataclasses.replace(candidate, call=lambda operands, params: (calls.append(0), candidate.call(operands, params))[1]), calls


def wrong(candidate, dtype="float32", variant=SOFTMAX, **fixed):
    return [f for f in recover.facts(variant, candidate, dtype, fixed) if not f.agrees]


def found(facts, subject, call=""):
    return [f.found for f in facts if f.subject == subject and call in f.call]


# ---- the right kernel ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [5, 16, planted.FAR])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_everything_about_the_right_kernel_is_as_specified_and_little_is_asked(dtype, tile):
    candidate, calls = counted(planted.candidate(planted.right(tile=tile)))
    facts = recover.facts(SOFTMAX, candidate, dtype)
    assert not [f for f in facts if not f.agrees]
    assert len(facts) == 35 and len(calls) <= 28
    assert [re.match(r"0\.(1|37|38)\d* times q . k, ", words) is not None for words in found(facts, SCORE)] == 3 * [True]


FIXED = (
    {"causal": True},
    {"causal": "top_left"},
    {"window": (5, 0)},
    {"window": (0, 0)},
    {"causal": True, "window": (3, None)},
    {"softcap": 3.0},
    {"scale": 8.0},
)


@pytest.mark.parametrize("fixed", FIXED, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_parameters_that_keep_one_value_are_asked_with_it(dtype, fixed):
    facts = recover.facts(SOFTMAX, planted.candidate(planted.RIGHT), dtype, fixed)
    assert len(facts) > 15 and all(f.agrees for f in facts)
    twice = planted.candidate(planted.right(factor=lambda scale, d, d_v, heads: 2 * planted.factor(scale, d, d_v, heads)))
    assert wrong(twice, dtype, **fixed) or fixed == {"window": (0, 0)}  # one key has weight 1 whatever its score


def test_float32_arithmetic_on_float64_operands_is_noticed_and_said_to_be_that():
    facts = wrong(planted.candidate(planted.RIGHT), "float64")
    assert {MASS, SCORE, BIAS} <= {f.subject for f in facts}
    assert all("; right if rounded to a relative 2e-07" in f.found for f in facts)


# ---- faults ------------------------------------------------------------------------------------------------------------------------

#: Fault -> (subject, part of the call, what is found).
READ = {
    "M1 top-left for bottom-right": (VISIBLE, "causal=True, T=24", "query i sees keys 0..i (aligned with the first key)"),
    "M1 bottom-right for top-left": (VISIBLE, "top_left", "query i sees keys 0..i+S-T (aligned with the last key)"),
    "M3 strictly earlier keys": (VISIBLE, "causal=True, T=24", "query i sees keys 0..i+S-T-1 (aligned with the last key)"),
    "M3 one key of the future": (VISIBLE, "causal=True, T=24", "query i sees keys 0..i+S-T+1 (aligned with the last key)"),
    "M4 causal of an earlier call": (VISIBLE, "causal=True, T=24", "every key; right in a call of a shape never asked before"),
    "M6 mask inverted": (VISIBLE, "mask", "the complement of the mask"),
    "M7 mask added as numbers": (VISIBLE, "window=(5, 0), T=24", r"query i sees keys 11..S-1; a key that should be hidden has 0\.37 times .*"),
    "M8 mask of batch 0": (VISIBLE, "mask", "the keys the mask of batch 0 allows"),
    "M8 mask of head 0": (VISIBLE, "mask", "the keys the mask of head 0 allows"),
    "M12 NaN on a row that sees nothing": (EMPTY, "mask", "NaN"),
    "M13 mean on a row that sees nothing": (EMPTY, "mask", "the mean of all values, hidden ones included"),
    "M15 -5e4 for minus infinity": ("weights of equal keys", "", "all 0 where q . k is -524288 and below"),
    "M19 tiny fill": (VISIBLE, "mask", "every key, whatever the mask says"),
    "M21 soft-cap after the mask": (VISIBLE, "softcap", "every key; a key that should be hidden has 0.0[56] times .*"),
    "W1 one key more": (VISIBLE, "window=(5, 0), T=24", "query i sees keys i+S-T-6..i+S-T (aligned with the last key)"),
    "W1 one key fewer": (VISIBLE, "window=(5, 0), T=24", "query i sees keys i+S-T-4..i+S-T (aligned with the last key)"),
    "W2 right side open": (VISIBLE, "window=(5, 0), T=24", r"query i sees keys i\+S-T-5..S-1 \(aligned with the last key\)"),
    "W3 sides exchanged": (VISIBLE, "window=(2, 3)", "query i sees keys i+S-T-3..i+S-T+2 (aligned with the last key)"),
    "W4 window at the top left": (VISIBLE, "window=(5, 0), T=24", "query i sees keys i-5..i (aligned with the first key)"),
    "W9 window lost": (VISIBLE, "window=(5, 0), T=24", "every key"),
    "H1 heads tiled": (VALUES, "", "0 1 0 1, its own batch"),
    "H14 keys of batch 0": (KEYS, "", "0 0 1 1, batch 0 0"),
    "H11 value width from the keys": ("value channel of an output channel", "E=44", "none for channels 20..43 of 44"),
    "S1 scale omitted": (SCORE, "T=24", r"1\.000+ times q . k, up to \d+"),
    "S2 multiplied by the root of d": (SCORE, "T=24", r"8\.00+ times q . k, up to \d+"),
    "S3 root of the value width": ("score per unit of q . k in each channel", "E=44", r"0\.1507\d* in every channel"),
    "S4 user's scale ignored": (SCORE, "scale=0.37", r"0\.1250+ times q . k, up to \d+"),
    "S5 scale of an earlier call": (SCORE, "scale=0.37", r"0\.1250+ times q . k, up to \d+; right in a call of a shape never asked before"),
    "S7 exp2 without log2(e)": (SCORE, "T=24", r"0\.0866\d* times q . k, up to \d+"),
    "S8 scale applied twice": (SCORE, "T=24", r"0\.0156\d* times q . k, up to \d+"),
    "S10 softmax over queries": (AXIS, "", "queries"),
    "S11 softmax over heads": (AXIS, "", "heads"),
    "S13 keys shifted by one": ("key that a query's score is with", "", "the key 1 before the value's"),
    "S14 no maximum subtracted": ("weights of equal keys", "", "all 0 where q . k is -1024 and below; NaN where q . k is 1024 and above"),
    "X1 not normalised": (MASS, "T=24, S=40", "n, the number of keys seen"),
    "X1 divided by the number of keys": (MASS, "causal=True", None),
    "X6 sink as a number": (SINK, "", "the sink itself, not its exponential"),
    "X8 sink counted by two splits": (SINK, "", None),
    "X9 sink dropped": (SINK, "", "nothing"),
    "X11 sink by another head": (SINK, "", "exp(sink) of heads 3 0 1 2"),
    "X11 sink of head 0": (SINK, "", "exp(sink) of heads 0 0 0 0"),
    "X12 soft-cap dropped": (SCORE, "softcap", r"0\.1250+ times q . k, up to \d+"),
    "X13 scores times tanh": (SCORE, "softcap", "neither a line nor a tanh of q . k, the same for either sign: .*"),
    "X13 no final multiplication": (SCORE, "softcap", r"0\.04[12]\d* times q . k, soft-capped at 1\.00+"),
    "X14 cap on unscaled scores": (SCORE, "softcap", r"0\.1[23]\d* times q . k, soft-capped at 0\.37\d*"),
    "P5 bias before the scale": (BIAS, "T=24", r"0\.1250+ times the bias, up to \d+"),
    "P5 bias added twice": (BIAS, "T=24", r"2\.00+ times the bias, up to \d+"),
    "L1 lse in base 2": ("lse", "T=24", "base 2"),
    "L2 lse without maximum": ("lse", "T=24", "natural of the row less its largest score"),
    "L2 lse without scale": ("lse", "T=24", r"1 times the natural one \+7 times the row's largest score"),
    "L3 lse of zero for an empty row": ("lse of a query that sees no key", "", "0"),
    "L4 lse of another head": ("lse", "T=24", None),
    "T1 padding in the denominator": (MASS, "T=24, S=40", "n / (n + 8), as if 8 more keys of score 0 were there (n seen) (a tile of 16)"),
    "T4 last partial tile dropped": (VISIBLE, "T=24, S=40", "query i sees keys 0..31"),
    "T4 first tile dropped": (VISIBLE, "T=24, S=40", "query i sees keys 16..S-1"),
    "T5 number of queries for keys": (VISIBLE, "T=24, S=40", "query i sees keys 0..23"),
    "T17 half of the values": ("value channel of an output channel", "", "none for channels 16..63 of 64, 16 later for channels 0..15"),
    "T18 width in whole eights": ("score per unit of q . k in each channel", "", r"0\.223\d*, but 0\.000+ in channels 16..19 of 20"),
    "R3 operand overwritten": ("operands after a call are", "", "overwritten: q"),
    "R4 keys of an earlier call": (SCORE, "T=24", "none of q . k at all; right in a call of a shape never asked before"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", READ)
def test_a_fault_is_read_off_with_its_own_numbers(fault, dtype):
    subject, call, says = READ[fault]
    read = found(wrong(planted.planted(fault), dtype), subject, call)
    assert read
    if says is not None:
        assert any(words == says or re.fullmatch(says, words) for words in read), read


#: Faults that no small call of these shows: strides, a sink so large that all else vanishes, no keys at all.
UNSEEN = {"H8 strides ignored", "X7 sink beside the maximum", "T7 NaN without keys"}


@pytest.mark.parametrize("fault", sorted(set(planted.FAULTS) - UNSEEN - set(READ)))
def test_hardly_any_other_fault_leaves_every_fact_right(fault):
    assert wrong(planted.planted(fault))


# ---- the open world --------------------------------------------------------------------------------------------------------------

OPEN = {
    "window two keys wider": (VISIBLE, "window=(5, 0), T=24", r"query i sees keys i\+S-T-7..i\+S-T .*"),
    "window two keys narrower": (VISIBLE, "window=(5, 0), T=24", r"query i sees keys i\+S-T-3..i\+S-T .*"),
    "window three keys wider to the right": (VISIBLE, "window=(5, 0), T=24", r"query i sees keys i\+S-T-5..i\+S-T\+3 .*"),
    "causal two keys late": (VISIBLE, "causal=True, T=24", r"query i sees keys 0..i\+S-T\+2 .*"),
    "causal three keys early": (VISIBLE, "causal=True, T=24", r"query i sees keys 0..i\+S-T-3 .*"),
    "cap half as large again": (SCORE, "softcap", r"0\.125\d* times q . k, soft-capped at 4\.50+"),
    "scores 1.07 times too large": (SCORE, "T=24", r"0\.1337\d* times q . k, up to \d+"),
    "scores 0.61 times too small": (SCORE, "T=24", r"0\.0762\d* times q . k, up to \d+"),
    "bias 1.3 times too large": (BIAS, "T=24", r"1\.300+ times the bias, up to \d+"),
    "sink half": (SINK, "", r"exp\(0\.(5|49\d) sink\)"),
    "first channel counted twice": ("score per unit of q . k in each channel", "", r"0\.223\d*, but 0\.447\d* in channels 0 of 20"),
    "directions instead of products": (SCORE, "T=24", r"the sign of q . k times (0\.99|1\.0)\d*, whatever its size"),
    "exponentials of the absolute score": (SCORE, "T=24", "neither a line nor a tanh of q . k, the same for either sign: .*"),
}  # fmt: skip


#: What no fact is about: values that are bent before they are averaged; and in bfloat16 a cap that is off by less than can be resolved.
UNSEEN = {("values warmed", "float32"), ("values warmed", "bfloat16"), ("cap a part in 250 too large", "bfloat16")}


@pytest.mark.parametrize("name, dtype", sorted(set(itertools.product(planted_open.CANDIDATES, ("float32", "bfloat16"))) - UNSEEN))
def test_what_no_catalogue_holds_is_read_off_all_the_same(name, dtype):
    candidate, _ = planted_open.CANDIDATES[name]
    facts = wrong(candidate, dtype)
    assert facts
    if name in OPEN:
        subject, call, says = OPEN[name]
        assert any(re.fullmatch(says, words) for words in found(facts, subject, call)), found(facts, subject, call)


def textbook(scores):
    """Softmax attention from a function of float32 queries and keys, both with all heads, to scores."""

    def call(operands, params):
        q, k, v = (operands[name].astype(np.float32) for name in "qkv")
        k, v = (planted.grouped(x, q.shape[1]) for x in (k, v))
        s = scores(q, k)
        p = np.exp(s - s.max(-1, keepdims=True))
        return (p / p.sum(-1, keepdims=True) @ v).astype(operands["v"].dtype)

    return Candidate("textbook", call, frozenset("qkv"))


def with_slopes(last):
    def scores(q, k):
        heads, n_q, n_k = *q.shape[1:3], k.shape[2]
        distance = np.abs(np.arange(n_k) - np.arange(n_q)[:, None] - (n_k - n_q if last else 0))
        slopes = 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
        return planted.products(q, k, q.shape[3] ** -0.5) - (slopes[:, None, None] * distance).astype(np.float32)

    return textbook(scores)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("last, where", [(True, "i+S-T"), (False, "i")])
def test_slopes_inside_are_read_off(last, where, dtype):
    (fact,) = wrong(with_slopes(last), dtype)
    assert fact.subject == "weights at equal scores" and f"per token between key and query {where} (heads 0..3)" in fact.found
    np.testing.assert_allclose(fact.values["found"], [2**-2, 2**-4, 2**-6, 2**-8], atol=1e-5 if dtype == "float32" else 2e-3)


def rotated(x, positions, theta, interleaved):
    angles = positions[:, None] * theta ** (-np.arange(0, x.shape[3], 2) / x.shape[3])
    cos, sin, half = np.cos(angles), np.sin(angles), x.shape[3] // 2
    one, two = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = [one * cos - two * sin, one * sin + two * cos]
    return (np.stack(turned, -1).reshape(x.shape) if interleaved else np.concatenate(turned, -1)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("interleaved, pairs", [(True, "(2m, 2m+1)"), (False, "(m, m+D/2)")])
@pytest.mark.parametrize("theta, last", [(10_000.0, True), (500_000.0, False)])
def test_a_rotation_inside_is_read_off(theta, last, interleaved, pairs, dtype):
    def scores(q, k):
        start = k.shape[2] - q.shape[2] if last else 0
        q, k = (rotated(x, first + np.arange(x.shape[2]), theta, interleaved) for x, first in ((q, start), (k, 0)))
        return planted.products(q, k, q.shape[3] ** -0.5)

    (fact,) = [f for f in wrong(textbook(scores), dtype) if f.subject == "rotation of queries and keys"]
    assert fact.specified == "none" and fact.found.startswith(f"channels {pairs}")
    assert fact.found.endswith("query i at position i" + ("+S-T" if last else ""))
    assert float(re.search(r"theta ([\d.e+]+)", fact.found)[1]) == pytest.approx(theta, rel=0.02)


# ---- other people's, and other variants' -----------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_pytorch_computes_what_is_specified(dtype):
    facts = recover.facts(SOFTMAX, adapters.load("torch"), dtype)
    assert len(facts) > 20 and all(f.agrees for f in facts)


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", [test_false_alarms.llama, test_false_alarms.gemma2, test_false_alarms.gpt_oss])
def test_transformers_eager_attention_computes_what_is_specified(model, dtype):
    """Operation by operation in narrow formats; and one of them answers nothing without sinks."""
    candidate = candidates.candidate(model, SOFTMAX, "torch")
    facts = recover.facts(SOFTMAX, candidate, dtype, {"empty_rows": "uniform"}, "eager")
    assert len(facts) > 20 and all(f.agrees for f in facts)
    assert found(facts, EMPTY) == ["0" if model is test_false_alarms.gpt_oss else "the mean of all values, hidden ones included"]


@pytest.mark.parametrize("name", planted_variants.TRANSCRIPTIONS)
def test_every_variant_is_read_as_specified(name):
    for dtype in ("float32", "float64"):
        assert transcription(name, "", dtype)
        assert all(f.agrees for f in transcription(name, "", dtype))


def transcription(name, fault, dtype="float32"):
    variant = catalog.variant(name)
    candidate = candidates.candidate(planted_variants.transcription(name, fault), variant, returns=planted_variants.TRANSCRIPTIONS[name][1])
    return recover.facts(variant, candidate, dtype)


#: (variant, fault) -> (subject, what is found).
OF_VARIANTS = {
    ("article_sdpa", "the axis that was meant"): (AXIS, "keys"),
    ("linear", "own key not seen"): (VISIBLE, "query i sees keys 0..i+S-T-1 (aligned with the last key)"),
    ("linear", "not normalised"): (MASS, None),
    ("luong_dot", "scaled"): (SCORE, r"0\.1250+ times q . k, up to \d+"),
    ("multi_head", "value's tokens from the key"): ("tokens of value that an output depends on", "no key"),
    ("relu", "power ignored"): ("weight as a function of q . k", None),
    ("retention", "decay dropped"): ("weights at equal scores", "all alike"),
    ("retention", "heads tiled"): (VALUES, "0 1 0 1, its own batch"),
    ("sigmoid", "normalised"): (AXIS, "keys"),
    ("sparsemax", "1.5-entmax"): ("weight as a function of q . k", None),
}


@pytest.mark.parametrize("name, fault", OF_VARIANTS)
def test_faults_of_other_variants_are_read_off(name, fault):
    subject, says = OF_VARIANTS[name, fault]
    read = found([f for f in transcription(name, fault) if not f.agrees], subject)
    assert read and (says is None or any(words == says or re.fullmatch(says, words) for words in read)), read


# ---- implementations that do not answer ------------------------------------------------------------------------------------------


def refusing(trouble, when):
    """The right kernel, but that it raises where `when` of the operands and parameters."""
    right = planted.candidate(planted.RIGHT)

    def call(operands, params):
        if when(operands, params):
            raise trouble
        return right.call(operands, params)

    return dataclasses.replace(right, call=call)


@pytest.mark.parametrize("trouble", [Inexpressible("no"), NotImplementedError(), ZeroDivisionError(), KeyError("q")], ids=repr)
def test_what_is_declined_or_fails_tells_nothing(trouble):
    assert recover.facts(SOFTMAX, refusing(trouble, lambda operands, params: True), "float32") == ()
    partly = recover.facts(SOFTMAX, refusing(trouble, lambda operands, params: params["causal"] or "bias" in operands), "float32")
    assert partly and all(f.agrees and "causal=" not in f.call and "bias" not in f.call for f in partly)


@pytest.mark.parametrize("answer", [None, np.zeros(3), (np.zeros(3), np.zeros(3)), "text"], ids=["none", "shape", "shapes", "text"])
def test_answers_of_another_shape_tell_nothing(answer):
    assert recover.facts(SOFTMAX, dataclasses.replace(planted.candidate(planted.RIGHT), call=lambda operands, params: answer), "float32") == ()


def test_nothing_but_nan_is_said_to_be_that():
    def call(operands, params):
        out, lse = planted.attend(planted.RIGHT, **operands, **params)
        return np.full_like(out, np.nan), np.full_like(lse, np.nan)

    facts = wrong(dataclasses.replace(planted.candidate(planted.RIGHT), call=call))
    assert facts


def test_an_answer_that_differs_from_time_to_time_is_noticed():
    rng = np.random.default_rng(0)
    right = planted.candidate(planted.RIGHT)

    def call(operands, params):
        out, lse = right.call(operands, params)
        return out * (1 + rng.uniform(-1e-7, 1e-7, out.shape)).astype(out.dtype), lse

    facts = wrong(dataclasses.replace(right, call=call))
    assert {(f.subject, f.found) for f in facts} == {("the same call gives", "other bits")}


def test_one_width_for_keys_and_values_is_enough():
    """As jax.nn.dot_product_attention has it."""
    facts = recover.facts(SOFTMAX, refusing(ValueError(), lambda operands, params: operands["k"].shape != operands["v"].shape), "float32")
    assert all(f.agrees for f in facts) and len(facts) == 35


def test_facts_carry_pictures():
    (fact, *_) = wrong(planted.planted("W1 one key more"))
    assert fact.values["found"].shape == fact.values["specified"].shape == (4, 24, 40)
    assert fact.values["found"].dtype == bool and (fact.values["found"] & ~fact.values["specified"]).sum() == 4 * 24
    (masked,) = wrong(planted.planted("M8 mask of batch 0"))
    assert masked.values["found"].shape == (4, 24, 40) and (masked.values["found"] != masked.values["specified"]).mean() > 0.3
    curve = next(f for f in recover.facts(SOFTMAX, planted.candidate(planted.RIGHT), "float32") if f.subject == SCORE)
    np.testing.assert_allclose(curve.values["found"], curve.values["x"] / 8, atol=1e-3)
