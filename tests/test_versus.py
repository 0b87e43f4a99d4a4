"""benchmarks/versus.py judges before it times, compares what ran in turns, and shows what it measured."""

import csv
import dataclasses
import io
import itertools
import math
import subprocess
import sys
import textwrap
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


@pytest.fixture
def report():
    from benchmarks import report

    return report


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 5},
    "documents": {"kind": "documents"},
    "bias": {"kind": "bias"},
    "alibi": {"kind": "alibi"},
    "relative": {"kind": "relative"},
}


def small(mask, **changes):
    from benchmarks.cases import Case

    return Case(mask, **{"B": 2, "Hq": 4, "Hkv": 2, "T": 37, "S": 37, "D": 8, **MASKS.get(mask, {}), **changes})


def answers(peer, work):
    """What every form of calling it returns."""
    from benchmarks.peers import asked

    prepared = asked(peer, work)
    return {form: prepared.arrays(call()) for form, call in prepared.calls.items()}


def fake(peers, name="fake", spoil=lambda found: found, calls=None):
    """refattn itself under another name, its answer spoilt."""

    def prepare(work):
        prepared = peers.prepare_refattn(work)

        def call():
            if calls is not None:
                calls.append(name)
            return prepared.calls[""]()

        return peers.Prepared({"": call}, lambda found: spoil(prepared.arrays(found)))

    return dataclasses.replace(peers.REFATTN, name=name, prepare=prepare)


# ---- what is asked -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["alibi", "relative", "documents"])
def test_a_function_says_entry_by_entry_what_the_array_says(mask):
    work = small(mask, B=1, T=5, S=5).work("forward", "float64", 1)
    functions = work.functions
    for h, i, j in itertools.product(range(4), range(5), range(5)):
        if mask == "documents":
            assert functions.mask_mod(0, h, i, j, *functions.aux) == work.operands["mask"][i, j]
        else:
            assert functions.score_mod(0.75, 0, h, i, j, *functions.aux) == 0.75 + work.operands["bias"][h, i, j]


