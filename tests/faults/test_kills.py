"""SIGKILL: no finished record is lost, what was in flight is trained again, and the same command goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import Child, complete, tiny, trials, until

from peftscape.search.account import Account
from peftscape.search.cohort import Cohort
from peftscape.search.config import SearchConfig
from peftscape.search.storage import TRIES, Storage
from peftscape.search.study import run_search
from peftscape.search.workers import Workers
from peftscape.spaces.record import Costs, Record, Score
from peftscape.spaces.sites import site_map
from peftscape.spaces.space_file import read_space


def kill_at_random(of: SearchConfig, out: Path, times: int, seed: int) -> tuple[int, float]:
    """Start the search and kill it, again and again; how many records were lost, and seconds to go on, on average."""
    random = np.random.default_rng(seed)
    lost, waits = 0, []
    for _ in range(times):
        before = complete(out)
        child = Child(lambda: run_search(of, out, quiet=True), out.with_suffix(".log"))
        started = time.monotonic()
        until(lambda: len(complete(out)) > len(before), 60)  # noqa: B023
        waits.append(time.monotonic() - started)
        time.sleep(random.uniform(0, 0.3))
        child.kill()
        child.wait()
        after = complete(out)
        lost += sum(after.get(number) != record for number, record in before.items())
    return lost, float(np.mean(waits))


def test_a_killed_search_goes_on_and_loses_nothing(base: Path, tmp_path: Path) -> None:
    of, out = tiny(base, budget={"trials": 40}), tmp_path / "run"
    lost, _ = kill_at_random(of, out, times=2, seed=0)
    assert lost == 0
    before = complete(out)
    study = run_search(of, out, quiet=True)
    assert len(complete(out)) == 40
    assert {number: complete(out)[number] for number in before} == before
    assert [r.number for r in study.records if r.state == "complete"] == list(range(40)), "no number is left out"
    assert all(trial["tries"] <= TRIES for trial in trials(out).values())


@pytest.mark.faults
def test_twenty_kills(base: Path, tmp_path: Path, tell: Callable[..., None]) -> None:
    of, out = tiny(base, budget={"trials": 150}), tmp_path / "run"
    lost, recovery_s = kill_at_random(of, out, times=20, seed=1)
    before = complete(out)
    run_search(of, out, quiet=True)
    after = complete(out)
    lost += sum(after.get(number) != record for number, record in before.items())
    tell("SIGKILL at a random moment", 20, lost, recovery_s)
    assert lost == 0
    ended = [trial for trial in trials(out).values() if "record" in trial]
    assert len(ended) == 150


def test_what_ends_its_process_each_time_is_tried_three_times_and_alone_at_last(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third trial of all kills its process in its second step."""
    step, beside = Cohort.step, tmp_path / "beside"

    def deadly(self: Cohort) -> list[float]:
        if any(lane.name == "2" and lane.step == 1 for lane in self.lanes):
            with beside.open("a") as file:
                file.write(f"{len(self.lanes)} ")
            os.kill(os.getpid(), 9)
        return step(self)

    monkeypatch.setattr(Cohort, "step", deadly)
    of, out = tiny(base, budget={"trials": 6}), tmp_path / "run"
    statuses = [Child(lambda: run_search(of, out, quiet=True), tmp_path / "log").wait() for _ in range(TRIES + 1)]
    assert statuses == [-9] * TRIES + [0], (tmp_path / "log").read_text()
    found = trials(out)
    assert found[2]["state"] == "PRUNED"
    assert found[2]["record"]["failure"]["kind"] == "left running"
    assert found[2]["record"]["design"], "it is known which design it was"
    assert len(complete(out)) == 5, "it was a trial of the six"
    first, _, last = map(int, beside.read_text().split())
    assert (first, last) == (4, 1)


def worker(storage: Storage, folder: Path | None) -> Workers:
    return Workers(storage.attrs, storage.set_attr, storage.lock, folder, Account())


def space(of: SearchConfig, base: Path) -> Any:
    return read_space(of.space, site_map(str(base)))


def record(number: int, design: Any) -> Record:
    costs = Costs(adapter=1, head=1, trainable=2, train_flops=1, infer_flops=1, peak_bytes=1, adapter_bytes=1)
    return Record(
        number=number, state="complete", design=design.json(), digest=design.digest, label=design.label,
        metric="accuracy", direction="maximize", n_validation=20, scores=(Score(seed=0, validation=0.5),), costs=costs,
    )  # fmt: skip


def test_a_trial_of_a_living_worker_is_left_alone(base: Path, tmp_path: Path) -> None:
    of, out = tiny(base), tmp_path / "run"
    other = Storage(out, of)
    living = worker(other, out / ".workers")
    living.join()
    trial, _ = other.ask(space(of, base), living.name)
    try:
        mine = Storage(out, of)
        assert mine.release(worker(mine, out / ".workers")) == (0, [])
        assert trials(out)[trial.number]["state"] == "RUNNING"
    finally:
        living.leave()


def test_a_lease_ends_when_its_counter_stands_still_for_the_observers_own_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that share no disk: only the counter tells. The other worker's clock does not matter."""
    import peftscape.search.workers as module

    of, out = tiny(base), tmp_path / "run"
    other, mine = Storage(out, of), Storage(out, of)
    left, observer = worker(other, None), worker(mine, None)
    left.beat()
    trial, _ = other.ask(space(of, base), left.name)
    now = [50.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert mine.release(observer) == (0, [])
    now[0] += module.LEASE_S - 1
    assert mine.release(observer) == (0, [])
    left.beat()  # it lives after all
    now[0] += 2
    assert mine.release(observer) == (0, [])
    now[0] += module.LEASE_S + 1
    assert mine.release(observer) == (1, []), "seen unchanged for the length of a lease"
    assert trials(out)[trial.number]["state"] == "WAITING"


def test_a_worker_that_was_taken_for_dead_drops_its_result(base: Path, tmp_path: Path) -> None:
    of, out = tiny(base), tmp_path / "run"
    late, other = Storage(out, of), Storage(out, of)
    trial, design = late.ask(space(of, base), "late")
    other.release(worker(other, None))
    again, _ = other.ask(space(of, base), "other")
    assert again.number == trial.number
    mine = record(trial.number, design)
    assert not late.tell(trial, mine, "late")
    assert other.tell(again, mine, "other")
    assert not late.tell(trial, mine, "late"), "nor is what is told already"
