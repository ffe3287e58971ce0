"""Truncated and bit-flipped files: told by name, the one before used where there is one, never loaded in silence."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from searches import complete, tiny

from peftscape.analysis.sources import SourceError
from peftscape.analysis.sources import load as load_study
from peftscape.search.checkpoint import Checkpoints
from peftscape.search.export import load
from peftscape.search.lane import Lane, new_lane
from peftscape.search.session import Session, open_session
from peftscape.search.storage import Storage
from peftscape.search.study import run_search
from peftscape.spaces.design import Design
from peftscape.spaces.record import SCHEMA
from peftscape.spaces.seal import SEAL, seal
from peftscape.spaces.words import InputError

FLIPS = 24


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))
        run_search(tiny(base, budget={"trials": 4}), out, quiet=True)
    return out


def flipped(raw: bytes, number: int, seed: int = 0) -> bytes:
    """With one bit turned over, elsewhere for each number."""
    place = int(np.random.default_rng((seed, number)).integers(len(raw) * 8))
    changed = bytearray(raw)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


# -- adapters


@pytest.mark.parametrize("name", ["adapter.safetensors", "design.json"])
def test_a_damaged_adapter_is_refused_by_name(finished: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(next((finished / "adapters").iterdir()), tmp_path / "7")
    file, whole = folder / name, (folder / name).read_bytes()
    model = load(folder).backbone
    for raw in [flipped(whole, i) for i in range(FLIPS)] + [whole[:n] for n in (0, 7, len(whole) // 2, len(whole) - 1)]:
        file.write_bytes(raw)
        if name == "design.json" and _same_meaning(raw, whole):
            continue
        with pytest.raises(InputError) as error:
            load(folder, model=model)
        assert str(folder) in str(error.value)


def _same_meaning(raw: bytes, whole: bytes) -> bool:
    """Whether only blanks were hit, or the checksum's own name, which is then one that nobody reads."""
    try:
        one, other = json.loads(raw), json.loads(whole)
    except ValueError:
        return False
    return all(one.get(key) == other[key] for key in other if key != "card_sha256")


# -- checkpoints


@pytest.fixture(scope="module")
def session(base: Path) -> Session:
    return open_session(tiny(base))


