"""Arrays that are lent: without a reference count.

Numba counts references with atomic instructions, at every mention of a field of a tuple of arrays.  In a kernel that has dozens of them, for tiles
that take microseconds, counting was half the time.  What is lent has no count; its owner must be held until it is no longer used.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _lent(context: Any, builder: ir.IRBuilder, kind: types.Type, value: Any) -> Any:
    if isinstance(kind, types.BaseTuple):
        fields = zip(kind, cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, kind, [_lent(context, builder, one, x) for one, x in fields])
    if not isinstance(kind, types.Array):
        return value
    view = context.make_array(kind)(context, builder, value)
    view.meminfo, view.parent = cgutils.get_null_value(view.meminfo.type), cgutils.get_null_value(view.parent.type)
    return view._getvalue()


@intrinsic
def lent(typingctx, x):  # type: ignore[no-untyped-def]
    """An array, or a tuple of arrays, numbers and tuples, without reference counts."""
    return x(x), lambda context, builder, signature, args: _lent(context, builder, x, args[0])


@intrinsic
def hold(typingctx, x):  # type: ignore[no-untyped-def]
    """Nothing, but until here x lives."""
    return types.void(x), lambda context, builder, signature, args: context.get_dummy_value()
