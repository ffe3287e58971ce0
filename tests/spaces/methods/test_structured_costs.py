"""What these methods say of their FLOPs and of what they keep, against what torch counts for each further sequence.

A method that makes weights does so once a step, which no sequence is charged with: two batches are compared.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from counted import flops, kept_bytes
from transformers import BertConfig, LlamaConfig

from peftscape.search.backbone import Backbone
from peftscape.spaces.design import Design
from peftscape.spaces.kept import kept
from peftscape.spaces.price import costs
from peftscape.spaces.profiles import PROFILES

SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 160,
    "max_position_embeddings": 256, "pad_token_id": 1,
}  # fmt: skip
CONFIGS: dict[str, Any] = {"bert": BertConfig(**SHAPE), "llama": LlamaConfig(**SHAPE, num_key_value_heads=2)}
LINEARS = ["q", "v", "o", "up", "down"]
PLACEMENTS: dict[str, dict[str, Any]] = {
    "lora-fa": {"method": "lora", "rank": 8, "sites": LINEARS, "freeze_a": True},
    "dora": {"method": "dora", "rank": 8, "sites": LINEARS},
    "pissa": {"method": "pissa", "rank": 8, "sites": LINEARS},
    "pissa with a frozen a": {"method": "pissa", "rank": 8, "sites": LINEARS, "freeze_a": True},
    "adalora": {"method": "adalora", "rank": 8, "sites": LINEARS},
    "delta_lora": {"method": "delta_lora", "rank": 8, "sites": LINEARS},
    "qalora": {"method": "qalora", "rank": 8, "group": 8, "sites": LINEARS},
    "kernel_mix": {"method": "kernel_mix_lite", "rank": 2, "sites": ["q", "v", "o"]},
    "vera": {"method": "vera", "rank": 16, "sites": LINEARS},
    "loha": {"method": "loha", "rank": 4, "sites": LINEARS},
    "lokr": {"method": "lokr", "rank": 4, "sites": LINEARS},
    "krona": {"method": "krona", "size": 8, "sites": LINEARS},
    "compacter": {"method": "compacter", "size": 16},
    "compacter++": {"method": "compacter", "size": 16, "n": 2, "rank": 2, "sites": ["ffn"]},
    "oft": {"method": "oft", "block": 8, "sites": LINEARS},
    "boft": {"method": "boft", "block": 4, "factors": 3, "sites": LINEARS},
    "boft of one": {"method": "boft", "block": 4, "factors": 1, "sites": ["v", "up"]},
    "said": {"method": "intrinsic_said", "size": 64},
    "loreft": {"method": "loreft", "rank": 8},
    "ssf": {"method": "ssf", "sites": [*LINEARS]},
    "ssf on norms": {"method": "ssf", "sites": ["norm"]},
    "ln_tuning": {"method": "ln_tuning"},
    "hadamard": {"method": "hadamard_adapter"},
}
# Each on one of the two, in turn: what a method adds to a site hangs on the site's widths alone.
cases = pytest.mark.parametrize(("name", "family"), list(zip(PLACEMENTS, itertools.cycle(CONFIGS), strict=False)))


@cases
def test_kept_numbers_grow_with_batch_and_length_as_they_do(name: str, family: str) -> None:
    of = Design.from_json({"placements": [PLACEMENTS[name]]})
    real, told = [], []
    for batch, tokens in ((1, 40), (3, 40), (1, 104)):
        real.append(kept_bytes(of, CONFIGS[family], batch, tokens))
        sites = Backbone.from_config(copy.deepcopy(CONFIGS[family])).sites
        told.append(kept(of, sites, PROFILES["peftscape"], tokens=tokens, batch=batch, dtype="float32").total)
    for there, here in zip(real[1:], told[1:], strict=True):
        assert here - told[0] == pytest.approx(there - real[0], rel=0.05)


@cases
def test_flops_of_a_further_sequence_are_what_torch_counts(name: str, family: str) -> None:
    of, tokens, config = Design.from_json({"placements": [PLACEMENTS[name]]}), 48, CONFIGS[family]
    two, four = (flops(of, config, batch, tokens, training=True) for batch in (2, 4))
    told = costs(of, Backbone.from_config(copy.deepcopy(config)).sites, outputs=2, tokens=tokens, batch=4)
    assert (four - two) / 2 == pytest.approx(told.train_flops, rel=0.005)
