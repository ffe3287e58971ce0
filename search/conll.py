"""CoNLL's files: a word and its labels a line, blank lines between texts."""

from __future__ import annotations

from pathlib import Path

from peftscape.search.tables import Table, TaskError, from_columns

_DOCUMENT = "-DOCSTART-"


def read_conll(source: str, path: Path, limit: int | None = None) -> Table:
    """The columns `tokens`, the first of each line, and `tags`, the last; lines of -DOCSTART- are left out.

    Raises:
        TaskError: a line has a word and no label.
    """
    rows: list[tuple[list[str], list[str]]] = []
    words: list[str] = []
    labels: list[str] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            cells = line.split()
            if not cells or cells[0] == _DOCUMENT:
                if words:
                    rows.append((words, labels))
                words, labels = [], []
                if limit is not None and len(rows) >= limit:
                    break
                continue
            if len(cells) < 2:
                raise TaskError(source, [f'{source}, line {number}: "{cells[0]}" has no label behind it'])
            words.append(cells[0])
            labels.append(cells[-1])
    if words:
        rows.append((words, labels))
    return from_columns(source, {"tokens": [w for w, _ in rows], "tags": [own for _, own in rows]}, {})
