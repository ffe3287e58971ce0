"""The frozen model: loaded from a folder or a hub id, its sites mapped, its attention taken through our function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftscape.search import attention
from peftscape.search.attention import Attending
from peftscape.spaces.sites import Site, SiteMap, site_map
from peftscape.spaces.words import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Backbone:
    """A frozen pretrained transformer without a task head.

    Args:
        model: transformers' base model, frozen, without dropout.
        sites: where it can be adapted.
        tokenizer: None for models made from a configuration.
        source: the folder or hub id it came from.
        missing: weights that the checkpoint has not, made up at random by transformers.
    """

    model: nn.Module
    config: Any
    sites: SiteMap
    tokenizer: Any = None
    source: str = ""
    missing: frozenset[str] = frozenset()
    attending: Attending = field(default_factory=Attending)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.attending.causal = self.sites.causal
        if self.sites.attention_interface:
            self._take_attention()

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and of the computation."""
        return next(self.model.parameters()).dtype

    @property
    def master_dtype(self) -> torch.dtype:
        """Of trained tensors and optimiser state."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding."""
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        assert isinstance(table, nn.Embedding)
        return table

    def pooler(self, states: Tensor) -> Tensor:
        """The frozen pooler of BERT-like models on rows x 1 x d_model, in the backbone's precision."""
        pooled: Tensor = self.model.pooler(states.to(self.dtype))  # type: ignore[operator]
        return pooled.to(states.dtype)

    def frozen(self, site: Site) -> dict[str, Any]:
        """The frozen `weight` (d_out x d_in; a norm's gain) and `bias` (or None) of a linear or a norm.

        A norm has `normalise` too, its input normalised, before gain and bias, and `norm`, all of it. A module that is
        no linear and no norm has nothing.
        """
        module: Any = self.model.get_submodule(site.path)
        if not hasattr(module, "weight"):
            return {}
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        if site.transposed:
            weight = weight.T
        if site.span is not None:
            weight, bias = weight[slice(*site.span)], None if bias is None else bias[slice(*site.span)]
        found: dict[str, Any] = {"weight": weight, "bias": None if bias is None else bias.detach()}
        return found | ({"normalise": normaliser(module), "norm": module.forward} if site.kind == "norm" else {})

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
        overrides: dict[str, Any] | None = None,
    ) -> Backbone:
        """Load a local folder or a hub id with transformers; safetensors only.

        Raises:
            InputError: if there is nothing to load, or the model's sites cannot be mapped.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()

        source = str(source)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model, loading = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=DTYPES[resolve_dtype(dtype)],
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(source, [f"transformers cannot load it: {first}"]) from error
        sites = site_map(config.to_dict(), overrides)
        missing = frozenset(loading["missing_keys"])
        if lost := sorted(name for name in missing if not name.startswith("pooler.")):
            raise InputError(source, [f"the checkpoint lacks weights of {type(model).__name__}: {', '.join(lost[:5])}"])
        return cls(model.to(device), config, sites, tokenizer, source, missing)

    @classmethod
    def from_config(cls, config: Any, *, dtype: str = "float32", seed: int = 0) -> Backbone:
        """A backbone with random weights, for tests and benchmarks."""
        from transformers import AutoModel

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModel.from_config(config).to(DTYPES[dtype])
        return cls(model, config, site_map(config.to_dict()))

    def clone(self) -> Backbone:
        """The same frozen weights in modules of their own, for a second cohort beside a first."""
        import copy

        model = copy.deepcopy(self.model)
        return Backbone(model, model.config, self.sites, self.tokenizer, self.source, self.missing)

    def _take_attention(self) -> None:
        attention.register()
        self.config._attn_implementation = attention.NAME
        for site in self.sites.sites:
            if site.kind == "kv":
                module = self.model.get_submodule(site.path)
                module.peftscape_attending = self.attending  # type: ignore[assignment]
                module.peftscape_layer = site.layer  # type: ignore[assignment]
        # Each model object has a configuration of its own: the one the modules read is set through the model.
        self.model.set_attn_implementation(attention.NAME)  # type: ignore[operator]


def normaliser(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm without its gain and bias, in float32 or wider as transformers' are."""
    epsilon = float(next(getattr(norm, name) for name in ("eps", "variance_epsilon", "epsilon") if hasattr(norm, name)))
    centred = isinstance(norm, nn.LayerNorm)

    def run(x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if centred:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)

    return run


def resolve_dtype(dtype: str) -> str:
    """`auto` is bfloat16 where the processor multiplies it in hardware, float32 elsewhere."""
    if dtype not in (*DTYPES, "auto"):
        raise InputError("dtype", [f'no dtype "{dtype}". There are: auto, {", ".join(DTYPES)}'])
    if dtype != "auto":
        return dtype
    return "bfloat16" if has_bfloat16() else "float32"


def has_bfloat16() -> bool:
    """Whether bfloat16 products run in hardware here (without, they are several times slower than float32)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    flags = Path("/proc/cpuinfo")
    words = flags.read_text().split() if flags.is_file() else []
    return "avx512_bf16" in words or "amx_bf16" in words or "bf16" in words
