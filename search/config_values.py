"""What the values of a search's configuration mean, and which of them cannot be: beyond their types."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from peftscape.analysis.front import ObjectiveError, parse_objectives
from peftscape.search.budget import parse_bytes, parse_duration
from peftscape.search.embedded import EMBEDDED_MODELS, MissingPackageError
from peftscape.search.metrics import METRICS
from peftscape.search.rungs import rungs_of
from peftscape.search.s3delta_space import Modules, budgets, space_errors, within
from peftscape.search.task import check_task
from peftscape.spaces.heads import refusal
from peftscape.spaces.record import COSTS
from peftscape.spaces.sites import SiteError, SiteMap, site_map
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_DEVICE = re.compile(r"(cpu|mps|(cuda|xpu|hpu|npu)(:\d+)?)")
_NAME = re.compile(r"[\w][\w .-]{0,99}")


def value_errors(config: SearchConfig, broken: frozenset[str] = frozenset()) -> list[str]:
    """What is wrong with the values, one line each.

    Nothing is fetched, and neither torch nor transformers is loaded for models of known families.

    Args:
        broken: dotted keys that are in error already; what follows from them is not said.
    """
    tables = {key.partition(".")[0] for key in broken}
    errors = []
    if not _NAME.fullmatch(config.name) or config.name.endswith(".retest"):
        take = 'take letters, digits, " ", ".", "_", "-"' + (", 100 at most" if len(config.name) > 100 else "")
        errors.append(f'name: "{config.name[:60]}" cannot name a study; {take}')
    sites = _model(config.model, config.head, errors) if not {"model", "model.source", "model.sites"} & broken else None
    if "task" not in tables:
        errors += check_task(config.task)
    if "space" not in broken:
        errors += _space(config.space, sites)
    if not {"search", "search.objectives", "task.metric"} & broken:
        errors += _objectives(config)
    if config.search.examples is not None and config.search.epochs is not None:
        errors.append("search.epochs: the length is given as search.examples already; give one of the two")
    if config.search.epochs is not None and not 0 < config.search.epochs < math.inf:
        errors.append(f"search.epochs: a number above 0 was expected, not {config.search.epochs!r}")
    if config.search.gradient_accumulation_steps > config.search.batch_size:
        least = f"at most search.batch_size, {config.search.batch_size}, was expected"
        errors.append(f"search.gradient_accumulation_steps: {least}, not {config.search.gradient_accumulation_steps}")
    if config.search.cuda_graphs and "model.device" not in broken and not config.model.device.startswith("cuda"):
        errors.append(f'search.cuda_graphs: they need model.device = "cuda", not "{config.model.device}"')
    errors += _rungs(config.search)
    if config.search.sampler == "s3delta" and not {"space", "search.sampler"} & broken:
        errors += _s3delta(config, sites)
    errors += _size("search.memory_limit", config.search.memory_limit)
    errors += _duration("search.step_limit", config.search.step_limit)
    return errors + _budget(config.budget, bounded="budget" not in tables)


def _model(model: ModelConfig, head: str, errors: list[str]) -> SiteMap | None:
    """Its sites, or None: then why is among the errors, unless it is still to come from the hub."""
    if not _DEVICE.fullmatch(model.device):
        near = nearest(model.device, ("cpu", "cuda", "mps"))
        errors.append(f'model.device: no device "{model.device}"{near}')
    source = model.source
    if source not in EMBEDDED_MODELS and not Path(source).expanduser().is_dir():
        if not _HUB_ID.fullmatch(source):
            errors.append(f'model.source: no folder "{source}", and not the id of a model of the hub')
            return None
        if close := difflib.get_close_matches(source, EMBEDDED_MODELS, n=1, cutoff=0.7):
            errors.append(f'model.source: no model "{source}". Did you mean "{close[0]}"?')
            return None
        if not is_here(model):
            return None
    try:
        sites = model.site_map()
    except MissingPackageError as error:
        errors.append(f"model.source: {error}")
        return None
    except SiteError as error:
        errors.append(f"{'model.sites' if model.sites else 'model.source'}: {error}")
        return None
    if head == "lm" and not (sites.causal or sites.decoder_layers):
        errors.append(f"task.kind: {sites.family} is no decoder, and cannot predict its next token")
    if head == "token" and sites.decoder_layers:
        errors.append(f"task.kind: {refusal(sites)}")
    if head == "class" and sites.head is None:
        errors.append(f'model.head: transformers has no sequence classifier for {sites.family}; use head = "mean"')
    return sites


def is_here(model: ModelConfig) -> bool:
    """Whether the model lies on this disk; else it is still to come from the hub."""
    if model.source in EMBEDDED_MODELS or Path(model.source).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model.source, "config.json"), str)
    except HFValidationError:
        return False


def _space(space: str | Mapping[str, Any], sites: SiteMap | None) -> list[str]:
    # What is wrong with a space is nearly always in its words, which any backbone can tell.
    sites = sites or site_map({"model_type": "bert"})
    try:
        if not read_space(space, sites).slots:
            return [f"space: nothing of it is left on this {sites.family}"]
    except InputError as error:
        return [f"space{': ' if line.startswith('no preset') else '.'}{line}" for line in error.errors]
    return []


def _s3delta(config: SearchConfig, sites: SiteMap | None) -> list[str]:
    settings = config.search.s3delta
    errors = [
        f"search.s3delta.{key}: a number above 0 was expected, not {value!r}"
        for key in ("temperature", "alpha_lr")
        if not 0 < (value := getattr(settings, key)) < math.inf
    ]
    is_known = sites is not None
    sites = sites or site_map({"model_type": "bert"})
    wanted: tuple[int, ...] = ()
    try:
        wanted = budgets(settings.budgets, sites.parameters)
    except ValueError as error:
        errors.append(f"search.s3delta.budgets: {error}")
    try:
        space = read_space(config.space, sites)
    except InputError:  # told elsewhere
        return errors
    found = [f"space.{line}" for line in space_errors(space)]
    if is_known and wanted and space.slots and not found:
        try:
            within(Modules(space), wanted)
        except InputError as error:
            errors += [f"{error.where}: {line}" for line in error.errors]
    return errors + found + (['space: one that S3Delta can choose from is the preset "s3delta"'] if found else [])


def _objectives(config: SearchConfig) -> list[str]:
    at = "search.objectives: "
    try:
        axes = parse_objectives(config.search.objectives, metrics=tuple(METRICS))
    except ObjectiveError as error:
        return [at + line for line in str(error).removeprefix("objectives: ").split("; ")]
    errors = []
    for axis in axes:
        best = METRICS[axis.name].direction if axis.name in METRICS else "minimize"
        if axis.direction != best:
            better = "larger" if best == "maximize" else "smaller"
            errors.append(f'{at}{axis.name} is better when {better}; write "{axis.name}:{best[:3]}"')
    named = [axis.name for axis in axes if axis.name not in COSTS]
    metric = config.task.metric
    if len(named) != 1 or len(axes) < 2:
        like = f"{metric}:max,trainable:min"
        errors.append(f'{at}one metric and at least one cost were expected, as in "{like}"')
    elif axes[0].name != named[0]:
        errors.append(f"{at}the metric, {named[0]}, comes first")
    elif metric in METRICS and named[0] != metric:
        errors.append(f"{at}{named[0]} is not the task's metric, {metric}; they must be the same")
    return errors


def _rungs(search: SearchSettings) -> list[str]:
    if search.brackets > max(1, search.rungs):
        return [f"search.brackets: {search.brackets} are more than the rungs, {search.rungs}, at which they begin"]
    if search.examples is not None and search.rungs:
        try:
            rungs_of(search, -(-search.examples // search.batch_size))
        except ValueError as error:
            return [f"search.rungs: {error}"]
    return []


def _budget(budget: BudgetConfig, *, bounded: bool) -> list[str]:
    errors = []
    ends = (budget.trials, budget.time, budget.device_time, budget.examples)
    if bounded and all(end is None for end in ends):
        errors.append("budget: give trials, time, device_time or examples, or the search never ends")
    errors += _duration("budget.time", budget.time) + _duration("budget.device_time", budget.device_time)
    limit = budget.trainable
    percent = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", limit) if isinstance(limit, str) else None
    share = float(percent[1]) if percent else limit
    if limit is not None and (isinstance(share, str) or share is None or share <= 0):
        like = 'a number such as 20000 or a share such as "2%"'
        errors.append(f"budget.trainable: {like} was expected, not {limit!r:.60}")
    for key in ("peak_bytes", "adapter_bytes"):
        errors += _size(f"budget.{key}", getattr(budget, key))
    return errors


def _size(key: str, value: int | str | None) -> list[str]:
    try:
        return [f"{key}: {value!r} is no room at all"] if value is not None and parse_bytes(value) <= 0 else []
    except ValueError as error:
        return [f"{key}: {error}"]


def _duration(key: str, text: str | None) -> list[str]:
    try:
        if text is not None and not 0 < parse_duration(text) < math.inf:
            return [f'{key}: "{text}" is no time at all']
    except ValueError as error:
        return [f"{key}: {error}"]
    return []
