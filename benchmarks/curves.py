"""Learning curves of many designs, to replay searches on: MiniLM on TREC-6, trained fully with peftscape's own lanes.

    python benchmarks/curves.py [--designs 200] [--seeds 3] [--examples 2560] [--lanes 8] [--processes 2] [--limit N]

First the textbook designs, then designs that Optuna's random sampler draws from the preset `unified`, in the order it
asked for them. Each is scored on the validation data at ten fractions of its training, which are the rungs of factor 3
and steps between them. Writes `results/curves.json` after each cohort; the same command goes on where it stopped.
`--limit` ends after so many designs of this session, and says how long all would take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftscape.search.config import ModelConfig, SearchConfig, SearchSettings
from peftscape.search.environment import processor, versions
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.search.session import Session, design_costs, open_session
from peftscape.search.task import TaskConfig
from peftscape.spaces.design import Design
from peftscape.spaces.presets import textbook
from peftscape.spaces.space_file import read_space

FRACTIONS = (1 / 27, 1 / 18, 1 / 9, 1 / 6, 2 / 9, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)


def main() -> None:
    """Record what is not there yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--designs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=2560)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--validation", type=int, default=500, help="examples; ten evaluations are dear")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1, help="each on its share of the cores")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "curves.json")
    args = parser.parse_args()
    session = opened(args)
    same = {
        "about": f"MiniLM on TREC-6, preset unified, {args.examples} examples, batches of {args.batch}, {args.dtype}",
        "fractions": [math.ceil(f * session.steps - 1e-9) / session.steps for f in FRACTIONS],
        "metric": session.task.metric.name,
        "n_validation": len(session.task.validation),
        "seeds": args.seeds,
    }
    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"designs": []}
    if args.out.is_file() and {key: known[key] for key in same} != same:
        raise SystemExit(f"{args.out} holds other curves ({known['about']}); use another --out")
    if len(set(same["fractions"])) < len(FRACTIONS):
        raise SystemExit(f"{session.steps} steps are too few for {len(FRACTIONS)} different fractions")
    have = {row["digest"] for row in known["designs"]}
    wanted = [(i, name, d) for i, (name, d) in enumerate(drawn(session, args.designs)) if d.digest not in have]
    print(f"{len(have)} designs are there, {len(wanted)} are wanted; {session.steps} steps each, {args.seeds} seeds")
    todo, done, started = wanted[: args.limit], 0, time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    with ProcessPoolExecutor(args.processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        groups = list(cohorts(todo, max(1, args.lanes // args.seeds)))
        for future in as_completed([pool.submit(record, args, together) for together in groups]):
            if error := future.exception():
                print(f"some designs failed: {error!r}", flush=True)
                continue
            rows = future.result()
            known = same | {
                "command": " ".join(["python", *sys.argv]),
                "machine": {"processor": processor(), "cores": os.cpu_count()},
                "versions": versions(),
                "designs": sorted([*known["designs"], *rows], key=lambda row: int(row["order"])),
            }
            part = args.out.with_suffix(".part")
            part.write_text(json.dumps(known, indent=None, separators=(",", ":")) + "\n")
            part.replace(args.out)
            done += len(rows)
            each = (time.monotonic() - started) / done
            left = each * (len(wanted) - done) / 3600
            print(f"{done} of {len(todo)}: {each:.1f} s a design; all that are wanted: {left:.1f} h more", flush=True)


def opened(args: argparse.Namespace) -> Session:
    """The task and the backbone, read once a process."""
    return _opened(args.validation, args.dtype, args.device, args.batch, args.examples, args.lanes)


@cache
def _opened(validation: int, dtype: str, device: str, batch: int, examples: int, lanes: int) -> Session:
    return open_session(
        SearchConfig(
            task=TaskConfig(name="trec6", validation_size=validation),
            model=ModelConfig(source="minilm", dtype=dtype, device=device),
            search=SearchSettings(batch_size=batch, examples=examples, lanes=lanes),
        )
    )


def drawn(session: Session, count: int) -> list[tuple[str | None, Design]]:
    """Textbook designs of the space with their names, then random ones; each once, and only what the model can hold."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = read_space("unified", session.backbone.sites)
    found: dict[str, tuple[str | None, Design]] = {}
    for name, design in textbook().items():
        if not design.check(session.backbone.sites):
            found[design.digest] = (name, design)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    while len(found) < count:
        design = space.suggest(study.ask())
        if not design.check(session.backbone.sites):
            found.setdefault(design.digest, (None, design))
    return list(found.values())[:count]


def cohorts(todo: list[tuple[int, str | None, Design]], size: int) -> Iterator[list[tuple[int, str | None, Design]]]:
    """Designs that train together: a few at a time, those that need the backbone for themselves alone."""
    together = [row for row in todo if not row[2].solo]
    for i in range(0, len(together), size):
        yield together[i : i + size]
    for row in todo:
        if row[2].solo:
            yield [row]


def record(args: argparse.Namespace, designs: list[tuple[int, str | None, Design]]) -> list[dict[str, Any]]:
    """The rows of designs that train together, each with as many lanes as seeds."""
    session, seeds = opened(args), args.seeds
    cohort = session.cohort()
    lanes: dict[int, list[Lane]] = {}
    solo = designs[0][2].solo
    for order, _, design in designs:
        lanes[order] = [
            new_lane(design, seed=s, steps=session.steps, backbone=session.backbone, head=session.head, name=str(order))
            for s in range(seeds)
        ]
        for lane in lanes[order]:
            prepare(lane, cohort)
    everyone = [lane for own in lanes.values() for lane in own]
    curves: dict[int, list[float | None]] = {id(lane): [] for lane in everyone}
    rungs = [math.ceil(f * session.steps - 1e-9) for f in FRACTIONS]
    for together in [[lane] for lane in everyone] if solo else [everyone]:
        cohort.admit(*together)
        for step in range(1, session.steps + 1):
            if cohort.lanes:
                cohort.step()
                cohort.retire(*(lane for lane in cohort.lanes if lane.failure))
            if step in rungs:
                score(session, cohort, together, curves)
        cohort.retire(*cohort.lanes)
    cohort.close()
    return [
        {
            "order": order,
            "label": design.label,
            "digest": design.digest,
            "textbook": name,
            "design": design.json(),
            "costs": vars(design_costs(session, design)),
            "curves": [curves[id(lane)] for lane in lanes[order]],
            "failures": [lane.failure.message if lane.failure else None for lane in lanes[order]],
        }
        for order, name, design in designs
    ]


def score(session: Session, cohort: Any, lanes: list[Lane], curves: dict[int, list[float | None]]) -> None:
    """Append the validation score of each lane, None for those that failed."""
    running = list(cohort.lanes)
    logits = cohort.predict(session.data.validation, *running) if running else []
    found: dict[int, float] = {}
    for lane, rows in zip(running, logits, strict=True):
        found[id(lane)] = session.task.metric.score(rows, session.data.validation.targets)
    for lane in lanes:
        value = found.get(id(lane), math.nan)
        curves[id(lane)].append(round(float(value), 6) if np.isfinite(value) else None)


if __name__ == "__main__":
    main()
