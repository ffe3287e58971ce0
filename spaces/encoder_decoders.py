"""Encoder-decoders whose sites follow from the configuration alone: two layouts each, the encoder's and the decoder's.

Module paths and defaults are those of transformers 5 (models/t5, models/mt5, models/bart, models/mbart). Layers are
numbered through: the decoder's follow the encoder's, in the order of computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peftscape.spaces.families import Config, Keys
from peftscape.spaces.layout import Layout, Linear, Norm, linear
from peftscape.spaces.sites import Head, SiteError


def t5(config: Config) -> tuple[Layout, Layout]:
    """T5 and mT5 (arXiv:1910.10683): pre-norm, RMSNorm, no biases, relative positions shared by a stack's layers."""
    keys, family = Keys(config), str(config["model_type"])
    default = T5[family]
    d = keys.number("d_model", "hidden_size", default=512)
    f = keys.number("d_ff", default=default["d_ff"])
    heads = keys.number("num_heads", "num_attention_heads", default=default["num_heads"])
    head_dim = keys.number("d_kv", "head_dim", default=64)
    depth = keys.number("num_layers", "num_hidden_layers", default=default["num_layers"])
    vocab = keys.number("vocab_size", default=default["vocab_size"])
    a, act = heads * head_dim, str(keys.get("feed_forward_proj", default=default["feed_forward_proj"]))
    gated, act = act.startswith("gated"), act.rpartition("-")[2]
    ups = (("gate", "wi_0"), ("up", "wi_1")) if gated else (("up", "wi"),)

    def stack(name: str, layers: int, first: int) -> Layout:
        decoder = name == "decoder"
        ffn = f"layer.{1 + decoder}.DenseReluDense"
        own, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
        norms = [Norm(f"layer.{i}.layer_norm", d, False) for i in range(2 + decoder)]
        if decoder:
            norms[1] = replace(norms[1], stack="cross")
        return Layout(
            layer=f"{name}.block.{{layer}}", layers=layers, first=first, stack=name, d_model=d, embedding_width=d,
            heads=heads, kv_heads=heads, head_dim=head_dim, causal=decoder,
            linears=(
                *_attention(own, "qkvo", d, a, False), *(_attention(cross, "qkvo", d, a, False, "cross") * decoder),
                *(linear(kind, f"{ffn}.{path}", d, f, False) for kind, path in ups),
                linear("down", f"{ffn}.wo", f, d, False),
            ),
            norms=tuple(norms), outer_norms=(Norm(f"{name}.final_layer_norm", d, False),),
            loose=keys.number("relative_attention_num_buckets", default=32) * heads + (0 if decoder else vocab * d),
            attention=(f"{own}.o", own), ffn=(f"{ffn}.wo", ffn), kv=own,
            cross_attention=(f"{cross}.o", cross) if decoder else None, cross_kv=cross,
            head=_head(d),
            sizes={
                "family": family, "d_ff": f, "vocab": vocab, "prefix": "transformer", "embedding": "shared",
                "activation": "gelu_new" if gated and act == "gelu" else act, "norm_kind": "rmsnorm",
                "positions": "relative", "position_offset": 0, "max_positions": None, "attention_interface": True,
            },
        )  # fmt: skip

    return stack("encoder", depth, 0), stack("decoder", keys.number("num_decoder_layers", default=depth), depth)


