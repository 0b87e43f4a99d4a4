"""The pytest plugin: a fixture that judges a kernel, and the report beside a failing test.

A test that fails while it holds a report that does not pass (raised by `refattn.assert_matches` or by the fixture, or in a variable of one of its
frames) shows the report in a section of its own, and with ``--refattn-html DIR`` leaves it as a page in that folder.  A test that holds none
is left alone.  Nothing heavy is imported before a test asks for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from .errors import Disagreement

_PAGE = "refattn report"  # a property of a test: where its report was written


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--refattn-html``."""
    parser.getgroup("refattn").addoption(
        "--refattn-html", metavar="DIR", type=Path, help="write the report of each attention kernel that a failing test judged to DIR, as a page"
    )


@pytest.fixture(scope="session")
def refattn_check() -> Callable[..., Any]:
    """`refattn.check` that fails the test where the report does not pass, and returns the report where it does."""

    def checked(*target: Any, **keywords: Any) -> Any:
        __tracebackhide__ = True
        from .api import check

        report = check(*target, **keywords)
        if not report.passed:
            raise Disagreement(report)
        return report

    return checked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put reports beside the failure of the test that holds them."""
    error = None if call.excinfo is None else call.excinfo.value
    found = [] if error is None else _held(error)
    if isinstance(error, Disagreement):
        error.args = (found[0].verdict,)  # the whole report has its own section
    result = yield
    if not result.failed:
        return result
    folder: Path | None = item.config.getoption("--refattn-html")
    for n, report in enumerate(found):
        result.sections.append((f"refattn: {report.candidate}", str(report)))
        if folder is not None:
            path = folder / f"{_file_name(item.nodeid)}{f'-{n + 1}' if n else ''}.html"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                report.to_html(path)
            except OSError as trouble:
                result.sections.append(("refattn", f"the page could not be written: {trouble}"))
            else:
                result.user_properties.append((_PAGE, str(path)))
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the pages that were written."""
    reports = [report for kind in ("failed", "error") for report in terminalreporter.getreports(kind)]
    pages = [path for report in reports for name, path in getattr(report, "user_properties", ()) if name == _PAGE]
    if pages:
        terminalreporter.section("refattn reports")
        for path in pages:
            terminalreporter.write_line(path)


def _held(error: BaseException) -> list[Any]:
    """Reports that do not pass: the error's own, and those in variables of the frames it passed through, each once."""
    judging = sys.modules.get("refattn.oracle.report")
    if judging is None:
        return []
    found = [error.report] if isinstance(error, Disagreement) else []
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if not module.startswith("refattn."):
            found += [x for x in trace.tb_frame.f_locals.values() if isinstance(x, judging.Report)]
        trace = trace.tb_next
    return list({id(report): report for report in found if not report.passed}.values())


def _file_name(test: str) -> str:
    """The test's id with nothing in it that a file system might mind."""
    return re.sub(r"[^\w.=,-]+", "-", test).strip("-")[:150]
