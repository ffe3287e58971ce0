"""States: how a trial ended, in words, and what stopping trials at rungs saved."""

from collections import Counter
from collections.abc import Iterable, Sequence

from peftscape.spaces.record import Record

STOPPED, REFUSED, WAITING = "stopped early", "not trained", "waiting at a rung"


def kind_of(record: Record) -> str:
    """`complete`, `failed`, `running`, `waiting at a rung`, `stopped early`, or `not trained` (over a limit)."""
    if record.state == "running" and record.rungs:
        return WAITING
    if record.state != "pruned":
        return record.state
    return STOPPED if record.rungs or record.scores or record.curve else REFUSED


def state_of(record: Record) -> str:
    """The kind, and at which rung: "stopped at rung 1 (640 examples)"."""
    if not record.rungs or record.state not in ("pruned", "running"):
        return kind_of(record)
    verb = "stopped at" if record.state == "pruned" else "reached"
    return f"{verb} rung {len(record.rungs)} ({record.rungs[-1].examples:,} examples)"


def counted(records: Iterable[Record]) -> str:
    """How many ended how: "8 complete, 3 stopped early, 1 failed"."""
    found = Counter(map(kind_of, records))
    order = ("complete", STOPPED, REFUSED, "failed", WAITING, "running")
    return ", ".join(f"{found[kind]:,} {kind}" for kind in order if found[kind])


def last_score(record: Record) -> float:
    """The validation score of a trial, or of its last rung where it was stopped there; NaN without either."""
    if record.rungs and not record.scores and record.state in ("pruned", "running"):
        return record.rungs[-1].validation
    return record.validation


def saved(records: Sequence[Record]) -> tuple[int, int] | None:
    """Training examples that stopping saved, and those that all begun trials would have taken; None without rungs."""
    begun = [r for r in records if kind_of(r) in ("complete", STOPPED) and r.curve]
    full = max((r.curve[-1][0] for r in begun if r.state == "complete"), default=0)
    stopped = [r for r in begun if r.state == "pruned" and r.rungs]
    if not full or not stopped:
        return None
    return sum(full - r.rungs[-1].examples for r in stopped), full * len(begun)
