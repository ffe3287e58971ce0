"""What a design costs when it trains alone: the backbone's closed forms plus what each method declares.

Nothing is built and nothing runs: a search knows these before a trial starts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from peftscape.spaces.cost import backward_flops, forward_flops, model_bytes, working_bytes
from peftscape.spaces.file_size import file_bytes, head_shapes, stored_tensors
from peftscape.spaces.flow import STAGES, Attention, kinds_at
from peftscape.spaces.kept import kept
from peftscape.spaces.profiles import PROFILES, WIDTH
from peftscape.spaces.record import Costs

if TYPE_CHECKING:
    from peftscape.spaces.design import Design
    from peftscape.spaces.sites import SiteMap

# A trained value in float32 with its gradient and AdamW's two moments (reference: 16 bytes, arXiv:1910.02054).
TRAINED_BYTES = 16


def head_size(sites: SiteMap, outputs: int, head: Literal["class", "mean"]) -> int:
    """Trained parameters of the head.

    Raises:
        ValueError: if transformers has no classifier for the family and `head` asks for it.
    """
    return sum(math.prod(shape) for shape in head_shapes(sites, outputs, head).values())


def adapter_size(design: Design, sites: SiteMap) -> int:
    """Trained parameters of a design without its head; of a masked tensor those that the mask keeps."""
    total = 0
    for placement in design.placements:
        for _, _, _, tensor in placement.tensors(sites):
            if tensor.trains:
                mask = placement.mask if placement.maskable(tensor) else None
                total += mask.kept(tensor.size) if mask else tensor.size
    return total


def optimised_size(design: Design, sites: SiteMap) -> int:
    """Values with a gradient and moments: all of a masked tensor's, since its mask is applied to the gradient."""
    return sum(t.size for p in design.placements for _, _, _, t in p.tensors(sites) if t.trains)


def extra_flops(design: Design, sites: SiteMap, length: int) -> tuple[int, int, int]:
    """FLOPs of the methods' own products for one sequence: (forward, backward, forward that no merging saves).

    Backward, a product has two gradients, of its weight and of its input, but the input of the lowest adapted
    place needs none: there the first of a method's two products has one.
    """
    lowest = design.lowest_layer(sites)
    at_lowest = [s.kind for p in design.placements for s in p.where(sites) if s.layer == lowest]
    bottom = min((STAGES.get(kind, -1) for kind in at_lowest), default=-1)
    forward = backward = unmerged = 0
    for placement in design.placements:
        for site in placement.where(sites):
            flops = placement.flops(site, length)
            forward += flops
            unmerged += 0 if placement.merges else flops
            no_input = site.layer == lowest and STAGES.get(site.kind, -1) == bottom
            # Of the four gradients around a prefix, the queries' is the input's.
            no_input = no_input and not (site.kind == "kv" and "q" in at_lowest)
            fixed = placement.method.fixed_flops(site, length)
            if no_input and fixed:  # nothing before the second product has a gradient
                backward += flops - fixed
            else:
                backward += 2 * flops - fixed - (flops // 2 if no_input else 0)
    return forward, backward, unmerged


def train_flops(
    design: Design, sites: SiteMap, length: int, *, batch: int = 1, attention: Attention = "lanes"
) -> tuple[int, int]:
    """FLOPs of one sequence's (forward, backward), the head left out; `length` counts virtual tokens."""
    lowest = design.lowest_layer(sites)
    kinds = kinds_at(design, sites, lowest) or None
    forward, backward, _ = extra_flops(design, sites, length)
    forward += forward_flops(sites, length, batch=batch)
    backward += backward_flops(sites, length, lowest, kinds=kinds, batch=batch, full=design.full, attention=attention)
    return design.passes * forward, design.passes * backward


def head_flops(design: Design, sites: SiteMap, size: int) -> tuple[int, int]:
    """FLOPs of one example's head: (forward, forward and backward); frozen states below it need no gradient."""
    return 2 * size, (4 if design.lowest_layer(sites) >= sites.layers else 6) * size


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
    """All costs of a design alone, as peftscape trains it.

    Args:
        outputs: of the head.
        tokens: of a typical text; FLOPs are for one example of it, peak bytes for `batch` of them.
        dtype: of the frozen backbone and its activations; trained values are float32.
    """
    length = tokens + design.prompt_length()
    on_head, adapter = head_size(sites, outputs, head), adapter_size(design, sites)
    forward, backward = train_flops(design, sites, length)
    held = kept(design, sites, PROFILES["peftscape"], tokens=tokens, batch=batch, dtype=dtype)
    peak = (
        model_bytes(sites, dtype)
        + TRAINED_BYTES * (optimised_size(design, sites) + on_head)
        + held.total
        + working_bytes(sites, length, batch, WIDTH[dtype])
    )
    return Costs(
        adapter=adapter,
        head=on_head,
        trainable=adapter + on_head,
        train_flops=forward + backward + design.passes * head_flops(design, sites, on_head)[1],
        infer_flops=forward_flops(sites, length)
        + head_flops(design, sites, on_head)[0]
        + extra_flops(design, sites, length)[2],
        peak_bytes=peak,
        adapter_bytes=file_bytes(stored_tensors(design, sites, outputs, head)),
    )
