"""How long until a front is as good: Optuna, `Trainer` and HF peft against peftscape, the same time for each.

    python benchmarks/time_to_front.py [--minutes 20] [--seeds 3] [--examples 640] [--retests 2] [--rungs 0]
        [--dtype float32]

Three searches for each seed of the search, on MiniLM and TREC-6:

- Trainer: Optuna's TPE with two objectives asks for LoRA designs; each is trained by `Trainer`, one after the other.
- peftscape, same space: what the engine gives.
- peftscape, `unified`: what the space gives beside it.

With `--dtype bfloat16` both sides compute in it, `Trainer` by autocast. Every design that was on a search's front at
some time (by its validation score) is trained again with fresh seeds, all by peftscape, and scored on the test data.
Hypervolume over time is of these scores against log cost, from a fixed reference. The clocks start with the first
trial; peftscape pays for reading the model out of its time. Writes `results/time_to_front.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import transformers
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))
from vs_trainer import FULL_DEPTH, LANES, expressible, trained

from peftscape.analysis.front import hypervolume, non_dominated
from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings
from peftscape.search.environment import processor, versions
from peftscape.search.lane import new_lane
from peftscape.search.prepare import prepare
from peftscape.search.samplers import sampler
from peftscape.search.session import Session, design_costs, open_session
from peftscape.search.study import run_search
from peftscape.search.task_config import TaskConfig
from peftscape.spaces.design import Design
from peftscape.spaces.space_file import read_space

WAYS = ("maximize", "minimize")
FRESH = 5000
"""Seeds of the retests begin here: no search has these."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trained design: when it was done, its validation score, its trained parameters."""

    end_s: float
    score: float
    cost: int
    design: Design


