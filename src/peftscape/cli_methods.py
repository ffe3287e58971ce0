"""`peftscape methods`: all there is to choose from, by the survey's categories (Xu et al. 2023, arXiv:2312.12148)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftscape.cli_common import Json, plain_table, print_json, show

if TYPE_CHECKING:
    from peftscape.spaces.design import Design, Placement
    from peftscape.spaces.methods.base import Method
    from peftscape.spaces.peft_form import PeftForm
    from peftscape.spaces.presets import Published
    from peftscape.spaces.sites import SiteMap

CATEGORIES = ("additive", "partial", "reparameterised", "hybrid", "unified", "reference")
#: What a row of a group is called behind its name.
GROUPS = {
    "methods": "",
    "presets": "published design",
    "spaces": "space",
    "settings": "setting",
    "left_out": "left out",
}


def methods(as_json: Json = False) -> None:
    """List methods, published designs and spaces by category, then compositions and HF peft's tuners."""
    found = _all()
    if as_json:
        print_json(found)
        return
    for category in CATEGORIES:
        show(category)
        for group, words in GROUPS.items():
            for row in (row for row in found[group] if row["category"] == category):
                _show(row, words)
        show("")
    show("compositions, on placements of any method where they make sense")
    for row in found["compositions"]:
        _show(row, "")
    show("", "tuners of HF peft")
    for row in found["tuners"]:
        _show(row, "")


def _all() -> dict[str, list[dict[str, Any]]]:
    from peftscape.spaces.methods import methods as all_methods
    from peftscape.spaces.presets import DESIGNS, listed, preset, preset_names, published
    from peftscape.spaces.shapes import shape
    from peftscape.spaces.sites import site_map

    sites = site_map(shape("roberta-base"))  # whether HF peft can say a design is a question to its sites
    designs = {name: row for file in DESIGNS for name, row in published(file).items()}
    spaces = {name: preset(name) for name in preset_names()}
    keys = ("category", "about", "source")
    return {
        "methods": [_method(kind) for kind in all_methods().values()],
        "presets": [_preset(name, row, sites) for name, row in designs.items()],
        "spaces": [{"name": name} | {k: row[k] for k in keys if k in row} for name, row in spaces.items()],
        **{group: [{"name": name} | row for name, row in rows.items()] for group, rows in listed().items()},
    }


def _method(kind: type[Method]) -> dict[str, Any]:
    from peftscape.spaces.methods.base import Method
    from peftscape.spaces.sites import KINDS

    paper = re.search(r"\(([^()]*\d{4}[^()]*)\)", (inspect.getdoc(inspect.getmodule(kind)) or "").split("\n")[0])
    equation, *notes = (" ".join(part.split()) for part in (inspect.getdoc(kind) or "").split("\n\n"))
    return {
        "name": kind.name,
        "category": kind.category,
        "equation": equation,
        "notes": " ".join(notes),
        "source": paper[1] if paper else None,
        "sites": [site for site in KINDS if site in kind.sites],
        "default_sites": list(kind.default_sites),
        "knobs": {k: list(v) if isinstance(v, tuple) else v for k, v in kind().knobs().items()},
        "searched": sorted(kind.domains()),
        "execution": kind.execution,
        "merges": kind.merges,
        "hf_peft": kind.in_peft is not Method.in_peft,
        "exact_start": kind.exact_start,
    }


def _preset(name: str, row: Published, sites: SiteMap) -> dict[str, Any]:
    execution = {p.method.execution for p in row.design.placements}
    return {
        "name": name,
        "category": row.category,
        "about": row.about,
        "source": row.source or None,
        "placements": row.design.json()["placements"],
        "execution": next((e for e in ("solo", "rewritten") if e in execution), "packed"),
        "merges": all(p.merges for p in row.design.placements),
        "hf_peft": _in_peft(row.design, sites),
    }


def _in_peft(design: Design, sites: SiteMap) -> bool:
    """Whether HF peft can say it: every placement, and all in an adapter of one kind."""
    forms = [form for p in design.placements for form in _peft_forms(p, sites)]
    kinds = {form.kind if form else None for form in forms}
    return len(kinds) == 1 and None not in kinds and not all(form and form.own for form in forms)


def _peft_forms(placement: Placement, sites: SiteMap) -> Iterator[PeftForm | None]:
    for site, _ in placement.declared(sites):
        form = placement.method.in_peft(site)
        yield None if isinstance(form, str) or placement.gate else form


def _show(row: dict[str, Any], words: str) -> None:
    rows = [(key, row[key]) for key in ("about", "equation", "notes", "use", "on", "source") if row.get(key)]
    if "sites" in row:
        rows.append(("sites", f"{', '.join(row['sites'])} (default {', '.join(row['default_sites'])})"))
    if row.get("knobs"):
        rows.append(("knobs", _knobs(row["knobs"])))
    for placement in row.get("placements", ()):
        rows.append((placement["method"], _knobs({k: v for k, v in placement.items() if k != "method"})))
    if "execution" in row:
        merges = "merges into the weights" if row["merges"] else "stays beside the weights"
        rows.append(("runs", f"{row['execution']}; {merges}"))
        rows.append(("HF peft", "loads its exports" if row["hf_peft"] else "not exported to it"))
    name = f"  {row['name']} ({words})" if words else f"  {row['name']}"
    show(name, plain_table("", "", "", rows=[("   ", *cells) for cells in rows]))


def _knobs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_toml(value)}" for name, value in values.items())


def _toml(value: Any) -> str:
    """As a file says it, but for quotes."""
    if isinstance(value, dict):
        return f"{{{_knobs(value)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
