"""LoftQ: LoRA that starts by making up for what quantisation lost (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.lora import LoRA

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class LoftQ(LoRA):
    """y + s B A x with s B A = U_r S_r V_r^T at the start, W - Q = U S V^T, Q the quantised weight that y is made of.

    All lanes share Q, so that this is one round of the paper's alternation (alg. 1 with T = 1: Q is W quantised, and A
    and B the best answer to it). On a backbone that is not quantised nothing was lost, and it starts as LoRA does. s
    is LoRA's.
    """

    name, category = "loftq", "reparameterised"
    needs_weight = True

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": Tensor((self.rank, site.d_in), init="own", trains=not self.freeze_a),
            "B": Tensor((site.d_out, self.rank), init="own", rate=self.rate),
        }

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        import torch

        lost = frozen.get("residual")  # gives W - Q
        if lost is None:
            a = torch.empty(self.rank, site.d_in).uniform_(-1, 1, generator=source) / math.sqrt(site.d_in)
            return {"A": a, "B": torch.zeros(site.d_out, self.rank)}
        left, sizes, right = torch.linalg.svd(lost().to(torch.float32), full_matrices=False)
        root = (sizes[: self.rank] / self.factor).sqrt()
        return {"A": root.unsqueeze(1) * right[: self.rank], "B": left[:, : self.rank] * root}
