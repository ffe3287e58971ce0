"""LN tuning: train the gains and biases of the norms (Qi et al. 2022, arXiv:2211.08682)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import choice, knob
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site, SiteMap


class LNTuning(Method):
    """y + n(x) * dg + db, n(x) the normalised input; dg and db in R^d, the changes of gain and bias, 0 at the start.

    An RMSNorm has no bias and gets none. `after = "attention"` takes the norm after each attention alone.
    """

    name, category = "ln_tuning", "partial"
    sites = frozenset({"norm"})
    default_sites = ("norm",)
    merges = True
    needs_weight = True

    after: str = knob(choice("all", "attention"), default="all")

    def takes(self, site: Site, sites: SiteMap) -> bool:
        if self.after == "all":
            return True
        here = [s for s in sites.sites if s.kind == "norm" and s.layer == site.layer and s.d_out == sites.d_model]
        # The second norm of a pre-norm layer reads the sum with the attention's output, as the first of the others.
        return site.layer >= 0 and site in (here[1:2] if sites.norm_place == "pre" else here[:1])

    def tensors(self, site: Site) -> Tensors:
        return {"gain": Tensor((site.d_out,))} | ({"shift": Tensor((site.d_out,))} if site.bias else {})

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        change = p.normalise(x) * p.gain.unsqueeze(1)
        return y + change + (p.shift.unsqueeze(1) if hasattr(p, "shift") else 0)

    def in_peft(self, site: Site) -> PeftForm:
        # peft keeps the norm itself, not its change.
        frozen = {"gain": "weight"} | ({"shift": "bias"} if site.bias else {})
        return PeftForm(
            kind="LN_TUNING",
            axes={f"ln_tuning_layers.{there}": ("out",) for there in frozen.values()},
            write=lambda own: {f"ln_tuning_layers.{there}": own[there] + own[ours] for ours, there in frozen.items()},
            read=lambda found: {
                ours: found[f"ln_tuning_layers.{there}"] - found[there] for ours, there in frozen.items()
            },
        )

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        return {} if settings["peft_type"] == "LN_TUNING" else None

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # the norm is there already; its change folds into it

    def saved_floats(self, site: Site, tokens: int) -> int:
        # What is normalised, for the gain; a LayerNorm's centred input besides (an RMSNorm's is kept by the norm).
        return tokens * site.d_out * (2 if site.bias else 1)
