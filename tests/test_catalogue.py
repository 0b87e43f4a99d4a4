"""Every variant of the catalogue, from its declarations alone: a new file is tested with no edit here."""

import inspect
import re

import ml_dtypes
import numpy as np
import pytest
from catalogue import CALLS, GENERAL, LADDER, SQUARE, VARIANTS, arrays_of, draw, flops, outputs, problem_of, rounding, tried

import refattn as ra
from refattn import catalog, costs, definition, problem
from refattn.precision import round_to
from refattn.spec import MAY_BE_EMPTY, Operand, shape, size

same = np.testing.assert_array_equal


def close(actual, desired, tolerance, message=""):
    """Equal where not finite, and within the tolerance, a number or an array, elsewhere."""
    finite = np.isfinite(actual) & np.isfinite(desired)
    same(np.where(finite, 0.0, actual), np.where(finite, 0.0, desired), message)
    excess = np.abs(np.where(finite, actual, 0.0) - np.where(finite, desired, 0.0)) - tolerance
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
    assert excess.size == 0 or excess[worst] <= 0, f"{message}: {actual[worst]!r} is not {desired[worst]!r}, at {worst}, past it by {excess[worst]:g}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_worked_examples_come_out(variant):
    assert variant.examples, "a variant has at least one worked example"
    for example in variant.examples:
        operands = {name: np.array(x) for name, x in example.operands.items()}
        results = outputs(variant, operands, example.params)
        for name, expected in example.returns.items():
            units = flops(variant, operands, example.params)  # each operation rounds once, and operands like log(3) were rounded too
            largest = np.max(np.abs(expected), where=np.isfinite(expected), initial=1.0)
            assert results[name].shape == np.shape(expected)
            close(results[name], expected, 2.0**-53 * units * largest, f"{name}, {example.source}")


@pytest.mark.parametrize("size", LADDER)
@pytest.mark.parametrize(
    "variant, identity", [pytest.param(v.values[0], i, id=f"{v.id}-{i.statement}") for v in VARIANTS for i in v.values[0].identities]
)
def test_identities_hold(variant, identity, size):
    operands = draw(variant, LADDER[size], optional=False)
    operations = 0

    def run(x, name=variant.name, returns=None, **params):
        nonlocal operations
        defaults = identity.params if name == variant.name else {}
        call = problem.bind(catalog.variant(name), (), {**x, **defaults, **params}, returns)
        operations += costs.flops(call)
        return problem.release(call, definition.run(call))

    left, right = map(arrays_of, identity.sides(run, operands))
    tolerances = rounding(lambda x: identity.sides(run, x)[0], operands, variant, operations)
    for a, b, tolerance in zip(left, right, tolerances, strict=True):
        close(a, np.broadcast_to(b, a.shape), tolerance, identity.statement)


