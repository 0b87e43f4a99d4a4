"""Certified recurrences against the variants' equations in Arb balls: sums over earlier tokens, where the equation has such a form."""

import dataclasses
import math
import types

import flint
import numpy as np
import pytest
from catalogue import GENERAL, SQUARE, draw, flops, rounding, tried
from test_certify import DTYPES, even, is_nearest

import refattn as ra
from refattn import catalog
from refattn.exact import balls, enclosures, maps, recurrent, results, states
from refattn.exact.tokens import Head, Tokens
from refattn.pieces.maps import exp
from refattn.problem import bind
from refattn.spec import Factor, Recurrence, Write

arb = flint.arb

pytestmark = pytest.mark.compiled

#: More than any of the inputs below needs: a token of the delta rule costs a few bits.
BITS = 3000
T, K, V, GROUP = 9, 4, 3, 2


# ---- the independent side --------------------------------------------------------------------------------------------------------


def exactly(x):
    return np.frompyfunc(arb, 1, 1)(np.asarray(x, np.float64))


def factor(x):
    """exp, of balls; 0 at -inf."""
    return np.frompyfunc(lambda one: one.exp(), 1, 1)(exactly(x))


def dot(x, y):
    return sum((a * b for a, b in zip(x, y, strict=True)), arb(0))


def delta_rule(q, k, v, gate, beta, scale):
    """S = (I - beta k k^T) diag(exp(gate)) S + beta k v^T; out = scale S^T q."""
    state = exactly(np.zeros((K, V)))
    out = np.empty((*q.shape[:2], V), object)
    for t in range(len(k)):
        state = factor(gate[t])[:, None] * state
        change = [arb(float(beta[t])) * (arb(float(v[t, y])) - dot(exactly(k[t]), state[:, y])) for y in range(V)]
        state = state + exactly(k[t])[:, None] * np.array(change, object)
        for h in range(len(q)):
            out[h, t] = [dot(exactly(q[h, t]), state[:, y]) * arb(scale) for y in range(V)]
    return {"out": out, "state": state}


def gated_delta(x):
    return delta_rule(x["q"], x["k"], x["v"], np.repeat(x["gate"][:, None], K, axis=1), x["beta"], K**-0.5)


def kda(x):
    return delta_rule(x["q"], x["k"], x["v"], x["gate"], x["beta"], K**-0.5)


def removal(x, w, b, e, written, scale):
    """S = diag(w) S - b (e^T S) + written v^T; out = scale S^T q."""
    state = exactly(np.zeros((K, V)))
    out = np.empty((GROUP, T, V), object)
    for t in range(T):
        held = [dot(exactly(e[t]), state[:, y]) for y in range(V)]
        state = w[t][:, None] * state - b[t][:, None] * np.array(held, object) + written[t][:, None] * exactly(x["v"][t])
        for h in range(GROUP):
            out[h, t] = [dot(exactly(x["q"][h, t]), state[:, y]) * arb(scale) for y in range(V)]
    return {"out": out, "state": state}


def rwkv7(x):
    return removal(x, factor(x["gate"]), exactly(x["a"]) * exactly(x["kappa"]), x["kappa"], exactly(x["k"]), 1.0)


def comba(x):
    key = exactly(x["beta"])[:, None] * exactly(x["k"])
    return removal(x, np.repeat(factor(x["gate"])[:, None], K, axis=1), key, x["p"], key, K**-0.5)


def weighed(weights, v):
    """sum_j weights[h, i, j] v_j"""
    return np.array([[[dot(row, exactly(v)[:, y]) for y in range(v.shape[1])] for row in head] for head in weights], object)


def faded(factors, j, t):
    """The product of those after token j up to t."""
    found = exactly(np.ones(factors.shape[1:]))
    for s in range(j + 1, t + 1):
        found = found * factors[s]
    return found


def retention(x):
    """sum_{j <= i} (q_i . k_j) decay^(i - j) v_j, scaled; the state is the same without q."""
    k, decay = exactly(x["k"]), arb(float(x["decay"]))
    aged = [[decay ** (i - j) * arb(x["scale"]) if j <= i else arb(0) for j in range(T)] for i in range(T)]
    scores = [[[dot(exactly(q), k[j]) * aged[i][j] for j in range(T)] for i, q in enumerate(head)] for head in x["q"]]
    left = np.array([decay ** (T - 1 - j) for j in range(T)], object)[:, None] * exactly(x["v"])
    state = [[dot(k[:, a], left[:, y]) for y in range(V)] for a in range(K)]
    return {"out": weighed(scores, x["v"]), "state": np.array(state, object)}


