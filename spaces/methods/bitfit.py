"""BitFit: train the biases (Ben Zaken et al. 2021, arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class BitFit(Method):
    """y + b on the output of every linear and LayerNorm that has a bias; b = 0, the change of that bias.

    It trains biases that exist and adds none: models nearly without biases (Llama, T5) have little to train here.
    """

    name, category = "bitfit", "partial"
    sites = frozenset({"bias"})
    default_sites = ("bias",)
    merges = True

    def tensors(self, site: Site) -> Tensors:
        return {"b": Tensor((site.d_out,))}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return y + p.b.unsqueeze(1)

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # the bias is there already; its change folds into it

    def in_peft(self, site: Site) -> PeftForm:
        return PeftForm(
            kind="LORA",
            axes={"changed": ("out",)},
            write=lambda own: {"changed": own["bias"] + own["b"]},
            read=lambda found: {"b": found["changed"] - found["bias"]},
            config={"bias": "all"},
            own="bias",
            note="the biases",
        )

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        return {} if settings["peft_type"] == "LORA" and settings.get("bias") == "all" else None
