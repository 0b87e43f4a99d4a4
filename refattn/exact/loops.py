"""Any definition certified: its own loops, run on balls of growing precision in place of float64.

Balls enclose, so what comes out encloses what the loops would give in exact arithmetic, as long as they go the way they would go there: a comparison
that a ball does not decide stops them, and they begin again with twice as many bits.  Two numbers that were made alike from the same operands, as the
scores of repeated keys are, are equal without any bits: every ball knows what it was made of.

A number written in a definition is that float64 number, a parameter too, and integers divide exactly.  An operation takes some microseconds: this is
for small calls.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import math
import operator
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from ..costs import flops
from ..errors import ParameterError
from ..problem import Problem, output_dtype
from ..spec import shape
from . import balls
from .results import Certified, Draft, draft, released, unknown_are_nan

#: Numbers whose making is remembered; later ones are compared by their bits alone.
_MOST_KNOWN = 2_000_000
#: Operations of a definition, a few microseconds each, from which a line on a terminal says that something is happening.
_SHOWN_FROM = 200_000
_numbers = itertools.count()


class Undecided(Exception):
    """Two numbers that the present precision does not tell apart."""


class Ball:
    """A finite real number, enclosed; arithmetic with infinities and NaN, which are plain floats, gives floats where it has no finite result."""

    __slots__ = ("made", "x")
    __array_ufunc__ = None
    #: What was made of what -> a number for it, the same for what was made alike, and never given again, whoever else computes meanwhile.
    known: ClassVar[dict[Any, int]] = {}

    def __init__(self, x: Any, made: Any) -> None:
        self.x = x
        self.made = self.known.setdefault(made, next(_numbers)) if None not in made and len(self.known) < _MOST_KNOWN else None

    def __add__(self, other: Any) -> Any:
        return _combined(self, other, operator.add)

    def __radd__(self, other: Any) -> Any:
        return _combined(other, self, operator.add)

    def __sub__(self, other: Any) -> Any:
        return _combined(self, other, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        return _combined(other, self, operator.sub)

    def __mul__(self, other: Any) -> Any:
        return _combined(self, other, operator.mul)

    def __rmul__(self, other: Any) -> Any:
        return _combined(other, self, operator.mul)

    def __truediv__(self, other: Any) -> Any:
        return quotient(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return quotient(other, self)

    def __neg__(self) -> Any:
        return Ball(-self.x, ("neg", self.made))

    def __abs__(self) -> Any:
        return Ball(abs(self.x), ("abs", self.made))

    def __pow__(self, other: Any) -> Any:
        return power(self, other)

    def __rpow__(self, other: Any) -> Any:
        return power(other, self)

    def __lt__(self, other: Any) -> bool:
        return self._order(other) < 0

    def __le__(self, other: Any) -> bool:
        return self._order(other) <= 0

    def __gt__(self, other: Any) -> bool:
        return self._order(other) > 0

    def __ge__(self, other: Any) -> bool:
        return self._order(other) >= 0

    def __eq__(self, other: object) -> bool:
        return self._order(other) == 0

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return self._order(0) != 0

    def _order(self, other: Any) -> float:
        """Negative, 0, positive, or NaN beside NaN."""
        other = ball(other)
        if not isinstance(other, Ball):
            return 0.0 - other
        difference = self.x - other.x
        if difference > 0:
            return 1.0
        if difference < 0:
            return -1.0
        if difference == 0 or (self.made is not None and self.made == other.made):
            return 0.0
        raise Undecided


def ball(x: Any) -> Any:
    """A number as a ball, exactly; infinities and NaN stay floats."""
    if isinstance(x, Ball):
        return x
    number = float(x)
    if not math.isfinite(number):
        return number
    import flint

    exact = int(x) if isinstance(x, int | np.integer) else number
    return Ball(flint.arb(exact), ("number", exact))


def _combined(a: Any, b: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """A sum, difference or product.  Beside an infinity or NaN, of a number only its sign counts."""
    a, b = ball(a), ball(b)
    if isinstance(a, Ball) and isinstance(b, Ball):
        return _finite(operation(a.x, b.x), (operation, a.made, b.made))
    one, other = (x if not isinstance(x, Ball) else x._order(0) if operation is operator.mul else 0.0 for x in (a, b))
    return operation(one, other)


def quotient(a: Any, b: Any) -> Any:
    """a / b, of balls, floats and integers alike; 0 divides as in IEEE arithmetic."""
    a, b = ball(a), ball(b)
    if isinstance(a, Ball) and isinstance(b, Ball):
        if b._order(0) == 0:
            order = a._order(0)
            return math.nan if order == 0 else math.copysign(math.inf, order)
        return _finite(a.x / b.x, ("/", a.made, b.made))
    if isinstance(b, Ball):
        return a * (b._order(0) or 1.0)
    return ball(0.0 / b) if isinstance(a, Ball) else a / b


def power(a: Any, b: Any) -> Any:
    """a**b for a that is not negative."""
    a, b = ball(a), ball(b)
    if not (isinstance(a, Ball) and isinstance(b, Ball)):
        one, other = (float(x.x.mid()) if isinstance(x, Ball) else x for x in (a, b))
        return ball(one**other)
    if a == 0:
        return ball(1.0) if b == 0 else ball(0.0) if b > 0 else math.inf
    return _finite(a.x**b.x, ("**", a.made, b.made))


def _finite(x: Any, made: Any) -> Ball:
    if not x.is_finite():
        raise Undecided
    return Ball(x, made)


def _function(name: str, plain: Callable[[float], float], of: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        x = ball(x)
        if not isinstance(x, Ball):
            return ball(plain(x))
        return _finite(of(x.x) if of else getattr(x.x, name)(), (name, x.made))

    return apply


def _root(x: Any) -> Any:
    x = ball(x)
    if isinstance(x, Ball) and x < 0:
        return math.nan
    return _function("sqrt", math.sqrt)(x)


def _logarithm(x: Any) -> Any:
    x = ball(x)
    if isinstance(x, Ball) and x <= 0:
        return -math.inf if x == 0 else math.nan
    return _function("log", math.log)(x)


#: What definitions use of `math` and of NumPy.
_MATH = types.SimpleNamespace(
    inf=math.inf, nan=math.nan, sqrt=_root, log=_logarithm,
    exp=_function("exp", lambda x: 0.0 if x == -math.inf else x), expm1=_function("expm1", lambda x: -1.0 if x == -math.inf else x),
    log1p=lambda x: _logarithm(1 + ball(x)), tanh=_function("tanh", math.tanh), sin=_function("sin", lambda x: math.nan),
    cos=_function("cos", lambda x: math.nan), erf=_function("erf", math.erf),
    isnan=lambda x: not isinstance(x, Ball) and math.isnan(x), isinf=lambda x: not isinstance(x, Ball) and math.isinf(x),
)  # fmt: skip
_NUMPY = types.SimpleNamespace(
    inf=np.inf, nan=np.nan, zeros=lambda size: np.full(size, ball(0.0), object), full=lambda size, value: np.full(size, ball(value), object)
)  # fmt: skip


class _Exactly(ast.NodeTransformer):
    """Floats that are written become balls, and divisions exact."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Call(ast.Name("ball", ast.Load()), [node], []) if isinstance(node.value, float) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return ast.Call(ast.Name("quotient", ast.Load()), [node.left, node.right], []) if isinstance(node.op, ast.Div) else node


