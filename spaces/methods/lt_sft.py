"""LT-SFT: the lottery-ticket sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import knob, log_uniform
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.weight_change import WeightChange
from peftscape.spaces.ops import weights

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.sites import Site


class LTSFT(WeightChange):
    """(W + M * D) x: D trains whole, then M takes the k largest |D|, D goes back to 0 and trains under M (sec. 3).

    The first `first_phase` of the steps finds the mask, the rest trains; the optimiser starts anew between them, the
    learning rate's schedule spans both. Stored are k values, `density` times all adapted weights, and their places.
    """

    name, category = "lt_sft", "partial"

    density: float = knob(log_uniform(2e-3, 0.2), default=0.05)
    first_phase: float = 0.5

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        size = weights.total(sites)
        return {
            "delta": Tensor((size,), scope="placement", kept=self._kept(size)),
            "chosen": Tensor((size,), init="ones", scope="placement", trains=False, stored=False, deployed=False),
        }

    def _kept(self, size: int) -> int:
        return max(1, round(self.density * size))

    def phase_end(self, steps: int) -> int:
        """The last step of the first phase: one is left for each, where there are two."""
        return max(1, min(round(self.first_phase * steps), steps - 1))

    def after_step(self, own: list[Own], step: int, steps: int) -> bool:
        if step != self.phase_end(steps):
            return False
        delta, chosen = own[0]["delta"], own[0]["chosen"]
        index = weights.largest([delta.abs()], self._kept(len(delta)))
        chosen.zero_()[index] = 1
        delta.zero_()
        return True

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [{"delta": part} for part in weights.split(own[0]["delta"] * own[0]["chosen"], sites)]

    def check(self, site: Site) -> str | None:
        if not 0 < self.first_phase < 1:
            return f"first_phase: a fraction of the steps was expected, not {self.first_phase}"
        return None if self.density <= 1 else f"density: {self.density} is larger than 1"