def bart(config: Config) -> tuple[Layout, Layout]:
    """BART (arXiv:1910.13461; post-norm) and mBART (pre-norm, with a norm after each stack): learned positions.

    Raises:
        SiteError: encoder and decoder differ in heads or in the width of their FFN.
    """
    keys, family = Keys(config), str(config["model_type"])
    d = keys.number("d_model", "hidden_size", default=1024)
    heads = keys.number("encoder_attention_heads", "num_attention_heads", default=16)
    f = keys.number("encoder_ffn_dim", default=4096)
    others = keys.number("decoder_attention_heads", default=16), keys.number("decoder_ffn_dim", default=4096)
    if others != (heads, f):
        raise SiteError(f"configuration: {family} with unlike heads or FFN widths in encoder and decoder is not mapped")
    if d % heads:
        raise SiteError(f"configuration: a hidden size of {d} is not a multiple of {heads} attention heads")
    vocab = keys.number("vocab_size", default=50265)
    rows = keys.number("max_position_embeddings", default=1024)
    depth = keys.number("encoder_layers", "num_hidden_layers", default=12)
    pre = family == "mbart"

    def stack(name: str, layers: int, first: int) -> Layout:
        decoder = name == "decoder"
        own, cross, names = "self_attn", "encoder_attn", ("q_proj", "k_proj", "v_proj", "out_proj")
        last = (Norm(f"{name}.layer_norm", d, True),) if pre else ()
        return Layout(
            layer=f"{name}.layers.{{layer}}", layers=layers, first=first, stack=name, d_model=d, embedding_width=d,
            heads=heads, kv_heads=heads, head_dim=d // heads, causal=decoder,
            linears=(
                *_attention(own, names, d, d, True), *(_attention(cross, names, d, d, True, "cross") * decoder),
                linear("up", "fc1", d, f, True), linear("down", "fc2", f, d, True),
            ),
            norms=(
                Norm("self_attn_layer_norm", d, True),
                *((Norm("encoder_attn_layer_norm", d, True, "cross"),) * decoder), Norm("final_layer_norm", d, True),
            ),
            outer_norms=(Norm(f"{name}.layernorm_embedding", d, True), *last),
            loose=(rows + 2) * d + (0 if decoder else vocab * d),
            attention=(f"{own}.out_proj", own), ffn=("fc2", "fc1"), kv=own,
            cross_attention=(f"{cross}.out_proj", cross) if decoder else None, cross_kv=cross,
            head=_head(d),
            sizes={
                "family": family, "d_ff": f, "vocab": vocab, "prefix": "model", "embedding": "shared",
                "activation": keys.get("activation_function", default="gelu"), "norm_place": "pre" if pre else "post",
                "positions": "absolute", "position_offset": 0, "max_positions": rows, "attention_interface": True,
            },
        )  # fmt: skip

    return stack("encoder", depth, 0), stack("decoder", keys.number("decoder_layers", default=12), depth)


def _attention(
    at: str, names: str | tuple[str, ...], d: int, a: int, bias: bool, stack: str = ""
) -> tuple[Linear, ...]:
    """Queries, keys, values and the output of one attention."""
    shapes = ((d, a), (d, a), (d, a), (a, d))
    made = (linear(k, f"{at}.{n}", *shape, bias) for k, n, shape in zip("qkvo", names, shapes, strict=True))
    return tuple(replace(m, stack=stack) for m in made)


def _head(d: int) -> Head:
    """The classes read the decoder's state at the text's last token, its end of sequence."""
    at = "classification_head"
    layout = (
        (f"{at}.dense.weight", (d, d)), (f"{at}.dense.bias", (d,)),
        (f"{at}.out_proj.weight", (0, d)), (f"{at}.out_proj.bias", (0,)),
    )  # fmt: skip
    return Head("last", (at,), layout, "tanh")


#: The defaults of the configuration classes.
T5: dict[str, dict[str, Any]] = {
    "t5": {"d_ff": 2048, "num_heads": 8, "num_layers": 6, "vocab_size": 32128, "feed_forward_proj": "relu"},
    "mt5": {"d_ff": 1024, "num_heads": 6, "num_layers": 8, "vocab_size": 250112, "feed_forward_proj": "gated-gelu"},
}

ENCODER_DECODERS: dict[str, Callable[[Config], tuple[Layout, Layout]]] = {
    **dict.fromkeys(T5, t5),
    **dict.fromkeys(("bart", "mbart"), bart),
}
