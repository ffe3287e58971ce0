"""Masks at initialisation keep what brute force says they keep (SparseAdapter's scores, arXiv:2210.04284)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract import BATCH, cohort, lane, split
from plain import design
from torch import Tensor

from peftscape.search.lane import Lane, generator
from peftscape.search.masks import ROUNDS, draw_masks
from peftscape.search.prepare import prepare

LORA: dict[str, Any] = {"method": "lora", "rank": 2, "sites": ["q"], "layers": [1]}


def masked(score: str, row: dict[str, Any], family: str = "bert", sparsity: float = 0.5) -> Lane:
    own, shared = lane(design({**row, "mask": {"sparsity": sparsity, "score": score}}), 5, family), cohort(family)
    draw_masks(own, shared)
    shared.close()
    return own


def scored(own: Lane, row: dict[str, Any], family: str = "bert") -> Lane:
    """The lane without masks, its matrices drawn as the scoring pass draws them."""
    probe = lane(design(row), 5, family)
    with torch.no_grad():
        for key in own.masks:
            noise = torch.empty(probe.params[key].shape).uniform_(-1, 1, generator=generator(5, f"snip/{key}"))
            probe.params[key].copy_(noise / np.sqrt(noise.shape[-1]))
    return probe


def assert_keeps(mask: Tensor, score: Tensor, count: int) -> None:
    kept = torch.topk(score.flatten(), count).indices
    assert set(kept.tolist()) == set(torch.nonzero(mask.flatten()).flatten().tolist())


def test_snip_keeps_what_the_loss_depends_on_most() -> None:
    """By differences: |d loss / d mask| at one, the up-projection drawn as the scoring pass draws it."""
    own = masked("snip", LORA)
    probe, shared = scored(own, LORA), cohort("bert")
    shared.admit(probe)
    rows, eps = own.examples(BATCH, len(split())), 1e-5
    with torch.no_grad():
        for key, mask in own.masks.items():
            flat, score = probe.params[key].data.view(-1), torch.zeros(mask.numel(), dtype=torch.float64)
            for i, entry in enumerate(flat.clone()):
                losses = []
                for factor in (1 + eps, 1 - eps):
                    flat[i] = entry * factor
                    losses.append(shared.losses([rows]).item())
                flat[i] = entry
                score[i] = abs(losses[0] - losses[1])
            assert_keeps(mask, score, mask.numel() // 2)
    shared.close()


def test_grasp_removes_what_the_gradient_norm_misses_least() -> None:
    """By differences: a value times the slope of |g|^2 / 2 along it; the first of them go (arXiv:2002.07376)."""
    row = {**LORA, "rank": 1}
    own = masked("grasp", row)
    probe, shared = scored(own, row), cohort("bert")
    shared.admit(probe)
    rows, eps = own.examples(BATCH, len(split())), 1e-5

    def half_norm() -> float:
        gradients = torch.autograd.grad(shared.losses([rows]).sum(), [probe.params[key] for key in own.masks])
        return 0.5 * sum(float(g.square().sum()) for g in gradients)

    for key, mask in own.masks.items():
        value, score = probe.params[key], torch.zeros(mask.numel(), dtype=torch.float64)
        flat = value.data.view(-1)
        for i, entry in enumerate(flat.clone()):
            sides = []
            for step in (eps, -eps):
                flat[i] = entry + step
                sides.append(half_norm())
            flat[i] = entry
            score[i] = entry * (sides[0] - sides[1]) / (2 * eps)
        assert_keeps(mask, score, mask.numel() // 2)
    shared.close()


def pruned_by_hand(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], kept: float) -> list[np.ndarray[Any, Any]]:
    """SynFlow on y = B A x with |A|, |B|: a path's flow is a product, a weight's score the paths through it."""
    masks = [np.ones_like(a), np.ones_like(b)]
    for turn in range(1, ROUNDS + 1):
        low, high = np.abs(a) * masks[0], np.abs(b) * masks[1]
        scores = [low * high.sum(axis=0)[:, None], high * low.sum(axis=1)[None, :]]
        for mask, score in zip(masks, scores, strict=True):
            count = max(round(kept * mask.size), round(mask.size * kept ** (turn / ROUNDS)))
            order = np.argsort(np.where(mask > 0, -score, np.inf), axis=None, kind="stable")
            mask[...] = 0
            mask.flat[order[:count]] = 1
    return masks


@pytest.mark.parametrize("method", ["lora", "sequential_adapter", "parallel_adapter"])
def test_synflow_keeps_the_strongest_paths_round_by_round(method: str) -> None:
    """Biases are zero at the start and a ReLU lets all of a positive flow through."""
    low, high, knobs = {
        "lora": ("A", "B", {"rank": 4, "sites": ["q"]}),
        "sequential_adapter": ("down", "up", {"size": 6, "sites": ["ffn"], "activation": "relu"}),
        "parallel_adapter": ("down", "up", {"size": 6, "sites": ["ffn"]}),
    }[method]  # fmt: skip
    row = {"method": method, **knobs}  # type: ignore[dict-item]
    own = masked("synflow", row, sparsity=0.75)
    probe = scored(own, row)
    places = sorted({key.rsplit("/", 1)[0] for key in own.masks})
    assert len(places) == 2
    for place in places:
        a, b = (probe.params[f"{place}/{name}"].detach().numpy() for name in (low, high))
        for name, wanted in zip((low, high), pruned_by_hand(a, b, 0.25), strict=True):
            np.testing.assert_array_equal(own.masks[f"{place}/{name}"].numpy(), wanted)
            assert own.masks[f"{place}/{name}"].sum() == wanted.size / 4


def test_synflow_reads_no_data_and_changes_with_the_seed_alone() -> None:
    shared = cohort("bert")
    of = design({**LORA, "mask": {"sparsity": 0.5, "score": "synflow"}})
    one, same, other = lane(of, 5, "bert"), lane(of, 5, "bert"), lane(of, 6, "bert")
    shared.losses = None  # type: ignore[method-assign,assignment]
    for own in (one, same, other):
        draw_masks(own, shared)
    for key, mask in one.masks.items():
        assert torch.equal(mask, same.masks[key])
        assert not torch.equal(mask, other.masks[key])


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("method", ["lora", "pfeiffer_adapter", "parallel_adapter", "prefix_tuning", "prompt_tuning"])
def test_a_scored_mask_keeps_its_share_of_the_start_of_every_matrix(method: str, score: str) -> None:
    own, bare = masked(score, {"method": method}, "gpt2", sparsity=0.6), lane(design({"method": method}), 5, "gpt2")
    matrices = [key for key, value in own.params.items() if key.startswith("0/") and value.ndim > 1]
    assert set(own.masks) == set(matrices)
    for key, mask in own.masks.items():
        assert int(mask.sum()) == mask.numel() - round(0.6 * mask.numel())
        assert torch.equal(own.params[key], bare.params[key] * mask)


def test_several_scores_in_one_design_do_not_mix() -> None:
    rows = [{**LORA, "mask": {"sparsity": 0.5, "score": s}} for s in ("snip", "grasp", "synflow")]
    both, shared = lane(design(*rows), 5, "bert"), cohort("bert")
    draw_masks(both, shared)
    shared.close()
    keys = [f"{i}/q/encoder.layer.1.attention.self.query/A" for i in range(3)]
    assert all(int(both.masks[key].sum()) == both.masks[key].numel() // 2 for key in keys)
    found = [both.masks[key] for key in keys]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("score", ["random", "magnitude", "snip"])
def test_a_mask_keeps_its_share_and_zeroes_the_rest_for_good(score: str) -> None:
    of = design({"method": "lora", "rank": 4, "mask": {"sparsity": 0.75, "score": score}}, weight_decay=0.5, lr=1e-2)
    bare = lane(design({"method": "lora", "rank": 4}), 1, "bert")
    own, shared = lane(of, 1, "bert"), cohort("bert")
    prepare(own, shared)
    start = {key: value.detach().clone() for key, value in own.params.items()}
    shared.admit(own)
    for _ in range(6):
        shared.step()
    shared.close()
    assert set(own.masks) == {key for key in own.params if key.startswith("0/")}
    for key, mask in own.masks.items():
        assert int(mask.sum()) == mask.numel() // 4
        assert torch.equal(start[key], bare.params[key].detach() * mask)
        assert not own.params[key][mask == 0].any()
        assert own.params[key][mask == 1].all()
    if score == "magnitude":  # the oracle of the largest values
        key = next(k for k in own.masks if k.endswith("/A"))
        value = bare.params[key].detach().abs().flatten()
        assert value[own.masks[key].flatten() == 1].min() >= value[own.masks[key].flatten() == 0].max()


def test_snip_masks_do_not_depend_on_neighbours_and_leave_them_as_they_were() -> None:
    of = design({"method": "lora", "rank": 3, "mask": {"sparsity": 0.5, "score": "snip"}})
    alone, beside = lane(of, 1, "bert"), lane(of, 1, "bert")
    empty, busy = cohort("bert"), cohort("bert")
    prepare(alone, empty)
    neighbours = [
        lane(design({"method": "sequential_adapter", "size": 4}), 2, "bert"),
        lane(design({"method": "bitfit"}), 3, "bert"),
    ]
    busy.admit(*neighbours)
    for _ in range(2):
        busy.step()
    before = [{key: value.detach().clone() for key, value in n.params.items()} for n in neighbours]
    prepare(beside, busy)
    busy.close()
    for key, mask in alone.masks.items():
        assert torch.equal(mask, beside.masks[key])
        assert torch.equal(alone.params[key], beside.params[key])
    for neighbour, was in zip(neighbours, before, strict=True):
        assert neighbour.step == 2
        for key, value in neighbour.params.items():
            assert torch.equal(value, was[key])
            assert value.grad is None
