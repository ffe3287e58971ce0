"""Sites: the places of a backbone that can be adapted, known from its configuration before anything is built.

`site_map` reads a configuration as JSON and imports neither torch nor transformers for the families of
`peftscape.spaces.families`; other models are built without weights and matched by name
(`peftscape.spaces.modules`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from peftscape.spaces.words import nearest

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
SUBLAYERS = ("attention", "ffn", "block")
KINDS = (*LINEARS, *SUBLAYERS, "kv", "input", "bias", "norm", "ladder", "model")
#: Kinds that stand once in a backbone and belong to every choice of layers.
EVERYWHERE = ("input", "ladder", "model")
STACKS = ("encoder", "decoder", "cross")


class SiteError(ValueError):
    """A backbone's places cannot be mapped, or a place was asked for that it does not have."""


@dataclass(frozen=True, slots=True)
class Site:
    """One place of a backbone: a module whose output y a method may change, given x, what the place reads.

    Args:
        kind: a linear (`q k v o gate up down`); a sub-layer (`attention ffn`: y is the output projection's
            output before the residual sum, x what the sub-layer reads; `block`: y is the layer's output, x
            its input); `kv` (keys and values: `d_in` the queries' width, `d_out` that of keys and of
            values); `input` (the embedded sequence); `bias` and `norm` (one for each bias parameter and each
            norm); `ladder` (the states after every layer, beside which a side network climbs); `model` (all
            of the backbone).
        layer: from 0; -1 outside the layers; of `ladder`, which ends above them, their number. A decoder's layers are
            counted on from its encoder's.
        path: the module inside AutoModel's base model whose output is y; empty for `EVERYWHERE`. For
            `kv` the module that calls transformers' attention interface.
        stack: `encoder`, `decoder`, or `cross`: the decoder's attention to the encoder's states, of which its k and v
            read the source and all else the target.
        source: the module whose first input is x, where that is not `path`.
        transposed: the weight lies as d_in x d_out (GPT-2's Conv1D).
        span: the output columns [start, stop) of a fused linear that this site owns.
        bias: whether the linear or the norm has one.
        heads: into which the outputs of q, k and v and the inputs of o divide; 1 elsewhere.
    """

    kind: str
    layer: int
    path: str
    d_in: int
    d_out: int
    stack: str = "encoder"
    source: str | None = None
    transposed: bool = False
    span: tuple[int, int] | None = None
    bias: bool = False
    heads: int = 1

    def named(self, names: Iterable[str]) -> bool:
        """Whether one of these names is its kind (`q`) or its kind in its stack (`cross.q`)."""
        return any(name in (self.kind, f"{self.stack}.{self.kind}") for name in names)

    @property
    def reads_source(self) -> bool:
        """Whether it reads tokens of the encoder's text, in an encoder-decoder."""
        return self.stack == "encoder" or (self.stack == "cross" and self.kind in ("k", "v"))


def kind_in(name: str) -> str:
    """The kind that a design's name of sites asks for: `q` of `q` and of `cross.q`."""
    stack, _, kind = name.partition(".")
    return kind if stack in STACKS and kind else name


