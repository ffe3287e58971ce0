"""Searches replayed on recorded learning curves, with and without stopping early.

    python benchmarks/replay.py [--curves benchmarks/results/curves.json] [--peft FOLDER] [--synthetic 5]
                                [--syne-tune PYTHON] [--replays 40] [--rungs 1 2] [--factor 3] [--lanes 8]

Each replay shuffles the order in which the sampler asked (textbook designs first; recorded curves once more with these
like any others) and takes one of the seeds; lanes train side by side and are compared as they come. Side by side: no
stopping, peftscape's rules, and Syne Tune's MOASHA where `--syne-tune` names the Python of an environment with it (else
it is not run). For each number of rungs and each of these:

- front, best 5: the share of the final front's members, and how many of the five best, that were trained to the end;
- work: of training everything to the end (by FLOPs where they are known);
- hv: hypervolume of what was trained to the end (final score, log cost), of that of all designs; the same when a
  third of the work was spent; and without stopping at equal work. `against_work` in the JSON has it at all parts.

Writes `results/replay.json`.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from curve_tables import Floats, Table, published, recorded, synthetic

from peftscape.analysis.front import hypervolume, non_dominated
from peftscape.search.rungs import WAITING, Entry, Rungs, Verdict, after

WAYS = ("maximize", "minimize")
THIRD = 1 / 3
PARTS = tuple(sorted([*(round(0.05 * i, 2) for i in range(1, 21)), THIRD]))


class Stopper(Protocol):
    """Says at a rung what becomes of a design, and who goes on later."""

    def start(self, table: Table) -> None: ...
    def scored(self, design: int, rung: int, score: float) -> Verdict: ...
    def next(self) -> int | None: ...


class Never:
    """No stopping."""

    def start(self, table: Table) -> None:
        """Nothing to know."""

    def scored(self, design: int, rung: int, score: float) -> Verdict:
        """Go on."""
        return Verdict.GO_ON

    def next(self) -> int | None:
        """Nobody waits."""
        return None


class Own:
    """peftscape's rungs."""

    def __init__(self, rungs: Rungs) -> None:
        self.rungs = rungs

    def start(self, table: Table) -> None:
        """A search without records."""
        self.table = table
        self.entries: dict[int, Entry] = {}

    def scored(self, design: int, rung: int, score: float) -> Verdict:
        """The verdict, noted."""
        old = self.entries.get(design) or Entry(
            key=design,
            costs=(float(self.table.costs[design]),),
            protected=bool(self.table.textbook[design]),
            floor=bool(self.table.floor[design]),
            bracket=self.rungs.bracket(0, slow=bool(self.table.slow[design])),
        )
        now = replace(old, scores=(*old.scores, score), error=self.table.error(score))
        self.entries[design] = now
        verdict = self.rungs.verdict(design, self.entries.values())
        self.entries[design] = after(now, verdict)
        for stopped in self.rungs.stopped(self.entries.values()):
            self.entries[stopped] = after(self.entries[stopped], Verdict.STOP)
        return verdict

    def next(self) -> int | None:
        """Who goes on now, noted."""
        found = self.rungs.next(self.entries.values())
        if found is not None:
            self.entries[found] = after(self.entries[found], Verdict.GO_ON)
        return found


