"""Files that are whole or not there, and what is said when the disk is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = 4
"""The exit status of a command that could not write."""

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)
_SQLITE = ("database or disk is full", "disk I/O error", "unable to open database file", "readonly database")


class DiskError(OSError):
    """Something could not be written; what was there before is as it was."""

    def __init__(self, path: Path | str, why: str) -> None:
        self.path, self.why = Path(path), why
        super().__init__(f"{path}: could not be written: {why}; free some space, and the same command goes on")


def write_file(path: Path, raw: bytes) -> None:
    """Write a whole file beside the old one, then put it in its place.

    Raises:
        DiskError: there is no room, or the disk failed; the old file stands.
    """
    part = path.with_name(f".{path.name[-80:]}.{os.getpid()}.part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in the block for want of room is told with this path."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if why := no_room(error):
            raise DiskError(path, why) from error
        raise


def no_room(error: BaseException | None) -> str | None:
    """Why there is no room, if that is what an error or one of its causes says; Optuna wraps SQLite's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error.strerror or "the disk is full"
        if "sqlite3.OperationalError" in str(error) or type(error).__module__ == "sqlite3":
            for words in _SQLITE:
                if words in str(error):
                    return words
        error = error.__cause__ or error.__context__
    return None
