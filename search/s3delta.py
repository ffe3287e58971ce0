"""S3Delta as a search's strategy: structures by gradients, trained as trials (Hu et al. 2022, arXiv:2206.07382).

Super-nets of several budgets and seeds train as lanes of one cohort. The modules that each finds most probable, up to
its budget, are a structure; the study keeps them, and every trial takes its turn's while TPE suggests what is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftscape.search.progress import show
from peftscape.search.s3delta_net import SuperNet, super_net
from peftscape.search.s3delta_space import STRUCTURES, Modules, budgets, within
from peftscape.search.session import design_costs
from peftscape.search.stopping import HangError
from peftscape.spaces.design import Design, Training
from peftscape.spaces.knobs import Domain
from peftscape.spaces.space_file import read_space

if TYPE_CHECKING:
    from peftscape.search.budget import Budget
    from peftscape.search.progress import SearchProgress
    from peftscape.search.session import Session
    from peftscape.search.storage import Storage
    from peftscape.search.workers import Workers
    from peftscape.spaces.space import Space

# Of the time and the examples that are left, super-nets may take this much: the rest trains what they find.
SHARE = 0.5
HOLDER = "s3delta_worker"
LOOK_S = 0.5


def find_structures(
    session: Session, storage: Storage, workers: Workers, budget: Budget, progress: SearchProgress
) -> None:
    """Find the study's structures, once: one worker does, the others wait.

    What was interrupted begins anew, with the same seeds.

    Raises:
        InputError: no budget holds some of the space's modules and not all of them, or `budget.trainable` none.
    """
    while storage.attr(STRUCTURES) is None and not budget.over():
        session.guards["stop"].check()
        with storage.lock():
            holder, known = storage.attr(HOLDER), workers.all()
            mine = holder is None or workers.dead(holder, known)
            if mine:
                storage.set_attr(HOLDER, workers.name)
                budget.hear(known, workers.name)
        if not mine:
            with budget.account.spending("waiting_s"):
                time.sleep(LOOK_S)
            continue
        found = _Search(session, storage, budget, progress).run()
        if not found:
            progress.say("S3Delta found no structure: TPE chooses the places too")
        with storage.lock():  # one that was taken for dead leaves it to the worker that took its place
            if storage.attr(STRUCTURES) is None and storage.attr(HOLDER) == workers.name:
                storage.set_attr(STRUCTURES, found)
        # What a super-net's step takes says little of a trial's.
        budget.lane_step_s = None


@dataclass
class _Search:
    session: Session
    storage: Storage
    budget: Budget
    progress: SearchProgress

    def run(self) -> list[dict[str, Any]]:
        """The structures that differ, as the study keeps them."""
        config, sites = self.session.config, self.session.backbone.sites
        settings = config.search.s3delta
        space = read_space(config.space, sites)
        modules = Modules(space)
        room = math.inf
        if self.budget.trainable is not None:
            room = self.budget.trainable - design_costs(self.session, Design()).trainable
        limits, notes = within(modules, budgets(settings.budgets, sites.parameters), room)
        for note in notes:
            self.progress.say(note)
        seeds = [config.search.seed + i for i in range(settings.seeds)]
        steps = self._steps(len(limits) * len(seeds))
        if steps < 2:
            self.progress.say("the budget leaves no room for S3Delta's super-nets")
            return []
        nets = [
            super_net(
                modules, settings, middle(space), budget=limit, seed=seed, steps=steps,
                backbone=self.session.backbone, head=self.session.head,
            )
            for limit in limits
            for seed in seeds
        ]  # fmt: skip
        try:
            self._train(nets)
        except BaseException:  # an interruption too: they begin anew
            self.budget.account.lose(sum(net.wall_s for net in nets))
            raise
        found = [self._structure(modules, net) for net in nets if net.failure is None and net.step > 1]
        for net in nets:
            if net.failure is not None:
                self.budget.account.lose(net.wall_s)
                self.progress.say(f"a super-net of {net.budget:,} parameters failed: {net.failure.message}")
        return list({str(row["layers"]): row for row in found}.values())

    def _steps(self, nets: int) -> int:
        """Of each super-net; as many as the examples that are left allow. Even: the halves take turns."""
        config = self.session.config.search
        size = config.s3delta.examples or 2 * self.session.steps * config.batch_size
        _, examples = self.budget.part_left(SHARE)
        steps = min(-(-size // config.batch_size), examples / (nets * config.batch_size))
        return int(steps) // 2 * 2

    def _train(self, nets: Sequence[SuperNet]) -> None:
        """Train super-nets, as many at once as a search trains lanes, for at most their part of the time."""
        width = self.session.config.search.lanes
        parts = [nets[i : i + width] for i in range(0, len(nets), width)]
        end = time.monotonic() + self.budget.part_left(SHARE)[0]
        for i, part in enumerate(parts):
            now = time.monotonic()
            self._train_part(part, now + (end - now) / (len(parts) - i))
        trained, steps = min(net.step for net in nets), nets[0].steps
        if trained < steps and all(net.failure is None for net in nets):
            self.progress.say(
                f"S3Delta's super-nets were stopped after {trained} of {steps} steps: half of the time is over"
            )

    def _train_part(self, nets: Sequence[SuperNet], end: float) -> None:
        cohort = self.session.cohort()
        cohort.checkpoints = None  # a lane that is saved is a design's
        cohort.memory = replace(cohort.memory, known={}, cuts={})  # what fits of super-nets says nothing of trials
        cohort.admit(*nets)
        try:
            while cohort.lanes and time.monotonic() < end and not self.budget.over():
                count, started = len(cohort.lanes), time.perf_counter()
                cohort.step()
                self.budget.measured(time.perf_counter() - started, count)
                cohort.retire(*(lane for lane in cohort.lanes if lane.done))
                show(self.progress, "super-nets", self.budget, self.storage, done=0, running=len(cohort.lanes))
        except HangError:
            self.progress.say("the time was over within a step of a super-net")
        finally:
            cohort.close()

    def _structure(self, modules: Modules, net: SuperNet) -> dict[str, Any]:
        p = net.probabilities().tolist()
        kept = modules.chosen(p, net.budget)
        size = modules.parameters(kept)
        self.progress.say(
            f"S3Delta keeps {len(kept)} of {len(p)} modules, {size:,} of {net.budget:,} parameters (seed {net.seed})"
        )
        return {
            "budget": net.budget, "seed": net.seed, "steps": net.step, "parameters": size,
            "layers": modules.by_slot(kept), "probabilities": [round(value, 6) for value in p],
        }  # fmt: skip


def middle(space: Space) -> Training:
    """Training knobs of a super-net: constants as they are, the middle of a learning rate's domain, else defaults."""
    values = {name: value for name, value in space.training.items() if not isinstance(value, Domain)}
    domain = space.training.get("lr")
    if isinstance(domain, Domain):
        ends = [float(end) for end in domain.ends()]
        values["lr"] = math.sqrt(min(ends) * max(ends))
    return Training(**values)
