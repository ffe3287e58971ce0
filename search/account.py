"""What a session of a study spent, and on what; kept in the study, where the report and other workers read it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Account:
    """What one session spent so far. Seconds are of the monotonic clock, which no change of the date moves.

    Args:
        joined_s: what the study had spent when this session began: sessions side by side count once.
        wall_s: since the command.
        loading_s, training_s, evaluation_s, retest_s, waiting_s, report_s: parts of it; retests have their own
            training and evaluation in them, waiting is for other workers.
        lost_s: training that gave no score: of lanes that failed or were given up, in trials and retests; part of
            neither `training_s` nor `retest_s`.
        unsaved_s: training of lanes in flight since they were last saved; lost if the session is killed.
        device_s: computing, for trials and retests.
        examples, promised_examples: trained on, and still to be by what is in flight.
        promised_s: device seconds still to be spent by what is in flight.
    """

    joined_s: float = 0.0
    wall_s: float = 0.0
    loading_s: float = 0.0
    training_s: float = 0.0
    evaluation_s: float = 0.0
    retest_s: float = 0.0
    waiting_s: float = 0.0
    report_s: float = 0.0
    lost_s: float = 0.0
    unsaved_s: float = 0.0
    device_s: float = 0.0
    examples: int = 0
    promised_examples: int = 0
    promised_s: float = 0.0

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Count the time of a block as spent on `what`."""
        started = time.monotonic()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + time.monotonic() - started)

    def lose(self, seconds: float, of: str = "training_s") -> None:
        """Training that gave nothing, and what it was counted as."""
        self.lost_s += seconds
        setattr(self, of, max(0.0, getattr(self, of) - seconds))

    def json(self) -> dict[str, Any]:
        return asdict(self)
