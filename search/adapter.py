"""A trained adapter on its backbone: texts in, labels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit, encode_split
from peftscape.search.lane import Lane, new_lane
from peftscape.search.task import Split
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.adapter_folder import Card
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.design import Design


@dataclass(eq=False)
class Adapter:
    """An adapter and its head on a frozen backbone, which several adapters may share.

    Args:
        card: the design, the labels and what else is known of it.
        tensors: those of a lane, head included.
    """

    card: Card
    backbone: Backbone
    head: Head
    tensors: dict[str, Tensor]

    @property
    def design(self) -> Design:
        return self.card.design

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by id; empty for regression."""
        return self.card.labels

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, batch_size: int = 64
    ) -> list[dict[str, Any]]:
        """What the adapter says of each text.

        Returns:
            `{"label": ..., "score": its probability, "probabilities": {label: ...}}` for classes, and
            `{"score": the number}` for regression.

        Raises:
            InputError: texts that cannot be read; see `logits`.
        """
        logits = self.logits(texts, pairs, batch_size=batch_size).astype(np.float64)
        if self.card.outputs == 1 and not self.labels:
            return [{"score": float(row[0])} for row in logits]
        names = self.labels or tuple(str(i) for i in range(self.card.outputs))
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        rows = (raised / raised.sum(axis=1, keepdims=True)).tolist()
        return [
            {
                "label": names[int(np.argmax(row))],
                "score": max(row),
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for row in rows
        ]

    def logits(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Texts x outputs; texts longer than the adapter's `max_length` tokens are cut.

        Raises:
            InputError: no tokenizer came with the backbone, a text has no tokens, or pairs are missing.
        """
        if self.backbone.tokenizer is None:
            raise InputError("predict", ["the backbone has no tokenizer; load it from a folder that has one"])
        if pairs is not None and len(pairs) != len(texts):
            raise InputError("predict", [f"{len(pairs)} second texts for {len(texts)} texts"])
        split = Split(list(texts), None if pairs is None else list(pairs), np.zeros(len(texts), dtype=np.int64))
        tokenizer = self.backbone.tokenizer
        side, tokenizer.truncation_side = tokenizer.truncation_side, "right"  # as in training
        try:
            encoded = encode_split(split, tokenizer, self.card.max_length)
        finally:
            tokenizer.truncation_side = side
        if empty := np.flatnonzero(encoded.lengths == 0).tolist():
            raise InputError("predict", [f"text {i} has no tokens" for i in empty[:5]])
        return self.encoded_logits(encoded, batch_size=batch_size)

    @torch.no_grad()
    def lane(self) -> Lane:
        """A lane with the adapter's tensors; what no file holds is made anew by the seed it was trained with."""
        seed = int(self.card.task.get("seed", 0))
        lane = new_lane(self.design, seed=seed, steps=1, backbone=self.backbone, head=self.head)
        for key, value in {**lane.params, **lane.fixed}.items():
            if key not in lane.passing:
                value.copy_(self.tensors[key])
        return lane

    @torch.no_grad()
    def encoded_logits(self, split: EncodedSplit, *, batch_size: int = 64) -> NDArray[np.float32]:
        """Examples x outputs for texts that are tokens already."""
        out = np.zeros((len(split), self.card.outputs), dtype=np.float32)
        lane = self.lane()
        cohort = Cohort(self.backbone, self.head, split, batch_size=batch_size)
        cohort.admit(lane)
        try:
            order = np.argsort(split.lengths, kind="stable")  # so that little is padded
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                out[rows] = cohort.logits([rows], split)[0].float().cpu().numpy()
        finally:
            cohort.close()
        return out
