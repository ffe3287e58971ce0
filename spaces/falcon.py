"""Falcon from its configuration alone (transformers' models/falcon; the paper is arXiv:2311.16867)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftscape.spaces.layout import Layout, Linear, Norm
from peftscape.spaces.sites import Head, SiteError


def falcon(config: Mapping[str, Any]) -> Layout:
    """Falcon: queries, keys and values in one linear, attention and FFN side by side on one input.

    Raises:
        SiteError: a size is missing or impossible.
    """
    d = _number(config, "hidden_size", "n_embed", default=4544)
    heads = _number(config, "num_attention_heads", "n_head", default=71)
    layers = _number(config, "num_hidden_layers", "n_layer", default=32)
    if d % heads:
        raise SiteError(f"configuration: a hidden size of {d} is not a multiple of {heads} attention heads")
    new = bool(config.get("new_decoder_architecture", False))
    single = bool(config.get("multi_query", True)) and not new
    kv_heads = _number(config, "num_kv_heads", default=heads) if new else 1 if single else heads
    head_dim, f = d // heads, _number(config, "ffn_hidden_size", default=4 * d)
    vocab, bias = _number(config, "vocab_size", default=65024), bool(config.get("bias", False))
    joint = (heads + 2 * kv_heads) * head_dim
    kinds = (("q", 0, d), ("k", d, d + head_dim), ("v", d + head_dim, joint)) if single else ()
    parallel = bool(config.get("parallel_attn", True))
    two = new and config.get("num_ln_in_parallel_attn", 2) in (None, 2)
    names: tuple[str, ...] = ("ln_attn", "ln_mlp") if two else ("input_layernorm",)
    names += ("post_attention_layernorm",) if not parallel and not new else ()
    refused = {"kv": "Falcon computes its attention itself, not through transformers' attention interface"}
    if not single:
        why = "Falcon lays queries, keys and values in turns, head by head: they are no columns side by side"
        refused |= dict.fromkeys("qkv", why)
    if config.get("alibi"):
        refused["input"] = "ALiBi's positions follow the order in the array"
    return Layout(
        layer="h.{layer}", layers=layers, d_model=d, embedding_width=d, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, causal=True,
        linears=(
            Linear("self_attention.query_key_value", d, joint, bias, kinds),
            Linear("self_attention.dense", d, d, bias, (("o", 0, d),)),
            Linear("mlp.dense_h_to_4h", d, f, bias, (("up", 0, f),)),
            Linear("mlp.dense_4h_to_h", f, d, bias, (("down", 0, d),)),
        ),
        norms=tuple(Norm(name, d, True) for name in names), outer_norms=(Norm("ln_f", d, True),), loose=vocab * d,
        attention=("self_attention.dense", "self_attention.query_key_value"), ffn=("mlp.dense_4h_to_h", "mlp"),
        kv="self_attention", refused=refused, head=Head("last", ("score",), (("score.weight", (0, d)),)),
        sizes={
            "family": "falcon", "d_ff": f, "vocab": vocab, "prefix": "transformer", "embedding": "word_embeddings",
            "activation": config.get("activation") or "gelu", "position_offset": 0,
            "positions": "relative" if config.get("alibi") else "rotary", "attention_interface": False,
            "max_positions": _number(config, "max_position_embeddings", default=2048),
        },
    )  # fmt: skip


def _number(config: Mapping[str, Any], *names: str, default: int) -> int:
    value = next((v for n in names if (v := config.get(n)) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SiteError(f"configuration: {names[0]}: a positive whole number was expected, not {value!r}")
    return value
