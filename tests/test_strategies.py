"""Drawn calls: every variant takes them, both statements of it agree on them, they are as unkind as they claim, and they shrink."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis import strategies as st

import refattn as ra
from refattn import backends, catalog, precision, strategies
from refattn.problem import bind

QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
MANY = settings(QUICK, max_examples=200)
EXISTS = settings(QUICK, max_examples=1000, phases=[Phase.generate])


def within_format(drawn, outputs):
    """Whether every answer is a number that its format holds; what happens beyond is the format's matter."""
    largest = precision.format_of(next(x.dtype for x in drawn.operands.values() if x.dtype != np.bool_)).largest
    return all(np.all(~np.isfinite(x) | (np.abs(x) <= largest)) for x in outputs)


def judged(variant):
    """Backends to be within the tolerance on any numbers: no kernels where that is measured by how a definition answers to perturbed operands.

    What leaves the format on the way, and comes back, does not show there.
    """
    return backends.of(variant) if variant.plan is not None or variant.recurrence is not None else ("definition",)


@pytest.mark.compiled
@pytest.mark.parametrize("name", catalog.names())
@MANY
@given(data=st.data())
def test_every_variant_takes_them_and_its_backends_agree(name, data):
    drawn = data.draw(strategies.problems(name, max_size=9))
    before = {n: x.tobytes() for n, x in drawn.operands.items()}
    returns = tuple(o.name for o in catalog.variant(name).outputs)
    wide = {n: x if x.dtype == np.bool_ else x.astype(np.float64) for n, x in drawn.operands.items()}
    exact = ra.attend(name, **{**drawn.keywords, **wide}, backend="definition", returns=returns)
    assume(within_format(drawn, exact if len(returns) > 1 else (exact,)))
    asked = tuple(n for n in returns if n not in ("weights", "scores"))
    for backend in judged(catalog.variant(name)):
        named = returns if backend == "definition" else asked
        try:
            with np.errstate(all="ignore"):
                found = ra.attend(name, **drawn.keywords, backend=backend, returns=named)
        except ra.BackendUnavailableError:  # the engine says which calls it leaves to the definition
            assert backend == "cpu"
            continue
        report = ra.compare(found, name, **drawn.keywords, returns=named)
        assert not report.failures, f"{drawn!r} by {backend}\n{report}"
    assert before == {n: x.tobytes() for n, x in drawn.operands.items()}


#: What can be seen of a call that has the feature: on softmax, which has them all.
SEEN = {
    "empty sizes": lambda d: d.operands["v"].size == 0,
    "different lengths": lambda d: lengths(d)[0] != lengths(d)[1],
    "grouped heads": lambda d: dims(d)["Hq"] // dims(d)["Hkv"] in (2, 3, 7),
    "optional operands": lambda d: len(d.operands) > 3,
    "broadcast": lambda d: "mask" in d.operands and d.operands["mask"].ndim < 4 and d.operands["v"].size,
    "empty rows": lambda d: "mask" in d.operands and d.operands["mask"].size and not d.operands["mask"].any(axis=-1).all(),
    "parameters": lambda d: d.params,
    "ties": lambda d: np.array_equal(d.operands["q"], np.round(d.operands["q"])) and 1 <= np.abs(d.operands["q"]).max(initial=0) < 9,
    "outliers": lambda d: d.operands["q"].size and 16 < np.abs(d.operands["q"]).max() < 100,
    "extremes": lambda d: d.operands["q"].any() and (np.abs(d.operands["q"]).max() < 1e-30 or np.abs(d.operands["q"]).max() > 1e6),
    "infinities": lambda d: "bias" in d.operands and np.isneginf(d.operands["bias"]).any(),
    "layouts": lambda d: d.layout == "BTHD",
    "strides": lambda d: not d.operands["q"].flags.c_contiguous or not d.operands["q"].flags.writeable,
}


def dims(drawn):
    return bind(catalog.variant(drawn.variant), (), drawn.operands | drawn.params, layout=drawn.layout).dims


def lengths(drawn):
    return dims(drawn)["T"], dims(drawn)["S"]


def test_every_feature_is_looked_for():
    assert SEEN.keys() == strategies.FEATURES.keys()


