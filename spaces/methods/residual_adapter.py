"""Residual adapter: a bottleneck with a LayerNorm of its own at the block's end (Lin et al. 2020, arXiv:2004.03829)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from peftscape.spaces import ops
from peftscape.spaces.methods.base import Lanes, Tensor, Tensors
from peftscape.spaces.methods.bottleneck import Bottleneck

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class ResidualAdapter(Bottleneck):
    """y + W_up sigma(W_down LN(y) + b_down) + b_up on a block's output, LN with a gain and a bias of its own.

    W_down N(0, 0.02), W_up = 0 and a gain of 1 at the start; once a block, so L(2dm + m + 3d) parameters.
    """

    name, category = "residual_adapter", "additive"
    sites = frozenset({"attention", "ffn", "block"})
    default_sites = ("block",)

    def tensors(self, site: Site) -> Tensors:
        made = super().tensors(site)
        made["down"] = dataclasses.replace(made["down"], init="normal")
        return {"gain": Tensor((site.d_out,), init="ones"), "shift": Tensor((site.d_out,)), **made}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        import torch

        normed = torch.nn.functional.layer_norm(y, y.shape[-1:])
        # W_down (n * gain + shift) as (W_down * gain) n + W_down shift: the tokens are multiplied and kept once.
        down = p.down * p.gain.unsqueeze(1)
        down_bias = p.down_bias + torch.bmm(p.down, p.shift.unsqueeze(-1)).squeeze(-1)
        return ops.adapter(y, down, down_bias, p.up, p.up_bias, self.activation, x=normed, size=p.size)

    def saved_floats(self, site: Site, tokens: int) -> int:
        # Besides y: its mean and deviation, and y normed.
        return tokens * (2 + site.d_out) + super().saved_floats(site, tokens)
