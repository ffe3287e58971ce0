"""Parallel adapter: a scaled bottleneck beside a sub-layer (He et al. 2021, arXiv:2110.04366)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces import ops
from peftscape.spaces.knobs import knob, ladder, log_uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensors
from peftscape.spaces.methods.sequential_adapter import (
    ACTIVATIONS,
    bottleneck_saved,
    bottleneck_tensors,
    check_bottleneck,
)

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class ParallelAdapter(Method):
    """y + s (W_up sigma(W_down x + b_down) + b_up), x what the sub-layer reads; W_up = 0 at the start."""

    name, category = "parallel_adapter", "additive"
    sites = frozenset({"attention", "ffn"})
    default_sites = ("ffn",)
    size_knob, letter = "size", "m"

    size: int = knob(ladder(1, 256), default=64)
    scale: float = knob(log_uniform(0.25, 8), default=4.0)
    activation: str = knob(ACTIVATIONS, default="relu")

    def tensors(self, site: Site) -> Tensors:
        return bottleneck_tensors(site.d_out, self.size)

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return ops.adapter(y, p.down, p.down_bias, p.up, p.up_bias, self.activation, x=x, scale=p.scale, size=p.size)

    def flops(self, site: Site, tokens: int) -> int:
        return 4 * tokens * site.d_out * self.size

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)

    def saved_floats(self, site: Site, tokens: int) -> int:
        return bottleneck_saved(self.activation, self.size, tokens)

    def check(self, site: Site) -> str | None:
        return check_bottleneck(site, self.size)
