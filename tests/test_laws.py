"""The laws of the house: what definitions may use, what an import may load, and that both statements of a variant agree."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from catalogue import CALLS, GENERAL, VARIANTS, draw, flops, outputs, problem_of, rounding, tried
from scipy.differentiate import derivative

import refattn as ra
import refattn.pieces.maps
import refattn.pieces.masks
import refattn.pieces.score_mods
import refattn.pieces.similarities
from refattn import catalog

# ---- definitions ---------------------------------------------------------------------------------------------------------------

MAY_CALL = {"range", "len", "min", "max", "abs", "bool", "int", "float"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_definition_uses_nothing_but_its_arguments_numpy_and_math(variant):
    define = variant.define
    function = ast.parse(textwrap.dedent(inspect.getsource(define))).body[0]
    own = {a.arg for a in function.args.args} | {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    foreign = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} - own - {"np", "math"} - MAY_CALL
    assert not foreign, f"define reads {foreign}"
    assert define.__globals__["np"] is np and define.__globals__.get("math", sys.modules["math"]) is sys.modules["math"]
    assert define.__closure__ is None and not function.args.defaults and not function.decorator_list
    for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
        root = call.func.value if isinstance(call.func, ast.Attribute) else call.func
        assert isinstance(root, ast.Name) and root.id in MAY_CALL | {"np", "math"}, f"define calls {ast.unparse(call.func)}"
    names = [o.name for o in variant.operands] + [p.name for p in variant.params]
    assert [a.arg for a in function.args.args] == names, "define takes the operands, then the parameters, in their order"


# ---- the public face -------------------------------------------------------------------------------------------------------------

HEAVY = ("numba", "llvmlite", "scipy", "rich", "typer", "torch", "jax", "tensorflow", "onnx", "onnxruntime", "mlx", "matplotlib", "pandas")
IMPORT = """
import sys, time
start = time.perf_counter()
import refattn
seconds = time.perf_counter() - start
print(seconds, [name for name in {heavy!r} if name in sys.modules])
"""


def in_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_refattn_is_quick_and_loads_neither_numba_nor_a_framework():
    runs = [in_fresh_process(IMPORT.format(heavy=HEAVY)).split(maxsplit=1) for _ in range(3)]
    assert {loaded.strip() for _, loaded in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.15


def test_a_first_call_loads_no_framework():
    code = "import sys, numpy as np, refattn as ra; x = np.ones((1, 1, 2, 2)); ra.attention(x, x, x); print([n for n in {!r} if n in sys.modules])"
    assert in_fresh_process(code.format(HEAVY)).strip() == "[]"


def test_the_names_type_checkers_see_are_the_names_loaded_lazily():
    tree = ast.parse(inspect.getsource(ra))
    [block] = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    errors = {name for name, module in ra._MODULE.items() if module == "errors"}  # these need no signature to be of use
    assert {name: module for name, module in ra._MODULE.items() if name not in errors - seen.keys()} == seen
    assert sorted(ra._MODULE) == ra.__all__ and set(ra.__all__) <= set(dir(ra))
    for name in ra.__all__:
        assert getattr(ra, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        ra.atention  # noqa: B018 - reading it is the test


def test_public_names_stay_functions_when_modules_of_the_same_name_are_imported():
    for info in pkgutil.iter_modules(ra.__path__):
        if info.name != "__main__":
            importlib.import_module(f"refattn.{info.name}")
    for name in ra.__all__:
        assert callable(getattr(ra, name)), name


@pytest.mark.parametrize("name", ra.__all__)
def test_every_public_name_is_documented(name):
    thing = getattr(ra, name)
    page = inspect.getdoc(thing)
    assert page and page.splitlines()[0].endswith((".", ":"))
    if inspect.isclass(thing):
        return
    signature = inspect.signature(thing)
    for p in signature.parameters.values():
        starred = {p.VAR_POSITIONAL: r"\*", p.VAR_KEYWORD: r"\*\*"}.get(p.kind, "")
        assert re.search(rf"^\s*(?:.*, )?{starred}{p.name}\b.*(:|$)", section(page, "Parameters"), re.MULTILINE), f"{p.name} is not described"
        assert p.annotation is not p.empty
    assert signature.return_annotation is not signature.empty
    if signature.return_annotation != "None":
        assert section(page, "Returns").strip()


def section(page, title):
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


# ---- pieces ----------------------------------------------------------------------------------------------------------------------


def stages(question, dims=({**GENERAL}, {**GENERAL, "T": 7, "S": 4})):
    """Every piece of that kind with numbers, as some variant's plan uses it."""
    for variant in (v.values[0] for v in VARIANTS if v.values[0].plan):
        defaults = {p.name: p.default for p in variant.params}
        for size in dims:
            for params in tried(variant):
                plan = variant.plan(size, {**defaults, **params})
                yield from ((stage, size) for stage in getattr(plan, question))


