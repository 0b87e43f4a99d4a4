"""The state engine against the definitions, for every variant that is a recurrence: values and gradients, in all forms, at chunks' edges, and cut."""

import math
from dataclasses import replace

import catalogue
import numpy as np
import pytest
from catalogue import CALLS, VARIANTS, arrays_of, draw, flops, rounding
from test_catalogue import close

import refattn as ra
from refattn import catalog, definition, derivatives, problem
from refattn.engine.state import forms
from refattn.engine.state import run as engine
from refattn.engine.state.lowered import Lowered
from refattn.engine.state.lowering import Lowering
from refattn.engine.state.reduction import Reduced

pytestmark = pytest.mark.compiled

WITH_RECURRENCE = [v for v in VARIANTS if v.values[0].recurs]
RECURRENT_CALLS = [c for c in CALLS if c.values[0].recurs]
FORMATS = {np.float64: 2.0**-53, np.float32: 2.0**-24}
#: An odd number of slots, or CyFA is no recurrence.
GENERAL, *_ = LADDER = [{**dims, "Z": dims["Z"] // 2 * 2 + 1} for dims in catalogue.LADDER.values()]
#: One state for two query heads; widths small enough for long sequences.
LONG = {**GENERAL, "B": 1, "Hq": 2, "Hkv": 1, "D": 4, "E": 3, "H": 2, "G": 1, "M": 3, "N": 2, "F": 4, "R": 2}
SMALL = {**GENERAL, "B": 1, "Hq": 2, "Hkv": 1, "T": 3, "S": 3, "D": 2, "E": 2, "H": 2, "G": 1, "M": 2, "N": 2, "F": 3}


def bound(variant, params, operands, returns):
    """A call of known outputs, in the operands' format."""
    return problem.bind(variant, (), {**operands, **params}, returns)


def returned(variant, params, dims):
    """The outputs that the engine returns."""
    call = bound(variant, params, draw(variant, dims), [variant.outputs[0].name])
    return [o.name for o in variant.outputs if not engine.reason_against(replace(call, returns=(o.name,)))]


def by_definition(variant, params, returns):
    return lambda x: [np.asarray(y, np.float64) for y in arrays_of(ra.attend(variant.name, **x, **params, returns=returns, backend="definition"))]


def in_format(operands, dtype):
    return {name: x.astype(dtype) if np.asarray(x).dtype.kind == "f" else x for name, x in operands.items()}


def check_values(variant, params, dims, kinds, dtype, seed=0, **changed):
    operands = {name: x for name, x in {**draw(variant, dims, seed), **changed}.items() if x is not None}
    narrow = in_format(operands, dtype)
    exact, returns = in_format(narrow, np.float64), returned(variant, params, dims)
    expected = by_definition(variant, params, returns)(exact)
    tolerances = rounding(by_definition(variant, params, returns), exact, variant, flops(variant, exact, params))
    for form in kinds:
        found = engine.run(bound(variant, params, narrow, returns), form)
        for name, wanted, tolerance in zip(returns, expected, tolerances, strict=True):
            close(found[name], wanted, tolerance * FORMATS[dtype] * 2.0**53, f"{name}, {form}")


def expressed(variant, params, dims):
    """The forms that a call has, of which only the chunked one may be missing."""
    call = bound(variant, params, draw(variant, dims), returned(variant, params, dims))
    lowered = Lowering(Reduced(call).problem if variant.reduction else call).lowered
    return [form for form in engine.FORMS if form != "chunked" or not forms.chunked.reason_against(lowered)]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant, params", RECURRENT_CALLS)
def test_every_form_is_the_definition(variant, params, dtype):
    for dims in LADDER:
        check_values(variant, params, dims, expressed(variant, params, dims), dtype)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 129])
@pytest.mark.parametrize("variant", WITH_RECURRENCE)
def test_lengths_around_those_of_chunks(variant, n):
    dims = {**LONG, "T": n, "S": n}
    check_values(variant, dict(variant.causal or {}), dims, expressed(variant, {}, dims)[:: 2 if n > 1 else 1], np.float64)


