"""Sequence to sequence from the data to HF peft's folder and transformers' merged model, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from two_stacks import ANSWERS, make_pair_model

from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings, TaskConfig
from peftscape.search.export import export, load
from peftscape.search.merge import export_merged
from peftscape.search.seq2seq_encoding import _split
from peftscape.search.session import open_session
from peftscape.search.study import run_search
from peftscape.search.tables import TaskError
from peftscape.search.task import check_task, load_task
from peftscape.search.train import train_design
from peftscape.spaces.design import Design
from peftscape.spaces.price import costs

SPACE = {
    "slots": [
        {
            "name": "w",
            "options": [
                {
                    "method": "lora", "rank": {"ladder": [1, 4]}, "layers": ["all", "top"],
                    "sites": {"choice": [["q", "v"], ["cross.q", "cross.v"], ["decoder.up", "decoder.down"]]},
                }
            ],
        }
    ],
    "training": {"lr": {"log": [1e-2, 3e-2]}},
}  # fmt: skip
LORA = {"method": "lora", "sites": ["q", "v", "up", "down"], "layers": "all", "rank": 8, "alpha": 16}


def config_of(base: Path, *, examples: int = 32, **task: Any) -> SearchConfig:
    metric = task.get("metric", "loss")
    columns = {"path": str(base / "pairs.jsonl"), "prompt": "source", "completion": "target", "kind": "lm"}
    return SearchConfig(
        name="seq2seq",
        model=ModelConfig(source=str(base), dtype="float32"),
        task=TaskConfig(validation_size=10, test_size=10, **{"metric": "loss", **columns, **task}),
        space=SPACE,
        search=SearchSettings(
            objectives=f"{metric}:{'min' if metric == 'loss' else 'max'},trainable:min", examples=examples,
            batch_size=8, lanes=3, retest_seeds=1, sampler="random", textbook=False,
        ),
        budget=BudgetConfig(trials=3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair_model(tmp_path_factory.mktemp("t5"), "t5-gated")


def test_a_search_over_stacks_and_what_comes_out_of_it(t5: Path, tmp_path: Path) -> None:
    config = config_of(t5, metric="chrf")
    study = run_search(config, tmp_path / "run", quiet=True)
    done = [r for r in study.records if r.state == "complete"]
    assert len(done) == 3
    assert all(r.costs.head == 0 and r.costs.trainable > 0 for r in done)
    best = max(done, key=lambda r: r.validation)
    session = open_session(config)
    tokenizer, learnt = session.backbone.tokenizer, session.task.train
    tokens, target = (
        round(float(np.mean([len(tokenizer(text).input_ids) for text in texts])))
        for texts in (learnt.texts, learnt.completions)
    )
    assert best.costs == costs(
        Design.from_json(best.design), session.backbone.sites,
        outputs=session.task.num_outputs, tokens=tokens, target=target, batch=8, head="lm",
    )  # fmt: skip
    assert best.retests[0].test > 0
    adapter = load(tmp_path / "run" / "adapters" / str(best.number))
    assert adapter.predict(["what is bob"], ["blue"])[0]["tokens"] == 2
    asked = load_task(config.task).validation
    said = adapter.generate(asked.texts, most=max(len(text.split()) for text in asked.completions or ()) + 1)
    assert best.validation == pytest.approx(sacrebleu.corpus_chrf(said, [asked.completions]).score)


def test_translation_is_an_embedded_task() -> None:
    assert check_task(TaskConfig(name="tatoeba", metric="bleu")) == []
    task = load_task(TaskConfig(name="tatoeba", metric="bleu", max_train=50, max_test=20, validation_size=20))
    sentences = [set(split.texts) for split in task.splits().values()]
    assert [len(s) for s in sentences] == [len(s) for s in task.splits().values()]
    assert len(set.union(*sentences)) == sum(map(len, sentences))
    assert len(task.train.completions or ()) == 50


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(("family", "lr"), [("t5-gated", 0.03), ("bart", 0.02)])
def test_learnt_answers_are_generated_and_exported(family: str, lr: float, tmp_path: Path) -> None:
    base = make_pair_model(tmp_path / "base", family)
    design = Design.from_json({"placements": [LORA], "training": {"lr": lr}})
    done = train_design(design, config_of(base, examples=480), out=tmp_path / "mine", quiet=True)
    assert done["scores"][0]["test"] < 0.6  # of about 5 before
    adapter = load(tmp_path / "mine")
    asked, answers = [f"what likes {name}" for name in ANSWERS], list(ANSWERS.values())
    mine = adapter.generate(asked)
    assert sum(a == b for a, b in zip(mine, answers, strict=True)) >= 3
    losses = [row["loss"] for row in adapter.predict(asked, answers)]

    written = export(adapter.tensors, adapter.card, adapter.backbone, adapter.head, tmp_path / "peft")
    assert written.format == "peft"
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    export_merged(adapter, tmp_path / "merged")
    words = AutoTokenizer.from_pretrained(tmp_path / "peft")
    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "peft").eval()
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    said: dict[str, list[str]] = {}
    for name, model in (("plain", plain), ("tuned", tuned), ("merged", merged)):
        said[name] = []
        for question, answer, loss in zip(asked, answers, losses, strict=True):
            ids, labels = (words(text, return_tensors="pt").input_ids for text in (question, answer))
            with torch.no_grad():
                theirs = float(model(input_ids=ids, labels=labels).loss)
            assert name == "plain" or theirs == pytest.approx(loss, abs=1e-5)
            out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, num_beams=1)
            said[name].append(words.decode(out[0], skip_special_tokens=True))
    assert said["tuned"] == said["merged"] == mine
    assert not set(said["plain"]) & set(answers)
    assert load(tmp_path / "peft").generate(asked[:1]) == mine[:1]


def test_whole_texts_are_no_task_of_an_encoder_decoder(t5: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="writes one text from another; give columns prompt and completion"):
        run_search(config_of(t5, prompt=None, completion=None, text="source"), tmp_path / "run", quiet=True)


def test_answers_are_ranked_by_what_the_decoder_finds_likely(t5: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (t5 / "pairs.jsonl").read_text().splitlines()]
    table = "".join(f"{row['source']},{row['target'].replace(' ', '_')}\n" for row in rows)
    (tmp_path / "classes.csv").write_text("text,label\n" + table)
    words = {answer.replace(" ", "_"): answer for answer in ANSWERS.values()}
    task = {
        "path": str(tmp_path / "classes.csv"), "prompt": None, "completion": None, "kind": "multiple_choice",
        "choices": words, "metric": "accuracy",
    }  # fmt: skip
    config = config_of(t5, examples=960, **task)
    design = Design.from_json({"placements": [LORA], "training": {"lr": 0.02}})
    done = train_design(design, config, out=tmp_path / "mine", quiet=True)
    assert done["scores"][0]["test"] > 2 / len(ANSWERS), "twice what guessing finds"
    assert load(tmp_path / "mine").predict(["is bob"])[0]["label"] == "blue"


def test_a_row_that_ends_in_its_language_gets_no_second_end() -> None:
    """mBART's first form is `X </s> en_XX`: the decoder starts with what stands last."""
    end, language = 2, 9

    class Ends:
        eos_token_id = end

        def __call__(self, texts: Any = None, text_target: Any = None, **_: Any) -> dict[str, list[list[int]]]:
            ends = [[end, language], [end], []]
            return {"input_ids": [[5, 6, *ends[i % 3]] for i in range(len(texts or text_target))]}

    found = _split(["a", "b", "c"], ["a", "b", "c"], Ends(), 16, np.zeros(3))
    assert [ids.tolist() for ids in found.ids] == [[5, 6, end, language], [5, 6, end], [5, 6, end]]
