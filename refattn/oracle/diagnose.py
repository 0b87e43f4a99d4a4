"""Which known faults explain the answers of an implementation: the name of the bug.

A hypothesis is the specification with one or two of its statements changed (`mutants`).  It explains the answers if every one of them, in
every call, is within the tolerance that a correct computation *of the hypothesis* has; one element beyond it refutes it.  So

1.  what is no matter of numbers is said at once: an operand overwritten, answers that differ from run to run;
2.  single faults are tried, then single faults with a number that is fitted, then pairs;
3.  pairs are directed by conflicts (de Kleer & Williams, Artificial Intelligence 32, 1987): in some failing call one of the two explains the
    answer, or one output of it, alone, and what it leaves unexplained elsewhere the other one must; plain calls are asked besides, as they are
    kind in this way.  Where no call is, the faults whose own answers come nearest to the given ones are paired with all others: of what two
    faults do to an answer, one explains the leading bits or some of the elements;
4.  where several explanations are left, the implementation is asked a call on which they differ, until one is left or they cannot be told
    apart;
5.  with no explanation left there is no name: what was recovered from the answers themselves has to speak.

A wrong hypothesis is cheap, since the call that refutes it comes early: calls that have refuted others are asked first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from .. import precision
from ..problem import Problem, bind
from ..spec import Variant
from . import mutants
from .findings import Diagnosis, Explanation, Fault
from .fitting import fitted, names, refitted
from .judge import Case, held_against, ratio
from .probes import Probe
from .profiles import Profile

#: Evaluations of a call of average size that each way to find a pair may take; further calls asked, and looked at, to tell explanations apart.
PAIRS, ASKED, LOOKED_AT = 600, 6, 60

#: Further calls asked before pairs are tried: plain ones, in which one of two faults shows alone.
_PLAIN = 24

#: Cost of an average call: about half of it is spent whatever its size is.
_AVERAGE = 50_000.0

#: Cost of a call that hypotheses are not held against any more.
LARGEST = 100 * _AVERAGE

#: Explanations compared with each other at most to find a call that tells some apart.
_APART = 6

#: Calls a number may be fitted to before it is given up.
_FITTED_TO = 4

#: Evaluations of average size to find faults whose answers are near, and again to find pairs: at most some six seconds each on one core.
NEAREST = 4000

#: How many such faults are paired with all others, and how much nearer than the specification's their answers have to be.
_NEAR, _NEARER = 16, 0.9

#: Calls that one of them does not explain, in which pairs with it are compared; and how many of these are then held against all calls.
_UNEXPLAINED, _HELD = 3, 16

#: Bits beyond tolerance from which on everything is as far off.
_FARTHEST = 40.0

#: Elements of an output from which on its mean error says something, and how far the mean errors of one kind of rounding may be apart.
_MANY, _CHANCE = 16, 8.0

#: Which call a kernel may remember something of.
MEMORIES = ("the first call of these sizes", "the first call with queries and keys of these sizes")

#: Another hypothesis this many tolerances off is far off.
_FAR = 3.0

Ask = Callable[[Probe], Case]

OVERWRITTEN = Fault(
    "R3",
    "an operand is overwritten",
    "The call changes one of its own operands, so that whoever uses it again, the next call or the backward pass, reads something else.",
    right="q, k, v are read only",
    wrong="q, k, v are scratch space",
    evidence="MLX c184262d, b35f1e3c",
)
UNREPEATABLE = Fault(
    "R1",
    "answers differ from run to run",
    "The same call made twice gives different bits: a missing barrier, sums in no fixed order through atomics, or memory read before it is written.",
    right="f(x) = f(x)",
    wrong="f(x) depends on what ran before or beside it",
    evidence="MLX c41f7565; FlashInfer 6dff34d1; flash-attention 9b0bc978",
)


@dataclass(frozen=True)
class Hypothesis:
    """The specification with some statements changed.

    Attributes
    ----------
    faults : tuple of Fault
    changes : mapping
        Fields of `mutants.Reading`.
    needs : tuple of frozenset of str
        What a call must have for each fault to show.
    memory : str
        Which earlier call a fault of memory remembers.
    fitted : mapping of str to (Family, float)
        By name of the fault: faults with a number, and the number.
    parts : tuple of Hypothesis
        The two single ones of a pair of faults without numbers.
    """

    faults: tuple[Fault, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[frozenset[str], ...] = ()
    prior: float = 1.0
    memory: str = ""
    fitted: Mapping[str, tuple[mutants.Family, float]] = field(default_factory=dict)
    parts: tuple[Hypothesis, ...] = ()

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        return (*sorted((name, repr(value)) for name, value in self.changes.items()), self.memory)


@dataclass(frozen=True, eq=False)
class Question:
    """One judged call, or one output of it, as hypotheses are held against it; with the earlier calls that a fault could remember."""

    case: Case
    problem: Problem
    earlier: Mapping[str, Problem]
    cotangents: Mapping[str, np.ndarray]
    cost: float
    whole: Question | None = None  # the call, where this is one output of it

    @property
    def failing(self) -> bool:
        return self.case.outcome == "differs"

    @functools.cached_property
    def off(self) -> float:
        """Largest error / tolerance under the specification."""
        return max(float(r.max()) for r in self.case.ratios.values() if r.size)

    @functools.cached_property
    def _shown(self) -> dict[str, frozenset[str]]:
        return {}

    def shown(self, memory: str) -> frozenset[str]:
        """What the call has that a fault may need."""
        if memory not in self._shown:
            looked_at = tuple(n for n in self.case.answers if not n.startswith("d_"))
            self._shown[memory] = mutants.shows(self.problem, looked_at, self.cotangents, self.earlier.get(memory))
        return self._shown[memory]


def diagnose(
    variant: Variant,
    cases: Sequence[Case],
    profile: Profile,
    alpha: float,
    ask: Ask | None = None,
    further: Callable[[], Iterable[Probe]] = tuple,
    cotangents: Sequence[str] = ("out",),
) -> tuple[Diagnosis, Callable[[Case], bool] | None]:
    """What explains the answers.

    Parameters
    ----------
    variant : Variant
    cases : sequence of Case
        All calls in the order they were made.
    profile : Profile
    alpha : float
        Chance that a correct answer is refused in one call.
    ask : callable, optional
        Makes a further call; explanations that only it could tell apart stay together where it is not given.
    further : callable
        Calls that may be asked in addition; made where they are needed.
    cotangents : sequence of str
        Outputs whose cotangents the implementation's backward pass takes.

    Returns
    -------
    diagnosis : Diagnosis
        Without explanations where every call is right: its blind spots are then what matters.
    explained : callable or None
        Whether a further call is explained as well; None without an explanation that holds for a call by itself.
    """
    asked = questions(cases, cotangents)
    decided = [c for c in cases if c.probe.decides and c.outcome != "declined"]
    signs = ((OVERWRITTEN, "it wrote into its operand"), (UNREPEATABLE, "run to run"))
    gate = [fault for fault, words in signs if any(words in c.reason for c in decided)]
    if gate and not any(q.failing and "run to run" not in q.case.reason for q in asked):
        return Diagnosis((Explanation(tuple(gate[:1]), 0.0),), "high", np.inf, 0, len(decided)), None
    search = Search(variant, asked, profile, alpha)
    if not search.hypotheses:
        return Diagnosis(calls=len(asked)), None
    if not search.failing:
        return Diagnosis(calls=len(asked), blind_spots=BlindSpots(search)), None
    found = search.singles() or search.numbers()
    if not found:
        if ask is not None:
            search.ask_also(questions([ask(probe) for probe in _plainest(variant, further())], cotangents))
        found = search.pairs()
    if gate:
        found = [replace(h, faults=(gate[0], *h.faults)) for h in found]
    told = tell_apart(search, found, ask, further, cotangents) if found else []
    explanations = tuple(search.explanation(group) for group in told)
    runner_up = search.runner_up([h for group in told for h in group])
    confidence = _confidence(explanations, told, runner_up)
    diagnosis = Diagnosis(explanations, confidence, runner_up, len(search.off), len(search.asked))
    if not told or told[0][0].memory:
        return diagnosis, None
    return diagnosis, lambda case: all(search.ratio(told[0][0], q) <= 1.0 for q in questions([case], cotangents))


def questions(cases: Sequence[Case], cotangents: Sequence[str] = ()) -> list[Question]:
    """The judged calls, each with the calls before it whose leftovers it could meet; but for those too large and those no mutant can be made of."""
    asked: list[Question] = []
    first: dict[tuple[Any, ...], Problem] = {}
    for case in cases:
        if case.problem is None or case.outcome not in ("agrees", "differs") or case.probe.cut:  # a call in two is not what a mutant answers
            continue
        problem = case.problem
        shapes = tuple(x.shape for o in problem.variant.operands if not o.optional for x in [problem.given[o.name]])
        earlier = {}
        for memory, key in zip(MEMORIES, (shapes, shapes[:2]), strict=True):
            kept = first.setdefault((memory, key), problem)
            if kept is not problem:
                earlier[memory] = _fitting(kept, problem)
        plain = problem.functions is None and problem.sequences is None and _cost(problem) <= LARGEST
        if case.probe.decides and case.answers and case.elements and plain:
            backward = any(name.startswith("d_") for name in case.answers)
            given = {name: x for name, x in case.probe.cotangents.items() if backward and name in cotangents}
            asked.append(Question(case, problem, earlier, given, _cost(problem)))
    return asked


def _fitting(earlier: Problem, problem: Problem) -> Problem:
    """An earlier call as far as it fits this one: what has another shape cannot have been kept."""
    required = [o.name for o in problem.variant.operands if not o.optional]
    own = {n: problem.given[n] for n in required if problem.given[n].shape != earlier.given[n].shape}
    return replace(earlier, dims=problem.dims, given={**earlier.given, **own}) if own else earlier


def _cost(problem: Problem) -> float:
    """Of an evaluation: what every call takes, and what grows with its size."""
    dims = problem.dims
    pairs = dims.get("B", 1) * dims.get("Hq", 1) * dims.get("T", 1) * dims.get("S", dims.get("T", 1))
    return _AVERAGE / 2 + pairs * (1 + 0.1 * (dims.get("D", 1) + dims.get("E", 1)))


class Search:
    """The hypotheses of a variant held against the answers of one implementation.

    Attributes
    ----------
    asked, failing : list of Question
        Those that fail come first, and then those that cost least.
    hypotheses : list of Hypothesis
        Single faults, the likeliest first.
    off : dict
        Every hypothesis tried, by its key: the largest error / tolerance met so far.
    """

    def __init__(self, variant: Variant, asked: Sequence[Question], profile: Profile, alpha: float) -> None:
        self.variant, self.profile, self.alpha = variant, profile, alpha
        self.asked = sorted(asked, key=lambda q: (not q.failing, q.cost))
        self.failing = [q for q in self.asked if q.failing]
        self.families = mutants.families(variant)
        self.hypotheses = [h for m in mutants.mutants(variant) for h in _hypotheses(m)]
        self.off: dict[tuple[Any, ...], float] = {}
        self._tried: dict[tuple[Any, ...], Hypothesis] = {}
        self._order = list(self.asked)
        self._known: dict[tuple[Any, ...], dict[str, float]] = {}
        self._split: dict[int, list[Question]] = {}
        self._weights: dict[int, dict[str, np.ndarray]] = {}
        self._left = math.inf  # cost that may still be spent

    # ---- one hypothesis, one call ---------------------------------------------------------------------------------------------------

    def answers(self, hypothesis: Hypothesis, question: Question) -> mutants.Answers | mutants.StateAnswers:
        self._left -= question.cost
        return mutants.evaluate(question.problem, hypothesis.changes, question.cotangents or None, question.earlier.get(hypothesis.memory))

    def shows(self, hypothesis: Hypothesis, question: Question) -> bool:
        """Whether the call has all that some fault of the hypothesis needs; where not, the specification answers."""
        return any(needs <= question.shown(hypothesis.memory) for needs in hypothesis.needs)

    def ratio(self, hypothesis: Hypothesis, question: Question) -> float:
        """Largest error / tolerance of the answers in one call, under the hypothesis."""
        if not self.shows(hypothesis, question):
            return question.off
        whole = question.whole or question
        key = (*hypothesis.key, id(whole))
        if key not in self._known:
            self._known[key] = self._ratios(hypothesis, whole)
        return max((self._known[key].get(name, 0.0) for name in question.case.answers), default=0.0)

    def _ratios(self, hypothesis: Hypothesis, question: Question) -> dict[str, float]:
        """The same by output."""
        said, case = self.answers(hypothesis, question), question.case
        ratios = {name: float(r.max()) for name, r in case.ratios.items() if r.size and name not in said.outputs}  # nothing is known of these
        known = {name: x for name, x in case.answers.items() if x.size and name in said.outputs}
        expected = {name: said.outputs[name].reshape(x.shape) for name, x in known.items()}
        if isinstance(said, mutants.StateAnswers):
            for name, x in known.items():
                lost = ~np.isfinite(x) & ~(np.abs(expected[name]) < said.beyond(x.dtype))
                expected[name] = np.where(lost, x.astype(np.float64), expected[name])
        finite = {name for name, x in known.items() if bool((np.isfinite(x) & ~np.isfinite(expected[name])).any())}
        ratios |= dict.fromkeys(finite, math.inf)
        rest = {name: x for name, x in known.items() if name not in finite}
        if rest and isinstance(said, mutants.StateAnswers):  # most are so far off that a rough tolerance refutes them
            rough = said.rough(self.profile, self.alpha)
            off = {n: float(ratio(x.astype(np.float64), expected[n], rough[n].reshape(x.shape)).max()) for n, x in rest.items() if n in rough}
            if max(off.values(), default=0.0) > mutants.ROUGHLY:
                return ratios | off
        if rest:
            tolerance = said.tolerance(self.profile, self.alpha)
            allowed = {name: tolerance[name].reshape(x.shape) for name, x in rest.items()}
            held = held_against(expected, allowed, question.problem, rest, case.probe)
            for name, r in held.ratios.items():
                worst = float(r.max())
                ratios[name] = worst if worst > 1.0 else max(worst, self._implausible(name, expected[name], question))
        return ratios

    @staticmethod
    def _implausible(name: str, wrong: np.ndarray, question: Question) -> float:
        """More than 1 where an output is within tolerance only because a fault that rounds much allows much.

        Its own answer shows how far off it would be: an output far closer to the specification than that has none of its roundings, and one
        that fails is no better explained where it is no closer to the hypothesis than to the specification.
        """
        answer = question.case.answers[name]
        got, right = answer.astype(np.float64), question.case.truth[name].reshape(wrong.shape)
        both = np.isfinite(got) & np.isfinite(right) & np.isfinite(wrong)
        if both.sum() < _MANY:
            return 0.0
        off, its, left = (float(np.sqrt(np.mean((a[both] - b[both]) ** 2))) for a, b in ((got, right), (wrong, right), (got, wrong)))
        rounding = float(np.sqrt(np.mean(right[both] ** 2))) * precision.format_of(answer.dtype).unit
        too_exact = its / (_CHANCE * max(off, rounding, 1e-300))
        failing = question.case.ratios[name].reshape(wrong.shape)[both] > 1
        return max(too_exact, left / max(off, 1e-300)) if failing.any() else too_exact

    def refuting(self, hypothesis: Hypothesis, among: Sequence[Question] | None = None) -> Question | None:
        """A call the hypothesis does not explain; None: it explains all.  What refutes one hypothesis is asked first of the next."""
        self._tried.setdefault(hypothesis.key, hypothesis)
        for question in self.failing if among is None else ():
            if not self.shows(hypothesis, question):  # nothing to compute
                return self._refuted(hypothesis, question)
        for at, question in enumerate(self._order if among is None else among):
            if not self.ratio(hypothesis, question) <= 1.0:
                if among is None:
                    self._order.insert(at // 2, self._order.pop(at))
                return self._refuted(hypothesis, question)
        return None

    def _refuted(self, hypothesis: Hypothesis, question: Question) -> Question:
        ratio = self.ratio(hypothesis, question)
        self.off[hypothesis.key] = max(self.off.get(hypothesis.key, 0.0), math.inf if math.isnan(ratio) else ratio)
        return question

    def runner_up(self, explained: Sequence[Hypothesis]) -> float:
        """Error / tolerance of the best hypothesis of no more faults that does not explain everything; the specification is one.

        What was refuted by little is held against further calls first, until it is far off.
        """
        own, most = {h.key for h in explained}, max((len(h.faults) for h in explained), default=1)
        best = max((q.off for q in self.failing), default=math.inf)
        for key, off in self.off.items():
            hypothesis = self._tried[key]
            if key in own or len(hypothesis.faults) > most or (len(hypothesis.faults) > 1 and off > best):
                continue
            for question in self._order if explained else ():
                if self.off[key] > min(_FAR, best):
                    break
                self._refuted(hypothesis, question)
            best = min(best, self.off[key])
        return best

    # ---- what may be the matter -------------------------------------------------------------------------------------------------------

    def singles(self) -> list[Hypothesis]:
        return [h for h in self.hypotheses if self.refuting(h) is None]

    def numbers(self) -> list[Hypothesis]:
        return [h for family in self.families for h in self.fits(Hypothesis(), family, self.failing) if self.refuting(h) is None]

    def ask_also(self, asked: Sequence[Question]) -> None:
        """Further calls to hold hypotheses against."""
        self.asked = sorted([*self.asked, *asked], key=lambda q: (not q.failing, q.cost))
        self.failing = [q for q in self.asked if q.failing]
        self._order += asked

    def pairs(self) -> list[Hypothesis]:
        """Two faults, of which one explains some failing call by itself, the other having a number or not; or comes near to that."""
        parts = [part for whole in _varied(self.failing) for part in self._parts(whole)]
        self._left = 3 * PAIRS * _AVERAGE
        alone = [(part, [h for h in self.hypotheses if self._left > 0 and self.ratio(h, part) <= 1.0]) for part in parts]

        def plain(one: Hypothesis, conflict: Question) -> Iterator[Hypothesis | None]:
            return (_together(one, other) for other in self.hypotheses if self.shows(other, conflict))

        def numbered(one: Hypothesis, conflict: Question) -> Iterator[Hypothesis]:
            return (both for family in self.families if self._left > 0 for both in self.fits(one, family, [conflict]))

        def number_alone() -> Iterator[tuple[Question, list[Hypothesis]]]:
            return ((part, [h for f in self.families if self._left > 0 for h in self.fits(Hypothesis(), f, [part])]) for part in parts)

        found = self._extended(alone, plain) or self._extended(alone, numbered) or self._extended(number_alone(), plain)
        found = found or self._extended(self._near(), self._nearest, NEAREST)
        alike = [(parts[0], [part]) for pair in found[:1] for part in pair.parts]  # what else would do for either of the two
        more = [pair for start in alike for pair in self._extended([start], plain)]
        return list({pair.key: pair for pair in (*found, *more)}.values())

    def _parts(self, question: Question) -> list[Question]:
        """A failing call once for every output that fails in it: a fault may have spoilt one of them only."""
        if id(question) not in self._split:
            case, failing = question.case, [name for name, r in question.case.ratios.items() if (r > 1).any()]
            cases = [replace(case, answers={n: case.answers[n]}, ratios={n: case.ratios[n]}) for n in failing]
            parts = [replace(question, case=one, whole=question) for one in cases]
            self._split[id(question)] = parts if len(case.answers) > 1 else [question]
        return self._split[id(question)]

    def _extended(
        self,
        starts: Iterable[tuple[Question, list[Hypothesis]]],
        others: Callable[[Hypothesis, Question], Iterable[Hypothesis | None]],
        most: int = PAIRS,
    ) -> list[Hypothesis]:
        """Pairs of which one explains a part by itself, and the other the cheapest failing part that is left.

        The part that the fewest explain is believed first.
        """
        self._left = most * _AVERAGE
        failing = [part for whole in self.failing for part in self._parts(whole)]
        for _, alone in sorted((s for s in starts if s[1]), key=lambda start: len(start[1])):
            found: dict[tuple[Any, ...], Hypothesis] = {}
            for one in sorted(alone, key=lambda h: -h.prior):
                conflict = next((part for part in failing if not self.ratio(one, part) <= 1.0), None) or self.refuting(one)
                if conflict is None:
                    continue
                for both in self._consistent(others(one, conflict), conflict):
                    if self._needed(one, both, conflict):
                        found[both.key] = both
            if found or self._left <= 0:
                return list(found.values())
        return []

    def _near(self) -> list[tuple[Question, list[Hypothesis]]]:
        """Faults one by one, those first whose answers are nearest to the given ones; none that are hardly nearer than the specification's."""
        calls = _varied(self._cheap)
        self._left = NEAREST * _AVERAGE
        far = _NEARER * self._distance(Hypothesis(), calls)
        ranked = [(self._distance(h, calls), n) for n, h in enumerate(self.hypotheses) if self._left > 0]
        return [(calls[0], [self.hypotheses[n]]) for distance, n in sorted(ranked)[:_NEAR] if distance < far]

    def _nearest(self, one: Hypothesis, conflict: Question) -> list[Hypothesis]:
        """Pairs with one fault that bring its answers nearest to the given ones in calls that it does not explain; each call passes few on."""
        unexplained = (q for q in _varied(self._cheap, len(self._cheap)) if not self.ratio(one, q) <= 1.0)
        calls = dict.fromkeys([conflict.whole or conflict, *itertools.islice(unexplained, _UNEXPLAINED)])
        pairs = [both for other in self.hypotheses for both in [_together(one, other)] if both is not None]
        for question in calls:
            ranked = [(self._bits(both, question), n) for n, both in enumerate(pairs) if self._left > 0]
            pairs = [pairs[n] for _, n in sorted(ranked)[: max(_HELD, len(pairs) // 8)]]
        return pairs

    @property
    def _cheap(self) -> list[Question]:
        """Failing calls in which very many hypotheses can be evaluated, or the cheapest there is."""
        return [q for q in self.failing if q.cost <= 2 * _AVERAGE] or self.failing[:1]

    def _needed(self, one: Hypothesis, both: Hypothesis, conflict: Question) -> bool:
        """Whether a second fault explains what the first one does not, and not a rounding more or less that tips the balance.

        Two hypotheses that round much are hardly ever separated: then the second fault has to bring the answers far nearer.
        """
        return 2 * self._bits(both, conflict) < self._bits(one, conflict) or _separated(self, one, both, conflict)

    def _distance(self, hypothesis: Hypothesis, calls: Sequence[Question]) -> float:
        """By how many bits the answers in some calls are beyond tolerance under the hypothesis, on average."""
        return float(np.mean([self._bits(hypothesis, question) for question in calls]))

    def _bits(self, hypothesis: Hypothesis, question: Question) -> float:
        """The same in one call: the mean over elements and then outputs; beyond the specification's tolerance, since its own costs more."""
        said = self.answers(hypothesis if self.shows(hypothesis, question) else Hypothesis(), question)
        found = []
        for name, allowed in self._allowed(question).items():
            if name in said.outputs:
                got = question.case.answers[name].astype(np.float64)
                off = np.log2(1.0 + ratio(got, said.outputs[name].reshape(got.shape), allowed))
                found.append(np.minimum(off, _FARTHEST).mean())
        return float(np.mean(found)) if found else 0.0

    def _consistent(self, pairs: Iterable[Hypothesis | None], first: Question) -> Iterator[Hypothesis]:
        """Pairs that explain one call, and then all; as many as may still be tried."""
        for both in pairs:
            if self._left <= 0:
                return
            if both is not None and self.refuting(both, [first]) is None and self.refuting(both) is None:
                yield both

    # ---- numbers ----------------------------------------------------------------------------------------------------------------------

    def fits(self, base: Hypothesis, family: mutants.Family, among: Sequence[Question]) -> list[Hypothesis]:
        """The family's faults beside `base` whose number explains the first of these calls in which it shows."""
        question = next((q for q in among if family.needs <= q.shown(base.memory)), None)
        if question is None or mutants.combine(base.changes, family.at(0.5)) is None:
            return []
        if family.values is not None:
            return [h for value in family.values if self.ratio(h := _with_number(base, family, value), question) <= 1.0]
        assert family.bounds is not None
        value = fitted(self._residuals(base, family, [question]), family.bounds, family.logarithmic)
        to = [question]
        while True:
            found = _with_number(base, family, value)
            if not self.ratio(found, question) <= 1.0:
                return []
            refuted = next((q for q in among if q not in to and not self.ratio(found, q) <= 1.0), None)
            if refuted is None or len(to) == _FITTED_TO:
                break
            to.append(refuted)
            value = refitted(self._residuals(base, family, to), value, family.bounds)
        for _, constant in names(value, _shared_sizes(self.asked)):
            exact = _with_number(base, family, constant)
            if all(self.ratio(exact, q) <= max(1.0, self.ratio(found, q)) for q in to):
                return [exact]
        return [found]

    def _residuals(self, base: Hypothesis, family: mutants.Family, to: Sequence[Question]) -> Callable[[float], list[np.ndarray]]:
        weights = [self._allowed(q) for q in to]

        def residuals(value: float) -> list[np.ndarray]:
            hypothesis, found = _with_number(base, family, value), []
            for question, weight in zip(to, weights, strict=True):
                said = self.answers(hypothesis, question)
                for name in weight.keys() & said.outputs.keys():
                    got = question.case.answers[name].astype(np.float64)
                    with np.errstate(invalid="ignore", over="ignore"):
                        off = (got - said.outputs[name].reshape(got.shape)) / weight[name]
                    found.append(np.where(np.isfinite(off), off, np.where(np.isfinite(got), 1e4, 0.0)))
            return found

        return residuals

    def _allowed(self, question: Question) -> dict[str, np.ndarray]:
        """Tolerances under the specification: what residuals are weighed by, since an lse may be a thousand times as exact as the output."""
        if id(question) not in self._weights:
            allowed = self.answers(Hypothesis(), question).tolerance(self.profile, self.alpha)
            self._weights[id(question)] = {n: allowed[n].reshape(x.shape) for n, x in question.case.answers.items() if n in allowed and x.size}
        return self._weights[id(question)]

    # ---- what is said -----------------------------------------------------------------------------------------------------------------

    def explanation(self, group: Sequence[Hypothesis]) -> Explanation:
        """One explanation of hypotheses that cannot be told apart, the likeliest first."""
        first = group[0]
        worst = max(self.ratio(first, q) for q in self.asked)
        own = {f.name for f in first.faults}
        others = {f.name: f for h in group[1:] for f in h.faults if f.name not in own}
        values = {family.field: value for family, value in first.fitted.values()}
        return Explanation(tuple(self._said(first, fault) for fault in first.faults), worst, values, tuple(others.values()))

    def _said(self, hypothesis: Hypothesis, fault: Fault) -> Fault:
        """The fault, with its number and what that is called, where it has one."""
        if fault.name not in hypothesis.fitted:
            return fault
        _, value = hypothesis.fitted[fault.name]
        exact = [name for name, x in names(value, _shared_sizes(self.asked)) if x == value]
        return replace(fault, words=f"{fault.words} The number that explains the answers is {value:.6g}{f' ({exact[0]})' if exact else ''}.")


def _hypotheses(mutant: mutants.Mutant) -> list[Hypothesis]:
    one = Hypothesis((mutant.fault,), mutant.changes, (mutant.needs,), mutant.prior)
    return [replace(one, memory=memory) for memory in MEMORIES] if "earlier call" in mutant.needs else [one]


def _together(one: Hypothesis, other: Hypothesis) -> Hypothesis | None:
    changes = mutants.combine(one.changes, other.changes)
    if changes is None or (one.memory and other.memory and one.memory != other.memory) or one.faults == other.faults:
        return None
    memory, fitted = one.memory or other.memory, {**one.fitted, **other.fitted}
    return Hypothesis((*one.faults, *other.faults), changes, (*one.needs, *other.needs), one.prior * other.prior, memory, fitted, (one, other))


def _with_number(base: Hypothesis, family: mutants.Family, value: float) -> Hypothesis:
    found = {**base.fitted, family.fault.name: (family, float(value))}
    faults, needs = (*base.faults, family.fault), (*base.needs, family.needs)
    return Hypothesis(faults, {**base.changes, **family.at(value)}, needs, base.prior * family.prior, base.memory, found)


def _varied(failing: Sequence[Question], most: int = 5) -> list[Question]:
    """Cheap failing calls that differ in what they were given, the plainest first."""
    plain: dict[tuple[Any, ...], Question] = {}
    for question in sorted(failing, key=lambda q: (len(_features(q.problem)), q.cost)):
        plain.setdefault(_features(question.problem), question)
    return list(plain.values())[:most]


def _plainest(variant: Variant, pool: Iterable[Probe]) -> list[Probe]:
    """Calls that differ in what they are given, those that are given least first, two of each: a fault of tiles needs a long one."""
    drawn: dict[tuple[Any, ...], list[Probe]] = {}
    for probe in pool:
        drawn.setdefault(_features(bind(variant, (), {**probe.operands, **probe.params})), []).append(probe)
    alike = sorted(drawn.items(), key=lambda item: len(item[0]))
    return [probe for _, probes in alike for probe in _thirds(probes)][:_PLAIN]


def _thirds(probes: Sequence[Probe]) -> list[Probe]:
    """One a third and one two thirds of the way from the smallest to the largest."""
    return [probes[n] for n in sorted({len(probes) // 3, 2 * len(probes) // 3})]


def _features(problem: Problem) -> tuple[Any, ...]:
    """What a call was given beyond required operands and defaults, and whether query heads share key-value heads."""
    optional = (o.name for o in problem.variant.operands if o.optional and o.name in problem.given)
    params = (f"{p.name}={problem.params[p.name]!r}" for p in problem.variant.params if problem.params[p.name] != p.default)
    grouped = ("grouped",) if 1 < problem.dims.get("Hkv", 1) < problem.dims.get("Hq", 1) else ()
    return (*optional, *params, *grouped)


def _shared_sizes(asked: Sequence[Question]) -> dict[str, int]:
    """Sizes that are the same in all calls."""
    dims = [q.problem.dims for q in asked]
    return {axis: n for axis, n in (dims[0].items() if dims else ()) if all(d.get(axis) == n for d in dims)}


# ---- telling explanations apart ---------------------------------------------------------------------------------------------------------


def tell_apart(
    search: Search, found: Sequence[Hypothesis], ask: Ask | None, further: Callable[[], Iterable[Probe]], cotangents: Sequence[str]
) -> list[list[Hypothesis]]:
    """The explanations that are left after further calls, in groups that no call at hand can tell apart, the likeliest group first."""
    left = _likeliest_first(found)
    named = {tuple(f.name for f in h.faults): h for h in reversed(left)}  # the likeliest form of each
    if len(named) > 1 and ask is not None:
        asked = 0
        for probe in itertools.islice(further(), LOOKED_AT):
            apart = [h for h in named.values() if h in left]
            if len(apart) < 2 or asked == ASKED:
                break
            problem = bind(search.variant, (), {**probe.operands, **probe.params}, returns=search.asked[0].problem.returns)
            given = {name: x for name, x in probe.cotangents.items() if name in cotangents}
            blank = Question(Case(probe, "declined", problem=problem), problem, {}, given, 0.0)
            if not any(_separated(search, one, other, blank) for one, other in itertools.combinations(apart[:_APART], 2)):
                continue
            asked += 1
            for question in questions([ask(probe)], cotangents):
                search.asked.append(question)
                left = [h for h in left if search.refuting(h, [question]) is None] or left
    groups: list[list[Hypothesis]] = []
    for hypothesis in left:
        own = tuple(f.name for f in hypothesis.faults)
        together = next((g for g in groups if own in (tuple(f.name for f in h.faults) for h in g)), None)
        together = together or next((g for g in groups if not any(_separated(search, g[0], hypothesis, q) for q in search.asked)), None)
        if together is None:
            groups.append([hypothesis])
        else:
            together.append(hypothesis)
    return groups


def _separated(search: Search, one: Hypothesis, other: Hypothesis, question: Question) -> bool:
    """Whether no answer could be right under both, in a call."""
    if not search.shows(one, question) and not search.shows(other, question):
        return False
    a, b = search.answers(one, question), search.answers(other, question)
    names = [n for n in a.outputs.keys() & b.outputs.keys() if n in question.problem.returns or n.startswith("d_")]
    if all(np.array_equal(a.outputs[n], b.outputs[n], equal_nan=True) for n in names):
        return False
    if any(not np.array_equal(np.isfinite(a.outputs[n]), np.isfinite(b.outputs[n])) for n in names):
        return True
    of_a, of_b = a.tolerance(search.profile, search.alpha), b.tolerance(search.profile, search.alpha)
    return any(bool((ratio(a.outputs[n], b.outputs[n], of_a[n] + of_b[n]) > 1).any()) for n in names)


def _likeliest_first(found: Sequence[Hypothesis]) -> list[Hypothesis]:
    return sorted(found, key=lambda h: (len(h.faults), len(h.fitted), -h.prior))


def _confidence(explanations: Sequence[Explanation], told: Sequence[Sequence[Hypothesis]], runner_up: float) -> str:
    if not explanations:
        return "none"
    if len(explanations) > 1:
        return "low"
    return "medium" if told[0][0].fitted or runner_up < _FAR else "high"


# ---- what a pass does not say -------------------------------------------------------------------------------------------------------------


class BlindSpots(Sequence[Fault]):
    """Faults that no call asked could have shown, though it had all they need; worked out when somebody looks, which a test that passes does not."""

    def __init__(self, search: Search) -> None:
        self._search = search

    @functools.cached_property
    def _faults(self) -> tuple[Fault, ...]:
        search, right = self._search, Hypothesis()
        known: dict[int, tuple[mutants.Answers | mutants.StateAnswers, dict[str, np.ndarray]]] = {}
        possible = frozenset(feature for q in search.asked for memory in MEMORIES for feature in q.shown(memory))
        unseen: dict[str, Fault] = {}
        seen: set[str] = set()
        for hypothesis in search.hypotheses:
            fault = hypothesis.faults[0]
            if fault.name in seen or not hypothesis.needs[0] <= possible:
                continue
            for question in search.asked:
                if search.shows(hypothesis, question):
                    if id(question) not in known:
                        said = search.answers(right, question)
                        known[id(question)] = said, said.tolerance(search.profile, search.alpha)
                    said, allowed = known[id(question)]
                    wrong = search.answers(hypothesis, question).outputs
                    names = [n for n in question.case.answers if n in wrong and n in allowed and wrong[n].size]
                    if any(ratio(wrong[n], said.outputs[n], allowed[n]).max() > 2.0 for n in names):  # its own roundings included
                        seen.add(fault.name)
                        break
            else:
                unseen[fault.name] = fault
        return tuple(fault for name, fault in unseen.items() if name not in seen)

    def __len__(self) -> int:
        return len(self._faults)

    @overload
    def __getitem__(self, at: int) -> Fault: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Fault]: ...
    def __getitem__(self, at: int | slice) -> Fault | Sequence[Fault]:
        return self._faults[at]