@pytest.mark.parametrize("variant, params", RECURRENT_CALLS)
def test_gradients_of_every_form_are_those_of_the_definition(variant, params):
    operands = draw(variant, SMALL, seed=5)
    returns = returned(variant, params, SMALL)
    call = bound(variant, params, operands, returns)
    assert not engine.reason_against_gradients(call, None)
    rng = np.random.default_rng(6)
    shapes = {o.name: problem.output_shape(call, o.axes) for o in variant.outputs}
    cotangents = {name: rng.standard_normal(shapes[name]) for name in returns}
    expected = derivatives.gradients(call, cotangents)
    for form in expressed(variant, params, SMALL):
        if form == "quadratic":
            continue

        def gradients(x, form=form):
            return list(engine.gradients(bound(variant, params, x, returns), cotangents, form).values())

        tolerances = rounding(gradients, operands, variant, 4 * flops(variant, operands, params))
        for name, found, tolerance in zip(expected.values, gradients(operands), tolerances, strict=True):
            settled = np.isfinite(expected.errors[name])  # where a definition jumps, there is no gradient to compare
            allowed = np.where(settled, expected.errors[name], math.inf) + tolerance
            assert found.shape == operands[name[2:]].shape
            assert (np.abs(found - expected.values[name]) <= allowed).all(), f"{name}, {form}"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant", WITH_RECURRENCE)
def test_gradients_of_the_forms_agree_over_several_chunks(variant, dtype):
    dims = {**LONG, "T": 70, "S": 70}
    assert "chunked" in expressed(variant, {}, dims)
    operands, returns = in_format(draw(variant, dims, seed=2), dtype), returned(variant, {}, dims)
    call = bound(variant, {}, operands, returns)
    assert not engine.reason_against_gradients(call, None)
    rng = np.random.default_rng(3)
    cotangents = {o.name: rng.standard_normal(problem.output_shape(call, o.axes)) for o in variant.outputs if o.name in returns}

    def gradients(x, form="recurrent"):
        return [np.asarray(y, np.float64) for y in engine.gradients(bound(variant, {}, x, returns), cotangents, form).values()]

    exact = in_format(operands, np.float64)
    tolerances = rounding(gradients, exact, variant, 4 * flops(variant, exact, {}))
    names = [o.name for o in variant.operands if o.kind == "real" and o.name in operands]
    for name, a, b, tolerance in zip(names, gradients(operands, "chunked"), gradients(exact), tolerances, strict=True):
        close(a, b, tolerance * FORMATS[dtype] * 2.0**53, f"d_{name}")


def gates(variant):
    """Operands that are logarithms of decays as they are."""
    params = {p.name: p.default for p in variant.params}
    rules = [variant.recurrence(GENERAL, params)] if variant.recurrence else [one.recurrence for one in variant.reduction(GENERAL, params).passes]
    [name] = rules[-1].log_decay if len(rules[-1].log_decay) == 1 and isinstance(rules[-1].log_decay[0], str) else [""]
    return name if name in {o.name for o in variant.operands} else ""


@pytest.mark.parametrize("strength", [-50.0, -1e4, -math.inf])
@pytest.mark.parametrize("variant", [v for v in WITH_RECURRENCE if gates(v.values[0])])
def test_strong_decay_neither_overflows_nor_leaves_nan(variant, strength):
    dims = {**LONG, "T": 70, "S": 70}
    gate = np.array(draw(variant, dims)[gates(variant)])
    gate[np.random.default_rng(4).random(gate.shape) < 0.3] = strength
    for dtype in FORMATS:
        check_values(variant, {}, dims, expressed(variant, {}, dims), dtype, **{gates(variant): gate})


