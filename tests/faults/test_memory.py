"""Out of memory, of a device and of the host: the cohort halves and goes on."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest
import torch
from searches import STEPS, Child, tiny
from transformers import AutoModel

from peftscape.search.cohort import Cohort
from peftscape.search.guarded import is_out_of_memory
from peftscape.search.session import design_costs, open_session
from peftscape.search.study import run_search

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]

MMAP_THRESHOLD = -3  # of glibc's mallopt


def narrow(monkeypatch: pytest.MonkeyPatch, width: int, error: BaseException, *, phase: str = "_step") -> list[int]:
    """No more than so many lanes fit; the sizes that were tried."""
    tried: list[int] = []
    work = getattr(Cohort, phase)

    def limited(self: Cohort, *args: object) -> object:
        tried.append(len(self.lanes))
        if len(self.lanes) > width:
            raise error
        return work(self, *args)

    monkeypatch.setattr(Cohort, phase, limited)
    return tried


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_cohort_halves_until_it_fits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    tried = narrow(monkeypatch, 2, error)
    study = run_search(tiny(base, search={"lanes": 8}, budget={"trials": 8}), tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["complete"] * 8
    assert tried[:2] == [8, 4]
    assert max(tried[3:]) <= 2, "what did not fit is not tried again"


def test_an_evaluation_halves_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 1, ERRORS[0], phase="_predict")
    study = run_search(tiny(base, budget={"trials": 4}), tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["complete"] * 4
    assert all(r.validation > 0 for r in study.records)


def test_a_design_that_does_not_fit_alone_is_recorded_so_and_not_tried_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, tried = Cohort._step, []

    def greedy(self: Cohort) -> list[float]:
        if any(lane.name == "2" for lane in self.lanes):
            tried.append(len(self.lanes))
            raise ERRORS[0]
        return step(self)

    monkeypatch.setattr(Cohort, "_step", greedy)
    study = run_search(tiny(base, budget={"trials": 6}), tmp_path, quiet=True)
    assert {r.number: r.state for r in study.records} == {0: "complete", 1: "complete", 2: "failed"} | dict.fromkeys(
        (3, 4, 5), "complete"
    )
    failure = study.records[2].failure
    assert failure is not None
    assert (failure.kind, failure.step) == ("out of memory", 0)
    assert "20.00 GiB" in failure.message
    assert tried == [4, 2, 1, 1, 1, 1], "alone, its 8 examples at once, 4, 2 and 1"


def test_lanes_that_run_in_halves_give_what_they_give_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = tiny(base, budget={"trials": 4}, search={"retest_seeds": 0})
    whole = run_search(of, tmp_path / "whole", quiet=True).records
    narrow(monkeypatch, 2, ERRORS[0])
    halves = run_search(of, tmp_path / "halves", quiet=True).records
    for one, other in zip(whole, halves, strict=True):
        assert one.digest == other.digest
        losses, same = ([loss for _, loss in record.curve] for record in (one, other))
        assert losses == pytest.approx(same, rel=1e-4)
        assert one.curve[-1][0] == STEPS * 8


def test_lanes_stay_within_the_memory_that_the_user_gives(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = tiny(base, budget={"trials": 4}, search={"retest_seeds": 0})
    peaks = [r.costs.peak_bytes for r in run_search(of, tmp_path / "free", quiet=True).records if r.costs]
    weights = sum(p.numel() * p.element_size() for p in AutoModel.from_pretrained(base).parameters())
    limit = weights + 2 * (max(peaks) - weights)
    together: list[int] = []
    step = Cohort._step

    def seen(self: Cohort) -> list[float]:
        together.append(sum(design_costs(session, lane.design).peak_bytes - weights for lane in self.lanes))
        return step(self)

    monkeypatch.setattr(Cohort, "_step", seen)
    of = tiny(base, budget={"trials": 4}, search={"retest_seeds": 0, "memory_limit": str(limit)})
    session = open_session(of)
    study = run_search(of, tmp_path / "given", quiet=True)
    assert [r.state for r in study.records] == ["complete"] * 4
    assert max(together) <= limit - weights
    assert len(together) > STEPS, "not all four at once"
    # How steps are run is no part of what the search is.
    assert run_search(tiny(base, budget={"trials": 4}, search={"retest_seeds": 0}), tmp_path / "given", quiet=True)


def test_a_host_without_memory(base: Path, tmp_path: Path) -> None:
    """A real limit on the address space: batches that need more than is left."""
    of = tiny(
        base, search={"lanes": 8, "batch_size": 2048, "examples": 2048}, budget={"trials": 8}
    )  # retests meet the limit too

    def run() -> None:
        # What is freed is the system's again at once. Else the heap may keep all address space, free as it is, and
        # oneDNN, which maps some for the code of each shape, has none for the smallest product either.
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)
        run_search(tiny(base, budget={"trials": 2}), tmp_path / "first", quiet=True)  # loads all that a search loads
        step, limited = Cohort._step, []

        def scarce(self: Cohort) -> list[float]:
            if not limited:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, resource.RLIM_INFINITY))
                limited.append(1)
            return step(self)

        Cohort._step = scarce  # type: ignore[method-assign]
        study = run_search(of, tmp_path / "run", quiet=True)
        states = [r.state for r in study.records]
        print(states, [r.failure for r in study.records if r.failure], flush=True)
        assert len(states) == 8
        assert all(r.failure is None or r.failure.kind == "out of memory" for r in study.records)
        assert "complete" in states

    child = Child(run, tmp_path / "log")
    assert child.wait(120) == 0, child.said()


def test_other_errors_are_no_lack_of_memory() -> None:
    assert all(map(is_out_of_memory, ERRORS))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
