"""Backbones whose linears are held in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), through bitsandbytes.

Every linear of the layers holds NF4 codes; embeddings, norms, biases and what lies outside the layers stay as they are.
A product restores its weight in the precision of the computation.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftscape.spaces.sites import Site, SiteMap
from peftscape.spaces.words import InputError

#: As the command line names them; the second keeps the blocks' constants in 8 bits ("double quantisation").
QUANTISED = ("nf4", "nf4-dq")


def load(source: str, config: Any, sites: SiteMap, name: str, compute: torch.dtype, device: str, trust: bool) -> Any:
    """transformers' base model with its layers' linears in 4 bits, and what it says of the loading.

    Args:
        name: one of `QUANTISED`.
        compute: of activations and products.

    Raises:
        InputError: bitsandbytes is not there, or does not restore such weights on this processor.
    """
    from transformers import AutoModel, BitsAndBytesConfig

    _library()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=name == "nf4-dq",
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=_outside(config, sites, trust),
    )
    model, loading = AutoModel.from_pretrained(
        source,
        config=copy.deepcopy(config),  # which gets the settings, that no head of ours should have
        quantization_config=settings,
        device_map=device,
        dtype=compute,
        trust_remote_code=trust,
        use_safetensors=True,
        output_loading_info=True,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # With it, a pass without gradients packs codes anew, in an order that neither the backward nor
            # `dequantize_4bit` reads.
            module.support_avx512bf16_for_cpu = False
    widths = {module.weight.quant_state.shape[1] for module in model.modules() if is_packed(module)}
    if wrong := [width for width in sorted(widths) if device == "cpu" and not _restores(width)]:
        said = ", ".join(map(str, wrong))
        why = f"bitsandbytes restores 4-bit linears of {said} inputs wrongly on this processor, unlike multiples of 64"
        raise InputError(source, [why])
    return model, loading


def held(module: Any) -> Tensor | None:
    """A module's weight in numbers; of a linear in 4 bits it is made anew, out x in."""
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None or not is_packed(module):
        return weight
    restored: Tensor = _library().functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return restored


def is_packed(module: Any) -> bool:
    """Whether a module's weight is held in 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def written(source: str, sites: SiteMap, site: Site) -> Tensor:
    """A linear's weight as the checkpoint has it, d_out x d_in in float32.

    Raises:
        InputError: the checkpoint has no tensor of its name.
    """
    from safetensors import safe_open

    wanted = (f"{site.path}.weight", f"{sites.prefix}.{site.path}.weight")
    for path in _files(source, wanted):
        with safe_open(path, framework="pt") as file:
            for name in {*wanted} & set(file.keys()):
                weight: Tensor = file.get_tensor(name).float()
                weight = weight.T if site.transposed else weight
                return weight if site.span is None else weight[slice(*site.span)]
    raise InputError(source, [f"LoftQ: its safetensors have no {wanted[0]}, whose rounding it would make up for"])


def _library() -> Any:
    with warnings.catch_warnings():
        # Its import makes a scripted class, which torch deprecates.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=DeprecationWarning)
        try:
            import bitsandbytes
        except ImportError as error:
            hint = 'a 4-bit backbone needs bitsandbytes: pip install "peftscape[quant]"'
            raise InputError("dtype", [hint]) from error
    return bitsandbytes


def _restores(width: int) -> bool:
    """Whether rows of this width come back as they do in one long row: 0.50's AVX-512 code ends blocks with the row."""
    functional = _library().functional
    codes, state = functional.quantize_4bit(torch.arange(64.0 * width).view(64, width), quant_type="nf4", blocksize=64)
    rows = functional.dequantize_4bit(codes, state)
    state.shape = torch.Size([1, 64 * width])
    return torch.equal(rows.flatten(), functional.dequantize_4bit(codes, state).flatten())


def _outside(config: Any, sites: SiteMap, trust: bool) -> list[str]:
    """The linears that lie in no layer."""
    from transformers import AutoModel

    blocks = tuple(f"{site.path}." for site in sites.sites if site.kind == "block")
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config, trust_remote_code=trust)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if not name.startswith(blocks)]


def _files(source: str, wanted: tuple[str, ...]) -> list[str]:
    """The checkpoint's files that may hold one of these tensors."""
    from transformers.utils import cached_file

    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(source, "model.safetensors.index.json", **missing)
    if index is None:
        whole = cached_file(source, "model.safetensors", **missing)
        return [] if whole is None else [whole]
    shards: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
    return [str(Path(index).parent / shards[name]) for name in wanted if name in shards]
