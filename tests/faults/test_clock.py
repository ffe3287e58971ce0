"""A system clock that jumps: leases and budgets go by the monotonic clock alone."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
from searches import complete, tiny

import peftscape.search
from peftscape.search.cohort import Cohort
from peftscape.search.study import run_search


@pytest.mark.parametrize("hours", [1, -1])
def test_a_search_does_not_notice_that_the_clock_jumps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    step, real, jumped = Cohort.step, time.time, []

    def jump(self: Cohort) -> list[float]:
        jumped.append(1)
        return step(self)

    monkeypatch.setattr(Cohort, "step", jump)
    monkeypatch.setattr(time, "time", lambda: real() + (3600 * hours if len(jumped) > 3 else 0))
    started = time.monotonic()
    study = run_search(tiny(base, budget={"trials": 8, "time": "10m"}), tmp_path, quiet=True)
    took = time.monotonic() - started
    assert len(jumped) > 3
    assert len(complete(tmp_path)) == 8, "no time was lost"
    assert {r.state for r in study.records} == {"complete"}
    assert 0 < study.spent["wall_s"] <= took + 0.5
    assert all(0 <= seconds <= took for name, seconds in study.spent.items() if name.endswith("_s"))


def test_nothing_in_a_search_asks_for_the_time_of_day() -> None:
    """`time.time` and `datetime.now` are for people: no budget, lease or measurement may use them."""
    files = sorted(Path(next(iter(peftscape.search.__path__))).rglob("*.py"))
    assert len(files) > 20
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("now", "utcnow", "today", "gmtime", "localtime"), f"{path}: {node.lineno}"
                is_time = (
                    isinstance(node.value, ast.Name) and node.value.id == "time" and node.attr in ("time", "time_ns")
                )
                assert not is_time, f"{path}, line {node.lineno}"
