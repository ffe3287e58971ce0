"""Memory as it is measured: what there is for lanes, and what a step really takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of what is free, the rest is for other processes and what no plan foresees.
SHARE = 0.8
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """What a process may still take: of a GPU, or of the machine and this process's group; None where unknown."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    found = [_meminfo(), _group()]
    return min((size for size in found if size is not None), default=None)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def _group() -> int | None:
    """What is left of the control group's limit, as containers have one (version 2)."""
    try:
        limit, used = ((_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not (limit.isdigit() and used.isdigit()):
        return None
    # Files that were read stay in memory as long as nobody needs it.
    return max(0, int(limit) - int(used) + int(counts.get("inactive_file", 0)))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of new tensors alive at once within it; what an operation takes inside itself is not seen.

    Args:
        own: tensors that were there before, which are not counted.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {t.untyped_storage()._cdata for t in own}
        self.alive = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._see(t.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.alive += (size := storage.nbytes())
        self.peak = max(self.peak, self.alive)
        finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def peak_of(work: Callable[[], object], device: torch.device, own: Iterable[Tensor]) -> int:
    """The most bytes that some work has at once beyond what was there before, as the allocator or autograd sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = LiveBytes(own)
    with live:
        work()
    return live.peak
