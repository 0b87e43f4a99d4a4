"""Token by token, and sequences laid end to end: every variant that carries something is the same computed in pieces."""

import ml_dtypes
import numpy as np
import pytest
from catalogue import GENERAL, VARIANTS, arrays_of, draw, flops, outputs, rounding
from test_catalogue import close
from test_state_engine import cut

import refattn as ra
from refattn import catalog, repeats
from refattn.problem import takes_sequences
from refattn.spec import shape

CARRYING = [v for v in VARIANTS if v.values[0].carried]
PACKING = [
    pytest.param(v, backend, id=f"{v.name}-{backend}", marks=pytest.mark.compiled if backend == "cpu" else ())
    for v in (one.values[0] for one in VARIANTS)
    if takes_sequences(v, packed=True) and v.family != "scored"
    for backend in (("definition", "cpu") if v.recurs else ("definition",))
]
#: An odd number of slots, or CyFA is no recurrence.
DIMS = {**GENERAL, "T": 6, "S": 6, "Z": 7}
STEPPING = [pytest.param(v, "auto", id=v.name) for v in (one.values[0] for one in CARRYING) if v.causal is not None]
STEPPING += [pytest.param(*p.values[:1], "cpu", id=f"{p.id}-cpu", marks=pytest.mark.compiled) for p in STEPPING if p.values[0].reduction]
LENGTHS = (3, 0, 1, 4)
BOUNDS = np.concatenate([[0], np.cumsum(LENGTHS)])
same = np.testing.assert_array_equal


def causal(variant):
    """Parameters under which it is a matter of token after token, in stretches of one where it has any."""
    return {**(variant.causal or {}), **{p.name: 1 for p in variant.params if p.name in ("segment", "mini_batch")}}


@pytest.mark.parametrize("variant, backend", STEPPING)
def test_step_by_step_is_the_whole(variant, backend):
    """Of reductions the engine too, which makes of a token what it is to their recurrence."""
    operands = draw(variant, DIMS, seed=7)
    whole = outputs(variant, operands, causal(variant))
    tolerances = rounding(lambda x: list(outputs(variant, x, causal(variant)).values()), operands, variant, flops(variant, operands, causal(variant)))
    state = {name: operands["initial_" + name].copy() for name in variant.carried if "initial_" + name in operands}
    rest, parts = operands, []
    asked = {**causal(variant), "returns": [o.name for o in variant.outputs if "T" in o.axes.split()], "backend": backend}
    for n in (1, 1, 2):
        now, rest = cut(variant, rest, n)
        for name in variant.carried:
            now.pop("initial_" + name, None)
        *found, state = ra.step(variant.name, state, **now, **asked)
        parts.append(found)
    rest = {name: x for name, x in rest.items() if name.removeprefix("initial_") not in variant.carried}
    *found, state = ra.step(variant.name, state, **rest, **asked)
    parts.append(found)
    with_tokens = [o for o in variant.outputs if "T" in o.axes.split()]
    together = {o.name: np.concatenate(pieces, o.axes.split().index("T")) for o, pieces in zip(with_tokens, zip(*parts, strict=True), strict=True)}
    for o, tolerance in zip(variant.outputs, tolerances, strict=True):
        if o.name in {**together, **state}:
            close({**together, **state}[o.name], whole[o.name], tolerance, o.name)


@pytest.mark.parametrize("variant", CARRYING)
def test_the_neutral_state_is_that_of_none(variant):
    operands, sizes = draw(variant, DIMS, optional=False), {axis: DIMS[axis] for axis in variant.axes}
    if "initial_" + variant.carried[0] in operands:
        with pytest.raises(ra.ParameterError, match=f"{variant.carried[0]} has no neutral beginning; it is the operand initial_{variant.carried[0]}"):
            ra.initial_state(variant.name, **sizes)
        return
    start = ra.initial_state(variant.name, dtype="float64", **sizes)
    assert {name: x.shape for name, x in start.items()} == {n: shape(variant.operand("initial_" + n).axes, DIMS) for n in variant.carried}
    *one, state = ra.step(variant.name, start, **operands)
    *two, fresh = ra.step(variant.name, None, **operands)
    for a, b in zip([*one, *state.values()], [*two, *fresh.values()], strict=True):
        same(a, b)
    assert list(state) == list(fresh) == list(variant.carried) and all(state[name] is start[name] for name in state)


