"""AdaLoRA: singular triplets whose number is cut to a budget by importance (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces import ops
from peftscape.spaces.knobs import integer, knob, log_uniform, uniform
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors
from peftscape.spaces.methods.lora import check_rank
from peftscape.spaces.peft_form import PeftForm

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array, Own
    from peftscape.spaces.sites import Site

TRAINED = ("A", "B", "E")


class AdaLoRA(Method):
    """y + (alpha / r) B diag(E) A x, A in R^{r x d_in}, B in R^{d_out x r}, E in R^r; E = 0, A, B ~ N(0, 0.02).

    (The paper's P, Lambda and Q.) Every `every` steps the triplets of all sites of the placement are ranked by
    importance, the smoothed |value * gradient| times its uncertainty (eq. 8 to 11: E_i + mean A_i + mean B_i), and E of
    all but the first b is set to zero. b falls from r a site to `kept` of that on a cubic schedule (eq. 12) between the
    first `warm` and the last `hold` of the steps; then the choice stays. The penalty is `orthogonality` times the mean
    over all A and B of ||A A^T - I||_F, ||B^T B - I||_F, as in the authors' code and HF peft.
    """

    name, category = "adalora", "reparameterised"
    sites = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
    default_sites = ("q", "v")
    merges = True
    size_knob, letter = "rank", "r"

    rank: int = knob(integer(2, 64, log=True), default=12)
    alpha: float = knob(log_uniform(1, 64), default=32.0)
    kept: float = knob(uniform(0.1, 1), default=2 / 3)
    warm: float = 0.1
    hold: float = 0.3
    every: int = 1
    beta: float = 0.85
    beta_uncertainty: float = 0.85
    orthogonality: float = 0.5

    def tensors(self, site: Site) -> Tensors:
        shapes = {"A": (self.rank, site.d_in), "B": (site.d_out, self.rank), "E": (self.rank, 1)}
        found = {name: Tensor(shape, init="zeros" if name == "E" else "normal") for name, shape in shapes.items()}
        for name, shape in shapes.items():  # what the schedule remembers
            for kind in ("importance", "uncertainty"):
                found[f"{kind}_{name}"] = Tensor(shape, trains=False, stored=False, deployed=False)
        return found | {"alive": Tensor((self.rank, 1), init="ones", trains=False, stored=False, deployed=False)}

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        return [{"A": t["A"] * t["E"], "B": t["B"]} for t in own]

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        scale = p.alpha / (p.rank + 1e-5)  # 1e-5 as in the authors' code
        return ops.low_rank(x, y, p.each("A"), p.each("B"), scale)

    def penalty(self, own: list[Own]) -> Array:
        import torch

        grams = [gram for t in own for gram in (t["A"] @ t["A"].mT, t["B"].mT @ t["B"])]
        far = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.orthogonality * torch.stack(far).mean()

    def budget(self, step: int, steps: int, sites: int) -> int:
        """How many triplets of all sites stay after a step (eq. 12)."""
        first, last = sites * self.rank, max(1, round(self.kept * sites * self.rank))
        start, end = self._ends(steps)
        if step <= start:
            return first
        left = max(0.0, 1 - (step - start) / max(1, end - start))
        return int((first - last) * left**3 + last)

    def _ends(self, steps: int) -> tuple[int, int]:
        """The last step with all triplets, and that after which the choice stays."""
        end = steps - round(self.hold * steps)
        return min(round(self.warm * steps), end - 1), end

    def after_step(self, own: list[Own], step: int, steps: int) -> bool:
        start, end = self._ends(steps)
        if step < end:
            self._weigh(own)
        if step == end or (start < step < end and step % self.every == 0):
            self._choose(own, self.budget(step, steps, len(own)))
        if step >= end or step % self.every == 0:
            for t in own:
                t["E"].mul_(t["alive"])
        return False

    def _weigh(self, own: list[Own]) -> None:
        """Smooth the sensitivity |value * gradient| and its uncertainty."""
        for t in own:
            for name in TRAINED:
                gradient = t[name].grad
                assert gradient is not None
                now, mean, spread = (t[name] * gradient).abs(), t[f"importance_{name}"], t[f"uncertainty_{name}"]
                mean.mul_(self.beta).add_(now, alpha=1 - self.beta)
                spread.mul_(self.beta_uncertainty).add_((now - mean).abs(), alpha=1 - self.beta_uncertainty)

    def _choose(self, own: list[Own], budget: int) -> None:
        """Keep the `budget` most important triplets of all sites."""
        import torch

        scores = []
        for t in own:
            a, b, e = (t[f"importance_{name}"] * t[f"uncertainty_{name}"] for name in TRAINED)
            scores.append(a.mean(dim=1) + b.mean(dim=0) + e[:, 0])
        alive = torch.zeros(len(own) * self.rank, dtype=scores[0].dtype, device=scores[0].device)
        alive[torch.cat(scores).topk(budget).indices] = 1
        for t, mine in zip(own, alive.view(len(own), self.rank), strict=True):
            t["alive"].copy_(mine.unsqueeze(1))

    def in_peft(self, site: Site) -> PeftForm:
        return PeftForm(
            kind="ADALORA",
            axes={"lora_A": ("rank", "in"), "lora_B": ("out", "rank"), "lora_E": ("rank", 1)},
            names={name: f"lora_{name}" for name in TRAINED},
            config={
                "target_r": max(1, round(self.kept * self.rank)),
                "beta1": self.beta, "beta2": self.beta_uncertainty, "orth_reg_weight": self.orthogonality,
                "deltaT": self.every, "tinit": 0, "tfinal": 0, "total_step": 1,
                "fan_in_fan_out": site.transposed, "lora_dropout": 0.0,
            },
            rank=self.rank,
            scale=self.alpha / self.rank,
            scaled="lora_B",
            ranked="init_r",
            splits=True,
        )  # fmt: skip

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        if settings["peft_type"] != "ADALORA" or settings.get("rank_pattern"):
            return None  # cut to unequal ranks
        kept = min(1.0, settings["target_r"] / settings["init_r"])
        return {"rank": settings["init_r"], "alpha": float(settings["lora_alpha"]), "kept": kept}

    def flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * self.rank * (site.d_in + site.d_out)

    def keeps(self, site: Site) -> tuple[str, ...]:
        return ("x",)

    def saved_floats(self, site: Site, tokens: int) -> int:
        return tokens * self.rank

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)
