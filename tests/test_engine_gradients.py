"""Gradients of the CPU kernels: against automatic differentiation, numerical differentiation of definitions, and themselves, to the bit."""

import functools

import ml_dtypes
import numpy as np
import pytest
from compositions import capped, compositions, cumulative, hides, near, numbers, squeezed, squeezed_slope
from hypothesis import HealthCheck, given, settings

import refattn as ra
from refattn import catalog, definition, derivatives, entrywise
from refattn.engine import threads
from refattn.engine.run import format_of, gradients
from refattn.problem import bind, part_of, split
from refattn.spec import shape

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
SOFTMAX = catalog.variant("softmax")
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
#: Roundings of an exp or tanh within four units in the last place, and of the operations around it.
OF_FUNCTIONS = 16


def of_each(call, cotangents, found_of):
    """What `found_of(dense problem, cotangents)` finds by ``d_<operand>``, of packed sequences put together where each lies."""
    if call.sequences is None:
        return found_of(call, cotangents)
    total = {"d_" + o.name: np.zeros(call.given[o.name].shape) for o in call.variant.operands if o.name in call.given and o.kind == "real"}
    for n, alone in enumerate(split(call)):
        for name, x in found_of(alone, {output: y[part_of(call, n, output)] for output, y in cotangents.items()}).items():
            total[name][part_of(call, n, name)] += x
    return total


def summed_to(x, target):
    """The sum over axes along which an operand of that shape was broadcast."""
    padded = (1,) * (x.ndim - len(target)) + target
    return x.sum(axis=tuple(n for n, size in enumerate(padded) if size != x.shape[n]), keepdims=True).reshape(target)


# ---- how far correct gradients may be off ------------------------------------------------------------------------------------------


