"""LoHa: a change that is an element-wise product of two low-rank ones (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import knob, ladder, log_uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.methods.lora import check_rank
from peftscape.spaces.peft_form import PeftForm, plain_linear

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site


class LoHa(Method):
    """y + (alpha / r) ((W1a W1b) * (W2a W2b)) x, Wa in R^{d_out x r}, Wb in R^{r x d_in}; W2b = 0 at the start.

    The change has rank up to r^2 and is made whole, once a step.
    """

    name, category = "loha", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "rank", "r"

    rank: int = knob(ladder(1, 256), default=8)
    alpha: float = knob(log_uniform(1, 64), default=16.0)

    def tensors(self, site: Site) -> Tensors:
        tall, wide = (site.d_out, self.rank), (self.rank, site.d_in)
        return {
            "w1a": Tensor(tall, init="kaiming"),
            "w1b": Tensor(wide, init="kaiming"),
            "w2a": Tensor(tall, init="kaiming"),
            "w2b": Tensor(wide),
        }

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        change = (p.alpha / p.rank) * (p.w1a @ p.w1b) * (p.w2a @ p.w2b)
        return y + x @ change.mT

    def in_peft(self, site: Site) -> PeftForm | str:
        names = {f"w{n}{side}": f"hada_w{n}_{side}" for n in "12" for side in "ab"}
        return plain_linear(site, "LoHa") or PeftForm(
            kind="LOHA",
            axes={
                theirs: ("out", self.rank) if ours[-1] == "a" else (self.rank, "in") for ours, theirs in names.items()
            },
            names=names,
            config={"r": self.rank, "alpha": self.alpha},
        )

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if settings["peft_type"] != "LOHA":
            return None
        return {"rank": settings["r"], "alpha": float(settings["alpha"])}

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * site.d_in * site.d_out

    def first_flops(self, site: Site, tokens: int) -> int:
        return self.flops(site, tokens)  # one product

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of the change

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)
