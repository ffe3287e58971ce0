"""Commands that read what a search left, as their users meet them."""

from __future__ import annotations

import csv
import io
import json

import pytest
from commands import record, run

from peftscape.spaces.design import Design

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def lines(folder):
    """Three trials: the second is beaten by the first."""
    records = [record(0, 0.80, 100), record(1, 0.79, 200), record(2, 0.90, 400)]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records))
    return path


def test_the_front_leaves_out_what_is_beaten(lines):
    value = json.loads(run("front", lines, "--json").stdout)
    assert [member["number"] for member in value["members"]] == [0, 2]
    output = run("front", lines).output
    assert "2 of 3 trials" in output
    assert "lora r2 " not in output


def test_a_front_of_other_objectives(lines):
    value = json.loads(run("front", lines, "--objectives", "accuracy:max", "--json").stdout)
    assert [member["number"] for member in value["members"]] == [2]
    assert "no objective" in run("front", lines, "--objectives", "acuracy:max", code=2).stderr


def test_all_trials_are_listed(lines):
    assert "0.790" in run("front", lines, "--all").output
    assert [t["number"] for t in json.loads(run("front", lines, "--all", "--json").stdout)["trials"]] == [0, 1, 2]


def test_a_report_is_one_file(lines, folder):
    assert json.loads(run("report", lines, "--out", "r.html", "--json").stdout) == {"report": "r.html"}
    assert "lora r4" in (folder / "r.html").read_text()


def test_an_export_names_the_adapters_there_are(folder):
    for number in (2, 11):
        (folder / "run" / "adapters" / str(number)).mkdir(parents=True)
    assert run("export", "run", "out", "--trial", "3", code=2).stderr == (
        "run: 1 error\n  no adapter of trial 3 was kept; there are: 2, 11\n"
    )


@pytest.fixture(scope="module")
def run_with_adapters(tmp_path_factory):
    """A run's folder with a LoRA (trial 2) and a sequential adapter (trial 3) for MiniLM, trained for no step."""
    from peftscape.search.adapter_folder import Card, save
    from peftscape.search.backbone import Backbone
    from peftscape.search.embedded import embedded_model_path
    from peftscape.search.head import Head
    from peftscape.search.lane import new_lane

    folder = tmp_path_factory.mktemp("runs")
    backbone = Backbone.load(embedded_model_path(), dtype="float32")
    head = Head(backbone, kind="class", outputs=2)
    for number, method in ((2, "lora"), (3, "sequential_adapter")):
        design = Design.from_json({"placements": [{"method": method}]})
        lane = new_lane(design, seed=0, steps=1, backbone=backbone, head=head)
        card = Card(design=design, head="class", outputs=2, max_length=32, labels=("no", "yes"))
        save(lane.adapter(), card, backbone, head, folder / "adapters" / str(number))
    return folder


@pytest.mark.parametrize(("trial", "written"), [(2, "peft"), (3, "peftscape")])
def test_an_adapter_is_exported_in_the_format_that_can_hold_it(run_with_adapters, folder, trial, written):
    value = json.loads(run("export", run_with_adapters, "out", "--trial", trial, "--json").stdout)
    assert value["format"] == written
    assert value["reason"]
    assert (folder / "out" / "adapter_config.json").is_file() == (written == "peft")
    assert f"{written} format" in run("export", run_with_adapters, "again", "--trial", trial).output.replace("\n", " ")


def test_predictions_stand_beside_their_texts(run_with_adapters, folder):
    (folder / "data.csv").write_text('question,other\n"who, then?",1\nwhat now,2\n')
    adapter = run_with_adapters / "adapters" / "2"
    rows = list(csv.DictReader(io.StringIO(run("predict", adapter, "data.csv", "--text", "question").stdout)))
    assert [row["question"] for row in rows] == ["who, then?", "what now"]
    assert {row["label"] for row in rows} <= {"no", "yes"}
    assert all(0.5 <= float(row["score"]) <= 1 for row in rows)
    found = json.loads(run("predict", adapter, "data.csv", "--text", "question", "--json").stdout)
    assert [row["label"] for row in found] == [row["label"] for row in rows]
    run("predict", adapter, "data.csv", "--text", "question", "--out", "answers.csv")
    assert list(csv.DictReader(io.StringIO((folder / "answers.csv").read_text()))) == rows
    error = run("predict", adapter, "data.csv", "--text", "qestion", code=2).stderr
    assert 'no column "qestion". Did you mean "question"?' in error
