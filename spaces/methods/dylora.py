"""DyLoRA: LoRA whose first b ranks are worth most, for every b (Valipour et al. 2023, arXiv:2210.07558)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import choice, knob
from peftscape.spaces.methods.lora import LoRA

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.sites import Site


class DyLoRA(LoRA):
    """y + (alpha / b) B[:, :b] A[:b] x, with b ~ U{1..r} anew in each training step, and b = r in evaluation.

    `only_last` trains row and column b alone and holds those before them (the paper's update "FRZ"). A step draws one b
    for all sites. With `scaling = "rslora"` the factor is alpha / sqrt(b).
    """

    name, category = "dylora", "reparameterised"

    only_last: bool = knob(choice(False, True), default=False)

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        import torch

        if source is None:
            return own
        b = int(torch.randint(1, self.rank + 1, (), generator=source))
        more = (self.rank / b) ** (1.0 if self.scaling == "standard" else 0.5)  # alpha / r is `apply`'s
        seen = []
        for t in own:
            a, up = t["A"][:b], t["B"][:, :b]
            if self.only_last:
                a = torch.cat([a[:-1].detach(), a[-1:]])
                up = torch.cat([up[:, :-1].detach(), up[:, -1:]], dim=1)
            seen.append({"A": a, "B": more * up})
        return seen
