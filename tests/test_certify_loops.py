"""Definitions run on balls: what they give is what two other certifications and the definition say, and what they cannot tell apart they refuse."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from catalogue import CALLS, GENERAL, draw, flops, outputs, problem_of, rounding

import refattn as ra
from refattn import catalog
from refattn.exact import balls, loops, recurrent
from refattn.exact import certify as ladder
from refattn.exact.loops import Ball, Undecided, ball

SMALL = {
    **GENERAL,
    "B": 1,
    "Hq": 2,
    "Hkv": 1,
    "T": 3,
    "S": 4,
    "D": 4,
    "E": 2,
    "M": 3,
}  # where the root of D is a float64 number, which plans take it for


#: After as many steps as keys are wide a residual is 0 on paper, for no reason that loops know.
CALLS = [pytest.param(c.values[0], {**c.values[1], **({"steps": 1} if "solver" in c.values[1] else {})}, id=c.id) for c in CALLS]


def certified(variant, x, params):
    problem = problem_of(variant, x, params)
    assert not loops.reason_against(problem)
    return loops.certify(problem)


@pytest.mark.parametrize("variant, params", CALLS)
def test_every_definition_is_certified_as_it_is_defined(variant, params):
    x = draw(variant, SMALL, seed=5)

    def defined(operands):
        return tuple(outputs(variant, operands, params).values())

    found, slacks = certified(variant, x, params), rounding(defined, x, variant, flops(variant, x, params))
    for (name, one), expected, slack in zip(found.items(), defined(x), slacks, strict=True):
        finite = np.isfinite(expected)
        # Within an ulp, or what is 0 on paper within what hundreds of bits leave of it.
        assert (one.bound[finite] < 2.0**-52 * np.abs(one.value[finite]) + 2.0**-200).all(), name
        assert (one.value[~finite] == expected[~finite]).all() and one.rounded[~finite].all(), name
        apart = np.abs(np.subtract(one.value, expected, where=finite, out=np.zeros(expected.shape)))
        assert (apart <= slack + np.where(finite, one.bound, 0.0)).all(), name


@pytest.mark.compiled
@pytest.mark.parametrize("variant, params", CALLS)
def test_it_says_what_the_other_certifications_say(variant, params):
    x = draw(variant, SMALL, seed=6)
    problem = problem_of(variant, x, params)
    recurs = problem.plan is None and problem.recurrence is not None
    names = [o.name for o in variant.outputs if problem.plan is None or o.name in ("out", "lse", "weights", "scores")]
    if (recurrent.reason_against if recurs else ladder.reason_against)(problem):
        assert ra.certify(variant.name, **x, **params, returns="out").value.shape  # then it is the only one
        return
    found, own = ra.certify(variant.name, **x, **params, returns=names), certified(variant, x, params)
    for name, one in zip(names, found if len(names) > 1 else [found], strict=True):
        known = one.rounded & own[name].rounded
        np.testing.assert_array_equal(one.value[known], own[name].value[known])
        assert known[one.rounded & (one.tier < 3)].all(), name  # ties are for rational numbers


def test_what_was_made_alike_is_equal_and_what_was_not_is_not_told_apart():
    Ball.known = {}
    with balls.precision(200):
        third = ball(1) / ball(3)
        assert not (third > ball(1) / ball(3)) and not (third < ball(1) / ball(3))
        with pytest.raises(Undecided):
            assert third * 3 == 1
        assert third * 3 > 0.9999


def test_a_call_that_begins_meanwhile_makes_nothing_equal():
    with balls.precision(200):
        Ball.known = {}
        one = ball(1) / ball(3) * 3
        Ball.known = {}
        other = ball(1) / ball(7) * 7
        with pytest.raises(Undecided):
            assert one == other


def test_two_scores_that_are_equal_for_no_reason_it_knows_are_refused():
    """tanh(x) + tanh(y) and tanh(y) + tanh(x), of which a softmax takes the larger out."""
    eye = np.eye(2)
    keys = np.array([[[0.3, 0.7], [0.7, 0.3]]])
    call = {"q": np.zeros((1, 1, 2)), "k": keys, "v": np.ones((1, 2, 1)), "w_q": eye, "w_k": eye, "w": np.ones(2), "b": np.zeros(2)}
    with pytest.raises(ra.ParameterError, match="additive: cannot be certified: its loops compare two numbers that 6144 bits do not tell apart"):
        ra.certify("additive", **call)
    call["k"] = keys[:, [0, 0]]
    assert ra.certify("additive", **call).rounded.all()


def test_infinities_are_answered_as_in_ieee_arithmetic():
    Ball.known = {}
    with balls.precision(100):
        for x in (-2.5, 0.0, 2.5):
            for y in (np.inf, -np.inf, np.nan):
                with np.errstate(all="ignore"):
                    for name in ("__add__", "__sub__", "__mul__", "__truediv__"):
                        expected, found = getattr(np.float64(x), name)(np.float64(y)), getattr(ball(x), name)(y)
                        number = float(found.x.mid()) if isinstance(found, Ball) else found
                        assert number == expected or (np.isnan(number) and np.isnan(expected)), (name, x, y)
                    assert (y - ball(x) == np.float64(y) - x) or np.isnan(y)
                    assert (ball(x) < y, ball(x) > y) == (x < y, x > y)
        assert ball(1.0) / 0 == np.inf and ball(-1.0) / 0 == -np.inf and np.isnan(ball(0.0) / 0)


def test_numbers_are_exact_as_long_as_they_can_be():
    Ball.known = {}
    with balls.precision(300):
        x = (ball(0.1) * ball(3) - ball(2.0**-1000)) * 2
        low, high = balls.ends(x.x)
        assert low <= 2 * (3 * Fraction(0.1) - Fraction(2) ** -1000) <= high and high - low < Fraction(2) ** -290
        assert ball(0.1) + 0.2 - 0.1 == 0.2


def test_a_query_before_the_first_key_has_a_certain_nothing():
    x = draw(catalog.variant("forgetting"), {**SMALL, "T": 4, "S": 2})
    out, lse = ra.certify("forgetting", **x, returns=("out", "lse"))
    assert (out.value[:, :, 0] == 0.0).all() and (lse.value[:, :, 0] == -np.inf).all() and out.rounded.all() and lse.rounded.all()


def of_integers(*given):
    return np.floor(given[0])


def test_what_loops_use_beyond_arithmetic_is_refused_by_name():
    variant = catalog.variant("forgetting")
    problem = problem_of(variant, draw(variant, SMALL), {})
    problem = replace(problem, variant=replace(variant, define=of_integers))
    with pytest.raises(ra.ParameterError, match=r"forgetting: cannot be certified: its loops use what has no enclosure: .*floor"):
        loops.certify(problem)
    problem = replace(problem, variant=replace(variant, define=eval("lambda *given: given[0]")))
    assert loops.reason_against(problem) == "the source of its loops cannot be read"


def test_without_python_flint_it_is_refused(monkeypatch):
    monkeypatch.setattr(balls, "available", lambda: False)
    with pytest.raises(ra.ParameterError, match="aft_full: cannot be certified"):
        ra.certify("aft_full", **draw(catalog.variant("aft_full"), SMALL))


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_counts_on_a_terminal_and_says_nothing_in_a_pipe(terminal, monkeypatch, capsys):
    monkeypatch.setattr(loops, "_SHOWN_FROM", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    variant = catalog.variant("aft_full")
    certified(variant, draw(variant, SMALL, seed=0), {})
    shown = capsys.readouterr()
    assert shown.out == "" and ("certifying aft_full with" in shown.err and "numbers made" in shown.err) == terminal
