"""KronA: a change that is a Kronecker product (Edalati et al. 2022, arXiv:2212.10650)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import knob, ladder, log_uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.methods.lokr import factors
from peftscape.spaces.ops.kronecker import kronecker, kronecker_flops, kronecker_saved
from peftscape.spaces.peft_form import PeftForm, plain_linear

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class KronA(Method):
    """y + s (A kron B) x, A in R^{a1 x a2}, B in R^{b1 x b2}, a1 b1 = d_out, a2 b2 = d_in; B = 0 at the start.

    a1 and a2 are the largest divisors of d_out and d_in up to `size`, so that a size fits every linear.
    """

    name, category = "krona", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "size", "a"

    size: int = knob(ladder(1, 256), default=16)
    scale: float = knob(log_uniform(0.25, 16), default=1.0)

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and of B."""
        a1, a2 = divisor(site.d_out, self.size), divisor(site.d_in, self.size)
        return (a1, a2), (site.d_out // a1, site.d_in // a2)

    def tensors(self, site: Site) -> Tensors:
        a, b = self.shapes(site)
        return {"A": Tensor(a, init="kaiming"), "B": Tensor(b)}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return y + p.scale * kronecker(x, p.A, p.B)

    def in_peft(self, site: Site) -> PeftForm | str:
        (a1, a2), b = self.shapes(site)
        if any(factors(width, self.size)[0] != a for width, a in ((site.d_out, a1), (site.d_in, a2))):
            return f"HF peft's LoKr does not divide {site.path} as KronA of size {self.size} does"
        rank = (max(b) + 1) // 2  # from which on LoKr keeps its second factor whole
        return plain_linear(site, "LoKr") or PeftForm(
            kind="LOKR",
            axes={"lokr_w1": (a1, a2), "lokr_w2": b},
            names={"A": "lokr_w1", "B": "lokr_w2"},
            config={"r": rank, "alpha": self.scale * rank, "decompose_both": False, "decompose_factor": self.size},
        )

    def flops(self, site: Site, tokens: int) -> int:
        return kronecker_flops(tokens, *self.shapes(site))

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of B

    def saved_floats(self, site: Site, tokens: int) -> int:
        return kronecker_saved(tokens, *self.shapes(site))

    def group_key(self, site: Site) -> tuple[object, ...]:
        return (*self.static_knobs(), self.shapes(site))

    def check(self, site: Site) -> str | None:
        return None if self.size >= 1 else f"size: {self.size} is not at least 1"


def divisor(width: int, limit: int) -> int:
    """The largest divisor of `width` that is at most `limit`."""
    return max(n for n in range(1, min(width, limit) + 1) if width % n == 0)
