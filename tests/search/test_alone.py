"""What is measured of memory and speed, and lanes that are cut by the plan."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig

from peftscape.search.alone import TIMED_STEPS, measure_alone, measure_front
from peftscape.search.backbone import Backbone
from peftscape.search.budget import Budget
from peftscape.search.encoding import EncodedSplit
from peftscape.search.guarded import Guarded, Memory
from peftscape.search.head import Head
from peftscape.search.lane import new_lane
from peftscape.search.memory import LiveBytes, free_bytes
from peftscape.search.speed import measure_rates
from peftscape.search.stopping import Stop
from peftscape.spaces.design import Design
from peftscape.spaces.devices import OF_MEASURED, device
from peftscape.spaces.price import costs
from peftscape.spaces.rates import rates_file, read_rates, write_rates
from peftscape.spaces.words import InputError

BATCH, TOKENS = 8, 24
DESIGNS = [
    Design.from_json({"placements": placements})
    for placements in (
        [{"method": "lora"}],
        [{"method": "sequential_adapter", "size": 8}],
        [{"method": "lora", "sites": ["up"]}],
        [{"method": "lst", "size": 8}],
    )
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=160, pad_token_id=1
    )
    return Backbone.from_config(config)


def guarded(backbone: Backbone, memory: Memory | None = None) -> Guarded:
    ids = [np.random.default_rng(i).integers(4, 60, size=TOKENS) for i in range(32)]
    split = EncodedSplit(ids, None, np.arange(32) % 2, 0, np.full(32, TOKENS))
    return Guarded(backbone, Head(backbone, kind="class", outputs=2), split, batch_size=BATCH, memory=memory)


def peak(backbone: Backbone, design: Design) -> int:
    return costs(design, backbone.sites, outputs=2, tokens=TOKENS, batch=BATCH).peak_bytes


def test_live_bytes_are_those_of_the_tensors_that_live_at_once() -> None:
    x = torch.zeros(1000)
    with LiveBytes([x]) as live:
        y = x + 1
        for _ in range(5):
            y = y * 2  # the old one goes as the new one is there
        z = y.view(10, 100)
        x.add_(1)
    assert (live.peak, live.alive) == (8000, 4000)
    assert z.shape == (10, 100)
    del y, z
    assert live.alive == 0


def test_lanes_train_in_the_parts_that_the_plan_tells_and_give_the_same(backbone: Backbone) -> None:
    def losses(memory: Memory | None) -> tuple[list[float], int]:
        cohort, calls = guarded(backbone, memory), []
        cohort.admit(*(new_lane(d, seed=0, steps=4, backbone=backbone, head=cohort.head) for d in DESIGNS[:3]))
        arrange = cohort._arrange
        cohort._arrange = lambda lanes: (calls.append(len(lanes)), arrange(lanes))[1]  # type: ignore[method-assign]
        found = [loss for _ in range(2) for loss in cohort.step()]
        cohort.close()
        return found, max(calls, default=3)

    weights = backbone.sites.parameters * 4
    each = [peak(backbone, d) - weights for d in DESIGNS[:3]]
    small = Memory(limit=weights + sum(each) - 1, weights=weights, alone=lambda d: peak(backbone, d))
    assert [len(part) for part in small.parts(DESIGNS[:3])] == [2, 1]
    whole, cut = losses(None)[0], losses(small)[0]
    assert cut == pytest.approx(whole, rel=1e-5)
    small.learn(DESIGNS[:3], 2 * sum(each))
    assert small.correction == pytest.approx(2.0)
    assert [len(part) for part in small.parts(DESIGNS[:3])] == [1, 1, 1]


@pytest.mark.parametrize("design", DESIGNS, ids=lambda d: d.label)
def test_a_design_alone_takes_what_was_predicted(backbone: Backbone, design: Design) -> None:
    cohort = guarded(backbone)
    session = SimpleNamespace(
        backbone=backbone,
        head=cohort.head,
        tokens=TOKENS,
        target=None,
        cohort=lambda: cohort,
        data=SimpleNamespace(train=cohort.train),
    )
    found = measure_alone(session, SimpleNamespace(design=design.json()), Path("nowhere"))  # type: ignore[arg-type]
    told = costs(design, backbone.sites, outputs=2, tokens=TOKENS, batch=BATCH)
    assert found["trainable"] == told.trainable
    assert told.peak_bytes == pytest.approx(found["peak_bytes"], rel=0.15)
    assert found["step_s"] > 0
    assert found["adapter_bytes"] is None
    assert cohort.lanes == []


def test_measuring_the_front_is_computing_and_ends_with_its_budget(backbone: Backbone) -> None:
    cohort, attrs = guarded(backbone), dict[str, Any]()
    session = SimpleNamespace(
        backbone=backbone, head=cohort.head, tokens=TOKENS, target=None, cohort=lambda: cohort,
        data=SimpleNamespace(train=cohort.train), guards={"stop": Stop()},
        config=SimpleNamespace(search=SimpleNamespace(lanes=1)),
    )  # fmt: skip
    members = [
        SimpleNamespace(number=i, design=DESIGNS[i].json(), costs=SimpleNamespace(peak_bytes=i)) for i in range(2)
    ]
    storage = SimpleNamespace(
        front=lambda: members, adapter_folder=lambda number: Path("nowhere"),
        attr=lambda name, default: attrs.get(name, default), set_attr=attrs.__setitem__,
    )  # fmt: skip
    limits: dict[str, Any] = {"trials": 1, "time_s": None, "trainable": None, "peak_bytes": None, "adapter_bytes": None}
    budget = Budget(**limits, device_s=1e-3, batch=BATCH, lane_step_s=1e-6)
    measure_front(session, storage, budget)  # type: ignore[arg-type]
    assert list(attrs["alone"]) == ["0"], "the first took all that there was"
    assert budget.account.device_s >= TIMED_STEPS * attrs["alone"]["0"]["step_s"]


def test_this_machine_is_a_device_once_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="peftscape doctor"):
        device("this")
    rates = measure_rates("cpu", scale=16)
    assert write_rates(rates) == rates_file()
    assert read_rates() == rates
    found = device("this", "nf4")
    assert (found.flops, found.memory_bytes) == (rates.flops[found.compute], rates.memory_bytes)
    assert found.flops == max(rates.flops["bfloat16"], rates.flops["float32"])
    assert found.utilisation == OF_MEASURED
    assert device("this", "float32").flops == rates.flops["float32"] > 0
    for broken in ("{", "[]", json.dumps({"device": "x"}), "[" * 10**5):
        rates_file().write_text(broken)
        assert read_rates() is None
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 <= free <= rates.memory_bytes
