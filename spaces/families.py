"""The families whose sites follow from the configuration alone: one function each, from its JSON to a layout.

Module paths and defaults are those of transformers 5 (models/*/modeling_*.py and configuration_*.py): keys
that a config.json leaves out take the default of their configuration class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftscape.spaces.layout import Layout, Linear, Norm, linear
from peftscape.spaces.sites import Head, Relative, SiteError

Config = Mapping[str, Any]


class Keys:
    """A configuration read key by key: aliases in the order of preference, then the class's default."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def number(self, *names: str, default: int) -> int:
        """A positive whole number; JSON's null counts as left out."""
        for name in names:
            if (value := self.config.get(name)) is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise SiteError(f"configuration: {name}: a positive whole number was expected, not {value!r}")
                return value
        return default

    def get(self, *names: str, default: Any) -> Any:
        """Any other value; null counts as left out."""
        return next((v for n in names if (v := self.config.get(n)) is not None), default)


def encoder(config: Config) -> Layout:
    """BERT, RoBERTa and its kin, ELECTRA, DeBERTa-v2: post-norm layers under `encoder.layer`."""
    keys = Keys(config)
    family = str(config["model_type"])
    default = ENCODERS[family]
    if keys.get("add_cross_attention", default=False):
        raise SiteError(f"{family} with cross-attention is not mapped; an encoder or a decoder alone was expected")
    deberta, electra = family == "deberta-v2", family == "electra"
    d = keys.number("hidden_size", default=default["hidden_size"])
    f = keys.number("intermediate_size", default=default["intermediate_size"])
    heads = keys.number("num_attention_heads", default=default["num_attention_heads"])
    head_dim = _head_dim(d, heads)
    if deberta:
        head_dim = keys.number("attention_head_size", default=head_dim)
    a = heads * head_dim
    e = keys.number("embedding_size", default=128 if electra else d) if electra or deberta else d
    vocab = keys.number("vocab_size", default=default["vocab_size"])
    rows = keys.number("max_position_embeddings", default=512)
    types = int(keys.get("type_vocab_size", default=0 if deberta else 2))
    offset = int(keys.get("pad_token_id", default=1)) + 1 if family in ROBERTA else 0
    self, p = "attention.self", "_proj" if deberta else ""
    biased_input = bool(keys.get("position_biased_input", default=True)) or not deberta
    loose = e * (vocab + types + rows * biased_input) + (0 if electra or deberta else d * d + d)
    extra = _deberta(keys, d, a, e) if deberta else {"loose": 0}
    project: tuple[Linear, ...] = ()
    if e != d:
        name, bias = ("embeddings.embed_proj", False) if deberta else ("embeddings_project", True)
        project = (linear("", name, e, d, bias),)
    extra["loose"] += loose
    return Layout(
        layer="encoder.layer.{layer}", layers=keys.number("num_hidden_layers",
        default=default["num_hidden_layers"]), d_model=d, embedding_width=e, heads=heads, kv_heads=heads,
        head_dim=head_dim, causal=bool(keys.get("is_decoder", default=False)) and not deberta,
        linears=(
            linear("q", f"{self}.query{p}", d, a, True), linear("k", f"{self}.key{p}", d, a, True),
            linear("v", f"{self}.value{p}", d, a, True), linear("o", "attention.output.dense", a, d, True),
            linear("up", "intermediate.dense", d, f, True), linear("down", "output.dense", f, d, True),
        ),
        norms=(Norm("attention.output.LayerNorm", d, True), Norm("output.LayerNorm", d, True)),
        outer_linears=project, outer_norms=(Norm("embeddings.LayerNorm", d if deberta else e, True),),
        attention=("attention.output.dense", "attention"), ffn=("output.dense", "intermediate"), kv=self,
        head=_encoder_head(family, d, keys),
        sizes={
            "family": family, "d_ff": f, "vocab": vocab, "prefix": PREFIX[family],
            "embedding": "embeddings.word_embeddings", "activation": keys.get("hidden_act", default="gelu"),
            "norm_place": "post", "max_positions": rows - offset, "position_offset": offset,
            "positions": "relative" if "relative" in extra else "absolute", "attention_interface": not
            deberta,
        },
        **extra,
    )  # fmt: skip


