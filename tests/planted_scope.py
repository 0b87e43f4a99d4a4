"""Which rows of the project's catalogue of published faults are planted, and why the others are not.

A row is not planted where the fault needs something that a softmax kernel called with the operands and parameters of `refattn.check` does not
have, or where nothing it returns can show it.
"""

from __future__ import annotations

import planted
import planted_backward

#: Letter -> number of rows: scale and score, masks, windows, heads and layout, position, softmax, tiles, lse, precision, quantisation,
#: backward, races, latent attention, linear and delta-rule attention.
ROWS = {"S": 14, "M": 24, "W": 9, "H": 14, "P": 17, "X": 17, "T": 20, "L": 10, "N": 10, "Q": 9, "B": 14, "R": 7, "A": 5, "D": 20}

_ROTARY = "rotary embedding is no operand of the variants here; operands come rotated"
_PACKED = "needs packed or paged sequences, which candidates are not asked"
_QUANTISED = "needs scale operands of quantised keys and values"
_STATE = "belongs to recurrent variants with gates or the delta rule, which are not in the catalogue"
_RACE = "needs hardware with races; what repeats differently is looked for by repeated calls"
_LATENT = "belongs to latent attention, which is not in the catalogue"

#: Row -> reason.
NOT_PLANTED: dict[str, str] = {
    "S6": _ROTARY,
    "M2": "without a cache it is M1",
    "M9": "in the arithmetic it is T1",
    "M11": _PACKED,
    "M14": "zero times NaN is an observation: planted.OBSERVED",
    "M16": "float16 alone; in the arithmetic it is M12",
    "M23": _PACKED,
    "W5": _PACKED,
    "W7": "needs two code paths of one kernel",
    "W8": "needs two windows in one call",
    "H6": "in the answers it is L2 or P5 of a single query",
    "H10": "in the answers it is H8",
    "H13": "reads beyond its operands: memory that no call owns",
    "P1": "slopes come as a bias",
    "P2": "slopes come as a bias",
    "P3": "slopes come as a bias",
    "P4": "slopes come as a bias",
    "P6": "nothing that is returned shows it",
    "P7": "slopes come as a bias",
    **dict.fromkeys(("P8", "P9", "P10", "P11", "P12", "P13", "P14", "P15", "P16"), _ROTARY),
    "P17": "positions are no operand",
    "X15": "needs float8 weights with a scale that lags behind",
    "X17": "the variants here have no dropout",
    **dict.fromkeys(("T6", "T9", "T10", "T11", "T12", "T13", "T14", "T15"), _PACKED),
    "T8": "memory that was not written is chance; poison and repeated calls look for it",
    "T16": "needs a hook with side effects",
    "T19": "in the answers it is R4",
    "T20": "needs more than 65535 heads or a sequence as long",
    "L5": "in the arithmetic it is N4",
    "L6": "needs several devices",
    "L7": "needs a merge outside the kernel",
    "L9": "memory beyond the rows, which no call owns",
    "L10": "in the answers it is H2",
    "N3": "no fault: a profile",
    "N5": "bits of two code paths",
    "N6": "needs operands beyond 2^31 elements",
    "N7": "needs more than 32767 keys",
    "N8": "a compiler's fault has no one form",
    "N9": "float64 alone; in the answers it is M12",
    "N10": "no fault: a profile",
    **dict.fromkeys((f"Q{n}" for n in range(1, 10)), _QUANTISED),
    "B4": "the variants here have no dropout",
    "B9": "needs sentinel indices",
    "B10": "memory that was not written is chance",
    "B11": _RACE,
    "B14": "needs several devices",
    **dict.fromkeys(("R1", "R2", "R5", "R6"), _RACE),
    **dict.fromkeys((f"A{n}" for n in range(1, 6)), _LATENT),
    **dict.fromkeys((f"D{n}" for n in range(1, 21)), _STATE),
}


def rows() -> list[str]:
    return [f"{letter}{n}" for letter, count in ROWS.items() for n in range(1, count + 1)]


def planted_rows() -> set[str]:
    """Rows that some planted kernel has."""
    named = [*planted.FAULTS, *planted_backward.FAULTS]
    return {name.split()[0] for name in named}
