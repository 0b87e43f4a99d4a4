"""A call like an earlier one goes straight to its kernel: what was found of the first is kept, by all it depends on but the numbers in arrays."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from . import backends
from .problem import Problem
from .spec import Variant

Arrays = Mapping[str, Any]
_NOTHING: Arrays = MappingProxyType({})


class Known(NamedTuple):
    """A call that has been made: ``out`` as a function of operands by name; the names of all arrays in their order, and of keywords among them."""

    run: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    names: tuple[str, ...]
    keywords: tuple[str, ...]

    def __call__(self, operands: Sequence[Any], keywords: Arrays, state: Arrays = _NOTHING) -> np.ndarray:
        """``out`` for other arrays under the same key."""
        return self.run(dict(zip(self.names, (*operands, *(keywords[name] for name in self.keywords), *state.values()), strict=True)))


#: Calls that can be made again without being looked at, by what they were asked with; `None` of those that cannot.
_known: dict[Hashable, Known | None] = {}
_MOST_KNOWN = 256


def key_of(variant: Variant, backend: Any, returns: Any, layout: Any, operands: Sequence[Any], keywords: Arrays, state: Any = _NOTHING) -> Hashable:
    """All that a call's way depends on but the numbers in its arrays; None where an array is none of NumPy's, or more is wanted than ``out``."""
    only = returns[0] if type(returns) is tuple and len(returns) == 1 else "out" if returns is None else returns
    plain = _is_one_of(only, "out") and _is_one_of(layout, "BHTD") and _is_one_of(backend, "auto", "cpu")
    if not plain or not isinstance(state, Mapping):
        return None
    arrays: list[Any] = [(None, x.shape, x.dtype, x.strides, True) for x in operands if type(x) is np.ndarray]
    arrays += [(name, x.shape, x.dtype, x.strides, x.flags.writeable) for name, x in state.items() if type(x) is np.ndarray]
    named: list[Any] = []
    for name, x in keywords.items():
        if type(x) is np.ndarray:
            arrays.append((name, x.shape, x.dtype, x.strides, True))
        elif x is None or type(x) in (bool, int, float, str):
            named.append((name, type(x), x))
        else:
            return None
    complete = len(arrays) + len(named) == len(state) + len(operands) + len(keywords)
    return (variant, backend, *named, None, *arrays) if complete else None


def _is_one_of(x: Any, *words: str) -> bool:
    """Of whatever a caller may have given."""
    return type(x) is str and x in words


def known(key: Hashable) -> Known | None:
    """The call of that key, if it has been made and can be made again."""
    return None if key is None else _known.get(key)


def remember(key: Hashable, call: Problem, backend: str, operands: Sequence[Any], keywords: Arrays, state: Arrays = _NOTHING) -> None:
    """Keep what a call turned out to be, if the engine can make it again and all arrays are operands as they are."""
    if key is None or key in _known:
        return
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    by_name = tuple(name for name, x in keywords.items() if type(x) is np.ndarray)
    names = (*(o.name for o, _ in zip(call.variant.operands, operands, strict=False)), *by_name, *("initial_" + name for name in state))
    arrays = (*operands, *(keywords[name] for name in by_name), *state.values())
    as_given = len(names) == len(call.given) and all(call.given.get(name) is x for name, x in zip(names, arrays, strict=True))
    run = backends.repeated(call, backend) if as_given else None
    _known[key] = None if run is None else Known(run, names, by_name)
