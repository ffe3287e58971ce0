"""Devices a plan is held against: memory and rates from the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from peftscape.spaces.cost import QUANTISED
from peftscape.spaces.rates import read_rates
from peftscape.spaces.words import InputError, nearest

#: Set aside for the device's context, libraries' workspaces and what the allocator cannot reuse. A choice, not a
#: measurement: contexts take 0.3 to 0.8 GB.
RESERVE_BYTES = 10**9

#: The fraction of a dense peak that training reaches: 0.46 for PaLM (arXiv:2204.02311, table 3), 0.52 for Megatron
#: (arXiv:2104.04473, table 1), a tenth where launches and memory bind short batches. The expected time takes the
#: middle one, the stated range the outer two.
UTILISATION = (0.1, 0.3, 0.6)

#: The fraction of a rate that was measured with large products: what is no product, and smaller ones, take the rest.
#: Steps of 19 designs on two shapes reached 0.47 to 0.71 on a processor, two of them more (docs/planner.md).
OF_MEASURED = (0.35, 0.6, 0.85)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device.

    Args:
        memory_bytes: decimal, as sold (80 GB = 80e9).
        flops: dense products in bfloat16 (float16 where there is no bfloat16), a second.
        bandwidth: bytes a second.
        measured: the rates were measured on it, not taken from a data sheet.
        compute: the precision in which a quantised backbone computes on it.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    measured: bool = False
    compute: str = "bfloat16"

    @property
    def utilisation(self) -> tuple[float, float, float]:
        """Which fractions of its rate training reaches: at worst, expected, at best."""
        return OF_MEASURED if self.measured else UTILISATION

    @property
    def usable_bytes(self) -> int:
        """What a training may take."""
        return self.memory_bytes - RESERVE_BYTES


#: Memory in GB, dense TFLOP/s, TB/s.
_SHEETS = {
    "t4": (16, 65, 0.32), "v100-32gb": (32, 125, 0.9), "a10": (24, 125, 0.6), "l4": (24, 121, 0.3),
    "rtx-3090": (24, 71, 0.936), "rtx-4090": (24, 165, 1.008), "a100-40gb": (40, 312, 1.555),
    "a100-80gb": (80, 312, 2.039), "l40s": (48, 362, 0.864), "h100-80gb": (80, 989, 3.35),
    "h200": (141, 989, 4.8), "b200": (180, 2250, 7.7), "mi300x": (192, 1307, 5.3),
}  # fmt: skip
DEVICES = {
    name: Device(name=name, memory_bytes=round(gb * 1e9), flops=tflops * 1e12, bandwidth=tb * 1e12)
    for name, (gb, tflops, tb) in _SHEETS.items()
}


def device(name: str, dtype: str = "bfloat16") -> Device:
    """The device of that name; `this` is the machine as `peftscape doctor` measured it.

    Raises:
        InputError: there is none, with the nearest one; or this machine was not measured yet.
    """
    if name.lower() == "this":
        if (rates := read_rates()) is None:
            raise InputError("device", ["this machine has not been measured: run peftscape doctor once"])
        # A search computes in float32 where bfloat16 is emulated, which is slower.
        compute = max(("bfloat16", "float32"), key=lambda name: rates.flops[name])
        other = compute if dtype in QUANTISED else "float32" if dtype == "float64" else "bfloat16"
        return Device(
            name=rates.device, memory_bytes=rates.memory_bytes, flops=rates.flops.get(dtype, rates.flops[other]),
            bandwidth=rates.bandwidth, measured=True, compute=compute,
        )  # fmt: skip
    if name.lower() not in DEVICES:
        several = [known for known in DEVICES if known.startswith(name.lower())]
        hint = f". There are: {', '.join(several)}" if len(several) > 1 else nearest(name.lower(), [*DEVICES, "this"])
        raise InputError("device", [f'no device "{name}"{hint}'])
    return DEVICES[name.lower()]
