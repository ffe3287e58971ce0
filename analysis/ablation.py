"""Ablation: the path from one design to another, one change at a time, and the designs that are missing on it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftscape.analysis.noise import validation_error
from peftscape.analysis.predictor import predictor
from peftscape.spaces.record import Record

MOST = 500
"""What predicts is fitted to so many designs at most, the last."""


@dataclass(frozen=True)
class Step:
    """A step of an ablation path: what changed, the score after it, and the design.

    `number` is that of the record with this design, and `ablation` whether the record was made for the path;
    where there is none the score is predicted. `error` is the standard error of a recorded score, and the
    root mean square of the predictor's errors on left-out designs for a predicted one.
    """

    change: str
    score: float
    error: float
    design: Mapping[str, Any]
    number: int | None
    ablation: bool = False


def ends(records: Sequence[Record]) -> tuple[Record, Record] | None:
    """The best complete textbook design with a method and the best design; None where they are one, or not there."""
    complete = [r for r in records if r.state == "complete" and "placements" in r.design]
    sign = 1 if complete and complete[0].direction == "maximize" else -1
    textbook = [r for r in complete if r.textbook and r.design["placements"]]
    if not textbook:
        return None
    start, goal = (max(able, key=lambda r: sign * r.validation) for able in (textbook, complete))
    return None if _frozen(start.design) == _frozen(goal.design) else (start, goal)


def ablation(records: Sequence[Record], start: Record, goal: Record, made: Sequence[Record] = ()) -> tuple[Step, ...]:
    """From one design to another, each time the change that is expected to gain most.

    A change adds or drops a placement, or sets one of its knobs or one of the training's. The path depends on
    `records` alone, so that records `made` for it later do not change it; a step's score is that of a complete
    record of exactly its design, of the search's or of `made`, else predicted from the last 500 complete designs
    (`predictor.predictor`). The first step is `start`, the last `goal`.
    """
    known = {_frozen(r.design): (r, True) for r in reversed(made) if r.state == "complete"}
    known |= {_frozen(r.design): (r, False) for r in reversed(records) if r.state == "complete"}
    known |= {_frozen(r.design): (r, False) for r in (goal, start)}
    predict, error = predictor([r for r in records if r.state == "complete"][-MOST:])
    sign = 1 if goal.direction == "maximize" else -1
    here: Mapping[str, Any] = start.design
    steps = [Step("start", start.validation, validation_error(start), here, start.number)]
    while _frozen(here) != _frozen(goal.design):
        options = _changes(here, goal.design)
        guesses = predict([design for _, design in options])
        best = max(range(len(options)), key=lambda i: (sign * guesses[i], options[i][0]))
        change, here = options[best]
        record, ours = known.get(_frozen(here), (None, False))
        if record is None:
            steps.append(Step(change, guesses[best], error, here, None))
        else:
            steps.append(Step(change, record.validation, validation_error(record), here, record.number, ours))
    return tuple(steps)


def missing(path: Sequence[Step]) -> tuple[Mapping[str, Any], ...]:
    """The designs on a path that no record has: what `peftscape search --ablate` trains."""
    return tuple(step.design for step in path if step.number is None)


def _changes(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every single change that leads towards `there`; placements keep the order that `there` has."""
    own, wanted = _by_name(here), _by_name(there)
    order = [*wanted, *(name for name in own if name not in wanted)]
    found = []

    def design(placements: Mapping[str, Any], training: Any) -> dict[str, Any]:
        return {"placements": [dict(placements[n]) for n in order if n in placements], "training": dict(training)}

    training = here.get("training") or {}
    for name in order:
        if name not in wanted:
            rest = {n: p for n, p in own.items() if n != name}
            found.append((f"without {name}", design(rest, training)))
        elif name not in own:
            found.append((f"with {name}", design({**own, name: wanted[name]}, training)))
        else:
            for key, value in _different(own[name], wanted[name]):
                found.append(
                    (f"{name} {key} {_said(value)}", design({**own, name: _set(own[name], key, value)}, training))
                )
    for key, value in _different(training, there.get("training") or {}):
        found.append((f"training {key} {_said(value)}", design(own, _set(training, key, value))))
    return found


def _by_name(design: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The placements by method; a method that is there twice has marks."""
    found: dict[str, Mapping[str, Any]] = {}
    for placement in design.get("placements", ()):
        name = str(placement.get("method"))
        while name in found:
            name += "'"
        found[name] = placement
    return found


def _different(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any]]:
    keys = sorted({*own, *wanted})
    return [(key, wanted.get(key)) for key in keys if _text(own.get(key)) != _text(wanted.get(key))]


def _set(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    rest = {k: v for k, v in values.items() if k != key or value is not None}
    return {**rest, key: value} if value is not None else rest


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return " ".join(f"{k} {_said(v)}" for k, v in value.items())
    return str(value)


def _text(value: Any) -> str:
    """JSON in which 1 and 1.0 are one."""
    return json.dumps(_floats(value), sort_keys=True)


def _floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _frozen(design: Mapping[str, Any]) -> str:
    return _text({"placements": design.get("placements", ()), "training": design.get("training") or {}})
