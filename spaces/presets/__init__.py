"""Spaces and published designs that come with peftscape, as TOML."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from peftscape.spaces.design import Design
from peftscape.spaces.words import InputError, nearest

#: Files of published designs: those of the unified space, and further ones.
DESIGNS = ("textbook", "published")
#: What `peftscape methods` tells besides: compositions, tuners of HF peft, methods that are settings or left out.
LISTED = "listed"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published design, and what its file says of it.

    Args:
        category: the survey's (arXiv:2312.12148); `reference` for what others are measured against.
    """

    design: Design
    category: str
    about: str
    source: str = ""


def preset_names() -> list[str]:
    """The spaces that come with peftscape."""
    names = [f.name.removesuffix(".toml") for f in files(__name__).iterdir() if f.name.endswith(".toml")]
    return sorted(n for n in names if n not in (*DESIGNS, LISTED))


@cache
def preset(name: str) -> dict[str, Any]:
    """A space's TOML table. Raises InputError with the nearest name."""
    if name not in preset_names():
        raise InputError("space", [f'no preset "{name}"{nearest(name, preset_names())}'])
    return _read(name)


@cache
def published(file: str) -> dict[str, Published]:
    """The designs of one of `DESIGNS` by name, with what is said of them."""
    found = {}
    for name, row in _read(file).items():
        said = {key: row.pop(key) for key in ("category", "about", "source") if key in row}
        found[name] = Published(design=Design.from_json(row, where=f"{file}.{name}"), **said)
    return found


def designs(file: str) -> dict[str, Design]:
    """The designs of one of `DESIGNS` by name."""
    return {name: row.design for name, row in published(file).items()}


@cache
def textbook() -> dict[str, Design]:
    """Published designs by name. A search starts with those that its space has."""
    return {name: design for file in DESIGNS for name, design in designs(file).items()}


def listed() -> dict[str, dict[str, dict[str, str]]]:
    """What stands beside methods, designs and spaces, by group and name."""
    return _read(LISTED)


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(files(__name__).joinpath(f"{name}.toml").read_text())