@pytest.mark.parametrize("backend", ["definition", pytest.param("cpu", marks=pytest.mark.compiled)])
def test_arrays_of_the_state_are_updated_in_place_and_others_are_not(backend):
    x = {name: a.astype(np.float32) for name, a in draw(catalog.variant("gated_delta"), DIMS).items() if name != "initial_state"}
    for name, returned in (("gated_delta", {}), ("linear", {})):
        given = {key: x[key] for key in ("q", "k", "v", "gate", "beta") if key in {o.name for o in catalog.variant(name).operands}} | returned
        start = ra.initial_state(name, B=2, Hkv=2, D=3, E=5)
        _, kept = ra.step(name, {key: a.copy() for key, a in start.items()}, **given, backend=backend)
        out, state = ra.step(name, start, **given, backend=backend)
        assert all(state[key] is start[key] for key in start) and out.dtype == np.float32
        for odd in (lambda a: a.astype(np.float64), np.asfortranarray, lambda a: a.astype(ml_dtypes.bfloat16), read_only):
            before = {key: odd(np.zeros_like(a)) for key, a in start.items()}
            _, after = ra.step(name, before, **given, backend=backend)
            for key, a in kept.items():
                same(after[key], a)
                assert after[key].dtype == np.float32


def read_only(x):
    x.flags.writeable = False
    return x


def test_half_width_operands_carry_a_wide_state():
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in draw(catalog.variant("gla"), DIMS, optional=False).items()}
    assert ra.initial_state("gla", dtype="bfloat16", B=1, Hkv=1, D=2)["state"].dtype == np.float32
    out, state = ra.step("gla", None, **half)
    again, _ = ra.step("gla", state, **half, layout="BHTD")
    assert out.dtype == again.dtype == ml_dtypes.bfloat16 and state["state"].dtype == np.float32


def test_what_a_step_is_asked_for_comes_before_the_state():
    x = draw(catalog.variant("retention"), DIMS, optional=False)
    out, last, state = ra.step("retention", None, **x, returns=("out", "state"))
    same(last, state["state"])
    (alone, _), (turned, _) = ra.step("retention", None, **x), ra.step("retention", None, *swapped(x), x["decay"], layout="BTHD")
    same(alone, out)
    same(np.swapaxes(turned, 1, 2), out)


def swapped(x):
    return [np.swapaxes(x[name], 1, 2) for name in ("q", "k", "v")]


