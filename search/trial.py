"""A trial in flight, and the record it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.spaces.record import Costs, Failure, Record, Score, State

if TYPE_CHECKING:
    from peftscape.search.lane import Lane
    from peftscape.search.session import Session
    from peftscape.spaces.design import Design

CURVE_POINTS = 20


@dataclass
class Trial:
    """A design that was asked for; a lane for each seed, and their validation scores as they come in.

    Args:
        trial: Optuna's.
        tries: the how-manieth try this is. What ended its process twice is tried a third time alone.
    """

    trial: Any
    design: Design
    costs: Costs
    textbook: str | None
    tries: int = 1
    lanes: list[Lane] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return int(self.trial.number)

    @property
    def suspect(self) -> bool:
        """Whether two processes have ended with it in flight."""
        return self.tries > 2

    @property
    def alone(self) -> bool:
        """Whether its lanes train beside no others."""
        return self.design.solo or self.suspect

    @property
    def done(self) -> bool:
        """Whether all seeds have ended, and those that ended well are scored."""
        return all(lane.failure or (lane.done and lane.seed in self.scores) for lane in self.lanes)

    @property
    def wall_s(self) -> float:
        """Seconds of training, beside neighbours."""
        return sum(lane.wall_s for lane in self.lanes)

    def record(self, session: Session, failure: Failure | None = None, *, state: State | None = None) -> Record:
        """What the trial gave: `failed` with a failure and `complete` without, unless the state is told."""
        metric = session.task.metric
        failure = failure or next((lane.failure for lane in self.lanes if lane.failure), None)
        state = state or ("failed" if failure else "complete")
        return Record(
            number=self.number,
            state=state,
            design=self.design.json(),
            digest=self.design.digest,
            label=self.design.label,
            textbook=self.textbook,
            metric=metric.name,
            direction=metric.direction,
            n_validation=len(session.task.validation),
            scores=tuple(
                Score(seed=lane.seed, validation=self.scores[lane.seed], wall_s=lane.wall_s)
                for lane in (self.lanes if state == "complete" else [])
            ),
            costs=self.costs,
            curve=_curve(self.lanes, session.config.search.batch_size),
            wall_s=self.wall_s,
            failure=failure,
        )


def _curve(lanes: list[Lane], batch: int) -> tuple[tuple[int, float], ...]:
    """The training loss of the first seed, averaged over blocks of steps: (examples seen, loss)."""
    losses = lanes[0].losses if lanes else []
    blocks = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses)) or 1)
    return tuple((int(b[-1] + 1) * batch, float(np.mean([losses[i] for i in b]))) for b in blocks if len(b))
