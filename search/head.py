"""The task's head, one per lane: transformers' own class around given hidden states, or masked mean and a linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.packing import Batch

HeadKind = Literal["class", "mean"]


class _Given(nn.Module):
    """Stands where the backbone was and returns the states it was given."""

    output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class Head:
    """Logits from hidden states, for all lanes at once.

    `class` runs the forward of transformers' own sequence classifier around states that are already there, so that a
    winner exported to HF peft gives equal logits; `mean` is one linear layer on the masked mean.
    """

    def __init__(self, backbone: Backbone, *, kind: HeadKind, outputs: int) -> None:
        self.backbone, self.kind, self.outputs = backbone, kind, outputs
        self.model: nn.Module | None = None
        if kind == "mean":
            width = backbone.sites.d_model
            self.shapes: dict[str, tuple[int, ...]] = {"weight": (outputs, width), "bias": (outputs,)}
            return
        if backbone.sites.head is None:
            reason = f'transformers has no sequence classifier for {backbone.sites.family}; use head = "mean"'
            raise InputError(backbone.source, [reason])
        self.pooling = backbone.sites.head.pooling
        if self.pooling == "pooler" and any(name.startswith("pooler.") for name in backbone.missing):
            # transformers would make one up at random at each load, so that no result could be had again.
            raise InputError(backbone.source, ['its checkpoint has no pooler, which its head reads; use head = "mean"'])
        self.model = _classifier_around_nothing(backbone, outputs)
        own = backbone.sites.head.modules
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters() if name.split(".")[0] in own}

    @property
    def size(self) -> int:
        """Trained parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def start(self, source: torch.Generator) -> dict[str, Tensor]:
        """As transformers starts a classifier: weights N(0, initializer_range), biases 0."""
        std = getattr(self.backbone.config, "initializer_range", 0.02)
        return {
            name: torch.empty(shape).normal_(0, std, generator=source) if len(shape) > 1 else torch.zeros(shape)
            for name, shape in sorted(self.shapes.items())
        }

    def reads(self, batch: Batch) -> Tensor | None:
        """Flat numbers of the tokens that the head reads, one an example; None for all of a text."""
        if self.model is None:
            return None
        return (batch.last if self.pooling == "last" else batch.first).reshape(-1)

    def logits(self, params: Mapping[str, Tensor], states: Tensor, batch: Batch, *, picked: bool = False) -> Tensor:
        """lanes x examples x outputs.

        Args:
            params: by name, with a leading lane dimension.
            states: flat tokens x d_model, the backbone's last hidden states.
            picked: whether these are the tokens of `reads` alone.
        """
        lanes, examples = batch.lanes, batch.examples
        if self.model is None:
            tokens, rows = batch.text
            sums = states.new_zeros(lanes * examples, states.shape[1]).index_add_(0, rows, states[tokens])
            lengths = (batch.last - batch.first + 1).view(-1, 1)
            means = (sums / lengths).view(lanes, examples, -1)
            return torch.baddbmm(params["bias"].unsqueeze(1), means, params["weight"].mT)
        read = (states if picked else states[self.reads(batch)]).unsqueeze(1)
        pooled = read[:, 0]
        if self.pooling == "pooler":  # frozen, so in the backbone's own precision
            pooled = self.backbone.pooler(read.to(self.backbone.dtype)).to(read.dtype)
        per_lane = torch.vmap(self._one)
        out: Tensor = per_lane(dict(params), read.view(lanes, examples, 1, -1), pooled.view(lanes, examples, -1))
        return out

    def _one(self, params: dict[str, Tensor], states: Tensor, pooled: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        assert self.model is not None
        given = self.model.get_submodule(str(self.model.base_model_prefix))
        assert isinstance(given, _Given)
        given.output = Output(last_hidden_state=states, pooler_output=pooled)
        # One token an example, and none of them padding: classes that look for the last real token find this one.
        ids = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        out = torch.func.functional_call(self.model, params, (), {"input_ids": ids})
        given.output = None
        logits: Tensor = out.logits
        return logits


def _classifier_around_nothing(backbone: Backbone, outputs: int) -> nn.Module:
    """transformers' sequence classifier without weights and with the backbone taken out."""
    import copy

    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(backbone.config)
    config.num_labels = outputs
    config.problem_type = None
    config.pad_token_id = 0
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    setattr(model, str(model.base_model_prefix), _Given())
    return model.eval()
