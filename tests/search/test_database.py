"""A trial's parameters are written in one transaction: one wait for the disk, and never half a design."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage

from peftscape.search.config import SearchConfig, TaskConfig
from peftscape.search.storage import Storage
from peftscape.spaces.sites import SiteMap, site_map
from peftscape.spaces.space import Space
from peftscape.spaces.space_file import read_space

SITES: SiteMap = site_map({"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                           "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64})  # fmt: skip


@pytest.fixture
def space() -> Space:
    return read_space("unified", SITES)


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    opened = Storage(tmp_path, SearchConfig(task=TaskConfig(name="trec6")))
    yield opened
    opened.close()


def commits(storage: Storage) -> list[Any]:
    found: list[Any] = []
    sqlalchemy.event.listen(storage._database.engine, "commit", found.append)
    return found


def test_asking_waits_for_the_disk_a_few_times_however_many_knobs_there_are(
    storage: Storage, space: Space, tmp_path: Path
) -> None:
    made = commits(storage)
    for number in range(3):
        trial, design = storage.ask(space, "me")
        seen = optuna.load_study(study_name="search", storage=RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")).trials
        assert (trial.number, len(seen)) == (number, number + 1)
        assert seen[-1].params == trial.params
        assert seen[-1].user_attrs == {"worker": "me", "tries": 1}
        assert space.suggest(optuna.trial.FixedTrial(seen[-1].params)).digest == design.digest
    assert len(made) < 3 * 10 < 3 * len(trial.params)


def test_a_design_whose_asking_fails_is_not_there_in_part(
    storage: Storage, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    suggested: list[float] = []

    def broken(self: Space, trial: optuna.Trial) -> Any:
        suggested.append(trial.suggest_float("x", 0, 1))
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(Space, "suggest", broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            storage.ask(space, "me")
    assert suggested
    storage.refresh()
    [trial] = storage.trials
    assert (trial.params, trial.user_attrs) == ({}, {"worker": "me", "tries": 1})
    assert storage.ask(space, "me")[0].number == 1
