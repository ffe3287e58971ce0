"""What a plan is asked for, in people's words: a model by name, folder or id; a design by name, file or JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftscape.spaces.design import Design
from peftscape.spaces.falcon import falcon
from peftscape.spaces.layout import assemble
from peftscape.spaces.methods import methods
from peftscape.spaces.presets import preset_names, textbook
from peftscape.spaces.shapes import ALIASES, shape, shape_names
from peftscape.spaces.sites import SiteError, SiteMap, read_config, site_map
from peftscape.spaces.words import InputError, nearest, unique

DESIGN_BYTES = 2**24

#: Families whose language-model head shares the embedding's weights unless their configuration says otherwise
#: (tie_word_embeddings in transformers' configuration classes).
TIED = frozenset(
    {
        "gpt2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "falcon",
        "bert",
        "roberta",
        "t5",
        "mt5",
        "bart",
        "mbart",
        "electra",
        "distilbert",
    }
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as a plan sees it.

    Args:
        tied: whether a language-model head shares the embedding's weights.
    """

    name: str
    sites: SiteMap
    tied: bool


def read_model(source: str) -> Model:
    """A shipped shape by name, a folder with config.json, or a hub id in the local cache.

    Raises:
        InputError: there is no such model; with the nearest shape.
        SiteError: its configuration cannot be mapped.
    """
    known = source.lower()
    if known in shape_names() or known in ALIASES:
        config = shape(known)
    else:
        try:
            config = read_config(source)
        except SiteError as error:
            if Path(source).expanduser().exists() or "/" in source:
                raise
            shapes = nearest(known, shape_names())
            raise InputError("model", [f'"{source}" is no shape, no folder and no cached model{shapes}']) from error
    family = str(config.get("model_type"))
    tied = config.get("tie_word_embeddings")
    tied = family in TIED if tied is None else bool(tied)
    if family == "falcon":  # for plans alone: a search does not know its attention
        return Model(name=source, sites=assemble(falcon(config)), tied=tied)
    return Model(name=source, sites=site_map(config), tied=tied)


def read_design(source: str) -> Design | str:
    """A design; or the name of a preset that is a whole space.

    A preset's name that is a textbook design's too (`lora`) is the design; `space:lora` is the space.

    Raises:
        InputError: it is none of these; with the nearest name.
    """
    if source.lstrip().startswith("{"):
        return _parse(source, "design")
    path = Path(source).expanduser()
    if path.is_file():
        if path.stat().st_size > DESIGN_BYTES:
            raise InputError(path.name, [f"larger than the {DESIGN_BYTES:,} bytes that are read"])
        try:
            return _parse(path.read_text(encoding="utf-8"), path.name)
        except UnicodeDecodeError as error:
            raise InputError(path.name, [f"not JSON: {error}"]) from None
    if source.startswith("space:"):
        source = source.removeprefix("space:")
        if source not in preset_names():
            raise InputError("design", [f'no preset "{source}"{nearest(source, preset_names())}'])
        return source
    if source in textbook():
        return textbook()[source]
    if source in preset_names():
        return source
    if source in methods():
        return Design.from_json({"placements": [{"method": source}]})
    known = {*textbook(), *preset_names(), *methods()}
    raise InputError("design", [f'"{source}" is no file, no JSON and no name{nearest(source, known)}'])


def _parse(text: str, where: str) -> Design:
    """A design from JSON, or from an adapter's design.json, which has it as a part."""
    try:
        value: Any = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(where, [f"not JSON: {error}"]) from None
    return Design.from_json(value["design"] if isinstance(value, dict) and "design" in value else value, where=where)
