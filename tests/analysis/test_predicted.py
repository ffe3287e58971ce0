"""Predicted against measured costs in reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from peftscape.analysis.forms import markdown
from peftscape.analysis.front import parse_objectives
from peftscape.analysis.predicted import predicted_rows, search_rate
from peftscape.analysis.report import write_report
from peftscape.analysis.sources import Study
from peftscape.spaces.record import Costs, Record, Score

COSTS = Costs(
    adapter=90, head=10, trainable=100, train_flops=2000, infer_flops=500, peak_bytes=110 * 10**6, adapter_bytes=4096
)


def study(**alone: Any) -> Study:
    records = tuple(
        Record(
            number=n, state="complete", design={"placements": []}, digest=str(n), label=f"design <{n}>",
            metric="accuracy", direction="maximize", n_validation=100, scores=(Score(seed=0, validation=0.5 + n / 10),),
            costs=COSTS, curve=((640, 1.0),),
        )
        for n in range(2)
    )  # fmt: skip
    objectives = parse_objectives("accuracy:max,trainable:min")
    spent = {"training_s": 128.0, "wall_s": 200.0, "sessions": 1}
    return Study(name="s", source="runs/s", records=records, objectives=objectives, spent=spent, alone=alone)


MEASURED = {"trainable": 100, "adapter_bytes": None, "peak_bytes": 100 * 10**6, "step_s": 2.0, "batch": 32}


def test_rows_hold_what_was_told_and_seen() -> None:
    rows = predicted_rows(study(**{"1": MEASURED}))
    assert [row[0] for row in rows] == ["#1 design <1>"] * 3  # a file that was not there has no row
    assert [row[1:] for row in rows] == [
        ("Trained parameters", "100", "100", "+0.0%"),
        ("Peak memory of a step", "110 MB", "100 MB", "+10.0%"),
        # 2 x 640 texts x 2,000 FLOPs in 128 s is 20,000 a second; a step is 32 x 2,000.
        ("Seconds a step", "3.2 s", "2 s", "+60.0%"),
    ]


def test_the_rate_counts_all_seeds_and_leaves_out_what_failed() -> None:
    found = dataclasses.replace(study(), config={"search": {"seeds": 3}})
    assert search_rate(found) == 3 * search_rate(study())
    failed = dataclasses.replace(found.records[0], state="failed", scores=())
    assert search_rate(dataclasses.replace(found, records=(failed, found.records[1]))) == search_rate(found) / 2


@pytest.mark.parametrize("odd", [{}, {"9": MEASURED}, {"1": None}, {"1": {"peak_bytes": "many", "step_s": 0}}])
def test_a_study_without_measurements_has_no_rows(odd: dict[str, Any]) -> None:
    assert predicted_rows(study(**odd)) == []


def test_reports_show_them(tmp_path: Path) -> None:
    whole = study(**{"1": MEASURED})
    page = write_report(whole, tmp_path / "report.html").read_text()
    assert "Predicted and measured" in page
    assert "#1 design &lt;1&gt;" in page
    assert "+60.0%" in page
    assert "| +60.0% |" in markdown(whole)
    assert "Predicted and measured" not in write_report(study(), tmp_path / "other.html").read_text()
