"""Hidden states below the lowest adapted layer, kept for each example: no lane, seed or epoch computes them again.

Without dropout, prompts and shifted positions they are a function of the example alone. They are filled when first
asked for and held in memory up to a limit, beyond it in a file that goes with the process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from peftscape.search.packing import LaneBatch, pack
from peftscape.spaces.ops.device import on_device

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.forward import Forward
    from peftscape.search.lane import Lane
    from peftscape.search.packing import Batch
    from peftscape.search.task import EncodedSplit

MEMORY_LIMIT, DISK_LIMIT = 2 << 30, 32 << 30
# Sequences of one filling pass.
FILLING_ROWS = 512


class _Reached(Exception):
    """Ends a forward pass early."""


@dataclass
class _Level:
    """States that enter one layer: tokens of all examples x d_model, and which examples are there."""

    values: Tensor
    first: np.ndarray[Any, Any]
    there: np.ndarray[Any, Any]


class StateCache:
    """States of one backbone.

    Args:
        memory_limit, disk_limit: bytes; a level that fits in neither is not kept.
    """

    def __init__(self, backbone: Backbone, *, memory_limit: int = MEMORY_LIMIT, disk_limit: int = DISK_LIMIT) -> None:
        self.backbone = backbone
        self.memory_left, self.disk_left = memory_limit, disk_limit
        self.blocks = [site.path for site in backbone.sites.sites if site.kind == "block"]
        self.hits = self.misses = 0
        self._levels: dict[tuple[int, int], _Level | None] = {}
        self._splits: list[EncodedSplit] = []  # kept alive, so that an id names one of them for good

    def start(self, lane: Lane) -> int:
        """The lowest layer that a lane has to run: below it nothing of it adapts or moves."""
        sites = self.backbone.sites
        if lane.model is not None:  # its layers are no backbone's: they can neither be left out nor watched here
            return 0
        moved = lane.design.prompt_length() or lane.design.position_shift() or not sites.attention_interface
        return 0 if moved or len(self.blocks) != sites.layers else max(0, lane.design.lowest_layer(sites))

    def states(
        self, forward: Forward, batch: Batch, split: EncodedSplit, examples: Any, layers: Collection[int]
    ) -> dict[int, Tensor]:
        """What enters each of these layers, in the shape of the batch; nothing where one of them is not kept.

        What enters layer 0 is never kept: it is found as quickly as it is read.
        """
        levels = {}
        for layer in sorted(set(layers) - {0}):
            if batch.cut or (level := self._level(split, layer)) is None:
                return {}
            levels[layer] = level
        wanted = np.unique(np.concatenate(examples))
        absent = {layer: wanted[~level.there[wanted]] for layer, level in levels.items()}
        self.misses += sum(map(len, absent.values()))
        self.hits += sum(sum(map(len, examples)) - len(missing) for missing in absent.values())
        if any(map(len, absent.values())):
            self._fill(forward, levels, split, np.unique(np.concatenate(list(absent.values()))))
        return {layer: self._laid_out(level, batch, split, examples) for layer, level in levels.items()}

    def _laid_out(self, level: _Level, batch: Batch, split: EncodedSplit, examples: Any) -> Tensor:
        flat = _places(level, split, np.concatenate(examples))
        values = on_device(level.values[torch.from_numpy(flat)], batch.ids.device)
        out = values.new_zeros(batch.ids.numel(), values.shape[1]).index_copy_(0, batch.tokens, values)
        return out.view(*batch.ids.shape, -1)

    def _level(self, split: EncodedSplit, layer: int) -> _Level | None:
        key = (id(split), layer)
        if key not in self._levels:
            self._splits.append(split)
            lengths = np.array([len(ids) for ids in split.ids])
            values = self._room(int(lengths.sum()))
            first = np.cumsum(lengths) - lengths
            self._levels[key] = None if values is None else _Level(values, first, np.zeros(len(lengths), dtype=bool))
        return self._levels[key]

    def _room(self, tokens: int) -> Tensor | None:
        shape, dtype = (tokens, self.backbone.sites.d_model), self.backbone.dtype
        size = tokens * shape[1] * dtype.itemsize
        if size <= self.memory_left:
            self.memory_left -= size
            return torch.empty(shape, dtype=dtype)
        # A page of the map that finds no room would end the process.
        if size > min(self.disk_left, shutil.disk_usage(tempfile.gettempdir()).free // 2):
            return None
        self.disk_left -= size
        with tempfile.NamedTemporaryFile(prefix="peftscape-") as file:  # mapped, it lives on without its name
            return torch.from_file(file.name, shared=True, size=tokens * shape[1], dtype=dtype).view(shape)

    @torch.no_grad()
    def _fill(self, forward: Forward, levels: dict[int, _Level], split: EncodedSplit, missing: Any) -> None:
        order = missing[np.argsort([len(split.ids[i]) for i in missing], kind="stable")]
        for start in range(0, len(order), FILLING_ROWS):
            rows = order[start : start + FILLING_ROWS]
            batch = pack([LaneBatch(rows)], split, self.backbone.sites).to(self.backbone.device)
            reached = self._run_to(forward, batch, list(levels))
            for layer, level in levels.items():
                states, flat = reached[layer], _places(level, split, rows)
                level.values[torch.from_numpy(flat)] = states.reshape(-1, states.shape[-1])[batch.tokens].to("cpu")
                level.there[rows] = True

    def _run_to(self, forward: Forward, batch: Batch, layers: list[int]) -> dict[int, Tensor]:
        """What enters these layers; the pass ends below the last of them."""
        found: dict[int, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Any, *, layer: int) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output
            if layer == layers[-1]:
                raise _Reached

        hooks = [
            self.backbone.model.get_submodule(self.blocks[n - 1]).register_forward_hook(partial(keep, layer=n))
            for n in layers
        ]
        try:
            forward.model_states(batch)
        except _Reached:
            return found
        finally:
            for hook in hooks:
                hook.remove()
        raise AssertionError(f"layer {layers[-1] - 1} was never run")


def _places(level: _Level, split: EncodedSplit, examples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of the level's values that hold these examples, one after the other."""
    lengths = np.array([len(split.ids[i]) for i in examples])
    ends = np.cumsum(lengths)
    return np.repeat(level.first[examples] - (ends - lengths), lengths) + np.arange(ends[-1])
