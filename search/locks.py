"""One at a time on a study: what counts and then asks, or reads and then writes, does it under a lock.

Optuna's ask is not atomic across processes: several workers that each count the trials and then ask make more than
were wanted. The lock is a file lock beside an SQLite file, an advisory lock in PostgreSQL; both go with their process.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

POLL_S = 0.02


class Lock(Protocol):
    """A lock that a thread may take again while it holds it."""

    def __call__(self) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


def study_lock(engine: Any, name: str, folder: Path) -> Lock:
    """The lock of a study, on the database that all its workers share."""
    if engine.dialect.name == "postgresql":
        return _Advisory(engine, name)
    return _File(folder / ".lock")


class _File:
    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self._lock = FileLock(path)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock.acquire(poll_interval=POLL_S):
            yield

    def close(self) -> None:
        """Nothing is open between two uses."""


class _Advisory:
    """A session's lock in PostgreSQL: it is the connection's, so each thread has a connection of its own."""

    def __init__(self, engine: Any, name: str) -> None:
        digest = hashlib.sha256(f"peftscape/{name}".encode()).digest()
        self._engine, self._key = engine, int.from_bytes(digest[:8], "big", signed=True)
        self._mine = threading.local()
        self._connections: list[Any] = []

    def close(self) -> None:
        """End the connections of all threads."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._mine = threading.local()
        self._engine.dispose()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from sqlalchemy import text  # type: ignore[import-not-found,unused-ignore]

        depth = getattr(self._mine, "depth", 0)
        if depth == 0:
            if getattr(self._mine, "connection", None) is None:
                self._mine.connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                self._connections.append(self._mine.connection)
            self._mine.connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": self._key})
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth -= 1
            if self._mine.depth == 0:
                self._mine.connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": self._key})


class Held:
    """A file that a living process holds locked; the system lets go of it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = path, FileLock(path, timeout=0, thread_local=False)
        self._lock.acquire()

    def release(self) -> None:
        """Let go of the file, and remove it."""
        self.let_go()
        self.path.unlink(missing_ok=True)

    def let_go(self) -> None:
        """Hold the file no more; it stays and tells that nobody does."""
        self._lock.release()


def is_held(path: Path) -> bool | None:
    """Whether a process that lives holds the file; None if there is no such file to tell by."""
    from filelock import FileLock, Timeout

    if not path.is_file():
        return None
    lock = FileLock(path, timeout=0)
    try:
        with lock:
            return False
    except Timeout:
        return True
