"""Attention of lanes: packed tokens in, each example attending to itself and to its lane's prefix.

Registered with transformers' `AttentionInterface` under the name `peftscape`; a model whose attention does not go
through that interface never calls it, and `calls` shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftscape.search.generation_past import Following
from peftscape.search.row_attention import move, row_attention
from peftscape.spaces import ops
from peftscape.spaces.ops.choose import noting
from peftscape.spaces.ops.device import on_device
from peftscape.spaces.ops.reference import stacked

if TYPE_CHECKING:
    from peftscape.search.packing import Batch, LengthClass
    from peftscape.spaces.sites import Site

Relative = Callable[[Tensor, int, int], Tensor]

NAME = "peftscape"
#: Where torch's own attention runs, which keeps no scores. On the CPU it is written out: there torch's is
#: pathologically slow backward in bfloat16 (see DESIGN leads).
FUSED_ON = ("cuda",)


@dataclass
class Prefix:
    """Keys and values that lanes `first` to before `stop` add in one layer: of each lane length x d_kv.

    `gate` gives lanes x texts x 1, what keys and values are multiplied with for each text. `ran` gets the kernel's name
    where it runs.
    """

    first: int
    stop: int
    keys: Tensor | Sequence[Tensor]
    values: Tensor | Sequence[Tensor]
    lengths: Sequence[int]
    gate: Callable[[], Tensor] | None = None
    ran: Sequence[set[str]] = ()

    @cached_property
    def own(self) -> tuple[list[Tensor], list[Tensor]]:
        """Unpadded, a tensor for each lane."""
        keys, values = (
            [t[:n] if len(t) > n else t for t, n in zip(part, self.lengths, strict=True)]
            for part in (self.keys, self.values)
        )
        return keys, values

    def padded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """lanes x longest x d_kv twice, and what hides the padding: lanes x 1 x 1 x longest. Made once a pass."""
        if self._padded is None:
            keys, values = stacked(self.keys, dtype), stacked(self.values, dtype)
            lengths = on_device(self.lengths, keys.device)
            inside = torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]
            hidden = _bias(inside, dtype)[:, None, None, :]
            self._padded = keys, values, hidden
        return self._padded

    _padded: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass
class Attending:
    """What the attention of one forward pass has to know; set by the cohort, read by the modules of its backbone."""

    batch: Batch | None = None
    causal: bool = False
    prefixes: dict[str, list[Prefix]] = field(default_factory=dict)  # by the path of the attention
    calls: dict[int, int] = field(default_factory=dict)  # by layer
    relative: dict[str, Any] = field(default_factory=dict)  # T5's modules with a table of positions, by stack


def register() -> None:
    """Make `peftscape` a name that transformers' models accept as their attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """softmax(Q [P_k; K]^T s) [P_v; V] for every example of every lane.

    Args:
        query: lanes x heads x tokens x head_dim; key and value may have fewer heads (grouped queries).
    Returns:
        lanes x tokens x heads x head_dim, and no weights.
    """
    run: Attending = module.peftscape_attending  # type: ignore[assignment]
    site: Site = module.peftscape_site  # type: ignore[assignment]
    run.calls[site.layer] = run.calls.get(site.layer, 0) + 1
    if more.get("s_aux") is not None:
        raise NotImplementedError("attention sinks (s_aux) are not supported")
    batch = run.batch
    if batch is None:  # the probe that looks whether this function is called at all
        return torch.zeros_like(query).transpose(1, 2), None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if batch.source is not None:
        return _attend_padded(batch, batch.source, site, query, key, value, run=run, scale=scale, more=more), None
    prefixes = sorted(run.prefixes.get(site.path, []), key=lambda p: p.first)
    if isinstance(batch, Following):
        return _attend_following(batch, site, query, key, value, prefixes=prefixes, scale=scale, more=more), None
    parts = list(zip(batch.classes, *(_to_rows(t, batch) for t in (query, key, value)), strict=True))
    outputs = [_attend_class(c, *part, run=run, prefixes=prefixes, scale=scale, more=more) for c, *part in parts]
    if batch.past is not None:
        for c, _, keys, values in parts:
            batch.past.keep(site.path, c, keys, values)
    lanes, heads, tokens, width = query.shape
    there, back = batch.places(heads)
    (flat,) = move([out.reshape(-1, width) for out in outputs], [back], there)
    return flat.view(lanes, tokens, heads, width), None


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where attention is allowed, the least number elsewhere."""
    # Made on the device: `where` would bring a number of the processor there, and wait.
    return torch.zeros((), dtype=dtype, device=allowed.device).where(allowed, torch.finfo(dtype).min)


