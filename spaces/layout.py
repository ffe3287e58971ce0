"""What a configuration says about a model's modules, and the site map that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftscape.spaces.sites import LINEARS, Head, Relative, Site, SiteMap


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer; `kinds` are the sites on it with the columns they own: q, k and v for a fused one.

    `stack` is `cross` in cross-attention, empty elsewhere.
    """

    path: str
    d_in: int
    d_out: int
    bias: bool
    kinds: tuple[tuple[str, int, int], ...] = ()
    transposed: bool = False
    stack: str = ""

    @property
    def size(self) -> int:
        return self.d_in * self.d_out + self.bias * self.d_out


@dataclass(frozen=True, slots=True)
class Norm:
    """A LayerNorm or RMSNorm."""

    path: str
    size: int
    bias: bool
    stack: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The modules of a backbone, or of one stack of it, whose layers are alike.

    Args:
        layer: a layer's path with {layer}; the paths in `linears`, `norms`, `kv`, `attention` and `ffn` go
            on from it.
        first: the number of its first layer, where an encoder's come before.
        stack: `encoder` or `decoder` of an encoder-decoder; empty where there is one stack.
        attention, ffn: (path whose output is y, path whose first input is x) of the sub-layers.
        cross_attention, cross_kv: of a decoder that reads an encoder.
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
    first: int = 0
    stack: str = ""
    cross_attention: tuple[str, str] | None = None
    cross_kv: str = ""
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


def assemble(of: Layout, decoder: Layout | None = None) -> SiteMap:
    """The site map of a layout, or of an encoder's and its decoder's; a kind without any site is refused."""
    stacks = (of,) if decoder is None else (of, decoder)
    sites = [Site("input", -1, "", of.embedding_width, of.embedding_width, _stack(of))]
    for one in stacks:
        sites += _small(one.outer_linears, one.outer_norms, -1, "", _stack(one))
        for layer in range(one.layers):
            sites += _layer(one, layer, _stack(one))
    if decoder is None:
        sites.append(Site("ladder", of.layers, "", of.d_model, of.d_model, _stack(of)))
    parameters = sum(map(_parameters, stacks))
    sites.append(Site("model", -1, "", 0, parameters, _stack(of)))

    refused = dict(of.refused)
    sites = [s for s in sites if s.kind not in refused]
    missing = {k: f"this model has no {k} linear" for k in LINEARS}
    missing |= {"ladder": "a side network climbs beside one stack, not beside an encoder-decoder"}
    missing |= {"bias": "this model has no biases", "norm": "this model has no norms with parameters"}
    refused = {k: why for k, why in missing.items() if not any(s.kind == k for s in sites)} | refused
    layers = sum(one.layers for one in stacks)
    products = [one.layers * (_products(one.linears) if one.layer_products is None else one.layer_products)
                for one in stacks]  # fmt: skip
    return SiteMap(
        layers=layers, d_model=of.d_model, d_kv=of.kv_heads * of.head_dim,
        heads=of.heads, kv_heads=of.kv_heads, head_dim=of.head_dim, causal=of.causal, parameters=parameters,
        refused=refused, head=of.head, sites=tuple(sites), relative=of.relative,
        decoder_layers=0 if decoder is None else decoder.layers, layer_products=sum(products) // layers,
        outer_products=_products(of.outer_linears) if of.outer_products is None else of.outer_products,
        **of.sizes,
    )  # fmt: skip


def _stack(of: Layout) -> str:
    return of.stack or ("decoder" if of.causal else "encoder")


def _parameters(of: Layout) -> int:
    if of.parameters is not None:
        return of.parameters
    inner = sum(m.size for m in of.linears) + sum(n.size * (1 + n.bias) for n in of.norms) + of.layer_loose
    outer = sum(m.size for m in of.outer_linears) + sum(n.size * (1 + n.bias) for n in of.outer_norms)
    return of.layers * inner + outer + of.loose


def _layer(of: Layout, number: int, stack: str) -> list[Site]:
    here, layer = of.layer.format(layer=number), of.first + number
    at = f"{here}." if here else ""
    sites, heads = [], {"q": of.heads, "k": of.kv_heads, "v": of.kv_heads, "o": of.heads}
    for m in of.linears:
        for kind, start, stop in m.kinds:
            span = None if stop - start == m.d_out else (start, stop)
            sites.append(
                Site(
                    kind, layer, at + m.path, m.d_in, stop - start, m.stack or stack,
                    transposed=m.transposed, span=span, bias=m.bias, heads=heads.get(kind, 1),
                )
            )  # fmt: skip
    bias = {m.path: m.bias for m in of.linears}
    transposed = {m.path: m.transposed for m in of.linears}
    places = (("attention", of.attention, stack), ("attention", of.cross_attention, "cross"), ("ffn", of.ffn, stack))
    for kind, place, own in places:
        if place is not None:
            y, x = place
            sites.append(
                Site(
                    kind, layer, at + y, of.d_model, of.d_model, own,
                    source=None if x == y else at + x,
                    transposed=transposed.get(y, False), bias=bias.get(y, False),
                )
            )  # fmt: skip
    queries, keys = of.heads * of.head_dim, of.kv_heads * of.head_dim
    sites.append(Site("kv", layer, (at + of.kv).rstrip("."), queries, keys, stack))
    if of.cross_attention is not None:
        sites.append(Site("kv", layer, at + of.cross_kv, queries, keys, "cross"))
    sites.append(Site("block", layer, here, of.d_model, of.d_model, stack))
    return sites + _small(of.linears, of.norms, layer, at, stack)


def _small(linears: tuple[Linear, ...], norms: tuple[Norm, ...], layer: int, at: str, stack: str) -> list[Site]:
    owners = [(m.path, m.d_in, m.d_out, m.transposed, m.stack) for m in linears if m.bias]
    owners += [(n.path, n.size, n.size, False, n.stack) for n in norms if n.bias]
    sites = [
        Site("bias", layer, at + path, d_in, d_out, own or stack, transposed=transposed, bias=True)
        for path, d_in, d_out, transposed, own in owners
    ]
    return sites + [Site("norm", layer, at + n.path, n.size, n.size, n.stack or stack, bias=n.bias) for n in norms]


def _products(linears: tuple[Linear, ...]) -> int:
    return sum(m.d_in * m.d_out for m in linears)
