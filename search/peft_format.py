"""HF peft's form of a design: its configuration and where each of our tensors lies in its file.

Both are written directly, without peft; names and shapes are those that peft 0.21 saves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftscape.search.adapter_folder import Card, Shapes, check
from peftscape.search.fingerprint import source
from peftscape.spaces.design import tensor_key
from peftscape.spaces.methods.ia3 import IA3
from peftscape.spaces.methods.lora import LoRA
from peftscape.spaces.methods.prefix_tuning import PrefixTuning
from peftscape.spaces.methods.prompt_tuning import PromptTuning

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.methods.base import Method
    from peftscape.spaces.sites import Site

#: Families whose classifiers get a prefix from peft as from us; others lack a cache or a part of the head.
PREFIXED = {
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "gpt2", "llama", "mistral", "qwen2", "qwen3",
    "gemma", "gemma2", "gemma3_text",
}  # fmt: skip


class InexpressibleError(ValueError):
    """HF peft cannot express a design; the message says why, in one line."""


@dataclass(frozen=True)
class Part:
    """One of our tensors: `theirs[where]`, reshaped, is `factor` times it."""

    ours: str
    theirs: str
    where: tuple[slice, ...] = ()
    factor: float = 1.0


@dataclass(frozen=True)
class PeftForm:
    """A design in peft's terms.

    Args:
        config: `adapter_config.json`.
        shapes: of peft's tensors by name.
        parts: what lies where in them; the rest is `rest` (0 for a low-rank factor, 1 for a scaling).
        note: what it is, and what to know about it, in one line.
    """

    config: dict[str, Any]
    shapes: Shapes
    parts: tuple[Part, ...]
    note: str
    rest: float = 0.0

    def to_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """peft's tensors from a lane's."""
        dtype = next(iter(tensors.values())).dtype
        out = {name: torch.full(shape, self.rest, dtype=dtype) for name, shape in self.shapes.items()}
        for part in self.parts:
            place = out[part.theirs][part.where]
            place.copy_(tensors[part.ours].detach().cpu().reshape(place.shape) * part.factor)
        return out

    def from_peft(self, stored: Mapping[str, Tensor], shapes: Shapes, where: str) -> dict[str, Tensor]:
        """A lane's tensors, of these shapes, from peft's. Raises InputError with all that does not fit."""
        check(stored, self.shapes, where)
        return {p.ours: (stored[p.theirs][p.where] / p.factor).reshape(shapes[p.ours]).clone() for p in self.parts}


def peft_form(card: Card, backbone: Backbone, head: Head) -> PeftForm:
    """How HF peft expresses an adapter, so that its sequence classifier gives equal logits.

    Raises:
        InexpressibleError: with the reason.
    """
    placements = card.design.placements
    names = sorted({p.method.name for p in placements})
    sites = backbone.sites
    if card.head != "class" or sites.head is None:
        raise InexpressibleError(f'head = "{card.head}" is no head of transformers, which HF peft builds on')
    if not placements or names == ["head_only"]:
        raise InexpressibleError("HF peft has no adapter that trains a head alone")
    if len(names) > 1:
        raise InexpressibleError(f"HF peft cannot combine {' and '.join(names)} in one adapter")
    forms = {"lora": _lora, "ia3": _ia3, "prefix_tuning": _prefix, "prompt_tuning": _prompt}
    if names[0] not in forms:
        raise InexpressibleError(f"HF peft has no {names[0]}")
    form = forms[names[0]](card, backbone)
    # Prompts are kept beside the classifier, other adapters inside it: its modules lie one level deeper.
    start = "base_model." if "num_virtual_tokens" in form.config else "base_model.model."
    config = {
        "base_model_name_or_path": source(backbone) or None,
        "task_type": "SEQ_CLS",
        "inference_mode": True,
        # peft names both for every classifier, whichever of them there is.
        "modules_to_save": list(dict.fromkeys([*sites.head.modules, "classifier", "score"])),
    }
    trained = {f"{start}{name}": shape for name, shape in head.shapes.items()}
    parts = tuple(Part(f"head/{name}", f"{start}{name}") for name in head.shapes)
    return PeftForm(form.config | config, form.shapes | trained, form.parts + parts, form.note, form.rest)


def _adapted(card: Card, backbone: Backbone) -> Iterator[tuple[str, Method, Site]]:
    """(key of the site's tensors up to their name, method, site) in the order in which they act."""
    for i, placement in enumerate(card.design.placements):
        for site in placement.where(backbone.sites):
            for name, declared in placement.method.tensors(site).items():
                key = tensor_key(site, name, declared)
                yield f"{i}/{key.removesuffix(name)}", placement.method, site
                break


def _lora(card: Card, backbone: Backbone) -> PeftForm:
    """One peft layer a module: what adapts it is stacked, A over A, B beside B (block-diagonal if fused)."""
    modules: dict[str, list[tuple[str, LoRA, Site]]] = {}
    for key, method, site in _adapted(card, backbone):
        assert isinstance(method, LoRA)
        modules.setdefault(site.path, []).append((key, method, site))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    shapes: Shapes = {}
    parts = []
    for path, pieces in modules.items():
        name = f"{backbone.sites.prefix}.{path}"
        scales = [m.alpha / m.rank for _, m, _ in pieces]
        ranks[name] = rank = sum(m.rank for _, m, _ in pieces)
        # peft has one scaling, alpha / r, for all of a layer: unequal ones go into B.
        even = len(set(scales)) == 1
        alphas[name] = scales[0] * rank if even else float(rank)
        a, b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
        d_in, d_out = _widths(backbone, pieces[0][2])
        shapes |= {a: (rank, d_in), b: (d_out, rank)}
        start = 0
        for (key, method, site), scale in zip(pieces, scales, strict=True):
            mine = slice(start, start := start + method.rank)
            parts.append(Part(f"{key}A", a, (mine,)))
            parts.append(Part(f"{key}B", b, (_columns(site), mine), 1.0 if even else scale))
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": {re.escape(name): n for name, n in ranks.items() if n != r},
        "alpha_pattern": {re.escape(name): x for name, x in alphas.items() if x != alpha},
        "fan_in_fan_out": _transposed(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
    }
    return PeftForm(config, shapes, tuple(parts), f"HF peft's LoRA on {len(modules)} modules")


def _ia3(card: Card, backbone: Backbone) -> PeftForm:
    modules: dict[str, list[tuple[str, Method, Site]]] = {}
    for key, method, site in _adapted(card, backbone):
        assert isinstance(method, IA3)
        modules.setdefault(site.path, []).append((key, method, site))
    shapes: Shapes = {}
    parts, feedforward = [], []
    for path, pieces in modules.items():
        name = f"{backbone.sites.prefix}.{path}"
        inputs = [m.side(s) == "input" for _, m, s in pieces]
        columns = [site.span for _, _, site in pieces]
        if len(set(columns)) < len(columns) or (any(inputs) and len(inputs) > 1):
            raise InexpressibleError(f"HF peft's (IA)^3 scales a module once, and {path} is scaled twice")
        if inputs[0] and columns[0] is not None:
            raise InexpressibleError(f"HF peft's (IA)^3 cannot scale what only a part of {path} reads")
        d_in, d_out = _widths(backbone, pieces[0][2])
        theirs = f"base_model.model.{name}.ia3_l"
        shapes[theirs] = (1, d_in) if inputs[0] else (d_out, 1)
        feedforward += [name] if inputs[0] else []
        parts += [Part(f"{key}s", theirs, () if inputs[0] else (_columns(site),)) for key, _, site in pieces]
    config = {
        "peft_type": "IA3",
        "target_modules": [f"{backbone.sites.prefix}.{path}" for path in modules],
        "feedforward_modules": feedforward,
        "fan_in_fan_out": _transposed(modules),
    }
    return PeftForm(config, shapes, tuple(parts), f"HF peft's (IA)^3 on {len(modules)} modules", rest=1.0)


def _prefix(card: Card, backbone: Backbone) -> PeftForm:
    sites = backbone.sites
    found = list(_adapted(card, backbone))
    method = found[0][1]
    assert isinstance(method, PrefixTuning)
    if len(card.design.placements) > 1 or [s.layer for _, _, s in found] != list(range(sites.layers)):
        raise InexpressibleError("HF peft's prefix tuning takes one prefix on all layers")
    if method.positions != "shift":
        raise InexpressibleError("HF peft's prefix tuning shifts the text's positions by the prefix's length")
    if sites.family not in PREFIXED:
        raise InexpressibleError(f"HF peft's prefix tuning does not work with {sites.family} classifiers")
    if sites.sliding_window and method.length + card.max_length > sites.sliding_window:
        raise InexpressibleError("HF peft's prefixes fall out of the sliding window, and ours do not")
    # A row is a virtual token: the keys of layer 0, its values, the keys of layer 1 ...
    parts = tuple(
        Part(f"{key}{name}", "prompt_embeddings", (slice(None), slice(at * sites.d_kv, (at + 1) * sites.d_kv)))
        for layer, (key, _, _) in enumerate(found)
        for at, name in ((2 * layer, "keys"), (2 * layer + 1, "values"))
    )
    config = _virtual(backbone, "PREFIX_TUNING", method.length, sites.d_kv, sites.kv_heads)
    config |= {"encoder_hidden_size": sites.d_kv, "prefix_projection": False}
    shape = (method.length, 2 * sites.layers * sites.d_kv)
    return PeftForm(config, {"prompt_embeddings": shape}, parts, "HF peft's prefix tuning")


def _prompt(card: Card, backbone: Backbone) -> PeftForm:
    sites = backbone.sites
    if len(card.design.placements) > 1:
        raise InexpressibleError("HF peft's prompt tuning takes one prompt")
    if sites.head is not None and sites.head.pooling != "last":
        raise InexpressibleError(
            f"HF peft's prompt tuning pools a virtual token in {sites.family} classifiers; ours pool the text"
        )
    [(key, method, site)] = _adapted(card, backbone)
    assert isinstance(method, PromptTuning)
    config = _virtual(backbone, "PROMPT_TUNING", method.length, site.d_out, sites.heads)
    config |= {"prompt_tuning_init": "RANDOM"}
    shapes: Shapes = {"prompt_embeddings": (method.length, site.d_out)}
    # The transformers class cannot tell padding from text behind a prompt, wherever the padding is.
    note = "HF peft's prompt tuning; peft's batches must hold texts of one length (it pools padding otherwise)"
    return PeftForm(config, shapes, (Part(f"{key}prompt", "prompt_embeddings"),), note)


def _virtual(backbone: Backbone, kind: str, length: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": backbone.sites.layers,
    }


def _widths(backbone: Backbone, site: Site) -> tuple[int, int]:
    """d_in and d_out of a site's whole module."""
    weight = backbone.model.get_submodule(site.path).weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if site.transposed else (columns, rows)


def _columns(site: Site) -> slice:
    return slice(*site.span) if site.span else slice(None)


def _transposed(modules: Mapping[str, list[tuple[str, Any, Site]]]) -> bool:
    return all(site.transposed for pieces in modules.values() for _, _, site in pieces)