@pytest.mark.parametrize("variant, params", CALLS)
def test_plain_python_and_compiled_code_agree_to_the_bit(variant, params):
    for dims in (GENERAL, {**GENERAL, "T": 7, "S": 4}):  # under NUMBA_DISABLE_JIT both are plain Python
        call = problem_of(variant, draw(variant, dims), params)
        with np.errstate(all="ignore"):
            plain = variant.define(*call.arrays, *call.arguments)
            fast = definition.compiled(variant)(*call.arrays, *call.arguments)
        for a, b in zip(arrays_of(plain), arrays_of(fast), strict=True):
            same(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrong_axis_is_refused_by_name_and_numbers(variant):
    operands = draw(variant, GENERAL)
    refused = 0
    for o in variant.operands:
        for n, axis in enumerate(o.axes.split()):
            sharing = {p.name: a for p in variant.operands for a in p.axes.split() if set(a.split("+")) & set(axis.split("+"))}
            if len(sharing) == 1 and not (axis == "Hq" and "Hkv" in variant.axes):
                continue  # nothing else fixes this size
            wrong = np.concatenate([operands[o.name], np.take(operands[o.name], [0], n)], n)
            with pytest.raises(ra.ShapeError) as refusal:
                ra.attend(variant.name, **{**operands, o.name: wrong})
            message = str(refusal.value)
            sizes = {wrong.shape[n], *(size(a, {**GENERAL, axis: wrong.shape[n]}) for a in sharing.values() if axis.isidentifier())}
            assert message.startswith(variant.name + ": ") and axis in message
            assert sizes & set(map(int, re.findall(r"\b\d+\b", message)))
            assert any(re.search(rf"\b{name}\b", message) for name in sharing)
            refused += 1
        with pytest.raises(ra.ShapeError, match=rf"{variant.name}: {o.name} has {operands[o.name].ndim + 1} axes"):
            ra.attend(variant.name, **{**operands, o.name: operands[o.name][None]})
    assert refused or len(variant.operands) == 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_dtype_gives_the_float64_result_rounded_once(variant, dtype):
    real = [o.name for o in variant.operands if o.kind == "real"]
    narrow = {name: round_to(x, np.dtype(dtype)) if name in real else x for name, x in draw(variant, GENERAL).items()}
    names = [o.name for o in variant.outputs]
    results = arrays_of(ra.attend(variant.name, **narrow, returns=names, backend="definition"))
    exact = outputs(variant, {name: x.astype(np.float64) if name in real else x for name, x in narrow.items()}, {})
    for output, result in zip(variant.outputs, results, strict=True):
        expected = np.dtype(np.float32) if output.wide and np.dtype(dtype).itemsize < 4 else np.dtype(dtype)
        assert result.dtype == expected
        same(result.astype(np.float64), round_to(exact[output.name], expected).astype(np.float64))  # NumPy compares no float8 NaN


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_order_does_not_matter(variant):
    def strided(x):
        wide = np.zeros([2 * n for n in x.shape], x.dtype)
        wide[tuple(slice(None, None, 2) for _ in x.shape)] = x
        return wide[tuple(slice(None, None, 2) for _ in x.shape)]

    def read_only(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    storages = {
        "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
        "read-only": read_only,
        "strided": strided,
        "reversed": lambda x: np.flip(np.flip(x).copy()),
        "Fortran": np.asfortranarray,
    }
    operands = draw(variant, GENERAL)
    expected = outputs(variant, operands, {})
    for storage, stored in storages.items():
        again = outputs(variant, {name: stored(x) for name, x in operands.items()}, {})
        for name, x in expected.items():
            same(again[name], x, storage)
    repeated = {name: np.broadcast_to(x[:1], x.shape) for name, x in operands.items()}
    copied = {name: x.copy() for name, x in repeated.items()}
    for a, b in zip(outputs(variant, repeated, {}).values(), outputs(variant, copied, {}).values(), strict=True):
        same(a, b)


@pytest.mark.parametrize("variant, params", CALLS)
def test_empty_axes_give_empty_or_unattended_outputs(variant, params):
    for axis in sorted(MAY_BE_EMPTY & set(variant.axes)):
        dims = {**GENERAL, axis: 0}
        results = outputs(variant, draw(variant, dims), params)
        for output in variant.outputs:
            assert results[output.name].shape == shape(output.axes, dims)
        assert np.isfinite(results[variant.outputs[0].name]).all()


@pytest.mark.parametrize("variant, params", CALLS)
def test_one_of_everything_is_finite(variant, params):
    results = outputs(variant, draw(variant, LADDER["one"], optional=False), params)
    assert np.isfinite(results[variant.outputs[0].name]).all()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if any(o.name == "mask" for o in v.values[0].operands)])
def test_a_query_that_sees_nothing_stays_finite(variant):
    operands = draw(variant, GENERAL, optional=False)
    mask = variant.operand("mask")
    hidden = np.ones(shape(mask.axes, GENERAL), bool)
    hidden[..., 1, :] = False
    out = outputs(variant, {**operands, "mask": hidden}, {})["out"]
    assert np.isfinite(out).all() and np.any(out)
    if "empty_rows" in [p.name for p in variant.params]:
        assert variant.param("empty_rows").default == "zero"
        same(np.take(out, 1, variant.outputs[0].axes.split().index("T")), 0.0)


