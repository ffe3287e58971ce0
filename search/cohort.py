"""A cohort: the lanes that share a training step on one frozen backbone.

One step, from top to bottom: every lane names its next examples; they are packed into one input; the frozen model
runs once over all of them while hooks let each group of lanes adapt its sites; each lane's loss gives gradients to
its own tensors alone; each lane clips and updates itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from peftscape.search.forward import Forward
from peftscape.search.lane import HEAD, Lane
from peftscape.search.packing import LaneBatch, pack
from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.search.states import StateCache
    from peftscape.search.task import EncodedSplit

# Evaluation has no backward to keep activations for; this many sequences at once keep two cores busy.
EVALUATION_ROWS = 512
# What a pass through a layer costs besides its tokens, in tokens: small products run at a lower rate.
PASS_TOKENS = 256


class Cohort:
    """Lanes on one backbone. A lane may come or go between any two steps.

    Args:
        backbone, head: shared by all lanes; nothing of them changes.
        train: the examples lanes learn from.
        batch_size: examples of a lane in a step, the same for all lanes.
        cache: of hidden states; with it, lanes run from their lowest adapted layer on, and the last layer runs on
            for the tokens alone that the head reads.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        train: EncodedSplit,
        *,
        batch_size: int,
        regression: bool = False,
        cache: StateCache | None = None,
    ) -> None:
        self.backbone, self.head, self.train = backbone, head, train
        self.batch_size, self.regression = batch_size, regression
        self.lanes: list[Lane] = []
        self.forward = Forward(backbone)
        self.cache = cache

    def admit(self, *lanes: Lane) -> None:
        """Take lanes in."""
        self._arrange([*self.lanes, *lanes])

    def retire(self, *lanes: Lane) -> None:
        """Let lanes go; they keep their parameters and optimiser and may come back."""
        gone = {id(lane) for lane in lanes}
        self._arrange([lane for lane in self.lanes if id(lane) not in gone])

    def step(self) -> list[float]:
        """Train every lane for one step; its loss in the order of `lanes`. A lane whose loss is not finite fails."""
        everyone = self.lanes
        losses: dict[int, float] = {}
        parts = self._passes(everyone)
        for part in parts:
            if len(parts) > 1:
                self._arrange(part)
            losses |= dict(zip(map(id, self.lanes), self._step(), strict=True))
        if len(parts) > 1:
            self._arrange(everyone)
        return [losses[id(lane)] for lane in self.lanes]

    def _step(self) -> list[float]:
        started = time.perf_counter()
        examples = [lane.examples(self.batch_size, len(self.train.ids)) for lane in self.lanes]
        losses = self.losses(examples)
        penalties = [term for lane in self.lanes if (term := lane.penalty()) is not None]
        torch.stack([losses.sum(), *penalties]).sum().backward()  # type: ignore[no-untyped-call]
        values: list[float] = losses.detach().tolist()
        share = (time.perf_counter() - started) / len(self.lanes)
        for lane, loss in zip(self.lanes, values, strict=True):
            if np.isfinite(loss):
                lane.losses.append(loss)
                lane.update()
            else:
                lane.failure = Failure(kind="not finite", message=f"the loss is {loss}", step=lane.step)
                lane.optimizer.zero_grad()
            lane.wall_s += share
        return values

    def losses(self, examples: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        """The mean loss of each lane on training examples of its own."""
        targets = torch.from_numpy(self.train.targets[np.stack(examples)]).to(self.backbone.device)
        logits = self.logits(examples, self.train, training=True)
        losses = self._losses(logits, targets)
        weights = [lane.consistency for lane in self.lanes]
        if not any(weights):
            return losses
        again = self.logits(examples, self.train, training=True, again=1)
        both = (losses + self._losses(again, targets)) / 2
        return both + losses.new_tensor(weights) * _divergence(logits, again)

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.regression:
            return (logits[..., 0] - targets).square().mean(dim=1)
        flat = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view_as(targets).mean(dim=1)

    def logits(
        self,
        examples: Sequence[np.ndarray[Any, Any]],
        split: EncodedSplit,
        *,
        training: bool = False,
        again: int = 0,
    ) -> Tensor:
        """lanes x examples x outputs: every lane's logits for its own examples.

        Args:
            training: whether methods draw at random what they draw (experts, ranks); `again` draws anew.
        """
        for lane in self.lanes:
            lane.unfold(training, again)
        batch = pack(
            [
                LaneBatch(e, lane.design.prompt_length(), lane.design.position_shift())
                for lane, e in zip(self.lanes, examples, strict=True)
            ],
            split,
            self.backbone.sites,
            padded=not self.backbone.sites.attention_interface,
        ).to(self.backbone.device)
        start, given, read = 0, None, None
        if self.cache is not None:
            start = min(map(self.cache.start, self.lanes))
            given = self.cache.states(self.forward, batch, split, examples, start)
            read = self.head.reads(batch)
        names = [key for key in self.lanes[0].params if key.startswith(f"{HEAD}/")]
        params = {key.removeprefix(f"{HEAD}/"): torch.stack([lane.params[key] for lane in self.lanes]) for key in names}

        def run() -> Tensor:
            states = self.forward.states(batch, start, given, read)
            # The head is small and its loss is a result: it is computed in the precision of the trained tensors.
            return self.head.logits(params, states.to(self.backbone.master_dtype), batch, picked=read is not None)

        return self.forward.with_own_weights(run)

    def predict(self, split: EncodedSplit, *lanes: Lane) -> np.ndarray[Any, Any]:
        """Logits on a whole split, lanes x examples x outputs: of these lanes, or of all in the order of `lanes`."""
        everyone, chosen = self.lanes, lanes or tuple(self.lanes)
        found: dict[int, np.ndarray[Any, Any]] = {}
        try:
            for part in self._passes(chosen):
                self._arrange(part)
                found |= dict(zip(map(id, self.lanes), self._predict(split), strict=True))
        finally:
            self._arrange(everyone)
        return np.stack([found[id(lane)] for lane in chosen])

    @torch.no_grad()
    def _predict(self, split: EncodedSplit) -> np.ndarray[Any, Any]:
        order = np.argsort([len(ids) for ids in split.ids], kind="stable")
        count = max(1, EVALUATION_ROWS // len(self.lanes))
        parts = [self.logits([order[i : i + count]] * len(self.lanes), split) for i in range(0, len(order), count)]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        out: np.ndarray[Any, Any] = torch.cat(parts, dim=1).float().cpu().numpy()[:, back]
        return out

    def close(self) -> None:
        """Take all hooks off the backbone."""
        self._arrange([])

    def _passes(self, lanes: Sequence[Lane]) -> list[list[Lane]]:
        """Which lanes run together; with a cache, those that begin at higher layers may go by themselves."""
        parts = _alike(lanes)
        if self.cache is None:
            return parts
        tokens = self.batch_size * float(self.train.lengths.mean())
        return [
            piece
            for part in parts
            for piece in by_start(part, [self.cache.start(lane) for lane in part], self.backbone.sites.layers, tokens)
        ]

    def _arrange(self, lanes: list[Lane]) -> None:
        """Set the cohort's lanes: like designs side by side, so that most groups are views."""
        self.lanes = sorted(lanes, key=lambda lane: lane.design.label)
        self.forward.arrange(self.lanes)


def _alike(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Lanes that run in one pass: each is padded to the longest, so prompts of like length go together.

    Lanes whose loss needs a second pass go apart from those that have one.
    """
    parts: dict[tuple[int, bool], list[Lane]] = {}
    for lane in lanes:
        parts.setdefault((lane.design.prompt_length().bit_length(), lane.consistency > 0), []).append(lane)
    return list(parts.values())


def by_start(lanes: Sequence[Lane], starts: Sequence[int], layers: int, tokens: float) -> list[list[Lane]]:
    """Cut lanes, by the layer they begin with, into passes of the least work.

    A pass runs from its lowest start on, and costs (layers - start) * (its tokens + what a pass costs by itself).
    """
    order = sorted(range(len(lanes)), key=lambda i: starts[i])
    best: list[tuple[float, int]] = [(0.0, 0)]  # for the first n lanes: the least work, and where the last pass begins
    for n in range(1, len(order) + 1):
        best.append(
            min((best[m][0] + (layers - starts[order[m]]) * ((n - m) * tokens + PASS_TOKENS), m) for m in range(n))
        )
    passes: list[list[Lane]] = []
    end = len(order)
    while end:
        begin = best[end][1]
        passes.insert(0, [lanes[i] for i in order[begin:end]])
        end = begin
    return passes


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """The symmetric KL divergence of two passes, a mean over examples; of single outputs their squared distance."""
    if one.shape[-1] == 1:
        return (one - other).square().mean(dim=(1, 2))
    p, q = torch.log_softmax(one, dim=-1), torch.log_softmax(other, dim=-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(dim=-1).mean(dim=1) / 2
