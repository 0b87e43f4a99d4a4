"""A pattern of failing rows gets the statement that made it, or none."""

from pathlib import Path

import numpy as np
import planted
import pytest

import refattn as ra
from refattn import catalog, definition
from refattn.oracle.judge import Case
from refattn.oracle.localise import Finding, channels, localise
from refattn.oracle.probes import Probe
from refattn.problem import bind

pytestmark = pytest.mark.compiled

EXAMPLE = Path(__file__).parents[1] / "examples" / "planted_bug.py"


def case(fails, seed=0, T=24, S=40, decides=True, outputs=("out",), **params):
    """A judged call whose failing rows are where `fails(facts)` holds."""
    rng = np.random.default_rng(seed)
    operands = {n: rng.standard_normal((2, h, m, 5)).astype(np.float32) for n, h, m in (("q", 4, T), ("k", 2, S), ("v", 2, S))}
    if "mask" in params:
        operands["mask"] = params.pop("mask")
    problem = bind(catalog.variant("softmax"), (), {**operands, **params}, outputs)
    truth = definition.run(problem)
    b, h, i = np.indices((2, 4, T))
    weights = truth["weights"]
    facts = {"batch": b, "head": h, "query": i, "largest": weights.argmax(-1) if S else i, "sees": (weights > 0).sum(-1), "T": T, **params}
    rows = np.broadcast_to(fails(facts), b.shape)
    ratios = {"out": np.where(rows[..., None], 7.0, 0.5) * np.ones(5), "lse": np.where(rows, 7.0, 0.5)}
    ratios = {name: ratios[name] for name in outputs}
    probe = Probe("synthetic", operands, params, decides=decides)
    return Case(probe, "differs" if rows.any() else "agrees", problem=problem, ratios=ratios, truth=truth)


def found(fails, **options):
    calls = [
        {},
        {"T": 40, "S": 24, "seed": 1},
        {"causal": True, "seed": 2},
        {"window": (5, 0), "seed": 3},
        {"scale": 0.3, "T": 33, "S": 33, "seed": 4},
    ]
    return localise([case(fails, **{**call, **options}) for call in calls])