X = np.ones((1, 1, 2, 3))
REFUSED = {
    "nothing carried": (lambda: ra.step("softmax", None, X, X, X), ra.ParameterError, "softmax carries nothing from token to token; .*retention"),
    "no mapping": (lambda: ra.step("linear", X, X, X, X), ra.OperandError, "linear: state is a ndarray; must be a mapping of state, mass, or None"),
    "a strange array": (
        lambda: ra.step("linear", {"sate": X}, X, X, X),
        ra.OperandError,
        "linear: state no array named 'sate'; did you mean 'state'",
    ),
    "a wrong shape": (lambda: ra.step("linear", {"mass": X}, X, X, X), ra.ShapeError, "linear: initial_mass has 4 axes"),
    "given twice": (lambda: ra.step("linear", {"mass": X[0]}, X, X, X, initial_mass=X[0]), ra.OperandError, "initial_mass is given twice"),
    "an axis missing": (
        lambda: ra.initial_state("linear", B=1, D=4),
        ra.ShapeError,
        "linear: Hkv missing; what it carries has the axes B, Hkv, D, E",
    ),
    "an axis unknown": (lambda: ra.initial_state("linear", B=1, Hkv=1, D=4, DD=3), ra.ParameterError, "linear: no axis named 'DD'"),
    "a size of none": (lambda: ra.initial_state("linear", B=1, Hkv=0, D=4), ra.ShapeError, "linear: Hkv=0; must be a whole number from 1"),
    "no dtype": (lambda: ra.initial_state("linear", dtype="int8", B=1, Hkv=1, D=4), ra.DtypeError, "int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_step_says_what_is_wrong(case):
    call, exception, message = REFUSED[case]
    with pytest.raises(exception, match=message):
        call()


# ---- laid end to end -----------------------------------------------------------------------------------------------------------------


def laid_out(variant, seed=0):
    """Operands of packed sequences, [T, H, ...], and of each sequence by itself, [1, H, T, ...]."""
    dims = {**GENERAL, "B": 1, "T": int(BOUNDS[-1]), "S": int(BOUNDS[-1]), "Z": DIMS["Z"]}
    packed, each = draw(variant, dims, seed), [{} for _ in LENGTHS]
    for o in variant.operands:
        axes = o.axes.split()
        at = [n for n, axis in enumerate(axes) if axis in ("T", "S")]
        if at:
            for n, one in enumerate(each):
                one[o.name] = np.take(packed[o.name], range(BOUNDS[n], BOUNDS[n + 1]), at[0])
            packed[o.name] = (np.swapaxes(packed[o.name], 1, at[0]) if at[0] == 2 else packed[o.name])[0]
        elif axes[0] == "B":
            packed[o.name] = draw(variant, {**dims, "B": len(LENGTHS)}, seed)[o.name]
            for n, one in enumerate(each):
                one[o.name] = packed[o.name][n : n + 1]
        else:
            for one in each:
                one[o.name] = packed[o.name]
    return packed, each


@pytest.mark.parametrize("variant, backend", PACKING)
def test_packed_sequences_are_calls_of_their_own(variant, backend):
    packed, each = laid_out(variant)
    call = {**causal(variant), "returns": [o.name for o in variant.outputs if "S" not in o.axes.split()], "backend": backend}
    found = arrays_of(ra.attend(variant.name, **packed, **call, layout=ra.Packed(BOUNDS)))
    alone = [arrays_of(ra.attend(variant.name, **one, **call)) for one in each]
    for at, name in enumerate(call["returns"]):
        axes = next(o.axes for o in variant.outputs if o.name == name).split()
        parts = [one[at] for one in alone]
        if "T" in axes:
            together = np.concatenate(parts, axes.index("T"))[0]
            same(found[at], np.swapaxes(together, 0, 1) if axes.index("T") == 2 and len(axes) > 3 else together, name)
        else:
            same(found[at], np.concatenate(parts), name)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["gated_delta", "linear", "mamba2"])
def test_gradients_of_packed_sequences_are_each_ones_own_and_sums_of_what_they_share(name):
    variant = catalog.variant(name)
    packed, each = laid_out(variant)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal(ra.attend(name, **packed, **causal(variant), layout=ra.Packed(BOUNDS)).shape)
    d_state = rng.standard_normal(packed["initial_state"].shape)
    call = {**causal(variant), "backend": "cpu"}
    found = ra.gradients(name, **packed, d_out=d_out, d_state=d_state, layout=ra.Packed(BOUNDS), **call)
    alone = [
        ra.gradients(name, **one, d_out=np.swapaxes(d_out[BOUNDS[n] : BOUNDS[n + 1]], 0, 1)[None], d_state=d_state[n : n + 1], **call)
        for n, one in enumerate(each)
    ]
    for o in variant.operands:
        parts, axes = [getattr(one, "d_" + o.name) for one in alone], o.axes.split()
        expected = sum(parts) if not {"T", "S", "B"} & set(axes) else None
        if {"T", "S"} & set(axes):
            expected = np.swapaxes(np.concatenate(parts, 2)[0], 0, 1)
        elif expected is None:
            expected = np.concatenate(parts)
        same(getattr(found, "d_" + o.name), expected, o.name)


# ---- the same step again -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch):
    """What calls remember, at first nothing."""
    monkeypatch.setattr(repeats, "_known", {})
    return repeats._known


def tokens(variant, seed, dtype=np.float32):
    """Operands of one token of some heads, wide enough that no call is tiny, without what is carried."""
    given = draw(variant, {**GENERAL, "B": 2, "Hq": 4, "Hkv": 2, "H": 4, "G": 2, "T": 1, "S": 1, "D": 16, "E": 24, "M": 40, "N": 16}, seed)
    return {name: np.ascontiguousarray(x, dtype) for name, x in given.items() if name.removeprefix("initial_") not in variant.carried}


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["gated_delta", "kda", "gla", "simple_gla", "delta", "rwkv6"])
def test_a_step_taken_again_has_the_bits_of_one_that_is_looked_at(name, known):
    variant = catalog.variant(name)
    calls = [tokens(variant, seed) for seed in range(4)]
    first = {n: x.astype(np.float32) for n, x in ra.step(name, None, **calls[0])[1].items()}
    looked_at, again = ({n: x.copy() for n, x in first.items()} for _ in range(2))
    remembered: dict = {}
    for call in calls:
        known.clear()
        out, looked_at = ra.step(name, looked_at, **call)
        known.update(remembered)
        other, again = ra.step(name, again, **call)
        remembered = dict(known)
        assert any(step is not None for step in remembered.values())
        same(other, out)
        same(again["state"], looked_at["state"])


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["linear", "mlstm", "mamba2", "retention", "hgrn2", "dplr", "gateloop", "rwkv4"])
def test_what_more_is_to_be_done_with_is_looked_at_every_time(name, known):
    variant = catalog.variant(name)
    state = ra.step(name, None, **tokens(variant, 0))[1]
    for seed in range(3):
        ra.step(name, state, **tokens(variant, seed))
    assert known and set(known.values()) == {None}


