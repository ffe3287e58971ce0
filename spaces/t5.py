"""What is exact about an encoder-decoder from its configuration alone: places, parameters, trained counts.

Not a map for training (peftscape's engine has one stack): FLOPs and activations of encoder-decoders are not estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftscape.spaces.sites import Site, SiteError, SiteMap

MISSING = (
    "encoder-decoders are not in the site map yet: parameters, counts, weights and states are exact, while FLOPs,"
    " activations and logits are left out (two lengths, cross-attention and two stacks are missing in cost.py)"
)


def t5(config: Mapping[str, Any]) -> SiteMap:
    """T5 (arXiv:1910.10683) with the encoder's layers first, then the decoder's, which cross-attend.

    Parameters: 2L(4 d a + c d f + 2d) + L(4 d a + d) + 2 b h + 2d + V d, a = h d_kv, c = 2 (3 if gated).

    Raises:
        SiteError: a size is impossible.
    """

    def number(name: str, default: int) -> int:
        value = config.get(name) or default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SiteError(f"configuration: {name}: a positive whole number was expected, not {value!r}")
        return value

    d, f, heads, head_dim = number("d_model", 512), number("d_ff", 2048), number("num_heads", 8), number("d_kv", 64)
    encoder = number("num_layers", 6)
    decoder = number("num_decoder_layers", encoder)
    a, vocab = heads * head_dim, number("vocab_size", 32128)
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    sites: list[Site] = [Site("input", -1, "", d, d)]
    parameters = vocab * d + 2 * (number("relative_attention_num_buckets", 32) * heads + d)
    for layer in range(encoder + decoder):
        stack, at = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
        places = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
        for i, name in enumerate(places):
            path = f"{stack}.block.{at}.layer.{i}"
            sites += [Site(k, layer, f"{path}.{name}.{k}", d, a, _stack(stack, i)) for k in "qkv"]
            sites.append(Site("o", layer, f"{path}.{name}.o", a, d, _stack(stack, i)))
            sites.append(Site("attention", layer, f"{path}.{name}.o", d, d, _stack(stack, i), source=f"{path}.{name}"))
            sites.append(Site("kv", layer, f"{path}.{name}", a, a, _stack(stack, i)))
            sites.append(Site("norm", layer, f"{path}.layer_norm", d, d, _stack(stack, i)))
            parameters += 4 * d * a + d
        path = f"{stack}.block.{at}.layer.{len(places)}"
        ups = (("gate", "wi_0"), ("up", "wi_1")) if gated else (("up", "wi"),)
        sites += [Site(kind, layer, f"{path}.DenseReluDense.{name}", d, f, stack) for kind, name in ups]
        sites.append(Site("down", layer, f"{path}.DenseReluDense.wo", f, d, stack))
        sites.append(Site("ffn", layer, f"{path}.DenseReluDense.wo", d, d, stack, source=f"{path}.DenseReluDense"))
        sites.append(Site("norm", layer, f"{path}.layer_norm", d, d, stack))
        parameters += (len(ups) + 1) * d * f + d
    sites.append(Site("model", -1, "", 0, parameters))
    layer_products = (4 * d * a * (encoder + 2 * decoder)) // (encoder + decoder) + (2 + gated) * d * f
    return SiteMap(
        family="t5", layers=encoder + decoder, d_model=d, d_kv=a, d_ff=f, heads=heads, kv_heads=heads,
        head_dim=head_dim, vocab=vocab, causal=False, parameters=parameters, max_positions=None, position_offset=0,
        positions="relative", attention_interface=False, refused={"bias": "T5's linears and norms have no biases"},
        head=None, sites=tuple(sites), prefix="", embedding="shared", norm_kind="rmsnorm",
        layer_products=layer_products,
    )  # fmt: skip


def _stack(stack: str, place: int) -> str:
    return "cross" if place else stack
