"""Rounding errors of recurrences: the recurrence is run on magnitudes beside the truth, and with roundings made larger.

worst
    |S| recurrences: every step adds to the error of the state what its roundings can, and what an erasure makes of the error that is there already,
    |b| |e|^T E.  Keys of length one and more make that grow without bound, where the truth contracts.
likely
    What errors become on their way to an output is no product of norms: I - b e^T shrinks most of what it meets.  So the recurrence itself
    carries them.  It is run several times with a rounding of random sign at every place where a kernel rounds, each as large as the largest
    partial sum there may make it (the value, or the root of the sum of squares of its terms: sums may be those of a recurrent, a chunked or a
    quadratic form); the root mean square of what changes is one standard deviation.  As many runs again give all tokens' decays one and the
    same error, as a decay that is the same for all tokens has, and let no erasure of a chunk correct what roundings wrote in it, as the chunked
    form solves for all of its changes before it writes any.  Where tokens repeat each other, so do all their roundings in further runs.
    What is divided by a mass is off by what both errors make of the quotient, and by anything where that of the mass may make it 0.

A decay of several tokens is the exponential of a sum of logarithms, or of a difference of two such sums, so that its relative error is that of the
sums: unit roundoffs times what has been added up since the chunk began, which may be far more than the logarithm itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ...problem import Problem
from ..profiles import Profile
from ..recurrences.lowered import Lowering, Moved, released
from ..recurrences.running import Form, Prepared, Result, Rounding, divisor_of, prepared, run, undivided, worst
from .bound import distance
from .extremes import Elsewhere, extremes, of_numbers

#: Runs with roundings, of each kind; fewer where those would update more entries of states than so many.
_DRAWS, _FEWEST, _WORK = 9, 4, 200_000_000

#: Roundings are made larger so that float64's own are nothing beside them.
_SMALLEST = 2.0**-34

OUTPUTS = ("out", "state", "mass", "maximum")

Draw = Callable[[Moved | None], Prepared]


def recurrent(problem: Problem, truth: Mapping[str, np.ndarray], profile: Profile, lam: float) -> dict[str, np.ndarray]:
    """Largest error of every output of a variant that has a recurrence."""
    rule, units = problem.recurrence, rounding(profile)
    assert rule is not None

    def draw(moved: Moved | None) -> Prepared:
        return prepared(Lowering(problem, rule, moved=moved).lowered())

    exact = run(draw(None), Form())
    mapped = any(_mapped(problem))
    errors = bounds(draw, Form(), exact, profile, lam, mapped)
    left = {name: lam * x for name, x in outputs(problem, extremes(problem, rule, units, exact)).items()}
    right, others = outputs(problem, exact), [truth]  # the definition's sums are in an order of their own
    if mapped:
        others.append(outputs(problem, run(prepared(Elsewhere(problem, rule, units).lowered()), Form())))
    numbers = of_numbers(problem)  # else it may be right that one answer is none
    for other in others:
        for name, x in right.items():
            left[name] = left[name] + distance(x, other[name]) + (distance(other[name], x) if numbers else 0.0)
    return {name: x + left[name] for name, x in outputs(problem, errors).items()}


def outputs(problem: Problem, result: Result) -> dict[str, np.ndarray]:
    """By the variant's own names and axes."""
    rule = problem.recurrence
    assert rule is not None
    names = {"out": "out", "state": rule.initial, "mass": rule.mass, "maximum": rule.maximum}
    own = {o.name for o in problem.variant.outputs}
    found = {name.removeprefix("initial_"): getattr(result, part) for part, name in names.items() if getattr(result, part) is not None}
    return {name: released(problem, rule, name, x) for name, x in found.items() if name in own}


def _mapped(problem: Problem) -> list[bool]:
    """For every factor, whether it goes through a map."""
    rule = problem.recurrence
    assert rule is not None
    products = (rule.query, rule.log_decay, rule.bonus, rule.skip, rule.input_gate, *(p for w in rule.writes for p in (w.key, w.value, w.erase)))
    return [not isinstance(f, str) and f.map is not None for product in products for f in product]


