"""The ground truth for attention: every variant as readable loops, and a judge for anybody's kernel.

Names are loaded on first use, so that ``import refattn`` costs next to nothing and imports neither Numba nor any framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import attend as attend
    from .api import attention as attention
    from .api import variants as variants

_HOME = {
    "api": ("attend", "attention", "variants"),
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


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'refattn' has no attribute {name!r}")
    return getattr(import_module(f"refattn.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
