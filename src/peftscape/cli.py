"""The command line: `peftscape search`, `check`, `methods`, `sites`, `train`, `front`, `report`, `export` ...

Commands load what they need when they run, so that help, checks and errors answer at once.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from peftscape import cli_compare, cli_plan, cli_runs, cli_show
from peftscape.cli_common import (
    BAD_INPUT,
    INTERRUPTED,
    Json,
    Set,
    command_started,
    plain_table,
    print_json,
    show,
    told_plainly,
)

if TYPE_CHECKING:
    from peftscape.search.check import Checked
    from peftscape.search.config import SearchConfig
    from peftscape.spaces.design import Design


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with told_plainly():
            return super().invoke(ctx)


app = typer.Typer(
    name="peftscape",
    cls=_Group,
    help="Search the design space of parameter-efficient fine-tuning and say what was found.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Option(help="minilm, a folder, or a hub id.")]
TaskOption = Annotated[str | None, typer.Option(help="An embedded task, a file, a folder, or a hub id.")]
Space = Annotated[str | None, typer.Option(help="A preset: unified, lora, autopeft, s3delta.")]
File = Annotated[Path | None, typer.Argument(metavar="FILE", help="A TOML file; the embedded default without.")]


@app.command()
def search(
    file: File = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    trials: Annotated[int | None, typer.Option(help="How many designs are trained.")] = None,
    time: Annotated[str | None, typer.Option(help="30m in all, or +5m more than was spent.")] = None,
    more: Annotated[int | None, typer.Option(min=1, help="Go on with this many more trials.")] = None,
    space: Space = None,
    model: Model = None,
    task: TaskOption = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampler and the lanes.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the search.")] = 1,
    storage: Annotated[str | None, typer.Option(help="A PostgreSQL database, for several machines.")] = None,
    fork: Annotated[bool, typer.Option("--fork", help="A new study that knows the results of the one there.")] = False,
    ablate: Annotated[bool, typer.Option("--ablate", help="Then train the path to the best design.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Search, many designs training at once, for a front, a report and adapters.

    Interrupted, the same command goes on where it stopped; finished, it prints the front.
    """
    from peftscape.search.budget import parse_duration
    from peftscape.spaces.words import InputError

    more_time_s = None
    if time is not None and time.startswith("+"):
        try:
            more_time_s = parse_duration(time[1:])
        except ValueError as error:
            raise InputError("--time", [str(error)]) from None
        time = None
    named = {"space": space, "model.source": model, "search.seed": seed}
    named |= {"budget.trials": trials, "budget.time": time}
    config = _config(file, out, [*_task(task), *_overrides(named), *(set_ or [])])
    out = out or Path("runs") / config.name
    old = out if fork and (out / "study.db").is_file() else None
    if old is not None:
        out = next(p for n in itertools.count(2) if not (p := out.with_name(f"{old.name}-{n}")).exists())
        show(f"the new study is in {out}")

    from peftscape.search.study import run_search

    try:
        study = run_search(
            config, out, more_trials=more, more_time_s=more_time_s, quiet=quiet, storage_url=storage, fork=old,
            workers=workers, started=command_started(),
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if ablate:
        from peftscape.analysis.sources import SourceError
        from peftscape.search.ablate import ablate as train_path

        try:
            study = train_path(out, storage_url=storage, name=config.name, quiet=quiet)
        except SourceError as error:  # the search itself is whole
            typer.echo(str(error), err=True)
    cli_runs.show_study(study, out)


@app.command()
def check(file: File = None, set_: Set = None, as_json: Json = False) -> None:
    """List all errors of a configuration, or say how large its space is and what its ends cost."""
    from peftscape.search.check import Checked
    from peftscape.search.check import check as check_config
    from peftscape.search.config_file import DEFAULT, read_config
    from peftscape.spaces.words import InputError

    try:
        config = read_config(file if file is not None else DEFAULT, set_ or [])
        found = check_config(config)
        if found.errors:
            raise InputError(file.name if file else "configuration", found.errors)
    except InputError as error:
        if not as_json:
            raise
        print_json(Checked(errors=error.errors).json())
        raise typer.Exit(BAD_INPUT) from None
    if as_json:
        print_json(found.json())
    else:
        _show_checked(str(file or "the embedded default"), config, found)


@app.command()
def train(
    design: Annotated[str, typer.Argument(metavar="DESIGN", help="A textbook design's name, a JSON file, or JSON.")],
    out: Annotated[Path, typer.Option(help="Gets the adapter, of several seeds that of the first.")],
    model: Model = None,
    task: TaskOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from search.seed on; they train together.")] = 1,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; the design's own without.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples instead of epochs.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train one design and save its adapter."""
    from peftscape.search.config_file import DEFAULT, read_config
    from peftscape.search.config_values import is_here
    from peftscape.spaces.words import InputError

    chosen = _design(design)
    if epochs is not None:
        chosen = replace(chosen, training=replace(chosen.training, epochs=epochs))
    named = {"model.source": model, "search.epochs": epochs}
    config = read_config({**DEFAULT, "name": "train"}, [*_task(task), *_overrides(named), *(set_ or [])])
    if is_here(config.model) and (errors := chosen.check(config.model.site_map())):
        raise InputError("design" if design.lstrip().startswith("{") else Path(design).name, errors)

    from peftscape.search.train import train_design

    seed = config.search.seed
    result = train_design(chosen, config, out=out, seed=seed, seeds=seeds, examples=examples, quiet=as_json)
    if as_json:
        print_json(result)
    else:
        _show_trained(result)


def _config(file: Path | None, out: Path | None, overrides: list[str]) -> SearchConfig:
    """From the file; without one, from the run that is in the folder, or the embedded default."""
    from peftscape.search.config_file import DEFAULT, read_config

    if file is not None:
        return read_config(file, overrides)
    table = dict(DEFAULT)
    if out is not None:
        table["name"] = out.resolve().name
    folder = out or Path("runs") / str(table["name"])
    if (folder / "study.db").is_file():
        from peftscape.analysis.sources import load

        # What is there goes on as it was asked for, whatever it was.
        table = dict(load(folder).config) or table
    return read_config(table, overrides)


def _overrides(named: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]


def _task(word: str | None) -> list[str]:
    """The whole `[task]` table anew: columns of the file's own data mean nothing in another's."""
    import difflib

    from peftscape.search.embedded import EMBEDDED_TASKS
    from peftscape.search.tables import is_file_name

    if word is None:
        return []
    close = difflib.get_close_matches(word, EMBEDDED_TASKS, n=1, cutoff=0.7)
    elsewhere = is_file_name(word) or "/" in word or Path(word).is_dir() or not close
    key = "path" if word not in EMBEDDED_TASKS and elsewhere else "name"
    return [f"task={{{key} = {json.dumps(word)}}}"]


def _design(word: str) -> Design:
    from peftscape.spaces.plan_input import read_design
    from peftscape.spaces.words import InputError

    found = read_design(word)
    if isinstance(found, str):
        raise InputError("design", [f'"{found}" is a space of many designs: peftscape search --space {found}'])
    return found


def _show_trained(result: dict[str, Any]) -> None:
    from peftscape.analysis.units import SHOWN, amount, score

    costs = ((c.title.partition(" (")[0].lower(), amount(result["costs"][c.name], c.unit)) for c in SHOWN)
    rows = [(row["seed"], score(row["validation"]), score(row["test"])) for row in result["scores"]]
    show(
        f"{result['label']}: {result['examples']:,} examples",
        plain_table("", "", rows=costs),
        "",
        plain_table("seed", f"validation {result['metric']}", "test", rows=rows, right=(0, 1, 2)),
        *(f"failed: {line}" for line in result["failed"]),
        "",
        f"adapter of seed {rows[0][0]}: {result['adapter']}",
    )


def _show_checked(source: str, config: SearchConfig, found: Checked) -> None:
    from peftscape.analysis.units import SHOWN, amount
    from peftscape.search.task_config import task_kind

    lines = [("model", config.model.source), ("task", config.task.source)]
    if found.rows is not None:
        kind = "numbers" if found.outputs == 1 else f"{found.outputs} classes"
        kind = "to be predicted" if task_kind(config.task) == "lm" else kind
        typical = f", texts of {found.tokens} tokens" if found.tokens else ""
        lines[-1] = ("task", f"{config.task.source}: {found.rows:,} training rows{typical}, {kind}")
    if found.examples is not None:
        lines.append(("a training", f"{found.examples:,} examples"))
    if found.designs is not None:
        many = f"{found.designs:,.0f}" if found.designs < 1e9 else f"{found.designs:.2e}"
        knobs = f", times {found.continuous} continuous knobs" if found.continuous else ""
        lines.append(("space", f"{found.space}: {many} designs{knobs}"))
        within = "" if found.limit is None else f", {found.within} within the limit"
        lines.append(("published", f"{found.textbook} designs in the space{within}"))
    if found.limit is not None:
        lines.append(("limit", f"{found.limit:,} trained parameters"))
    lines += [("left out", line) for line in found.dropped] + [("note", line) for line in found.notes]
    show(f"{source}: no errors", plain_table("", "", rows=lines))
    ends = [("cheapest", found.cheapest), ("dearest", found.dearest)]
    rows = [
        (name, end.design.label, *(amount(getattr(end.costs, cost.name), cost.unit) for cost in SHOWN))
        for name, end in ends
        if end is not None
    ]
    if rows:
        heads = ("", "design", *(cost.short.lower() for cost in SHOWN))
        show("", plain_table(*heads, rows=rows, right=tuple(range(2, len(heads)))))


cli_show.register(app)
cli_runs.register(app)
cli_plan.register(app)
cli_compare.register(app)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
