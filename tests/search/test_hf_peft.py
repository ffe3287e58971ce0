"""Tuners of HF peft as designs: counted before they are built, trained alone, and giving what peft gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from contract import HEAD_ONLY, OUTPUTS, SITES, backbone, cohort, head, lane, logits, move, split
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftscape.search.export import Card, load, save
from peftscape.search.lane import new_lane
from peftscape.spaces.design import Design
from peftscape.spaces.price import adapter_size
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError

_checkpointing = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
pytestmark = [_checkpointing, pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")]

TUNERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 3},
    "MISS": {"r": 4},
    "SHIRA": {"r": 2},
    "HIRA": {"r": 4},
    "RANDLORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "VERA": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "HRA": {"r": 4},
}


def design(tuner: str, **more: Any) -> Design:
    row = {"method": f"peft:{tuner}", "config": TUNERS[tuner], "sites": ["q", "v"], **more}
    return Design.from_json({"placements": [row], "training": {"lr": 1e-2}})


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_lane_gives_what_peft_gives(tuner: str, family: str) -> None:
    """With the lane's own weights in a model that peft itself has wrapped."""
    base, own = backbone(family, "float64"), lane(design(tuner), 3, family)
    move([own])
    found = logits(own, family)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[tuner](
        target_modules=[s.path for s in SITES[family].sites if s.kind in ("q", "v")], **TUNERS[tuner]
    )
    plain = copy.deepcopy(base.model, {id(base.attending): base.attending})
    torch.manual_seed(3)
    wrapped = get_peft_model(plain, config).double()
    theirs = {
        n.removeprefix("base_model.").removeprefix("model."): p
        for n, p in (*wrapped.named_parameters(), *wrapped.named_buffers())
    }
    held = {**own.params, **own.fixed}
    with torch.no_grad():
        for key, value in held.items():
            if key.startswith("0/"):
                theirs[key.removeprefix("0/")].copy_(value)
    bare = lane(HEAD_ONLY, 3, family)
    for key, value in bare.params.items():
        value.data.copy_(own.params[key])
    bare.model = plain
    torch.testing.assert_close(found, logits(bare, family), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, logits(_without(bare), family)), "the tuner does something"


def _without(bare: Any) -> Any:
    bare.model = None
    return bare


@pytest.mark.parametrize("tuner", TUNERS)
def test_it_is_counted_before_it_is_built_and_trains_alone(tuner: str) -> None:
    base = backbone("bert", "float64")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    chosen, shared = design(tuner), cohort("bert")
    assert chosen.solo
    own = lane(chosen, 3, "bert")
    adapters = {key: value for key, value in own.params.items() if key.startswith("0/")}
    assert adapter_size(chosen, SITES["bert"]) == sum(v.numel() for v in adapters.values()) > 0
    start = {key: value.detach().clone() for key, value in adapters.items()}
    shared.admit(own)
    for _ in range(4):
        shared.step()
    shared.close()
    assert own.failure is None
    assert all(not torch.equal(value, start[key]) for key, value in adapters.items())
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "the backbone stays as it was"


@pytest.mark.parametrize("tuner", TUNERS)
def test_its_file_brings_it_back_with_its_random_parts(tuner: str, tmp_path: Path) -> None:
    base, on_top = backbone("bert", "float32"), head("bert", "float32")
    chosen = design(tuner)
    own = new_lane(chosen, seed=5, steps=1, backbone=base, head=on_top)
    move([own])
    card = Card(design=chosen, head="class", outputs=OUTPUTS, max_length=40, task={"seed": 5})
    wanted = logits(own, "bert", "float32").numpy()
    save(own.adapter(), card, base, on_top, tmp_path)
    found = load(tmp_path, model=base).encoded_logits(split())[: len(wanted)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_layers_and_sites_say_where_it_goes() -> None:
    own = lane(design("MISS", layers=[1], sites=["down"]), 0, "bert")
    adapters = [key for key in own.params if key.startswith("0/")]
    assert adapters
    assert all(key.startswith("0/encoder.layer.1.output.dense.") for key in adapters)


def test_two_seeds_start_apart_and_one_seed_alike() -> None:
    one, same, other = (lane(design("LORA"), seed, "bert") for seed in (1, 1, 2))
    key = next(key for key in one.params if "lora_A" in key)
    assert torch.equal(one.params[key], same.params[key])
    assert not torch.equal(one.params[key], other.params[key])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"method": "peft:MISSS"}, 'no tuner "MISSS" that targets modules. Did you mean "MISS"'),
        ({"method": "peft:MISS", "config": {"rr": 3}}, 'rr: no such key. Did you mean "r"'),
        ({"method": "peft:MISS", "config": {"r": "three"}}, "r: int expected, not 'three'"),
        ({"method": "peft:PROMPT_TUNING"}, 'no tuner "PROMPT_TUNING"'),
    ],
)
def test_what_peft_does_not_know_is_said(row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        Design.from_json({"placements": [row]})


def test_what_peft_refuses_is_said_before_anything_trains() -> None:
    errors = Design.from_json({"placements": [{"method": "peft:MISS", "config": {"r": 4096}}]}).check(SITES["bert"])
    assert errors
    assert "peft refuses it" in errors[0]


def test_a_space_searches_its_knobs() -> None:
    option = {"method": "peft:MISS", "sites": ["q", "v"], "config": {"r": {"choice": [2, 4, 8]}}}
    space = read_space({"name": "miss", "slots": [{"options": [option]}]}, SITES["bert"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    ranks = set()
    for _ in range(12):
        trial = study.ask()
        found = space.suggest(trial)
        ranks.add(found.placements[0].method.knobs()["r"])
        assert space.params(found) == trial.params
        assert Design.from_json(found.json()).digest == found.digest
    assert ranks == {2, 4, 8}


def test_a_lane_that_begins_beside_others_has_nothing_of_them() -> None:
    """Its model is copied while hooks of lanes that train are on the backbone."""
    others = cohort("bert")
    wanted = logits(lane(design("MISS"), 3, "bert"), "bert")
    others.admit(lane(Design.from_json({"placements": [{"method": "lora", "sites": ["k", "up"]}]}), 0, "bert"))
    own = lane(design("MISS"), 3, "bert")
    others.close()
    torch.testing.assert_close(logits(own, "bert"), wanted, rtol=0, atol=0)
