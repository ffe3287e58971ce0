"""Lane-steps a second: cohorts of 1 to 32 lanes against HF peft's plain training loop, both in one run.

    python benchmarks/throughput.py [--steps 7] [--batch 32] [--lanes 1 2 4 8 16 32] [--no-bfloat16]

MiniLM on TREC-6, the same designs, the same examples in the same order. peft trains one design after the other with
dynamic padding; its loop runs as its users run it (float32, the model's own dropout), without dropout, and under
bfloat16 autocast. Ours runs in float32 and, where the processor has it, in bfloat16. Medians over steps after two for
warming up. Writes `results/throughput.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from peftscape.search.backbone import has_bfloat16
from peftscape.search.config import ModelConfig, SearchConfig, SearchSettings
from peftscape.search.environment import processor, versions
from peftscape.search.lane import Lane, new_lane
from peftscape.search.session import Session, open_session
from peftscape.search.task import TaskConfig
from peftscape.spaces.design import Design

WARM_UP = 2
ALL = ["q", "k", "v", "o", "up", "down"]
NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": r"(?<!attention\.)output.dense",
}
MIXED: list[dict[str, Any]] = [
    {"method": "lora", "sites": ["q", "v"], "rank": 8},
    {"method": "lora", "sites": ["q", "v"], "rank": 64},
    {"method": "lora", "sites": ALL, "rank": 16},
    {"method": "lora", "sites": ["up", "down"], "rank": 4},
    {"method": "ia3"},
    {"method": "ia3", "sites": ["k", "v"]},
    {"method": "prefix_tuning", "length": 16},
    {"method": "prompt_tuning", "length": 8},
]
LORA: list[dict[str, Any]] = [{"method": "lora", "sites": ["q", "v"], "rank": 8}]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--no-bfloat16", action="store_true", help="leave it out (slow without hardware)")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    dtypes = ["float32", "bfloat16"] if has_bfloat16() and not args.no_bfloat16 else ["float32"]
    sessions = {dtype: opened(dtype, args.batch) for dtype in dtypes}
    rows = []
    for name, designs in (("LoRA r8 q,v", LORA), (f"{len(MIXED)} designs of four families", MIXED)):
        theirs = {
            "peft float32": peft_loop(sessions["float32"], designs, args.steps, dropout=True, autocast=False),
            "peft float32, no dropout": peft_loop(
                sessions["float32"], designs, args.steps, dropout=False, autocast=False
            ),
        }
        if not args.no_bfloat16:
            autocast = peft_loop(sessions["float32"], designs, args.steps, dropout=True, autocast=True)
            theirs["peft bfloat16 autocast"] = autocast
        print(name, json.dumps(theirs))
        for lanes in (n for n in args.lanes if n % len(designs) == 0):
            for dtype, session in sessions.items():
                own = ours(session, designs * (lanes // len(designs)), args.steps)
                row = {"designs": name, "lanes": lanes, "dtype": dtype, "peftscape": own, **theirs}
                rows.append(row | {f"ratio to {key}": own / value for key, value in theirs.items()})
                ratios = ", ".join(f"{own / value:.2f} times {key}" for key, value in theirs.items())
                print(f"{lanes} lanes, {dtype}: {own:.2f}; {ratios}", flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "unit": "lane-steps a second",
        "machine": {"processor": processor(), "cores": os.cpu_count(), "bfloat16 in hardware": has_bfloat16()},
        "versions": versions() | {"peft": peft.__version__},
        "rows": rows,
    }
    out = Path(__file__).parent / "results" / "throughput.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


def opened(dtype: str, batch: int) -> Session:
    """The task and the backbone in this precision."""
    return open_session(
        SearchConfig(
            task=TaskConfig(name="trec6"),
            model=ModelConfig(source="minilm", dtype=dtype),  # type: ignore[arg-type]
            search=SearchSettings(batch_size=batch),
        )
    )


def lanes_of(session: Session, designs: list[dict[str, Any]], steps: int) -> list[Lane]:
    """One lane a design, with a seed of its own."""
    return [
        new_lane(
            Design.from_json({"placements": [design]}),
            seed=seed,
            steps=steps,
            backbone=session.backbone,
            head=session.head,
            name=str(seed),
        )
        for seed, design in enumerate(designs)
    ]


def ours(session: Session, designs: list[dict[str, Any]], steps: int) -> float:
    """Lane-steps a second of one cohort."""
    cohort = session.cohort()
    cohort.admit(*lanes_of(session, designs, steps + WARM_UP))
    seconds = timed(cohort.step, steps)
    cohort.close()
    return len(designs) / seconds


def peft_loop(session: Session, designs: list[dict[str, Any]], steps: int, *, dropout: bool, autocast: bool) -> float:
    """Lane-steps a second of peft, one design after the other: the mean over designs of their median step."""
    total = 0.0
    for lane, design in zip(lanes_of(session, designs, steps + WARM_UP), designs, strict=True):
        torch.manual_seed(lane.seed)
        base = AutoModelForSequenceClassification.from_pretrained(
            session.config.model.path(), num_labels=session.task.num_outputs
        )
        model = peft.get_peft_model(base, peft_config(design))
        model.train(dropout)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        total += timed(step_of(session, lane, model, optimizer, autocast=autocast), steps)
    return len(designs) / total


def step_of(session: Session, lane: Lane, model: Any, optimizer: Any, *, autocast: bool) -> Callable[[], None]:
    """A training step as in peft's examples, on the lane's next examples padded to their longest."""
    split = session.data.train

    def step() -> None:
        examples = lane.examples(session.config.search.batch_size, len(split.ids))
        lane.step += 1
        texts = [torch.from_numpy(split.ids[i]) for i in examples]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        labels = torch.from_numpy(np.asarray(split.targets[examples]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_config(design: dict[str, Any]) -> Any:
    """The design in peft's terms."""
    task = "SEQ_CLS"
    if design["method"] == "lora":
        sites = "|".join(NAMES[s] for s in design["sites"])
        targets = rf".*({sites})"
        return peft.LoraConfig(task_type=task, r=design["rank"], lora_alpha=16, target_modules=targets)
    if design["method"] == "ia3":
        down = "down" in design.get("sites", ["down"])
        names = [NAMES["k"], NAMES["v"]] + ([NAMES["down"]] if down else [])
        feedforward = rf".*{NAMES['down']}" if down else []
        return peft.IA3Config(task_type=task, target_modules=rf".*({'|'.join(names)})", feedforward_modules=feedforward)
    kind = peft.PrefixTuningConfig if design["method"] == "prefix_tuning" else peft.PromptTuningConfig
    return kind(task_type=task, num_virtual_tokens=design["length"])


def timed(step: Callable[[], Any], steps: int) -> float:
    """The median seconds of a step."""
    seconds = []
    for i in range(WARM_UP + steps):
        started = time.perf_counter()
        step()
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
