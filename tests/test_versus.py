"""benchmarks/versus.py judges before it times, compares what ran in turns, and shows what it measured."""

import csv
import dataclasses
import io
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import refattn as ra

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.compiled


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture
def versus():
    from benchmarks import versus

    return versus


@pytest.fixture
def peers():
    from benchmarks import peers

    return peers


@pytest.fixture
def referee():
    from benchmarks import referee

    return referee


MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window": 5}, "documents": {"documents": 3}, "bias": {"bias": True}}


def small(versus, mask, ways=("forward", "backward")):
    return versus.Case(mask, 2, 4, 2, 37, 37, 8, ways=ways, **MASKS[mask])


def fake(peers, name="fake", spoil=lambda found: found, calls=None):
    """refattn itself under another name, its answer spoilt."""

    def prepare(work):
        call, arrays = peers.prepare_refattn(work)
        return lambda: (calls.append(name) if calls is not None else None, call())[1], lambda found: spoil(arrays(found))

    return dataclasses.replace(peers.REFATTN, name=name, prepare=prepare)


# ---- the referee ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_the_formulas_of_the_backward_referee_are_the_definitions_derivatives(versus, referee, mask):
    case = dataclasses.replace(small(versus, mask), B=1, Hq=2, Hkv=1, T=6, S=6, D=3)
    work = case.work("backward", "float64", 1)
    truth = ra.gradients("softmax", **work.operands, **work.params, d_out=work.d_out, backend="definition")
    profile = referee.resolve("flash", np.dtype("float64"))
    exact, allowed = referee.gradients(work, 0, 0, profile)
    for name, x, tolerance in zip(("d_q", "d_k", "d_v"), exact, allowed, strict=True):
        found = getattr(truth, name)[0] if name == "d_q" else getattr(truth, name)[0, 0]
        errors = truth.errors[name].reshape(found.shape)
        assert (np.abs(found - x) <= errors + tolerance).all(), name
        assert np.abs(x).max() > 1e6 * (errors + tolerance).max(), "the comparison says nothing"


