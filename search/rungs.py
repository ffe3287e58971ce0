"""Rungs: which lanes go on, by asynchronous successive halving with several objectives.

Every lane trains to the first rung. There it is compared with the lanes that got there before it, and of `factor`
lanes one goes on to the next rung; the others wait, and may be sent on later, when more lanes have come and show that
they were good after all (ASHA: Li et al. 2018, arXiv:1810.05934, algorithm 2). With several objectives the order is
that of `rung_rules.crowding`, which kept more of the front on recorded curves than the others (docs/stopping.md).

    rungs = Rungs(count=2, factor=3)
    rungs.steps(900)                          # (100, 300): where lanes of 900 steps stop to be compared
    rungs.verdict(7, entries)                 # "go on", "wait" or "stop", for trial 7 that has just been scored
    rungs.next(entries)                       # the waiting trial that may go on now, or None: ask for a fresh one

All of it is a function of the entries alone, whatever their order: a search that was stopped and goes on decides as
an unbroken one. For an Optuna study there is `rung_study.StudyRungs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from peftscape.search.rung_rules import RULES, Rule
from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    from peftscape.search.config import SearchSettings

# In a search so many of a rung's lanes wait: each is files on the disk, and a trial that is read again and again.
WAITING = 32


class Verdict(StrEnum):
    """What becomes of a lane at a rung."""

    GO_ON = "go on"
    WAIT = "wait"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trial as far as it has come.

    Args:
        key: its number; of equals the smaller goes first.
        costs: what is known of it exactly, smaller is better; at least one, none below zero.
        scores: its quality at each rung it has reached, and at last its final one; larger is better.
        error: the standard error of a score (0: not known).
        promoted: how many rungs it was told to go on from.
        protected: runs to the end whatever it scores, and takes no place from the others.
        floor: a baseline, such as training the head alone: it is protected, and what scores below it by more than the
            standard error of their difference never goes on.
        bracket: the first rung at which it is compared; it passes those before. Brackets are compared apart.
        ended: it will not go on: it was stopped, failed or finished. It still counts for the others.

    Raises:
        ValueError: if there is no cost, or one is below zero or not finite.
    """

    key: int
    costs: tuple[float, ...]
    scores: tuple[float, ...] = ()
    error: float = 0.0
    promoted: int = 0
    protected: bool = False
    floor: bool = False
    bracket: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        if not self.costs or not all(0 <= cost < math.inf for cost in self.costs):
            raise ValueError(f"trial {self.key}: expected costs from zero up, found {self.costs}")

    @property
    def safe(self) -> bool:
        """Whether it is never stopped."""
        return self.protected or self.floor

    @property
    def waits(self) -> bool:
        """Whether it was scored and has not been told to go on from there."""
        return len(self.scores) > 0 and self.promoted < len(self.scores) and not self.ended


