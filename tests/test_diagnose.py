"""Faulty kernels written by hand get the name of their fault, alone or in pairs; what is in no catalogue gets a fitted number or no name."""

import itertools
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import planted
import planted_variants
import pytest

import refattn as ra
from refattn.candidate import Candidate
from refattn.oracle.fitting import fitted, names

pytestmark = pytest.mark.compiled

EXAMPLE = Path(__file__).parents[1] / "examples" / "planted_bug.py"


def diagnosed(candidate, variant="softmax", **options):
    return ra.check(candidate, variant, **options).investigation.diagnosis


def named(diagnosis):
    """Codes of the faults of the first explanation."""
    return sorted(f.code for f in diagnosis.explanations[0].faults) if diagnosis.explanations else []


def says(diagnosis):
    return [[(f.code, f.name) for f in e.faults] + [e.ratio, dict(e.values)] for e in diagnosis.explanations]


# ---- single faults --------------------------------------------------------------------------------------------------------------------

SAMPLE = [fault for n, fault in enumerate(planted.FAULTS) if n % 8 == 0]


@pytest.mark.parametrize("n, fault", list(enumerate(SAMPLE)))
def test_a_hand_written_fault_gets_its_name(n, fault):
    """An eighth of them; all, in both formats, are asked in the examination."""
    dtype = ("float32", "bfloat16")[n % 2]
    diagnosis = diagnosed(planted.planted(fault), dtype=dtype, suite="quick")
    code = fault.split()[0]
    candidates = {f.code for e in diagnosis.explanations for f in (*e.faults, *e.alike)}
    assert code in candidates, says(diagnosis)
    assert all(e.ratio <= 1 for e in diagnosis.explanations)


def test_the_example_is_named_with_its_mathematics():
    report = ra.check(f"{EXAMPLE}:attention")
    diagnosis = report.investigation.diagnosis
    assert named(diagnosis) == ["X2"] and diagnosis.confidence == "high" and diagnosis.runner_up > 3
    fault = diagnosis.explanations[0].faults[0]
    assert fault.right and fault.wrong and fault.words
    smallest = report.investigation.minimal
    assert smallest.failed and smallest.problem.dims["S"] < 33
    assert report.investigation.growth is not None


