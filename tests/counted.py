"""What torch counts of one lane alone: FLOPs and bytes kept for the backward, texts of one length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import Head
from peftscape.search.lane import new_lane
from peftscape.search.prepare import prepare
from peftscape.spaces.design import Design


def one_lane(of: Design, config: Any, batch: int, tokens: int) -> tuple[Cohort, Callable[[], torch.Tensor]]:
    """A cohort of one lane, and what computes its loss on a batch."""
    backbone = Backbone.from_config(copy.deepcopy(config))
    ids = [np.random.default_rng(0).integers(4, config.vocab_size, size=tokens) for _ in range(batch)]
    split = EncodedSplit(ids, None, np.zeros(batch, dtype=np.int64), 0, np.array([tokens] * batch))
    head = Head(backbone, kind="class", outputs=2)
    shared = Cohort(backbone, head, split, batch_size=batch)
    lane = new_lane(of, seed=0, steps=4, backbone=backbone, head=head)
    prepare(lane, shared)
    shared.admit(lane)
    shared.forward.arrange(shared.lanes, fold=False)  # what it adds beside others is what costs tell
    return shared, lambda: shared.losses([np.arange(batch)]).sum()


def kept_for(own: Iterable[torch.Tensor], forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """A loss, and the bytes that autograd keeps for it: storages once, those of `own` left out."""
    known = {t.untyped_storage().data_ptr() for t in own}
    held: dict[int, Any] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in known:
            held[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    assert loss.requires_grad
    return loss, int(sum(storage.nbytes() for storage in held.values()))


def kept_bytes(of: Design, config: Any, batch: int, tokens: int) -> int:
    """Bytes that autograd keeps of a lane alone, weights left out."""
    shared, forward = one_lane(of, config, batch, tokens)
    model, [lane] = shared.backbone.model, shared.lanes
    return kept_for([*model.parameters(), *model.buffers(), *lane.params.values()], forward)[1]


def flops(of: Design, config: Any, batch: int, tokens: int, *, training: bool) -> int:
    """Of a step's forward and backward, or of an evaluation."""
    shared, forward = one_lane(of, config, batch, tokens)
    with FlopCounterMode(display=False) as counter:
        if training:
            forward().backward()  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                shared.logits([np.arange(batch)], shared.train)
    return int(counter.get_total_flops())
