"""Recurrences certified: two float64 with a running bound, then balls of growing precision for what that leaves open.

tier 1      two float64, a bound for each column of a state        refattn.exact.states
tier 2      Arb balls, from the first token to the last one needed   refattn.exact.state_balls
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..problem import Problem, output_dtype
from ..spec import shape
from . import balls, enclosures, states, tokens, trusted
from .blocks import progress
from .results import Certified, Draft, Enclosed, draft, released, unknown_are_nan
from .state_balls import Place, StateBalls
from .tokens import Head, Pairs, Tokens, after_name, folded


def reason_against(problem: Problem) -> str:
    """What in a recurrence has no enclosure here, or the empty string."""
    assert problem.recurrence is not None
    return tokens.reason_against(problem, problem.recurrence)


def certify(problem: Problem) -> dict[str, Certified]:
    """The outputs asked for, in the caller's layout; arguments as in `certify.certify`."""
    trusted.check()
    asked = Tokens(problem)
    rule, square = asked.rule, (asked.batch, asked.states, asked.n_keys)
    full = {
        "out": (asked.batch, asked.heads, asked.n_reads, asked.n_values),
        after_name(rule.initial): (*square, asked.n_values),
        after_name(rule.mass): (*square, 1),
        after_name(rule.maximum): (asked.batch, asked.states, 1, 1),
    }
    drafts = {name: draft(full[name], output_dtype(problem, name)) for name in problem.returns}
    work = [(b, g) for b in range(asked.batch) for g in range(asked.states)]
    cost = len(work) * asked.n_tokens * asked.n_keys * asked.n_values * (2.0 + asked.group)
    for b, g in progress(work, len(work), f"certifying {problem.variant.name}", cost):
        for name, known in _in_two(asked, b, g).items():
            if name in drafts:
                at = (b, _of_state(asked, name, g))
                drafts[name].write(at, tuple(x.reshape(drafts[name].value[at].shape) for x in known), 1)  # type: ignore[arg-type]
        if balls.available():
            _climb(asked, drafts, b, g)
    unknown_are_nan(drafts)
    return {name: _released(asked, name, x) for name, x in drafts.items()}


def _of_state(asked: Tokens, name: str, g: int) -> slice:
    """Heads of an output that one state gives."""
    return slice(g * asked.group, (g + 1) * asked.group) if name == "out" else slice(g, g + 1)


def _released(asked: Tokens, name: str, x: Draft) -> Certified:
    axes = next(o.axes for o in asked.problem.variant.outputs if o.name == name)
    full, places = shape(axes, asked.problem.dims), asked.out_at(axes) if name == "out" else asked.square(axes)
    value, bound, tier, rounded = (folded(y, places, full) for y in (x.value, x.bound, x.tier, x.rounded))
    return released(Draft(x.dtype, value, bound, tier, rounded), full, axes, asked.problem.layout)


# ---- two float64 -----------------------------------------------------------------------------------------------------------------


def _in_two(asked: Tokens, b: int, g: int) -> dict[str, Enclosed]:
    """Everything one state gives."""
    rule, head, queries = asked.rule, asked.head(Pairs, b, g), asked.queries(Pairs, b, g)
    with np.errstate(all="ignore"):
        read, state = _run(asked, head, queries)
        found = {after_name(rule.initial): tuple(x[:, : asked.n_values] for x in state)}
        if rule.normalizer:
            found[after_name(rule.mass)] = tuple(x[:, asked.n_values :] for x in state)
        if rule.input_gate:
            found[after_name(rule.maximum)] = tuple(x[-1:].reshape(1, 1) for x in head.tops)
        found["out"] = _divided(asked, b, g, head, queries, read)
    return found  # type: ignore[return-value]


