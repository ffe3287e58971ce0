"""Which operations run as kernels: those that a benchmark on this device found faster at sizes like these.

`measured.json` holds what `benchmarks/kernels.py --table` measured. For a device without measurements plain torch runs:
a kernel that nobody has timed there may be slower, and is not trusted to be faster because it moves fewer bytes.
PEFTSCAPE_KERNELS=off turns all kernels off, =on takes one wherever it can run on CUDA, =auto (the default) asks the
table. On a CPU plain torch always runs. `decisions` says what was chosen, and why, for a record.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    import torch

VARIABLE = "PEFTSCAPE_KERNELS"
#: How far, in doublings summed over lanes, size, tokens and width, a measurement speaks for other sizes.
NEAR = 4.0
#: What a kernel must gain: less is within the noise of a timing.
GAIN = 1.05


@dataclass(frozen=True)
class Call:
    """What an operation is asked to do. `size` is the mean rank, bottleneck or prefix of its lanes."""

    op: str
    dtype: str
    lanes: int
    size: int
    tokens: int
    width: int


@dataclass(frozen=True)
class Choice:
    """Whether a kernel runs, and why."""

    kernel: bool
    why: str


@dataclass(frozen=True)
class Measured:
    """One row of the table: seconds of forward and backward together."""

    device: str
    call: Call
    kernel_s: float
    torch_s: float


def choice(call: Call, device: torch.device) -> Choice:
    """Kernel or plain torch.

    Raises:
        ValueError: PEFTSCAPE_KERNELS is none of `auto`, `on` and `off`.
    """
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in ("auto", "on", "off"):
        raise ValueError(f'{VARIABLE}: no setting "{setting}"{nearest(setting, ("auto", "on", "off"))}')
    if device.type != "cuda":
        return _keep(call, Choice(False, f"no kernels on {device.type}"))
    if setting == "off":
        return _keep(call, Choice(False, f"{VARIABLE}=off"))
    unable = _unable(device.index or 0)
    if unable or setting == "on":
        return _keep(call, Choice(not unable, unable or f"{VARIABLE}=on"))
    return _keep(call, by_table(call, _name(device.index or 0), table()))


def by_table(call: Call, device: str, rows: tuple[Measured, ...]) -> Choice:
    """What the nearest measurement of the operation on the device says."""
    mine = [r for r in rows if r.device == device and (r.call.op, r.call.dtype) == (call.op, call.dtype)]
    if not mine:
        return Choice(False, f"{call.op} in {call.dtype} was never measured on {device}")
    near = min(mine, key=lambda r: _distance(r.call, call))
    if _distance(near.call, call) > NEAR:
        return Choice(False, f"{call.op} was never measured on {device} at sizes like these")
    ratio = near.torch_s / near.kernel_s
    return Choice(ratio >= GAIN, f"measured on {device}: {ratio:.2f} times as fast as torch")


def decisions() -> list[dict[str, Any]]:
    """What was chosen since the process started, each kind of call once: its sizes, kernel or not, and why."""
    return [asdict(call) | asdict(choice) for call, choice in _CHOSEN.items()]


@functools.cache
def table() -> tuple[Measured, ...]:
    """What was measured, from the package."""
    text = (resources.files("peftscape.spaces.ops") / "measured.json").read_text()
    return tuple(
        Measured(row["device"], Call(**row["call"]), row["kernel_s"], row["torch_s"])
        for row in json.loads(text)["rows"]
    )


_CHOSEN: dict[Call, Choice] = {}


def _keep(call: Call, choice: Choice) -> Choice:
    if len(_CHOSEN) < 4096:
        _CHOSEN[call] = choice
    return choice


def _distance(a: Call, b: Call) -> float:
    pairs = ((a.lanes, b.lanes), (a.size, b.size), (a.tokens, b.tokens), (a.width, b.width))
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in pairs)


@functools.cache
def _unable(index: int) -> str:
    """Why no kernel can run on this GPU, or nothing."""
    import torch

    if find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"kernels are made for sm_80 and later, not sm_{major}{minor}"


@functools.cache
def _name(index: int) -> str:
    import torch

    name: str = torch.cuda.get_device_name(index)
    return name
