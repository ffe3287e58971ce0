"""Prefix tuning without the MLP, also called P-tuning v2 (arXiv:2101.00190, arXiv:2110.07602)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import choice, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class PrefixTuning(Method):
    """K <- [P_k; K], V <- [P_v; V] with P_k, P_v in R^{l x d_kv} in every adapted layer; N(0, 0.02).

    No start equals the backbone: even zero keys take a share of the softmax. `positions = "shift"` moves the text
    behind the prefix, as a cache of l tokens does in transformers and so in HF peft; `"keep"` leaves it where it was.
    """

    name, category = "prefix_tuning", "additive"
    sites = frozenset({"kv"})
    default_sites = ("kv",)
    exact_start = False
    size_knob, letter = "length", "l"

    length: int = knob(ladder(1, 64), default=16)
    positions: str = knob(choice("shift", "keep"), default="shift")

    def tensors(self, site: Site) -> Tensors:
        shape = (self.length, site.d_out)
        return {"keys": Tensor(shape, init="normal"), "values": Tensor(shape, init="normal")}

    def prefix(self, p: Lanes) -> tuple[Array, Array]:
        return p.keys, p.values

    def prefix_length(self) -> int:
        return self.length

    def position_shift(self) -> int:
        return self.length if self.positions == "shift" else 0

    def flops(self, site: Site, tokens: int) -> int:
        return 4 * tokens * self.length * site.d_in  # scores and their sum over values; d_in is the queries' width

    def check(self, site: Site) -> str | None:
        return None if self.length >= 1 else f"length: {self.length} is not at least 1"