@pytest.mark.parametrize("feature", SEEN)
def test_a_feature_is_drawn_when_it_may_be_and_only_then(feature):
    found = find(strategies.problems("softmax", dtype="float32", max_size=6), lambda d: bool(SEEN[feature](d)), settings=EXISTS)
    assert SEEN[feature](found)
    without = [f for f in strategies.FEATURES if f != feature]
    if feature == "empty rows":  # a bias of -inf and causality empty rows too; here the mask is looked at
        without = ["optional operands", "broadcast", "different lengths"]

    @QUICK
    @given(strategies.problems("softmax", dtype="float32", max_size=6, features=without))
    def never(drawn):
        assert not SEEN[feature](drawn)

    never()


@QUICK
@given(strategies.problems("softmax", features=()))
def test_without_features_a_call_is_plain(drawn):
    assert [*drawn.operands] == ["q", "k", "v"] and not drawn.params and drawn.layout == "BHTD"
    assert all(x.flags.c_contiguous and x.size for x in drawn.operands.values())
    assert lengths(drawn)[0] == lengths(drawn)[1]


def test_a_failing_call_shrinks_to_the_plainest_that_fails():
    found = find(strategies.problems("softmax"), lambda d: d.params.get("causal") == "top_left" and lengths(d)[1] > lengths(d)[0], settings=MANY)
    assert dict(found.params) == {"causal": "top_left"} and found.layout == "BHTD" and [*found.operands] == ["q", "k", "v"]
    assert [x.shape for x in found.operands.values()] == [(1, 1, 1, 1), (1, 1, 2, 1), (1, 1, 2, 1)]
    assert not any(x.any() for x in found.operands.values())
    assert repr(found) == ("Drawn('softmax', q=float32[1, 1, 1, 1], k=float32[1, 1, 2, 1], v=float32[1, 1, 2, 1], causal='top_left', layout='BHTD')")


def wrong_alignment(q, k, v, causal):
    return ra.attention(q, k, v, causal="top_left" if causal is True else causal)


def test_a_planted_mistake_is_found_and_shrunk():
    plain = ["different lengths", "parameters", "ties"]

    def differs(drawn):
        causal = drawn.params.get("causal", False)
        q, k, v = (drawn.operands[n] for n in "qkv")
        return not ra.compare(wrong_alignment(q, k, v, causal), "softmax", q, k, v, causal=causal).passed

    found = find(strategies.problems("softmax", dtype="float32", features=plain), differs, settings=settings(MANY, max_examples=500))
    assert found.params["causal"] is True and max(lengths(found)) <= 3


@pytest.mark.parametrize("name", catalog.names())
@QUICK
@given(data=st.data())
def test_single_operands_fit_where_they_belong(name, data):
    variant = catalog.variant(name)
    sizes = data.draw(strategies.sizes(variant, 5))
    operands = {o.name: data.draw(strategies.operand(name, o.name, sizes, dtype="bfloat16")) for o in variant.operands}
    assert bind(variant, (), operands).dims == sizes
    assert all(x.dtype.name in ("bfloat16", "bool") for x in operands.values())


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: strategies.problems("softmx"), ra.UnknownVariantError, "did you mean 'softmax'"),
        (lambda: strategies.problems(dtype="float31"), ra.DtypeError, "no floating-point format named"),
        (lambda: strategies.problems(dtype=()), ra.ParameterError, "dtype is empty"),
        (lambda: strategies.problems(max_size=0), ra.ParameterError, "max_size=0; must be a whole number from 1"),
        (lambda: strategies.problems(features=["tie"]), ra.ParameterError, "no feature named 'tie'; did you mean 'ties'"),
        (lambda: strategies.operand("softmax", "w", {}), ra.ParameterError, "no operand named 'w'"),
        (lambda: strategies.operand("softmax", "q", {"B": 1}), ra.ParameterError, "q has axes B Hq T D; dims has no Hq"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_without_hypothesis_the_error_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None\ntry: import refattn.strategies\nexcept ImportError as e: print(type(e).__name__, e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "BackendUnavailableError" in out and "pip install 'refattn[strategies]'" in out
