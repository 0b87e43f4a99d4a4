"""Every exception refattn raises on purpose.

    RefattnError
    |-- ShapeError               (ValueError)   an operand's axes do not fit the variant or one another
    |-- DtypeError               (TypeError)    an operand is no array, or of a kind the variant cannot take
    |-- OperandError             (ValueError)   an operand is missing, extra, aliased, or holds values outside its domain
    |-- ParameterError           (ValueError)   a parameter is unknown, of the wrong kind, or out of range
    |-- UnknownVariantError      (KeyError)     no variant, profile or dtype has that name
    |-- BackendUnavailableError  (ImportError)  a backend, framework or file format is not installed or not built
    `-- CandidateError           (ValueError)   an implementation to be judged cannot be found, called or read

A message names the variant, the operand, the axis and both numbers, and says what would be allowed.
"""

from typing import Any


class RefattnError(Exception):
    """Base class of everything refattn raises on purpose."""


class ShapeError(RefattnError, ValueError):
    """An operand's axes do not fit the variant, or one another."""


class DtypeError(RefattnError, TypeError):
    """An operand is not an array, or its elements are of a kind the variant cannot take."""


class OperandError(RefattnError, ValueError):
    """An operand is missing, superfluous, aliased, or holds values outside its domain."""


class ParameterError(RefattnError, ValueError):
    """A parameter is unknown, of the wrong kind, or out of range."""


class UnknownVariantError(RefattnError, KeyError):
    """No variant (or profile, suite, dtype) has that name."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class BackendUnavailableError(RefattnError, ImportError):
    """A backend, framework or file format is asked for by name and is not there."""


class CandidateError(RefattnError, ValueError):
    """The implementation to be judged cannot be found, called or read."""


class Disagreement(AssertionError):
    """What `refattn.assert_matches` raises: no mistake in a call, but a report that does not pass, which it carries as `report`."""

    def __init__(self, report: Any) -> None:
        super().__init__(f"\n{report}")
        self.report = report


def shown(value: object) -> str:
    """A value as it stands in a message: its repr, or its type where that is long or cannot be had."""
    try:
        text = repr(value)
    except Exception:
        text = ""
    return text if 0 < len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"
