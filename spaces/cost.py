"""What the frozen backbone costs, in closed form: parameters, FLOPs, bytes.

Nothing here depends on a design beyond the lowest place that it adapts; what methods add, they declare
themselves. A FLOP count follows torch's FlopCounterMode: a product of m x n weights with a token is 2mn,
causal attention counts as full, and element-wise work as nothing. One sequence unless said otherwise.

Symbols: T tokens, B sequences, a = heads * head_dim, d the model's width, f the FFN's, s bytes a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from peftscape.spaces.sites import LINEARS, Site, SiteMap
from peftscape.spaces.words import nearest

Attention = Literal["eager", "fused"]

#: Bytes a weight. NF4 (arXiv:2305.14314, sec. 3): 4 bits and one float32 constant for 64 weights; double
#: quantisation keeps these constants in 8 bits with one float32 for 256 of them: 8/64 + 32/(64 * 256) bits.
#: bitsandbytes and its kin quantise the layers' linears alone; the rest stays in 16 bits. int8: one float32
#: constant a row, not counted.
WEIGHT_BYTES = {
    "float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0,
    "nf4": (4 + 32 / 64) / 8, "nf4-dq": (4 + 8 / 64 + 32 / (64 * 256)) / 8,
}  # fmt: skip

QKV = frozenset("qkv")

#: How far up a layer its adapted kinds lie: gradients need not flow below. Counted along the layer's order.
STAGES = {
    "q": 0, "k": 0, "v": 0, "kv": 0, "attention": 1, "o": 1, "gate": 2, "up": 2, "ffn": 3, "down": 3,
    "block": 4,
}  # fmt: skip

#: Tensors of the FFN's width that autograd keeps for an activation function: its input or output where torch
#: has a kernel; what each step of a formula in Python needs elsewhere (counted, transformers'
#: activations.py).
ACTIVATION_TENSORS = {
    "gelu_new": 4, "gelu_accurate": 4, "gelu_fast": 7, "gelu_python": 3, "gelu_10": 2, "quick_gelu": 2,
}  # fmt: skip


def parameters(sites: SiteMap) -> int:
    """All parameters of AutoModel's base model; exact (counted)."""
    return sites.parameters


