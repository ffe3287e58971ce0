"""DoRA: LoRA on the direction of the weight, and its magnitude learnt apart (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftscape.spaces import ops
from peftscape.spaces.methods.base import Lanes, Tensor, Tensors
from peftscape.spaces.methods.lora import LoRA, lora_in_peft

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site


class DoRA(LoRA):
    """b + m * (W x + s B A x) / ||W + s B A||, m in R^{d_out}, one norm an output; s as LoRA's.

    B = 0 and m_i = ||W_i|| (of row i) at the start. No gradient flows through the norm (sec. 4.3, as in HF peft), which
    is made once a step without B A: ||W_i + s B_i A||^2 = ||W_i||^2 + 2 s B_i . (W A^T)_i + s^2 B_i (A A^T) B_i^T.
    """

    name, category = "dora", "reparameterised"
    needs_weight = True

    def tensors(self, site: Site) -> Tensors:
        squares = Tensor((site.d_out,), init="own", trains=False, stored=False, deployed=False)
        return {**super().tensors(site), "m": Tensor((site.d_out,), init="own"), "squares": squares}

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        squares = frozen["weight"].square().sum(dim=1)  # ||W_i||^2, which never changes
        return {"m": squares.sqrt(), "squares": squares}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [{"A": t["A"], "B": t["B"], "ratio": t["m"] / self._norm(t)} for t in own]

    def _norm(self, t: Own) -> Array:
        a, b, weight = t["A"].detach(), t["B"].detach(), t["weight"]
        across = (weight @ a.mT.to(weight.dtype)).to(a.dtype)
        squares = t["squares"] + self.factor * (b * (2 * across + self.factor * (b @ (a @ a.mT)))).sum(dim=1)
        return squares.clamp(min=0).sqrt()

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        plain = y if p.bias is None else y - p.bias
        turned = ops.low_rank(x, plain, p.each("A"), p.each("B"), self.scale(p))
        return y + (p.ratio.unsqueeze(1) * turned - plain)  # exactly y where nothing has changed

    def in_peft(self, site: Site) -> PeftForm:
        names = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
        plain = lora_in_peft(site, self.rank, self.factor, names=names, use_dora=True)
        # Rows of a fused linear that are not ours keep their magnitude.
        axes = {**plain.axes, "lora_magnitude_vector": ("out",)}
        return replace(plain, axes=axes, rest={"lora_magnitude_vector": "row norms"})

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        return LoRA.from_peft({**settings, "use_dora": False}, site) if settings.get("use_dora") else None

    def saved_floats(self, site: Site, tokens: int) -> int:
        return super().saved_floats(site, tokens) + tokens * site.d_out  # what m scales
