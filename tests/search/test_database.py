"""A trial is asked for and told in one transaction each: one wait for the disk, and never half a trial."""

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


def test_a_trial_is_asked_for_in_one_commit_and_others_see_it_whole(
    storage: Storage, space: Space, tmp_path: Path
) -> None:
    made = commits(storage)
    trial, design = storage.ask(space, "me")
    assert len(made) == 1
    [seen] = optuna.load_study(study_name="search", storage=RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")).trials
    assert (seen.number, seen.params, seen.user_attrs) == (0, trial.params, {"worker": "me", "tries": 1})
    assert space.suggest(optuna.trial.FixedTrial(seen.params)).digest == design.digest
    trial, _ = storage.ask(space, "me")
    assert (trial.number, len(made)) == (1, 2)


def test_a_trial_whose_asking_fails_was_never_there(
    storage: Storage, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    suggested: list[float] = []

    def broken(self: Space, trial: optuna.Trial) -> Any:
        suggested.append(trial.suggest_float("x", 0, 1))
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(Space, "suggest", broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            storage.ask(space)
    assert suggested
    with storage._database.engine.connect() as connection:
        rows = connection.execute(sqlalchemy.text("SELECT count(*) FROM trials")).scalar()
    assert rows == 0
