"""What autograd keeps of the frozen backbone's forward for the backward, in closed form, bytes.

Counted by operation, as arXiv:2205.05198, sec. 4, does for training all weights: a frozen linear keeps nothing. It
follows a design only in where gradients start; what a design's methods keep is added in `peftscape.spaces.kept`.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftscape.spaces.flow import QKV, Attention, check_layer, is_fused, stage_of
from peftscape.spaces.sites import SiteMap

#: Tensors of the FFN's width that autograd keeps for an activation function: its input or output where torch
#: has a kernel; what each step of a formula in Python needs elsewhere (counted, transformers'
#: activations.py).
ACTIVATION_TENSORS = {
    "gelu_new": 4, "gelu_accurate": 4, "gelu_fast": 7, "gelu_python": 3, "gelu_10": 2, "quick_gelu": 2,
}  # fmt: skip


def activation_bytes(
    sites: SiteMap,
    tokens: int,
    batch: int,
    lowest_layer: int,
    dtype_bytes: int,
    *,
    kinds: Iterable[str] | None = None,
    full: bool = False,
    attention: Attention = "eager",
) -> int:
    """Bytes that autograd keeps of the backbone's forward for the backward, without dropout.

    Counted by operation (as arXiv:2205.05198, sec. 4, does for training all weights): a frozen linear keeps
    nothing; attention keeps queries, keys, values and scores (fused: its output instead of the scores); a
    norm keeps its input (RMSNorm as float32); an activation function its input. Nothing is kept below the
    lowest adapted site. What a method's own products keep, it declares.

    Args: as `backward_flops`; dtype_bytes of the activations.
    """
    check_layer(sites, lowest_layer)
    if not full and lowest_layer >= sites.layers:
        return 0
    post = sites.norm_place == "post"
    whole = (
        _attention_bytes(sites, tokens, batch, dtype_bytes, attention)
        + _ffn_bytes(sites, dtype_bytes)
        + _norm_bytes(sites, dtype_bytes)
    )
    outside = _norm_bytes(sites, dtype_bytes, layer=-1)  # the embeddings' LayerNorm or the last one
    if full:
        whole += _trained_bytes(sites, dtype_bytes, attention)
    if full or lowest_layer < 0:
        return batch * tokens * (sites.layers * whole + outside)
    stage, adapted = stage_of(sites, kinds)
    lowest = whole
    if stage >= 0:
        lowest = _norm_bytes(sites, dtype_bytes, stage=stage, adapted=adapted)
        lowest += _ffn_bytes(sites, dtype_bytes, stage=stage, adapted=adapted)
        if stage == 0:
            lowest += _attention_bytes(sites, tokens, batch, dtype_bytes, attention, adapted)
    return batch * tokens * ((sites.layers - 1 - lowest_layer) * whole + lowest + (0 if post else outside))


def working_bytes(sites: SiteMap, tokens: int, batch: int, dtype_bytes: int, *, attention: Attention = "eager") -> int:
    """Bytes of the largest step of one layer, which come on top of what is kept, in forward or backward
    (counted).

    Eager attention holds two tensors of scores at once (scores and their softmax, or their gradients); the FFN two of
    its width, three where it is gated; an RMSNorm, which works in float32, six of the model's width. Beside them live
    the residual stream, its gradient and what is being added to it.
    """
    rms = sites.norm_kind == "rmsnorm"
    scores = 2 * sites.heads * tokens * max(dtype_bytes, 4 if rms and attention != "lanes" else 0)
    scores = 4 * sites.d_model * dtype_bytes if is_fused(sites, attention) else scores
    gated = any(s.kind == "gate" for s in sites.sites)
    ffn = (2 + gated) * sites.d_ff * dtype_bytes
    norm = 6 * 4 * sites.d_model if rms else 0
    return batch * tokens * (max(scores, ffn, norm) + 3 * sites.d_model * dtype_bytes)


def _attention_bytes(
    sites: SiteMap, tokens: int, batch: int, width: int, attention: Attention, adapted: frozenset[str] = QKV
) -> int:
    """Bytes a token that one layer's attention keeps when gradients reach the `adapted` ones of q, k, v."""
    a = sites.heads * sites.head_dim
    if is_fused(sites, attention):
        # Queries, output, keys, values and the log-sum-exp. With a mask transformers repeats grouped keys and values to
        # the queries' width (sdpa_attention.py), and torch turns the mask of bits into numbers, in every layer anew.
        # litgpt repeats them too; where they are not grouped, its values are a view that keeps all of q-k-v alive
        # (litgpt/model.py, CausalSelfAttention).
        if attention == "masked":
            return (4 * a + tokens) * width + 4 * sites.heads
        if attention == "joint":
            return (4 if sites.d_kv < a else 6) * a * width + 4 * sites.heads
        return (2 * a + 2 * sites.d_kv) * width + 4 * sites.heads
    lanes = attention == "lanes" and sites.attention_interface
    scored = bool(adapted & {"q", "k"})
    # Queries are kept for the keys' gradient, keys for the queries', values for the scores'; grouped-query
    # attention repeats keys and values to the queries' width.
    kept = a * width * (("q" in adapted) + ("k" in adapted) + scored)
    # Models with RMSNorm take the softmax in float32 and keep it beside its copy in the activations'
    # precision, which is for the values; a softcap keeps its tanh.
    upcast = scored * 4 if sites.norm_kind == "rmsnorm" and width < 4 and not lanes else 0
    kept += sites.heads * tokens * (width + upcast + (scored * width if sites.softcap else 0))
    if scored and (of := sites.relative) is not None:
        # For each term the scores against the table, the table itself, repeated for every sequence, and the
        # indices that gather from the scores (int64, once a batch); and a mask of bytes.
        kept += of.terms * of.rows * (sites.heads * tokens + a) * width // tokens + tokens
        kept += of.terms * 8 * tokens // batch
    return kept


