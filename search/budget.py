"""Budgets: what may still be started so that everything, retests and report included, stays within them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftscape.search.account import Account

if TYPE_CHECKING:
    from peftscape.spaces.record import Costs

# Writing the report and closing the study, until a session has measured it here: 2 to 4 s for a few thousand trials.
REPORT_S = 6.0
# A measured report is followed by a longer one, for there will be more trials; and the study is closed after it.
REPORT_GROWS, CLOSE_S = 1.5, 0.5
# Of each budget, retests may reserve at most this much: the rest finds designs worth retesting.
RETEST_SHARE = 0.45
# Estimates are corrected as lanes run; until then and beyond, this much is kept free.
CAUTION = 1.1


@dataclass
class Budget:
    """What a search may spend. None is no limit.

    Args:
        trials: largest number of designs trained, over all sessions of the study.
        time_s: wall-clock seconds, over all sessions; sessions side by side count once.
        trainable, peak_bytes, adapter_bytes: of one design, as it costs alone; trained parameters with the head.
        device_s, examples: computing and training examples, of all trials and retests of all sessions.
        spent_s: seconds of earlier sessions.
        started: when this session's command was given, on the monotonic clock, which no clock change moves.
        batch: examples of a lane in a step.
        step_limit_s: seconds that a step or an evaluation may take.
        evaluations: of a whole training of a trial: at its end and at its rungs.
        retest_evaluations: how many validation sets a retest's validation and test data are together.
        lane_step_s, lane_evaluation_s: measured seconds a lane takes for a step, and to be evaluated.
        evaluation_steps: how many steps an evaluation is like, until one was measured.
        report_s: what the end takes, measured.
        account: what this session spends.
        others: what other sessions spent and promised: `device_s` and `examples`.
    """

    trials: int | None
    time_s: float | None
    trainable: int | None
    peak_bytes: int | None = None
    adapter_bytes: int | None = None
    device_s: float | None = None
    examples: int | None = None
    spent_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    batch: int = 0
    step_limit_s: float | None = None
    evaluations: int = 1
    retest_evaluations: float = 1.0
    lane_step_s: float | None = None
    lane_evaluation_s: float = 0.0
    evaluation_steps: float = 0.0
    report_s: float = REPORT_S
    account: Account = field(default_factory=Account)
    others: Mapping[str, float] = field(default_factory=dict)
    retesting: bool = False

    # -- time -------------------------------------------------------------------------------------------------------

    def elapsed_s(self) -> float:
        """Seconds spent, earlier sessions included."""
        self.account.wall_s = time.monotonic() - self.started
        return self.spent_s + self.account.wall_s

    def left_s(self) -> float:
        """Seconds left; infinite without a limit."""
        return math.inf if self.time_s is None else self.time_s - self.elapsed_s()

    def over(self) -> bool:
        """Whether only the report still fits, or nothing may be computed any more."""
        return self.left_s() <= self.report_s or self._left("device_s") <= 0

    def patience_s(self) -> float | None:
        """How long a step or an evaluation may take from now."""
        left = self.left_s() - self.report_s
        limits = [s for s in (self.step_limit_s, None if math.isinf(left) else max(1.0, left)) if s is not None]
        return min(limits, default=None)

    # -- what is measured -------------------------------------------------------------------------------------------

    def measured(self, seconds: float, lane_steps: int) -> None:
        """Learn from a step of a cohort: recent steps count most."""
        value = seconds / lane_steps
        self.lane_step_s = value if self.lane_step_s is None else 0.95 * self.lane_step_s + 0.05 * value
        self.account.examples += lane_steps * self.batch
        self.account.device_s += seconds
        if not self.retesting:
            self.account.training_s += seconds

    def evaluated(self, seconds: float, lanes: int) -> None:
        """Learn from an evaluation on the validation data."""
        self.lane_evaluation_s = seconds / lanes
        self.account.evaluation_s += seconds
        self.account.device_s += seconds

    def scored(self, seconds: float, lanes: int) -> None:
        """Learn from scoring retests on the validation and the test data."""
        self.lane_evaluation_s = seconds / lanes / self.retest_evaluations
        self.account.device_s += seconds

    def reported(self, seconds: float) -> None:
        """Learn from a report that was written."""
        self.report_s = REPORT_GROWS * seconds + CLOSE_S

    def hear(self, workers: Mapping[str, Mapping[str, Any]], me: str) -> None:
        """Learn what the other workers spent and promised."""
        self.others = drawn({name: said for name, said in workers.items() if name != me})

    # -- what may start ---------------------------------------------------------------------------------------------

    @property
    def evaluation_s(self) -> float:
        """Expected seconds to evaluate a lane on the validation data."""
        return self.lane_evaluation_s or self.evaluation_steps * (self.lane_step_s or 0.0)

    def lane_s(self, steps: int, *, retest: bool = False) -> float:
        """Expected seconds of a whole lane within a full cohort; zero before anything was measured."""
        evaluations = self.retest_evaluations if retest else self.evaluations
        return (self.lane_step_s or 0.0) * steps + evaluations * self.evaluation_s

    def may_start(
        self, *, begun: int, in_flight_steps: int, in_flight: int, steps: int, retests: int, whole: int
    ) -> bool:
        """Whether one more trial can be trained and what has to follow still fits, of every budget.

        Args:
            begun: trials begun so far, by all workers.
            in_flight_steps, in_flight: steps still to do of this worker's running lanes, and how many they are.
            steps: of a whole trial, of all its seeds.
            retests: lanes of the retest to come.
            whole: steps of each of those.
        """
        if self.trials is not None and begun >= self.trials:
            return False
        return self.fits(
            in_flight_steps=in_flight_steps, in_flight=in_flight, steps=steps, retests=retests, whole=whole
        )

    def fits(self, *, in_flight_steps: int, in_flight: int, steps: int, retests: int, whole: int) -> bool:
        """Whether so many more steps of a trial and what has to follow still fit, of all but the number of trials.

        A trial begins, or goes on from a rung, only if it could be trained to its end; in flight it is owed no more
        than the steps to its next rung.
        """
        running = self.running_s(in_flight_steps, in_flight)
        after = retests * self.lane_s(whole, retest=True)
        for limit, left, end in (
            (self.time_s, self.left_s(), self.report_s),
            (self.device_s, self._left("device_s"), 0.0),
        ):
            if limit is not None:
                reserve = min(after, RETEST_SHARE * limit)
                if left <= CAUTION * (running + self.lane_s(steps) + reserve) + end:
                    return False
        if self.examples is None:
            return True
        reserve = min(retests * whole * self.batch, RETEST_SHARE * self.examples)
        return self._left("examples") >= (in_flight_steps + steps) * self.batch + reserve

    def running_s(self, in_flight_steps: int, in_flight: int) -> float:
        """Expected seconds until what is in flight has ended."""
        return (self.lane_step_s or 0.0) * in_flight_steps + in_flight * self.evaluation_s

    def promise(self, steps: int, lanes: int) -> None:
        """Keep what is in flight will still spend, where other workers see it."""
        self.account.promised_examples = steps * self.batch
        self.account.promised_s = self.running_s(steps, lanes)

    def cannot_finish(self, in_flight_steps: int, in_flight: int) -> bool:
        """Whether what is in flight will not end in time together."""
        left = min(self.left_s() - self.report_s, self._left("device_s"))
        return self.lane_step_s is not None and left < CAUTION * self.running_s(in_flight_steps, in_flight)

    def may_train(self, in_flight_steps: int, in_flight: int, steps: int) -> bool:
        """Whether one more lane of a retest ends before the report has to be written."""
        evaluation_s = self.retest_evaluations * self.evaluation_s
        running = (self.lane_step_s or 0.0) * in_flight_steps + in_flight * evaluation_s
        needed = CAUTION * (running + self.lane_s(steps, retest=True))
        if self.left_s() <= needed + self.report_s or self._left("device_s") <= needed:
            return False
        return self._left("examples") >= (in_flight_steps + steps) * self.batch

    def retests_that_fit(self, steps: int) -> float:
        """How many lanes can still be trained before the report."""
        fit = self._left("examples") / max(steps * self.batch, 1)
        seconds = min(self.left_s() - self.report_s, self._left("device_s"))
        if self.lane_step_s and not math.isinf(seconds):
            fit = min(fit, seconds / (CAUTION * self.lane_s(steps, retest=True)))
        return max(0.0, fit)

    def part_left(self, share: float) -> tuple[float, float]:
        """Such a share of the seconds and of the training examples that are left; infinite without a limit."""
        seconds = min(self.left_s() - self.report_s, self._left("device_s"))
        return share * max(0.0, seconds), share * max(0.0, self._left("examples"))

    def over_limits(self, costs: Costs) -> list[str]:
        """What a design costs beyond what one may, a line each."""
        words = {"trainable": "trained parameters", "peak_bytes": "bytes at the peak of training"}
        words["adapter_bytes"] = "bytes of the saved adapter"
        return [
            f"{getattr(costs, name):,} {what} are over the limit of {limit:,}"
            for name, what in words.items()
            if (limit := getattr(self, name)) is not None and getattr(costs, name) > limit
        ]

    def _left(self, name: str) -> float:
        """Of a budget that all workers draw on."""
        limit = getattr(self, name)
        if limit is None:
            return math.inf
        return float(limit - getattr(self.account, name) - self.others.get(name, 0.0))


def drawn(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What workers spent, with what is still to come of those at work."""
    found = {"device_s": 0.0, "examples": 0.0}
    for said in workers.values():
        promised = not said.get("ended")
        found["device_s"] += said.get("device_s", 0.0) + promised * said.get("promised_s", 0.0)
        found["examples"] += said.get("examples", 0) + promised * said.get("promised_examples", 0)
    return found


def parse_duration(text: str) -> float:
    """Seconds of `"90s"`, `"30m"`, `"2h"` or `"1h30m"`. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    if len(text) > 40 or not found or not any(found.groups()):
        raise ValueError(f'"{text[:40]}" is not a time like "90s", "30m", "2h" or "1h30m"')
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(value: int | str) -> int:
    """Bytes of a number, `"500kB"`, `"4GB"` or `"1.5 GiB"`. Raises ValueError."""
    if isinstance(value, int):
        return value
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*([kmg]?i?b)?", value.strip().lower())
    if not found or (found[2] or "") not in _BYTES:
        raise ValueError(f'"{value[:40]}" is not a size like 500000, "500kB", "4GB" or "1.5GiB"')
    return int(float(found[1]) * _BYTES[found[2] or ""])


def parameter_limit(value: int | str | None, backbone: int) -> int | None:
    """An absolute number of trained parameters from a number or from `"2%"` of the backbone's."""
    if isinstance(value, str):
        return int(float(value.strip().removesuffix("%")) / 100 * backbone)
    return value
