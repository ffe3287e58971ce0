"""Methods that train part of the weights: their masks against autograd on the bare model, and what never moves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from contract import BATCH, HEAD_ONLY, SITES, STEPS, backbone, cohort, head, lane, split, train
from torch import Tensor

from peftscape.search.backbone import Backbone
from peftscape.search.lane import Lane
from peftscape.search.merge import merged_weights
from peftscape.search.prepare import prepare
from peftscape.spaces.design import Design

LINEARS = ["q", "k", "v", "o", "up", "down"]


def whole(family: str) -> Backbone:
    """The model that the suite's cohorts run on."""
    return backbone(family, "float64")


def design(method: str, **knobs: Any) -> Design:
    training = {"lr": 1e-2, "weight_decay": 0.1}
    return Design.from_json({"placements": [{"method": method, "sites": LINEARS, **knobs}], "training": training})


def weights_of(family: str) -> list[tuple[Any, Tensor]]:
    """Each adapted site with the part of the model's own parameter that belongs to it, d_out x d_in."""
    found = []
    for site in SITES[family].sites:
        if site.kind in LINEARS:
            weight = whole(family).model.get_submodule(site.path).weight
            assert isinstance(weight, Tensor)
            found.append((site, weight))
    return found


def brute_force_gradients(family: str, examples: list[int]) -> list[list[Tensor]]:
    """For each example the gradient of the head-only model's loss for every site's weight."""
    bare, own = cohort(family), lane(HEAD_ONLY, 3, family)
    bare.admit(own)
    rows = []
    for example in examples:
        parameters = [weight for _, weight in weights_of(family)]
        for weight in parameters:
            weight.requires_grad_(True)
        scores = bare.logits([np.array([example])], split())[0]
        target = torch.from_numpy(split().targets[[example]])
        found = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, target), parameters)
        for weight in parameters:
            weight.requires_grad_(False)
        row = []
        for (site, _), grad in zip(weights_of(family), found, strict=True):
            whole = grad.T if site.transposed else grad
            row.append(whole[slice(*site.span)] if site.span else whole)
        rows.append(row)
    bare.close()
    return rows


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("method", "power"), [("fish_mask", "each"), ("child_tuning", "each"), ("sam", "mean")])
def test_the_mask_takes_the_largest_of_the_information(family: str, method: str, power: str) -> None:
    knobs = {"variant": "D", "density": 0.1} if method == "child_tuning" else {"density": 0.1}
    chosen = design(method, examples=6, **knobs)
    own, shared = lane(chosen, 3, family), cohort(family)
    prepare(own, shared)
    rows = brute_force_gradients(family, own.examples(6, len(split())).tolist())
    sites = range(len(rows[0]))
    if power == "each":
        score = [torch.stack([row[s] ** 2 for row in rows]).mean(dim=0) for s in sites]
    else:
        score = [torch.stack([row[s] for row in rows]).mean(dim=0) ** 2 for s in sites]
    flat = torch.cat([s.reshape(-1) for s in score])
    count = round(0.1 * flat.numel())
    wanted = set(flat.argsort(descending=True)[:count].tolist())
    index = own.own[0][0]["index"]
    assert len(index) == count
    assert set(index.tolist()) == wanted
    assert not own.own[0][0]["values"].any(), "the look at the data trains nothing"


@pytest.mark.parametrize("method", ["fish_mask", "sam", "lt_sft", "diff_pruning", "child_tuning"])
def test_weights_outside_the_mask_are_the_backbones_own_in_spite_of_decay(method: str) -> None:
    knobs = {"variant": "D"} if method == "child_tuning" else {}
    density = 0.2
    [own] = train([(design(method, density=density, **knobs), 3)], "bert")
    assert own.failure is None
    moved = 0
    for site, weight in weights_of("bert"):
        after = merged_weights(own, whole("bert"))[f"{site.path}.weight"]
        moved += int((after != weight).sum())
    total = sum(site.d_in * site.d_out for site, _ in weights_of("bert"))
    assert 0 < moved <= round(density * total)
    assert moved > 0.9 * density * total, "hardly any of the chosen weights stays where it was"


