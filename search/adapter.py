"""A trained adapter on its backbone: texts in, labels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit, encode_split
from peftscape.search.lane import Lane, new_lane
from peftscape.search.language import Language
from peftscape.search.language_predict import continued, probabilities, said_of
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
    def language(self) -> Language | None:
        """What it was asked as a language model; None for classification and regression."""
        said = self.card.task.get("language")
        return None if said is None else Language.from_json(dict(said))

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by id; empty for regression."""
        return self.card.labels

    def predict(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        pairs: Sequence[str] | None = None,
        *,
        options: Sequence[Sequence[str]] | None = None,
        batch_size: int = 64,
    ) -> list[dict[str, Any]]:
        """What the adapter says of each text.

        Args:
            texts: where words are labelled, lists of words, or texts whose words stand between blanks.
            pairs: second texts; of a language model the completions of the texts.
            options: answers to each text, where it was trained to choose among those of each example.

        Returns:
            `{"label": ..., "score": its probability, "probabilities": {label: ...}}` for classes and options (equally
            named ones cannot be), `{"score": the number}` for regression, for language models
            `{"loss": of a token in nats, "perplexity": ..., "tokens": how many}`, and where words are labelled
            `{"words": [...], "labels": [...], "scores": [...]}`, with None for a word beyond `max_length` or without a
            token.

        Raises:
            InputError: texts that cannot be read; see `logits`.
        """
        if self.card.head == "token":
            from peftscape.search.token_predict import labels_of_words

            return labels_of_words(self, texts, batch_size)
        texts = cast("Sequence[str]", texts)
        if self.language is not None:
            return said_of(self, self.language, texts, pairs, options, batch_size)
        logits = self.logits(texts, pairs, batch_size=batch_size).astype(np.float64)
        if self.card.outputs == 1 and not self.labels:
            return [{"score": float(row[0])} for row in logits]
        names = self.labels or tuple(str(i) for i in range(self.card.outputs))
        return [probabilities(names, row) for row in logits]

    def logits(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Texts x outputs; texts longer than the adapter's `max_length` tokens are cut.

        Raises:
            InputError: no tokenizer came with the backbone, a text has no tokens, or pairs are missing.
        """
        if self.card.head == "token":
            raise InputError("logits", ["an adapter that labels words has logits of words; use predict"])
        tokenizer = self.tokenizer()
        if pairs is not None and len(pairs) != len(texts):
            raise InputError("predict", [f"{len(pairs)} second texts for {len(texts)} texts"])
        split = Split(list(texts), None if pairs is None else list(pairs), np.zeros(len(texts), dtype=np.int64))
        side, tokenizer.truncation_side = tokenizer.truncation_side, "right"  # as in training
        try:
            encoded = encode_split(split, tokenizer, self.card.max_length)
        finally:
            tokenizer.truncation_side = side
        if empty := np.flatnonzero(encoded.lengths == 0).tolist():
            raise InputError("predict", [f"text {i} has no tokens" for i in empty[:5]])
        return self.encoded_logits(encoded, batch_size=batch_size)

    def tokenizer(self) -> Any:
        """The backbone's. Raises InputError if it has none."""
        if self.backbone.tokenizer is None:
            raise InputError("predict", ["the backbone has no tokenizer; load it from a folder that has one"])
        return self.backbone.tokenizer

    def generate(self, prompts: Sequence[str], *, most: int = 32, batch_size: int = 16) -> list[str]:
        """The most likely continuation of each prompt, at most `most` tokens; of a chat's adapter the next answer.

        Raises:
            InputError: the adapter is not one of a language model, a prompt has no tokens or leaves no position, or the
                tokenizer's chat template refuses a chat.
        """
        if self.language is None:
            raise InputError("generate", ["an adapter with a trained head says labels, not texts; use predict"])
        return continued(self, self.language, prompts, most, batch_size)

    @torch.no_grad()
    def lane(self) -> Lane:
        """A lane with the adapter's tensors; what no file holds is made anew by the seed it was trained with."""
        seed = int(self.card.task.get("seed", 0))
        lane = new_lane(self.design, seed=seed, steps=1, backbone=self.backbone, head=self.head)
        for key, value in lane.tensors.items():
            if key not in lane.passing:
                value.copy_(self.tensors[key])
        return lane

    @torch.no_grad()
    def encoded_logits(self, split: EncodedSplit, *, batch_size: int = 64) -> NDArray[np.float32]:
        """Examples x outputs for texts that are tokens already."""
        out = np.zeros((1, len(split.ids), 2 if split.scored is not None else self.card.outputs), dtype=np.float32)
        lane = self.lane()
        cohort = Cohort(self.backbone, self.head, split, batch_size=batch_size)
        cohort.admit(lane)
        try:
            order = np.argsort(split.lengths, kind="stable")  # so that little is padded
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                out[0, rows] = cohort.logits([rows], split)[0].float().cpu().numpy()
        finally:
            cohort.close()
        # A row may have more answers to choose from than any that was learnt from.
        most = int(split.choices.column.max()) + 1 if split.choices is not None else 0
        found: NDArray[np.float32] = split.answers(out, max(self.card.outputs, most))[0]
        return found
