"""Prompt tuning: learned vectors before the embedded text (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class PromptTuning(Method):
    """X <- [P; X], P in R^{l x d}, started from rows of the vocabulary; the text moves back by l positions."""

    name, category = "prompt_tuning", "additive"
    sites = frozenset({"input"})
    default_sites = ("input",)
    exact_start = False
    size_knob, letter = "length", "l"

    length: int = knob(ladder(1, 64), default=16)

    def tensors(self, site: Site) -> Tensors:
        return {"prompt": Tensor((self.length, site.d_out), init="vocabulary")}

    def virtual_tokens(self, p: Lanes) -> Array:
        return p.prompt

    def prompt_length(self) -> int:
        return self.length

    def position_shift(self) -> int:
        return self.length

    def in_peft(self, site: Site) -> PeftForm:
        return PeftForm(
            kind="PROMPT_TUNING",
            axes={"prompt_embeddings": (self.length, "beside")},
            names={"prompt": "prompt_embeddings"},
            config={
                "num_virtual_tokens": self.length, "token_dim": site.d_out, "prompt_tuning_init": "RANDOM"
            },
            beside=site.d_out,
            common=("prompt_embeddings",),
            virtual=True,
            note="HF peft's prompt tuning",
            # The transformers class cannot tell padding from text behind a prompt, wherever the padding is.
            pooled="; peft's batches must hold texts of one length (it pools padding otherwise)",
        )  # fmt: skip

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if settings["peft_type"] != "PROMPT_TUNING":
            return None
        return {"length": settings["num_virtual_tokens"]}

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # its tokens run through the whole model: `prompt_length` says so

    def check(self, site: Site) -> str | None:
        return None if self.length >= 1 else f"length: {self.length} is not at least 1"
