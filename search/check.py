"""What a search would do, told before anything is built: its errors, the size of its space, its ends' costs.

Nothing here loads torch, transformers or optuna, or fetches anything; sizes come from the model's
configuration and the data on this disk. Only a model of an unknown family is built, without weights.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.search.budget import parameter_limit
from peftscape.search.config_values import is_here, value_errors
from peftscape.search.s3delta_space import Modules, budgets, within
from peftscape.search.tables import TaskError, is_file_name
from peftscape.search.task import load_task
from peftscape.spaces.design import Design, Placement, Training
from peftscape.spaces.knobs import Domain
from peftscape.spaces.presets import textbook
from peftscape.spaces.price import adapter_size, costs
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from peftscape.search.config import ModelConfig, SearchConfig
    from peftscape.search.task import Task
    from peftscape.search.task_config import TaskConfig
    from peftscape.spaces.record import Costs
    from peftscape.spaces.sites import SiteMap
    from peftscape.spaces.space import Slot, Space

_READ_BYTES = 64 * 2**20  # larger data is not read to be counted: `check` answers at once
_TEXTS = 512  # of which a typical length is told


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A design with what it costs alone."""

    design: Design
    costs: Costs


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What `check` found. With errors the rest is empty; what cannot be known here is None, and a note.

    Args:
        designs: how many the space holds, its continuous knobs left out; infinite if beyond counting.
        continuous: how many continuous knobs.
        dropped: options that this backbone refuses, and why.
        textbook: how many published designs the space holds; `within` of them keep to the limit.
        limit: largest number of trained parameters.
        examples: training examples of a full training, on `rows` of them.
        tokens: of a typical text; FLOPs and bytes are told for it.
    """

    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    space: str = ""
    designs: float | None = None
    continuous: int = 0
    dropped: tuple[str, ...] = ()
    cheapest: Priced | None = None
    dearest: Priced | None = None
    textbook: int = 0
    within: int = 0
    limit: int | None = None
    rows: int | None = None
    outputs: int | None = None
    examples: int | None = None
    tokens: int | None = None

    def json(self) -> dict[str, Any]:
        """The findings as JSON values."""
        value: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        for end in ("cheapest", "dearest"):
            found: Priced | None = value[end]
            if found is not None:
                value[end] = {"label": found.design.label, "design": found.design.json(), **vars(found.costs)}
        if self.designs is not None:  # strict JSON has no infinity
            value["designs"] = int(self.designs) if self.designs < 2**63 else f"{self.designs:.3g}"
        return value


def check(config: SearchConfig) -> Checked:
    """The errors of a configuration, or what its search would be."""
    if errors := value_errors(config):
        return Checked(errors=tuple(errors))
    notes: list[str] = []
    task = None
    if _is_small(config.task):
        try:
            task = load_task(config.task)
        except TaskError as error:
            return Checked(errors=error.errors)
    else:
        notes.append(f"{config.task.source} is not read before the search: its rows and classes are not known")
    rows = None if task is None else len(task.train)
    known = Checked(
        notes=tuple(notes),
        rows=rows,
        outputs=None if task is None else task.num_outputs,
        examples=config.search.examples if rows is None else config.search.full_length(rows),
    )
    if not is_here(config.model):
        note = f"{config.model.source} is not in the local hub cache: its sites and costs are not known"
        return replace(known, notes=(*notes, note))
    return _priced(config, known, task)


def _priced(config: SearchConfig, known: Checked, task: Task | None) -> Checked:
    sites = config.model.site_map()
    space = read_space(config.space, sites)
    longest = min(config.model.max_length, sites.max_positions or config.model.max_length)
    tokens = longest if task is None else _typical(config.model, task, longest)
    outputs = 2 if task is None else task.num_outputs
    dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
    price = partial(
        costs,
        sites=sites,
        outputs=outputs,
        tokens=tokens,
        batch=config.search.pass_size,
        checkpointing=config.search.gradient_checkpointing,
        head=config.head,
        dtype=dtype,
    )
    notes = [*known.notes, *([] if task else [f"costs are those of a head for 2 classes on {tokens} tokens"])]
    limit = parameter_limit(config.budget.trainable, sites.parameters)
    cheapest, dearest = (_end(space, price, dear=dear) for dear in (False, True))
    if limit is not None and cheapest is not None and cheapest.costs.trainable > limit:
        least = f"{cheapest.costs.trainable:,} parameters (head: {cheapest.costs.head:,})"
        error = f"budget.trainable: {limit:,} leaves no design; the cheapest trains {least}"
        return Checked(errors=(error,))
    if config.search.sampler == "s3delta":
        room = math.inf if limit is None else limit - price(Design()).trainable
        try:
            notes += within(Modules(space), budgets(config.search.s3delta.budgets, sites.parameters), room)[1]
        except InputError as error:
            return Checked(errors=tuple(f"{error.where}: {line}" for line in error.errors))
    published = [price(d) for d in textbook().values() if _holds(space, d)] if config.search.textbook else []
    designs, continuous = space.count()
    return replace(
        known,
        notes=tuple(notes),
        space=space.name,
        designs=designs,
        continuous=continuous,
        dropped=tuple(dict.fromkeys(space.dropped)),
        cheapest=cheapest,
        dearest=dearest,
        textbook=len(published),
        within=sum(limit is None or cost.trainable <= limit for cost in published),
        limit=limit,
        tokens=tokens,
    )


def _is_small(config: TaskConfig) -> bool:
    """Whether all of the data lies in files of this disk that are read in a moment."""
    if config.name is not None:
        return True
    files = [f for f in (config.train, config.validation, config.test) if f is not None]
    folder = Path()
    if config.path is not None and is_file_name(config.path):
        files.append(config.path)
    elif config.path is not None:
        folder = Path(config.path)
    if not files or not all(map(is_file_name, files)):
        return False
    return sum((folder / file).expanduser().stat().st_size for file in files) <= _READ_BYTES


def _typical(model: ModelConfig, task: Task, longest: int) -> int:
    """The mean length of training texts in tokens; guessed from words where no tokenizer is here."""
    texts = task.train.examples()[:: max(1, len(task.train) // _TEXTS)]
    if (file := Path(model.path()).expanduser() / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        pairs: list[Any] = [(a, b) if task.train.pairs is not None else a for a, b in texts]
        lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(pairs)]
    else:
        lengths = [round(1.4 * len(f"{a} {b}".split())) + 2 for a, b in texts]
    return max(1, round(sum(min(n, longest) for n in lengths) / len(lengths)))


def _holds(space: Space, design: Design) -> bool:
    try:
        space.params(design)
    except ValueError:
        return False
    return not design.check(space.sites)


def _end(space: Space, price: Callable[[Design], Costs], *, dear: bool) -> Priced | None:
    """The design with the fewest or the most trained parameters; None if the space holds no possible one."""
    slots = [_held(space, slot, held, dear=dear) for slot, held in space.ends()]
    if not all(slots):
        return None
    training = Training(**{k: v.ends()[0] if isinstance(v, Domain) else v for k, v in space.training.items()})
    # Best first: what is possible alone can be impossible together (prompts and prefixes share positions).
    start = (0,) * len(slots)
    queue, seen = [(_sum(slots, start), start)], {start}
    while queue:
        _, at = heapq.heappop(queue)
        parts = (slots[i][n][1] for i, n in enumerate(at))
        design = Design(placements=tuple(p for p in parts if p is not None), training=training)
        if not design.check(space.sites):
            return Priced(design=design, costs=price(design))
        for i, n in enumerate(at):
            other = (*at[:i], n + 1, *at[i + 1 :])
            if n + 1 < len(slots[i]) and other not in seen:
                seen.add(other)
                heapq.heappush(queue, (_sum(slots, other), other))
    return None


_Held = list[tuple[int, Placement | None]]


def _sum(slots: list[_Held], at: Iterable[int]) -> int:
    return sum(slot[n][0] for slot, n in zip(slots, at, strict=True))


def _held(space: Space, slot: Slot, held: list[Placement | None], *, dear: bool) -> _Held:
    """What a slot may hold, one of each size, the best first; sizes are negative if the dearest is sought."""
    shared = space.layers.ends() if space.layers is not None else None
    found: dict[int, Placement | None] = {}
    for end in held:
        for layers in shared if shared and end is not None else (None,):
            placement = end if layers is None or end is None else replace(end, layers=layers)
            placement = placement and _possible(placement, slot, space.sites)
            if placement is not None or end is None:
                alone = Design(placements=(placement,) if placement else ())
                found.setdefault(adapter_size(alone, space.sites) * (-1 if dear else 1), placement)
    return sorted(found.items(), key=lambda item: item[0])


def _possible(placement: Placement, slot: Slot, sites: SiteMap) -> Placement | None:
    """The placement, halved until this backbone takes it; None if the slot has no such size."""
    knob = placement.method.size_knob
    option = next(o for o in slot.options if o.method == placement.method.name)
    domain = option.knobs.get(knob) if knob else None
    while Design(placements=(placement,)).check(sites):
        if knob is None or not isinstance(domain, Domain):
            return None
        size = getattr(placement.method, knob) // 2
        try:
            domain.param(knob, size)
        except ValueError:
            return None
        method: Any = placement.method
        placement = replace(placement, method=replace(method, **{knob: size}))
    return placement
