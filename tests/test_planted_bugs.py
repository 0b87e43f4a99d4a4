"""The judge lets the right kernels pass and none of the wrong ones, with the arithmetic it assumes of anybody."""

import planted
import planted_scope
import planted_variants
import pytest

import refattn as ra
from refattn import catalog
from refattn.oracle import probes
from refattn.precision import as_dtype

pytestmark = pytest.mark.compiled

DTYPES = ("float32", "bfloat16")
TILES = (5, 16, planted.FAR)
VARIANTS = tuple(planted_variants.TRANSCRIPTIONS)
VARIANT_FAULTS = [(name, fault) for name, (_, _, faults) in planted_variants.TRANSCRIPTIONS.items() for fault in faults]


def check_variant(name, fault="", **options):
    returns = planted_variants.TRANSCRIPTIONS[name][1]
    return ra.check(planted_variants.transcription(name, fault), name, returns=returns, **options)


def test_the_faults_are_many_and_every_variant_has_some():
    assert len(planted.FAULTS) >= 30
    scored = {name for name in ra.variants() if catalog.variant(name).plan is not None}
    assert set(VARIANTS) | {"softmax"} >= scored, "a new variant needs a transcription and faults of its own; recurrences are test_state_oracle.py's"
    assert all(faults for _, _, faults in planted_variants.TRANSCRIPTIONS.values())


def test_every_row_of_the_catalogue_of_faults_is_planted_or_says_why_not():
    assert planted_scope.planted_rows() | set(planted_scope.NOT_PLANTED) == set(planted_scope.rows())
    assert not planted_scope.planted_rows() & set(planted_scope.NOT_PLANTED)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_right_kernel_passes_whatever_the_draw(dtype, tile):
    for seed in range(20):
        report = ra.check(planted.candidate(planted.right(tile=tile)), dtype=dtype, seed=seed)
        assert report.passed, f"seed {seed}\n{report}"


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_the_right_kernel_passes_in_narrower_formats(dtype):
    for seed in range(3):
        report = ra.check(planted.candidate(planted.RIGHT), dtype=dtype, seed=seed)
        assert report.passed, f"seed {seed}\n{report}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", planted.FAULTS)
def test_no_fault_passes_and_each_is_found_by_its_numbers(fault, dtype):
    """A mutant that raises, or answers in the wrong shape, or is never right would be found by any judge."""
    assert not ra.check(planted.planted(fault), dtype=dtype, suite="quick").passed
    report = ra.check(planted.planted(fault), dtype=dtype, suite="standard")
    assert not report.passed
    if fault.startswith("R3"):
        assert {case.reason for case in report.failures} == {"it wrote into its operand q"}
        return
    assert {case.outcome for case in report.cases} == {"agrees", "differs"}
    assert any(case.outcome == "agrees" and case.elements for case in report.cases)


@pytest.mark.parametrize("stages, says", [(planted.RIGHT, False), (planted.OBSERVED["M14 zero times NaN"], True)])
def test_zero_times_nan_is_observed_and_does_not_decide(stages, says):
    report = ra.check(planted.candidate(stages))
    assert report.passed
    assert any("NaN in a hidden key" in note for note in report.notes) == says


def test_the_standard_suite_asks_all_that_the_quick_one_does():
    every = planted.candidate(planted.RIGHT)
    quick, standard = (probes.suite(name, catalog.variant("softmax"), every, as_dtype("float32"), {}).probes for name in ("quick", "standard"))
    asked = {(p.title, str(p.params), tuple(x.tobytes() for x in p.operands.values())) for p in standard}
    assert all((p.title, str(p.params), tuple(x.tobytes() for x in p.operands.values())) in asked for p in quick)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_transcription_of_every_variant_passes(name, dtype):
    for seed in range(5):
        report = check_variant(name, dtype=dtype, seed=seed)
        assert report.passed, f"seed {seed}\n{report}"


@pytest.mark.parametrize("name, fault", VARIANT_FAULTS)
def test_no_fault_of_another_variant_passes(name, fault):
    for suite in ("quick", "standard"):
        report = check_variant(name, fault, suite=suite)
        assert not report.passed, suite
        assert {case.outcome for case in report.failures} == {"differs"}
