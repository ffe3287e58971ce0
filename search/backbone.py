"""The frozen model: loaded from a folder or a hub id, its sites mapped, its attention taken through our function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from peftscape.search import attention, quantised
from peftscape.search.attention import Attending
from peftscape.search.quantised import QUANTISED
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
        quantised: how its layers' linears are held, `nf4` or `nf4-dq`; empty where they are numbers.
    """

    model: nn.Module
    config: Any
    sites: SiteMap
    tokenizer: Any = None
    source: str = ""
    missing: frozenset[str] = frozenset()
    quantised: str = ""
    attending: Attending = field(default_factory=Attending)

    def __post_init__(self) -> None:
        self._restored: WeakValueDictionary[Site, Tensor] = WeakValueDictionary()
        self.model.eval().requires_grad_(False)
        self.attending.causal = self.sites.causal
        if self.sites.attention_interface:
            self._take_attention()

    @cached_property  # asked for at each place of each lane, and a model's parameters are found by walking its modules
    def dtype(self) -> torch.dtype:
        """Of the computation, and of the frozen weights where they are not quantised."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def precision(self) -> str:
        """How the frozen weights are held: `nf4`, `nf4-dq` or the name of their dtype."""
        return self.quantised or self.computation

    @property
    def computation(self) -> str:
        """The name of the computation's dtype."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def master_dtype(self) -> torch.dtype:
        """Of trained tensors and optimiser state."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
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

        A norm has `normalise` too, its input normalised, before gain and bias, and `norm`, all of it. A ladder has
        `linear`, which gives the weight of a layer's linear by its kind, and `queries`, the heads and the key heads. A
        linear in 4 bits has `residual`, which gives what its rounding lost. What is none of these has nothing.
        """
        if site.kind == "ladder":
            return {"linear": self.linear, "queries": (self.sites.heads, self.sites.kv_heads)}
        module: Any = self.model.get_submodule(site.path)
        if not hasattr(module, "weight"):
            return {}
        weight, bias = self._weight(module, site), getattr(module, "bias", None)
        if site.span is not None and bias is not None:
            bias = bias[slice(*site.span)]
        found: dict[str, Any] = {"weight": weight, "bias": None if bias is None else bias.detach()}
        if quantised.is_packed(module):
            found["residual"] = lambda: quantised.written(self.source, self.sites, site).to(weight) - weight
        return found | ({"normalise": normaliser(module), "norm": module.forward} if site.kind == "norm" else {})

    def _weight(self, module: Any, site: Site) -> Tensor:
        """d_out x d_in. One that was restored from 4 bits is the same for all who hold it."""
        if site in self._restored:
            return self._restored[site]
        weight = quantised.held(module)
        assert weight is not None
        packed = quantised.is_packed(module)
        weight = weight.detach().T if site.transposed and not packed else weight.detach()
        weight = weight if site.span is None else weight[slice(*site.span)]
        if packed:
            self._restored[site] = weight
        return weight

    def linear(self, layer: int, kind: str) -> Tensor:
        """The frozen weight of a layer's linear, d_out x d_in."""
        [site] = [s for s in self.sites.sites if s.layer == layer and s.kind == kind]
        weight: Tensor = self.frozen(site)["weight"]
        return weight

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
            sites = replace(site_map(config.to_dict(), overrides), quantised=dtype in QUANTISED)
            if sites.quantised:
                compute = DTYPES[resolve_dtype("auto")]
                model, loading = quantised.load(source, config, sites, dtype, compute, device, trust_remote_code)
            else:
                model, loading = AutoModel.from_pretrained(
                    source,
                    config=config,
                    dtype=DTYPES[resolve_dtype(dtype)],
                    trust_remote_code=trust_remote_code,
                    use_safetensors=True,
                    output_loading_info=True,
                )
                model = model.to(device)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(source, [f"transformers cannot load it: {first}"]) from error
        missing = frozenset(loading["missing_keys"])
        if lost := sorted(name for name in missing if not name.startswith("pooler.")):
            raise InputError(source, [f"the checkpoint lacks weights of {type(model).__name__}: {', '.join(lost[:5])}"])
        held = dtype if sites.quantised else ""
        return cls(model, config, sites, tokenizer, source, missing, held)

    @classmethod
    def from_config(cls, config: Any, *, dtype: str = "float32", seed: int = 0) -> Backbone:
        """A backbone with random weights, for tests and benchmarks."""
        from transformers import AutoModel

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModel.from_config(config).to(DTYPES[dtype])
        return cls(model, config, site_map(config.to_dict()))

    def _take_attention(self) -> None:
        attention.register()
        self.config._attn_implementation = attention.NAME
        for site in self.sites.sites:
            if site.kind == "kv":
                module = self.model.get_submodule(site.path)
                module.peftscape_attending = self.attending  # type: ignore[assignment]
                module.peftscape_site = site  # type: ignore[assignment]
                if getattr(module, "has_relative_attention_bias", False):
                    self.attending.relative[site.stack] = module
        # transformers would look into every input whether it begins or ends with padding, which waits for the device,
        # and say that a mask is missing, which packed texts do not need.
        self.model.warn_if_padding_and_no_attention_mask = _looks_at_nothing  # type: ignore[assignment]
        # Each model object has a configuration of its own: the one the modules read is set through the model.
        self.model.set_attn_implementation(attention.NAME)  # type: ignore[operator]


def _looks_at_nothing(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """In the place of transformers' look for padding."""


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
        raise InputError("dtype", [f'no dtype "{dtype}". There are: auto, {", ".join((*DTYPES, *QUANTISED))}'])
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
