"""Faults that no catalogue holds: the judge sees every one of them, and gives none a name that is not its own."""

import pytest
from examination import codes
from planted_open import CANDIDATES

import refattn as ra

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_fault_of_no_catalogue_is_seen_and_not_misnamed(name):
    candidate, right = CANDIDATES[name]
    report = ra.check(candidate, suite="quick")
    assert not report.passed, str(report)
    said = {code for explanation in codes(report) for code in explanation}
    assert not said or said & right, f"named {said}, rightly {set(right) or 'nothing'}\n{report}"
