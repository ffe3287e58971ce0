"""What the tokens of a text leave for those that are written after them, so that each runs through the layers once.

A decoder's keys and values are kept here, an array for each attention with a row for each text that goes on; those of
an encoder-decoder in transformers' own cache, since its modules leave out the source's only for that. Methods that read
more of a text than one token find what they have read in `Text.past`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftscape.search.packing import Batch, LengthClass
from peftscape.spaces.text import Text

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.groups import Group

Numbers = NDArray[np.int64]
#: Where a lane has fewer texts than another.
NONE = -1


@dataclass(frozen=True)
class Following(Batch):
    """The next token of every text that goes on; its layout is lanes x texts of the lane that has the most.

    Args:
        texts: of a lane, over or not.
        number: lanes x texts in the layout, which text of its lane it is; NONE where there is none.
        place: likewise, where the token stands in its text; of a source, nothing.
        since: the least of these places.
        longest: of each lane the length of its longest text, this token included.
    """

    texts: int = field(kw_only=True)
    number: Tensor = field(kw_only=True)
    place: Tensor = field(kw_only=True)
    since: int = field(kw_only=True)
    longest: tuple[int, ...] = field(kw_only=True)

    @cached_property
    def layout(self) -> Text:
        """Where each token stands in its text, virtual tokens included."""
        assert self.context is not None
        there = self.number >= 0
        row, length = self.number.where(there, self.texts), (self.place + 1).where(there, 0)
        # Rows of a lane whose texts are over are not empty, for methods' shapes.
        known = tuple(max(n, self.since + 1) for n in self.longest)
        return Text(row, self.place, length, self.texts, self.context, known=known, since=self.since)

    @cached_property
    def rows(self) -> Numbers:
        """Of each place in the layout the number of its text, lane * texts + text; where there is none the first."""
        lanes = np.arange(self.lanes)[:, None] * self.texts
        numbers: Numbers = (lanes + self.number.clamp(min=0).cpu().numpy()).reshape(-1)
        return numbers

    @cached_property
    def padded_rows(self) -> LengthClass:
        """All texts as they lie in the padded layout."""
        assert self.mask is not None
        return LengthClass(self.ids.shape[1], self.rows, self.rows // self.texts, self.mask > 0)


class Past:
    """What the texts of a cohort have left.

    Args:
        batch: their first tokens, whose pass fills it.
        most: how many tokens may follow.
    """

    def __init__(self, backbone: Backbone, batch: Batch, most: int) -> None:
        last = batch.last.reshape(-1)
        self.batch, self.texts = batch, batch.examples
        self.lengths: Numbers = (last - batch.first.reshape(-1) + 1 + batch.ahead).cpu().numpy()
        self.positions: Numbers = batch.positions.reshape(-1)[last].cpu().numpy()
        self.total = len(self.lengths)
        self.slots: Numbers = np.arange(self.total)  # where each text lies in what is kept
        self.steps = 0
        self.size = int(self.lengths.max()) + most - 1
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.pair = _pair_cache() if backbone.sites.decoder_layers else None
        self._read: dict[tuple[int, str], dict[str, Tensor]] = {}

    def of(self, group: Group, side: str) -> dict[str, Tensor]:
        """What a group's method has read of these texts on one side of its site: input or output."""
        return self._read.setdefault((id(group), side), {})

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What an encoder-decoder needs besides its tokens: transformers' cache, and an encoder that has run."""
        if self.pair is None:
            return {}
        found = {"past_key_values": self.pair, "use_cache": True}
        if isinstance(batch, Following):
            from transformers.modeling_outputs import BaseModelOutput

            assert batch.source is not None
            # The cache has the keys and values of the source: of its states the shape alone is asked for.
            nothing = self.batch.positions.new_zeros(1, dtype=torch.float32).expand(*batch.source.ids.shape, 1)
            found["encoder_outputs"] = BaseModelOutput(last_hidden_state=nothing)
        return found

    def keep(self, path: str, rows: LengthClass, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values of first tokens, each rows x key heads x length x head_dim."""
        which = torch.from_numpy(rows.rows).to(keys.device)
        for kept, new in ((self.keys, keys), (self.values, values)):
            if path not in kept:
                kept[path] = new.new_zeros(self.total, new.shape[1], self.size, new.shape[3])
            kept[path][which, :, : rows.length] = new

    def extend(self, path: str, batch: Following, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of this step, and return all: texts that go on x key heads x longest x head_dim.

        Args:
            keys, values: texts x key heads x head_dim.
        """
        every, place = torch.arange(len(keys), device=keys.device), batch.place.reshape(-1)[batch.tokens]
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[path][every, :, place] = new
        length = batch.classes[0].length
        return self.keys[path][:, :, :length], self.values[path][:, :, :length]

    def follow(self, live: Numbers, tokens: Numbers) -> Following:
        """The step that reads these tokens behind the texts that go on; what is kept of others is let go.

        Args:
            live: numbers of the texts, lane * texts + text, ascending.
        """
        self.steps += 1
        lanes, device = self.batch.lanes, self.batch.ids.device
        lane, place = live // self.texts, self.lengths[live] + self.steps - 1
        counts = np.bincount(lane, minlength=lanes)
        slots = lane * counts.max() + np.concatenate([np.arange(n) for n in counts])

        def laid(values: Numbers, gap: int = 0) -> Tensor:
            out = np.full(lanes * int(counts.max()), gap, dtype=np.int64)
            out[slots] = values
            return torch.from_numpy(out).view(lanes, -1).to(device)

        longest = tuple(int(place[lane == n].max(initial=-1)) + 1 for n in range(lanes))
        valid = torch.from_numpy(np.arange(max(longest)) <= place[:, None]).to(device)
        flat = torch.from_numpy(slots).to(device)
        context = self.batch.context
        assert context is not None
        if self.pair is None:
            self._select(live, np.arange(len(live)), len(live))
        else:
            self._select(live, slots, lanes * int(counts.max()))
        ids, positions = laid(tokens), laid(self.positions[live] + self.steps)
        last = torch.arange(ids.numel(), device=device).view(lanes, -1)
        made = Following(
            ids=ids, positions=positions, types=None, first=last, last=last, tokens=flat,
            classes=(LengthClass(max(longest), live, lane, valid),), prompts=(None,) * lanes, lanes=lanes,
            context=laid(context.cpu().numpy()[live]), past=self, texts=self.texts,
            number=laid(live % self.texts, NONE), place=laid(place), since=int(place.min()), longest=longest,
        )  # fmt: skip
        return made if self.pair is None else self._paired(made)

    def _select(self, live: Numbers, slots: Numbers, total: int) -> None:
        """Move what is kept of these texts to their new slots; what lies between is not read."""
        which = np.zeros(total, dtype=np.int64)
        which[slots] = self.slots[live]
        self.slots[live] = slots
        if total == self.total and np.array_equal(which[slots], slots):
            return
        self.total, index = total, torch.from_numpy(which).to(self.batch.ids.device)
        if self.pair is not None:
            self.pair.batch_select_indices(index)
        for kept in (self.keys, self.values):
            for path in kept:
                kept[path] = kept[path].index_select(0, index)

    def _paired(self, made: Following) -> Following:
        """The same for a decoder whose texts lie in rows of their own, with what the encoder has read."""
        source = self.batch.source
        assert source is not None
        assert source.mask is not None
        mask = source.mask[torch.from_numpy(made.rows).to(made.ids.device)]
        ids, positions = made.ids.view(-1, 1), made.positions.view(-1, 1)
        read = replace(made, ids=mask, mask=mask, past=None)
        return replace(made, ids=ids, positions=positions, mask=torch.ones_like(ids), source=read)


def _pair_cache() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())