def bounds(call, cotangents):
    """The most by which gradients that are computed in the kernel's format may be off, by ``d_<operand>``; of a dense call.

    Every rounding at its limit and of the worst sign, to first order in the unit roundoff u, from the definition's own float64 numbers.  A sum of
    n products is off by n u times the sum of their magnitudes, and by what its terms are off.  Beside that, with E for "off by":

        E_s      by what q . k is, through the soft-cap, whose slope is at most 1, and through score_mod, evaluated at both ends
        E_p, E_g of weights and their slopes (weights.py): relative for exponentials; where there is a kink, whatever an s within E_s gives
        E_delta  by what the mean of values under g is
        E_ds     E_g |d_p - delta| + (g + E_g) (E_dp + E_delta)
        E_dx     E_ds |slope| + |d_s| E_slope

    A truth that was computed in the same format is off by as much.
    """
    u, tiny = np.finfo(format_of(call)).eps / 2, np.finfo(format_of(call)).tiny
    x, plan, functions = call.operands, call.plan, call.functions
    own = 2 if format_of(call) == np.float64 else 1
    group = x["q"].shape[1] // x["k"].shape[1]
    q, k, v = x["q"], np.repeat(x["k"], group, 1), np.repeat(x["v"], group, 1)
    n_q, n_k, width = q.shape[2], k.shape[2], q.shape[3]
    truth = definition.run(call)
    seen, p = np.isfinite(truth["scores"]), truth["weights"]
    s, bias = (np.where(seen, y, 0.0) for y in (truth["scores"], x["bias"]))
    modified = functions is not None and functions.score_mod is not None

    # scores
    raw = np.where(seen, definition.raw_scores(call)[0], 0.0) if modified else s - bias
    e = u * (width + 4) * abs(plan.scale) * (np.abs(q) @ np.abs(k).swapaxes(2, 3))
    slope, e_slope = np.ones_like(s), np.zeros_like(s)
    if plan.score_mods:
        cap = plan.score_mods[0].numbers[0]
        slope = 1 - (raw / cap) ** 2
        e += OF_FUNCTIONS * u * np.abs(raw)
        e_slope = 2 * np.abs(raw) * e / cap**2 + OF_FUNCTIONS * u
    if modified:

        def ends(function, aux):
            middle, low, high = (entrywise.scores(function, aux, raw + sign * e, seen, functions.first) for sign in (0, -1, 1))
            with np.errstate(invalid="ignore"):  # hidden by the function: -inf, whatever the score
                moved = np.nan_to_num(np.maximum(np.abs(low - middle), np.abs(high - middle)))
            return np.where(np.isfinite(middle), middle, 0.0), moved

        of_slope, e_of_slope = ends(functions.slope, functions.slope_aux)
        e_of_slope += OF_FUNCTIONS * u * (1 + np.abs(of_slope))
        slope, e_slope = slope * of_slope, e_slope * np.abs(of_slope) + (np.abs(slope) + e_slope) * e_of_slope
        at, e_at = ends(functions.score_mod, functions.score_aux)
        e = e_at + OF_FUNCTIONS * u * np.maximum(np.maximum(np.abs(raw), np.abs(at)), np.abs(at - raw))
    e = np.where(seen, e + 2 * u * (np.abs(s) + np.abs(bias)), 0.0)

    # weights p, their slopes g, and the mean of values under g
    exact, e_row = np.zeros(s.shape[:3]), np.zeros(s.shape[:3])
    total = least = np.ones(s.shape[:3])
    if plan.normalizer == "softmax":
        exact = np.where(np.isfinite(truth["lse"]), truth["lse"], 0.0)
        largest = np.abs(s).max(axis=3, initial=0.0)
        e_row = (p * e).sum(3) + u * (n_k + OF_FUNCTIONS * (1 + largest + np.abs(exact)))
        g, e_g = p, p * np.expm1(np.minimum(e + e_row[..., None] + OF_FUNCTIONS * u * (1 + np.abs(s) + np.abs(exact)[..., None]), 300))
        e_g = e_p = np.where(seen, e_g + tiny, 0.0)  # what is less may be 0
    elif plan.normalizer == "sigmoid":
        relative = np.expm1(np.minimum(e + OF_FUNCTIONS * u * (1 + np.abs(s) + abs(plan.shift)), 300))
        g = np.where(seen, p / (1 + np.exp(np.minimum(s, 700))), 0.0)  # 1 - p, where p is nearly 1
        e_g, e_p = (np.where(seen, np.minimum(y * relative + tiny, 1), 0.0) for y in (g, p))
    elif plan.normalizer == "relu":
        r, n = plan.power, plan.divisor
        slopes, weights = (lambda z: np.where(z > 0, r * np.maximum(z, 0) ** (r - 1), 0) / n), (lambda z: np.maximum(z, 0) ** r / n)
        g = np.where(seen, slopes(s), 0.0)
        e_g, e_p = (np.where(seen, np.maximum(f(s + e) - f(s), f(s) - f(s - e)) + OF_FUNCTIONS * u * f(s + e), 0.0) for f in (slopes, weights))
        e_g = np.where(seen & (np.abs(s) <= e), slopes(s + e), e_g)
    else:
        r = {"sparsemax": 1, "entmax15": 2}[plan.normalizer]
        exact = np.where(np.isfinite(truth["threshold"]), truth["threshold"], 0.0)
        z, e = np.where(seen, s / r - exact[..., None], -1.0), e / r
        near_it = z + e + e.max(axis=3, keepdims=True, initial=0.0) > 0
        largest = np.where(near_it, np.abs(s), 0.0).max(axis=3, initial=0.0)
        e_row = np.where(near_it, e, 0.0).max(axis=3, initial=0.0) + u * (near_it.sum(3) + OF_FUNCTIONS) * (1 + np.abs(exact) + largest)
        e = np.where(seen, e + e_row[..., None] + 2 * u * np.abs(z), 0.0)
        above = np.where(seen & (z + e > 0), e, 0.0)
        g, e_g = (1.0 * (z > 0), 1.0 * (seen & (np.abs(z) <= e))) if r == 1 else (np.maximum(z, 0), above)
        e_p = above if r == 1 else (2 * np.maximum(z, 0) + above) * above
        total, least = g.sum(3), np.maximum(g.sum(3) - e_g.sum(3), 0.5)  # both are at least 1, because no weight is above 1

    # backwards
    d_out = np.asarray(cotangents.get("out", np.zeros((*s.shape[:3], v.shape[3]))), np.float64)
    d_lse = np.asarray(cotangents.get("lse", np.zeros(s.shape[:3])), np.float64)
    d_p, size = d_out @ v.swapaxes(2, 3), np.abs(d_out) @ np.abs(v).swapaxes(2, 3)
    e_dp = u * (v.shape[3] + 3) * size
    delta = e_delta = np.zeros(s.shape[:3])
    if plan.normalizer not in ("sigmoid", "relu"):
        mean = g @ v / np.maximum(total, 1)[..., None]
        e_mean = e_g @ np.abs(v) + e_g.sum(3, keepdims=True) * np.abs(mean)
        e_mean += u * (n_k + OF_FUNCTIONS) * ((g + e_g) @ np.abs(v) + total[..., None] * np.abs(mean))
        delta = (d_out * mean).sum(3) - d_lse
        e_delta = (np.abs(d_out) * e_mean).sum(3) / least
        e_delta += u * (v.shape[3] + 4) * ((np.abs(d_out) * np.abs(mean)).sum(3) + np.abs(d_lse))
    difference = np.where(g + e_g > 0, d_p - delta[..., None], 0.0)
    d_s = g * difference
    e_ds = e_g * np.abs(difference) + (g + e_g) * (e_dp + e_delta[..., None] + 3 * u * (np.abs(d_p) + np.abs(delta)[..., None]))
    d_x = d_s * slope
    e_dx = e_ds * (np.abs(slope) + e_slope) + np.abs(d_s) * e_slope + 3 * u * np.abs(d_x)

    def off(left, e_left, right, terms):  # a sum of products; MOST_PARTS of it are added at the end
        return e_left @ np.abs(right) + u * (terms + 12) * (np.abs(left) + e_left) @ np.abs(right)

    def by_kv_head(y):
        return y.reshape(y.shape[0], y.shape[1] // group, group, *y.shape[2:]).sum(2)

    def turned(y):
        return y.swapaxes(2, 3)

    found = {
        "d_q": abs(plan.scale) * off(d_x, e_dx, k, n_k),
        "d_k": abs(plan.scale) * by_kv_head(off(turned(d_x), turned(e_dx), q, n_q * group)),
        "d_v": by_kv_head(off(turned(p), turned(e_p), d_out, n_q * group)),
    }
    if "bias" in call.given:
        target = call.given["bias"].shape
        found["d_bias"] = summed_to(e_ds, target) + u * (d_s.size / max(np.prod(target), 1)) * summed_to(np.abs(d_s) + e_ds, target)
    if "sinks" in call.given:
        sinks = x["sinks"][:, None]
        share = np.where(np.isfinite(truth["lse"]), np.exp(np.where(np.isfinite(sinks), sinks, -np.inf) - exact), 0.0)
        e_share = share * np.expm1(e_row + OF_FUNCTIONS * u * (1 + np.abs(np.where(share > 0, sinks, 0.0)) + np.abs(exact)))
        e_sinks = e_share * np.abs(delta) + (share + e_share) * (e_delta + 3 * u * np.abs(delta))
        found["d_sinks"] = e_sinks.sum((0, 2)) + u * d_s.shape[0] * n_q * (share * np.abs(delta)).sum((0, 2))
    return {name: own * (y + tiny) for name, y in found.items()}


def assert_near(call, cotangents, truth, errors=None):
    """Gradients of one thread lie within the bounds of the truth, which may have errors of its own; the worst of them as a part of its bound."""
    found, allowed, worst = gradients(call, cotangents, 1), of_each(call, cotangents, bounds), 0.0
    assert found.keys() == truth.keys()
    for name, x in found.items():
        assert x.shape == truth[name].shape, name
        most = allowed[name] + (0.0 if errors is None else errors[name])
        off = np.abs(x - truth[name])
        part = np.divide(off, most, out=np.zeros(x.shape), where=most > 0)
        assert (off <= most).all(), f"{name} at {np.unravel_index(np.nanargmax(part), x.shape)}: off by {np.nanmax(part):g} times what it may be"
        worst = max(worst, part.max(initial=0.0))
    return worst


def cotangents_of(call, seed=0, lse=True):
    """Random ones of the output, and of lse where there is one; of few of the caller's formats."""
    rng = np.random.default_rng(seed)
    found = {"out": numbers(rng, shape("B Hq T E", call.dims), rng.choice([np.dtype(np.float64), call.dtype]))}
    if lse and call.variant.name == "softmax":
        found["lse"] = rng.standard_normal(shape("B Hq T", call.dims))
    return found


# ---- random calls ---------------------------------------------------------------------------------------------------------------

DENSE_OR_PACKED = ("BHTD", "BTHD", "packed")
RANDOM = functools.partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


@RANDOM(max_examples=25)
@given(compositions(DENSE_OR_PACKED, formats=(np.dtype(np.float64),), most=4, widest=3, gradients=True))
def test_gradients_of_random_compositions_are_those_of_the_definition(call):
    cotangents = cotangents_of(call)
    found = derivatives.gradients(call, cotangents)
    assert_near(call, cotangents, found.values, found.errors)


@pytest.mark.peer
@RANDOM(max_examples=200)
@given(compositions(DENSE_OR_PACKED, gradients=True))
def test_gradients_of_random_compositions_are_those_of_torch_autograd(call):
    cotangents = cotangents_of(call)
    assert_near(call, cotangents, of_each(call, cotangents, by_torch))


@RANDOM(max_examples=100)
@given(compositions(DENSE_OR_PACKED, gradients=True))
def test_any_number_of_threads_gives_gradients_of_the_same_bits(call):
    cotangents = cotangents_of(call)
    alone = gradients(call, cotangents, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "PARALLEL_FROM", 0)
        for n_threads in (2, 3):
            for name, x in gradients(call, cotangents, n_threads).items():
                same(x, alone[name], name)


def by_torch(call, cotangents):
    """Gradients of the composition as one writes it on a blackboard, float64, by automatic differentiation; of a dense call."""
    import torch

    x = {name: torch.tensor(y.astype(np.float64), requires_grad=True) for name, y in call.given.items() if name != "mask"}
    functions, params, name = call.functions, call.params, call.variant.name
    group = call.dims["Hq"] // call.dims["Hkv"]
    q, k, v = x["q"], x["k"].repeat_interleave(group, dim=1), x["v"].repeat_interleave(group, dim=1)
    n_q, n_k = q.shape[2], k.shape[2]
    places = list(np.ogrid[tuple(map(slice, (*q.shape[:3], n_k)))])
    places[0] = places[0] + (functions.first if functions else 0)
    *_, i, j = places
    scale = params["scale"]
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if params.get("softcap") is not None:
        scores = params["softcap"] * torch.tanh(scores / params["softcap"])
    if functions is not None and functions.score_mod is not None:
        theirs = {capped: lambda s, *_: 3 * torch.tanh(s / 3), hides: lambda s, b, h, i, j: torch.where((i + 2 * j) % 5 == 0, -torch.inf, s)}
        arrays = (torch.from_numpy(y) for y in functions.score_aux)
        scores = theirs.get(functions.score_mod, functions.score_mod)(scores, *map(torch.from_numpy, places), *arrays)
    scores = scores + x["bias"] if "bias" in x else scores
    seen = np.broadcast_to(call.given.get("mask", True), (*q.shape[:3], n_k))
    own = i if params["causal"] == "top_left" else i + n_k - n_q
    seen = seen & (j <= own) if params["causal"] else seen
    left, right = params.get("window") or (None, None)
    seen = seen & (True if left is None else j >= own - left) & (True if right is None else j <= own + right)
    if functions is not None and functions.mask_mod is not None:
        seen = seen & functions.mask_mod(*places, *functions.mask_aux)
    seen = torch.from_numpy(np.array(seen)) & torch.isfinite(scores)
    scores = torch.where(seen, scores, 0.0)
    lse = None
    if name == "softmax":
        sinks = x["sinks"][:, None, None] if "sinks" in x else torch.full((1, 1, 1), -torch.inf, dtype=torch.float64)
        every = torch.cat([torch.where(seen, scores, -torch.inf), sinks.expand(*q.shape[:3], 1)], -1)
        some = torch.isfinite(every).any(-1)
        lse = torch.logsumexp(torch.where(some[..., None], every, 0.0), -1)
        weights = torch.where(seen, torch.exp(scores - lse[..., None]), 0.0)
        lse = torch.where(some, lse, 0.0)
    elif name == "sigmoid":
        shift = -np.log(max(n_k, 1)) if params["shift"] is None else params["shift"]
        weights = torch.where(seen, torch.exp(torch.nn.functional.logsigmoid(scores + shift)), 0.0)  # its own slope is p (1 - p), which cancels
    elif name == "relu":
        weights = torch.where(seen, torch.relu(scores) ** params["power"] / (params["divisor"] or max(n_k, 1)), 0.0)
    else:
        weights = sparse_by_torch(torch, torch.where(seen, scores, -torch.inf), seen, name) if n_k else scores
    d_out = torch.from_numpy(np.asarray(cotangents["out"], np.float64))
    value = (weights @ v * d_out).sum() + (0.0 if "lse" not in cotangents else (lse * torch.from_numpy(cotangents["lse"])).sum())
    found = torch.autograd.grad(value, list(x.values()), allow_unused=True, materialize_grads=True)
    return {"d_" + name: y.numpy() for name, y in zip(x, found, strict=True)}


def sparse_by_torch(torch, scores, seen, name):
    """Sparsemax or 1.5-entmax: the support from sorted scores, then the threshold in closed form, which is differentiated."""
    power = {"sparsemax": 1, "entmax15": 2}[name]
    z = scores / power
    falling = z.detach().sort(-1, descending=True).values
    falling = torch.where(torch.isfinite(falling), falling, -1e9)
    n = torch.arange(1, z.shape[-1] + 1)

    def threshold(total, squares, n):
        if power == 1:
            return (total - 1) / n
        return total / n - torch.sqrt(torch.clamp((1 - (squares - total**2 / n)) / n, min=0.0))

    top = falling[..., :1]
    shifted = torch.clamp(falling - top, min=-4.0)  # what is 4 below the largest is in no support
    taus = threshold(shifted.cumsum(-1), (shifted**2).cumsum(-1), n)
    least = torch.gather(shifted, -1, (shifted >= taus).sum(-1, keepdim=True) - 1)
    support = seen & (z.detach() - top >= least)
    inside = torch.where(support, z - top, 0.0)
    count = torch.clamp(support.sum(-1, keepdim=True), min=1)
    tau = threshold(inside.sum(-1, keepdim=True), (inside**2).sum(-1, keepdim=True), count)
    return torch.where(support, torch.clamp(inside - tau, min=0.0) ** power, 0.0)


# ---- d_bias ---------------------------------------------------------------------------------------------------------------------

#: Which of the axes B, Hq, T, S a bias has.
PATTERNS = [(b, h, i, j) for b in (0, 1) for h in (0, 1) for i in (0, 1) for j in (0, 1)]


def call_of(q, k, v, **keywords):
    return bind(SOFTMAX, (q, k, v), keywords, ("out",))


def operands(dtype=np.float32, seed=0, *, B=1, Hq=2, Hkv=1, T=5, S=7, D=3, E=4):
    rng = np.random.default_rng(seed)
    return [numbers(rng, shape_, dtype) for shape_ in ((B, Hq, T, D), (B, Hkv, S, D), (B, Hkv, S, E))]


@pytest.mark.parametrize("group", [1, 5, 7, 97])  # rows of a query straddle blocks of 96 or 192 unless blocks mind, and 97 heads fill one
@FORMATS
def test_the_gradient_of_a_broadcast_bias_is_the_sum_of_that_of_a_whole_one(dtype, group):
    x = operands(dtype, B=2, Hkv=2, Hq=2 * group, T=250 // group + 3, S=70, D=8, E=5)
    rng = np.random.default_rng(1)
    for pattern in PATTERNS:
        sizes = (2, 2 * group, x[0].shape[2], 70)
        bias = rng.standard_normal([n if has else 1 for n, has in zip(sizes, pattern, strict=True)])
        bias = bias.astype(rng.choice([np.dtype(dtype), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]))
        small, whole = (call_of(*x, bias=y, causal=True, softcap=4.0) for y in (bias, np.ascontiguousarray(np.broadcast_to(bias, sizes))))
        cotangents = {"out": numbers(rng, (*sizes[:3], 5))}
        found, summed = (gradients(call, cotangents, 1)["d_bias"] for call in (small, whole))
        allowed = bounds(small, cotangents)["d_bias"] + summed_to(bounds(whole, cotangents)["d_bias"], bias.shape)
        assert found.shape == bias.shape
        assert (np.abs(found - summed_to(summed.astype(np.float64), bias.shape)) <= allowed).all(), pattern
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threads, "PARALLEL_FROM", 0)
            for n_threads in (2, 3):
                same(gradients(small, cotangents, n_threads)["d_bias"], found)


# ---- rows, blocks and threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 7])
@FORMATS
def test_gradients_of_any_number_of_queries_add_up(dtype, group):
    """A query's own gradient does not depend on who is beside it, to the bit; those of keys and values are sums over queries."""
    q, k, v = operands(dtype, Hkv=2, Hq=2 * group, T=200, S=70, D=5, E=4)
    d_out = numbers(np.random.default_rng(1), (1, 2 * group, 200, 4))
    every = gradients(call_of(q, k, v), {"out": d_out}, 1)
    for n in (*range(25, 60), 63, 64, 65, 95, 96, 97, 191, 192, 193, 199):  # more rows than are decoded one by one
        first, last = ((call_of(q[:, :, part], k, v), {"out": d_out[:, :, part]}) for part in (slice(n), slice(n, None)))
        one, two = gradients(*first, 1), gradients(*last, 1)
        same(one["d_q"], every["d_q"][:, :, :n])
        allowed = [bounds(call_of(q, k, v), {"out": d_out}), bounds(*first), bounds(*last)]
        for name in ("d_k", "d_v"):
            assert (np.abs(one[name].astype(np.float64) + two[name] - every[name]) <= sum(x[name] for x in allowed)).all(), (name, n)


@FORMATS
def test_one_long_head_has_work_for_two_threads_and_the_same_bits(dtype):
    call = call_of(*operands(dtype, Hq=1, T=2000, S=2100, D=24, E=16), causal=True, sinks=np.ones(1))
    cotangents = cotangents_of(call)
    alone, together = gradients(call, cotangents, 1), gradients(call, cotangents, 2)
    for name, x in alone.items():
        same(together[name], x, name)


# ---- what the bounds are worth, and what must not be read ------------------------------------------------------------------------


def one_everywhere(score, b, h, i, j, slopes):
    return 1.0


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "relu", "sparsemax", "entmax15"])
def test_a_wrong_slope_or_a_gradient_forgotten_is_noticed(name):
    x = operands(np.float32, Hq=4, Hkv=2, T=12, S=15)
    slopes = np.linspace(0.5, 1.0, 4)[None]
    call, wrong = (
        bind(catalog.variant(name), x, {"score_mod": squeezed, "slope": slope, "aux": slopes, "bias": np.zeros(15)}, ("out",))
        for slope in (squeezed_slope, one_everywhere)
    )
    cotangents = cotangents_of(call, lse=False)
    truth, found, allowed = gradients(call, cotangents, 1), gradients(wrong, cotangents, 1), bounds(call, cotangents)
    assert not (np.abs(truth["d_q"] - found["d_q"]) <= allowed["d_q"]).all()
    for gradient, most in ((y, allowed[operand]) for operand, y in truth.items()):
        assert (np.abs(gradient) > most).mean() > 0.1, "a gradient of 0 would pass"


