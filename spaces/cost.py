"""What the frozen backbone costs, in closed form: parameters, FLOPs, bytes.

Nothing here depends on a design beyond the lowest place that it adapts; what methods add, they declare
themselves. A FLOP count follows torch's FlopCounterMode: a product of m x n weights with a token is 2mn,
causal attention counts as full, and element-wise work as nothing. One sequence unless said otherwise.

Symbols: T tokens, B sequences, a = heads * head_dim, d the model's width, f the FFN's, s bytes a number.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftscape.spaces.activations import ACTIVATION_TENSORS as ACTIVATION_TENSORS
from peftscape.spaces.activations import activation_bytes as activation_bytes
from peftscape.spaces.activations import working_bytes as working_bytes
from peftscape.spaces.flow import Attention, attention_products, check_layer, is_fused, stage_of
from peftscape.spaces.sites import LINEARS, Site, SiteMap
from peftscape.spaces.words import nearest

#: Bytes a weight. NF4 (arXiv:2305.14314, sec. 3): 4 bits and one float32 constant for 64 weights; double
#: quantisation keeps these constants in 8 bits with one float32 for 256 of them: 8/64 + 32/(64 * 256) bits.
#: bitsandbytes and its kin quantise the layers' linears alone; the rest stays in 16 bits. int8: one float32
#: constant a row, not counted.
WEIGHT_BYTES = {
    "float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0,
    "nf4": (4 + 32 / 64) / 8, "nf4-dq": (4 + 8 / 64 + 32 / (64 * 256)) / 8,
}  # fmt: skip
#: Those that hold the layers' linears alone; all else is as wide as the computation.
QUANTISED = ("int8", "nf4", "nf4-dq")


def parameters(sites: SiteMap) -> int:
    """All parameters of AutoModel's base model; exact (counted)."""
    return sites.parameters


def model_bytes(sites: SiteMap, dtype: str = "float32", compute: str | None = None) -> int:
    """Bytes of the frozen weights held as `dtype`, one of `WEIGHT_BYTES`.

    Args:
        compute: precision of the computation with quantised weights, which all others are held in; None: 16 bits.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in WEIGHT_BYTES:
        raise ValueError(f'no precision "{dtype}"{nearest(dtype, WEIGHT_BYTES)}')
    width = WEIGHT_BYTES[dtype]
    if dtype not in QUANTISED:
        return round(sites.parameters * width)
    quantised = sites.layers * sites.layer_products
    return round(quantised * width + (sites.parameters - quantised) * WEIGHT_BYTES[compute or "bfloat16"])


def restored_bytes(sites: SiteMap, dtype: str, width: int) -> int:
    """Bytes of the largest quantised linear, which is restored whole for its product; 0 where none is quantised."""
    if dtype not in QUANTISED:
        return 0
    return width * max(s.d_in * s.d_out for s in sites.sites if s.kind in ("up", "down", "o"))


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
    check_layer(sites, lowest_layer)
    a, through = sites.heads * sites.head_dim, 10 if is_fused(sites, attention) else 8
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
    stage, adapted = stage_of(sites, kinds)
    if stage < 0:
        return total + layer
    above = {0: {"o", "gate", "up", "down"}, 1: {"gate", "up", "down"}, 2: {"down"}}.get(stage, set())
    total += 2 * tokens * sum(s.d_in * s.d_out for s in _linears(sites, lowest_layer) if s.kind in above)
    if stage == 0:
        total += tokens**2 * a * (through if is_fused(sites, attention) else 2 * attention_products(adapted))
    return total


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
