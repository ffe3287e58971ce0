"""A design's costs alone, held against what torch counts, what lands on disk, and what must grow with what."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.export import Card, save
from peftscape.search.head import Head
from peftscape.search.lane import new_lane
from peftscape.search.masks import draw_masks
from peftscape.spaces.design import Design
from peftscape.spaces.presets import textbook
from peftscape.spaces.price import costs
from peftscape.spaces.sites import SiteMap, site_map

TOKENS, BATCH, OUTPUTS = 24, 4, 3
#: Measured training FLOPs over told ones, over all cases below: 0.9996 to 1.0028.
FLOPS = 0.005

_SHAPE: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SHAPE),
    "gpt2": GPT2Config(**_SHAPE, n_inner=160),
    "llama": LlamaConfig(**_SHAPE, num_key_value_heads=2),
}
SITES: dict[str, SiteMap] = {family: site_map(config.to_dict()) for family, config in CONFIGS.items()}
LORA: dict[str, Any] = {"method": "lora", "rank": 8}
DESIGNS: dict[str, list[dict[str, Any]]] = {
    "head_only": [],
    "lora": [LORA],
    "lora on top": [{**LORA, "layers": [2], "sites": ["up", "down"]}],
    "lora masked": [{**LORA, "mask": {"sparsity": 0.75, "score": "random"}}],
    "lora snip": [{**LORA, "sites": ["q", "o"], "mask": {"sparsity": 0.5, "score": "snip"}}],
    "sequential": [{"method": "sequential_adapter", "size": 16}],
    "parallel": [{"method": "parallel_adapter", "size": 16, "sites": ["attention", "ffn"], "layers": [1, 2]}],
    "parallel masked": [{"method": "parallel_adapter", "size": 13, "mask": {"sparsity": 0.9}}],
    "ia3": [{"method": "ia3"}],
    "bitfit": [{"method": "bitfit"}],
    "bitfit above": [{"method": "bitfit", "layers": [1, 2]}],
    "prefix": [{"method": "prefix_tuning", "length": 8}],
    "prompt": [{"method": "prompt_tuning", "length": 8}],
    "mam": [{"method": "parallel_adapter", "size": 16}, {"method": "prefix_tuning", "length": 8}],
    "full": [{"method": "full_finetuning"}],
    "many": [LORA, {"method": "prefix_tuning", "length": 4}, {"method": "sequential_adapter", "size": 8}],
}
CASES = [
    (name, family)
    for name, family in itertools.product(DESIGNS, CONFIGS)
    if not Design.from_json({"placements": DESIGNS[name]}).check(SITES[family])
]
cases = pytest.mark.parametrize(("name", "family"), CASES)


def design(name: str) -> Design:
    return Design.from_json({"placements": DESIGNS[name]})


def price(of: Design, family: str = "bert", *, tokens: int = TOKENS, batch: int = BATCH, **more: Any) -> Any:
    return costs(of, SITES[family], outputs=OUTPUTS, tokens=tokens, batch=batch, **more)


@functools.cache
def built(family: str) -> Backbone:
    return Backbone.from_config(CONFIGS[family])


def cohort(of: Design, family: str) -> Cohort:
    """One lane on texts of one length, so that nothing is padding."""
    backbone = built(family)
    ids = [np.random.default_rng(i).integers(3, 99, size=TOKENS) for i in range(BATCH)]
    data = EncodedSplit(ids, None, np.arange(BATCH) % OUTPUTS, 0, np.full(BATCH, TOKENS))
    made = Cohort(backbone, Head(backbone, kind="class", outputs=OUTPUTS), data, batch_size=BATCH)
    lane = new_lane(of, seed=0, steps=1, backbone=backbone, head=made.head)
    draw_masks(lane, made)
    made.admit(lane)
    return made


@cases
def test_flops_are_those_that_torch_counts(name: str, family: str) -> None:
    of = design(name)
    run = cohort(of, family)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        run.logits([np.arange(BATCH)], run.train)
    with FlopCounterMode(display=False) as both:
        run.losses([np.arange(BATCH)]).sum().backward()
    run.close()
    told = price(of, family)
    assert both.get_total_flops() / BATCH == pytest.approx(told.train_flops, rel=FLOPS)
    merged = sum(  # what a method that merges adds is in the forward of training, not in that of inference
        p.method.flops(s, TOKENS) for p in of.placements if p.method.merges for s in p.where(SITES[family])
    )
    assert forward.get_total_flops() / BATCH == pytest.approx(told.infer_flops + merged, rel=FLOPS)


@cases
def test_adapter_bytes_are_those_of_the_file_after_training(name: str, family: str, tmp_path: Path) -> None:
    of = design(name)
    run = cohort(of, family)
    lane = run.lanes[0]
    for key, value in lane.params.items():
        value.data.fill_(0.1).mul_(lane.masks.get(key, torch.ones(())))
    card = Card(design=of, head="class", outputs=OUTPUTS, max_length=TOKENS)
    folder = save(lane.adapter(), card, run.backbone, run.head, tmp_path)
    run.close()
    assert price(of, family).adapter_bytes == (folder / "adapter.safetensors").stat().st_size


@cases
def test_bytes_grow_with_the_batch_and_with_the_length(name: str, family: str) -> None:
    of = design(name)
    for dtype in ("float32", "bfloat16"):
        by_batch = [price(of, family, batch=b, dtype=dtype).peak_bytes for b in (1, 2, 4, 8, 16, 32, 64)]
        by_length = [price(of, family, tokens=t, dtype=dtype).peak_bytes for t in (1, 2, 4, 8, 16, 32, 64, 100)]
        for row in (by_batch, by_length):
            assert row == sorted(row)
            assert row[0] < row[-1]
    assert price(of, family, dtype="bfloat16").peak_bytes < price(of, family, dtype="float32").peak_bytes


@pytest.mark.parametrize(
    ("method", "knob", "sizes"),
    [
        ("lora", "rank", (1, 2, 8, 64)),
        ("sequential_adapter", "size", (1, 4, 64)),
        ("parallel_adapter", "size", (1, 4, 64)),
        ("prefix_tuning", "length", (1, 4, 32)),
        ("prompt_tuning", "length", (1, 4, 32)),
    ],
)
def test_every_cost_grows_with_a_methods_size(method: str, knob: str, sizes: tuple[int, ...]) -> None:
    found = [price(Design.from_json({"placements": [{"method": method, knob: n}]})) for n in sizes]
    for name in ("adapter", "train_flops", "infer_flops", "peak_bytes", "adapter_bytes"):
        values = [getattr(c, name) for c in found]
        assert values == sorted(values), name
        if not (method == "lora" and name == "infer_flops"):  # it merges
            assert len(set(values)) == len(values), name


def test_adapting_fewer_and_higher_layers_is_cheaper() -> None:
    found = [price(Design.from_json({"placements": [{**LORA, "layers": n}]})) for n in ([0, 1, 2], [1, 2], [2])]
    for name in ("adapter", "train_flops", "peak_bytes", "adapter_bytes"):
        values = [getattr(c, name) for c in found]
        assert values == sorted(values, reverse=True), name
        assert len(set(values)) == 3, name
    low, high = (price(Design.from_json({"placements": [{**LORA, "layers": [n]}]})) for n in (0, 2))
    assert low.adapter == high.adapter
    assert (low.train_flops, low.peak_bytes) > (high.train_flops, high.peak_bytes)


def test_a_merged_method_costs_nothing_at_inference() -> None:
    bare = price(design("head_only")).infer_flops
    for name in ("lora", "ia3", "bitfit", "full"):
        assert price(design(name)).infer_flops == bare
    for name in ("sequential", "parallel", "prefix", "prompt"):
        assert price(design(name)).infer_flops > bare


def test_the_head_alone_is_the_cheapest_and_full_finetuning_the_dearest() -> None:
    bare, full = price(design("head_only")), price(design("full"))
    for name in DESIGNS:
        for cost in ("trainable", "train_flops", "peak_bytes", "adapter_bytes"):
            assert getattr(bare, cost) <= getattr(price(design(name)), cost) <= getattr(full, cost), (name, cost)


def test_a_mean_head_is_one_linear() -> None:
    found = price(design("lora"), head="mean")
    assert found.head == OUTPUTS * (64 + 1)


def test_a_model_without_a_classifier_says_how_to_go_on() -> None:
    sites = site_map({**CONFIGS["bert"].to_dict()})
    bare = type(sites)(**{**vars_of(sites), "head": None, "family": "odd"})
    with pytest.raises(ValueError, match='no sequence classifier for odd; use head = "mean"'):
        costs(design("lora"), bare, outputs=2, tokens=8, batch=2)
    assert costs(design("lora"), bare, outputs=2, tokens=8, batch=2, head="mean").head == 2 * 65


def vars_of(sites: SiteMap) -> dict[str, Any]:
    return {name: getattr(sites, name) for name in sites.__dataclass_fields__}


def test_costs_are_whole_numbers() -> None:
    for family, of in itertools.product(SITES, textbook().values()):
        if not of.check(SITES[family]):
            for name, value in vars(price(of, family)).items():
                assert type(value) is int, name


def test_the_head_alone_costs_the_same_in_both_ways_to_say_it() -> None:
    said, empty = (Design.from_json({"placements": rows}) for rows in ([{"method": "head_only"}], []))
    for config in ({"model_type": "bert"}, {"model_type": "llama"}, {"model_type": "t5"}):
        sites = site_map(config)
        of: dict[str, Any] = {"outputs": 6, "tokens": 12, "batch": 8, "dtype": "float32", "head": "mean"}
        of["target"] = 5 if sites.decoder_layers else None
        assert costs(said, sites, **of) == costs(empty, sites, **of)