@pytest.mark.parametrize(
    "fails, says",
    [
        (lambda row: row["query"] >= 16, "is query 16 or a later one"),
        (lambda row: row["query"] < 3, "is a query before 3"),
        (lambda row: row["query"] == 7, "is query 7"),
        (lambda row: row["query"] % 8 == 3, "has a query index of 3 modulo 8"),
        (lambda row: row["query"] % 4 != 0, "has a query index that is no multiple of 4"),
        (lambda row: row["head"] == 2, "is of query head 2"),
        (lambda row: row["head"] >= 2, "is of query head 2 or a later one"),
        (lambda row: row["batch"] == 1, "is of batch 1 or a later one"),
        (lambda row: row["head"] % 2 == 1, "is of a query head at place 1 or later among those that share a key-value head"),
        (lambda row: (row["query"] >= row["T"] // 16 * 16) & (row["T"] > 16), "is in the last, partial tile of 16 queries"),
        (lambda row: row["largest"] >= 16, "has its largest weight at key 16 or later"),
        (lambda row: row["sees"] < 20, "sees fewer than 20 keys"),
        (lambda row: row["sees"] >= 30, "sees 30 keys or more"),
        (lambda row: bool(row.get("window")), "is in a call with window"),
        (lambda row: bool(row.get("causal")), "is in a call with causal"),
        (lambda row: "scale" not in row, "is in a call without scale"),
    ],
)
def test_the_statement_behind_a_pattern_is_found(fails, says):
    finding = found(fails)
    assert finding is not None and finding.text == says


def test_a_few_exceptions_do_not_hide_a_statement_and_are_counted():
    rng = np.random.default_rng(0)
    finding = found(lambda row: (row["query"] >= 16) ^ (rng.random(row["query"].shape) < 0.01))
    assert finding.text == "is query 16 or a later one"
    assert 0 < finding.failing - finding.both < 0.03 * finding.rows and 0 < finding.holding - finding.both < 0.03 * finding.rows
    assert f"each of {finding.both} failing rows ({finding.failing} in all) is query 16" in str(finding)


def test_rows_failing_here_and_there_have_nothing_in_common():
    rng = np.random.default_rng(0)
    assert found(lambda row: rng.random(row["query"].shape) < 0.2) is None
    assert found(lambda row: rng.random(row["query"].shape) < 0.95) is None, "what holds for nearly all rows says nothing"


def test_where_nothing_fails_there_is_nothing_to_say_and_where_all_fails_that_is_said():
    assert found(lambda row: False) is None
    assert localise([]) is None
    assert str(found(lambda row: True)).startswith("all ") and str(found(lambda row: True)).endswith(" rows that were judged fail")


def test_observations_do_not_count():
    kept = case(lambda row: row["query"] >= 5)
    observed = case(lambda row: row["query"] < 5, decides=False)
    assert localise([kept, observed]).text == "is query 5 or a later one"


def test_a_row_fails_by_any_of_its_outputs():
    only_lse = case(lambda row: row["query"] >= 16, outputs=("out", "lse"))
    only_lse.ratios["out"][:] = 0.5
    assert localise([only_lse]).text == "is query 16 or a later one"


def test_words_agree_in_number():
    text = "is query 3"
    assert str(Finding(text, 5, 5, 5, 9)) == "every failing row is query 3; no passing row is"
    assert str(Finding(text, 5, 5, 6, 9)) == "every failing row is query 3; 1 passing row is too"
    assert str(Finding(text, 5, 4, 6, 9)) == "each of 4 failing rows (5 in all) is query 3; 2 passing rows are too"
    assert str(Finding("sees no key", 5, 5, 5, 9)) == "every failing row sees no key; no passing row does"
    assert str(Finding("sees no key", 5, 5, 7, 9)) == "every failing row sees no key; 2 passing rows do too"
    assert found(lambda row: row["sees"] == 0, causal=True).text == "sees no key"


def test_a_score_is_one_at_best_and_nothing_where_all_rows_fail():
    assert Finding("", 5, 5, 5, 9).score == 1
    assert Finding("", 5, 5, 7, 9).score == pytest.approx(min(10 / 12, 1 - 2 / 4))
    assert Finding("", 5, 4, 4, 9).score == pytest.approx(min(8 / 9, 4 / 5))
    assert Finding("", 9, 9, 9, 9).score == Finding("", 0, 0, 3, 9).score == 0


@pytest.mark.parametrize(
    "failing, says",
    [
        ([8, 9, 10, 11], "only channels 8 to 11 of 20 differ"),
        ([3], "only channels 3 of 20 differ"),
        ([1, 5], "only channels 1, 5 of 20 differ"),
        (range(0, 20, 2), "only channels of index 0 modulo 2 of 20 differ"),
        (range(3, 20, 4), "only channels of index 3 modulo 4 of 20 differ"),
        ([0, 2, 4], "only channels 0, 2, 4 of 20 differ"),
        ([0, 1, 3, 4, 6, 7, 9, 10, 12], "only channels 0, 1, 3, 4, 6, 7, 9, 10, ... of 20 differ"),
        (range(18), ""),
        ([], ""),
    ],
)
def test_channels_are_listed_where_they_are_few(failing, says):
    ratios = np.zeros((1, 2, 3, 20))
    ratios[:, 1, 1, list(failing)] = 2.0
    judged = case(lambda row: False)
    assert channels(Case(judged.probe, "differs", ratios={"out": ratios})) == says


@pytest.mark.parametrize("suite", ["quick", "standard"])
@pytest.mark.parametrize("seed", range(3))
def test_the_planted_example_is_pointed_at(suite, seed):
    report = ra.check(f"{EXAMPLE}:attention", suite=suite, seed=seed)
    assert str(report.finding) == "every failing row has its largest weight at key 16 or later; no passing row does"


@pytest.mark.parametrize(
    "fault, says",
    [
        ("M6 mask inverted", "every failing row is in a call with mask; no passing row is"),
        ("M12 NaN on a row that sees nothing", "every failing row sees no key"),
        ("W9 window lost", "every failing row is in a call with window"),
        ("X9 sink dropped", "every failing row is in a call with sinks; no passing row is"),
        ("X12 soft-cap dropped", "every failing row is in a call with softcap"),
        ("H14 keys of batch 0", "every failing row is of batch 1 or a later one"),
        ("S4 user's scale ignored", "every failing row is in a call with scale"),
        ("M1 bottom-right for top-left", "every failing row is in a call with causal='top_left'"),
        ("X5 neighbour's sum", "every failing row has a query index of 0 modulo 2"),
    ],
)
def test_planted_faults_are_pointed_at(fault, says):
    assert str(ra.check(planted.planted(fault)).finding).startswith(says)
