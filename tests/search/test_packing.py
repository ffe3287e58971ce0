"""How lanes' texts become one input: every token once, in its place, with its position, and nothing beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from peftscape.search.encoding import EncodedSplit
from peftscape.search.packing import Batch, LaneBatch, pack
from peftscape.spaces.sites import SiteMap, site_map

_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
}  # fmt: skip
BERT = site_map({"model_type": "bert", **_SHAPE, "max_position_embeddings": 200})
ROBERTA = site_map({"model_type": "roberta", **_SHAPE, "max_position_embeddings": 202, "pad_token_id": 1})
LENGTHS = [3, 17, 16, 33, 64, 65, 129, 1, 140, 5]


def split(*, typed: bool = False) -> EncodedSplit:
    random = np.random.default_rng(0)
    ids = [random.integers(3, 99, size=n) for n in LENGTHS]
    types = [random.integers(0, 2, size=n) for n in LENGTHS] if typed else None
    return EncodedSplit(ids, types, np.zeros(len(ids)), 0, np.array(LENGTHS))


LANES = [
    LaneBatch(np.array([0, 1, 2])),
    LaneBatch(np.array([3, 7, 4]), prompt=4, shift=4),
    LaneBatch(np.array([5, 6, 8]), prompt=2, shift=7),
    LaneBatch(np.array([9, 9, 0]), shift=3),
]
both = pytest.mark.parametrize("padded", [False, True])


def packed(padded: bool, sites: SiteMap = BERT, *, typed: bool = False) -> Batch:
    return pack(LANES, split(typed=typed), sites, padded=padded)


@both
def test_every_text_is_where_first_and_last_say(padded: bool) -> None:
    batch, data = packed(padded), split()
    flat = batch.ids.flatten()
    for lane, row in enumerate(LANES):
        for i, example in enumerate(row.examples):
            first, last = int(batch.first[lane, i]), int(batch.last[lane, i])
            assert flat[first : last + 1].tolist() == data.ids[example].tolist()


@both
@pytest.mark.parametrize(("sites", "offset"), [(BERT, 0), (ROBERTA, 2)])
def test_positions_count_from_the_shift_and_prompts_lie_before(padded: bool, sites: SiteMap, offset: int) -> None:
    batch = packed(padded, sites)
    positions = batch.positions.flatten()
    for lane, row in enumerate(LANES):
        for i in range(3):
            first, last = int(batch.first[lane, i]), int(batch.last[lane, i])
            wanted = offset + row.shift + np.arange(last - first + 1)
            assert positions[first : last + 1].tolist() == wanted.tolist()
            virtual = batch.prompts[lane]
            if row.prompt:
                assert virtual is not None
                assert virtual[i].tolist() == list(range(first - row.prompt, first))
                before = offset + row.shift - row.prompt + np.arange(row.prompt)
                assert positions[virtual[i]].tolist() == before.tolist()
            else:
                assert virtual is None


@both
def test_real_tokens_are_counted_once_and_each_has_a_place_of_its_own(padded: bool) -> None:
    batch = packed(padded)
    real = sum(LENGTHS[e] + row.prompt for row in LANES for e in row.examples)
    assert len(batch.tokens) == len(set(batch.tokens.tolist())) == real
    places = torch.cat(batch.places(1)[0])
    assert sorted(places[places < batch.ids.numel()].tolist()) == sorted(batch.tokens.tolist())
    if batch.mask is not None:
        assert batch.mask.flatten().nonzero().flatten().tolist() == sorted(batch.tokens.tolist())
        assert batch.ids.shape[0] == batch.lanes * batch.examples


def test_tokens_are_packed_end_to_end_in_their_lane() -> None:
    batch = packed(False)
    totals = [sum(LENGTHS[e] + row.prompt for e in row.examples) for row in LANES]
    assert batch.ids.shape == (len(LANES), max(totals))
    assert batch.mask is None
    for lane, total in enumerate(totals):
        mine = batch.tokens[(batch.tokens // max(totals)) == lane] - lane * max(totals)
        assert mine.tolist() == list(range(total))


def test_heads_lie_in_rows_by_class_row_head_and_place() -> None:
    batch, heads = packed(False), 3
    parts, back = batch.places(heads)
    assert [len(p) for p in parts] == [len(c.rows) * heads * c.length for c in batch.classes]
    there = torch.cat(parts)
    nothing, wanted = batch.ids.numel() * heads, []
    for of in batch.classes:
        for row in of.rows.tolist():
            lane, i = divmod(row, 3)
            first, end = int(batch.first[lane, i]) - LANES[lane].prompt, int(batch.last[lane, i]) + 1
            for head in range(heads):
                mine = [t if t < end else None for t in range(first, first + of.length)]
                wanted += [nothing if t is None else t * heads + head for t in mine]
    assert there.tolist() == wanted
    gaps = set(range(nothing)) - set(wanted)
    assert [wanted[i] for i in back.tolist() if i < len(wanted)] == [i for i in range(nothing) if i not in gaps]
    assert {i for i, place in enumerate(back.tolist()) if place == len(wanted)} == gaps


def test_attention_rows_hold_one_example_each_in_classes_of_like_length() -> None:
    batch = packed(False)
    flat = batch.ids.flatten()
    seen = []
    for of, places in zip(batch.classes, batch.places(1)[0], strict=True):
        here = places.where(places < batch.ids.numel(), -1).view(len(of.rows), of.length)
        assert torch.equal(of.valid, here >= 0)
        lengths = of.valid.sum(1)
        assert int(lengths.max()) == of.length, "padded to the longest row that is there"
        for row, number, lane in zip(here, of.rows, of.lanes, strict=True):
            tokens = row[row >= 0]
            i, example = int(number) % 3, LANES[lane].examples[int(number) % 3]
            assert number // 3 == lane
            assert (np.diff(tokens.numpy()) == 1).all()
            assert flat[tokens[LANES[lane].prompt :]].tolist() == split().ids[example].tolist()
            assert int(tokens[-1]) == int(batch.last[lane, i])
            seen.append(int(number))
    assert sorted(seen) == list(range(12))
    for of in batch.classes:  # no row is padded to more than twice its length
        assert int(of.valid.sum(1).min()) > of.length / 2 or of.length <= 16


def test_rows_of_a_lane_lie_side_by_side() -> None:
    for of in packed(False).classes:
        for lane in range(len(LANES) + 1):
            assert of.before(lane) == int((of.lanes < lane).sum())
        assert of.lanes.tolist() == sorted(of.lanes.tolist())


@both
def test_token_types_go_with_their_tokens(padded: bool) -> None:
    batch, data = packed(padded, typed=True), split(typed=True)
    assert batch.types is not None
    assert data.types is not None
    assert packed(padded).types is None
    flat = batch.types.flatten()
    for lane, row in enumerate(LANES):
        for i, example in enumerate(row.examples):
            first, last = int(batch.first[lane, i]), int(batch.last[lane, i])
            assert flat[first : last + 1].tolist() == data.types[example].tolist()


def test_text_tokens_and_their_rows() -> None:
    batch, data = packed(False), split()
    rows, ids = batch.text_rows, batch.ids.flatten()
    texts = [data.ids[e] for row in LANES for e in row.examples]
    for i, text in enumerate(texts):
        assert ids[rows == i].tolist() == text.tolist()
    assert set(rows.tolist()) == set(range(13))


@both
def test_a_text_that_does_not_fit_keeps_its_start_and_its_closing_token(padded: bool) -> None:
    sites = site_map({"model_type": "bert", **_SHAPE, "max_position_embeddings": 20})
    lanes = [LaneBatch(np.array([1, 5]), prompt=2, shift=6), LaneBatch(np.array([0, 8]))]
    batch, data = pack(lanes, split(typed=True), sites, padded=padded), split(typed=True)
    assert batch.cut == 3
    flat = batch.ids.flatten()
    assert data.types is not None
    assert batch.types is not None
    for lane, limit in ((0, 20 - 6), (1, 20)):
        for i, example in enumerate(lanes[lane].examples):
            ids, types = data.ids[example], data.types[example]
            keep = list(range(len(ids))) if len(ids) <= limit else [*range(limit - 1), len(ids) - 1]
            span = slice(int(batch.first[lane, i]), int(batch.last[lane, i]) + 1)
            assert flat[span].tolist() == ids[keep].tolist()
            assert batch.types.flatten()[span].tolist() == types[keep].tolist()
    assert int(batch.positions.max()) == 19


def test_a_lane_alone_is_the_corner_of_its_place_in_a_batch() -> None:
    together = packed(False)
    for lane, row in enumerate(LANES):
        alone = pack([row], split(), BERT)
        width = alone.ids.shape[1]
        assert torch.equal(alone.ids[0], together.ids[lane, :width])
        assert torch.equal(alone.positions[0], together.positions[lane, :width])
        assert torch.equal(alone.first[0], together.first[lane] - lane * together.ids.shape[1])
