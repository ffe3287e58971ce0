"""A folder that HF peft wrote, read as a design of ours: what its configuration means at each module of its file.

What no method of ours is becomes a `peft:NAME`, if the installed peft has it. Training knobs are not in such a folder;
the design has their defaults. Nothing in it is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftscape.search.adapter_folder import TENSORS, Card, declared
from peftscape.search.backbone import Backbone
from peftscape.search.head import Head, make_head
from peftscape.search.language import Language
from peftscape.search.peft_folder import InexpressibleError, PeftFolder
from peftscape.search.peft_format import changes_of, peft_form
from peftscape.search.peft_own import apart, with_own
from peftscape.search.peft_place import PATTERNS, place
from peftscape.search.peft_tuner import TunerFolder, tuner_row, tuner_sites
from peftscape.search.peft_virtual import refusal
from peftscape.spaces.design import Design
from peftscape.spaces.heads import layer_name, token_shapes
from peftscape.spaces.hf_peft import HFPeft
from peftscape.spaces.methods import methods
from peftscape.spaces.words import InputError, nearest

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Method
    from peftscape.spaces.sites import Site

CONFIG = "adapter_config.json"
#: With `bias = "all"` peft writes the biases of a head's wrapper too, beside the head.
COPIES = (".modules_to_save.", ".original_module.")
#: Tokens of a text where neither the folder nor the backbone says how many.
LONGEST = 512


def read_config(directory: str | Path) -> dict[str, Any]:
    """What `adapter_config.json` says. Raises InputError if it is of a task that is not here."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(path), [f"it cannot be read as JSON: {error}"]) from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InputError(str(path), ['no "peft_type": not a configuration that HF peft wrote'])
    if config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        expected = "an adapter of a sequence or token classifier or a language model was expected"
        found = f"task_type {config.get('task_type')!r}: {expected}"
        raise InputError(str(path), [found])
    return config


def read_peft(directory: str | Path, config: Mapping[str, Any], backbone: Backbone) -> tuple[Card, dict[str, Tensor]]:
    """An adapter of HF peft as a design with a lane's tensors.

    Raises:
        InputError: no method of ours is what the folder holds, or the backbone is not the one it was made for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(directory) / TENSORS["peft"]
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(str(path), [f"it cannot be read: {error}"]) from None
    stored = {name: value for name, value in stored.items() if not any(copy in name for copy in COPIES)}
    speaks, words = config["task_type"] in ("CAUSAL_LM", "SEQ_2_SEQ_LM"), config["task_type"] == "TOKEN_CLS"
    if speaks and bool(backbone.sites.decoder_layers) != (config["task_type"] == "SEQ_2_SEQ_LM"):
        raise InputError(str(directory), [f"task_type {config['task_type']} is none of a {backbone.sites.family}"])
    head = make_head(backbone, kind="lm", outputs=2) if speaks else _head(stored, backbone, str(path), words=words)
    placements = _placements(config, stored, backbone, str(directory))
    card = Card(
        design=Design.from_json({"placements": placements}, where=str(directory)),
        head=head.kind, outputs=head.outputs, max_length=_longest(directory, backbone),
        task={"language": _language(backbone).json()} if head.kind == "lm" else {},
    )  # fmt: skip
    if errors := card.design.check(backbone.sites):
        raise InputError(str(directory), errors)
    shapes, _ = declared(card.design, backbone, head)
    return card, _folder(card, backbone, head, str(directory)).from_peft(stored, shapes, str(path))


def _folder(card: Card, backbone: Backbone, head: Head, where: str) -> PeftFolder | TunerFolder:
    """How a design lies in a file that peft made."""
    order = {site: i for i, site in enumerate(backbone.sites.sites)}
    try:
        if any(isinstance(p.method, HFPeft) for p in card.design.placements):
            return peft_form(card, backbone, head)
        found, own = apart(list(changes_of(card.design, backbone)))
        changes = sorted(found, key=lambda c: order[c.site])
        form = changes[0].form
        # Virtual tokens that would give other logits here than there are refused as they are in export.
        if form.virtual and (why := refusal(card, backbone, [c.site for c in changes], form.kind)):
            raise InexpressibleError(why)
        return with_own(place(changes, backbone, head, stacked=False), own, backbone, head)
    except InexpressibleError as error:
        raise InputError(where, [str(error)]) from None


def _language(backbone: Backbone) -> Language:
    return Language("completion", "completion") if backbone.sites.decoder_layers else Language("text", "all")


def _head(stored: Mapping[str, Tensor], backbone: Backbone, where: str, *, words: bool) -> Head:
    """The classifier's head, of texts or of words, as wide as the one stored."""
    own, kind = backbone.sites.head, "token" if words else "sequence"
    if (layer_name(backbone.sites) if words else own) is None:
        raise InputError(where, [f"transformers has no {kind} classifier for {backbone.sites.family}"])
    layout = token_shapes(backbone.sites, 0).items() if words or own is None else own.layout
    name, shape = next((name, shape) for name, shape in layout if 0 in shape)
    value = next((v for key, v in stored.items() if key.endswith(f".{name}")), None)
    if value is None:
        raise InputError(where, [f"no {name}: the adapter of a {kind} classifier with its head was expected"])
    return make_head(backbone, kind="token" if words else "class", outputs=value.shape[shape.index(0)])


