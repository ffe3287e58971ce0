"""Greedy generation with lanes: what each lane's model says after a prompt, a token of all texts at a time.

The prompts run once, packed as in training; then every step runs the newest token of each text that goes on, beside
the keys and values of those before it (`generation_past`). A model whose attention cannot be reached, or whose rotary
positions change with the length of the text, runs the whole texts again at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from peftscape.search.encoding import Asked, EncodedSplit, Ids
from peftscape.search.generation_past import Numbers, Past
from peftscape.search.lm_head import LMHead

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.cohort import Cohort
    from peftscape.search.packing import Batch

#: The likeliest words after texts, by their numbers (lane * prompts + prompt, ascending), of which this was said.
Words = Callable[[Numbers, list[list[int]]], list[int]]
#: Of each of some prompts, by their numbers, what each lane says behind it: lanes x prompts.
Said = tuple[list[int], list[list[list[int]]]]
#: Bytes of keys and values that `in_chunks` keeps at a time.
PAST_BYTES = 1 << 29


@torch.no_grad()
def generate(
    cohort: Cohort, prompts: Sequence[Ids], *, most: int, ends: frozenset[int], again: bool = False
) -> list[list[list[int]]]:
    """For each lane and prompt the most likely next tokens, one after the other.

    Args:
        most: tokens of an answer; fewer where the model's positions end.
        ends: tokens after one of which an answer is over; it is not part of it.
        again: run the whole texts at every step, as where nothing can be kept.
    """
    room = _room(cohort, prompts)
    most = min(most, max(0, int(room.max())))
    whole = again or not keeps_past(cohort.backbone)
    words = _Whole(cohort, prompts) if whole else _Following(cohort, prompts, most)
    cache, cohort.cache = cohort.cache, None  # these texts are no examples
    try:
        said: torch.Tensor = cohort.forward.with_own_weights(lambda: _said(words, room.reshape(-1), most, ends))
    finally:
        cohort.cache = cache
    return [[row[row >= 0].tolist() for row in texts] for texts in said.view(len(cohort.lanes), len(prompts), most)]


def keeps_past(backbone: Backbone) -> bool:
    """Whether what a token leaves for later ones can be kept."""
    rotary = getattr(backbone.config, "rope_parameters", None) or {}
    return backbone.sites.attention_interface and rotary.get("rope_type") not in ("dynamic", "longrope")


def past_bytes(backbone: Backbone) -> int:
    """Bytes that a token's keys and values take: 2 x layers x d_kv numbers.

    In an encoder-decoder a token of the source takes them in attention across, one of the target in its own.
    """
    sites = backbone.sites
    return 2 * (sites.decoder_layers or sites.layers) * sites.d_kv * backbone.dtype.itemsize


def in_chunks(
    cohort: Cohort, prompts: Sequence[Ids], *, most: int, ends: frozenset[int], tokens: int, size: int | None = None
) -> Iterator[Said]:
    """What `generate` gives, chunk by chunk, the shortest prompts first.

    Args:
        tokens: about how many all lanes' texts of a chunk have, their longest answers included, and fewer where their
            keys and values (see `past_bytes`) would not fit in half a GiB, `PAST_BYTES`; of one prompt at least.
        size: prompts of a chunk, at most.
    """
    if not prompts:
        return
    order = np.argsort([len(row) for row in prompts], kind="stable")
    most = min(most, max(0, int(_room(cohort, prompts).max())))
    longest = max(map(len, prompts)) + most + max(lane.design.prompt_length() for lane in cohort.lanes)
    tokens = min(tokens, PAST_BYTES // past_bytes(cohort.backbone))
    size = max(1, min(size or len(order), tokens // (longest * len(cohort.lanes))))
    for start in range(0, len(order), size):
        rows = order[start : start + size].tolist()
        yield rows, generate(cohort, [prompts[i] for i in rows], most=most, ends=ends)


def written(cohort: Cohort, asked: Asked, tokens: int) -> NDArray[Any]:
    """lanes x prompts: the texts that follow the prompts, `in_chunks` of about so many tokens."""
    out = np.full((len(cohort.lanes), len(asked.prompts)), "", dtype=object)
    for rows, said in in_chunks(cohort, asked.prompts, most=asked.most, ends=asked.ends, tokens=tokens):
        for lane, texts in enumerate(said):
            out[lane, rows] = [asked.decode(text) for text in texts]
    return out


def _room(cohort: Cohort, prompts: Sequence[Ids]) -> Numbers:
    """lanes x prompts: for how many tokens behind a prompt the model has positions."""
    read = np.array([1 if cohort.backbone.sites.decoder_layers else len(prompt) for prompt in prompts])
    ahead = np.array([lane.design.position_shift() for lane in cohort.lanes])
    room: Numbers = (cohort.backbone.sites.max_positions or 1 << 30) - ahead[:, None] - read
    return room


def _said(words: Words, room: Numbers, most: int, ends: frozenset[int]) -> torch.Tensor:
    """lanes * prompts x most: the tokens of each answer, then -1.

    Args:
        room: for how many tokens each has positions.
    """
    said: list[list[int]] = [[] for _ in room]
    over = room <= 0
    for _ in range(most):
        live = np.flatnonzero(~over)
        if not len(live):
            break
        for i, word in zip(live.tolist(), words(live, said), strict=True):
            over[i] = word in ends
            said[i] += [] if over[i] else [word]
            over[i] |= len(said[i]) == room[i]
    out = torch.full((len(said), most), -1)
    for i, row in enumerate(said):
        out[i, : len(row)] = torch.tensor(row)
    return out


class _Following:
    """Words of texts whose tokens run once."""

    def __init__(self, cohort: Cohort, prompts: Sequence[Ids], most: int) -> None:
        self.cohort = cohort
        for lane in cohort.lanes:
            lane.unfold(False)
        examples, split = _split(cohort, prompts, [[]] * (len(cohort.lanes) * len(prompts)))
        first = cohort.packed(examples, split).to(cohort.backbone.device)
        self.past = Past(cohort.backbone, first, most)
        self.first: Batch | None = replace(first, past=self.past)

    def __call__(self, live: Numbers, said: list[list[int]]) -> list[int]:
        if self.first is not None:
            batch, self.first = self.first, None
            last = batch.last.reshape(-1)[torch.from_numpy(live).to(batch.last.device)]
        else:
            batch = self.past.follow(live, np.array([said[i][-1] for i in live]))
            last = batch.tokens
        return _likeliest(self.cohort, self.cohort.forward.states(batch, 0, {}, None)[last])


class _Whole:
    """Words of texts that run whole, at every step."""

    def __init__(self, cohort: Cohort, prompts: Sequence[Ids]) -> None:
        self.cohort, self.prompts = cohort, prompts

    def __call__(self, live: Numbers, said: list[list[int]]) -> list[int]:
        # Lanes have equally many examples in a pass: a text goes on as long as any lane's does.
        count = len(self.prompts)
        some = np.unique(live % count)
        rows = (np.arange(len(self.cohort.lanes))[:, None] * count + some).reshape(-1)
        split = _split(self.cohort, [self.prompts[i] for i in some], [said[i] for i in rows])
        states, batch, _ = self.cohort.passing(*split)()
        last = batch.last.reshape(-1)[torch.from_numpy(np.searchsorted(rows, live)).to(states.device)]
        return _likeliest(self.cohort, states[last])


def _split(
    cohort: Cohort, prompts: Sequence[Ids], said: Sequence[list[int]]
) -> tuple[list[NDArray[Any]], EncodedSplit]:
    """Each lane's texts so far, as examples."""
    lanes, ends = len(cohort.lanes), [np.array(s, dtype=np.int64) for s in said]
    asked = list(prompts) * lanes
    two = cohort.backbone.sites.decoder_layers > 0
    ids = ends if two else [np.concatenate([p, s]) for p, s in zip(asked, ends, strict=True)]
    # Methods that read a text's context read its prompt.
    scored = [np.arange(len(row)) >= (0 if two else len(p)) for row, p in zip(ids, asked, strict=True)]
    lengths, nothing = np.array([len(row) for row in ids]), np.zeros(len(ids), dtype=np.float32)
    split = EncodedSplit(ids, None, nothing, 0, lengths, scored=scored, sources=asked if two else None)
    return list(np.arange(len(ids)).reshape(lanes, -1)), split


def _likeliest(cohort: Cohort, states: torch.Tensor) -> list[int]:
    """The word that each of these last states makes the likeliest."""
    assert isinstance(cohort.head, LMHead)
    return [int(word) for word in cohort.head.next_words(states).argmax(dim=-1)]
