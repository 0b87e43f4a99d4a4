"""The forms there are, which agree: a module each, with ``forward(lowered, threads)`` and, but for the quadratic one, ``backward``."""

from . import chunked, quadratic, recurrent
from .lowering import Lowering
from .reduction import Reduced
from .repeat import repeated

__all__ = ["CHUNKED_FROM", "Lowering", "Reduced", "chunked", "quadratic", "recurrent", "repeated"]

#: Tokens from which chunks pay.
CHUNKED_FROM = 16
