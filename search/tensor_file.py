"""Reading safetensors that anyone may have written: everything is checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from peftscape.spaces.words import InputError

# A header names each tensor in about 100 bytes: this is for some 40,000 of them.
HEADER_BYTES = 4 * 2**20
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def read_tensors_file(path: Path, *, size: int, sha256: str, described: str) -> dict[str, Tensor]:
    """The tensors of a file whose size and SHA-256 are known from elsewhere.

    Args:
        described: the file that says what this one is, for messages.

    Raises:
        InputError: it is not that file, or its header does not describe its data. Nothing was loaded then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = path.stat().st_size
        if found != size:
            short = "it was cut short" if found < size else f"it is not the file that {described} describes"
            raise InputError(str(path), [f"{found:,} bytes, {size:,} were expected: {short}"])
        if errors := header_errors(path, found):
            raise InputError(str(path), errors)
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), [f"it cannot be read: {error.strerror}"]) from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise InputError(str(path), [f"its SHA-256 is not the one in {described}: it was changed or damaged"])
    try:
        tensors: dict[str, Tensor] = load(raw)
    except SafetensorError as error:
        raise InputError(str(path), [f"not safetensors: {error}"]) from None
    return tensors


def header_errors(path: Path, size: int) -> list[str]:
    """What is wrong with a header: its length, its JSON, shapes and offsets that do not fit each other."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return ["not safetensors: the header is longer than the file"]
        if length > HEADER_BYTES:
            return [f"not safetensors: a header of {length:,} bytes; at most {HEADER_BYTES:,} are read"]
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        return ["not safetensors: the header is not JSON"]
    if not isinstance(header, dict):
        return ["not safetensors: the header is not an object"]
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        span = _span(entry)
        if span is None:
            return [f"not safetensors: {name[:80]}: its shape, type and offsets do not fit each other"]
        spans.append((*span, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            return [f"not safetensors: {name[:80]}: it {'overlaps another' if first < end else 'leaves a gap'}"]
        end = last
    return [] if end == size - 8 - length else ["not safetensors: the data is not as long as the header says"]


def _span(entry: Any) -> tuple[int, int] | None:
    if not isinstance(entry, Mapping):
        return None
    shape, offsets, width = entry.get("shape"), entry.get("data_offsets"), _SIZES.get(str(entry.get("dtype")))
    if width is None or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return None
    first, last = offsets
    return (first, last) if last - first == width * math.prod(shape) else None


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**60 for value in values)
