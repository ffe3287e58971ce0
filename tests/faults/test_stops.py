"""Ctrl-C, SIGTERM, the end of a parent, and steps that hang."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import STEPS, Child, complete, tiny, trials, until

from peftscape.search.checkpoint import Checkpoints
from peftscape.search.cohort import Cohort
from peftscape.search.lane import new_lane
from peftscape.search.session import open_session
from peftscape.search.stopping import HUNG, HangError, Stop
from peftscape.search.study import run_search
from peftscape.spaces.design import Design


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    step = Cohort.step

    def slow(self: Cohort) -> list[float]:
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(Cohort, "step", slow)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_search_with_130_and_its_lanes_go_on(
    number: signal.Signals, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, out = tiny(base, budget={"trials": 4}), tmp_path / "run"
    with monkeypatch.context() as patch:
        slowed(patch, 0.3)
        child = Child(lambda: run_search(of, out, quiet=True), tmp_path / "log")
        until(lambda: len(trials(out)) == 4 if (out / "study.db").is_file() else False)
        time.sleep(1.5)
        started = time.monotonic()
        child.kill(number)
        assert child.wait() == 130, child.said()
    assert time.monotonic() - started < 10
    saved = {path.name.split("-")[0]: path for path in (out / "checkpoints").glob("*.json")}
    assert len(saved) == 4, child.said()
    assert {trial["state"] for trial in trials(out).values()} == {"WAITING"}
    assert {trial["tries"] for trial in trials(out).values()} == {0}, "to be stopped is no failed try"

    begun: dict[str, int] = {}
    step = Cohort.step

    def watched(self: Cohort) -> list[float]:
        for lane in self.lanes:
            begun.setdefault(lane.name, lane.step)
        return step(self)

    monkeypatch.setattr(Cohort, "step", watched)
    run_search(of, out, quiet=True)
    assert all(0 < begun[name] < STEPS for name in "0123"), "they went on from where they were"
    assert len(complete(out)) == 4
    assert not list((out / "checkpoints").iterdir()), "what is done with is removed"


def test_a_lane_that_goes_on_is_the_lane_that_never_stopped(base: Path, tmp_path: Path) -> None:
    session = open_session(tiny(base))
    design = Design.from_json({"placements": [{"method": "lora", "rank": 4}, {"method": "bitfit"}]})

    def lane() -> Any:
        return new_lane(design, seed=3, steps=10, backbone=session.backbone, head=session.head)

    unbroken, broken, resumed = lane(), lane(), lane()
    cohort = session.cohort()
    for one, count in ((unbroken, 10), (broken, 6)):
        cohort.admit(one)
        for _ in range(count):
            cohort.step()
        cohort.retire(one)
    checkpoints = Checkpoints(tmp_path, print)
    broken.kernels.add("one that ran before")
    checkpoints.save(broken)
    session.guards["checkpoints"] = checkpoints
    again = session.cohort()
    again.start(resumed)
    assert resumed.step == 6
    again.admit(resumed)
    for _ in range(4):
        again.step()
    assert resumed.losses == unbroken.losses
    assert resumed.kernels == {"one that ran before", *unbroken.kernels}
    for key, value in unbroken.adapter().items():
        assert torch.equal(value, resumed.adapter()[key]), key


def test_a_second_signal_does_not_wait(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 30)
    of, out = tiny(base), tmp_path / "run"
    child = Child(lambda: run_search(of, out, quiet=True), tmp_path / "log")
    until(lambda: len(trials(out)) == 4 if (out / "study.db").is_file() else False)
    time.sleep(1)
    child.kill(signal.SIGINT)
    time.sleep(0.2)
    child.kill(signal.SIGINT)
    assert child.wait(4) == 130


def test_a_step_that_never_ends_does_not_keep_a_signal_waiting(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once where Python sees the clock, once where nothing of Python runs."""
    of = tiny(base)
    for name, hang in (("python", lambda: time.sleep(60)), ("c", _deaf)):
        with monkeypatch.context() as patch:
            patch.setattr(Cohort, "step", lambda self, hang=hang: hang())
            out = tmp_path / name
            child = Child(lambda: run_search(of, out, quiet=True), tmp_path / f"{name}.log")  # noqa: B023
            until(lambda: len(trials(out)) == 4 if (out / "study.db").is_file() else False)  # noqa: B023
            time.sleep(0.5)
            started = time.monotonic()
            child.kill(signal.SIGTERM)
            assert child.wait(12) == 130, child.said()
            assert time.monotonic() - started < 10


