"""Commands that read what a search left: the front, the report, the adapters."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftscape.cli_common import Json, plain_table, print_json, show

if TYPE_CHECKING:
    from peftscape.analysis.sources import Study

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, an Optuna storage, or JSON lines.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (front, report, export, predict):
        app.command()(command)


def show_study(study: Study, out: Path) -> None:
    """The front of a search, and where everything lies."""
    from peftscape.analysis.table import front_table

    files = [(name, out / place) for name, place in _PLACES.items() if (out / place).exists()]
    show(front_table(study), "", plain_table("", "", rows=files))


_PLACES = {"study": "study.db", "report": "report.html", "adapters": "adapters"}


def front(
    run: Run,
    objectives: Annotated[str | None, typer.Option(help='Other axes: "accuracy:max,peak_bytes:min".')] = None,
    all_: Annotated[bool, typer.Option("--all", help="All trials instead of the front.")] = False,
    as_json: Json = False,
) -> None:
    """Show the front of a run."""
    from peftscape.analysis import table
    from peftscape.analysis.front import parse_objectives
    from peftscape.analysis.sources import load
    from peftscape.search.metrics import METRICS

    study = load(run)
    known = sorted({*METRICS, *(record.metric for record in study.records)})
    axes = parse_objectives(objectives, metrics=known) if objectives else None
    if as_json:
        print_json(table.trials_json(study) if all_ else table.front_json(study, axes))
    elif all_:
        show(_trials(study))
    else:
        show(table.front_table(study, axes))


def _trials(study: Study) -> Any:
    from peftscape.analysis.units import amount, score

    rows = [
        (
            record.number,
            record.state,
            record.label + (f" ({record.textbook})" if record.textbook else ""),
            score(record.validation),
            "–" if record.costs is None else amount(record.costs.trainable),
            f"{len(record.retests)} retests" if record.retests else record.failure.kind if record.failure else "",
        )
        for record in study.records
    ]
    return plain_table("#", "state", "design", study.quality.name, "parameters", "", rows=rows, right=(0, 3, 4))


def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="The HTML file; report.html in the run's folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report anew: one HTML file that needs no network."""
    from peftscape.analysis.report import write_report
    from peftscape.analysis.sources import load

    folder = Path(run) if Path(run).is_dir() else Path()
    written = write_report(load(run), out or folder / "report.html")
    if as_json:
        print_json({"report": str(written)})
    else:
        show(str(written))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Gets the adapter.")],
    trial: Annotated[int, typer.Option(help="Its number, as in the front.")],
    as_json: Json = False,
) -> None:
    """Write an adapter as HF peft reads it, or in peftscape's own format where peft cannot express it."""
    from peftscape.spaces.words import InputError

    folder = run / "adapters" / str(trial)
    if not folder.is_dir():
        if not run.is_dir():
            raise InputError(str(run), ["no such folder; a run's folder was expected"])
        kept = sorted((p.name for p in (run / "adapters").glob("*")), key=lambda n: (len(n), n))
        there = ", ".join(kept) or "none"
        raise InputError(str(run), [f"no adapter of trial {trial} was kept; there are: {there}"])

    from peftscape.search.export import export as write
    from peftscape.search.export import load

    adapter = load(folder)
    done = write(adapter.tensors, adapter.card, adapter.backbone, adapter.head, directory)
    if as_json:
        print_json({"directory": str(done.directory), "format": done.format, "reason": done.reason})
    else:
        loads = "peft.PeftModel.from_pretrained" if done.format == "peft" else "peftscape.load"
        show(f"{done.directory}: {done.format} format ({done.reason}); {loads} reads it")


def predict(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")],
    data: Annotated[Path, typer.Argument(metavar="DATA.csv", help="CSV, TSV, JSON lines or Parquet.")],
    text: Annotated[str, typer.Option(help="The column with the texts.")] = "text",
    pair: Annotated[str | None, typer.Option(help="The column with the second texts.")] = None,
    out: Annotated[Path | None, typer.Option(help="A CSV file; standard output without.")] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, if it lies elsewhere now.")] = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter makes of each row of a file."""
    from peftscape.search.tables import read_file
    from peftscape.spaces.words import InputError, nearest

    table = read_file(str(data))
    names = [text] if pair is None else [text, pair]
    if errors := [f'no column "{n}"{nearest(n, table.names)}' for n in names if n not in table.names]:
        raise InputError(data.name, errors)
    columns = [["" if value is None else str(value) for value in table.column(name)] for name in names]

    from peftscape.search.config import ModelConfig
    from peftscape.search.export import load

    where = None if model is None else ModelConfig(source=model).path()
    found = load(adapter, model=where).predict(columns[0], columns[1] if pair else None)
    if as_json:
        print_json(found)
        return
    heads = [key for key in ("label", "score") if found and key in found[0]]
    rows = ([*texts, *(answer[key] for key in heads)] for *texts, answer in zip(*columns, found, strict=True))
    if out is None:
        _write(sys.stdout, [*names, *heads], rows)
    else:
        with out.open("w", encoding="utf-8", newline="") as file:
            _write(file, [*names, *heads], rows)
        show(str(out))


def _write(file: Any, heads: list[str], rows: Any) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
