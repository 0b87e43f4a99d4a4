"""How a recurrence is read: one field per decision that real kernels got wrong, each at what the specification says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StateReading:
    """One way to read a recurrence; ``StateReading()`` is the right one.

    Strengths are the factors of a write that are one number per token (beta, dt); gates are logarithms of decays.  A field that a call gives no
    occasion for (no gate, one head) changes nothing there.
    """

    # ---- operands
    exchanged: bool = False  #: queries and keys change places
    queries: str = "own"  #: "unit" length, "batch 0"
    keys: str = "own"  #: "unit" length, "unit in erasures", "unit in writes", "one late", "batch 0"
    values: str = "own"  #: "one late", "batch 0", "keys"
    query_map: str = "given"  #: of features: "none", or one of `evaluation.MAPS`
    key_map: str = "given"
    heads: str = "grouped"  #: "tiled": query head h reads state h mod H
    strength: str = "given"  #: "none", "values", "erasures" (only there), "squared", "twice for values", "doubled", "first head", "one late"
    # ---- decay
    gate: str = "given"  #: "none", "base 2", "factor" (the logarithm itself), "one late", "one early", "first channel", "mean channel", "first head"
    gate_factor: float = 1.0
    order: str = "fade, write, read"  #: of `running.ORDERS`
    # ---- erasure
    erase: str = "given"  #: "none", "negated", "old" (before the fading), "faded", "with queries"
    # ---- read
    read: str = "given"  #: of `running.READS`
    bonus: str = "given"  #: "none", "ones"
    skip: str = "given"  #: "none"
    scale: str = "given"  #: "none", "none by default", "twice", "width of values" by default
    scale_factor: float = 1.0
    # ---- state
    initial: str = "given"  #: "none", "none of the state" (but of the mass), "transposed", "batch 0", "first head", "unfaded"
    state: str = "given"  #: as it is returned: "transposed", "one early", "initial", "zero", "whole chunks of" so many tokens
    # ---- normaliser
    normalizer: str = "given"  #: "none", "count" of keys seen, "sum", "clamp"
    eps: str = "given"  #: "none", "of one key each"
    causal: str = "given"  #: "always", "never"
    lookahead: int = 0  #: so many keys more are written before a query reads
    # ---- chunks
    chunk: int = 0
    wrong: str = "right"  #: about chunks: of `running.CHUNKS`
    overflow: int = 0  #: decays within chunks of so many tokens are quotients of exponentials, which overflow


RIGHT = StateReading()
