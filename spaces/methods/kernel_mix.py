"""Kernel-mix-lite: a low-rank change of its own for each attention head (Chen et al. 2022, arXiv:2205.03720)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import knob, ladder, log_uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.methods.lora import lora_in_peft

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site


class KernelMixLite(Method):
    """y_h + s B_h A_h x for each head h of q, k, v; on o y + s sum_h B_h A_h x_h, x_h from head h; B = 0 at first.

    A_h in R^{r x d_in}, B_h in R^{p x r} with p = d_out / H outputs a head: H r (d_in + p) parameters. On o A_h in
    R^{r x p} and B_h in R^{d_out x r}: H r (p + d_out). Kernel-mix adds a LoRA that all heads share: the published
    design `kernel_mix`, with placements of `lora`. After the authors' code (ychen-stat-ml/kernel-adapters), which has
    s = 1 and A, B at noise of 0.01 first, adds a bias to each head (`bitfit` here) and can let the change of v read
    the head's keys (not here). The paper could not be read: what it calls lite may be more than leaving out the LoRA.
    """

    name, category = "kernel_mix_lite", "reparameterised"
    sites = frozenset({"q", "k", "v", "o"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "rank", "r"

    rank: int = knob(ladder(1, 16), default=1)
    scale: float = knob(log_uniform(0.25, 16), default=1.0)

    def tensors(self, site: Site) -> Tensors:
        heads, width = site.heads, head_width(site)
        read, given = (width, site.d_out) if site.kind == "o" else (site.d_in, width)
        return {"A": Tensor((heads, self.rank, read), init="kaiming"), "B": Tensor((heads, given, self.rank))}

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        import torch

        heads, rank, read = p.A.shape[1:]
        if read == x.shape[-1]:
            z = torch.bmm(x, p.A.flatten(1, 2).mT) * p.scale
            return y + torch.einsum("lnhr,lhor->lnho", z.view(*z.shape[:2], heads, rank), p.B).flatten(2)
        apart = x.reshape(*x.shape[:2], heads, read)
        z = torch.einsum("lnhi,lhri->lnhr", apart, p.A).flatten(2) * p.scale
        return torch.baddbmm(y, z, p.B.mT.flatten(1, 2))

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * sum(t.size for t in self.tensors(site).values())

    def first_flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * self.tensors(site)["A"].size

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of A

    def saved_floats(self, site: Site, tokens: int) -> int:
        return tokens * site.heads * self.rank  # A x, for the gradient of B

    def check(self, site: Site) -> str | None:
        side, size = ("inputs", site.d_in) if site.kind == "o" else ("outputs", site.d_out)
        if size % site.heads:
            return f"the {size} {side} of {site.kind} do not divide into {site.heads} heads"
        if not 1 <= self.rank <= head_width(site):
            size_of = "smaller than 1" if self.rank < 1 else f"larger than a head ({head_width(site)} wide)"
            return f"rank: {self.rank} is {size_of}"
        return None

    def in_peft(self, site: Site) -> PeftForm:
        """A LoRA of rank H r, one of whose matrices has a block for each head and zeros elsewhere."""
        heads, first = site.heads, site.kind == "o"

        def write(own: Own) -> Own:
            a, b = own["A"], own["B"]
            lora_a = _block_diagonal(a) if first else a.flatten(0, 1)
            lora_b = b.transpose(0, 1).flatten(1) if first else _block_diagonal(b)
            return {"lora_A.weight": lora_a, "lora_B.weight": lora_b}

        def read(found: Own) -> Own:
            a, b = found["lora_A.weight"], found["lora_B.weight"]
            if first:
                return {"A": _blocks(a, heads), "B": b.reshape(len(b), heads, -1).transpose(0, 1)}
            return {"A": a.reshape(heads, -1, a.shape[1]), "B": _blocks(b, heads)}

        return lora_in_peft(site, heads * self.rank, self.scale, write=write, read=read)


def head_width(site: Site) -> int:
    """What a head reads of o and gives of the others."""
    return (site.d_in if site.kind == "o" else site.d_out) // site.heads


def _block_diagonal(blocks: Array) -> Array:
    """count x a x b as (count a) x (count b), zeros beside the blocks."""
    count, a, b = blocks.shape
    out = blocks.new_zeros(count, a, count, b)
    out[range(count), :, range(count)] = blocks
    return out.view(count * a, count * b)


def _blocks(x: Array, count: int) -> Array:
    """The inverse."""
    apart = x.reshape(count, len(x) // count, count, x.shape[1] // count)
    return apart[range(count), :, range(count)]
