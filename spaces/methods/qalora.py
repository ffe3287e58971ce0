"""QA-LoRA: LoRA that reads sums over groups, to merge into a quantised weight (Xu et al. 2023, arXiv:2309.14717)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftscape.spaces import ops
from peftscape.spaces.knobs import knob, ladder
from peftscape.spaces.methods.base import Lanes, Tensor, Tensors
from peftscape.spaces.methods.lora import LoRA, lora_in_peft

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site


class QALoRA(LoRA):
    """y + s B A u, u_j = the sum of x over its j-th group of g, A in R^{r x d_in / g}, B in R^{d_out x r}; B = 0.

    The change is the same for all weights of a row that share a zero point, when g is the quantisation's group size, so
    it merges into the zero points (alg. 1). `group` is g; s is LoRA's.
    """

    name, category = "qalora", "reparameterised"

    group: int = knob(ladder(2, 128), default=32)

    def tensors(self, site: Site) -> Tensors:
        own = super().tensors(site)
        return {**own, "A": Tensor((self.rank, site.d_in // self.group), init="kaiming", trains=not self.freeze_a)}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        sums = x.reshape(*x.shape[:-1], -1, self.group).sum(dim=-1)
        return ops.low_rank(sums, y, p.each("A"), p.each("B"), self.scale(p))

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * self.rank * (site.d_in // self.group + site.d_out)

    def fixed_flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * self.rank * (site.d_in // self.group) if self.freeze_a else 0

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ()

    def saved_floats(self, site: Site, tokens: int) -> int:
        sums = 0 if self.freeze_a else site.d_in // self.group
        return super().saved_floats(site, tokens) + tokens * sums

    def group_key(self, site: Site) -> tuple[Any, ...]:
        return (*super().group_key(site), self.group)

    def check(self, site: Site) -> str | None:
        if self.group < 1 or site.d_in % self.group:
            return f"group: {self.group} does not divide what {site.kind} reads ({site.d_in})"
        return super().check(site)

    def in_peft(self, site: Site) -> PeftForm:
        def write(own: Own) -> Own:
            return {"lora_A.weight": own["A"].repeat_interleave(self.group, dim=1), "lora_B.weight": own["B"]}

        def read(found: Own) -> Own:
            return {"A": found["lora_A.weight"][:, :: self.group], "B": found["lora_B.weight"]}

        return lora_in_peft(site, self.rank, self.factor, write=write, read=read)