def _divided(asked: Tokens, b: int, g: int, head: Head, queries: Enclosed, read: Enclosed) -> Enclosed:
    """Outputs from what was read of a state and its mass, [group, T, V]."""
    rule, after, at = asked.rule, asked.after, Pairs.at
    if rule.exclusive and head.past is not None:
        read = enclosures.product(read, at(head.past, (after, None)))
    if head.own is not None:
        overlap = enclosures.summed(enclosures.product(queries, at(head.own, after)))
        read = enclosures.total(read, enclosures.product(at(overlap, (..., None)), at(head.value, (after, 0))))
    scaled = enclosures.product(read, enclosures.exactly(np.array([rule.scale])))
    if rule.normalizer:
        mass, eps = at(read, (..., slice(-1, None))), enclosures.exactly(np.array([rule.eps]))
        if rule.normalizer == "clamp":
            divisor = enclosures.larger(mass, eps)
        elif rule.normalizer == "sum":
            divisor = enclosures.total(mass, eps)
        else:
            floor = at(head.floor, (after + 1, None))
            divisor = enclosures.larger(enclosures.size(mass), floor)
            divisor = divisor if rule.eps == 0.0 else enclosures.total(divisor, eps)
        scaled = enclosures.quotient(at(scaled, (..., slice(-1))), divisor)
    return enclosures.total(scaled, asked.skipped(Pairs, b, g)) if rule.skip else scaled


def _run(asked: Tokens, head: Head, queries: Enclosed) -> tuple[Enclosed, Enclosed]:
    """What is read of a state, [group, T, V], and the state after the last token, [K, V]; a mass is the last value."""
    n_values = head.value[0].shape[2]
    wide = states.padded(n_values)
    n_tokens, n_writes, n_keys = head.key[0].shape
    key, erase = _vectors(head.key), _vectors(head.erase or enclosures.exactly(np.zeros((0, n_writes, n_keys))))
    factors = head.decay or enclosures.exactly(np.ones((n_tokens, 1)))
    decay, _, decay_off = (np.ascontiguousarray(np.broadcast_to(x, (n_tokens, n_keys))) for x in factors)
    fading, growth = np.max(decay + decay_off, axis=1, initial=0.0) * states.UP, np.ones((n_tokens, n_writes))
    if head.erase is not None:
        states.growths(key, erase, decay, decay_off, asked.old, fading, growth)
    full = (n_tokens if head.decay else 0, n_keys)
    decays = np.ascontiguousarray(np.broadcast_to(np.stack(factors[:2])[:, : full[0]], (2, *full)))

    def columns(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, wide - n_values)]))

    values, state = (columns(np.stack(x[:2])) for x in (head.value, head.initial))
    rho = columns(np.sum(head.initial[2], axis=0))
    read, off = np.zeros((2, asked.group, asked.n_reads, wide)), np.zeros((asked.group, asked.n_reads, wide))
    states.run(
        _vectors(queries), asked.after, asked.rule.exclusive, key, values, columns(head.value[2]), erase, asked.old, decays, decay_off,
        fading, growth, state, rho, read, off,
    )  # fmt: skip
    off[~(np.isfinite(read[0]) & (off >= 0.0))] = np.inf
    rho = np.broadcast_to(rho, state[0].shape)
    reach = np.where(np.isfinite(state[0]) & (rho >= 0.0), rho, np.inf)
    h, l, r = (x[..., :n_values] for x in (*read, off))
    a, c, e = (x[..., :n_values] for x in (*state, reach))
    return (h, l, r), (a, c, e)


def _vectors(x: Enclosed) -> states.Vectors:
    def lengths(y: np.ndarray) -> np.ndarray:
        found: np.ndarray = states.lengths(np.ascontiguousarray(y).reshape(-1, y.shape[-1])).reshape(y.shape[:-1])
        return found

    return states.Vectors(np.ascontiguousarray(np.stack(x[:2])), lengths(x[0]), lengths(x[2]))


# ---- balls -------------------------------------------------------------------------------------------------------------------------


def _climb(asked: Tokens, drafts: Mapping[str, Draft], b: int, g: int) -> None:
    """Balls of growing precision for what one state leaves open."""
    left: list[Place] = []
    for name, x in drafts.items():
        heads = _of_state(asked, name, g)
        left += [(name, (b, heads.start + h, *rest)) for h, *rest in np.argwhere(~x.rounded[b, heads]).tolist()]
    for bits in balls.precisions():
        if not left:
            return
        with balls.precision(bits):
            found = StateBalls(asked, b, g, left)
            still = []
            for name, at in left:
                ball = found.element(name, at)
                if ball is None:  # something that is not finite is in it
                    continue
                ends = balls.ends(ball)
                if ends is None or not drafts[name].settle(at, *ends, 2):
                    still.append((name, at))
        left = still
