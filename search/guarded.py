"""A cohort that survives what machines do: too little memory, steps that hang, signals.

Out of memory, the lanes run in halves from then on; where one does not fit alone its examples do, down to single ones,
before it fails and says so. Work that takes longer than its limit is stopped and its lanes run one by one, so that only
the one that hangs fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftscape.search.cohort import EVALUATION_TOKENS, Cohort
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.search.stopping import HangError, Stop
from peftscape.spaces.hf_peft import HFPeft
from peftscape.spaces.plan_lanes import groups
from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from peftscape.search.account import Account
    from peftscape.search.checkpoint import Checkpoints
    from peftscape.search.task import EncodedSplit
    from peftscape.spaces.design import Design

# Lanes are saved this often, and never for more than a fiftieth of the time.
SAVE_EVERY_S = 30.0
SAVE_SHARE = 50
#: The kind of a failure that code of another library, a tuner of HF peft, raised.
FOREIGN = "error in peft"
_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory",
    "storage size calculation overflowed",
    "could not create a primitive", "could not create a memory",  # what oneDNN says of it
)  # fmt: skip


@dataclass
class Memory:
    """How many lanes fit at once: by the plan, corrected by what was measured.

    Args:
        width: the most that fit after memory ran out; None while all did.
        limit: bytes that weights and lanes may take together; None for any.
        weights: bytes of the frozen weights.
        alone: peak bytes of a design that trains alone, by the plan.
        correction: measured over planned bytes.
        cuts: of designs that do not fit alone, in how many parts a pass runs, by what it is for and digest.
    """

    width: int | None = None
    limit: int | None = None
    weights: int = 0
    alone: Callable[[Design], int] = lambda _: 0
    correction: float = 1.0
    known: dict[str, int] = field(default_factory=dict)
    cuts: dict[tuple[str, str], int] = field(default_factory=dict)

    def parts(self, designs: Sequence[Design]) -> list[range]:
        """Lanes of these designs, in their order, in as few parts as fit."""
        if self.limit is None:
            return [range(len(designs))]
        return groups(list(map(self._alone, designs)), self.weights, self.limit, self.correction)

    def learn(self, designs: Sequence[Design], measured: int) -> None:
        """From what a step of lanes of these designs took beyond what was there before it."""
        planned = sum(self._alone(design) - self.weights for design in designs)
        self.correction = max(self.correction, measured / max(planned, 1))

    def _alone(self, design: Design) -> int:
        if design.digest not in self.known:
            self.known[design.digest] = self.alone(design)
        return self.known[design.digest]


@dataclass(frozen=True)
class _Work:
    """What is done with lanes, in parts.

    Args:
        name: `step` or `predict`.
        most: into how many parts a lone lane's pass can be cut.
        open: whether it is still to be done on a lane.
    """

    name: str
    most: int
    do: Callable[[Sequence[Lane]], None]
    open: Callable[[Lane], bool]


class Guarded(Cohort):
    """A cohort with limits.

    Args:
        stop: asked before each step.
        patience_s: seconds that a step or an evaluation may take now; None for any.
        over: whether it was the whole search's time that ended; then a HangError goes on to it.
        checkpoints: where lanes are saved; None for nowhere.
        account: told of training that a kill would lose.
        memory: what is known of how many lanes fit.
    """

    def __init__(
        self,
        *args: Any,
        stop: Stop | None = None,
        patience_s: Callable[[], float | None] = lambda: None,
        over: Callable[[], bool] = lambda: False,
        checkpoints: Checkpoints | None = None,
        account: Account | None = None,
        memory: Memory | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self.stop, self.patience_s, self.over = stop or Stop(), patience_s, over
        self.checkpoints, self.account = checkpoints, account
        self.memory = memory or Memory()
        self._begun: dict[int, Lane] = {}
        self._saved: dict[int, float] = {}  # seconds of a lane's training that are on disk
        self._last, self._took = time.monotonic(), 0.0

    def begin(self, design: Design, *, seed: int, steps: int, name: str = "") -> Lane | Failure:
        """A lane at where its training begins, or why there is no memory for its tensors."""
        try:
            lane = new_lane(design, seed=seed, steps=steps, backbone=self.backbone, head=self.head, name=name)
        except Exception as error:
            if is_out_of_memory(error):
                return Failure(kind="out of memory", message=first_line(error), step=0)
            if not _foreign(design):
                raise
            return Failure(kind=FOREIGN, message=_said(error), step=0)
        self.start(lane)
        return lane

    def start(self, lane: Lane) -> None:
        """Bring a new lane to where its training begins: where it was saved, or what it needs from the data."""
        if self.checkpoints is not None and self.checkpoints.restore(lane):
            self._begun[id(lane)] = lane
            self._saved[id(lane)] = lane.wall_s
            return
        everyone = list(self.lanes)
        failure = self._tried([lane], lambda part: prepare(lane, self))
        while failure is not None and failure.kind == "out of memory" and self.cuts < self._most_cuts:
            self.cuts = min(2 * self.cuts, self._most_cuts)
            failure = self._tried([lane], lambda part: prepare(lane, self))
        self.cuts = 1
        if [id(other) for other in everyone] != [id(other) for other in self.lanes]:
            self._arrange(everyone)
        if failure is not None:
            lane.failure = Failure(kind=failure.kind, message=failure.message, step=0)

    def step(self) -> list[float]:
        """As a cohort's, in as many parts as memory needs; raises Stopped between two steps where that was asked."""
        if self.stop.asked:
            self.save()
            self.stop.check()
        everyone = list(self.lanes)
        self._begin(everyone)
        before = {id(lane): lane.step for lane in everyone}
        losses: dict[int, float] = {}

        def train(part: Sequence[Lane]) -> None:
            with self._measured(part):
                losses.update(zip(map(id, self.lanes), super(Guarded, self).step(), strict=True))

        try:
            self._each(_Work("step", self._most_cuts, train, lambda lane: lane.step == before[id(lane)]), everyone)
        except KeyboardInterrupt:
            self.save()
            raise
        for lane in everyone:
            if lane.done:
                self._begun.pop(id(lane), None)
        if self.account is not None:
            self.account.unsaved_s = sum(lane.wall_s - self._saved[i] for i, lane in self._begun.items())
        if time.monotonic() - self._last > max(SAVE_EVERY_S, SAVE_SHARE * self._took):
            self.save()
        return [losses.get(id(lane), float("nan")) for lane in self.lanes]

    def predict(self, split: EncodedSplit, *lanes: Lane) -> np.ndarray[Any, Any]:
        """As a cohort's; a lane that could not be evaluated has failed, and its logits are NaN."""
        chosen = list(lanes or self.lanes)
        found: dict[int, np.ndarray[Any, Any]] = {}

        def evaluate(part: Sequence[Lane]) -> None:
            found.update(zip(map(id, part), super(Guarded, self).predict(split, *part), strict=True))

        self._each(_Work("predict", EVALUATION_TOKENS, evaluate, lambda lane: id(lane) not in found), chosen)
        nothing: np.ndarray[Any, Any] = np.full((len(split), self.head.outputs), np.nan, dtype=np.float32)
        if split.asked is not None or split.words is not None:
            nothing = np.full(len(split), None, dtype=object)
        return np.stack([found.get(id(lane), nothing) for lane in chosen])

    def save(self, *lanes: Lane) -> None:
        """Save these lanes, or all, that have begun and are not done; one interrupted in its update is left out."""
        if self.checkpoints is None:
            return
        started = time.monotonic()
        wanted = {id(lane) for lane in lanes} or self._begun.keys()
        for key, lane in self._begun.items():
            if key in wanted and not lane.done and lane.step == len(lane.losses) > 0:
                self.checkpoints.save(lane)
                self._saved[key] = lane.wall_s
        self._last = time.monotonic()
        self._took = self._last - started

    def keep(self, *lanes: Lane) -> None:
        """Save lanes that are done and scored while their trial is not: whoever takes it up does not train them."""
        if self.checkpoints is not None:
            for lane in lanes:
                self.checkpoints.save(lane)

    def put_by(self, *lanes: Lane) -> None:
        """Save lanes that wait and let go of them: `start` takes a new lane to where they were."""
        self.save(*lanes)
        for lane in lanes:
            self._begun.pop(id(lane), None)

    def forget(self, *lanes: Lane) -> None:
        """These lanes are done with: their records are written, or nobody wants them."""
        for lane in lanes:
            self._begun.pop(id(lane), None)
            if self.checkpoints is not None:
                self.checkpoints.drop(lane)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _begin(self, lanes: list[Lane]) -> None:
        for lane in lanes:
            if id(lane) not in self._begun:
                self._begun[id(lane)] = lane
                self._saved[id(lane)] = lane.wall_s

    def _each(self, work: _Work, lanes: list[Lane]) -> None:
        """Do the work on all lanes in as few parts as fit; those whose own pass has to be cut go by themselves."""
        everyone, size = list(self.lanes), self.memory.width or len(lanes)
        whole = [lane for lane in lanes if self._cuts(work, lane) == 1]
        planned = [whole[part.start : part.stop] for part in self.memory.parts([lane.design for lane in whole])]
        parts = [part[i : i + size] for part in planned for i in range(0, len(part), size)]
        parts += [[lane] for lane in lanes if self._cuts(work, lane) > 1]
        try:
            while parts:
                part = [lane for lane in parts.pop(0) if lane.failure is None and work.open(lane)]
                if not part:
                    continue
                if self.memory.width is not None and len(part) > self.memory.width:  # learnt since the parts were made
                    parts = [part[: self.memory.width], part[self.memory.width :], *parts]
                    continue
                if [id(lane) for lane in part] != [id(lane) for lane in self.lanes]:
                    self._arrange(part)
                self.cuts = max(self._cuts(work, lane) for lane in part)
                if failure := self._tried(part, work.do):
                    parts = [*self._smaller(part, failure, work), *parts]
        finally:
            self.cuts = 1
            if [id(lane) for lane in everyone] != [id(lane) for lane in self.lanes]:
                self._arrange(everyone)

    @contextmanager
    def _measured(self, part: Sequence[Lane]) -> Iterator[None]:
        """Correct the plan by what the lanes take, where the device tells it."""
        device = self.backbone.device
        if device.type != "cuda" or self.memory.limit is None:
            yield
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        self.memory.learn([lane.design for lane in part], torch.cuda.max_memory_allocated(device) - before)

    def _tried(self, part: list[Lane], work: Callable[[Sequence[Lane]], None]) -> Failure | None:
        """Why the work could not be done on so many lanes, or None; any other error of code of ours goes on."""
        try:
            with self.stop.limit(self.patience_s()):
                work(part)
        except Exception as error:
            if isinstance(error, HangError) and self.over():
                raise
            if isinstance(error, HangError):
                return Failure(kind="hanging", message=str(error))
            if is_out_of_memory(error):
                return Failure(kind="out of memory", message=first_line(error))
            if not all(_foreign(lane.design) for lane in part):
                raise
            return Failure(kind=FOREIGN, message=_said(error))
        return None

    @property
    def _most_cuts(self) -> int:
        """Into how many parts a training pass can be cut: the largest is one of single examples then."""
        return -(-self.batch_size // self.passes)

    def _cuts(self, work: _Work, lane: Lane) -> int:
        return self.memory.cuts.get((work.name, lane.design.digest), 1)

    def _smaller(self, part: list[Lane], failure: Failure, work: _Work) -> list[list[Lane]]:
        """The parts to try next; a lane that was alone and cannot be cut further has failed."""
        for lane in part:  # what the failed pass left
            lane.optimizer.zero_grad()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        broken = [lane for lane in part if lane.step != len(lane.losses)]  # interrupted in their update
        alone = len(part) == 1 and not broken
        if failure.kind == "out of memory" and alone and self.cuts < work.most:
            self.memory.cuts[work.name, part[0].design.digest] = min(2 * self.cuts, work.most)
            self.memory.width = None  # it was this lane that did not fit
            return [part]
        half = -(-len(part) // 2) if failure.kind == "out of memory" else 1
        if len(part) > 1 and failure.kind == "out of memory":
            self.memory.width = min(self.memory.width or half, half)
        for lane in part if alone else broken:
            lane.failure = Failure(kind=failure.kind, message=failure.message, step=lane.step)
            self.memory.width = None  # it was this lane that did not fit
        whole = [lane for lane in part if lane.failure is None]
        return [whole[i : i + half] for i in range(0, len(whole), half)]

    def close(self) -> None:
        super().close()
        self._begun.clear()
        if self.account is not None:
            self.account.unsaved_s = 0.0


def _foreign(design: Design) -> bool:
    """Whether code of another library runs in its steps."""
    return any(isinstance(p.method, HFPeft) for p in design.placements)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an error says, or what it is if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or the device: torch says it in several ways."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
