"""Studies are read whole: records, retests, what has no record, and what is odd."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import synthetic

from peftscape.analysis.front import Objective
from peftscape.analysis.sources import SourceError, from_optuna, load
from peftscape.spaces.record import SCHEMA


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def test_a_run_folder_its_file_and_its_url_are_one_study(tmp_path: Path) -> None:
    made = synthetic.records(12)
    synthetic.store(made, url(tmp_path), retested=(0, 1), seeds=3)
    folder, file, address = load(tmp_path), load(tmp_path / "study.db"), load(url(tmp_path))
    assert folder.records == file.records == address.records
    assert [dataclasses.replace(r, retests=()) for r in folder.records] == made
    assert [len(r.retests) for r in folder.records[:3]] == [3, 3, 0]
    assert folder.records[0].retests[0].n_test == 500
    assert folder.config == synthetic.CONFIG
    assert folder.environment["processors"] == 2
    assert folder.objectives == (Objective("accuracy", "maximize"), Objective("trainable", "minimize"))
    assert folder.name == "demo"


def test_trials_without_a_record_are_listed_and_waiting_ones_are_not() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_user_attr("objectives", "macro_f1:max,peak_bytes:min")
    study.enqueue_trial({})
    study.ask()  # takes the one that waits; runs
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    study.tell(study.ask(), [0.5, 1.0])
    study.enqueue_trial({})
    records = from_optuna(study).records
    assert [(r.number, r.state) for r in records] == [(0, "running"), (1, "failed"), (2, "failed")]
    assert records[2].failure is not None
    assert "no record" in records[2].failure.kind
    assert records[0].metric == "macro_f1"


def test_retests_that_cannot_be_used_are_said() -> None:
    study, retests = synthetic.store(synthetic.records(3), optuna.storages.InMemoryStorage(), retested=(0,), seeds=2)
    assert retests is not None
    for attrs in (
        {"of": 99, "seed": 1, "validation": 0.5},
        {"of": 0, "seed": 3, "validation": float("nan")},
        {"of": 0, "seed": 1, "validation": 0.5},
        {"of": 0},
    ):
        retests.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={"retest": attrs}))
    retests.ask()
    loaded = from_optuna(study, retests)
    assert len(loaded.records[0].retests) == 2
    text = " ".join(loaded.notes)
    for part in (
        "trial 99",
        "seed 3 gave no finite",
        "twice with seed 1",
        "lacks its seed",
        "1 retests are running",
    ):
        assert part in text


def test_json_lines(tmp_path: Path) -> None:
    made = synthetic.records(5)
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in made))
    assert load(path).records == tuple(made)
    path.write_text(json.dumps(made[0].to_json()) + '\n{"number": 1}\n[1\n')
    with pytest.raises(SourceError, match=r"2 errors\n.*line 2: record 1: .*missing.*\n.*line 3"):
        load(path)


def test_a_record_of_a_newer_peftscape_is_refused_by_trial() -> None:
    study, _ = synthetic.store(synthetic.records(2), optuna.storages.InMemoryStorage())
    data = {**synthetic.record(2).to_json(), "schema": SCHEMA + 1}
    study.add_trial(optuna.trial.create_trial(values=[0, 0], user_attrs={"record": data}))
    with pytest.raises(SourceError, match=rf"trial 2: .*schema {SCHEMA + 1} is newer"):
        from_optuna(study)


def test_several_studies_need_a_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthetic.store(synthetic.records(2), url(tmp_path), name=name)
    with pytest.raises(SourceError, match="or which: URL#NAME; it holds a, b"):
        load(tmp_path)
    assert load(f"{url(tmp_path)}#b").name == "b"
    assert load(tmp_path, name="b").name == "b"
    with pytest.raises(SourceError, match='no study "c"'):
        load(tmp_path, name="c")


def test_what_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none.jsonl", url(tmp_path)):
        with pytest.raises(SourceError, match=r"not there|no such file"):
            load(source)
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_not_shown() -> None:
    from peftscape.analysis.sources import _masked

    assert _masked("postgresql://me:s3cret@host/db") == "postgresql://me:***@host/db"
    assert _masked("sqlite:///runs/demo/study.db") == "sqlite:///runs/demo/study.db"


def test_imports_are_quick_and_one_way() -> None:
    heavy = "('torch', 'optuna', 'plotly', 'sklearn', 'scipy', 'jinja2', 'rich', 'peftscape.search')"
    load = "import sys; from peftscape.analysis import front, noise, sources, table, report"
    code = f"{load}; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
