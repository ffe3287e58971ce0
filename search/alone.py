"""What a design costs alone, measured: members of the front train a few steps by themselves after the search."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftscape.search.guarded import is_out_of_memory
from peftscape.search.lane import Lane, new_lane
from peftscape.search.memory import peak_of
from peftscape.search.prepare import prepare
from peftscape.search.stopping import HangError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from peftscape.search.budget import Budget
    from peftscape.search.cohort import Cohort
    from peftscape.search.session import Session
    from peftscape.search.storage import Storage
    from peftscape.spaces.record import Record

# Of a front: the cheapest, the dearest, and between.
MOST = 3
TIMED_STEPS = 2


def measure_front(session: Session, storage: Storage, budget: Budget) -> None:
    """Measure members of the front alone, as long as there are time and memory; kept in the study (`alone`).

    It counts as computing in the budget.
    """
    known = dict(storage.attr("alone", {}))
    for record in _some(sorted(storage.front(), key=lambda r: r.costs.peak_bytes if r.costs else 0)):
        steps_s = (1 + TIMED_STEPS) * max(1, session.config.search.lanes) * (budget.lane_step_s or 0.0)
        left_s, _ = budget.part_left(1.0)
        if left_s <= 2 * steps_s:
            return
        if str(record.number) in known:
            continue
        try:
            with budget.account.spending("device_s"), session.guards["stop"].limit(budget.patience_s()):
                known[str(record.number)] = measure_alone(session, record, storage.adapter_folder(record.number))
        except (HangError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, HangError) or is_out_of_memory(error)):
                raise
            return
        storage.set_attr("alone", known)


def _some(members: Sequence[Record]) -> list[Record]:
    places = {round(i * (len(members) - 1) / max(1, MOST - 1)) for i in range(MOST)} if members else set()
    return [members[i] for i in sorted(places)]


def measure_alone(session: Session, record: Record, adapter: Path) -> dict[str, Any]:
    """Trained parameters, adapter bytes on disk, peak bytes and seconds of a step of a record's design alone.

    On texts of the length that costs are told for, without kept states. Bytes: weights, what trains, moments, and the
    most that a step has at once besides (`peak_of`). Seconds: the shorter of two steps.
    """
    from peftscape.spaces.design import Design

    design = Design.from_json(record.design)
    lane = new_lane(design, seed=0, steps=1 + TIMED_STEPS, backbone=session.backbone, head=session.head)
    cohort = session.cohort()
    cohort.cache = None
    prepare(lane, cohort)
    cohort.admit(lane)
    typical = session.tokens + (session.target or 0)
    try:
        batch = np.argsort(np.abs(session.data.train.lengths - typical), kind="stable")[: cohort.batch_size]
        own = [*session.backbone.model.parameters(), *session.backbone.model.buffers(), *lane.tensors.values()]
        peak = peak_of(lambda: cohort.gradients([batch]), session.backbone.device, own)
        lane.update()
        taken = [_timed(cohort, lane, batch) for _ in range(TIMED_STEPS)]
    finally:
        cohort.close()
    states = [s for state in lane.optimizer.state.values() for s in state.values() if isinstance(s, torch.Tensor)]
    file = adapter / "adapter.safetensors"
    return {
        "trainable": sum(int(lane.masks[k].sum()) if k in lane.masks else v.numel() for k, v in lane.params.items()),
        "adapter_bytes": file.stat().st_size if file.is_file() else None,
        "peak_bytes": peak + sum(t.nbytes for t in [*own, *states]),
        "step_s": min(taken),
        "batch": len(batch),
        "device": str(session.backbone.device),
    }


def _timed(cohort: Cohort, lane: Lane, batch: np.ndarray[Any, Any]) -> float:
    started = time.perf_counter()
    cohort.gradients([batch])
    lane.update()
    if cohort.backbone.device.type == "cuda":
        torch.cuda.synchronize(cohort.backbone.device)
    return time.perf_counter() - started
