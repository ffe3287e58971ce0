"""How the batches of many lanes become one input: sequences packed end to end, one row of tokens a lane.

Frozen linears then see lanes x tokens without padding to the longest text; attention alone works on padded rows,
sorted into length classes. Lanes may be at different steps, with prompts of different lengths, at no cost to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftscape.search.token_words import Words, laid_out
from peftscape.spaces.ops.device import on_device
from peftscape.spaces.text import Text

if TYPE_CHECKING:
    from peftscape.search.generation_past import Past
    from peftscape.search.task import EncodedSplit
    from peftscape.spaces.sites import SiteMap

# Rows are padded to the smallest of these that holds them; longer ones to a multiple of the last.
LENGTH_CLASSES = (16, 32, 64, 128)


@dataclass(frozen=True)
class LaneBatch:
    """What one lane reads in one step."""

    examples: np.ndarray[Any, Any]
    prompt: int = 0
    shift: int = 0


@dataclass(frozen=True)
class LengthClass:
    """Rows padded to one length. `rows` are their numbers, `lanes` whose they are; both ascend."""

    length: int
    rows: np.ndarray[Any, Any]
    lanes: np.ndarray[Any, Any]
    valid: Tensor  # rows x length

    def before(self, lane: int) -> int:
        """How many of its rows belong to lanes before this one."""
        return int(np.searchsorted(self.lanes, lane))


@dataclass(frozen=True)
class Batch:
    """The input of a cohort.

    `ids`, `positions` and `types` are lanes x tokens (packed) or lanes * examples x tokens (padded, for models whose
    attention cannot be reached). Flat numbers count tokens in that order. `first`, `last`: lanes x examples, the flat
    number of an example's first and last text token. `tokens` are the flat numbers of all real tokens, prompts
    included, and `slots` where each lies in the padded rows of attention, class after class.
    """

    ids: Tensor
    positions: Tensor
    types: Tensor | None
    first: Tensor
    last: Tensor
    tokens: Tensor
    classes: tuple[LengthClass, ...]
    prompts: tuple[Tensor | None, ...]  # for each lane, examples x prompt length: flat numbers
    lanes: int
    longest: tuple[int, ...] = ()  # of each lane the tokens of its longest text, virtual ones included
    mask: Tensor | None = None  # padded layout only
    cut: int = 0
    scored: Tensor | None = None  # flat numbers of the tokens that a language model predicts, and the row of each
    scored_rows: Tensor | None = None
    context: Tensor | None = None  # of each row, the tokens that all others may read, those ahead of it included
    words: Words | None = None  # where words are labelled
    source: Batch | None = None  # what the encoder reads, where this is what the decoder reads
    past: Past | None = None  # what its tokens leave for those that are written after them

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        moved = {f.name: _to(getattr(self, f.name), device) for f in fields(self)}
        classes = tuple(replace(c, valid=on_device(c.valid, device)) for c in self.classes)
        return type(self)(**{**moved, "classes": classes})

    @property
    def examples(self) -> int:
        """Examples of one lane."""
        return self.first.shape[1]

    @cached_property
    def padded_rows(self) -> LengthClass:
        """All texts as they lie in the padded layout."""
        assert self.mask is not None
        rows = np.arange(self.lanes * self.examples)
        return LengthClass(self.ids.shape[1], rows, rows // self.examples, self.mask > 0)

    def places(self, heads: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Where heads of tokens lie in the padded rows of attention: rows x heads x length, class after class.

        Returns:
            For each place of each class the number of what lies there (flat token * heads + head), and for each of
            these numbers its place, counted through all classes. What has none gets the number behind the last.
        """
        if heads not in self._places:
            device, total = self.first.device, self.ids.numel()
            parts, head = [], torch.arange(heads, device=device)[:, None]
            begin = self.first.reshape(-1) - self.ahead
            for c in self.classes:
                token = begin[on_device(c.rows, device)][:, None] + torch.arange(c.length, device=device)
                number = token.where(c.valid, total).view(len(c.rows), 1, c.length) * heads + head
                parts.append(number.clamp(max=total * heads).reshape(-1))
            every = torch.cat(parts)
            back = torch.full((total * heads + 1,), len(every), device=device)
            back.index_copy_(0, every, torch.arange(len(every), device=device))
            self._places[heads] = tuple(parts), back[:-1]
        return self._places[heads]

    @cached_property
    def _places(self) -> dict[int, tuple[tuple[Tensor, ...], Tensor]]:
        return {}

    @cached_property
    def text_rows(self) -> Tensor:
        """Of each token the row (lane * examples + example) whose text it is of; of all others the number of rows."""
        row, place = self.layout.row, self.layout.place
        inside = (row < self.examples) & (place >= self.ahead.view(self.lanes, -1)[:, :1])
        lane = torch.arange(self.lanes, device=row.device)[:, None]
        return (lane * self.examples + row).where(inside, self.lanes * self.examples).reshape(-1)

    @cached_property
    def layout(self) -> Text:
        """Where each token stands in its text, virtual tokens included."""
        count, device = self.examples, self.first.device
        place = torch.arange(self.ids.numel() // self.lanes, device=device).repeat(self.lanes, 1)
        ahead = self.ahead.view(self.lanes, -1)
        begin = self.first - ahead - torch.arange(self.lanes, device=device)[:, None] * place.shape[1]
        row = torch.searchsorted(begin, place, right=True) - 1  # a lane's texts lie in their order
        place, length = place - begin.gather(1, row), (self.last - self.first + 1 + ahead).gather(1, row)
        inside, context = place < length, None
        if self.context is not None:
            context = self.context.view(self.lanes, -1).gather(1, row).where(inside, 0)
        row, place, length = row.where(inside, count), place.where(inside, 0), length.where(inside, 0)
        return Text(row, place, length, count, context, known=self.longest)

    @cached_property
    def ahead(self) -> Tensor:
        """Virtual tokens before each text."""
        sizes = [0 if p is None else p.shape[1] for p in self.prompts]
        return on_device(sizes, self.first.device).repeat_interleave(self.examples)


def pack(batches: Sequence[LaneBatch], split: EncodedSplit, sites: SiteMap, *, padded: bool = False) -> Batch:
    """Lay out the lanes' examples. All lanes have the same number of examples."""
    texts: list[np.ndarray[Any, Any]] = []
    types: list[np.ndarray[Any, Any]] = []
    marks: list[np.ndarray[Any, Any]] = []
    firsts: list[np.ndarray[Any, Any]] = []
    prompts, shifts, cut = [], [], 0
    for batch in batches:
        # A text that does not fit behind the lane's prompts loses its middle end, never its closing token.
        limit = sites.max_positions - batch.shift if sites.max_positions else None
        for i in batch.examples:
            ids = split.ids[i]
            kinds = split.types[i] if split.types is not None else None
            begins = split.words[i] if split.words is not None else None
            if limit is not None and len(ids) > limit:
                keep = (
                    np.r_[0 : limit - 1, len(ids) - 1] if split.scored is None else np.r_[len(ids) - limit : len(ids)]
                )
                ids, kinds, cut = ids[keep], kinds[keep] if kinds is not None else None, cut + 1
                begins = np.append(begins[: limit - 1], False) if begins is not None else None
            texts.append(ids)
            if split.scored is not None:
                mark = split.scored[i][len(split.scored[i]) - len(ids) :].copy()
                mark[0] = False  # what stood before it was cut
                marks.append(mark)
            if kinds is not None:
                types.append(kinds)
            if begins is not None:
                firsts.append(begins)
        prompts += [batch.prompt] * len(batch.examples)
        shifts += [batch.shift] * len(batch.examples)

    lanes, examples = len(batches), len(batches[0].examples)
    prompt, shift = np.array(prompts), np.array(shifts)
    lengths = prompt + np.array([len(t) for t in texts])
    row_lane = np.repeat(np.arange(lanes), examples)
    if padded:
        width = int(lengths.max())
        starts, total = np.arange(len(texts)) * width, len(texts) * width
        shape = (len(texts), width)
    else:
        ends = np.cumsum(lengths.reshape(lanes, examples), axis=1)
        width = int(ends[:, -1].max())
        starts = (ends - lengths.reshape(lanes, examples) + np.arange(lanes)[:, None] * width).reshape(-1)
        total, shape = lanes * width, (lanes, width)

    row_of = np.repeat(np.arange(len(texts)), lengths)  # for every real token: its row and its place in it
    place = np.arange(len(row_of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    flat = starts[row_of] + place
    is_text = place >= prompt[row_of]

    ids_flat = np.zeros(total, dtype=np.int64)
    ids_flat[flat[is_text]] = np.concatenate(texts)
    positions = np.zeros(total, dtype=np.int64)
    positions[flat] = place + (shift - prompt)[row_of]
    types_flat = None
    if types:
        types_flat = np.zeros(total, dtype=np.int64)
        types_flat[flat[is_text]] = np.concatenate(types)
    mask = None
    if padded:
        mask = np.zeros(total, dtype=np.int64)
        mask[flat] = 1

    scored = scored_rows = context = None
    if marks:
        inside = np.concatenate(marks)
        scored = torch.from_numpy(flat[is_text][inside])
        scored_rows = torch.from_numpy(row_of[is_text][inside])
        context = torch.from_numpy(prompt + [max(1, int(m.argmax()) if m.any() else len(m)) for m in marks])

    words = None
    if split.words is not None:
        most = max(len(split.targets[i]) for batch in batches for i in batch.examples)
        words = laid_out(firsts, flat[is_text], row_of[is_text], most)

    return Batch(
        ids=torch.from_numpy(ids_flat).view(shape),
        positions=torch.from_numpy(positions + sites.position_offset).view(shape),
        types=torch.from_numpy(types_flat).view(shape) if types_flat is not None else None,
        first=torch.from_numpy(starts + prompt).view(lanes, examples),
        last=torch.from_numpy(starts + lengths - 1).view(lanes, examples),
        tokens=torch.from_numpy(flat),
        classes=_length_classes(lengths, row_lane),
        prompts=tuple(
            torch.from_numpy(starts[row_lane == g][:, None] + np.arange(b.prompt)) if b.prompt else None
            for g, b in enumerate(batches)
        ),
        lanes=lanes,
        longest=tuple(lengths.reshape(lanes, examples).max(axis=1).tolist()),
        mask=torch.from_numpy(mask).view(shape) if mask is not None else None,
        cut=cut,
        scored=scored,
        scored_rows=scored_rows,
        context=context,
        words=words,
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    if isinstance(value, Tensor):
        return on_device(value, device)
    return value.to(device) if isinstance(value, Batch | Words) else value


def padded_lengths(lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The length class of each text."""
    last, bounds = LENGTH_CLASSES[-1], np.array(LENGTH_CLASSES)
    short = bounds[np.searchsorted(bounds, np.minimum(lengths, last))]
    return np.where(lengths > last, -(-lengths // last) * last, short)


def _length_classes(lengths: np.ndarray[Any, Any], lane: np.ndarray[Any, Any]) -> tuple[LengthClass, ...]:
    padded_to, classes = padded_lengths(lengths), []
    for length in np.unique(padded_to):
        rows = np.flatnonzero(padded_to == length)
        # Padding goes to the longest row that is really there: the class only says who lies together.
        longest = int(lengths[rows].max())
        valid = torch.from_numpy(np.arange(longest) < lengths[rows][:, None])
        classes.append(LengthClass(longest, rows, lane[rows], valid))
    return tuple(classes)