def test_lt_sft_rewinds_to_the_largest_changes_of_its_first_phase() -> None:
    chosen, shared = design("lt_sft", density=0.1), cohort("bert")
    own = lane(chosen, 3, "bert")
    shared.admit(own)
    delta, mask = own.own[0][0]["delta"], own.own[0][0]["chosen"]
    for _ in range(STEPS // 2 - 1):
        shared.step()
    assert bool(mask.all()), "the first phase trains them all"
    assert int((delta != 0).sum()) > 0.9 * delta.numel()

    seen = {}

    def last_value(*_: Any) -> None:
        seen["delta"] = delta.detach().clone()

    own.optimizer.register_step_post_hook(last_value)
    shared.step()
    assert not delta.any(), "back to the start"
    assert not own.optimizer.state, "and without momentum"
    count = round(0.1 * delta.numel())
    largest = set(seen["delta"].abs().argsort(descending=True)[:count].tolist())
    assert set(mask.nonzero()[:, 0].tolist()) == largest
    while not own.done:
        shared.step()
    shared.close()
    assert set(delta.nonzero()[:, 0].tolist()) <= largest


def test_diff_pruning_keeps_the_largest_gated_changes_and_trains_them_without_a_gate() -> None:
    own, shared = lane(design("diff_pruning", density=0.1), 3, "bert"), cohort("bert")
    row, method = own.own[0][0], own.design.placements[0].method
    with torch.no_grad():  # gates of all degrees, which twelve steps would not reach
        row["alpha"].normal_(-5, 2, generator=torch.Generator().manual_seed(2))
    shared.admit(own)
    for _ in range(STEPS // 2 - 1):
        shared.step()
    last: dict[str, Tensor] = {}
    own.optimizer.register_step_post_hook(
        lambda *_: last.update({name: row[name].detach().clone() for name in ("delta", "alpha")})
    )
    shared.step()
    assert not own.optimizer.state, "the second phase starts without momentum"
    gate = (torch.sigmoid(last["alpha"] + 5) * 3 - 1.5).clamp(0, 1)
    assert 0.2 < float((gate == 0).double().mean()) < 0.8
    gated, count = gate * last["delta"], round(0.1 * len(gate))
    largest = gated.abs().argsort(descending=True)[:count]
    assert set(row["chosen"].nonzero()[:, 0].tolist()) == set(largest.tolist())
    assert set(largest.tolist()) != set(last["delta"].abs().argsort(descending=True)[:count].tolist())
    torch.testing.assert_close(row["delta"], torch.zeros_like(gated).index_copy(0, largest, gated[largest]))
    while not own.done:
        for source in (None, torch.Generator().manual_seed(own.step)):  # z = 1 whatever alpha says, and without noise
            seen = torch.cat([part["delta"].reshape(-1) for part in method.expand(own.own[0], own.sites[0], source)])
            assert torch.equal(seen, row["delta"])
        shared.step()
    shared.close()
    assert set(row["delta"].nonzero()[:, 0].tolist()) == set(largest.tolist())
    assert not torch.equal(row["delta"][largest], gated[largest])


def test_diff_prunings_gates_close_while_they_train() -> None:
    """The largest step that AdamW makes is its rate: log alpha's is a hundred times that of the change."""
    own, shared = lane(design("diff_pruning"), 3, "bert"), cohort("bert")
    shared.admit(own)
    for _ in range(STEPS // 2 - 1):
        shared.step()
    shared.close()
    rate = own.design.training.lr
    fall = -own.own[0][0]["alpha"].mean().item() / (STEPS // 2 - 1)
    assert 0.3 * 100 * rate < fall < 100 * rate


@pytest.mark.parametrize("method", ["lt_sft", "diff_pruning"])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_both_phases_have_a_step_in_the_shortest_trainings(method: str, steps: int) -> None:
    for fraction in (0.05, 0.5, 0.95):
        of = design(method, density=0.1, first_phase=fraction)
        own, shared = lane(of, 3, "bert", steps=steps), cohort("bert")
        shared.admit(own)
        while not own.done:
            shared.step()
        shared.close()
        row = own.own[0][0]
        assert int((row["delta"] != 0).sum()) == int(row["chosen"].sum()) == round(0.1 * row["delta"].numel())


def test_diff_pruning_that_keeps_all_is_refused() -> None:
    [error] = design("diff_pruning", density=1.0).check(SITES["bert"])
    assert "density: below 1 was expected" in error


def test_diff_prunings_gate_opens_as_often_as_its_formula_says() -> None:
    from peftscape.spaces.methods.diff_pruning import _gate

    location = torch.linspace(-4, 4, 9, dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    gates = _gate((location - 5.0).repeat(20000, 1), draws)
    assert bool(((gates >= 0) & (gates <= 1)).all())
    opened = (gates > 0).double().mean(dim=0)
    # P(z > 0) = sigmoid(log alpha - log(-l / h)), and l = -h here.
    torch.testing.assert_close(opened, 1 / (1 + torch.exp(-location)), rtol=0, atol=0.015)


def test_diff_prunings_penalty_counts_the_open_gates_to_expect_until_it_is_pruned() -> None:
    own, shared = lane(design("diff_pruning", penalty_weight=0.002), 3, "bert"), cohort("bert")
    term = own.penalty()
    assert term is not None
    count = own.own[0][0]["alpha"].numel()
    assert float(term.detach()) == pytest.approx(0.002 * count / (1 + math.exp(-5)), rel=1e-12)
    shared.admit(own)
    while not own.done:
        shared.step()
    shared.close()
    after = own.penalty()
    assert after is not None
    assert float(after.detach()) == 0
    assert int((own.own[0][0]["delta"] != 0).sum()) == round(0.005 * own.own[0][0]["delta"].numel())


def test_child_tuning_f_keeps_a_fraction_of_the_gradient_and_its_mean() -> None:
    own, shared = lane(design("child_tuning", density=0.25), 3, "bert"), cohort("bert")
    shared.admit(own)
    examples = [np.arange(BATCH)]
    key = next(key for key in own.params if key.endswith("/delta"))

    def gradient(training: bool) -> Tensor:
        own.optimizer.zero_grad()
        scores = shared.logits(examples, split(), training=training)
        scores.square().sum().backward()
        grad = own.params[key].grad
        assert grad is not None
        return grad.clone()

    whole, masked = gradient(False), gradient(True)
    shared.close()
    alive = masked != 0
    assert float(alive.double().mean()) == pytest.approx(0.25, abs=0.06)
    torch.testing.assert_close(masked[alive], whole[alive] / 0.25, rtol=1e-9, atol=0)


def test_a_threshold_mask_starts_at_its_sparsity_and_ends_as_bits() -> None:
    own = lane(design("threshold_mask", threshold=0.2), 3, "bert")
    scores = torch.cat([row["score"].reshape(-1) for row in own.own[0]])
    assert float((scores <= 0.2).double().mean()) == pytest.approx(0.2, abs=0.02)
    [trained] = train([(design("threshold_mask", threshold=0.2), 3)], "bert")
    for (_, weight), row in zip(weights_of("bert"), trained.own[0], strict=True):
        assert set(row["score"].unique().tolist()) <= {0.0, 1.0}
        after = weight * row["score"]
        assert bool(((after == weight) | (after == 0)).all())


def test_a_sparse_change_takes_no_more_of_a_file_than_its_values_and_their_places(tmp_path: Any) -> None:
    from peftscape.search.adapter_folder import Card, save
    from peftscape.spaces.price import costs

    for method, density in (("fish_mask", 0.01), ("lt_sft", 0.01), ("lt_sft", 0.3), ("threshold_mask", None)):
        chosen = design(method, **({} if density is None else {"density": density}))
        own = _trained(chosen)
        folder = save(
            own.adapter(), Card(design=chosen, head="class", outputs=4, max_length=40),
            backbone("bert", "float32"), head("bert", "float32"), tmp_path / f"{method}{density}",
        )  # fmt: skip
        size = (folder / "adapter.safetensors").stat().st_size
        assert size == costs(chosen, SITES["bert"], outputs=4, tokens=8, batch=2).adapter_bytes


def _trained(chosen: Design) -> Lane:
    return train([(chosen, 3)], "bert", "float32")[0]
