"""What methods with a bottleneck have in common: down, an activation, up, with biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftscape.spaces.knobs import choice, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Each
    from peftscape.spaces.sites import Site

ACTIVATIONS = choice("relu", "gelu", "silu", "tanh")


class Bottleneck(Method):
    """W_up sigma(W_down x + b_down) + b_up, W_down in R^{m x d}, W_up in R^{d x m}; W_up = 0 at the start.

    Where and of what, the methods made of it say; if they say nothing else, it reads what the site gives.
    """

    sites = frozenset({"attention", "ffn"})
    default_sites: ClassVar[tuple[str, ...]] = ("ffn",)
    size_knob, letter = "size", "m"

    size: int = knob(ladder(1, 256), default=64)
    activation: str = knob(ACTIVATIONS, default="relu")

    def tensors(self, site: Site) -> Tensors:
        return {
            "down": Tensor((self.size, site.d_out), init="kaiming"),
            "down_bias": Tensor((self.size,)),
            "up": Tensor((site.d_out, self.size)),
            "up_bias": Tensor((site.d_out,)),
        }

    def weights(self, p: Lanes) -> tuple[Each, Each, Each, Each]:
        """As each lane holds them, for `ops.adapter`."""
        return p.each("down"), p.each("down_bias"), p.each("up"), p.each("up_bias")

    def flops(self, site: Site, tokens: int) -> int:
        return 4 * tokens * site.d_out * self.size

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("y",)

    def saved_floats(self, site: Site, tokens: int) -> int:
        # relu and tanh keep their output, which `up` reads anyway; the others their input too.
        return tokens * self.size * (1 if self.activation in ("relu", "tanh") else 2)

    def check(self, site: Site) -> str | None:
        if self.size > site.d_out:
            return f"size: {self.size} is wider than the {site.kind} output ({site.d_out})"
        return None
