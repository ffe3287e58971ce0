"""How the batches of lanes lie for an encoder-decoder: each text in a row of its own, source and target apart.

The decoder reads its target behind a start token. Where the target is what is learnt it reads the last token too,
which predicts nothing and is seen by none, so that every token is predicted from the one before it, as in a decoder
alone. Where an example has one text (classification), that text is source and target, shifted right as transformers'
classes shift it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from peftscape.search.packing import Batch, LaneBatch, pack
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.encoding import EncodedSplit
    from peftscape.spaces.design import Design
    from peftscape.spaces.sites import SiteMap


def pack_pairs(
    designs: Sequence[Design],
    examples: Sequence[np.ndarray[Any, Any]],
    split: EncodedSplit,
    sites: SiteMap,
    start: int | None,
) -> Batch:
    """Lay out the lanes' examples: what the decoder reads, with what the encoder reads as its `source`.

    Args:
        designs, examples: of each lane.
        start: the token that the decoder reads first; None for the target's last (mBART's, its language).
    """
    sources = split.ids if split.sources is None else split.sources
    read, scored = list(split.ids), None if split.scored is None else list(split.scored)
    for i in np.unique(np.concatenate(examples)):
        if start is None and not len(split.ids[i]):
            raise InputError("generate", ["its decoder starts with the language it writes, which nothing here says"])
        first = split.ids[i][-1] if start is None else start
        read[i] = np.r_[first, split.ids[i] if scored is not None else split.ids[i][:-1]]
        if scored is not None:
            scored[i] = np.r_[False, scored[i]]
    lanes = list(zip(designs, examples, strict=True))
    prompts = [LaneBatch(e, d.prompt_length(), d.prompt_length()) for d, e in lanes]
    source = pack(prompts, replace(split, ids=sources, types=None, scored=None), sites, padded=True)
    behind = [LaneBatch(e, 0, shift_of(d, sites)) for d, e in lanes]
    target = pack(behind, replace(split, ids=read, types=None, scored=scored), sites, padded=True)
    return replace(target, source=source, cut=source.cut + target.cut)


def shift_of(design: Design, sites: SiteMap) -> int:
    """By how many positions prefixes on the decoder's attention to itself move the target."""
    return sum(
        p.method.position_shift()
        for p in design.placements
        if any(s.kind == "kv" and s.stack == "decoder" for s in p.where(sites))
    )


def decoder_start(config: Any) -> int | None:
    """The token that a model's decoder reads first; None for the target's last."""
    if config.model_type == "mbart":
        return None
    start = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id if start is None else start)
