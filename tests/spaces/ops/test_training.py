"""A cohort of mixed lanes that trains on kernels trains as it does in plain torch, and says what it ran on."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import GPU
from torch.utils._python_dispatch import TorchDispatchMode

from peftscape.search.cohort import Cohort
from peftscape.search.lane import Lane
from peftscape.search.trial import Trial
from peftscape.search.update import UNEQUAL, update
from peftscape.spaces.design import Design
from peftscape.spaces.ops import fused_tile
from peftscape.spaces.record import Costs, Record

aten = torch.ops.aten
contract = pytest.importorskip("contract")
pytestmark = pytest.mark.skipif(GPU, reason="the tests' backbones are on the CPU")

STEPS = 2
LORA = {"method": "lora", "sites": ["q", "v"]}
#: Designs, and the kernels that each should run on.
LANES: list[tuple[list[dict[str, Any]], set[str]]] = [
    (
        [{**LORA, "rank": 3, "rate": 4.0}, {"method": "prefix_tuning", "length": 1, "layers": [1]}],
        {"low_rank", "prefix_attention", "adamw"},
    ),
    ([{**LORA, "rank": 7, "mask": {"sparsity": 0.5}}], {"low_rank", "adamw"}),
    ([{"method": "adalora", "sites": ["q"], "rank": 4}], {"low_rank"}),  # looks at its gradients after the step
    ([{"method": "sequential_adapter", "sites": ["ffn"], "size": 5}], {"bottleneck", "adamw"}),
    (
        [
            {"method": "parallel_adapter", "sites": ["ffn"], "size": 2},
            {"method": "prefix_tuning", "length": 3, "layers": [1]},
        ],
        {"bottleneck", "prefix_attention", "adamw"},
    ),
    ([{"method": "ln_tuning"}], {"adamw"}),
]


@pytest.fixture
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTSCAPE_KERNELS", "on")  # with TRITON_INTERPRET=1, which conftest.py sets


def trained() -> list[Lane]:
    """The lanes after some steps on a model whose attention is causal, with fewer heads of keys than of queries."""
    training = {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.5}
    designs = [Design.from_json({"placements": rows, "training": training}) for rows, _ in LANES]
    lanes = [contract.lane(design, i, "llama", "float32", steps=STEPS) for i, design in enumerate(designs)]
    backbone, head = contract.backbone("llama", "float32"), contract.head("llama", "float32")
    cohort = Cohort(backbone, head, contract.split(), batch_size=2)
    cohort.admit(*lanes)
    for _ in range(STEPS):
        cohort.step()
    cohort.close()
    return lanes


def test_a_mixed_cohort_trains_as_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained()
    assert not any(lane.kernels for lane in plain)
    monkeypatch.setenv("PEFTSCAPE_KERNELS", "on")
    lanes = trained()
    assert [lane.kernels for lane in lanes] == [kernels for _, kernels in LANES]
    for own, other in zip(lanes, plain, strict=True):
        assert own.failure is None
        torch.testing.assert_close(own.losses, other.losses, rtol=1e-5, atol=0)
        for key, value in own.params.items():
            off = float((value - other.params[key]).detach().norm() / other.params[key].detach().norm().clamp_min(1e-3))
            assert off < 1e-5, (own.design.label, key, off)
        for number, state in other.optimizer.state_dict()["state"].items():
            assert float(own.optimizer.state_dict()["state"][number]["step"]) == float(state["step"])


class Waits(TorchDispatchMode):
    """Operations that on CUDA make the CPU wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_forced")
