"""Methods that train vectors, against weights folded by hand; a random subspace, against the matrix it stands for."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from contract import CONFIGS, SITES, backbone, lane, logits, move, split
from scipy.linalg import hadamard as matrix
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from peftscape.search.lane import Lane
from peftscape.spaces.design import Design
from peftscape.spaces.methods.base import Lanes
from peftscape.spaces.methods.intrinsic_said import IntrinsicSAID
from peftscape.spaces.ops.fastfood import draw_parts, fastfood, hadamard, random_parts
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import SiteMap, site_map

LAYERS, D, F = 12, 768, 3072
ROBERTA: SiteMap = site_map({
    "model_type": "roberta", "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 12,
    "intermediate_size": F, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    "pad_token_id": 1,
})  # fmt: skip
LLAMA = site_map({
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
})  # fmt: skip


def count(sites: SiteMap, *placements: dict[str, Any]) -> int:
    return adapter_size(Design.from_json({"placements": list(placements)}), sites)


def folded(own: Lane) -> Any:
    """transformers' own classifier on the backbone's weights, in which y becomes s y + t at each site of the lane."""
    config = copy.deepcopy(CONFIGS["bert"])
    config.num_labels, config._attn_implementation = 4, "eager"
    model: Any = AutoModelForSequenceClassification.from_config(config).to(torch.float64).eval()
    model.base_model.load_state_dict(backbone("bert").model.state_dict())
    with torch.no_grad():
        for key, value in own.params.items():
            if key.startswith("head/"):
                model.get_parameter(key.removeprefix("head/")).copy_(value)
        for site, row in zip(own.sites[0], own.own[0], strict=True):
            module = model.base_model.get_submodule(site.path)
            scale, shift = (row[name] for name in (("scale", "shift") if "scale" in row else ("w", "b")))
            module.weight.mul_(scale.unsqueeze(-1) if module.weight.ndim == 2 else scale)
            module.bias.mul_(scale).add_(shift)
    return model


@pytest.mark.parametrize(
    "row",
    [
        {"method": "ssf"},
        {"method": "ssf", "sites": ["q", "norm"], "layers": [1]},
        {"method": "hadamard_adapter"},
        {"method": "hadamard_adapter", "sites": ["ffn"]},
    ],
)
def test_scales_and_shifts_are_those_of_the_folded_weights(row: dict[str, Any]) -> None:
    own = lane(Design.from_json({"placements": [row]}), 1, "bert")
    move([own])
    model = folded(own)
    found = logits(own, "bert")
    for i in range(12):
        with torch.no_grad():
            wanted = model(input_ids=torch.from_numpy(split().ids[i]).unsqueeze(0)).logits[0]
        torch.testing.assert_close(found[i], wanted, rtol=1e-9, atol=1e-9)


def test_vectors_count_what_their_papers_count() -> None:
    assert count(ROBERTA, {"method": "ln_tuning"}) == 4 * D * LAYERS + 2 * D
    assert count(LLAMA, {"method": "ln_tuning"}) == 2 * 4096 * 32 + 4096  # a gain alone
    hadamard_with_norm = [{"method": "hadamard_adapter"}, {"method": "ln_tuning", "after": "attention"}]
    assert count(ROBERTA, hadamard_with_norm[0]) == 2 * D * LAYERS
    assert count(ROBERTA, *hadamard_with_norm) == 2 * D * LAYERS + 2 * D * LAYERS
    assert count(ROBERTA, {"method": "ssf", "sites": ["q", "up", "norm"]}) == LAYERS * 2 * (D + F + 2 * D) + 2 * D


@pytest.mark.parametrize(
    ("family", "norm"),
    [("bert", "attention.output.LayerNorm"), ("gpt2", "ln_2"), ("llama", "post_attention_layernorm")],
)
def test_the_norm_after_an_attention_is_the_first_to_read_its_sum(family: str, norm: str) -> None:
    of = Design.from_json({"placements": [{"method": "ln_tuning", "after": "attention"}]})
    found = of.placements[0].where(SITES[family])
    assert len(found) == SITES[family].layers
    assert all(site.path.endswith(norm) for site in found)


# -- the random subspace


def dense(size: int, seed: int, columns: int) -> np.ndarray[Any, Any]:
    """H G P H B as a matrix, from the parts that were drawn."""
    signs, order, normal, _ = (part.double().numpy() for part in random_parts(size, seed))
    length = len(signs)
    h = matrix(length).astype(float)
    whole = h @ np.diag(normal) @ np.eye(length)[order.astype(int)] @ h @ np.diag(signs)
    return whole[:size, :columns] / np.sqrt(size * (normal**2).sum())


def test_the_fast_transform_is_hadamards_matrix() -> None:
    x = torch.randn(64, dtype=torch.float64)
    np.testing.assert_allclose(hadamard(x).numpy(), matrix(64) @ x.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "columns"), [(96, 10), (128, 128), (200, 1)])
def test_fastfood_is_its_matrix_and_keeps_lengths(size: int, columns: int) -> None:
    theta = torch.randn(columns, dtype=torch.float64)
    wanted = dense(size, 7, columns)
    np.testing.assert_allclose(fastfood(theta, size, 7).numpy(), wanted @ theta.numpy(), rtol=1e-5, atol=1e-6)
    lengths = [float(np.square(dense(size, seed, columns)).sum()) / columns for seed in range(20)]
    assert np.mean(lengths) == pytest.approx(1, rel=0.1)


def test_said_adds_its_scaled_projection_to_each_weight_and_counts_its_dimension() -> None:
    of = Design.from_json({"placements": [{"method": "intrinsic_said", "size": 20, "layers": [0]}]})
    own = lane(of, 3, "bert")
    sites, method = own.sites[0], of.placements[0].method
    trained = {key: value for key, value in own.params.items() if key.startswith("0/")}
    assert sum(v.numel() for v in trained.values()) == adapter_size(of, SITES["bert"]) == 20
    assert trained["0/theta"].numel() == 20 - len(sites)
    move([own])
    rows = method.expand(own.own[0], sites, None)
    x, y = torch.randn(1, 5, 32, dtype=torch.float64), torch.randn(1, 5, 32, dtype=torch.float64)
    changes = []
    for row, held in zip(rows, own.own[0], strict=True):
        # theta's image, in the span of the columns of M: the change is linear in theta and scale.
        again = method.expand([{**h, "theta": 2 * h["theta"]} for h in own.own[0]], sites, None)
        torch.testing.assert_close(again[len(changes)]["delta"], 2 * row["delta"])
        changes.append(row["delta"] / held["scale"])
        found = method.apply(Lanes({"delta": row["delta"].unsqueeze(0)}), x, y)
        torch.testing.assert_close(found, y + x @ row["delta"].T)
    assert not torch.allclose(changes[0], changes[1])  # each weight has a projection of its own


def test_a_seed_draws_its_projections_again_and_another_draws_others() -> None:
    assert torch.equal(random_parts(96, 5)[1], draw_parts(96, 5)[1])
    assert not torch.equal(random_parts(96, 5)[1], random_parts(96, 6)[1])
    of = Design.from_json({"placements": [{"method": "intrinsic_said", "size": 20}]})
    seeds: list[Tensor] = [lane(of, n, "bert").fixed["0/seed"] for n in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert IntrinsicSAID(size=2000).check(SITES["bert"].select(["q"], [0])[0]) is not None
