"""Where labelled words lie in a batch, their losses, and their logits text by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peftscape.search.token_examples import objects
from peftscape.spaces.ops.device import on_device

#: The target of a place that is no word, as torch and transformers know it.
IGNORED = -100


@dataclass(frozen=True)
class Words:
    """Where the words of a batch lie.

    Args:
        tokens: the flat number of each word's first token; `rows` whose text it is of (lane * examples + example) and
            `places` which word of that text. Words that were cut are not there.
        most: words of the longest text, those that were cut included.
    """

    tokens: Tensor
    rows: Tensor
    places: Tensor
    most: int

    def to(self, device: torch.device) -> Words:
        """The same on a device."""
        tokens, rows, places = (on_device(t, device) for t in (self.tokens, self.rows, self.places))
        return replace(self, tokens=tokens, rows=rows, places=places)


def laid_out(firsts: Sequence[NDArray[np.bool_]], flat: NDArray[Any], row_of: NDArray[Any], most: int) -> Words:
    """The words of a batch, from the marks of their first tokens, text after text, and every token's number and row."""
    inside = np.concatenate(firsts)
    rows = row_of[inside]
    counts = np.bincount(rows, minlength=len(firsts))
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Words(torch.from_numpy(flat[inside]), torch.from_numpy(rows), torch.from_numpy(places), most)


def labels_of(targets: NDArray[Any], examples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label ids of the words of these texts (lanes x examples): lanes x examples x words, -100 where there is none."""
    rows = [targets[i] for i in examples.reshape(-1)]
    out = np.full((len(rows), max(map(len, rows))), IGNORED, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out.reshape(*examples.shape, -1)


def word_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of each lane's words, from lanes x examples x words x classes."""
    flat = nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(len(logits), -1).sum(dim=1)


def word_divergence(one: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """The symmetric KL divergence of two passes, for each lane a sum over its words."""
    p, q = torch.log_softmax(one, dim=-1), torch.log_softmax(other, dim=-1)
    values = ((p.exp() - q.exp()) * (p - q)).sum(dim=-1) * (labels != IGNORED)
    return values.flatten(1).sum(dim=1) / 2


def by_text(parts: Sequence[Tensor], order: NDArray[np.int64], targets: NDArray[Any]) -> NDArray[Any]:
    """lanes x examples, each words x classes: from parts of lanes x examples x words x classes in another order."""
    host = [part.float().cpu().numpy() for part in parts]
    rows: list[list[NDArray[np.float32]]] = []
    for lane in range(len(host[0])):
        own = [row for part in host for row in part[lane]]
        found = dict(zip(order.tolist(), own, strict=True))
        rows.append([found[i][: len(target)] for i, target in enumerate(targets)])
    return np.stack([objects(row) for row in rows])
