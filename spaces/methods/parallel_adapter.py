"""Parallel adapter: a scaled bottleneck beside a sub-layer (He et al. 2021, arXiv:2110.04366)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces import ops
from peftscape.spaces.knobs import knob, log_uniform
from peftscape.spaces.methods.base import Lanes
from peftscape.spaces.methods.bottleneck import Bottleneck

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class ParallelAdapter(Bottleneck):
    """y + s (W_up sigma(W_down x + b_down) + b_up), x what the sub-layer reads; W_up = 0 at the start."""

    name, category = "parallel_adapter", "additive"

    scale: float = knob(log_uniform(0.25, 8), default=4.0)

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return ops.adapter(y, *self.weights(p), self.activation, x=x, scale=p.scale)

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)
