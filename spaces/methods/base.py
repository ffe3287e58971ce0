"""The contract of a method: it declares its tensors and writes its equation; the engine does the rest.

The engine adds the lane dimension, pads unequal sizes with zeros, initialises, counts, trains, saves and loads.
A file in this folder with one subclass of `Method` adds a method; nothing else changes anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, dataclass_transform

from peftscape.spaces.knobs import Domain, knob
from peftscape.spaces.ops import reference

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site, SiteMap
    from peftscape.spaces.text import Text

    Array = torch.Tensor
    Own = dict[str, torch.Tensor]
    Each = torch.Tensor | list[torch.Tensor]

Init = Literal["zeros", "ones", "kaiming", "he", "normal", "vocabulary", "own"]
Scope = Literal["site", "kind", "layer", "placement"]


@dataclass(frozen=True)
class Tensor:
    """One declared tensor.

    Args:
        shape: without the lane dimension.
        init: `kaiming` is uniform in +-1/sqrt(fan in), as torch's linears and LoRA's A start; `he` in +-sqrt(6/fan in);
            `normal` has standard deviation 0.02; `vocabulary` takes rows of the backbone's embedding, drawn by the
            lane's seed; `own` is made by the method's `start`.
        scope: one for each site, or shared by the sites of one kind, by a layer or by the whole placement (made and
            counted once).
        trains: false for fixed tensors and for what a method remembers between steps.
        stored: written to an adapter's file; one that is not is made by `init` again when the file is read.
        deployed: needed at inference.
        rate: a multiple of the lane's learning rate.
        kept: of a tensor that is sparse when trained, how many entries are not zero: the file holds those alone.
        binary: zeros and ones when trained (a learned mask): the file holds one bit an entry.
        integer: positions rather than numbers.
    """

    shape: tuple[int, ...]
    init: Init = "zeros"
    scope: Scope = "site"
    trains: bool = True
    stored: bool = True
    deployed: bool = True
    rate: float = 1.0
    kept: int | None = None
    binary: bool = False
    integer: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Tensors = dict[str, Tensor]


class Lanes:
    """What `apply` sees of a group of lanes: `p.A` is lanes x shape, padded with zeros; `p.alpha` is lanes x 1 x 1.

    Both are tensors; a name that is neither is a mistake in the method, and says so. A method with `needs_weight`
    finds the frozen `p.weight` (d_out x d_in; a norm's gain) and `p.bias` (None where there is none), without a lane
    dimension, and for a norm `p.normalise(x)`, before gain and bias, and `p.norm(x)`, all of it; one with
    `needs_text` finds `p.text`, a `peftscape.spaces.text.Text`.
    """

    weight: Array
    bias: Array | None
    normalise: Callable[[Array], Array]
    norm: Callable[[Array], Array]
    text: Text

    def __init__(
        self,
        values: Mapping[str, Any],
        own: Mapping[str, list[Array]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`values` are there as they are; of `own`, each lane's own tensors by name, what is asked for is stacked."""
        self.__dict__.update(values)
        self.__dict__["_own"], self.__dict__["_dtype"] = own or {}, dtype

    def each(self, name: str) -> Each:
        """A declared tensor as each lane holds it, unpadded, for operations of `ops` that take it so."""
        own: Mapping[str, list[Array]] = self.__dict__["_own"]
        return own[name] if name in own else getattr(self, name)

    def given(self, values: Mapping[str, Any], *, without: Collection[str] = ()) -> Lanes:
        """The same with further values, and without some."""
        kept = {k: v for k, v in self.__dict__.items() if k not in (*without, "_own", "_dtype")}
        return Lanes({**kept, **values}, self.__dict__["_own"], self.__dict__["_dtype"])

    def __getattr__(self, name: str) -> Array:
        own: list[Array] | None = self.__dict__["_own"].get(name)
        if own is None:
            raise AttributeError(f'a method asked for "{name}", which it neither declares as a tensor nor as a knob')
        self.__dict__[name] = reference.stacked(own, self.__dict__["_dtype"])
        found: Array = self.__dict__[name]
        return found


class Probe(Protocol):
    """A lane's look at the training data before its first step, for `prepare`."""

    def squared_gradients(self, count: int) -> list[Array]:
        """Mean over `count` examples of the loss's squared gradient for each site's frozen weight (true batch 1)."""

    def gradients(self, count: int) -> list[Array]:
        """The mean gradient of the loss over `count` examples for each site's frozen weight."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(knob,))
class Method:
    """A way to adapt sites. Subclasses are frozen dataclasses; their fields are knobs."""

    name: ClassVar[str]
    category: ClassVar[Literal["additive", "partial", "reparameterised", "hybrid", "unified", "reference"]]
    execution: ClassVar[Literal["packed", "rewritten", "solo"]] = "packed"
    #: Kinds of sites it can adapt, and those it takes when a design names none.
    sites: ClassVar[frozenset[str]]
    default_sites: ClassVar[tuple[str, ...]]
    #: Whether the adapted model equals the backbone before the first step.
    exact_start: ClassVar[bool] = True
    #: Whether its change folds into the backbone's weights.
    merges: ClassVar[bool] = False
    #: The knob that says how large it is, for labels and size limits; and its letter in labels.
    size_knob: ClassVar[str | None] = None
    letter: ClassVar[str] = ""
    #: A lone method: nothing else can be in its design.
    alone: ClassVar[bool] = False
    #: Whether it reads the frozen weights of its sites, or where tokens stand in their texts.
    needs_weight: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        # `alpha = 16` and `alpha = 16.0` are one design with one digest.
        for f in fields(self):  # type: ignore[arg-type]
            if isinstance(f.default, float) and type(getattr(self, f.name)) is int:
                object.__setattr__(self, f.name, float(getattr(self, f.name)))

    def takes(self, site: Site, sites: SiteMap) -> bool:
        """Whether it adapts this site, of a kind that it was given, in this backbone."""
        return True

    def tensors(self, site: Site) -> Tensors:
        """The tensors that adapt one site."""
        raise NotImplementedError

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        """Tensors of scope `placement` whose shapes depend on all sites that a placement adapts."""
        return {}

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        """The tensors of one site that are declared with `init="own"`, by name.

        Args:
            frozen: `weight` (d_out x d_in) and `bias` (or None) of the site, in float32 or float64.
            source: random numbers of the lane's seed and this site; shared tensors are taken from the first site.
        """
        raise NotImplementedError

    def prepare(self, own: list[Own], sites: tuple[Site, ...], probe: Probe) -> None:
        """Before training: set fixed tensors from a pass over the data (Fisher masks and the like), in place."""

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        """What `apply` gets at each site, from the tensors that a lane holds; differentiable.

        A method whose sites share tensors, draw parts of them at random or make weights of them does it here, once a
        step. Names may be others than those declared.

        Args:
            own: for each site its declared tensors by name (with `weight` and `bias` where `needs_weight`), those of
                one lane; shared ones are in each.
            source: random numbers of the lane's seed and step while it trains, None in evaluation.
        """
        return own

    def penalty(self, own: list[Own]) -> Array | None:
        """A term added to the lane's loss, from its declared tensors (no expansion); None for no such term."""
        return None

    def consistency(self) -> float:
        """The weight of the symmetric KL divergence between two passes that draw anew; 0 for one pass."""
        return 0.0

    def after_step(self, own: list[Own], step: int, steps: int) -> bool:
        """After the optimiser's step number `step` (from 1) of `steps`, gradients still there: schedules, in place.

        Returns:
            whether values were set anew, so that the optimiser forgets its moments.
        """
        return False

    def finish(self, own: list[Own], sites: tuple[Site, ...]) -> None:
        """After the last step: bring the tensors into the form that is kept, in place."""

    def apply(self, p: Lanes, x: Array, y: Array) -> Array:
        """The adapted output of a site.

        Args:
            p: the declared tensors and numeric knobs of the group's lanes.
            x: lanes x tokens x d_in, what the site reads.
            y: lanes x tokens x d_out, what the frozen site gives.
        Returns:
            lanes x tokens x d_out. A lane's rows may depend on that lane's rows alone.
        """
        raise NotImplementedError

    def apply_input(self, p: Lanes, x: Array) -> Array:
        """The adapted input of a site, for methods and sites with `side(site) == "input"`."""
        raise NotImplementedError

    def side(self, site: Site) -> Literal["input", "output", "both"]:
        """Whether the method changes what the site gives (`apply`), what it reads (`apply_input`), or both."""
        return "output"

    def prefix(self, p: Lanes) -> tuple[Each, Each]:
        """Keys and values to attend to besides the sequence, of each lane length x d_kv; `kv` sites only."""
        raise NotImplementedError

    def virtual_tokens(self, p: Lanes) -> Array:
        """Vectors (lanes x length x width) put before the embedded sequence; `input` sites only."""
        raise NotImplementedError

    def rungs(self, site: Site) -> tuple[int, ...]:
        """After how many layers it reads the states, ascending from 0, the embeddings; `ladder` sites only."""
        raise NotImplementedError

    def ladder(self, p: Lanes, states: list[Array], causal: bool) -> Array:
        """What stands in the place of the last states (lanes x tokens x d_out); `ladder` sites only.

        Args:
            states: at each of its `rungs`, lanes x tokens x d_in, without a gradient.
            causal: whether a token sees those before it alone.
        """
        raise NotImplementedError

    def prompt_length(self) -> int:
        """Tokens that the method adds to the sequence itself."""
        return 0

    def prefix_length(self) -> int:
        """Positions that the method adds to keys and values."""
        return 0

    def position_shift(self) -> int:
        """By how many positions the text moves."""
        return 0

    def flops(self, site: Site, tokens: int) -> int:
        """Forward FLOPs for one sequence beyond the frozen site's: 2 a parameter and token, unless overridden."""
        return 2 * tokens * sum(t.size for t in self.tensors(site).values() if t.deployed)

    def first_flops(self, site: Site, tokens: int) -> int:
        """Of `flops` those of products with what the site reads: where nothing below trains, it needs no gradient."""
        return self.flops(site, tokens) // 2

    def fixed_flops(self, site: Site, tokens: int) -> int:
        """Of `flops` those of a first product whose factor does not train: it has no gradient to pay for."""
        return 0

    def keeps(self, site: Site) -> tuple[str, ...]:
        """Which tensors of the site's own autograd keeps for this method: `x` (what it reads), `y` (what it gives).

        A tensor that several methods or sites read is kept once.
        """
        return ()

    def saved_floats(self, site: Site, tokens: int) -> int:
        """Numbers that autograd keeps for one sequence because this method is here, besides those of `keeps`."""
        return 0

    def check(self, site: Site) -> str | None:
        """Why this method with these knobs cannot adapt this site, in one line; None if it can."""
        return None

    def in_peft(self, site: Site) -> PeftForm | str:
        """How HF peft expresses it at a site, or why it cannot, in one line."""
        return f"HF peft has no {self.name}"

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
        """The knobs with which this method is what HF peft's configuration means at a site; None where it is not.

        Args:
            settings: `adapter_config.json` with the patterns for the site's module applied; an entry that lists modules
                says whether it lists this one.
        """
        return None

    def static_knobs(self) -> tuple[Any, ...]:
        """Knobs that choose code rather than numbers; lanes share a group only if these are equal."""
        return tuple(v for v in self.knobs().values() if isinstance(v, (str, bool, tuple)) or v is None)

    def group_key(self, site: Site) -> tuple[Any, ...]:
        """Lanes share a group only if equal; a method that cannot be padded with zeros adds its shapes."""
        return self.static_knobs()

    def knobs(self) -> dict[str, Any]:
        """The knobs and their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        """The knobs that a search may turn, and how."""
        return {f.name: f.metadata["domain"] for f in fields(cls) if "domain" in f.metadata}  # type: ignore[arg-type]
