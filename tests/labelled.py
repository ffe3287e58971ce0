"""Texts whose words are labelled, for the tests: what a label is follows from the word and the one before it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from exported import WORDS

NAMES = ("O", "B-LOC", "I-LOC", "B-PER")


def labels_of(words: list[str]) -> list[str]:
    labels = []
    for i, word in enumerate(words):
        behind = i > 0 and words[i - 1].startswith("city")
        labels.append("B-LOC" if word.startswith("city") else "I-LOC" if behind else "B-PER" if word == "man" else "O")
    return labels


def texts(count: int, *, seed: int = 0, most: int = 9) -> list[list[str]]:
    """Words of the tiny backbones' tokenizer; `city-river` is three of its tokens."""
    random = np.random.default_rng(seed)
    known = [*WORDS[4:], "city-river", "man", "city"]
    return [[str(w) for w in random.choice(known, size=n)] for n in random.integers(2, most, size=count)]


def write_jsonl(path: Path, rows: list[list[str]], *, tokens: str = "tokens", tags: str = "tags") -> Path:
    path.write_text("".join(json.dumps({tokens: row, tags: labels_of(row)}) + "\n" for row in rows))
    return path