SPOILS = {
    "scaled by 2%": lambda x: x * 1.02,
    "one row of zeros": lambda x: np.where(np.arange(x.shape[2])[:, None] == x.shape[2] - 1, 0, x),
    "heads exchanged": lambda x: x[:, ::-1],
    "NaN": lambda x: np.where(np.arange(x.shape[3]) == 0, np.nan, x),
    "another shape": lambda x: x[:, :, :-1],
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_wrong_answers_are_refused(versus, peers, referee, dtype, spoil):
    for mask, way in itertools.product(("full", "causal"), ("forward", "backward")):
        work = small(versus, mask).work(way, dtype, 1)
        call, arrays = peers.prepare_refattn(work)
        right = arrays(call())
        assert referee.worst(work, right, "flash") <= 1.0
        for n in range(len(right)):
            spoilt = [SPOILS[spoil](x.astype(np.float64)) if m == n else x for m, x in enumerate(right)]
            assert referee.worst(work, spoilt, "flash") > 1.0, (mask, way, n)


@pytest.mark.parametrize("name", ["numpy", *(pytest.param(name, marks=pytest.mark.peer) for name in ("torch", "jax", "onnxruntime"))])
def test_every_implementation_is_asked_for_the_same_thing(versus, peers, referee, name):
    """Each answers every mask, way and dtype rightly, or declines before it is timed."""
    peer = next(p for p in peers.PEERS if p.name == name)
    assert not peer.missing(), f"{peer.missing()} is not installed"
    answered = set()
    for dtype, way, mask in itertools.product(versus.DTYPES, versus.WAYS, MASKS):
        work = small(versus, mask).work(way, dtype, 1)
        try:
            call, arrays = peers.asked(peer, work)
        except peers.Declined:
            continue
        assert referee.worst(work, arrays(call()), peer.profile) <= 1.0, (dtype, way, mask)
        answered.add((dtype, way, mask))
    assert {("float32", "forward", mask) for mask in MASKS} <= answered
    assert {way for _, way, _ in answered} == set(peer.ways)


def test_decoding_and_latency_shapes_are_judged_too(versus, peers):
    for case in versus.CASES:
        if case.group in ("latency", "decode"):
            tiny = dataclasses.replace(case, S=min(case.S, 50))
            ours, theirs = versus.measure(tiny, "float32", "forward", 1, [peers.REFATTN, peers.PEERS[-1]], 1, 1e-4)[1:]
            assert not ours.reason and not theirs.reason
            assert 0 < ours.error <= 1 and 0 < theirs.error <= 1


# ---- timing --------------------------------------------------------------------------------------------------------------------


def test_samples_are_taken_in_turns_and_last_long_enough(versus, monkeypatch):
    seconds = {"quick": 0.001, "slow": 0.5}
    now, log = [0.0], []

    def call(name):
        def run():
            now[0] += seconds[name]
            log.append(name)

        return run

    monkeypatch.setattr(versus.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(versus.time, "sleep", lambda rest: log.append("rest"))
    samples = versus.interleaved({name: call(name) for name in seconds}, rounds=3, least=0.02, rest=0.01)
    assert {name: [round(x, 9) for x in xs] for name, xs in samples.items()} == {name: [s] * 3 for name, s in seconds.items()}
    turns = [(name, len(list(group))) for name, group in itertools.groupby(log[log.index("rest") :])]
    quick, slow = [("rest", 1), ("quick", 21)], [("rest", 1), ("slow", 1)]  # a quick one begins with a call that is not timed
    assert turns == [*quick, *slow, *slow, *quick, *quick, *slow]


def test_a_ratio_is_the_median_of_ratios_within_a_round(versus, peers, monkeypatch):
    samples = {"refattn": [1.0, 10.0, 100.0], "fake": [2.0, 30.0, 50.0], "ceiling": [4.0, 1.0, 2.0]}
    monkeypatch.setattr(versus, "interleaved", lambda calls, rounds, least: {name: samples[name] for name in calls})
    case = small(versus, "causal")
    ceiling, ours, theirs = versus.measure(case, "float32", "forward", 1, [peers.REFATTN, fake(peers)], 3)
    pairs = sum(range(1, 38))
    assert (ours.seconds, ours.ratio, theirs.seconds, theirs.ratio) == (10.0, 1.0, 30.0, 2.0)
    assert ours.rate == 4 * 2 * 4 * pairs * 8 / 10.0
    assert ceiling.seconds == 1.0 and ceiling.rate > 0 and math.isnan(ceiling.share)


def test_whoever_is_wrong_is_named_and_never_timed(versus, peers):
    calls = []
    wrong = fake(peers, "wrong", lambda found: tuple(1.02 * x for x in found), calls)
    absent = dataclasses.replace(fake(peers, "absent"), dtypes=("float64",))
    for way in ("forward", "backward"):
        calls.clear()
        rows = versus.measure(small(versus, "full"), "float32", way, 1, [peers.REFATTN, wrong, absent], 1, 1e-4)
        assert calls == ["wrong"]
        row = {r.implementation: r for r in rows}
        assert math.isnan(row["wrong"].seconds) and math.isnan(row["wrong"].ratio) and row["wrong"].error > 1
        assert row["wrong"].reason.startswith("WRONG: its error is")
        assert row["absent"].reason == "not asked in float32"
        assert row["refattn"].ratio == 1.0 and row["refattn"].seconds > 0
        assert any("wrong was not timed on 1 case" in remark for remark in versus.remarks(rows))


def test_nobody_is_compared_with_a_wrong_answer_of_ours(versus, peers):
    ours = fake(peers, "refattn", lambda found: tuple(1.02 * x for x in found))
    rows = versus.measure(small(versus, "full"), "float32", "forward", 1, [ours, fake(peers)], 1, 1e-4)
    assert rows[1].reason.startswith("WRONG") and math.isnan(rows[1].rate)
    assert math.isnan(rows[2].ratio) and rows[2].seconds > 0
    assert "wrong" in text(versus.tables(rows)[0])


def test_the_ceilings_are_above_what_is_measured(versus):
    from benchmarks import ceilings

    for ceiling in (ceilings.MultiplyAdd(np.dtype(np.float32), 1), ceilings.MultiplyAdd(np.dtype(np.float64), 2), ceilings.Read(1), ceilings.Read(2)):
        samples = versus.interleaved({"it": ceiling}, 2, 1e-4)
        assert min(samples["it"]) > 1e-4, "too short: the compiler has deleted the work"
    assert ceilings.Read(2).bytes == ceilings.READ
    ceiling = ceilings.Read(1)
    ceiling()
    count = 64 // ceiling.a.itemsize
    assert ceiling.results[0, :count].sum() == ceiling.a.size, "not every element was read"


# ---- what is shown -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(versus):
    nan = math.nan
    key = (1, "float32", "forward")
    return [
        versus.Row(*key, "full", "1 x 8 x 128 x 64", "ceiling", 1.0, rate=2e11, share=1.0),
        versus.Row(*key, "full", "1 x 8 x 128 x 64", "refattn", 0.001, 1.0, 1e11, 0.5, 0.1),
        versus.Row(*key, "full", "1 x 8 x 128 x 64", "torch", 0.002, 2.0, 5e10, 0.25, 0.1),
        versus.Row(*key, "full", "1 x 8 x 512 x 64", "ceiling", 1.0, rate=1e11, share=0.5),
        versus.Row(*key, "full", "1 x 8 x 512 x 64", "refattn", 0.004, 1.0, 1.6e11, 0.8, 0.1),
        versus.Row(*key, "full", "1 x 8 x 512 x 64", "torch", 0.032, 8.0, 2e10, 0.1, 0.1),
        versus.Row(*key, "causal", "1 x 8 x 128 x 64", "ceiling", 1.0, rate=1e11, share=0.5),
        versus.Row(*key, "causal", "1 x 8 x 128 x 64", "refattn", 0.004, 1.0, 1.6e11, 0.8, 0.1),
        versus.Row(*key, "causal", "1 x 8 x 128 x 64", "torch", nan, nan, nan, nan, 7.0, "WRONG: its error is 7 times the tolerance"),
    ]


def text(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_table_has_a_row_for_every_case_and_geometric_means(versus, rows):
    (table,) = versus.tables(rows)
    lines = [line.split() for line in text(table).splitlines()]
    assert ["full", *"1 x 8 x 128 x 64".split(), "1", "100", "50%", "2.00"] in lines
    assert ["full", *"1 x 8 x 512 x 64".split(), "4", "160", "80%", "8.00"] in lines
    assert ["causal", *"1 x 8 x 128 x 64".split(), "4", "160", "80%", "wrong"] in lines
    assert ["full", "geometric", "mean", "63%", "4.00"] in lines
    assert ["full", "and", "causal", "geometric", "mean", "68%", "4.00"] in lines
    assert ["ceiling:", "200", "Gflop/s"] in lines


def test_shares_are_of_the_best_ceiling_of_their_kind(versus, rows):
    decode = [dataclasses.replace(r, group="decode", rate=r.rate / 100) for r in rows[:2]]
    double = [dataclasses.replace(r, dtype="float64", rate=r.rate / 2) for r in rows[:2]]
    half = [dataclasses.replace(r, dtype="bfloat16") for r in rows[3:5]]
    blank = [dataclasses.replace(r, share=math.nan) for r in [*rows, *decode, *double, *half]]
    found = [r.share for r in versus.with_shares(blank)]
    np.testing.assert_allclose(found, [*(r.share for r in rows), 1.0, 0.5, 1.0, 0.5, 0.5, 0.8], rtol=2**-50)


def test_a_csv_holds_every_row(versus, rows, tmp_path):
    versus.write_csv(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        for name, x in dataclasses.asdict(row).items():
            absent = isinstance(x, float) and math.isnan(x)
            assert line[name] == ("" if absent else str(x)), name


def test_a_plot_is_a_picture(versus, rows, tmp_path):
    versus.write_plot(tmp_path / "rows.png", rows, "a machine")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="nothing to plot"):
        versus.write_plot(tmp_path / "none.png", [r for r in rows if r.implementation != "torch"], "a machine")


def test_who_is_not_installed_is_left_out_with_a_line(versus, peers, capsys):
    missing = dataclasses.replace(fake(peers, "elsewhere"), packages=("no_such_package_anywhere",))
    assert versus.installed([peers.REFATTN, missing], Console(width=200)) == [peers.REFATTN]
    printed = capsys.readouterr().out
    assert "elsewhere: left out, no_such_package_anywhere is not installed" in printed
    assert f"refattn: refattn {ra.__version__} numba " in printed


def test_the_program_runs_from_the_command_line(tmp_path):
    command = [sys.executable, "benchmarks/versus.py", "--quick", "--threads", "1", "--only", "latency", "--peers", "numpy"]
    done = subprocess.run([*command, "--csv", str(tmp_path / "rows.csv")], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "forward, float32, 1 thread" in done.stdout and "vectors of" in done.stdout
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = {line["implementation"]: line for line in csv.DictReader(file)}
    assert set(read) == {"ceiling", "refattn", "numpy"}
    assert float(read["numpy"]["ratio"]) > 0 and float(read["refattn"]["ratio"]) == 1.0
