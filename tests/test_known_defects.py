"""Public implementations that compute something else than what they are taken for: the judge sees it, and says what it is."""

import importlib
import warnings

import pytest
from known_defects import DEFECTS

import refattn as ra

pytestmark = pytest.mark.peer

CASES = [pytest.param(defect, id=name) for name, defect in DEFECTS.items()]


@pytest.fixture
def defect(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn of while they are imported is theirs
        for package in request.param.packages:
            importlib.import_module(package)
    return request.param


@pytest.mark.parametrize("defect", CASES, indirect=True)
def test_a_defect_is_seen_and_named(defect):
    report = ra.check(defect.candidate, suite="quick", **defect.check)
    assert not report.passed
    assert all(case.outcome == "differs" for case in report.failures), str(report)  # its numbers are wrong, and nothing else is
    explanations = report.investigation.diagnosis.explanations
    assert [[fault.code for fault in explanation.faults] for explanation in explanations] == [[defect.code]], str(report)


@pytest.mark.parametrize("defect", CASES, indirect=True)
def test_the_same_implementation_passes_where_it_is_right(defect):
    keywords = defect.check if defect.right_check is None else defect.right_check
    report = ra.check(defect.right or defect.candidate, defect.right_variant, suite="quick", **keywords)
    assert report.passed, str(report)
