"""Labelled words: how they are read and become tokens, and what their scores are."""

from __future__ import annotations

import warnings

import datasets
import numpy as np
import pytest
from exported import tokenizer
from labelled import NAMES, labels_of, texts, write_jsonl
from seqeval.metrics import classification_report
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peftscape.search.conll import read_conll
from peftscape.search.encoding import encode
from peftscape.search.metrics import METRICS
from peftscape.search.splits import Split
from peftscape.search.task import TaskConfig, TaskError, check_task, load_task
from peftscape.search.token_encoding import encode_words, first_tokens, word_tokens
from peftscape.search.token_examples import objects
from peftscape.search.token_metrics import words_score, words_scores

SIZES = {"validation_size": 4, "test_size": 4}


def config(path, **more):
    return TaskConfig(path=str(path), kind="token_classification", **SIZES, **more)


def errors_of(task):
    with pytest.raises(TaskError) as caught:
        load_task(task)
    assert check_task(task) == list(caught.value.errors)
    return "\n".join(caught.value.errors)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same rows as JSON lines, CoNLL, Parquet with names of ids, and as `datasets` saves them."""
    folder, rows = tmp_path_factory.mktemp("rows"), texts(30)
    write_jsonl(folder / "rows.jsonl", rows)
    lines = (f"{w} x {t}" for row in rows for w, t in [*zip(row, labels_of(row), strict=True), ("", "")])
    lines = ("" if line == " x " else line for line in lines)
    (folder / "rows.conll").write_text("-DOCSTART- -X- O\n\n" + "\n".join(lines) + "\n")
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner": datasets.List(datasets.ClassLabel(names=NAMES))}
    )
    ids = [[NAMES.index(label) for label in labels_of(row)] for row in rows]
    data = datasets.Dataset.from_dict({"tokens": [*rows, []], "ner": [*ids, []]}, features=features)
    data.to_parquet(folder / "rows.parquet")
    data.save_to_disk(str(folder / "saved"))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_rows_from_four_sources_are_one_task(stored):
    found = [load_task(config(stored / "rows.jsonl")), load_task(config(stored / "rows.conll"))]
    named = [load_task(config(stored / name, tags="ner")) for name in ("rows.parquet", "saved")]
    assert [task.labels for task in (*found, *named)] == [("O", "B-LOC", "B-PER", "I-LOC")] * 2 + [NAMES] * 2
    for task in (*found, *named):
        splits = task.splits()
        assert {name: len(split) for name, split in splits.items()} == {"train": 22, "validation": 4, "test": 4}
        for split in splits.values():
            for words, target, text in zip(split.words, split.targets, split.texts, strict=True):
                assert [task.labels[i] for i in target] == labels_of(list(words))
                assert text == " ".join(words)
    assert len({task.fingerprint() for task in found}) == len({task.fingerprint() for task in named}) == 1
    counts = found[0].describe()["class_counts"]
    assert sum(map(sum, counts.values())) == sum(len(row) for row in texts(30))
    assert found[0].metric.name == "entity_f1"
    assert found[0].num_outputs == 4


def test_what_is_wrong_with_labelled_words_is_said(tmp_path):
    def rows(*lines):
        (tmp_path / "bad.jsonl").write_text("\n".join(lines))
        return config(tmp_path / "bad.jsonl")

    good = '{"tokens": ["a", "b"], "tags": ["O", "B-X"]}'
    assert "row 2 of" in (said := errors_of(rows(good, '{"tokens": ["a"], "tags": []}')))
    assert "has 0 labels for 1 words" in said
    assert 'has no list in "tokens"' in errors_of(rows(good, '{"tokens": "a b", "tags": ["O"]}'))
    assert "has the label None" in errors_of(rows(good, '{"tokens": ["a"], "tags": [null]}'))
    assert 'no column "tags"' in errors_of(rows('{"tokens": ["a"]}'))
    parts = rows(*['{"tokens": ["a", "b"], "tags": ["NN", "VB"]}'] * 20)
    assert 'not "NN"; take "token_accuracy"' in errors_of(parts)
    assert load_task(TaskConfig(**{**vars(parts), "metric": "token_accuracy"})).labels == ("NN", "VB")
    assert "task.tags: only for kind = token_classification" in errors_of(TaskConfig(path="x.csv", tags="ner"))
    outside = rows(*['{"tokens": ["a", "b"], "tags": ["O", "O"]}'] * 20)
    with pytest.raises(TaskError, match="has 1 labels; two or more were expected"):
        load_task(outside)
    assert check_task(outside) == []  # who reads the first rows alone cannot know
    (tmp_path / "bad.conll").write_text("a O\nb\n")
    assert 'line 2: "b" has no label behind it' in errors_of(config(tmp_path / "bad.conll"))


def test_lines_of_conll_are_cut_at_blanks_and_tabs_alone(tmp_path):
    lines = ["# id 3f-2\tdomain=en", "10\u00a0000 _ _ O", "#\tx\tO", "id O ", "", "# id 4", "a  B-X\r", "# id B-X", ""]
    (tmp_path / "rows.conll").write_text("\n".join(lines), encoding="utf-8", newline="")
    table = read_conll("rows", tmp_path / "rows.conll")
    assert table.column("tokens") == [["10\u00a0000", "#", "id"], ["a", "#"]]
    assert table.column("tags") == [["O", "O", "O"], ["B-X", "B-X"]]


def test_first_tokens_carry_labels_and_long_texts_are_cut(tmp_path):
    rows = [["city-river", "man", "of", "a", "year"], ["", "man"], *texts(20)]
    task = load_task(config(write_jsonl(tmp_path / "rows.jsonl", rows)))
    made = tokenizer("bert")
    data = encode(task, made, 6)
    for split, own in zip((data.train, data.validation, data.test), task.splits().values(), strict=True):
        cut = 0
        for i, words in enumerate(own.words):
            # As transformers' example scripts align labels (examples/pytorch/token-classification).
            told = made([list(words)], is_split_into_words=True, truncation=True, max_length=6)
            last, marks, seen = None, [], []
            for number in told.word_ids(0):
                marks.append(number is not None and number != last)
                seen += [number] if marks[-1] else []
                last = number
            assert told["input_ids"][0] == split.ids[i].tolist()
            assert marks == split.words[i].tolist()
            assert [task.labels[k] for k in split.targets[i]] == [labels_of(list(words))[k] for k in seen]
            cut += len(made([list(words)], is_split_into_words=True)["input_ids"][0]) > 6
        assert split.cut == cut
    with pytest.raises(TaskError, match="max_length: 2 leaves no room"):
        encode(task, made, 2)


def test_texts_without_a_token_are_left_out_and_counted():
    rows = [("man", "of"), ("", ""), ("a",) * 9, ("city",)]
    targets = objects([np.arange(len(row)) for row in rows])
    found = encode_words(Split([" ".join(row) for row in rows], None, targets, words=rows), tokenizer("bert"), 6)
    assert [target.tolist() for target in found.targets] == [[0, 1], [0, 1, 2, 3], [0]]
    assert found.lengths.tolist() == [len(ids) for ids in found.ids] == [len(row) for row in found.types] == [4, 6, 3]
    assert found.cut == 2
    with pytest.raises(TaskError, match="no token of any text's words"):
        encode_words(Split([""], None, targets[1:2], words=rows[1:2]), tokenizer("bert"), 6)


def test_byte_level_tokenizers_see_words_behind_blanks():
    """The tokens of a text whose words stand between blanks, as `add_prefix_space=True` gives them."""
    rows = texts(12)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [" " + " ".join(row) for row in rows],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    for row, found in zip(rows, word_tokens(made, rows, 99), strict=True):
        assert found.ids.tolist() == made(" " + " ".join(row))["input_ids"]
        assert first_tokens(found.words).sum() == len(row)


def test_tokenizers_that_write_blanks_see_words_behind_them() -> None:
    """Gemma's has a normaliser for it and splits nothing, others Metaspace behind the first word alone."""
    rows = texts(12)
    lines = [" " + " ".join(row) for row in rows]
    for kind in ("replace", "first", "always"):
        inner = Tokenizer(models.BPE())
        if kind == "replace":
            inner.normalizer = normalizers.Replace(" ", "\u2581")
            inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        inner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, show_progress=False))
        made = PreTrainedTokenizerFast(tokenizer_object=inner)
        whole = [" ".join(row) if kind == "always" else line for row, line in zip(rows, lines, strict=True)]
        for text, row, found in zip(whole, rows, word_tokens(made, rows, 99), strict=True):
            assert "".join(made.convert_ids_to_tokens(found.ids)) == "".join(made.tokenize(text)), kind
            assert first_tokens(found.words).sum() == len(row), kind


