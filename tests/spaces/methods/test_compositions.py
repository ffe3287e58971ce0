"""Compositions do what their papers say: prototypes under learned masks, gates, layers left out."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from contract import CONFIGS, SITES, cohort, lane, logits, move, split
from plain import ROWS, Params, assert_equals_plain, close, design, lane_logits, on_output
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface

from peftscape.search.lane import Lane
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import site_map
from peftscape.spaces.words import InputError

families = pytest.mark.parametrize("family", CONFIGS)

# -- share: ProPETL's prototype and masks (arXiv:2305.17682)

SHARED = {
    "lora": {"method": "lora", "rank": 3},
    "sequential_adapter": {"method": "sequential_adapter", "size": 4},
    "prefix_tuning": {"method": "prefix_tuning", "length": 5},
}
KEPT = 0.4


def prototypes(own: Lane) -> dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]:
    """By kind and name the prototype, and by path each site's scores."""
    found: dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]] = {}
    placed = [(key.split("/")[1:], value) for key, value in own.params.items() if key.startswith("0/")]
    for (kind, *rest), value in placed:
        if len(rest) == 1:
            found[kind, rest[0]] = (value, {})
    for (kind, *rest), value in placed:
        if len(rest) == 2:
            found[kind, rest[1].removeprefix("score_")][1][rest[0]] = value
    return found


def masked(value: Tensor, score: Tensor | None) -> Tensor:
    """The prototype where the score is among its largest `KEPT` share."""
    if score is None:
        return value.detach()
    keep = max(1, round(KEPT * score.numel()))
    border = score.detach().flatten().sort(descending=True).values[keep - 1]
    return value.detach() * (score.detach() >= border)


