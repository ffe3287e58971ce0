"""How large an adapter's file is, to the byte: peftscape's own safetensors, header included.

A safetensors file is 8 bytes, a header of JSON padded with spaces to a multiple of 8, and the tensors end to end, those
of wider types first and names in order within a type (github.com/huggingface/safetensors, README and src/tensor.rs).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Literal

from peftscape.spaces.heads import HeadKind, token_shapes

if TYPE_CHECKING:
    from peftscape.spaces.design import Design, Placement
    from peftscape.spaces.methods.base import Tensor
    from peftscape.spaces.sites import SiteMap

#: How wide an entry is; within a width safetensors orders types as they stand here.
WIDTHS = {"F32": 4, "I32": 4, "U8": 1}
Form = Literal["dense", "integer", "binary", "masked", "indexed"]
Stored = dict[str, tuple[str, tuple[int, ...]]]


def form(placement: Placement, tensor: Tensor) -> Form:
    """How a tensor lies in the file: as it is, as bits, or as its kept values and where they are.

    Where they are is one bit an entry (`masked`), or 32 bits a kept value where those are fewer (`indexed`).
    """
    if tensor.integer:
        return "integer"
    if tensor.binary:
        return "binary"
    kept = kept_entries(placement, tensor)
    if kept is None:
        return "dense"
    return "indexed" if 32 * kept < tensor.size else "masked"


def kept_entries(placement: Placement, tensor: Tensor) -> int | None:
    """How many entries of a tensor are not zero when it is trained; None for all."""
    if placement.mask is not None and placement.maskable(tensor):
        return placement.mask.kept(tensor.size)
    return tensor.kept


def stored_tensors(design: Design, sites: SiteMap, outputs: int, head: HeadKind | None) -> Stored:
    """(type, shape) of each tensor that `peftscape.search.adapter_folder.save` writes, by name.

    Args:
        head: None where there is none; a language model's own (`lm`) stays as it is.

    Raises:
        ValueError: as `head_shapes`.
    """
    found: Stored = {}
    for i, placement in enumerate(design.placements):
        for key, _, _, tensor in placement.tensors(sites):
            if tensor.stored:
                found |= {f"{i}/{key}{end}": what for end, what in _parts(placement, tensor).items()}
    return found | {f"head/{name}": ("F32", shape) for name, shape in head_shapes(sites, outputs, head).items()}


def _parts(placement: Placement, tensor: Tensor) -> Stored:
    how = form(placement, tensor)
    bits: tuple[str, tuple[int, ...]] = ("U8", (-(-tensor.size // 8),))
    if how == "integer":
        return {"": ("I32", tensor.shape)}
    if how == "binary":
        return {".bits": bits}
    kept = kept_entries(placement, tensor)
    if kept is None:
        return {"": ("F32", tensor.shape)}
    return {".kept": ("F32", (kept,))} | ({".index": ("I32", (kept,))} if how == "indexed" else {".mask": bits})


def head_shapes(sites: SiteMap, outputs: int, head: HeadKind | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's tensors.

    Raises:
        ValueError: if the family has no such head: transformers no classifier, an encoder-decoder none for words.
    """
    if head is None or head == "lm":
        return {}
    if head == "token":
        return token_shapes(sites, outputs)
    if head == "mean":
        return {"weight": (outputs, sites.d_model), "bias": (outputs,)}
    if sites.head is None:
        raise ValueError(f'transformers has no sequence classifier for {sites.family}; use head = "mean"')
    return sites.head.tensors(outputs)


def file_bytes(tensors: Stored) -> int:
    """Bytes of the safetensors file that holds these tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = list(WIDTHS)
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        start, end = end, end + WIDTHS[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
