"""LoRA: a low-rank change beside a frozen linear (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces import ops
from peftscape.spaces.knobs import choice, knob, ladder, log_uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site


def check_rank(rank: int, site: Site) -> str | None:
    """A low rank is one that both sides of the linear have."""
    if not 1 <= rank <= min(site.d_in, site.d_out):
        size = "smaller than 1" if rank < 1 else "larger than the linear it adapts"
        return f"rank: {rank} is {size} ({site.kind}: {site.d_in} x {site.d_out})"
    return None


class LoRA(Method):
    """y + (alpha / r) B A x, with A in R^{r x d_in}, B in R^{d_out x r}; B = 0 at the start.

    The factor s is alpha / sqrt(r) with `scaling = "rslora"` (Kalajdzievski 2023, arXiv:2312.03732). `rate` is
    the learning rate of B over that of A, which is the lane's (LoRA+, Hayou et al. 2024, arXiv:2402.12354). `freeze_a`
    keeps A where it started (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
    """

    name, category = "lora", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "rank", "r"

    rank: int = knob(ladder(1, 256), default=8)
    alpha: float = knob(log_uniform(1, 64), default=16.0)
    scaling: str = knob(choice("standard", "rslora"), default="standard")
    rate: float = knob(log_uniform(1, 32), default=1.0)
    freeze_a: bool = knob(choice(False, True), default=False)

    @property
    def factor(self) -> float:
        """s, of one lane; `scale` is that of a group."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def scale(self, p: Lanes) -> Array:
        scale: Array = p.alpha / (p.rank if self.scaling == "standard" else p.rank.sqrt())
        return scale

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": Tensor((self.rank, site.d_in), init="kaiming", trains=not self.freeze_a),
            "B": Tensor((site.d_out, self.rank), init="zeros", rate=self.rate),
        }

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        return ops.low_rank(x, y, p.each("A"), p.each("B"), self.scale(p))

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * self.rank * (site.d_in + site.d_out)

    def fixed_flops(self, site: Site, tokens: int) -> int:
        return self.flops(site, tokens) * site.d_in // (site.d_in + site.d_out) if self.freeze_a else 0

    def keeps(self, site: Site) -> tuple[str, ...]:
        return () if self.freeze_a else ("x",)  # for the gradient of A

    def saved_floats(self, site: Site, tokens: int) -> int:
        return tokens * self.rank  # A x, for the gradient of B

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def in_peft(self, site: Site) -> PeftForm:
        return lora_in_peft(site, self.rank, self.factor, names={"A": "lora_A.weight", "B": "lora_B.weight"})

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if cls is not LoRA or settings["peft_type"] != "LORA" or any(settings.get(entry) for entry in BEYOND):
            return None
        # The biases of `bias = "all"` are BitFit's.
        if settings.get("bias") not in (None, "none", "all") or settings.get("init_lora_weights") not in SAME_MAP:
            return None
        scaling = "rslora" if settings.get("use_rslora") else "standard"
        return {"rank": settings["r"], "alpha": float(settings["lora_alpha"]), "scaling": scaling}


#: Entries of peft's configuration that make another map of a LoRA, or adapt other things than linears.
BEYOND = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "lora_bias", "layer_replication", "arrow_config",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters", "megatron_config", "velora_config",
)  # fmt: skip
#: Starts after which the base weights are what they were (PiSSA's, OLoRA's, LoftQ's and others are not).
SAME_MAP = (None, True, False, "gaussian", "eva", "orthogonal")


def lora_in_peft(
    site: Site,
    rank: int,
    scale: float,
    *,
    names: Mapping[str, str] | None = None,
    write: Callable[[Own], Own] | None = None,
    read: Callable[[Own], Own] | None = None,
    **config: Any,
) -> PeftForm:
    """A change that is a product of two matrices is peft's LoRA, whatever made it."""
    return PeftForm(
        kind="LORA",
        axes={"lora_A.weight": ("rank", "in"), "lora_B.weight": ("out", "rank")},
        names=names or {},
        write=write,
        read=read,
        config={
            "fan_in_fan_out": site.transposed, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, **config
        },
        rank=rank,
        scale=scale,
        scaled="lora_B.weight",
        splits=True,
    )  # fmt: skip
