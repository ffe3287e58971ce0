"""AdaMix: a mixture of adapters that costs one (Wang et al. 2022, arXiv:2205.12410)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces import ops
from peftscape.spaces.knobs import integer, knob, ladder
from peftscape.spaces.methods.base import Lanes, Tensor, Tensors
from peftscape.spaces.methods.bottleneck import ACTIVATIONS, Bottleneck

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site

MOST_EXPERTS = 1024


class AdaMix(Bottleneck):
    """y + U_j sigma(D_i y + b_i) + c_j, experts i and j drawn for each module and pass; U = 0 at the start.

    D in R^{M x m x d}, U in R^{M x d x m}. In training a text passes twice, each time with experts drawn anew, and the
    symmetric KL divergence of the two answers, times `agreement`, joins their mean loss. In evaluation and in the file
    stands the mean of the experts: one adapter.
    """

    name, category = "adamix", "unified"

    size: int = knob(ladder(1, 256), default=16)
    experts: int = knob(integer(2, 8), default=4)
    activation: str = knob(ACTIVATIONS, default="gelu")
    agreement: float = 1.0

    def tensors(self, site: Site) -> Tensors:
        one = super().tensors(site)
        many = {
            f"{name}_experts": Tensor((self.experts, *t.shape), init=t.init, stored=False, deployed=False)
            for name, t in one.items()
        }
        return many | {name: Tensor(t.shape, trains=False) for name, t in one.items()}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        import torch

        seen = []
        for row in own:
            one = {name.removesuffix("_experts"): name for name in row if name.endswith("_experts")}
            if source is None:
                seen.append({name: row[name] for name in one})
                continue
            down, up = torch.randint(self.experts, (2,), generator=source).tolist()
            seen.append({name: row[many][down if name.startswith("down") else up] for name, many in one.items()})
        return seen

    def after_step(self, own: list[Own], step: int, steps: int) -> bool:
        for row in own:
            for name in [n for n in row if n.endswith("_experts")]:
                row[name.removesuffix("_experts")].copy_(row[name].mean(dim=0))
        return False

    def consistency(self) -> float:
        return self.agreement

    def check(self, site: Site) -> str | None:
        if not 1 <= self.experts <= MOST_EXPERTS:
            return f"experts: {self.experts} is not from 1 to {MOST_EXPERTS}"
        return super().check(site)

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return ops.adapter(y, *self.weights(p), self.activation)