#: Llama 3's: digits come without the blank before them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("trimmed", [True, False])
def test_a_blank_that_is_a_token_of_its_own_carries_no_label(trimmed):
    inner = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if trimmed:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.decoder = decoders.ByteLevel()
    rows = [["In", "1996", ",", "é", "Ann's", "3", "cats"], ["1996"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kept = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([" In 199 ,", " In 199 ,", " Ann"], kept)
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    for row, found in zip(rows, word_tokens(made, rows, 99), strict=True):
        pieces = [made.convert_ids_to_tokens([i])[0] for i in found.ids.tolist()]
        assert "Ġ" in pieces
        starts = [
            made.decode(found.ids[i:], clean_up_tokenization_spaces=False).lstrip()
            for i in np.flatnonzero(first_tokens(found.words))
        ]
        assert starts == [" ".join(row[k:]) for k in range(len(row))]
        assert "Ġ" not in np.array(pieces)[first_tokens(found.words)]
    # Of a word that is cut behind its blank nothing is there.
    (short,) = word_tokens(made, [["In", "1996"]], 1 + [*pieces].index("Ġ") + len(made(" In")["input_ids"]))
    assert short.words[first_tokens(short.words)].tolist() == [0]


def some_logits(truth, *, seed=0):
    random = np.random.default_rng(seed)
    return objects([random.normal(size=(len(row), 4)) + 2 * np.eye(4)[row] for row in truth])


def entities(labels):
    """IOB2 by hand, for labels in which nothing stands inside of what did not begin."""
    found, start = set(), None
    for i, label in enumerate([*labels, "O"]):
        if start is not None and label != f"I-{labels[start][2:]}":
            found.add((start, i, labels[start][2:]))
            start = None
        start = i if label[0] == "B" else start
    return found


def test_scores_are_those_of_seqeval_and_of_hand():
    random = np.random.default_rng(3)
    truth = objects([random.choice(4, size=n) for n in random.integers(1, 9, size=25)])
    logits = some_logits(truth)
    said = [[NAMES[i] for i in row.argmax(axis=1)] for row in logits]
    wanted = [[NAMES[i] for i in row] for row in truth]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = classification_report(wanted, said, output_dict=True)["micro avg"]
    for metric, key in (("entity_precision", "precision"), ("entity_recall", "recall"), ("entity_f1", "f1-score")):
        assert words_score(metric, NAMES, logits, truth) == pytest.approx(theirs[key], abs=1e-12)
        assert words_scores(metric, logits, truth) is None
    right = [a == b for x, y in zip(said, wanted, strict=True) for a, b in zip(x, y, strict=True)]
    assert words_score("token_accuracy", NAMES, logits, truth) == pytest.approx(np.mean(right))
    assert words_scores("token_accuracy", logits, truth).mean() == pytest.approx(np.mean(right))

    # Words taken for another entity, so that labels stay well formed and can be counted by hand.
    named = [[label if k % 3 else label.replace("B-LOC", "B-PER") for k, label in enumerate(row)] for row in wanted]
    named, wanted = ([formed(row) for row in rows] for rows in (named, wanted))
    both = [(entities(a), entities(b)) for a, b in zip(wanted, named, strict=True)]
    hits, there, given = (sum(map(len, part)) for part in zip(*((a & b, a, b) for a, b in both), strict=True))
    assert 0 < hits < min(there, given)
    truth, logits = (objects([np.eye(4)[[NAMES.index(x) for x in row]] for row in rows]) for rows in (wanted, named))
    found = words_score("entity_f1", NAMES, logits, objects([row.argmax(axis=1) for row in truth]))
    assert found == pytest.approx(2 * hits / (there + given))


def formed(labels):
    """Without an inside that nothing of its type stands before."""
    out = []
    for label in labels:
        out.append("O" if label[0] == "I" and (not out or out[-1][2:] != label[2:]) else label)
    return out


def test_logits_that_are_missing_or_of_other_words():
    truth = objects([np.array([0, 1]), np.array([3])])
    logits = some_logits(truth)
    metric = METRICS["token_accuracy"]
    assert metric.per_example(logits, truth).shape == (2,)
    assert np.isnan(metric.score(np.full(2, None, dtype=object), truth))
    logits[1][0, 0] = np.inf
    assert np.isnan(metric.score(logits, truth))
    with pytest.raises(ValueError, match="text 0 has logits of shape"):
        metric.score(some_logits(truth)[::-1], truth)
