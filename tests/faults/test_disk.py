"""A full disk, at the study, an adapter, a checkpoint and the report: told with its path, and nothing else is lost.

A limit on the size of files fails writes as a full disk does, and needs no privileges. Where mounting is permitted, a
small disk in memory is filled to its last byte too.
"""

from __future__ import annotations

import errno
import pkgutil
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from searches import Child, complete, tiny, trials

from peftscape.cli_common import told_plainly
from peftscape.search.cohort import Cohort
from peftscape.search.disk import FULL, DiskError, write_file
from peftscape.search.export import load
from peftscape.search.study import run_search


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_at_the_study(base: Path, tmp_path: Path) -> None:
    of, out = tiny(base, budget={"trials": 60}), tmp_path / "run"
    run_search(tiny(base, budget={"trials": 4}), out, quiet=True)
    before, adapters = complete(out), contents(out / "adapters")
    assert adapters

    def run() -> None:
        with at_most((out / "study.db").stat().st_size + 8192):
            run_search(of, out, quiet=True)

    child = Child(run, tmp_path / "log")
    assert child.wait() == FULL, child.said()
    assert str(out / "study.db") in child.said()
    after = complete(out)
    assert {number: after[number] for number in before} == before
    study = run_search(tiny(base, budget={"trials": len(after) + 2}), out, quiet=True)
    assert len([r for r in study.records if r.state == "complete"]) == len(after) + 2


def test_a_full_disk_at_an_adapter(base: Path, tmp_path: Path) -> None:
    """The study fits, its adapter does not; then the trial is trained again, and its adapter kept."""
    of, out = tiny(base, budget={"trials": 4}), tmp_path / "run"

    def run(patch: pytest.MonkeyPatch) -> None:
        def full(path: Path, raw: bytes) -> None:
            with at_most(100):
                write_file(path, raw)

        patch.setattr("peftscape.search.adapter_folder.write_file", full)
        run_search(of, out, quiet=True)

    with pytest.MonkeyPatch.context() as patch:
        child = Child(lambda: run(patch), tmp_path / "log")
        assert child.wait() == FULL, child.said()
    assert "adapters" in child.said()
    assert complete(out) == {}, "a record whose adapter is lost is not told"
    study = run_search(of, out, quiet=True)
    assert len(complete(out)) == 4
    for number in (r.number for r in study.records if (out / "adapters" / str(r.number)).is_dir()):
        assert load(out / "adapters" / str(number)).design.digest == study.records[number].digest


def test_an_old_adapter_stands_until_the_new_one_is_whole(base: Path, tmp_path: Path) -> None:
    of, out = tiny(base, budget={"trials": 2}), tmp_path / "run"
    run_search(of, out, quiet=True)
    folder = next((out / "adapters").iterdir())
    before = contents(folder)
    adapter = load(folder)
    from peftscape.search.adapter_folder import save

    with at_most(100), pytest.raises(DiskError) as error:
        save(adapter.tensors, adapter.card, adapter.backbone, adapter.head, folder)
    assert str(folder.parent) in str(error.value)
    assert contents(folder) == before
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_at_the_report(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, out = tiny(base, budget={"trials": 3}), tmp_path / "run"

    def full(study: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("peftscape.analysis.report.write_report", full)
        with pytest.raises(DiskError) as error:
            run_search(of, out, quiet=True)
    assert error.value.path == out / "report.html"
    assert len(complete(out)) == 3
    run_search(of, out, quiet=True)
    assert (out / "report.html").is_file()


def test_a_full_disk_at_a_checkpoint_ends_nothing_that_was_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, out = tiny(base, budget={"trials": 4}), tmp_path / "run"
    monkeypatch.setattr("peftscape.search.guarded.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("peftscape.search.guarded.SAVE_SHARE", 0.0)
    written = []

    def full(path: Path, raw: bytes) -> None:
        written.append(path)
        with at_most(100 if len(written) > 12 else 2**30):
            write_file(path, raw)

    with monkeypatch.context() as patch:
        patch.setattr("peftscape.search.checkpoint.write_file", full)
        with pytest.raises(DiskError) as error:
            run_search(of, out, quiet=True)
    assert error.value.path.parent == out / "checkpoints"
    assert {trial["state"] for trial in trials(out).values()} == {"WAITING"}
    begun: dict[str, int] = {}
    step = Cohort.step

    def watched(self: Cohort) -> list[float]:
        for lane in self.lanes:
            begun.setdefault(lane.name, lane.step)
        return step(self)

    monkeypatch.setattr(Cohort, "step", watched)
    run_search(of, out, quiet=True)
    assert len(complete(out)) == 4
    assert any(begun[name] > 0 for name in "0123"), "what was saved before the disk was full is used"


# -- a disk that really is full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A disk of 8 MB, and what leaves no room on it; where nobody may mount one, files that cannot grow."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0

    def fill() -> None:
        if mounted:
            with suppress(OSError), (folder / "ballast").open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(512))
        else:  # for the rest of this process
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    yield folder, fill
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


#: Where the disk is full at once before what is written there, and what the command has to name.
PLACES = {
    "study": ("peftscape.search.storage.Storage.tell", "study.db"),
    "adapter": ("peftscape.search.adapter_folder.write_file", "adapters"),
    "checkpoint": ("peftscape.search.checkpoint.write_file", "checkpoints"),
    "report": ("peftscape.analysis.report.write_report", "report.html"),
}


@pytest.mark.parametrize("place", ["study", *(pytest.param(p, marks=pytest.mark.faults) for p in list(PLACES)[1:])])
def test_a_disk_that_fills_up(
    base: Path, small: tuple[Path, Callable[[], None]], tmp_path: Path, tell: Callable[..., None], place: str
) -> None:
    (folder, fill), (name, words) = small, PLACES[place]
    out = folder / "run"
    of = tiny(base, budget={"trials": 8})
    run_search(tiny(base, budget={"trials": 4}), out, quiet=True)
    before, files = complete(out), contents(out)

    def run() -> None:
        work = pkgutil.resolve_name(name)

        def full(*given: Any, **more: Any) -> Any:
            fill()
            if place == "report":
                given[1].write_bytes(bytes(2**16))
            return work(*given, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("peftscape.search.guarded.SAVE_EVERY_S", 0.0)
            patch.setattr("peftscape.search.guarded.SAVE_SHARE", 0.0)
            patch.setattr(name, full)
            run_search(of, out, quiet=True)

    child = Child(run, tmp_path / "log")
    assert child.wait() == FULL, child.said()
    assert words in child.said()
    (folder / "ballast").unlink(missing_ok=True)
    after = complete(out)
    lost = sum(after.get(number) != record for number, record in before.items())
    assert lost == 0
    for path, raw in files.items():
        if path.parent.parent.name == "adapters" and path.parent.is_dir():
            assert path.read_bytes() == raw, "an adapter of before is as it was"
    assert place != "report" or (out / "report.html").read_bytes() == files[out / "report.html"]
    started = time.monotonic()
    run_search(of, out, quiet=True)
    tell(f"a full disk at the {place}", 1, lost, time.monotonic() - started)
    assert sorted(complete(out)) == list(range(8)), "the same command goes on"


def test_the_command_ends_with_4_and_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit) as done, told_plainly():
        raise DiskError("runs/x/study.db", "No space left on device")
    assert done.value.exit_code == FULL
    assert "runs/x/study.db" in capsys.readouterr().err
    with pytest.raises(typer.Exit) as done, told_plainly():
        raise OSError(errno.ENOSPC, "No space left on device", "answers.csv")
    assert done.value.exit_code == FULL
    assert "answers.csv" in capsys.readouterr().err
