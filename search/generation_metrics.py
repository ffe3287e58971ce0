"""Scores of texts that a model has written against those that were wanted.

Exact match and ROUGE-L are from 0 to 1, BLEU and chrF from 0 to 100, as their own tools print them: those scores are of
the sacrebleu and rouge-score packages, with their default settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

#: The module that a metric needs, and the package that has it.
NEEDED = {
    "bleu": ("sacrebleu", "sacrebleu"),
    "chrf": ("sacrebleu", "sacrebleu"),
    "rouge_l": ("rouge_score", "rouge-score"),
}


def missing_package(name: str) -> str | None:
    """What to install for a metric, if anything."""
    module, package = NEEDED.get(name, (None, None))
    return package if module is not None and find_spec(module) is None else None


def generated_score(name: str, said: Sequence[str | None], wanted: Sequence[str]) -> float:
    """The score of all texts."""
    if name in ("bleu", "chrf"):
        import sacrebleu

        score = sacrebleu.corpus_bleu if name == "bleu" else sacrebleu.corpus_chrf
        return float(score(list(said), [list(wanted)]).score)
    scores = generated_scores(name, said, wanted)
    assert scores is not None
    return float(scores.mean())


def generated_scores(name: str, said: Sequence[str | None], wanted: Sequence[str]) -> NDArray[np.float64] | None:
    """One value a text whose mean is the score, NaN for one that is not there; None if the score is no such mean."""
    pairs = list(zip(said, wanted, strict=True))
    if name == "exact_match":
        return np.array([np.nan if a is None else float(a.split() == b.split()) for a, b in pairs])
    if name != "rouge_l":
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array([np.nan if a is None else scorer.score(b, a)["rougeL"].fmeasure for a, b in pairs])
