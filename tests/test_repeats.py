"""A call like an earlier one gives what it would have given had nothing been remembered, and only then is one like it."""

import gc
import itertools
import weakref

import numpy as np
import pytest

import refattn as ra
from refattn import problem, repeats

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal


@pytest.fixture
def known(monkeypatch):
    """What calls remember, at first nothing."""
    monkeypatch.setattr(repeats, "_known", {})
    return repeats._known


@pytest.fixture
def unbound(monkeypatch):
    """Whoever is looked at from now on is an error."""

    def refuse():
        def bind(*_):
            raise AssertionError("looked at")

        monkeypatch.setattr(problem, "bind", bind)

    return refuse


def operands(seed, dtype=np.float32, T=20, S=70, D=16, E=24):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((2, 4, T, D), (2, 2, S, D), (2, 2, S, E))]


@pytest.mark.parametrize("n_q", [1, 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "options"),
    [("softmax", {}), ("softmax", {"causal": True, "scale": 0.3, "softcap": 5.0}), ("sparsemax", {"causal": True}), ("sigmoid", {}), ("relu", {})],
)
def test_a_call_made_again_has_the_bits_of_one_that_is_looked_at(name, options, dtype, n_q, known, unbound):
    calls = [operands(seed, dtype, n_q) for seed in range(3)]
    looked_at = [ra.attend(name, *call, **options, returns=("out",), form=None, out=None) for call in calls]
    assert list(map(bool, known.values())) == [True]
    known.clear()
    first = ra.attend(name, *calls[0], **options)
    unbound()
    again = [ra.attend(name, *call, **options) for call in calls]
    for found, expected in zip((first, *again), (looked_at[0], *looked_at), strict=True):
        same(found, expected)
    assert not any(np.shares_memory(one, other) for one, other in itertools.combinations((first, *again), 2))


def test_operands_by_name_and_one_array_for_two_are_remembered_as_such(known, unbound):
    q, k, _ = operands(0, E=16)
    other = [operands(1, E=16)[n] for n in (0, 1)]
    looked_at = [ra.attention(q, k, v=k), ra.attention(other[0], other[1], v=other[1])]
    unbound()
    same(ra.attention(q, k, v=k), looked_at[0])
    same(ra.attention(*other, v=other[1]), looked_at[1])
    assert len(known) == 1


DIFFERENT = {
    "a parameter": lambda q, k, v: ((q, k, v), {"causal": True}),
    "a parameter of another type": lambda q, k, v: ((q, k, v), {"scale": 1}),
    "the order in memory": lambda q, k, v: ((q, np.ascontiguousarray(k.swapaxes(1, 2)).swapaxes(1, 2), v), {"scale": 1.0}),
    "the format": lambda q, k, v: ((q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)), {"scale": 1.0}),
    "a size": lambda q, k, v: ((q[:, :, :-1], k, v), {"scale": 1.0}),
    "the backend": lambda q, k, v: ((q, k, v), {"scale": 1.0, "backend": "cpu"}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_call_that_differs_is_another(what, known):
    q, k, v = operands(0)
    ra.attention(q, k, v, scale=1.0)
    arrays, options = DIFFERENT[what](q, k, v)
    found = ra.attention(*arrays, **options)
    assert len(known) == 2
    known.clear()
    same(ra.attention(*arrays, **options), found)


def test_a_wrong_call_like_a_remembered_one_is_refused_as_ever(known):
    q, k, v = operands(0)
    ra.attention(q, k, v)
    with pytest.raises(ra.ShapeError, match="softmax: k has D=15"):
        ra.attention(q, k[..., :15], v)
    with pytest.raises(ra.ParameterError, match="softmax: scale="):
        ra.attention(q, k, v, scale=True)
    with pytest.raises(ra.OperandError, match="softmax: v missing"):
        ra.attend("softmax", q, k)


MORE = {
    "an operand": {"bias": np.zeros(70, np.float32)},
    "a rule": {"empty_rows": "nan"},
    "a layout": {"layout": "BTHD"},
    "an output": {"returns": ("out", "lse")},
    "a function": {"mask_mod": lambda b, h, i, j: j <= i},
}


@pytest.mark.parametrize("what", MORE)
def test_what_more_is_to_be_done_with_is_looked_at_every_time(what, known):
    q, k, v = operands(0)
    more = MORE[what]
    if "layout" in more:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    for _ in range(2):
        ra.attention(q, k, v, **more)
    assert not any(known.values())


def test_the_arrays_of_a_remembered_call_are_not_kept(known):
    arrays = operands(0)
    watched = [weakref.ref(x) for x in arrays]
    ra.attention(*arrays)
    assert any(known.values())
    del arrays
    gc.collect()
    assert [one() for one in watched] == [None] * 3


def test_what_is_remembered_does_not_grow_without_end(known, monkeypatch):
    monkeypatch.setattr(repeats, "_MOST_KNOWN", 3)
    for n in range(20, 30):
        ra.attention(*operands(0, T=n))
        assert len(known) <= 3