def test_operations_are_counted_for_visible_pairs():
    counts = {"full": 37 * 37, "causal": 37 * 38 // 2, "window": 5 * 37 - 10}
    for mask, pairs in counts.items():
        for way, products in (("forward", 2), ("backward", 5), ("training", 7)):
            assert small(mask).work(way, "float32", 1).flops == products * 2 * 2 * 4 * pairs * 8


# ---- the referee ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_the_formulas_of_the_backward_referee_are_the_definitions_derivatives(referee, mask):
    n = 12 if mask == "documents" else 6  # eight documents: some of two tokens
    work = small(mask, B=1, Hq=2, Hkv=1, T=n, S=n, D=3).work("backward", "float64", 1)
    truth = ra.gradients("softmax", **work.operands, **work.params, d_out=work.d_out, backend="definition")
    exact, allowed = referee.gradients(work, 0, 0, referee.resolve("flash", np.dtype("float64")))
    for name, x, tolerance in zip(("d_q", "d_k", "d_v"), exact, allowed, strict=True):
        found = getattr(truth, name)[0] if name == "d_q" else getattr(truth, name)[0, 0]
        errors = truth.errors[name].reshape(found.shape)
        assert (np.abs(found - x) <= errors + tolerance).all(), name
        assert np.abs(x).max() > 1e6 * (errors + tolerance).max(), "the comparison says nothing"


def test_running_sums_are_those_of_whole_tiles(referee):
    rng = np.random.default_rng(0)
    weights, rows, before = rng.standard_normal((70, 3)), rng.standard_normal((70, 2)), rng.standard_normal((3, 2))
    ends = [before + weights[:n].T @ rows[:n] for n in (32, 64, 70)]
    np.testing.assert_allclose(referee._squares_of_running_sums(weights, rows, before), sum(x**2 for x in ends), rtol=1e-12)


#: By how much a scaled answer is wrong: about ten units of the format with 8 bits, half of what the others are refused for.
SCALE = {"float32": 1.02, "float64": 1.02, "bfloat16": 1.2}
SPOILS = {
    "scaled": lambda x, dtype: x * SCALE[dtype],
    "one row of zeros": lambda x, dtype: np.where(np.arange(x.shape[2])[:, None] == x.shape[2] - 1, 0, x),
    "heads exchanged": lambda x, dtype: x[:, ::-1],
    "NaN": lambda x, dtype: np.where(np.arange(x.shape[3]) == 0, np.nan, x),
    "another shape": lambda x, dtype: x[:, :, :-1],
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_wrong_answers_are_refused(peers, referee, dtype, spoil):
    for mask, way in itertools.product(("full", "causal"), ("forward", "training")):
        work = small(mask).work(way, dtype, 1)
        right = answers(peers.REFATTN, work)[""]
        assert referee.worst(work, right, "flash") <= 1.0
        for n in range(len(right)):
            spoilt = [SPOILS[spoil](x.astype(np.float64), dtype) if m == n else x for m, x in enumerate(right)]
            assert referee.worst(work, spoilt, "flash") > 1.0, (mask, way, n)


def test_a_forgotten_bias_is_refused(peers, referee):
    for way in ("forward", "training"):
        work = small("bias").work(way, "float32", 1)
        forgotten = answers(peers.BARE, work)[""]
        assert referee.worst(work, forgotten, "flash") > 1.0
        assert referee.worst(peers.bare(work), forgotten, "flash") <= 1.0


def test_a_forgotten_cap_is_refused(peers, referee):
    work = small("cap", kind="cap").work("forward", "float32", 1)
    assert peers.bare(work).params == {} and work.params == {"softcap": 20.0}
    forgotten = answers(peers.BARE, work)[""]
    assert referee.worst(work, forgotten, "flash") > 1.0
    assert referee.worst(peers.bare(work), forgotten, "flash") <= 1.0


NAMES = ["refattn", "numpy", *(pytest.param(name, marks=pytest.mark.peer) for name in ("torch", "jax", "onnxruntime"))]


@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_is_asked_for_the_same_thing(peers, referee, name):
    """Each answers every mask, way and dtype rightly, however it is called, or declines before it is timed."""
    from benchmarks.cases import DTYPES, WAYS

    peer = next(p for p in (peers.REFATTN, *peers.PEERS) if p.name == name)
    assert not peer.missing(), f"{peer.missing()} is not installed"
    answered, forms = set(), set()
    for dtype, way, (mask, kv_heads) in itertools.product(DTYPES, WAYS, [*((mask, 2) for mask in MASKS), ("full", 4)]):
        work = small(mask, Hkv=kv_heads).work(way, dtype, 1)
        try:
            found = answers(peer, work)
        except peers.Declined:
            continue
        for form, arrays in found.items():
            assert referee.worst(work, arrays, peer.profile) <= 1.0, (dtype, way, mask, kv_heads, form)
            forms.add(form)
        answered.add((dtype, way, mask))
    assert {("float32", "forward", mask) for mask in MASKS} <= answered
    assert {way for _, way, _ in answered} == set(peer.ways)
    expected = {"torch": {"enable_gqa", "repeated keys", "boolean mask, enable_gqa"}, "onnxruntime": {"Attention", "MultiHeadAttention"}}
    assert expected.get(name, {""}) <= forms


@pytest.mark.parametrize("name", NAMES)
def test_a_cap_is_taken_as_a_number_or_declined(peers, referee, name):
    peer = next(p for p in (peers.REFATTN, *peers.PEERS) if p.name == name)
    work = small("cap", kind="cap").work("forward", "float32", 1)
    if name in ("torch", "jax"):
        with pytest.raises(peers.Declined, match="knows no soft-cap"):
            peer.prepare(work)
        return
    for found in answers(peer, work).values():
        assert referee.worst(work, found, peer.profile) <= 1.0


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of torch
@pytest.mark.parametrize("mask", ["causal", "documents", "alibi", "cap"])
def test_flex_attention_compiled_is_asked_for_the_same_thing(peers, referee, mask):
    flex = next(p for p in peers.PEERS if p.name == "flex")
    work = small(mask, **({"kind": "cap"} if mask == "cap" else {})).work("forward", "float32", 1)
    if not any(map(peers.shutil.which, peers.COMPILERS)):  # then it must say so; what it says is tested below
        with pytest.raises(peers.Declined):
            flex.prepare(work)
        return
    found = answers(flex, work)[""]
    assert referee.worst(work, found, flex.profile) <= 1.0


@pytest.mark.peer
def test_flex_attention_is_declined_without_a_compiler(peers, monkeypatch):
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    flex = next(p for p in peers.PEERS if p.name == "flex")
    with pytest.raises(peers.Declined, match="needs a C\\+\\+ compiler"):
        flex.prepare(small("full").work("forward", "float32", 1))


def test_decoding_and_latency_shapes_are_judged_too(versus, peers, monkeypatch):
    from benchmarks.cases import CASES

    monkeypatch.setattr(versus, "CACHES", 2**20)
    numpy = next(p for p in peers.PEERS if p.name == "numpy")
    for case in CASES:
        if case.group in ("latency", "decode"):
            tiny = dataclasses.replace(case, S=min(case.S, 50))
            ours, theirs = versus.measure(tiny, "float32", "forward", 1, [peers.REFATTN, numpy], 1, 1e-4)[1:]
            assert not ours.reason and not theirs.reason
            assert 0 < ours.error <= 1 and 0 < theirs.error <= 1


# ---- timing --------------------------------------------------------------------------------------------------------------------


def run(program):
    """In a process of its own, whose threads nobody has started."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.peer
def test_torch_is_started_before_numba():
    run("""
        from benchmarks import versus
        from numba.np.ufunc import parallel

        order = []
        start, measure = versus.start_torch, versus.measure
        versus.start_torch = lambda threads: (order.append(("torch", parallel._is_initialized)), start(threads))
        versus.measure = lambda *arguments: (order.append(("numba", parallel._is_initialized)), measure(*arguments))[1]
        versus.session(1, versus.parse("--threads 1 --only latency --ways forward --peers torch --quick".split()))
        assert order[0] == ("torch", False) and order[1][0] == "numba", order
    """)


@pytest.mark.peer
def test_torch_is_not_started_after_numba():
    run("""
        import numba
        from benchmarks import peers

        @numba.njit(parallel=True)
        def together(n):
            total = 0
            for i in numba.prange(n):
                total += i
            return total

        together(4)
        try:
            peers.start_torch(1)
        except RuntimeError as error:
            assert "start torch first" in str(error)
        else:
            raise SystemExit("it was started")
    """)


def test_the_fastest_form_counts(versus, peers, monkeypatch):
    now = [0.0]

    def taking(*seconds):
        left = list(seconds)
        return lambda: now.__setitem__(0, now[0] + (left.pop(0) if len(left) > 1 else left[0]))

    monkeypatch.setattr(versus.time, "perf_counter", lambda: now[0])
    prepared = peers.Prepared({"compiles": taking(9.0, 1.0), "steady": taking(2.0)}, lambda found: found)
    assert versus.fastest(prepared) == (9.0, "compiles")
    assert versus.fastest(peers.Prepared({"only": taking(3.0)}, lambda found: found)) == (3.0, "only")


def test_decoding_takes_turns_on_caches(versus, peers, monkeypatch):
    case = small("full", T=1, S=64)
    monkeypatch.setattr(type(case), "reads", property(lambda case: True))
    bytes_each = case.work("forward", "float32", 1).bytes
    monkeypatch.setattr(versus, "CACHES", 3 * bytes_each)
    prepared = []

    def prepare(work):
        prepared.append(work.operands["k"])
        return peers.prepare_refattn(work)

    versus.measure(case, "float32", "forward", 1, [dataclasses.replace(peers.REFATTN, prepare=prepare)], 1, 1e-4)
    assert len(prepared) == 3
    assert len({k.ctypes.data for k in prepared}) == 3, "one cache under three names"
    log = []
    call = versus.in_turn([lambda n=n: log.append(n) for n in range(3)])
    for _ in range(5):
        call()
    assert log == [0, 1, 2, 0, 1]


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
    ceiling, ours, theirs = versus.measure(small("causal"), "float32", "forward", 1, [peers.REFATTN, fake(peers)], 3)
    pairs = sum(range(1, 38))
    assert (ours.seconds, ours.ratio, theirs.seconds, theirs.ratio) == (10.0, 1.0, 30.0, 2.0)
    assert ours.rate == 4 * 2 * 4 * pairs * 8 / 10.0
    assert ceiling.seconds == 1.0 and ceiling.rate > 0 and math.isnan(ceiling.share)
    assert ours.share == pytest.approx(ours.rate * 10.0 * 0.1 / ceiling.rate, rel=1e-12)  # of 4 / 1, 1 / 10 and 2 / 100
    assert theirs.share == pytest.approx(ours.rate * 10.0 * (1 / 25) / ceiling.rate, rel=1e-12)  # of 4 / 2, 1 / 30 and 2 / 50


def test_whoever_is_wrong_or_fails_is_named_and_never_timed(versus, peers, report):
    calls = []

    def fails(work):
        raise ValueError("no such thing\nsecond line")

    wrong = fake(peers, "wrong", lambda found: tuple(1.02 * x for x in found), calls)
    absent = dataclasses.replace(fake(peers, "absent"), dtypes=("float64",))
    failing = dataclasses.replace(peers.REFATTN, name="failing", prepare=fails)
    for way in ("forward", "training"):
        calls.clear()
        rows = versus.measure(small("full"), "float32", way, 1, [peers.REFATTN, wrong, absent, failing], 1, 1e-4)
        assert calls == ["wrong"] * 2  # to find its first call's time, and to be judged
        row = {r.implementation: r for r in rows}
        assert math.isnan(row["wrong"].seconds) and math.isnan(row["wrong"].ratio) and row["wrong"].error > 1
        assert row["wrong"].reason.startswith("WRONG: its error is") and row["wrong"].refused
        assert row["absent"].reason == "not asked in float32" and not row["absent"].refused
        assert row["failing"].reason == "FAILED: ValueError: no such thing" and row["failing"].refused
        assert row["refattn"].ratio == 1.0 and row["refattn"].seconds > 0
        assert any("wrong was not timed on 1 case" in remark for remark in report.remarks(rows))


def test_nobody_is_compared_with_a_wrong_answer_of_ours(versus, peers, report):
    ours = fake(peers, "refattn", lambda found: tuple(1.02 * x for x in found))
    rows = versus.measure(small("full"), "float32", "forward", 1, [ours, fake(peers)], 1, 1e-4)
    assert rows[1].reason.startswith("WRONG") and math.isnan(rows[1].rate)
    assert math.isnan(rows[2].ratio) and rows[2].seconds > 0
    assert "wrong" in text(report.tables(rows)[0])
    ratio = next(t for t in report.TARGETS if t.says.startswith("forward, float32: ahead"))
    assert math.isnan(ratio.worst(rows)[0])


def test_the_ceilings_are_above_what_is_measured(versus):
    from benchmarks import ceilings

    for ceiling in (ceilings.MultiplyAdd(np.dtype(np.float32), 1), ceilings.MultiplyAdd(np.dtype(np.float64), 2), ceilings.Read(1), ceilings.Read(2)):
        samples = versus.interleaved({"it": ceiling}, 2, 1e-4)
        assert min(samples["it"]) > 1e-4, "too short: the compiler has deleted the work"
    assert ceilings.Read(2).bytes == ceilings.READ
    ceiling = ceilings.Read(1)
    ceiling()
    assert ceiling.results.sum() == ceilings.READ // 4, "not every element was read"
    for threads in (1, 2):
        turns = [[np.full((4, 2, 128), x, np.float32), np.full((4, 128), 2 * x, np.float32)] for x in (1, 3)]
        ceiling = ceilings.Read(threads, turns)
        assert ceiling.bytes == turns[0][0].nbytes + turns[0][1].nbytes
        for last in (2, 6, 2):
            ceiling()
            assert ceiling.results.sum() == last * 4 * 128, "another turn's array was read"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident pages are counted on Linux")
def test_memory_is_measured_in_a_process_of_its_own():
    from benchmarks import fresh

    length = 8192
    for way in ("forward", "training"):
        extra, seconds = fresh.memory(way, length, 1)
        assert abs(extra) < length**2, "a matrix of scores was kept"
        assert seconds > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident pages are counted on Linux")
def test_a_matrix_of_scores_that_is_kept_is_seen(monkeypatch):
    from benchmarks import fresh

    call = 'return (ra.attention(q, k, v, backend="cpu"),)'
    assert call in fresh.MEMORY
    monkeypatch.setattr(fresh, "MEMORY", fresh.MEMORY.replace(call, "np.ones((q.shape[2], k.shape[2]), np.float32); return (v.copy(),)"))
    assert 0.9 < fresh.memory("forward", 4096, 1)[0] / (4 * 4096**2) < 1.1  # Linux counts in batches


def test_a_first_call_is_measured_without_and_with_compiled_code(monkeypatch):
    from benchmarks import fresh

    seconds = iter([7.0, 0.3, 0.1, 0.2])
    caches = []

    def run(program, threads, **environment):
        caches.append(environment["NUMBA_CACHE_DIR"])
        return str(next(seconds))

    monkeypatch.setattr(fresh, "_run", run)
    assert fresh.first_call(1, warm_runs=3) == (7.0, 0.2)
    assert len(set(caches)) == 1 and not Path(caches[0]).exists()
    monkeypatch.undo()
    assert float(fresh._run(fresh.FIRST, 1)) > 0


# ---- what is shown -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(report):
    shapes = {n: (1, 8, 8, n, n, 64) for n in (128, 512)}

    def row(group, n, implementation, *numbers, **more):
        names = ("seconds", "ratio", "rate", "share")
        return report.Row(1, "float32", "forward", group, *shapes[n], implementation, **dict(zip(names, numbers, strict=False)), **more)

    return [
        row("full", 128, "ceiling", 1.0, math.nan, 2e11, 1.0),
        row("full", 128, "refattn", 0.001, 1.0, 1e11, 0.5),
        row("full", 128, "torch", 0.002, 2.0, 5e10, 0.25),
        row("full", 512, "ceiling", 1.0, math.nan, 1e11, 0.5),
        row("full", 512, "refattn", 0.004, 1.0, 1.6e11, 0.8),
        row("full", 512, "torch", 0.032, 8.0, 2e10, 0.1, form="enable_gqa"),
        row("causal", 128, "ceiling", 1.0, math.nan, 1e11, 0.5),
        row("causal", 128, "refattn", 0.004, 1.0, 1.6e11, 0.8),
        row("causal", 128, "torch", error=7.0, reason="WRONG: its error is 7 times the tolerance"),
    ]


def text(table):
    console = Console(width=250, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_table_has_a_row_for_every_case_and_geometric_means(report, rows):
    (table,) = report.tables(rows)
    lines = [" ".join(line.split()) for line in text(table).splitlines()]
    assert "full 1 x 8 x 128 x 64 1 100 50% 2 2.00" in lines
    assert "full 1 x 8 x 512 x 64 4 160 80% 32 8.00" in lines
    assert "causal 1 x 8 x 128 x 64 4 160 80% wrong wrong" in lines
    assert "full geometric mean 63% 4.00" in lines
    assert "full least 2.00" in lines
    assert "full and causal geometric mean 68% 4.00" in lines
    assert "ceiling: 200 Gflop/s" in lines


def test_markdown_holds_what_the_tables_hold(report, rows):
    lines = report.markdown(rows).splitlines()
    assert lines[0] == "**forward, float32, 1 thread: time of each over refattn's** (ceiling: 200 Gflop/s)"
    assert "| mask | B x H x T x D | refattn ms | G/s | of ceiling | torch ms | torch |" in lines
    assert "| full | 1 x 8 x 512 x 64 | 4 | 160 | 80% | 32 | 8.00 |" in lines
    assert "| causal | 1 x 8 x 128 x 64 | 4 | 160 | 80% | wrong | wrong |" in lines


def test_requirements_are_met_by_the_worst_case(report, rows):
    def verdict(rows, says, **more):
        line = next(line for line in text(report.targets(rows, **more)).splitlines() if line.startswith(says))
        return " ".join(line[len(says) :].split())

    ahead = "forward, float32: ahead of torch on every shape of the grid"
    right = [r for r in rows if not r.refused]
    assert verdict(right, ahead) == "2.00 float32, 1 thread, full 1 x 8 x 128 x 64 met"
    slower = [dataclasses.replace(r, ratio=0.9 * r.ratio / 2) if r.implementation == "torch" else r for r in right]
    assert verdict(slower, ahead).startswith("0.90") and verdict(slower, ahead).endswith("not met")
    assert verdict(rows, ahead).endswith("not met"), "a wrong answer does not count as beaten"
    assert verdict(right, ahead, undisturbed=False).endswith("slowed down")
    assert verdict(right, "decode, float32: at least 3 times as fast as torch") == "- not measured"
    key = (2, "float32", "forward")
    bias = report.Row(*key, "bias", 1, 8, 8, 2048, 2048, 64, "bare", seconds=1.0, ratio=0.5)
    assert verdict([bias], "a dense bias: at most 1.15 times the bare kernel").startswith("2.00")
    head = report.Row(*key, "one head", 1, 1, 1, 4096, 4096, 64, "1 thread", seconds=1.0, ratio=1.8)
    assert verdict([head], "fewer heads than threads: at least three quarters of the ideal gain").startswith("90%")
    small = report.Row(*key, "latency", 1, 8, 8, 16, 16, 64, "refattn", seconds=59e-6)
    assert verdict([small], "T = S = 16: under 60 microseconds").startswith("59 us")
    memory = report.Row(*key, "memory", 1, 1, 1, 131072, 131072, 64, "refattn", seconds=1.0, extra=2.0**29)
    assert verdict([memory], "forward, T = S = 131072: at most 1 GiB beyond operands and results").startswith("0.50 GiB")
    shorter = dataclasses.replace(memory, T=16384)
    assert verdict([shorter], "forward, T = S = 131072: at most 1 GiB beyond operands and results") == "- not measured"


def test_every_requirement_is_about_something_that_is_measured(report):
    """Every group, way, dtype and implementation that versus.py can measure, at a number that meets nothing, reaches every requirement."""
    from benchmarks.cases import CASES

    rows = [
        report.Row(1, dtype, way, c.group, c.B, c.Hq, c.Hkv, c.T, c.S, c.D, name, seconds=1.0, first=9.0, ratio=1.0, share=0.0)
        for c in CASES
        for dtype in c.dtypes
        for way in c.ways
        for name in ("refattn", "torch", "flex", "bare", "1 thread")
    ]
    fresh = [report.Row(1, "float32", way, "memory", 1, 1, 1, 131072, 131072, 64, "refattn", extra=2.0**33) for way in ("forward", "training")]
    fresh += [report.Row(1, "float32", way, "first call", 1, 8, 8, 128, 128, 64, "refattn", seconds=99.0) for way in ("compiling", "cached")]
    for target in report.TARGETS:
        worst, row = target.worst([*rows, *fresh])
        assert row is not None and math.isfinite(worst), target.says


def test_a_csv_holds_every_row(report, rows, tmp_path):
    report.write_csv(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        for name, x in dataclasses.asdict(row).items():
            absent = isinstance(x, float) and math.isnan(x)
            assert line[name] == ("" if absent else str(x)), name
    assert [str(r) for r in report.read_csv(tmp_path / "rows.csv")] == [str(r) for r in rows]


def test_a_plot_is_a_picture(report, rows, tmp_path):
    report.write_plot(tmp_path / "rows.png", rows, "a machine")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="nothing to plot"):
        report.write_plot(tmp_path / "none.png", [r for r in rows if r.implementation != "torch"], "a machine")


def test_every_peer_has_a_colour(report, peers):
    assert set(report.COLOURS) == {p.name for p in peers.PEERS}
    assert set(report.OURSELVES) == {peers.BARE.name, peers.ALONE.name}


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
    assert set(read) == {"ceiling", "refattn", "numpy", "bare", "1 thread"}
    assert float(read["numpy"]["ratio"]) > 0 and float(read["refattn"]["ratio"]) == 1.0


def test_a_number_of_threads_that_is_not_there_is_refused(versus, capsys):
    with pytest.raises(SystemExit):
        versus.parse(["--threads", "100000"])
    assert "this process may use 1 to" in capsys.readouterr().err
