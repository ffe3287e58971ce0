"""Intrinsic SAID: train in a small random subspace of the weights (Aghajanyan et al. 2020, arXiv:2012.13255)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import knob, ladder
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.weight_change import WeightChange
from peftscape.spaces.ops.fastfood import fastfood

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class IntrinsicSAID(WeightChange):
    """(W_i + lambda_i M_i theta) x for each of k adapted weights W_i, with theta in R^{d' - k}: d' numbers in all.

    M_i is a Fastfood projection onto the entries of W_i, made again from the seed that the file holds; theta = 0 and
    lambda = 1 at the start. With d' up to k, theta has one entry.
    """

    name, category = "intrinsic_said", "reparameterised"
    default_sites = ("q", "v")
    size_knob, letter = "size", "d"

    size: int = knob(ladder(64, 131072), default=1024)

    def tensors(self, site: Site) -> Tensors:
        return {"scale": Tensor((1,), init="ones")}

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        return {
            "theta": Tensor((max(1, self.size - len(sites)),), scope="placement"),
            "seed": Tensor((1,), init="own", scope="placement", trains=False, integer=True),
        }

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        import torch

        return {"seed": torch.randint(2**31 - 1, (1,), generator=source)}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        seed = int(own[0]["seed"]) << 32
        rows = []
        for row, site in zip(own, sites, strict=True):
            here = seed + zlib.crc32(f"{site.kind}/{site.path}".encode())
            change = row["scale"] * fastfood(row["theta"], site.d_out * site.d_in, here)
            rows.append({"delta": change.view(site.d_out, site.d_in)})
        return rows

    def check(self, site: Site) -> str | None:
        if self.size > site.d_in * site.d_out:
            return f"size: {self.size} is more than the weights of {site.kind} ({site.d_in} x {site.d_out})"
        return None
