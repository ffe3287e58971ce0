"""Kernel-mix against its formula a head at a time, against HF peft as a LoRA, and its count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from contract import SITES
from exported import base, close, peft_logits, trained
from plain import Params, assert_equals_plain, design, on_output
from torch import Tensor, nn

from peftscape.search.export import load
from peftscape.spaces.design import Design
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import Site, site_map

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WIDTH = 8  # of a head: 32 in 4 heads, of which Llama's keys and values have 2
SHARED = {"method": "lora", "sites": ["q", "o"], "rank": 2, "alpha": 2.0}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_it_is_its_formula_head_by_head(family: str) -> None:
    def formula(site: Site, params: Params, x: Tensor, y: Tensor) -> Tensor:
        a, b = (params[f"0/{site.kind}/{site.path}/{name}"] for name in "AB")
        change = y * 0
        for h in range(len(a)):
            own = slice(h * WIDTH, (h + 1) * WIDTH)
            if site.kind == "o":
                change = change + 0.7 * x[..., own] @ a[h].T @ b[h].T
            else:
                outputs = slice((site.span or (0, 0))[0] + own.start, (site.span or (0, 0))[0] + own.stop)
                change[..., outputs] = 0.7 * x @ a[h].T @ b[h].T
        return y + change

    def change(model: nn.Module, params: Params) -> None:
        for site in SITES[family].sites:
            if site.kind in ("q", "k", "v", "o"):
                on_output(model.get_submodule(site.path), lambda x, y, site=site: formula(site, params, x, y))  # type: ignore[misc]

    of = design({"method": "kernel_mix_lite", "sites": ["q", "k", "v", "o"], "rank": 3, "scale": 0.7})
    own = assert_equals_plain(of, family, change)
    heads = {key.split("/")[1]: len(value) for key, value in own.params.items() if key.endswith("/A")}
    few = 2 if family == "llama" else 4
    assert heads == {"q": 4, "k": few, "v": few, "o": 4}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_the_shared_part_it_is_one_lora_of_hf_peft(family: str, tmp_path: Path) -> None:
    folder = base(tmp_path, family)
    run = trained(folder, {"method": "kernel_mix_lite", "sites": ["q", "v", "o"], "rank": 2, "scale": 0.7}, SHARED)
    exported = run.export(tmp_path / "out")
    assert exported.format == "peft", exported.reason
    close(peft_logits(folder, tmp_path / "out"), run.logits())
    close(load(tmp_path / "out").logits(["where is the city", "a man"]), run.logits(["where is the city", "a man"]))


def test_it_counts_its_heads_and_a_rank_beyond_a_heads_width_is_refused() -> None:
    llama = site_map({
        "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256,
    })  # fmt: skip
    of = Design.from_json({"placements": [{"method": "kernel_mix_lite", "sites": ["q", "v", "o"], "rank": 2}]})
    assert adapter_size(of, llama) == 28 * 2 * (24 + 8 + 24) * (3072 + 128)
    wide = Design.from_json({"placements": [{"method": "kernel_mix_lite", "rank": 129}]})
    assert wide.check(llama)[0] == "placements[0].rank: 129 is larger than a head (128 wide)"
