"""What a search is: one frozen value, from a TOML file and the command line.

`peftscape.search.config_file` reads it and uses what a field's metadata says (`least`, `most`, `example`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from peftscape.search.task_config import TaskConfig, task_kind
from peftscape.spaces.heads import HeadKind

if TYPE_CHECKING:
    from peftscape.spaces.sites import SiteMap

DEFAULT_EPOCHS = 2.0
"""Passes over the training data of a full training, where neither examples nor epochs are given."""

DEFAULT_TRIALS = 30
"""How many designs are trained where neither trials nor time are given."""


def _whole(default: int | None, *, least: int, most: int | None = None) -> Any:
    """A field for a whole number from `least` to `most`."""
    return field(default=default, metadata={"least": least, "most": most})


def _like(example: str) -> Any:
    """An optional field whose error shows an example of what is expected."""
    return field(default=None, metadata={"example": example})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The `[model]` table.

    Args:
        source: `minilm` (the embedded default), a local folder, or a hub id.
        dtype: of the frozen weights: `auto`, `float32`, `bfloat16`, `float64`, or 4 bits (`nf4`; `nf4-dq` with the
            constants in 8 bits), which need bitsandbytes.
        device: as torch names it: `cpu`, `cuda`, `cuda:1`, `mps`.
        head: `class` (transformers' own) or `mean` (masked mean and one linear).
        max_length: tokens after which a text is cut; never more than the model's positions.
        sites: patterns for models of unknown families (`q = "layers.{layer}.attn.q_proj"`).
    """

    source: str = "minilm"
    dtype: Literal["auto", "float32", "bfloat16", "float64", "nf4", "nf4-dq"] = "auto"
    device: str = "cpu"
    head: Literal["class", "mean"] = "class"
    max_length: int = _whole(256, least=1)
    trust_remote_code: bool = False
    sites: Mapping[str, Any] = field(default_factory=dict)

    def path(self) -> str:
        """Where the model lies: an embedded one by name, else the folder or hub id itself.

        Raises:
            MissingPackageError: if it is an embedded one whose package is not installed.
        """
        from peftscape.search.embedded import EMBEDDED_MODELS, embedded_model_path

        return str(embedded_model_path(self.source)) if self.source in EMBEDDED_MODELS else self.source

    def site_map(self) -> SiteMap:
        """The places that can be adapted, from the model's configuration alone.

        Raises:
            SiteError: there is no configuration here, or it cannot be mapped.
            MissingPackageError: as `path` does.
        """
        from peftscape.spaces.sites import site_map

        return replace(site_map(self.path(), dict(self.sites) or None), quantised=self.dtype.startswith("nf4"))


