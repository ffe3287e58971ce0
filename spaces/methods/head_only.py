"""The lower reference point: a frozen backbone and a trained head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.methods.base import Method, Tensors

if TYPE_CHECKING:
    from peftscape.spaces.sites import Site


class HeadOnly(Method):
    """y: nothing is adapted, the task's head alone trains (a linear probe where the head is one linear)."""

    name, category = "head_only", "reference"
    sites = frozenset({"model"})
    default_sites = ("model",)
    merges = True
    alone = True

    def tensors(self, site: Site) -> Tensors:
        return {}