def test_softmax_over_the_wrong_axis_offered_as_attention_is_named():
    def article(q, k, v):
        s = np.einsum("bhtd,bhsd->bhts", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1)) / math.sqrt(q.shape[3])
        e = np.exp(s - s.max(axis=2, keepdims=True, initial=-np.inf))
        return (e / e.sum(axis=2, keepdims=True)) @ np.repeat(v, q.shape[1] // v.shape[1], axis=1)

    assert named(diagnosed(article, dtype="float32")) == ["S10"]


def test_a_written_operand_is_said_at_once():
    diagnosis = diagnosed(planted.planted("R3 operand overwritten"), suite="quick")
    assert named(diagnosis) == ["R3"] and diagnosis.confidence == "high" and diagnosis.hypotheses == 0


@pytest.mark.parametrize("name, fault, code", [("multi_head", "heads tiled", "H1"), ("luong_dot", "scaled", "S"), ("additive", "tanh left out", "")])
def test_faults_of_other_variants_are_named(name, fault, code):
    returns = planted_variants.TRANSCRIPTIONS[name][1]
    diagnosis = diagnosed(planted_variants.transcription(name, fault), name, returns=returns, suite="quick")
    assert diagnosis.explanations and diagnosis.explanations[0].faults[0].code.startswith(code), says(diagnosis)


# ---- numbers ----------------------------------------------------------------------------------------------------------------------------


def scaled_by(number):
    return planted.right(factor=lambda scale, d, d_v, heads: number * planted.factor(scale, d, d_v, heads))


def capped_at(number):
    return planted.right(finished=lambda s, scale, cap, bias, seen: planted.finished(s, scale, None if cap is None else number * cap, bias, seen))


@pytest.mark.parametrize(
    "stages, field, value",
    [
        (scaled_by(1.07), "scale_factor", 1.07),
        (capped_at(1.5), "cap_factor", 1.5),
        (planted.right(visible=planted.moved_window(more_left=2)), "window_left_offset", 2),
        (planted.right(visible=planted.moved_window(more_causal=2)), "causal_offset", 2),
        (planted.right(finished=planted.biased_as(lambda bias, scale: planted.F32(0.3) * bias)), "bias_factor", 0.3),
    ],
)
def test_a_number_that_is_off_is_fitted(stages, field, value):
    dtype = "bfloat16" if field in ("cap_factor", "causal_offset") else "float32"
    diagnosis = diagnosed(planted.candidate(stages), dtype=dtype, suite="quick")
    assert len(diagnosis.explanations) == 1 and len(diagnosis.explanations[0].faults) == 1, says(diagnosis)
    assert diagnosis.explanations[0].values == {field: pytest.approx(value, rel=2e-5 if dtype == "float32" else 0.02)}
    assert diagnosis.confidence == "medium", "its number was fitted"
    assert f"{diagnosis.explanations[0].values[field]:.6g}" in diagnosis.explanations[0].faults[0].words


def test_a_number_with_a_name_is_called_by_it():
    diagnosis = diagnosed(planted.candidate(scaled_by(2.0)), suite="quick")
    assert diagnosis.explanations[0].values == {"scale_factor": 2.0}
    assert names(1.4427, {})[0] == ("log2(e)", math.log2(math.e)) and names(0.25, {"D": 16})[0][1] == 0.25
    assert {"1/sqrt(D)", "1/4"} <= {name for name, _ in names(0.25, {"D": 16})} and not names(1.07, {})


@pytest.mark.parametrize("truth", [0.013, 0.7, 1.4427, 55.0])
def test_a_fit_finds_the_number_to_the_noise(truth):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(400)
    seen = np.tanh(truth * x) + 1e-9 * rng.standard_normal(400)
    found = fitted(lambda number: [np.tanh(number * x) - seen], (1e-3, 1e3), True)
    assert found == pytest.approx(truth, rel=1e-7)


# ---- pairs --------------------------------------------------------------------------------------------------------------------------------


def changed(stages):
    return {f.name for f in fields(stages) if getattr(stages, f.name) != getattr(planted.RIGHT, f.name)}


def pairs():
    """Pairs of planted faults in different stages."""
    faults = [name for name, stages in planted.FAULTS.items() if isinstance(stages, planted.Stages) and not name.startswith("R3")]
    return [(a, b) for a, b in itertools.combinations(faults, 2) if not changed(planted.FAULTS[a]) & changed(planted.FAULTS[b])]


def both(a, b):
    second = planted.FAULTS[b]
    return planted.candidate(replace(planted.FAULTS[a], **{field: getattr(second, field) for field in changed(second)}), f"{a} + {b}")


def contained(diagnosis, a, b):
    """Whether an explanation has both, or one of the two explains all there is to explain."""
    want = {a.split()[0], b.split()[0]}
    have = [{f.code for f in (*e.faults, *e.alike)} for e in diagnosis.explanations]
    return any(want <= codes for codes in have) or any({f.code for f in e.faults} < want for e in diagnosis.explanations)


def test_pairs_of_faults_are_named():
    drawn = pairs()
    random.Random(5).shuffle(drawn)
    missed = {}
    for a, b in drawn[:4]:
        diagnosis = diagnosed(both(a, b), suite="quick")
        if not contained(diagnosis, a, b):
            missed[a, b] = says(diagnosis)
    assert len(missed) <= 1, missed


@pytest.mark.parametrize(
    "a, b",
    [
        ("H12 values for keys", "X16 weights stored in float8"),  # which allows so much that no answer is apart from that of the first one
        ("S14 no maximum subtracted", "M13 mean on a row that sees nothing"),  # no call, nor an output of it, shows one of them alone
    ],
)
def test_a_pair_is_named_whose_second_fault_brings_the_answers_nearer(a, b):
    diagnosis = diagnosed(both(a, b), suite="quick")
    assert contained(diagnosis, a, b), says(diagnosis)


# ---- what is in no catalogue ----------------------------------------------------------------------------------------------------------------


def kernel(weigh):
    """float32 attention whose weights come from scores and visible pairs by `weigh`."""

    def call(operands, params):
        q, k, v = (operands[n].astype(np.float32) for n in "qkv")
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        s = q @ np.swapaxes(k, -1, -2) * np.float32(q.shape[3] ** -0.5)
        seen = planted.visible(s.shape[2], s.shape[3], params.get("causal", False), None)
        return weigh(q, k, s, seen, v).astype(operands["v"].dtype)

    return Candidate("open", call, frozenset("qkv"), frozenset({"causal"}))


def normalised(w):
    total = w.sum(-1, keepdims=True)
    return w / np.where(total > 0, total, 1)


def softmax(s, seen):
    return normalised(np.where(seen, np.exp(s - s.max(-1, keepdims=True, initial=-np.inf)), 0))


OPEN = {
    "temperature on values": lambda q, k, s, seen, v: softmax(s, seen) @ (v * np.float32(0.9)),
    "linear attention": lambda q, k, s, seen, v: (
        normalised(np.where(seen, np.exp(np.minimum(q, 9)) @ np.swapaxes(np.exp(np.minimum(k, 9)), -1, -2), 0)) @ v
    ),
    "every third key left out": lambda q, k, s, seen, v: softmax(s, seen & (np.arange(s.shape[3]) % 3 != 2)) @ v,
    "last head not scaled": lambda q, k, s, seen, v: softmax(s * np.where(np.arange(s.shape[1]) == s.shape[1] - 1, 3, 1)[:, None, None], seen) @ v,
}


@pytest.mark.parametrize("name", OPEN)
def test_what_is_in_no_catalogue_gets_no_name(name):
    with np.errstate(all="ignore"):
        diagnosis = diagnosed(kernel(OPEN[name]), suite="quick")
    assert diagnosis.explanations == () and diagnosis.confidence == "none", says(diagnosis)


# ---- what a pass does not say -------------------------------------------------------------------------------------------------------------------


def test_a_pass_names_no_fault_and_lists_what_its_calls_could_not_show():
    square = {n: np.random.default_rng(0).standard_normal((1, 2, 8, 4)).astype(np.float32) for n in "qkv"}
    report = ra.check(planted.candidate(planted.RIGHT), inputs=square, causal=True)
    diagnosis = report.investigation.diagnosis
    assert report.passed and diagnosis.explanations == ()
    blind = {f.code for f in diagnosis.blind_spots}
    assert "S1" not in blind, "a call without a scale shows its omission"
    wide = ra.check(planted.candidate(planted.RIGHT), suite="standard").investigation.diagnosis
    assert len(wide.blind_spots) <= 6, [f.name for f in wide.blind_spots]
    few = {n: x[:, :, :2] for n, x in square.items()}
    window = ra.check(planted.candidate(planted.RIGHT), inputs=few, window=(5, 5)).investigation.diagnosis
    assert {"W1", "W9"} <= {f.code for f in window.blind_spots}, "a window wider than the sequence hides its edge"


def test_a_window_without_a_right_bound_is_asked_for_but_by_the_quick_suite_which_says_so():
    def closed(causal, window):
        return causal, window and (window[0], window[0] if window[1] is None else window[1])

    kernel = planted.candidate(planted.right(visible=planted.with_arguments(closed)))
    quick = ra.check(kernel, suite="quick")
    blind = {f.name for f in quick.investigation.diagnosis.blind_spots}
    assert quick.passed and {f"open right side of the window taken for {number}" for number in ("-1", "0", "the left one")} <= blind
    diagnosis = diagnosed(kernel)
    assert [e.faults[0].name for e in diagnosis.explanations] == ["open right side of the window taken for the left one"], says(diagnosis)


# ---- arrays that exist already ------------------------------------------------------------------------------------------------------------------


def test_arrays_that_exist_already_are_diagnosed_from_what_they_say():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, n, 8)).astype(np.float32) for heads, n in ((4, 9), (2, 20), (2, 20)))
    out, _ = planted.attend(planted.FAULTS["H1 heads tiled"], q, k, v, causal=True)
    diagnosis = ra.compare(out, "softmax", q, k, v, causal=True).investigation.diagnosis
    assert named(diagnosis) == ["H1"] and diagnosis.calls == 1, says(diagnosis)


def test_calls_too_large_for_hypotheses_are_left_to_the_judge():
    q, k, v = (np.ones((1, 1, 1700, 4), np.float32) for _ in range(3))
    report = ra.compare(2 * v, "softmax", q, k, v)
    assert not report.passed and report.investigation.diagnosis.explanations == () and report.investigation.diagnosis.calls == 0
