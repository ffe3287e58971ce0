"""Prefix tuning through an MLP that training alone needs (Li and Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import choice, knob, ladder, log_uniform
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class PrefixTuningMLP(PrefixTuning):
    """[P_k; P_v] = W_up tanh(W_down E + b_down) + b_up in every layer, E in R^{l x d}; then as prefix tuning.

    E, W_down (m' x d) and b_down serve all layers, W_up (2 d_kv x m') and b_up are a layer's own rows of the paper's
    one matrix: l d + d m' + m' + 2L(m' + 1) d_kv trained parameters. E is N(0, 1), the rest as torch starts a linear.
    All of it learns at `rate` times the lane's rate: a step of AdamW moves P by some m' / 2 times the MLP's rate, and a
    head from scratch, which the paper does not have, wants a hundred times as much.
    What is stored and deployed are the 2L l d_kv numbers of P alone, which every step makes anew.
    """

    name, category = "prefix_tuning_mlp", "additive"

    length: int = knob(ladder(1, 64), default=16)
    hidden: int = knob(ladder(16, 1024), default=512)
    rate: float = knob(log_uniform(1e-3, 1), default=0.01)
    positions: str = knob(choice("shift", "keep"), default="shift")

    def tensors(self, site: Site) -> Tensors:
        made = {name: Tensor(t.shape, trains=False) for name, t in super().tensors(site).items()}
        aside: dict[str, Any] = {"stored": False, "deployed": False, "rate": self.rate}
        return made | {
            "embedding": Tensor((self.length, site.d_in), init="own", scope="placement", **aside),
            "down": Tensor((self.hidden, site.d_in), init="kaiming", scope="placement", **aside),
            "down_bias": Tensor((self.hidden,), init="own", scope="placement", **aside),
            "up": Tensor((2 * site.d_out, self.hidden), init="kaiming", **aside),
            "up_bias": Tensor((2 * site.d_out,), init="own", **aside),
        }

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        import torch

        def bias(size: int, inputs: int) -> Array:
            return torch.empty(size).uniform_(-1, 1, generator=source) / math.sqrt(inputs)

        embedding = torch.empty(self.length, site.d_in).normal_(generator=source)
        down_bias, up_bias = bias(self.hidden, site.d_in), bias(2 * site.d_out, self.hidden)
        return {"embedding": embedding, "down_bias": down_bias, "up_bias": up_bias}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        # Zero values: nothing has been trained yet. A file has the prefix alone.
        if source is None and bool(own[0]["values"].any()):
            return [{name: row[name] for name in ("keys", "values")} for row in own]
        return _prefixes(own)

    def after_step(self, own: list[Own], step: int, steps: int) -> bool:
        for row, made in zip(own, _prefixes(own), strict=True):
            row["keys"].copy_(made["keys"])
            row["values"].copy_(made["values"])
        return False


def _prefixes(own: list[Own]) -> list[Own]:
    import torch

    hidden = torch.tanh(own[0]["embedding"] @ own[0]["down"].T + own[0]["down_bias"])
    pairs = [torch.chunk(hidden @ row["up"].T + row["up_bias"], 2, dim=1) for row in own]
    return [{"keys": keys, "values": values} for keys, values in pairs]
