"""What methods on the model's own weights train and store, and (IA)^3 on two stacks, from configurations alone."""

from __future__ import annotations

from typing import Any

import pytest

from peftscape.spaces.design import Design
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import site_map

L, D, F = 12, 768, 3072
ROBERTA = site_map({
    "model_type": "roberta", "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 12,
    "intermediate_size": F, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    "pad_token_id": 1,
})  # fmt: skip
#: Of T5-XL, on which the paper of (IA)^3 works.
T5: dict[str, Any] = {
    "model_type": "t5", "d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24,
    "num_decoder_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
#: Weights of all linears in the layers: four of attention, two of the feed-forward network.
ALL = L * (4 * D * D + 2 * D * F)


def design(**placement: Any) -> Design:
    return Design.from_json({"placements": [placement]})


@pytest.mark.parametrize(
    ("placement", "trained", "values", "places", "bits"),
    [
        ({"method": "fish_mask", "density": 0.005}, 0.005 * ALL, 0.005 * ALL, 0.005 * ALL, 0),
        ({"method": "sam", "density": 0.002}, 0.002 * ALL, 0.002 * ALL, 0.002 * ALL, 0),
        ({"method": "child_tuning", "variant": "D", "density": 0.3}, 0.3 * ALL, 0.3 * ALL, 0.3 * ALL, 0),
        ({"method": "child_tuning", "variant": "F", "density": 0.3}, ALL, ALL, 0, 0),
        ({"method": "lt_sft", "density": 0.05}, ALL, 0.05 * ALL, 0, 0),
        ({"method": "diff_pruning", "density": 0.005}, 2 * ALL, 0.005 * ALL, 0, 0),  # a change and a gate each
        ({"method": "threshold_mask"}, ALL, 0, 0, ALL),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_partial_methods_count_what_their_papers_count(
    placement: dict[str, Any], trained: float, values: float, places: float, bits: int
) -> None:
    of = design(**placement)
    stored = [t for p in of.placements for _, _, _, t in p.tensors(ROBERTA) if t.stored]
    assert adapter_size(of, ROBERTA) == round(trained)
    assert sum(t.kept or t.size for t in stored if not (t.binary or t.integer)) == round(values)
    assert sum(t.size for t in stored if t.integer) == round(places)
    assert sum(t.size for t in stored if t.binary) == bits


def test_ia3_counts_the_cross_attention_of_two_stacks() -> None:
    inner, f = 32 * 64, 5120
    assert adapter_size(design(method="ia3"), site_map(T5)) == 24 * (2 * inner + f) + 24 * (4 * inner + f) == 540_672
    narrow = {**T5, "d_kv": 128, "num_heads": 8, "num_decoder_layers": 6}  # keys are not as wide as the model
    inner = 8 * 128
    assert adapter_size(design(method="ia3"), site_map(narrow)) == 24 * (2 * inner + f) + 6 * (4 * inner + f)
    cross = design(method="ia3", sites=["cross.k", "cross.v"])
    assert adapter_size(cross, site_map(narrow)) == 6 * 2 * inner
