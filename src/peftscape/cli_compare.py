"""The command that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftscape.cli_common import Json, print_json, show

Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs' folders, storages, JSON lines or CSV.")]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(compare)


def compare(
    runs: Runs,
    objectives: Annotated[str | None, typer.Option(help='The axes: "accuracy:max,trainable:min".')] = None,
    by: Annotated[str | None, typer.Option(help="A key of the configuration, as search.sampler, or method.")] = None,
    reference: Annotated[str | None, typer.Option(help='Where nothing counts any more: "accuracy=0.6".')] = None,
    out: Annotated[Path | None, typer.Option(help="Also write an HTML file with the figures.")] = None,
    as_json: Json = False,
) -> None:
    """Compare repeated runs: hypervolume by trials and time, attainment, tests, and how many repeats they need.

    Runs whose configurations differ in name and seed alone are repeats of one group.
    """
    from peftscape.analysis.runs import compare as compare_studies
    from peftscape.analysis.runs import parse_reference
    from peftscape.analysis.runs_report import compared_json, compared_tables, write_comparison
    from peftscape.analysis.sources import load

    studies = [load(run) for run in runs]
    axes = studies[0].aimed(objectives).objectives if objectives else None
    found = compare_studies(studies, axes, by=by, reference=parse_reference(reference) if reference else None)
    if out is not None:
        write_comparison(found, out)
    if as_json:
        print_json(compared_json(found))
        return
    for part in compared_tables(found):
        show(part, "")
    if out is not None:
        show(str(out))
