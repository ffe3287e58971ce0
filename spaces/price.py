"""What a design costs when it trains alone: the backbone's closed forms plus what each method declares.

Nothing is built and nothing runs: a search knows these before a trial starts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftscape.spaces.cost import backward_flops, forward_flops, model_bytes, restored_bytes, working_bytes
from peftscape.spaces.file_size import file_bytes, head_shapes, stored_tensors
from peftscape.spaces.flow import STAGES, Attention, kinds_at
from peftscape.spaces.heads import HeadKind
from peftscape.spaces.kept import kept
from peftscape.spaces.profiles import PROFILES, WIDTH
from peftscape.spaces.record import Costs
from peftscape.spaces.sites import LINEARS
from peftscape.spaces.two_stacks import Walk, is_two_stacks, tokens_at

if TYPE_CHECKING:
    from peftscape.spaces.design import Design
    from peftscape.spaces.sites import SiteMap

# A trained value in float32 with its gradient and AdamW's two moments (reference: 16 bytes, arXiv:1910.02054).
TRAINED_BYTES = 16
# Logits of a chunk of tokens, of which a language model's loss is computed: with 50,000 words 335 tokens. Each is held
# as it comes, in float32, and with its gradient.
LM_CHUNK, LM_CHUNK_BYTES = 1 << 24, 12


def head_size(sites: SiteMap, outputs: int, head: HeadKind) -> int:
    """Trained parameters of the head.

    Raises:
        ValueError: as `head_shapes`.
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
                backward += 2 * flops - fixed - (placement.first_flops(site, length) if no_input else 0)
    return forward, backward, unmerged


def train_flops(
    design: Design, sites: SiteMap, length: int, *, batch: int = 1, attention: Attention = "lanes",
    target: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """FLOPs of one sequence's (forward, backward), the head left out; `length` counts virtual tokens.

    Args:
        target: tokens of an encoder-decoder's target; None for as many.
    """
    if is_two_stacks(sites):
        forward, backward = _of_two_stacks(design, sites, length, target or length, attention)
        return design.passes * forward, design.passes * backward
    lowest = design.lowest_layer(sites)
    kinds = kinds_at(design, sites, lowest) or None
    forward, backward, _ = extra_flops(design, sites, length)
    forward += forward_flops(sites, length, batch=batch)
    backward += backward_flops(sites, length, lowest, kinds=kinds, batch=batch, full=design.full, attention=attention)
    backward += _through_lowest(design, sites, length)
    return design.passes * forward, design.passes * backward


def _through_lowest(design: Design, sites: SiteMap, length: int) -> int:
    """FLOPs of gradients through the lowest adapted linears, which what changes their input needs; whole fused ones."""
    lowest = design.lowest_layer(sites)
    places = [(p, s) for p in design.placements for s in p.where(sites) if s.layer == lowest]
    bottom = min((STAGES.get(s.kind, -1) for _, s in places), default=-1)
    paths = {s.path for p, s in places if STAGES.get(s.kind, -1) == bottom >= 0 and p.method.side(s) != "output"}
    return sum(2 * length * s.d_in * s.d_out for s in sites.sites if s.kind in LINEARS and s.path in paths)


def _of_two_stacks(design: Design, sites: SiteMap, source: int, target: int, attention: Attention) -> tuple[int, int]:
    """`train_flops` of an encoder-decoder."""
    walk = Walk(design, sites, source, target, 4, fused=attention not in ("eager", "lanes"))
    forward, backward = walk.forward, walk.backward
    for placement in design.placements:
        for site in placement.where(sites):
            flops = placement.flops(site, tokens_at(site, source, target))
            fixed = placement.method.fixed_flops(site, tokens_at(site, source, target))
            needed = walk.has_input_gradient(site, placement.keeps(site))
            forward += flops
            if fixed and not needed:
                backward += flops - fixed
            else:
                first = placement.first_flops(site, tokens_at(site, source, target))
                backward += 2 * flops - fixed - (0 if needed else first)
    return forward, backward


def infer_flops(design: Design, sites: SiteMap, length: int, *, target: int | None = None) -> int:
    """FLOPs of one sequence's forward, the head left out, with what merges merged; arguments as `train_flops`."""
    if not is_two_stacks(sites):
        return forward_flops(sites, length) + extra_flops(design, sites, length)[2]
    target = target or length
    beside = [(p, site) for p in design.placements if not p.merges for site in p.where(sites)]
    walk = Walk(design, sites, length, target, 4)
    return walk.forward + sum(p.flops(site, tokens_at(site, length, target)) for p, site in beside)


def head_flops(design: Design, sites: SiteMap, size: int, *, read: int = 1) -> tuple[int, int]:
    """FLOPs of one example's head: (forward, forward and backward); frozen states below it need no gradient.

    Args:
        read: tokens that it reads: one, or all where each is labelled.
    """
    trained = any(True for p in design.placements for _ in p.tensors(sites))
    return 2 * size * read, (6 if trained else 4) * size * read


def head_bytes(sites: SiteMap, tokens: int, outputs: int) -> int:
    """Bytes that labelling every token keeps: the states in float32, and logits as they come and with two gradients."""
    return 4 * tokens * (sites.d_model + 3 * outputs)


def costs(
    design: Design,
    sites: SiteMap,
    *,
    outputs: int,
    tokens: int,
    batch: int,
    head: HeadKind = "class",
    dtype: str = "float32",
    compute: str | None = None,
    target: int | None = None,
    checkpointing: bool = False,
) -> Costs:
    """All costs of a design alone, as peftscape trains it.

    Args:
        outputs: of the head. A language model's own (`lm`) has no parameters, and predicts every token; `token`
            labels every token.
        tokens: of a typical text; FLOPs are for one example of it, peak bytes for `batch` of them.
        checkpointing: layers keep their input alone and run again in the backward; FLOPs are those without.
        dtype: of the frozen backbone and its activations; trained values are float32.
        compute: of the activations on a quantised backbone; None for bfloat16.
        target: tokens of an encoder-decoder's target; None for as many.
    """
    target = target or tokens
    length = tokens + design.prompt_length()
    on_head, adapter = head_size(sites, outputs, head), adapter_size(design, sites)
    forward, backward = train_flops(design, sites, length, target=target)
    held = kept(
        design, sites, PROFILES["peftscape"], tokens=tokens, batch=batch, dtype=dtype, compute=compute, target=target,
        checkpointing=checkpointing,
    )  # fmt: skip
    words = 2 * target * sites.d_model * sites.vocab if head == "lm" else 0
    on_tokens = head_flops(design, sites, on_head, read=length if head == "token" else 1)
    states = TRAINED_BYTES * (optimised_size(design, sites) + on_head)
    width = WIDTH[compute or dtype]
    working = max(
        held.beyond(working_bytes(sites, length, batch, width) + restored_bytes(sites, dtype, width)),
        LM_CHUNK_BYTES * min(LM_CHUNK, batch * target * sites.vocab) if words else 0,
    )
    height = held.total + working + (head_bytes(sites, batch * length, outputs) if head == "token" else 0)
    if design.full:  # its gradients come as what was kept goes
        height = max(height - states // 4, 0)
    peak = model_bytes(sites, dtype, compute) + states + height
    return Costs(
        adapter=adapter,
        head=on_head,
        trainable=adapter + on_head,
        train_flops=forward + backward + design.passes * (on_tokens[1] + 2 * words),
        infer_flops=infer_flops(design, sites, length, target=target) + words + on_tokens[0],
        peak_bytes=peak,
        adapter_bytes=file_bytes(stored_tensors(design, sites, outputs, head)),
    )