@pytest.mark.parametrize("variant, params", CALLS)
def test_order_means_nothing_along_every_unordered_axis(variant, params):
    operands = draw(variant, GENERAL)
    defaults = {p.name: p.default for p in variant.params}
    ordered = variant.ordered({**defaults, **params}).split()
    tolerances = rounding(lambda x: list(outputs(variant, x, params).values()), operands, variant, flops(variant, operands, params))
    expected = outputs(variant, operands, params)
    for order in permutations(variant):
        if order.keys() & set(ordered):
            continue
        moved = {name: reordered(x, variant.operand(name).axes, order) for name, x in operands.items()}
        results = outputs(variant, moved, params)
        for output, tolerance in zip(variant.outputs, tolerances, strict=True):
            wanted, budget = (reordered(x, output.axes, order) for x in (expected[output.name], tolerance))
            close(results[output.name], wanted, budget, f"{output.name} along {' and '.join(order)}")


def permutations(variant):
    """One reordering per axis; heads and the heads or groups they share go together, group by group."""
    rng = np.random.default_rng(5)
    shared = {few: many for many, few in (("Hq", "Hkv"), ("H", "G")) if few in variant.axes}
    for axis in variant.axes:
        if axis in shared:
            group = GENERAL[shared[axis]] // GENERAL[axis]
            groups = np.roll(np.arange(GENERAL[axis]), 1)
            yield {axis: groups, shared[axis]: np.concatenate([g * group + rng.permutation(group) for g in groups])}
        elif axis not in shared.values():
            yield {axis: np.roll(rng.permutation(GENERAL[axis]), 1)}


def reordered(x, axes, order):
    for n, axis in enumerate(axes.split()):
        starts = np.cumsum([0, *(GENERAL[term] for term in axis.split("+"))])
        index = [start + order.get(term, np.arange(GENERAL[term])) for start, term in zip(starts[:-1], axis.split("+"), strict=True)]
        x = np.take(x, np.concatenate(index), n)
    return x


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.values[0].causal is not None])
def test_no_output_depends_on_a_later_token(variant):
    for params in tried(variant):
        if params.keys() & variant.causal.keys():
            continue
        for dims in (SQUARE, {**GENERAL, "T": 4, "S": 6}):  # queries are the last T of S tokens
            before, after = draw(variant, dims, seed=1), draw(variant, dims, seed=2)
            expected = outputs(variant, before, {**variant.causal, **params})
            for n in range(1, dims["T"]):
                first = {"T": n, "S": n + dims["S"] - dims["T"]}
                changed = {name: with_later_tokens(x, after[name], variant.operand(name).axes, first) for name, x in before.items()}
                results = outputs(variant, changed, {**variant.causal, **params})
                for output in variant.outputs:
                    if "T" in output.axes.split():
                        kept = range(n), output.axes.split().index("T")
                        same(np.take(results[output.name], *kept), np.take(expected[output.name], *kept), f"{output.name} before token {n}")


def with_later_tokens(x, other, axes, first):
    x = x.copy()
    for n, axis in enumerate(axes.split()):
        if axis in first:
            np.moveaxis(x, n, 0)[first[axis] :] = np.moveaxis(other, n, 0)[first[axis] :]
    return x


@pytest.mark.parametrize("variant, params", [c for c in CALLS if c.values[0].linear_in])
def test_the_first_output_is_linear_where_declared(variant, params):
    one, two = draw(variant, GENERAL, seed=3), draw(variant, GENERAL, seed=4)
    name, out = variant.linear_in, variant.outputs[0].name

    def of(x):
        return outputs(variant, {**one, name: x}, params)[out]

    def terms(x):
        return 4.0 * np.abs(of(one[name])) + np.abs(of(x[name]))

    [tolerance] = rounding(terms, {**one, name: two[name]}, variant, 3 * flops(variant, one, params))
    close(of(4.0 * one[name] - two[name]), 4.0 * of(one[name]) - of(two[name]), tolerance)


