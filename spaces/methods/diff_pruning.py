"""Diff pruning: a sparse change of the weights under a relaxed L0 penalty (Guo et al. 2021, arXiv:2012.07463)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import knob, log_uniform
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.lt_sft import LTSFT
from peftscape.spaces.ops import weights

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site

#: The stretched interval of the hard-concrete gate, and where log alpha starts (app. A.1).
LOW, HIGH, START = -1.5, 1.5, 5.0
#: Log alpha's learning rate over that of w: 0.1 beside 1e-3. The authors have 0.1 beside 5e-5.
RATE = 100.0


class DiffPruning(LTSFT):
    """(W + z * w) x, z hard-concrete with a location log alpha a weight: z = clip(sigmoid(log u - log(1-u) + log
    alpha)(h - l) + l, 0, 1), u ~ U(0, 1), (l, h) = (-1.5, 1.5); the loss gains `penalty_weight` times the sum of
    P(z > 0) = sigmoid(log alpha - log(-l / h)) over all weights (eq. 4 to 6), so that what moves a log alpha does not
    depend on how many there are.

    After `first_phase` of the steps the k largest |z * w| stay, z taken without noise, and are fine-tuned with z = 1
    (sec. 3.2); the optimiser starts anew. The authors' weight, 1.25e-7, is for tens of thousands of steps: its gradient
    is far below Adam's epsilon, and gates would stay where they begin in a few hundred. Evaluation has no noise. w = 0
    at the start.
    """

    name, category = "diff_pruning", "partial"

    density: float = knob(log_uniform(2e-3, 0.2), default=0.005)
    penalty_weight: float = knob(log_uniform(1e-7, 1e-3), default=1e-5)

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        size = weights.total(sites)
        # What is read from a file has w = 0 where nothing was kept, and alpha's start has z = 1 without noise.
        return super().shared(sites) | {
            "alpha": Tensor((size,), init="zeros", scope="placement", stored=False, deployed=False, rate=RATE)
        }

    def penalty(self, own: list[Own]) -> Array | None:
        import torch

        row = own[0]
        open_gates = torch.sigmoid(row["alpha"] + START - math.log(-LOW / HIGH)).sum()
        return self.penalty_weight * open_gates * (row["chosen"].min() > 0)

    def after_step(self, own: list[Own], step: int, steps: int) -> bool:
        if step != self.phase_end(steps):
            return False
        delta, chosen, alpha = (own[0][name] for name in ("delta", "chosen", "alpha"))
        delta.mul_(_gate(alpha, None))
        index = weights.largest([delta.abs()], self._kept(len(delta)))
        chosen.zero_()[index] = 1
        delta.mul_(chosen)
        return True

    def check(self, site: Site) -> str | None:
        if self.density >= 1:
            return f"density: below 1 was expected, not {self.density}: with all weights kept nothing is pruned"
        return super().check(site)

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        delta, chosen, alpha = (own[0][name] for name in ("delta", "chosen", "alpha"))
        relaxed = bool(chosen.min() > 0)
        value = _gate(alpha, source) * delta if relaxed else chosen * delta
        return [{"delta": part} for part in weights.split(value, sites)]


def _gate(alpha: Any, source: torch.Generator | None) -> Any:
    """The hard-concrete gate; `alpha` is counted from its start, so that it may begin at zero."""
    import torch

    location = alpha + START
    if source is not None:
        location = location + torch.logit(torch.rand(alpha.shape, generator=source), eps=1e-6).to(alpha)
    return (torch.sigmoid(location) * (HIGH - LOW) + LOW).clamp(0, 1)
