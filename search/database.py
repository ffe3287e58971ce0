"""The database of a study: a file of SQLite beside the run's results, or PostgreSQL for several machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peftscape.search import integrity
from peftscape.search.locks import Lock, is_held, study_lock
from peftscape.spaces.words import InputError

FILE = "study.db"
WORKERS, ADAPTERS, CHECKPOINTS, REPORT = ".workers", "adapters", "checkpoints", "report.html"
PLACES = (FILE, f"{FILE}.previous", f"{FILE}-journal", ".lock", WORKERS, ADAPTERS, CHECKPOINTS, REPORT)
# A writer waits for readers this long before SQLite says that the database is locked.
BUSY_S = 120


def open_database(out: Path, url: str | None, name: str, say: Callable[[str], None]) -> tuple[Any, Lock]:
    """Optuna's storage, and the lock of the study called `name` in it.

    Raises:
        InputError: the file is damaged and no copy of it is whole, or the database cannot be reached.
    """
    import optuna
    import sqlalchemy  # type: ignore[import-not-found,unused-ignore]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    # All that is written is written below the folder: none of these may lead out of it.
    if linked := [name for name in PLACES if (out / name).is_symlink()]:
        raise InputError(str(out), [f"{name}: a link, which could lead anywhere; remove it" for name in linked])
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url is None:
        file = out.resolve() / FILE
        url, options = f"sqlite:///{file}", {"connect_args": {"timeout": BUSY_S}}
    else:
        url, file = _with_driver(url), None
    engine = sqlalchemy.create_engine(url, **options)
    lock = study_lock(engine, name, out)
    try:
        with lock():
            if file is not None:
                engine.dispose()
                if not any(is_held(path) for path in (out / WORKERS).glob("*.lock")):
                    integrity.ensure(file, say)
            return optuna.storages.RDBStorage(url, engine_kwargs=options), lock
    except sqlalchemy.exc.OperationalError as error:
        if file is not None:
            raise
        reason = str(error.orig).strip().splitlines()[0]
        raise InputError("--storage", [f"the database cannot be reached: {reason}"]) from None


@contextmanager
def one_transaction(database: Any) -> Iterator[None]:
    """What this thread writes of parameters and attributes within is committed at once, or not at all.

    Optuna commits each by itself, and a commit waits for the disk. SQLAlchemy lets a session take part in a transaction
    that is not its own: its commits are then none. New trials are made outside: Optuna tries that again where it
    fails, which a transaction that is lost cannot be.
    """
    import sqlalchemy

    session = database.scoped_session  # of this thread alone
    session.remove()
    with database.engine.begin() as connection:
        session(bind=connection, join_transaction_mode="rollback_only")
        try:
            yield
        finally:
            session.remove()
        if not connection.in_transaction():  # Optuna passes over keys that are there already
            raise sqlalchemy.exc.PendingRollbackError("a key was written twice, and nothing of the transaction is kept")


def _with_driver(url: str) -> str:
    """The address with a driver that is installed: psycopg, where psycopg2 (SQLAlchemy's own choice) is not."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2") or not rest:
        raise InputError("--storage", [f'an address like "postgresql://user@host/name" was expected, not "{scheme}"'])
    if scheme in ("postgresql", "postgres"):
        scheme = "postgresql" if find_spec("psycopg2") else "postgresql+psycopg"
    if not find_spec("psycopg2") and not find_spec("psycopg"):
        raise InputError("--storage", ['PostgreSQL needs a driver: pip install "psycopg[binary]"'])
    return f"{scheme}://{rest}"