def test_every_piece_is_used_by_a_plan():
    plans = [v.plan(GENERAL, {**{p.name: p.default for p in v.params}, **params}) for v, params in (c.values for c in CALLS) if v.plan]
    used = {plan.similarity for plan in plans} | {stage.piece for plan in plans for stage in (*plan.masks, *plan.score_mods)}
    for package in (refattn.pieces.masks, refattn.pieces.score_mods, refattn.pieces.similarities):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            assert importlib.import_module(info.name) in used, info.name


def test_a_masks_span_bounds_what_it_allows():
    for stage, dims in stages("masks"):
        first, last = stage.piece.span(np.arange(dims["T"]), dims["S"], *stage.numbers)
        for i in range(dims["T"]):
            assert (first[i], last[i]) == stage.piece.span(i, dims["S"], *stage.numbers)
            allowed = [j for j in range(dims["S"]) if stage.piece.allows(0, 0, i, j, *stage.numbers)]
            assert allowed == list(range(max(first[i], 0), min(last[i], dims["S"]))), f"{stage.piece.__name__}, query {i}"


def test_a_score_mods_slope_is_its_derivative():
    seen = list(stages("score_mods"))
    assert seen
    for stage, _ in seen:
        x = np.linspace(-9.0, 9.0, 37)
        found = derivative(np.vectorize(lambda s, stage=stage: stage.piece.apply(s, *stage.numbers)), x)
        slopes = [stage.piece.slope(s, *stage.numbers) for s in x]
        np.testing.assert_array_less(np.abs(slopes - found.df), found.error + 2.0**-40)
        assert np.ptp(slopes) > 0.1


def factors():
    """Every factor of the recurrences of the catalogue, with the parameters worth trying."""
    for variant, params in (c.values for c in CALLS if c.values[0].recurrence):
        rule = variant.recurrence(GENERAL, {**{p.name: p.default for p in variant.params}, **params})
        products = (rule.query, rule.log_decay, rule.bonus, rule.skip, rule.input_gate)
        for product in (*products, *(part for w in rule.writes for part in (w.key, w.value, w.erase))):
            yield from (f for f in product if not isinstance(f, str) and f.map is not None)


def test_the_slope_of_a_map_of_numbers_is_its_derivative():
    numbers_of = {f.map: f.numbers for f in factors()}  # of those that a recurrence of the catalogue uses
    for info in pkgutil.iter_modules(refattn.pieces.maps.__path__, refattn.pieces.maps.__name__ + "."):
        piece = importlib.import_module(info.name)
        numbers = numbers_of.get(piece, ())
        x = np.linspace(1.0, 3.0, 23)
        numerical = derivative(lambda y, piece=piece, numbers=numbers: piece.apply(y, *numbers), x)
        np.testing.assert_array_less(np.abs(piece.slope(x, *numbers) - numerical.df), numerical.error + 2.0**-40)


def test_a_variant_lies_in_the_folder_of_its_family():
    for name, v in catalog.catalogue().items():
        module = catalog.module(v).__name__
        assert not module.startswith("refattn.") or module == f"refattn.variants.{v.family}.{name}"


