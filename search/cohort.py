"""A cohort: the lanes that share a training step on one frozen backbone.

One step, from top to bottom: every lane names its next examples; they are packed into one input; the frozen model
runs once over all of them while hooks let each group of lanes adapt its sites; each lane's loss gives gradients to
its own tensors alone; each lane clips and updates itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftscape.search.fixed import fixed
from peftscape.search.forward import Forward
from peftscape.search.laid import Laid
from peftscape.search.lane import HEAD, Lane
from peftscape.search.losses import gradients, in_parts, mean_losses
from peftscape.search.packing import Batch, LaneBatch, pack
from peftscape.search.seq2seq import decoder_start, pack_pairs
from peftscape.search.update import update
from peftscape.spaces.ops.device import on_device

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.graphed import Graphs
    from peftscape.search.head import Head
    from peftscape.search.states import StateCache
    from peftscape.search.task import EncodedSplit

# Evaluation has no backward to keep activations for; this many tokens at once keep two cores busy.
EVALUATION_TOKENS = 1 << 14
# The largest array of a pass on a processor. glibc gives freed blocks over 32 MiB back to the system, which hands them
# out again page by page: half a second a step for 32 lanes on MiniLM. A quarter is for texts longer than the mean.
LARGEST = 24 << 20
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
        passes: in which a step's examples run, one after the other; their gradients add up to those of one pass.
        checkpointing: whether a layer keeps what enters it alone, and runs again in the backward.
        graphs: with them, steps of layouts and shapes that come back are captured and replayed.
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
        passes: int = 1,
        checkpointing: bool = False,
        graphs: Graphs | None = None,
    ) -> None:
        self.backbone, self.head, self.train = backbone, head, train
        self.batch_size, self.regression = batch_size, regression
        self.lanes: list[Lane] = []
        self.passes, self.cuts = passes, 1  # in how many parts each pass runs where it does not fit
        self.forward = Forward(backbone, checkpointing=checkpointing)
        self.cache = None if backbone.sites.decoder_layers else cache  # it keeps what enters layers of one stack
        self.graphs = graphs
        self._laid: Laid | None = None

    def admit(self, *lanes: Lane) -> None:
        """Take lanes in."""
        self._forget()
        self._arrange([*self.lanes, *lanes])

    def retire(self, *lanes: Lane) -> None:
        """Let lanes go; they keep their parameters and optimiser and may come back."""
        gone = {id(lane) for lane in lanes}
        self._forget()
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
        whole = self.passes * self.cuts == 1
        captured = self.graphs.gradients(self, examples) if self.graphs is not None and whole else None
        values = update(self.lanes, self.gradients(examples) if captured is None else captured)
        share = (time.perf_counter() - started) / len(self.lanes)
        for lane in self.lanes:
            lane.wall_s += share
        return values

    def gradients(self, examples: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        """Add the gradients of a step on these examples to the lanes' tensors, in `passes`; the losses of the lanes."""
        return gradients(self, examples, self.passes * self.cuts)

    def parts(self, examples: Sequence[np.ndarray[Any, Any]]) -> Iterator[Tensor]:
        """The sum of all lanes' losses, pass by pass, each with its graph."""
        return (losses.sum() for losses in in_parts(self, examples, self.passes * self.cuts))

    def losses(self, examples: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        """The mean loss of each lane on training examples of its own; a language model's is the mean of all tokens."""
        return mean_losses(self, examples)

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
        names = [key for key in self.lanes[0].params if key.startswith(f"{HEAD}/")]
        params = {key.removeprefix(f"{HEAD}/"): torch.stack([lane.params[key] for lane in self.lanes]) for key in names}
        run = self.passing(examples, split, training, again)

        def logits() -> Tensor:
            states, batch, picked = run()
            # The head is small and its loss is a result: it is computed in the precision of the trained tensors.
            return self.head.logits(params, states.to(self.backbone.master_dtype), batch, picked=picked)

        return self.forward.with_own_weights(logits)

    def passing(
        self,
        examples: Sequence[np.ndarray[Any, Any]],
        split: EncodedSplit,
        training: bool = False,
        again: int = 0,
    ) -> Callable[[], tuple[Tensor, Batch, bool]]:
        """What runs the backbone: last hidden states, of which texts, and whether of the tokens alone that are read."""
        for lane in self.lanes:
            lane.unfold(training, again)
        laid = self._laid or self.laid_out(examples, split)
        read = self.head.reads(laid.batch) if laid.cached else None
        return lambda: (
            self.forward.states(laid.batch, laid.start, laid.given, read), laid.batch, read is not None,
        )  # fmt: skip

    def laid_out(
        self, examples: Sequence[np.ndarray[Any, Any]], split: EncodedSplit, *, fixed_shape: bool = False
    ) -> Laid:
        """What a pass on these examples reads, on the device; in the shape of its class with the training targets."""
        batch, targets = self.packed(examples, split), None
        if fixed_shape:
            batch, targets = fixed(batch), None if split.scored is not None else self.targets(examples)
        batch = batch.to(self.backbone.device)
        if self.cache is None:
            return Laid(batch, targets=targets)
        start = min(map(self.cache.start, self.lanes))
        below = {start, *(n for n in self.forward.rungs if n < start)}
        return Laid(batch, start, self.cache.states(self.forward, batch, split, examples, below), True, targets)

    @contextmanager
    def given(self, laid: Laid) -> Iterator[None]:
        """Within, passes read this, whatever examples they are asked for."""
        self._laid = laid
        try:
            yield
        finally:
            self._laid = None

    def targets(self, examples: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        """lanes x examples, those of the training data."""
        if self._laid is not None and self._laid.targets is not None:
            return self._laid.targets
        return on_device(self.train.targets[np.stack(examples)], self.backbone.device)

    def packed(self, examples: Sequence[np.ndarray[Any, Any]], split: EncodedSplit) -> Batch:
        """How these examples lie in one input, on the CPU."""
        sites, designs = self.backbone.sites, [lane.design for lane in self.lanes]
        if sites.decoder_layers:
            return pack_pairs(designs, examples, split, sites, decoder_start(self.backbone.config))
        batches = [
            LaneBatch(e, design.prompt_length(), design.position_shift())
            for design, e in zip(designs, examples, strict=True)
        ]
        return pack(batches, split, sites, padded=not sites.attention_interface)

    def predict(self, split: EncodedSplit, *lanes: Lane) -> np.ndarray[Any, Any]:
        """Logits on a whole split, lanes x examples x outputs: of these lanes, or of all in the order of `lanes`.

        Where a split asks for texts, these: lanes x examples. Where words are labelled, lanes x examples of words x
        outputs each.
        """
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
        if split.asked is not None:
            from peftscape.search.generation import written

            return written(self, split.asked, EVALUATION_TOKENS // self.cuts)
        order, passes = self._by_length(split)
        parts = [self.logits([texts] * len(self.lanes), split) for texts in passes]
        if split.words is not None:
            from peftscape.search.token_words import by_text

            return by_text(parts, order, split.targets)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        out: np.ndarray[Any, Any] = torch.cat(parts, dim=1).float().cpu().numpy()[:, back]
        return split.answers(out, self.head.outputs)

    def _by_length(self, split: EncodedSplit) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
        """A split's texts, the short ones first, and the passes that evaluate them: as many texts in each as fit."""
        sizes = np.array([len(ids) for ids in split.ids])
        if split.sources is not None:
            sizes = np.maximum(sizes, [len(ids) for ids in split.sources])
        order = np.argsort(sizes, kind="stable")
        tokens = EVALUATION_TOKENS
        if self.backbone.device.type == "cpu":
            tokens = min(tokens, LARGEST // self._token_bytes())
        prompt = max(lane.design.prompt_length() for lane in self.lanes)
        most = np.maximum(1, tokens // self.cuts // len(self.lanes) // (sizes[order] + prompt))
        begins = [0]  # a pass ends before the first text that is too long for as many as it has
        for i in range(len(order)):
            if i - begins[-1] >= most[i]:
                begins.append(i)
        return order, np.split(order, begins[1:])

    def _token_bytes(self) -> int:
        """Of one token in a layer's largest array."""
        return max(self.backbone.sites.d_ff, self.backbone.sites.d_model) * self.backbone.dtype.itemsize

    def close(self) -> None:
        """Take all hooks off the backbone."""
        self._forget()
        self._arrange([])

    def _forget(self) -> None:
        """Lanes are about to come or go: hold on to none of them."""
        self.forward.forget()
        if self.graphs is not None:
            self.graphs.forget()

    def _passes(self, lanes: Sequence[Lane]) -> list[list[Lane]]:
        """Which lanes run together; with a cache, those that begin at higher layers may go by themselves."""
        parts = _alike(lanes)
        length = float(self.train.lengths.mean())
        if self.cache is not None:
            layers, tokens = self.backbone.sites.layers, self.batch_size * length
            starts = {id(lane): self.cache.start(lane) for lane in lanes}
            cut = (by_start(part, [starts[id(lane)] for lane in part], layers, tokens) for part in parts)
            parts = [piece for pieces in cut for piece in pieces]
        if self.backbone.device.type != "cpu":
            return parts
        texts = -(-self.batch_size // (self.passes * self.cuts))
        row = self._token_bytes() * texts
        return [piece for part in parts for piece in _evenly(part, row * (part[0].design.prompt_length() + length))]

    def _arrange(self, lanes: list[Lane]) -> None:
        """Set the cohort's lanes: like designs side by side, so that most groups are views."""
        self.lanes = sorted(lanes, key=lambda lane: lane.design.label)
        self.forward.arrange(self.lanes)


def _alike(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Lanes that run in one pass: each is padded to the longest, so prompts of like length go together.

    Lanes whose loss needs a second pass go apart from those that have one, and a solo lane goes by itself.
    """
    parts: dict[tuple[int, bool, int], list[Lane]] = {}
    for lane in lanes:
        alone = id(lane) if lane.design.solo else 0
        parts.setdefault((lane.design.prompt_length().bit_length(), lane.consistency > 0, alone), []).append(lane)
    return list(parts.values())


def _evenly(lanes: list[Lane], size: float) -> list[list[Lane]]:
    """Lanes in as few passes as their arrays allow, `size` bytes each, and as many in each."""
    count = -(-len(lanes) // max(1, int(LARGEST / size)))
    bounds = [len(lanes) * i // count for i in range(count + 1)]
    return [lanes[begin:end] for begin, end in pairwise(bounds)]


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