def lane(session: Session) -> Lane:
    design = Design.from_json({"placements": [{"method": "lora", "rank": 2}]})
    return new_lane(design, seed=1, steps=10, backbone=session.backbone, head=session.head)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(session: Session, tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    trained, cohort = lane(session), session.cohort()
    cohort.admit(trained)
    for step in range(6):
        if step in (2, 4):
            checkpoints.save(trained)
        cohort.step()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 4, "two of each"
    newest = [path for path in files if "previous" not in path.name and (".4." in path.name or path.suffix == ".json")]
    assert len(newest) == 2
    for path in newest:
        whole = files[path]
        for raw in [flipped(whole, i) for i in range(FLIPS)] + [whole[:n] for n in (0, 7, len(whole) // 2)]:
            path.write_bytes(raw)
            said.clear()
            found = lane(session)
            assert checkpoints.restore(found)
            assert found.step == 2, "the one before"
            assert len(said) == 1
            assert path.name in said[0]
        path.write_bytes(whole)
    for path in files:
        path.write_bytes(flipped(files[path], 1))
    found = lane(session)
    assert not checkpoints.restore(found), "nothing whole is left: the lane begins anew"
    assert (found.step, len(found.losses)) == (0, 0)


def test_a_checkpoint_of_another_training_is_not_used(session: Session, tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    trained, cohort = lane(session), session.cohort()
    cohort.admit(trained)
    cohort.step()
    checkpoints.save(trained)
    other = Design.from_json({"placements": [{"method": "lora", "rank": 4}]})
    wide = new_lane(other, seed=1, steps=10, backbone=session.backbone, head=session.head)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace(trained.design.digest, wide.design.digest)))
    assert not checkpoints.restore(wide)
    assert said


# -- studies


def test_a_damaged_study_is_named_and_the_copy_is_used(base: Path, finished: Path, tmp_path: Path) -> None:
    whole, records = (finished / "study.db").read_bytes(), complete(finished)
    for i in range(FLIPS):
        out = shutil.copytree(finished, tmp_path / str(i))
        (out / "study.db").write_bytes(flipped(whole, i) if i % 4 else whole[: i * len(whole) // FLIPS])
        said: list[str] = []
        storage = Storage(out, tiny(base), say=said.append)
        assert [r.to_json() for r in storage.records] == list(records.values())
        storage.close()
        assert len(said) == 1
        assert str(out / "study.db") in said[0]
        assert (out / "study.db.damaged").is_file()


def test_a_damaged_study_without_a_copy_is_refused_by_name(base: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    file = out / "study.db"
    file.write_bytes(flipped(file.read_bytes(), 3))
    (out / "study.db.previous").unlink()
    with pytest.raises(InputError, match="damaged") as error:
        Storage(out, tiny(base))
    assert str(file) in str(error.value)
    (out / "study.db").write_bytes(b"not a database at all")
    with pytest.raises(InputError, match="not an SQLite file"):
        Storage(out, tiny(base))


@pytest.mark.parametrize("edit", ["score", "value", "parameter"])
def test_a_record_that_was_changed_behind_its_seal_is_found(
    base: Path, finished: Path, tmp_path: Path, edit: str
) -> None:
    """What SQLite takes for valid: a number in a record, a told value, or a parameter is another."""
    out = shutil.copytree(finished, tmp_path / "run")
    with closing(sqlite3.connect(out / "study.db")) as database:
        if edit == "score":
            [(id_, text)] = database.execute(
                "SELECT trial_user_attribute_id, value_json FROM trial_user_attributes WHERE key = 'record' LIMIT 1"
            ).fetchall()
            value: dict[str, Any] = json.loads(text)
            value["scores"][0]["validation"] = 1.0
            database.execute(
                "UPDATE trial_user_attributes SET value_json = ? WHERE trial_user_attribute_id = ?",
                (json.dumps(value), id_),
            )
        elif edit == "value":
            database.execute("UPDATE trial_values SET value = 1.0 WHERE trial_value_id = 1")
        else:
            database.execute("UPDATE trial_params SET param_value = param_value * 1.001 WHERE param_name LIKE '%lr'")
        database.commit()
    with pytest.raises(SourceError, match="seal"):
        load_study(out)
    said: list[str] = []
    storage = Storage(out, tiny(base), say=said.append)
    assert len(said) == 1
    assert "seal" in said[0]
    assert [r.to_json() for r in storage.records] == list(complete(finished).values()), "those of the copy"
    storage.close()


def test_the_record_of_a_newer_version_is_no_damage(base: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    trial = optuna.load_study(study_name="tiny", storage=f"sqlite:///{out / 'study.db'}").trials[0]
    with closing(sqlite3.connect(out / "study.db")) as database:
        record = trial.user_attrs["record"] | {"schema": SCHEMA + 1, "colour": "red"}
        for key, value in {"record": record, SEAL: seal(record, trial.values, trial.params)}.items():
            database.execute(
                "UPDATE trial_user_attributes SET value_json = ? WHERE key = ? AND trial_id = ?",
                (json.dumps(value), key, trial._trial_id),
            )
        database.commit()
    before = (out / "study.db").read_bytes()
    with pytest.raises(InputError, match="is newer than this peftscape reads"):
        Storage(out, tiny(base))
    assert (out / "study.db").read_bytes() == before
    assert not (out / "study.db.damaged").exists()


def test_an_interrupted_write_is_undone_and_no_damage(base: Path, finished: Path, tmp_path: Path) -> None:
    """Optuna's tools may write too: what they left is no damage."""
    out = shutil.copytree(finished, tmp_path / "run")
    import optuna

    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{out / 'study.db'}")
    study.set_user_attr("note", "mine")
    said: list[str] = []
    storage = Storage(out, tiny(base), say=said.append)
    assert said == []
    assert storage.attr("note") == "mine"
    storage.close()
