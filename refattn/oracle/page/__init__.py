"""A report as one HTML page: no network, no framework, no file beside it.

`sections` makes the markup; what needs a hand on it (pictures, sorting, the details of a call) is drawn by `page.js` from the report's own JSON,
which the page carries.
"""

from __future__ import annotations

import importlib.resources
import json
from html import escape
from typing import TYPE_CHECKING, Any

from . import pictures, sections

if TYPE_CHECKING:
    from ..report import Report

#: Even if something slipped through as markup, the page could load and send nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def html(report: Report) -> str:
    """The page.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        A whole HTML document, the same for the same report.
    """
    drawn: list[dict[str, Any]] = []
    bodies = {
        "fault": ("What is wrong", sections.fault(report)),
        "structure": ("Structure, read off the answers", sections.structure(report, drawn)),
        "errors": ("Where the errors are", sections.errors(report, drawn)),
        "growth": ("Error over the number of keys", sections.growth(report)),
        "calls": ("Every call", sections.calls(report)),
        "basis": ("What the verdict rests on", sections.basis(report)),
        "reproduce": ("Reproduce", sections.reproduce(report)),
    }
    bodies = {name: found for name, found in bodies.items() if found[1]}
    carried = {
        "report": report.to_dict(),
        "maps": sections.maps(report, drawn),
        "pictures": drawn,
        "bytes": {name: getattr(pictures, name) for name in ("TOLERANCE", "STEPS", "INFINITE")},
    }
    mark, state = ("PASS", "good") if report.passed else ("FAIL", "bad")
    links = "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in ("verdict", *bodies))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{mark} {escape(report.candidate)}: {escape(report.variant.name)}</title>",
            f"<style>\n{_file('page.css')}</style>",
            "</head>",
            "<body>",
            f'<div class="bar"><div><b class="{state}">{mark}</b><nav aria-label="Sections">{links}</nav>',
            '<button id="theme" hidden></button></div></div>',
            "<main>",
            f'<header class="verdict {state}" id="verdict">{sections.verdict(report)}</header>',
            *(f'<section id="{name}"><h2>{title}</h2>\n{body}</section>' for name, (title, body) in bodies.items()),
            "<footer>Made by refattn. The page is complete: it loads nothing, and works from a file.</footer>",
            "</main>",
            "<noscript>Pictures, sorting and the details of calls need scripts to run; everything else is here.</noscript>",
            f'<script type="application/json" id="data">{_embedded(carried)}</script>',
            f"<script>\n{_file('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _file(name: str) -> str:
    return importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _embedded(carried: Any) -> str:
    """JSON that cannot end its script element, whatever a candidate is called."""
    text = json.dumps(carried, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
