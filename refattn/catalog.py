"""Finds variants by walking packages: a file that ends in ``VARIANT = Variant(...)`` is the whole registration.

The packages are `refattn.variants` and every package named by an installed distribution under the entry-point group
``refattn.variants``, so a project can keep variants of its own.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType

from .errors import UnknownVariantError
from .spec import Variant

ENTRY_POINT_GROUP = "refattn.variants"


def packages() -> Iterator[ModuleType]:
    """The packages searched, refattn's own first."""
    yield importlib.import_module("refattn.variants")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        yield importlib.import_module(entry.value)


@functools.cache
def catalogue() -> Mapping[str, Variant]:
    """Every variant by name, in alphabetical order."""
    found: dict[str, Variant] = {}
    for package in packages():
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if info.ispkg:
                continue
            variant = importlib.import_module(info.name).VARIANT
            stem = info.name.rpartition(".")[2]
            if variant.name != stem:
                raise ValueError(f"{info.name} must define a variant named {stem!r}, not {variant.name!r}")
            if variant.name in found:
                raise ValueError(f"two files define the variant {variant.name!r}: {info.name} and {module(found[stem]).__name__}")
            found[variant.name] = variant
    return MappingProxyType(dict(sorted(found.items())))


def variant(name: str) -> Variant:
    """The variant of that name.

    Raises
    ------
    UnknownVariantError
        With the nearest names there are.
    """
    found = catalogue()
    if not isinstance(name, str) or name not in found:
        raise UnknownVariantError(unknown("variant", name, found))
    return found[name]


def names(family: str | None = None) -> tuple[str, ...]:
    """Names of all variants, or of one family's."""
    found = catalogue()
    families = sorted({v.family for v in found.values()})
    if family is not None and not (isinstance(family, str) and family in families):
        raise UnknownVariantError(unknown("family", family, families))
    return tuple(name for name, v in found.items() if family in (None, v.family))


def module(v: Variant) -> ModuleType:
    """The file a variant is written in."""
    found = inspect.getmodule(v.define)
    assert found is not None
    return found


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """``no variant named 'softmx'; did you mean 'softmax'?``"""
    known = list(known)
    if not isinstance(name, str):
        return f"a {kind} is named by a string, not a {type(name).__name__}; known are {', '.join(known)}"
    near = difflib.get_close_matches(name, known, 1)
    return f"no {kind} named {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
