"""Compositions: what any method can carry besides its own equation. They work on declared tensors and on outputs.

`mask` zeroes part of a method's matrices, `share` gives the sites of a kind one set of tensors, `gate` weighs the
change by what the text says, `drop` leaves out low layers at random while training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftscape.spaces.methods.base import Method, Tensor, Tensors
from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.sites import Site

SCORES = ("random", "magnitude", "snip", "grasp", "synflow")
#: Kinds of sites that are no module's input or output.
NO_OUTPUT = ("input", "model", "ladder")
#: No backbone has more.
MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask on a method's own matrices, drawn at initialisation and kept (SparseAdapter, arXiv:2210.04284).

    Args:
        sparsity: the zeroed fraction, 0 <= sparsity < 1 (the SparseAdapter code calls the kept fraction so).
        score: what is kept: `random`, `magnitude` (of the initial draw), `snip` (|gradient * value| on one batch,
            arXiv:1810.02340), `grasp` (value * Hessian-gradient product, arXiv:2002.07376) or `synflow`
            (|value * gradient of the data-free flow|, arXiv:2006.05467).
    """

    sparsity: float
    score: str = "random"

    def kept(self, size: int) -> int:
        """How many of `size` entries stay; at least one."""
        return max(1, size - round(self.sparsity * size))


@dataclass(frozen=True, kw_only=True)
class Share:
    """One prototype for all sites of a kind, and at each site a learned binary mask on it (ProPETL, arXiv:2305.17682).

    W_site = W * 1[s_site among its largest `kept` fraction], the gradient straight through to s. `kept = 1` shares
    without masks. (The ProPETL code calls the kept fraction sparsity.)
    """

    kept: float = 1.0

    def count(self, size: int) -> int:
        """Ones of a mask on `size` entries."""
        return max(1, round(self.kept * size))


GATE = "gate"


def composed(own: Tensors, site: Site, *, share: Share | None, gate: bool) -> Tensors:
    """The tensors of a method at a site with those of its compositions."""
    found: Tensors = {}
    for name, tensor in own.items():
        common = share is not None and tensor.trains and tensor.scope == "site"
        found[name] = dataclasses.replace(tensor, scope="kind") if common else tensor
        if share is not None and common and share.kept < 1 and len(tensor.shape) > 1:
            # Scores that learn apart from their start tell the sites apart: uniform, as the paper's.
            found[f"score_{name}"] = Tensor(tensor.shape, init="kaiming", binary=True)
    if gate:
        found |= {GATE: Tensor((site.d_in,)), f"{GATE}_bias": Tensor((1,))}
    return found


def shared_values(own: list[Own], share: Share) -> list[Own]:
    """At each site the prototype under its mask."""
    return [
        {name: _masked(name, value, row, share) for name, value in row.items() if not name.startswith("score_")}
        for row in own
    ]


def _masked(name: str, value: torch.Tensor, row: Own, share: Share) -> torch.Tensor:
    score = row.get(f"score_{name}")
    if score is None:
        return value
    chosen = top(score.detach(), share.count(score.numel())).to(value)
    return value * (chosen + (score - score.detach()))  # exactly the mask: the bracket is zero, with a gradient


def dropped_below(drop: int, source: torch.Generator | None) -> int:
    """The lowest layer that stays in this step: uniform from 0 to `drop` while training, 0 in evaluation."""
    import torch

    return int(torch.randint(drop + 1, (), generator=source)) if drop and source is not None else 0


