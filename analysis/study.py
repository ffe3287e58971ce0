"""Study: records with what is needed to repeat them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftscape.analysis.front import Objective, ObjectiveError, parse_objectives
from peftscape.analysis.measures import Imported, is_cost, measured
from peftscape.spaces.record import Failure, Record


class SourceError(ValueError):
    """A source that cannot be read; the message says what was expected."""


@dataclass(frozen=True, kw_only=True)
class FailedRetest:
    """A retest that gave no score: of which trial, with which seed, why, and after how many seconds of training."""

    of: int
    seed: int
    failure: Failure
    wall_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """Records with what is needed to repeat them.

    `source` is what `load` was given, fit to be shown (no password); `elapsed_s` the time from the first
    trial's start to the last trial's end, pauses included; `ended_s` the seconds from that start to each
    trial's end, by number, where the source knows them; `ablations` the records that were made for the path
    from a textbook design to the best and count nowhere else; `failed_retests` the retests that gave no score;
    `notes` what was odd in the source; `spent` what the search spent and on what, by name
    (`search.account.Account`), over all its sessions: `wall_s` of it is the search's own time, without pauses,
    and by a clock that no change of the date moves; `alone` what some designs were measured to cost alone, by
    the trial's number.
    """

    name: str
    source: str
    records: tuple[Record, ...]
    objectives: tuple[Objective, ...]
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    environment: Mapping[str, Any] = field(default_factory=dict, hash=False)
    elapsed_s: float | None = None
    ended_s: Mapping[int, float] = field(default_factory=dict, hash=False)
    ablations: tuple[Record, ...] = ()
    failed_retests: tuple[FailedRetest, ...] = ()
    notes: tuple[str, ...] = ()
    spent: Mapping[str, float] = field(default_factory=dict, hash=False)
    alone: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def quality(self) -> Objective:
        """The objective that is a metric: the first that is not a cost, else the records' own metric."""
        named = [objective for objective in self.objectives if not is_cost(objective.name)]
        return named[0] if named else default_objectives(self.records)[0]

    @property
    def cost(self) -> Objective:
        """The objective that quality is weighed against: the first that is a cost, else a cost the records have."""
        named = [objective for objective in self.objectives if is_cost(objective.name)]
        return named[0] if named else default_objectives(self.records)[-1]

    @property
    def imported(self) -> bool:
        """Whether the records are other people's runs, whose costs are columns."""
        return any(isinstance(record, Imported) for record in self.records)

    def aimed(self, objectives: Sequence[Objective] | str) -> "Study":
        """The study with other objectives; of imported runs the first that is no cost becomes the quality.

        Raises:
            ObjectiveError: if text does not name objectives, or no record has one of them.
        """
        known = measured(self.records)
        if isinstance(objectives, str):
            objectives = parse_objectives(objectives, metrics=known)
        records = self.records
        metrics = [objective for objective in objectives if not is_cost(objective.name)]
        if self.imported and metrics:
            first = metrics[0]
            if first.name not in known:
                raise ObjectiveError(f'no record has "{first.name}". They have: {", ".join(known)}')
            records = tuple(
                r.aimed(first.name, first.direction) if isinstance(r, Imported) else r for r in self.records
            )
        return dataclasses.replace(self, records=records, objectives=tuple(objectives))

    def _repr_html_(self) -> str:
        """The front as a table, for notebooks."""
        from peftscape.analysis.table import study_html

        return study_html(self)


def default_objectives(records: Sequence[Record]) -> tuple[Objective, ...]:
    """The metric of the records against trained parameters, or the first cost that imported runs have."""
    scored = [record for record in records if record.scores] or list(records)
    metric = (scored[0].metric, scored[0].direction) if scored else ("score", "maximize")
    if not any(isinstance(record, Imported) for record in records):
        return (Objective(*metric), Objective("trainable", "minimize"))
    names = measured(records)
    costs = [name for name in ("trainable", *names) if name in names and is_cost(name)]
    return (Objective(*metric), *(Objective(name, "minimize") for name in costs[:1]))


def several(where: str, errors: Sequence[str]) -> str:
    more = [f"... and {len(errors) - 10} more"] if len(errors) > 10 else []
    return "\n  ".join([f"{where}: {len(errors)} errors", *errors[:10], *more])
