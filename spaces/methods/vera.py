"""VeRA: two vectors per linear around random matrices that all share (Kopiczko et al. 2023, arXiv:2310.11454)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces import ops
from peftscape.spaces.knobs import knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class VeRA(Method):
    """y + b * (B (d * (A x))), d in R^r, b in R^{d_out}; d = 0.1 and b = 0 at the start.

    A in R^{r x n} and B in R^{m x r} are drawn once for the placement, n and m its largest d_in and d_out, and never
    train; a linear sees the corner of its own size, as in peft. The file holds them.
    """

    name, category = "vera", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "rank", "r"

    rank: int = knob(ladder(1, 1024), default=256)
    d_initial: float = 0.1

    def tensors(self, site: Site) -> Tensors:
        return {"d": Tensor((self.rank,), init="own"), "b": Tensor((site.d_out,))}

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        wide, tall = max(s.d_in for s in sites), max(s.d_out for s in sites)
        return {
            "A": Tensor((self.rank, wide), init="he", scope="placement", trains=False),
            "B": Tensor((tall, self.rank), init="he", scope="placement", trains=False),
        }

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        import torch

        return {"d": torch.full((self.rank,), self.d_initial)}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [
            row | {"A": row["A"][:, : site.d_in], "B": row["B"][: site.d_out]}
            for row, site in zip(own, sites, strict=True)
        ]

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        one = p.rank.new_ones(1, 1, 1)
        return ops.low_rank(x, y, p.d.unsqueeze(-1) * p.A, p.b.unsqueeze(-1) * p.B, one)

    def in_peft(self, site: Site) -> PeftForm:
        return PeftForm(
            kind="VERA",
            axes={
                "vera_lambda_d": ("rank",), "vera_lambda_b": ("out",),
                "base_model.vera_A": ("rank", "widest"), "base_model.vera_B": ("tallest", "rank"),
            },
            names={
                "d": "vera_lambda_d", "b": "vera_lambda_b", "A": "base_model.vera_A", "B": "base_model.vera_B"
            },
            config={
                "r": self.rank, "d_initial": self.d_initial, "projection_prng_key": 0, "save_projection": True,
                "vera_dropout": 0.0, "fan_in_fan_out": site.transposed, "bias": "none",
            },
            rank=self.rank,
            common=("base_model.vera_A", "base_model.vera_B"),
        )  # fmt: skip

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if settings["peft_type"] != "VERA" or settings.get("bias", "none") != "none":
            return None
        return {"rank": settings["r"], "d_initial": settings.get("d_initial", 0.1)}

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * self.rank * (site.d_in + site.d_out)

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of d

    def saved_floats(self, site: Site, tokens: int) -> int:
        return tokens * self.rank  # A x, for the gradient of b

    def check(self, site: Site) -> str | None:
        return None if self.rank >= 1 else f"rank: {self.rank} is not at least 1"
