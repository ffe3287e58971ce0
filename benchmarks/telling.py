"""What a stopped trial should tell the sampler: searches on a MADE-UP landscape, the same work for each.

    python benchmarks/telling.py [--work 40] [--seeds 5] [--samplers tpe nsga2 random]

The landscape is synthetic (recorded curves hold only designs that were drawn, and a sampler asks for others): four
methods of different ceilings and speeds, a size that is the cost, a learning rate with a best value for each method,
layers. So this says how samplers take what they are told, not how good peftscape is. Options:

- `pruned`: told PRUNED. TPE (Optuna 5.0, `_split_trials`) sorts such trials behind all complete ones, NSGA-II and GP
  leave them out.
- `expected`: told its rung's score plus the mean gain of the others from there to the end, as if it were complete.
- `rung`: told its rung's score as if it were final.

Prints the hypervolume (noise-free final quality of what was trained to the end, log cost), mean and standard error over
seeds. Writes `results/telling.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from peftscape.analysis.front import hypervolume
from peftscape.search.rungs import Entry, Rungs, Verdict, after

METHODS = {
    "lora": (0.93, 0.12, -2.6),
    "adapter": (0.92, 0.15, -2.9),
    "ia3": (0.84, 0.1, -1.9),
    "prefix": (0.9, 0.5, -2.2),
}
LAYERS = {"all": 1.0, "top": 0.4, "alternate": 0.5}
EXAMPLES = 500


def design(trial: Any) -> dict[str, Any]:
    """Ask for the knobs; the size only where the method has one."""
    method = trial.suggest_categorical("method", list(METHODS))
    size = trial.suggest_int("size", 1, 256, log=True) if method != "ia3" else 1
    layers = trial.suggest_categorical("layers", list(LAYERS))
    return {"method": method, "size": size, "layers": layers, "lr": trial.suggest_float("lr", 2e-4, 2e-2, log=True)}


def quality(knobs: dict[str, Any], part: float) -> float:
    """The made-up noise-free score after a part of the training."""
    best, slowness, rate = METHODS[knobs["method"]]
    size = knobs["size"] * LAYERS[knobs["layers"]]
    off = math.log10(knobs["lr"]) - rate - 0.1 * math.log10(knobs["size"])
    end = best - 0.16 / (1 + size) ** 0.5 - 0.12 * off**2 - (0.03 if knobs["layers"] == "top" else 0.0)
    return end - (end - 0.3) * math.exp(-part / slowness)


def cost(knobs: dict[str, Any]) -> float:
    """Its made-up parameters."""
    return 2000 + 768 * 6 * LAYERS[knobs["layers"]] * knobs["size"]


def search(name: str, telling: str, work: float, seed: int) -> tuple[float, int, int]:
    """The hypervolume that a search reaches, and its trials: all, and those trained to the end."""
    random = np.random.default_rng(seed)
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=10),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=samplers[name]())
    rungs = Rungs(count=2, factor=3)
    ends = (0.0, *rungs.fractions, 1.0)
    trials: dict[int, tuple[Any, dict[str, Any]]] = {}
    entries: dict[int, Entry] = {}
    told: set[int] = set()
    spent = 0.0
    while spent < work:
        number = None if telling == "no stopping" else rungs.next(entries.values())
        if number is None:
            trial = study.ask()
            number = trial.number
            trials[number] = trial, design(trial)
            entries[number] = Entry(key=number, costs=(cost(trials[number][1]),))
        else:
            entries[number] = after(entries[number], Verdict.GO_ON)
        verdict = Verdict.GO_ON
        while verdict is Verdict.GO_ON and len(entries[number].scores) <= rungs.count:
            rung = len(entries[number].scores)
            spent += ends[rung + 1] - ends[rung]
            p = quality(trials[number][1], ends[rung + 1])
            score = float(random.binomial(EXAMPLES, min(max(p, 0.01), 0.99))) / EXAMPLES
            entries[number] = Entry(
                **vars(entries[number]) | {"scores": (*entries[number].scores, score), "error": 0.02}
            )
            if telling != "no stopping" and rung < rungs.count:
                verdict = rungs.verdict(number, entries.values())
                entries[number] = after(entries[number], verdict)
        if len(entries[number].scores) > rungs.count:
            study.tell(trials[number][0], [entries[number].scores[-1], entries[number].costs[0]])
            told.add(number)
        # A trial that has waited while twice `factor` others came is told; it gives up its chance.
        for key, entry in entries.items():
            if key not in told and entry.waits and len(entries) - key > 2 * rungs.factor * rungs.factor:
                entries[key] = after(entry, Verdict.STOP)
                told.add(key)
                if telling == "pruned":
                    study.tell(trials[key][0], state=optuna.trial.TrialState.PRUNED)
                else:
                    end = expected_final(entry, entries.values(), count=rungs.count)
                    value = end if telling == "expected" else entry.scores[-1]
                    study.tell(trials[key][0], [value, entry.costs[0]])
    done = [k for k, e in entries.items() if len(e.scores) > rungs.count]
    rows = [(quality(trials[k][1], 1.0), math.log10(entries[k].costs[0])) for k in done]
    return hypervolume(rows, ("maximize", "minimize"), (0.6, 6.1)), len(entries), len(done)


def expected_final(entry: Entry, entries: Iterable[Entry], *, count: int) -> float:
    """What a trial that stopped at a rung might have scored in the end: its score and the others' mean gain from there.

    The gain is the mean over trials that were scored at this rung and at the end (the rung after the last of `count`).
    They are those that were sent on, so chance helped their scores at the rung and the gain is rather too small.
    Without any, the score itself. NaN without a score.
    """
    if not entry.scores:
        return math.nan
    rung = len(entry.scores) - 1
    gains = [e.scores[-1] - e.scores[rung] for e in entries if len(e.scores) > count and math.isfinite(e.scores[-1])]
    return entry.scores[rung] + (math.fsum(gains) / len(gains) if gains else 0.0)


def main() -> None:
    """Search, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=float, default=40, help="full trainings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samplers", nargs="+", default=["tpe", "nsga2", "random"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "telling.json")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    import warnings

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    rows = []
    for name in args.samplers:
        for telling in ("no stopping", "pruned", "expected", "rung"):
            found = np.array([search(name, telling, args.work, seed) for seed in range(args.seeds)])
            mean, trials, done = found.mean(axis=0).tolist()
            error = float(found[:, 0].std(ddof=1) / math.sqrt(args.seeds)) if args.seeds > 1 else math.nan
            row = {"sampler": name, "told": telling, "hv": mean, "error": error, "trials": trials, "to the end": done}
            rows.append(row)
            count = f"{trials:.0f} trials, {done:.0f} to the end"
            print(f"{name:<7} {telling:<12} hv {mean:.4f} +- {error:.4f}, {count}", flush=True)
    from peftscape.search.environment import processor, versions

    machine = {"processor": processor(), "cores": os.cpu_count()}
    result = {"command": " ".join(["python", *sys.argv]), "SYNTHETIC": True, "work": args.work, "machine": machine}
    args.out.write_text(json.dumps(result | {"versions": versions(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
