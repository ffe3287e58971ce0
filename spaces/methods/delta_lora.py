"""Delta-LoRA: the frozen weight follows the change of the low-rank product (Zi et al. 2023, arXiv:2309.02411)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import knob, log_uniform
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.lora import LoRA, lora_in_peft

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site


class DeltaLoRA(LoRA):
    """W_t x + s B_t A_t x, and from step K on W_{t+1} = W_t + ratio s (B_{t+1} A_{t+1} - B_t A_t); B = 0 at the start.

    The changes add up to W_t = W + ratio s (B_t A_t - B_K A_K), so no lane needs a weight of its own: A_K and B_K are
    kept and W stays shared. As in the paper (alg. 1) W gets no gradient: A and B learn through s B A x alone.
    `start_at` is K as a fraction of all steps; s is LoRA's.
    """

    name, category = "delta_lora", "reparameterised"

    ratio: float = knob(log_uniform(0.1, 4), default=1.0)
    start_at: float = 0.1

    def tensors(self, site: Site) -> Tensors:
        own = super().tensors(site)
        kept = {f"{name}_K": Tensor(own[name].shape, trains=False) for name in "AB"}
        return own | kept | {"started": Tensor((1, 1), trains=False)}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        import torch

        seen = []
        for t in own:
            more = 1 + self.ratio * t["started"]
            # (1 + ratio) B A in the forward, the gradients of B A in the backward.
            a, b = (t[name].detach() + (t[name] - t[name].detach()) / more for name in "AB")
            seen.append({"A": torch.cat([a, t["A_K"]]), "B": torch.cat([more * b, (1 - more) * t["B_K"]], dim=1)})
        return seen

    def after_step(self, own: list[Own], step: int, steps: int) -> bool:
        if step == max(1, round(self.start_at * steps)):
            for t in own:
                t["A_K"].copy_(t["A"])
                t["B_K"].copy_(t["B"])
                t["started"].fill_(1)
        return False

    def in_peft(self, site: Site) -> PeftForm:
        r = self.rank

        def write(own: Own) -> Own:
            [seen] = self.expand([own], (site,), None)
            return {f"lora_{name}.weight": value for name, value in seen.items()}

        def read(found: Own) -> Own:
            a, b = found["lora_A.weight"], found["lora_B.weight"]
            started = a[r:].any().to(a.dtype).view(1, 1)  # A_K is zero until step K
            return {
                "A": a[:r], "A_K": a[r:], "B": b[:, :r] / (1 + self.ratio * started), "B_K": b[:, r:] / -self.ratio,
                "started": started,
            }  # fmt: skip

        return lora_in_peft(site, 2 * r, self.factor, write=write, read=read)

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * super().flops(site, tokens)

    def saved_floats(self, site: Site, tokens: int) -> int:
        return 2 * super().saved_floats(site, tokens)
