"""The task's head, one per lane: transformers' own class around given hidden states, or masked mean and a linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftscape.spaces.heads import HeadKind
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.adapter_folder import Card
    from peftscape.search.backbone import Backbone
    from peftscape.search.packing import Batch


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
        self.model = around_nothing(backbone, "AutoModelForSequenceClassification", outputs)
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

    def frozen(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the head that do not train, by their names in transformers' class; `base` are the backbone's."""
        return {}

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
            # The last sum is of what is in no text.
            sums = states.new_zeros(lanes * examples + 1, states.shape[1]).index_add_(0, batch.text_rows, states)
            lengths = (batch.last - batch.first + 1).view(-1, 1)
            means = (sums[:-1] / lengths).view(lanes, examples, -1)
            return torch.baddbmm(params["bias"].unsqueeze(1), means, params["weight"].mT)
        read = (states if picked else states[self.reads(batch)]).unsqueeze(1)
        pooled = read[:, 0]
        if self.pooling == "pooler":  # frozen, so in the backbone's own precision
            pooled = self.backbone.pooler(read.to(self.backbone.dtype)).to(read.dtype)
        per_lane = torch.vmap(self._one)
        out: Tensor = per_lane(dict(params), read.view(lanes, examples, 1, -1), pooled.view(lanes, examples, -1))
        return out

    def _one(self, params: dict[str, Tensor], states: Tensor, pooled: Tensor) -> Tensor:
        assert self.model is not None
        # One token an example, and none of them padding: classes that look for the last real token find this one.
        ids = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        with given_states(self.model, states, pooled):
            out = torch.func.functional_call(self.model, params, (), {"input_ids": ids})
        logits: Tensor = out.logits
        return logits


def auto_class(card: Card, backbone: Backbone) -> str:
    """Which of transformers' classes has the head of an adapter."""
    if card.head == "token":
        return "AutoModelForTokenClassification"
    if card.head != "lm":
        return "AutoModelForSequenceClassification"
    return "AutoModelForSeq2SeqLM" if backbone.sites.decoder_layers else "AutoModelForCausalLM"


def make_head(backbone: Backbone, *, kind: HeadKind, outputs: int) -> Head:
    """The head of a task: a trained one, of texts or of their words, or the language model's own.

    Raises:
        InputError: the backbone has no such head.
    """
    if kind == "lm":
        from peftscape.search.lm_head import LMHead

        return LMHead(backbone, outputs=outputs)
    if kind == "token":
        from peftscape.search.token_head import TokenHead

        return TokenHead(backbone, outputs=outputs)
    return Head(backbone, kind=kind, outputs=outputs)


def around_nothing(backbone: Backbone, auto: str, outputs: int | None = None) -> nn.Module:
    """transformers' own class for a task, without weights and with the backbone taken out."""
    import copy

    import transformers

    config = copy.deepcopy(backbone.config)
    if outputs is not None:
        config.num_labels = outputs
        config.problem_type = None
        config.pad_token_id = 0
    config._attn_implementation = "eager"
    if config.is_encoder_decoder:  # its classes look for the token that ends a text: the 1 that `Head._one` gives
        config.eos_token_id, config.decoder_start_token_id = 1, 0
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, auto).from_config(config)
    if hasattr(model, str(model.base_model_prefix)):
        setattr(model, str(model.base_model_prefix), _Given())
    else:  # T5's language model holds the parts of its base model itself
        model.shared, model.encoder, model.decoder = nn.Identity(), _Given(), _Given()
    return model.eval()


@contextmanager
def given_states(model: nn.Module, states: Tensor, pooled: Tensor | None = None) -> Iterator[None]:
    """Within this, a model of `around_nothing` finds these states where its backbone was: texts x tokens x d_model."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, Seq2SeqModelOutput

    given = [module for module in model.modules() if isinstance(module, _Given)]
    output: Any = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=pooled)
    if model.config.is_encoder_decoder and len(given) == 1:  # type: ignore[union-attr]
        output = Seq2SeqModelOutput(last_hidden_state=states)
    try:
        for module in given:
            module.output = output
        yield
    finally:
        for module in given:
            module.output = None
