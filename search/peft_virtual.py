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


def refusal(card: Card, backbone: Backbone, where: Sequence[Site], kind: str) -> str | None:
    """Why peft's virtual tokens would be others than ours, in one line."""
    sites, [method, *others] = backbone.sites, [p.method for p in card.design.placements]
    if kind == "PROMPT_TUNING":
        if others:
            return "HF peft's prompt tuning takes one prompt"
        if card.head == "class" and sites.head is not None and sites.head.pooling != "last":
            return f"HF peft's prompt tuning pools a virtual token in {sites.family} classifiers; ours pool the text"
        return None
    if others or [s.layer for s in where] != list(range(sites.layers)):
        return "HF peft's prefix tuning takes one prefix on all layers"
    if sites.family not in PREFIXED:
        return f"HF peft's prefix tuning does not work with {sites.family} classifiers"
    if sites.sliding_window and method.prefix_length() + card.max_length > sites.sliding_window:
        return "HF peft's prefixes fall out of the sliding window, and ours do not"
    return None


def virtual_config(backbone: Backbone, kind: str) -> dict[str, Any]:
    """What peft wants to know of the model."""
    return {
        "num_transformer_submodules": 1,
        "num_attention_heads": backbone.sites.kv_heads if kind == "PREFIX_TUNING" else backbone.sites.heads,
        "num_layers": backbone.sites.layers,
    }
