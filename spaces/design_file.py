"""Designs as people write them: JSON or TOML tables, read with all that is wrong said at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeGuard

from peftscape.spaces.compositions import read_compositions
from peftscape.spaces.design import Design, Placement, Training
from peftscape.spaces.hf_peft import HFPeft
from peftscape.spaces.knobs import MOST, is_finite
from peftscape.spaces.methods import method
from peftscape.spaces.sites import kind_in
from peftscape.spaces.words import InputError, nearest

#: What every placement may have besides its method's knobs.
COMMON = ("method", "sites", "layers", "mask", "share", "gate", "drop")


def read_design(value: Any, where: str) -> Design:
    """A design from what people write. Raises InputError with all that is wrong."""
    errors: list[str] = []
    if not isinstance(value, Mapping):
        raise InputError(where, [f"a design is a table with placements and training, not {value!r}"])
    _unknown(value, ("placements", "training"), "", errors)
    rows = value.get("placements", [])
    if not isinstance(rows, list):
        raise InputError(where, ["placements: a list of tables was expected"])
    placements = [_placement(row, f"placements[{i}]", errors) for i, row in enumerate(rows)]
    training = _training(value.get("training", {}), errors)
    found = tuple(p for p in placements if p is not None)
    lone = [p.method.name for p in found if p.method.alone]
    if lone and len(found) > 1:
        errors.append(f"placements: {lone[0]} stands alone, it cannot be combined")
    if errors:
        raise InputError(where, errors)
    return Design(placements=found, training=training)


def parse_layers(value: Any) -> Literal["all"] | tuple[int, ...]:
    """`"all"`, `[0, 1, 2]`, `"0-5"` or `"0,2,4-5"`. Raises ValueError."""
    if value == "all":
        return "all"
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, str):
        try:
            parts = [part.split("-") for part in value.replace(" ", "").split(",")]
            numbers = [n for low, *high in parts for n in range(int(low), int(high[0] if high else low) + 1)]
        except ValueError:
            raise ValueError(f'{value!r} is not "all", a list of numbers, or like "0-5"') from None
    elif isinstance(value, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        numbers = list(value)
    else:
        raise ValueError(f'{value!r} is not "all", a list of numbers, or like "0-5"')
    if not numbers:
        raise ValueError("no layer is named")
    return tuple(sorted(set(numbers)))


def with_config(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the `config` of another library's method beside its own keys."""
    config = row.get("config")
    if not str(row.get("method")).startswith("peft:") or not isinstance(config, Mapping):
        return row
    return {**{k: v for k, v in row.items() if k != "config"}, **config}


def _placement(row: Any, at: str, errors: list[str]) -> Placement | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("method"), str):
        errors.append(f'{at}: a table with a "method" was expected')
        return None
    try:
        kind = method(row["method"])
    except InputError as error:
        errors += [f"{at}.method: {line}" for line in error.errors]
        return None
    row = with_config(row)
    before = len(errors)
    defaults = kind().knobs()
    own = {k: v for k, v in row.items() if k not in COMMON}
    _unknown(own, (*defaults, *COMMON), f"{at}.", errors)
    if issubclass(kind, HFPeft):
        knobs = {k: _theirs(kind, k, v, f"{at}.{k}", errors) for k, v in own.items() if k in defaults}
    else:
        knobs = {k: _knob(v, defaults[k], f"{at}.{k}", errors) for k, v in own.items() if k in defaults}
        many = [k for k, v in knobs.items() if isinstance(v, int) and v > MOST]
        errors += [f"{at}.{k}: more than {MOST:,}" for k in many]
    for name, domain in kind.domains().items():
        value = knobs.get(name)
        if isinstance(value, str):  # words are checked here; sizes and rates may lie outside what a search tries
            try:
                domain.param(name, value)
            except ValueError as error:
                errors.append(f"{at}.{name}: {error}")
        elif _is_number(value) and value <= 0 and value not in domain.ends():
            errors.append(f"{at}.{name}: {value} is not larger than 0")
    sites = row.get("sites", list(kind.default_sites))
    sites = [sites] if isinstance(sites, str) else sites
    if not isinstance(sites, (list, tuple)) or not sites or not all(isinstance(s, str) for s in sites):
        errors.append(f"{at}.sites: a list of names was expected, not {sites!r}")
    else:
        for site in sites:
            if kind_in(site) not in kind.sites:
                errors.append(f'{at}.sites: {kind.name} cannot adapt "{site}"{nearest(site, kind.sites)}')
    layers: Literal["all"] | tuple[int, ...] = "all"
    try:
        layers = parse_layers(row.get("layers", "all"))
    except ValueError as error:
        errors.append(f"{at}.layers: {error}")
    compositions = read_compositions(row, kind, at, errors)
    if len(errors) > before:
        return None
    return Placement(method=kind(**knobs), sites=tuple(dict.fromkeys(sites)), layers=layers, **compositions)


def _knob(value: Any, default: Any, at: str, errors: list[str]) -> Any:
    """The value in the default's type, or an error."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and is_finite(value):
        return float(value)
    if isinstance(value, float) and not is_finite(value):
        errors.append(f"{at}: a finite number was expected, not {value!r}")
        return default
    if type(value) is not type(default):
        errors.append(f"{at}: {type(default).__name__} expected, not {value!r}")
        return default
    return value


def _theirs(kind: type[HFPeft], name: str, value: Any, at: str, errors: list[str]) -> Any:
    """The value of another library's knob, or an error."""
    try:
        return kind.read_knob(name, value)
    except ValueError as error:
        errors.append(f"{at}: {error}")
        return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _training(row: Any, errors: list[str]) -> Training:
    names = tuple(vars(Training()))
    if not isinstance(row, Mapping):
        errors.append("training: a table was expected")
        return Training()
    _unknown(row, names, "training.", errors)
    values = {}
    for name, value in row.items():
        if name not in names:
            continue
        if not is_finite(value) or value < 0 or (name == "lr" and not value):
            errors.append(
                f"training.{name}: a number {'above' if name == 'lr' else 'from'} 0 was expected, not {value!r}"
            )
        elif name in ("warmup", "decay") and value > 1:
            errors.append(f"training.{name}: a fraction of the steps was expected, not {value!r}")
        else:
            values[name] = float(value)
    return Training(**values)


def _unknown(row: Mapping[str, Any], known: Iterable[str], at: str, errors: list[str]) -> None:
    errors += [f"{at}{key}: no such key{nearest(key, known)}" for key in row if key not in set(known)]
