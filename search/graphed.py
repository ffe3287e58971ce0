"""Steps of a cohort that are captured and replayed: a CUDA graph of forward and backward for each layout and shape.

A layout is what the lanes' operations depend on besides numbers: which methods act where, on tensors of which shapes.
Its first step of a shape runs as always; the second is captured, and from then on it is replayed. Lanes come and go
without a new capture where their layout is one that was there before: a graph reads and writes fixed addresses, so a
lane that takes a slot has its tensors moved there, and the one that had it takes its own away.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftscape.search.lane import generator
from peftscape.search.losses import gradients
from peftscape.search.slots import Slots
from peftscape.spaces.methods.base import Method
from peftscape.spaces.ops.device import Constants, remembered

if TYPE_CHECKING:
    from peftscape.search.cohort import Cohort
    from peftscape.search.laid import Laid
    from peftscape.search.lane import Lane

#: Runs the work once or not at all, and gives its result with what runs it again into the same tensors.
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
#: Graphs that are kept: each holds its inputs, its losses and its gradients; what is between shares one pool.
KEPT = 32


def cuda_graphs(device: torch.device) -> Capture:
    """Capture as CUDA graphs that share their memory, which is safe since no two run at once."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            losses = work()
        return losses, graph.replay

    return capture


@dataclass
class _Step:
    """A step of one layout and shape."""

    inputs: Laid
    constants: Constants = field(default_factory=Constants)
    losses: Tensor | None = None
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    kernels: list[set[str]] = field(default_factory=list)
    replay: Callable[[], None] | None = None


class Graphs:
    """The captured steps of a cohort.

    Args:
        capture: how.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.replayed = 0
        self._steps: OrderedDict[tuple[Hashable, Hashable], _Step] = OrderedDict()  # by layout and shape
        self._slots: dict[Hashable, Slots] = {}
        self._refused: set[Hashable] = set()
        self._layouts: dict[tuple[int, ...], tuple[tuple[Lane, ...], Hashable]] = {}

    def gradients(self, cohort: Cohort, examples: Sequence[np.ndarray[Any, Any]]) -> Tensor | None:
        """The lanes' gradients and losses of a step in one pass; None where it cannot be captured.

        The losses are there until the next step.
        """
        layout = self._layout(cohort)
        if layout is None:
            return None
        stages = cohort.forward.stages
        if layout not in self._slots:
            self._slots[layout] = Slots.of(cohort.lanes, stages)
        self._slots[layout].take(cohort.lanes, stages)  # from the first run on: kernels' tables tell addresses
        laid = cohort.laid_out(examples, cohort.train, fixed_shape=True)
        key = layout, laid.shape
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(laid)
            self._drop_old()
            with remembered(step.constants), cohort.given(laid):
                return gradients(cohort, examples, 1)
        self._steps.move_to_end(key)
        step.inputs.copy_(laid)
        if step.replay is None and not self._captured(cohort, step, examples):
            self._refused.add(layout)
            return None
        assert step.replay is not None
        step.replay()
        self.replayed += 1
        for lane, own, kernels in zip(cohort.lanes, step.gradients, step.kernels, strict=True):
            lane.kernels |= kernels
            for value, gradient in zip(lane.params.values(), own, strict=True):
                value.grad = gradient
        return step.losses

    def forget(self) -> None:
        """Lanes are about to come or go."""
        self._layouts.clear()

    def _drop_old(self) -> None:
        while len(self._steps) > KEPT:
            (layout, _), _ = self._steps.popitem(last=False)
            if all(layout != kept for kept, _ in self._steps):
                self._slots.pop(layout, None)

    def _captured(self, cohort: Cohort, step: _Step, examples: Sequence[np.ndarray[Any, Any]]) -> bool:
        try:
            # What the first run found out of its batch is to be found out in each.
            with remembered(step.constants, complete=True), cohort.given(step.inputs.anew()):
                step.losses, step.replay = self.capture(lambda: gradients(cohort, examples, 1))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            labels = ", ".join(sorted({lane.design.label for lane in cohort.lanes}))
            warnings.warn(f"no CUDA graph of {labels}: {error}", stacklevel=2)
            for lane in cohort.lanes:
                lane.optimizer.zero_grad()
            return False
        step.gradients = [[value.grad for value in lane.params.values()] for lane in cohort.lanes]
        step.kernels = [set(lane.kernels) for lane in cohort.lanes]
        return True

    def _layout(self, cohort: Cohort) -> Hashable | None:
        """What the lanes' operations depend on; None where they depend on more."""
        key = tuple(map(id, cohort.lanes))
        if key not in self._layouts:
            found = _layout(cohort) if all(map(_repeats, cohort.lanes)) and _has_fixed_shapes(cohort) else None
            self._layouts[key] = tuple(cohort.lanes), found  # which hold the lanes, so that no id is another's
        layout = self._layouts[key][1]
        return None if layout in self._refused else layout


def _has_fixed_shapes(cohort: Cohort) -> bool:
    sites, train = cohort.backbone.sites, cohort.train
    return sites.attention_interface and not sites.decoder_layers and train.words is None and train.asked is None


def _repeats(lane: Lane) -> bool:
    """Whether every step of a lane runs the same operations: none draws at random, none is left to another library."""
    if lane.model is not None or lane.design.solo or lane.consistency:
        return False
    for placement, own, sites in zip(lane.design.placements, lane.own, lane.sites, strict=True):
        if placement.expands:
            source = generator(lane.seed, "does it draw")
            before = source.get_state()
            with torch.no_grad():
                placement.expand(own, sites, source)
            if not torch.equal(before, source.get_state()):
                return False
    return True


def _layout(cohort: Cohort) -> Hashable:
    stages = [
        (stage.site.path, stage.site.kind, [
            (group.first, group.count, group.placement.method.name, group.placement.method.group_key(stage.site),
             bool(group.placement.gate), group.placement.weighed) for group in stage.groups
        ]) for stage in cohort.forward.stages
    ]  # fmt: skip
    lanes = [
        ([(key, value.shape, value.dtype) for key, value in lane.tensors.items()],
         [p for p in lane.design.placements if type(p.method).penalty is not Method.penalty or p.expands])
        for lane in cohort.lanes
    ]  # fmt: skip
    return repr(stages), repr(lanes)
