"""Other people's results: HF peft's folder, CSV and flat JSON lines give the fronts that brute force gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftscape.analysis.front import ObjectiveError, front
from peftscape.analysis.report import write_report
from peftscape.analysis.sources import SourceError, load
from peftscape.analysis.table import front_json


def result(name: str, accuracy: float | None, memory: int, **changes: Any) -> dict[str, Any]:
    """A file of the form that peft's method comparison writes."""
    last = {"step": 5000, "train loss": 0.6, "train samples": 20000, "forgetting": 0.1}
    last |= {} if accuracy is None else {"test accuracy": accuracy}
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], "bias": None}
    train = {"accelerator_memory_max": memory, "train_time": 900.5, "file_size": 4 * memory, "status": "success"}
    train |= {"num_trainable_params": memory // 1000, "metrics": [{"step": 250, "valid accuracy": 0.1}, last]}
    info = {"experiment_name": name, "total_time": 1000.0, "error_msg": changes.pop("error_msg", "")}
    info |= {"train_config": {"seed": 0, "optimizer_kwargs": {"lr": 1e-4}}, "peft_config": config}
    return {"run_info": info, "train_info": train | changes, "meta_info": {"dataset_info": {"gsm8k": {}}}}


def folder(path: Path, n: int = 30) -> tuple[Path, np.ndarray]:
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.integers(0, 1320, n) / 1319, rng.integers(10**4, 10**9, n)])
    values[1] = values[0]  # a duplicate
    for i, (accuracy, memory) in enumerate(values):
        (path / f"{i:02}.json").write_text(json.dumps(result(f"lora/run-{i}", float(accuracy), int(memory))))
    return path, values


def members(values: np.ndarray) -> set[int]:
    return {i for i, (a, m) in enumerate(values) if not any(b >= a and k <= m and (b > a or k < m) for b, k in values)}


def test_a_peft_folder_is_read_whole_and_its_front_is_brute_forces(tmp_path: Path) -> None:
    path, values = folder(tmp_path)
    failed = result("lora/broke", None, 5, status="failed", metrics=[], error_msg="CUDA out of memory")
    (path / "99.json").write_text(json.dumps(failed))
    study = load(path).aimed("accuracy:max,peak_bytes:min")
    assert len(study.records) == 31
    assert {int(r.label.split("-")[1]) for r in front(study.records, study.objectives)} == members(values)
    last = study.records[-1]
    assert (last.state, last.failure and last.failure.message) == ("failed", "CUDA out of memory")
    assert {r.n_validation for r in study.records} == {1319}
    data = json.loads(json.dumps(front_json(study, everything=True), allow_nan=False))
    assert len(data["runs"]) == 31
    assert {m["name"] for m in data["members"]} == {f"lora/run-{i}" for i in members(values)}
    assert data["runs"][-1]["on_front"] is False
    assert data["members"][0]["values"].keys() == {"accuracy", "peak_bytes"}
    assert all(0 <= m["front_sensitivity"] <= 1 for m in data["members"])


def test_other_measures_keep_their_names(tmp_path: Path) -> None:
    study = load(folder(tmp_path)[0])
    record = study.aimed("forgetting:min,train_s").records[0]
    assert record.validation == 0.1
    assert set(record.columns) >= {"accuracy", "train_loss", "peak_bytes", "trainable", "train_s", "adapter_bytes"}
    with pytest.raises(ObjectiveError, match='Did you mean "forgetting"'):
        study.aimed("forgeting:min")


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, 3)
    (path / "x.json").write_text("{")
    (path / "y.json").write_text('{"run_info": {}, "train_info": {}}')
    with pytest.raises(SourceError, match=r"2 errors\n.*x\.json.*\n.*y\.json"):
        load(path)


def test_csv_with_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(
        "name,seed,f1,peak_bytes,rank,status,error\n"
        "a,0,0.8,100,r8,ok,\na,1,0.9,100,r8,ok,\nb,0,0.7,50,r4,ok,\nc,0,,70,r4,ok,\nd,0,nan,7,r4,failed,it broke\n"
    )
    study = load(path)
    assert [(r.label, r.state, len(r.scores)) for r in study.records] == [
        ("a", "complete", 2),
        ("b", "complete", 1),
        ("c", "failed", 0),
        ("d", "failed", 0),
    ]
    assert study.records[0].validation == pytest.approx(0.85)
    assert [r.failure.message for r in study.records if r.failure] == ["no f1", "it broke"]
    assert [r.label for r in front(study.records, study.objectives)] == ["b", "a"]
    assert [axis.name for axis in study.objectives] == ["f1", "peak_bytes"]
    assert [r.state for r in study.aimed("peak_bytes,f1:max").records] == ["complete", "complete", "failed", "failed"]


def test_a_report_of_a_cost_that_is_not_parameters(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [f"r{i},{rng.random():.3f},{rng.integers(1, 99)},{rng.integers(9)}" for i in range(30)]
    (tmp_path / "runs.csv").write_text("\n".join(["name,f1,peak_bytes,rank", *rows]) + "\n")
    write_report(load(tmp_path / "runs.csv"), tmp_path / "report.html")
    assert "f1" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,f1,f1\na,1,2\n", "named twice: f1"),
        ("name,f1\na,1,2\n", "line 2 has more cells"),
        ("name,what\na,b\n", "no column of numbers"),
        ("name,f1,seed\na,1,x\n", "seed: expected a whole number, found 'x'"),
        ("", "no header"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(SourceError, match=message):
        load(path)


def test_flat_json_lines_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    rows = [{"name": "a", "accuracy": 0.8, "trainable": 10}, {"name": "b", "accuracy": 0.9, "trainable": 20}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [r.label for r in front(load(path).records, load(path).objectives)] == ["a", "b"]
