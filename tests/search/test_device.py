"""Where a step would wait for the device: each number that it asks of a tensor is one such place on CUDA."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from contract import backbone, head, lane, split
from torch.utils._python_dispatch import TorchDispatchMode

from peftscape.search.cohort import Cohort
from peftscape.spaces.design import Design

#: What cannot go on before the device has answered.
WAITING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.masked_select", "aten.unique")
#: Gates and side networks look at whole texts, prefixes at their rows.
PLACEMENTS: list[list[dict[str, Any]]] = [
    [{"method": "lora", "rank": 3, "gate": True}, {"method": "prefix_tuning", "length": 3, "gate": True}],
    [{"method": "tiny_attention", "size": 3}, {"method": "prompt_tuning", "length": 4}],
    [{"method": "lst", "size": 4}],
    [{"method": "sequential_adapter", "size": 4, "mask": {"sparsity": 0.5, "score": "random"}}],
]


class Asked(TorchDispatchMode):
    """Counts what asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(WAITING) or (name.startswith("aten.repeat_interleave") and not (kwargs or {})):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_asks_for_its_losses_and_norms_alone_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Cohort(backbone("llama", "float64"), head("llama", "float64"), split(), batch_size=4)
    shared.admit(*(lane(Design.from_json({"placements": p}), i, "llama") for i, p in enumerate(PLACEMENTS)))
    shared.step()
    read, lists = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(self.shape), read(self))[1])
    with Asked() as asked:
        shared.step()
    shared.close()
    assert asked.found == {}
    assert sorted(lists) == [(2,), (6,)], "each lane's loss and norm; lanes with a prompt have a pass of their own"