@families
@pytest.mark.parametrize("method", SHARED)
def test_each_site_sees_the_prototype_under_its_mask_and_the_gradient_goes_straight_through(
    method: str, family: str
) -> None:
    """The oracle is a lane of the plain method, with the masked prototype written into every site."""
    own = lane(design({**SHARED[method], "share": {"kept": KEPT}}), 3, family)
    plain = lane(design(SHARED[method]), 3, family)
    move([own])
    found = prototypes(own)
    with torch.no_grad():
        for key, value in plain.params.items():
            if key.startswith("0/"):
                _, kind, path, name = key.split("/")
                prototype, scores = found[kind, name]
                value.copy_(masked(prototype, scores.get(path)))
            else:
                value.copy_(own.params[key])
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=(len(ROWS), 4)))
    for one in (own, plain):
        (lane_logits(one, family) * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(logits(own, family), logits(plain, family))
    for (kind, name), (prototype, scores) in found.items():
        gradients = {
            k.split("/")[2]: v.grad
            for k, v in plain.params.items()
            if k.startswith(f"0/{kind}/") and k.endswith(f"/{name}")
        }
        assert len(gradients) == 2, "both layers share it"
        total = torch.zeros_like(prototype)
        for path, gradient in gradients.items():
            assert gradient is not None
            score = scores.get(path)
            total += gradient * (masked(torch.ones_like(prototype), score))
            if score is not None:
                close(score.grad, gradient * prototype.detach(), "bert", name)
        close(prototype.grad, total, "bert", name)


@pytest.mark.parametrize("method", SHARED)
def test_a_trained_mask_is_binary_and_keeps_its_share(method: str) -> None:
    own, shared = lane(design({**SHARED[method], "share": {"kept": KEPT}}, lr=1e-2), 3, "bert", steps=4), cohort("bert")
    start = {key: value.detach().clone() for key, value in own.params.items()}
    shared.admit(own)
    for _ in range(3):
        shared.step()
    before = shared.predict(split(), own)
    unfolded = [{n: v.detach().clone() for n, v in row.items()} for row in own.seen[0]]
    assert before.any()
    shared.step()
    shared.close()
    scores = {key: value for key, value in own.params.items() if "/score_" in key}
    assert scores
    for key, score in scores.items():
        assert set(score.unique().tolist()) == {0.0, 1.0}
        assert int(score.sum()) == round(KEPT * score.numel())
        assert not torch.equal(start[key], score)
    own.unfold(training=False)
    for row, old in zip(own.seen[0], unfolded, strict=True):
        for name, value in row.items():
            if value.ndim > 1:
                assert int((value != 0).sum()) <= round(KEPT * value.numel())
                assert value.shape == old[name].shape


def test_a_shared_method_counts_its_prototype_once_and_a_mask_for_each_layer() -> None:
    d, r, layers = 32, 3, 2
    whole = adapter_size(design({**SHARED["lora"], "sites": ["q"]}), SITES["bert"])
    assert whole == layers * 2 * d * r
    shared = design({**SHARED["lora"], "sites": ["q"], "share": {"kept": 1.0}})
    assert adapter_size(shared, SITES["bert"]) == 2 * d * r
    learnt = design({**SHARED["lora"], "sites": ["q"], "share": {"kept": 0.5}})
    assert adapter_size(learnt, SITES["bert"]) == 2 * d * r + layers * 2 * d * r


@pytest.mark.parametrize("method", ["adamix", "prefix_tuning_mlp", "adalora"])
def test_a_method_that_sets_its_own_tensors_cannot_share_them(method: str) -> None:
    with pytest.raises(InputError, match=rf"share: {method} sets tensors of its sites itself"):
        design({"method": method, "share": {"kept": 0.5}})


# -- gate: UniPELT's sigmoid(w x + b), averaged over each text (arXiv:2110.07577)


def gate_of(t: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.sigmoid(linear(x, t["gate"][None], t["gate_bias"])).mean(dim=1, keepdim=True)


def tensors(params: Params, path: str, kind: str) -> dict[str, Tensor]:
    return {key.rsplit("/", 1)[1]: value for key, value in params.items() if key.startswith(f"0/{kind}/{path}/")}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_gated_lora_is_its_formula(family: str) -> None:
    def change(model: nn.Module, params: Params) -> None:
        for site in SITES[family].sites:
            if t := tensors(params, site.path, site.kind):

                def lora(x: Tensor, y: Tensor, t: dict[str, Tensor] = t) -> Tensor:
                    return y + gate_of(t, x) * 2.0 * linear(linear(x, t["A"]), t["B"])

                on_output(model.get_submodule(site.path), lora)

    assert_equals_plain(design({"method": "lora", "rank": 4, "alpha": 8.0, "gate": True}), family, change)


@families
def test_a_gated_adapter_weighs_its_change_by_what_the_sub_layer_reads(family: str) -> None:
    """h_A <- G_A h_A, G_A from the direct input of the feed-forward network (sec. 3.2 of the paper)."""

    def change(model: nn.Module, params: Params) -> None:
        for site in SITES[family].sites:
            if t := tensors(params, site.path, site.kind):
                read: list[Tensor] = []

                def keep(module: Any, args: Any, kwargs: Any, read: list[Tensor] = read) -> None:
                    read[:] = [args[0] if args else kwargs["hidden_states"]]

                def adapter(x: Tensor, y: Tensor, t: dict[str, Tensor] = t, read: list[Tensor] = read) -> Tensor:
                    hidden = torch.relu(linear(read[0], t["down"], t["down_bias"]))
                    return y + gate_of(t, read[0]) * 3.0 * linear(hidden, t["up"], t["up_bias"])

                if site.source is not None:
                    model.get_submodule(site.source).register_forward_pre_hook(keep, with_kwargs=True)
                on_output(model.get_submodule(site.path), adapter)

    of = design({"method": "parallel_adapter", "size": 5, "scale": 3.0, "gate": True})
    assert_equals_plain(of, family, change)


@families
def test_a_gated_prefix_weighs_its_keys_and_values(family: str) -> None:
    """[G_P P_k; K] and [G_P P_v; V], G_P from what the attention reads, in plain eager attention."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **more: Any) -> Any:
        t, x = module.prefix_tensors, module.read
        heads, width, length = key.shape[1], key.shape[3], key.shape[2]
        gate = gate_of(t, x)
        before = [(gate * t[n]).view(1, -1, heads, width).transpose(1, 2) for n in ("keys", "values")]
        groups = query.shape[1] // heads
        key, value = (
            torch.cat([p, s], dim=2).repeat_interleave(groups, dim=1) for p, s in zip(before, (key, value), strict=True)
        )
        scores = query @ key.mT * scaling
        if SITES[family].causal:
            late = torch.ones(length, length).triu(1) > 0
            scores = scores.masked_fill(torch.cat([torch.zeros(length, 5) > 0, late], dim=1), -math.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def change(model: nn.Module, params: Params) -> None:
        AttentionInterface.register("gated_prefix", attend)  # type: ignore[arg-type]
        model.set_attn_implementation("gated_prefix")  # type: ignore[operator]
        for site in SITES[family].sites:
            if t := tensors(params, site.path, site.kind):
                module: Any = model.get_submodule(site.path)
                module.prefix_tensors = t

                def keep(module: Any, args: Any, kwargs: Any) -> None:
                    module.read = args[0] if args else kwargs["hidden_states"]

                module.register_forward_pre_hook(keep, with_kwargs=True)

    of = design({"method": "prefix_tuning", "length": 5, "positions": "keep", "gate": True})
    assert_equals_plain(of, family, change)


@families
@pytest.mark.parametrize("method", ["lora", "sequential_adapter", "parallel_adapter", "prefix_tuning", "ia3"])
def test_a_gated_text_does_not_depend_on_its_neighbours(method: str, family: str) -> None:
    own = lane(design({"method": method, "gate": True}), 3, family)
    move([own])
    together, shared = logits(own, family), cohort(family)
    shared.admit(own)
    with torch.no_grad():
        alone = torch.cat([shared.logits([np.array([i])], split())[0] for i in range(12)])
        beside = shared.logits([np.arange(31, -1, -1)], split())[0].flip(0)[:12]
    shared.close()
    close(alone, together)
    close(beside, together)


def test_a_closed_gate_is_the_backbone_and_an_open_one_the_method() -> None:
    of = design({"method": "sequential_adapter", "size": 4, "gate": True})
    own, bare = lane(of, 3, "bert"), lane(design({"method": "sequential_adapter", "size": 4}), 3, "bert")
    move([own])
    with torch.no_grad():
        for key, value in own.params.items():
            if key.endswith("/gate_bias"):
                value.fill_(60.0)
            elif key.endswith("/gate"):
                value.zero_()
            else:
                bare.params[key].copy_(value)
        close(logits(own, "bert"), logits(bare, "bert"))
        for key, value in own.params.items():
            if key.endswith("/gate_bias"):
                value.fill_(-60.0)
            elif key.startswith("0/"):
                bare.params.get(key, value).zero_()
    close(logits(own, "bert"), logits(bare, "bert"))


# -- drop: robust AdapterDrop (arXiv:2010.11918, sec. 4.1)


@pytest.mark.parametrize("method", ["sequential_adapter", "lora", "ia3"])
def test_a_dropped_layer_is_the_backbones_and_evaluation_is_whole(method: str) -> None:
    own, whole = lane(design({"method": method, "drop": 2}), 3, "bert"), lane(design({"method": method}), 3, "bert")
    upper, none = lane(design({"method": method, "layers": [1]}), 3, "bert"), lane(design(), 3, "bert")
    move([own])
    with torch.no_grad():
        for other in (whole, upper, none):
            for key, value in other.params.items():
                value.copy_(own.params[key])
    wanted = [logits(other, "bert") for other in (whole, upper, none)]
    seen: Counter[int] = Counter()
    for own.step in range(300):
        own.unfold(training=True)
        keeps = [
            int(row["keep"])
            for row, site in zip(own.seen[0], own.sites[0], strict=True)
            if site.kind in ("ffn", "q", "k")
        ]
        lowest = 2 - sum(keeps)
        assert keeps == [int(layer >= lowest) for layer in range(2)], "layers go from below"
        if seen[lowest] == 0:
            with torch.no_grad():
                close(lane_logits(own, "bert", training=True), wanted[lowest][: len(ROWS)])
        seen[lowest] += 1
    assert min(seen[n] for n in range(3)) > 70, "each of 0 to 2 layers, equally often"
    close(logits(own, "bert"), wanted[0])


def test_a_dropped_layer_gets_no_gradient() -> None:
    own, shared = lane(design({"method": "sequential_adapter", "drop": 1}), 3, "bert"), cohort("bert")
    move([own])
    shared.admit(own)
    found = set()
    for own.step in range(12):
        shared.losses([ROWS]).sum().backward()  # type: ignore[no-untyped-call]
        left = {
            key: bool(value.grad.any())
            for key, value in own.params.items()
            if value.grad is not None and key.startswith("0/")
        }
        low = {moved for key, moved in left.items() if "layer.0" in key}
        assert {moved for key, moved in left.items() if "layer.1" in key} == {True}
        assert len(low) == 1
        found |= low
        own.optimizer.zero_grad()
    shared.close()
    assert found == {True, False}


def test_what_lies_below_the_layers_is_never_dropped() -> None:
    own = lane(design({"method": "bitfit", "drop": 1}), 3, "bert")
    assert any(site.layer < 0 for site in own.sites[0])
    for training in (True, False):
        own.unfold(training)
        for row, site in zip(own.seen[0], own.sites[0], strict=True):
            assert int(row["keep"]) == 1 or (training and site.layer == 0)


def test_a_gate_on_norms_of_single_heads_is_refused() -> None:
    """Qwen3 norms the queries of each head by itself: such a norm is called with tokens x heads, not with texts."""
    sites = site_map(
        {
            "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": 60,
        }
    )  # fmt: skip
    row = {"method": "ln_tuning", "gate": True}
    assert design(row).check(sites) == ["placements[0].gate: the norms of single heads of this qwen3 see no text"]
    assert design({**row, "after": "attention"}).check(sites) == []
    assert design({"method": "ln_tuning"}).check(sites) == []
