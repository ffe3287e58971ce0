"""LoKr: a Kronecker product with a low-rank factor (Yeh et al. 2023, arXiv:2309.14859; LyCORIS and peft)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import choice, knob, ladder, log_uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.ops.kronecker import kronecker, kronecker_flops, kronecker_saved
from peftscape.spaces.peft_form import PeftForm, plain_linear

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


class LoKr(Method):
    """y + (alpha / r) (W1 kron W2) x, W1 in R^{a1 x a2}, W2 in R^{b1 x b2}, a1 b1 = d_out, a2 b2 = d_in; W1 = 0.

    A factor is a product of rank r, W2 = W2a W2b, where r is below half its larger side: W2 always, W1 if
    `decompose` is `both` (then W1a = 0). `factor` divides d_in and d_out into sides; -1 takes those nearest to a root.
    """

    name, category = "lokr", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "rank", "r"

    rank: int = knob(ladder(1, 256), default=8)
    alpha: float = knob(log_uniform(1, 64), default=16.0)
    decompose: str = knob(choice("second", "both"), default="second")
    factor: int = -1

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of W1 and of W2."""
        (a1, b1), (a2, b2) = factors(site.d_out, self.factor), factors(site.d_in, self.factor)
        return (a1, a2), (b1, b2)

    def tensors(self, site: Site) -> Tensors:
        first, second = self.shapes(site)
        one = self._factor("w1", first, split=self.decompose == "both", zero=True)
        return one | self._factor("w2", second, split=True, zero=False)

    def _factor(self, name: str, shape: tuple[int, int], *, split: bool, zero: bool) -> Tensors:
        start = Tensor(shape, init="zeros" if zero else "kaiming")
        if not split or 2 * self.rank >= max(shape):
            return {name: start}
        return {
            f"{name}_a": Tensor((shape[0], self.rank), init=start.init),
            f"{name}_b": Tensor((self.rank, shape[1]), init="kaiming"),
        }

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [{name: _whole(name, row) for name in ("w1", "w2")} for row in own]

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return y + (p.alpha / p.rank) * kronecker(x, p.w1, p.w2)

    def in_peft(self, site: Site) -> PeftForm | str:
        tensors = self.tensors(site)
        return plain_linear(site, "LoKr") or PeftForm(
            kind="LOKR",
            axes={f"lokr_{name}": tensor.shape for name, tensor in tensors.items()},
            names={name: f"lokr_{name}" for name in tensors},
            config={
                "r": self.rank, "alpha": self.alpha, "decompose_both": self.decompose == "both",
                "decompose_factor": self.factor,
            },
        )  # fmt: skip

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if settings["peft_type"] != "LOKR":
            return None
        decompose, factor = "both" if settings.get("decompose_both") else "second", settings.get("decompose_factor", -1)
        return {
            "rank": settings["r"], "alpha": float(settings["alpha"]), "decompose": decompose, "factor": factor
        }  # fmt: skip

    def flops(self, site: Site, tokens: int) -> int:
        return kronecker_flops(tokens, *self.shapes(site))  # the factors are made once a step

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)  # for the gradient of W2

    def saved_floats(self, site: Site, tokens: int) -> int:
        return kronecker_saved(tokens, *self.shapes(site))

    def group_key(self, site: Site) -> tuple[object, ...]:
        return self.shapes(site)

    def check(self, site: Site) -> str | None:
        return None if self.rank >= 1 else f"rank: {self.rank} is not at least 1"


def _whole(name: str, row: Own) -> torch.Tensor:
    return row[name] if name in row else row[f"{name}_a"] @ row[f"{name}_b"]


def factors(width: int, factor: int) -> tuple[int, int]:
    """`width` as a product of two, the first the smaller one (LyCORIS' and peft's `factorization`).

    `factor` itself where it divides the width; otherwise the pair with the smallest sum whose smaller one is no larger
    than `factor` (-1: any).
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    limit = width if factor == -1 else factor
    pairs = [(n, width // n) for n in range(1, int(width**0.5) + 1) if width % n == 0 and n <= limit]
    return pairs[-1] if pairs else (1, width)
