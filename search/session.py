"""What every run needs at hand: the backbone, the head, the data as tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.search.adapter_folder import Card
from peftscape.search.backbone import Backbone
from peftscape.search.graphed import Graphs, cuda_graphs
from peftscape.search.guarded import Guarded
from peftscape.search.head import Head, make_head
from peftscape.search.rungs import Rungs, rungs_of
from peftscape.search.states import StateCache
from peftscape.search.task import EncodedTask, Task, encode, load_task
from peftscape.spaces.price import costs
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.config import SearchConfig
    from peftscape.search.encoding import EncodedSplit
    from peftscape.spaces.design import Design
    from peftscape.spaces.record import Costs


@dataclass
class Session:
    """A loaded configuration.

    Args:
        tokens: a typical text's length, the mean of the training texts; costs are told for it.
        target: of an encoder-decoder that learns an answer to each text, the answers' mean length.
        steps: of every training at full length.
        states: hidden states that all cohorts share; None keeps none.
        rungs: at which trials are compared; None where all are trained to their end.
        guards: what cohorts are limited by: `stop`, `patience_s`, `over`, `checkpoints`, `account` (`Guarded`).
    """

    config: SearchConfig
    backbone: Backbone
    head: Head
    task: Task
    data: EncodedTask
    tokens: int
    steps: int
    target: int | None = None
    guards: dict[str, Any] = field(default_factory=dict)
    states: StateCache | None = None
    rungs: Rungs | None = None

    @property
    def stops(self) -> tuple[int, ...]:
        """After which steps of a training it is scored: at the rungs, and last at the end."""
        return (*(self.rungs.steps(self.steps) if self.rungs else ()), self.steps)

    def cohort(self) -> Guarded:
        """An empty cohort on the training data."""
        graphs = Graphs(cuda_graphs(self.backbone.device)) if self.config.search.cuda_graphs else None
        return Guarded(
            self.backbone,
            self.head,
            self.data.train,
            batch_size=self.config.search.batch_size,
            regression=self.task.kind == "regression",
            cache=self.states,
            passes=self.config.search.gradient_accumulation_steps,
            checkpointing=self.config.search.gradient_checkpointing,
            graphs=graphs,
            **self.guards,
        )


def open_session(config: SearchConfig) -> Session:
    """Load what the configuration names.

    Raises:
        InputError, TaskError: with all that is wrong with the model or the data.
    """
    task = load_task(config.task)
    model = config.model
    backbone = Backbone.load(
        model.path(),
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        overrides=dict(model.sites) or None,
    )
    data = encode(task, backbone.tokenizer, _longest(config, backbone), pairs=backbone.sites.decoder_layers > 0)
    head = make_head(backbone, kind=config.head, outputs=task.num_outputs)
    end = getattr(backbone.tokenizer, "eos_token_id", None)
    if backbone.sites.decoder_layers and config.head == "class" and any(ids[-1] != end for ids in data.train.ids):
        why = "reads the last end of a text, and this tokenizer ends texts in another token"
        raise InputError("model.head", [f'transformers\' classifier {why}; use head = "mean"'])
    tokens, target = _typical(data.train)
    steps = max(1, -(-config.search.full_length(len(data.train)) // config.search.batch_size))
    try:
        rungs = rungs_of(config.search, steps)
    except ValueError as error:
        raise InputError("search.rungs", [str(error)]) from None
    return Session(config, backbone, head, task, data, tokens, steps, target, states=StateCache(backbone), rungs=rungs)


def _longest(config: SearchConfig, backbone: Backbone) -> int:
    """Tokens after which a text is cut."""
    return min(config.model.max_length, backbone.sites.max_positions or config.model.max_length)


def _typical(split: EncodedSplit) -> tuple[int, int | None]:
    if split.sources is None:
        return round(float(np.mean(split.lengths))), None
    return round(float(np.mean(list(map(len, split.sources))))), round(float(np.mean(list(map(len, split.ids)))))


def design_costs(session: Session, design: Design) -> Costs:
    """What a design costs alone in this session: on this backbone, for this task's typical text."""
    return costs(
        design,
        session.backbone.sites,
        outputs=session.task.num_outputs,
        tokens=session.tokens,
        target=session.target,
        batch=session.config.search.pass_size,
        checkpointing=session.config.search.gradient_checkpointing,
        head=session.config.head,
        dtype=session.backbone.precision,
        compute=session.backbone.computation,
    )


def adapter_card(session: Session, design: Design, seed: int) -> Card:
    """What an adapter's folder says of it."""
    return Card(
        design=design,
        head=session.config.head,
        outputs=session.task.num_outputs,
        max_length=_longest(session.config, session.backbone),
        labels=session.task.labels,
        metric=session.task.metric.name,
        task={"name": session.task.name, "seed": seed}
        | ({} if session.task.language is None else {"language": session.task.language.json()}),
    )
