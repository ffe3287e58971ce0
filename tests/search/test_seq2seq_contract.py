"""The contract of methods on encoder-decoders: every method that is there, by discovery, on T5's or BART's shapes.

Here lanes of many methods train in one cohort, each against itself alone, in turn on the one family and the other; few
steps, since the whole suite of each method runs on one stack (`contract.MethodContract`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import contract
import numpy as np
import pytest
import torch
from merged import anywhere, apart, by_weights, homeless_shifts, with_head
from transformers import BartConfig, PreTrainedConfig, T5Config

from peftscape.spaces.design import Design
from peftscape.spaces.methods import methods
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import site_map

STEPS = 2
_SHAPE: dict[str, Any] = {"vocab_size": contract.VOCAB, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "t5": T5Config(
        **_SHAPE, d_kv=8, d_ff=48, num_layers=1, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=16, eos_token_id=2,
    ),
    "bart": BartConfig(
        **_SHAPE, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        forced_eos_token_id=2,
    ),
}  # fmt: skip
families = pytest.mark.parametrize("family", CONFIGS)
NAMES = (*methods(), *contract.COMPOSED)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """The contract's own functions, on these families and for fewer steps."""
    with pytest.MonkeyPatch.context() as patch:
        for family, config in CONFIGS.items():
            patch.setitem(contract.CONFIGS, family, config)
            patch.setitem(contract.SITES, family, site_map(config.to_dict()))
        patch.setattr(contract, "STEPS", STEPS)
        yield


def designs(family: str) -> dict[str, Design]:
    """An example of every other method, on all sites that it can adapt; of those too that T5 has no sites for."""
    found = {}
    for i, name in enumerate(NAMES):
        rows = contract.examples(name, family)[:2]
        if rows and (i % 2 == list(CONFIGS).index(family) or not contract.examples(name, "t5")):
            found[name] = rows[-1]
    return found


@families
def test_what_cannot_be_there_is_refused_with_a_reason(family: str) -> None:
    absent = {name for name in NAMES if not contract.examples(name, family)}
    assert absent == {"lst"} | ({"bitfit"} if family == "t5" else set())
    for name in absent:
        errors = Design.from_json({"placements": [{"method": name}]}).check(contract.SITES[family])
        assert [e for e in errors if e.startswith("placements[0].sites: ")], errors


@families
def test_every_method_declares_what_a_lane_holds(family: str) -> None:
    for design in designs(family).values():
        built = contract.lane(design, 0, family)
        held = {k: int(built.masks[k].sum()) if k in built.masks else v.numel() for k, v in built.params.items()}
        on_head = sum(n for key, n in held.items() if key.startswith("head/"))
        assert adapter_size(design, contract.SITES[family]) == sum(held.values()) - on_head, design.label


@families
def test_every_method_starts_at_the_backbone_and_trains_packed_as_if_alone(family: str) -> None:
    chosen = {n: d for n, d in designs(family).items() if contract.kind_of(n).execution != "solo"}
    shared, bare = contract.cohort(family), contract.lane(contract.HEAD_ONLY, contract.SEED, family)
    fresh = {name: contract.lane(design, contract.SEED, family) for name, design in chosen.items()}
    logits = dict(zip(["bare", *fresh], shared.predict(contract.split(), bare, *fresh.values()), strict=True))
    shared.close()
    for name in fresh:
        same = bool(np.allclose(logits[name], logits["bare"], rtol=1e-6))
        assert same == contract.kind_of(name).exact_start, name

    packed = contract.train([(design, contract.SEED) for design in chosen.values()], family)
    for name, one in zip(chosen, packed, strict=True):
        alone = contract.train([(chosen[name], contract.SEED)], family)[0]
        contract.assert_trained_alike(one, alone, family)
        moved = [not torch.equal(value, fresh[name].params[key]) for key, value in one.params.items()]
        assert all(moved) or one.masks or "share" in name or len(moved) > sum(moved) > 0, name


@families
def test_every_method_that_merges_gives_its_logits_from_weights(family: str) -> None:
    for name, design in designs(family).items():
        if not design.placements or not design.placements[0].merges:
            continue
        own = anywhere(design, family)
        for shift in homeless_shifts(own, family):
            shift.data.zero_()
        found = contract.logits(own, family)
        assert apart(by_weights(own, family), found) < 1e-6, name
        if name != "head_only":
            assert apart(contract.logits(with_head(own, family), family), found) > 1e-4, f"{name} changes nothing"
