"""The ground truth for attention: every variant as readable loops, and a judge for anybody's kernel.

Names are loaded on first use, so that ``import refattn`` costs next to nothing and imports neither Numba nor any framework.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import assert_matches as assert_matches
    from .api import attend as attend
    from .api import attention as attention
    from .api import block_mask as block_mask
    from .api import certify as certify
    from .api import check as check
    from .api import cite as cite
    from .api import compare as compare
    from .api import cost as cost
    from .api import describe as describe
    from .api import gradients as gradients
    from .api import initial_state as initial_state
    from .api import set_num_threads as set_num_threads
    from .api import step as step
    from .api import tolerance as tolerance
    from .api import variants as variants
    from .functions import BlockMask as BlockMask
    from .sequences import Packed as Packed
    from .sequences import Paged as Paged

_HOME = {
    "api": (
        "assert_matches",
        "attend",
        "attention",
        "block_mask",
        "certify",
        "check",
        "cite",
        "compare",
        "cost",
        "describe",
        "gradients",
        "initial_state",
        "set_num_threads",
        "step",
        "tolerance",
        "variants",
    ),
    "functions": ("BlockMask",),
    "sequences": ("Packed", "Paged"),
    "errors": (
        "RefattnError",
        "ShapeError",
        "DtypeError",
        "OperandError",
        "ParameterError",
        "UnknownVariantError",
        "BackendUnavailableError",
        "CandidateError",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


class _Face(ModuleType):
    """Keeps a public function when a submodule of the same name (`variants`, `describe`) is imported and would take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'refattn' has no attribute {name!r}")
    return getattr(import_module(f"refattn.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
