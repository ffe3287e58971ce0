"""What a step does on a device, seen without one: where it would wait for it, and that fused attention is the same.

Each number that is asked of a tensor is a place where the processor waits for CUDA.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from contract import (
    BATCH,
    CONFIGS,
    OUTPUTS,
    PACKED,
    STEPS,
    assert_trained_alike,
    backbone,
    head,
    lane,
    smallest,
    split,
    train,
)  # fmt: skip
from recorder import WAITING
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.head import Head
from peftscape.search.lane import new_lane
from peftscape.spaces.design import Design
from peftscape.spaces.ops.device import Constants, remembered

#: Gates and side networks look at whole texts, prefixes at their rows.
PLACEMENTS: list[list[dict[str, Any]]] = [
    [{"method": "lora", "rank": 3, "gate": True}, {"method": "prefix_tuning", "length": 3, "gate": True}],
    [{"method": "tiny_attention", "size": 3}, {"method": "prompt_tuning", "length": 4}],
    [{"method": "lst", "size": 4}],
    [{"method": "sequential_adapter", "size": 4, "mask": {"sparsity": 0.5, "score": "random"}}],
]
#: Methods that ask the device once a step, and what.
ASKING = {"diff_pruning": "whether its gates are still relaxed", "intrinsic_said": "the seed of its projection"}


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


class Brought(TorchDispatchMode):
    """Finds what comes from the processor: CUDA waits for it, where it does not lie in pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        here = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        there = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        # An operation element by element takes one number from the processor with its call; `where` copies it first.
        copies = str(func).startswith(("aten._to_copy", "aten.copy_", "aten.where", "aten.index"))
        if "cpu" in here and "meta" in there and copies:
            self.found[str(func)] += 1
        return out


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


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_and_backward_of_every_method_ask_for_nothing_and_bring_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without values, which cannot be read: but for the two methods that say so.

    Nor do they bring anything to the device, once the numbers that stay the same are there.
    """
    nowhere = Backbone.from_config(CONFIGS[family], dtype="float32")
    nowhere.model.to("meta")
    on_top = Head(nowhere, kind="class", outputs=OUTPUTS)
    monkeypatch.setattr("peftscape.search.lane.draw", lambda declared, *_: torch.zeros(declared.shape))
    asking, brought = {}, {}
    for name in (name for name, on in PACKED if on == family):
        shared = Cohort(nowhere, on_top, split(), batch_size=BATCH)
        own = new_lane(smallest(name, family), seed=0, steps=STEPS, backbone=nowhere, head=on_top)
        shared.admit(own)
        examples, constants = [own.examples(BATCH, len(split()))], Constants()
        laid = shared.laid_out(examples, split(), fixed_shape=True)
        try:
            shared.gradients(examples)
            with remembered(constants), shared.given(laid):
                shared.gradients(examples)
            assert any(value.grad is not None for value in own.params.values()), name
            with remembered(constants, complete=True), shared.given(laid.anew()), Brought() as brings:
                shared.gradients(examples)
            brought |= {name: brings.found} if brings.found else {}
        except (RuntimeError, NotImplementedError) as error:
            asking[name] = str(error)
        finally:
            shared.close()
    assert brought == {}
    assert set(asking) == set(ASKING) & {name for name, on in PACKED if on == family}, asking


@pytest.mark.parametrize("family", CONFIGS)
def test_lanes_train_alike_with_fused_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prefixes, gates, prompts and a mask that takes second derivatives, beside each other."""
    rows = [
        *PLACEMENTS[:2],
        [{"method": "prefix_tuning", "length": 2}, {"method": "lora", "mask": {"sparsity": 0.5, "score": "grasp"}}],
    ]
    pairs = [(Design.from_json({"placements": row}), i) for i, row in enumerate(rows)]
    plain = train(pairs, family)
    ran = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("peftscape.search.attention.FUSED_ON", ("cpu",))
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: (ran.append(1), fused(*a, **k))[1]
    )
    for one, other in zip(train(pairs, family), plain, strict=True):
        assert_trained_alike(one, other, family)
    assert ran
