"""Tiny-attention adapter: one narrow attention head as an adapter (Zhao et al. 2022, arXiv:2211.01979)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class TinyAttention(Method):
    """y + W_o softmax(W_q y (W_k y)^T / sqrt(m)) W_v y on the attention's output, each text by itself; W_o = 0.

    W_q, W_k, W_v in R^{m x d}, W_o in R^{d x m}: 4 L m d parameters. A token of a decoder sees those before it.
    """

    name, category = "tiny_attention", "additive"
    sites = frozenset({"attention", "ffn"})
    default_sites = ("attention",)
    size_knob, letter = "size", "m"
    needs_text = True

    size: int = knob(ladder(1, 64), default=4)

    def tensors(self, site: Site) -> Tensors:
        read = Tensor((self.size, site.d_out), init="kaiming")
        return {"query": read, "key": read, "value": read, "out": Tensor((site.d_out, self.size))}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [
            row | {"causal": row["out"].new_full((1,), float(not site.reads_source))}
            for row, site in zip(own, sites, strict=True)
        ]

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        import torch

        read = torch.cat([p.query * p.size**-0.5, p.key, p.value], dim=1)
        q, k, v = p.text.rows(y @ read.mT).chunk(3, dim=-1)  # lanes x texts x longest x m
        here = p.text.rows(torch.ones_like(y[..., :1])).transpose(2, 3) > 0
        place = torch.arange(q.shape[2], device=y.device)
        q, late = q[:, :, p.text.since :], place > place[p.text.since :, None]
        late = late & (p.causal[..., None, None] > 0)
        scores = (q @ k.mT).masked_fill(~here | late, torch.finfo(y.dtype).min)
        return y + p.text.flat(scores.softmax(dim=-1) @ v) @ p.out.mT

    def flops(self, site: Site, tokens: int) -> int:
        return 8 * tokens * site.d_out * self.size + 4 * tokens**2 * self.size

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("y",)

    def saved_floats(self, site: Site, tokens: int) -> int:
        # q, k, v and what `out` reads; the softmax and what is masked of it; where each token lies (8 bytes).
        return tokens * (4 * self.size + tokens + tokens // 2 + 4)

    def check(self, site: Site) -> str | None:
        return (
            f"size: {self.size} is wider than the {site.kind} output ({site.d_out})" if self.size > site.d_out else None
        )
