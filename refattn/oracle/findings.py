"""What is found out about an implementation, as data: facts read off it, and faults that explain how it differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fault:
    """A mistake that real kernels made.

    Attributes
    ----------
    code : str
        Its family and number: ``"M1"`` (see docs/faults).  Faults of one code are told apart by their names.
    name : str
        A few words: ``"causal mask aligned with the first key"``.
    words : str
        A plain sentence or two on what happens, for somebody who wrote the kernel.
    right, wrong : str
        The line of mathematics as it should be and as it was computed.
    evidence : str
        Where it was published, if it was.
    """

    code: str
    name: str
    words: str
    right: str = ""
    wrong: str = ""
    evidence: str = ""


@dataclass(frozen=True)
class Explanation:
    """One or two faults under which every answer is right within its tolerance.

    Attributes
    ----------
    faults : tuple of Fault
    ratio : float
        Largest error / tolerance over all calls when the faults are taken for granted; at most 1.
    values : mapping of str to float
        Numbers that were fitted: ``{"scale": 1.44}``.
    alike : tuple of Fault
        Faults that give the same answers in every call that was, or could be, asked.
    """

    faults: tuple[Fault, ...]
    ratio: float
    values: Mapping[str, float] = field(default_factory=dict)
    alike: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What explains the answers.

    Attributes
    ----------
    explanations : tuple of Explanation
        All that are consistent with every answer, the likeliest first; none: the fault is not among the known ones.
    confidence : {"high", "medium", "low", "none"}
        high: one explanation, and every other is far off; medium: its number was fitted, or the runner-up is near; low: several are left.
    runner_up : float
        Smallest error / tolerance of what is not consistent; infinite where there is nothing.
    hypotheses, calls : int
        How many were tried, on how many calls.
    blind_spots : sequence of Fault
        Faults the calls could not have shown.
    """

    explanations: tuple[Explanation, ...] = ()
    confidence: str = "none"
    runner_up: float = np.inf
    hypotheses: int = 0
    calls: int = 0
    blind_spots: Sequence[Fault] = ()


@dataclass(frozen=True)
class Fact:
    """Something read off the implementation from answers alone, without a catalogue of faults, beside what the variant says.

    Attributes
    ----------
    subject : str
        ``"visible keys"``, ``"key-value head of a query head"``, ``"scale"``, ...
    found, specified : str
        In words that fit one line each.
    agrees : bool
    call : str
        What was asked to see it: ``"causal=True, T=12, S=20"``.
    values : mapping of str to ndarray
        ``found`` and ``specified`` as arrays, where a picture says more: visible pairs as booleans (Hq, T, S), a score curve, ...
    """

    subject: str
    found: str
    specified: str
    agrees: bool
    call: str = ""
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Growth:
    """Error over the number of keys: its law tells roundings that average out from ones that add up, and from faults.

    Attributes
    ----------
    keys : tuple of int
    errors : tuple of float
        Largest error / tolerance of the output at each.
    exponent : float
        Slope of log error over log keys (about 0.5 or less: independent roundings; about 1: they add up).
    absolute : tuple of float
        Largest error of the output itself at each, which the exponent is of.
    """

    keys: tuple[int, ...]
    errors: tuple[float, ...]
    exponent: float
    absolute: tuple[float, ...] = ()


@dataclass(frozen=True)
class Investigation:
    """All that is known beyond the cases of a suite; what was not looked into is None or empty."""

    diagnosis: Diagnosis | None = None
    facts: tuple[Fact, ...] = ()
    growth: Growth | None = None
    minimal: Any = None  # a failing `judge.Case`, smaller than any of the suite's
    about: Mapping[str, Any] = field(default_factory=dict)