class Moasha:
    """Syne Tune's own, in a process of its own; textbook designs go on whatever it says."""

    def __init__(self, python: str, rungs: int, factor: int, *, ranks: bool) -> None:
        server = Path(__file__).parent / "moasha_server.py"
        command = [python, str(server), f"--ranks={int(ranks)}", f"--count={rungs}", f"--factor={factor}"]
        self.factor = factor
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, table: Table) -> None:
        """A scheduler without records."""
        self.table = table
        self._say("reset")

    def scored(self, design: int, rung: int, score: float) -> Verdict:
        """What it answers."""
        self._say([design, self.factor**rung, score, float(self.table.costs[design])])
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        assert answer in ("CONTINUE", "STOP"), answer
        return Verdict.GO_ON if answer == "CONTINUE" or self.table.textbook[design] else Verdict.STOP

    def next(self) -> int | None:
        """It stops and never waits."""
        return None

    def _say(self, message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()


def replay(
    table: Table, order: Sequence[int], curves: Floats, rungs: Rungs, stopper: Stopper, lanes: int
) -> tuple[list[tuple[float, int]], float]:
    """The designs that were trained to the end, each with the work spent until then, and all the work.

    Work is in trainings of the mean design. All lanes advance at the same pace; one that ends or waits gives its place
    to one that was promoted, else to the next of the order.
    """
    stopper.start(table)
    at = [int(np.searchsorted(table.fractions, f - 1e-9)) for f in rungs.fractions]
    ends = [*(float(table.fractions[k]) for k in at), 1.0]
    reached: dict[int, int] = {}
    running: list[tuple[float, int, int]] = []
    finished, clock, begun, arrivals, spent = [], 0.0, 0, 0, 0.0

    def go(design: int) -> None:
        nonlocal arrivals
        rung = reached.setdefault(design, 0)
        length = ends[rung] - (ends[rung - 1] if rung else 0.0)
        heapq.heappush(running, (clock + length, arrivals, design))
        arrivals += 1

    def fill() -> None:
        nonlocal begun
        while len(running) < lanes:
            promoted = stopper.next()
            if promoted is not None:
                go(promoted)
            elif begun < len(order):
                go(order[begun])
                begun += 1
            else:
                return

    fill()
    while running:
        clock, _, design = heapq.heappop(running)
        rung = reached[design]
        reached[design] += 1
        spent += float(table.work[design]) * (ends[rung] - (ends[rung - 1] if rung else 0.0))
        if rung == rungs.count:
            finished.append((spent, design))
        else:
            verdict = stopper.scored(design, rung, float(np.nan_to_num(curves[design, at[rung]], nan=-1.0)))
            if verdict is Verdict.GO_ON:
                go(design)
        fill()
    return finished, spent


def volume(table: Table, designs: Sequence[int]) -> float:
    """Hypervolume of designs trained to the end: final quality above the reference, decades of cost saved."""
    if not len(designs):
        return 0.0
    size = np.log10(table.costs)
    rows = np.column_stack([table.finals, size])[list(designs)]
    return hypervolume(rows, WAYS, [table.reference, float(size.max()) + 0.05])


def compare(
    tables: Callable[[int], Table], stoppers: dict[str, Stopper], rungs: Rungs, *, replays: int, lanes: int
) -> list[dict[str, Any]]:
    """A row a stopper: means over replays."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in stoppers}
    for number in range(replays):
        table = tables(number)
        n = len(table.labels)
        random = np.random.default_rng(number)
        shuffled = random.permutation(n)
        order = [*np.flatnonzero(table.textbook).tolist(), *(i for i in shuffled.tolist() if not table.textbook[i])]
        curves = table.curves[number % len(table.curves)]
        front = set(np.flatnonzero(non_dominated(np.column_stack([table.finals, table.costs]), WAYS)).tolist())
        best = set(np.argsort(-table.finals, kind="stable")[:5].tolist())
        whole, total = volume(table, range(n)), float(table.work.sum())
        plain, _ = replay(table, order, curves, rungs, Never(), lanes)
        for name, stopper in stoppers.items():
            finished, spent = replay(table, order, curves, rungs, stopper, lanes)
            ends = {design for _, design in finished}
            row: dict[str, Any] = {
                "front": len(front & ends) / len(front),
                "best 5": len(best & ends),
                "work": spent / total,
                "hv": volume(table, sorted(ends)) / whole,
                "hv, equal work": volume(table, [d for w, d in plain if w <= spent]) / whole,
            }
            row["against_work"] = [volume(table, [d for w, d in finished if w <= p * total]) / whole for p in PARTS]
            rows[name].append(row)
    return [
        {"stopping": name} | {key: np.mean([row[key] for row in found], axis=0).tolist() for key in found[0]}
        for name, found in rows.items()
    ]


def stoppers(rungs: Rungs, syne_tune: str | None) -> dict[str, Stopper]:
    """What is compared, by name."""
    found: dict[str, Stopper] = {"none": Never()}
    for rule in ("like-cost", "crowding", "epsilon-net", "quality"):
        found[rule] = Own(Rungs(count=rungs.count, factor=rungs.factor, rule=rule, waiting=WAITING))
    if syne_tune:
        for name, ranks in (("MOASHA (Syne Tune)", False), ("MOASHA, priorities as ranks", True)):
            found[name] = Moasha(syne_tune, rungs.count, rungs.factor, ranks=ranks)
    return found


def main() -> None:
    """Replay, print and write."""
    parser = argparse.ArgumentParser()
    results = Path(__file__).parent / "results"
    parser.add_argument("--curves", type=Path, default=results / "curves.json")
    parser.add_argument("--peft", type=Path, help="a folder of HF peft's MetaMathQA result files")
    parser.add_argument("--synthetic", type=int, default=0, help="how many made-up tables to replay")
    parser.add_argument("--syne-tune", help="the Python of an environment with syne-tune")
    parser.add_argument("--replays", type=int, default=40)
    parser.add_argument("--rungs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--factor", type=int, default=3)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=results / "replay.json")
    args = parser.parse_args()
    cases: list[tuple[str, Callable[[int], Table], int]] = []
    if args.curves.is_file():
        own = recorded(args.curves)
        cases.append((own.source, lambda number: own, args.replays))
        alike = replace(own, textbook=np.zeros_like(own.textbook))
        cases.append((f"{own.source}, textbook designs like any others", lambda number: alike, args.replays))
    if args.peft:
        theirs = published(args.peft)
        cases.append((theirs.source, lambda number: theirs, args.replays))
    if args.synthetic:
        cases.append((synthetic(0).source.replace("seed 0", "a seed a replay"), synthetic, args.synthetic))
    said = []
    for (source, tables, replays), count in itertools.product(cases, args.rungs):
        rungs = Rungs(count=count, factor=args.factor)
        rows = compare(tables, stoppers(rungs, args.syne_tune), rungs, replays=replays, lanes=args.lanes)
        said.append({"source": source, "replays": replays, "rungs": rungs.fractions, "rows": rows})
        print(f"\n{source}; {replays} replays, rungs at {[round(f, 3) for f in rungs.fractions]}, {args.lanes} lanes")
        print(
            f"{'stopping':<28} {'front':>6} {'best 5':>7} {'work':>6} {'hv':>7} {'at 1/3':>7} {'none, equal work':>17}"
        )
        for row in rows:
            third = row["against_work"][PARTS.index(THIRD)]
            figures = (row["front"], row["best 5"], row["work"], row["hv"], third, row["hv, equal work"])
            print(f"{row['stopping']:<28} {'{:6.2f} {:7.2f} {:6.3f} {:7.4f} {:7.4f} {:16.4f}'.format(*figures)}")
    if not args.syne_tune:
        print("\nSyne Tune's MOASHA was not run: --syne-tune names no Python")
    from peftscape.search.environment import processor, versions

    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "syne_tune": bool(args.syne_tune),
        "parts_of_work": PARTS,
        "cases": said,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