def linear(x):
    """sum_j phi(q_i) . phi(k_j) v_j / (sum_j phi(q_i) . phi(k_j) + eps), phi = elu + 1."""

    def phi(y):
        return np.array([arb(float(a)) + 1 if a > 0 else arb(float(a)).exp() for a in y.ravel()], object).reshape(y.shape)

    q, k, v = phi(x["q"]), phi(x["k"]), exactly(x["v"])
    seen = [[j <= i or not x["causal"] for j in range(T)] for i in range(T)]
    scores = [[[dot(a, b) if seen[i][j] else arb(0) for j, b in enumerate(k)] for i, a in enumerate(head)] for head in q]
    divisor = np.array([[sum(row, arb(0)) + arb(1e-6) for row in head] for head in scores], object)[..., None]
    state = np.array([[dot(k[:, a], v[:, y]) for y in range(V)] for a in range(K)], object)
    return {"out": weighed(scores, x["v"]) / divisor, "state": state, "mass": np.array([sum(k[:, a], arb(0)) for a in range(K)], object)}


def mlstm(x):
    """Weights exp(sum of gates + input gate) without a stabiliser, over max(|their sum|, 1); the state relative to the largest exponent m."""
    forget, into = factor(x["gate"][:, None])[:, 0], factor(x["input_gate"])
    k, v = exactly(x["k"]) * arb(K**-0.5), exactly(x["v"])
    age = np.array([[faded(forget[:, None], j, t)[0] * into[j] if j <= t else arb(0) for j in range(T)] for t in range(T)], object)
    scores = np.array([[[dot(exactly(q), k[j]) * age[i, j] for j in range(T)] for i, q in enumerate(head)] for head in x["q"]], object)
    divisor = np.array([[abs(sum(row, arb(0))).max(1) for row in head] for head in scores], object)[..., None]
    largest = arb(0)
    for a in age[-1]:
        largest = largest.max(a)
    state = np.array([[dot(age[-1] * k[:, a], v[:, y]) / largest for y in range(V)] for a in range(K)], object)
    mass = np.array([dot(age[-1], k[:, a]) / largest for a in range(K)], object)
    return {"out": weighed(scores, x["v"]) / divisor, "state": state, "mass": mass, "max": np.array([largest.log()], object)[0]}


def rwkv6(x):
    """sum_{j < t} (q_t * k_j * what lies between) v_j + (q_t * bonus * k_t) v_t."""
    w, k, u = factor(x["gate"]), exactly(x["k"]), exactly(x["bonus"])
    aged = [[k[j] * (u if j == t else faded(w, j, t - 1)) if j <= t else 0 * k[j] for j in range(T)] for t in range(T)]
    scores = np.array([[[dot(exactly(q), aged[t][j]) for j in range(T)] for t, q in enumerate(head)] for head in x["q"]], object)
    left = [k[j] * faded(w, j, T - 1) for j in range(T)]
    state = np.array([[dot([row[a] for row in left], exactly(x["v"])[:, y]) for y in range(V)] for a in range(K)], object)
    return {"out": weighed(scores, x["v"]), "state": state}


EQUATIONS = {f.__name__: f for f in (gated_delta, kda, rwkv7, comba, retention, linear, mlstm, rwkv6)}
KINDS = ("random", "fading", "cancelling", "growing", "huge", "tiny", "whole")


