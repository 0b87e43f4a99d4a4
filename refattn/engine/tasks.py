"""Work handed out one task at a time: whoever is free takes the next number, so unequal tasks balance themselves."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


@intrinsic
def take(typingctx, counter):  # type: ignore[no-untyped-def]
    """The number in counter[0], which becomes one more; atomic."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        view = context.make_array(counter)(context, builder, args[0])
        return builder.atomic_rmw("add", view.data, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counter), emit
