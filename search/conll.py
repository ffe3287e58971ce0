"""CoNLL's files: a word and its labels a line, blank lines between texts."""

from __future__ import annotations

import re
from pathlib import Path

from peftscape.search.tables import Table, TaskError, from_columns

_DOCUMENT = "-DOCSTART-"


def read_conll(source: str, path: Path, limit: int | None = None) -> Table:
    """The columns `tokens`, the first of each line, and `tags`, the last; blanks and tabs stand between columns.

    Lines of -DOCSTART- are left out, and MultiCoNER's `# id ...` before a text.

    Raises:
        TaskError: a line has a word and no label.
    """
    rows: list[tuple[list[str], list[str]]] = []
    words: list[str] = []
    labels: list[str] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            cells = re.split(r"[ \t]+", line.strip(" \t\r\n"))
            if not words and cells[:2] == ["#", "id"]:
                continue
            if cells[0] in ("", _DOCUMENT):
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
