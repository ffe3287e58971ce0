"""Rows: runs in CSV with named columns or in JSON lines of flat objects, as records."""

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftscape.analysis.measures import Imported, common_denominator, direction_of, is_cost
from peftscape.spaces.record import Direction, Failure, State

NAMES = ("name", "label", "design", "run", "experiment_name", "experiment", "id")
STATES = ("state", "status")
ERRORS = ("error", "error_msg", "message", "failure")
SIZES = ("n_test", "n_validation", "n")
_METHOD, _SEED = "method", "seed"
_WORDS: dict[str, State] = {
    **dict.fromkeys(("", "complete", "completed", "success", "ok", "done", "finished"), "complete"),
    **dict.fromkeys(("pruned", "stopped", "stopped early"), "pruned"),
    "running": "running",
}


class RowsError(ValueError):
    """A table that cannot be read; the message lists what is wrong with it."""


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Raises:
        RowsError: if there is no header, a column is named twice, or a row has more cells than the header.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        heads = [head.strip() for head in reader.fieldnames or ()]
        reader.fieldnames = heads
        twice = sorted(head for head, n in Counter(heads).items() if n > 1)
        if not any(heads) or twice:
            raise RowsError(f"{path}: " + (f"columns named twice: {', '.join(twice)}" if twice else "no header"))
        rows = []
        for row in reader:
            if None in row:
                raise RowsError(f"{path}: line {reader.line_num} has more cells than the header ({len(heads)})")
            rows.append({key: (value or "").strip() for key, value in row.items()})
        return rows


def imported(rows: Sequence[Mapping[str, Any]], *, source: str) -> tuple[tuple[Imported, ...], tuple[str, ...]]:
    """One record for each run, and notes; rows that differ in nothing but seed and measures are one run's seeds.

    Known columns: a name (`name`, `label`, `design`, `run`, `experiment_name`, `experiment`, `id`), `method`,
    `seed`, `state` or `status`, an error's message, and how many examples scores are means over (`n_test`,
    `n_validation`, `n`). Every other column whose cells are all numbers is a measure; the rest are knobs.
    The first measure that is not the name of a cost counts as quality until objectives say otherwise.

    Raises:
        RowsError: if there is no measure, or a seed or size is not a whole number.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    known = {_METHOD, _SEED, *NAMES, *STATES, *ERRORS, *SIZES}
    numeric = [
        c
        for c in columns
        if c not in known and any(_given(r.get(c)) for r in rows) and all(_ok(r.get(c)) for r in rows)
    ]
    metrics = [c for c in numeric if not is_cost(c)]
    if rows and not metrics:
        has = ", ".join(columns) or "none"
        raise RowsError(f"{source}: no column of numbers that could be a quality; columns: {has}")
    metric = metrics[0] if metrics else "score"
    texts = [c for c in columns if c not in known and c not in numeric]
    name = next((c for c in NAMES if c in columns), None)
    groups: dict[Any, list[tuple[int, Mapping[str, Any]]]] = {}
    for i, row in enumerate(rows):
        label = str(row.get(name) or f"row {i + 1}") if name else f"row {i + 1}"
        seed, state = _whole(row.get(_SEED), "seed", i, source), _state(row)
        key = (label, str(row.get(_METHOD, "")), state, *(str(row.get(c, "")) for c in texts))
        taken = [s for s, _ in groups.get(key, ())]
        # Without seeds, or with one seed twice, equal names are runs of their own.
        groups.setdefault(key if seed is not None and seed not in taken else (*key, i), []).append((seed or 0, row))
    made = [_record(number, key, runs, numeric, texts) for number, (key, runs) in enumerate(groups.items())]
    notes = [f"read as text, not as a measure: {', '.join(texts)}"] if texts else []
    return aim(tuple(made), metric, direction_of(metric), rows, source), tuple(notes)


def aim(
    runs: Sequence[Imported],
    metric: str,
    direction: Direction,
    rows: Sequence[Mapping[str, Any]] = (),
    source: str = "",
) -> tuple[Imported, ...]:
    """The runs with `metric` as quality; the number of examples is the source's, else what the scores betray."""
    sizes = {n for i, row in enumerate(rows) for c in SIZES if (n := _whole(row.get(c), c, i, source))}
    given = {run.n_validation for run in runs if run.n_validation}
    n = next(iter(sizes)) if len(sizes) == 1 else None
    if not sizes and not given:
        values = [v for run in runs for v in run.columns.get(metric, ()) if math.isfinite(v)]
        n = common_denominator(values)
    return tuple(run.aimed(metric, direction, n) for run in runs)


def _record(
    number: int, key: Any, runs: list[tuple[int, Mapping[str, Any]]], numeric: list[str], texts: list[str]
) -> Imported:
    label, method, state, *_ = key
    first = runs[0][1]
    message = next((str(first[c]) for c in ERRORS if first.get(c)), "")
    status = next((str(first[c]) for c in STATES if first.get(c)), "")
    design = {"placements": [{"method": method}]} if method else {}
    sizes = [n for c in SIZES if (n := _whole(first.get(c), c, 0, ""))]
    return Imported(
        number=number,
        state="failed" if state == "complete" else state,  # until a metric is chosen it has no score
        design={**design, "training": {c: first[c] for c in texts if first.get(c)}} if design or texts else {},
        digest=f"{label}#{number}",
        label=label,
        metric="score",
        direction="maximize",
        n_validation=sizes[0] if sizes else 0,
        scores=(),
        costs=None,
        failure=Failure(kind="missing value" if state == "complete" else status, message=message)
        if state in ("complete", "failed")
        else None,
        columns={c: tuple(_number(row.get(c)) for _, row in runs) for c in numeric},
        seeds=tuple(seed for seed, _ in runs),
    )


def _state(row: Mapping[str, Any]) -> State:
    word = next((str(row[c]).strip().lower() for c in STATES if row.get(c)), "")
    return _WORDS.get(word, "failed")


def _given(cell: Any) -> bool:
    return cell is not None and cell != ""


def _ok(cell: Any) -> bool:
    if isinstance(cell, (bool, list, dict)):
        return False
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _number(cell: Any) -> float:
    return float(cell) if _given(cell) else math.nan


def _whole(cell: Any, what: str, row: int, source: str) -> int | None:
    if not _given(cell):
        return None
    try:
        if float(cell) == int(float(cell)):
            return int(float(cell))
    except (ValueError, OverflowError):
        pass
    raise RowsError(f"{source}: row {row + 1}: {what}: expected a whole number, found {cell!r}")


def flat_objects(lines: Sequence[str]) -> list[dict[str, Any]] | None:
    """The lines' objects where they are rows of a table and not this package's records, else None."""
    found = []
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return None
        if not isinstance(row, dict) or {"number", "scores", "schema"} & row.keys():
            return None
        found.append(row)
    return found or None
