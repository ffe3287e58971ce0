"""A long search with random faults: does it lose records, and do memory and files grow?

    python benchmarks/soak.py --trials 2000 --out benchmarks/results/soak

Asking, telling, locks, leases, checkpoints, adapters and copies are the search's own; the model is tiny, and a
training step or an evaluation computes nothing, so that trials take a tenth of a second. Sessions are ended at random
by SIGKILL, SIGTERM or SIGINT, or run beside a second worker; lanes turn NaN, and cohorts run out of memory, at random.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from searches import Child, make_base, tiny, trials

from peftscape.search.cohort import Cohort
from peftscape.search.study import run_search
from peftscape.spaces.record import Failure

# Imported once, here: the sessions are copies of this process.
SLOW_IMPORTS = ("peftscape.analysis.report", "optuna.importance", "sklearn.ensemble", "peftscape.search.loop")
FAULT = 0.01  # of a lane's steps, and of a cohort's


def accelerate(seed: int) -> None:
    """Steps and evaluations that compute nothing, but fail as real ones do; a report that takes no time."""
    dice = random.Random(seed)

    def step(self: Cohort) -> list[float]:
        if len(self.lanes) > 1 and dice.random() < FAULT:
            raise torch.OutOfMemoryError("out of memory, says the soak test")
        for lane in self.lanes:
            if dice.random() < FAULT:
                lane.failure = Failure(kind="not finite", message="the loss is nan", step=lane.step)
            else:
                lane.losses.append(1 / (1 + lane.step))
                lane.step += 1
        return [lane.losses[-1] if lane.losses else 1.0 for lane in self.lanes]

    def predict(self: Cohort, split: Any) -> np.ndarray[Any, Any]:
        shape = len(split), self.head.outputs
        draws = [np.random.default_rng(int(lane.design.digest, 16)) for lane in self.lanes]
        return np.stack([draw.normal(size=shape) for draw in draws])

    Cohort._step, Cohort._predict = step, predict  # type: ignore[method-assign]
    report = importlib.import_module("peftscape.analysis.report")
    report.write_report = lambda study, path: path.write_text(study.name)


def ended(out: Path) -> dict[int, dict[str, Any]]:
    """The records there are, by number, read without peftscape."""
    if not (out / "study.db").is_file():
        return {}
    return {n: t["record"] for n, t in trials(out).items() if "record" in t and t["state"] in ("COMPLETE", "PRUNED")}


def resident(pid: int) -> int:
    """Bytes of memory that a process has now; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def session(children: list[Child], seconds: float, dice: random.Random) -> tuple[Counter[str], int]:
    """Let workers run for so long, then end those that still do; how each ended, and the most memory of one."""
    until, peak = time.monotonic() + seconds, 0
    while time.monotonic() < until and (sizes := [size for child in children if (size := resident(child.pid))]):
        peak = max(peak, *sizes)
        time.sleep(0.2)
    ends: Counter[str] = Counter()
    for child in children:
        child.kill(dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
        status = child.wait()
        ends[{0: "sessions done", 130: "asked to stop", -9: "killed"}.get(status, f"status {status}")] += 1
    return ends, peak


def growth(sizes: list[tuple[int, int, int]], column: int) -> float:
    """Bytes that a further record costs: the slope of a line through all sessions."""
    rows = np.array([row for row in sizes if row[0]], dtype=float)
    return float(np.polyfit(rows[:, 0], rows[:, column], 1)[0]) if len(rows) > 2 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--session-s", type=float, default=25.0, help="mean length of a session, beyond 5 s")
    parser.add_argument("--most-s", type=float, default=float("inf"), help="stop here, however far it has come")
    parser.add_argument("--out", type=Path, help="gets .md and .json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    write_report = importlib.import_module("peftscape.analysis.report").write_report
    dice, folder = random.Random(asked.seed), Path(tempfile.mkdtemp(prefix="peftscape-soak-"))
    base, out = make_base(folder / "base"), folder / "run"
    of = tiny(base, budget={"trials": asked.trials}, search={"examples": 16, "lanes": 8, "retest_seeds": 0})
    lost, ends = 0, Counter[str]()
    sizes: list[tuple[int, int, int]] = []  # records, bytes of the study, most bytes of memory in a session
    began = time.monotonic()
    while len(before := ended(out)) < asked.trials and time.monotonic() - began < asked.most_s:
        seed = dice.randrange(2**31)

        def work(seed: int = seed) -> None:
            accelerate(seed)
            run_search(of, out, quiet=True)

        children = [Child(work, folder / "log") for _ in range(dice.choice((1, 1, 2)))]
        how, peak = session(children, dice.expovariate(1 / asked.session_s) + 5, dice)
        ends += how
        after = ended(out)
        lost += sum(after.get(number) != record for number, record in before.items())
        sizes.append((len(after), (out / "study.db").stat().st_size, peak))
        print(f"{len(after)} records, {lost} lost, {sizes[-1][1] / 1e6:.1f} MB, peak {peak / 1e6:.0f} MB", flush=True)
    took = time.monotonic() - began
    found = ended(out)
    done = len(found) >= asked.trials
    missing = len(set(range(asked.trials)) - set(found)) if done else 0
    started = time.monotonic()
    from peftscape.analysis.sources import load

    study = load(out)
    write_report(study, folder / "report.html")
    kinds = Counter(record.failure.kind for record in study.records if record.failure)
    rows: dict[str, int | float] = {
        "trials wanted": asked.trials, "records": len(found), "sessions": len(sizes), **ends,
        **{f"records of failure: {kind}": count for kind, count in kinds.items()},
        "records lost or changed": lost, "numbers missing at the end": missing, "seconds": round(took),
        "records a second": round(len(found) / took, 2), "study file, bytes": sizes[-1][1],
        "study file, bytes a further record": round(growth(sizes, 1)),
        "memory, most of a process, bytes": max(row[2] for row in sizes),
        "memory, bytes a further record": round(growth(sizes, 2)),
        "files in the folder": sum(1 for path in out.rglob("*") if path.is_file()),
        "report of it all, seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    text = "| soak | |\n|---|---:|\n" + "".join(f"| {name} | {value:,} |\n" for name, value in rows.items())
    print(text)
    if asked.out:
        asked.out.with_suffix(".md").write_text(text)
        asked.out.with_suffix(".json").write_text(json.dumps({"rows": rows, "sessions": sizes}, indent=1) + "\n")
    if lost or missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
