"""What a configuration says about a model's modules, and the site map that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftscape.spaces.sites import LINEARS, Head, Relative, Site, SiteMap


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer; `kinds` are the sites on it with the columns they own: q, k and v for a fused one."""

    path: str
    d_in: int
    d_out: int
    bias: bool
    kinds: tuple[tuple[str, int, int], ...] = ()
    transposed: bool = False

    @property
    def size(self) -> int:
        return self.d_in * self.d_out + self.bias * self.d_out


@dataclass(frozen=True, slots=True)
class Norm:
    """A LayerNorm or RMSNorm."""

    path: str
    size: int
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The modules of a backbone whose layers are alike.

    Args:
        layer: a layer's path with {layer}; the paths in `linears`, `norms`, `kv`, `attention` and `ffn` go
            on from it.
        attention, ffn: (path whose output is y, path whose first input is x) of the sub-layers.
        outer_linears, outer_norms: outside the layers and on every token, with whole paths.
        parameters: all of the base model; None where layers, outer modules and `loose` parameters add up to
            them.
        sizes: the remaining fields of the site map.
    """

    layer: str
    layers: int
    d_model: int
    embedding_width: int
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    attention: tuple[str, str] | None
    ffn: tuple[str, str] | None
    kv: str
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    outer_linears: tuple[Linear, ...] = ()
    outer_norms: tuple[Norm, ...] = ()
    loose: int = 0
    layer_loose: int = 0
    layer_products: int | None = None
    outer_products: int | None = None
    parameters: int | None = None
    relative: Relative | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    head: Head | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)


def linear(kind: str, path: str, d_in: int, d_out: int, bias: bool) -> Linear:
    """A linear that is one site."""
    return Linear(path, d_in, d_out, bias, ((kind, 0, d_out),) if kind else ())


def assemble(of: Layout) -> SiteMap:
    """The site map of a layout; a kind without any site is refused, with a reason."""
    stack = "decoder" if of.causal else "encoder"
    inner = sum(m.size for m in of.linears) + sum(n.size * (1 + n.bias) for n in of.norms) + of.layer_loose
    outer = sum(m.size for m in of.outer_linears) + sum(n.size * (1 + n.bias) for n in of.outer_norms)
    parameters = of.layers * inner + outer + of.loose if of.parameters is None else of.parameters
    sites = [Site("input", -1, "", of.embedding_width, of.embedding_width, stack)]
    sites += _small(of.outer_linears, of.outer_norms, -1, "", stack)
    for layer in range(of.layers):
        sites += _layer(of, layer, stack)
    sites.append(Site("model", -1, "", 0, parameters, stack))

    refused = dict(of.refused)
    sites = [s for s in sites if s.kind not in refused]
    missing = {k: f"this model has no {k} linear" for k in LINEARS}
    missing |= {"bias": "this model has no biases", "norm": "this model has no norms with parameters"}
    refused = {k: why for k, why in missing.items() if not any(s.kind == k for s in sites)} | refused
    return SiteMap(
        layers=of.layers, d_model=of.d_model, d_kv=of.kv_heads * of.head_dim,
        heads=of.heads, kv_heads=of.kv_heads, head_dim=of.head_dim, causal=of.causal, parameters=parameters,
        refused=refused, head=of.head, sites=tuple(sites), relative=of.relative,
        layer_products=_products(of.linears) if of.layer_products is None else of.layer_products,
        outer_products=_products(of.outer_linears) if of.outer_products is None else of.outer_products,
        **of.sizes,
    )  # fmt: skip


def _layer(of: Layout, layer: int, stack: str) -> list[Site]:
    here = of.layer.format(layer=layer)
    at = f"{here}." if here else ""
    sites = []
    for m in of.linears:
        for kind, start, stop in m.kinds:
            span = None if stop - start == m.d_out else (start, stop)
            sites.append(Site(kind, layer, at + m.path, m.d_in, stop - start, stack, None, m.transposed, span, m.bias))
    bias = {m.path: m.bias for m in of.linears}
    transposed = {m.path: m.transposed for m in of.linears}
    for kind, places in (("attention", of.attention), ("ffn", of.ffn)):
        if places is not None:
            y, x = places
            sites.append(
                Site(
                    kind, layer, at + y, of.d_model, of.d_model, stack,
                    source=None if x == y else at + x,
                    transposed=transposed.get(y, False), bias=bias.get(y, False),
                )
            )  # fmt: skip
    queries, keys = of.heads * of.head_dim, of.kv_heads * of.head_dim
    sites.append(Site("kv", layer, (at + of.kv).rstrip("."), queries, keys, stack))
    sites.append(Site("block", layer, here, of.d_model, of.d_model, stack))
    return sites + _small(of.linears, of.norms, layer, at, stack)


def _small(linears: tuple[Linear, ...], norms: tuple[Norm, ...], layer: int, at: str, stack: str) -> list[Site]:
    owners = [(m.path, m.d_in, m.d_out, m.transposed) for m in linears if m.bias]
    owners += [(n.path, n.size, n.size, False) for n in norms if n.bias]
    sites = [
        Site("bias", layer, at + path, d_in, d_out, stack, transposed=transposed, bias=True)
        for path, d_in, d_out, transposed in owners
    ]
    return sites + [Site("norm", layer, at + n.path, n.size, n.size, stack, bias=n.bias) for n in norms]


def _products(linears: tuple[Linear, ...]) -> int:
    return sum(m.d_in * m.d_out for m in linears)