def _ffn_bytes(sites: SiteMap, width: int, stage: int = -1, adapted: frozenset[str] = frozenset()) -> int:
    """Bytes a token that the FFN's activation keeps, and where there is a gate the product with it."""
    if stage > 2:
        return 0
    kept = ACTIVATION_TENSORS.get(sites.activation, 1)
    if any(s.kind == "gate" for s in sites.sites):
        gate, up = stage < 2 or "gate" in adapted, stage < 2 or "up" in adapted
        kept = gate * (kept + 1) + up
    return kept * sites.d_ff * width


def _trained_bytes(sites: SiteMap, width: int, attention: Attention) -> int:
    """Bytes a token of one layer for trained weights: the inputs of q-k-v, o, gate and up, and down."""
    a = sites.heads * sites.head_dim
    kept = (2 * sites.d_model + sites.d_ff + (0 if is_fused(sites, attention) else a)) * width
    if sites.norm_kind == "rmsnorm":  # a trained gain keeps what it scales (Gemma in float32)
        kept += sum(size for _, _, size in _norms(sites, 0)) * (4 if sites.family.startswith("gemma") else width)
    return kept


def _norms(sites: SiteMap, layer: int) -> list[tuple[str, int, int]]:
    """(name, stage, numbers a token) of each norm; a norm is kept if gradients stop at its stage or below."""
    found, place = [], 0
    for path, size in ((s.path, s.d_out) for s in sites.sites if s.kind == "norm" and s.layer == layer):
        name = path.rsplit(".", 1)[-1]
        if name in ("q_norm", "k_norm"):  # on every head
            found.append((name[0], 0, size * (sites.heads if name == "q_norm" else sites.kv_heads)))
            continue
        if name == "post_feedforward_layernorm":
            stage = 3
        elif sites.norm_place == "pre":
            stage = -1 if place == 0 else 1
        else:
            stage = 1 if place == 0 else 3
        found.append((name, stage, size))
        place += 1
    return found


def _norm_bytes(sites: SiteMap, width: int, layer: int = 0, stage: int = -1, adapted: frozenset[str] = QKV) -> int:
    """Bytes a token that a layer's norms keep.

    LayerNorm keeps its input, mean and 1/deviation, RMSNorm its input as float32 and 1/root mean square.
    """
    number, extra = (4, 4) if sites.norm_kind == "rmsnorm" else (width, 8)
    return sum(
        size * number + extra
        for name, at, size in _norms(sites, layer)
        if at >= stage and (name not in QKV or name in adapted)
    )
