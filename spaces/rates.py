"""Rates measured on this machine by `peftscape doctor`, kept in the user's cache folder for later plans."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine was seen to do.

    Args:
        device: its name: a GPU's, or the processor's with the threads used.
        memory_bytes: of the device; of a processor the machine's.
        flops: of large matrix products, a second, by precision; where the hardware lacks one, as torch emulates it.
        bandwidth: bytes read and written by a copy, a second.
    """

    device: str
    memory_bytes: int
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float


def rates_file() -> Path:
    """Where measured rates are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftscape" / "rates.json"


def read_rates() -> Rates | None:
    """What was measured here; None where nothing was, or the file is not one of ours."""
    try:
        found: Any = json.loads(rates_file().read_text(encoding="utf-8"))
        flops = {str(name): float(rate) for name, rate in found["flops"].items()}
        rates = Rates(
            device=str(found["device"]), memory_bytes=int(found["memory_bytes"]), flops=flops,
            bandwidth=float(found["bandwidth"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    numbers = [rates.memory_bytes, rates.bandwidth, *flops.values()]
    return rates if {"float32", "bfloat16"} <= flops.keys() and min(numbers) > 0 else None


def write_rates(rates: Rates) -> Path:
    """Keep the rates; a reader sees the old file or the new one.

    Raises:
        OSError: the folder cannot be written.
    """
    path = rates_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(rates), indent=2), encoding="utf-8")
    part.replace(path)
    return path
