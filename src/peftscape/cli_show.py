"""Commands that describe: a model's sites, this machine, and what there is to choose from."""

from __future__ import annotations

import platform
import re
from typing import Annotated, Any

import typer

from peftscape.cli_common import Json, plain_table, print_json, show
from peftscape.cli_methods import methods


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (methods, sites, doctor):
        app.command()(command)


def sites(
    model: Annotated[str, typer.Argument(help="minilm, a folder, or a hub id in the local cache.")],
    as_json: Json = False,
) -> None:
    """Show where a model can be adapted, from its configuration, and what it refuses."""
    from peftscape.search.config import ModelConfig

    found = ModelConfig(source=model).site_map()
    kinds: list[dict[str, Any]] = []
    for kind in found.kinds:
        of_kind = [s for s in found.sites if s.kind == kind]
        inner = [s for s in of_kind if 0 <= s.layer < found.layers]
        first = (inner or of_kind)[0]
        kinds.append(
            {
                "kind": kind,
                "sites": len(of_kind),
                "per_layer": sum(s.layer == first.layer for s in inner),
                "shapes": [list(shape) for shape in dict.fromkeys((s.d_in, s.d_out) for s in of_kind)],
                "path": re.sub(r"(?<=\.)\d+(?=\.|$)", "{layer}", first.path) if inner else first.path,
                "columns": None if first.span is None else list(first.span),
            }
        )
    value = {
        "model": model,
        "family": found.family,
        "layers": found.layers,
        "d_model": found.d_model,
        "parameters": found.parameters,
        "max_positions": found.max_positions,
        "head": None if found.head is None else {"pooling": found.head.pooling, "modules": list(found.head.modules)},
        "kinds": kinds,
        "refused": dict(found.refused),
    }
    if as_json:
        print_json(value)
        return
    show(
        f"{model}: {found.family}, {found.layers} layers of {found.d_model}, {found.parameters:,} parameters",
        "",
    )
    rows = [
        (
            row["kind"],
            row["per_layer"] or "–",
            ", ".join(f"{d_in} x {d_out}" for d_in, d_out in row["shapes"] if d_in),
            f"{row['path']}{row['columns'] or ''}{' and others' if row['per_layer'] > 1 else ''}" or "–",
        )
        for row in kinds
    ]
    show(plain_table("site", "a layer", "in x out", "module", rows=rows, right=(1,)))
    if found.head is None:
        show("", 'no classifier in transformers for this family: take head = "mean"')
    if found.refused:
        show("", "refused", plain_table("", "", rows=[(f"  {k}", why) for k, why in found.refused.items()]))


def doctor(
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Rates, kept for later plans.")] = True,
    as_json: Json = False,
) -> None:
    """Show the processor, threads, GPU, versions and embedded data; measure how fast the machine is, for plans."""
    import os

    import torch

    from peftscape.search.backbone import has_bfloat16, resolve_dtype
    from peftscape.search.environment import processor, versions

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    value: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(),
        "dtype": resolve_dtype("auto"),
        "gpus": gpus,
        "versions": {"python": platform.python_version(), **versions()},
        "embedded": _embedded(),
        "rates": _rates() if measure else None,
    }
    if as_json:
        print_json(value)
        return
    yes = "in hardware" if value["bfloat16"] else "not in hardware"
    rows = [
        ("processor", value["processor"]),
        ("threads", f"{value['threads']} of {value['cores']} cores"),
        ("bfloat16", f"{yes}; models are loaded in {value['dtype']}"),
        ("gpu", ", ".join(gpus) or "none"),
        ("versions", ", ".join(f"{name} {number}" for name, number in value["versions"].items())),
    ]
    if found := value["rates"]:
        speeds = ", ".join(f"{name} {flops / 1e9:,.3g} GFLOP/s" for name, flops in found["flops"].items())
        rows.append((found["device"], f"{speeds}; {found['bandwidth'] / 1e9:,.3g} GB/s; {found['kept']}"))
    rows += [(row["name"], row["install"] or "installed") for row in value["embedded"]]
    show(plain_table("", "", rows=rows))


def _rates() -> dict[str, Any]:
    """What this machine does, measured now and kept for `peftscape plan`."""
    from dataclasses import asdict

    from peftscape.search.speed import measure_rates
    from peftscape.spaces.rates import write_rates

    found = measure_rates()
    try:
        kept = f"kept in {write_rates(found)}"
    except OSError as error:
        kept = f"not kept: {error}"
    return asdict(found) | {"kept": kept}


def _embedded() -> list[dict[str, Any]]:
    """Each embedded model and task, and how to install what it lacks."""
    from peftscape.search.embedded import EMBEDDED_MODELS, EMBEDDED_TASKS, MissingPackageError

    rows = []
    for kind, names in (("model", EMBEDDED_MODELS), ("task", EMBEDDED_TASKS)):
        for name in names:
            package = EMBEDDED_MODELS[name][0] if kind == "model" else EMBEDDED_TASKS[name].package
            install = None
            try:  # the package's file alone: converting one would take half a minute
                _ = package.file(EMBEDDED_MODELS[name][1], name) if kind == "model" else EMBEDDED_TASKS[name].paths()
            except MissingPackageError:
                install = package.install
            rows.append({"name": f"{kind} {name}", "package": package.name, "install": install})
    return rows
