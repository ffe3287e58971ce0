"""What the commands share: how they print, and how what a user got wrong is told."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BAD_INPUT, NO_ROOM, INTERRUPTED = 2, 4, 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set any key of the file: -s search.lanes=4."),
]


@contextmanager
def told_plainly() -> Iterator[None]:
    """What is wrong with the input ends the command with its message and status 2, a full disk with 4, Ctrl-C 130."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, RuntimeError, OSError) as error:
        if message := _no_room(error):
            typer.echo(message, err=True)
            raise typer.Exit(NO_ROOM) from None
        if not _is_input(error):
            raise
        typer.echo(str(error), err=True)
        raise typer.Exit(BAD_INPUT) from None


def _no_room(error: Exception) -> str | None:
    """What to say of a disk that is full or broken."""
    from peftscape.search.disk import DiskError, no_room

    if isinstance(error, DiskError):
        return str(error)
    if isinstance(error, OSError) and (why := no_room(error)):
        return f"{error.filename or 'a file'}: could not be written: {why}"
    return None


def command_started() -> float:
    """When this process began, by `time.monotonic()`: Python itself and imports are part of a command's time."""
    import os
    import time
    from pathlib import Path

    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        age = since_boot - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now  # not Linux
    return now - max(0.0, age)


def plain_cell(value: Any) -> Any:
    """A cell of a CSV file: text that a spreadsheet would run as a formula gets an apostrophe before it."""
    risky = isinstance(value, str) and (value.lstrip()[:1] in ("=", "+", "-", "@") or value[:1] in ("\t", "\r"))
    return f"'{value}" if risky and value.strip() else value


def _is_input(error: Exception) -> bool:
    # Imported here: a command that ends well needs none of them.
    from peftscape.analysis.front import ObjectiveError
    from peftscape.analysis.sources import SourceError
    from peftscape.search.embedded import MissingPackageError
    from peftscape.spaces.record import RecordError
    from peftscape.spaces.sites import SiteError
    from peftscape.spaces.words import InputError

    known = (InputError, SiteError, ObjectiveError, SourceError, RecordError, MissingPackageError)
    is_path = isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)
    return is_path or isinstance(error, (*known, PermissionError, FileExistsError, NotADirectoryError))


def print_json(value: Any) -> None:
    """Strict JSON on standard output; a number that is not finite is null."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """Standard output; without a terminal, 100 columns."""
    import os

    from rich.console import Console

    found = Console(highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found = Console(highlight=False, width=100)
    return found


def show(*parts: RenderableType) -> None:
    """Print for people."""
    out = console()
    for part in parts:
        # Text of users (names, labels, paths) may hold brackets: it is never read as markup.
        out.print(part, markup=False)


def plain_table(*heads: str, rows: Any, right: tuple[int, ...] = ()) -> RenderableType:
    """A table without a frame; columns numbered in `right` are aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(heads))
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
