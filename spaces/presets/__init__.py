"""Spaces and published designs that come with peftscape, as TOML."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from peftscape.spaces.design import Design
from peftscape.spaces.words import InputError, nearest

#: Files of published designs: those of the unified space, and further ones.
DESIGNS = ("textbook", "published")


def preset_names() -> list[str]:
    """The spaces that come with peftscape."""
    names = [f.name.removesuffix(".toml") for f in files(__name__).iterdir() if f.name.endswith(".toml")]
    return sorted(n for n in names if n not in DESIGNS)


@cache
def preset(name: str) -> dict[str, Any]:
    """A space's TOML table. Raises InputError with the nearest name."""
    if name not in preset_names():
        raise InputError("space", [f'no preset "{name}"{nearest(name, preset_names())}'])
    return _read(name)


@cache
def designs(file: str) -> dict[str, Design]:
    """The designs of one of `DESIGNS` by name."""
    return {name: Design.from_json(row, where=f"{file}.{name}") for name, row in _read(file).items()}


@cache
def textbook() -> dict[str, Design]:
    """Published designs by name. A search starts with those that its space has."""
    return {name: design for file in DESIGNS for name, design in designs(file).items()}


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(files(__name__).joinpath(f"{name}.toml").read_text())
