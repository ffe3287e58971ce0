"""Threshold-Mask: learn which weights to leave out (Zhao et al. 2020, arXiv:2004.12406)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import knob, log_uniform
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.weight_change import WeightChange

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class ThresholdMask(WeightChange):
    """(W * 1[s > tau]) x, one score s a weight, its gradient straight through the threshold (sec. 3).

    s ~ U(0, 1) at the start, so that tau is the fraction masked then (5 % in the paper): the start is not the
    backbone. Stored is one bit a weight; the backbone's values do not change.
    """

    name, category = "threshold_mask", "partial"
    exact_start = False
    needs_weight = True

    threshold: float = knob(log_uniform(0.005, 0.2), default=0.05)

    def tensors(self, site: Site) -> Tensors:
        return {"score": Tensor((site.d_out, site.d_in), init="own", binary=True)}

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        import torch

        return {"score": torch.rand(site.d_out, site.d_in, generator=source)}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [{"delta": row["weight"] * (self._mask(row["score"]) - 1)} for row in own]

    def _mask(self, score: Array) -> Array:
        kept = score.detach()
        return (kept > self.threshold).to(score) + score - kept

    def finish(self, own: list[Own], sites: tuple[Site, ...]) -> None:
        for row in own:
            row["score"].copy_(row["score"] > self.threshold)

    def check(self, site: Site) -> str | None:
        return None if self.threshold < 1 else f"threshold: {self.threshold} masks everything"
