"""Trained parameters of published designs, from configurations alone (reference/methods.md, the counts table)."""

from __future__ import annotations

from typing import Any

import pytest

from peftscape.spaces.design import Design
from peftscape.spaces.methods import method, methods
from peftscape.spaces.price import adapter_size, costs, head_size
from peftscape.spaces.sites import site_map
from peftscape.spaces.words import InputError

ROBERTA_BASE = {
    "model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    "pad_token_id": 1,
}  # fmt: skip
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
}  # fmt: skip
LLAMA_32_3B = {
    "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256,
}  # fmt: skip
SEVEN = ["q", "k", "v", "o", "gate", "up", "down"]
HEAD = 592_130  # d^2 + d + 2d + 2 for RoBERTa-base and two labels


def sizes(config: dict[str, Any], *placements: dict[str, Any]) -> tuple[int, int, int]:
    """(adapter, head, total) for two labels."""
    sites = site_map(config)
    found = costs(Design.from_json({"placements": list(placements)}), sites, outputs=2, tokens=32, batch=8)
    assert found.adapter == adapter_size(Design.from_json({"placements": list(placements)}), sites)
    assert found.head == head_size(sites, 2, "class")
    return found.adapter, found.head, found.trainable


@pytest.mark.parametrize(
    ("total", "placements"),
    [
        (592_130, []),
        (592_130, [{"method": "head_only"}]),
        (607_490, [{"method": "prompt_tuning", "length": 20}]),
        (960_770, [{"method": "prefix_tuning", "length": 20}]),
        # Key and value where they come out, both output.dense where they read.
        (656_642, [{"method": "ia3", "sites": ["k", "v", "o", "down"], "inputs": ["o", "down"]}]),
        (694_274, [{"method": "bitfit"}]),
        (887_042, [{"method": "lora", "rank": 8, "sites": ["q", "v"]}]),
    ],
)
def test_roberta_base_with_two_labels(total: int, placements: list[dict[str, Any]]) -> None:
    assert sizes(ROBERTA_BASE, *placements) == (total - HEAD, HEAD, total)


def test_a_houlsby_adapter_on_roberta_base_is_the_published_count_without_its_layernorms() -> None:
    """7,414,464 counts one LayerNorm (gain and bias) a layer."""
    layers, d, m = 12, 768, 200
    adapter, head, total = sizes(
        ROBERTA_BASE, {"method": "sequential_adapter", "size": m, "sites": ["attention", "ffn"]}
    )
    assert adapter == layers * 2 * (2 * d * m + m + d) == 7_414_464 - layers * 2 * d
    assert total == adapter + head


@pytest.mark.parametrize(
    ("config", "adapter", "placement"),
    [
        (LLAMA_7B, 159_907_840, {"method": "lora", "rank": 64, "sites": SEVEN}),
        # Outputs of six linears, and the input of `down`.
        (LLAMA_7B, 1_581_056, {"method": "ia3", "sites": SEVEN}),
        (LLAMA_32_3B, 9_175_040, {"method": "lora", "rank": 32, "sites": ["q", "v"]}),
        (LLAMA_32_3B, 11_468_800, {"method": "prefix_tuning", "length": 200}),
        (LLAMA_32_3B, 286_720, {"method": "ia3", "sites": ["k", "v", "down"]}),
    ],
)
def test_llama_with_two_labels(config: dict[str, Any], adapter: int, placement: dict[str, Any]) -> None:
    head = 2 * config["hidden_size"]  # the score layer has no bias
    assert sizes(config, placement) == (adapter, head, adapter + head)


@pytest.mark.parametrize("m", [16, 200])
def test_a_parallel_adapter_has_a_sequential_ones_count(m: int) -> None:
    d, layers = 768, 12
    assert sizes(ROBERTA_BASE, {"method": "parallel_adapter", "size": m})[0] == layers * (2 * d * m + m + d)


def test_full_finetuning_trains_every_parameter_of_the_base_model() -> None:
    d, f, layers, vocab, rows = 768, 3072, 12, 50265, 514
    layer = 4 * (d * d + d) + 2 * d * f + d + f + 4 * d
    base = (vocab + rows + 1) * d + 2 * d + layers * layer + d * d + d  # the pooler that AutoModel makes
    assert sizes(ROBERTA_BASE, {"method": "full_finetuning"})[0] == base


def test_bitfit_on_llama_says_that_there_are_no_biases() -> None:
    errors = Design.from_json({"placements": [{"method": "bitfit"}]}).check(site_map(LLAMA_7B))
    assert errors == ["placements[0].sites: bias: this model has no biases"]


def test_a_mask_counts_what_it_keeps() -> None:
    whole, _, _ = sizes(ROBERTA_BASE, {"method": "lora", "rank": 8})
    masked, _, _ = sizes(ROBERTA_BASE, {"method": "lora", "rank": 8, "mask": {"sparsity": 0.75}})
    assert 4 * masked == whole
    # Vectors are never masked.
    d, m, layers = 768, 64, 12
    adapter, _, _ = sizes(
        ROBERTA_BASE, {"method": "sequential_adapter", "size": m, "sites": ["ffn"], "mask": {"sparsity": 0.5}}
    )
    assert adapter == layers * (d * m + m + d)


def test_methods_are_found_by_lying_in_their_folder() -> None:
    assert list(methods()) == sorted(methods())
    assert set(methods()) >= {
        "bitfit", "full_finetuning", "head_only", "ia3", "lora", "parallel_adapter", "prefix_tuning",
        "prompt_tuning", "sequential_adapter",
    }  # fmt: skip
    assert method("lora") is methods()["lora"]
    with pytest.raises(InputError, match=r'no method "prefix". Did you mean "prefix_tuning"\?'):
        method("prefix")


def test_a_new_file_is_a_method_without_any_other_change(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import peftscape.spaces.methods as package

    (tmp_path / "half.py").write_text(
        '"""A scaling that halves."""\n'
        "from peftscape.spaces.methods.base import Method, Tensor\n\n\n"
        "class Half(Method):\n"
        '    """y / 2."""\n\n'
        '    name, category = "half", "additive"\n'
        '    sites = frozenset({"q"})\n'
        '    default_sites = ("q",)\n\n'
        "    def tensors(self, site):\n"
        '        return {"s": Tensor((site.d_out,))}\n'
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    package.methods.cache_clear()
    try:
        assert "half" in package.methods()
        assert sizes(ROBERTA_BASE, {"method": "half"})[0] == 12 * 768
    finally:
        monkeypatch.undo()
        package.methods.cache_clear()
    assert "half" not in package.methods()
