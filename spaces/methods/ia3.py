"""(IA)^3: learned scalings of keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class IA3(Method):
    """y * s, s in R^{d_out} per adapted linear, and s in R^{d_in} on the input of `inputs`; s = 1 at the start.

    Keys and values are scaled where they come out, the feed-forward activations where `down` reads them (sec. 3.3).
    """

    name, category = "ia3", "additive"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("k", "v", "down")
    merges = True

    inputs: tuple[str, ...] = ("down",)

    def side(self, site: Site) -> Literal["input", "output"]:
        return "input" if site.kind in self.inputs else "output"

    def tensors(self, site: Site) -> Tensors:
        return {"s": Tensor((site.d_in if self.side(site) == "input" else site.d_out,), init="ones")}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return y * p.s.unsqueeze(1)

    def apply_input(self, p: Lanes, x: Array) -> Array:
        return x * p.s.unsqueeze(1)

    def in_peft(self, site: Site) -> PeftForm | str:
        reads = self.side(site) == "input"
        if reads and site.span is not None:
            return f"HF peft's (IA)^3 cannot scale what only a part of {site.path} reads"
        return PeftForm(
            kind="IA3",
            axes={"ia3_l": (1, "in") if reads else ("out", 1)},
            names={"s": "ia3_l"},
            config={"fan_in_fan_out": site.transposed, "feedforward_modules": ()},
            rest={"ia3_l": 1.0},
            listed=("target_modules", *(["feedforward_modules"] if reads else [])),
            splits=True,
        )

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if settings["peft_type"] != "IA3":
            return None
        return {"inputs": [site.kind] if settings["feedforward_modules"] else []}

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # element-wise, which is nothing beside products

    def check(self, site: Site) -> str | None:
        if self.side(site) == "input" and site.span is not None:
            return f"inputs: {site.kind} shares its input with others in a fused linear"
        return None

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",) if self.side(site) == "input" else ("y",)  # what is scaled, for the gradient of s