@functools.cache
def _on_balls(define: Callable[..., Any]) -> Callable[..., Any]:
    tree = ast.fix_missing_locations(_Exactly().visit(ast.parse(textwrap.dedent(inspect.getsource(define)))))
    names: dict[str, Any] = {"math": _MATH, "np": _NUMPY, "ball": ball, "quotient": quotient}
    module = compile(tree, inspect.getsourcefile(define) or "definition", "exec")
    return types.FunctionType(next(x for x in module.co_consts if isinstance(x, types.CodeType)), names)


def reason_against(problem: Problem) -> str:
    """What has no enclosure here, or the empty string."""
    if problem.sequences is not None:
        return f"{type(problem.sequences).__name__} sequences have no enclosure; pass one sequence at a time"
    if problem.functions is not None:
        return "functions of the caller's have no enclosure"
    try:
        inspect.getsource(problem.variant.define)
    except OSError:
        return "the source of its loops cannot be read"
    return "" if balls.available() else "its loops need python-flint (pip install 'refattn[exact]')"


def certify(problem: Problem) -> dict[str, Certified]:
    """The outputs asked for, in the caller's layout; arguments as in `certify.certify`, of a problem that `reason_against` has nothing against.

    Raises
    ------
    ParameterError
        When the loops compare two numbers that no precision here tells apart, or use what there is no enclosure of.
    """
    axes = {o.name: o.axes for o in problem.variant.outputs}
    drafts = {name: draft(shape(axes[name], problem.dims), output_dtype(problem, name)) for name in problem.returns}
    bits = 0
    for bits in balls.precisions():
        try:
            with balls.precision(bits), _shown(problem, bits):
                found = _run(problem)
                done = [_settle(x, found[name]) for name, x in drafts.items()]
        except Undecided:
            continue
        except (AttributeError, NameError) as error:
            raise ParameterError(f"{problem.variant.name}: cannot be certified: its loops use what has no enclosure: {error}") from error
        if all(done) or bits > 2 * balls.FIRST:  # the next would not decide what is a tie
            unknown_are_nan(drafts)
            return {name: released(x, x.value.shape, axes[name], problem.layout) for name, x in drafts.items()}
    raise ParameterError(f"{problem.variant.name}: cannot be certified: its loops compare two numbers that {bits} bits do not tell apart")


@contextlib.contextmanager
def _shown(problem: Problem, bits: int) -> Iterator[None]:
    """Long work counts on a terminal what it has made."""
    if not sys.stderr.isatty() or flops(problem) < _SHOWN_FROM:
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Made(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{len(Ball.known):,} numbers made")

    columns = SpinnerColumn(), TextColumn("{task.description}"), Made(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as line:
        line.add_task(f"certifying {problem.variant.name} with {bits} bits")
        yield


def _run(problem: Problem) -> Mapping[str, np.ndarray]:
    every = np.frompyfunc(ball, 1, 1)
    real = {o.name for o in problem.variant.operands if o.kind == "real"}
    operands = [every(x) if name in real and x.size else x.astype(object) if name in real else x for name, x in problem.operands.items()]
    numbers = [ball(x) if isinstance(x, float) else x for x in problem.arguments]
    try:
        results = _on_balls(problem.variant.define)(*operands, *numbers)
    finally:
        Ball.known = {}
    results = results if isinstance(results, tuple) else (results,)
    return {o.name: np.asarray(x, object) for o, x in zip(problem.variant.outputs, results, strict=True)}


def _settle(known: Draft, found: np.ndarray) -> bool:
    """Put what was found, and say whether all of it is decided."""
    for at in np.ndindex(found.shape):
        x = ball(found[at])
        if isinstance(x, Ball):
            ends = balls.ends(x.x)
            if ends is not None and not known.rounded[at]:
                known.settle(at, *ends, 2)
        elif not math.isnan(x):
            known.value[at], known.bound[at], known.tier[at], known.rounded[at] = x, 0.0, 2, True
    return bool((known.rounded | np.array([isinstance(x, float) and math.isnan(x) for x in found.ravel()], bool).reshape(found.shape)).all())
