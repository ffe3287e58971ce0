"""What a design costs when it trains alone: the backbone's closed forms plus what each method declares.

Nothing is built and nothing runs: a search knows these before a trial starts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from peftscape.spaces.cost import activation_bytes, backward_flops, forward_flops, model_bytes, working_bytes
from peftscape.spaces.record import Costs

if TYPE_CHECKING:
    from peftscape.spaces.design import Design
    from peftscape.spaces.sites import SiteMap

# A trained value in float32 with its gradient and AdamW's two moments (reference: 16 bytes, arXiv:1910.02054).
TRAINED_BYTES = 16
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


def head_size(sites: SiteMap, outputs: int, head: Literal["class", "mean"]) -> int:
    """Trained parameters of the head.

    Raises:
        ValueError: if transformers has no classifier for the family and `head` asks for it.
    """
    if head == "mean":
        return outputs * (sites.d_model + 1)
    if sites.head is None:
        raise ValueError(f'transformers has no sequence classifier for {sites.family}; use head = "mean"')
    return sum(math.prod(shape) for shape in sites.head.tensors(outputs).values())


def adapter_size(design: Design, sites: SiteMap) -> int:
    """Trained parameters of a design without its head; of a masked tensor those that the mask keeps."""
    total = 0
    for placement in design.placements:
        for _, _, _, tensor in placement.tensors(sites):
            if tensor.trains:
                mask = placement.mask if placement.maskable(tensor) else None
                total += mask.kept(tensor.size) if mask else tensor.size
    return total


def costs(
    design: Design,
    sites: SiteMap,
    *,
    outputs: int,
    tokens: int,
    batch: int,
    head: Literal["class", "mean"] = "class",
    dtype: str = "float32",
) -> Costs:
    """All costs of a design alone.

    Args:
        outputs: of the head.
        tokens: of a typical text; FLOPs are for one example of it, peak bytes for `batch` of them.
        dtype: of the frozen backbone and its activations; trained values are float32.
    """
    length = tokens + design.prompt_length()
    lowest = design.lowest_layer(sites)
    full = design.solo
    at_lowest = {s.kind for p in design.placements for s in p.where(sites) if s.layer == lowest}
    kinds = at_lowest or None
    extra_train = extra_infer = saved = optimised = stored = 0
    for placement in design.placements:
        flops = sum(placement.method.flops(site, length) for site in placement.where(sites))
        # Backward, a product has two gradients: for its input and for its weight.
        extra_train += 3 * flops
        extra_infer += 0 if placement.method.merges else flops
        saved += sum(placement.method.saved_floats(site, length) for site in placement.where(sites))
        for _, _, _, tensor in placement.tensors(sites):
            optimised += tensor.size if tensor.trains else 0
            if tensor.stored and placement.maskable(tensor) and placement.mask:
                stored += 4 * placement.mask.kept(tensor.size) + math.ceil(tensor.size / 8)
            else:
                stored += 4 * tensor.size if tensor.stored else 0
    on_head = head_size(sites, outputs, head)
    adapter = adapter_size(design, sites)
    width = DTYPE_BYTES[dtype]
    forward = forward_flops(sites, length) + 2 * on_head
    backward = backward_flops(sites, length, lowest, kinds=kinds, full=full) + 4 * on_head
    peak = (
        model_bytes(sites, dtype)
        + TRAINED_BYTES * (optimised + on_head)
        + activation_bytes(sites, length, batch, lowest, width, kinds=kinds, full=full)
        + working_bytes(sites, length, batch, width)
        + batch * saved * width
    )
    return Costs(
        adapter=adapter,
        head=on_head,
        trainable=adapter + on_head,
        train_flops=forward + backward + extra_train,
        infer_flops=forward + extra_infer,
        peak_bytes=peak,
        adapter_bytes=stored + 4 * on_head,
    )
