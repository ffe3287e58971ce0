"""Trained and deployed numbers of LoRA's relatives, from configurations alone (reference/methods.md)."""

from __future__ import annotations

from typing import Any

import pytest

from peftscape.spaces.design import Design
from peftscape.spaces.price import adapter_size, head_size
from peftscape.spaces.sites import SiteMap, site_map

ROBERTA_BASE = site_map({
    "model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    "pad_token_id": 1,
})  # fmt: skip
LLAMA = site_map({
    "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256,
})  # fmt: skip


def size(of: SiteMap, **placement: Any) -> int:
    return adapter_size(Design.from_json({"placements": [placement]}), of)


def test_adalora_on_roberta_base_is_the_published_count() -> None:
    adapter = size(ROBERTA_BASE, method="adalora", rank=12, sites=["q", "v"])
    assert adapter == 24 * 12 * (768 + 768 + 1)
    assert adapter + head_size(ROBERTA_BASE, 2, "class") == 1_034_786


@pytest.mark.parametrize(
    ("placement", "of_a_linear"),
    [
        ({"method": "lora", "scaling": "rslora"}, lambda r, i, o: r * (i + o)),
        ({"method": "lora", "freeze_a": True}, lambda r, i, o: r * o),
        ({"method": "pissa"}, lambda r, i, o: r * (i + o)),
        ({"method": "dora"}, lambda r, i, o: r * (i + o) + o),
        ({"method": "dylora"}, lambda r, i, o: r * (i + o)),
        ({"method": "delta_lora"}, lambda r, i, o: r * (i + o)),
        ({"method": "loftq"}, lambda r, i, o: r * (i + o)),
        ({"method": "qalora", "group": 32}, lambda r, i, o: r * (i // 32 + o)),
        ({"method": "adalora"}, lambda r, i, o: r * (i + o + 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("sites", [ROBERTA_BASE, LLAMA], ids=["roberta", "llama"])
def test_counts_are_those_of_the_reference(sites: SiteMap, placement: dict[str, Any], of_a_linear: Any) -> None:
    kinds = ("q", "k", "v", "o", "up", "down")
    linears = [s for s in sites.sites if s.kind in kinds]
    wanted = sum(of_a_linear(8, s.d_in, s.d_out) for s in linears)
    assert size(sites, rank=8, sites=list(kinds), **placement) == wanted


def test_what_a_rank_must_be_is_said() -> None:
    for method in ("lora", "pissa", "adalora"):
        errors = Design.from_json({"placements": [{"method": method, "rank": 1024}]}).check(ROBERTA_BASE)
        assert errors == [
            "placements[0].rank: 1024 is larger than the linear it adapts (q: 768 x 768)",
            "placements[0].rank: 1024 is larger than the linear it adapts (v: 768 x 768)",
        ]
    errors = Design.from_json({"placements": [{"method": "qalora", "group": 100}]}).check(ROBERTA_BASE)
    assert errors[0] == "placements[0].group: 100 does not divide what q reads (768)"
