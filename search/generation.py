"""Greedy generation with lanes: what each lane's model says after a prompt, a token of all texts at a time.

Every step runs the whole texts again: the same pass as in training, for every method alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from peftscape.search.encoding import Asked, EncodedSplit, Ids
from peftscape.search.lm_head import LMHead

if TYPE_CHECKING:
    from peftscape.search.cohort import Cohort


@torch.no_grad()
def generate(cohort: Cohort, prompts: Sequence[Ids], *, most: int, ends: frozenset[int]) -> list[list[list[int]]]:
    """For each lane and prompt the most likely next tokens, one after the other.

    Args:
        most: tokens of an answer; fewer where the model's positions end.
        ends: tokens after one of which an answer is over; it is not part of it.
    """
    head = cohort.head
    assert isinstance(head, LMHead)
    lanes, count = len(cohort.lanes), len(prompts)
    said: list[list[int]] = [[] for _ in range(lanes * count)]
    read = np.array([1 if cohort.backbone.sites.decoder_layers else len(prompt) for prompt in prompts])
    ahead = np.array([lane.design.position_shift() for lane in cohort.lanes])
    room = ((cohort.backbone.sites.max_positions or 1 << 30) - ahead[:, None] - read).reshape(-1)
    over = room <= 0
    cache, cohort.cache = cohort.cache, None  # these texts are others at every step
    try:
        for _ in range(most):
            # Lanes have equally many examples in a pass: a text goes on as long as any lane's does.
            live = np.flatnonzero(~over.reshape(lanes, count).all(axis=0))
            if not len(live):
                break
            rows: list[int] = (np.arange(lanes)[:, None] * count + live).reshape(-1).tolist()
            words = _next(cohort, head, [prompts[i % count] for i in rows], [said[i] for i in rows])
            for i, word in zip(rows, words, strict=True):
                if not over[i]:
                    over[i] = word in ends
                    said[i] += [] if over[i] else [word]
                    over[i] |= len(said[i]) == room[i]
    finally:
        cohort.cache = cache
    return [said[lane * count : (lane + 1) * count] for lane in range(lanes)]


def written(cohort: Cohort, asked: Asked, tokens: int) -> NDArray[Any]:
    """lanes x prompts: the texts that follow the prompts; of so many at once that a pass has about `tokens` tokens."""
    order = np.argsort([len(row) for row in asked.prompts], kind="stable")
    longest = max(map(len, asked.prompts)) + asked.most
    size = max(1, tokens // (longest * len(cohort.lanes)))
    out = np.full((len(cohort.lanes), len(order)), "", dtype=object)
    for start in range(0, len(order), size):
        rows = order[start : start + size].tolist()
        said = generate(cohort, [asked.prompts[i] for i in rows], most=asked.most, ends=asked.ends)
        for lane, texts in enumerate(said):
            out[lane, rows] = [asked.decode(text) for text in texts]
    return out


def _next(cohort: Cohort, head: LMHead, prompts: Sequence[Ids], said: Sequence[list[int]]) -> list[int]:
    """The most likely word after each text."""
    ends = [np.array(s, dtype=np.int64) for s in said]
    two = cohort.backbone.sites.decoder_layers > 0
    ids = ends if two else [np.concatenate([p, s]) for p, s in zip(prompts, ends, strict=True)]
    # Methods that read a text's context read its prompt.
    scored = [np.arange(len(row)) >= (0 if two else len(p)) for row, p in zip(ids, prompts, strict=True)]
    lengths, nothing = np.array([len(row) for row in ids]), np.zeros(len(ids), dtype=np.float32)
    sources = list(prompts) if two else None
    split = EncodedSplit(ids, None, nothing, 0, lengths, scored=scored, sources=sources)
    examples = list(np.arange(len(ids)).reshape(len(cohort.lanes), -1))
    run = cohort.passing(examples, split)

    def words() -> torch.Tensor:
        states, batch, _ = run()
        return head.next_words(states[batch.last.reshape(-1)]).argmax(dim=-1)

    return [int(word) for word in cohort.forward.with_own_weights(words)]
