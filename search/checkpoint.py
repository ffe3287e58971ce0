"""Lanes in flight, saved to go on from: tensors, optimiser, step and losses, with a checksum, the one before kept.

A training is decided by its design, seed and length: whatever session has the trial or retest next takes up what is
saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftscape.search.disk import write_file, writing
from peftscape.search.tensor_file import read_tensors_file
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.lane import Lane

SCHEMA = 1
_CARD_BYTES = 16 * 2**20
# What a lane holds by other names too, or what is made again from its design.
_MADE_AGAIN = {"design", "seed", "steps", "name", "optimizer", "failure", "sites", "own", "seen", "backbone", "head"}


class Checkpoints:
    """The saved lanes of a run.

    Args:
        folder: gets two files for each lane, and two more for the one before.
        say: told what was found damaged.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say

    def save(self, lane: Lane) -> None:
        """Write a lane as it is between two steps. Raises DiskError; what was saved before stands."""
        from safetensors.torch import save as to_bytes

        tensors, numbers = _state(lane)
        raw: bytes = to_bytes(tensors)
        key = _key(lane)
        card, file = self.folder / f"{key}.json", self.folder / f"{key}.{lane.step}.{os.getpid()}.safetensors"
        value = {
            "schema": SCHEMA, "design": lane.design.json(), "seed": lane.seed, "steps": lane.steps, "step": lane.step,
            "lane": numbers, "file": file.name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(),
        }  # fmt: skip
        value["card_sha256"] = _digest(value)
        with writing(card):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_file(file, raw)
        if card.is_file():
            with writing(card):
                card.replace(card.with_suffix(".previous.json"))
        write_file(card, json.dumps(value).encode())
        self._tidy(key)

    def restore(self, lane: Lane) -> bool:
        """Set a lane at its start to what was saved last, or before that; False where nothing whole was."""
        card = self.folder / f"{_key(lane)}.json"
        for path in (card, card.with_suffix(".previous.json")):
            if not path.is_file():
                continue
            try:
                value, tensors = _read(path)
                _set(lane, value, tensors, str(path))
            except InputError as error:
                self.say(f"a saved lane is damaged and not used: {'; '.join(error.errors)} ({error.where})")
                continue
            return True
        return False

    def drop(self, lane: Lane) -> None:
        """Forget a lane that is done."""
        for path in self.folder.glob(f"{_key(lane)}.*"):
            path.unlink(missing_ok=True)

    def has(self, trial: int) -> bool:
        """Whether lanes of a trial lie here."""
        return any(self.folder.glob(f"*-*-*-{trial}.json"))

    def drop_trial(self, trial: int) -> None:
        """Forget the lanes of a trial that will not go on."""
        for path in self.folder.glob(f"*-*-*-{trial}.*"):
            path.unlink(missing_ok=True)

    def _tidy(self, key: str) -> None:
        """Remove tensors that neither the card nor the one before names."""
        named = set()
        for path in (self.folder / f"{key}.json", self.folder / f"{key}.previous.json"):
            if path.is_file():
                try:
                    named.add(_card(path)["file"])
                except InputError:
                    return
        for path in self.folder.glob(f"{key}.*.safetensors"):
            if path.name not in named:
                path.unlink(missing_ok=True)


def _key(lane: Lane) -> str:
    key = f"{lane.design.digest}-{lane.seed}-{lane.steps}"
    # Two trials of one design may be at different points of it.
    return f"{key}-{lane.name}" if lane.name else key


def _state(lane: Lane) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a lane is beyond its start: tensors by name, and plain values."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for field in dataclasses.fields(lane):
        value = getattr(lane, field.name)
        if field.name in _MADE_AGAIN:
            continue
        if isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{field.name}:{key}": _plain(tensor) for key, tensor in value.items()}
        elif field.name == "losses":
            numbers[field.name] = [x if math.isfinite(x) else str(x) for x in value]
        elif field.name == "kernels":
            numbers[field.name] = sorted(value)
        elif value is None or isinstance(value, int | float | str | bool):
            numbers[field.name] = value
    for number, state in lane.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer:{number}:{name}": _plain(value) for name, value in state.items()}
    return tensors, numbers


def _plain(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU: safetensors stores no tensor twice."""
    return torch.as_tensor(tensor).detach().cpu().clone().contiguous()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    value = _card(path)
    file = path.with_name(value["file"])
    return value, read_tensors_file(file, size=value["bytes"], sha256=value["sha256"], described=path.name)


def _card(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _CARD_BYTES:
            raise InputError(str(path), [f"larger than the {_CARD_BYTES:,} bytes that are read"])
        value = json.loads(path.read_bytes())
        expected = value.pop("card_sha256")
        if _digest(value) != expected:
            raise InputError(str(path), ["its checksum is not its own: it was changed or damaged"])
        if value["schema"] > SCHEMA:
            raise InputError(str(path), [f"schema {value['schema']} is of a newer peftscape"])
        if Path(value["file"]).name != value["file"]:
            raise InputError(str(path), ["it names a file elsewhere"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(path), [f"it cannot be read: {error}"]) from None
    found: dict[str, Any] = value
    return found


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _set(lane: Lane, value: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy into the tensors that are there, for a cohort may hold them by other names."""
    into = {
        f"{field.name}:{key}": tensor
        for field in dataclasses.fields(lane)
        if field.name not in _MADE_AGAIN and isinstance(getattr(lane, field.name), Mapping)
        for key, tensor in getattr(lane, field.name).items()
    }
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith("optimizer:")}
    # A mask that is drawn from data is not there at the start.
    wrong = [k for k in into if k not in own] + [k for k in own if k not in into and not k.startswith("masks:")]
    wrong += [k for k in into.keys() & own.keys() if own[k].shape != into[k].shape]
    if wrong or value["seed"] != lane.seed or value["steps"] != lane.steps:
        raise InputError(where, [f"{name}: not as in the design" for name in sorted(wrong)] or ["another training"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer:"):
            _, number, name = key.split(":")
            state.setdefault(int(number), {})[name] = tensor
    before = lane.optimizer.state_dict()
    lane.optimizer.load_state_dict({"state": state, "param_groups": before["param_groups"]})
    for key, tensor in own.items():
        if key in into:
            into[key].copy_(tensor)
        else:
            name = key.removeprefix("masks:")
            lane.masks[name] = tensor.to(lane.params[name].device)
    for name, number in _fields(value["lane"]):
        setattr(lane, name, number)


def _fields(numbers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    kinds: dict[str, Callable[[Any], Any]] = {"losses": lambda row: [float(x) for x in row], "kernels": set}
    for name, number in numbers.items():
        yield name, kinds[name](number) if name in kinds else number
