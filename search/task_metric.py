"""Which metric a task is judged by, and whether it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peftscape.search.generation_metrics import missing_package
from peftscape.search.metrics import METRICS, Metric, metric
from peftscape.search.task_config import Kind, TaskConfig
from peftscape.search.token_metrics import label_errors

DEFAULT_METRIC: Mapping[Kind, str] = {
    "classification": "accuracy", "regression": "pearson", "lm": "loss", "multiple_choice": "accuracy",
    "token_classification": "entity_f1",
}  # fmt: skip


def task_metric(
    config: TaskConfig, kind: Kind, classes: int | None, errors: list[str], labels: Sequence[str] = ()
) -> Metric:
    """The metric that is asked for, or the kind's usual one; what speaks against it is appended to `errors`.

    Args:
        classes: how many there are; None where they are not known, or differ from row to row.
        labels: of words, by id.
    """
    chosen = metric(config.metric or DEFAULT_METRIC[kind])
    like = "classification" if kind == "multiple_choice" else kind
    if kind == "lm" and chosen.kind == "generation":
        if config.completion is None and config.messages is None:
            why = "is of what is written after a prompt; give prompt and completion, or messages"
            errors.append(f'task.metric: "{chosen.name}" {why}')
        if package := missing_package(chosen.name):
            errors.append(f'task.metric: "{chosen.name}" needs the package {package}: pip install {package}')
        return chosen
    if config.options is not None and chosen.name not in (names := ("accuracy", "log_loss")):
        errors.append(f'task.metric: "{chosen.name}" needs classes; with options there are: {", ".join(names)}')
    elif chosen.kind != like:
        kinds = (like, "generation") if kind == "lm" else (like,)
        others = ", ".join(m.name for m in METRICS.values() if m.kind in kinds)
        errors.append(f'task.metric: "{chosen.name}" is for {chosen.kind}, the task is {kind}; there are: {others}')
    elif chosen.binary and classes not in (None, 2):
        errors.append(f'task.metric: "{chosen.name}" needs 2 classes, the task has {classes}; take "macro_f1"')
    errors += label_errors(chosen.name, labels)
    return replace(chosen, labels=tuple(labels))