def inputs(name, kind, rng):
    """Operands of one head of keys and two of queries, without those axes."""
    q, k, v = rng.standard_normal((GROUP, T, K)), rng.standard_normal((T, K)), rng.standard_normal((T, V))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    gate, beta, into = -rng.exponential(0.2, (T, K)), rng.uniform(0.0, 1.0, T), rng.standard_normal(T)
    decay, bonus = 0.9, rng.standard_normal(K)
    if kind == "fading":
        gate = -rng.exponential(1.0, (T, K)) * 10.0 ** rng.integers(0, 4, (T, K))
        gate[3], gate[5], decay = -np.inf, 0.0, 1e-200
    elif kind == "cancelling":  # what is written is erased, and what is left of large numbers is small
        k[1::2], beta = k[::2][: T // 2] * (1.0 + 2.0**-50), np.ones(T)
        v[1::2], gate, decay = -v[::2][: T // 2] * (1.0 + 2.0**-45), np.full((T, K), -(2.0**-60)), 1.0 - 2.0**-53
        v *= 1e15
        into = 20.0 * into
    elif kind == "growing":
        k, beta, gate, into, decay = 5.0 * k, 2.0 * beta, -0.1 * gate, 30.0 * into, 1.0
    elif kind == "huge":
        q, k, v, into = 1e10 * q, np.abs(k) * 1e6, 1e200 * v, 200.0 * into
    elif kind == "tiny":
        q, k, v, into = 1e-30 * q, 1e-40 * k, v * 10.0 ** rng.integers(-290, -200, v.shape), -200.0 + into
    elif kind == "whole":  # numbers of few bits, whose sums are ties of narrow formats
        q, k, v = (rng.integers(-3, 4, x.shape).astype(float) for x in (q, k, v))
        v, beta, gate, decay, bonus = v + 2.0**-8, rng.integers(0, 2, T) * 1.0, np.zeros((T, K)), 0.5, np.ones(K)
    given = {"q": q, "k": k, "v": v}
    if name not in ("retention", "linear"):
        given["gate"] = gate if name in ("kda", "rwkv6", "rwkv7") else gate[:, 0]
    removed = {"p": np.roll(k, 1, axis=1)}, {"kappa": np.roll(k, 1, axis=1), "a": rng.uniform(0.0, 1.0, (T, K))}
    extra = {"gated_delta": {"beta": beta}, "kda": {"beta": beta}, "comba": {"beta": beta, **removed[0]}, "rwkv7": removed[1]}
    extra |= {"retention": {"decay": decay}, "mlstm": {"input_gate": into}, "rwkv6": {"bonus": bonus}}
    return given | extra.get(name, {})


def certified(name, x, returns, **keywords):
    """With the axes of batches and heads, and without them again."""
    x = {key: np.asarray(y)[None] if key in ("q", "decay", "bonus") else np.asarray(y)[None, None] for key, y in x.items()}
    found = ra.certify(name, **x, returns=returns, **keywords)
    found = found if isinstance(found, tuple) else (found,)
    return {
        key: results.Certified(*(part[0] if key == "out" else part[0, 0] for part in (y.value, y.bound, y.tier, y.rounded)))
        for key, y in zip(returns, found, strict=True)
    }


def holds(found, at, ball):
    value, bound = found.value[at], found.bound[at]
    assert found.rounded[at], (at, value, found.tier[at], ball)
    verdict = is_nearest(value, ball)
    assert even(value) if verdict is None else verdict, (at, value, ball)  # a tie where so many bits do not tell
    if math.isfinite(bound):
        assert not bool(abs(ball - arb(float(value))) > arb(float(bound))), (at, value, bound, ball)


PARAMS = {"retention": {"scale": 0.7}, "linear": {"causal": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_values_are_the_exact_numbers_rounded_once(name, kind):
    rng = np.random.default_rng([3, KINDS.index(kind), *name.encode()])
    x, params = inputs(name, kind, rng), PARAMS.get(name, {})
    with flint.ctx.workprec(BITS):
        expected = EQUATIONS[name](x | params)
        for dtype in DTYPES:
            found = certified(name, x, tuple(expected), dtype=dtype, **params)
            for output, exact in expected.items():
                for at in np.ndindex(np.shape(exact)):
                    holds(found[output], at, exact[at] if np.shape(exact) else exact)


def test_every_query_may_see_every_key():
    x = inputs("linear", "random", np.random.default_rng(1))
    with flint.ctx.workprec(BITS):
        expected = linear(x | {"causal": False})
        found = certified("linear", x, ("out", "state", "mass"), causal=False)
        for output, exact in expected.items():
            for at in np.ndindex(exact.shape):
                holds(found[output], at, exact[at])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_enclosures_hold_before_anything_is_rounded(name, kind, monkeypatch):
    """What two float64 hand on, number and bound; tight where nothing grows."""
    handed = []

    def spy(self, at, known, tier):
        handed.append(known)
        original(self, at, known, tier)

    original = results.Draft.write
    monkeypatch.setattr(results.Draft, "write", spy)
    x, params = inputs(name, kind, np.random.default_rng([4, KINDS.index(kind)])), PARAMS.get(name, {})
    certified(name, x, ("state", "out"), **params)
    with flint.ctx.workprec(BITS):
        expected = EQUATIONS[name](x | params)
        smallest = math.inf
        for known in handed:
            output = "out" if known[0].shape == (GROUP, T, V) else "state"
            high, low, bound = (y.reshape(expected[output].shape) for y in known)
            for at in np.ndindex(high.shape):
                if np.isfinite(bound[at]):
                    error = abs(expected[output][at] - arb(float(high[at])) - arb(float(low[at])))
                    assert not bool(error > arb(float(bound[at]))), (output, at)
                    smallest = min(smallest, float(bound[at]) / max(abs(float(high[at])), 1e-300))
    assert smallest < (2.0**-80 if kind == "random" else math.inf) or kind in ("huge", "tiny")


def test_bounds_do_not_grow_where_the_state_does_not():
    """The delta rule with keys of length one moves no error apart: long sequences need no balls."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 2000, 8)) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    out, state = ra.certify("delta", q, k, v, beta=rng.uniform(0, 1, (1, 2, 2000)), returns=("out", "state"))
    assert (out.tier == 1).mean() > 0.999 and out.rounded.all() and state.rounded.all()


def by_hand(q, key, value, erase, decay, initial, old, exclusive):
    """The recurrence in float64: what is read, [G, T, V], and the state."""
    state, out = initial.copy(), np.zeros((*q.shape[:2], initial.shape[1]))
    for t in range(len(key)):
        if exclusive:
            out[:, t] = q[:, t] @ state
        before = state
        state = decay[t][:, None] * state
        for w in range(key.shape[1]):
            held = erase[t, w] @ (before if old[w] else state)
            state = state + np.outer(key[t, w], value[t, w] - held)
        if not exclusive:
            out[:, t] = q[:, t] @ state
    return out, state


PARTS = ("q", "key", "value", "erase", "decay", "initial")


@pytest.mark.parametrize("moved", [(part,) for part in PARTS] + [PARTS], ids="-".join)
@pytest.mark.parametrize(
    "old, exclusive", [((False,), False), ((True,), True), ((True, False), False), ((False, True), False), ((False, False), True)]
)
def test_bounds_hold_for_whatever_operands_lie_within_theirs(moved, old, exclusive):
    """Operands anywhere within wide bounds, beside which no rounding counts: results lie within the bounds that come of them."""
    rng, n, writes = np.random.default_rng([9, *map(ord, moved[0])]), 12, len(old)
    sizes = {"q": (GROUP, n, K), "key": (n, writes, K), "value": (n, writes, V), "erase": (n, writes, K), "decay": (n, K), "initial": (K, V)}
    middle = {part: rng.standard_normal(size) for part, size in sizes.items()} | {"decay": rng.uniform(0.2, 1.0, (n, K))}
    radius = {part: 1e-7 * rng.exponential(1.0, x.shape) * (part in moved) for part, x in middle.items()}
    asked = types.SimpleNamespace(
        group=GROUP, n_reads=n, n_values=V, after=np.arange(n), old=np.array(old), rule=types.SimpleNamespace(exclusive=exclusive)
    )
    enclosed = {part: (x, np.zeros(x.shape), radius[part]) for part, x in middle.items()}
    queries = enclosed.pop("q")
    found = recurrent._run(asked, Head(**enclosed, past=None, own=None, floor=None, tops=None), queries)
    worst = 0.0
    for _ in range(40):
        # ends of the bounds, which is where the furthest results are
        x = {part: y + radius[part] * rng.choice([-1.0, 1.0], y.shape) for part, y in middle.items()}
        for exact, (high, _, bound) in zip(by_hand(**x, old=old, exclusive=exclusive), found, strict=True):
            slack = 1e-12 * np.abs(high).max()  # of the float64 here; bounds are larger by far
            assert (np.abs(exact - high) <= bound + slack).all()
            worst = max(worst, (np.abs(exact - high) / (bound + slack)).max())
    assert worst > 1e-4  # bounds are of the size of what they bound


def test_norms_are_bounded_from_above_and_closely():
    rng = np.random.default_rng(8)
    for _ in range(300):
        n = int(rng.integers(2, 20))
        e = rng.standard_normal(n) * 10.0 ** rng.integers(-2, 3)
        b = rng.uniform(-1.0, 2.0, n) * e * 10.0 ** rng.integers(-4, 2)
        d = np.exp(-rng.uniform(0.0, 0.6, n) * 10.0 ** rng.integers(-3, 4))
        for found, faded in (
            (states._of_rank_one(b, e), np.ones(n)),
            (states._of_faded(d, b, e, d.max() + states.length(b) * states.length(e)), d),
        ):
            exact = np.linalg.norm(np.diag(faded) - np.outer(b, e), 2)
            # LAPACK rounds, too; a bisection ends, and begins at the largest factor
            assert exact * (1.0 - n * 2.0**-50) <= found <= max(exact, faded.max()) * (1.0 + 1e-4)


def test_bounds_grow_where_errors_do():
    """Keys of length two erase more than there is: what was rounded grows threefold at each token, on the way to tokens that erase it again."""
    rng = np.random.default_rng(5)
    n = 40
    q, k, v, beta = rng.standard_normal((GROUP, n, K)), rng.standard_normal((n, K)), rng.standard_normal((n, V)), np.ones(n)
    k *= 2.0 / np.linalg.norm(k, axis=1, keepdims=True)
    x = {"q": q, "k": k, "v": v, "gate": np.full(n, -0.1), "beta": beta}
    tokens = Tokens(bind(catalog.variant("gated_delta"), (), {name: y[None] if name == "q" else y[None, None] for name, y in x.items()}))
    high, low, bound = recurrent._in_two(tokens, 0, 0)["out"]
    with flint.ctx.workprec(BITS):
        expected = delta_rule(q, k, v, np.repeat(x["gate"][:, None], K, axis=1), beta, K**-0.5)["out"]
        errors = np.frompyfunc(lambda ball: float(abs(ball)), 1, 1)(expected - exactly(high) - exactly(low)).astype(float)
    assert (errors <= bound).all()
    assert errors[:, -1].max() > 1e3 * bound[:, 0].max()  # it would not do to add what each token rounds


# ---- the whole catalogue -----------------------------------------------------------------------------------------------------------

CALLS = [
    pytest.param(name, params, id="-".join([name, *(f"{p}={value}" for p, value in params.items())]))
    for name, v in catalog.catalogue().items()
    if v.recurrence is not None
    for params in tried(v)
]


def without_balls(v, dims, params):
    """Names of the maps of its recurrence that have no version in balls."""
    rule = v.recurrence(dims, {p.name: p.default for p in v.params} | params)
    products = [rule.query, rule.log_decay, rule.bonus, rule.skip, rule.input_gate, *(p for w in rule.writes for p in (w.key, w.value, w.erase))]
    pieces = [f.map for product in products for f in product if isinstance(f, Factor)]
    return [piece.__name__.rpartition(".")[2] for piece in pieces if not maps.has(piece)]


@pytest.mark.parametrize("dims", [GENERAL, SQUARE], ids=["general", "square"])
@pytest.mark.parametrize("name, params", CALLS)
def test_every_recurrence_is_certified_as_it_is_defined(name, params, dims):
    v = catalog.variant(name)
    x, names = draw(v, dims, seed=5), tuple(o.name for o in v.outputs)

    def defined(operands):
        return ra.attend(name, **operands, **params, returns=names, backend="definition")

    found = ra.certify(name, **x, **params, returns=names)
    found, expected = (y if isinstance(y, tuple) else (y,) for y in (found, defined(x)))
    for one, other, slack in zip(found, expected, rounding(defined, x, v, flops(v, x, params)), strict=True):
        assert one.rounded[np.isfinite(other)].all()
        distance = np.abs(one.value - other, where=one.value != other, out=np.zeros(other.shape))
        assert (distance <= slack + one.bound)[np.isfinite(other)].all()


@pytest.mark.parametrize("name", [name for name, v in catalog.catalogue().items() if v.recurrence is not None])
def test_balls_alone_say_the_same(name, monkeypatch):
    v = catalog.variant(name)
    if without_balls(v, SQUARE, {}):
        return
    x, names = draw(v, SQUARE, seed=6), tuple(o.name for o in v.outputs)
    one = ra.certify(name, **x, returns=names)
    monkeypatch.setattr(recurrent, "_in_two", lambda *call: {})
    other = ra.certify(name, **x, returns=names)
    for two, ball in zip(one, other, strict=True):
        assert (ball.tier == 2).all() and two.rounded.all()
        np.testing.assert_array_equal(two.value, ball.value)


# ---- what no variant of the catalogue states as data ---------------------------------------------------------------------------------


def planted(name, rule, x, **params):
    """A variant certified under another recurrence; outputs by name."""
    v = dataclasses.replace(catalog.variant(name), recurrence=lambda dims, params: rule)
    bound = bind(v, (), {**x, **params}, [o.name for o in v.outputs])
    return recurrent.certify(dataclasses.replace(bound, dtype=np.dtype(np.float64)))


@pytest.mark.parametrize("drop", [(), ("initial_state", "initial_mass", "initial_max")])
@pytest.mark.parametrize("stretch", [1.0, 300.0])
def test_an_exclusive_read_with_an_input_gate(stretch, drop):
    """RWKV-4, whose keys are logarithms, against its definition."""
    rule = Recurrence(
        writes=(Write(key=(), value=("v",)),), query=(), log_decay=("gate",), exclusive=True, bonus=(Factor("bonus", exp),), heads="M",
        input_gate=("k",), normalizer="sum",
    )  # fmt: skip
    x = {name: y for name, y in draw(catalog.variant("rwkv4"), SQUARE, seed=1).items() if name not in drop}
    x["k"] = x["k"] * stretch
    found = planted("rwkv4", rule, x)
    for name, expected in zip(found, ra.attend("rwkv4", **x, returns=tuple(found), backend="definition"), strict=True):
        assert found[name].rounded.all()
        np.testing.assert_allclose(found[name].value, expected, rtol=1e-13 * max(1.0, stretch), atol=0)  # exponents lose digits of their own size


def test_a_clamped_divisor():
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((1, 2, T, K)), rng.standard_normal((1, 1, T, K)), rng.standard_normal((1, 1, T, V))
    rule = Recurrence(writes=(Write(key=("k",), value=("v",)),), normalizer="clamp", eps=0.5, scale=0.3)
    found = planted("linear", rule, {"q": q, "k": k, "v": v})["out"]
    scores = np.tril(q @ np.swapaxes(k, -1, -2))
    expected = 0.3 * scores @ v / np.maximum(scores.sum(-1, keepdims=True), 0.5)
    assert found.rounded.all()
    np.testing.assert_allclose(found.value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["product", "total", "quotient", "exponential", "summed"])
def test_enclosures_of_numbers_anywhere_within_theirs(name):
    rng = np.random.default_rng([6, *name.encode()])

    def numbers(scale):
        high = rng.standard_normal(200) * 10.0 ** rng.integers(-scale, scale, 200)
        off = np.abs(high) * 10.0 ** rng.integers(-34, -6, 200) * (rng.random(200) < 0.7)
        return high, np.spacing(high) * rng.uniform(-0.49, 0.49, 200), off

    def within(x):
        high, low, off = (exactly(part) for part in x)
        return high + low + off * exactly(rng.choice([-1.0, 1.0], high.shape))

    x, y = numbers(160), numbers(160)
    with flint.ctx.workprec(BITS):
        if name == "exponential":
            x = tuple(np.abs(part) for part in numbers(2))
            x = (-x[0], -x[1], np.minimum(x[2], 1e-7))
            found, exact = enclosures.exponential(x), np.frompyfunc(lambda one: one.exp(), 1, 1)(within(x))
        elif name == "summed":
            x = tuple(part.reshape(20, 10) for part in x)
            found, exact = enclosures.summed(x), np.sum(within(x), axis=1)
        else:
            operation = {"product": lambda a, b: a * b, "total": lambda a, b: a + b, "quotient": lambda a, b: a / b}[name]
            found, exact = getattr(enclosures, name)(x, y), operation(within(x), within(y))
        known = 0
        for high, low, bound, ball in zip(*found, exact, strict=True):
            if np.isfinite(bound):
                known += 1
                assert not bool(abs(ball - arb(float(high)) - arb(float(low))) > arb(float(bound)))
    assert known > 0.9 * len(exact)


# ---- forms of a call ---------------------------------------------------------------------------------------------------------------


def call(rng, n=6, heads=4, kv_heads=2):
    q, k, v = (rng.standard_normal((2, h, n, 3)) for h in (heads, kv_heads, kv_heads))
    return {"q": q, "k": k, "v": v, "gate": -rng.exponential(1.0, (2, kv_heads, n)), "beta": rng.uniform(0.0, 1.0, (2, kv_heads, n))}


def test_layouts():
    x = call(np.random.default_rng(0))
    one = ra.certify("gated_delta", **x)
    other = ra.certify("gated_delta", **{name: np.swapaxes(y, 1, 2) for name, y in x.items()}, layout="BTHD")
    np.testing.assert_array_equal(one.value, np.swapaxes(other.value, 1, 2))


def test_a_sequence_is_carried_on_from_a_state_that_is_exact():
    """Whole numbers: a state of float64 is the exact one, so that the second part is the same number, tie or not."""
    rng = np.random.default_rng(2)
    x = {name: rng.integers(-2, 3, y.shape).astype(float) for name, y in call(rng).items() if name != "gate"}
    whole, state = ra.certify("delta", **x, returns=("out", "state"), dtype="bfloat16")
    _, first = ra.certify("delta", **{name: y[:, :, :3] for name, y in x.items()}, returns=("out", "state"))
    assert first.rounded.all()
    second, last = ra.certify(
        "delta", **{name: y[:, :, 3:] for name, y in x.items()}, initial_state=first.value, returns=("out", "state"), dtype="bfloat16"
    )
    np.testing.assert_array_equal(whole.value[:, :, 3:], second.value)
    np.testing.assert_array_equal(state.value, last.value)
    assert whole.rounded.all() and second.rounded.all()


def test_a_factor_below_the_range_of_exp_is_not_nothing():
    q = np.ones((1, 1, 2, 1))
    k, v = np.array([1.0, 0.0]).reshape(1, 1, 2, 1), np.array([1e300, 0.0]).reshape(1, 1, 2, 1)
    found = ra.certify("simple_gla", q, k, v, gate=np.array([[[0.0, -705.0]]]), scale=1.0, dtype="bfloat16")
    with flint.ctx.workprec(BITS):
        holds(found, (0, 0, 1, 0), arb(-705).exp() * arb(1e300))


@pytest.mark.parametrize("only_balls", [False, True])
def test_what_is_not_finite_spoils_what_reads_it_and_nothing_else(only_balls, monkeypatch):
    if only_balls:
        monkeypatch.setattr(recurrent, "_in_two", lambda *call: {})
    x = call(np.random.default_rng(0))
    x["q"][0, 0, 1, 0], x["v"][0, 0, 2, 1], x["k"][1, 1, 4, 0], x["gate"][1, 0, 3] = np.nan, np.inf, np.nan, -np.inf
    found = ra.certify("gated_delta", **x)
    spoilt = np.zeros((2, 4, 6, 3), bool)
    spoilt[0, 0, 1] = spoilt[0, :2, 2:, 1] = spoilt[1, 2:, 4:] = True
    np.testing.assert_array_equal(np.isnan(found.value), spoilt)
    np.testing.assert_array_equal(found.rounded, ~spoilt)
    np.testing.assert_array_equal(np.isinf(found.bound), spoilt)


@pytest.mark.parametrize("changed", [{"n": 0}, {"n": 1}, {"n": 3, "heads": 2}])
def test_sizes_at_the_edges(changed):
    x = call(np.random.default_rng(0), **changed)
    out, state = ra.certify("gated_delta", **x, returns=("out", "state"))
    assert out.rounded.all() and state.rounded.all() and out.value.shape == x["q"].shape
    for name in ("linear", "performer"):
        w = {"w": np.ones((5, 3))} if name == "performer" else {}
        assert ra.certify(name, x["q"], x["k"], x["v"], **w).value.shape == x["q"].shape


def test_without_python_flint_maps_are_refused_and_the_rest_is_enclosed(monkeypatch):
    monkeypatch.setattr(balls, "available", lambda: False)
    x = call(np.random.default_rng(0))
    assert ra.certify("gated_delta", **x).rounded.all()
    with pytest.raises(ra.ParameterError, match="linear: cannot be certified: its maps need python-flint"):
        ra.certify("linear", x["q"], x["k"], x["v"])
    x["k"][..., 1], x["q"][..., :2], x["q"][..., 2] = x["k"][..., 0], (1.0, -1.0), 0.0  # all cancels
    found = ra.certify("gated_delta", **x)
    assert not found.rounded.any() and (found.bound < 1e-25).all()


def test_gradients_are_refused_by_name():
    x = call(np.random.default_rng(0))
    with pytest.raises(ra.ParameterError, match="gated_delta: cannot be certified: gradients"):
        ra.certify("gated_delta", **x, d_out=x["q"])
