"""Prefixes and prompts of encoder-decoders in HF peft's folder: losses and texts as a user of peft gets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from two_stacks import ANSWERS, make_pair_model

from peftscape.search.adapter_folder import Card
from peftscape.search.backbone import Backbone
from peftscape.search.export import Exported, export, load
from peftscape.search.head import make_head
from peftscape.search.lane import new_lane
from peftscape.search.language import Language
from peftscape.spaces.design import Design

PREFIX: dict[str, Any] = {"method": "prefix_tuning", "length": 3, "sites": ["decoder.kv"]}
DESIGNS: list[dict[str, Any]] = [
    PREFIX,
    {"method": "prompt_tuning", "length": 3},
    {"method": "prefix_tuning_mlp", "length": 3, "hidden": 8, "sites": ["decoder.kv"]},
]


def written(base: Path, out: Path, *placements: dict[str, Any], head: Any = "lm") -> Exported:
    """The folder of an adapter whose tensors are far from their start."""
    backbone = Backbone.load(base, dtype="float32")
    built = make_head(backbone, kind=head, outputs=2)
    design = Design.from_json({"placements": list(placements)})
    lane = new_lane(design, seed=0, steps=1, backbone=backbone, head=built)
    source = torch.Generator().manual_seed(5)
    for key, value in {**lane.params, **lane.fixed}.items():
        value.data.add_(torch.empty(value.shape).normal_(0, 0.5, generator=source))
        if key.endswith("/started"):
            value.data.fill_(1.0)
    task = {"language": Language("completion", "completion").json()} if head == "lm" else {}
    card = Card(design=design, head=head, outputs=2, max_length=32, metric="loss", task=task)
    return export(lane.adapter(), card, backbone, built, out)


# Decoders of even and odd depth: peft hands out the rows of a prefix in steps of two layers.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(("family", "designs"), [("t5", 3), ("t5-deep", 1), ("bart", 2)])
def test_virtual_tokens_give_pefts_losses_and_texts(family: str, designs: int, tmp_path: Path) -> None:
    base = make_pair_model(tmp_path / "base", family)
    asked, answers = [f"{'of ' * i}what likes {name}" for i, name in enumerate(ANSWERS)], list(ANSWERS.values())
    for i, placement in enumerate(DESIGNS[:designs]):
        out = tmp_path / str(i)
        exported = written(base, out, placement)
        assert exported.format == "peft", exported.reason
        assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
        assert "one length" not in exported.reason, "padding is masked where nothing is pooled"
        model = AutoModelForSeq2SeqLM.from_pretrained(base)
        words, tuned = AutoTokenizer.from_pretrained(out), peft.PeftModel.from_pretrained(model, out).eval()
        batch = words(asked, padding=True, return_tensors="pt")
        labels = words(answers, padding=True, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = tuned(**batch, labels=labels.masked_fill(labels == 0, -100)).logits.log_softmax(-1)
        adapter = load(out)
        for row, label, said in zip(logits, labels, adapter.predict(asked, answers), strict=True):
            own = label[label != 0]
            theirs = -row[torch.arange(len(own)), own].mean()
            assert said["loss"] == pytest.approx(float(theirs), abs=1e-5)
        ids = batch.input_ids[0][batch.input_ids[0] != 0][None]
        told = tuned.generate(input_ids=ids, max_new_tokens=4, do_sample=False, num_beams=1)
        assert adapter.generate(asked[:1], most=3) == [words.decode(told[0][:4], skip_special_tokens=True)]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(
    ("family", "config", "methods"),
    [
        ("t5", peft.LoraConfig(r=3, target_modules=["q", "v", "wo"]), {"lora"}),
        ("bart", peft.LoraConfig(r=3, target_modules=["q_proj", "fc1"], use_dora=True), {"dora"}),
        ("t5", peft.MissConfig(r=4, target_modules=["k"]), {"peft:MISS"}),
    ],
)
def test_what_peft_wrote_of_an_encoder_decoder_is_read(
    family: str, config: peft.PeftConfig, methods: set[str], tmp_path: Path
) -> None:
    base, out = make_pair_model(tmp_path / "base", family), tmp_path / "out"
    torch.manual_seed(0)
    config.task_type = "SEQ_2_SEQ_LM"
    tuned = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), config).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    tuned.save_pretrained(out)
    adapter = load(out, model=base)
    assert {p.method.name for p in adapter.design.placements} == methods
    asked, words = [f"what likes {name}" for name in ANSWERS], AutoTokenizer.from_pretrained(base)
    batch, answers = (words(texts, padding=True, return_tensors="pt") for texts in (asked, list(ANSWERS.values())))
    with torch.no_grad():
        labels = answers.input_ids.masked_fill(answers.input_ids == 0, -100)
        logits = tuned(**batch, labels=labels).logits.log_softmax(-1)
    for row, label, said in zip(logits, answers.input_ids, adapter.predict(asked, list(ANSWERS.values())), strict=True):
        own = label[label != 0]
        assert said["loss"] == pytest.approx(-float(row[torch.arange(len(own)), own].mean()), abs=1e-5)


def test_every_layers_rows_are_in_the_file_once(tmp_path: Path) -> None:
    base = make_pair_model(tmp_path / "base", "t5")
    written(base, tmp_path / "peft", PREFIX)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    parts = stored.reshape(3, 3, 2, 24)  # virtual tokens, two layers and one that is not there, keys and values
    assert [bool(parts[:, i].any()) for i in range(3)] == [True, False, True]


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    base = make_pair_model(tmp_path / "base", "t5")
    reasons = {
        "takes a prefix on all of decoder.kv": ({"method": "prefix_tuning", "length": 2}, "lm"),
        "all of decoder.kv and nowhere else": ({**PREFIX, "layers": [2]}, "lm"),
        "do not work with t5 classifiers": ({"method": "prompt_tuning", "length": 2}, "class"),
    }
    for i, (reason, (placement, head)) in enumerate(reasons.items()):
        exported = written(base, tmp_path / str(i), placement, head=head)
        assert exported.format == "peftscape"
        assert reason in exported.reason