def rounding(profile: Profile) -> Rounding:
    """What a profile says of recurrences."""
    return Rounding(
        sums=profile.accumulate,
        products=profile.products or profile.accumulate,
        operands=max(profile.operands, profile.probabilities),
        state=profile.state,
        function=profile.exp_error,
        every=max(profile.state_every, 1),
        chunk=profile.chunk,
        tiny=float(np.finfo(np.float64 if profile.accumulate <= np.finfo(np.float64).eps else np.float32).tiny),
    )


def bounds(draw: Draw, form: Form, exact: Result, profile: Profile, lam: float, mapped: bool, rough: bool = False) -> Result:
    """The smaller of both bounds of every output, [B, Hq, T, V] and [B, H, K, V]; of a wrong form, the likely one alone.

    Parameters
    ----------
    draw : callable
        Makes the arrays; anew, with other roundings, of operands that go through maps.
    form : Form
    exact : Result
        Without roundings.
    profile : Profile
    lam : float
    mapped : bool
        Whether any operand goes through a map.
    rough : bool
        Whether one run of each kind is enough, and no worst case is wanted.
    """
    units = rounding(profile)
    larger = max(1.0, _SMALLEST / units.sums)
    made = units.times(larger)
    plain = draw(None)
    apart = bool(plain.lowered.erases.any()) and units.chunk != 1
    kinds = [(0, False), *([(1, apart)] if plain.g.any() or apart else [])]
    kinds += [(2, False), (2, apart)][: 1 + apart] if _repeats(plain, units) else []
    work = plain.state.size * plain.lowered.tokens
    draws = 1 if rough else max(_FEWEST, min(_DRAWS, _WORK // max(work, 1)))
    rng = np.random.default_rng(0)
    moved = Moved(rng, made.sums + made.operands, made.function + 4 * made.sums) if mapped else None
    sums = undivided(plain, form) if plain.lowered.rule.normalizer else None
    roots: dict[str, np.ndarray] = {}  # of mean squares; squares themselves may leave float64
    for kind in kinds:
        own: dict[str, np.ndarray] = {}
        for m in range(draws):
            p, rounded = plain if moved is None else draw(moved), (made, kind[0] * draws + m + 1, *kind)
            off = _of(exact, run(p, form, *rounded)) if sums is None else _of_quotient(plain, sums, exact, p, undivided(p, form, *rounded))
            for name, x in off.items():
                own[name] = np.hypot(own.get(name, 0.0), x / larger / np.sqrt(draws))
        roots = {name: np.maximum(x, roots[name]) if name in roots else x for name, x in own.items()}
    spreads = {name: lam * _pooled(x) for name, x in roots.items()}
    if sums is not None:
        spreads["out"] = _quotient(plain, sums[0][..., -1:], exact, spreads)
    likely = {name: spreads[name] + 2 * lam * units.sums * np.abs(np.nan_to_num(x)) for name in OUTPUTS if (x := getattr(exact, name)) is not None}
    if not _right(form) or rough:
        return Result(likely["out"], likely["state"], likely.get("mass"), likely.get("maximum"))
    most = worst(plain, form, units, exact)
    known = {name: x for name in OUTPUTS if (x := getattr(most, name)) is not None}
    if mapped:  # what maps make of roundings is in no magnitude
        known = {name: np.full_like(x, np.inf) for name, x in known.items()}
    least = {name: np.fmin(x, known[name]) for name, x in likely.items() if name in known}
    return Result(least["out"], least["state"], least.get("mass"), least.get("maximum"))


def _of(exact: Result, found: Result) -> dict[str, np.ndarray]:
    return {name: distance(x, getattr(exact, name)) for name in OUTPUTS if (x := getattr(found, name)) is not None}


def _of_quotient(
    plain: Prepared, sums: tuple[np.ndarray, np.ndarray], exact: Result, p: Prepared, found: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """Errors of a divisor's mass, and of a sum less its quotient times what the divisor is off by: that, or nothing."""
    rule, skip, moved = plain.lowered.rule, plain.lowered.skip, p.lowered.skip
    (read, state), mass = sums, sums[0][..., -1:]
    with np.errstate(all="ignore"):
        off = np.where(np.isfinite(read), found[0] - read, 0.0)
        value, over = (exact.out, 0.0) if skip is None else (exact.out - skip, divisor_of(plain, mass) * (moved - skip))
        still = rule.scale * off[..., :-1] + over
        slope = np.sign(mass) if rule.normalizer == "floor" else 1.0
        errors = {name: np.where(np.isfinite(value), x, 0.0) for name, x in (("still", still), ("moving", still - value * slope * off[..., -1:]))}
    of_state = distance(found[1], state)
    errors |= {"divisor": off[..., -1:], "state": of_state[..., :-1], "mass": of_state[..., -1]}
    if plain.maxima is not None and p.maxima is not None:
        errors["maximum"] = distance(p.maxima[..., -1], plain.maxima[..., -1])
    return {name: np.where(np.isnan(x), np.inf, np.abs(x)) for name, x in errors.items()}


def _quotient(plain: Prepared, mass: np.ndarray, exact: Result, spreads: Mapping[str, np.ndarray]) -> np.ndarray:
    """n / d becomes (n + a) / (d + b), which is off by (a - n / d b) / (d + b): by anything where d + b may be 0."""
    rule, skip, shift = plain.lowered.rule, plain.lowered.skip, spreads["divisor"]
    with np.errstate(all="ignore"):
        value = np.abs(np.nan_to_num(exact.out if skip is None else exact.out - skip))
        divisor, least = np.abs(divisor_of(plain, mass)), np.abs(divisor_of(plain, np.zeros_like(mass)))
        size = np.abs(mass) if rule.normalizer == "floor" else mass
        of_sum = spreads["moving"]
        if rule.normalizer == "sum":
            moves, stays, least = np.True_, np.False_, np.zeros_like(mass)
        else:  # the mass, or what a divisor does not fall below
            bound = least - rule.eps if rule.normalizer == "floor" else least
            moves, stays = ~(size + shift < bound), ~(size - shift > bound)
            of_sum = np.where(size > shift, of_sum, spreads["still"] + value * shift)  # a mass of any sign
        off = np.maximum(np.where(moves, of_sum, 0.0), np.where(stays, spreads["still"], 0.0))
        left = np.where(moves, np.maximum(divisor - shift, least), divisor)
        found = np.where(left > 0.0, off / left, np.where(shift > 0.0, np.inf, 0.0))
        return np.where(least > 0.0, np.minimum(found, value * (1.0 + divisor / least) + spreads["still"] / least), found)


def _pooled(roots: np.ndarray) -> np.ndarray:
    """Root mean squares of few runs, none much smaller than those of the row's other channels: a mean of few may be small by chance."""
    if roots.ndim < 4 or not roots.size:
        return roots
    known = np.where(np.isfinite(roots), roots, 0.0)
    most = known.max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        shares = np.where(most > 0.0, known / most, 0.0)
    return np.maximum(roots, 0.5 * most * np.sqrt(np.mean(shares**2, axis=-1, keepdims=True)))


def _repeats(p: Prepared, units: Rounding) -> bool:
    """Whether most tokens write what the token before wrote, as far as it is told apart after it was rounded: then roundings repeat too."""
    near = 8 * max(units.operands, units.state, units.sums)
    alike = []
    for x in (p.b, p.w):
        after, before = x[:, :, 1:], x[:, :, :-1]
        size = np.abs(after).max(axis=(3, 4), initial=0.0)
        alike.append((np.abs(after - before).max(axis=(3, 4), initial=0.0) <= near * size) & (size > 0))
    same = alike[0] & alike[1]
    return bool(same.size) and float(same.mean()) > 0.5


def _right(form: Form) -> bool:
    return form.order == Form().order and form.wrong == Form().wrong
