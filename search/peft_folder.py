"""A design in HF peft's terms: its configuration, its tensors, and what of ours lies where in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftscape.search.adapter_folder import Shapes, check

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site


class InexpressibleError(ValueError):
    """HF peft cannot express a design; the message says why, in one line."""


@dataclass(frozen=True)
class Piece:
    """What one placement changes at one site.

    Args:
        keys: of the lane's tensors, by their names in the method.
        where: of peft's tensors that hold it, by their names in the form: full name and place.
        widths: of the form's dimensions at this site.
        factor: on the form's scaled tensor.
    """

    site: Site
    form: PeftForm
    keys: Mapping[str, str]
    frozen: Mapping[str, Tensor]
    where: Mapping[str, tuple[str, tuple[slice, ...]]]
    widths: Mapping[str, int]
    factor: float = 1.0

    def to_peft(self, tensors: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        """Put a lane's tensors in their places."""
        own = {name: tensors[key].detach().cpu() for name, key in self.keys.items()}
        for name, value in self.form.theirs({**own, **self.frozen}).items():
            full, place = self.where[name]
            factor = self.factor if name == self.form.scaled else 1.0
            out[full][place].copy_(value.reshape(out[full][place].shape) * factor)

    def from_peft(self, stored: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """A lane's tensors from their places."""
        found: Own = {}
        for name, (full, place) in self.where.items():
            value = stored[full][place] / (self.factor if name == self.form.scaled else 1.0)
            found[name] = value.reshape(self.form.shape(name, self.widths))
        own = self.form.ours({**found, **self.frozen})
        return {key: own[name].reshape(shapes[key]).clone() for name, key in self.keys.items()}


@dataclass(frozen=True)
class PeftFolder:
    """A design in peft's terms.

    Args:
        config: `adapter_config.json`.
        shapes: of peft's tensors by name; `rest` what is in them where nothing of ours is (0 unless said).
        pieces: what lies where in them.
        head: names of the head's tensors: ours to theirs.
        note: what it is, and what to know about it, in one line.
    """

    config: dict[str, Any]
    shapes: Shapes
    rest: Mapping[str, float | Tensor]
    pieces: tuple[Piece, ...]
    head: Mapping[str, str]
    note: str

    def to_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """peft's tensors from a lane's."""
        dtype = next(iter(tensors.values())).dtype
        out = {name: torch.zeros(shape, dtype=dtype) for name, shape in self.shapes.items()}
        for name, value in self.rest.items():
            out[name].copy_(torch.as_tensor(value))
        for piece in self.pieces:
            piece.to_peft(tensors, out)
        return out | {theirs: tensors[ours].detach().cpu() for ours, theirs in self.head.items()}

    def from_peft(self, stored: Mapping[str, Tensor], shapes: Shapes, where: str) -> dict[str, Tensor]:
        """A lane's tensors, of these shapes, from peft's. Raises InputError with all that does not fit."""
        check(stored, self.shapes, where)
        found = {ours: stored[theirs].clone() for ours, theirs in self.head.items()}
        for piece in self.pieces:
            found |= piece.from_peft(stored, shapes)
        return found


@dataclass(frozen=True)
class Change:
    """A placement at one site, before it is known what else the module holds."""

    site: Site
    form: PeftForm
    keys: Mapping[str, str]
    frozen: Mapping[str, Tensor]
