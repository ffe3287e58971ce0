"""All methods, by name; a file in this folder is found by being there."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from peftscape.spaces.methods.base import Method
from peftscape.spaces.words import InputError, nearest


@cache
def methods() -> dict[str, type[Method]]:
    """Every method by name, in alphabetical order."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            own = isinstance(value, type) and value.__module__ == f"{__name__}.{module.name}"
            if own and issubclass(value, Method) and "name" in vars(value):  # one without is a base of others
                found[value.name] = value
    return dict(sorted(found.items()))


def method(name: str) -> type[Method]:
    """The method of that name, `peft:NAME` for a tuner of HF peft. Raises InputError with the nearest one."""
    if name.startswith("peft:"):
        from peftscape.spaces.hf_peft import tuner

        return tuner(name)
    if name not in methods():
        raise InputError("method", [f'no method "{name}"{nearest(name, methods())}'])
    return methods()[name]
