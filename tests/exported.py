"""Adapters on tiny saved backbones: as our export writes them, and as a user of HF peft reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from peftscape.search.adapter import Adapter
from peftscape.search.backbone import Backbone
from peftscape.search.export import Card, Exported, export
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.spaces.design import Design
from peftscape.spaces.heads import HeadKind

Saved = Callable[[str], Path]
LABELS = ("person", "place", "number")
WORDS = (
    "[PAD] [UNK] [CLS] [SEP] who where when what is was the a of in city river year man".split()  # noqa: SIM905
)
TEXTS = ["who", "where is the city of the river", "when was the man in a city", "what is a year", "the river"]
_SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SHAPE),
    "roberta": RobertaConfig(**_SHAPE),
    "gpt2": GPT2Config(**_SHAPE, bos_token_id=2, eos_token_id=3),
    "llama": LlamaConfig(**_SHAPE, num_key_value_heads=2),
    "distilbert": DistilBertConfig(**_SHAPE, hidden_dim=48),
}
FAMILIES = ("bert", "roberta", "gpt2", "llama")


def base(root: Path, family: str) -> Path:
    """A family's tiny base model with a tokenizer, saved as a hub's folder is."""
    path = root / family
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModel.from_config(CONFIGS[family])
            for parameter in model.parameters():
                if parameter.ndim > 1:  # far from a fresh start, so that attention is uneven
                    torch.nn.init.normal_(parameter, 0, 0.2)
        model.save_pretrained(path)
        tokenizer(family).save_pretrained(path)
    return path


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if family not in ("gpt2", "llama"):
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_input_names=names, model_max_length=64,
    )  # fmt: skip


@dataclass
class Trained:
    """A lane on a saved backbone, its tensors far from their start."""

    lane: Lane
    card: Card
    backbone: Backbone
    head: Head

    def logits(self, texts: list[str] = TEXTS) -> np.ndarray[Any, Any]:
        return Adapter(self.card, self.backbone, self.head, self.lane.adapter()).logits(texts)

    def export(self, directory: Path) -> Exported:
        return export(self.lane.adapter(), self.card, self.backbone, self.head, directory)


def trained(folder: Path, *placements: dict[str, Any], head: HeadKind = "class", outputs: int = 3) -> Trained:
    backbone = Backbone.load(folder, dtype="float32")
    built = Head(backbone, kind=head, outputs=outputs)
    design = Design.from_json({"placements": list(placements)})
    lane = new_lane(design, seed=0, steps=1, backbone=backbone, head=built)
    generator = torch.Generator().manual_seed(5)
    for key, value in {**lane.params, **lane.fixed}.items():
        noise = torch.empty(value.shape).normal_(0, 0.3, generator=generator)
        if key.endswith("/started"):
            value.fill_(1.0)
        elif key not in lane.passing and (lane.model is None or key in lane.params):
            value.data.add_(noise * lane.masks.get(key, torch.ones(())))
    labels = LABELS if outputs == 3 else ()
    card = Card(design=design, head=head, outputs=outputs, labels=labels, max_length=32, metric="accuracy")
    return Trained(lane, card, backbone, built)


def peft_logits(folder: Path, directory: Path, *, outputs: int = 3, one_by_one: bool = False) -> Any:
    """As a user of HF peft gets them: padded batches, with the tokenizer of the folder."""
    tokens = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, directory).eval()
    batches = [[t] for t in TEXTS] if one_by_one else [TEXTS]
    with torch.no_grad():
        rows = [adapted(**tokens(batch, padding=True, return_tensors="pt")).logits for batch in batches]
    return torch.cat(rows).numpy()


def close(found: Any, wanted: Any, *, within: float = 1e-5) -> None:
    """Largest difference within 1e-5 of the largest value, or of 1."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=within * max(1.0, float(np.abs(wanted).max())))
