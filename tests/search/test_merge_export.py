"""`peftscape export --merge`: a whole transformers model that gives the logits of the adapter on its backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import LABELS, TEXTS, base, close, trained
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
from two_stacks import ANSWERS, make_pair_model, tokenizer
from typer.testing import CliRunner

from peftscape.cli import app
from peftscape.search.adapter import Adapter
from peftscape.search.adapter_folder import Card, save
from peftscape.search.backbone import Backbone
from peftscape.search.head import make_head
from peftscape.search.lane import new_lane
from peftscape.search.language import Language
from peftscape.search.merge import export_merged
from peftscape.spaces.design import Design

# What folds into linears, biases and norms; at most one of them on a module of each family.
BESIDE: list[dict[str, Any]] = [
    {"method": "lora", "rank": 4, "sites": ["q", "v"]},
    {"method": "ia3", "sites": ["down"], "layers": [1]},
    {"method": "ln_tuning"},
]


def export(run: Path, out: Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["export", str(run), str(out), "--trial", "7", "--merge", "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def logits(folder: Path) -> torch.Tensor:
    """As a user of transformers reads the folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_merged_model_gives_the_adapters_logits_in_transformers(family: str, tmp_path: Path) -> None:
    run = trained(base(tmp_path, family), *BESIDE)
    save(run.lane.adapter(), run.card, run.backbone, run.head, tmp_path / "run" / "adapters" / "7")
    told = json.loads(export(tmp_path / "run", tmp_path / "whole"))
    assert told["format"] == "transformers"
    close(logits(tmp_path / "whole"), run.logits())
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}


def test_a_merged_decoder_that_had_no_padding_reads_texts_together(tmp_path: Path) -> None:
    path = base(tmp_path, "gpt2")
    config = json.loads((path / "config.json").read_text()) | {"pad_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    run = trained(path, *BESIDE)
    save(run.lane.adapter(), run.card, run.backbone, run.head, tmp_path / "run" / "adapters" / "7")
    export(tmp_path / "run", tmp_path / "whole")
    close(logits(tmp_path / "whole"), run.logits())


def test_what_does_not_fold_in_and_the_backbones_own_folder_are_refused(tmp_path: Path) -> None:
    path = base(tmp_path, "bert")
    run = trained(path, {"method": "sequential_adapter", "size": 4}, {"method": "lora", "gate": True})
    folder = tmp_path / "run" / "adapters" / "7"
    save(run.lane.adapter(), run.card, run.backbone, run.head, folder)
    said = export(tmp_path / "run", tmp_path / "whole", code=2)
    assert "sequential_adapter computes what no weight of the backbone can" in said
    assert "the gate on lora depends on the text" in said
    assert not (tmp_path / "whole").exists()
    run = trained(path, {"method": "lora"})
    save(run.lane.adapter(), run.card, run.backbone, run.head, folder)
    before = (path / "model.safetensors").read_bytes()
    assert "the backbone's own folder" in export(tmp_path / "run", path, code=2)
    assert (path / "model.safetensors").read_bytes() == before


def test_all_weights_of_a_model_that_holds_some_twice_are_written(tmp_path: Path) -> None:
    """FLAN's T5 has its word embedding under three names, and a head of its own under a fourth."""
    backbone = Backbone.load(make_pair_model(tmp_path / "base", "t5-gated"), dtype="float32")
    head = make_head(backbone, kind="lm", outputs=2)
    design = Design.from_json({"placements": [{"method": "full_finetuning"}]})
    lane = new_lane(design, seed=0, steps=1, backbone=backbone, head=head)
    for value in lane.params.values():
        value.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    task = {"language": Language("completion", "completion").json()}
    card = Card(design=design, head="lm", outputs=2, max_length=32, metric="loss", task=task)
    adapter = Adapter(card, backbone, head, lane.adapter())
    export_merged(adapter, tmp_path / "whole")
    model, words = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole").eval(), tokenizer()
    for name, answer in ANSWERS.items():
        labels = words(answer, return_tensors="pt").input_ids
        with torch.no_grad():
            theirs = model(**words(f"what likes {name}", return_tensors="pt"), labels=labels).loss
        [said] = adapter.predict([f"what likes {name}"], [answer])
        assert said["loss"] == pytest.approx(float(theirs), rel=1e-5)
