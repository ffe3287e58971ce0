"""Train one design, with one or several seeds as lanes, and keep its adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from peftscape.search.adapter_folder import save
from peftscape.search.lane import new_lane
from peftscape.search.prepare import prepare
from peftscape.search.session import adapter_card, design_costs, open_session
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.config import SearchConfig
    from peftscape.spaces.design import Design


def train_design(
    design: Design,
    config: SearchConfig,
    *,
    out: Path,
    seed: int = 0,
    seeds: int = 1,
    examples: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a design at full length and save the adapter of its first seed in `out`.

    Args:
        examples: training examples; else the design's `training.epochs`, else the configuration's length.
    Returns:
        the design's label and costs, and for each seed its validation and test score.

    Raises:
        InputError: if the backbone cannot hold the design, or no seed gave a finite loss.
    """
    if examples is not None:
        config = replace(config, search=replace(config.search, examples=examples, epochs=None))
    elif design.training.epochs is not None:
        config = replace(config, search=replace(config.search, examples=None, epochs=design.training.epochs))
    session = open_session(config)
    if errors := design.check(session.backbone.sites):
        raise InputError("design", errors)
    lanes = [
        new_lane(design, seed=seed + i, steps=session.steps, backbone=session.backbone, head=session.head)
        for i in range(seeds)
    ]
    cohort = session.cohort()
    for lane in lanes:
        prepare(lane, cohort)
    # A design that needs the backbone for itself trains seed by seed, all others train together.
    for together in [[lane] for lane in lanes] if design.solo else [lanes]:
        cohort.admit(*together)
        for _ in track(range(session.steps), design.label, disable=quiet, transient=True):
            if cohort.lanes:
                cohort.step()
                cohort.retire(*(lane for lane in cohort.lanes if lane.failure))
        cohort.retire(*cohort.lanes)
    good = [lane for lane in lanes if lane.failure is None]
    if not good:
        raise InputError(design.label, [f"seed {lane.seed}: {lane.failure}" for lane in lanes])
    scores: list[dict[str, Any]] = []
    metric, data = session.task.metric, session.data
    for lane in good:
        cohort.admit(lane)
        validation, test = (
            metric.score(cohort.predict(split)[0], split.targets) for split in (data.validation, data.test)
        )
        cohort.retire(lane)
        scores.append({"seed": lane.seed, "validation": validation, "test": test})
    save(good[0].adapter(), adapter_card(session, design, good[0].seed), session.backbone, session.head, out)
    return {
        "design": design.json(),
        "label": design.label,
        "costs": vars(design_costs(session, design)),
        "examples": session.steps * config.search.batch_size,
        "metric": metric.name,
        "scores": scores,
        "failed": [f"seed {lane.seed}: {lane.failure.message}" for lane in lanes if lane.failure],
        "loss": float(np.mean(good[0].losses[-10:])),
        "adapter": str(out),
    }