def top(score: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest."""
    import torch

    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[torch.topk(score.reshape(-1), count).indices] = True
    return mask.view(score.shape)


def gated(x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, text: Any) -> torch.Tensor:
    """sigmoid(w x + b), averaged over each text (UniPELT, arXiv:2110.07577): lanes x texts x 1."""
    import torch

    mean: torch.Tensor = text.mean(torch.sigmoid(torch.baddbmm(bias.unsqueeze(1), x, gate.unsqueeze(-1))))
    return mean


def read_compositions(row: Mapping[str, Any], kind: type[Method], at: str, errors: list[str]) -> dict[str, Any]:
    """The compositions of a placement from what people write, or errors."""
    found: dict[str, Any] = {}
    if kind.execution == "solo":
        wanted = [key for key in ("mask", "share", "gate", "drop") if row.get(key)]
        errors += [f"{at}.{key}: {kind.name} has the backbone to itself, and takes no compositions" for key in wanted]
        return found
    if row.get("mask") is not None:
        found["mask"] = _mask(row["mask"], kind, f"{at}.mask", errors)
    if row.get("share") is not None:
        found["share"] = _share(row["share"], f"{at}.share", errors)
        if any(getattr(kind, hook) is not getattr(Method, hook) for hook in ("prepare", "after_step", "finish")):
            errors.append(f"{at}.share: {kind.name} sets tensors of its sites itself while it trains")
        elif kind.needs_weight and kind.start is not Method.start:
            errors.append(f"{at}.share: {kind.name} starts from the weights of each of its sites")
        elif kind.sites <= {"model"}:
            errors.append(f"{at}.share: {kind.name} has no tensors of sites")
    if row.get("gate") is not None:
        if not isinstance(row["gate"], bool):
            errors.append(f"{at}.gate: true or false was expected, not {row['gate']!r}")
        elif row["gate"] and kind.sites <= set(NO_OUTPUT):
            errors.append(f"{at}.gate: {kind.name} changes no site's output")
        else:
            found["gate"] = row["gate"]
    if row.get("drop") is not None:
        if not isinstance(row["drop"], int) or isinstance(row["drop"], bool) or not 0 <= row["drop"] <= MOST_LAYERS:
            errors.append(f"{at}.drop: a number of layers was expected, not {row['drop']!r:.60}")
        elif row["drop"] and kind.sites <= {*NO_OUTPUT, "kv"}:
            errors.append(f"{at}.drop: {kind.name} changes no site's output")
        else:
            found["drop"] = row["drop"]
    if found.get("mask") and found.get("share"):
        errors.append(f"{at}: a mask and shared tensors cannot be combined; share has masks of its own (kept)")
    return found


def written(mask: Mask | None, share: Share | None, gate: bool, drop: int) -> dict[str, Any]:
    """The canonical JSON of what is there."""
    found: dict[str, Any] = {}
    if mask:
        found["mask"] = {"sparsity": mask.sparsity, "score": mask.score}
    if share:
        found["share"] = {"kept": share.kept}
    return found | ({"gate": True} if gate else {}) | ({"drop": drop} if drop else {})


def _mask(row: Any, kind: type[Method], at: str, errors: list[str]) -> Mask | None:
    if not isinstance(row, Mapping) or "sparsity" not in row:
        errors.append(f'{at}: a table like {{"sparsity": 0.5, "score": "random"}} was expected')
        return None
    errors += [f"{at}.{k}: no such key{nearest(k, ('sparsity', 'score'))}" for k in row.keys() - {"sparsity", "score"}]
    sparsity, score = row["sparsity"], row.get("score", "random")
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        errors.append(f"{at}.sparsity: the zeroed fraction, from 0 to below 1, was expected, not {sparsity!r}")
        return None
    if score not in SCORES:
        errors.append(f'{at}.score: no score "{score}"{nearest(str(score), SCORES)}')
        return None
    if kind.size_knob is None:
        errors.append(f"{at}: {kind.name} has no matrix to mask")
        return None
    return Mask(sparsity=float(sparsity), score=score) if sparsity > 0 else None


def _share(row: Any, at: str, errors: list[str]) -> Share | None:
    kept = row.get("kept", 1.0) if isinstance(row, Mapping) else None
    if not isinstance(row, Mapping) or isinstance(kept, bool) or not isinstance(kept, (int, float)):
        errors.append(f'{at}: a table like {{"kept": 0.5}} was expected, not {row!r}')
        return None
    errors += [f"{at}.{k}: no such key{nearest(k, ('kept',))}" for k in row.keys() - {"kept"}]
    if not 0 < kept <= 1:
        errors.append(f"{at}.kept: a fraction above 0, up to 1, was expected, not {kept!r}")
        return None
    return Share(kept=float(kept))
