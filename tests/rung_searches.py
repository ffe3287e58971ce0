"""A tiny search with rungs, brackets and two seeds a trial, and what brute force says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from searches import EXAMPLES, tiny, trials

from peftscape.search.config import SearchConfig
from peftscape.spaces.record import Record

SEEDS, FACTOR = 2, 2
# By hand: a trial of bracket 0 costs 1/2 of a training, of bracket 1 3/4; each goes to the one that would have less.
BRACKETS = [0, 1, 0, 0, 1, 0, 1]
RUNGS = (EXAMPLES // 4, EXAMPLES // 2)


def config(base: Path, **search: Any) -> SearchConfig:
    settings = {
        "lanes": 4, "seeds": SEEDS, "rungs": 2, "factor": FACTOR, "brackets": 2, "rung_rule": "quality",
        "retest_seeds": 0, "seed": 1, **search,
    }  # fmt: skip
    return tiny(base, search=settings, budget={"trials": len(BRACKETS)})


def check(records: tuple[Record, ...]) -> None:
    """At each rung the best of each bracket that is compared there went on, and all of the others."""
    assert [record.number for record in records] == list(range(len(BRACKETS)))
    assert {record.state for record in records} == {"complete", "pruned"}
    for record in records:
        assert [rung.examples for rung in record.rungs] == list(RUNGS[: len(record.rungs)])
        assert len(record.scores) == (SEEDS if record.state == "complete" else 0)
    for rung in range(2):
        for bracket in range(2):
            here = [r for r in records if BRACKETS[r.number] == bracket and len(r.rungs) > rung]
            gone = [r.number for r in here if len(r.rungs) > rung + 1 or r.state == "complete"]
            places = len(here) // FACTOR if bracket <= rung else len(here)
            assert len(gone) >= places
            order = sorted(here, key=lambda r: r.rungs[rung].validation, reverse=True)
            worst = order[places - 1].rungs[rung].validation if places else np.inf
            assert {r.number for r in here if r.rungs[rung].validation > worst} <= set(gone)


def check_folder(out: Path) -> None:
    """The brackets are those of an unbroken search, and no lane is left."""
    scored = {n: t for n, t in trials(out).items() if "rungs:values" in t}
    assert {n: t.get("rungs:bracket", 0) for n, t in scored.items()} == dict(enumerate(BRACKETS))
    assert not list((out / "checkpoints").glob("*"))
