"""`peftscape compare`: groups, tests and a page from the command line, and errors that say what is wrong."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "analysis"))
import synthetic

from peftscape.cli import app


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two runs each of two samplers."""
    folders = []
    for sampler in ("tpe", "random"):
        for seed in range(2):
            folder = tmp_path / f"{sampler}-{seed}"
            folder.mkdir()
            config = synthetic.CONFIG | {"name": folder.name, "search": {"sampler": sampler, "seed": seed}}
            monkeypatch.setattr(synthetic, "CONFIG", config)
            synthetic.store(synthetic.records(15, seed=seed + 9 * len(sampler)), f"sqlite:///{folder / 'study.db'}")
            folders.append(str(folder))
    return folders


def test_runs_are_grouped_and_tested(runs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["compare", *runs, "--out", str(page), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {g["name"]: len(g["runs"]) for g in found["groups"]} == {"sampler tpe": 2, "sampler random": 2}
    (test,) = found["tests"]
    assert {"difference", "p_corrected", "repeats_needed", "attainment_p"} < test.keys()
    assert page.is_file()
    said = CliRunner().invoke(app, ["compare", *runs, "--objectives", "accuracy:max,peak_bytes:min"]).stdout
    assert "sampler tpe" in said
    assert "Reference: accuracy" in " ".join(said.split())


def test_what_is_wrong_is_said(runs: list[str]) -> None:
    done = CliRunner().invoke(app, ["compare", *runs, "--by", "nothing"])
    assert done.exit_code == 2
    assert "They have: " in done.output
    assert "search.sampler" in done.output
    assert CliRunner().invoke(app, ["compare", *runs, "--reference", "accuracy"]).exit_code == 2
