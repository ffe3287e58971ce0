"""Holds the planner against published measurements and prints a table of errors, as in docs/planner.md.

    python benchmarks/planner_errors.py FOLDER     # with HF peft's MetaMathQA result files (one JSON a run)

Nothing of the planner is fitted to these figures. FOLDER may be left out: litgpt's table then stands alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftscape.spaces.design import Design
from peftscape.spaces.plan import Setting, plan
from peftscape.spaces.profiles import PROFILES
from peftscape.spaces.shapes import shape
from peftscape.spaces.sites import site_map

#: litgpt's resource table (tutorials/resource-tables.md), GB: LoRA r 8 on q and v, 1,304 tokens, one A100 40 GB.
LITGPT = {
    ("llama-2-7b", "bfloat16", 1): 21.30, ("llama-2-7b", "bfloat16", 2): 29.07, ("llama-2-7b", "nf4", 1): 14.14,
    ("llama-2-7b", "nf4-dq", 1): 13.84, ("llama-2-13b", "bfloat16", 1): 38.12, ("llama-2-13b", "nf4", 1): 23.14,
    ("llama-2-13b", "nf4-dq", 1): 22.55,
}  # fmt: skip

KINDS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down",
}  # fmt: skip


def peft_design(config: dict[str, Any] | None) -> Design | None:
    """The design of a run's peft_config; None where no method of peftscape is the same."""
    if config is None:
        return Design.from_json({"placements": [{"method": "full_finetuning"}]})
    kind, targets = config["peft_type"], config.get("target_modules")
    sites = [KINDS[m] for m in targets] if isinstance(targets, list) and set(targets) <= set(KINDS) else []
    if kind == "LORA":
        variants = ("use_dora", "use_bdlora", "lora_bias", "use_qalora", "velora_config", "monteclora_config")
        if any(config.get(key) for key in variants) or config.get("init_lora_weights") is not True or not sites:
            return None
        row: dict[str, Any] = {"method": "lora", "sites": sites, "rank": config["r"]}
    elif kind == "IA3":
        feedforward = [KINDS[m] for m in config["feedforward_modules"] if m in config["target_modules"]]
        row = {"method": "ia3", "sites": sites, "inputs": feedforward}
    elif kind == "PREFIX_TUNING" and not config.get("prefix_projection"):
        row = {"method": "prefix_tuning", "length": config["num_virtual_tokens"]}
    elif kind == "PROMPT_TUNING":
        row = {"method": "prompt_tuning", "length": config["num_virtual_tokens"]}
    else:
        return None
    return Design.from_json({"placements": [row]})


def litgpt_rows() -> Iterator[tuple[str, float, float]]:
    """(case, predicted, published) in bytes."""
    design = Design.from_json({"placements": [{"method": "lora"}]})
    for (model, dtype, batch), published in LITGPT.items():
        sites = site_map(shape(model))
        setting = Setting(batch=batch, length=1304, dtype=dtype)
        found = plan(design, sites, PROFILES["litgpt"], setting, tied=False).memory
        yield f"{model} LoRA {dtype}, micro-batch {batch}", found.peak, published * 1e9


def peft_rows(folder: Path) -> Iterator[tuple[str, float | None, float, int, int | None]]:
    """(run, predicted or None, published in bytes, trained parameters published, predicted)."""
    sites = site_map(shape("llama-3.2-3b"))
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if "train_info" not in run:
            continue
        settings, info = run["run_info"]["train_config"], run["train_info"]
        config = run["run_info"].get("peft_config")
        name = path.stem.replace("--llama-3.2-3B", "")
        published, trained = info["accelerator_memory_max"], info["num_trainable_params"]
        design = peft_design(config)
        if design is None or settings["optimizer_type"] != "AdamW":
            yield name, None, published, trained, None
            continue
        setting = Setting(
            batch=settings["batch_size"], length=settings["max_seq_length"], dtype=settings["dtype"],
            checkpointing=settings["use_gc"], dropout=(config or {}).get("lora_dropout"),
        )  # fmt: skip
        found = plan(design, sites, PROFILES["peft"], setting)
        yield name, found.memory.peak, published, trained, found.total


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="HF peft's MetaMathQA result files")
    folder = parser.parse_args().folder
    print("| litgpt's table | predicted GB | published GB | error |\n|---|---|---|---|")
    for case, predicted, published in litgpt_rows():
        print(f"| {case} | {predicted / 1e9:.2f} | {published / 1e9:.2f} | {predicted / published - 1:+.1%} |")
    if folder is None:
        return
    print("\n| peft run | predicted GB | published GB | error | trained | published |\n|---|---|---|---|---|---|")
    other = []
    for name, peak, published, trained, ours in peft_rows(folder):
        if peak is None:
            other.append(name)
            continue
        error = f"{peak / published - 1:+.1%}"
        print(f"| {name} | {peak / 1e9:.2f} | {published / 1e9:.2f} | {error} | {ours:,} | {trained:,} |")
    why = "runs that the script does not turn into a design (some are methods that peftscape has)"
    print(f"\n{len(other)} {why}: {', '.join(other)}")


if __name__ == "__main__":
    main()
