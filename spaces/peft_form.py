"""How HF peft says what a method does: each method's own file tells it, `search/peft_format.py` writes and reads it.

Names and shapes are those of peft 0.21's files. Nothing here imports torch or peft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.sites import Site


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """A method at one site, in peft's terms.

    Args:
        kind: its `peft_type`.
        axes: its tensors of a module, by their names behind the module's path. A dimension is a number, or `in`, `out`
            (the module's widths; a part of a fused linear has its columns of `out`), `widest`, `tallest` (the largest
            of these), `rank` (changes of one module lie one after the other) or `beside` (those of all sites do).
        names: ours, and what they are called there.
        write, read: where that is not all: its tensors from ours at the site, and back; both are given the frozen
            `weight` and `bias` too where the method reads them, or `own` is set.
        config: entries of `adapter_config.json`; those that differ between modules become patterns where peft has such.
        rank, beside: the length of these dimensions.
        scale, scaled: of changes that add up: what peft's alpha / r must be, and the tensor that takes a factor where
            one module has several. The entries `ranked` and `lora_alpha` follow.
        rest: what is in its tensors where no site of ours is: 0 unless said.
        listed: entries of the configuration that list the module.
        common: of `axes`, the full names of those that all modules share.
        splits: whether a part of a fused linear can have it.
        virtual: whether it is made of virtual tokens, which peft keeps beside the model.
        own: the parameter of the module that its one tensor is; peft keeps such only beside an adapter of this kind.
        note: what it is and what to know about it, where the kind and the number of modules do not say so.
        pooled: what else to know about it behind a classifier.
    """

    kind: str
    axes: Mapping[str, tuple[str | int, ...]]
    names: Mapping[str, str] = field(default_factory=dict)
    write: Callable[[Own], Own] | None = None
    read: Callable[[Own], Own] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    beside: int = 0
    scale: float | None = None
    scaled: str = ""
    ranked: str = "r"
    rest: Mapping[str, float | Literal["row norms"]] = field(default_factory=dict)
    listed: tuple[str, ...] = ("target_modules",)
    common: tuple[str, ...] = ()
    splits: bool = False
    virtual: bool = False
    own: str = ""
    note: str = ""
    pooled: str = ""

    @property
    def adds(self) -> bool:
        """Whether its change is a sum of products of matrices, whatever else the module does."""
        return all("rank" in axes or name in self.common for name, axes in self.axes.items())

    def shape(self, name: str, widths: Mapping[str, int]) -> tuple[int, ...]:
        """Of one of its tensors, with these lengths of named dimensions."""
        return tuple(n if isinstance(n, int) else widths[n] for n in self.axes[name])

    def theirs(self, own: Own) -> Own:
        """peft's tensors from ours."""
        return self.write(own) if self.write else {theirs: own[ours] for ours, theirs in self.names.items()}

    def ours(self, found: Own) -> Own:
        """Our tensors from peft's."""
        return self.read(found) if self.read else {ours: found[theirs] for ours, theirs in self.names.items()}


def plain_linear(site: Site, kind: str) -> str | None:
    """Why peft's tuners that know `torch.nn.Linear` alone cannot adapt a site."""
    if site.transposed:
        return f"HF peft's {kind} takes no Conv1D, which the linears of this model are"
    return f"HF peft's {kind} cannot adapt a part of {site.path} alone" if site.span else None
