"""Spaces and textbook designs that come with peftscape, as TOML."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from peftscape.spaces.design import Design
from peftscape.spaces.words import InputError, nearest


def preset_names() -> list[str]:
    """The spaces that come with peftscape."""
    names = [f.name.removesuffix(".toml") for f in files(__name__).iterdir() if f.name.endswith(".toml")]
    return sorted(n for n in names if n != "textbook")


@cache
def preset(name: str) -> dict[str, Any]:
    """A space's TOML table. Raises InputError with the nearest name."""
    if name not in preset_names():
        raise InputError("space", [f'no preset "{name}"{nearest(name, preset_names())}'])
    return tomllib.loads(files(__name__).joinpath(f"{name}.toml").read_text())


@cache
def textbook() -> dict[str, Design]:
    """Published designs by name."""
    rows = tomllib.loads(files(__name__).joinpath("textbook.toml").read_text())
    return {name: Design.from_json(row, where=f"textbook.{name}") for name, row in rows.items()}
