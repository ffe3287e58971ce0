"""Metrics by name: one score of a model's outputs, and what each example adds to it.

Definitions are those of scikit-learn and scipy; both are imported when a score is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peftscape.search.generation_metrics import generated_score, generated_scores
from peftscape.search.token_metrics import words_score, words_scores
from peftscape.spaces.words import nearest

Kind = Literal["classification", "regression", "lm", "generation", "token_classification"]
Direction = Literal["maximize", "minimize"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A named score; `direction` is in Optuna's words, so that it can be handed to a study.

    `binary` says that the metric is defined for two classes only, class 1 being the positive one. `labels` are names by
    id, which metrics of labelled words read.
    """

    name: str
    direction: Direction
    kind: Kind
    binary: bool = False
    labels: tuple[str, ...] = ()

    def score(self, logits: NDArray[Any], targets: NDArray[Any]) -> float:
        """The score of all examples, in the metric's own units (accuracy: 0 to 1, not percent).

        NaN where an output is not finite, for then the model's answer cannot be read. 0 where the score is
        undefined: `pearson` and `spearman` of constant predictions or targets, `r2` of constant targets.

        Args:
            logits: examples x classes; for regression examples, or examples x 1; for language modelling examples x 2,
                the negative log-likelihood of each example's tokens in nats, and how many these are; for generation
                the texts that were written, None where there is none; for labelled words of each text words x labels.
            targets: class ids, or numbers; language modelling has none, and takes anything of their shape; for
                generation the texts that were wanted; for labelled words of each text their class ids.

        Raises:
            ValueError: if shapes differ, there are no examples, or a target is no class of the logits.
        """
        if self.kind == "generation":
            said, wanted = _texts(self.name, logits, targets)
            return float("nan") if None in said else generated_score(self.name, said, wanted)
        if self.kind == "token_classification":
            return words_score(self.name, self.labels, list(logits), list(targets))
        outputs, truth = self._checked(logits, targets)
        if not np.isfinite(outputs).all():
            return float("nan")
        return float(_SCORES[self.name](outputs, truth))

    def per_example(self, logits: NDArray[Any], targets: NDArray[Any]) -> Floats | None:
        """One value an example whose mean is the score, for paired tests; None if the score is no such mean.

        Accuracy gives 0 and 1. An example whose outputs are not finite gives NaN.
        """
        if self.kind == "generation":
            said, wanted = _texts(self.name, logits, targets)
            return generated_scores(self.name, said, wanted)
        if self.kind == "token_classification":
            return words_scores(self.name, list(logits), list(targets))
        outputs, truth = self._checked(logits, targets)
        values = _PER_EXAMPLE.get(self.name)
        if values is None:
            return None
        finite = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
        safe = np.where(finite.reshape(-1, *[1] * (outputs.ndim - 1)), outputs, 0.0)
        return np.where(finite, values(safe, truth), np.nan)

    def _checked(self, logits: NDArray[Any], targets: NDArray[Any]) -> tuple[Floats, NDArray[Any]]:
        outputs = np.asarray(logits, dtype=np.float64)
        truth = np.asarray(targets)
        if self.kind == "regression" and outputs.ndim == 2 and outputs.shape[1] == 1:
            outputs = outputs[:, 0]
        dims, shape = _SHAPES[self.kind]
        if outputs.ndim != dims or truth.shape != outputs.shape[:1] or len(truth) == 0:
            raise ValueError(
                f"{self.name}: outputs of shape {outputs.shape} and targets of shape {truth.shape}; "
                f"expected {shape} and (examples,), of one length and not empty"
            )
        if self.kind == "regression":
            return outputs, truth.astype(np.float64)
        if self.kind == "lm":
            if outputs.shape[1] != 2:
                raise ValueError(f"{self.name}: outputs of shape {outputs.shape}; expected (examples, 2)")
            return outputs, truth
        classes = outputs.shape[1]
        if truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= classes:
            raise ValueError(f"{self.name}: targets must be class ids from 0 to {classes - 1}")
        if self.binary and classes != 2:
            raise ValueError(f"{self.name}: needs 2 classes, not {classes}; macro_f1 takes any number")
        return outputs, truth


_SHAPES: dict[Kind, tuple[int, str]] = {
    "classification": (2, "(examples, classes)"),
    "regression": (1, "(examples,)"),
    "lm": (2, "(examples, 2)"),
}


def _texts(name: str, said: NDArray[Any], wanted: NDArray[Any]) -> tuple[list[str | None], list[str]]:
    if said.ndim != 1 or said.shape != wanted.shape or len(said) == 0:
        shapes = f"outputs of shape {said.shape} and targets of shape {wanted.shape}"
        raise ValueError(f"{name}: {shapes}; expected texts (examples,), of one length and not empty")
    return said.tolist(), wanted.tolist()


def metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name not in METRICS:
        raise ValueError(f'no metric "{name}"{nearest(name, METRICS)}')
    return METRICS[name]


def _correct(outputs: Floats, truth: NDArray[Any]) -> Floats:
    return np.asarray(outputs.argmax(axis=1) == truth, dtype=np.float64)


def _balanced(outputs: Floats, truth: NDArray[Any]) -> Floats:
    """Correctness weighted so that every class present weighs alike; the mean is the mean recall."""
    counts = np.bincount(truth)
    weights = len(truth) / (np.count_nonzero(counts) * counts[truth])
    return np.asarray(_correct(outputs, truth) * weights)


def _negative_log_likelihood(outputs: Floats, truth: NDArray[Any]) -> Floats:
    from scipy.special import log_softmax

    logp: Floats = np.asarray(log_softmax(outputs, axis=1), dtype=np.float64)
    return np.asarray(-logp[np.arange(len(truth)), truth])


def _token_loss(outputs: Floats, truth: NDArray[Any]) -> Floats:
    """Weighted so that every token weighs alike; the mean is the loss of a token."""
    return np.asarray(outputs[:, 0] * (len(outputs) / outputs[:, 1].sum()))


def _perplexity(outputs: Floats, truth: NDArray[Any]) -> float:
    """exp of the loss of a token; infinite beyond what a float holds."""
    with np.errstate(over="ignore"):
        return float(np.exp(outputs[:, 0].sum() / outputs[:, 1].sum()))


def _f1(average: str) -> Callable[[Floats, NDArray[Any]], float]:
    def score(outputs: Floats, truth: NDArray[Any]) -> float:
        from sklearn.metrics import f1_score

        # A class that is never predicted has no precision; counted as 0, in silence, as scikit-learn does.
        return float(f1_score(truth, outputs.argmax(axis=1), average=average, zero_division=0))

    return score


def _matthews(outputs: Floats, truth: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth, outputs.argmax(axis=1)))


def _correlation(function: str) -> Callable[[Floats, NDArray[Any]], float]:
    def score(outputs: Floats, truth: NDArray[Any]) -> float:
        import warnings

        from scipy import stats

        if np.ptp(outputs) == 0 or np.ptp(truth) == 0:
            return 0.0  # no order among equal values: no skill, rather than a NaN that stops a search
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            return float(getattr(stats, function)(outputs, truth).statistic)

    return score


def _r2(outputs: Floats, truth: NDArray[Any]) -> float:
    from sklearn.metrics import r2_score

    return float(r2_score(truth, outputs)) if np.ptp(truth) > 0 else 0.0


def _mean_of(values: Callable[[Floats, NDArray[Any]], Floats]) -> Callable[[Floats, NDArray[Any]], float]:
    return lambda outputs, truth: float(values(outputs, truth).mean())


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("accuracy", "maximize", "classification"),
        Metric("macro_f1", "maximize", "classification"),
        Metric("micro_f1", "maximize", "classification"),
        Metric("f1", "maximize", "classification", binary=True),
        Metric("matthews", "maximize", "classification"),
        Metric("balanced_accuracy", "maximize", "classification"),
        Metric("log_loss", "minimize", "classification"),
        Metric("pearson", "maximize", "regression"),
        Metric("spearman", "maximize", "regression"),
        Metric("r2", "maximize", "regression"),
        Metric("mse", "minimize", "regression"),
        Metric("mae", "minimize", "regression"),
        Metric("loss", "minimize", "lm"),
        Metric("perplexity", "minimize", "lm"),
        Metric("exact_match", "maximize", "generation"),
        Metric("bleu", "maximize", "generation"),
        Metric("chrf", "maximize", "generation"),
        Metric("rouge_l", "maximize", "generation"),
        Metric("entity_f1", "maximize", "token_classification"),
        Metric("entity_precision", "maximize", "token_classification"),
        Metric("entity_recall", "maximize", "token_classification"),
        Metric("token_accuracy", "maximize", "token_classification"),
    )
}
"""Every metric by its name."""

_PER_EXAMPLE: dict[str, Callable[[Floats, NDArray[Any]], Floats]] = {
    "accuracy": _correct,
    "micro_f1": _correct,  # with one label an example, micro F1 is accuracy
    "balanced_accuracy": _balanced,
    "log_loss": _negative_log_likelihood,
    "mse": lambda outputs, truth: (outputs - truth) ** 2,
    "mae": lambda outputs, truth: np.abs(outputs - truth),
    "loss": _token_loss,
}

_SCORES: dict[str, Callable[[Floats, NDArray[Any]], float]] = {
    **{name: _mean_of(values) for name, values in _PER_EXAMPLE.items()},
    "macro_f1": _f1("macro"),
    "f1": _f1("binary"),
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "r2": _r2,
    "perplexity": _perplexity,
}
