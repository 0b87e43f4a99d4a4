"""What a report says, to people on eighty columns and to machines."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
from rich.console import Console

import refattn as ra
from refattn.oracle import check
from refattn.oracle.findings import Diagnosis, Explanation, Fact, Fault, Growth, Investigation
from refattn.oracle.repeat import folded, script

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


@pytest.fixture(scope="module", autouse=True)
def uninvestigated():
    """Reports hold the investigations that are given to them here; the real ones take longer and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "investigate", lambda *_, **__: Investigation())
        yield


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
    assert "note NaN in a hidden key or value reaches the output" in words(report)


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


@pytest.mark.parametrize("numbers", ["few", "many"])
def test_the_script_holds_the_operands_and_fails_again(failing, numbers, capsys):
    case = failing.smallest_failure
    if numbers == "few":
        q, k, v = (np.random.default_rng(0).standard_normal((1, 1, n, 2)).astype(np.float32) for n in (1, 3, 3))
        probe = replace(case.probe, operands={"q": q, "k": k, "v": v}, params={"softcap": 0.5})
        case = replace(case, probe=probe, problem=None)
    report = replace(failing, investigation=Investigation(minimal=case))
    text = script(report)
    assert ("base64" in text) == (numbers == "many") and "it = ..." in text
    asked = []
    exec(
        text.replace("it = ...", "it = mine"),
        {"mine": replace(CAPLESS, call=lambda operands, params: asked.append(operands) or CAPLESS.call(operands, params))},
    )
    assert capsys.readouterr().out.startswith("FAIL")
    assert all(asked[0][name].tobytes() == x.tobytes() for name, x in case.probe.operands.items())


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
    assert read["finding"] == str(failing.finding) and "every failing row is in a call with" in read["finding"]
    assert read["reproduce"] == failing.reproduce()


def test_json_holds_what_was_found_out(failing):
    read = json.loads(replace(failing, investigation=INVESTIGATED).to_json(), parse_constant=pytest.fail)
    assert read["layout"] == 1 and read["about"] == {"asked": 41}
    assert read["growth"] == {"keys": [16, 64], "errors": [0.5, "inf"], "exponent": "nan", "absolute": []}
    explanation = read["diagnosis"]["explanations"][0]
    assert explanation["faults"][0]["code"] == "S8" and explanation["alike"][0]["name"] == OTHER.name and explanation["values"] == {"factor": 1 / 3}
    assert read["diagnosis"]["confidence"] == "high" and read["diagnosis"]["blind_spots"][0]["code"] == "K7"
    scale, seen = read["facts"]
    assert scale["agrees"] is False and scale["values"]["found"] == {"shape": [], "values": [1 / 12]}
    assert seen["values"]["found"] == {"shape": [2, 3], "rows": ["100", "110"]}


def test_json_has_its_documented_layout(failing, passing):
    page = (Path(__file__).parents[1] / "docs" / "checking.md").read_text()
    for report in (failing, passing):
        assert all(f"`{name}`" in page for name in report.to_dict())
        assert all(f"`{name}`" in page for name in report.to_dict()["cases"][0])


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


@pytest.mark.parametrize("width", [80, 120])
def test_a_report_fits_the_terminal_and_says_what_is_wrong_first(width):
    report = ra.check(late)
    text = shown(report, width)
    assert max(map(len, text.splitlines())) <= width
    parts = ["FAIL", "softmax, float32, standard suite, profile flash", "worst element", "in common", "of tolerance", "examined", "not examined"]
    parts += ["budget", "reproduce", "smallest failing call", "ra.check(it"]
    places = [" ".join(text.split()).find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    assert "..." not in text, "nothing is cut off"


def test_a_pass_is_short_and_shows_no_table(passing):
    text = shown(passing)
    assert text.startswith("PASS") and "of tolerance" not in text and "closest" in text
    assert len(text.splitlines()) <= 20


def test_a_long_table_is_shortened_and_counts_what_it_leaves_out():
    report = ra.check(CAPLESS)
    text = shown(report, 100)
    rows = text[text.index("of tolerance") :].split("\n\n")[0].splitlines()[1:]
    more = {line.split()[3]: int(line.split()[1]) for line in rows if line.startswith("and ")}
    noted = len(report.notes)
    assert len(report.failures) > 12 and sum("differs" in line for line in rows if not line.startswith("and ")) == 12
    assert more["differs"] == len(report.failures) - 12 and len(rows) - len(more) - 12 == noted
    assert sum(more.values()) + 12 + noted == len(report.cases)


SCALE = Fault("S8", "scale applied twice", "The scores carry the scale twice.", "s = q . k * c", "s = q . k * c * c", "a library's issue 7")
OTHER = Fault("S1", "scale from the wrong width", "The width of the values.", "", "")
UNSEEN = Fault("K7", "an index of 32 bits", "")
INVESTIGATED = Investigation(
    diagnosis=Diagnosis((Explanation((SCALE,), 0.25, {"factor": 1 / 3}, (OTHER,)),), "high", 812.0, 431, 27, (UNSEEN,)),
    facts=(
        Fact("scale", "0.0833", "0.2887 +- 0.0002", False, "q ramp", {"found": np.array(1 / 12), "specified": np.array(0.2887)}),
        Fact("visible keys", "0..i", "0..i", True, "causal=True", {"found": np.tri(2, 3, dtype=bool), "specified": np.tri(2, 3, dtype=bool)}),
    ),
    growth=Growth((16, 64), (0.5, np.inf), np.nan),
    about={"asked": 41},
)


def test_a_named_fault_comes_first_with_both_lines_and_its_certainty(failing):
    text = " ".join(shown(replace(failing, investigation=INVESTIGATED)).split())
    parts = ["FAIL", "fault S8 scale applied twice", SCALE.words, f"right {SCALE.right}", f"wrong {SCALE.wrong}", "fitted factor = 0.333333"]
    parts += ["or else S1 scale from the wrong width (no call tells them apart)", "confidence high: with it every answer of 27 calls is within 0.25"]
    parts += ["the next of 431 hypotheses misses by 812 x", "found scale: 0.0833; specified: 0.2887 +- 0.0002 (q ramp)", "worst element", "in common"]
    parts += ["of tolerance", "structure 1 of 2 facts read off the answers are as specified", "blind spots K7 an index of 32 bits", "asked 41"]
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), dict(zip(parts, places, strict=True))


