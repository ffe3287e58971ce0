"""A search over labelled words by the command line, from CoNLL's file to HF peft's folder and a merged model."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from exported import base
from labelled import labels_of, texts, write_jsonl
from seqeval.metrics import f1_score
from transformers import pipeline
from typer.testing import CliRunner

from peftscape.cli import app
from peftscape.search.task import TaskConfig, load_task

SEARCH = """
name = "words"
[model]
source = "{model}"
dtype = "float32"
[task]
path = "{data}"
kind = "token_classification"
validation_size = 12
test_size = 12
[space]
slots = [{{name = "w", options = [{{method = "lora", rank = {{ladder = [2, 4]}}, sites = ["q", "v", "up", "down"]}}]}}]
training = {{lr = {{log = [1e-2, 2e-2]}}}}
[search]
examples = 480
batch_size = 16
lanes = 2
retest_seeds = 1
sampler = "random"
textbook = false
[budget]
trials = 1
"""


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.mark.filterwarnings("ignore")
def test_a_search_from_a_file_of_words_to_their_labels(tmp_path):
    rows = texts(80, seed=1)
    blocks = ["\n".join(f"{w} {t}" for w, t in zip(row, labels_of(row), strict=True)) for row in rows]
    data, model = tmp_path / "words.conll", base(tmp_path, "bert")
    data.write_text("\n\n".join(blocks) + "\n")
    config = tmp_path / "words.toml"
    config.write_text(SEARCH.format(model=model, data=data))
    assert "4 classes" in run("check", config)
    run("search", config, "--out", tmp_path / "run", "--quiet")
    front = json.loads(run("front", tmp_path / "run", "--json"))
    best = front["members"][-1]
    assert best["metric"] == "entity_f1"
    adapter = tmp_path / "run" / "adapters" / str(best["number"])

    # The score that was told is seqeval's of what the adapter says, without what a search keeps of states.
    held_out = load_task(TaskConfig(path=str(data), kind="token_classification", validation_size=12, test_size=12))
    own = [list(words) for words in held_out.validation.words]
    table = write_jsonl(tmp_path / "own.jsonl", own)
    answers = json.loads(run("predict", adapter, table, "--text", "tokens", "--json"))
    said = [answer["labels"] for answer in answers]
    assert best["validation"] == pytest.approx(f1_score([labels_of(words) for words in own], said), abs=1e-9)
    assert best["validation"] > 0.1  # outside everywhere has 0
    run("predict", adapter, table, "--text", "tokens", "--out", tmp_path / "said.csv")
    with (tmp_path / "said.csv").open() as file:
        shown = list(csv.DictReader(file))
    assert [json.loads(row["labels"]) for row in shown] == said
    assert [json.loads(row["tokens"]) for row in shown] == own

    exported = json.loads(run("export", tmp_path / "run", tmp_path / "peft", "--trial", best["number"], "--json"))
    assert exported["format"] == "peft"
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert told["task_type"] == "TOKEN_CLS"
    run("export", tmp_path / "run", tmp_path / "whole", "--trial", best["number"], "--merge")
    named = pipeline("token-classification", model=str(tmp_path / "whole"), device="cpu")
    for words, labels in zip(own, said, strict=True):
        found = {part["start"]: part["entity"] for part in named(" ".join(words))}
        starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
        assert [found.get(int(start), "O") for start in starts] == labels