def cut(variant, operands, n):
    """Operands before token n and from it on, without what is carried."""
    axes = {o.name: o.axes.split() for o in variant.operands}
    one, two = {}, {}
    for name, x in operands.items():
        at = [a for a, axis in enumerate(axes[name]) if axis in ("T", "S")]
        if name.removeprefix("initial_") in variant.carried:
            one[name] = x
        elif at:
            one[name], two[name] = np.split(x, [n], axis=at[0])
        else:
            one[name] = two[name] = x
    return one, two


@pytest.mark.parametrize("form", engine.FORMS)
@pytest.mark.parametrize("variant", [v for v in WITH_RECURRENCE if v.values[0].causal is not None])
def test_a_sequence_is_carried_on_by_what_it_carries(variant, form):
    dims, params = {**LONG, "T": 70, "S": 70}, dict(variant.causal)
    assert form in expressed(variant, params, dims)
    operands, returns = draw(variant, dims), returned(variant, params, dims)
    whole = engine.run(bound(variant, params, operands, returns), form)
    one, two = cut(variant, operands, 33)
    first = engine.run(bound(variant, params, one, returns), form)
    second = engine.run(bound(variant, params, {**two, **{"initial_" + name: first[name] for name in variant.carried}}, returns), form)
    tolerances = rounding(by_definition(variant, params, returns), operands, variant, flops(variant, operands, params))
    for name, tolerance in zip(returns, tolerances, strict=True):
        tokens = next(o.axes for o in variant.outputs if o.name == name).split()
        joined = np.concatenate([first[name], second[name]], tokens.index("T")) if "T" in tokens else second[name]
        close(joined, whole[name], tolerance, name)


def test_results_do_not_depend_on_the_number_of_threads():
    variant, dims = catalog.variant("kda"), {**GENERAL, "T": 200, "D": 24, "E": 40, "Hq": 4}
    call = bound(variant, {}, draw(variant, dims), ["out", "state"])
    cotangents = {"out": np.random.default_rng(0).standard_normal((2, 4, 200, 40))}
    for form in engine.FORMS:
        one, two = (engine.run(call, form, threads) for threads in (1, 2))
        assert all((one[name] == two[name]).all() for name in one)
    for form in ("recurrent", "chunked"):
        one, two = (engine.gradients(call, cotangents, form, threads) for threads in (1, 2))
        assert all((one[name] == two[name]).all() for name in one)


def switches():
    """Every combination of what a `Lowered` can have, which no catalogue needs to."""
    rng = np.random.default_rng(0)
    for steps in (1, 3):
        for width, fades in ((0, False), (1, False), (3, False), (0, True), (3, True)):
            for erases, old in ((False, False), (True, False), (True, True)):
                for exclusive, bonus in ((False, False), (True, False), (True, True)):
                    if fades and (old or exclusive):
                        continue
                    q, b, w, S0 = (rng.standard_normal(s) for s in ((2, 4, 11, 3), (2, 2, 11, steps, 3), (2, 2, 11, steps, 5), (2, 2, 3, 5)))
                    yield Lowered(
                        q,
                        0.5 * b,
                        w,
                        S0,
                        g=-np.abs(rng.standard_normal((2, 2, 11, width))) if width else None,
                        e=0.5 * rng.standard_normal(b.shape) if erases else None,
                        u=rng.standard_normal((2, 2, 11, 3)) if bonus else None,
                        f=-np.abs(rng.standard_normal((2, 2, 11, 5))) if fades else None,
                        old=old,
                        exclusive=exclusive,
                        scale=0.7,
                    )


