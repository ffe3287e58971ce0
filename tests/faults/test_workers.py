"""Several processes on one study: never a trial too many, no "database is locked", everything shared."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from searches import BATCH, STEPS, Child, tiny

from peftscape.search.account import Account
from peftscape.search.cohort import Cohort
from peftscape.search.config import SearchConfig
from peftscape.search.storage import Storage
from peftscape.search.study import _Run, run_search
from peftscape.search.workers import LEASE_S, PREFIX, Workers
from peftscape.spaces.record import Costs, Record, Score
from peftscape.spaces.space_file import read_space


def race(of: SearchConfig, folders: list[Path], url: str | None = None, timeout_s: float = 300) -> tuple[str, float]:
    """Processes that run one search; what they said, and how long it took."""
    started = time.monotonic()
    log = folders[0].parent / "log"
    children = [Child(lambda f=folder: run_search(of, f, quiet=True, storage_url=url), log) for folder in folders]  # type: ignore[misc]
    statuses = [child.wait(timeout_s) for child in children]
    assert statuses == [0] * len(folders), children[0].said()
    return children[0].said(), time.monotonic() - started


def check(storage: Storage, wanted: int, said: str, processes: int) -> Counter[str]:
    """Exactly so many distinct trials, each trained once and by one worker; how many each did."""
    trials = storage._study.get_trials(deepcopy=False)
    assert [trial.number for trial in trials] == list(range(wanted))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert storage.trained() == wanted
    assert {trial.user_attrs["tries"] for trial in trials} == {1}
    assert "locked" not in said.lower()
    spent = storage.study().spent
    retests = len(storage.retested())
    assert spent["examples"] == (wanted + retests) * STEPS * BATCH, "nothing was trained in vain"
    assert spent["sessions"] == processes
    return Counter(trial.user_attrs["worker"] for trial in trials)


def test_two_processes_make_exactly_the_trials_that_were_wanted(base: Path, tmp_path: Path) -> None:
    of, out = tiny(base, budget={"trials": 15}), tmp_path / "run"
    said, _ = race(of, [out, out])
    storage = Storage(out, of)
    shares = check(storage, 15, said, 2)
    assert len(shares) == 2, "both took part"
    storage.close()


def test_what_another_worker_put_on_the_front_keeps_its_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the other while this one trains, which has not asked since."""
    of, told = tiny(base, budget={"trials": 4}, search={"retest_seeds": 0}), list[int]()
    step = Cohort.step

    def meanwhile(self: Cohort) -> list[float]:
        if not told and self.lanes[0].step == STEPS - 2:
            other = Storage(tmp_path, of)
            other.refresh()
            space = read_space(of.space, self.backbone.sites)
            trial, design = other.ask(space, "other")
            told.append(trial.number)
            metric = {"metric": "accuracy", "direction": "maximize", "n_validation": 20, "label": design.label}
            price = Costs(adapter=1, head=0, trainable=1, train_flops=1, infer_flops=1, peak_bytes=1, adapter_bytes=1)
            score = Score(seed=0, validation=1.0)
            record = Record(
                number=trial.number, state="complete", design=design.json(), digest=design.digest, scores=(score,),
                costs=price, **metric,
            )  # fmt: skip
            (other.adapter_folder(trial.number)).mkdir(parents=True)
            assert other.tell(trial, record, "other")
            other.close()
        return step(self)

    monkeypatch.setattr(Cohort, "step", meanwhile)
    run_search(of, tmp_path, quiet=True)
    [number] = told
    assert (tmp_path / "adapters" / str(number)).is_dir()


def counted(beats: Iterator[int]) -> Workers:
    """A worker that sees one other by its counter alone."""
    said = {f"{PREFIX}other": {"beat": 1, "ended": False}}

    def attrs() -> dict[str, Any]:
        said[f"{PREFIX}other"]["beat"] = next(beats)
        return said

    return Workers(attrs, said.__setitem__, nullcontext, None, Account(), lease_s=0.4)  # type: ignore[arg-type]


def test_a_holder_is_watched_until_it_is_known_whether_it_lives() -> None:
    """Where there is only a counter, as on PostgreSQL: a command given anew soon after a crash has to take over."""
    assert counted(itertools.count()).lives("other")
    started = time.monotonic()
    assert not counted(itertools.repeat(7)).lives("other")
    assert 0.4 <= time.monotonic() - started < 2


def test_the_end_of_a_session_does_not_wait_for_a_lease_that_is_being_renewed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal waits for the study's lock; the end of the session, which holds it, must not wait for the renewal."""
    end, took = _Run._end, list[float]()

    def timed(self: _Run) -> None:
        started = time.monotonic()
        end(self)
        took.append(time.monotonic() - started)

    monkeypatch.setattr(_Run, "_end", timed)
    monkeypatch.setattr("peftscape.search.workers.BEATS", 2000)
    run_search(tiny(base, budget={"trials": 1}, search={"retest_seeds": 0}), tmp_path, quiet=True)
    assert took[0] < LEASE_S / 2


@pytest.mark.faults
@pytest.mark.parametrize("processes", [2, 8])
def test_many_processes_on_sqlite(base: Path, tmp_path: Path, processes: int, tell: Callable[..., None]) -> None:
    of, out = tiny(base, budget={"trials": 200}, search={"lanes": 2, "retest_seeds": 0}), tmp_path / "run"
    said, took = race(of, [out] * processes, timeout_s=1500)
    storage = Storage(out, of)
    assert len(check(storage, 200, said, processes)) == processes
    storage.close()
    tell(f"{processes} processes, 200 trials, SQLite ({took:.0f} s)", 1, 0, 0.0)


# -- PostgreSQL


@pytest.mark.postgres
@pytest.mark.parametrize(("processes", "trials"), [(2, 16), (8, 200)])
def test_many_processes_on_postgresql(
    base: Path, tmp_path: Path, server: str, processes: int, trials: int, tell: Callable[..., None]
) -> None:
    of = tiny(base, name=f"pg{processes}", budget={"trials": trials}, search={"lanes": 2, "retest_seeds": 0})
    folders = [tmp_path / str(i) for i in range(processes)]
    said, took = race(of, folders, server, timeout_s=1500)
    storage = Storage(folders[0], of, server)
    check(storage, trials, said, processes)
    assert not list(tmp_path.rglob("*.db"))
    storage.close()
    tell(f"{processes} processes, {trials} trials, PostgreSQL ({took:.0f} s)", 1, 0, 0.0)
