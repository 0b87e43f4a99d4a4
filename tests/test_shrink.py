"""A failing call is cut down to what it needs to fail, and error over the number of keys has the slope its arithmetic implies."""

import ml_dtypes
import numpy as np
import planted
import planted_variants
import pytest

import refattn as ra
from refattn import catalog
from refattn.candidate import Candidate
from refattn.oracle import candidates
from refattn.oracle.growth import growth
from refattn.oracle.judge import judge
from refattn.oracle.profiles import resolve
from refattn.oracle.shrink import minimal
from refattn.oracle.tolerance import ALPHA

pytestmark = pytest.mark.compiled

SOFTMAX = catalog.variant("softmax")


def shrunk(candidate, variant=SOFTMAX, dtype="float32", **options):
    report = ra.check(candidate, variant.name, dtype=dtype)
    return minimal(variant, candidate, largest(report), report.profile, ALPHA, **options)


def entries(case):
    return sum(x.size for x in case.probe.operands.values())


def largest(report):
    """The failing call with the most to take away, of those that fail by themselves."""
    return max((c for c in report.failures if c.probe.repeatable), key=entries)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fault, sizes, features",
    [
        ("H1 heads tiled", {"B": 1, "Hq": 4, "Hkv": 2, "T": 1, "S": 1, "D": 1, "E": 1}, {}),
        ("M1 top-left for bottom-right", {"B": 1, "Hq": 1, "Hkv": 1, "T": 1, "S": 2}, {"causal": True}),
        ("M1 bottom-right for top-left", {"B": 1, "Hq": 1, "T": 1, "S": 2}, {"causal": "top_left"}),
        ("X9 sink dropped", {"B": 1, "Hq": 1, "T": 1, "S": 1}, {"sinks": True}),
        ("M8 mask of batch 0", {"B": 2, "Hq": 1, "T": 1}, {"mask": True}),
        ("H11 value width from the keys", {"B": 1, "Hq": 1, "T": 1, "S": 1, "D": 1, "E": 2}, {}),
        ("T4 last partial tile dropped", {"B": 1, "Hq": 1, "T": 1, "S": 17, "D": 1, "E": 1}, {}),
    ],
)
def test_what_a_fault_needs_is_left_and_nothing_else(fault, sizes, features, dtype):
    case = shrunk(planted.planted(fault), dtype=dtype)
    assert case.failed and case.probe.decides
    dims = case.problem.dims
    assert {axis: dims[axis] for axis in sizes} == sizes
    given = {n for n, v in case.problem.params.items() if v != SOFTMAX.param(n).default} | (case.probe.operands.keys() - {"q", "k", "v"})
    assert given == features.keys()
    assert all(case.problem.params[n] == v for n, v in features.items() if n not in case.probe.operands)


def test_the_smaller_call_fails_when_it_is_asked_again_and_holds_plain_numbers():
    candidate = planted.planted("X2 accumulator not rescaled")
    case = shrunk(candidate)
    again = judge(SOFTMAX, candidate, case.probe, resolve(None, np.dtype("float32")), ALPHA)
    assert again.failed and again.worst == case.worst
    assert 17 <= case.problem.dims["S"] <= 48, "one tile and a bit"
    assert all((x == np.rint(x)).all() for x in case.probe.operands.values())


def test_it_goes_on_failing_for_the_given_reason():
    """Two faults in one call: it is cut down to what the one asked about needs."""
    both = planted.candidate(planted.right(group=planted.tiled_heads, divided=planted.nan_where_empty))
    report = ra.check(both)
    start = next(c for c in report.failures if c.probe.title == "a row that sees no key")

    def nan(case):
        return bool(np.isnan(case.answers["out"]).any())

    def wrong_number(case):
        return bool((np.isfinite(case.answers["out"]) & (case.ratios["out"] > 1)).any())

    assert nan(start) and wrong_number(start)
    empty = minimal(SOFTMAX, both, start, report.profile, ALPHA, same=nan)
    heads = minimal(SOFTMAX, both, start, report.profile, ALPHA, same=wrong_number)
    assert nan(empty) and empty.problem.dims["Hq"] == 1
    assert wrong_number(heads) and heads.problem.dims["Hkv"] == 2 and "mask" not in heads.probe.operands


