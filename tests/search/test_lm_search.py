"""Searches over language-modelling tasks from the data to HF peft's folder and transformers' merged model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from language import ANSWERS, NAMES, make_decoder
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftscape.search.adapter_folder import CARD
from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings, TaskConfig
from peftscape.search.export import export, load
from peftscape.search.merge import export_merged
from peftscape.search.metrics import METRICS
from peftscape.search.study import run_search
from peftscape.search.task import load_task
from peftscape.search.train import train_design
from peftscape.spaces.design import Design
from peftscape.spaces.words import InputError

SPACE = {
    "slots": [
        {"name": "w", "options": [{"method": "lora", "rank": {"ladder": [2, 4]}, "sites": ["q", "v", "up", "down"]}]}
    ],
    "training": {"lr": {"log": [2e-2, 4e-2]}},
}
LORA = {"method": "lora", "sites": ["q", "v", "up", "down"], "layers": "all", "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("decoder"), tied=False)


def config_of(base, metric, *, examples=32, **task):
    return SearchConfig(
        name="lm",
        model=ModelConfig(source=str(base), dtype="float32"),
        task=TaskConfig(validation_size=10, test_size=10, metric=metric, **task),
        space=SPACE,
        search=SearchSettings(
objectives=f"{metric}:{METRICS[metric].direction[:3]},trainable:min", examples=examples,
            batch_size=8, lanes=3, retest_seeds=1, sampler="random", textbook=False,
        ),
        budget=BudgetConfig(trials=2),
    )  # fmt: skip


def test_a_search_over_completions_and_what_comes_out_of_it(base, tmp_path):
    task = {"path": str(base / "pairs.jsonl"), "prompt": "prompt", "completion": "completion", "kind": "lm"}
    study = run_search(config_of(base, "exact_match", examples=160, **task), tmp_path / "run", quiet=True)
    done = [r for r in study.records if r.state == "complete"]
    assert len(done) == 2
    assert all(r.costs.head == 0 and r.costs.trainable == r.costs.adapter > 0 for r in done)
    best = max(done, key=lambda r: (r.validation, -r.costs.trainable))
    adapter = load(tmp_path / "run" / "adapters" / str(best.number))
    assert adapter.predict(["what ann likes :"], [" red"])[0]["tokens"] == 2
    validation = load_task(config_of(base, "exact_match", **task).task).validation
    right = [
        said == wanted.strip()
        for said, wanted in zip(adapter.generate(validation.texts, most=2), validation.completions, strict=True)
    ]
    assert best.validation == pytest.approx(np.mean(right))
    assert best.validation > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_learnt_completions_are_generated_and_exported(base, tmp_path):
    task = {"path": str(base / "pairs.jsonl"), "prompt": "prompt", "completion": "completion", "kind": "lm"}
    design = Design.from_json({"placements": [LORA], "training": {"lr": 0.03}})
    done = train_design(design, config_of(base, "loss", examples=480, **task), out=tmp_path / "mine", quiet=True)
    assert done["scores"][0]["test"] < 0.3
    adapter = load(tmp_path / "mine")
    prompts = [f"what {name} likes :" for name in NAMES]
    answers = [ANSWERS[name] for name in NAMES]
    assert adapter.generate(prompts) == answers
    filler = " ".join(["what"] * 63)  # one place is left, beside texts with many
    assert adapter.generate([*prompts, filler], most=3)[:-1] == answers
    with pytest.raises(InputError, match="prompt 1 has 64 tokens"):
        adapter.generate([prompts[0], f"{filler} what"])
    shifted = Design.from_json({"placements": [{"method": "prompt_tuning", "length": 4}]})
    crowded = replace(adapter, card=replace(adapter.card, design=shifted))
    with pytest.raises(InputError, match=r"prompt 0 has 60 tokens, .* 64 positions, of which the design takes 4"):
        crowded.generate([" ".join(["what"] * 60)])
    losses = [row["loss"] for row in adapter.predict(prompts, [f" {a}" for a in answers])]

    written = export(adapter.tensors, adapter.card, adapter.backbone, adapter.head, tmp_path / "peft")
    assert written.format == "peft"
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    export_merged(adapter, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peft")
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert load(tmp_path / "peft").generate(prompts[:1]) == answers[:1]
    (tmp_path / "peft" / CARD).unlink()  # as HF peft writes such folders
    assert load(tmp_path / "peft", model=base).generate(prompts[:1]) == answers[:1]
    said = {}
    for name, model in (("plain", plain), ("tuned", tuned), ("merged", merged)):
        said[name] = []
        for prompt, answer, loss in zip(prompts, answers, losses, strict=True):
            ids = tokenizer(f"{prompt} {answer} </s>", return_tensors="pt").input_ids
            labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 2, ids, -100)
            with torch.no_grad():
                theirs = float(model(input_ids=ids, labels=labels).loss)
            assert name == "plain" or theirs == pytest.approx(loss, abs=1e-5)
            out = model.generate(input_ids=ids[:, :-2], max_new_tokens=4, do_sample=False, pad_token_id=0)
            said[name].append(tokenizer.decode(out[0, ids.shape[1] - 2 :], skip_special_tokens=True))
    assert said["tuned"] == said["merged"] == answers
    assert said["plain"] != answers


def test_classes_by_their_words_need_no_head(base, tmp_path):
    task = {"path": str(base / "classes.csv"), "kind": "multiple_choice", "template": "{text}"}
    design = Design.from_json({"placements": [LORA], "training": {"lr": 0.03}})
    done = train_design(design, config_of(base, "accuracy", examples=240, **task), out=tmp_path / "mine", quiet=True)
    assert done["costs"]["head"] == 0
    assert done["scores"][0]["test"] >= 0.8
    adapter = load(tmp_path / "mine")
    assert adapter.labels == ("blue", "green", "red")
    found = adapter.predict(["is bob likes :", "the dan likes :"])
    assert found[0]["label"] == "blue"
    # The ranks are those of the summed log-likelihood by transformers' model.
    export_merged(adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = adapter.tokenizer()("is bob likes :", return_tensors="pt").input_ids
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    chosen = logp[[adapter.tokenizer().convert_tokens_to_ids(label) for label in adapter.labels]].softmax(-1)
    np.testing.assert_allclose(list(found[0]["probabilities"].values()), chosen, atol=1e-5)


def test_options_of_each_row_are_ranked(base, tmp_path):
    rows = [
        {"text": f"what {name} likes :", "options": sorted({"red", "blue", "green"}, key=lambda w: (w != other, w)),
         "label": ANSWERS[name]}
        for name in NAMES * 8 for other in ("red", "green")
    ]  # fmt: skip
    rows += [{"text": "ann likes :", "options": ["blue", "red"], "label": 1}] * 6
    (tmp_path / "options.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"path": str(tmp_path / "options.jsonl"), "options": "options", "kind": "multiple_choice", "normalise": True}
    design = Design.from_json({"placements": [LORA], "training": {"lr": 0.03}})
    done = train_design(design, config_of(base, "accuracy", examples=200, **task), out=tmp_path / "mine", quiet=True)
    assert done["scores"][0]["test"] == 1.0
    found = load(tmp_path / "mine").predict(["what cem likes :"], options=[["blue", "green"]])
    assert found[0]["label"] == "green"
    assert set(found[0]["probabilities"]) == {"blue", "green"}
