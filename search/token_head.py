"""The head that labels words, one per lane: a linear layer on every token, read where words begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftscape.search.head import Head
from peftscape.spaces.heads import refusal, token_shapes
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.packing import Batch


class TokenHead(Head):
    """Logits of words, as transformers' token classifiers give them without dropout."""

    def __init__(self, backbone: Backbone, *, outputs: int) -> None:
        if backbone.sites.decoder_layers:
            raise InputError(backbone.source, [refusal(backbone.sites)])
        self.backbone, self.kind, self.outputs = backbone, "token", outputs
        self.model = None
        self.shapes = token_shapes(backbone.sites, outputs)
        self.weight, self.bias = self.shapes

    def logits(self, params: Mapping[str, Tensor], states: Tensor, batch: Batch, *, picked: bool = False) -> Tensor:
        """lanes x examples x words x outputs: of the longest text's words; 0 where a text has none."""
        assert batch.words is not None
        lanes, words = batch.lanes, batch.words
        bias = params[self.bias].unsqueeze(1)
        every = torch.baddbmm(bias, states.view(lanes, -1, states.shape[-1]), params[self.weight].mT)
        out = states.new_zeros(lanes * batch.examples, words.most, self.outputs)
        found = every.flatten(0, 1)[words.tokens]
        return out.index_put((words.rows, words.places), found).view(lanes, batch.examples, words.most, -1)
