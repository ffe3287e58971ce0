"""Lanes' kernels against plain torch, torch.compile of it, and what HF peft's users run, looped over lanes.

    python benchmarks/kernel_times.py [--op NAME ...] [--dtype bfloat16 ...] [--no-compile] [--save [TABLE]] [--out F]
    python benchmarks/kernel_times.py --interpret        # a smoke test on a CPU: tiny sizes, its times mean nothing

Forward and backward apart: seconds (the median, the L2 cache swept before each run), the bytes that must move, the
bandwidth that makes, its ratio to a copy on the same device, and the peak of memory above what lay there before. Every
way starts from each lane's own float32 tensors and brings gradients back to them, and is first compared with plain
torch. `--save` writes the table from which kernels are chosen on this machine (~/.cache/peftscape/kernels.json);
`--save spaces/ops/measured.json` is for those who maintain the package's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from kernel_tasks import DEVICE, INTERPRET, TASKS, Task, tasks
from torch import Tensor

from peftscape.spaces.ops.choose import saved

REPEATS = 1 if INTERPRET else 30
HERE = Path(__file__).parent
UNIT = "seconds of forward and backward together"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--dtype", nargs="+", default=["float32"] if INTERPRET else ["bfloat16"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--save", type=Path, nargs="?", const=saved(), help="the table by which kernels are chosen")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--interpret", action="store_true", help="a smoke test on a CPU")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and (args.save or not INTERPRET):
        parser.error("there is no GPU here to measure; --interpret runs a smoke test on the CPU, without --save")
    copy = copy_bandwidth()
    print(f"{device_name()}: a copy moves {copy / 1e9:.1f} GB/s")
    without = {"torch.compile"} if args.no_compile else set()
    todo = (task for op in args.op for dtype in args.dtype for task in tasks(op, getattr(torch, dtype)))
    rows = [row for task in todo for row in measured(task, copy, without)]
    result = {
        "command": " ".join(["python", *sys.argv]), "device": device_name(), "copy_bytes_per_s": copy,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "meaning": "a smoke test; times mean nothing" if INTERPRET else "medians; the L2 cache swept before each run",
        "rows": rows,
    }  # fmt: skip
    if out := args.out or (None if INTERPRET else HERE / "results" / "kernels.json"):
        out.write_text(json.dumps(result, indent=2) + "\n")
    if args.save:
        save(rows, args.save, device_name())


# -- measuring


def measured(task: Task, copy: float, without: set[str]) -> Iterator[dict[str, Any]]:
    """A row for every way of a task. One that cannot run is a row too, and says why."""
    wanted = None
    for how, way in task.ways.items():
        if how in without:
            continue
        row: dict[str, Any] = {**asdict(task.call), "note": task.note, "how": how}
        try:
            found = [t.detach().clone() for t in way()]
            wanted = found if wanted is None else wanted
            row["off_torch"] = off(found, wanted)
            row |= timed("forward", way, task.forward_bytes, copy)
            if task.leaves:
                outputs = way()

                def back(outputs: Sequence[Tensor] = outputs) -> Any:
                    return torch.autograd.grad(outputs, task.leaves, task.grads, retain_graph=True)

                row |= timed("backward", back, task.backward_bytes, copy)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        print(json.dumps(row), flush=True)
        yield row


def timed(part: str, run: Callable[[], Any], least: int, copy: float) -> dict[str, Any]:
    """Median seconds, the bandwidth that the least bytes make, its ratio to a copy, and the peak above the start."""
    for _ in range(0 if INTERPRET else 5):
        run()
    sweep = torch.empty(2**10 if INTERPRET else 2**28, dtype=torch.uint8, device=DEVICE)
    seconds = []
    for _ in range(REPEATS):
        sweep.zero_()
        seconds.append(seconds_of(run))
    peak = None
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
    median = statistics.median(seconds)
    return {
        f"{part}_s": median, f"{part}_least_bytes": least, f"{part}_bytes_per_s": least / median,
        f"{part}_of_copy": least / median / copy, f"{part}_peak_bytes": peak,
    }  # fmt: skip


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one run, on the device's own clock where it has one."""
    if DEVICE.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes together."""
    source = torch.ones(2**16 if INTERPRET else 2**29, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / statistics.median(seconds_of(lambda: target.copy_(source)) for _ in range(REPEATS))


def off(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far from plain torch's outputs, relative Frobenius."""
    pairs = [(f.double(), w.double()) for f, w in zip(found, wanted, strict=True)]
    return max(float((f - w).norm() / w.norm().clamp_min(1e-300)) for f, w in pairs)


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()


def save(rows: Sequence[dict[str, Any]], path: Path, device: str) -> None:
    """Put kernel and plain torch, forward and backward together, into a table; what it had of other calls stays.

    Plain torch is what lanes run without the kernel: for AdamW torch's own optimiser, lane after lane.
    """
    table = json.loads(path.read_text()) if path.is_file() else {"unit": UNIT, "rows": []}
    names = ("op", "dtype", "lanes", "size", "tokens", "width")
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if "failed" not in row:
            calls = found.setdefault(tuple(row[n] for n in names), {})
            calls.setdefault(row["how"], row["forward_s"] + row.get("backward_s", 0.0))
    new = []
    for call, how in found.items():
        otherwise = "peft" if call[0] == "adamw" else "torch"
        if "kernel" in how and otherwise in how:
            one = {"device": device, "call": dict(zip(names, call, strict=True))}
            new.append({**one, "kernel_s": how["kernel"], "torch_s": how[otherwise]})
    done = [(row["device"], row["call"]) for row in new]
    kept = [row for row in table["rows"] if (row["device"], row["call"]) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table | {"rows": kept + new}, indent=2) + "\n")
    print(f"{path}: {len(new)} calls on {device}")


if __name__ == "__main__":
    main()
