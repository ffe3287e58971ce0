"""Tables of rows: read from a file, a `datasets` folder or the hub, with errors in the user's own terms."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftscape.spaces.words import InputError, nearest

_CONLL = (".conll", ".iob", ".bio")
SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".parquet", *_CONLL)
"""The files that `read_file` reads, told apart by their ending."""


LINE_BYTES = 16 * 2**20
"""Longer lines are no texts that a model reads; parsers would hold several copies of them."""

_QUOTED_CELL = re.compile(r'"([^"]|"")*"')


class TaskError(InputError):
    """A task cannot be had from what was asked; carries every error found."""


@dataclass(frozen=True)
class Table:
    """Named columns of one length, each read when it is asked for.

    `class_names` holds the names of the classes of a column of ids, or of lists of ids, where the source knows them.
    """

    source: str
    names: tuple[str, ...]
    rows: int
    column: Callable[[str], list[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def from_columns(
    source: str, columns: Mapping[str, Sequence[Any]], class_names: Mapping[str, tuple[str, ...]]
) -> Table:
    """A table of columns that are in memory."""
    rows = len(next(iter(columns.values()))) if columns else 0
    return Table(source, tuple(columns), rows, lambda name: list(columns[name]), class_names)


def is_file_name(source: str) -> bool:
    """Whether `source` names a table file, by its ending."""
    return Path(source).suffix.lower() in SUFFIXES


def read_file(source: str, *, limit: int | None = None) -> Table:
    """The first `limit` rows (all by default) of a CSV, TSV, JSON lines, Parquet or CoNLL file.

    CSV values stay strings, so that a label `007` or a text `NA` is what the file says.

    Raises:
        TaskError: if the file is missing, empty, damaged, of another kind or not UTF-8.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        here = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        raise TaskError(source, [f"no such file: {source}{nearest(path.name, here)}"])
    suffix = path.suffix.lower()
    if suffix != ".parquet" and (line := _long_line(path)):
        raise TaskError(source, [f"{source}, line {line}: longer than {LINE_BYTES:,} bytes; is this a table of texts?"])
    try:
        if suffix == ".parquet":
            return _parquet(source, path, limit)
        if suffix in (".jsonl", ".ndjson", ".json"):
            return _json(source, path, limit)
        if suffix in (".csv", ".tsv", ".tab"):
            return _csv(source, path, "," if suffix == ".csv" else "\t", limit)
        if suffix in _CONLL:
            from peftscape.search.conll import read_conll

            return read_conll(source, path, limit)
    except UnicodeDecodeError:
        raise TaskError(source, [_not_utf8(path)]) from None
    kind = f"{suffix} files" if suffix else "files without an ending"
    raise TaskError(source, [f"{source}: cannot read {kind}; can read {', '.join(SUFFIXES)}"])


def _long_line(path: Path) -> int | None:
    """The number of the first line that is too long; told from blocks, so that it is never in memory."""
    number, length = 1, 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            lines = block.split(b"\n")
            for part in lines[:-1]:
                if length + len(part) > LINE_BYTES:
                    return number
                number, length = number + 1, 0
            length += len(lines[-1])
            if length > LINE_BYTES:
                return number
    return None


def _csv(source: str, path: Path, separator: str, limit: int | None) -> Table:
    import warnings

    import pandas as pd

    quoted = separator == "," or _is_quoted(path)
    try:
        with warnings.catch_warnings():
            # pandas cuts rows longer than the header with a warning; a wrong separator or quote made them.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path, sep=separator, dtype=object, keep_default_na=False, index_col=False,
                encoding="utf-8-sig", nrows=limit,
                quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            )  # fmt: skip
    except pd.errors.EmptyDataError:
        raise TaskError(source, [f"{source}: the file is empty"]) from None
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise TaskError(source, [f"{source}: not a regular table: {reason}"]) from None
    return Table(source, tuple(map(str, frame.columns)), len(frame), lambda name: list(frame[name]))


