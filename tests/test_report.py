"""What a report says, to people on eighty columns and to machines."""

import io
import json

import numpy as np
import planted
import pytest
from rich.console import Console

import refattn as ra
from refattn.oracle.report import _folded

pytestmark = pytest.mark.compiled

RIGHT, CAPLESS = planted.candidate(planted.RIGHT, "kernel"), planted.planted("X12 soft-cap dropped")


def textbook(q, k, v, causal=False, scale=None):
    out, _ = planted.attend(planted.RIGHT, q, k, v, causal=causal, scale=scale)
    return out


def late(q, k, v):
    """Right for the first eight queries."""
    out = textbook(q, k, v)
    out[:, :, 8:] += 1
    return out


def shown(report, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(report)
    return console.file.getvalue()


def words(report):
    return " ".join(shown(report).split())


@pytest.fixture(scope="module")
def passing():
    return ra.check(RIGHT, suite="quick")


@pytest.fixture(scope="module")
def failing():
    return ra.check(CAPLESS, suite="quick")


# ---- the verdict --------------------------------------------------------------------------------------------------------------------


def test_a_pass_says_what_was_examined_and_what_was_not(passing):
    assert passing.passed and passing.failures == () and passing.smallest_failure is None and passing.reproduce() == ""
    decided = [c for c in passing.cases if c.probe.decides]
    assert passing.verdict == f"agrees with softmax in all {len(decided)} calls"
    examined = {"shapes", "large scores", "scale", "softcap", "causal", "window", "bias", "mask", "sinks", "hidden keys", "rows that see no key"}
    assert examined <= set(passing.examined) and not passing.unexamined
    assert 0 < passing.worst.ratio < 1
    with pytest.raises(ValueError, match="nothing failed"):
        passing.save("nowhere.npz")


def test_a_failure_names_the_worst_element_of_all(failing):
    assert not failing.passed and failing.verdict.startswith("does not agree with softmax: ")
    assert all("softcap" in c.probe.examines for c in failing.failures)
    worst, case = failing.worst, failing.worst_case
    assert worst.ratio == max(r.max() for c in failing.cases if c.probe.decides for r in c.ratios.values() if r.size) > 1
    truth = ra.attend("softmax", **{n: x.astype(np.float64) if x.dtype != bool else x for n, x in case.probe.operands.items()}, **case.probe.params)
    assert worst.output != "out" or worst.expected == pytest.approx(truth[worst.index], rel=1e-12)
    assert worst.error == abs(worst.got - worst.expected)
    assert worst.ratio == worst.error / worst.tolerance


def test_features_the_candidate_does_not_take_are_listed_with_the_reason():
    report = ra.check(textbook, suite="quick")
    assert report.passed
    assert report.unexamined["window"] == report.unexamined["softcap"] == "takes no such parameter"
    assert report.unexamined["sinks"] == "takes no such operand"
    assert "window" not in report.examined and "scale" in report.examined
    assert "causal='top_left'" in report.unexamined, "a word of ours that a stranger's function may not know"


def test_calls_that_were_declined_count_neither_way_and_are_listed():
    def short(q, k, v):
        if k.shape[2] > 50:
            raise NotImplementedError("at most 50 keys")
        return textbook(q, k, v)

    report = ra.check(short, suite="quick")
    assert report.passed and set(report.declined) == {"at most 50 keys"}
    assert report.to_dict()["unexamined"]["at most 50 keys"].endswith("calls")
    assert "at most 50 keys" in shown(report)


def test_agreeing_on_calls_without_elements_is_no_agreement():
    def empty_only(q, k, v):
        if 0 in q.shape:
            return np.empty((*q.shape[:3], v.shape[3]), q.dtype)
        raise NotImplementedError("nothing but nothing")

    with pytest.raises(ra.CandidateError, match="could not be asked a single call of softmax in float32: nothing but nothing"):
        ra.check(empty_only)


def test_an_observation_is_noted_and_does_not_decide():
    report = ra.check("numpy", suite="quick")
    assert report.passed and len(report.notes) == 1
    assert "NaN in a hidden key or value reaches the output" in words(report) and "noted" in words(report)


def test_the_smallest_failing_call_is_one_that_can_be_repeated():
    report = ra.check(CAPLESS)
    smallest = report.smallest_failure
    sizes = [sum(x.size for x in c.probe.operands.values()) for c in report.failures if c.probe.repeatable]
    assert sum(x.size for x in smallest.probe.operands.values()) == min(sizes)
    strides = ra.check(planted.planted("H8 strides ignored"), suite="quick")
    assert not strides.smallest_failure.probe.repeatable
    assert "suite='quick'" in strides.reproduce() and "inputs" not in strides.reproduce()


def test_what_is_saved_and_asked_again_fails_again(failing, tmp_path):
    failing.save(tmp_path / "operands.npz")
    command = failing.reproduce(str(tmp_path / "operands.npz"))
    again = eval(command, {"ra": ra, "np": np, "it": CAPLESS})
    assert not again.passed
    first = next(c for c in again.cases if c.probe.title == "the given operands")
    before, after = failing.smallest_failure.worst, first.worst
    assert (after.output, after.index, after.got, after.expected) == (before.output, before.index, before.got, before.expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_saved_operands_keep_every_bit(dtype, tmp_path):
    report = ra.check(CAPLESS, dtype=dtype, suite="quick")
    report.save(tmp_path / "operands.npz")
    with np.load(tmp_path / "operands.npz") as held:
        for name, x in report.smallest_failure.probe.operands.items():
            assert held[name].astype(x.dtype).tobytes() == x.tobytes()


# ---- for machines -----------------------------------------------------------------------------------------------------------------------


def test_json_holds_everything_the_report_says(failing):
    read = json.loads(failing.to_json())
    assert read["passed"] is False and read["variant"] == "softmax" and read["dtype"] == "float32" and read["suite"] == "quick"
    assert read["worst"]["index"].keys() <= {"B", "Hq", "T", "E"}
    assert len(read["cases"]) == len(failing.cases)
    assert [c["outcome"] for c in read["cases"]] == [c.outcome for c in failing.cases]
    assert read["finding"] == str(failing.finding) and "softcap" in read["finding"]
    assert read["reproduce"] == failing.reproduce()


def test_json_holds_infinities_parameters_and_numpy_numbers():
    report = ra.check(lambda q, k, v: np.full_like(v[:, :, :1], np.nan) + 0 * q, suite="quick", scale=np.float32(0.5), window=(np.int64(3), None))
    read = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert read["params"] == {"scale": 0.5, "window": [3, None]}
    assert read["worst"]["got"] == "nan" and read["worst"]["error"] == "inf"
    assert all(c["params"]["scale"] == 0.5 for c in read["cases"])


def test_compare_judges_arrays_and_says_so():
    q, k, v = (np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(np.float32) for _ in range(3))
    right = ra.compare(textbook(q, k, v, causal=True), "softmax", q, k=k, v=v, causal=True)
    assert right.passed and right.verdict == "agrees with softmax"
    wrong = ra.compare(textbook(q, k, v), "softmax", q, k=k, v=v, causal=True)
    assert not wrong.passed and wrong.reproduce() == "", "there is nobody to ask again"
    assert json.loads(wrong.to_json())["params"] == {"causal": True}
    assert "the given output does not agree with softmax: 1 of 1 calls fail" in shown(wrong)


def test_compare_takes_either_layout_and_several_outputs():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 3, d)).astype(np.float32) for n, d in ((4, 6), (5, 6), (5, 7)))
    out, lse = ra.attend("softmax", q, k, v, layout="BTHD", returns=("out", "lse"))
    assert ra.compare((out, lse), "softmax", q, k, v, layout="BTHD", returns=("out", "lse")).passed
    assert not ra.compare((out, lse + 1e-3), "softmax", q, k, v, layout="BTHD", returns=("out", "lse")).passed
    for answers, returns, says in (
        (out, ("out", "lse"), "1 arrays for 2 outputs"),
        ((out.swapaxes(1, 2), lse), ("out", "lse"), r"out has shape \(2, 3, 4, 7\); must be \(2, 4, 3, 7\), \[B T Hq E\]"),
        ((out.astype(int), lse), ("out", "lse"), "out is int64; must be floating point"),
    ):
        with pytest.raises(ra.CandidateError, match=says):
            ra.compare(answers, "softmax", q, k, v, layout="BTHD", returns=returns)


