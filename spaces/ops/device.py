"""Numbers on their way to the device: a step on CUDA waits for none of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@dataclass
class Constants:
    """Numbers that stay on a device for as long as a captured step reads them there.

    Args:
        kept: by their dtype, shape, bytes and device.
        held: what else is to stay.
    """

    kept: dict[Any, Tensor] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)


_REMEMBERED: ContextVar[tuple[Constants, bool] | None] = ContextVar("remembered", default=None)


@contextmanager
def remembered(constants: Constants, *, complete: bool = False) -> Iterator[None]:
    """Within, numbers that were brought to the device before are not brought again.

    Args:
        complete: whether all are there; what is not was to be captured on its way from the processor, and is an error.
    """
    token = _REMEMBERED.set((constants, complete))
    try:
        yield
    finally:
        _REMEMBERED.reset(token)


def on_device(value: Tensor | np.ndarray[Any, Any] | Sequence[int], device: torch.device) -> Tensor:
    """A tensor, an array or numbers on a device: to CUDA from pinned memory, so that the processor goes on."""
    import torch

    made = torch.as_tensor(value)
    remembering = _REMEMBERED.get()
    if remembering is None or made.device.type != "cpu":
        return _moved(made, device)
    constants, complete = remembering
    key = made.dtype, made.shape, made.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), device
    if key not in constants.kept:
        if complete:
            raise RuntimeError(f"numbers of shape {tuple(made.shape)} come from the processor within a captured step")
        constants.kept[key] = _moved(made, device)
    return constants.kept[key]


def keep(tensors: Iterable[Tensor]) -> None:
    """Let a captured step that reads these hold them."""
    remembering = _REMEMBERED.get()
    if remembering is not None:
        remembering[0].held.extend(tensors)


def upload(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as this dtype on a device."""
    import torch

    return on_device(torch.tensor(numbers, dtype=dtype), device)


def _moved(made: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and made.device.type == "cpu":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)
