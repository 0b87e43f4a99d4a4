"""Cost formulas against counts taken while the definition runs."""

import ast
import inspect
import textwrap
import tracemalloc

import numpy as np
import pytest
from catalogue import CALLS, GENERAL, SQUARE, VARIANTS, draw, problem_of

import refattn as ra
from refattn import catalog, costs
from refattn.precision import as_dtype
from refattn.spec import every_size, shape

#: No more queries than keys, so that no row is empty; sizes that differ, and one of everything.
SIZES = (GENERAL, SQUARE, {**GENERAL, "B": 1, "Hq": 4, "T": 1, "S": 9, "D": 2, "E": 1}, dict.fromkeys(GENERAL, 1))


class Instrumented(ast.NodeTransformer):
    """Passes the result of every arithmetic operation and every function of math and NumPy through `counted`."""

    def visit_BinOp(self, node):
        self.generic_visit(node)
        return self.counted(node) if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow) else node

    def visit_AugAssign(self, node):
        read = ast.parse(ast.unparse(node.target), mode="eval").body
        return ast.Assign([node.target], self.visit(ast.BinOp(read, node.op, node.value)), lineno=node.lineno)

    def visit_Call(self, node):
        self.generic_visit(node)
        module = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        return self.counted(node) if module in ("math", "np") else node

    def counted(self, node):
        return ast.Call(ast.Name("counted", ast.Load()), [node], [])


class CountingNumPy:
    """NumPy, adding up the elements of the arrays it allocates."""

    def __init__(self):
        self.elements = 0

    def __getattr__(self, name):
        found = getattr(np, name)
        return self.allocating(found) if name.partition("_")[0] in ("zeros", "ones", "empty", "full", "array", "arange") else found

    def allocating(self, make):
        def allocate(*args, **keywords):
            made = make(*args, **keywords)
            self.elements += made.size
            return made

        return allocate


def counts(call):
    """Floating-point operations and elements allocated, of one run of the definition as plain Python."""
    operations, numpy = 0, CountingNumPy()

    def counted(result):
        nonlocal operations
        operations += isinstance(result, float)  # index arithmetic gives integers, allocations give arrays
        return result

    define = call.variant.define
    tree = ast.fix_missing_locations(Instrumented().visit(ast.parse(textwrap.dedent(inspect.getsource(define)))))
    names = {**define.__globals__, "np": numpy, "counted": counted}
    exec(compile(tree, inspect.getsourcefile(define), "exec"), names)
    with np.errstate(all="ignore"):
        names[define.__name__](*call.arrays, *call.arguments)
    return operations, numpy.elements


@pytest.mark.parametrize("variant, params", CALLS)
def test_the_formulas_are_the_counts(variant, params):
    for dims in SIZES:
        call = problem_of(variant, draw(variant, dims, optional=False), params)
        operations, elements = counts(call)
        assert costs.flops(call) == operations > 0
        cost = costs.cost(variant, call.dims, call.params, itemsize=8)
        assert cost.flops == operations
        assert cost.peak_memory == {"definition": 8 * elements}


def test_parameters_that_add_up_are_counted_together():
    softmax = next(v.values[0] for v in VARIANTS if v.id == "softmax")
    for params in ({"causal": True, "window": (1, None), "softcap": 2.0}, {"causal": "top_left", "window": (None, 0)}):
        call = problem_of(softmax, draw(softmax, GENERAL, optional=False), params)
        assert costs.flops(call) == counts(call)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_traffic_is_each_required_operand_and_usual_output_once(variant):
    dims = {axis: GENERAL[axis] for axis in variant.axes}
    params = {p.name: p.default for p in variant.params}
    operands = sum(np.prod(shape(o.axes, dims)) for o in variant.operands if not o.optional)
    results = sum(np.prod(shape(o.axes, dims)) for o in variant.outputs if o.name in variant.returns)
    for itemsize in (2, 4, 8):
        cost = costs.cost(variant, dims, params, itemsize)
        assert cost.bytes == itemsize * (operands + results)
        assert cost.intensity == cost.flops / cost.bytes