def main() -> None:
    """Search, retest, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--retests", type=int, default=2)
    parser.add_argument("--rungs", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reference", type=float, default=0.25, help="accuracy from which hypervolume counts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "time_to_front.json")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seconds = 60 * args.minutes
    session = open_session(config_of(args, FULL_DEPTH, seed=0))
    base = AutoModelForSequenceClassification.from_pretrained(
        session.config.model.path(), num_labels=session.task.num_outputs
    )
    searches: dict[str, list[list[Point]]] = {"Trainer": [], "peftscape, same space": [], "peftscape, unified": []}
    for seed in range(args.seeds):
        runs = {
            "Trainer": lambda seed=seed: theirs(session, base, seconds, seed, bf16=args.dtype == "bfloat16"),
            "peftscape, same space": lambda seed=seed: ours(config_of(args, FULL_DEPTH, seed=seed), seconds),
            "peftscape, unified": lambda seed=seed: ours(config_of(args, "unified", seed=seed), seconds),
        }
        for name, search in runs.items():
            searches[name].append(search())
            print(
                name, seed, [(round(p.end_s), p.score, p.cost, p.design.label) for p in searches[name][-1]], flush=True
            )
    grid = np.linspace(0, seconds, 61)[1:].tolist()
    members = [p for runs in searches.values() for run in runs for t in grid for p in front_at(run, t)]
    tests = retested(session, {p.design.digest: p.design for p in members}, args.retests)
    corner = args.reference, math.log10(session.backbone.sites.parameters)
    curves = {
        name: [[volume(front_at(run, t), tests, corner) for t in grid] for run in runs]
        for name, runs in searches.items()
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "minutes": args.minutes,
        "grid_s": grid,
        "trials": {name: [len(run) for run in runs] for name, runs in searches.items()},
        "hypervolume": curves,
        "summary": summary(curves, grid),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["summary"], indent=2))


def config_of(args: argparse.Namespace, space: Any, *, seed: int) -> SearchConfig:
    """A search on this space; its retests are made here, the same for all sides."""
    return SearchConfig(
        name="front",
        task=TaskConfig(name="trec6", validation_size=args.validation),
        model=ModelConfig(source="minilm", dtype=args.dtype),
        space=space,
        search=SearchSettings(
            batch_size=args.batch, examples=args.examples, seed=seed, textbook=False, retest_seeds=0, rungs=args.rungs
        ),
        budget=BudgetConfig(time=f"{60 * args.minutes:.0f}s"),
    )


def ours(config: SearchConfig, seconds: float) -> list[Point]:
    """What peftscape trained to the end; what it loads and writes counts too, so that it has a little less time."""
    with tempfile.TemporaryDirectory() as folder:
        study = run_search(config, Path(folder) / "run", quiet=True)
    return [
        Point(
            end_s=study.ended_s[record.number],
            score=record.validation,
            cost=record.costs.trainable,
            design=Design.from_json(dict(record.design)),
        )
        for record in study.records
        if record.state == "complete" and record.costs is not None and study.ended_s[record.number] <= seconds
    ]


def theirs(session: Session, base: Any, seconds: float, seed: int, *, bf16: bool) -> list[Point]:
    """What an Optuna study trains with `Trainer` in this time; a trial that ends too late does not count."""
    study = optuna.create_study(directions=list(WAYS))
    space = read_space(FULL_DEPTH, session.backbone.sites)
    found: list[Point] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        study.sampler = sampler("tpe", seed, len(study.trials))
        trial = study.ask()
        design = space.suggest(trial)
        assert expressible(session, design) is not None
        score = trained(session, base, design, seed, dropout=True, bf16=bf16)
        cost = design_costs(session, design).trainable
        study.tell(trial, [score, cost])
        end_s = time.perf_counter() - started
        if end_s <= seconds:
            found.append(Point(end_s=end_s, score=score, cost=cost, design=design))
    return found


def front_at(points: list[Point], t: float) -> list[Point]:
    """The front, by validation score, of what was done by then."""
    done = [point for point in points if point.end_s <= t]
    if not done:
        return []
    keep = non_dominated([(point.score, point.cost) for point in done], WAYS)
    return [point for point, kept in zip(done, keep, strict=True) if kept]


def retested(session: Session, designs: dict[str, Design], seeds: int) -> dict[str, float]:
    """The mean test score of each design, by its digest, trained with fresh seeds."""
    jobs = [(digest, seed) for digest in sorted(designs) for seed in range(seeds)]
    packed = [job for job in jobs if not designs[job[0]].solo]
    batches = [packed[i : i + LANES] for i in range(0, len(packed), LANES)]
    batches += [[job] for job in jobs if designs[job[0]].solo]
    scores: dict[str, list[float]] = {digest: [] for digest in designs}
    for together in batches:
        cohort = session.cohort()
        lanes = [
            new_lane(
                designs[digest], seed=FRESH + seed, steps=session.steps, backbone=session.backbone, head=session.head
            )
            for digest, seed in together
        ]
        for lane in lanes:
            prepare(lane, cohort)
        cohort.admit(*lanes)
        while cohort.lanes:
            cohort.step()
            cohort.retire(*(lane for lane in cohort.lanes if lane.done))
        good = [(digest, lane) for (digest, _), lane in zip(together, lanes, strict=True) if lane.failure is None]
        logits = cohort.predict(session.data.test, *(lane for _, lane in good)) if good else []
        for (digest, _), rows in zip(good, logits, strict=True):
            score = session.task.metric.score(rows, session.data.test.targets)
            if math.isfinite(score):
                scores[digest].append(score)
        cohort.close()
    return {digest: float(np.mean(found)) for digest, found in scores.items() if found}


def volume(members: list[Point], tests: dict[str, float], corner: tuple[float, float]) -> float:
    """Hypervolume of a front's retested scores: accuracy above the reference, decades of parameters saved."""
    rows = [(tests[p.design.digest], math.log10(p.cost)) for p in members if p.design.digest in tests]
    return hypervolume(rows, WAYS, corner) if rows else 0.0


def summary(curves: dict[str, list[list[float]]], grid: list[float]) -> dict[str, Any]:
    """Final hypervolumes, and when each side first had the opponent's final one or nearly, as means over seeds."""
    aim = float(np.mean([run[-1] for run in curves["Trainer"]]))
    found: dict[str, Any] = {}
    for name, runs in curves.items():
        mean = np.mean(runs, axis=0)
        reached, nearly = ([t for t, v in zip(grid, mean, strict=True) if v >= part * aim > 0] for part in (1, 0.95))
        found[name] = {
            "final hypervolume": float(mean[-1]),
            "standard error": float(np.std([run[-1] for run in runs], ddof=1) / math.sqrt(len(runs)))
            if len(runs) > 1
            else None,
            "seconds to the opponent's final": reached[0] if reached else None,
            "seconds to 95 % of it": nearly[0] if nearly else None,
        }
    return found


if __name__ == "__main__":
    main()