@dataclass(frozen=True, slots=True)
class Head:
    """transformers' own sequence-classification head: linears on one pooled vector, trained for each lane.

    Args:
        pooling: `pooler` (the backbone's frozen pooler), `first` (the state of token 0) or `last` (of the
            last real token).
        modules: names in the ForSequenceClassification class whose parameters train with the head.
        layout: (name in the class's state dict, shape) in the order of computation; 0 stands for the outputs.
        activation: between the two linears, as transformers' ACT2FN names it; None where there is one linear.
    """

    pooling: Literal["pooler", "first", "last"]
    modules: tuple[str, ...]
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    activation: str | None = None

    def tensors(self, num_outputs: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the head's parameters for this many labels (or 1 for regression)."""
        return {name: tuple(n or num_outputs for n in shape) for name, shape in self.layout}


@dataclass(frozen=True, slots=True)
class Relative:
    """Attention to a table of relative positions, which the layers read beside the tokens (DeBERTa-v2).

    Args:
        rows: of the table that is read.
        terms: products of queries or keys with the projected table (c2p, p2c).
        projections: linears of a layer that project the table, once for a whole batch.
        through: the kinds of the sites whose own linears do that (share_att_key). Such a module is called
            twice in a forward, and its second input, 1 x rows x d, belongs to no lane.
    """

    rows: int
    terms: int
    projections: int
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteMap:
    """A backbone as the space sees it: its sizes, its sites and what they cannot be used for.

    Args:
        d_kv: kv_heads * head_dim; d_ff: the width between `up` and `down`.
        parameters: all of AutoModel's base model, its pooler included where it has one.
        max_positions: tokens that fit in the positions (RoBERTa: 512 of its 514 rows); None if unlimited.
        position_offset: what explicit `position_ids` start from (RoBERTa: pad_token_id + 1).
        positions: how tokens know their places.
        attention_interface: whether attention goes through transformers' AttentionInterface; `softcap` and
            `sliding_window` are what it hands over besides the usual.
        refused: kinds that this backbone has no sites of, and why.
        prefix: the base model's name within the task classes; `embedding`: the word embedding's path.
        norm_place: `pre` (x is the normed input of a sub-layer) or `post` (the norm follows the residual
            sum).
        decoder_layers: the last of `layers`, of a decoder that reads an encoder; 0 where there is one stack.
        layer_products, outer_products: weights multiplied for each token in one layer, and outside the layers
            (mapped to sites or not): a product costs 2 FLOPs. `relative` likewise.
        quantised: whether the layers' linears are held in 4 bits, which cannot train.
    """

    family: str
    layers: int
    d_model: int
    d_kv: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    causal: bool
    parameters: int
    max_positions: int | None
    position_offset: int
    positions: Literal["absolute", "rotary", "relative", "unknown"]
    attention_interface: bool
    refused: Mapping[str, str] = field(hash=False)
    head: Head | None
    sites: tuple[Site, ...]
    prefix: str = ""
    embedding: str = ""
    activation: str = "gelu"
    norm_kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_place: Literal["pre", "post"] = "pre"
    softcap: float | None = None
    sliding_window: int | None = None
    decoder_layers: int = 0
    layer_products: int = 0
    outer_products: int = 0
    relative: Relative | None = None
    quantised: bool = False

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites there are, in the order of `KINDS`."""
        found = {s.kind for s in self.sites}
        return tuple(k for k in KINDS if k in found)

    def within(self, *, lm: bool) -> str:
        """What the base model's names begin with in a class with a head; T5's language model is no wrapper."""
        return "" if lm and self.family in ("t5", "mt5") else f"{self.prefix}."

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What a design may call its sites: the kinds, and in an encoder-decoder those of each stack."""
        stacked = dict.fromkeys(f"{s.stack}.{s.kind}" for s in self.sites if s.kind != "model")
        return (*self.kinds, *stacked) if self.decoder_layers else self.kinds

    @cached_property
    def position_paths(self) -> frozenset[str]:
        """The linears that project a table of relative positions as well, which belongs to no lane."""
        through = self.relative.through if self.relative is not None else ()
        return frozenset(s.path for s in self.sites if s.kind in through)

    @cached_property
    def _named(self) -> dict[tuple[str, ...], tuple[Site, ...]]:
        return {}

    def named(self, names: tuple[str, ...]) -> tuple[Site, ...]:
        """The sites that one of these names names, in the model's order; remembered, for plans of whole spaces."""
        if names not in self._named:
            self._named[names] = tuple(s for s in self.sites if s.named(names))
        return self._named[names]

    def select(self, kinds: Iterable[str], layers: Iterable[int]) -> tuple[Site, ...]:
        """The sites of these kinds (of one stack: `cross.q`) in these layers, in the model's order.

        What lies outside the layers comes with `EVERYWHERE`'s kinds, which are nowhere else, and otherwise
        with layer -1 or with all layers together (a BitFit on all layers trains the embeddings' bias too).

        Raises:
            SiteError: a kind that is unknown or refused, a layer that is not there.
        """
        kinds, layers = tuple(kinds), set(layers)
        for kind in kinds:
            if (plain := kind_in(kind)) in self.refused:
                raise SiteError(f"{kind}: {self.refused[plain]}")
            if not any(s.named((kind,)) for s in self.sites):
                raise SiteError(f'this {self.family} has no sites "{kind}"{nearest(kind, self.names)}')
        if missing := sorted(n for n in layers if not -1 <= n < self.layers):
            raise SiteError(f"layers {missing} of a backbone with layers 0 to {self.layers - 1}")
        if layers.issuperset(range(self.layers)):
            layers.add(-1)
        return tuple(s for s in self.sites if s.named(kinds) and (s.layer in layers or s.kind in EVERYWHERE))


def site_map(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> SiteMap:
    """The site map of a model, from its configuration.

    Args:
        source: a folder with config.json, a hub id in the local cache, or the configuration itself.
        overrides: a TOML table `[model.sites]`, kind = pattern with {layer}; see `site_map_from_modules`.

    Raises:
        SiteError: no configuration there, a key of it is missing or impossible, or modules that match no
        pattern.
    """
    from peftscape.spaces.encoder_decoders import ENCODER_DECODERS
    from peftscape.spaces.families import FAMILIES
    from peftscape.spaces.layout import assemble

    config = read_config(source)
    kind = str(config.get("model_type"))
    family, two = FAMILIES.get(kind), ENCODER_DECODERS.get(kind)
    if two is not None:
        if overrides:
            raise SiteError(f"{kind} is mapped from its configuration; [model.sites] cannot change it")
        return assemble(*two(config))
    if family is None or overrides:
        return site_map_from_modules(config, overrides)
    return assemble(family(config))


def site_map_from_modules(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> SiteMap:
    """The site map of any model that AutoModel can build, from its modules, built without weights.

    Linears are matched by well-known names. `overrides` maps what is not: `q = "layers.{layer}.attn.q_proj"`
    for the linears and for `attention`, `ffn` and `block`; `"layers.{layer}.attn.qkv[0:768]"` takes columns
    of a fused one.

    Raises:
        SiteError: with the modules of a layer and how to map them.
    """
    from peftscape.spaces.layout import assemble
    from peftscape.spaces.modules import layout_from_modules

    return assemble(layout_from_modules(read_config(source), overrides or {}))


def read_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration as it is written in JSON; many keys are optional there.

    Raises:
        SiteError: it is neither a folder with config.json nor a hub id in the local cache, or not JSON.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise SiteError(f"{path.parent}: no config.json in this folder")
    elif not path.is_file():
        path = _cached(str(source))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SiteError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise SiteError(f'{path}: a transformers configuration with "model_type" was expected')
    return config


def _cached(hub_id: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise SiteError(f'"{hub_id}": neither a folder with config.json nor a model in the local hub cache')
    return Path(found)