def by_einsum(x):
    out, S, group = np.zeros((*x.q.shape[:3], x.w.shape[4])), x.S0, x.q.shape[1] // x.b.shape[1]

    def read(t, S):
        return x.scale * np.einsum("bhk,bhkv->bhv", x.q[:, :, t], np.repeat(S, group, axis=1))

    for t in range(x.q.shape[2]):
        before, S = S, S if x.g is None else S * np.exp(x.g[:, :, t])[..., None]
        S = S if x.f is None else S * np.exp(x.f[:, :, t])[:, :, None]
        if x.exclusive:
            own = 0.0 if x.u is None else np.einsum("bhk,bhrk,bhrv->bhkv", x.u[:, :, t], x.b[:, :, t], x.w[:, :, t])
            out[:, :, t] = read(t, before + own)
        for r in range(x.b.shape[3]):
            seen = 0.0 if x.e is None else np.einsum("bhk,bhkv->bhv", x.e[:, :, t, r], before if x.old else S)
            S = S + x.b[:, :, t, r, :, None] * (x.w[:, :, t, r] - seen)[:, :, None]
        if not x.exclusive:
            out[:, :, t] = read(t, S)
    return out, S


def test_every_switch_of_the_recurrence_in_every_form():
    rng = np.random.default_rng(1)
    for x in switches():
        expected = by_einsum(x)
        d_out, d_state = (rng.standard_normal(y.shape) for y in expected)
        sizes = by_einsum(
            replace(
                x,
                q=np.abs(x.q),
                b=np.abs(x.b),
                w=np.abs(x.w),
                S0=np.abs(x.S0),
                e=None if x.e is None else -np.abs(x.e),
                u=None if x.u is None else np.abs(x.u),
            )
        )
        for form in (forms.recurrent, forms.quadratic, forms.chunked):
            if form is forms.chunked and form.reason_against(x):
                continue
            for a, b, size in zip(form.forward(x, 1), expected, sizes, strict=True):
                close(a, b, 2.0**-53 * 11 * 3 * 20 * np.abs(size))
        one, *others = (f.backward(x, d_out, d_state, 1) for f in (forms.recurrent, forms.chunked) if f is forms.recurrent or not f.reason_against(x))
        for name in ("q", "b", "w", "S0", "g", "e", "u", "f"):
            if getattr(x, name) is None:
                assert getattr(one, name) is None
                continue
            along, h = rng.standard_normal(getattr(x, name).shape), 2.0**-17

            def phi(move, name=name, along=along, x=x, d_out=d_out, d_state=d_state):
                out, state = by_einsum(replace(x, **{name: getattr(x, name) + move * along}))
                return np.sum(d_out * out) + np.sum(d_state * state)

            slope = (8 * (phi(h) - phi(-h)) - (phi(2 * h) - phi(-2 * h))) / (12 * h)
            size = sum(np.sum(np.abs(y)) for y in sizes) * 10
            for found in (one, *others):  # the error of the difference: roundings of phi / h; its fourth-order term is below that
                assert abs(np.sum(getattr(found, name) * along) - slope) <= 2.0**-53 * size / h * 4, name


@pytest.mark.parametrize("dtype", FORMATS)
def test_slots_written_with_weights_of_any_size(dtype):
    """Weights of nothing at first, then far apart, so that what was written before them does not count."""
    variant, dims = catalog.variant("abc"), {**LONG, "T": 70, "S": 70}
    write = np.array(draw(variant, dims)["write"])
    write[:, :, :5, :2] = -math.inf
    write[:, :, 20, 1:] = 1000.0
    write[:, :, 40, 2] = 5000.0
    for first in (None, np.full((1, 1, dims["Z"]), -math.inf)):
        check_values(variant, {}, dims, engine.FORMS, dtype, write=write, initial_max=first)


def test_columns_fade_in_what_a_variant_is_reduced_to_alone():
    """What judges variants by their own recurrence would pass over it."""
    for variant, params in (c.values for c in RECURRENT_CALLS if c.values[0].recurrence):
        assert not variant.recurrence(GENERAL, {**{p.name: p.default for p in variant.params}, **params}).log_value_decay


