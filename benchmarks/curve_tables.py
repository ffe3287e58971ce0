"""Learning curves to replay searches on: recorded by `curves.py`, published by HF peft, or made up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.noise import standard_error
from peftscape.spaces.design import Design

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Table:
    """n designs, scored at k fractions of their training by s seeds.

    Args:
        source: where the curves come from, in a sentence.
        costs: n, the exact cost of a front.
        curves: s x n x k validation scores, larger is better; NaN after a failure.
        finals: n, the truth that a search wants: the mean over seeds at the end, or a test score.
        n_validation: examples a score is a mean over.
        work: n, of a whole training, relative to the others'.
        textbook: n, designs that start every search and are never stopped.
        floor: n, those that are baselines (the head alone).
        slow: n, those that start slowly (prompts and prefixes alone).
        reference: the quality from which hypervolume counts.
    """

    source: str
    labels: tuple[str, ...]
    costs: Floats
    fractions: Floats
    curves: Floats
    finals: Floats
    n_validation: int
    work: Floats
    textbook: NDArray[np.bool_]
    floor: NDArray[np.bool_]
    slow: NDArray[np.bool_]
    reference: float

    def error(self, score: float) -> float:
        """The standard error of a score; 0 where it says nothing."""
        found = standard_error("accuracy", score, self.n_validation)
        return found if np.isfinite(found) else 0.0


def recorded(path: Path) -> Table:
    """What `curves.py` wrote."""
    data = json.loads(path.read_text())
    rows = [row for row in sorted(data["designs"], key=lambda row: int(row["order"])) if len(row["curves"]) > 0]
    seeds = min(len(row["curves"]) for row in rows)
    curves = np.array([[_floats(c) for c in row["curves"][:seeds]] for row in rows]).transpose(1, 0, 2)
    finals = curves[:, :, -1].mean(axis=0)
    floor = np.array([row["textbook"] == "head_only" for row in rows])
    worst = float(np.nanmin(finals))
    return Table(
        source=f"recorded: {data['about']}; {len(rows)} designs, {seeds} seeds",
        labels=tuple(row["label"] for row in rows),
        costs=np.array([row["costs"]["trainable"] for row in rows], dtype=np.float64),
        fractions=np.array(data["fractions"]),
        curves=curves,
        finals=np.where(np.isfinite(finals), finals, worst),
        n_validation=data["n_validation"],
        work=_relative([row["costs"]["train_flops"] for row in rows]),
        textbook=np.array([row["textbook"] is not None for row in rows]),
        floor=floor,
        slow=np.array([Design.from_json(row["design"]).starts_slowly for row in rows]),
        reference=float(finals[floor].mean()) if floor.any() else worst,
    )


def published(folder: Path) -> Table:
    """HF peft's MetaMathQA runs: 20 validation scores on 50 questions each, and at the end a test score."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        metrics = data["train_info"]["metrics"]
        curve = [m["valid accuracy"] for m in metrics if m.get("valid accuracy") is not None]
        steps = [m["step"] for m in metrics if m.get("valid accuracy") is not None]
        name, cost = data["run_info"]["experiment_name"], data["train_info"]["num_trainable_params"]
        end = metrics[-1].get("test accuracy")
        if data["train_info"]["status"] == "success" and end is not None:
            rows.append(
                {
                    "label": name,
                    "cost": cost,
                    "curve": curve,
                    "steps": steps,
                    "end": end,
                }
            )
    n = len(rows)
    return Table(
        source=f"published: HF peft method_comparison/MetaMathQA, {n} runs of one seed, truth: test accuracy",
        labels=tuple(row["label"] for row in rows),
        costs=np.array([row["cost"] for row in rows], dtype=np.float64),
        fractions=np.array(rows[0]["steps"]) / rows[0]["steps"][-1],
        curves=np.array([[row["curve"] for row in rows]]),
        finals=np.array([row["end"] for row in rows]),
        n_validation=50,
        work=np.ones(n),
        textbook=np.zeros(n, dtype=bool),
        floor=np.zeros(n, dtype=bool),
        slow=np.zeros(n, dtype=bool),
        reference=0.0,
    )


def synthetic(seed: int, n: int = 200, *, n_validation: int = 500, seeds: int = 3) -> Table:
    """Made up, to see that the replay works, and to try rules on: no result.

    The best quality rises with log cost and saturates; most designs fall short of it a little, one in seven badly;
    curves rise exponentially, one design in eight four times as slowly. Scores of one design at several steps share
    most of their sampling noise, since they are on the same examples. The first design is the head alone.
    """
    random = np.random.default_rng(seed)
    fractions = np.arange(1, 28) / 27
    size = np.r_[2.5, random.uniform(2.7, 7, n - 1)]
    best = 0.95 - 0.25 * np.exp(-(size - 2.7) / 1.2)
    quality = best - np.abs(random.gumbel(0.03, 0.05, n)).clip(0) * 0.8
    quality -= np.where(random.random(n) < 0.15, random.uniform(0.1, 0.4, n), 0)
    quality[0] = 0.62
    rise = np.exp(random.normal(-2.0, 0.7, n)) * np.where(random.random(n) < 0.12, 4, 1)
    rise[0] = 0.1
    start = random.uniform(0.2, 0.4, n)
    mean = quality[:, None] - (quality - start)[:, None] * np.exp(-fractions / rise[:, None])
    by_seed = mean + random.normal(0, 0.008, (seeds, n, 1)) * np.sqrt(fractions)
    p = by_seed.clip(0.01, 0.99)
    draw = 0.8 * random.normal(size=(1, n, 1)) + 0.6 * random.normal(size=p.shape)
    curves = (p + draw * np.sqrt(p * (1 - p) / n_validation)).clip(0, 1)
    return Table(
        source=f"SYNTHETIC (made up, seed {seed}): {n} designs",
        labels=tuple(f"made up {i}" for i in range(n)),
        costs=10**size,
        fractions=fractions,
        curves=curves,
        finals=mean[:, -1],
        n_validation=n_validation,
        work=np.ones(n),
        textbook=np.arange(n) == 0,
        floor=np.arange(n) == 0,
        slow=np.zeros(n, dtype=bool),
        reference=float(mean[0, -1]),
    )


def _floats(values: list[Any]) -> list[float]:
    return [float("nan") if v is None else float(v) for v in values]


def _relative(values: list[float]) -> Floats:
    array = np.array(values, dtype=np.float64)
    found: Floats = array / array.mean()
    return found
