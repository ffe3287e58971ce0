"""Trials an hour: what users do today against lanes, on the same designs, both in one run.

    python benchmarks/vs_trainer.py [--trials 8] [--examples 640] [--batch 8]

The opponent is an Optuna study whose objective trains HF peft with transformers' `Trainer`, one trial at a time, with
dynamic padding, batches grouped by length, no logging and no checkpoints; the pretrained model is read once and copied
for each trial. It runs with the model's own dropout, without, and, where the processor has bfloat16 products, with
`bf16=True`, both ways, and once in an order that is not grouped. peftscape trains the very same designs on the very
same examples with the same batch size and schedule, its trials as lanes of cohorts of 8, in float32 and in bfloat16.
Both evaluate each trial on the same validation texts at its end. Two sets of designs: LoRA on all layers, and what the
preset `unified` suggests and HF peft can express. Writes `results/vs_trainer.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import peft
import torch
import transformers
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from peftscape.search.adapter_folder import Card
from peftscape.search.backbone import has_bfloat16
from peftscape.search.config import ModelConfig, SearchConfig, SearchSettings
from peftscape.search.encoding import EncodedSplit
from peftscape.search.environment import processor, versions
from peftscape.search.lane import new_lane, stream
from peftscape.search.peft_format import InexpressibleError, peft_form
from peftscape.search.prepare import prepare
from peftscape.search.session import Session, open_session
from peftscape.search.task import TaskConfig
from peftscape.spaces.design import Design
from peftscape.spaces.space_file import read_space

LANES = 8
FULL_DEPTH = {
    "name": "lora-full-depth",
    "slots": [{"options": [{"method": "lora", "sites": ["q", "v"], "rank": {"choice": [4, 8, 16, 32]}}]}],
    "training": {"lr": {"log": [3e-4, 1e-2]}},
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dtypes = ("float32", "bfloat16") if has_bfloat16() else ("float32",)
    sessions = {dtype: opened(dtype, args.batch, args.examples) for dtype in dtypes}
    session = sessions["float32"]
    base = AutoModelForSequenceClassification.from_pretrained(
        session.config.model.path(), num_labels=session.task.num_outputs
    )
    rows = []
    for name, space in (("LoRA on all layers", FULL_DEPTH), ("of `unified`, what peft can express", "unified")):
        designs = drawn(session, space, args.trials)
        own = {f"peftscape {dtype}": ours(each, designs) for dtype, each in sessions.items()}
        other = {
            "Trainer": theirs(session, base, designs, dropout=True),
            "Trainer, no dropout": theirs(session, base, designs, dropout=False),
        }
        if has_bfloat16():
            other["Trainer, bf16"] = theirs(session, base, designs, dropout=True, bf16=True)
            other["Trainer, bf16, no dropout"] = theirs(session, base, designs, dropout=False, bf16=True)
            other["Trainer, bf16, no dropout, random order"] = theirs(
                session, base, designs, dropout=False, bf16=True, grouped=False
            )
        row: dict[str, Any] = {"designs": name, "labels": [d.label for d in designs], **own, **other}
        for mine, fast in own.items():
            for side, slow in other.items():
                row[f"{mine} to {side}"] = fast["trials_an_hour"] / slow["trials_an_hour"]
                row[f"{mine} beyond {side}"] = paired(fast["scores"], slow["scores"])
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "labels"}, indent=2), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "examples": args.examples,
        "batch": args.batch,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "bfloat16 in hardware": has_bfloat16()},
        "versions": versions() | {"peft": peft.__version__},
        "rows": rows,
    }
    out = Path(__file__).parent / "results" / "vs_trainer.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


def opened(dtype: str, batch: int, examples: int) -> Session:
    """The task and the backbone in this precision."""
    return open_session(
        SearchConfig(
            task=TaskConfig(name="trec6"),
            model=ModelConfig(source="minilm", dtype=dtype),  # type: ignore[arg-type]
            search=SearchSettings(batch_size=batch, examples=examples),
        )
    )


def drawn(session: Session, space: Any, count: int) -> list[Design]:
    """Designs that both sides can train, as Optuna's random sampler suggests them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found: list[Design] = []
    while len(found) < count:
        design = read_space(space, session.backbone.sites).suggest(study.ask())
        if not design.check(session.backbone.sites) and expressible(session, design) is not None:
            found.append(design)
    return found


