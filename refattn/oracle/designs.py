"""Calls as data: sizes, parameters, operands and values, from which a suite draws; and which few of them make the quick suite.

`POOL` holds calls that each excite something else.  `QUICK` is a choice of them: `python -m refattn.oracle.mutants.choose` evaluates every known
fault in every call of the pool, and takes, one after another, the call that separates the most faults from the specification and from one another.
A test repeats the evaluation: the quick suite refuses every mutant that the pool refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Design:
    """One call, but for its random numbers.

    Attributes
    ----------
    title : str
    sizes : mapping of str to int
        Axes that differ from the usual sizes.
    params : str
        ``"first"`` or ``"last"``: every parameter at the first or the last of its other values; else names, each with the position of a value.
    operands : str
        ``"all"`` optional operands, or names.
    factor : float
        Of the first operand: how far scores spread.
    level : float
        About which all scores lie, in place of independent ones; 0 for those.
    kind : str
        What else is special: ``"emptied"`` (a row that sees no key), ``"strided"``, ``"poisoned"``, ``"again"`` (the first call, a second time),
        ``"broadcast"`` (optional operands with as few axes as they may have).
    examines : tuple of str
        Features beside parameters and operands.
    """

    title: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: str = ""
    operands: str = ""
    factor: float = 1.0
    level: float = 0.0
    kind: str = ""
    examines: tuple[str, ...] = ("shapes",)

    def chosen(self, tries: Mapping[str, tuple[object, ...]]) -> dict[str, object]:
        """Values of those parameters that are taken."""
        if self.params in ("first", "last"):
            return {name: values[0 if self.params == "first" else -1] for name, values in tries.items() if values}
        wanted = dict(part.split(":") for part in self.params.split())
        return {name: tries[name][int(at)] for name, at in wanted.items() if len(tries.get(name, ())) > int(at)}


_DECODE = {"B": 1, "Hq": 7, "Hkv": 1, "T": 1, "S": 65, "D": 16, "E": 16}
_TALL = {"T": 41, "S": 23, "D": 16, "E": 16}
_WIDE = {"T": 37, "S": 53, "E": 20}
_NARROW = {"T": 19, "S": 37, "D": 33, "E": 33}
_SEVEN = {"B": 1, "Hq": 7, "Hkv": 1, "T": 9, "S": 33}
_LONG = {"B": 1, "Hq": 4, "Hkv": 2, "T": 33, "S": 150, "D": 8, "E": 8}
_SQUARE = {"B": 2, "Hq": 4, "Hkv": 2, "T": 45, "S": 45, "D": 20, "E": 20}
_ODD = {"B": 1, "Hq": 3, "Hkv": 3, "T": 131, "S": 131, "D": 20, "E": 20}
_BROAD = {"B": 1, "Hq": 2, "Hkv": 1, "T": 131, "S": 150, "D": 66, "E": 72}
_ALIKE = {"B": 2, "Hq": 3, "Hkv": 3, "T": 37, "S": 37, "D": 21, "E": 21}

#: Everything that may be asked, the plainest first.
POOL: tuple[Design, ...] = (
    Design("fewer queries than keys"),
    Design("values wider than keys", _WIDE),
    Design("more queries than keys", _TALL),
    Design("square", _SQUARE),
    Design("square, odd lengths", _ODD),
    Design("one query, one key-value head", _DECODE),
    Design("widths of no vector", _NARROW),
    Design("wide heads, many queries and keys", _BROAD, factor=2.0),
    Design("many keys", _LONG, factor=3.0),
    Design("one key", {"T": 3, "S": 1}),
    Design("no keys", {"T": 3, "S": 0}),
    Design("no queries", {"T": 0, "S": 5}),
    Design("scores spread out", {"T": 33, "S": 70}, factor=6.0, examines=("large scores",)),
    Design("everything at once", _NARROW, "first", "all", 3.0),
    Design("everything at once, other values", _NARROW, "last", "all", 3.0, examines=()),
    Design("everything at once, more queries than keys", _TALL, "first", "all", 3.0, examines=("shapes",)),
    Design("everything at once, square", _SQUARE, "last", "all", 3.0, examines=("shapes",)),
    Design("everything at once, many keys", _LONG, "first", "all", 3.0, examines=("shapes",)),
    Design("every parameter, no operand", _WIDE, "first", factor=2.0, examines=()),
    Design("every parameter at its other value", _NARROW, "last", "bias", 2.0, kind="broadcast", examines=()),
    Design("every operand, no parameter", _WIDE, "", "all", 2.0, examines=()),
    Design("every operand, many keys", _LONG, "", "all", 3.0, examines=()),
    Design("every operand, few axes", _SQUARE, "", "all", 2.0, kind="broadcast", examines=()),
    Design("causal, window, seven heads of a group", _SEVEN, "causal:0 window:0", factor=2.0, examines=("shapes",)),
    Design("causal, seven heads of a group", _SEVEN, "causal:0", factor=2.0, examines=("shapes",)),
    Design("causal and sinks, many keys", _LONG, "causal:0", "sinks", 3.0, examines=("shapes",)),
    Design("top-left, many keys", _LONG, "causal:1", "", 3.0, examines=("shapes",)),
    Design("window alone", _LONG, "window:0", factor=3.0, examines=("shapes",)),
    Design("as many queries as keys, no shared heads", _ALIKE, "window:1", "all", 2.0),
    Design("soft-cap alone", _WIDE, "softcap:0", factor=6.0, examines=()),
    Design("causal, more queries than keys", _TALL, "causal:0", factor=2.0, examines=("rows that see no key",)),
    Design("a row that sees no key", {}, kind="emptied", examines=("rows that see no key",)),
    *(
        Design(f"every score {where} zero", level=level, examines=("large scores",))
        for where, level in (("far below", -7e4), ("far above", 7e4), ("well below", -3e2), ("a thousandfold below", -2e4))
    ),
    Design("strided operands", _NARROW, kind="strided", examines=("strided operands",)),
    Design("large numbers where hidden", {"T": 9, "S": 40}, kind="poisoned", examines=("hidden keys",)),
    Design("the first call again", kind="again", examines=("state kept between calls",)),
)

#: Titles of the quick suite, in the order they are asked; see the module's docstring.
QUICK: tuple[str, ...] = (
    "everything at once",
    "every parameter at its other value",
    "everything at once, many keys",
    "a row that sees no key",
    "window alone",
    "as many queries as keys, no shared heads",
    "causal, more queries than keys",
    "wide heads, many queries and keys",
    "no keys",
    "every score far below zero",
    "strided operands",
    "large numbers where hidden",
    "the first call again",
)


def named(titles: tuple[str, ...]) -> tuple[Design, ...]:
    """Designs by their titles."""
    by_title = {d.title: d for d in POOL}
    return tuple(by_title[title] for title in titles)


@dataclass(frozen=True)
class Tokens:
    """One call of a recurrence, but for its random numbers.

    Attributes
    ----------
    title : str
    tokens : int
    impulse : int
        The only token with a value; -1: all have one.
    gate : str
        ``"strong"`` at every token, ``"none"``, or ``"jump"`` (strong at token `at`, none elsewhere); as drawn unless said.
    at : int
    strength : float
        Of every write; as drawn if negative.
    repeated : bool
        Whether all keys are the first one.
    lengths : bool
        Whether queries and keys are of lengths that differ from token to token.
    cut : int
        After how many tokens the call is cut in two, the second carried on by what the first returns; 0 if it is not.
    carried : bool
        Whether there is a state before the first token.
    """

    title: str
    tokens: int
    impulse: int = -1
    gate: str = ""
    at: int = 0
    strength: float = -1.0
    repeated: bool = False
    lengths: bool = False
    cut: int = 0
    carried: bool = True


#: Around the edges of chunks of these lengths something goes wrong first.
CHUNKS = (16, 32, 64, 128)

#: Calls of recurrences, and which of them belong to the quick suite.
TOKENS: tuple[Tokens, ...] = (
    *(Tokens(f"one value, at token {at} of {n + 5}", n + 5, impulse=at, carried=False) for n in CHUNKS for at in (n - 1, n, n + 1)),
    Tokens("one value, at the first token", 70, impulse=0, carried=False),
    *(Tokens(f"strong decay at token {n} alone", n + 5, gate="jump", at=n) for n in CHUNKS),
    Tokens("strong decay", 70, gate="strong"),
    Tokens("no decay", 70, gate="none"),
    *(Tokens(f"every strength {x:g}", 70, strength=x) for x in (0.0, 1.0, 2.0)),
    Tokens("one key again and again", 70, repeated=True),
    Tokens("one key again and again, every strength 1", 70, strength=1.0, repeated=True),
    Tokens("keys and queries of many lengths", 70, lengths=True),
    Tokens("one token, carried on", 1),
    Tokens("cut in two at token 64", 131, cut=64),
    Tokens("cut in two at token 23", 70, cut=23),
    Tokens("cut in two after the first token", 18, cut=1),
)
QUICK_TOKENS = (
    "one value, at token 64 of 69",
    "strong decay",
    "one key again and again",
    "keys and queries of many lengths",
    "cut in two at token 64",
    "cut in two at token 23",
)
