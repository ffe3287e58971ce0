"""What a running search shows: trials done and running, the front's size, the best score, the time left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from peftscape.search.budget import Budget
    from peftscape.search.storage import Storage
    from peftscape.spaces.record import Record


class SearchProgress:
    """A bar on a terminal; a line now and then where there is none."""

    def __init__(self, *, quiet: bool = False, total: int | None = None) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal and not quiet
        self._console, self._said = console, ""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            console=console,
            disable=quiet or self._plain,
        )
        self._task = self._bar.add_task("search", total=total, words="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(
        self,
        phase: str,
        *,
        done: float,
        total: float | None,
        trials: int,
        running: int,
        front: int,
        best: float | None,
        left_s: float,
        waiting: int = 0,
        stopped: str = "",
    ) -> None:
        """Say where the search is; `done` of `total` moves the bar."""
        words = [f"{trials} done, {running} running" + (f", {waiting} waiting" if waiting else ""), f"front {front}"]
        if stopped:
            words.append(stopped)
        if best is not None:
            words.append(f"best {best:.3f}")
        if not math.isinf(left_s):
            words.append(f"{max(0, int(left_s)) // 60}:{max(0, int(left_s)) % 60:02d} left")
        self._bar.update(self._task, description=phase, completed=done, total=total, words="  ".join(words))
        line = f"{phase} {done if total is None else trials} {front}"
        if self._plain and line != self._said:
            self._said = line
            self._console.print(f"{phase}: {', '.join(words)}", highlight=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, highlight=False)


def show(progress: SearchProgress, phase: str, budget: Budget, storage: Storage, *, done: int, running: int) -> None:
    """Tell the progress bar where the search is."""
    complete = [r for r in storage.records if r.state == "complete"]
    quality = storage.objectives[0]
    best = max if quality.direction == "maximize" else min
    progress.show(
        phase,
        done=budget.elapsed_s() if budget.time_s else done,
        total=budget.time_s or budget.trials,
        trials=done,
        running=running,
        front=len(storage.front()),
        best=best((r.validation for r in complete), default=None),
        left_s=budget.left_s(),
        waiting=storage.waiting,
        stopped=stopped(storage.records),
    )


def stopped(records: Sequence[Record]) -> str:
    """How many trials were stopped at each rung, and what part of the work this saved; nothing where none was."""
    early = [record for record in records if record.state == "pruned" and record.rungs]
    if not early:
        return ""
    at = Counter(len(record.rungs) for record in early)
    words = f"{' + '.join(str(at[rung]) for rung in range(1, max(at) + 1))} stopped at rungs"
    full = max((record.curve[-1][0] for record in records if record.state == "complete" and record.curve), default=0)
    trained = sum(bool(record.curve) for record in records)
    saved = sum(full - record.rungs[-1].examples for record in early) / (full * trained) if full else 0.0
    return f"{words}, {saved:.0%} of the work saved" if full else words