def _deberta(keys: Keys, d: int, a: int, e: int) -> dict[str, Any]:
    """What DeBERTa-v2 adds: its relative positions, its convolution, and what it cannot do."""
    out: dict[str, Any] = {
        "loose": 0,
        "refused": {
            "kv": "DeBERTa-v2 computes its attention itself, not through transformers' attention interface",
            "input": "DeBERTa-v2's relative positions follow the order in the array, which prompts of unequal"
            " lengths and padding change",
        },
    }
    kernel = int(keys.get("conv_kernel_size", default=0))
    if kernel > 0:  # on every token, after layer 0, outside all sites
        weights = d * d // int(keys.get("conv_groups", default=1)) * kernel
        out["loose"] += weights + d + 2 * d
        out["outer_products"] = weights + (e * d if e != d else 0)
    if "layer_norm" in str(keys.get("norm_rel_ebd", default="none")).lower():
        out["loose"] += 2 * d
    if keys.get("relative_attention", default=False):
        longest = int(keys.get("max_relative_positions", default=-1))
        longest = longest if longest >= 1 else keys.number("max_position_embeddings", default=512)
        buckets = int(keys.get("position_buckets", default=-1))
        rows = 2 * (buckets if buckets > 0 else longest)
        kinds = keys.get("pos_att_type", default=[])
        kinds = [k.strip() for k in kinds.lower().split("|")] if isinstance(kinds, str) else kinds
        terms = len({"c2p", "p2c"} & set(kinds))
        shared = bool(keys.get("share_att_key", default=False))
        out["loose"] += rows * d
        out["layer_loose"] = 0 if shared else terms * (d * a + a)
        # With share_att_key both projections run whatever pos_att_type says.
        out["relative"] = Relative(rows, terms, 2 if shared else terms, ("q", "k") if shared else ())
    return out


def _encoder_head(family: str, d: int, keys: Keys) -> Head:
    out = (("classifier.weight", (0, d)), ("classifier.bias", (0,)))
    if family == "bert":
        return Head("pooler", ("classifier",), out)
    if family == "deberta-v2":
        h = keys.number("pooler_hidden_size", default=d)
        dense = (("pooler.dense.weight", (h, h)), ("pooler.dense.bias", (h,)))
        return Head("first", ("pooler", "classifier"), dense + out, keys.get("pooler_hidden_act", default="gelu"))
    layout = (
        ("classifier.dense.weight", (d, d)), ("classifier.dense.bias", (d,)),
        ("classifier.out_proj.weight", (0, d)), ("classifier.out_proj.bias", (0,)),
    )  # fmt: skip
    return Head("first", ("classifier",), layout, "gelu" if family == "electra" else "tanh")


def distilbert(config: Config) -> Layout:
    """DistilBERT: BERT's layers under other names, no token types, no pooler."""
    keys = Keys(config)
    d = keys.number("dim", "hidden_size", default=768)
    f = keys.number("hidden_dim", default=3072)
    heads = keys.number("n_heads", "num_attention_heads", default=12)
    vocab, rows = (
        keys.number("vocab_size", default=30522),
        keys.number("max_position_embeddings", default=512),
    )
    head = (
        ("pre_classifier.weight", (d, d)), ("pre_classifier.bias", (d,)),
        ("classifier.weight", (0, d)), ("classifier.bias", (0,)),
    )  # fmt: skip
    return Layout(
        layer="transformer.layer.{layer}", layers=keys.number("n_layers", "num_hidden_layers", default=6),
        d_model=d, embedding_width=d, heads=heads, kv_heads=heads, head_dim=_head_dim(d, heads), causal=False,
        linears=(
            linear("q", "attention.q_lin", d, d, True), linear("k", "attention.k_lin", d, d, True),
            linear("v", "attention.v_lin", d, d, True), linear("o", "attention.out_lin", d, d, True),
            linear("up", "ffn.lin1", d, f, True), linear("down", "ffn.lin2", f, d, True),
        ),
        norms=(Norm("sa_layer_norm", d, True), Norm("output_layer_norm", d, True)),
        outer_norms=(Norm("embeddings.LayerNorm", d, True),), loose=d * (vocab + rows),
        attention=("attention.out_lin", "attention"), ffn=("ffn.lin2", "ffn"), kv="attention",
        head=Head("first", ("pre_classifier", "classifier"), head, "relu"),
        sizes={
            "family": "distilbert", "d_ff": f, "vocab": vocab, "prefix": "distilbert",
            "embedding": "embeddings.word_embeddings", "activation": keys.get("activation", default="gelu"),
            "norm_place": "post", "max_positions": rows, "position_offset": 0, "positions": "absolute",
            "attention_interface": True,
        },
    )  # fmt: skip


