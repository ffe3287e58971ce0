"""A CUDA graph's contract kept on a CPU: what ran is run again, on the same memory, and nothing else is looked at.

Every operation of torch is recorded with the tensors it read and wrote. A replay runs them in their order and writes
what each gives into the tensors that it gave then, so that Python's part of the work has no say any more: whatever it
decided, counted or read from a tensor is as it was when it was recorded. What asks the device for a value cannot be
recorded, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: What cannot go on before the device has answered: CUDA raises such an error while it captures.
WAITING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.masked_select", "aten.unique")


class Recorder(TorchDispatchMode):
    """Within it, operations are recorded as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(WAITING):
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map(_address, (args, kwargs or {}, out))))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def _address(value: Any) -> Any:
    """A tensor's memory, whatever becomes of the tensor."""
    return value.detach() if isinstance(value, Tensor) else value


def recorded(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A capture, as `peftscape.search.graphed` takes it."""
    with Recorder() as recorder:
        out = work()
    out.detach().fill_(torch.nan)  # a capture on CUDA computes nothing
    return out, recorder.replay
