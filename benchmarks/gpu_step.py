"""A training step of 32 LoRA lanes at batch 1 against 32 steps of HF peft, on a Llama shape with random weights.

    python benchmarks/gpu_step.py [--lanes 32] [--tokens 256] [--rank 8] [--sites q v] [--steps 10] [--out FILE]
    python benchmarks/gpu_step.py --tiny            # a smoke test on a CPU: its times mean nothing

Llama-3.2-1B's shape (2048 wide, 16 layers, 32 heads, 8 of keys, FFN 8192, vocabulary 128256) in bfloat16, a
classifier on the last token, texts of one length. One row for each setting of PEFTSCAPE_KERNELS: with kernels forced
on, as the tables choose (auto), and off; one for CUDA graphs of the step without kernels; one for peft, whose model is
transformers' own with its default attention, stepped once for every lane. Seconds are medians of whole steps (forward,
backward, clipping, AdamW), the device waited for. The first losses are compared, so that both sides are seen to do the
same work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.graphed import Graphs, cuda_graphs
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.spaces.design import Design

OUTPUTS, WARM_UP, EXAMPLES = 4, 3, 64
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "max_position_embeddings": 4096, "pad_token_id": 0,
    "head_dim": 64,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sites", nargs="+", default=["q", "v"], choices=["q", "k", "v", "o", "gate", "up", "down"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a smoke test on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.lanes, args.tokens, args.steps = 3, 12, 1
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here to measure; --tiny runs a smoke test on the CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    dtype = "float32" if args.tiny else "bfloat16"
    with torch.device(device):
        backbone = Backbone.from_config(LlamaConfig(**(TINY if args.tiny else LLAMA_1B)), dtype=dtype)
    rows = [ours(setting, backbone, args) for setting in (("auto",) if args.tiny else ("on", "auto", "off"))]
    if not args.tiny:
        rows.append(ours("off", backbone, args, Graphs(cuda_graphs(device))))
    rows.append(peft_loop(backbone, args))
    for row in rows:
        row["times_as_fast_as_peft"] = rows[-1]["seconds"] / row["seconds"]
        row["first_loss_off_peft"] = abs(row["first_loss"] - rows[-1]["first_loss"])
        print(json.dumps(row), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__},
        "meaning": "a smoke test; times mean nothing" if args.tiny else "medians of whole steps of all lanes",
        "lanes": args.lanes, "tokens": args.tokens, "rank": args.rank, "sites": args.sites, "dtype": dtype,
        "rows": rows,
    }  # fmt: skip
    if out := args.out or (None if args.tiny else Path(__file__).parent / "results" / "gpu_step.json"):
        out.write_text(json.dumps(result, indent=2) + "\n")


def ours(setting: str, backbone: Backbone, args: argparse.Namespace, graphs: Graphs | None = None) -> dict[str, Any]:
    """A cohort's step, under one setting of PEFTSCAPE_KERNELS."""
    os.environ["PEFTSCAPE_KERNELS"] = setting
    head = Head(backbone, kind="class", outputs=OUTPUTS)
    lanes = [lane(i, backbone, head, args) for i in range(args.lanes)]
    cohort = Cohort(backbone, head, texts(backbone, args.tokens), batch_size=1, graphs=graphs)
    cohort.admit(*lanes)
    seconds, peak = timed(cohort.step, args.steps, backbone.device)
    cohort.close()
    if failed := [one.failure for one in lanes if one.failure]:
        raise RuntimeError(f"{len(failed)} lanes failed: {failed[0]}")
    return {
        "how": f"cohort, PEFTSCAPE_KERNELS={setting}" + (", CUDA graphs" if graphs else ""),
        "replayed": graphs.replayed if graphs else 0, "kernels": sorted(lanes[0].kernels), "seconds": seconds,
        "peak_bytes": peak, "first_loss": lanes[0].losses[0],
    }  # fmt: skip


def peft_loop(backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    """As many steps of peft's model as there are lanes, one text each, as its users train it."""
    import peft

    head = Head(backbone, kind="class", outputs=OUTPUTS)
    first = lane(0, backbone, head, args)
    config = LlamaConfig(**{**backbone.config.to_diff_dict(), "num_labels": OUTPUTS})
    with torch.device(backbone.device):
        base = AutoModelForSequenceClassification.from_config(config).to(backbone.dtype)
    base.base_model.load_state_dict(backbone.model.state_dict())
    base.score.weight.data.copy_(first.params["head/score.weight"])
    names = [f"{site}_proj" for site in args.sites]
    model: Any = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=args.rank, lora_alpha=16, target_modules=names)
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    data, losses = texts(backbone, args.tokens), []

    def step() -> None:
        [i] = first.examples(1, len(data.ids))
        first.step += 1
        ids = torch.from_numpy(data.ids[i]).to(backbone.device)[None]
        label = torch.tensor([data.targets[i]], device=backbone.device)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=label).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    def steps() -> None:
        for _ in range(args.lanes):
            step()

    seconds, peak = timed(steps, args.steps, backbone.device)
    return {
        "how": f"peft {peft.__version__}, {args.lanes} steps", "kernels": [], "seconds": seconds, "peak_bytes": peak,
        "first_loss": float(losses[0]),
    }  # fmt: skip


def lane(seed: int, backbone: Backbone, head: Head, args: argparse.Namespace) -> Lane:
    """A LoRA lane."""
    row = {"method": "lora", "sites": args.sites, "rank": args.rank}
    design = Design.from_json({"placements": [row], "training": {"lr": 1e-3}})
    return new_lane(design, seed=seed, steps=10_000, backbone=backbone, head=head)


def texts(backbone: Backbone, tokens: int) -> EncodedSplit:
    """Random texts of one length."""
    source = np.random.default_rng(0)
    ids = [source.integers(3, backbone.config.vocab_size, size=tokens) for _ in range(EXAMPLES)]
    return EncodedSplit(ids, None, source.integers(0, OUTPUTS, size=EXAMPLES), 0, np.full(EXAMPLES, tokens))


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> tuple[float, int | None]:
    """The median seconds of a step after some to warm up, and the most memory that was held."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(WARM_UP if device.type == "cuda" else 1):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() if device.type == "cuda" else None


if __name__ == "__main__":
    main()