# ---- what a caller may ask for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba1", "rwkv4", "hgrn", "longhorn", "gla", "mamba2", "gated_slot"])
def test_values_of_states_of_one_column_are_left_to_the_definition_unless_asked_for(name, monkeypatch):
    variant = catalog.variant(name)
    x = draw(variant, {**GENERAL, "T": 90, "S": 90, "M": 30, "N": 16, "D": 16, "E": 16, "Z": 9})
    asked: list[str] = []
    monkeypatch.setattr(definition, "run", lambda call, real=definition.run: asked.append(call.variant.name) or real(call))
    ra.attend(name, **x)
    assert asked == ([name] if name in ("mamba1", "rwkv4", "hgrn", "longhorn") else [])
    ra.attend(name, **x, backend="cpu")
    ra.attend(name, **x, form="recurrent")
    assert len(asked) <= 1


def test_the_form_is_a_keyword_of_the_public_calls():
    variant = catalog.variant("gated_delta")
    x, d_out = draw(variant, GENERAL), np.ones((2, 6, 4, 5))
    whole = ra.attend("gated_delta", **x, backend="definition")
    for form in engine.FORMS:
        np.testing.assert_allclose(
            ra.attend("gated_delta", **x, form=form), whole, rtol=0, atol=2.0**-53 * flops(variant, x, {}) * np.abs(whole).max()
        )
    np.testing.assert_array_equal(
        ra.gradients("gated_delta", **x, d_out=d_out, form="recurrent").d_k, ra.gradients("gated_delta", **x, d_out=d_out, form="recurrent").d_k
    )
    refusals = (
        (ra.ParameterError, "no form named 'chunky'; did you mean 'chunked'", {"form": "chunky"}),
        (ra.ParameterError, "backend='definition' has one form", {"form": "recurrent", "backend": "definition"}),
        (ra.ParameterError, "a form is named by a string", {"form": 3}),
    )
    for exception, message, keywords in refusals:
        with pytest.raises(exception, match=message):
            ra.attend("gated_delta", **x, **keywords)
    with pytest.raises(ra.BackendUnavailableError, match="quadratic form has no gradients"):
        ra.gradients("gated_delta", **x, d_out=d_out, form="quadratic")
    q = np.ones((1, 1, 2, 2))
    with pytest.raises(ra.ParameterError, match="softmax: form='recurrent'; it has no recurrence"):
        ra.attention(q, q, q, form="recurrent")


def test_what_is_carried_past_no_token_is_no_view_of_what_was_given():
    x = draw(catalog.variant("cyfa"), {**GENERAL, "T": 0})
    found = ra.attend("cyfa", **x, returns="slot_keys", form="chunked")
    np.testing.assert_array_equal(found, x["initial_slot_keys"])
    assert found.flags.writeable and not np.shares_memory(found, x["initial_slot_keys"])


def test_an_even_number_of_slots_has_the_definition_alone():
    x = draw(catalog.variant("cyfa"), {**GENERAL, "Z": 4})
    for keywords in ({"form": "chunked"}, {"backend": "cpu"}):
        with pytest.raises(ra.BackendUnavailableError, match="it has no recurrence"):
            ra.attend("cyfa", **x, **keywords)
    np.testing.assert_array_equal(ra.attend("cyfa", **x), ra.attend("cyfa", **x, backend="definition"))
    assert ra.gradients("cyfa", **x, d_out=np.ones((2, 6, 4, 5))).errors


def test_a_decay_of_zero_is_differentiated_by_its_definition():
    x = draw(catalog.variant("retention"), SMALL) | {"decay": np.array([0.0])}
    found = ra.gradients("retention", **x, d_out=np.ones((1, 2, 3, 2)))
    assert np.isfinite(found.d_decay).all() and found.errors
    with pytest.raises(ra.BackendUnavailableError, match="the logarithm of a decay of 0 has no slope"):
        ra.gradients("retention", **x, d_out=np.ones((1, 2, 3, 2)), backend="cpu")


@pytest.mark.parametrize("variant", WITH_RECURRENCE)
def test_what_there_is_a_recurrence_for_the_engine_runs(variant):
    assert ra.describe(variant.name).backends == ("definition", "cpu")
    assert returned(variant, {}, GENERAL)[:1] == ["out"]
