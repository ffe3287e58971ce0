"""BOFT: rotate what a linear reads by butterfly factors (Liu et al. 2023, arXiv:2311.06243)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from peftscape.spaces.knobs import integer, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.methods.oft import shares_input
from peftscape.spaces.ops.rotation import cayley, rotate, skew
from peftscape.spaces.peft_form import PeftForm, plain_linear

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class BOFT(Method):
    """s * (W (x B_m ... B_1)) + bias, B_i = P_i diag(R_1 ... R_{d_in / b}) P_i^T; s in R^{d_out}; R = I, s = 1.

    Each R is a Cayley rotation (I - Q)(I + Q)^{-1} of a skew-symmetric Q, of which the entries above the diagonal
    train: m d_in (b - 1) / 2 + d_out numbers. P_i brings coordinates together that the factors before have not mixed.
    b is the largest even divisor of d_in / 2^{m-1} up to `block` (with m = 1: any divisor). As in peft, the
    input is rotated and s scales the output without its bias.
    """

    name, category = "boft", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    needs_weight = True
    size_knob, letter = "block", "b"

    block: int = knob(ladder(2, 256), default=8)
    factors: int = knob(integer(1, 4), default=2)

    def side(self, site: Site) -> Literal["both"]:
        return "both"

    def width(self, site: Site) -> int:
        """b at this site; 0 where there is none."""
        step, part = (1, site.d_in) if self.factors == 1 else (2, site.d_in // 2 ** (self.factors - 1))
        if part * 2 ** (self.factors - 1) != site.d_in:
            return 0
        return max((n for n in range(2, min(self.block, part) + 1, step) if part % n == 0), default=0)

    def tensors(self, site: Site) -> Tensors:
        b = max(1, self.width(site))
        return {
            "R": Tensor((self.factors, site.d_in // b, b * (b - 1) // 2)),
            "s": Tensor((site.d_out,), init="ones"),
        }

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        import torch

        made: dict[int, Own] = {}
        for shape in {row["R"].shape for row in own}:
            here = [i for i, row in enumerate(own) if row["R"].shape == shape]
            rotations = cayley(skew(torch.stack([own[i]["R"] for i in here]), self.width(sites[here[0]])))
            made |= {i: {"R": rotation, "s": own[i]["s"]} for i, rotation in zip(here, rotations, strict=True)}
        return [made[i] for i in range(len(own))]

    def apply_input(self, p: Lanes, x: Array) -> Array:
        for level in reversed(range(self.factors)):
            x = _unzip(rotate(_zip(x, p.R.shape[-1], level), p.R[:, level]), p.R.shape[-1], level)
        return x

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        plain = y if p.bias is None else y - p.bias
        return y + (p.s.unsqueeze(1) - 1) * plain

    def in_peft(self, site: Site) -> PeftForm | str:
        if self.factors > 1:
            return "HF peft's BOFT has one factor where its CUDA extension is not built"
        b = self.width(site)

        def write(own: Own) -> Own:
            return {"boft_R": skew(own["R"], b), "boft_s": own["s"].unsqueeze(1)}

        def read(found: Own) -> Own:
            import torch

            rows, columns = torch.triu_indices(b, b, 1)
            half = (found["boft_R"] - found["boft_R"].mT) / 2  # peft keeps whole matrices and takes this of them
            return {"R": half[..., rows, columns], "s": found["boft_s"][:, 0]}

        return plain_linear(site, "BOFT") or PeftForm(
            kind="BOFT",
            axes={"boft_R": (1, site.d_in // b, b, b), "boft_s": ("out", 1)},
            write=write,
            read=read,
            config={
                "boft_block_size": b, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0,
                "bias": "none",
            },
        )  # fmt: skip

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if settings["peft_type"] != "BOFT" or settings.get("bias", "none") != "none":
            return None
        if settings.get("boft_n_butterfly_factor", 1) != 1:
            return None
        return {"block": settings.get("boft_block_size") or site.d_in // settings["boft_block_num"], "factors": 1}

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * site.d_in * self.width(site) * self.factors

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",) if self.factors == 1 else ()

    def saved_floats(self, site: Site, tokens: int) -> int:
        # What each factor reads, put in its order, and what s scales.
        return tokens * ((self.factors * site.d_in if self.factors > 1 else 0) + site.d_out)

    def group_key(self, site: Site) -> tuple[object, ...]:
        return self.width(site), self.factors

    def check(self, site: Site) -> str | None:
        if self.width(site) < 2:
            return f"block: {self.factors} factors of blocks up to {self.block} do not fit into {site.d_in} coordinates"
        return shares_input(site)


def _unzip(x: Array, b: int, level: int) -> Array:
    """x P^T: in groups of 2^level blocks of b the even halves of blocks before the odd ones."""
    if level == 0:
        return x
    return x.view(*x.shape[:-1], -1, 2**level, 2, b // 2).transpose(-3, -2).reshape(x.shape)


def _zip(x: Array, b: int, level: int) -> Array:
    """x P, which undoes it."""
    if level == 0:
        return x
    return x.reshape(*x.shape[:-1], -1, 2, 2**level, b // 2).transpose(-3, -2).reshape(x.shape)
