"""PiSSA: LoRA that starts as the weight's own largest singular directions (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.lora import LoRA, lora_in_peft

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site


class PiSSA(LoRA):
    """(W - s B_0 A_0) x + s (B_0 + dB) (A_0 + dA) x, with s B_0 A_0 = U_r S_r V_r^T of W = U S V^T; dA, dB = 0.

    A_0 = sqrt(S_r / s) V_r^T and B_0 = U_r sqrt(S_r / s) are the start, dA and dB what training adds. W is shared, so
    what is computed is y + s (B_0 dA + dB (A_0 + dA)) x, the same without a residual weight: a LoRA of rank 2 r. s is
    LoRA's.
    """

    name, category = "pissa", "reparameterised"
    needs_weight = True

    def tensors(self, site: Site) -> Tensors:
        a, b = (self.rank, site.d_in), (site.d_out, self.rank)
        return {
            "dA": Tensor(a, trains=not self.freeze_a),
            "dB": Tensor(b, rate=self.rate),
            "A0": Tensor(a, init="own", trains=False),
            "B0": Tensor(b, init="own", trains=False),
        }

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        import torch

        left, sizes, right = torch.linalg.svd(frozen["weight"], full_matrices=False)
        root = (sizes[: self.rank] / self.factor).sqrt()
        return {"A0": root.unsqueeze(1) * right[: self.rank], "B0": left[:, : self.rank] * root}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        import torch

        return [{"A": torch.cat([t["dA"], t["A0"] + t["dA"]]), "B": torch.cat([t["B0"], t["dB"]], dim=1)} for t in own]

    def in_peft(self, site: Site) -> PeftForm:
        r = self.rank

        def write(own: Own) -> Own:
            [seen] = self.expand([own], (site,), None)
            return {f"lora_{name}.weight": value for name, value in seen.items()}

        def read(found: Own) -> Own:
            a, b = found["lora_A.weight"], found["lora_B.weight"]
            return {"dA": a[:r], "A0": a[r:] - a[:r], "B0": b[:, :r], "dB": b[:, r:]}

        return lora_in_peft(site, 2 * r, self.factor, write=write, read=read)

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * super().flops(site, tokens)

    def saved_floats(self, site: Site, tokens: int) -> int:
        return 2 * super().saved_floats(site, tokens)
