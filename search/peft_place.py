"""Where each change of a design lies in HF peft's tensors, and the configuration that says so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from peftscape.search.adapter_folder import Shapes
from peftscape.search.fingerprint import source
from peftscape.search.peft_folder import Change, InexpressibleError, PeftFolder, Piece
from peftscape.search.peft_virtual import parts, virtual_config

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.sites import Site

#: Entries that may differ between modules, and where peft then writes them; the kinds that know these.
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern"}
PATTERNED = ("LORA", "LOHA", "LOKR")


def place(changes: Sequence[Change], backbone: Backbone, head: Head, *, stacked: bool = True) -> PeftFolder:
    """Where each change lies in peft's file.

    Args:
        stacked: changes of one module lie one after the other, A over A, B beside B. Otherwise each of them reads all
            of its module's A, and its own columns of B: as in a file that peft made of a fused linear.
    """
    modules: dict[str, list[Change]] = {}
    for change in changes:
        modules.setdefault(change.site.path, []).append(change)
    start = "base_model." if changes[0].form.virtual else "base_model.model."
    shapes: Shapes = {}
    rest: dict[str, float | Tensor] = {}
    pieces: list[Piece] = []
    entries: dict[str, dict[str, Any]] = {}
    listed: dict[str, list[str]] = {}
    most = {"widest": max(c.site.d_in for c in changes), "tallest": max(c.site.d_out for c in changes)}
    starts, beside = _beside([c for here in modules.values() for c in here], backbone)
    _refuse_two_of_a_kind(changes)
    for path, here in modules.items():
        name = backbone.sites.within(lm=head.kind == "lm") + path
        _refuse_parts(path, here)
        if stacked:
            _refuse_overlaps(path, here)
        d_in, d_out = widths(backbone, here[0].site)
        scales = [c.form.scale for c in here]
        ranks = [c.form.rank for c in here] if stacked else [here[0].form.rank]
        # peft has one scaling, alpha / r, for all of a layer: unequal ones go into B.
        even = len(set(scales)) == 1
        entries[name] = _entries(path, here)
        if scales[0] is not None:
            alpha = scales[0] * sum(ranks) if even else float(sum(ranks))
            entries[name] |= {here[0].form.ranked: sum(ranks), "lora_alpha": alpha}
        at = 0
        for change, scale in zip(here, scales, strict=True):
            form = change.form
            sizes = {"in": d_in, "out": d_out, "rank": sum(ranks), "beside": beside} | most
            own = {"in": d_in, "out": change.site.d_out, "rank": form.rank, "beside": form.beside} | most
            spans: dict[str | int, slice] = {
                "out": slice(*change.site.span) if change.site.span else slice(None),
                "rank": slice(at, at + form.rank) if stacked else slice(None),
                "beside": slice(starts[len(pieces)], starts[len(pieces)] + form.beside),
            }
            where = {}
            for tensor, axes in form.axes.items():
                full = tensor if tensor in form.common else f"{start}{name}.{tensor}"
                shapes[full] = form.shape(tensor, sizes)
                where[tensor] = (full, tuple(spans.get(a, slice(None)) for a in axes))
                if value := form.rest.get(tensor):
                    rest[full] = row_norms(backbone, change.site) if value == "row norms" else value
            factor = 1.0 if even or scale is None else scale
            pieces.append(Piece(change.site, form, change.keys, change.frozen, where, own, factor))
            at += form.rank
            for entry in () if form.virtual else form.listed:
                listed.setdefault(entry, []).append(name)
    trained = {f"{start}{name}": shape for name, shape in head.shapes.items()}
    on_top = {f"head/{name}": f"{start}{name}" for name in head.shapes}
    config = _config(changes[0].form, entries, listed, backbone, head)
    note = changes[0].form.note or f"HF peft's {changes[0].form.kind} on {len(modules)} modules"
    note += "" if head.kind == "lm" else changes[0].form.pooled
    return PeftFolder(config, shapes | trained, rest, tuple(pieces), on_top, note)


def _beside(changes: Sequence[Change], backbone: Backbone) -> tuple[list[int], int]:
    """Where each change begins in the dimension in which all lie side by side, and its length."""
    if changes[0].form.virtual:
        places, count = parts(backbone, changes[0].form.kind, len(changes))
        return [place * changes[0].form.beside for place in places], count * changes[0].form.beside
    ends = np.cumsum([c.form.beside for c in changes])
    return [0, *ends[:-1].tolist()], int(ends[-1])


def _config(
    form: PeftForm, entries: Mapping[str, dict[str, Any]], listed: Mapping[str, list[str]], backbone: Backbone,
    head: Head,
) -> dict[str, Any]:  # fmt: skip
    """`adapter_config.json`."""
    config = {"peft_type": form.kind} | _patterns(form.kind, entries)
    config |= {entry: list(dict.fromkeys(names)) for entry, names in listed.items()}
    if form.virtual:
        config |= virtual_config(backbone, form.kind)
    return config | about_base(backbone, head)


def about_base(backbone: Backbone, head: Head) -> dict[str, Any]:
    """What `adapter_config.json` says of the model that an adapter stands on, and of its head."""
    config = {"base_model_name_or_path": source(backbone) or None, "inference_mode": True}
    if head.kind == "lm":
        return config | {"task_type": "SEQ_2_SEQ_LM" if backbone.sites.decoder_layers else "CAUSAL_LM"}
    modules_to_save = backbone.sites.head.modules if backbone.sites.head is not None and head.kind == "class" else ()
    return config | {
        "task_type": "TOKEN_CLS" if head.kind == "token" else "SEQ_CLS",
        # peft names both for every classifier, whichever of them there is.
        "modules_to_save": list(dict.fromkeys([*modules_to_save, "classifier", "score"])),
    }


def _refuse_two_of_a_kind(changes: Sequence[Change]) -> None:
    """What all modules share must be one tensor of ours."""
    for ours, theirs in changes[0].form.names.items():
        if theirs in changes[0].form.common and not changes[0].form.beside and len({c.keys[ours] for c in changes}) > 1:
            raise InexpressibleError(f"HF peft's {changes[0].form.kind} has one {ours} for all modules")


def _refuse_parts(path: str, here: Sequence[Change]) -> None:
    for change in here:
        if change.site.span is not None and not change.form.splits:
            raise InexpressibleError(f"HF peft's {change.form.kind} cannot adapt a part of {path} alone")


def _refuse_overlaps(path: str, here: Sequence[Change]) -> None:
    """Changes of one module must add up, or lie in columns of their own."""
    columns = [c.site.span for c in here]
    for change in here:
        form = change.form
        alone = [axes for name, axes in form.axes.items() if "rank" not in axes and name not in form.common]
        overlap = len(set(columns)) < len(here) and bool(alone)
        if len(here) > 1 and (overlap or any("out" not in axes for axes in alone)):
            raise InexpressibleError(f"HF peft's {form.kind} changes a module once, and {path} is changed twice")


def _entries(path: str, here: Sequence[Change]) -> dict[str, Any]:
    """The configuration of one module."""
    first = here[0].form.config
    for change in here[1:]:
        if differing := [entry for entry in first if first[entry] != change.form.config.get(entry)]:
            raise InexpressibleError(f"HF peft takes one {differing[0]} for all of {path}")
    return dict(first)


def _patterns(kind: str, entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The configuration of all modules: what most have, and patterns for the others."""
    config: dict[str, Any] = {
        PATTERNS[e]: {} for row in entries.values() for e in row if kind in PATTERNED and e in PATTERNS
    }
    for entry in next(iter(entries.values())):
        values = {name: row[entry] for name, row in entries.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        config[entry] = usual
        others = {re.escape(name): value for name, value in values.items() if value != usual}
        if others and (kind not in PATTERNED or entry not in PATTERNS):
            raise InexpressibleError(f"HF peft's {kind} takes one {entry} for all modules")
        if others:
            config[PATTERNS[entry]] |= others
    return config


def widths(backbone: Backbone, site: Site) -> tuple[int, int]:
    """d_in and d_out of a site's whole module."""
    if site.span is None:
        return site.d_in, site.d_out
    weight = backbone.model.get_submodule(site.path).weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if site.transposed else (columns, rows)


def row_norms(backbone: Backbone, site: Site) -> Tensor:
    """||W_i|| of a site's whole module."""
    weight = backbone.model.get_submodule(site.path).weight
    assert isinstance(weight, Tensor)
    norms: Tensor = (weight.T if site.transposed else weight).detach().float().norm(dim=1).cpu()
    return norms
