"""What HF peft asks of prompts and prefixes, which it keeps beside the model: where its classifiers equal ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftscape.search.adapter_folder import Card
    from peftscape.search.backbone import Backbone
    from peftscape.spaces.sites import Site

#: Families whose classifiers get a prefix from peft as from us; others lack a cache or a part of the head.
PREFIXED = {
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "gpt2", "llama", "mistral", "qwen2", "qwen3",
    "gemma", "gemma2", "gemma3_text",
}  # fmt: skip
#: Encoder-decoders whose language models do.
PREFIXED_PAIRS = {"t5", "mt5", "bart", "mbart"}


def refusal(card: Card, backbone: Backbone, where: Sequence[Site], kind: str) -> str | None:
    """Why peft's virtual tokens would be others than ours, in one line."""
    sites, [method, *others] = backbone.sites, [p.method for p in card.design.placements]
    if sites.decoder_layers and card.head != "lm":
        return f"HF peft's virtual tokens do not work with {sites.family} classifiers"
    if kind == "PROMPT_TUNING":
        if others:
            return "HF peft's prompt tuning takes one prompt"
        if card.head == "token":
            return "HF peft's prompt tuning gives labels to its virtual tokens too"
        if card.head == "class" and sites.head is not None and sites.head.pooling != "last":
            return f"HF peft's prompt tuning pools a virtual token in {sites.family} classifiers; ours pool the text"
        return None
    if sites.decoder_layers:
        if others or [s for s in sites.sites if s.kind == "kv" and s.stack == "decoder"] != list(where):
            return "HF peft's prefix tuning takes a prefix on all of decoder.kv and nowhere else"
    elif others or [s.layer for s in where] != list(range(sites.layers)):
        return "HF peft's prefix tuning takes one prefix on all layers"
    if sites.family not in (PREFIXED_PAIRS if sites.decoder_layers else PREFIXED):
        return f"HF peft's prefix tuning does not work with {sites.family} models"
    if sites.sliding_window and method.prefix_length() + card.max_length > sites.sliding_window:
        return "HF peft's prefixes fall out of the sliding window, and ours do not"
    return None


def parts(backbone: Backbone, kind: str, count: int) -> tuple[list[int], int]:
    """Which part of a virtual token's row is each layer's, and of how many parts.

    peft 0.21 writes an encoder-decoder's rows twice and hands each decoder layer the parts of two, for cross-attention
    too, of which the second is dropped (`PeftModel.get_prompt`): layer i reads part 2i of a row repeated. Where the
    parts are even in number two layers would read the same, so there is one more then, that no layer reads.
    """
    if kind != "PREFIX_TUNING" or not backbone.sites.decoder_layers:
        return list(range(count)), count
    odd = count | 1
    return [2 * i % odd for i in range(count)], odd


def virtual_config(backbone: Backbone, kind: str) -> dict[str, Any]:
    """What peft wants to know of the model."""
    sites = backbone.sites
    prefix = kind == "PREFIX_TUNING"
    _, layers = parts(backbone, kind, sites.decoder_layers or sites.layers)
    return {
        "num_transformer_submodules": 2 if prefix and sites.decoder_layers else 1,
        "num_attention_heads": sites.kv_heads if prefix else sites.heads,
        "num_layers": layers,
    }
