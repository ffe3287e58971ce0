"""Well-known shapes as small configurations: the keys that sizes follow from, of the models' published config.json."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from peftscape.spaces.words import InputError, nearest

#: What people call them besides.
ALIASES = {
    "llama-2-70b": "llama-70b", "llama-1-7b": "llama-7b", "llama-1-13b": "llama-13b", "bert-base": "bert-base-uncased",
    "bert-large": "bert-large-uncased", "gpt2-small": "gpt2", "gemma-2-2b-it": "gemma-2-2b",
}  # fmt: skip


def shape_names() -> list[str]:
    """The shapes that come with peftscape."""
    return sorted(f.name.removesuffix(".json") for f in files(__name__).iterdir() if f.name.endswith(".json"))


def shape(name: str) -> dict[str, Any]:
    """A shape's configuration, case aside. Raises InputError with the nearest name."""
    known = name.lower()
    known = ALIASES.get(known, known)
    if known not in shape_names():
        raise InputError("model", [f'no shape "{name}"{nearest(known, shape_names())}'])
    config: dict[str, Any] = json.loads(files(__name__).joinpath(f"{known}.json").read_text(encoding="utf-8"))
    return config
