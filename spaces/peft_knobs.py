"""Which tuners of HF peft a linear can have, and what their knobs may be: read from peft's own configurations."""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from peftscape.spaces.knobs import is_finite
from peftscape.spaces.words import InputError, nearest

#: Fields of a configuration that say where and how it is stored rather than what it computes.
NOT_KNOBS = ("inference_mode", "bias", "fan_in_fan_out", "use_dora", "ensure_weight_tying")
#: Why peft's tuners of these kinds (0.21) are none of single linears on a shared backbone.
REFUSED = {
    "ADALORA": 'its ranks change in calls that peft leaves to the training loop; use "adalora"',
    "ADAMSS": "its sizes follow from clusters of the weights, so that its costs cannot be told beforehand",
    "ADAPTION_PROMPT": 'it adapts whole attention modules, no linears; use "prefix_tuning"',
    "CARTRIDGE": 'it makes virtual tokens, no change of linears; use "prefix_tuning"',
    "CPT": 'it makes virtual tokens of given texts, no change of linears; use "prompt_tuning"',
    "IA3": 'it wants to be told which linears are of feed-forward layers; use "ia3"',
    "LILY": "it mixes by a mean over all texts of a batch and their padding: what it says of one depends on the others",
    "LN_TUNING": 'of a linear it would train a copy of the whole weight; use "ln_tuning"',
    "MULTITASK_PROMPT_TUNING": 'it makes virtual tokens and wants a task number with each text; use "prompt_tuning"',
    "POLY": 'it wants the number of a task with each text, of which there is one here; use "lora"',
    "PREFIX_TUNING": 'it makes virtual tokens, no change of linears; use "prefix_tuning"',
    "PROMPT_TUNING": 'it makes virtual tokens, no change of linears; use "prompt_tuning"',
    "P_TUNING": 'it makes virtual tokens, no change of linears; use "prompt_tuning" or "prefix_tuning"',
    "SHADOW": 'it wraps whole decoder blocks, no linears; use "lst" for a side network',
    "TRAINABLE_TOKENS": "it trains rows of the embedding, no linears",
    "XLORA": "it mixes LoRA adapters that were trained before",
}
#: Of these there are stored designs: they are refused when a design is checked, not when it is read.
REFUSED_LATE = ("ADAMSS", "LILY", "LN_TUNING")
#: Words that a knob does not take, though peft does, and why; a word behind `_` counts as its beginning.
REFUSED_WORDS = {
    "init_lora_weights": {
        "pissa": 'it writes the weights that all lanes share; use the method "pissa"',
        "olora": "it writes the weights that all lanes share",
        "corda": "it writes the weights that all lanes share, and looks at data before",
        "loftq": 'it writes the weights that all lanes share; use the method "loftq"',
        "eva": "it looks at data before training, in a call that peft leaves to the training loop",
    },
}  # fmt: skip


@cache
def config_class(kind: str) -> Any:
    """peft's configuration of a tuner that targets linears. Raises InputError with the nearest one, or why not."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError:
        raise InputError("method", ["peft: methods need HF peft; pip install peft"]) from None
    if kind in REFUSED and kind not in REFUSED_LATE:
        raise InputError("method", [f"peft:{kind}: {REFUSED[kind]}"])
    configs = {str(t.value): cls for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    tuners = [str(t.value) for t in PEFT_TYPE_TO_TUNER_MAPPING]
    aimed = [k for k in tuners if "target_modules" in {f.name for f in dataclasses.fields(configs[k])}]
    known = [k for k in aimed if k not in REFUSED or k in REFUSED_LATE]
    if kind not in known:
        raise InputError("method", [f'HF peft has no tuner "{kind}" that targets modules{nearest(kind, known)}'])
    return configs[kind]


@cache
def own_names(config: Any) -> frozenset[str]:
    """Fields that are the tuner's own, besides those that say where it goes."""
    from peft import PeftConfig

    shared = {f.name for f in dataclasses.fields(PeftConfig)} | set(NOT_KNOBS)
    where = ("modules", "layers_", "_pattern", "pattern_", "_config")
    names = {f.name for f in dataclasses.fields(config)} - shared
    return frozenset(name for name in names if not any(w in name for w in where))


def read_knob(kind: str, name: str, value: Any, default: Any) -> Any:
    """A value of a tuner's knob as peft's annotation of it has it. Raises ValueError with what was expected."""
    kinds, words = _plain(config_class(kind), name)
    if default is not None:
        kinds = kinds | {type(default)}
    if isinstance(value, float) and not is_finite(value):
        raise ValueError(f"a finite number was expected, not {value!r}")
    if isinstance(value, str):
        for word, why in REFUSED_WORDS.get(name, {}).items():
            if value == word or value.startswith(f"{word}_"):
                raise ValueError(f'"{value}" cannot be had: {why}')
    if value is None and (default is None or NoneType in kinds):
        return None
    if value in words or (type(value) in kinds and not (words and isinstance(value, str))):
        return value
    if float in kinds and type(value) is int:
        return float(value)
    expected = [*(t.__name__ for t in (bool, int, float, str) if t in kinds and not (words and t is str))]
    expected += [f'"{word}"' for word in words if word not in REFUSED_WORDS.get(name, {}) and "[" not in word]
    raise ValueError(f"{' or '.join(expected) or 'nothing but its default'} expected, not {value!r}")


@cache
def _plain(config: Any, name: str) -> tuple[frozenset[type], tuple[str, ...]]:
    """The plain types and the words that the annotation of a field allows."""
    kinds: set[type] = set()
    words: dict[str, None] = {}
    left = [typing.get_type_hints(config)[name]]
    while left:
        hint = left.pop()
        if get_origin(hint) in (Union, UnionType):
            left += get_args(hint)
        elif get_origin(hint) is Literal:
            words |= dict.fromkeys(w for w in get_args(hint) if isinstance(w, str))
        elif hint in (bool, int, float, str, NoneType):
            kinds.add(hint)
    return frozenset(kinds), tuple(words)
