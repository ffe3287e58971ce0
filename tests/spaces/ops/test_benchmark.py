"""The kernels' benchmarks run to their end without a GPU, and without what a GPU machine may lack."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftscape.spaces.ops.choose import Call, Choice, by_table, read

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RUN = """
import runpy, sys
for name in ("optuna", "datasets", "plotly"):
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def smoke(script: str, out: Path, *args: str) -> Any:
    """What a script writes when it runs on the CPU to see that it runs."""
    options = ["-W", "error", "-W", "ignore::FutureWarning", "-c", RUN]
    command = [sys.executable, *options, str(BENCHMARKS / script), *args, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_a_smoke_run_times_every_way_and_says_that_it_means_nothing(tmp_path: Path) -> None:
    found = smoke("kernel_times.py", tmp_path / "kernels.json", "--interpret", "--op", "low_rank", "adamw")
    assert found["meaning"] == "a smoke test; times mean nothing"
    ways = {(row["op"], row["how"]) for row in found["rows"]}
    assert ways == {
        *(("low_rank", how) for how in ("torch", "kernel", "torch.compile", "peft")),
        *(("adamw", how) for how in ("torch", "kernel", "peft")),
    }
    for row in found["rows"]:
        assert "failed" not in row, row["failed"]
        assert row["off_torch"] < 1e-5
        assert row["forward_s"] > 0
        assert row["forward_of_copy"] > 0


def test_a_smoke_run_of_a_training_step_does_the_work_that_peft_does(tmp_path: Path) -> None:
    found = smoke("gpu_step.py", tmp_path / "gpu_step.json", "--tiny")
    assert found["meaning"] == "a smoke test; times mean nothing"
    assert len(found["rows"]) == 2
    for row in found["rows"]:
        assert row["seconds"] > 0
        assert row["first_loss_off_peft"] < 1e-5


def test_the_table_that_is_saved_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    save = runpy.run_path(str(BENCHMARKS / "kernel_times.py"), run_name="kernel_times")["save"]
    sizes = {"dtype": "bfloat16", "lanes": 8, "size": 16, "tokens": 512, "width": 4096}
    made = [
        {"op": "low_rank", "how": "torch", "forward_s": 3.0, "backward_s": 1.0},
        {"op": "low_rank", "how": "kernel", "forward_s": 1.0, "backward_s": 1.0},
        {"op": "low_rank", "how": "torch.compile", "forward_s": 0.5, "backward_s": 0.5},  # lanes do not run it
        {"op": "bottleneck", "how": "torch", "forward_s": 1.0, "backward_s": 1.0},
        {"op": "bottleneck", "how": "kernel", "failed": "out of memory"},
        {"op": "adamw", "how": "torch", "forward_s": 9.0},
        {"op": "adamw", "how": "kernel", "forward_s": 2.0},
        {"op": "adamw", "how": "peft", "forward_s": 1.0},
    ]
    path = tmp_path / "new" / "kernels.json"
    save([{**sizes, **row} for row in made], path, "GPU")
    again = [{**sizes, **row} for row in made if row["op"] == "adamw"]
    save(
        [{**row, "forward_s": 1.0} if row["how"] == "kernel" else {**row, "forward_s": 4.0} for row in again],
        path,
        "GPU",
    )
    rows = read(path.read_text(), "a test")
    calls = {op: Call(op, **sizes) for op in ("low_rank", "bottleneck", "adamw")}  # type: ignore[arg-type]
    assert by_table(calls["low_rank"], "GPU", rows) == Choice(True, "measured on GPU: 2.00 times as fast as torch")
    assert by_table(calls["adamw"], "GPU", rows) == Choice(True, "measured on GPU: 4.00 times as fast as torch")
    assert not by_table(calls["bottleneck"], "GPU", rows).kernel
    assert len(rows) == 2
