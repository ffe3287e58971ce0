"""HF peft's method comparison: a folder of one JSON file a run, as its `run.py` scripts write them.

The files of github.com/huggingface/peft, method_comparison/MetaMathQA/results: `run_info` (the experiment's
name and configuration), `train_info` (status, costs, metrics by step) and `meta_info` (versions, data sets).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftscape.analysis.measures import Imported, direction_of
from peftscape.analysis.rows import aim
from peftscape.spaces.record import Failure

KNOWN_SIZES = {"gsm8k": 1319}
"""Test examples of data sets that these files name and do not count (Cobbe et al. 2021: 1,319)."""
_COSTS = {
    "peak_bytes": "accelerator_memory_max",
    "trainable": "num_trainable_params",
    "train_s": "train_time",
    "adapter_bytes": "file_size",
}
_DULL = {"peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "task_type", "megatron_core"}


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds JSON files, the first of which is one of peft's results."""
    first = next(iter(sorted(folder.glob("*.json"))), None)
    if first is None:
        return False
    try:
        return bool({"run_info", "train_info"} <= json.loads(first.read_text(encoding="utf-8")).keys())
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
        return False


def read_peft(folder: Path) -> tuple[tuple[Imported, ...], list[str], list[str]]:
    """The runs of a folder, notes, and the errors of files that are not such a result.

    `test accuracy` is called `accuracy`; another measure of the last entry of `metrics` keeps its name with
    `_` for spaces and without `test`. Costs are `peak_bytes`, `trainable`, `train_s` and `adapter_bytes`. A
    run is named by its experiment's name; one that did not end in success is failed, with its message.
    """
    runs: list[Imported] = []
    errors: list[str] = []
    sizes: set[int] = set()
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            runs.append(_run(len(runs), data))
            sets = data.get("meta_info", {}).get("dataset_info", {})
            sizes |= {KNOWN_SIZES[name] for name in sets if name in KNOWN_SIZES}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            errors.append(f"{path.name}: not a result of peft's method comparison: {what}")
    metrics = list(dict.fromkeys(name for run in runs for name in run.columns if name not in _COSTS))
    metric = "accuracy" if "accuracy" in metrics or not metrics else metrics[0]
    aimed = aim(runs, metric, direction_of(metric))
    values = [value for run in aimed for value in run.columns.get(metric, ())]
    notes = ["Scores are of the test set itself: the runs were not selected by it, and a front of them is."]
    if len(sizes) == 1 and metric == "accuracy":
        n = sizes.pop()
        if all(abs(value * n - round(value * n)) < 1e-6 for value in values):
            aimed = tuple(run.aimed(metric, run.direction, n) for run in runs)
    if aimed and aimed[0].n_validation:
        notes.append(f"Every {metric} is a share of {aimed[0].n_validation:,} test examples.")
    return aimed, notes, errors


def _run(number: int, data: Mapping[str, Any]) -> Imported:
    info, train = data["run_info"], data["train_info"]
    name, status = str(info["experiment_name"]), str(train["status"])
    last = train["metrics"][-1] if train.get("metrics") else {}
    columns = {key: train.get(source) for key, source in _COSTS.items()}
    columns |= {_rename(key): value for key, value in last.items() if key not in ("step", "train samples")}
    values = {
        key: (float(value),)
        for key, value in columns.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    config, ended = info.get("train_config") or {}, status == "success"
    knobs = {k: v for k, v in (info.get("peft_config") or {}).items() if k not in _DULL and _plain(v)}
    training = {k: v for k, v in (config.get("optimizer_kwargs") or {}).items() if _plain(v)}
    training["lr_scheduler"] = config.get("lr_scheduler")
    message = str(info.get("error_msg") or ("no metrics" if ended else f"status {status}"))
    wall = info.get("total_time") or 0.0
    return Imported(
        number=number,
        state="failed",  # aim() completes those that have the metric
        design={"placements": [{"method": name.split("/")[0], **knobs}], "training": training},
        digest=name,
        label=name,
        metric="accuracy",
        direction="maximize",
        n_validation=0,
        scores=(),
        costs=None,
        wall_s=float(wall) if math.isfinite(float(wall)) else 0.0,
        failure=Failure(kind="missing value" if ended else status, message=message),
        columns=values,
        seeds=(int(config.get("seed") or 0),),
    )


def _rename(key: str) -> str:
    return key.removeprefix("test ").replace(" ", "_").replace("/", "per")


def _plain(value: Any) -> bool:
    """A knob that fits in a table: a scalar that is set, or a short list of them."""
    if isinstance(value, list):
        return 0 < len(value) <= 12 and all(isinstance(item, (str, int, float)) for item in value)
    return isinstance(value, (str, int, float)) and value not in (None, False, "")
