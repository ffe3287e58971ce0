"""Layers that run again in the backward: the same gradients, from less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import contract
import numpy as np
import pytest
import torch
import two_stacks
from contract import backbone, head, lane, move, split
from counted import kept_for, one_lane
from transformers import BertConfig

from peftscape.search.cohort import Cohort
from peftscape.search.lane import Lane
from peftscape.search.memory import peak_of
from peftscape.search.prepare import prepare
from peftscape.search.states import StateCache
from peftscape.spaces.design import Design
from peftscape.spaces.price import costs
from peftscape.spaces.sites import site_map

ROWS = np.arange(5)
#: Of a name of its own, since the suite keeps backbones by their names.
T5 = "t5 of two layers"
LORA: dict[str, Any] = {"method": "lora", "rank": 3}
MIXTURE: dict[str, Any] = {"method": "adamix", "size": 3, "agreement": 0.7}
#: Of a mixed cohort.
PLACEMENTS: list[list[dict[str, Any]]] = [
    [LORA | {"gate": True}, {"method": "sequential_adapter", "size": 4}, {"method": "prefix_tuning", "length": 3}],
    [{"method": "prompt_tuning", "length": 4}],
    [{"method": "prefix_tuning", "length": 5, "gate": True}],
    [{"method": "tiny_attention", "size": 3}, LORA | {"sites": ["up", "down"], "drop": 1}],
    [{"method": "dylora", "rank": 5}, {"method": "residual_adapter", "sites": ["block"], "size": 3}],
]
LST: list[dict[str, Any]] = [{"method": "lst", "size": 4}]
GRASP: list[dict[str, Any]] = [LORA | {"mask": {"sparsity": 0.5, "score": "grasp"}}]


@pytest.fixture(scope="module", autouse=True)
def t5() -> Iterator[None]:
    """The suite's functions on an encoder-decoder too."""
    with pytest.MonkeyPatch.context() as patch:
        config: Any = copy.deepcopy(two_stacks.CONFIGS["t5"])
        config.d_kv = 8
        patch.setitem(contract.CONFIGS, T5, config)
        patch.setitem(contract.SITES, T5, site_map(config.to_dict()))
        yield


def design(placements: list[dict[str, Any]]) -> Design:
    return Design.from_json({"placements": placements})


class Counted(Cohort):
    """Counts how often the first adapted linear of the last layer runs."""

    def gradients(self, examples: Any) -> torch.Tensor:
        self.ran = 0
        [*_, site] = [s for s in self.backbone.sites.sites if s.kind == "q"]

        def count(*_: Any) -> None:
            self.ran += 1

        hook = self.backbone.model.get_submodule(site.path).register_forward_pre_hook(count)
        try:
            return super().gradients(examples)
        finally:
            hook.remove()


def run(placements: list[list[dict[str, Any]]], family: str, *, cached: bool = False, **how: Any) -> list[Lane]:
    """Lanes of these designs with the gradients of one step, at a random point."""
    cache = StateCache(backbone(family, "float64")) if cached else None
    shared = Counted(
        backbone(family, "float64"), head(family, "float64"), split(), batch_size=len(ROWS), cache=cache, **how
    )
    lanes = [lane(design(p), 3 + i, family) for i, p in enumerate(placements)]
    for own in lanes:
        prepare(own, shared)
    move(lanes)
    shared.admit(*lanes)
    losses = shared.gradients([ROWS + 2 * i for i in range(len(lanes))])
    for own, loss in zip(shared.lanes, losses.tolist(), strict=True):
        own.losses.append(loss)
        own.wall_s = shared.ran
    shared.close()
    return lanes


def assert_alike(found: list[Lane], wanted: list[Lane]) -> None:
    for own, other in zip(found, wanted, strict=True):
        assert own.losses == pytest.approx(other.losses, rel=1e-9)
        assert sum(value.grad is not None for value in own.params.values()) > 0
        for key, value in own.params.items():
            assert value.grad is not None, key
            torch.testing.assert_close(value.grad, other.params[key].grad, rtol=1e-6, atol=1e-12, msg=key)


@pytest.mark.parametrize("family", ["bert", "llama", T5])
def test_gradients_are_those_without(family: str) -> None:
    mixed = PLACEMENTS + ([LST] if family != T5 else [])
    for placements in (mixed, [[MIXTURE]], [[{"method": "full_finetuning"}]]):
        plain, again = run(placements, family), run(placements, family, checkpointing=True)
        assert_alike(again, plain)
        assert again[0].wall_s == 2 * plain[0].wall_s > 0, "each layer runs once more"


def test_gradients_are_those_without_where_the_head_reads_single_tokens_of_kept_states() -> None:
    for placements in ([LORA | {"layers": "1"}], GRASP):
        plain = run([placements, PLACEMENTS[0]], "bert")
        assert_alike(run([placements, PLACEMENTS[0]], "bert", cached=True, checkpointing=True), plain)


@pytest.mark.parametrize("placements", [[LORA], LST], ids=["lora", "lst"])
def test_what_is_kept_is_each_layers_input_and_the_plan_knows_it(placements: list[dict[str, Any]]) -> None:
    layers, width, batch, tokens = 6, 64, 8, 24
    config = BertConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=256,
        pad_token_id=1,
    )  # fmt: skip
    kept, peak, told = {}, {}, {}
    for checkpointing in (False, True):
        shared, forward = one_lane(design(placements), config, batch, tokens)
        shared.forward.checkpointing = checkpointing
        model, [own] = shared.backbone.model, shared.lanes
        held = [*model.parameters(), *model.buffers(), *own.params.values()]
        kept[checkpointing] = kept_for(held, forward)[1]
        ids = [np.arange(batch)]
        peak[checkpointing] = peak_of(lambda cohort=shared, ids=ids: cohort.gradients(ids), torch.device("cpu"), held)
        trained = sum(t.nbytes for t in own.params.values())
        peak[checkpointing] += sum(t.nbytes for t in held) + 2 * trained
        told[checkpointing] = costs(
            own.design, shared.backbone.sites, outputs=2, tokens=tokens, batch=batch, checkpointing=checkpointing
        ).peak_bytes
        assert told[checkpointing] == pytest.approx(peak[checkpointing], rel=0.15)
    if placements == LST:  # whose layers keep nothing of the backbone's as it is
        assert kept[True] == kept[False]
    else:
        inputs = layers * batch * tokens * width * 4
        assert inputs < kept[True] < 1.1 * inputs < kept[False] / 5
        assert peak[True] < peak[False] / 1.5