def _deaf() -> None:
    """What a loop in C is to signals: they are not handled until it ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})
    time.sleep(60)


def test_workers_end_when_their_parent_is_killed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.2)
    of, out = tiny(base, budget={"trials": 400}), tmp_path / "run"
    child = Child(lambda: run_search(of, out, quiet=True, workers=2), tmp_path / "log")
    helpers = until(lambda: _children(child.pid), 60)
    until(lambda: len(list((out / ".workers").glob("*.lock"))) == 2, 90)
    child.kill()
    child.wait()
    started = time.monotonic()
    until(lambda: not any(_lives(pid) for pid in helpers), 8)
    assert time.monotonic() - started < 5


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- steps that hang


def hang(monkeypatch: pytest.MonkeyPatch, when: Callable[[Any], bool], seconds: float = 60.0) -> None:
    step = Cohort._step

    def hanging(self: Cohort) -> list[float]:
        if any(when(lane) for lane in self.lanes):
            time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(Cohort, "_step", hanging)


def test_only_the_lane_that_hangs_fails_at_its_time_limit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang(monkeypatch, lambda lane: lane.name == "1" and lane.step == 2)
    of, out = tiny(base, search={"step_limit": "1s"}, budget={"trials": 4}), tmp_path / "run"
    started = time.monotonic()
    study = run_search(of, out, quiet=True)
    assert time.monotonic() - started < 30
    states = {r.number: r.state for r in study.records}
    assert states == {0: "complete", 1: "failed", 2: "complete", 3: "complete"}
    failure = study.records[1].failure
    assert failure is not None
    assert (failure.kind, failure.step) == ("hanging", 2)
    assert "1 s" in failure.message


def test_a_step_that_python_cannot_stop_ends_with_the_process(tmp_path: Path) -> None:
    def run() -> None:
        with Stop() as stop, stop.limit(1.0):
            _deaf()

    started = time.monotonic()
    child = Child(run, tmp_path / "log")
    assert child.wait() == HUNG
    assert time.monotonic() - started < 1 + 5
    assert "did not end within 1 s" in child.said()


def test_preparing_that_takes_longer_than_the_time_ends_with_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftscape.search.guarded.prepare", lambda lane, cohort: time.sleep(60 if lane.name else 0))
    started = time.monotonic()
    study = run_search(tiny(base, budget={"time": "8s"}), tmp_path, quiet=True)
    assert time.monotonic() - started < 12
    assert not [r for r in study.records if r.state == "complete"]
    assert {trial["state"] for trial in trials(tmp_path).values()} == {"WAITING"}
    assert (tmp_path / "report.html").is_file()


def test_a_step_that_hangs_ends_with_the_budgets_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang(monkeypatch, lambda lane: lane.step == 3)
    of, out = tiny(base, budget={"time": "12s"}), tmp_path / "run"
    started = time.monotonic()
    study = run_search(of, out, quiet=True)
    assert time.monotonic() - started < 12 + 5
    assert not [r for r in study.records if r.state == "failed"], "it was not the lanes' fault that time was over"


def test_signals_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with Stop() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._ask
        with pytest.raises(HangError), stop.limit(0.05):
            time.sleep(2)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_search_in_a_thread_runs_without_signals() -> None:
    done = []

    def run() -> None:
        with Stop() as stop, stop.limit(0.01):
            done.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [False]