def expressible(session: Session, design: Design) -> dict[str, Any] | None:
    """HF peft's configuration of a design, if peft trains it as it is: a mask could be exported, not trained."""
    if any(p.mask or p.share or p.gate or p.drop for p in design.placements):
        return None
    card = Card(design=design, head="class", outputs=session.task.num_outputs, max_length=128)
    try:
        return dict(peft_form(card, session.backbone, session.head).config)
    except InexpressibleError:
        return None


def ours(session: Session, designs: list[Design]) -> dict[str, Any]:
    """Lanes, in cohorts of 8, evaluated at their end."""
    started = time.perf_counter()
    scores = []
    for first in range(0, len(designs), LANES):
        cohort = session.cohort()
        lanes = [
            new_lane(design, seed=seed, steps=session.steps, backbone=session.backbone, head=session.head)
            for seed, design in enumerate(designs[first : first + LANES], start=first)
        ]
        for lane in lanes:
            prepare(lane, cohort)
        cohort.admit(*lanes)
        while not all(lane.done for lane in lanes):
            cohort.step()
        for logits in cohort.predict(session.data.validation, *lanes):
            scores.append(session.task.metric.score(logits, session.data.validation.targets))
        cohort.close()
    return summary(len(designs), time.perf_counter() - started, scores)


def theirs(
    session: Session, base: Any, designs: list[Design], *, dropout: bool, bf16: bool = False, grouped: bool = True
) -> dict[str, Any]:
    """An Optuna study over the same designs, each trained by `Trainer`."""
    started = time.perf_counter()
    study = optuna.create_study(direction="maximize")
    for number in range(len(designs)):
        study.enqueue_trial({"design": number})

    def objective(trial: optuna.Trial) -> float:
        design = designs[trial.suggest_int("design", 0, len(designs) - 1)]
        return trained(session, base, design, trial.number, dropout=dropout, bf16=bf16, grouped=grouped)

    study.optimize(objective, n_trials=len(designs))
    return summary(len(designs), time.perf_counter() - started, [float(t.value or 0) for t in study.trials])


def trained(
    session: Session, base: Any, design: Design, seed: int, *, dropout: bool, bf16: bool, grouped: bool = True
) -> float:
    """The validation score of one trial by peft and `Trainer`."""
    config = expressible(session, design)
    assert config is not None
    transformers.set_seed(seed)
    config["inference_mode"] = False
    model = peft.get_peft_model(copy.deepcopy(base), peft.PeftConfig.from_peft_type(**config))
    if not dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    training, steps = design.training, session.steps
    # Of the whole split, grouping by length would take the longest texts first and stop there.
    seen = stream(seed, 0, steps * session.config.search.batch_size, len(session.data.train))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=session.config.search.batch_size,
                per_device_eval_batch_size=64, num_train_epochs=1, learning_rate=training.lr,
                weight_decay=training.weight_decay, warmup_steps=math.ceil(training.warmup * steps),
                lr_scheduler_type="warmup_stable_decay",
                lr_scheduler_kwargs={"num_decay_steps": math.ceil(training.decay * steps), "decay_type": "linear"},
                max_grad_norm=training.clip, use_cpu=True, bf16=bf16,
                train_sampling_strategy="group_by_length" if grouped else "random", seed=seed,
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
            train_dataset=rows_of(session.data.train, seen),
            eval_dataset=rows_of(session.data.validation, range(len(session.data.validation))),
            data_collator=DataCollatorWithPadding(session.backbone.tokenizer),
            compute_metrics=lambda p: {
                "score": session.task.metric.score(
                    p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions, p.label_ids
                )
            },
        )  # fmt: skip
        trainer.train()
        return float(trainer.evaluate()["eval_score"])


def rows_of(split: EncodedSplit, which: Iterable[int]) -> list[dict[str, Any]]:
    """These examples of the split as `Trainer` takes them."""
    return [
        {"input_ids": split.ids[i].tolist(), "attention_mask": [1] * len(split.ids[i]), "labels": int(split.targets[i])}
        for i in which
    ]


def summary(trials: int, seconds: float, scores: list[float]) -> dict[str, Any]:
    """Trials an hour, and how good they were."""
    return {
        "trials_an_hour": trials * 3600 / seconds,
        "seconds": seconds,
        "mean_score": statistics.mean(scores),
        "standard_error": float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
        "scores": scores,
    }


def paired(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How much better the same designs scored: the mean difference and its standard error."""
    apart = np.array(ours) - theirs
    return {"mean": float(apart.mean()), "standard_error": float(apart.std(ddof=1) / len(apart) ** 0.5)}


if __name__ == "__main__":
    main()