def _to_rows(x: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """lanes x heads x tokens x head_dim to rows x heads x length x head_dim, an array for each length class."""
    lanes, heads, tokens, width = x.shape
    flat = x.transpose(1, 2).reshape(lanes * tokens * heads, width)
    there, back = batch.places(heads)
    parts = move([flat], there, [back])
    return tuple(t.view(len(c.rows), heads, c.length, width) for t, c in zip(parts, batch.classes, strict=True))


def _attend_class(
    rows: LengthClass,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    run: Attending,
    prefixes: list[Prefix],
    scale: float,
    more: dict[str, Any],
) -> Tensor:
    allowed = rows.valid[:, None, None, :]
    if run.causal:
        place = torch.arange(rows.length, device=q.device)
        near = place[:, None] >= place
        if more.get("sliding_window"):
            near &= place[:, None] - place < more["sliding_window"]
        allowed = allowed & near
    elif window := more.get("sliding_window"):  # both ways, as EmbeddingGemma's
        place = torch.arange(rows.length, device=q.device)
        allowed = allowed & ((place[:, None] - place).abs() < window)
    bias = _bias(allowed, q.dtype)
    softcap = more.get("softcap")
    keys, values = ([t for p in prefixes for t in p.own[i]] for i in (0, 1))
    one_way = run.causal or not more.get("sliding_window")
    if prefixes and one_way and softcap is None and not any(p.gate for p in prefixes):
        with noting([ran for p in prefixes for ran in p.ran]):
            fused = ops.attends_fused(q, keys, values)
        if fused:
            out = ops.prefix_attention(
                q, k, v, keys, values, _owners(prefixes, rows), valid=rows.valid, causal=run.causal,
                window=more.get("sliding_window"), scale=scale,
            )  # fmt: skip
            return out.transpose(1, 2)
    bias = bias.expand(len(rows.rows), -1, -1, -1)
    return _attend_by_prefix(rows, q, k, v, bias, prefixes, scale, softcap)


def _attend_following(
    batch: Following, site: Site, query: Tensor, key: Tensor, value: Tensor, *, prefixes: list[Prefix], scale: float,
    more: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Attention of one token of each text to those before it, whose keys and values are kept."""
    assert batch.past is not None
    lanes, heads, tokens, width = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1).index_select(0, batch.tokens) for t in (query, key, value))
    keys, values = batch.past.extend(site.path, batch, k, v)
    (rows,) = batch.classes
    allowed = rows.valid
    if more.get("sliding_window"):
        place = torch.arange(rows.length, device=q.device)
        allowed = allowed & (rows.valid.sum(dim=1, keepdim=True) - 1 - place < more["sliding_window"])
    bias = _bias(allowed, q.dtype)[:, None, None, :]
    # Heads of queries that share a head of keys stand where a text's tokens do: no key is written twice.
    grouped = q.view(len(q), k.shape[1], -1, width)
    bias = bias.expand(-1, -1, grouped.shape[2], -1)
    out = _attend_by_prefix(rows, grouped, keys, values, bias, prefixes, scale, more.get("softcap"))
    flat = out.new_zeros(lanes * tokens, heads * width)
    flat = flat.index_copy(0, batch.tokens, out.reshape(len(q), heads * width))
    return flat.view(lanes, tokens, heads, width)


def _attend_padded(
    batch: Batch, source: Batch, site: Site, q: Tensor, k: Tensor, v: Tensor, *, run: Attending, scale: float,
    more: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Attention of an encoder-decoder, whose texts lie in rows of their own: rows x heads x length x head_dim in.

    T5 adds a bias by distance to the scores; a prefix lies before the text, as in transformers' cache.
    """
    rows = (batch if site.stack == "decoder" else source).padded_rows
    allowed, before = rows.valid[:, None, None, :], 0
    if site.stack == "decoder":
        before = k.shape[2] - q.shape[2]  # keys that were kept, of texts that are equally long
        place = torch.arange(k.shape[2], device=q.device)
        allowed = nn.functional.pad(allowed, (before, 0), value=True) & (place[before:, None] >= place)
    bias = _bias(allowed, q.dtype)
    if more.get("position_bias") is not None:
        bias = bias + more["position_bias"]
    bias = bias.expand(-1, -1, q.shape[2], -1)
    table = run.relative.get(site.stack)
    relative = None if table is None else partial(_bias_before, table, before)
    prefixes = sorted(run.prefixes.get(site.path, []), key=lambda p: p.first)
    return _attend_by_prefix(rows, q, k, v, bias, prefixes, scale, None, relative).transpose(1, 2)


def _bias_before(table: Any, first: int, lengths: Tensor, width: int, queries: int) -> Tensor:
    """T5's bias of a text's tokens, from `first` on, for prefixes of these lengths before it.

    Returns:
        rows x heads x queries x width.
    """
    place = torch.arange(first, first + queries, device=lengths.device)[:, None]
    distance = torch.arange(width, device=lengths.device) - place - lengths[:, None, None]
    buckets = table._relative_position_bucket(
        distance,
        bidirectional=not table.is_decoder,
        num_buckets=table.relative_attention_num_buckets,
        max_distance=table.relative_attention_max_distance,
    )
    found: Tensor = table.relative_attention_bias(buckets).permute(0, 3, 1, 2)
    return found


def _attend_by_prefix(
    rows: LengthClass, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, prefixes: list[Prefix], scale: float,
    softcap: float | None, relative: Relative | None = None,
) -> Tensor:  # fmt: skip
    """Attention of padded rows, those of lanes with a prefix behind it: rows x heads x length x head_dim."""
    cuts = [rows.before(lane) for p in prefixes for lane in (p.first, p.stop)]
    sizes = [stop - start for start, stop in pairwise([0, *cuts, len(rows.rows)])]
    owners = [None, *(who for p in prefixes for who in (p, None))]
    outputs = [
        _softmax_attention(*_with_prefix(owner, relative, rows, start, *parts), scale, softcap)
        for owner, start, *parts in zip(
            owners, [0, *cuts], *(torch.split(t, sizes) for t in (q, k, v, bias)), strict=True
        )
        if len(parts[0])
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _with_prefix(
    prefix: Prefix | None, relative: Relative | None, rows: LengthClass, start: int, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys, values and bias of rows from `start` on, the keys and values behind their lane's prefix."""
    if prefix is None:
        return q, k, v, bias
    mine = slice(start, start + len(q))
    which = on_device(rows.lanes[mine] - prefix.first, q.device)
    keys, values, hidden = _prefix_rows(prefix, which, k.shape[1], k.shape[3], k.dtype)
    if prefix.gate is not None:
        gate = prefix.gate()
        text = on_device(rows.rows[mine] % gate.shape[1], q.device)
        weight = gate[which, text][:, :, None, None]
        keys, values = keys * weight, values * weight
    if relative is not None:
        lengths = on_device(prefix.lengths, q.device)
        hidden = hidden + relative(lengths[which], hidden.shape[-1], q.shape[2])
    hidden = hidden.expand(-1, bias.shape[1], bias.shape[2], -1)
    return q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), torch.cat([hidden, bias], dim=-1)


def _owners(prefixes: Sequence[Prefix], rows: LengthClass) -> list[int]:
    """Of each row the number of its lane's prefix among all of these, -1 for none."""
    lanes = [lane for p in prefixes for lane in range(p.first, p.stop)]
    number = {lane: i for i, lane in enumerate(lanes)}
    return [number.get(lane, -1) for lane in rows.lanes.tolist()]


def _prefix_rows(
    prefix: Prefix, which: Tensor, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The lanes' prefixes for their rows (rows x kv heads x length x head_dim), and what hides the padding."""
    keys, values, hidden = prefix.padded(dtype)
    length = keys.shape[1]
    split = [t.view(-1, length, kv_heads, width).transpose(1, 2) for t in (keys, values)]
    return split[0].index_select(0, which), split[1].index_select(0, which), hidden[which]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    """rows x heads x length x head_dim in and out."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if softcap is not None:
        scores = torch.tanh(torch.matmul(q * scale, k.transpose(2, 3)) / softcap) * softcap
        return torch.matmul(torch.softmax(scores + bias, dim=-1), v)
    if q.device.type in FUSED_ON:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return row_attention(q, k, v, bias, scale)
