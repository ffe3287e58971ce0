"""How a search grows: its own work a trial, a step's time by model and lanes, and where the time of a step goes.

    python benchmarks/scaling.py [--trials 10 100 1000] [--after 4900] [--sampler tpe] [--rungs 0] [--steps 5]
                                 [--hidden 128 256 512 1024] [--lanes 1 2 4 8 16]
                                 [--parts overhead thread sizes operations]

- overhead: whole searches of the preset `unified` on MiniLM whose steps, scoring passes and evaluations compute
  nothing, so that what is left is the search's own: suggesting, bookkeeping, the database, making lanes. Seconds a
  trial, and the share of a search whose trials train for `--training` seconds each side by side that lanes would
  wait for it. Also of 100 trials of a study that knows `--after` others.
- thread: what lanes lose by an ask of TPE at `--known` trials that runs in a thread while they train, against what the
  ask takes between two steps.
- sizes: the median step of a cohort of LoRA lanes (rank 8 on q and v) on random BERTs of six layers, a lane.
- operations: of a step of 8 such lanes on MiniLM, the share of the processor's time in matrix products, and what a
  product of the frozen linears' shapes alone would take at the rate measured here (the floor).

Writes `results/scaling.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from transformers import BertConfig

from peftscape.search import guarded
from peftscape.search.backbone import Backbone, has_bfloat16
from peftscape.search.cohort import Cohort
from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings
from peftscape.search.database import one_transaction
from peftscape.search.environment import processor, versions
from peftscape.search.guarded import Guarded
from peftscape.search.head import Head
from peftscape.search.lane import new_lane
from peftscape.search.samplers import sampler
from peftscape.search.session import Session, open_session
from peftscape.search.storage import Storage
from peftscape.search.study import run_search
from peftscape.search.task import EncodedSplit
from peftscape.search.task_config import TaskConfig
from peftscape.spaces.design import Design
from peftscape.spaces.space_file import read_space

LORA = Design.from_json({"placements": [{"method": "lora", "sites": ["q", "v"], "rank": 8}]})
BATCH, TOKENS, STEPS_A_TRIAL = 32, 16, 9
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
#: What of the loop's own work is timed, by name.
WORK = {"ask": (Storage, "ask"), "tell": (Storage, "tell"), "reach a rung": (Storage, "reach"),
        "look": (Storage, "refresh"), "make lanes": (Guarded, "begin")}  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--after", type=int, nargs="+", default=[4900], help="100 trials behind so many")
    parser.add_argument("--known", type=int, default=1000)
    parser.add_argument("--rungs", type=int, default=0)
    parser.add_argument("--training", type=float, default=30.0, help="seconds of a trial's training among its lanes")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["overhead", "thread", "sizes", "operations"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if "sizes" in args.parts:
        found["sizes"] = [sizes(hidden, dtype, args.lanes, args.steps) for hidden in args.hidden for dtype in dtypes()]
    if "operations" in args.parts:
        found["operations"] = [operations(dtype, args.steps) for dtype in dtypes()]
    if "thread" in args.parts:
        found["thread"] = in_a_thread(args.known, args.steps)
    if "overhead" in args.parts:  # last, for it takes the training out of cohorts
        found["overhead"] = [overhead(n, args.sampler, args.rungs, args.training) for n in args.trials]
        for n in args.after:
            found["overhead"].append(overhead(100, args.sampler, args.rungs, args.training, n))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    args.out.write_text(json.dumps(result | found, indent=2) + "\n")


def dtypes() -> tuple[str, ...]:
    """In which the backbone is timed: bfloat16 where the processor multiplies it in hardware."""
    return ("float32", "bfloat16") if has_bfloat16() else ("float32",)


# -- the search's own work --------------------------------------------------------------------------------------------


def overhead(trials: int, asked: str, rungs: int, training_s: float, known: int = 0) -> dict[str, Any]:
    """Seconds a trial of a search whose training costs nothing, and of its parts, behind so many known trials."""
    Cohort._step, Cohort._predict = _step, _predict  # type: ignore[method-assign]
    guarded.prepare = lambda lane, cohort: None  # type: ignore[attr-defined]
    spent: Counter[str] = Counter()
    before = {name: getattr(owner, key) for name, (owner, key) in WORK.items()}
    for name, (owner, key) in WORK.items():
        setattr(owner, key, timed(before[name], name, spent))
    settings = SearchSettings(
        sampler=asked,  # type: ignore[arg-type]
        textbook=False,
        examples=STEPS_A_TRIAL * BATCH,
        batch_size=BATCH,
        retest_seeds=0,
        rungs=rungs,
    )
    config = SearchConfig(
        name="scaling", task=TaskConfig(name="trec6"), search=settings, budget=BudgetConfig(trials=trials)
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            if known:
                tell(config, Path(folder) / "run", known)
            study = run_search(config, Path(folder) / "run", quiet=True)
    finally:
        for name, (owner, key) in WORK.items():
            setattr(owner, key, before[name])
    total = study.spent["wall_s"] - study.spent["loading_s"] - study.spent["report_s"]
    row = {
        "trials": trials,
        "known before": known,
        "sampler": asked,
        "rungs": rungs,
        "seconds a trial": total / trials,
        "of them": {name: seconds / trials for name, seconds in spent.items()},
        "lanes wait": total / (total + training_s * trials / settings.lanes),
        "if a trial trains for, s": training_s,
    }
    print(json.dumps(row), flush=True)
    return row


def tell(config: SearchConfig, out: Path, known: int) -> None:
    """Fill a new study with random designs and random values, as if it were a fork of another."""
    storage = Storage(out, config)
    with storage.lock(), one_transaction(storage._database):
        for trial in studied(known).trials:
            trial.user_attrs["known"] = True
            storage.add(trial)
    storage.close()


def in_a_thread(known: int, steps: int) -> dict[str, Any]:
    """Seconds that an ask takes by itself, and that lanes lose by one that runs beside them."""
    cohort, space, study = minilm().cohort(), read_space("unified", minilm().backbone.sites), studied(known)
    asks: list[float] = []
    over = threading.Event()

    def ask() -> None:
        started = time.perf_counter()
        study.sampler = sampler("tpe", 0, len(asks), known=study.get_trials(deepcopy=False))
        space.suggest(study.ask())
        asks.append(time.perf_counter() - started)

    def ask_on() -> None:
        while not over.is_set():
            ask()

    for _ in range(steps + 1):
        ask()
    alone, step = statistics.median(asks[1:]), median_step(cohort, 8, steps)
    asks.clear()
    admit(cohort, 8, 2 * steps)
    thread = threading.Thread(target=ask_on)
    started = time.perf_counter()
    thread.start()
    for _ in range(2 * steps):
        cohort.step()
    trained = time.perf_counter() - started
    count = len(asks)
    over.set()
    thread.join()
    cohort.retire(*cohort.lanes)
    row = {
        "trials known": known,
        "an ask alone, s": alone,
        "a step alone, s": step,
        "a step beside asks, s": trained / (2 * steps),
        "asks in that time": count,
        "lost to the lanes by an ask, s": (trained - 2 * steps * step) / count,
    }
    print(json.dumps(row), flush=True)
    return row


def studied(known: int) -> optuna.Study:
    """A study in memory that has so many random designs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, random = read_space("unified", minilm().backbone.sites), np.random.default_rng(0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(known):
        trial = study.ask()
        space.suggest(trial)
        study.tell(trial, random.random(2).tolist())
    return study


def timed(function: Callable[..., Any], name: str, spent: Counter[str]) -> Callable[..., Any]:
    """The function, its seconds counted under a name."""

    @wraps(function)
    def run(*args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            spent[name] += time.perf_counter() - started  # type: ignore[assignment]

    return run


def _step(self: Cohort) -> list[float]:
    """A step that computes nothing."""
    for lane in self.lanes:
        lane.losses.append(1.0)
        lane.step += 1
    return [1.0] * len(self.lanes)


def _predict(self: Cohort, split: EncodedSplit) -> np.ndarray[Any, Any]:
    """Logits at random, the same for a design each time."""
    shape = len(split), self.head.outputs
    return np.stack([np.random.default_rng(int(lane.design.digest, 16)).normal(size=shape) for lane in self.lanes])


# -- steps ------------------------------------------------------------------------------------------------------------


def sizes(hidden: int, dtype: str, lanes: list[int], steps: int) -> dict[str, Any]:
    """Milliseconds a lane-step on a random BERT, by lanes."""
    shape = BertConfig(
        hidden_size=hidden, num_hidden_layers=6, num_attention_heads=hidden // 32, intermediate_size=4 * hidden
    )
    backbone = Backbone.from_config(shape, dtype=dtype)
    random = np.random.default_rng(0)
    ids = [random.integers(5, shape.vocab_size, TOKENS) for _ in range(8 * BATCH)]
    split = EncodedSplit(ids, None, np.zeros(len(ids), dtype=np.int64), 0, np.full(len(ids), TOKENS))
    cohort = Cohort(backbone, Head(backbone, kind="mean", outputs=2), split, batch_size=BATCH)
    row: dict[str, Any] = {"hidden": hidden, "dtype": dtype, "parameters": backbone.sites.parameters}
    row["ms a lane-step"] = {}
    for count in lanes:
        row["ms a lane-step"][count] = 1000 * median_step(cohort, count, steps) / count
    print(json.dumps(row), flush=True)
    return row


def median_step(cohort: Cohort, count: int, steps: int) -> float:
    """Seconds of a step of so many LoRA lanes, after one to warm up."""
    admit(cohort, count, steps + 1)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        cohort.step()
        seconds.append(time.perf_counter() - started)
    cohort.retire(*cohort.lanes)
    return statistics.median(seconds[1:])


def admit(cohort: Cohort, count: int, steps: int) -> None:
    """Fill a cohort with LoRA lanes."""
    backbone, head = cohort.backbone, cohort.head
    cohort.admit(
        *(new_lane(LORA, seed=i, steps=max(steps, 10), backbone=backbone, head=head, name=str(i)) for i in range(count))
    )


def operations(dtype: str, steps: int) -> dict[str, Any]:
    """Where the time of a step of 8 LoRA lanes on MiniLM goes."""
    session = minilm(dtype)
    cohort = session.cohort()
    seconds = median_step(cohort, 8, steps)
    admit(cohort, 8, steps)
    cohort.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cohort.step()
    cohort.retire(*cohort.lanes)
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(own.values())
    floor = 2 * forward_floor(session, 8)  # the backward needs as much again: weights are frozen, inputs are not
    row = {
        "dtype": dtype,
        "ms a step": 1000 * seconds,
        "share in matrix products": sum(own.get(name, 0.0) for name in PRODUCTS) / total,
        "largest": {name: round(value / total, 4) for name, value in Counter(own).most_common(12)},
        "floor, ms": 1000 * floor,
        "step over floor": seconds / floor,
    }
    print(json.dumps(row), flush=True)
    return row


@cache
def minilm(dtype: str = "float32") -> Session:
    """MiniLM on TREC-6, read once."""
    config = SearchConfig(
        task=TaskConfig(name="trec6"),
        model=ModelConfig(source="minilm", dtype=dtype),  # type: ignore[arg-type]
        search=SearchSettings(batch_size=BATCH),
    )
    return open_session(config)


def forward_floor(session: Session, lanes: int) -> float:
    """Seconds of one product for each frozen linear, on the tokens of a step."""
    rows = lanes * BATCH * session.tokens
    config = session.backbone.config
    shapes = Counter({(config.hidden_size, config.hidden_size): 4, (config.hidden_size, config.intermediate_size): 1})
    shapes[config.intermediate_size, config.hidden_size] += 1
    total = 0.0
    for (d_in, d_out), count in shapes.items():
        x, weight, y = (
            torch.randn(n, m).to(session.backbone.dtype) for n, m in ((rows, d_in), (d_out, d_in), (rows, d_out))
        )
        seconds = []
        for _ in range(12):
            started = time.perf_counter()
            torch.mm(x, weight.T, out=y)  # an array of its own each time would be timed with it
            seconds.append(time.perf_counter() - started)
        total += count * config.num_hidden_layers * statistics.median(seconds[1:])
    return total


if __name__ == "__main__":
    main()
