"""Every method on two tasks: this project's small counterpart of the survey's experiment.

    python benchmarks/methods.py [--examples 1280] [--batch 16] [--methods lora,ia3] [--tasks trec6,rotten_tomatoes]

MiniLM, the same number of examples for every method. The learning rate is chosen on validation data among seven over
two decades, for every method alike; five further seeds at that rate are scored on the test data (at most 2,000 texts).
Rates and seeds run as lanes. What is there already is not run again: the result is written after each method.
Writes `results/methods.json` and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from scipy.stats import t as student

from peftscape.search.config import ModelConfig, SearchConfig, SearchSettings
from peftscape.search.environment import processor, versions
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.search.session import Session, design_costs, open_session
from peftscape.search.task import TaskConfig
from peftscape.spaces.design import Design
from peftscape.spaces.methods import methods

OUT = Path(__file__).parent / "results" / "methods.json"
RATES = [round(1e-4 * 10 ** (i / 3), 7) for i in range(7)]  # 1e-4 to 1e-2
SEEDS = range(100, 105)
#: Lanes at once; methods with weights of their own for each lane take more memory.
LANES = {"packed": 8, "rewritten": 3, "solo": 1}


def main() -> None:
    """Run what is missing, write and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--methods", default="")
    parser.add_argument("--tasks", default="trec6,rotten_tomatoes")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {"rows": {}}
    for task in args.tasks.split(","):
        session = open_session(
            SearchConfig(
                task=TaskConfig(name=task, max_test=2000),
                model=ModelConfig(source="minilm", dtype="float32"),
                search=SearchSettings(examples=args.examples, batch_size=args.batch),
            )
        )
        for name, design in designs(session).items():
            key = f"{task}/{name}/{args.examples}/{args.batch}"
            if key in found["rows"] or (args.methods and name not in args.methods.split(",")):
                continue
            found["rows"][key] = measured(session, task, name, design)
            found |= {"command": " ".join(["python", *sys.argv]), "processor": processor(), "versions": versions()}
            OUT.write_text(json.dumps(found, indent=1) + "\n")
            print(key, found["rows"][key]["test_mean"], flush=True)
    print(table(found["rows"]))


def designs(session: Session) -> dict[str, Design]:
    """Each method with its own defaults on its own places, where this backbone has them."""
    found = {}
    for name in ("head_only", *methods()):
        design = Design.from_json({"placements": [] if name == "head_only" else [{"method": name}]})
        if not design.check(session.backbone.sites):
            found[name] = design
    return found


def measured(session: Session, task: str, name: str, design: Design) -> dict[str, Any]:
    """Choose the rate, train the seeds."""
    started = time.perf_counter()
    lanes = 8 if not design.placements else LANES[design.placements[0].method.execution]
    tried = trained(session, [(at_rate(design, rate), 0) for rate in RATES], lanes, "validation")
    scores = [score for _, score in tried]
    best = int(np.nanargmax(scores))
    again = trained(session, [(at_rate(design, RATES[best]), seed) for seed in SEEDS], lanes, "test")
    tests = [score for _, score in again]
    mean, error = statistics.mean(tests), statistics.stdev(tests) / math.sqrt(len(tests))
    costs = design_costs(session, design)
    return {
        "task": task,
        "method": name,
        "rates": dict(zip(map(str, RATES), scores, strict=True)),
        "rate": RATES[best],
        "test": tests,
        "test_mean": mean,
        "test_half_width": error * float(student.ppf(0.975, len(tests) - 1)),
        "expected_best": expected_best(scores),
        "adapter": costs.adapter,
        "train_flops": costs.train_flops,
        "peak_bytes": costs.peak_bytes,
        "lane_s": statistics.median(lane.wall_s for lane, _ in again),
        "wall_s": time.perf_counter() - started,
    }


def at_rate(design: Design, rate: float) -> Design:
    """The design at another learning rate."""
    return Design.from_json(design.json() | {"training": design.json()["training"] | {"lr": rate}})


def trained(session: Session, runs: list[tuple[Design, int]], at_once: int, split: str) -> list[tuple[Lane, float]]:
    """Each run's lane and its score on a split; NaN where it failed."""
    rows = getattr(session.data, split)
    found = []
    for part in batches(runs, at_once):
        cohort = session.cohort()
        lanes = [
            new_lane(design, seed=seed, steps=session.steps, backbone=session.backbone, head=session.head)
            for design, seed in part
        ]
        for lane in lanes:
            prepare(lane, cohort)
        cohort.admit(*lanes)
        while not all(lane.done for lane in lanes):
            cohort.step()
        logits = cohort.predict(rows, *lanes)
        found += [
            (lane, float(session.task.metric.score(own, rows.targets))) for lane, own in zip(lanes, logits, strict=True)
        ]
        cohort.close()
    return found


def batches(runs: list[Any], size: int) -> list[list[Any]]:
    """Python 3.11 has no itertools.batched."""
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def expected_best(scores: list[float]) -> list[float]:
    """The best of n of these to expect, for n from 1: the mean over all subsets (Dodge et al. 2019, 1909.03004)."""
    good = [s for s in scores if math.isfinite(s)]
    return [statistics.mean(map(max, itertools.combinations(good, n))) for n in range(1, len(good) + 1)]


def table(rows: dict[str, Any]) -> str:
    """Test scores with 95 % t-intervals, and costs relative to full fine-tuning."""
    lines = [
        "| task | method | test | parameters | training FLOPs | peak bytes | rate | seconds a lane |",
        "|---|---|---|---|---|---|---|---|",
    ]
    full = {row["task"]: row for row in rows.values() if row["method"] == "full_finetuning"}
    for row in sorted(rows.values(), key=lambda row: (row["task"], -row["test_mean"])):
        whole = full.get(row["task"], row)
        lines.append(
            f"| {row['task']} | `{row['method']}` | {row['test_mean']:.3f} ± {row['test_half_width']:.3f} | "
            f"{row['adapter']:,} | {row['train_flops'] / whole['train_flops']:.2f} | "
            f"{row['peak_bytes'] / whole['peak_bytes']:.2f} | {row['rate']:.1e} | {row['lane_s']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