@pytest.mark.parametrize("block", [None, (16, 8)])
@FORMATS
def test_what_a_query_does_not_see_has_no_part_in_gradients(dtype, block):
    q, k, v = operands(dtype, Hq=3, Hkv=1, T=60, S=90)
    k[:, :, 80:] = v[:, :, 75:80] = np.nan

    def shown(b, h, i, j):
        return j < 75 and (b + i + j) % (h + 2) != 0

    functions = {"mask_mod": shown} if block is None else {"block_mask": ra.block_mask(shown, T=60, S=90, Hq=3, block=block)}
    call = call_of(q, k, v, **functions, window=(40, 40))
    cotangents = {"out": numbers(np.random.default_rng(1), (1, 3, 60, 4)), "lse": np.ones((1, 3, 60))}
    found, alone = gradients(call, cotangents, 1), call_of(q, k[:, :, :75], v[:, :, :75], mask_mod=shown, window=(25, 55))
    allowed, expected = bounds(alone, cotangents), gradients(alone, cotangents, 1)
    for name, x in found.items():
        assert np.isfinite(x).all(), name
        own = x[:, :, :75] if name != "d_q" else x
        assert (np.abs(own - expected[name].astype(np.float64)) <= 2 * allowed[name]).all(), name
        same(x[:, :, 75:] if name != "d_q" else 0, 0)


def test_no_queries_no_keys_and_no_sequences_have_gradients_of_zero():
    for n_q, n_k in ((0, 5), (5, 0), (0, 0)):
        call = call_of(*operands(T=n_q, S=n_k), sinks=np.zeros(2), bias=np.zeros((2, 1, n_k)))
        for name, x in gradients(call, {"out": np.ones((1, 2, n_q, 4)), "lse": np.ones((1, 2, n_q))}).items():
            assert x.shape == call.given[name[2:]].shape
            same(x, 0 if n_k or name != "d_sinks" else n_q)  # without keys lse is the sink
    nothing = ra.Packed(cumulative([0, 0]))
    found = ra.gradients("softmax", *(np.zeros((0, 2, 3)) for _ in range(3)), d_out=np.zeros((0, 2, 3)), layout=nothing, mask_mod=near)
    assert [x.shape for x in found] == [(0, 2, 3)] * 3