@pytest.mark.parametrize("variant, params", CALLS)
def test_the_other_layout_is_a_transpose(variant, params):
    def swapped(o, x):
        fewest = "*" if isinstance(o, Operand) else "+"  # widths: a gate has none, and neither has a log-sum-exp, which stays as it is
        return np.swapaxes(x, 1, 2) if re.fullmatch(rf"B (H\w*|G) [TS]( (?![TS]\b)[\w+]+){fewest}", o.axes) else x

    operands = draw(variant, GENERAL)
    names = [o.name for o in variant.outputs]
    expected = arrays_of(ra.attend(variant.name, **operands, **params, returns=names))
    turned = {name: swapped(variant.operand(name), x) for name, x in operands.items()}
    results = arrays_of(ra.attend(variant.name, **turned, **params, returns=names, layout="BTHD"))
    for output, a, b in zip(variant.outputs, results, expected, strict=True):
        same(swapped(output, a), b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_operands_may_be_named_or_in_order(variant):
    operands = draw(variant, GENERAL)
    for count in range(len(operands) + 1):
        in_order, named = list(operands.values())[:count], dict(list(operands.items())[count:])
        for a, b in zip(arrays_of(ra.attend(variant.name, *in_order, **named)), arrays_of(ra.attend(variant.name, **operands)), strict=True):
            same(a, b)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if any(o.optional for o in v.values[0].operands)])
def test_an_absent_operand_is_its_neutral_element(variant):
    operands = draw(variant, GENERAL, optional=False)
    expected = outputs(variant, operands, {})
    for o in variant.operands:
        if o.optional:
            neutral = np.full(shape(o.axes, GENERAL), o.absent)
            for name, x in outputs(variant, {**operands, o.name: neutral}, {}).items():
                same(x, expected[name], f"{name} with neutral {o.name}")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if any(o.broadcast for o in v.values[0].operands)])
def test_a_broadcast_operand_equals_its_expansion(variant):
    operands = draw(variant, GENERAL)
    for o in variant.operands:
        whole = operands[o.name]
        for small in (whole[..., :1, :], whole[:1], whole[0], whole[(0,) * (whole.ndim - 1)]) if o.broadcast else ():
            expanded = np.broadcast_to(small, whole.shape).copy()
            given, copied = (outputs(variant, {**operands, o.name: x}, {}) for x in (small, expanded))
            for name, x in given.items():
                same(x, copied[name], f"{name} with {o.name} of shape {small.shape}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_operand_or_parameter_has_the_name_of_a_keyword_of_every_call(variant):
    keywords = {p for call in (ra.attend, ra.gradients, ra.step) for p in inspect.signature(call).parameters}
    assert not keywords & {one.name for one in (*variant.operands, *variant.params)} - {"state"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_says_what_it_is(variant):
    page = catalog.module(variant).__doc__
    assert re.search(r"^    \S.*=", page, re.MULTILINE), "the docstring shows the equation, indented"
    assert "=" in variant.equation and variant.summary.endswith(".") and "\n" not in variant.summary
    paper = variant.paper
    assert paper.title and paper.authors and (paper.year is None or paper.year > 1900) and (paper.arxiv or paper.doi or paper.url or paper.where)
    assert all("," in author or author == "Anonymous" for author in paper.authors), "authors are 'Family, Given'"
    named = (*variant.operands, *variant.outputs, *variant.params)
    assert all(x.meaning for x in named) and len({x.name for x in named}) == len(named)
    assert set(variant.returns) <= {o.name for o in variant.outputs} and variant.identities
    for p in variant.params:
        assert p.kind.accepts(p.default) and all(p.kind.accepts(value) and value != p.default for value in p.tries)
