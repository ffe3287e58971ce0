"""LoRA: a low-rank change beside a frozen linear (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import knob, ladder, log_uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.ops import reference as ops

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class LoRA(Method):
    """y + (alpha / r) B A x, with A in R^{r x d_in}, B in R^{d_out x r}; B = 0 at the start."""

    name, category = "lora", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "rank", "r"

    rank: int = knob(ladder(1, 256), default=8)
    alpha: float = knob(log_uniform(1, 64), default=16.0)

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": Tensor((self.rank, site.d_in), init="kaiming"),
            "B": Tensor((site.d_out, self.rank), init="zeros"),
        }

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return ops.low_rank(x, y, p.A, p.B, p.alpha / p.rank)

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of A

    def saved_floats(self, site: Site, tokens: int) -> int:
        return tokens * self.rank  # A x, for the gradient of B

    def check(self, site: Site) -> str | None:
        if self.rank > min(site.d_in, site.d_out):
            return f"rank: {self.rank} is larger than the linear it adapts ({site.kind}: {site.d_in} x {site.d_out})"
        return None