def test_a_narrow_operand_costs_its_float64_copy_and_the_rounded_output():
    softmax = next(v.values[0] for v in VARIANTS if v.id == "softmax")
    dims = {"B": 2, "Hq": 6, "Hkv": 2, "T": 4, "S": 7, "D": 3, "E": 5}
    params = {p.name: p.default for p in softmax.params}
    wide, narrow = (costs.cost(softmax, dims, params, itemsize).peak_memory["definition"] for itemsize in (8, 2))
    copies, rounded = 8 * (2 * 6 * 4 * 3 + 2 * 2 * 7 * (3 + 5)), 2 * (2 * 6 * 4 * 5)
    assert narrow == wide + copies + rounded


@pytest.mark.parametrize("window", [(0, 0), (2, 1), (None, 0), (None, None), (100, 100)])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_pairs_are_counted_as_the_definition_shows_them(causal, window):
    softmax = next(v.values[0] for v in VARIANTS if v.id == "softmax")
    for queries, keys in ((4, 7), (7, 4), (1, 5), (5, 1), (5, 0), (0, 5)):
        dims = {**GENERAL, "B": 1, "Hq": 1, "Hkv": 1, "T": queries, "S": keys}
        call = problem_of(softmax, draw(softmax, dims, optional=False), {"causal": causal, "window": window})
        scores = softmax.define(*call.arrays, *call.arguments)[3]
        assert costs.visible_pairs(softmax, call.dims, call.params) == np.count_nonzero(scores > -np.inf)


def allocated(variant, dims, dtype):
    """Bytes at the most in one call by the engine, as NumPy and Numba report them to tracemalloc, and as the cost says."""
    operands = [o.draw(np.random.default_rng(0), shape(o.axes, dims)).astype(as_dtype(dtype)) for o in variant.operands if not o.optional]
    ra.attend(variant.name, *operands, backend="cpu")
    tracemalloc.start()
    try:
        ra.attend(variant.name, *operands, backend="cpu")
        return tracemalloc.get_traced_memory()[1], ra.cost(variant.name, dtype=dtype, **dims).peak_memory["cpu"]
    finally:
        tracemalloc.stop()


def grown(name, dtype, sizes, longer=5000, shorter=3000):
    """What more tokens take, found and said."""
    variant = catalog.variant(name)
    (long, said_long), (short, said_short) = (
        allocated(variant, {axis: {**sizes, "T": n, "S": n + 100}[axis] for axis in variant.axes}, dtype) for n in (longer, shorter)
    )
    return long - short, said_long - said_short


@pytest.fixture
def one_thread(monkeypatch):
    """A second thread, which comes with more work, has room of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softmax", "relu", "luong_dot"])
def test_the_engine_allocates_more_for_longer_sequences_as_the_cost_says(name, dtype, one_thread):
    """What is not counted does not grow, but for tables of some bytes a row."""
    found, said = grown(name, dtype, {"B": 2, "Hq": 4, "Hkv": 2, "D": 4, "E": 40})
    assert abs(found - said) <= 64 * 2000 < said / 2


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["retention", "gated_delta", "delta_product", "linear", "rebased", "mlstm", "mamba2"])
def test_the_state_engine_allocates_more_for_longer_sequences_as_the_cost_says(name, dtype, one_thread):
    found, said = grown(name, dtype, {**every_size({"B": 2, "Hq": 4, "Hkv": 2, "T": 1, "S": 1, "D": 8, "E": 40}), "M": 40})
    assert abs(found - said) <= 64 * 2000 < said / 2


@pytest.mark.compiled
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.values[0].recurs])
def test_the_state_engine_allocates_what_the_cost_says_but_for_what_it_works_out_on_the_way(variant, one_thread):
    """Up to half more where there is a recurrence, whose maps work on whole arrays, twice as much where its operands are made first; or less."""
    sizes = {**every_size({"B": 1, "Hq": 2, "Hkv": 1, "T": 1, "S": 1, "D": 3, "E": 8, "Dq": 3, "Dk": 3, "A": 3}), "M": 8}
    found, said = grown(variant.name, "float32", sizes, 2200, 1200)
    assert said / (1.1 if variant.recurrence else 1.5) <= found <= said * (1.5 if variant.recurrence else 2.0)