def model_bytes(sites: SiteMap, dtype: str = "float32") -> int:
    """Bytes of the frozen weights held as `dtype`, one of `WEIGHT_BYTES`.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in WEIGHT_BYTES:
        raise ValueError(f'no precision "{dtype}"{nearest(dtype, WEIGHT_BYTES)}')
    width = WEIGHT_BYTES[dtype]
    quantised = sites.layers * sites.layer_products if width < 2 else 0
    return round(quantised * width + (sites.parameters - quantised) * max(width, 2.0))


def forward_flops(sites: SiteMap, tokens: int, *, batch: int = 1) -> int:
    """FLOPs of one sequence's forward: 2T a multiplied weight, and 4 T^2 a a layer for attention.

    2 a weight and token is arXiv:2001.08361, sec. 2.1; 4 T^2 a are two products with T x T scores (counted).
    A pooler counts where the head reads it. DeBERTa-v2 projects its relative positions once for `batch`
    sequences.
    """
    a = sites.heads * sites.head_dim
    layer = 2 * tokens * sites.layer_products + 4 * tokens**2 * a + _relative(sites, tokens, batch)
    return sites.layers * layer + 2 * tokens * sites.outer_products + 2 * _pooler(sites)


def backward_flops(
    sites: SiteMap,
    tokens: int,
    lowest_layer: int,
    *,
    kinds: Iterable[str] | None = None,
    batch: int = 1,
    full: bool = False,
    attention: Attention = "eager",
) -> int:
    """FLOPs of one sequence's backward through the frozen backbone: input gradients down to the lowest
    adapted site.

    A frozen linear costs 2mnT (its input's gradient; half of what a trained one does), attention 8 T^2 a:
    gradients of scores, values, queries and keys. A fused attention makes the scores again: 10 T^2 a
    (arXiv:2205.14135, alg. 4).

    Args:
        lowest_layer: the lowest adapted layer; -1 for the input or the embeddings, `sites.layers` for the
            head alone.
        kinds: what is adapted there; gradients stop at the lowest of them. None: they pass the whole layer.
        full: full fine-tuning, all weights' gradients too.
    """
    _check(sites, lowest_layer)
    a, through = sites.heads * sites.head_dim, 10 if _fused(sites, attention) else 8
    layer = 2 * tokens * sites.layer_products + through * tokens**2 * a
    if full:
        layer += 2 * tokens * sites.layer_products + 2 * _relative(sites, tokens, batch)
        return sites.layers * layer + 4 * tokens * sites.outer_products + 4 * _pooler(sites)
    if lowest_layer >= sites.layers:
        return 0
    # Queries and keys get gradients from the products with the table; the table itself trains only in full.
    layer += 2 * tokens * sites.relative.rows * a * sites.relative.terms if sites.relative else 0
    total = 2 * _pooler(sites) + (sites.layers - 1 - lowest_layer) * layer
    if lowest_layer < 0:
        return total + 2 * tokens * sites.outer_products
    stage, adapted = _stage(sites, kinds)
    if stage < 0:
        return total + layer
    above = {0: {"o", "gate", "up", "down"}, 1: {"gate", "up", "down"}, 2: {"down"}}.get(stage, set())
    total += 2 * tokens * sum(s.d_in * s.d_out for s in _linears(sites, lowest_layer) if s.kind in above)
    if stage == 0:
        total += tokens**2 * a * (through if _fused(sites, attention) else 2 * _attention_products(adapted))
    return total


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
    _check(sites, lowest_layer)
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
    stage, adapted = _stage(sites, kinds)
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

    Eager attention holds two tensors of scores at once (scores and their softmax, or their gradients); the
    FFN two of its width, three where it is gated.
    """
    scores = 2 * sites.heads * tokens * max(dtype_bytes, 4 if sites.norm_kind == "rmsnorm" else 0)
    scores = 4 * sites.d_model * dtype_bytes if _fused(sites, attention) else scores
    gated = any(s.kind == "gate" for s in sites.sites)
    ffn = (2 + gated) * sites.d_ff * dtype_bytes
    return batch * tokens * max(scores, ffn)


def _check(sites: SiteMap, lowest_layer: int) -> None:
    if not -1 <= lowest_layer <= sites.layers:
        raise ValueError(f"lowest_layer: {lowest_layer} of a backbone with layers 0 to {sites.layers - 1}")


def _pooler(sites: SiteMap) -> int:
    return sites.d_model**2 if sites.head is not None and sites.head.pooling == "pooler" else 0


def _relative(sites: SiteMap, tokens: int, batch: int) -> int:
    """One layer's products with the table of relative positions, and its projections (arXiv:2006.03654)."""
    if (of := sites.relative) is None:
        return 0
    a = sites.heads * sites.head_dim
    return 2 * of.rows * a * (tokens * of.terms + of.projections * sites.d_model // batch)


def _linears(sites: SiteMap, layer: int) -> list[Site]:
    return [s for s in sites.sites if s.layer == layer and s.kind in LINEARS]


def _stage(sites: SiteMap, kinds: Iterable[str] | None) -> tuple[int, frozenset[str]]:
    """Where in the lowest layer gradients stop, -1 at its input; and which of q, k, v they reach."""
    if kinds is None:
        return -1, frozenset()
    adapted, stages = frozenset(kinds), []
    for kind in adapted:
        if kind in ("bias", "norm"):
            # Pre-norm layers start with a norm; post-norm ones with q, k, v (biases), their first norm
            # follows o.
            stages.append(-1 if sites.norm_place == "pre" else 0 if kind == "bias" else 1)
        else:
            stages.append(STAGES.get(kind, -1))
    reached = adapted & QKV
    # Prefixes lie in one tensor with the keys and with the values; columns of a fused linear with the
    # others'.
    if "kv" in adapted:
        reached |= {"k", "v"}
    fused = reached and any(s.kind == "q" and s.span for s in sites.sites)
    return min(stages, default=-1), adapted | (QKV if fused or "bias" in adapted else reached)


def _attention_products(adapted: frozenset[str]) -> int:
    """Of the gradients of scores, queries, keys and values, those that the adapted ones of q, k, v need."""
    return bool(adapted & {"q", "k"}) + len(adapted & {"q", "k", "v"})


def _attention_bytes(
    sites: SiteMap, tokens: int, batch: int, width: int, attention: Attention, adapted: frozenset[str] = QKV
) -> int:
    """Bytes a token that one layer's attention keeps when gradients reach the `adapted` ones of q, k, v."""
    a = sites.heads * sites.head_dim
    if _fused(sites, attention):
        return (2 * a + 2 * sites.d_kv) * width + 4 * sites.heads  # q, output, k, v and the log-sum-exp
    scored = bool(adapted & {"q", "k"})
    # Queries are kept for the keys' gradient, keys for the queries', values for the scores'; grouped-query
    # attention repeats keys and values to the queries' width.
    kept = a * width * (("q" in adapted) + ("k" in adapted) + scored)
    # Models with RMSNorm take the softmax in float32 and keep it beside its copy in the activations'
    # precision, which is for the values; a softcap keeps its tanh.
    upcast = scored * 4 if sites.norm_kind == "rmsnorm" and width < 4 else 0
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
    kept = (2 * sites.d_model + sites.d_ff + (0 if _fused(sites, attention) else a)) * width
    if sites.norm_kind == "rmsnorm":  # a trained gain keeps what it scales (Gemma in float32)
        kept += sum(size for _, _, size in _norms(sites, 0)) * (4 if sites.family.startswith("gemma") else width)
    return kept


def _fused(sites: SiteMap, attention: Attention) -> bool:
    """A model that computes its own attention is eager whatever is asked."""
    return attention == "fused" and sites.attention_interface


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