def gpt2(config: Config) -> Layout:
    """GPT-2: pre-norm, weights transposed (Conv1D), queries, keys and values fused in one."""
    keys = Keys(config)
    if keys.get("add_cross_attention", default=False):
        raise SiteError("gpt2 with cross-attention is not mapped; an encoder or a decoder alone was expected")
    d = keys.number("n_embd", "hidden_size", default=768)
    f = keys.number("n_inner", default=4 * d)
    heads = keys.number("n_head", "num_attention_heads", default=12)
    vocab = keys.number("vocab_size", default=50257)
    rows = keys.number("n_positions", "max_position_embeddings", default=1024)
    fused = tuple((kind, i * d, (i + 1) * d) for i, kind in enumerate("qkv"))
    return Layout(
        layer="h.{layer}", layers=keys.number("n_layer", "num_hidden_layers", default=12),
        d_model=d, embedding_width=d, heads=heads, kv_heads=heads, head_dim=_head_dim(d, heads), causal=True,
        linears=(
            Linear("attn.c_attn", d, 3 * d, True, fused, transposed=True),
            Linear("attn.c_proj", d, d, True, (("o", 0, d),), transposed=True),
            Linear("mlp.c_fc", d, f, True, (("up", 0, f),), transposed=True),
            Linear("mlp.c_proj", f, d, True, (("down", 0, d),), transposed=True),
        ),
        norms=(Norm("ln_1", d, True), Norm("ln_2", d, True)), outer_norms=(Norm("ln_f", d, True),),
        loose=d * (vocab + rows), attention=("attn.c_proj", "attn"), ffn=("mlp.c_proj", "mlp"), kv="attn",
        head=Head("last", ("score",), (("score.weight", (0, d)),)),
        sizes={
            "family": "gpt2", "d_ff": f, "vocab": vocab, "prefix": "transformer", "embedding": "wte",
            "activation": keys.get("activation_function", default="gelu_new"), "max_positions": rows,
            "position_offset": 0, "positions": "absolute", "attention_interface": True,
        },
    )  # fmt: skip


def llama(config: Config) -> Layout:
    """Llama, Mistral, Qwen2 and 3, Gemma 1 to 3: pre-norm, RMSNorm, gated FFN, rotary, grouped queries."""
    keys = Keys(config)
    family = str(config["model_type"])
    default = DECODERS[family]
    gemma = family.startswith("gemma")
    d = keys.number("hidden_size", default=default["hidden_size"])
    f = keys.number("intermediate_size", default=default["intermediate_size"])
    heads = keys.number("num_attention_heads", default=default["num_attention_heads"])
    # An absent key takes the class's default; an explicit null means as many as heads.
    grouped = default["num_key_value_heads"] if "num_key_value_heads" not in config else None
    kv_heads = keys.number("num_key_value_heads", default=grouped or heads)
    head_dim = keys.number("head_dim", default=default.get("head_dim") or _head_dim(d, heads))
    if heads % kv_heads:
        raise SiteError(f"configuration: {heads} attention heads cannot share {kv_heads} heads of keys and values")
    a, kv = heads * head_dim, kv_heads * head_dim
    bias = bool(keys.get("attention_bias", default=False)) and family not in ("mistral", "qwen2")
    in_bias, mlp_bias = (
        bias or family == "qwen2",
        bool(keys.get("mlp_bias", default=False)) and family == "llama",
    )
    names = ["input_layernorm", "post_attention_layernorm"]
    if family in ("gemma2", "gemma3_text"):
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    norms = [Norm(n, d, False) for n in names]
    if family in ("qwen3", "gemma3_text"):
        norms += [Norm("self_attn.q_norm", head_dim, False), Norm("self_attn.k_norm", head_dim, False)]
    vocab = keys.number("vocab_size", default=default["vocab_size"])
    act = "gelu_pytorch_tanh" if gemma else "silu"
    return Layout(
        layer="layers.{layer}", layers=keys.number("num_hidden_layers", default=default["num_hidden_layers"]),
        d_model=d, embedding_width=d, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        causal=not (gemma and keys.get("use_bidirectional_attention", default=False)),
        linears=(
            linear("q", "self_attn.q_proj", d, a, in_bias), linear("k", "self_attn.k_proj", d, kv, in_bias),
            linear("v", "self_attn.v_proj", d, kv, in_bias), linear("o", "self_attn.o_proj", a, d, bias),
            linear("gate", "mlp.gate_proj", d, f, mlp_bias), linear("up", "mlp.up_proj", d, f, mlp_bias),
            linear("down", "mlp.down_proj", f, d, mlp_bias),
        ),
        norms=tuple(norms), outer_norms=(Norm("norm", d, False),), loose=vocab * d,
        # The layer hands its attention everything by name, so the first input is read at the query's linear.
        attention=("self_attn.o_proj", "self_attn.q_proj"), ffn=("mlp.down_proj", "mlp"), kv="self_attn",
        head=Head("last", ("score",), (("score.weight", (0, d)),)),
        sizes={
            "family": family, "d_ff": f, "vocab": vocab, "prefix": "model", "embedding": "embed_tokens",
            "activation": act if family == "gemma" else keys.get(
                "hidden_activation" if gemma else "hidden_act", default=act
            ),
            "norm_kind": "rmsnorm", "positions": "rotary", "attention_interface": True, "position_offset": 0,
            "max_positions": keys.number("max_position_embeddings",
            default=default["max_position_embeddings"]), "softcap": config.get("attn_logit_softcapping",
            default.get("attn_logit_softcapping")), "sliding_window": _window(keys, family),
        },
    )  # fmt: skip


