"""The pytest plugin, seen from a test suite that uses it."""

import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest

import refattn as ra

pytest_plugins = "pytester"

KERNEL = """
import numpy as np, pytest, refattn as ra

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 2, n, 4)).astype(np.float32) for n in (5, 7, 7))

def right(q, k, v, causal=False):
    return ra.attention(q, k, v, causal=causal, backend="definition")

def wrong(q, k, v, causal=False):
    return ra.attention(q, k, v, causal="top_left" if causal else False, backend="definition")
"""


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """What inner runs import is here already: modules that they import first are forgotten after them, and compiled ones load once."""
    x = np.ones((1, 1, 2, 2))
    with pytest.raises(AssertionError, match="worst element"):
        ra.assert_matches(2 * x, "softmax", x, x, x)
    assert not ra.check(lambda q, k, v: v, "softmax", suite="quick").passed


@pytest.fixture
def run(pytester):
    """Runs pytest on a file of tests in this process."""

    def run(source, *arguments):
        pytester.makepyfile(test_kernels=KERNEL + source)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)

    return run


def test_it_is_installed_with_the_package():
    assert [entry.value for entry in entry_points(group="pytest11", name="refattn")] == ["refattn.pytest_plugin"]


def test_a_failing_assertion_shows_the_report_once_and_no_inner_frames(run):
    result = run("def test_causal():\n    ra.assert_matches(wrong(q, k, v, True), 'softmax', q, k, v, causal=True)\n")
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert text.count("FAIL  the given output does not agree with softmax") == 1 and text.count("worst element") == 1
    assert "- refattn: the given output -" in text
    result.stdout.fnmatch_lines([">*ra.assert_matches(wrong(q, k, v, True)*", "E*Disagreement: does not agree with softmax*"])
    assert "api.py" not in text and "raise Disagreement" not in text


def test_the_fixture_checks_a_kernel_and_returns_its_report(run):
    source = """
def test_right(refattn_check):
    assert refattn_check(right, "softmax", suite="quick").passed

def test_wrong(refattn_check):
    refattn_check(wrong, "softmax", suite="quick")
"""
    result = run(source)
    result.assert_outcomes(passed=1, failed=1)
    text = result.stdout.str()
    assert "- refattn: test_kernels.wrong -" in text and "pytest_plugin.py" not in text
    assert text.count("- refattn:") == 1


def test_a_report_in_a_variable_is_found_and_one_that_passes_is_not(run):
    source = """
def test_both():
    fine = ra.compare(right(q, k, v), "softmax", q, k, v)
    poor = ra.compare(wrong(q, k, v, True), "softmax", q, k, v, causal=True)
    again = poor
    assert fine.passed and poor.passed
"""
    text = run(source).stdout.str()
    assert text.count("- refattn: the given output -") == 1 and "causal" in text


def test_tests_without_a_report_expected_failures_and_passes_are_left_alone(run):
    source = """
def test_other():
    assert 1 == 2

@pytest.mark.xfail
def test_expected():
    ra.assert_matches(wrong(q, k, v, True), "softmax", q, k, v, causal=True)

def test_refused():
    with pytest.raises(AssertionError, match="of tolerance"):
        ra.assert_matches(wrong(q, k, v, True), "softmax", q, k, v, causal=True)
"""
    result = run(source, "--refattn-html", "pages")
    result.assert_outcomes(failed=1, xfailed=1, passed=1)
    assert "refattn" not in result.stdout.str().replace("test_kernels", "").split("FAILURES")[1]


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_pages_are_written_and_listed(pytester, run, workers):
    source = """
@pytest.mark.parametrize("causal", [True, False], ids=["yes/[1]", "no"])
def test_kernel(causal):
    ra.assert_matches(wrong(q, k, v, causal), "softmax", q, k, v, causal=causal)

def test_two():
    a = ra.compare(wrong(q, k, v, True), "softmax", q, k, v, causal=True)
    b = ra.compare(-right(q, k, v), "softmax", q, k, v)
    assert a.passed or b.passed
"""
    result = run(source, "--refattn-html", "pages/here", *workers)
    result.assert_outcomes(failed=2, passed=1)
    names = ["test_kernels.py-test_kernel-yes-1.html", "test_kernels.py-test_two-2.html", "test_kernels.py-test_two.html"]
    assert sorted(path.name for path in (pytester.path / "pages" / "here").iterdir()) == names
    assert all("<html" in (pytester.path / "pages" / "here" / name).read_text(encoding="utf-8") for name in names)
    result.stdout.fnmatch_lines(["*= refattn reports =*", "pages/here/test_kernels.py-test_kernel-yes-1.html"])


def test_a_page_that_cannot_be_written_is_said_and_breaks_nothing(pytester, run):
    (pytester.path / "pages").write_text("a file")
    result = run("def test_it():\n    ra.assert_matches(-right(q, k, v), 'softmax', q, k, v)\n", "--refattn-html", "pages")
    result.assert_outcomes(failed=1)
    assert "the page could not be written" in result.stdout.str()


def test_it_starts_quickly_and_imports_nothing_heavy():
    code = "\n".join(
        [
            "import pytest, sys, time",
            "start = time.perf_counter()",
            "import refattn.pytest_plugin",
            "print(time.perf_counter() - start, [m for m in ('numba', 'numpy', 'rich', 'scipy') if m in sys.modules])",
        ]
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(maxsplit=1) for _ in range(3)]
    assert {loaded.strip() for _, loaded in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.02