def _is_quoted(path: Path) -> bool:
    """Whether quotes in a tab-separated file are syntax; in many (GLUE) they are text, and would eat rows.

    They are text if they do not close, though every line has the columns of the first.
    """
    columns: set[int] = set()
    closed = True
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            cells = line.rstrip("\n").split("\t")
            columns.add(len(cells))
            closed = closed and all(c[:1] != '"' or _QUOTED_CELL.fullmatch(c) for c in cells)
    return closed or len(columns) > 1


def _json(source: str, path: Path, limit: int | None) -> Table:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as lines:
        first = lines.read(1)
        lines.seek(0)
        if first == "[":
            raise TaskError(source, [f"{source}: a JSON array; write one object a line (JSON lines)"])
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(source, [f"{source}, line {number}: not JSON: {error}"]) from None
            if not isinstance(row, dict):
                raise TaskError(source, [f"{source}, line {number}: not an object but {line.strip()[:40]}"])
            rows.append(row)
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(source, names, len(rows), lambda name: [row.get(name) for row in rows])


def _parquet(source: str, path: Path, limit: int | None) -> Table:
    import pyarrow  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = tuple(file.schema_arrow.names)
        labels = _labels_of_lists((file.schema_arrow.metadata or {}).get(b"huggingface"))
        if limit is None:
            return Table(source, names, file.metadata.num_rows, lambda name: _values(file.read([name])[name]), labels)
        head = next(file.iter_batches(batch_size=limit), None)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise TaskError(source, [f"{source}: not a Parquet file: {error}"]) from None
    if head is None:
        return from_columns(source, {name: [] for name in names}, {})
    return Table(source, names, head.num_rows, lambda name: _values(head[name]), labels)


def _labels_of_lists(written: bytes | None) -> dict[str, tuple[str, ...]]:
    """What `datasets` wrote into a Parquet file of columns that are lists of class ids: the classes' names."""
    try:
        features = json.loads(written or b"{}")["info"]["features"]
        inner = {name: feature.get("feature") for name, feature in features.items()}
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in inner.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _values(column: Any) -> list[Any]:
    return list(column.to_pylist())


def _not_utf8(path: Path) -> str:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"0x{line[error.start]:02x}"
                return f"{path}, line {number}: not UTF-8 (byte {byte}); save the file as UTF-8"
    return f"{path}: not UTF-8; save the file as UTF-8"


def read_dataset(source: str, subset: str | None = None, *, limit: int | None = None) -> dict[str, Table]:
    """The splits of a folder that `datasets` wrote or can read, or of a dataset of the hub, by name.

    Raises:
        TaskError: if `source` is neither, or the hub cannot be reached and holds no copy here.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise TaskError(source, [f"{source}: no such file or folder, and not the id of a dataset"])
    with _quiet_datasets() as datasets:
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                found = datasets.load_from_disk(str(folder))
            elif folder.is_dir():
                found = _folder(datasets, folder, subset)
            else:
                found = datasets.load_dataset(source, subset)
        except Exception as error:  # the hub and the builders raise dozens of types, all about `source`
            reason = (str(error).strip().splitlines() or [""])[0]
            what = "cannot be read" if folder.is_dir() else "nothing here, and the hub did not give it"
            raise TaskError(source, [f"{source}: {what} ({type(error).__name__}: {reason})"]) from None
    splits = found if isinstance(found, dict) else {"train": found}
    return {str(name): _split_table(f"{source} [{name}]", split, limit) for name, split in splits.items()}


def _folder(datasets: Any, folder: Path, subset: str | None) -> Any:
    import tempfile

    # In memory, so that the cache can go and no copy of the user's data stays behind.
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(str(folder), subset, cache_dir=cache, keep_in_memory=True)


def _split_table(source: str, split: Any, limit: int | None) -> Table:
    part = split if limit is None else split.select(range(min(limit, len(split))))
    inner = {name: getattr(feature, "feature", feature) for name, feature in part.features.items()}
    named = {
        name: tuple(map(str, feature.names))
        for name, feature in inner.items()
        if type(feature).__name__ == "ClassLabel"
    }
    return Table(source, tuple(part.column_names), len(part), lambda name: list(part[name]), named)


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """`datasets` without progress bars, and without its request that counts each load, local ones too."""
    import datasets

    counts, bars = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, not datasets.are_progress_bars_disabled()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()
