"""Tuners of HF peft as designs: counted before they are built, trained alone, and giving what peft gives."""

from __future__ import annotations

import copy
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import searches
import torch
from contract import HEAD_ONLY, OUTPUTS, SITES, backbone, cohort, head, lane, logits, move, split, trained_alone
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftscape.search.cohort import Cohort
from peftscape.search.export import Card, load, save
from peftscape.search.guarded import Guarded
from peftscape.search.lane import new_lane
from peftscape.search.states import StateCache
from peftscape.search.study import run_search
from peftscape.spaces.design import Design
from peftscape.spaces.hf_peft import tuner as tuner_of
from peftscape.spaces.peft_knobs import REFUSED, REFUSED_LATE
from peftscape.spaces.price import adapter_size
from peftscape.spaces.record import Failure
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


def test_a_tuner_of_upper_layers_trains_beside_kept_states_as_without() -> None:
    """Its layers are copies of the backbone's."""
    base = backbone("bert", "float64")
    losses = []
    for cache in (None, StateCache(base)):
        shared = Cohort(base, head("bert", "float64"), split(), batch_size=3, cache=cache)
        own = lane(design("MISS", layers=[1]), 3, "bert")
        shared.admit(own)
        for _ in range(4):
            shared.step()
        shared.close()
        losses.append(own.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_its_model_is_made_beside_lanes_that_train_and_takes_nothing_of_theirs() -> None:
    shared = cohort("bert")
    neighbour = lane(Design.from_json({"placements": [{"method": "dora"}, {"method": "vera"}]}), 3, "bert")
    shared.admit(neighbour)
    shared.step()
    own = lane(design("MISS"), 3, "bert")
    shared.close()
    assert own.model is not None
    assert not [h for m in own.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    alone = trained_alone(own.design, 3, "bert")
    shared = cohort("bert")
    shared.admit(own)
    shared.step()
    shared.close()
    assert own.losses == pytest.approx(alone.losses[:1], rel=1e-9)


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


SMALL: dict[str, dict[str, Any]] = TUNERS | {
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "C3A": {"block_size": 8},
    "FROD": {"progressbar": False},
    "GRALORA": {"r": 4},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"u": 4},
    "UNILORA": {"theta_d_length": 32},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}


def installed() -> list[str]:
    """Every tuner of the installed peft that is told its modules."""
    kinds = {str(kind.value): {f.name for f in fields(c)} for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return sorted(kind for kind, names in kinds.items() if "target_modules" in names)


@pytest.mark.parametrize("tuner", installed())
def test_a_tuner_of_the_installed_peft_trains_or_is_refused_by_name(tuner: str) -> None:
    base, row = backbone("bert", "float32"), {"method": f"peft:{tuner}", "config": SMALL.get(tuner, {})}
    if tuner in REFUSED and tuner not in REFUSED_LATE:
        with pytest.raises(InputError, match=re.escape(REFUSED[tuner])):
            Design.from_json({"placements": [row]})
        return
    chosen = Design.from_json({"placements": [row], "training": {"lr": 1e-2}})
    assert [error for error in chosen.check(SITES["bert"]) if REFUSED.get(tuner, "") in error] == (
        [f"placements[0].method: peft:{tuner}: {REFUSED[tuner]}"] if tuner in REFUSED else []
    )
    if tuner in REFUSED:
        return
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    own, shared = lane(chosen, 3, "bert", "float32"), cohort("bert", "float32")
    adapters = {key: value for key, value in own.params.items() if key.startswith("0/")}
    assert adapter_size(chosen, SITES["bert"]) == sum(v.numel() for v in adapters.values()) > 0
    start = {key: value.detach().clone() for key, value in adapters.items()}
    shared.admit(own)
    shared.step()
    with torch.no_grad():
        both, [first] = shared.logits([np.arange(2)], split())[0], shared.logits([np.arange(1)], split())[0]
    shared.close()
    assert own.failure is None
    assert any(not torch.equal(value, start[key]) for key, value in adapters.items())
    torch.testing.assert_close(both[0], first, msg="a text depends on its neighbours")
    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the backbone stays as it was"


def test_dropout_and_draws_are_of_training_alone_and_of_the_seed() -> None:
    """peft's layers draw from the process's stream: a lane sets it by its seed and step."""
    chosen = Design.from_json({"placements": [{"method": "peft:LORA", "config": {"r": 3, "lora_dropout": 0.5}}]})
    found = []
    for noise in (1, 2):
        own, shared = lane(chosen, 3, "bert"), cohort("bert")
        move([own])
        shared.admit(own)
        torch.manual_seed(noise)
        shared.step()
        shared.close()
        found.append((own.losses, logits(own, "bert")))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(logits(own, "bert"), found[1][1], rtol=0, atol=0)
    still = Design.from_json({"placements": [{"method": "peft:LORA", "config": {"r": 3}}]})
    bare, shared = lane(still, 3, "bert"), cohort("bert")
    move([bare])
    shared.admit(bare)
    shared.step()
    shared.close()
    assert bare.losses != own.losses


def broken(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("task_ids should not be None")


def test_a_tuner_that_raises_as_it_is_built_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = Guarded(backbone("bert"), head("bert"), split(), batch_size=3)
    monkeypatch.setattr("peftscape.search.lane.inject", broken)
    failure = guarded.begin(design("MISS"), seed=0, steps=2)
    assert failure == Failure(kind="error in peft", message="KeyError: 'task_ids should not be None'", step=0)


def test_a_tuner_that_raises_is_a_failed_trial_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))
    monkeypatch.setattr("peft.tuners.miss.layer.MissLinear.forward", broken)
    options = [{"method": "peft:MISS", "config": {"r": 4}}, {"method": "bitfit"}]
    of = searches.tiny(
        searches.make_base(tmp_path / "base"),
        space={"slots": [{"options": options}], "training": {"lr": {"log": [1e-3, 1e-2]}}},
        budget={"trials": 4}, search={"retest_seeds": 0, "examples": 16},
    )  # fmt: skip
    study = run_search(of, tmp_path / "out", quiet=True)
    failed = [r for r in study.records if "peft:MISS" in r.label]
    assert failed
    assert {(r.state, r.failure.kind, r.failure.message) for r in failed if r.failure} == {
        ("failed", "error in peft", "KeyError: 'task_ids should not be None'")
    }
    others = [r for r in study.records if r not in failed]
    assert others
    assert all(r.state == "complete" for r in others)
    assert max(r.number for r in others) > min(r.number for r in failed)


@pytest.mark.parametrize(
    ("tuner", "knob", "value", "said"),
    [
        ("MISS", "init_weights", "bat", ""),
        ("LORA", "init_lora_weights", "gaussian", ""),
        ("LORA", "init_lora_weights", False, ""),
        ("PSOFT", "cayley_neumann_eps", 1, ""),
        ("MISS", "init_weights", "bad", 'bool or "bat" or "mini" expected'),
        ("LORA", "init_lora_weights", "pissa_niter_4", 'all lanes share; use the method "pissa"'),
        ("LORA", "init_lora_weights", "loftq", 'all lanes share; use the method "loftq"'),
        ("LORA", "init_lora_weights", "olora", "all lanes share"),
        ("LORA", "init_lora_weights", "corda", "all lanes share"),
        ("LORA", "init_lora_weights", "eva", "looks at data"),
        ("LORA", "target_parameters", ["a"], "nothing but its default expected"),
        ("OSF", "effective_rank", float("nan"), "a finite number"),
    ],
)
def test_a_knob_takes_what_pefts_annotation_says(tuner: str, knob: str, value: Any, said: str) -> None:
    row = {"method": f"peft:{tuner}", "config": {knob: value}}
    if said:
        with pytest.raises(InputError, match=re.escape(said)):
            Design.from_json({"placements": [row]})
        with pytest.raises(InputError, match=re.escape(said)):
            read_space({"slots": [{"options": [row]}]}, SITES["bert"])
        return
    found = Design.from_json({"placements": [row]}).placements[0].method.knobs()[knob]
    assert found == value
    assert type(found) is (float if tuner == "PSOFT" else type(value))


def test_a_start_that_writes_the_shared_weights_is_refused() -> None:
    """As a tuner of a later peft might, whose words nobody has listed here."""
    method = tuner_of("peft:LORA")(init_lora_weights="olora")
    [site, *_] = SITES["bert"].named(("q",))
    assert "writes the weights that all lanes share" in str(method.check(site))


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
        ({"method": "peft:PROMPT_TUNING"}, 'use "prompt_tuning"'),
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
