"""The study's file: whether it is the one that was left, and the copy from before if it is not.

SQLite has no checksums: a flipped bit in a score reads as another score. So when a session ends, the file's digest is
kept beside it with SQLite's own count of changes, which every program that writes to the file moves on.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from peftscape.search.disk import write_file, writing
from peftscape.spaces.words import InputError

_MAGIC = b"SQLite format 3\x00"


def mark(file: Path) -> None:
    """Keep a copy of the file as `NAME.previous`, and note what both look like. Nobody may write meanwhile."""
    if problem := _structure(file):
        raise InputError(str(file), [problem])
    previous, part = _previous(file), file.with_name(f".{file.name}.part")
    with writing(previous):
        try:
            with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(part)) as copy:
                source.backup(copy)
            part.replace(previous)
        finally:
            part.unlink(missing_ok=True)
    _note(previous)
    _note(file)


def ensure(file: Path, say: Callable[[str], None]) -> None:
    """Check the file; damaged, put the copy from before in its place, and say so.

    Raises:
        InputError: it is damaged, and so is the copy, or there is none.
    """
    if not file.is_file():
        return
    if problem := damage(file):
        restore(file, problem, say)


def restore(file: Path, problem: str, say: Callable[[str], None]) -> None:
    """Put the copy from before in the place of a damaged file. Raises InputError if there is none that is whole."""
    previous = _previous(file)
    if not previous.is_file() or damage(previous):
        gone = "there is no copy from before" if not previous.is_file() else f"and so is {previous.name}"
        raise InputError(str(file), [f"damaged: {problem}; {gone}"])
    kept = file.with_name(f"{file.name}.damaged")
    with writing(file):
        file.replace(kept)
        file.with_name(f"{file.name}-journal").unlink(missing_ok=True)
        write_file(file, previous.read_bytes())
        _note(file)
    say(f"{file}: damaged: {problem}. Going on from {previous.name}, its last good copy; kept as {kept.name}")


def damage(file: Path) -> str | None:
    """What is wrong with the file, or None."""
    note = _card(file)
    try:
        size, count, digest = _look(file)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if note is not None and note.get("changes") == count and not _journal(file):
        # Nobody has written since it was left: it has to be the very same.
        if size != note.get("bytes"):
            return f"{size:,} bytes, {note.get('bytes'):,} were expected"
        return None if digest == note.get("sha256") else "its checksum is not the one it was left with"
    return _structure(file)


def _structure(file: Path) -> str | None:
    """What SQLite itself finds wrong."""
    with file.open("rb") as raw:
        if raw.read(16) != _MAGIC:
            return "not an SQLite file"
    try:
        with closing(sqlite3.connect(file, timeout=60)) as connection:
            [found] = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if found == "ok" else str(found).splitlines()[0]


def _look(file: Path) -> tuple[int, int, str]:
    raw = file.read_bytes()
    return len(raw), int.from_bytes(raw[24:28], "big"), hashlib.sha256(raw).hexdigest()


def _note(file: Path) -> None:
    size, count, digest = _look(file)
    value = {"bytes": size, "changes": count, "sha256": digest}
    write_file(_note_path(file), json.dumps(value).encode())


def _card(file: Path) -> dict[str, object] | None:
    try:
        value = json.loads(_note_path(file).read_bytes()[:4096])
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _journal(file: Path) -> bool:
    """Whether a writer was killed in the middle: SQLite then puts the file right when it opens it."""
    return file.with_name(f"{file.name}-journal").is_file()


def _previous(file: Path) -> Path:
    return file.with_name(f"{file.name}.previous")


def _note_path(file: Path) -> Path:
    return file.with_name(f".{file.name}.sum")
