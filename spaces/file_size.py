"""How large an adapter's file is, to the byte: peftscape's own safetensors, header included.

A safetensors file is 8 bytes, a header of JSON padded with spaces to a multiple of 8, and the tensors end to end, those
of wider types first and names in order within a type (github.com/huggingface/safetensors, README and src/tensor.rs).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from peftscape.spaces.design import Design
    from peftscape.spaces.sites import SiteMap

WIDE, BITS = 4, 1


def stored_tensors(
    design: Design, sites: SiteMap, outputs: int, head: Literal["class", "mean"] | None
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """(bytes a number, shape) of each tensor that `peftscape.search.adapter_folder.save` writes, by name.

    Args:
        head: None where there is none (a language model's own stays as it is).

    Raises:
        ValueError: as `head_shapes`.
    """
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for i, placement in enumerate(design.placements):
        for key, _, _, tensor in placement.tensors(sites):
            if placement.maskable(tensor) and placement.mask:
                # Kept values, and one bit an entry for where they lie.
                found[f"{i}/{key}.kept"] = (WIDE, (placement.mask.kept(tensor.size),))
                found[f"{i}/{key}.mask"] = (BITS, (-(-tensor.size // 8),))
            else:
                found[f"{i}/{key}"] = (WIDE, tensor.shape)
    return found | {f"head/{name}": (WIDE, shape) for name, shape in head_shapes(sites, outputs, head).items()}


def head_shapes(sites: SiteMap, outputs: int, head: Literal["class", "mean"] | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's tensors.

    Raises:
        ValueError: if transformers has no classifier for the family and `head` asks for it.
    """
    if head is None:
        return {}
    if head == "mean":
        return {"weight": (outputs, sites.d_model), "bias": (outputs,)}
    if sites.head is None:
        raise ValueError(f'transformers has no sequence classifier for {sites.family}; use head = "mean"')
    return sites.head.tensors(outputs)


def file_bytes(tensors: dict[str, tuple[int, tuple[int, ...]]]) -> int:
    """Bytes of the safetensors file that holds these tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (width, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0], item[0])):
        start, end = end, end + width * math.prod(shape)
        header[name] = {
            "dtype": "F32" if width == WIDE else "U8",
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