def test_what_keeps_one_value_is_kept():
    candidate = planted.planted("H1 heads tiled")
    report = ra.check(candidate, causal=True)
    case = minimal(SOFTMAX, candidate, largest(report), report.profile, ALPHA, keep={"causal"})
    assert case.problem.params["causal"] is True and case.problem.params["scale"] is None


def test_spending_nothing_changes_nothing():
    candidate = planted.planted("H1 heads tiled")
    report = ra.check(candidate)
    start = largest(report)
    assert minimal(SOFTMAX, candidate, start, report.profile, ALPHA, calls=0) is start


@pytest.mark.parametrize("name, fault", [("multi_head", "heads tiled"), ("luong_concat", "keys first"), ("cosine_residual", "residual left out")])
def test_calls_of_other_variants_shrink_too(name, fault):
    variant = catalog.variant(name)
    function = planted_variants.transcription(name, fault)
    candidate = candidates.candidate(function, variant, returns=planted_variants.TRANSCRIPTIONS[name][1])
    report = ra.check(candidate, name)
    case = minimal(variant, candidate, largest(report), report.profile, ALPHA)
    assert case.failed and entries(case) < entries(largest(report)) / 4


# ---- error over the number of keys ------------------------------------------------------------------------------------------------------


def naive(weigh):
    """out only, in float32, the weighted sum made by `weigh`."""

    def call(operands, params):
        q, k, v = (x.astype(np.float32) for x in (operands["q"], *(np.repeat(operands[n], 2, axis=1) for n in "kv")))
        s = q @ np.swapaxes(k, -1, -2) * np.float32(q.shape[-1] ** -0.5)
        p = np.exp(s - s.max(-1, keepdims=True))
        return weigh(p, v)

    return Candidate("naive", call, frozenset({"q", "k", "v"}), frozenset())


def truncating(p, v):
    """Sums in an accumulator of 12 bits that rounds towards zero, so that roundings have one sign."""
    total, acc = np.zeros(p.shape[:3], np.float32), np.zeros((*p.shape[:3], v.shape[3]), np.float32)
    for j in range(p.shape[3]):
        acc += p[..., j, None] * v[:, :, None, j]
        acc = (acc.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
        total += p[..., j]
    return acc / total[..., None]


def rounding(p, v):
    """The same accumulator rounding to nearest."""
    total, acc = np.zeros(p.shape[:3], np.float32), np.zeros((*p.shape[:3], v.shape[3]), np.float32)
    for j in range(p.shape[3]):
        acc += p[..., j, None] * v[:, :, None, j]
        acc = ((acc.view(np.uint32) + np.uint32(0x800)) & np.uint32(0xFFFFF000)).view(np.float32)
        total += p[..., j]
    return acc / total[..., None]


@pytest.mark.parametrize("weigh, low, high", [(truncating, 0.75, 1.25), (rounding, 0.0, 0.7)])
def test_roundings_of_one_sign_grow_in_proportion_and_independent_ones_slower(weigh, low, high):
    single = np.dtype("float32")
    found = growth(SOFTMAX, naive(weigh), single, {}, resolve(None, single), ALPHA, keys=(16, 64, 256, 1024))
    assert found is not None and low < found.exponent < high, found


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)])
def test_a_right_kernel_stays_within_tolerance_at_every_length(dtype):
    found = growth(SOFTMAX, planted.candidate(planted.RIGHT), dtype, {}, resolve(None, dtype), ALPHA)
    assert found is not None and max(found.errors) <= 1 and found.exponent < 0.6 and len(found.errors) == len(found.keys)


def test_where_there_is_nothing_to_measure_there_is_no_growth():
    single = np.dtype("float32")
    nan = Candidate("nan", lambda operands, params: np.full_like(operands["q"], np.nan)[..., :16], frozenset("qkv"), frozenset())
    assert growth(SOFTMAX, nan, single, {}, resolve(None, single), ALPHA) is None
    mean = catalog.variant("cosine_residual")
    assert growth(mean, naive(rounding), single, {}, resolve(None, single), ALPHA) is None
