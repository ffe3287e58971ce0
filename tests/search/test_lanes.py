"""Lanes on one backbone do not touch each other, whatever they are and whenever they come and go."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    BATCH,
    CONFIGS,
    HEAD_ONLY,
    OUTPUTS,
    PACKED,
    SEED,
    SITES,
    STEPS,
    MethodContract,
    assert_trained_alike,
    backbone,
    cohort,
    combinations,
    head,
    lane,
    logits,
    move,
    smallest,
    split,
    train,
    trained_alone,
)  # fmt: skip
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.spaces.design import Design

families = pytest.mark.parametrize("family", CONFIGS)


class TestEveryMethod(MethodContract):
    """The suite of `contract.py` on all that is found in `spaces/methods/`."""


def design(*placements: dict[str, Any], **training: float) -> Design:
    return Design.from_json({"placements": list(placements), "training": training})


LORA: dict[str, Any] = {"method": "lora", "rank": 3}
ADAPTER: dict[str, Any] = {"method": "sequential_adapter", "size": 4, "sites": ["ffn"]}


def of_every_method(family: str) -> list[Design]:
    return [smallest(name, family) for name, on in PACKED if on == family]


def run_steps(shared: Cohort, count: int) -> None:
    for _ in range(count):
        shared.step()


# -- packed equals alone


@families
def test_a_mixed_cohort_of_all_methods_trains_as_each_alone(family: str) -> None:
    compared = [*of_every_method(family), *combinations(family)]
    for own in train([(d, SEED) for d in compared], family)[list(CONFIGS).index(family) % 3 :: 3]:
        assert_trained_alike(own, trained_alone(own.design, SEED, family), family)


@pytest.mark.parametrize(("dtype", "family"), [("float32", "llama"), ("bfloat16", "bert")])
def test_a_mixed_cohort_keeps_to_the_stated_tolerance_in(dtype: str, family: str) -> None:
    compared = of_every_method(family)[::2]
    for own in train([(d, SEED) for d in compared], family, dtype)[list(CONFIGS).index(family) :: 3]:
        assert_trained_alike(own, trained_alone(own.design, SEED, family, dtype), family, dtype)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lanes_come_and_go_and_train_as_if_alone(family: str) -> None:
    """Each starts at another step and ends at another; one leaves half-trained and comes back."""
    shared = cohort(family)
    lanes = [lane(d, SEED, family) for d in of_every_method(family)]
    for own in lanes:
        prepare(own, shared)
    away = lanes[1]
    for time in range(2 * STEPS + len(lanes)):
        if time < len(lanes):
            shared.admit(lanes[time])
        if time == 4:
            shared.retire(away)
        if time == 11:
            shared.admit(away)
        if not shared.lanes:
            break
        shared.step()
        shared.retire(*(own for own in shared.lanes if own.done))
    for own in (away, *lanes[::2]):
        assert_trained_alike(own, trained_alone(own.design, SEED, family), family)


def test_a_lane_that_has_left_is_not_held() -> None:
    """Its tensors are memory; and what is known of it must not be taken for another's that has its place there."""
    shared = cohort("bert")
    staying, leaving = (lane(design(LORA), seed, "bert") for seed in (1, 2))
    shared.admit(staying, leaving)
    shared.step()
    shared.retire(leaving)
    left = weakref.ref(leaving)
    del leaving
    gc.collect()
    assert left() is None
    shared.close()


def test_lanes_of_unequal_length_keep_their_own_schedule() -> None:
    shared = cohort("bert")
    lanes = [lane(design(LORA), SEED, "bert", steps=steps) for steps in (5, 9, STEPS)]
    shared.admit(*lanes)
    while shared.lanes:
        shared.step()
        shared.retire(*(own for own in shared.lanes if own.done))
    assert [len(own.losses) for own in lanes] == [5, 9, STEPS]
    assert_trained_alike(lanes[2], trained_alone(design(LORA), SEED, "bert"), "bert")


@pytest.mark.parametrize("first", [True, False])
def test_placements_on_one_module_act_in_the_order_written_whatever_the_neighbours_do(first: bool) -> None:
    """BERT's output.dense is `down`, `ffn` and `bias` at once; a neighbour has them in the opposite order."""
    rows: list[dict[str, Any]] = [{**LORA, "sites": ["down"]}, ADAPTER, {"method": "bitfit"}]
    one, other = (lane(design(*order), SEED, "bert") for order in (rows, rows[::-1]))
    move([one])
    for key, value in other.params.items():  # the same tensors under the numbers of the opposite order
        i, dot, rest = key.partition("/")
        value.data.copy_(one.params[key if i == "head" else f"{2 - int(i)}{dot}{rest}"])
    wanted = [logits(one, "bert"), logits(other, "bert")]
    assert not torch.allclose(*wanted)
    shared = cohort("bert")
    shared.admit(*((one, other) if first else (other, one)))
    with torch.no_grad():
        found = shared.logits([np.arange(12)] * 2, split())
    for own, row in zip(shared.lanes, found, strict=True):
        torch.testing.assert_close(row, wanted[0] if own is one else wanted[1], rtol=1e-12, atol=1e-12)
    shared.close()