def _placements(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], backbone: Backbone, where: str
) -> list[dict[str, Any]]:
    """Sites with the same method and knobs, kinds on the same layers together."""
    start, kind = _start(config, backbone), config["peft_type"]
    try:
        sites = _sites(config, stored, backbone, where)
        meant = [(meaning(settings_of(config, start + site.path), site), site) for site in sites]
        if none := [f"no method of peftscape is what this {kind} does ({s.path})" for row, s in meant if row is None]:
            raise InputError(where, list(dict.fromkeys(none))[:5])
        return _rows([(row, site) for row, site in meant if row], backbone, where)
    except InputError as error:
        ours = error.errors
    try:
        whole = tuner_row(config, where)
        rows = _rows([(whole, site) for site in tuner_sites(config, backbone, start, where)], backbone, where)
    except InputError as error:
        raise InputError(where, list(dict.fromkeys([*ours[:5], *error.errors[:5]]))) from None
    if all(row["layers"] == "all" for row in rows):  # stacks count their layers apart
        return [{**rows[0], "sites": [name for row in rows for name in row["sites"]]}]
    if len(rows) > 1:
        raise InputError(where, [f"this {kind} adapts other kinds of linears in some layers, which no design says"])
    return rows


def _rows(meant: Iterable[tuple[dict[str, Any], Site]], backbone: Backbone, where: str) -> list[dict[str, Any]]:
    found: dict[str, tuple[dict[str, Any], dict[str, set[int]]]] = {}
    for row, site in meant:
        _, layers = found.setdefault(json.dumps(row, sort_keys=True), (row, {}))
        name = f"{site.stack}.{site.kind}" if backbone.sites.decoder_layers else site.kind
        layers.setdefault(name, set()).add(site.layer)
    rows = []
    for row, kinds in found.values():
        together: dict[tuple[int, ...], list[str]] = {}
        for kind, numbers in kinds.items():
            together.setdefault(tuple(sorted(numbers)), []).append(kind)
        for chosen, names in together.items():
            every = {s.layer for s in backbone.sites.sites if s.named(names)}
            rows.append({**row, "sites": names, "layers": "all" if set(chosen) == every else _within(chosen, where)})
    return rows


def _start(config: Mapping[str, Any], backbone: Backbone) -> str:
    return backbone.sites.within(lm=config.get("task_type") in ("CAUSAL_LM", "SEQ_2_SEQ_LM"))


def _within(layers: Iterable[int], where: str) -> list[int]:
    if min(layers) < 0:
        raise InputError(where, ["a part of the modules outside the layers is adapted, which no design says"])
    return list(layers)


def meaning(settings: Mapping[str, Any], site: Site) -> dict[str, Any] | None:
    """The method and knobs that peft's settings are at a site."""
    kinds: list[type[Method]] = [m for m in methods().values() if site.kind in m.sites]
    for kind in kinds:
        knobs = kind.from_peft(settings, site)
        if knobs is not None:
            return {"method": kind.name, **knobs}
    return None


def settings_of(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The configuration with the patterns for one module applied; a list of modules says whether it is in it."""
    settings = dict(config)
    for entry, pattern in PATTERNS.items():
        for key, value in (config.get(pattern) or {}).items():
            if entry in config and re.match(rf"(.*\.)?({key})$", module):
                settings[entry] = value
                break
    names = config.get("feedforward_modules") or []
    here = re.fullmatch(names, module) if isinstance(names, str) else any(f".{module}".endswith(f".{n}") for n in names)
    return settings | {"feedforward_modules": bool(here)}


def _sites(config: Mapping[str, Any], stored: Mapping[str, Tensor], backbone: Backbone, where: str) -> list[Site]:
    """The sites that the file's modules are; last those whose biases it holds, which peft adds to all else."""
    sites = backbone.sites
    if "num_virtual_tokens" in config:
        kind = "input" if config["peft_type"] == "PROMPT_TUNING" else "kv"
        written = [s for s in sites.sites if s.kind == kind and s.stack == "decoder"]  # peft's prefixes go nowhere else
        return written if kind == "kv" and sites.decoder_layers else [s for s in sites.sites if s.kind == kind]
    start, kinds = f"base_model.model.{_start(config, backbone)}", {k for m in methods().values() for k in m.sites}
    adapted: dict[str, list[Site]] = {}
    for site in sites.sites:
        if site.path and site.kind in kinds - {"kv", "bias", "attention", "ffn", "block"}:
            adapted.setdefault(site.path, []).append(site)
    biases = {f"{s.path}{within}.bias": s for s in sites.sites if s.kind == "bias" for within in ("", ".base_layer")}
    found: dict[str, None] = {}
    unknown, own = [], []
    for name in stored:
        if not name.startswith(start):
            continue  # the head, or what all modules share
        inner = name.removeprefix(start)
        if inner in biases:
            own.append(biases[inner])
            continue
        path = next((path for path in sorted(adapted, key=len, reverse=True) if inner.startswith(f"{path}.")), None)
        if path is None:
            unknown.append(f"{name}: {sites.family} has no such site{nearest(inner, adapted)}")
        else:
            found[path] = None
    if unknown or not found:
        raise InputError(where, unknown[:5] or ["the file adapts no module of this backbone"])
    return [*(site for path in found for site in adapted[path]), *own]


def _longest(directory: str | Path, backbone: Backbone) -> int:
    """Tokens at which a text is cut: the tokenizer's own limit, within the backbone's positions."""
    limits = [LONGEST, backbone.sites.max_positions]
    path = Path(directory) / "tokenizer_config.json"
    if path.is_file():
        limits.append(json.loads(path.read_text(encoding="utf-8")).get("model_max_length"))
    return int(min(n for n in limits if isinstance(n, (int, float)) and n > 0))