class Rungs:
    """Asynchronous successive halving.

    Args:
        count: rungs before the end, at the fractions factor^-count, ..., factor^-1 of full training.
        factor: of so many lanes of a rung one goes on.
        rule: in which order lanes go on: `crowding`, `like-cost`, `epsilon-net` or, for comparison, `quality`; or a
            function of (scores, costs, errors) that returns indices, best first.
        brackets: of Hyperband (Li et al. 2016, arXiv:1603.06560): bracket b is first compared at rung b, and each
            gets the same work. One is plain successive halving.
        waiting: of a rung's lanes that do not go on so many wait, the best; the others stop. None: all wait.

    Raises:
        ValueError: if a number is out of range or there is no such rule, with the nearest.
    """

    def __init__(
        self,
        *,
        count: int = 2,
        factor: int = 3,
        rule: str | Rule = "crowding",
        brackets: int = 1,
        waiting: int | None = None,
    ) -> None:
        if count < 1 or factor < 2 or not 1 <= brackets <= count or (waiting is not None and waiting < 0):
            raise ValueError(
                f"expected count >= 1, factor >= 2, 1 <= brackets <= count and waiting >= 0, found count {count}, "
                f"factor {factor}, brackets {brackets}, waiting {waiting}"
            )
        if isinstance(rule, str) and rule not in RULES:
            raise ValueError(f'no rule "{rule}"{nearest(rule, RULES)}')
        self.count, self.factor, self.brackets, self.waiting = count, factor, brackets, waiting
        self._order = RULES[rule] if isinstance(rule, str) else rule

    @property
    def fractions(self) -> tuple[float, ...]:
        """Of full training, the parts at which lanes are compared."""
        return tuple(float(self.factor) ** -i for i in range(self.count, 0, -1))

    def steps(self, total: int) -> tuple[int, ...]:
        """After which steps of `total` lanes are compared.

        Raises:
            ValueError: if the training is too short to have so many rungs.
        """
        found = tuple(math.ceil(total * fraction - 1e-9) for fraction in self.fractions)
        if len({*found, total}) <= self.count:
            raise ValueError(f"{total} steps are too few for {self.count} rungs of factor {self.factor}: {found}")
        return found

    def bracket(self, number: int, *, slow: bool = False) -> int:
        """The bracket of a trial by its number: the one that has had least work so far, were all trials alike.

        Args:
            slow: the trial is known to start slowly (prompts, prefixes): it is never compared at the first rung.
        """
        ends = (*self.fractions, 1.0)
        work = [
            ends[b] + sum((ends[r + 1] - ends[r]) * ends[b] / ends[r] / self.factor for r in range(b, self.count))
            for b in range(self.brackets)
        ]
        spent = [0.0] * self.brackets
        chosen = 0
        for _ in range(number + 1):
            chosen = min(range(self.brackets), key=lambda b: (spent[b] + work[b], b))
            spent[chosen] += work[chosen]
        return max(chosen, 1) if slow and self.count > 1 else chosen

    def decide(self, rung: int, entries: Iterable[Entry]) -> dict[int, Verdict]:
        """The verdict on every trial that has been scored at a rung, the ones to go on first, best first.

        n lanes of a bracket, protected ones not counted, give floor(n / factor) places. Who was told to go on before
        is not called back, so early luck may let a few more go on than there are places, as in ASHA.

        Raises:
            ValueError: if there is no such rung or a key is there twice.
        """
        if not 0 <= rung < self.count:
            raise ValueError(f"expected a rung from 0 to {self.count - 1}, found {rung}")
        here = sorted((e for e in entries if len(e.scores) > rung), key=lambda e: e.key)
        if len({e.key for e in here}) < len(here):
            raise ValueError("a key is there twice")
        floors = [e.scores[rung] for e in here if e.floor and math.isfinite(e.scores[rung])]
        lowest = math.fsum(floors) / len(floors) if floors else -math.inf
        found: dict[int, Verdict] = {}
        for bracket in sorted({e.bracket for e in here}):
            peers = [e for e in here if e.bracket == bracket]
            found |= dict.fromkeys((e.key for e in peers), Verdict.GO_ON) if bracket > rung else {}
            found |= self._compare(peers, rung, lowest) if bracket <= rung else {}
        return dict(sorted(found.items(), key=lambda item: list(Verdict).index(item[1])))

    def _compare(self, peers: Sequence[Entry], rung: int, lowest: float) -> dict[int, Verdict]:
        """The verdicts on one bracket, whose lanes are compared with each other alone."""
        able = [e for e in peers if math.isfinite(e.scores[rung])]
        found = {e.key: Verdict.STOP for e in peers}
        if not able:
            return found
        order = self._order(
            np.array([e.scores[rung] for e in able]),
            np.array([e.costs for e in able], dtype=np.float64),
            np.array([e.error for e in able]),
        )
        ranked = [able[i] for i in order]
        places = sum(not e.safe for e in peers) // self.factor
        # Early on many a good design is no better than the head alone, which learns quickly: the scores' noise decides.
        eligible = [e for e in ranked if not e.safe and e.scores[rung] >= lowest - math.sqrt(2) * e.error]
        last = len(eligible) if self.waiting is None else places + self.waiting
        for i, e in enumerate(eligible[:last]):
            if not e.ended:
                found[e.key] = Verdict.GO_ON if i < places else Verdict.WAIT
        found |= {e.key: Verdict.GO_ON for e in peers if e.safe or e.promoted > rung}
        return {e.key: found[e.key] for e in ranked} | found

    def verdict(self, key: int, entries: Iterable[Entry]) -> Verdict:
        """What becomes of a trial that has just been scored at a rung (its final score ends it).

        Raises:
            KeyError: if no entry has the key, or it has not been scored yet.
        """
        entries = list(entries)
        rung = {e.key: len(e.scores) for e in entries if e.scores}[key] - 1
        return Verdict.STOP if rung >= self.count else self.decide(rung, entries)[key]

    def next(self, entries: Iterable[Entry], *, needed: bool = False) -> int | None:
        """The waiting trial to go on with: of the highest rung that has one, the best. None: ask for a fresh one.

        Args:
            needed: one goes on if any waits, whether or not there is a place for it yet.
        """
        entries = list(entries)
        for rung in reversed(range(self.count)):
            waiting = {e.key for e in entries if e.waits and len(e.scores) == rung + 1}
            verdicts = self.decide(rung, entries) if waiting else {}
            for key, verdict in verdicts.items():
                if key in waiting and (verdict is Verdict.GO_ON or needed):
                    return key
        return None

    def stopped(self, entries: Iterable[Entry]) -> list[int]:
        """The waiting trials that will not go on: others have come that are better, or a baseline above them."""
        entries = list(entries)
        return [
            entry.key
            for rung in range(self.count)
            if (waiting := [e for e in entries if e.waits and len(e.scores) == rung + 1])
            for verdicts in [self.decide(rung, entries)]
            for entry in waiting
            if verdicts[entry.key] is Verdict.STOP
        ]


def rungs_of(settings: SearchSettings, steps: int) -> Rungs | None:
    """The rungs of a search whose full training has so many steps; None where every design is trained to the end.

    Raises:
        ValueError: if the training is too short to have so many rungs.
    """
    if not settings.rungs:
        return None
    rungs = Rungs(
        count=settings.rungs,
        factor=settings.factor,
        rule=settings.rung_rule,
        brackets=settings.brackets,
        waiting=WAITING,
    )
    rungs.steps(steps)
    return rungs


def after(entry: Entry, verdict: Verdict) -> Entry:
    """The entry once its trial was told the verdict."""
    if verdict is Verdict.GO_ON:
        return replace(entry, promoted=len(entry.scores))
    return replace(entry, ended=True) if verdict is Verdict.STOP else entry
