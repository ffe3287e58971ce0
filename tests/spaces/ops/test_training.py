"""Lanes of unequal size that train on kernels train as they do in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import GPU

from peftscape.search.cohort import Cohort
from peftscape.spaces import ops
from peftscape.spaces.design import Design
from peftscape.spaces.methods import lora, parallel_adapter, sequential_adapter
from peftscape.spaces.ops.choose import Choice

contract = pytest.importorskip("contract")

PLACEMENTS: list[dict[str, Any]] = [
    {"method": "lora", "sites": ["q", "v"], "rank": 3},
    {"method": "lora", "sites": ["q", "v"], "rank": 7},
    {"method": "sequential_adapter", "sites": ["ffn"], "size": 5},
    {"method": "parallel_adapter", "sites": ["ffn"], "size": 2},
]


def losses() -> list[list[float]]:
    cohort: Cohort = contract.cohort("bert", "float32")
    lanes = [
        contract.lane(Design.from_json({"placements": [row], "training": {"lr": 1e-2}}), i, "bert", "float32", steps=2)
        for i, row in enumerate(PLACEMENTS)
    ]
    cohort.admit(*lanes)
    for _ in range(2):
        cohort.step()
    cohort.close()
    return [lane.losses for lane in lanes]


@pytest.mark.skipif(GPU, reason="the tests' backbones are on the CPU")
def test_losses_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, calls = losses(), []

    def chosen(call: ops.Call, device: torch.device) -> Choice:
        calls.append(call.op)
        return Choice(True, "a test")

    def bottleneck(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, activation: str) -> Any:
        """The change alone, as the methods ask for it today."""
        return ops.adapter(torch.zeros_like(x), down, down_bias, up, up_bias, activation, x=x)

    monkeypatch.setattr(ops, "choice", chosen)
    for module in (lora, parallel_adapter, sequential_adapter):
        monkeypatch.setattr(module, "ops", ops)
    monkeypatch.setattr(ops, "bottleneck", bottleneck)
    found = losses()
    assert set(calls) == {"low_rank", "bottleneck"}
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)
