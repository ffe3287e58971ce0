"""The designs between a textbook design and the best are trained once; retests keep what each example gave."""

from __future__ import annotations

from pathlib import Path

import pytest
from searches import make_base, tiny
from typer.testing import CliRunner

from peftscape.analysis.ablation import ablation, ends, missing
from peftscape.analysis.outcomes import of_record
from peftscape.analysis.sources import SourceError, Study, load
from peftscape.cli import app
from peftscape.search.ablate import ablate
from peftscape.search.study import run_search

# One textbook design lies in it (LoRA of rank 8 on q and v), at a rate too low to learn anything in 48 examples.
SITES = {"choice": [["q", "v"], ["q", "k", "v", "o"]]}
OPTION = {"method": "lora", "rank": {"ladder": [4, 16]}, "alpha": {"choice": [8.0, 16.0]}, "sites": SITES}
SPACE = {"slots": [{"name": "w", "options": [OPTION]}], "training": {"lr": {"log": [1e-3, 5e-2]}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """A search with two textbook designs and a few others, and its study."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    settings = {"examples": 48, "retest_seeds": 2, "textbook": True}
    return out, run_search(tiny(base, search=settings, budget={"trials": 10}, space=SPACE), out, quiet=True)


def test_retests_keep_what_each_example_gave(finished: tuple[Path, Study]) -> None:
    _, study = finished
    retested = [record for record in study.records if record.retests]
    assert retested
    for record in retested:
        outcomes = of_record(record)
        assert outcomes.keys() == {score.seed for score in record.retests}
        for score in record.retests:
            assert outcomes[score.seed].size == score.n_test == 30
            assert outcomes[score.seed].mean() == pytest.approx(score.test)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["search", *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_what_is_missing_on_the_path_is_trained_once_by_the_command(finished: tuple[Path, Study]) -> None:
    out, study = finished
    found = ends(study.records)
    assert found is not None
    wanted = missing(ablation(study.records, *found))
    assert wanted
    before = (out / "report.html").read_text(encoding="utf-8")
    assert "peftscape search --ablate</code> train" in before
    assert "front of accuracy" in run("--out", str(out), "--ablate", "-q")
    after = load(out)
    assert [dict(r.design) for r in after.ablations] == [dict(d) for d in wanted]
    assert {r.state for r in after.ablations} == {"complete"}
    assert after.records == study.records  # they count nowhere else
    path = ablation(after.records, *found, after.ablations)
    assert [step.ablation for step in path if step.number is not None].count(True) == len(wanted)
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "recorded for this path" in report
    assert "--ablate" not in report
    again = ablate(out, quiet=True)
    assert len(again.ablations) == len(wanted)


def test_a_search_without_a_path_says_so_and_shows_its_front(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    run_search(tiny(base, search={"retest_seeds": 0}, budget={"trials": 2}), out, quiet=True)
    output = run("--out", str(out), "--ablate", "-q")
    assert "no path to train: no complete textbook design" in output
    assert "front of accuracy" in output


def test_a_folder_without_a_path_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        ablate(tmp_path, quiet=True)
