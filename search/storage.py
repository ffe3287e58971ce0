"""A run's folder: the Optuna storage, which is the one truth, and beside it adapters and the report.

Trials carry their record as a user attribute, written before `tell`; retests are trials of a second study,
`NAME.retest`, in the same storage. Any Optuna tool works on both.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.analysis import sources
from peftscape.analysis.front import Objective, parse_objectives
from peftscape.spaces.record import Record
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.config import SearchConfig
    from peftscape.spaces.design import Design
    from peftscape.spaces.space import Space


class Storage:
    """The studies of one run.

    Args:
        out: the run's folder; made if it is not there.
        config: of the search; one that differs from the folder's own is refused (its budget may differ).

    Raises:
        InputError: if the folder holds another search, with the differences.
    """

    def __init__(self, out: Path, config: SearchConfig) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.config = out, config
        self.objectives: tuple[Objective, ...] = parse_objectives(config.search.objectives)
        url = f"sqlite:///{(out / 'study.db').resolve()}"
        self._study = optuna.create_study(
            study_name=config.name,
            storage=url,
            directions=[o.direction for o in self.objectives],
            load_if_exists=True,
        )
        self._retests = optuna.create_study(
            study_name=f"{config.name}{sources.RETEST}",
            storage=url,
            direction=self.objectives[0].direction,
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([o.name for o in self.objectives])
        known = self.attr("config")
        if known is None:
            self.set_attr("config", _plain(config))
            self.set_attr("objectives", config.search.objectives)
        elif differences := list(_differences(_without_budget(known), _without_budget(_plain(config)))):
            raise InputError(str(out), [*differences, "this folder holds another search; use another --out"])
        self._records: dict[int, Record] = {r.number: r for r in self.study().records if r.state != "running"}

    # -- trials -----------------------------------------------------------------------------------------------------

    def ask(self, space: Space) -> tuple[Any, Design]:
        """The next trial and its design, from a sampler made for its number."""
        from peftscape.search.samplers import sampler

        search = self.config.search
        self._study.sampler = sampler(search.sampler, search.seed, len(self._study.get_trials(deepcopy=False)))
        trial = self._study.ask()
        return trial, space.suggest(trial)

    def enqueue(self, params: Mapping[str, Any], textbook: str | None = None) -> None:
        """Ask for a design before the sampler's own."""
        attrs = {"textbook": textbook} if textbook else None
        self._study.enqueue_trial(dict(params), user_attrs=attrs, skip_if_exists=True)

    def tell(self, trial: Any, record: Record) -> None:
        """Write the record, then its values; what failed or was never trained is told as pruned.

        TPE asks again for what it was told had failed; it leaves pruned trials of several objectives alone.
        """
        from optuna.trial import TrialState

        trial.set_user_attr("record", record.to_json())
        if record.state == "complete":
            self._study.tell(trial, [o.value(record) for o in self.objectives])
        else:
            self._study.tell(trial, state=TrialState.PRUNED)
        self._records[record.number] = record

    def release(self) -> int:
        """Trials that an earlier session left running are asked for again, before all others; how many there were.

        They keep their numbers, and so the trials after them theirs: a search that was interrupted asks its sampler
        what an unbroken one does.
        """
        from optuna.trial import TrialState

        left = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in left:  # `ask` takes what waits, in order; a trial that has its parameters gives them again
            self._study._storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)
        for trial in self._retests.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._retests.tell(trial.number, state=TrialState.FAIL)
        return len(left)

    @property
    def records(self) -> list[Record]:
        """Of all trials that ended."""
        return list(self._records.values())

    def trained(self) -> int:
        """How many trials were trained, to whatever end; without refused designs and interrupted attempts."""
        return sum(r.costs is not None and (r.state != "pruned" or bool(r.curve)) for r in self.records)

    # -- retests ----------------------------------------------------------------------------------------------------

    def retested(self) -> set[tuple[int, int]]:
        """(trial, seed) of all retests there are."""
        rows = [t.user_attrs["retest"] for t in self._retests.get_trials(deepcopy=False) if "retest" in t.user_attrs]
        return {(row["of"], row["seed"]) for row in rows}

    def add_retest(self, value: float, row: Mapping[str, Any]) -> None:
        """Keep a retest's score."""
        trial = self._retests.ask()
        trial.set_user_attr("retest", dict(row))
        self._retests.tell(trial, value)

    # -- the run ----------------------------------------------------------------------------------------------------

    def attr(self, name: str, default: Any = None) -> Any:
        return self._study.user_attrs.get(name, default)

    def set_attr(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, value)

    def study(self) -> sources.Study:
        """Everything there is, as analysis reads it."""
        return sources.from_optuna(self._study, self._retests, source=str(self.out))

    def adapter_folder(self, number: int) -> Path:
        """Where the adapter of a trial lies."""
        return self.out / "adapters" / str(number)


def _plain(config: SearchConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _without_budget(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "budget"}


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{at}.{k}" if at else k)]
    return [] if old == new else [f"{at}: was {old!r}, is {new!r}"]
