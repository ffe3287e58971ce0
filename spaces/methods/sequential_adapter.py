"""Sequential adapter: a bottleneck after a sub-layer (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces import ops
from peftscape.spaces.knobs import knob
from peftscape.spaces.methods.base import Lanes
from peftscape.spaces.methods.bottleneck import ACTIVATIONS, Bottleneck

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array


class SequentialAdapter(Bottleneck):
    """y + W_up sigma(W_down y + b_down) + b_up on a sub-layer's output, before the residual sum; W_up = 0."""

    name, category = "sequential_adapter", "additive"
    default_sites = ("attention", "ffn")

    activation: str = knob(ACTIVATIONS, default="gelu")

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return ops.adapter(y, *self.weights(p), self.activation)
