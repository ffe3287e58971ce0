"""Metrics of written texts against the command lines of the packages that define them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from rouge_score import rouge_scorer

from peftscape.search.metrics import metric

WANTED = ["the cat sat on the mat", "a dog barks at night", "nobody was there at all", "yes"]
SAID = ["the cat sat on a mat", "the dog barks at the night", "nobody was there at all", "no"]


def texts(*values: str | None) -> np.ndarray:
    return np.array(values, dtype=object)


def test_bleu_and_chrf_are_those_of_sacrebleu_itself(tmp_path):
    for name, lines in (("said", SAID), ("wanted", WANTED)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "wanted"), "-i", str(tmp_path / "said")]
    printed = subprocess.run(
        [*command, "-m", "bleu", "chrf", "-b", "-w", "8"], capture_output=True, check=True, text=True
    )
    bleu, chrf = (float(line.strip(' ,[]"')) for line in printed.stdout.split() if line.strip(' ,[]"'))
    assert metric("bleu").score(texts(*SAID), texts(*WANTED)) == pytest.approx(bleu, abs=1e-7)
    assert metric("chrf").score(texts(*SAID), texts(*WANTED)) == pytest.approx(chrf, abs=1e-7)
    assert 0 < bleu < 100
    assert metric("bleu").per_example(texts(*SAID), texts(*WANTED)) is None


def test_exact_match_and_rouge_l_are_means_of_their_texts():
    found = metric("exact_match").per_example(texts(" nobody  was there", "x"), texts("nobody was there", "y"))
    assert found.tolist() == [1.0, 0.0]
    each = metric("rouge_l").per_example(texts(*SAID), texts(*WANTED))
    assert metric("rouge_l").score(texts(*SAID), texts(*WANTED)) == pytest.approx(each.mean())
    # 5 of 6 words in order, of either text.
    assert each[0] == pytest.approx(5 / 6)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    assert each.tolist() == [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(WANTED, SAID, strict=True)]


def test_a_text_that_is_not_there_has_no_score():
    assert np.isnan(metric("exact_match").score(texts("a", None), texts("a", "b")))
    assert np.isnan(metric("rouge_l").per_example(texts("a", None), texts("a", "b"))).tolist() == [False, True]
    assert np.isnan(metric("bleu").score(texts("a", None), texts("a", "b")))
    with pytest.raises(ValueError, match="exact_match: outputs of shape"):
        metric("exact_match").score(texts("a"), texts("a", "b"))
