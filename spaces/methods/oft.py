"""OFT: rotate what a linear reads, block by block (Qiu et al. 2023, arXiv:2306.07280; OFTv2, arXiv:2506.19847)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from peftscape.spaces.knobs import choice, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.ops.rotation import cayley, cayley_neumann, rotate, skew
from peftscape.spaces.peft_form import PeftForm, plain_linear

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class OFT(Method):
    """W (x R), R = diag(R_1 ... R_{d_in / b}) of b x b rotations made of skew-symmetric Q_i; Q = 0 at the start.

    `neumann`, the default and peft's: R_i = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 (five terms of Cayley's series, nearly
    orthogonal); `cayley`: (I - Q)(I + Q)^{-1}. b is the divisor of d_in nearest to `block`. As in peft the input is
    rotated, which keeps the angles between the rows of W.
    """

    name, category = "oft", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "block", "b"

    block: int = knob(ladder(2, 256), default=32)
    rotation: str = knob(choice("neumann", "cayley"), default="neumann")

    def side(self, site: Site) -> Literal["input"]:
        return "input"

    def width(self, site: Site) -> int:
        """b at this site."""
        return nearest_divisor(site.d_in, self.block)

    def tensors(self, site: Site) -> Tensors:
        b = self.width(site)
        return {"R": Tensor((site.d_in // b, b * (b - 1) // 2))}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        import torch

        # Sites of one shape together: few large solves instead of many small ones.
        made: dict[int, Own] = {}
        for shape in {row["R"].shape for row in own}:
            here = [i for i, row in enumerate(own) if row["R"].shape == shape]
            q = skew(torch.stack([own[i]["R"] for i in here]), self.width(sites[here[0]]))
            rotations = cayley(q) if self.rotation == "cayley" else cayley_neumann(q, 5)
            made |= {i: {"R": rotation} for i, rotation in zip(here, rotations, strict=True)}
        return [made[i] for i in range(len(own))]

    def apply_input(self, p: Lanes, x: Array) -> Array:
        return rotate(x, p.R)

    def in_peft(self, site: Site) -> PeftForm | str:
        return plain_linear(site, "OFT") or PeftForm(
            kind="OFT",
            axes={"oft_R.weight": self.tensors(site)["R"].shape},
            names={"R": "oft_R.weight"},
            config={
                "r": 0, "oft_block_size": self.block, "use_cayley_neumann": self.rotation == "neumann",
                "num_cayley_neumann_terms": 5, "block_share": False, "coft": False, "bias": "none",
                "peft_version": "0.21.0",  # peft takes folders that do not say so for an older series
            },
        )  # fmt: skip

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        series = settings.get("use_cayley_neumann", False)
        old = series and "peft_version" not in settings  # of before 0.18, where the series was another
        beyond = old or settings.get("coft") or settings.get("block_share") or settings.get("bias", "none") != "none"
        if settings["peft_type"] != "OFT" or beyond or (series and settings.get("num_cayley_neumann_terms") != 5):
            return None
        block = settings.get("oft_block_size") or site.d_in // settings["r"]
        return {"block": block, "rotation": "neumann" if series else "cayley"}

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * site.d_in * self.width(site)

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of R

    def group_key(self, site: Site) -> tuple[object, ...]:
        return self.width(site), self.rotation

    def check(self, site: Site) -> str | None:
        if self.width(site) < 2:
            return f"block: no rotation in {self.block} of the {site.d_in} coordinates that {site.kind} reads"
        return shares_input(site)


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of `width` nearest to `wanted`, the smaller of two as near (peft's `adjust_oft_parameters`)."""
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


def shares_input(site: Site) -> str | None:
    """Why what a site reads cannot be changed for it alone."""
    return f"sites: {site.kind} shares its input with others in a fused linear" if site.span is not None else None
