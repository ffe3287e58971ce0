"""How fast this machine multiplies matrices and moves bytes: what `peftscape doctor` measures for later plans."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

from peftscape.search.environment import processor
from peftscape.spaces.rates import Rates

# Of a wide FFN; rows as of a step of a few hundred texts, with which products run at their best rate, but fewer where
# they would take longer than this.
ROWS, WIDTH, WIDER = 4096, 768, 3072
LONGEST_S = 0.15
COPY_BYTES = 1 << 27
REPEATS = 3


def measure_rates(device: str | None = None, *, scale: int = 1) -> Rates:
    """The rates of products in float32 and bfloat16 and of a copy; the median of a few tries each, after one more.

    Args:
        device: None for the first GPU, or the processor where there is none.
        scale: divides the sizes, for tests.
    """
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(ROWS // scale, WIDTH // scale, device=on).to(dtype)
        w = torch.randn(WIDER // scale, WIDTH // scale, device=on).to(dtype)
        rows = max(1, len(x) // 64)
        while True:
            taken = _seconds(lambda x=x[:rows], w=w: x @ w.T, on)  # type: ignore[misc]
            if 2 * rows > len(x) or 2 * taken > LONGEST_S:
                break
            rows *= 2
        flops[str(dtype).removeprefix("torch.")] = 2 * rows * w.numel() / taken
    source = torch.zeros(COPY_BYTES // scale // 4, device=on)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source), on)
    return Rates(device=_name(on), memory_bytes=_memory(on), flops=flops, bandwidth=bandwidth)


def _seconds(work: Callable[[], object], on: torch.device) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _name(on: torch.device) -> str:
    if on.type == "cuda":
        return torch.cuda.get_device_name(on)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _memory(on: torch.device) -> int:
    if on.type == "cuda":
        return int(torch.cuda.get_device_properties(on).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