def _window(keys: Keys, family: str) -> int | None:
    """How far back the layers with a sliding window see; None where no layer has one."""
    if family in ("llama", "gemma") or (
        family.startswith("qwen") and not keys.get("use_sliding_window", default=False)
    ):
        return None
    if "sliding_window" in keys.config:
        return keys.config["sliding_window"]  # type: ignore[no-any-return]
    return 4096


def _head_dim(d: int, heads: int) -> int:
    if d % heads:
        raise SiteError(f"configuration: a hidden size of {d} is not a multiple of {heads} attention heads")
    return d // heads


def _sizes(d: int, f: int, layers: int, heads: int, vocab: int, kv: int | None = None, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return dict(zip(names, (d, f, layers, heads, vocab), strict=True), num_key_value_heads=kv, **more)


#: The defaults of the configuration classes.
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _sizes(768, 3072, 12, 12, 30522),
    "roberta": _sizes(768, 3072, 12, 12, 50265),
    "xlm-roberta": _sizes(768, 3072, 12, 12, 30522),
    "camembert": _sizes(768, 3072, 12, 12, 30522),
    "electra": _sizes(256, 1024, 12, 4, 30522),
    "deberta-v2": _sizes(1536, 6144, 24, 24, 128100),
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": _sizes(4096, 11008, 32, 32, 32000, max_position_embeddings=2048),
    "mistral": _sizes(4096, 14336, 32, 32, 32000, 8, max_position_embeddings=131072),
    "qwen2": _sizes(4096, 22016, 32, 32, 151936, 32, max_position_embeddings=32768),
    "qwen3": _sizes(4096, 22016, 32, 32, 151936, 32, max_position_embeddings=32768, head_dim=128),
    "gemma": _sizes(3072, 24576, 28, 16, 256000, 16, max_position_embeddings=8192, head_dim=256),
    "gemma2": _sizes(
        2304, 9216, 26, 8, 256000, 4, max_position_embeddings=8192, head_dim=256, attn_logit_softcapping=50.0
    ),
    "gemma3_text": _sizes(2304, 9216, 26, 8, 262208, 4, max_position_embeddings=131072, head_dim=256),
}
ROBERTA = ("roberta", "xlm-roberta", "camembert")
PREFIX = {"bert": "bert", "electra": "electra", "deberta-v2": "deberta"} | dict.fromkeys(ROBERTA, "roberta")

FAMILIES: dict[str, Callable[[Config], Layout]] = {
    **dict.fromkeys(ENCODERS, encoder),
    "distilbert": distilbert,
    "gpt2": gpt2,
    **dict.fromkeys(DECODERS, llama),
}
