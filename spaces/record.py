"""Record: what a trial gave, as one frozen value with a versioned JSON form.

Records are what `search` writes and `analysis` reads. The JSON form is strict (RFC 8259): a number that is
not finite, as the loss of a diverged lane, is written as the string "nan", "inf" or "-inf".
"""

import difflib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

SCHEMA = 3
"""The version of the JSON form: 2 added `outcomes` to scores, 3 `rungs` and `kernels`. A reader takes its own and
older ones."""

State = Literal["complete", "pruned", "failed", "running"]
Direction = Literal["maximize", "minimize"]


class RecordError(ValueError):
    """A record that is not valid; the message lists everything that is wrong with it."""


class NewerRecordError(RecordError):
    """A record that a newer version wrote: nothing is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one seed of a design scored.

    `validation` and `test` are in the metric's own units (accuracy: 0 to 1), `n_test` is the number of test
    examples that `test` is a mean over, `wall_s` the seconds of this training run. `outcomes` is what each of
    these examples gave, in their order, as `spaces.outcomes` packs it: their mean is `test`. None where it is
    not known, or the metric is no mean over examples.
    """

    seed: int
    validation: float
    test: float | None = None
    n_test: int | None = None
    wall_s: float = 0.0
    outcomes: str | None = None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a design costs when it is trained alone.

    `adapter`, `head` and `trainable` count trained parameters, and trainable = adapter + head. `train_flops`
    (forward and backward) and `infer_flops` are of one example. `peak_bytes` is the most memory that training
    takes, `adapter_bytes` the size of the saved adapter.

    Raises:
        RecordError: if a cost is negative or trainable differs from adapter + head.
    """

    adapter: int
    head: int
    trainable: int
    train_flops: int
    infer_flops: int
    peak_bytes: int
    adapter_bytes: int

    def __post_init__(self) -> None:
        errors = [f"{name} is negative: {getattr(self, name)}" for name in COSTS if getattr(self, name) < 0]
        total = self.adapter + self.head
        if self.trainable != total:
            errors.append(f"trainable is {self.trainable:,}, not adapter + head = {total:,}")
        if errors:
            raise RecordError("costs: " + "; ".join(errors))


COSTS: tuple[str, ...] = tuple(f.name for f in fields(Costs))
"""The names of all costs, as objectives and limits use them."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What a trial scored on the way: `validation`, the mean over its seeds, after so many `examples` of each."""

    examples: int
    validation: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a trial gave no score: a short `kind` ("diverged", "out of memory"), the message, and the step."""

    kind: str
    message: str
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a trial gave.

    `number` is the trial's number in its study; `design` the design's JSON, `digest` its digest, `label` a
    short name for people ("lora r8 q,v") and `textbook` the published design that it is, if it is one.
    `metric` and `direction` say what the scores measure, `n_validation` on how many examples. `scores` are
    those of the trial's own seeds, in which selection may look at `validation` alone; `retests` are later
    seeds, scored on test data that no selection saw. `curve` holds (examples seen, training loss). `wall_s`
    is the time that the trial took where it ran, beside its neighbours: a note, never a cost. `rungs` are the
    points of its training at which it was compared with others; a pruned record that has some was stopped at the
    last of them, one that has none was never trained, and one that is running waits there or has gone on. `kernels`
    are the operations of `spaces.ops` that its lanes ran as kernels; plain torch computed the others.

    Raises:
        RecordError: if the state or direction is unknown, or a complete record lacks a finite score.
    """

    number: int
    state: State
    design: Mapping[str, Any] = field(hash=False)
    digest: str
    label: str
    textbook: str | None = None
    metric: str
    direction: Direction
    n_validation: int
    scores: tuple[Score, ...]
    costs: Costs | None
    curve: tuple[tuple[int, float], ...] = ()
    wall_s: float = 0.0
    failure: Failure | None = None
    retests: tuple[Score, ...] = ()
    rungs: tuple[Rung, ...] = ()
    kernels: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        errors = _unknown(self.state, get_args(State), "state")
        errors += _unknown(self.direction, get_args(Direction), "direction")
        if self.state == "complete":
            if not self.scores:
                errors.append("scores: a complete record has at least one")
            for where, scores in (("scores", self.scores), ("retests", self.retests)):
                for i, score in enumerate(scores):
                    for name, value in (("validation", score.validation), ("test", score.test)):
                        if value is not None and not math.isfinite(value):
                            errors.append(f"{where}[{i}].{name}: {value} in a complete record")
        if errors:
            raise RecordError(f"record {self.number}: " + "; ".join(errors))

    @functools.cached_property
    def validation(self) -> float:
        """The mean validation score over the trial's own seeds; NaN where there is none."""
        return _mean(score.validation for score in self.scores)

    @functools.cached_property
    def test(self) -> float:
        """The mean test score over the retests, which no selection saw; NaN where there is none."""
        return _mean(score.test for score in self.retests if score.test is not None)

    @property
    def title(self) -> str:
        """The label, and the published name where it is another."""
        return f"{self.label} ({self.textbook})" if self.textbook not in (None, self.label) else self.label

    def to_json(self) -> dict[str, Any]:
        """The record as strict JSON values, which `from_json` reads back to an equal record."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Record":
        """The record that `to_json` wrote.

        Raises:
            RecordError: if the schema is newer than this package, a key is unknown or missing, a value has
                the wrong type, or a complete record has a score that is not finite.
        """
        schema = data.get("schema", SCHEMA)
        who = f"record {data.get('number', '?')}"
        if isinstance(schema, int) and schema > SCHEMA:
            raise NewerRecordError(
                f"{who}: schema {schema} is newer than this peftscape reads ({SCHEMA}): upgrade peftscape"
            )
        errors: list[str] = []
        record = _read(cls, data, "", errors)
        if errors:
            raise RecordError(f"{who}: " + "; ".join(error.removeprefix(f"{who}: ") for error in errors))
        assert isinstance(record, cls)
        return record


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found) if found else math.nan


def _unknown(value: object, known: Sequence[str], what: str) -> list[str]:
    """No error for a known value, otherwise one that names the nearest."""
    if value in known:
        return []
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f'Did you mean "{near[0]}"?' if near else f"Known: {', '.join(known)}"
    return [f'no such {what} "{value}". {hint}']


def _plain(value: Any) -> Any:
    """`value` with tuples as lists, dataclasses as dicts and non-finite numbers as strings."""
    if isinstance(value, (Score, Costs, Failure, Rung)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_WORDS = {int: "a whole number", float: "a number", str: "a string", Mapping: "an object"}


_hints = functools.cache(get_type_hints)  # resolving them anew would take most of reading 5,000 records


def _read(kind: Any, value: Any, path: str, errors: list[str]) -> Any:
    """`value` from JSON as the annotated type `kind`; what is wrong is appended to `errors`."""
    if type(value) is kind and kind in (int, float, str):  # nearly all values: 5,000 records have 200,000 of them
        return value
    origin, options = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None is the only union in a record
        return None if value is None else _read(options[0], value, path, errors)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _read_fields(kind, value, path, errors)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = options[:1] * len(value) if options[1] is ... else options
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_read(k, item, f"{path}[{i}]", errors) for i, (k, item) in pairs)
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = str if origin is Literal else Mapping if origin is Mapping or is_dataclass(kind) else kind
    if plain in _WORDS and isinstance(value, plain) and not isinstance(value, bool):
        return value
    expected = _WORDS.get(plain, "a list" if options[-1:] == (...,) else f"a list of {len(options)}")
    errors.append(f"{path or 'record'}: expected {expected}, found {value!r:.60}")
    return None


def _read_fields(cls: Any, data: Mapping[str, Any], path: str, errors: list[str]) -> Any:
    """The dataclass `cls` from an object whose keys are its fields, or None with the errors."""
    prefix, before, hints = f"{path}." if path else "", len(errors), _hints(cls)
    for key in data:
        errors += [f"{prefix}{error}" for error in _unknown(key, list(hints), "key")]
    values: dict[str, Any] = {}
    for f in fields(cls):
        if f.name in data:
            values[f.name] = _read(hints[f.name], data[f.name], f"{prefix}{f.name}", errors)
        elif f.default is MISSING:
            errors.append(f"{prefix}{f.name}: missing")
    if len(errors) > before:
        return None
    try:
        return cls(**values)
    except RecordError as error:
        errors.append(str(error))
        return None
