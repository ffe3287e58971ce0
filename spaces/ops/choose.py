"""Which operations run as kernels: those that a benchmark on this device found faster at sizes like these.

`measured.json`, and the table that `benchmarks/kernel_times.py --save` makes on a machine, hold what was measured. For
a device without measurements plain torch runs: a kernel that nobody has timed there may be slower, and is not trusted
to be faster because it moves fewer bytes. PEFTSCAPE_KERNELS=off turns all kernels off, =auto (the default) asks the
tables, =on takes one wherever it can run: on CUDA, and with TRITON_INTERPRET=1 in Triton's interpreter on a CPU, where
it is slow and only to be looked at. Otherwise plain torch runs on a CPU.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    import torch

VARIABLE = "PEFTSCAPE_KERNELS"
SETTINGS = ("auto", "on", "off")
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
    """One row of a table: seconds of forward and backward together."""

    device: str
    call: Call
    kernel_s: float
    torch_s: float


def possible(device: torch.device) -> bool:
    """Whether any kernel may run on a device here and now: quick, for operations to ask before they look at sizes.

    Raises:
        ValueError: PEFTSCAPE_KERNELS is none of `auto`, `on` and `off`.
    """
    return _setting() != "off" and not _WITHOUT.get() and (device.type == "cuda" or _interpreted(device))


def choice(call: Call, device: torch.device) -> Choice:
    """Kernel or plain torch. It is decided, once, for sizes rounded to powers of two.

    Raises:
        ValueError: PEFTSCAPE_KERNELS is none of `auto`, `on` and `off`.
    """
    if _WITHOUT.get():
        return Choice(False, "second derivatives are taken")
    setting = _setting()
    sizes = (call.lanes, call.size, call.tokens, call.width)
    key = (Call(call.op, call.dtype, *map(_power_of_two, sizes)), device, setting)
    found = _CHOSEN.get(key)
    if found is None:
        found = _CHOSEN[key] = _decided(*key)
    if found.kernel:
        for ran in _NOTED.get():
            ran.add(call.op)
    return found


def by_table(call: Call, device: str, rows: Sequence[Measured]) -> Choice:
    """What the nearest measurement of the operation on the device says."""
    mine = [r for r in rows if r.device == device and (r.call.op, r.call.dtype) == (call.op, call.dtype)]
    if not mine:
        how = "benchmarks/kernel_times.py --save measures it"
        return Choice(False, f"{call.op} in {call.dtype} was never measured on {device}; {how}")
    near = min(mine, key=lambda r: _distance(r.call, call))
    if _distance(near.call, call) > NEAR:
        return Choice(False, f"{call.op} was never measured on {device} at sizes like these")
    ratio = near.torch_s / near.kernel_s
    return Choice(ratio >= GAIN, f"measured on {device}: {ratio:.2f} times as fast as torch")


def decisions() -> list[dict[str, Any]]:
    """What was chosen since the process started, each kind of call once: its sizes, kernel or not, and why."""
    return [asdict(call) | asdict(choice) for (call, _, _), choice in _CHOSEN.items()]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Plain torch within, whatever the setting: kernels have no second derivatives."""
    token = _WITHOUT.set(True)
    try:
        yield
    finally:
        _WITHOUT.reset(token)


def takes_second_derivatives() -> bool:
    """Whether this runs `without_kernels`: then what is written by hand for one derivative has to stand back too."""
    return _WITHOUT.get()


@contextmanager
def noting(lanes: Sequence[set[str]]) -> Iterator[None]:
    """Add the name of every operation that runs as a kernel within to these sets, one a lane."""
    token = _NOTED.set(lanes)
    try:
        yield
    finally:
        _NOTED.reset(token)


@functools.cache
def table() -> tuple[Measured, ...]:
    """What was measured: on this machine, and for other devices from the package.

    Raises:
        ValueError: this machine's table cannot be read.
    """
    path = saved()
    own = read(path.read_text(), str(path)) if path.is_file() else ()
    measured = {row.device for row in own}
    packaged = read((resources.files("peftscape.spaces.ops") / "measured.json").read_text(), "measured.json")
    return (*own, *(row for row in packaged if row.device not in measured))


def read(text: str, where: str) -> tuple[Measured, ...]:
    """The rows of a table.

    Raises:
        ValueError: it is none; `where` it is from.
    """
    try:
        return tuple(
            Measured(str(row["device"]), Call(**row["call"]), float(row["kernel_s"]), float(row["torch_s"]))
            for row in json.loads(text)["rows"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is no table of measured kernels ({error!r}): remove it, or write it anew with "
            "benchmarks/kernel_times.py --save"
        ) from None


def saved() -> Path:
    """Where `benchmarks/kernel_times.py --save` writes this machine's table."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "peftscape" / "kernels.json"


_CHOSEN: dict[tuple[Call, torch.device, str], Choice] = {}
_NOTED: ContextVar[Sequence[set[str]]] = ContextVar("noted", default=())
_WITHOUT: ContextVar[bool] = ContextVar("without", default=False)


def _decided(call: Call, device: torch.device, setting: str) -> Choice:
    if setting == "off":
        return Choice(False, f"{VARIABLE}=off")
    if _interpreted(device):
        return Choice(True, f"{VARIABLE}=on, in Triton's interpreter")
    if device.type != "cuda":
        return Choice(False, f"no kernels on {device.type}")
    unable = _unable(device.index or 0)
    if unable or setting == "on":
        return Choice(not unable, unable or f"{VARIABLE}=on")
    return by_table(call, _name(device.index or 0), table())


def _setting() -> str:
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in SETTINGS:
        raise ValueError(f'{VARIABLE}: no setting "{setting}"{nearest(setting, SETTINGS)}')
    return setting


def _interpreted(device: torch.device) -> bool:
    wanted = device.type == "cpu" and _setting() == "on" and os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and find_spec("triton") is not None


def _power_of_two(size: int) -> int:
    """The nearest one, by its logarithm."""
    return 1 << round(math.log2(max(size, 1)))


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
