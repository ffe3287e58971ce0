"""Commands that read what a search left: the front, the report, the adapters."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftscape.cli_common import Json, plain_cell, plain_table, print_json, show

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
    limits: Annotated[str | None, typer.Option(help='Constraints: "trainable<=1e6,accuracy>=0.8".')] = None,
    all_: Annotated[bool, typer.Option("--all", help="All trials instead of the front.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew as trials end, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show the front of a run, or of other people's results: CSV, JSON lines, a folder of HF peft's JSONs."""
    from peftscape.analysis import table

    if watch:
        from peftscape.analysis.watch import watch as follow

        follow(lambda: _studied(run, objectives, limits))
        return
    study = _studied(run, objectives, limits)
    if as_json:
        print_json(
            table.trials_json(study) | table.front_json(study, everything=True) if all_ else table.front_json(study)
        )
    elif all_:
        show(_trials(study))
    else:
        show(table.front_table(study))


def _studied(run: str, objectives: str | None, limits: str | None = None) -> Study:
    import dataclasses

    from peftscape.analysis.front import parse_limits, within
    from peftscape.analysis.measures import measured
    from peftscape.analysis.sources import load

    study = load(run)
    study = study.aimed(objectives) if objectives else study
    if limits:
        kept = within(study.records, parse_limits(limits, known=measured(study.records)))
        study = dataclasses.replace(study, records=kept)
    return study


def _trials(study: Study) -> Any:
    from peftscape.analysis.measures import measure
    from peftscape.analysis.states import last_score, state_of
    from peftscape.analysis.units import amount, score

    cost = study.cost.name
    rows = [
        (
            record.number,
            state_of(record),
            record.label + (f" ({record.textbook})" if record.textbook else ""),
            score(last_score(record)),
            amount(measure(record, cost)),
            f"{len(record.retests)} retests" if record.retests else record.failure.kind if record.failure else "",
        )
        for record in study.records
    ]
    return plain_table(
        "#",
        "state",
        "design",
        study.quality.name,
        cost.replace("trainable", "parameters"),
        "",
        rows=rows,
        right=(0, 3, 4),
    )


def report(
    run: Run,
    objectives: Annotated[str | None, typer.Option(help='Other axes: "accuracy:max,peak_bytes:min".')] = None,
    out: Annotated[Path | None, typer.Option(help="The file; report.html in the run's folder.")] = None,
    form: Annotated[str, typer.Option("--format", help="html, md (for pull requests) or png (the front).")] = "html",
    as_json: Json = False,
) -> None:
    """Write the report: one HTML file that needs no network, or Markdown, or a picture of the front."""
    from peftscape.analysis.forms import write
    from peftscape.spaces.words import InputError

    if form not in ("html", "md", "png"):
        raise InputError("--format", [f'expected html, md or png, found "{form}"'])
    study = _studied(run, objectives)
    folder = Path(run) if (Path(run) / "study.db").is_file() else Path()
    written = write(study, out or folder / f"report.{form}", form)
    if as_json:
        print_json({"report": str(written)})
    else:
        show(str(written))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Gets the adapter.")],
    trial: Annotated[int, typer.Option(help="Its number, as in the front.")],
    merge: Annotated[bool, typer.Option("--merge", help="A whole transformers model, the adapter folded in.")] = False,
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
    if merge:
        from peftscape.search.head import auto_class
        from peftscape.search.merge import export_merged

        written = export_merged(adapter, directory)
        if as_json:
            print_json({"directory": str(written), "format": "transformers", "reason": "merged"})
        else:
            show(f"{written}: a whole model; transformers' {auto_class(adapter.card, adapter.backbone)} reads it")
        return
    done = write(adapter.tensors, adapter.card, adapter.backbone, adapter.head, directory)
    if as_json:
        print_json({"directory": str(done.directory), "format": done.format, "reason": done.reason})
    else:
        loads = "peft.PeftModel.from_pretrained" if done.format == "peft" else "peftscape.load"
        show(f"{done.directory}: {done.format} format ({done.reason}); {loads} reads it")


def predict(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")],
    data: Annotated[Path, typer.Argument(metavar="DATA.csv", help="CSV, TSV, JSON lines or Parquet.")],
    text: Annotated[str, typer.Option(help="The column with the texts, or with their words.")] = "text",
    pair: Annotated[str | None, typer.Option(help="The column with the second texts, or with completions.")] = None,
    options: Annotated[str | None, typer.Option(help="The column with the answers to choose from.")] = None,
    generate: Annotated[
        int | None, typer.Option(help="Write what follows each text, this many tokens at most.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A CSV file; standard output without.")] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, if it lies elsewhere now.")] = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter makes of each row of a file: a label, a number, a text's loss, or what follows it."""
    from peftscape.search.language_examples import read_options
    from peftscape.search.tables import TaskError, read_file
    from peftscape.spaces.words import InputError, nearest

    table = read_file(str(data))
    names = [name for name in (text, pair, options) if name is not None]
    if errors := [f'no column "{n}"{nearest(n, table.names)}' for n in names if n not in table.names]:
        raise InputError(data.name, errors)
    columns = [[str(_cell(value)) for value in table.column(name)] for name in names]
    answers = None
    if options is not None:
        unread: list[str] = []
        answers = read_options(table, options, unread)
        if unread:
            raise TaskError(data.name, [line.removeprefix("task.options: ") for line in unread])

    from peftscape.search.config import ModelConfig
    from peftscape.search.export import load

    where = None if model is None else ModelConfig(source=model).path()
    loaded = load(adapter, model=where)
    found: list[dict[str, Any]]
    if generate is not None:
        found = [{"continuation": said} for said in loaded.generate(columns[0], most=generate)]
    elif loaded.card.head == "token":
        found = loaded.predict([_words(cell) for cell in columns[0]])
    else:
        found = loaded.predict(columns[0], columns[1] if pair else None, options=answers)
    if as_json:
        print_json(found)
        return
    shown = ("label", "score", "labels", "scores", "loss", "perplexity", "tokens", "continuation")
    heads = [key for key in shown if found and key in found[0]]
    rows = ([*texts, *(_cell(answer[key]) for key in heads)] for *texts, answer in zip(*columns, found, strict=True))
    if out is None:
        _write(sys.stdout, [*names, *heads], rows)
    else:
        with out.open("w", encoding="utf-8", newline="") as file:
            _write(file, [*names, *heads], rows)
        show(str(out))


def _cell(value: Any) -> Any:
    """A value as one cell of a table: lists as JSON, nothing as no text."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value


def _words(cell: str) -> list[str]:
    """The words of a text, which is a list of them as JSON, or has blanks between them."""
    from peftscape.search.language_examples import parsed

    words = parsed(cell)
    return [str(word) for word in words] if isinstance(words, list) else cell.split()


def _write(file: Any, heads: list[str], rows: Any) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([plain_cell(head) for head in heads])
    writer.writerows([plain_cell(cell) for cell in row] for row in rows)