@dataclass(frozen=True, kw_only=True)
class S3DeltaSettings:
    """The `[search.s3delta]` table; read where `sampler = "s3delta"`.

    Args:
        budgets: trained parameters of the structures that are looked for, the head left out: shares of the
            backbone's, `"0.01%, 0.1%"`, or numbers.
        seeds: super-nets of each budget.
        examples: training examples of a super-net, half of them for its gates; twice a full training's where it is
            not given.
        temperature: of the gates that are drawn; the smaller, the nearer they are to 0 and 1.
        alpha_lr: learning rate of the gates.
    """

    budgets: str = "0.01%, 0.03%, 0.1%"
    seeds: int = _whole(1, least=1)
    examples: int | None = _whole(None, least=1)
    temperature: float = 1.0
    alpha_lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The `[search]` table.

    Args:
        objectives: a quality metric and one or more costs, `"accuracy:max,trainable:min"`. Left out of a
            file, it is the task's metric against trained parameters.
        sampler: `tpe`, `nsga2`, `gp`, `random`, or `s3delta`: places by gradients, what is left by `tpe`.
        examples: training examples of every trial at full length, the same for all.
        epochs: the same as passes over the training data; one of the two, 2 epochs where neither is given.
        lanes: most trials that train at once.
        gradient_accumulation_steps: passes in which a lane's `batch_size` examples run, one after the other. The
            update is that of one pass, in less memory.
        gradient_checkpointing: whether layers keep their input alone, and run again in the backward.
        cuda_graphs: whether steps of lanes and lengths that come back are captured and replayed; on CUDA alone.
        seeds: lanes of a trial.
        retest_seeds: further seeds of the designs that could be on the front.
        further_seeds: seeds beyond these, for all designs together; one by one to where a place on the front is open.
        textbook: whether published designs start the search; they run to the end whatever they score on the way.
        rungs: how often a training is compared with the others on its way, at the fractions factor^-rungs, ...,
            factor^-1 of its length; one in `factor` goes on from there. 0: every design is trained to the end.
        factor: see `rungs`.
        rung_rule: which go on: `crowding`, `like-cost`, `epsilon-net` or `quality` (`search.rung_rules`).
        brackets: of Hyperband; bracket b is first compared at its rung b + 1. 1: all are compared at the first.
        memory_limit: what the weights and the lanes may take together, `"6GB"`; most of what is free where it is not
            given.
        step_limit: the longest that a training step or an evaluation may take; what hangs is stopped then.
        s3delta: how `sampler = "s3delta"` looks for structures.
    """

    objectives: str = "accuracy:max,trainable:min"
    sampler: Literal["tpe", "nsga2", "gp", "random", "s3delta"] = "tpe"
    seed: int = _whole(0, least=0, most=2**32 - 1)
    examples: int | None = _whole(None, least=1)
    epochs: float | None = _like("2")
    batch_size: int = _whole(32, least=1)
    lanes: int = _whole(8, least=1)
    gradient_accumulation_steps: int = _whole(1, least=1)
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False
    seeds: int = _whole(1, least=1)
    retest_seeds: int = _whole(5, least=0)
    further_seeds: int = _whole(0, least=0)
    textbook: bool = True
    rungs: int = _whole(0, least=0, most=8)
    factor: int = _whole(3, least=2, most=10)
    rung_rule: Literal["crowding", "like-cost", "epsilon-net", "quality"] = "crowding"
    brackets: int = _whole(1, least=1)
    memory_limit: str | None = _like('"6GB"')
    step_limit: str = "15m"
    s3delta: S3DeltaSettings = S3DeltaSettings()

    @property
    def pass_size(self) -> int:
        """Examples of a lane that run at once, at most."""
        return -(-self.batch_size // self.gradient_accumulation_steps)

    def full_length(self, rows: int) -> int:
        """Training examples of a full training on `rows` of them."""
        return self.examples or max(1, round((self.epochs or DEFAULT_EPOCHS) * rows))


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The `[budget]` table; whatever is None does not bind.

    Args:
        trials: how many designs are trained.
        time: wall-clock time from the command to the report, `"30m"`, `"2h"`, `"90s"`.
        device_time: time spent computing, for trials and retests, of all workers together.
        examples: training examples of all trials and retests together.
        trainable: largest number of trained parameters of a design, head included; `"2%"` of the backbone's.
        peak_bytes: largest peak memory of a design when it is trained alone; a number or `"4GB"`.
        adapter_bytes: largest file of a design's saved adapter; a number or `"500kB"`.
    """

    trials: int | None = _whole(None, least=1)
    time: str | None = _like('"30m"')
    device_time: str | None = _like('"30m"')
    examples: int | None = _whole(None, least=1)
    trainable: int | str | None = _like('20000 or "2%"')
    peak_bytes: int | str | None = _like('4000000000 or "4GB"')
    adapter_bytes: int | str | None = _like('500000 or "500kB"')


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A whole search."""

    name: str = "search"
    model: ModelConfig = ModelConfig()
    task: TaskConfig
    space: str | Mapping[str, Any] = "unified"
    search: SearchSettings = SearchSettings()
    budget: BudgetConfig = BudgetConfig(trials=DEFAULT_TRIALS)

    @property
    def head(self) -> HeadKind:
        """The head of the task: a language model's own where the task is one of language, of words where they count."""
        if self.task.kind == "token_classification":
            return "token"
        return "lm" if task_kind(self.task) in ("lm", "multiple_choice") else self.model.head
