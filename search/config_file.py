"""A search's configuration read from TOML and the command line; all errors at once, in the user's own terms.

    config = read_config("search.toml", ["search.lanes=4", "task.name=trec6"])

Keys and types are those of the dataclasses in `peftscape.search.config`; none of them is named here again.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peftscape.search.config import DEFAULT_TRIALS, SearchConfig
from peftscape.search.config_values import value_errors
from peftscape.search.embedded import EMBEDDED_TASKS
from peftscape.search.metrics import METRICS
from peftscape.search.task import DEFAULT_METRIC
from peftscape.spaces.record import COSTS
from peftscape.spaces.words import InputError, nearest

DEFAULT: Mapping[str, Any] = {
    "name": "demo",
    "model": {"source": "minilm"},
    "task": {"name": "trec6"},
    "budget": {"trials": DEFAULT_TRIALS},
}
"""The embedded default: what `peftscape search` runs when it is given no file."""

FILE_BYTES = 2**20
"""A configuration is a page or two."""

ENDS = ("trials", "time", "device_time", "examples")
"""The budgets that end a search; the others bind designs."""

_WORDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", Mapping: "a table",
    NoneType: "nothing",
}  # fmt: skip


def read_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> SearchConfig:
    """A search's configuration from a TOML file (or its table), with some keys set anew.

    What is left out follows from the rest: the name is the file's, the task's metric and the search's objectives
    are each other's, and a budget that never ends has 30 trials. Paths start in the working directory.

    Args:
        overrides: `key=value` with dotted keys, `search.lanes=4`. A value is TOML; what is not TOML is text.

    Raises:
        InputError: with all that is wrong.
    """
    name = Path(source).name if isinstance(source, str | Path) else "configuration"
    table = _plain(source if isinstance(source, Mapping) else _load(Path(source)))
    errors: list[str] = []
    for override in overrides:
        _override(table, override, errors)
    if not isinstance(source, Mapping) and "name" not in table:
        table["name"] = Path(source).stem
    if "task" not in table:
        errors.append('task: missing; name = "trec6" or path = "my.csv", for instance')
    _connect(table)
    config: SearchConfig = _read(SearchConfig, table, "", errors)
    errors += value_errors(config, broken=frozenset(line.partition(":")[0] for line in errors))
    if errors:
        order = ["", *_hints(SearchConfig)]
        heads = {line: re.split(r"[.:]", line)[0] for line in errors}
        raise InputError(name, sorted(heads, key=lambda e: order.index(heads[e]) if heads[e] in order else 0))
    return config


def config_json(config: SearchConfig) -> dict[str, Any]:
    """The configuration as JSON values; what is not set is left out."""
    value = _without_none(asdict(config))
    assert isinstance(value, dict)
    return value


def config_from_json(value: Mapping[str, Any]) -> SearchConfig:
    """The configuration that `config_json` wrote. Its files need not be there.

    Raises:
        InputError: a key or a type is not what this version of peftscape knows.
    """
    errors: list[str] = []
    config: SearchConfig = _read(SearchConfig, value, "", errors)
    if errors:
        raise InputError("stored configuration", errors)
    return config


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        here = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise InputError(str(path), [f"no such file{nearest(path.name, here)}"])
    if path.stat().st_size > FILE_BYTES:
        raise InputError(path.name, [f"larger than the {FILE_BYTES:,} bytes that are read"])
    try:
        text = path.read_text(encoding="utf-8-sig")
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(path.name, ["lists or tables too deep within each other"]) from None
    except UnicodeDecodeError:
        raise InputError(path.name, ["not UTF-8; save the file as UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(path.name, [_toml_error(str(error), text)]) from None


def _toml_error(message: str, text: str) -> str:
    """tomllib's message with its line first, and the line as it stands."""
    found = re.fullmatch(r"(.*?) \(at line (\d+), column \d+\)", message, re.DOTALL)
    lines = text.splitlines()
    if found is None:  # the end of the file came too early
        reason = message.removesuffix(" (at end of document)")
        return f"line {len(lines)}: not TOML: {reason[:1].lower()}{reason[1:]} at the end of the file"
    reason, number = found[1], int(found[2])
    line = lines[number - 1].strip() if number <= len(lines) else ""
    if reason.startswith("Cannot overwrite"):
        reason = f'"{line.partition("=")[0].strip()}" is given twice'
    elif twice := re.fullmatch(r"Cannot declare \((.*?),?\) twice", reason):
        names = ".".join(part.strip().strip("'") for part in twice[1].split(","))
        reason = f"the table [{names}] is there twice"
    else:
        reason = f"not TOML: {reason[:1].lower()}{reason[1:]}"
    return f"line {number}: {reason}" + (f" ({line:.60})" if line else "")


