"""The kernels' benchmark runs to its end without a GPU, and without what a GPU machine may lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kernels.py"
RUN = """
import runpy, sys
for name in ("optuna", "datasets", "plotly"):
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_smoke_run_times_every_way_and_says_that_it_means_nothing(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    args = [str(SCRIPT), "--interpret", "--op", "bottleneck", "adamw", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["meaning"] == "a smoke test; times mean nothing"
    ways = {(row["op"], row["how"]) for row in found["rows"]}
    assert ways == {
        *(("bottleneck", how) for how in ("torch", "kernel", "torch.compile", "loop over lanes")),
        *(("adamw", how) for how in ("torch", "kernel", "peft")),
    }
    for row in found["rows"]:
        assert "failed" not in row
        assert row["off_torch"] < 1e-5
        assert row["forward_s"] > 0
        assert row["forward_of_copy"] > 0