@pytest.mark.compiled
def test_other_parameters_formats_and_operands_are_other_steps(known):
    variant = catalog.variant("gated_delta")
    call, state = tokens(variant, 0), ra.step("gated_delta", None, **tokens(variant, 1))[1]
    ra.step("gated_delta", state, **call)
    plain = ra.step("gated_delta", {"state": state["state"].copy()}, **call)[0]
    other = ra.step("gated_delta", {"state": state["state"].copy()}, **call, scale=1.0)[0]
    np.testing.assert_allclose(other, plain * np.sqrt(16.0), rtol=1e-5)
    assert (
        ra.step("gated_delta", {"state": state["state"].astype(np.float64)}, **{n: x.astype(np.float64) for n, x in call.items()})[0].dtype
        == np.float64
    )
    both = ra.step("gated_delta", {"state": state["state"].copy()}, **call, returns=("out", "state"))
    same(both[0], plain)
    with pytest.raises(ra.ShapeError, match="gated_delta: k has D=15"):
        ra.step("gated_delta", state, **{**call, "k": call["k"][..., :15]})
    with pytest.raises(ra.OperandError, match="gated_delta: beta missing"):
        ra.step("gated_delta", state, **{name: x for name, x in call.items() if name != "beta"})
    apart = np.asfortranarray(state["state"])
    same(ra.step("gated_delta", {"state": apart}, **call)[0], plain)
    same(ra.step("gated_delta", {"state": state["state"].copy()}, *call.values())[0], plain)


@pytest.mark.compiled
def test_what_is_remembered_does_not_grow_without_end(known, monkeypatch):
    monkeypatch.setattr(repeats, "_MOST_KNOWN", 3)
    for width in range(16, 24):
        call = {name: x[..., :width] if name in "qk" else x for name, x in tokens(catalog.variant("gated_delta"), 0).items()}
        ra.step("gated_delta", ra.step("gated_delta", None, **call)[1], **{name: np.ascontiguousarray(x) for name, x in call.items()})
        assert len(known) <= 3
