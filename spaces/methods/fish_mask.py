"""FISH Mask: train the weights with the largest Fisher information (Sung et al. 2021, arXiv:2111.09839)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import knob, log_uniform
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.weight_change import WeightChange
from peftscape.spaces.ops import weights

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Own, Probe
    from peftscape.spaces.sites import Site


class FishMask(WeightChange):
    """(W + D) x, D zero but for k values at the largest F_i = mean over N examples of g_i^2; D = 0 at the start.

    k is `density` times the weights of all adapted linears, chosen among them all together, before training and for
    good (sec. 3). F is the empirical Fisher information: gradients of the loss at the true labels, an example at a
    time. Stored are the k values and their places; weights elsewhere are the backbone's own, whatever the decay.
    """

    name, category = "fish_mask", "partial"

    density: float = knob(log_uniform(2e-4, 0.1), default=0.005)
    examples: int = 256

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        count = max(1, round(self.density * weights.total(sites)))
        return {
            "values": Tensor((count,), scope="placement"),
            "index": Tensor((count,), scope="placement", trains=False, integer=True),
        }

    def prepare(self, own: list[Own], sites: tuple[Site, ...], probe: Probe) -> None:
        index = own[0]["index"]
        index.copy_(weights.largest(probe.squared_gradients(self.examples), len(index)))

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [{"delta": delta} for delta in weights.scatter(own[0]["values"], own[0]["index"], sites)]

    def check(self, site: Site) -> str | None:
        return None if self.density <= 1 else f"density: {self.density} is larger than 1"
