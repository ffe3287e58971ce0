"""Numbers on their way to the device: a step on CUDA waits for none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


def on_device(value: Tensor | np.ndarray[Any, Any] | Sequence[int], device: torch.device) -> Tensor:
    """A tensor, an array or numbers on a device: to CUDA from pinned memory, so that the processor goes on."""
    import torch

    made = torch.as_tensor(value)
    if device.type == "cuda" and made.device.type == "cpu":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


def upload(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as this dtype on a device."""
    import torch

    return on_device(torch.tensor(numbers, dtype=dtype), device)
