"""Sequential adapter: a bottleneck after a sub-layer (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces import ops
from peftscape.spaces.knobs import choice, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site

ACTIVATIONS = choice("relu", "gelu", "silu", "tanh")


def bottleneck_tensors(width: int, size: int) -> Tensors:
    """Down to `size` and up to `width` again, with biases; up = 0, so that the start is the backbone."""
    return {
        "down": Tensor((size, width), init="kaiming"),
        "down_bias": Tensor((size,)),
        "up": Tensor((width, size)),
        "up_bias": Tensor((width,)),
    }


def bottleneck_saved(activation: str, size: int, tokens: int) -> int:
    """What the activation keeps: relu and tanh their output, which `up` reads anyway; the others their input too."""
    return tokens * size * (1 if activation in ("relu", "tanh") else 2)


def check_bottleneck(site: Site, size: int) -> str | None:
    """A bottleneck is at most as wide as what it narrows."""
    return f"size: {size} is wider than the {site.kind} output ({site.d_out})" if size > site.d_out else None


class SequentialAdapter(Method):
    """y + W_up sigma(W_down y + b_down) + b_up on a sub-layer's output, before the residual sum; W_up = 0."""

    name, category = "sequential_adapter", "additive"
    sites = frozenset({"attention", "ffn"})
    default_sites = ("attention", "ffn")
    size_knob, letter = "size", "m"

    size: int = knob(ladder(1, 256), default=64)
    activation: str = knob(ACTIVATIONS, default="gelu")

    def tensors(self, site: Site) -> Tensors:
        return bottleneck_tensors(site.d_out, self.size)

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return ops.adapter(y, p.down, p.down_bias, p.up, p.up_bias, self.activation, size=p.size)

    def flops(self, site: Site, tokens: int) -> int:
        return 4 * tokens * site.d_out * self.size

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("y",)

    def saved_floats(self, site: Site, tokens: int) -> int:
        return bottleneck_saved(self.activation, self.size, tokens)

    def check(self, site: Site) -> str | None:
        return check_bottleneck(site, self.size)