def test_assert_matches_raises_with_the_report():
    q = k = v = np.ones((1, 1, 3, 2), np.float32)
    ra.assert_matches(textbook(q, k, v), "softmax", q, k, v)
    with pytest.raises(AssertionError, match=r"(?s)FAIL.*worst element  out\[0, 0, \d, \d\].*tolerance"):
        ra.assert_matches(textbook(q, k, v) + np.float32(1e-3), "softmax", q, k, v)


# ---- for people --------------------------------------------------------------------------------------------------------------------------


def test_a_report_fits_eighty_columns_and_hides_nothing():
    text = shown(ra.check(late))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("FAIL", "worst element", "in common", "examined", "not examined", "budget", "reproduce", "smallest failing call"):
        assert part in " ".join(text.split())
    assert "..." not in text.split("FAIL")[1], "nothing is cut off"


def test_a_long_table_is_shortened_and_counts_what_it_leaves_out():
    report = ra.check(CAPLESS)
    lines = [line for line in shown(report, 100).split("FAIL")[0].splitlines()[2:] if line.strip()]
    more = [line.split() for line in lines if line.startswith("and ")]
    assert len(lines) - len(more) == 30
    assert 30 + sum(int(words[1]) for words in more) == len(report.cases)
    assert sum("differs" in line for line in lines if not line.startswith("and ")) == min(15, len(report.failures))


def test_exceptions_and_malformed_answers_are_quoted():
    def broken(q, k, v):
        raise ZeroDivisionError("the scale is one over nothing")

    report = ra.check(broken, suite="quick")
    assert not report.passed and "ZeroDivisionError: the scale is one over nothing" in words(report)
    assert report.worst is None and json.loads(report.to_json())["worst"] is None


def test_channels_are_named_where_it_is_not_all_of_them():
    def tail(q, k, v):
        out = textbook(q, k, v)
        out[..., 8:12] = 0
        return out

    q, k, v = (np.random.default_rng(0).standard_normal((1, 2, 9, 20)).astype(np.float32) for _ in range(3))
    assert "only channels 8 to 11 of 20 differ" in shown(ra.compare(tail(q, k, v), "softmax", q, k, v))


def test_str_is_the_report_without_colours(failing):
    assert "\x1b" not in str(failing) and str(failing).startswith("softmax, float32, quick suite, profile flash")


def test_the_budget_says_what_a_correct_answer_was_allowed():
    eager = words(ra.check("numpy", dtype="bfloat16", profile="eager", suite="quick"))
    assert "sums in unit roundoff 2^-24" in eager and "weights stored to 2^-8" in eager and "scores stored to 2^-8" in eager


@pytest.mark.parametrize(
    "command", ["refattn check a.py:f --variant softmax --dtype float32 --set 'window=[3,0]' --set causal=top_left --inputs " + 9 * "long"]
)
def test_a_folded_command_is_the_same_command(command):
    folded = _folded(command)
    assert max(map(len, folded.splitlines())) < 80 and folded.replace(" \\\n   ", "") == command
