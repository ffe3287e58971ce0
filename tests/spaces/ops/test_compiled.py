"""Every kernel compiles for sm_80 and sm_90, on machines without a GPU too, and keeps to the registers of a thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: Bytes a thread may spill: a few loop counters, not accumulators.
SPILLED = 64
KERNELS = {
    "shrink", "expand", "outer", "forward", "backward_input", "backward_weights", "backward_queries", "backward_keys",
    "backward_prefix", "_squares", "_factors", "_update",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was compiled, in processes that do not interpret kernels: one a kind of GPU, side by side."""
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [
        subprocess.Popen([sys.executable, str(script), "--arch", arch], env=environment, **pipes)
        for arch in ("80", "90")
    ]
    found = []
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, err
        assert "Warning" not in err, err
        found += [json.loads(line) for line in out.splitlines()]
    return found


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles(rows: list[dict[str, Any]], arch: int) -> None:
    assert {row["kernel"] for row in rows if row["arch"] == arch} == KERNELS
    assert all(row["cubin_bytes"] > 0 for row in rows)


def test_no_kernel_spills_its_sums(rows: list[dict[str, Any]]) -> None:
    assert not [row for row in rows if row["spill_stores"] > SPILLED or row["spill_loads"] > SPILLED]
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_two_blocks_fit_in_the_shared_memory_of_an_sm(rows: list[dict[str, Any]]) -> None:
    """164 KiB on an A100 (228 on an H100): one waits for memory while the other computes."""
    assert not [row for row in rows if 2 * (row["shared_bytes"] + 1024) > 164 * 1024]


def test_states_are_loaded_16_bytes_at_a_time(rows: list[dict[str, Any]]) -> None:
    narrow = {"_squares", "_factors", "_update"}  # a lane's own tensors may start anywhere
    assert not [row for row in rows if row["kernel"] not in narrow and not row["wide_loads"]]
