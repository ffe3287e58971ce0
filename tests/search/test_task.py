"""Tasks of users' files by what was written into them: splits, labels, errors, tokens."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from peftscape.search.embedded import embedded_model_path
from peftscape.search.task import Task, TaskConfig, TaskError, check_task, encode, load_task


def write_csv(path: Path, rows: list[tuple[object, ...]], header: tuple[str, ...] = ("text", "label")) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return str(path)


def labelled(n: int, labels: tuple[object, ...] = ("no", "yes")) -> list[tuple[object, ...]]:
    return [(f"text {i}", labels[i % len(labels)]) for i in range(n)]


def errors_of(config: TaskConfig) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(config)
    return "\n".join(caught.value.errors)


def everything(task: Task) -> Counter[tuple[str, float]]:
    return Counter((t, float(y)) for s in task.splits().values() for t, y in zip(s.texts, s.targets, strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path())


# Splits.


def test_splits_keep_every_row_once_and_the_proportions(tmp_path):
    rows = [(f"text {i}", "rare" if i % 10 == 0 else "common") for i in range(1000)]
    task = load_task(TaskConfig(path=write_csv(tmp_path / "a.csv", rows), validation_size=100, test_size=0.3))
    ids = {name: i for i, name in enumerate(task.labels)}
    assert everything(task) == Counter((str(text), float(ids[label])) for text, label in rows)
    assert [len(s) for s in task.splits().values()] == [600, 100, 300]
    assert [int((s.targets == ids["rare"]).sum()) for s in task.splits().values()] == [60, 10, 30]
    assert task.carved == ("test", "validation")


def test_the_seed_fixes_the_splits_and_another_seed_changes_them(tmp_path):
    path = write_csv(tmp_path / "a.csv", labelled(200))
    prints = [load_task(TaskConfig(path=path, seed=seed)).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_the_validation_size_does_not_move_the_test_split(tmp_path):
    path = write_csv(tmp_path / "a.csv", labelled(200))
    small, large = (load_task(TaskConfig(path=path, validation_size=size)) for size in (5, 20))
    assert small.test.texts == large.test.texts


def test_a_count_takes_at_most_a_fifth(tmp_path):
    task = load_task(TaskConfig(path=write_csv(tmp_path / "a.csv", labelled(100))))
    assert [len(s) for s in task.splits().values()] == [64, 16, 20]


def test_a_class_with_one_row_stays_in_training(tmp_path):
    rows = [*labelled(50), ("alone", "single")]
    task = load_task(TaskConfig(path=write_csv(tmp_path / "a.csv", rows), max_train=5))
    assert len(task.train) == 5
    assert "alone" in task.train.texts


def test_max_train_caps_training_only(tmp_path):
    path = write_csv(tmp_path / "a.csv", labelled(500))
    whole, capped = load_task(TaskConfig(path=path)), load_task(TaskConfig(path=path, max_train=40))
    assert Counter(capped.train.targets.tolist()) == {0: 20, 1: 20}
    assert set(capped.train.texts) < set(whole.train.texts)
    assert capped.validation.texts == whole.validation.texts
    assert capped.test.texts == whole.test.texts


def test_the_fingerprint_follows_the_content_not_the_file(tmp_path):
    rows = labelled(60)
    first = write_csv(tmp_path / "a.csv", rows)
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows), encoding="utf-8")
    changed = write_csv(tmp_path / "c.csv", [("other", "no"), *rows[1:]])
    prints = [load_task(TaskConfig(path=p)).fingerprint() for p in (first, str(lines), changed)]
    assert prints[0] == prints[1] != prints[2]


def test_describe_counts_texts_that_training_has_seen(tmp_path):
    train = write_csv(tmp_path / "train.csv", labelled(40))
    test = write_csv(tmp_path / "test.csv", [("text 0", "no"), ("new", "yes"), ("text 1", "yes")])
    described = load_task(TaskConfig(train=train, validation=None, test=test, validation_size=1)).describe()
    assert described["seen_in_training"]["test"] in (1, 2)  # one of the two may be in the validation split
    assert json.loads(json.dumps(described))["class_counts"]["test"] == [1, 2]


# Users' files.


def test_every_format_gives_the_same_task(tmp_path):
    import datasets
    import pandas as pd

    rows = [(f"text, {i}", f'pair "{i}"', i % 3) for i in range(60)]
    frame = pd.DataFrame(rows, columns=["a", "b", "y"])
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    write_csv(tmp_path / "a.csv", rows, ("a", "b", "y"))
    write_csv(tmp_path / "a.tsv", rows, ("a", "b", "y"))
    (tmp_path / "folder").mkdir()
    write_csv(tmp_path / "folder" / "train.csv", rows, ("a", "b", "y"))
    datasets.disable_progress_bars()
    datasets.Dataset.from_pandas(frame).save_to_disk(str(tmp_path / "disk"))
    files = ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "folder", "disk")
    configs = [TaskConfig(path=str(tmp_path / f), text="a", pair="b", label="y") for f in files]
    assert [check_task(config) for config in configs] == [[]] * len(files)
    tasks = [load_task(config) for config in configs]
    assert len({task.fingerprint() for task in tasks}) == 1
    assert tasks[0].labels == ("0", "1", "2")
    assert tasks[0].train.pairs is not None
    for text, pair, target in zip(tasks[0].train.texts, tasks[0].train.pairs, tasks[0].train.targets, strict=True):
        i = int(text.split()[1])
        assert (pair, target) == (f'pair "{i}"', i % 3)


def test_splits_and_class_names_of_a_datasets_folder_are_used(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zebra", "ape"])}
    )

    def part(prefix: str, n: int) -> datasets.Dataset:
        columns = {"text": [f"{prefix} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}
        return datasets.Dataset.from_dict(columns, features=features)

    datasets.disable_progress_bars()
    parts = {"train": part("a", 20), "dev": part("b", 6), "test": part("c", 4)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    task = load_task(TaskConfig(path=str(tmp_path / "d")))
    assert task.labels == ("zebra", "ape")
    assert [len(s) for s in task.splits().values()] == [20, 6, 4]
    assert task.carved == ()
    other = load_task(TaskConfig(path=str(tmp_path / "d"), test="dev", validation="test"))
    assert other.test.texts[0] == "b 0"
    assert 'no split "tset"' in errors_of(TaskConfig(path=str(tmp_path / "d"), test="tset"))
    assert 'Did you mean "test"' in errors_of(TaskConfig(path=str(tmp_path / "d"), test="tset"))


def test_hidden_labels_are_named_as_such(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    train = datasets.Dataset.from_dict({"text": ["a", "b"] * 10, "label": [0, 1] * 10}, features=features)
    test = datasets.Dataset.from_dict({"text": ["c", "d"], "label": [-1, -1]}, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "d"))
    assert "are hidden (all -1)" in errors_of(TaskConfig(path=str(tmp_path / "d")))


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ((3, 10, 2), "classification", ("2", "3", "10")),
        (("b", "a"), "classification", ("a", "b")),
        (("007", "7"), "classification", ("007", "7")),
        (("NA", "null"), "classification", ("NA", "null")),
        (("1.0", "v2"), "classification", ("1.0", "v2")),
        (("1.5", "2", "1e-05"), "regression", ()),
    ],
)
def test_labels_are_what_the_file_says(tmp_path, labels, kind, names):
    task = load_task(TaskConfig(path=write_csv(tmp_path / "a.csv", labelled(60, labels))))
    assert (task.kind, task.labels) == (kind, names)
    lookup = {f"text {i}": labels[i % len(labels)] for i in range(60)}
    for text, target in zip(task.train.texts, task.train.targets, strict=True):
        if names:
            assert names[target] == str(lookup[text])
        else:
            assert target == np.float32(lookup[text])


def test_regression_has_one_output_and_pearson(tmp_path):
    task = load_task(TaskConfig(path=write_csv(tmp_path / "a.csv", labelled(60, (1, 2, 3))), kind="regression"))
    assert (task.num_outputs, task.metric.name, task.train.targets.dtype) == (1, "pearson", np.float32)


def test_quotes_that_do_not_close_are_text_in_a_tsv(tmp_path):
    lines = [f'"Well {i}, he said\t{i % 2}' if i % 3 else f"plain {i}\t{i % 2}" for i in range(30)]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    task = load_task(TaskConfig(path=str(tmp_path / "a.tsv")))
    assert {text for text, _ in everything(task)} == {line.split("\t")[0] for line in lines}


def test_a_quoted_tsv_cell_may_span_lines(tmp_path):
    path = write_csv(tmp_path / "a.tsv", [(f'say "{i}"\nand more', i % 2) for i in range(20)])
    assert {text for text, _ in everything(load_task(TaskConfig(path=path)))} == {
        f'say "{i}"\nand more' for i in range(20)
    }


# Errors.


def test_missing_columns_are_all_named_with_the_nearest(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("x", "y", 1)] * 9, ("sentence1", "sentence2", "labels"))
    config = TaskConfig(path=path, text="sentence", pair="sentense2")
    message = errors_of(config)
    assert 'task.text: no column "sentence"' in message
    assert 'task.pair: no column "sentense2"' in message
    assert 'Did you mean "sentence2"?' in message
    assert 'task.label: no column "label"' in message
    assert '(columns: "sentence1", "sentence2", "labels")' in message
    assert "\n".join(check_task(config)) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(name="trec"), 'no embedded task "trec". Did you mean "trec6"?'),
        (TaskConfig(), "task.path: needed, or task.name"),
        (TaskConfig(name="trec6", path="a.csv"), "task.path: the embedded tasks have their own data"),
        (TaskConfig(name="trec6", metric="acuracy"), 'no metric "acuracy". Did you mean "accuracy"?'),
        (
            TaskConfig(name="trec6", metric="pearson"),
            '"pearson" is for regression, the task is classification',
        ),
        (TaskConfig(name="trec6", metric="f1"), '"f1" needs 2 classes, the task has 6'),
        (TaskConfig(path="gone.csv"), "task.path: no such file: gone.csv"),
        (TaskConfig(path="a.csv", test="a.csv"), "train, validation and test must differ"),
        (TaskConfig(name="trec6", seed=-1), "task.seed: -1"),
        (TaskConfig(name="trec6", validation_size=1.5), "task.validation_size: 1.5"),
        (TaskConfig(name="trec6", max_train=0), "task.max_train: 0"),
        (TaskConfig(path="a.csv", text=3), "task.text: 3 is not text"),  # type: ignore[arg-type]
        (TaskConfig(path="a.csv", kind="regresion"), 'Did you mean "regression"?'),  # type: ignore[arg-type]
    ],
)
def test_what_the_keys_show_is_told_by_the_check_and_by_the_load(config, message):
    assert message in "\n".join(check_task(config))
    assert message in errors_of(config)


def test_all_errors_of_the_keys_are_told_at_once():
    assert len(check_task(TaskConfig(name="trek6", metric="acc", seed=-1, test_size=0))) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([("a", "x"), ("", "y"), (" ", "x")] * 4, "8 of 12 rows"),
        ([("a", "x"), ("b", ""), ("c", "y")] * 4, "4 of 12 rows of"),
        ([("a", "x")] * 12, "all 12 rows"),
        ([(f"a{i}", f"label {i}") for i in range(12)], "12 different labels in 12 rows"),
    ],
)
def test_data_without_a_task_in_it_is_refused(tmp_path, rows, message):
    assert message in errors_of(TaskConfig(path=write_csv(tmp_path / "a.csv", rows)))


def test_labels_that_training_never_saw_are_named(tmp_path):
    train = write_csv(tmp_path / "train.csv", labelled(20))
    test = write_csv(tmp_path / "test.csv", [("a", "no"), ("b", "maybe"), ("c", "maybe")])
    message = errors_of(TaskConfig(path=train, test=test))
    assert 'labels that the training data does not: "maybe" (2 rows)' in message


def test_words_are_no_numbers(tmp_path):
    path = write_csv(tmp_path / "a.csv", labelled(20, ("1.5", "high")))
    config = TaskConfig(path=path, kind="regression")
    assert "10 of 20 labels" in errors_of(config)
    assert '"label" = "high" in row 2' in "\n".join(check_task(config))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nfine,a\ncaf\xe9,b\n", "line 3: not UTF-8 (byte 0xe9)"),
        ("a.jsonl", b'{"text": "caf\xe9", "label": 1}\n', "line 1: not UTF-8 (byte 0xe9)"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"text,label\na,b\nc,d,e,f\n", "not a regular table"),
        ("a.csv", b"text,label\na,b,c\nd,e,f\n", "not a regular table"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "a JSON array"),
        ("a.parquet", b"not parquet at all", "not a Parquet file"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    config = TaskConfig(path=str(tmp_path / name))
    assert message in errors_of(config)
    assert message in "\n".join(check_task(config))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    text = "text,label\n" + "\n".join(f"a{i},{i % 2}" for i in range(20))
    (tmp_path / "a.csv").write_text(text, encoding="utf-8-sig")
    assert len(load_task(TaskConfig(path=str(tmp_path / "a.csv"))).train) > 0


def test_what_is_no_file_and_no_dataset_is_told(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "task.path: a/b/c: no such" in errors_of(TaskConfig(path="a/b/c"))
    assert f"task.path: {empty}: cannot be read" in errors_of(TaskConfig(path=str(empty)))


# Tokens.


def test_tokens_are_those_of_each_text_alone(tokenizer):
    task = load_task(TaskConfig(name="trec6", max_train=50))
    data = encode(task, tokenizer, max_length=16)
    for split, encoded in zip(task.splits().values(), (data.train, data.validation, data.test), strict=True):
        whole = [tokenizer.tokenize(t) for t in split.texts]
        ids = [[101, *tokenizer.convert_tokens_to_ids(words)[:14], 102] for words in whole]
        assert [row.tolist() for row in encoded.ids] == ids
        assert encoded.cut == sum(len(words) > 14 for words in whole) > 0
        assert encoded.lengths.tolist() == [len(row) for row in ids]
        assert encoded.ids[0].dtype == np.int64
        assert encoded.types is not None
        assert all(not row.any() and len(row) == len(i) for row, i in zip(encoded.types, ids, strict=True))
        assert encoded.targets is split.targets


def test_of_a_pair_the_longer_text_is_cut(tmp_path, tokenizer):
    rows = [("one two", "three " * 30, i % 2) for i in range(20)]
    task = load_task(TaskConfig(path=write_csv(tmp_path / "a.csv", rows, ("text", "more", "label")), pair="more"))
    data = encode(task, tokenizer, max_length=12)
    words = tokenizer.convert_ids_to_tokens(data.train.ids[0].tolist())
    assert words == ["[CLS]", "one", "two", "[SEP]", *["three"] * 7, "[SEP]"]
    assert data.train.types is not None
    assert data.train.types[0].tolist() == [0] * 4 + [1] * 8
    assert data.train.cut == len(task.train)


def test_a_length_without_room_for_text_is_refused(tokenizer):
    with pytest.raises(TaskError, match="2 leaves no room beside 2 special tokens"):
        encode(load_task(TaskConfig(name="trec6")), tokenizer, max_length=2)