# -- a neighbour that diverges


def beside_a_neighbour(neighbour: Lane, family: str, dtype: str, poison: float | None = None) -> list[Lane]:
    """Four steps of one lane of every method, two of them beside a neighbour; before the second it may be poisoned."""
    shared = cohort(family, dtype)
    lanes = [lane(d, SEED, family, dtype) for d in of_every_method(family)]
    shared.admit(*lanes, neighbour)
    run_steps(shared, 1)
    if poison is not None:
        for value in neighbour.params.values():
            value.data.view(-1)[0] = poison
    run_steps(shared, 1)
    shared.retire(neighbour)
    run_steps(shared, 2)
    shared.close()
    return lanes


def assert_equal_bits(found: list[Lane], wanted: list[Lane]) -> None:
    for own, other in zip(found, wanted, strict=True):
        assert own.failure is None
        assert own.losses == other.losses
        for key, value in own.params.items():
            assert torch.equal(value, other.params[key]), f"{own.design.label}: {key}"


@pytest.mark.parametrize(("family", "poison"), [("bert", math.nan), ("gpt2", math.inf), ("llama", math.nan)])
def test_a_poisoned_neighbour_fails_alone_and_changes_no_bit(family: str, poison: float) -> None:
    well, ill = (lane(combinations(family)[0], 0, family, "float32") for _ in range(2))
    wanted = beside_a_neighbour(well, family, "float32")
    found = beside_a_neighbour(ill, family, "float32", poison)
    assert (well.failure, len(well.losses)) == (None, 2)
    assert ill.failure is not None
    assert (ill.failure.kind, ill.failure.step, len(ill.losses)) == ("not finite", 1, 1)
    assert_equal_bits(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_neighbour_whose_rate_is_too_high_fails_alone_and_changes_no_bit(dtype: str) -> None:
    rows = design(LORA, ADAPTER, {"method": "prefix_tuning", "length": 3}, {"method": "bitfit"}).json()
    lanes: dict[float, list[Lane]] = {}
    for lr in (1e-3, 1e36):
        wild = lane(Design.from_json({**rows, "training": {"lr": lr, "warmup": 0.0}}), 0, "bert", dtype)
        lanes[lr] = [wild, *beside_a_neighbour(wild, "bert", dtype)]
    assert lanes[1e-3][0].failure is None
    assert lanes[1e36][0].failure is not None
    assert_equal_bits(lanes[1e36][1:], lanes[1e-3][1:])


def test_a_gradient_that_is_not_finite_stops_the_lane_before_it_moves() -> None:
    own = lane(design(LORA), 0, "bert")
    before = {key: value.detach().clone() for key, value in own.params.items()}
    for value in own.params.values():
        value.grad = torch.full_like(value, math.inf)
    own.update()
    assert own.failure is not None
    assert own.done
    assert own.step == 0
    for key, value in own.params.items():
        assert torch.equal(value, before[key])


# -- what a lane does by itself


def transformers_model(family: str) -> nn.Module:
    """The backbone under transformers' own classifier, as a user would fine-tune it."""
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels, config._attn_implementation = OUTPUTS, "eager"
    model: Any = AutoModelForSequenceClassification.from_config(config).to(torch.float64).eval()
    model.base_model.load_state_dict(backbone(family).model.state_dict())
    return model


def padded(rows: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    texts = [split().ids[i] for i in rows]
    ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


@families
def test_full_finetuning_is_a_plain_loop_over_transformers_own_model(family: str) -> None:
    """Also the oracle of a lane's data order, loss, clipping, rate and AdamW."""
    lr, clip, warmup, decay = 3e-3, 0.7, 0.1, 0.3
    of = design({"method": "full_finetuning"}, lr=lr, clip=clip, warmup=warmup, decay=decay)
    own, shared = lane(of, 4, family), cohort(family)
    model = transformers_model(family)
    for name, value in own.params.items():
        if name.startswith("head/"):
            model.get_parameter(name.removeprefix("head/")).data.copy_(value.detach())
    own_head = {n for n, p in model.named_parameters() if not n.startswith(model.base_model_prefix)}
    assert own_head == {k.removeprefix("head/") for k in own.params if k.startswith("head/")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rise, fall = math.ceil(warmup * STEPS), math.ceil(decay * STEPS)
    stream = [i for epoch in range(9) for i in np.random.default_rng((4, epoch)).permutation(len(split()))]
    wanted = []
    for step in range(STEPS):
        rows = np.array(stream[step * BATCH : (step + 1) * BATCH])
        out = model(**padded(rows)).logits
        loss = nn.functional.cross_entropy(out, torch.from_numpy(split().targets[rows]))
        wanted.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / rise, (STEPS - step) / fall)
        optimizer.step()
    shared.admit(own)
    run_steps(shared, STEPS)
    shared.close()
    # Llama's own attention takes its softmax in float32.
    np.testing.assert_allclose(own.losses, wanted, rtol=1e-5 if family == "llama" else 1e-9)


def test_the_rate_rises_stays_and_falls() -> None:
    own = lane(design(LORA, lr=2.0, warmup=0.2, decay=0.4), 0, "bert", steps=10)
    assert [round(own.rate(t), 9) for t in range(10)] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]


def test_a_lane_reads_every_example_once_an_epoch_in_an_order_of_its_seed() -> None:
    one, same, other = (lane(design(LORA), seed, "bert") for seed in (1, 1, 2))
    read = {}
    for own in (one, same, other):
        batches = []
        for own.step in range(10):
            batches.append(own.examples(3, 15))
        read[id(own)] = np.concatenate(batches)
    assert sorted(read[id(one)][:15]) == sorted(read[id(one)][15:]) == list(range(15))
    assert list(read[id(one)]) == list(read[id(same)]) != list(read[id(other)])
    assert list(read[id(one)][:15]) != list(read[id(one)][15:])


def test_a_start_depends_on_the_seed_and_on_nothing_else() -> None:
    one, same, other = (lane(design(LORA, ADAPTER), seed, "gpt2") for seed in (1, 1, 2))
    beside = lane(design(LORA), 1, "gpt2")
    for key, value in one.params.items():
        assert torch.equal(value, same.params[key])
        assert torch.equal(value, other.params[key]) == (not value.any()), key
        if key.startswith("0/"):
            assert torch.equal(value, beside.params[key])


# -- a cohort


@families
def test_predictions_are_each_lanes_own_in_the_order_of_the_split(family: str) -> None:
    shared = cohort(family)
    lanes = [lane(d, SEED, family) for d in of_every_method(family)]
    move(lanes)
    shared.admit(*lanes)
    order = list(shared.lanes)
    chosen = [lanes[4], lanes[0]]
    found = shared.predict(split(), *chosen)
    assert shared.lanes == order
    everyone = shared.predict(split())
    shared.close()
    for own, rows in zip(chosen, found, strict=True):
        wanted = logits(own, family).numpy()
        np.testing.assert_allclose(rows[:12], wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(everyone[order.index(own)], rows, rtol=1e-5, atol=1e-5)


def test_lanes_with_weights_of_their_own_are_scored_with_these() -> None:
    lanes = [lane(design({"method": "full_finetuning"}), seed, "bert") for seed in range(2)]
    move(lanes)
    shared = cohort("bert")
    each = []
    for own in lanes:
        shared.admit(own)
        each.append(shared.predict(split(), own)[0])
        shared.retire(own)
    together = shared.predict(split(), *lanes)
    shared.close()
    np.testing.assert_allclose(together, each, rtol=1e-9)
    assert not np.allclose(*each)


def test_regression_trains_on_the_squared_error() -> None:
    base = backbone("bert")
    one = Head(base, kind="mean", outputs=1)
    targets = np.random.default_rng(0).normal(size=len(split()))
    data = EncodedSplit(split().ids, None, targets, 0, split().lengths)
    shared = Cohort(base, one, data, batch_size=BATCH, regression=True)
    own = new_lane(design(LORA), seed=0, steps=2, backbone=base, head=one)
    shared.admit(own)
    with torch.no_grad():
        out = shared.logits([np.arange(6)], data)[0, :, 0].numpy()
        [loss] = shared.losses([np.arange(6)]).tolist()
    assert loss == pytest.approx(np.mean((out - targets[:6]) ** 2), rel=1e-12)
    run_steps(shared, 2)
    shared.close()
    assert own.failure is None


def test_a_mean_head_pools_real_tokens_alone() -> None:
    base = backbone("bert")
    mean = Head(base, kind="mean", outputs=OUTPUTS)
    shared = Cohort(base, mean, split(), batch_size=BATCH)
    own = new_lane(HEAD_ONLY, seed=0, steps=1, backbone=base, head=mean)
    shared.admit(own)
    model: Any = transformers_model("bert")
    inputs = padded(np.arange(5))
    with torch.no_grad():
        found = shared.logits([np.arange(5)], split())[0]
        states = model.base_model(**inputs).last_hidden_state
    shared.close()
    weights = inputs["attention_mask"].double().unsqueeze(-1)
    pooled = (states * weights).sum(1) / weights.sum(1)
    wanted = pooled @ own.params["head/weight"].T + own.params["head/bias"]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-12)


@families
def test_training_leaves_the_backbone_as_it_was(family: str) -> None:
    model = backbone(family).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own, shared = lane(combinations(family)[0], 0, family), cohort(family)
    shared.admit(own)
    run_steps(shared, 2)
    shared.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert SITES[family].parameters == sum(p.numel() for p in model.parameters())
    assert head(family).size == sum(v.numel() for k, v in own.params.items() if k.startswith("head/"))
