"""A plan held against a device: does it fit, how large a batch, how many lanes, how many devices, how long a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from peftscape.spaces.devices import Device
from peftscape.spaces.plan import Memory, Plan

#: Lengths of batches that are tried, at most.
MOST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a device says to a plan.

    Args:
        largest_batch: texts a step that still fit; 0 where not one does.
        lanes: such designs that train at once on one frozen backbone; None where they cannot share one.
        devices: the smallest number under plain sharding: weights, gradients and moments in equal parts
            (ZeRO-3, arXiv:1910.02054), activations of a batch of this size on each; None where these do not fit.
        state_devices: the smallest number whose memory holds the model states alone.
        step_s: expected, at the middle of `Device.utilisation`; `fastest_s` and `slowest_s` at its ends.
        measured: the device's rates were measured on it.
        infer_extra_s: what a token of inference takes longer unmerged, by memory traffic or products.
    """

    device: str
    memory_bytes: int
    usable_bytes: int
    fits: bool
    largest_batch: int
    lanes: int | None
    devices: int | None
    state_devices: int
    step_s: float
    fastest_s: float
    slowest_s: float
    infer_extra_s: float
    measured: bool = False

    def json(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fit(at: Callable[[int], Plan], batch: int, device: Device) -> Fit:
    """The plan of a batch size on a device.

    Args:
        at: the plan for a batch size.
    """
    found = at(batch)
    memory = found.memory

    def fits(size: int) -> bool:
        return at(size).memory.peak <= device.usable_bytes

    slow, middle, fast = (_seconds(found, device, rate) for rate in device.utilisation)
    states = found.mixed_precision_bytes or memory.states
    around = memory.kept + memory.held + max(memory.logits, memory.working + memory.outputs)
    room = device.usable_bytes - around
    return Fit(
        device=device.name,
        memory_bytes=device.memory_bytes,
        usable_bytes=device.usable_bytes,
        fits=fits(batch),
        largest_batch=_largest(fits),
        lanes=_lanes(found, memory, device),
        devices=max(1, math.ceil((memory.states + memory.step) / room)) if room > 0 else None,
        state_devices=math.ceil(states / device.memory_bytes),
        step_s=middle,
        fastest_s=fast,
        slowest_s=slow,
        infer_extra_s=max(found.infer_extra_bytes / device.bandwidth, found.infer_extra_flops / device.flops),
        measured=device.measured,
    )


def _seconds(found: Plan, device: Device, utilisation: float) -> float:
    """Products at a fraction of the peak, but never faster than the weights can be read, forward and backward."""
    weights = found.memory.weights + found.memory.trained
    return max(found.step_flops / (device.flops * utilisation), 2 * weights / device.bandwidth)


def _lanes(found: Plan, memory: Memory, device: Device) -> int | None:
    """Each lane adds its own states and activations to one frozen backbone; the widest step is all lanes' together."""
    if found.mixed_precision_bytes is not None:
        return None
    alone = memory.peak - memory.weights
    return max(0, (device.usable_bytes - memory.weights) // alone) if alone else None


def _largest(fits: Callable[[int], bool]) -> int:
    if not fits(1):
        return 0
    high = 1
    while high < MOST and fits(2 * high):
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
