"""The winner in a format that other tools load: HF peft's where it can express the design, else our own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftscape.search.adapter import Adapter
from peftscape.search.adapter_folder import (
    CARD,
    Card,
    Format,
    check,
    declared,
    read_card,
    read_tensors,
    save,
    unpack,
    write,
)
from peftscape.search.backbone import Backbone
from peftscape.search.fingerprint import differences, source
from peftscape.search.head import Head, auto_class, make_head
from peftscape.search.peft_folder import InexpressibleError
from peftscape.search.peft_format import peft_form
from peftscape.search.peft_import import CONFIG, read_config, read_peft
from peftscape.search.unshared import unshared
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapter", "Card", "Exported", "export", "load", "save"]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the folder, in which format, and why in that one."""

    directory: Path
    format: Format
    reason: str


def export(
    tensors: Mapping[str, Tensor], card: Card, backbone: Backbone, head: Head, directory: str | Path
) -> Exported:
    """Write an adapter as a folder that `peft.PeftModel.from_pretrained` loads, or else in our own format.

    peft's folder holds what a method says of itself (`Method.in_peft`): most changes of linears and norms, a prefix on
    all layers, or a prompt where the classifier pools the last token, with the transformers class's own head; tensors
    that sites share are written out for each of them, and read as such; a lone `peft:NAME` is written by peft. Its
    logits equal ours. `load` reads both.

    Args:
        tensors: those of a lane (`Lane.adapter()`), head included; masked LoRA is written with its zeros.

    Raises:
        InputError: the tensors are not those of the design, or hold values that are not finite.
    """
    check(tensors, declared(card.design, backbone, head)[0], str(directory))
    try:
        plain, own = unshared(card.design, tensors, backbone.sites)
        theirs = dataclasses.replace(card, design=plain)
        form = peft_form(theirs, backbone, head)
        stored = form.to_peft(own)
    except InexpressibleError as why:
        return Exported(save(tensors, card, backbone, head, directory), "peftscape", str(why))
    texts = {
        "adapter_config.json": json.dumps(form.config, indent=2) + "\n",
        "README.md": _readme(theirs, backbone, form.note),
    }
    folder = write(directory, "peft", stored, theirs, backbone, texts)
    return Exported(folder, "peft", form.note)


def load(directory: str | Path, *, model: Backbone | str | Path | None = None, device: str = "cpu") -> Adapter:
    """An adapter that `export` or `save` wrote, or HF peft itself, ready to predict.

    Args:
        model: its backbone, or where to load it from; by default where it came from in training.

    Raises:
        InputError: the folder is not whole, or the backbone is not the one that the adapter was trained on.
    """
    if not (Path(directory) / CARD).exists() and (Path(directory) / CONFIG).exists():
        return _load_pefts(directory, model, device)
    card, value = read_card(directory)
    backbone = _backbone(directory, model or value["backbone"]["source"], value["backbone"]["dtype"], device)
    if errors := differences(value, backbone, card.head):
        raise InputError(str(directory), errors)
    head = make_head(backbone, kind=card.head, outputs=card.outputs)
    stored = read_tensors(directory, value)
    if value["format"] == "peft":
        shapes, _ = declared(card.design, backbone, head)
        tensors = peft_form(card, backbone, head).from_peft(stored, shapes, str(directory))
    else:
        tensors = unpack(stored, card.design, backbone, head, str(directory))
    return Adapter(card, backbone, head, {key: tensor.to(device) for key, tensor in tensors.items()})


def _load_pefts(directory: str | Path, model: Backbone | str | Path | None, device: str) -> Adapter:
    """An adapter that HF peft wrote, as a design of ours."""
    config = read_config(directory)
    backbone = _backbone(directory, model or config.get("base_model_name_or_path") or "", "auto", device)
    card, tensors = read_peft(directory, config, backbone)
    head = make_head(backbone, kind=card.head, outputs=card.outputs)
    return Adapter(card, backbone, head, {key: tensor.to(device) for key, tensor in tensors.items()})


def _backbone(directory: str | Path, model: Backbone | str | Path, dtype: str, device: str) -> Backbone:
    if isinstance(model, Backbone):
        return model
    if not str(model):
        raise InputError(str(directory), ["its backbone came from no folder: hand one over as model="])
    return Backbone.load(model, dtype=dtype, device=device)


def _readme(card: Card, backbone: Backbone, note: str) -> str:
    """How to load the folder with HF peft."""
    auto = auto_class(card, backbone)
    labels = f"Labels by id: {', '.join(card.labels)}.\n\n" if card.labels else ""
    outputs = f", num_labels={card.outputs}" if card.head in ("class", "token") else ""
    pad = ""
    if card.head == "class" and backbone.sites.head is not None and backbone.sites.head.pooling == "last":
        pad = (
            "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token\n"
            "base.config.pad_token_id = tokenizer.pad_token_id\n"
        )
    return f"""---
library_name: peft
base_model: {source(backbone)}
---

{card.design.label}: {note}. Made by peftscape; `peftscape.load` reads this folder too.

{labels}```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
base = {auto}.from_pretrained({source(backbone)!r}{outputs})
{pad}model = PeftModel.from_pretrained(base, "THIS FOLDER").eval()
```

Texts are cut at {card.max_length} tokens.
"""