def test_a_step_asks_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels compute does not matter here; they are left out, as an interpreter waits all the time."""
    monkeypatch.setattr(fused_tile, "launch", lambda *args, **options: None)
    asked: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(self.numel()) or tolist(self))
    lanes = [lane(rows) for rows, kernels in LANES if "adamw" in kernels]
    cohort: Cohort = contract.cohort("bert", "float32")
    cohort.admit(*lanes)
    with Waits() as waits:
        cohort.step()
    cohort.close()
    assert waits.found == []
    assert asked == [2 * len(lanes)]  # losses and norms


def lane(rows: list[dict[str, Any]], steps: int = 4) -> Lane:
    design = Design.from_json({"placements": rows, "training": {"lr": 1e-2}})
    made: Lane = contract.lane(design, 0, "bert", "float32", steps=steps)
    return made


def give(own: Lane, seed: int) -> None:
    """Gradients, as a backward pass would."""
    source = torch.Generator().manual_seed(seed)
    for value in own.params.values():
        value.grad = torch.empty(value.shape).normal_(generator=source)


def test_a_lane_may_change_between_the_kernel_and_torchs_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = lane([LORA]), lane([LORA])
    for step, setting in enumerate(("off", "on", "off", "on")):
        for own in (one, other):
            give(own, step)
            monkeypatch.setenv("PEFTSCAPE_KERNELS", setting if own is one else "off")
            assert update([own], torch.ones(1)) == [1.0]
    assert one.kernels == {"adamw"}
    assert one.step == other.step == 4
    for key, value in one.params.items():
        torch.testing.assert_close(value, other.params[key], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_lane_that_diverges_fails_alone_and_does_not_move(what: str) -> None:
    lanes = [lane([LORA]) for _ in range(3)]
    alone = lane([LORA])
    losses = torch.tensor([1.0, math.inf if what == "loss" else 2.0, 3.0])
    for own in (*lanes, alone):
        give(own, 0)
    if what == "gradient":
        next(iter(lanes[1].params.values())).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
    before = {key: value.detach().clone() for key, value in lanes[1].params.items()}
    update([alone], torch.ones(1))
    update(lanes, losses)
    failure = lanes[1].failure
    assert failure is not None
    said = "the loss is inf" if what == "loss" else "the gradient is not finite"
    assert (failure.kind, failure.message, failure.step, lanes[1].step) == ("not finite", said, 0, 0)
    assert lanes[1].losses == ([] if what == "loss" else [2.0])
    assert all(torch.equal(value, before[key]) for key, value in lanes[1].params.items())
    for own in (lanes[0], lanes[2]):
        assert (own.failure, own.step, len(own.losses)) == (None, 1, 1)
        assert all(torch.equal(value, alone.params[key]) for key, value in own.params.items())


@pytest.mark.usefixtures("_forced")
def test_a_lane_whose_tensors_have_taken_unequal_steps_goes_by_itself() -> None:
    own, beside = lane([LORA]), lane([LORA])
    for step in range(2):
        for each in (own, beside):
            give(each, step)
        if step == 0:
            next(iter(own.params.values())).grad = None  # an expert that was not drawn
        update([own, beside], torch.ones(2))
    assert own.taken is None or own.taken == UNEQUAL
    assert own.kernels == set()
    assert beside.kernels == {"adamw"}
    assert sorted({int(state["step"]) for state in own.optimizer.state.values()}) == [1, 2]


def test_a_record_names_the_kernels_of_its_lanes() -> None:
    metric = SimpleNamespace(name="accuracy", direction="maximize")
    search = SimpleNamespace(batch_size=2)
    session: Any = SimpleNamespace(
        task=SimpleNamespace(metric=metric),
        data=SimpleNamespace(validation=[0] * 9),
        config=SimpleNamespace(search=search),
    )
    costs = Costs(adapter=1, head=1, trainable=2, train_flops=1, infer_flops=1, peak_bytes=1, adapter_bytes=1)
    own = [lane([LORA]), lane([LORA])]
    trial = Trial(SimpleNamespace(number=3), own[0].design, costs, None, lanes=own)
    assert trial.record(session, state="running").kernels == ()
    own[0].kernels |= {"low_rank", "adamw"}
    own[1].kernels |= {"low_rank"}
    record = trial.record(session, state="running")
    assert record.kernels == ("adamw", "low_rank")
    written = record.to_json()
    assert Record.from_json(written) == record
    del written["kernels"]  # before there were any
    assert Record.from_json({**written, "schema": 2}).kernels == ()
