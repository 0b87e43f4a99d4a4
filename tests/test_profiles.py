"""Every field of a profile moves a tolerance the right way, and each way of computing stays within the profile that describes it."""

from dataclasses import fields, replace
from pathlib import Path

import backward
import ml_dtypes
import numpy as np
import planted
import pytest

import refattn as ra
from refattn import catalog
from refattn.candidate import Candidate
from refattn.oracle import profiles
from refattn.oracle.calibrate import calibrated
from refattn.precision import as_dtype, round_to
from refattn.spec import shape

pytestmark = pytest.mark.compiled

SOFTMAX = catalog.variant("softmax")
F32 = np.float32


def drawn(dtype, n=300, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    shapes = (1, 2, 24, 32), (1, 1, n, 32), (1, 1, n, 32), (1, 2, 24, 32)
    q, k, v, d_out = (round_to(rng.standard_normal(shape) + offset * (m == 2), as_dtype(dtype)) for m, shape in enumerate(shapes))
    return (q, k, v), d_out


OPERANDS, D_OUT = drawn("float32")  # so that results are hardly rounded, whatever the profile says of what comes before
SHIFTED, _ = drawn("float32", offset=5.0)
FLASH = profiles.resolve("flash", as_dtype("bfloat16"))
WIDE = replace(FLASH, probabilities=0.0, smallest_probability=0.0, intermediate=0.0, gradient_scores=0.0)

#: Field -> a value that rounds more than flash does, and outputs whose tolerance that widens.
COARSER = {
    "accumulate": (2.0**-11, {"out", "lse", "d_q", "d_k", "d_v"}),
    "products": (2.0**-12, {"out", "d_q", "d_k", "d_v"}),
    "block": (4, {"out"}),
    "operands": (2.0**-8, {"out", "lse", "d_q", "d_k"}),
    "scores": (2.0**-8, {"out", "lse"}),
    "distances": (2.0**-8, {"out", "lse"}),
    "probabilities": (2.0**-4, {"out", "d_v"}),
    "smallest_probability": (2.0**-10, {"out", "d_v"}),
    "exp_error": (2.0**-8, {"out", "lse"}),
    "tanh_error": (2.0**-6, {"out", "d_q", "d_k"}),
    "log_error": (2.0**-8, {"lse"}),
    "tile": (1, {"out", "lse"}),
    "splits": (100, {"out", "lse"}),
    "intermediate": (2.0**-4, {"d_q", "d_k", "d_v"}),
    "lse": (2.0**-8, {"d_q", "d_k", "d_v"}),
    "weights_kept": (True, {"d_q", "d_k"}),
    "gradient_weights": (2.0**-6, {"d_q", "d_k"}),
    "gradient_scores": (2.0**-6, {"d_q", "d_k"}),
    "gradient_tile": (1, {"d_q", "d_k", "d_v"}),
}
#: Fields of recurrences -> from what is rounded most to what is rounded least.
STATES = {
    "state": (2.0**-8, 2.0**-11, 0.0),
    "state_every": (1, 16, 64),
    "chunk": (64, 16, 1),
}
FINER = {"order": "tree", "extra_bits": 6, "normalised": False, "sum_rounded": True}


def allowed(profile, operands=OPERANDS):
    return ra.tolerance("softmax", *operands, d_out=D_OUT, profile=profile, softcap=9.0)


def test_each_field_is_examined_here():
    assert {*COARSER, *STATES, *FINER, "name", "source"} == {f.name for f in fields(profiles.Profile)}


@pytest.mark.parametrize("field", COARSER)
def test_whoever_rounds_more_is_allowed_more_where_it_matters(field):
    value, wider = COARSER[field]
    base = FLASH if field in ("gradient_tile", "weights_kept", "smallest_probability") else WIDE
    usual, coarse = allowed(base), allowed(replace(base, **{field: value}))
    for name in ("out", "lse", "d_q", "d_k", "d_v"):
        before, after = getattr(usual, name), getattr(coarse, name)
        assert field == "block" or np.all(after >= before * (1 - 1e-12)), name  # cut off in blocks, or to nearest one by one
        assert name not in wider or after.mean() > 1.001 * before.mean(), name


@pytest.mark.parametrize("field", STATES)
def test_a_state_that_is_rounded_less_is_allowed_less(field):
    variant = catalog.variant("gated_delta")
    sizes = {"B": 1, "Hq": 2, "Hkv": 2, "T": 150, "D": 8, "E": 8}
    rng = np.random.default_rng(0)
    operands = {o.name: o.draw(rng, shape(o.axes, sizes)).astype(np.float32) for o in variant.operands}
    base = profiles.resolve("recurrent", as_dtype("float32"))
    base = replace(base, state=2.0**-8) if field == "state_every" else base
    wide, less, least = (ra.tolerance("gated_delta", **operands, profile=replace(base, **{field: value})) for value in STATES[field])
    assert wide.out.mean() > 1.1 * less.out.mean() > 1.2 * least.out.mean()
    assert wide.state.mean() > less.state.mean() > least.state.mean()  # the last one is rounded where it is stored, however rarely the others are


@pytest.mark.parametrize("field", FINER)
def test_whoever_rounds_less_is_allowed_less(field):
    coarse = {"order": WIDE, "extra_bits": replace(WIDE, block=8), "normalised": replace(WIDE, smallest_probability=2.0**-10), "sum_rounded": FLASH}
    usual, fine = (allowed(p, SHIFTED) for p in (coarse[field], replace(coarse[field], **{field: FINER[field]})))
    assert fine.out.mean() < 0.9 * usual.out.mean()


def test_errors_of_one_sign_grow_with_the_keys_and_others_with_their_root():
    """With all values positive, truncation is allowed in proportion to the number of keys."""
    ratio = {}
    for name in ("flash", "tensor-core-v100"):
        means = []
        for n in (500, 4000):
            (q, k, v), _ = drawn("bfloat16", n, offset=5.0)
            profile = replace(profiles.resolve(name, as_dtype("bfloat16")), probabilities=0.0, smallest_probability=0.0, tile=0)
            wide = tuple(x.astype(F32) for x in (0 * q, k, v))
            means.append(ra.tolerance("softmax", *wide, profile=profile, returns="out").out.mean())
        ratio[name] = means[1] / means[0]
    assert ratio["flash"] < 3.5 and ratio["tensor-core-v100"] > 6


# ---- ways of computing ------------------------------------------------------------------------------------------------------------------


def truncated(x, bits):
    """Cut off below so many bits, towards zero."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


def tensor_core_sum(a, b, block, extra_bits, bits=24):
    """Sums of products over the last axis of a and the last but one of b, as matrix instructions make them."""
    total = np.zeros((*a.shape[:-1], b.shape[-1]))
    for start in range(0, a.shape[-1], block):
        terms = a[..., start : start + block, None] * b[..., None, start : start + block, :]
        terms = np.concatenate([total[..., None, :], terms], axis=-2)
        largest = np.max(np.abs(terms), axis=-2, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0))) + 1 - bits - extra_bits)
        total = truncated((np.trunc(terms / unit) * unit).sum(-2), bits)
    return total


def tensor_core_attention(q, k, v, block, extra_bits, bits=24, weights=np.float32, factor=1.0):
    heads = q.shape[1]
    q, k, v = (x.astype(np.float64) for x in (q, planted.grouped(k, heads), planted.grouped(v, heads)))
    s = tensor_core_sum(q, np.swapaxes(k, -1, -2), block, extra_bits, bits).astype(F32) * F32(q.shape[-1] ** -0.5)
    p = np.exp(s - s.max(-1, keepdims=True))
    stored = (p * F32(factor)).astype(weights).astype(np.float64) / factor
    out = tensor_core_sum(stored, v, block, extra_bits, bits)
    return out.astype(F32) / p.sum(-1, keepdims=True, dtype=F32)


@pytest.mark.parametrize("name, block, extra_bits", [("tensor-core-v100", 4, 0), ("tensor-core-a100", 8, 1), ("tensor-core-h100", 16, 2)])
def test_truncating_accumulators_stay_within_their_profile(name, block, extra_bits):
    for seed, offset in ((0, 0.0), (1, 8.0)):
        (q, k, v), _ = drawn("bfloat16", 1500, seed, offset)
        out = tensor_core_attention(0.1 * q.astype(F32), k, v, block, extra_bits)
        wide = tuple(x.astype(F32) for x in ((0.1 * q.astype(F32)), k, v))  # nothing but truncation: results and weights stay wide
        profile = replace(profiles.resolve(name, as_dtype("bfloat16")), probabilities=0.0, smallest_probability=0.0)
        ratio = ra.compare(out, "softmax", *wide, profile=profile).worst.ratio
        assert 0.01 < ratio < 1
    assert ra.compare(out, "softmax", *wide, profile=replace(profile, block=0)).worst.ratio > 2 * ratio  # sums to nearest would be nearer


def test_8_bit_weights_in_14_bit_accumulators_stay_within_their_profile():
    (q, k, v), _ = drawn("float8_e4m3fn", 700)
    out = tensor_core_attention(q, k, v, 32, 0, bits=14, weights=ml_dtypes.float8_e4m3fn, factor=256.0)
    assert 0.05 < ra.compare(out, "softmax", q, k, v, profile="fa3-fp8").worst.ratio < 1


def test_weights_that_vanish_are_allowed_for_in_the_scale_they_are_stored_in():
    """Without a factor small weights of e4m3 vanish, which the factor 256 of the profile does not allow for."""
    rng = np.random.default_rng(0)
    q = np.ones((1, 1, 4, 1), ml_dtypes.float8_e4m3fn)
    k = np.where(np.arange(900) == 0, 8.0, 0.0).reshape(1, 1, 900, 1).astype(q.dtype)  # one weight of one, others of exp(-8), a third of the whole
    v = (1 + rng.random((1, 1, 900, 4))).astype(q.dtype)
    scaled, plain = (tensor_core_attention(q, k, v, 32, 0, bits=14, weights=q.dtype, factor=f) for f in (256.0, 1.0))
    profile = replace(profiles.resolve("fa3-fp8", q.dtype), products=0.0, block=0)
    wide = tuple(x.astype(F32) for x in (q, k, v))
    assert ra.compare(scaled, "softmax", *wide, profile=replace(profile, products=2.0**-14, block=32)).passed
    assert not ra.compare(plain, "softmax", *wide, profile=profile).passed


def merged(q, k, v, parts):
    pieces = np.array_split(np.arange(k.shape[2]), parts)
    outs, lses = zip(*(planted.attend(planted.RIGHT, q, k[:, :, part], v[:, :, part]) for part in pieces), strict=True)
    lse = np.logaddexp.reduce(np.stack(lses), axis=0).astype(F32)
    return sum(np.exp(one - lse)[..., None] * out.astype(F32) for out, one in zip(outs, lses, strict=True)), lse


@pytest.mark.parametrize("seed", range(4))
def test_keys_in_parts_stay_within_the_profile_of_splits(seed):
    (q, k, v), _ = drawn("float32", 2000, seed)
    report = ra.compare(merged(q, k, v, 32), "softmax", q, k, v, returns=("out", "lse"), profile="split")
    assert 0.01 < report.worst.ratio < 1


def eager_with_sinks(q, k, v, sinks, dropped=False):
    """Every array stored in the operands' format, scores and sinks less the maximum of both among them."""
    kept, heads = q.dtype, q.shape[1]

    def op(x):
        return x.astype(kept).astype(F32)

    q, k, v, sinks = (x.astype(F32) for x in (q, planted.grouped(k, heads), planted.grouped(v, heads), sinks))
    s = op(op(q @ np.swapaxes(k, -1, -2)) * F32(q.shape[-1] ** -0.5))
    joined = s if dropped else np.concatenate([s, np.broadcast_to(sinks[:, None, None], (*s.shape[:3], 1))], -1)
    e = op(np.exp(op(joined - joined.max(-1, keepdims=True))))
    return (op(e / op(e.sum(-1, keepdims=True)))[..., : s.shape[-1]] @ v).astype(kept)


@pytest.mark.parametrize("level", [5.0, 40.0, 400.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_far_below_a_sink_are_rounded_when_they_are_stored_less_it(dtype, level):
    """All the same way, where they are closer to one another than to the sink; what is none of that, such as a sink of another head, is refused."""
    eager = profiles.resolve("eager", as_dtype(dtype))
    sinks = round_to(np.array([level, level + 2]), as_dtype(dtype))

    def ratio(out, profile=eager):
        return ra.compare(out, "softmax", q, k, v, sinks=sinks, profile=profile).worst.ratio

    for seed in range(3):
        (q, k, v), _ = drawn(dtype, 70, seed)
        right = eager_with_sinks(q, k, v, sinks)
        assert ratio(right) < 1 < ratio(eager_with_sinks(q, k, v, sinks, dropped=True))
        assert level == 400.0 or ratio(eager_with_sinks(q, k, v, sinks[::-1])) > 5  # exp(-400) is 0 by any sink
        assert (ratio(right, replace(eager, distances=0.0)) > 1) == (dtype == "bfloat16" and level == 40.0)


def stored_eagerly(q, k, v, d_out):
    """Forward and backward pass of `softmax(q @ k.T * scale) @ v`, each array between two operations rounded to the operands' format."""
    kept, heads = q.dtype, q.shape[1]

    def op(x):
        return x.astype(kept).astype(F32)

    q, k, v, d_out = (x.astype(F32) for x in (q, planted.grouped(k, heads), planted.grouped(v, heads), d_out))
    scale = F32(q.shape[-1] ** -0.5)
    s = op(op(q @ np.swapaxes(k, -1, -2)) * scale)
    e = np.exp(s - s.max(-1, keepdims=True))
    p = op(e / e.sum(-1, keepdims=True))
    out, d_v, d_p = p @ v, op(np.swapaxes(p, -1, -2) @ d_out), op(d_out @ np.swapaxes(v, -1, -2))
    d_s = op(op(p * (d_p - (p * d_p).sum(-1, keepdims=True))) * scale)
    d_q, d_k = d_s @ k, op(np.swapaxes(d_s, -1, -2) @ q)
    return tuple(x.astype(kept) for x in (out, d_q, d_k.sum(1, keepdims=True), d_v.sum(1, keepdims=True)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arrays_stored_between_all_operations_stay_within_eager_and_not_within_flash(dtype):
    ratios: dict[str, list[float]] = {"eager": [], "flash": []}
    for seed in range(6):
        (q, k, v), d_out = drawn(dtype, 200, seed)
        q = (2 * q.astype(F32)).astype(q.dtype)
        answers = stored_eagerly(q, k, v, d_out)
        for profile, seen in ratios.items():
            report = ra.compare(answers, "softmax", q, k, v, d_out=d_out, returns=("out", "d_q", "d_k", "d_v"), profile=profile)
            seen.append(report.worst.ratio)
    assert 0.05 < max(ratios["eager"]) < 1 < max(ratios["flash"])


# ---- names ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profiles.PRESETS)
def test_a_preset_has_its_name_a_source_and_a_line_in_the_documentation(name):
    made = profiles.resolve(name, as_dtype("float8_e4m3fn" if name == "fa3-fp8" else "bfloat16"))
    assert made.name == name and made.source
    documented = (Path(__file__).parent.parent / "docs" / "profiles.md").read_text()
    assert f"`{name}`" in documented or f"`-{name.rpartition('-')[2]}`" in documented
    assert all(f"`{f.name}`" in documented for f in fields(profiles.Profile) if f.name not in ("name", "source"))


def test_a_name_may_carry_its_dtype_and_is_refused_for_others():
    assert profiles.resolve("torch-cpu-flash-bf16", as_dtype("bfloat16")) == profiles.resolve("torch-cpu-flash", as_dtype("bfloat16"))
    with pytest.raises(ra.ParameterError, match="is for bfloat16, but the operands are float16"):
        profiles.resolve("jax-xla-bf16", as_dtype("float16"))
    with pytest.raises(ra.ParameterError, match="'fa3-fp8' is for formats of 8 bits, but the operands are float32"):
        profiles.resolve("fa3-fp8", as_dtype("float32"))
    with pytest.raises(ra.UnknownVariantError, match="did you mean 'jax-xla'"):
        profiles.resolve("jax-xlaa", as_dtype("float16"))
    with pytest.raises(ra.ParameterError, match="'auto' is found by asking calls"):
        ra.tolerance("softmax", *OPERANDS, profile="auto")


# ---- found by asking --------------------------------------------------------------------------------------------------------------------


def found(candidate, dtype):
    return calibrated(SOFTMAX, candidate, as_dtype(dtype), {}, 1e-4).name


def eager_candidate():
    def gradients(operands, params, cotangents):
        return dict(zip(("d_q", "d_k", "d_v"), stored_eagerly(**operands, d_out=cotangents["out"])[1:], strict=True))

    def call(operands, params):
        return stored_eagerly(**operands, d_out=operands["q"])[0]

    return Candidate("eager", call, frozenset("qkv"), gradients=gradients)


@pytest.mark.parametrize(
    "made, dtype, name",
    [
        (lambda: planted.candidate(planted.RIGHT), "float32", "math"),
        (lambda: planted.candidate(planted.RIGHT), "bfloat16", "flash"),
        (eager_candidate, "bfloat16", "eager"),
        (lambda: planted.candidate(planted.RIGHT), "float8_e4m3fn", "flash"),
    ],
)
def test_auto_takes_the_tightest_preset_that_explains_plain_calls(made, dtype, name):
    assert found(made(), dtype).startswith(f"{name} (the tightest that explains 2 plain calls: error / tolerance 0.")


def test_auto_takes_the_usual_preset_where_none_explains_or_nothing_is_answered():
    assert found(planted.planted("S1 scale omitted"), "bfloat16").startswith("flash (the usual one: none explains")
    assert found(Candidate("mute", lambda o, p: None, frozenset("qkv")), "float32").startswith("flash (the usual one: plain calls were not")


def test_auto_calibrates_with_gradients_where_there_are_any():
    def gradients(operands, params, cotangents):
        return {n: x.astype(np.float16).astype(F32) for n, x in backward.gradients(**operands, d_out=cotangents["out"]).items()}

    right = planted.candidate(planted.RIGHT)
    coarse = Candidate("coarse", right.call, frozenset("qkv"), returns=("out", "lse"), gradients=gradients)
    assert found(coarse, "float32").startswith("flash (the usual one: none explains")


def test_a_report_names_the_profile_that_was_found():
    report = ra.check(planted.candidate(planted.RIGHT), suite="quick", dtype="bfloat16", profile="auto")
    assert report.passed and report.profile.name.startswith("flash (the tightest")