def _plain(value: Any) -> Any:
    """A copy that can be written to; what a caller handed over stays as it is."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _override(table: dict[str, Any], text: str, errors: list[str]) -> None:
    """Sets one `key=value` in the table."""
    key, equals, written = (part.strip() for part in text.partition("="))
    path = key.split(".")
    if not equals or not all(path):
        errors.append(f'"{text}": key=value was expected, as in search.lanes=4')
        return
    for part in path[:-1]:
        inner = table.get(part)
        if part == "space" and not isinstance(inner, dict):  # one knob of a preset set anew
            inner = {"preset": SearchConfig.space if inner is None else inner}
        if not isinstance(inner, dict):
            inner = {}
        table[part] = inner
        table = inner
    table[path[-1]] = _value(written, _hint(path))


def _value(written: str, hint: Any) -> Any:
    """A TOML value, or the text itself where it is not TOML or where text was wanted."""
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return written
    return written if not _fits(value, hint) and _fits(written, hint) else value


def _hint(path: Sequence[str]) -> Any:
    """What is expected at a dotted key; anything where that is not known."""
    hint: Any = SearchConfig
    for part in path:
        hint = _hints(hint).get(part, Any) if is_dataclass(hint) else Any
    return hint


def _connect(table: dict[str, Any]) -> None:
    """An end where none is given; the metric from the objectives, or these from it, where one is left out."""
    budget = table.setdefault("budget", {})
    if isinstance(budget, dict) and all(budget.get(key) is None for key in ENDS):
        budget["trials"] = DEFAULT_TRIALS
    task, search = table.get("task"), table.setdefault("search", {})
    if not isinstance(task, dict) or not isinstance(search, dict):
        return
    if "objectives" in search and "metric" not in task:
        names = [part.partition(":")[0].strip() for part in str(search["objectives"]).split(",")]
        if metric := next((name for name in names if name in METRICS and name not in COSTS), None):
            task["metric"] = metric
    metric = task.setdefault("metric", _usual_metric(task))
    if "objectives" not in search and isinstance(metric, str) and metric in METRICS:
        search["objectives"] = f"{metric}:{METRICS[metric].direction[:3]},trainable:min"


def _usual_metric(task: Mapping[str, Any]) -> str:
    """The metric of a task of this kind, or of an embedded one; accuracy where the kind is still to be seen."""
    kind, name = task.get("kind"), task.get("name")
    if kind is None and isinstance(name, str) and name in EMBEDDED_TASKS:
        kind = EMBEDDED_TASKS[name].kind
    return next((metric for known, metric in DEFAULT_METRIC.items() if known == kind), "accuracy")


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _read(cls: Any, table: Mapping[str, Any], at: str, errors: list[str]) -> Any:
    """The dataclass `cls` from a table; what is wrong with a key is an error, and its default stands."""
    hints = _hints(cls)
    values: dict[str, Any] = {}
    errors += [f"{at}{key}: no such key{_near(key, hints)}" for key in table if key not in hints]
    for f in fields(cls):
        hint = hints[f.name]
        if f.name in table:
            value = _field(f, hint, table[f.name], at, errors)
            if value is not MISSING:
                values[f.name] = value
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            values[f.name] = hint()  # a table that is needed and missing: its errors are told elsewhere
    return cls(**values)


def _field(f: Field[Any], hint: Any, value: Any, at: str, errors: list[str]) -> Any:
    """The field's value, or MISSING with an error."""
    where = f"{at}{f.name}"
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return _read(hint, value, f"{where}.", errors)
    elif _fits(value, hint):
        if isinstance(value, int) and not isinstance(value, bool):
            if float in _options(hint) and int not in _options(hint):
                return float(value)
            least, most = f.metadata.get("least"), f.metadata.get("most")
            if (least is not None and value < least) or (most is not None and value > most):
                range_ = f"of {least} or more" if most is None else f"from {least} to {most}"
                errors.append(f"{where}: {value} is not a whole number {range_}")
                return MISSING
        return value
    known = [v for option in _options(hint) if get_origin(option) is Literal for v in get_args(option)]
    if known and isinstance(value, str):
        errors.append(f'{where}: no such {f.name} "{value}"{nearest(value, known)}')
    else:
        errors.append(f"{where}: {_expected(hint, f)} was expected, not {_shown(value)}")
    return MISSING


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value is of this annotated type; a whole number is a number, and true is neither."""
    for option in _options(hint):
        origin = get_origin(option) or option
        if origin is Literal:
            fits = value in get_args(option)
        elif origin is Any:
            fits = True
        elif origin is Mapping:
            fits = isinstance(value, Mapping)
        elif origin is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif isinstance(value, bool):
            fits = origin is bool
        else:
            fits = isinstance(value, origin)
        if fits:
            return True
    return False


def _expected(hint: Any, f: Field[Any]) -> str:
    if is_dataclass(hint):
        return "a table"
    if example := f.metadata.get("example"):
        return f"a value such as {example}"
    words = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(f'"{v}"' for v in get_args(option)))
        elif option is not NoneType:
            words.append(_WORDS[get_origin(option) or option])
    return " or ".join(words)


def _shown(value: Any) -> str:
    """The value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value!r:.60}"


def _near(key: str, siblings: Mapping[str, Any]) -> str:
    """The nearest key of the same table, else the same key of another table, else what there is."""
    if difflib.get_close_matches(key, list(siblings), n=1, cutoff=0.6):
        return nearest(key, siblings)
    tables = {name: hint for name, hint in _hints(SearchConfig).items() if is_dataclass(hint)}
    homes = [f"{name}.{key}" for name, hint in tables.items() if key in _hints(hint)]
    homes += [key] if key in _hints(SearchConfig) else []
    return f'. Did you mean "{homes[0]}"?' if homes else nearest(key, siblings)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list | tuple) else value
