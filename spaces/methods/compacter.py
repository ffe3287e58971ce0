"""Compacter: adapters whose weights are sums of Kronecker products (Mahabadi et al. 2021, arXiv:2106.04647)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import integer, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class Compacter(Method):
    """y + W_up GELU(W_down y + b_down) + b_up, each W = sum_i A_i kron (t_i s_i), i = 1 ... n; W_up = 0 at the start.

    A_i in R^{n x n}, shared by all weights of the placement; s_i in R^{rho x (in / n)} and t_i in R^{(out / n) x rho},
    each weight's own. The bottleneck m is `size`, rounded up to a multiple of n. After attention and FFN that makes
    2 L [2 rho (d + m) + m + d] + n^3 numbers; on the FFN alone it is Compacter++.
    """

    name, category = "compacter", "additive"
    sites = frozenset({"attention", "ffn"})
    default_sites = ("attention", "ffn")
    size_knob, letter = "size", "m"

    size: int = knob(ladder(1, 256), default=32)
    n: int = knob(ladder(2, 16), default=4)
    rank: int = knob(integer(1, 4), default=1)

    @property
    def bottleneck(self) -> int:
        """m."""
        return -(-self.size // self.n) * self.n

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        return {"A": Tensor((self.n, self.n, self.n), init="kaiming", scope="placement")}

    def tensors(self, site: Site) -> Tensors:
        n, rho, wide, narrow = self.n, self.rank, site.d_out // self.n, self.bottleneck // self.n
        return {
            "down_s": Tensor((n, rho, wide), init="kaiming"),
            "down_t": Tensor((n, narrow, rho), init="kaiming"),
            "down_bias": Tensor((n, narrow)),  # in n parts, so that unequal bottlenecks can be padded in each
            "up_s": Tensor((n, rho, narrow), init="kaiming"),
            "up_t": Tensor((n, wide, rho)),
            "up_bias": Tensor((site.d_out,)),
        }

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        import torch

        lanes, tokens, width = y.shape
        n, rho = p.down_s.shape[1:3]
        terms = n * rho
        # Along the wide sides the factors are used one after the other; along the narrow ones A is multiplied in.
        read = y.reshape(lanes, tokens * n, width // n) @ p.down_s.reshape(lanes, terms, -1).mT
        down = torch.einsum("liab,lijr->lajbir", p.A, p.down_t).reshape(lanes, -1, n * terms)
        bias = p.down_bias.reshape(lanes, 1, -1)
        hidden = torch.nn.functional.gelu(torch.baddbmm(bias, read.view(lanes, tokens, -1), down.mT))
        up = torch.einsum("liab,lirk->lairbk", p.A, p.up_s).reshape(lanes, n * terms, -1)
        mixed = (hidden @ up.mT).view(lanes, tokens * n, terms)
        written = mixed @ p.up_t.transpose(2, 3).reshape(lanes, terms, -1)
        return y + written.view(lanes, tokens, width) + p.up_bias.unsqueeze(1)

    def flops(self, site: Site, tokens: int) -> int:
        return 4 * tokens * self.n * self.rank * (site.d_out + self.n * self.bottleneck)

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("y",)

    def saved_floats(self, site: Site, tokens: int) -> int:
        # Between the factors on both sides, and before and behind the activation.
        return 2 * tokens * (self.n**2 * self.rank + self.bottleneck)

    def group_key(self, site: Site) -> tuple[object, ...]:
        return (self.n,)

    def check(self, site: Site) -> str | None:
        if site.d_out % self.n:
            return f"n: the {site.kind} output ({site.d_out}) does not divide into {self.n} parts"
        if self.bottleneck > site.d_out:
            return f"size: {self.size} is wider than the {site.kind} output ({site.d_out})"
        return None
