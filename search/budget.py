"""Budgets: what may still be started so that everything, retests and report included, ends in time."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field

# Writing the report and closing the study; measured at 2 to 4 s for a few thousand trials.
REPORT_S = 6.0
# Of the whole time, retests may reserve at most this much: the rest finds designs worth retesting.
RETEST_SHARE = 0.45
# Estimates are corrected as lanes run; until then and beyond, this much is kept free.
CAUTION = 1.1


@dataclass
class Budget:
    """What a search may spend.

    Args:
        trials: largest number of designs trained, over all sessions of the study; None is no limit.
        time_s: wall-clock seconds, over all sessions; None is no limit.
        trainable: largest number of trained parameters of a design, head included; None is no limit.
        spent_s: seconds of earlier sessions.
        started: when this session began, on the monotonic clock, which no clock change moves.
        retest_evaluations: how many validation sets a retest's validation and test data are together.
        lane_step_s, lane_evaluation_s: measured seconds a lane takes for a step, and to be evaluated.
    """

    trials: int | None
    time_s: float | None
    trainable: int | None
    spent_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    retest_evaluations: float = 1.0
    lane_step_s: float | None = None
    lane_evaluation_s: float = 0.0

    def elapsed_s(self) -> float:
        """Seconds spent, earlier sessions included."""
        return self.spent_s + time.monotonic() - self.started

    def left_s(self) -> float:
        """Seconds left; infinite without a limit."""
        return math.inf if self.time_s is None else self.time_s - self.elapsed_s()

    def over(self) -> bool:
        """Whether only the report still fits."""
        return self.left_s() <= REPORT_S

    def measured(self, seconds: float, lane_steps: int) -> None:
        """Learn from a step of a cohort: recent steps count most."""
        value = seconds / lane_steps
        self.lane_step_s = value if self.lane_step_s is None else 0.95 * self.lane_step_s + 0.05 * value

    def lane_s(self, steps: int, *, retest: bool = False) -> float:
        """Expected seconds of a whole lane within a full cohort; zero before anything was measured."""
        evaluations = self.retest_evaluations if retest else 1.0
        return (self.lane_step_s or 0.0) * steps + evaluations * self.lane_evaluation_s

    def may_start(self, *, begun: int, in_flight_steps: int, in_flight: int, steps: int, retests: int) -> bool:
        """Whether one more lane can be trained and what has to follow still fits.

        Args:
            begun: trials begun so far.
            in_flight_steps, in_flight: steps still to do of running lanes, and how many they are.
            steps: of a whole lane.
            retests: lanes of the retest to come.
        """
        if self.trials is not None and begun >= self.trials:
            return False
        if self.time_s is None:
            return True
        reserve = min(retests * self.lane_s(steps, retest=True), RETEST_SHARE * self.time_s)
        running = (self.lane_step_s or 0.0) * in_flight_steps + in_flight * self.lane_evaluation_s
        return self.left_s() > CAUTION * (running + self.lane_s(steps) + reserve) + REPORT_S

    def may_train(self, in_flight_steps: int, in_flight: int, steps: int) -> bool:
        """Whether one more lane of a retest ends before the report has to be written."""
        evaluation_s = self.retest_evaluations * self.lane_evaluation_s
        running = (self.lane_step_s or 0.0) * in_flight_steps + in_flight * evaluation_s
        return self.left_s() > CAUTION * (running + self.lane_s(steps, retest=True)) + REPORT_S

    def retests_that_fit(self, steps: int) -> float:
        """How many lanes can still be trained before the report."""
        if self.time_s is None or not self.lane_step_s:
            return math.inf
        return max(0.0, (self.left_s() - REPORT_S) / (CAUTION * self.lane_s(steps, retest=True)))


def parse_duration(text: str) -> float:
    """Seconds of `"90s"`, `"30m"`, `"2h"` or `"1h30m"`. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    if not found or not any(found.groups()):
        raise ValueError(f'"{text}" is not a time like "90s", "30m", "2h" or "1h30m"')
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def parameter_limit(value: int | str | None, backbone: int) -> int | None:
    """An absolute number of trained parameters from a number or from `"2%"` of the backbone's."""
    if isinstance(value, str):
        return int(float(value.strip().removesuffix("%")) / 100 * backbone)
    return value
