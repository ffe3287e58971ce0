"""What additive methods and compositions say of their FLOPs and of what they keep, against what torch counts.

What is made once a step, a prefix's MLP and masks of prototypes, is no sequence's: two batches are compared.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from counted import flops, kept_bytes
from plain import design
from transformers import BertConfig, GPT2Config, LlamaConfig

from peftscape.spaces.kept import kept
from peftscape.spaces.price import costs
from peftscape.spaces.profiles import PROFILES
from peftscape.spaces.sites import site_map

SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160,
    "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SHAPE),
    "gpt2": GPT2Config(**SHAPE, n_inner=160),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
}
ADAPTER = {"method": "sequential_adapter", "size": 16}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "residual": {"method": "residual_adapter", "size": 16},
    "residual above": {"method": "residual_adapter", "size": 16, "layers": [1, 2]},
    "pfeiffer": {"method": "pfeiffer_adapter", "size": 16},
    "pfeiffer above": {"method": "pfeiffer_adapter", "size": 16, "layers": [1, 2]},
    "tiny attention": {"method": "tiny_attention", "size": 4},
    "lst": {"method": "lst", "size": 16},
    "lst at every other layer": {"method": "lst", "size": 16, "every": 2, "heads": 2},
    "prefix through an mlp": {"method": "prefix_tuning_mlp", "length": 16, "hidden": 64},
    "adamix": {"method": "adamix", "size": 16},
    "adamix of one pass": {"method": "adamix", "size": 16, "agreement": 0.0},
    "gated adapter": {**ADAPTER, "gate": True},
    "gated lora": {"method": "lora", "rank": 8, "gate": True},
    "gated prefix": {"method": "prefix_tuning", "length": 8, "gate": True},
    "shared adapter": {**ADAPTER, "share": {"kept": 0.5}},
    "shared lora": {"method": "lora", "rank": 8, "share": {"kept": 0.5}},
    "adapters that drop": {**ADAPTER, "drop": 1},
}
# Each on one of the two, in turn: what a method adds to a site hangs on the site's widths alone.
cases = pytest.mark.parametrize(("name", "family"), list(zip(PLACEMENTS, itertools.cycle(CONFIGS), strict=False)))


@cases
def test_flops_of_a_further_sequence_are_what_torch_counts(name: str, family: str) -> None:
    of, config, tokens = design(PLACEMENTS[name]), CONFIGS[family], 48
    told = costs(of, site_map(config.to_dict()), outputs=2, tokens=tokens, batch=4)
    for training, wanted in ((True, told.train_flops), (False, told.infer_flops)):
        if name == "shared lora" and not training:
            continue  # it merges
        two, four = (flops(of, config, batch, tokens, training=training) for batch in (2, 4))
        assert (four - two) / 2 == pytest.approx(wanted, rel=0.005)


@cases
def test_kept_numbers_grow_with_batch_and_length_as_they_do(name: str, family: str) -> None:
    of, config = design(PLACEMENTS[name]), CONFIGS[family]
    real, told = [], []
    for batch, tokens in ((1, 40), (3, 40), (1, 104)):
        real.append(kept_bytes(of, config, batch, tokens))
        sites = site_map(config.to_dict())
        told.append(kept(of, sites, PROFILES["peftscape"], tokens=tokens, batch=batch, dtype="float32").total)
    # At the lowest place a LayerNorm of the method's own keeps no input, which is not told apart.
    near = 0.08 if "residual" in name else 0.05
    for there, here in zip(real[1:], told[1:], strict=True):
        assert here - told[0] == pytest.approx(there - real[0], rel=near)
    assert told == pytest.approx(real, rel=0.15)