def test_no_explanation_is_said_and_several_are_all_shown(failing):
    nothing = replace(failing, investigation=Investigation(Diagnosis((), "none", 3.0, 431, 27)))
    assert "none of the 431 hypotheses that were tried explains the answers of 27 calls" in words(nothing)
    several = Diagnosis((Explanation((SCALE,), 0.2), Explanation((OTHER, UNSEEN), 0.9)), "low", 3.0, 431, 27)
    said = words(replace(failing, investigation=Investigation(several)))
    assert "or S1 scale from the wrong width" in said and "and K7" in said and "low: 2 of 431 hypotheses explain the answers of 27 calls" in said


def test_a_pass_says_its_blind_spots_and_facts_that_are_not_as_specified(passing):
    said = words(replace(passing, investigation=INVESTIGATED))
    many = replace(INVESTIGATED.diagnosis, blind_spots=(UNSEEN,) * 40)
    assert len(shown(replace(passing, investigation=Investigation(many))).splitlines()) <= 24
    assert "and 34 more" in words(replace(passing, investigation=Investigation(many)))
    assert "blind spots K7" in said and "found scale: 0.0833" in said and "S8" not in said, "what passes has no fault"


def test_the_smallest_failing_call_is_the_one_made_smaller(failing):
    minimal = replace(failing.smallest_failure, probe=replace(failing.smallest_failure.probe, title="made smaller"))
    smaller = replace(failing, investigation=Investigation(minimal=minimal))
    assert smaller.smallest_failure is minimal and "made smaller" in words(smaller)
    assert smaller.to_dict()["minimal"]["title"] == "made smaller"


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


def test_outputs_that_differ_are_told_from_those_that_agree():
    q, k, v = (np.random.default_rng(0).standard_normal((1, 2, n, 4)).astype(np.float32) for n in (3, 5, 5))
    out, lse = ra.attention(q, k, v, returns=("out", "lse"))
    wrong = ra.compare((out, lse + 1), "softmax", q, k, v, returns=("out", "lse"))
    assert "outputs lse differs; out agrees in every call" in words(wrong)
    assert "outputs" not in words(ra.compare((out + 1, lse + 1), "softmax", q, k, v, returns=("out", "lse"))), "nothing tells them apart"


def test_str_is_the_report_without_colours(failing):
    assert "\x1b" not in str(failing) and str(failing).startswith("FAIL")


def test_the_budget_says_what_a_correct_answer_was_allowed():
    eager = words(ra.check("numpy", dtype="bfloat16", profile="eager", suite="quick"))
    assert "sums in unit roundoff 2^-24" in eager and "weights stored to 2^-8" in eager and "scores stored to 2^-8" in eager


@pytest.mark.parametrize(
    "command", ["refattn check a.py:f --variant softmax --dtype float32 --set 'window=[3,0]' --set causal=top_left --inputs " + 9 * "long"]
)
def test_a_folded_command_is_the_same_command(command):
    lines = folded(command)
    assert max(map(len, lines.splitlines())) < 80 and lines.replace(" \\\n   ", "") == command


def test_a_repetition_names_the_functions_and_options_it_was_given(failing):
    def backward(*operands):
        return operands

    options = {"rename": {"causal": "is_causal"}, "returns": ("out", "lse"), "gradients": backward}
    assert "rename={'causal': 'is_causal'}, returns=('out', 'lse'), gradients=backward, inputs=" in replace(failing, options=options).reproduce()
    typed = replace(failing, options={**options, "gradients": True}, target="a.py:f").reproduce()
    assert "--rename causal=is_causal --returns out,lse --gradients auto --set " in typed and typed.endswith("--inputs FILE.npz")
    assert "--set softcap=3.0" in typed, "what was asked"
