"""Bad and hostile input: told plainly and soon, bounded in memory, nothing written outside the output folder."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_bytes
from searches import tiny
from typer.testing import CliRunner

from peftscape.cli import app
from peftscape.cli_common import plain_cell
from peftscape.search.backbone import Backbone
from peftscape.search.config import TaskConfig
from peftscape.search.config_file import read_config
from peftscape.search.export import load
from peftscape.search.folders import prune, replacing
from peftscape.search.session import open_session
from peftscape.search.study import run_search
from peftscape.search.tables import LINE_BYTES, TaskError, read_file
from peftscape.search.task import load_task
from peftscape.search.tensor_file import HEADER_BYTES, header_errors, read_tensors_file
from peftscape.spaces.words import InputError


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))
        patch.setenv("HF_TOKEN", "hf_secretsecretsecret")
        patch.setenv("MY_PASSWORD", "correct-horse-battery")
        run_search(tiny(base, budget={"trials": 2}), out, quiet=True)
    return out


def growth() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(folder: Path, toml: str) -> str:
    """What `check` says of a configuration; it has to be soon."""
    (folder / "search.toml").write_text(toml, encoding="utf-8")
    started = time.monotonic()
    result = CliRunner().invoke(app, ["check", str(folder / "search.toml")])
    assert time.monotonic() - started < 10
    assert result.exit_code == 2, result.output
    return result.stderr


# -- configurations


def test_all_errors_of_a_configuration_at_once(tmp_path: Path) -> None:
    said = check(
        tmp_path,
        """
        name = "../../etc/cron.d/x"
        space = "unifide"
        sped = 3
        [model]
        head = "clas"
        max_length = 0
        [task]
        name = "trec7"
        [search]
        lanes = "many"
        batch_size = -1
        step_limit = "soon"
        [budget]
        trials = 2.5
        examples = 0
        device_time = "1 fortnight"
        peak_bytes = "4 elephants"
        adapter_bytes = -5
        trainable = "150 percent"
        """,
    )
    for words in (
        '"../../etc/cron.d/x" cannot name a study', 'no preset "unifide"', "sped: no such key", "model.head",
        "max_length", 'no embedded task "trec7"', "search.lanes: a whole number was expected", "search.batch_size",
        "search.step_limit", "budget.trials", "budget.examples", "budget.device_time", "budget.peak_bytes",
        "budget.adapter_bytes", "budget.trainable",
    ):  # fmt: skip
        assert words in said, said


def test_keys_given_twice(tmp_path: Path) -> None:
    assert '"lanes" is given twice' in check(tmp_path, '[task]\nname = "trec6"\n[search]\nlanes = 1\nlanes = 2\n')
    path = tmp_path / "design.json"
    path.write_text('{"placements": [{"method": "lora"}], "placements": []}')
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert '"placements" is given twice' in result.stderr


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/etc/passwd", "<script>alert(1)</script>", "x" * 600, "", "a\nb", "a\0b"]
)
def test_names_that_could_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a study") as error:
        read_config({"name": name, "task": {"name": "trec6"}})
    assert len(str(error.value)) < 300


def test_bombs_in_toml_and_json_are_bounded(tmp_path: Path, finished: Path) -> None:
    before = growth()
    assert "deep" in check(tmp_path, f'[task]\nname = "trec6"\n[space]\nx = {"[" * 50_000}{"]" * 50_000}\n')
    assert "larger than" in check(tmp_path, "a = 1\n" + "#" * 3_000_000)
    path = tmp_path / "design.json"
    for raw, words in (("[" * 200_000, "not JSON"), ("[" + "1," * 20_000_000 + "1]", "larger than")):
        path.write_text(raw)
        result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert words in result.stderr
    folder = shutil.copytree(next((finished / "adapters").iterdir()), tmp_path / "adapter")
    for raw in ("[" * 200_000, " " * 20_000_000, '{"schema": 1, "schema": 2}'):
        (folder / "design.json").write_text(raw)
        with pytest.raises(InputError):
            load(folder)
    assert growth() - before < 500 * 2**20


# -- data


def errors_of(path: Path, **more: Any) -> str:
    started = time.monotonic()
    with pytest.raises(TaskError) as error:
        load_task(TaskConfig(path=str(path), **more))
    assert time.monotonic() - started < 10
    return str(error.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"text,label\n", "no rows"),
        (b"text,label\n" + b"x,a\n" * 50, 'have the label "a"'),
        (b"txt,label\nx,a\ny,b\n" * 20, 'no column "text"'),
        (b"text,label\n" + b"caf\xe9,a\nd\xc3\xa9j\xc3\xa0,b\n" * 20, "line 2: not UTF-8"),
        (b"text,label\n" + b"x,a\n,b\n" * 20, 'have no "text"'),
        (b"\x80\x04\x95canary", "not UTF-8"),
    ],
    ids=["empty", "headers", "one class", "columns", "encodings", "cells", "pickle"],
)
def test_data_that_cannot_be_learnt(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(raw)
    assert words in errors_of(path)


def test_labels_that_training_never_saw(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(40)))
    (tmp_path / "test.csv").write_text("text,label\nx,a\ny,c\nz,d\n")
    said = errors_of(tmp_path, train="train.csv", test="test.csv")
    assert '"c" (1 rows), "d" (1 rows)' in said


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.tsv"])
def test_a_line_of_100_megabytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("w") as file:
        file.write({"csv": "text,label\n", "tsv": "text\tlabel\n"}.get(name.rpartition(".")[2], ""))
        for _ in range(100):
            file.write("x" * 2**20)
    before, started = growth(), time.monotonic()
    with pytest.raises(TaskError, match=f"longer than {LINE_BYTES:,} bytes") as error:
        read_file(str(path))
    assert "line " in str(error.value)
    assert time.monotonic() - started < 5
    assert growth() - before < 64 * 2**20


def test_a_text_longer_than_the_models_positions_is_cut_and_counted(base: Path, tmp_path: Path) -> None:
    rows = (base / "task.csv").read_text().splitlines()
    long = [f"{'the ' * 500}{row}" for row in rows[1:4]]
    (tmp_path / "task.csv").write_text("\n".join([rows[0], *long, *rows[4:]]) + "\n")
    of = tiny(base, task=TaskConfig(path=str(tmp_path / "task.csv"), validation_size=20, test_size=30))
    session = open_session(of)
    data = session.data
    assert data.train.cut + data.validation.cut + data.test.cut == 3
    assert max(data.train.lengths.max(), data.test.lengths.max()) <= session.backbone.sites.max_positions
    of = tiny(base, task=of.task, budget={"trials": 1}, search={"retest_seeds": 0})
    run_search(of, tmp_path / "run", quiet=True)
    import optuna

    attrs = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}").user_attrs
    assert sum(attrs["cut"].values()) == 3


def test_ten_thousand_classes(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    path.write_text("text,label\n" + "".join(f"the {i},c{i % 10_000}\n" for i in range(40_000)))
    started = time.monotonic()
    of = tiny(
        base, task=TaskConfig(path=str(path), validation_size=200, test_size=200), search={"examples": 16},
        budget={"trials": 1},
    )  # fmt: skip
    session = open_session(of)
    assert session.task.num_outputs == 10_000
    cohort = session.cohort()
    from peftscape.search.lane import new_lane
    from peftscape.spaces.design import Design

    design = Design.from_json({"placements": [{"method": "lora", "rank": 2}]})
    cohort.admit(new_lane(design, seed=0, steps=2, backbone=session.backbone, head=session.head))
    assert np.isfinite(cohort.step()).all()
    assert time.monotonic() - started < 60


# -- pickles and safetensors


class Canary:
    """Written where a pickle of it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_pickles_are_never_loaded(base: Path, finished: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    raw = pickle.dumps(Canary(canary))
    model = shutil.copytree(base, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(InputError):
        Backbone.load(model)
    folder = shutil.copytree(next((finished / "adapters").iterdir()), tmp_path / "adapter")
    for name in ("adapter.safetensors", "design.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(raw)
        with pytest.raises(InputError):
            load(folder)
        (folder / name).write_bytes(whole)
    (folder / "adapter_model.bin").write_bytes(raw)
    load(folder)
    for name in ("data.csv", "data.jsonl", "data.parquet"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(TaskError):
            load_task(TaskConfig(path=str(tmp_path / name)))
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "study.db").write_bytes(raw)
    (run / "study.db.previous").write_bytes(raw)
    with pytest.raises(InputError):
        run_search(tiny(base, budget={"trials": 3}), run, quiet=True)
    assert not canary.exists()


def packed(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "header is longer than the file"),
        ((2**62).to_bytes(8, "little") + b"{}", "header is longer than the file"),
        (packed(b" " * (HEADER_BYTES + 1)), "at most"),
        (packed(b"[" * 100_000), "not JSON"),
        (packed([1]), "not an object"),
        (packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "overlaps"),
        (packed({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)), "gap"),
        (packed({"a": entry([2], 0, 8)}, bytes(4)), "not as long as the header says"),
        (packed({"a": entry([2**40], 0, 8)}, bytes(8)), "do not fit"),
        (packed({"a": entry([-1, -2], 0, 8)}, bytes(8)), "do not fit"),
        (packed({"a": entry([2], 0, 8, dtype="OBJ")}, bytes(8)), "do not fit"),
        (packed({"a": {"shape": [2]}}, bytes(8)), "do not fit"),
    ],
)  # fmt: skip
def test_safetensors_that_lie_are_refused_before_they_are_loaded(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(raw)
    before = growth()
    [error] = header_errors(path, len(raw))
    assert words in error
    import hashlib

    with pytest.raises(InputError, match=words) as told:
        read_tensors_file(path, size=len(raw), sha256=hashlib.sha256(raw).hexdigest(), described="design.json")
    assert str(path) in str(told.value)
    assert growth() - before < 64 * 2**20


def test_safetensors_with_other_shapes_are_a_named_error(finished: Path, tmp_path: Path) -> None:
    import hashlib

    folder = shutil.copytree(next((finished / "adapters").iterdir()), tmp_path / "adapter")
    value = json.loads((folder / "design.json").read_text())
    raw = to_bytes({"0/q/x/A": torch.zeros(3, 3), "head/weight": torch.zeros(2, 2)})
    (folder / "adapter.safetensors").write_bytes(raw)
    value["tensors"] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    value.pop("card_sha256")
    (folder / "design.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"head/weight: 2 x 2, 3 x 32 was expected"):
        load(folder)


def test_what_a_real_writer_writes_is_taken(tmp_path: Path) -> None:
    raw = to_bytes({"a": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(0, 5)})
    (tmp_path / "x").write_bytes(raw)
    assert header_errors(tmp_path / "x", len(raw)) == []


# -- files


def test_links_are_neither_written_through_nor_emptied(base: Path, finished: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "3").symlink_to(outside)
    (adapters / "notes").mkdir()
    (adapters / "notes" / "mine").touch()
    prune(adapters, set())
    assert (outside / "precious").read_text() == "mine"
    assert (adapters / "notes" / "mine").exists()
    with pytest.raises(InputError, match="a link"), replacing(adapters / "3", ("x",), last="x"):
        pass
    (tmp_path / "linked").symlink_to(outside)
    prune(tmp_path / "linked", set())
    assert sorted(path.name for path in outside.iterdir()) == ["precious"]
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "adapters")
    (run / "adapters").symlink_to(outside)
    with pytest.raises(InputError, match="a link"):
        run_search(tiny(base, budget={"trials": 2}), run, more_trials=3, quiet=True)
    assert sorted(path.name for path in outside.iterdir()) == ["precious"]


def test_a_checkpoint_that_names_a_file_elsewhere_is_not_read(base: Path, tmp_path: Path) -> None:
    from peftscape.search import checkpoint
    from peftscape.search.lane import new_lane
    from peftscape.spaces.design import Design

    session = open_session(tiny(base))
    design = Design.from_json({"placements": [{"method": "lora", "rank": 2}]})
    lane = new_lane(design, seed=1, steps=10, backbone=session.backbone, head=session.head)
    cohort = session.cohort()
    cohort.admit(lane)
    cohort.step()
    said: list[str] = []
    checkpoints = checkpoint.Checkpoints(tmp_path, said.append)
    checkpoints.save(lane)
    [card] = tmp_path.glob("*.json")
    value = json.loads(card.read_text())
    value["file"] = "../../etc/passwd"
    del value["card_sha256"]
    card.write_text(json.dumps({**value, "card_sha256": checkpoint._digest(value)}))
    fresh = new_lane(design, seed=1, steps=10, backbone=session.backbone, head=session.head)
    assert not checkpoints.restore(fresh)
    assert "a file elsewhere" in said[0]


@pytest.mark.parametrize("cell", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "  =1"])
def test_formulas_in_csv_are_text(cell: str) -> None:
    assert plain_cell(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["who is it", "a=b", -0.5, 3, "", None, "1 - 2"])
def test_other_cells_are_left_alone(cell: Any) -> None:
    assert plain_cell(cell) == cell


def test_no_variable_or_token_is_in_what_is_written(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert len(files) > 4
    for path in files:
        raw = path.read_bytes()
        for secret in (b"hf_secret", b"correct-horse", b"MY_PASSWORD", b"HF_TOKEN", os.uname().nodename.encode()):
            assert secret not in raw, path