# ---- both statements of a variant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, params", [c for c in CALLS if c.values[0].plan])
def test_the_plan_is_the_definition_entry_by_entry(variant, params):
    for dims in (GENERAL, {**GENERAL, "T": 7, "S": 4}):
        operands = draw(variant, dims)
        expected = outputs(variant, operands, params)
        tolerances = rounding(lambda x: list(outputs(variant, x, params).values()), operands, variant, flops(variant, operands, params))
        scores, weights, out = planned(problem_of(variant, operands, params))
        found = {"scores": scores, "weights": weights, "out": out}
        assert np.array_equal(weights != 0.0, np.reshape(expected["weights"], weights.shape) != 0.0)
        for output, tolerance in zip(variant.outputs, tolerances, strict=True):
            if output.name in found:
                x = found[output.name].reshape(expected[output.name].shape)
                visible = x > -np.inf
                assert np.array_equal(visible, expected[output.name] > -np.inf), "the same entries are visible"
                off = np.abs(x[visible] - expected[output.name][visible])
                assert np.all(off <= tolerance[visible]), f"{output.name}: off by {off.max()}"


def planned(problem):
    """Scores, weights and output of a plan, from its pieces' scalar functions: (B, H, T, S) twice, and (B, H, T, E) or (B, T, M)."""
    plan, x = problem.variant.plan(problem.dims, problem.params), problem.operands
    q, k, v = (x[name] if x[name].ndim == 4 else x[name][:, None] for name in (plan.query, plan.key, plan.value))
    if plan.projections:
        q, k, v = (rows @ x[w] + x[b][:, None] for rows, (w, b) in zip((q, k, v), plan.projections[:3], strict=True))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.full((*q.shape[:3], k.shape[2]), plan.fill)
    own = [x[name] for name in plan.weights]
    for b, h, i, j in np.ndindex(scores.shape):
        allowed = all(stage.piece.allows(b, h, i, j, *stage.numbers) for stage in plan.masks)
        entry = (b, h, i, j) if "Hq" in problem.dims else (b, i, j)
        if allowed and (not plan.mask or x[plan.mask][entry]):
            s = plan.scale * plan.similarity.score(q[b, h, i], k[b, h, j], *own) + plan.shift
            for stage in plan.score_mods:
                s = stage.piece.apply(s, *stage.numbers)
            scores[b, h, i, j] = s + (x[plan.bias][entry] if plan.bias else 0.0)
    weights = normalised(plan, scores, x[plan.sinks] if plan.sinks else np.full(q.shape[1], -np.inf))
    out = weights @ v
    if plan.projections:
        w, b = plan.projections[3]
        out = np.einsum("bhte,hem->btm", out, x[w]) + x[b]
    return scores, weights, out + (x[plan.residual][:, None] if plan.residual else 0.0)


def normalised(plan, scores, sinks):
    if plan.normalizer == "sigmoid":
        return 1.0 / (1.0 + np.exp(-scores))
    if plan.normalizer == "relu":
        return np.maximum(scores, 0.0) ** plan.power / plan.divisor
    if plan.normalizer in ("sparsemax", "entmax15"):
        return beyond_a_threshold(scores, {"sparsemax": 1, "entmax15": 2}[plan.normalizer])
    axis = {"softmax": 3, "softmax over queries": 2}[plan.normalizer]
    if axis == 3:  # a sink is one more score of the row, whose weight is then dropped
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))], 3)
    top = np.max(scores, axis, keepdims=True)
    exponentials = np.exp(scores - np.where(top > -np.inf, top, 0.0))
    total = exponentials.sum(axis, keepdims=True)
    weights = np.divide(exponentials, total, out=np.zeros_like(scores), where=total != 0.0)
    return weights[..., :-1] if axis == 3 else weights


def beyond_a_threshold(scores, power):
    """max(scores / power - tau, 0) ** power with rows that sum to one: the sum falls as tau rises, so tau is found by bisection."""
    top = np.max(scores, 3, keepdims=True)
    z = (scores - np.where(top > -np.inf, top, 0.0)) / power
    low, high = np.full(top.shape, -1.0), np.zeros(top.shape)
    for _ in range(60):
        tau = (low + high) / 2.0
        too_much = np.sum(np.maximum(z - tau, 0.0) ** power, 3, keepdims=True) > 1.0
        low, high = np.where(too_much, tau, low), np.where(too_much, high, tau)
    return np.maximum(z - low, 0.0) ** power
