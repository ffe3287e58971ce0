"""A trial in flight, and the record it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.spaces.record import Costs, Failure, Record, Rung, Score, State

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
        stops: after which steps its lanes are scored: at the rungs, and last at the end.
        rungs: what it scored at the rungs that it has passed, the mean over its seeds.
        safe: whether it runs to its end whatever it scores.
        scores: of its seeds at the present stop.
    """

    trial: Any
    design: Design
    costs: Costs
    textbook: str | None
    tries: int = 1
    stops: tuple[int, ...] = ()
    rungs: list[float] = field(default_factory=list)
    safe: bool = False
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
        """Whether it has failed, or all seeds have ended and are scored."""
        return self.failed or all(lane.done and lane.seed in self.scores for lane in self.lanes)

    @property
    def failed(self) -> bool:
        """Whether one of its seeds has: then the others say nothing either."""
        return any(lane.failure for lane in self.lanes)

    @property
    def until(self) -> int:
        """The step at which its lanes are scored next."""
        return self.stops[len(self.rungs)]

    @property
    def open(self) -> list[Lane]:
        """The lanes that train until then."""
        return [lane for lane in self.lanes if not self.failed and not lane.done and lane.step < self.until]

    @property
    def owed(self) -> int:
        """Steps that its lanes will train without being asked."""
        end = self.stops[-1] if self.safe else self.until
        return sum(end - lane.step for lane in self.open)

    @property
    def unscored(self) -> list[Lane]:
        """The lanes that have come to the next stop and were not scored there yet."""
        here = [lane for lane in self.lanes if not self.failed and lane.step >= self.until]
        return [lane for lane in here if lane.seed not in self.scores]

    @property
    def at_rung(self) -> bool:
        """Whether all its lanes have come to a rung that is not the end."""
        return not self.open and self.until < self.stops[-1] and not self.failed

    def pass_rung(self) -> None:
        """Its seeds were scored at a rung: the next stop is the one after it."""
        self.rungs.append(float(np.mean([self.scores[lane.seed] for lane in self.lanes])))
        self.scores.clear()

    @property
    def wall_s(self) -> float:
        """Seconds of training, beside neighbours."""
        return sum(lane.wall_s for lane in self.lanes)

    def record(self, session: Session, failure: Failure | None = None, *, state: State | None = None) -> Record:
        """What the trial gave so far: `failed` with a failure and `complete` without, unless the state is told."""
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
            n_validation=len(session.data.validation),
            scores=tuple(
                Score(seed=lane.seed, validation=self.scores[lane.seed], wall_s=lane.wall_s)
                for lane in (self.lanes if state == "complete" else [])
            ),
            costs=self.costs,
            curve=_curve(self.lanes, session.config.search.batch_size),
            wall_s=self.wall_s,
            failure=failure,
            rungs=tuple(
                Rung(examples=step * session.config.search.batch_size, validation=score)
                for step, score in zip(self.stops, self.rungs, strict=False)
            ),
            kernels=tuple(sorted({name for lane in self.lanes for name in lane.kernels})),
        )


def _curve(lanes: list[Lane], batch: int) -> tuple[tuple[int, float], ...]:
    """The training loss of the first seed, averaged over blocks of steps: (examples seen, loss)."""
    losses = lanes[0].losses if lanes else []
    blocks = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses)) or 1)
    return tuple((int(b[-1] + 1) * batch, float(np.mean([losses[i] for i in b]))) for b in blocks if len(b))
