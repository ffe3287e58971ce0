"""Every method on two tasks: this project's small counterpart of the survey's experiment.

    python benchmarks/methods.py [--examples 640] [--batch 8] [--methods lora,ia3] [--tasks trec6,rotten_tomatoes]
                                 [--processes 2] [--table]

MiniLM, the same number of examples for every method. The learning rate is chosen on validation data among seven over
two decades, for every method alike; while the best is the lowest or highest, two more are tried there. Five further
seeds at that rate are scored on the test data (at most 2,000 texts). Rates and seeds run as lanes. What is there
stays: the result is written after each method. At the end one lane of each is timed alone, with nothing
beside it. Writes `results/methods.json` and prints the tables.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import t as student
from torch import Tensor
from tqdm import tqdm

from peftscape.search.config import ModelConfig, SearchConfig, SearchSettings
from peftscape.search.environment import processor, versions
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.search.session import Session, design_costs, open_session
from peftscape.search.task import TaskConfig
from peftscape.spaces.design import Design
from peftscape.spaces.methods import methods
from peftscape.spaces.presets import textbook

OUT = Path(__file__).parent / "results" / "methods.json"
STEP = 10 ** (1 / 3)
RATES = [round(3e-4 * STEP**i, 7) for i in range(7)]  # 3e-4 to 3e-2: few steps want large rates
MOST_RATES = 13
SEEDS = range(100, 105)
#: Lanes at once; those with weights of their own have little to share, and alone their changes fold into the weights.
LANES = {"packed": 8, "rewritten": 1, "solo": 1}
#: What is a knob, a variant or other places of a method; and presets for twelve wide layers on these six narrow ones.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "rslora": [{"method": "lora", "scaling": "rslora"}],
    "lora_plus": [{"method": "lora", "rate": 16.0}],
    "lora_fa": [{"method": "lora", "freeze_a": True}],
    "child_tuning_d": [{"method": "child_tuning", "variant": "D"}],
    "parallel_attention": [{"method": "parallel_adapter", "sites": ["attention"]}],
    "adapterdrop": [{"method": "pfeiffer_adapter", "size": 48, "layers": "2-5"}],
    "adapterdrop_robust": [{"method": "pfeiffer_adapter", "size": 48, "drop": 5}],
    "mam": [
        {"method": "parallel_adapter", "sites": ["ffn"], "size": 256, "scale": 4.0},
        {"method": "prefix_tuning_mlp", "length": 30, "hidden": 512, "positions": "keep"},
    ],
    "s4": [
        {"method": "sequential_adapter", "sites": ["ffn"], "size": 16, "layers": "0-4"},
        {"method": "lora", "sites": ["q", "v"], "rank": 8, "layers": "0,5"},
        {"method": "prefix_tuning", "length": 16, "positions": "keep", "layers": "1-2"},
        {"method": "prefix_tuning", "length": 10, "positions": "keep", "layers": "3-4"},
        {"method": "prefix_tuning", "length": 11, "positions": "keep", "layers": "5"},
        {"method": "bitfit", "layers": "3-5"},
    ],
}
#: Steps of the lane that is timed alone; the first warm it up.
TIMED, WARM = 12, 4


def main() -> None:
    """Run what is missing, write and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", default="")
    parser.add_argument("--tasks", default="trec6,rotten_tomatoes")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--processes", type=int, default=2, help="each on its share of the cores; small models like it")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {"rows": {}}
    chosen = [name for name in args.methods.split(",") if name]
    jobs = {
        f"{task}/{name}/{args.examples}/{args.batch}": (task, name, args.examples, args.batch)
        for task in args.tasks.split(",")
        for name in chosen or designs(opened(task, args.examples, args.batch))
    }
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    with ProcessPoolExecutor(args.processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        rows = found["rows"]
        running = {
            pool.submit(measured, *job, rows.get(key)): key
            for key, job in jobs.items()
            if not args.table and (key not in rows or beyond(scores_of(rows[key])))
        }
        for future in tqdm(as_completed(running), total=len(running), unit="method"):
            if error := future.exception():
                tqdm.write(f"{running[future]} failed: {error!r}")
                continue
            rows[running[future]] = future.result()
            write(found)
    jobs = {key: job for key, job in jobs.items() if key in rows}
    for key, (task, name, examples, batch) in tqdm(jobs.items(), unit="method alone"):
        if "alone_s" not in rows[key] and not args.table:
            rows[key]["alone_s"] = alone(opened(task, examples, batch), name)
            write(found)
    for task in args.tasks.split(","):
        print(f"\n{task}: {args.examples} examples, batches of {args.batch}\n")
        print(table([rows[key] for key, job in jobs.items() if job[0] == task]))


def write(found: dict[str, Any]) -> None:
    """The rows so far, with where and how they were measured."""
    found |= {"command": " ".join(["python", *sys.argv]), "processor": processor(), "versions": versions()}
    part = OUT.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(OUT)


@cache
def opened(task: str, examples: int, batch: int) -> Session:
    """The task and the backbone, read once a process."""
    transformers.utils.logging.set_verbosity_error()
    return open_session(
        SearchConfig(
            task=TaskConfig(name=task, max_test=2000),
            model=ModelConfig(source="minilm", dtype="float32"),
            search=SearchSettings(examples=examples, batch_size=batch),
        )
    )


def designs(session: Session) -> dict[str, Design]:
    """Each method with its defaults on its own places, then variants, and the textbook's combinations and places."""
    found = {"head_only": Design.from_json({"placements": []})}
    found |= {name: Design.from_json({"placements": [{"method": name}]}) for name in methods()}
    found |= {name: Design.from_json({"placements": placements}) for name, placements in VARIANTS.items()}
    kinds = {kind(design) for design in found.values()}
    found |= {name: d for name, d in textbook().items() if name not in found and kind(d) not in kinds}
    errors = {name: design.check(session.backbone.sites) for name, design in found.items()}
    for name in (name for name in found if errors[name]):
        tqdm.write(f"{name} is left out: {errors[name][0]}")
    return {name: design for name, design in found.items() if not errors[name]}


def kind(design: Design) -> str:
    """What a design is but for its sizes: which methods, where, and how they are composed."""
    return repr([(p.method.name, p.sites, p.layers, p.mask, p.share, p.gate, p.drop) for p in design.placements])


def measured(task: str, name: str, examples: int, batch: int, known: dict[str, Any] | None) -> dict[str, Any]:
    """Choose the rate, train the seeds; going on from a row whose rates were too few."""
    session = opened(task, examples, batch)
    design = designs(session)[name]
    started = time.perf_counter()
    lanes = min((LANES[p.method.execution] for p in design.placements), default=8)
    scores = scores_of(known) if known is not None else {}
    while more := beyond(scores):
        tried = trained(session, [(at_rate(design, rate), 0) for rate in more], lanes, "validation")
        scores |= {rate: score for rate, (_, score) in zip(more, tried, strict=True)}
    rate = best_of(scores)
    if known is None or known["rate"] != rate:
        again = trained(session, [(at_rate(design, rate), seed) for seed in SEEDS], lanes, "test")
        tests = [score for _, score in again]
    else:
        tests = known["test"]
    mean, error = statistics.mean(tests), statistics.stdev(tests) / math.sqrt(len(tests))
    costs = design_costs(session, design)
    return {
        "task": task,
        "method": name,
        "label": design.label,
        "rates": {str(rate): scores[rate] for rate in sorted(scores)},
        "rate": rate,
        "test": tests,
        "test_mean": mean,
        "test_half_width": error * float(student.ppf(0.975, len(tests) - 1)),
        "expected_best": expected_best(list(scores.values())),
        "adapter": costs.adapter,
        "train_flops": costs.train_flops,
        "peak_bytes": costs.peak_bytes,
        "wall_s": time.perf_counter() - started + (known["wall_s"] if known is not None else 0.0),
    }


def scores_of(row: dict[str, Any]) -> dict[float, float]:
    """The validation score of each rate that was tried."""
    return {float(rate): score for rate, score in row["rates"].items()}


def best_of(scores: dict[float, float]) -> float:
    """The rate with the best score, the smallest of equals."""
    rates = sorted(scores)
    return rates[int(np.nanargmax([scores[rate] for rate in rates]))]


def beyond(scores: dict[float, float]) -> list[float]:
    """The rates to try next: first all, then two more where the best is at an end; none where it has neighbours."""
    if not scores:
        return RATES
    best = best_of(scores)
    if len(scores) >= MOST_RATES or min(scores) < best < max(scores):
        return []
    factor = 1 / STEP if best == min(scores) else STEP
    return [round(best * factor**i, 9) for i in (1, 2)]


def at_rate(design: Design, rate: float) -> Design:
    """The design at another learning rate."""
    return Design.from_json(design.json() | {"training": design.json()["training"] | {"lr": rate}})


def trained(session: Session, runs: list[tuple[Design, int]], at_once: int, split: str) -> list[tuple[Lane, float]]:
    """Each run's lane and its score on a split; NaN where it failed."""
    rows = getattr(session.data, split)
    found, starts = [], {}
    for part in batches(runs, at_once):
        cohort = session.cohort()
        lanes = [fresh(session, design, seed) for design, seed in part]
        for lane in lanes:
            if lane.seed not in starts:
                prepare(lane, cohort)
                starts[lane.seed] = copy.deepcopy((lane.params, lane.fixed, lane.masks))
            else:  # what the data prepare does not depend on the rate
                take(lane, *starts[lane.seed])
        cohort.admit(*lanes)
        while not all(lane.done for lane in lanes):
            cohort.step()
        logits = cohort.predict(rows, *lanes)
        found += [
            (lane, float(session.task.metric.score(own, rows.targets))) for lane, own in zip(lanes, logits, strict=True)
        ]
        cohort.close()
    return found


@torch.no_grad()
def take(lane: Lane, params: dict[str, Tensor], fixed: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Bring a lane to the start that another of its seed was prepared to."""
    for own, others in ((lane.params, params), (lane.fixed, fixed)):
        for key, value in others.items():
            own[key].copy_(value)
    lane.masks |= {key: mask.clone() for key, mask in masks.items()}


def fresh(session: Session, design: Design, seed: int) -> Lane:
    """A new lane of the whole training."""
    return new_lane(design, seed=seed, steps=session.steps, backbone=session.backbone, head=session.head)


def alone(session: Session, name: str) -> float:
    """Seconds of the whole training of one lane with nothing beside it, by the median of a few steps."""
    cohort = session.cohort()
    cohort.cache = None  # others have filled it with these examples
    lane = fresh(session, designs(session)[name], 0)
    prepare(lane, cohort)
    cohort.admit(lane)
    steps = []
    for _ in range(TIMED):
        started = time.perf_counter()
        cohort.step()
        steps.append(time.perf_counter() - started)
    cohort.close()
    return statistics.median(steps[WARM:]) * session.steps


def batches(runs: list[Any], size: int) -> list[list[Any]]:
    """Python 3.11 has no itertools.batched."""
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def expected_best(scores: list[float]) -> list[float]:
    """The best of n of these to expect, for n from 1: the mean over all subsets (Dodge et al. 2019, 1909.03004)."""
    good = [s for s in scores if math.isfinite(s)]
    return [statistics.mean(map(max, itertools.combinations(good, n))) for n in range(1, len(good) + 1)]


def table(rows: list[dict[str, Any]]) -> str:
    """Of one task: test scores with 95 % t-intervals, their gain on the head alone, costs in those of full fine-tuning.

    A rate with a star is at an end of those that were tried.
    """
    of = {row["method"]: row for row in rows}
    full, head = of.get("full_finetuning"), of.get("head_only")
    lines = [
        "| method | test | over head-only | parameters | FLOPs | peak | seconds alone | rate | best of 1, 3, 7 |",
        "|" + 9 * "---|",
    ]
    for row in sorted(rows, key=lambda row: -row["test_mean"]):
        best = row["expected_best"]
        cells = [
            f"`{row['method']}`",
            f"{row['test_mean']:.3f} ± {row['test_half_width']:.3f}",
            gain(row["test"], head["test"]) if head is not None and row is not head else "",
            f"{row['adapter']:,}",
            *(
                f"{row[key] / full[key]:.2f}" if full and key in row.keys() & full.keys() else ""
                for key in ("train_flops", "peak_bytes", "alone_s")
            ),
            f"{row['rate']:.1e}" + (" *" if beyond(scores_of(row)) else ""),
            ", ".join(f"{best[min(n, len(best)) - 1]:.2f}" for n in (1, 3, 7)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gain(scores: list[float], head: list[float]) -> str:
    """The difference of two means with Welch's 95 % half-width."""
    a, b = (statistics.variance(own) / len(own) for own in (scores, head))
    if a + b == 0:
        return f"{statistics.mean(scores) - statistics.mean(head):+.3f}"
    freedom = (a + b) ** 2 / (a**2 / (len(scores) - 1) + b**2 / (len(head) - 1))
    half = math.sqrt(a + b) * float(student.ppf(0.975, freedom))
    return f"{statistics.mean(scores) - statistics.mean(head):+.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
