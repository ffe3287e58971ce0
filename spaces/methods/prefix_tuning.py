"""Prefix tuning without the MLP, also called P-tuning v2 (arXiv:2101.00190, arXiv:2110.07602)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import choice, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Each, Own
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

    def prefix(self, p: Lanes) -> tuple[Each, Each]:
        return p.each("keys"), p.each("values")

    def prefix_length(self) -> int:
        return self.length

    def position_shift(self) -> int:
        return self.length if self.positions == "shift" else 0

    def in_peft(self, site: Site) -> PeftForm | str:
        if self.positions != "shift":
            return "HF peft's prefix tuning shifts the text's positions by the prefix's length"
        width = site.d_out

        def write(own: Own) -> Own:
            import torch

            return {"prompt_embeddings": torch.cat([own["keys"], own["values"]], dim=1)}

        return PeftForm(
            kind="PREFIX_TUNING",
            # A row is a virtual token: the keys of layer 0, its values, the keys of layer 1 ...
            axes={"prompt_embeddings": (self.length, "beside")},
            write=write,
            read=lambda found: {
                "keys": found["prompt_embeddings"][:, :width], "values": found["prompt_embeddings"][:, width:]
            },
            config={
                "num_virtual_tokens": self.length, "token_dim": width, "encoder_hidden_size": width,
                "prefix_projection": False,
            },
            beside=2 * width,
            common=("prompt_embeddings",),
            virtual=True,
            note="HF peft's prefix tuning",
        )  # fmt: skip

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if cls is not PrefixTuning or settings["peft_type"] != "PREFIX_TUNING" or settings.get("prefix_projection"):
            return None
        return {"length": settings["num_virtual_tokens"], "positions": "shift"}

    def flops(self, site: Site, tokens: int) -> int:
        return 4 * tokens * self.length * site.d_in  # scores and their sum over values; d_in is the queries' width

    def check(self, site: Site) -> str | None:
        return None if self.length >= 1 else f"length: {self.length} is not at least 1"
