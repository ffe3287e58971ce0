"""LoReFT: edit hidden states in a low-rank subspace at some tokens (Wu et al. 2024, arXiv:2404.03592)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import integer, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class LoReFT(Method):
    """h + R^T (W h + b - R h) on a layer's output h at the first f and the last l tokens of each text.

    R and W in R^{r x d}, b in R^r, the rows of R orthonormal: what trains is V in R^{r x d}, R^T the first factor of
    V^T = R^T U with U upper triangular, its diagonal positive. W is drawn at random as in the paper's code, so that
    no start equals the backbone. Virtual tokens count as the first of their text.
    A language model's tokens are those of the prompt, as in the paper's generation tasks.
    """

    name, category = "loreft", "reparameterised"
    sites = frozenset({"block"})
    default_sites = ("block",)
    exact_start = False
    needs_text = True
    size_knob, letter = "rank", "r"

    rank: int = knob(ladder(1, 64), default=4)
    first: int = knob(integer(0, 16), default=7)
    last: int = knob(integer(0, 16), default=7)

    def tensors(self, site: Site) -> Tensors:
        shape = (self.rank, site.d_out)
        return {
            "V": Tensor(shape, init="kaiming"),
            "W": Tensor(shape, init="kaiming"),
            "b": Tensor((self.rank,)),
        }

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [{"R": orthonormal(row["V"]), "W": row["W"], "b": row["b"]} for row in own]

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        import torch

        change = torch.baddbmm(p.b.unsqueeze(1), y, (p.W - p.R).mT) @ p.R
        text, first, last = p.text, p.first.squeeze(-1), p.last.squeeze(-1)
        end = text.length if text.context is None else text.context
        here = (text.place < first) | (text.place >= end - last)
        inside = here & (text.place < end) & (text.row < text.texts)
        return y + torch.where(inside.unsqueeze(-1), change, change.new_zeros(()))

    def flops(self, site: Site, tokens: int) -> int:
        return 4 * tokens * self.rank * site.d_out

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("y",)  # for the gradient of W - R

    def saved_floats(self, site: Site, tokens: int) -> int:
        return tokens * self.rank  # W h + b - R h, for the gradient of R

    def check(self, site: Site) -> str | None:
        if self.first + self.last < 1:
            return "first: no token is edited"
        if self.rank > site.d_out:
            return f"rank: {self.rank} is larger than the hidden state ({site.d_out})"
        return None


def orthonormal(v: Array) -> Array:
    """Rows of an r x d matrix made orthonormal from the first to the last, each on its own side."""
    import torch

    q, upper = torch.linalg.qr(v.mT)
    rows: Array = (q * upper.diagonal().sign()).mT
    return rows
