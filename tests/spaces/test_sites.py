"""The site map of a configuration, held against the model that transformers builds from it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from peftscape.spaces.families import FAMILIES
from peftscape.spaces.sites import LINEARS, SiteError, SiteMap, site_map, site_map_from_modules

# Tiny configurations of every known family with its odd shapes: grouped queries, factored embeddings, ...
_BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56,
    "vocab_size": 90, "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip
_LLAMA = {
    **_BERT, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-6, "bos_token_id": 2,
    "eos_token_id": 3,
}  # fmt: skip
_DEBERTA = {
    **_BERT, "relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8, "share_att_key":
    True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT},
    "roberta": {"model_type": "roberta", **_BERT, "type_vocab_size": 1},
    "xlm-roberta": {"model_type": "xlm-roberta", **_BERT},
    "camembert": {"model_type": "camembert", **_BERT},
    "electra": {"model_type": "electra", **_BERT, "embedding_size": 24},
    "electra-flat": {"model_type": "electra", **_BERT, "embedding_size": 32},
    "deberta-v2": {"model_type": "deberta-v2", **_DEBERTA},
    "deberta-v2-unshared": {
        "model_type": "deberta-v2", **_DEBERTA, "share_att_key": False, "pos_att_type": ["c2p"],
        "conv_kernel_size": 3, "norm_rel_ebd": "none", "type_vocab_size": 2, "position_biased_input": True,
        "position_buckets": -1, "pad_token_id": 0,
    },
    "distilbert": {
        "model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 56, "vocab_size":
        90, "max_position_embeddings": 40,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 56, "vocab_size": 90,
        "n_positions": 40, "bos_token_id": 2, "eos_token_id": 3,
    },
    "llama": {"model_type": "llama", **_LLAMA},
    "llama-biased": {"model_type": "llama", **_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim":
    None}, "llama-null": {"model_type": "llama", **_LLAMA, "num_key_value_heads": None},
    "mistral": {"model_type": "mistral", **_LLAMA},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen3": {"model_type": "qwen3", **_LLAMA},
    "gemma": {"model_type": "gemma", **_LLAMA},
    "gemma2": {"model_type": "gemma2", **_LLAMA},
    "gemma3_text": {"model_type": "gemma3_text", **_LLAMA},
}  # fmt: skip


def settings(config: dict[str, Any]) -> Any:
    config = dict(config)
    return AutoConfig.for_model(config.pop("model_type"), **config)


def on_meta(config: dict[str, Any], kind: Any = AutoModel) -> Any:
    with torch.device("meta"):
        return kind.from_config(settings(config))


@pytest.fixture(params=TINY, scope="module")
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return TINY[request.param]


@pytest.fixture(scope="module")
def model(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(settings(config), attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def sites(config: dict[str, Any]) -> SiteMap:
    return site_map(config)


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) <= {c["model_type"] for c in TINY.values()}


def test_parameters_are_exact(model: Any, sites: SiteMap) -> None:
    assert sites.parameters == sum(p.numel() for p in model.parameters())


def test_sizes_are_those_of_the_model(model: Any, sites: SiteMap) -> None:
    embedding = model.get_input_embeddings()
    assert (sites.vocab, sites.embedding) == (
        embedding.num_embeddings,
        next(name for name, m in model.named_modules() if m is embedding),
    )
    assert sites.layers == 2
    assert sites.prefix == model.base_model_prefix
    if "input" not in sites.refused:
        assert sites.select(["input"], [])[0].d_out == embedding.embedding_dim


def test_linear_sites_are_the_modules_they_name(model: Any, sites: SiteMap) -> None:
    for site in sites.select([k for k in LINEARS if k not in sites.refused], range(2)):
        module = model.get_submodule(site.path)
        weight = module.weight.T if site.transposed else module.weight
        assert site.transposed == isinstance(module, Conv1D)
        start, stop = site.span or (0, site.d_out)
        assert weight[start:stop].shape == (site.d_out, site.d_in)
        assert site.span is not None or weight.shape[0] == site.d_out
        assert site.bias == (module.bias is not None)


def test_biases_and_norms_are_all_those_of_layers_and_embeddings(model: Any, sites: SiteMap) -> None:
    biases = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    norms = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    # Left out: the pooler; and in DeBERTa-v2 what works on its relative positions, and its convolution.
    outside = ("pooler", "pos_key_proj", "pos_query_proj", "encoder.LayerNorm", "encoder.conv")
    for kind, paths in (("bias", biases), ("norm", norms)):
        found = {s.path: s for s in sites.sites if s.kind == kind}
        assert set(found) == {p for p in paths if not any(o in p for o in outside)}
        for path, site in found.items():
            module = model.get_submodule(path)
            assert site.d_out == (module.bias if kind == "bias" else module.weight).numel()
            assert site.bias == (getattr(module, "bias", None) is not None)
            assert (site.layer == -1) == (".0." not in path and ".1." not in path)


def test_all_attention_goes_through_the_interface_at_kv_sites(
    config: dict[str, Any], model: Any, sites: SiteMap
) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def spy(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((module, query.shape[1] * query.shape[3], key.shape[1] * key.shape[3], dict(kwargs)))
        kwargs.pop("softcap", None)  # which torch's own attention refuses
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("peftscape-spy", spy)
    if not sites.attention_interface:
        assert "kv" in sites.refused
        assert model.config._attn_implementation == "eager"
        return
    spied = AutoModel.from_config(settings(config), attn_implementation="peftscape-spy").eval()
    spied(torch.randint(4, 90, (2, 7)))
    modules = dict(spied.named_modules())
    kv = sites.select(["kv"], range(2))
    assert [(modules[s.path], s.d_in, s.d_out) for s in kv] == [(m, q, k) for m, q, k, _ in seen]
    assert {k["softcap"] for *_, k in seen if "softcap" in k} <= {sites.softcap}
    assert all(m.is_causal == sites.causal for m, *_ in seen)


def test_sub_layers_read_and_give_what_they_say(model: Any, sites: SiteMap) -> None:
    taken: dict[tuple[str, str], Any] = {}

    def tap(name: str, side: str) -> Any:
        def before(_: Any, args: Any) -> None:
            taken.setdefault((name, side), args[0].detach())

        def after(_: Any, __: Any, out: Any) -> None:
            taken[name, side] = (out[0] if isinstance(out, tuple) else out).detach()

        return before if side == "x" else after

    handles = []
    for site in sites.sites:
        if site.kind in ("q", "attention", "ffn", "block", "up"):
            x, y = model.get_submodule(site.source or site.path), model.get_submodule(site.path)
            handles += [
                x.register_forward_pre_hook(tap(f"{site.kind}{site.layer}", "x")),
                y.register_forward_hook(tap(f"{site.kind}{site.layer}", "y")),
            ]
    norms = {s.path.rsplit(".", 1)[-1]: model.get_submodule(s.path) for s in sites.select(["norm"], [1])}
    with torch.no_grad():
        last = model(torch.randint(4, 90, (2, 7)), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(2):
        block_x, block_y = taken[f"block{layer}", "x"], taken[f"block{layer}", "y"]
        assert torch.equal(taken[f"attention{layer}", "x"], taken[f"q{layer}", "x"])
        assert torch.equal(taken[f"ffn{layer}", "x"], taken[f"up{layer}", "x"])
        if sites.relative is None:  # its convolution changes the stream outside the layers
            assert torch.equal(block_x, last[layer])
        if sites.norm_place == "post":
            assert torch.equal(taken[f"attention{layer}", "x"], block_x)
    x, attention, ffn = block_x, taken["attention1", "y"], taken["ffn1", "y"]
    with torch.no_grad():
        if sites.norm_place == "post":  # y = LN(y_ffn + LN(y_attention + x))
            paths = [model.get_submodule(s.path) for s in sites.select(["norm"], [1])]
            rebuilt = paths[1](ffn + paths[0](attention + x))
        elif "pre_feedforward_layernorm" in norms:
            rebuilt = x + norms["post_attention_layernorm"](attention) + norms["post_feedforward_layernorm"](ffn)
        else:  # y = x + y_attention + y_ffn
            rebuilt = x + attention + ffn
    torch.testing.assert_close(rebuilt, block_y)


def test_the_head_is_that_of_the_classification_class(config: dict[str, Any], sites: SiteMap) -> None:
    built = on_meta({**config, "num_labels": 5}, AutoModelForSequenceClassification)
    own = {n: tuple(p.shape) for n, p in built.named_parameters() if not n.startswith(f"{sites.prefix}.")}
    assert sites.head is not None
    assert sites.head.tensors(5) == own
    assert {n.split(".")[0] for n in own} == set(sites.head.modules)


def test_a_head_computes_the_class_logits(config: dict[str, Any], sites: SiteMap) -> None:
    from transformers.activations import ACT2FN

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(settings({**config, "pad_token_id": 1})).eval()
    ids = torch.randint(4, 90, (3, 7))
    base, head = model.base_model, sites.head
    assert head is not None
    with torch.no_grad():
        out = base(ids)
        picked = out.last_hidden_state[:, 0 if head.pooling == "first" else -1]
        h = out.pooler_output if head.pooling == "pooler" else picked
        state = model.state_dict()
        names = [n for n in head.tensors(2) if n.endswith("weight")]
        for i, name in enumerate(names):
            h = torch.nn.functional.linear(h, state[name], state.get(name.replace("weight", "bias")))
            h = ACT2FN[head.activation](h) if head.activation and i + 1 < len(names) else h
        torch.testing.assert_close(h, model(ids).logits)


def test_relative_positions_say_which_linears_read_their_table(model: Any, sites: SiteMap) -> None:
    calls: dict[str, int] = {}
    handles = [
        m.register_forward_hook(lambda *_, n=n: calls.update({n: calls.get(n, 0) + 1}))
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | Conv1D)
    ]
    model(torch.randint(4, 90, (2, 7)))
    for handle in handles:
        handle.remove()
    twice = {s.kind for s in sites.sites if s.kind in LINEARS and calls[s.path] > 1}
    assert twice == set(sites.relative.through if sites.relative else ())


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_take_the_defaults_of_the_configuration_class(family: str) -> None:
    short = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers")
    brief = {"model_type": family, short: 1}
    assert site_map(brief) == site_map(settings(brief).to_dict())
    assert site_map(brief).parameters == sum(p.numel() for p in on_meta(brief).parameters())
    assert site_map({"model_type": family}).layers == settings({"model_type": family}).num_hidden_layers


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"model_type": "bert"}, 109_482_240),
        ({"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1}, 124_645_632),
        ({"model_type": "gpt2"}, 124_439_808),
        ({"model_type": "llama"}, 6_738_415_616 - 32000 * 4096),
    ],
    ids=["bert-base", "roberta-base", "gpt2", "llama-7b"],
)
def test_published_sizes(config: dict[str, Any], count: int) -> None:
    assert site_map(config).parameters == count
    if config["model_type"] != "llama":
        assert count == sum(p.numel() for p in on_meta(config).parameters())


def test_bitfit_and_the_roberta_head_count_as_published() -> None:
    roberta = site_map({"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1})
    assert roberta.head is not None
    head = sum(torch.Size(s).numel() for s in roberta.head.tensors(2).values())
    assert head == 592_130
    biases = sum(s.d_out for s in roberta.select(["bias"], range(12)))
    assert biases == 12 * (7 * 768 + 3072) + 768 == 694_274 - head
    assert (roberta.max_positions, roberta.position_offset) == (512, 2)


def test_select_takes_layers_and_says_what_is_wrong() -> None:
    bert = site_map(TINY["bert"])
    assert [s.layer for s in bert.select(["q", "v"], [1])] == [1, 1]
    assert [s.layer for s in bert.select(["input", "q"], [0])] == [-1, 0]
    assert -1 not in {s.layer for s in bert.select(["bias"], [0])}
    with pytest.raises(SiteError, match=r'no sites "quary"'):
        bert.select(["quary"], [0])
    with pytest.raises(SiteError, match="layers 0 to 1"):
        bert.select(["q"], [2])
    with pytest.raises(SiteError, match="no gate linear"):
        bert.select(["gate"], [0])
    with pytest.raises(SiteError, match="attention interface"):
        site_map(TINY["deberta-v2"]).select(["kv"], [0])


def test_impossible_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="not a multiple of 5"):
        site_map({**TINY["bert"], "num_attention_heads": 5})
    with pytest.raises(SiteError, match="cannot share 3"):
        site_map({**TINY["llama"], "num_key_value_heads": 3})
    with pytest.raises(SiteError, match="hidden_size: a positive whole number"):
        site_map({**TINY["bert"], "hidden_size": "32"})
    with pytest.raises(SiteError, match=r"no config\.json"):
        site_map(tmp_path)
    with pytest.raises(SiteError, match="local hub cache"):
        site_map("nobody/no-such-model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SiteError, match="model_type"):
        site_map(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY["gpt2"]))
    assert site_map(tmp_path) == site_map(str(tmp_path)) == site_map(TINY["gpt2"])


def test_modules_give_what_the_configuration_gives(config: dict[str, Any], sites: SiteMap) -> None:
    overrides = {}
    if config["model_type"] == "gpt2":
        overrides = {k: f"h.{{layer}}.attn.c_attn[{32 * i}:{32 * i + 32}]" for i, k in enumerate("qkv")}
    found = site_map_from_modules(config, overrides)
    assert found.parameters == sites.parameters
    assert found.attention_interface == sites.attention_interface
    if sites.relative is None:
        assert set(found.refused) == set(sites.refused)
        key = {(s.kind, s.path): (s.d_in, s.d_out, s.span, s.bias, s.transposed, s.stack) for s in sites.sites}
        assert key == {(s.kind, s.path): (s.d_in, s.d_out, s.span, s.bias, s.transposed, s.stack) for s in found.sites}
        assert (found.position_offset, found.positions) == (sites.position_offset, sites.positions)


def test_unknown_models_are_mapped_by_name_or_say_how_to() -> None:
    opt = site_map(
        {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
        "num_attention_heads": 4,
         "num_hidden_layers": 2, "vocab_size": 90}
    )  # fmt: skip
    assert opt.select(["q"], [1])[0].path == "decoder.layers.1.self_attn.q_proj"
    assert (opt.causal, opt.attention_interface, opt.head is not None) == (True, True, True)
    neox = {
        "model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_hidden_layers": 2, "vocab_size": 90,
    }  # fmt: skip
    with pytest.raises(SiteError) as error:
        site_map(neox)
    assert "layers.{layer}.attention.query_key_value  (32 -> 96)" in str(error.value)
    assert "[model.sites]" in str(error.value)
    mapped = site_map(neox, {"up": "layers.{layer}.mlp.dense_h_to_4h"})
    assert mapped.select(["up"], [1])[0].d_out == 48
    assert "[model.sites]" in mapped.refused["q"]
    with pytest.raises(SiteError, match="Did you mean"):
        site_map(neox, {"up": "layers.{layer}.mlp.dense_h_to_5h"})
    with pytest.raises(SiteError, match='"upp" is no site'):
        site_map(neox, {"upp": "layers.{layer}.mlp.dense_h_to_4h"})
    with pytest.raises(SiteError, match='Did you mean "bert"'):
        site_map({"model_type": "berrt"})
    with pytest.raises(SiteError, match="of encoder-decoders there are: bart, mbart, mt5, t5"):
        site_map({"model_type": "pegasus", "encoder_layers": 1, "decoder_layers": 1})


def test_a_large_model_is_mapped_at_once_and_without_torch() -> None:
    code = """
import sys, time
from peftscape.spaces.sites import site_map
from peftscape.spaces import cost
start = time.perf_counter()
m = site_map({"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
              "num_attention_heads": 64, "num_key_value_heads": 8})
cost.forward_flops(m, 512), cost.activation_bytes(m, 512, 8, 0, 2)
print(time.perf_counter() - start, m.parameters, sorted({"torch", "transformers"} & set(sys.modules)))
"""
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert time.perf_counter() - start < 10
    assert float(out[0]) < 0.1
    assert int(out[1]) == 68_976_648_192 - 32000 * 8192
    assert out[2] == "[]"
