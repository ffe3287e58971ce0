"""peftscape searches the design space of parameter-efficient fine-tuning and says what it found.

    import peftscape

    study = peftscape.run_search(peftscape.read_config("search.toml"), Path("runs/demo"))
    adapter = peftscape.load("runs/demo/adapters/7")

Names are loaded when they are first used: `import peftscape` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftscape.analysis.front import front as front
    from peftscape.analysis.front import parse_objectives as parse_objectives
    from peftscape.analysis.report import write_report as write_report
    from peftscape.analysis.sources import Study as Study
    from peftscape.analysis.sources import load as load_study  # noqa: F401
    from peftscape.search.adapter import Adapter as Adapter
    from peftscape.search.backbone import Backbone as Backbone
    from peftscape.search.check import check as check
    from peftscape.search.config import SearchConfig as SearchConfig
    from peftscape.search.config_file import read_config as read_config
    from peftscape.search.export import export as export
    from peftscape.search.export import load as load
    from peftscape.search.study import run_search as run_search
    from peftscape.search.task import load_task as load_task
    from peftscape.search.task_config import TaskConfig as TaskConfig
    from peftscape.search.train import train_design as train_design
    from peftscape.spaces.design import Design as Design
    from peftscape.spaces.methods import methods as methods
    from peftscape.spaces.price import costs as costs
    from peftscape.spaces.record import Record as Record
    from peftscape.spaces.sites import site_map as site_map
    from peftscape.spaces.space import Space as Space
    from peftscape.spaces.space_file import read_space as read_space

    __version__: str

# The function that searches is `run_search`: `peftscape.search` is the package it lives in.
_HOMES = {
    "Adapter": "search.adapter",
    "Backbone": "search.backbone",
    "Design": "spaces.design",
    "Record": "spaces.record",
    "SearchConfig": "search.config",
    "Space": "spaces.space",
    "Study": "analysis.sources",
    "TaskConfig": "search.task_config",
    "check": "search.check",
    "costs": "spaces.price",
    "export": "search.export",
    "front": "analysis.front",
    "load": "search.export",
    "load_study": "analysis.sources:load",
    "load_task": "search.task",
    "methods": "spaces.methods",
    "parse_objectives": "analysis.front",
    "read_config": "search.config_file",
    "read_space": "spaces.space_file",
    "run_search": "search.study",
    "site_map": "spaces.sites",
    "train_design": "search.train",
    "write_report": "analysis.report",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("peftscape")
    elif name in _HOMES:
        module, _, there = _HOMES[name].partition(":")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), there or name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
