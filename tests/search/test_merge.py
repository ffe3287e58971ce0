"""Every method that says it folds into the weights does: transformers' own model with them gives the lane's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract import ALL, CONFIGS, SITES, cohort, examples, kind_of, lane, logits, move, on
from merged import anywhere, apart, by_transformers, homeless_shifts, with_head
from plain import TOLERANCE, design
from transformers import DebertaV2Config

from peftscape.search.backbone import Backbone
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.search.merge import merged_weights
from peftscape.spaces.sites import site_map
from peftscape.spaces.words import InputError

MERGING = [(name, family) for name, family in ALL if kind_of(name).merges and examples(name, family)]


@on(MERGING)
def test_merged_weights_give_the_lanes_logits(name: str, family: str) -> None:
    # All its sites and its own, all layers and one; and of a method with a size masks as well.
    for of in examples(name, family)[: 2 if kind_of(name).execution == "rewritten" else 4]:
        own = anywhere(of, family)
        if not of.placements[0].merges:
            with pytest.raises(InputError, match="the gate on lora depends on the text"):
                by_transformers(own, family)
            continue
        if shifts := homeless_shifts(own, family):
            with pytest.raises(InputError, match="without a bias"):
                by_transformers(own, family)
            for shift in shifts:
                shift.data.zero_()
        found = logits(own, family)
        assert apart(by_transformers(own, family), found) < TOLERANCE[family], of.label
        if name != "head_only":
            assert apart(logits(with_head(own, family), family), found) > 1e-3, "it changes nothing"


_SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8, "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip


def test_merging_in_bfloat16_keeps_what_is_far_below_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of 16, as Qwen's keys have them, are 0.125 apart in bfloat16; a change of a weight is a thousandth."""
    base = Backbone.from_config(CONFIGS["bert"], dtype="bfloat16")
    own = new_lane(
        design({"method": "lora", "sites": ["k"], "rank": 2, "alpha": 2.0}), seed=3, steps=1, backbone=base,
        head=Head(base, kind="class", outputs=2),
    )  # fmt: skip
    for value in own.params.values():
        value.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    for site in own.sites[0]:
        module = base.model.get_submodule(site.path)
        assert isinstance(module.bias, torch.Tensor)
        module.bias.data.fill_(16.0)
    merged = merged_weights(own, base)
    for row, site in zip(own.own[0], own.sites[0], strict=True):
        module = base.model.get_submodule(site.path)
        assert module.weight.dtype == torch.bfloat16
        wanted = row["B"].detach().float() @ row["A"].detach().float()
        found = merged[f"{site.path}.weight"].float() - module.weight.float()
        assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_a_table_of_positions_is_no_lanes_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeBERTa's 16 relative positions go through q and k too: as many as four lanes with a text of four tokens have."""
    family = "deberta-v2 table"
    monkeypatch.setitem(CONFIGS, family, DebertaV2Config(**_SHAPE, share_att_key=True))
    monkeypatch.setitem(SITES, family, site_map(CONFIGS[family].to_dict()))
    lanes = [lane(design({"method": "lora", "sites": ["q", "k"]}), seed, family) for seed in range(4)]
    move(lanes)
    text = EncodedSplit([np.array([5, 9, 7, 3])], None, np.zeros(1, dtype=np.int64), 0, np.array([4]))

    def predicted(*some: Lane) -> np.ndarray[Any, Any]:
        shared = cohort(family)
        shared.admit(*some)
        found = shared.predict(text, *some)
        shared.close()
        return found

    together = predicted(*lanes)
    for own, found in zip(lanes, together, strict=True):
        np.testing.assert_allclose(found, predicted(own)[0], rtol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_linears_that_project_positions_too_do_not_merge(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane changes what DeBERTa-v2's queries and keys make of texts, its weights what they make of positions too."""
    family = f"deberta-v2 {shared}"
    monkeypatch.setitem(CONFIGS, family, DebertaV2Config(**_SHAPE, share_att_key=shared))
    monkeypatch.setitem(SITES, family, site_map(CONFIGS[family].to_dict()))
    others: dict[str, Any] = {"method": "lora", "sites": ["v", "o", "up", "down"]}
    for row in ({"method": "lora", "sites": ["q"]}, {"method": "dora", "sites": ["k"]}, {"method": "bitfit"}, others):
        own = anywhere(design(row), family)
        if shared and row != others:
            with pytest.raises(InputError, match="projects the table of relative positions too"):
                by_transformers(own, family)
        else:
            assert apart(by_transformers(own, family), logits(own, family)) < 1e-5
