"""A study resumed with something changed is refused, with the difference; a fork knows the old results."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from searches import SPACE, complete, make_base, tiny, trials
from typer.testing import CliRunner

from peftscape.analysis.sources import SourceError
from peftscape.analysis.sources import load as load_study
from peftscape.cli import app
from peftscape.search import identity
from peftscape.search.cohort import Cohort
from peftscape.search.config import SearchConfig
from peftscape.search.study import run_search
from peftscape.spaces.record import SCHEMA, Record, RecordError
from peftscape.spaces.words import InputError

FIXTURES = Path(__file__).parent / "records"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data of its own, in `base`, and a search of them in `run`."""
    folder = tmp_path_factory.mktemp("changed")
    make_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))
        run_search(of(folder), folder / "run", quiet=True)
    return folder


def of(folder: Path, **more: Any) -> SearchConfig:
    return tiny(folder / "base", **{"budget": {"trials": 4}, **more})


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, to be changed; its model is found where it was, and nothing may train."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def refused(config: SearchConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    before = trials(out)

    def fail(*_: Any) -> None:
        raise AssertionError("it trained")

    with monkeypatch.context() as patch:
        patch.setattr(Cohort, "step", fail)
        with pytest.raises(InputError) as error:
            run_search(config, out, more_trials=2, quiet=True)
    assert trials(out) == before
    assert "--fork" in str(error.value)
    return str(error.value)


def test_another_space(finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**SPACE, "training": {"lr": {"log": [1e-4, 1e-2]}}}
    said = refused(of(finished, space=other), copy / "run", monkeypatch)
    assert "space.training.lr.log: was [0.001, 0.01], is [0.0001, 0.01]" in said


def test_other_data_under_the_same_name(finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = finished / "base" / "task.csv"
    whole = file.read_text()
    lines = whole.splitlines()
    try:
        file.write_text("\n".join([lines[0], f"other {lines[1]}", *lines[2:]]) + "\n")
        assert "data: texts or labels are others" in refused(of(finished), copy / "run", monkeypatch)
        file.write_text("\n".join(lines[:-30]) + "\n")
        assert "data.rows: was " in refused(of(finished), copy / "run", monkeypatch)
    finally:
        file.write_text(whole)


def test_other_weights_under_the_same_name(finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = finished / "base" / "model.safetensors"
    whole = file.read_bytes()
    try:
        make_base(copy / "other", seed=1)
        file.write_bytes((copy / "other" / "model.safetensors").read_bytes())
        assert "model: the weights are others" in refused(of(finished), copy / "run", monkeypatch)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("library", "version", "line"),
    [("torch", "9.0.0", "torch: was "), ("optuna", "1.2", "optuna: was "), ("peftscape", "0.9", "peftscape: was ")],
)
def test_another_major_version(
    finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, library: str, version: str, line: str
) -> None:
    there = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: {**there, library: version})
    assert line in refused(of(finished), copy / "run", monkeypatch)


def test_another_minor_version_goes_on(finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = identity.versions()
    minor = ".".join([there["torch"].split(".")[0], "999", "0"])
    monkeypatch.setattr(identity, "versions", lambda: {**there, "torch": minor})
    run_search(of(finished), copy / "run", more_trials=1, quiet=True)
    assert len(complete(copy / "run")) == 5


def test_a_fork_knows_the_old_results_and_shows_its_own(finished: Path, tmp_path: Path) -> None:
    config = of(finished, search={"batch_size": 4, "sampler": "tpe"})
    study = run_search(config, tmp_path, fork=finished / "run", quiet=True)
    old = complete(finished / "run")
    found = trials(tmp_path)
    known = [trial["known"]["trial"] for trial in found.values() if "known" in trial]
    assert sorted(known) == sorted(old)
    assert len(study.records) == 4
    assert {r.state for r in study.records} == {"complete"}
    assert not {r.number for r in study.records} & {n for n, trial in found.items() if "known" in trial}
    front = {int(path.name) for path in (finished / "run" / "adapters").iterdir()}
    tried = {r.digest for r in study.records}
    assert {old[number]["digest"] for number in front} <= tried, "the old front is measured anew"
    assert all(curve[0][0] == 4 for curve in (r.curve for r in study.records)), "in the new study's own terms"


def test_the_command_forks_beside_the_old_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from peftscape.search import study

    calls = []

    def run_search(config: SearchConfig, out: Path, **more: Any) -> Any:
        calls.append((out, more["fork"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_search", run_search)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.db").touch()
    (tmp_path / "run-2").mkdir()
    (tmp_path / "x.toml").write_text('[task]\nname = "trec6"\n')
    result = CliRunner().invoke(app, ["search", "x.toml", "--out", "run", "--fork"])
    assert result.exit_code == 130
    assert calls == [(Path("run-3"), Path("run"))]


# -- versions of records


def test_records_of_every_release_load(tmp_path: Path) -> None:
    """One file of JSON lines a version of the schema; they are never written anew."""
    files = sorted(FIXTURES.glob("*.jsonl"))
    assert {f"schema-{n}.jsonl" for n in range(1, SCHEMA + 1)} == {path.name for path in files}
    for path in files:
        study = load_study(path)
        assert len(study.records) >= 3
        assert {r.state for r in study.records} >= {"complete", "failed", "pruned"}
        for line in path.read_text().splitlines():
            again = Record.from_json(json.loads(line))
            assert Record.from_json(json.loads(json.dumps(again.to_json()))) == again


def test_records_of_a_newer_version_are_refused_clearly(finished: Path) -> None:
    record = load_study(finished / "run").records[0]
    newer = {**record.to_json(), "schema": SCHEMA + 1, "something": "new"}
    with pytest.raises(RecordError, match=f"schema {SCHEMA + 1} is newer than this peftscape reads"):
        Record.from_json(newer)


def test_a_study_with_newer_records_is_refused_clearly(
    finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    record = dataclasses.replace(load_study(copy / "run").records[0], number=4)
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{copy / 'run' / 'study.db'}")
    trial = study.ask()
    trial.set_user_attr("record", {**record.to_json(), "schema": SCHEMA + 1})
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    with pytest.raises(SourceError, match="newer than this peftscape"):
        load_study(copy / "run")
