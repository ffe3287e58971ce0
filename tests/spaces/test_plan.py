"""Plans, held against what the engine and HF peft really do on the CPU, and against figures of papers."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from counted import kept_for
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from peftscape.analysis.plan_figure import memory_figure, memory_page
from peftscape.search.adapter_folder import Card, save
from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.spaces.design import Design
from peftscape.spaces.devices import DEVICES, UTILISATION, device
from peftscape.spaces.kept import kept
from peftscape.spaces.plan import Plan, Setting, plan
from peftscape.spaces.plan_device import fit
from peftscape.spaces.plan_input import read_design, read_model
from peftscape.spaces.plan_space import QUANTILES, spread
from peftscape.spaces.price import costs
from peftscape.spaces.profiles import PROFILES, profile
from peftscape.spaces.sites import site_map
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160,
    "max_position_embeddings": 256, "pad_token_id": 1,
}  # fmt: skip
MID = {**SHAPE, "hidden_size": 256, "intermediate_size": 704}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SHAPE),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=64, n_layer=3, n_head=4, n_positions=256, pad_token_id=1, bos_token_id=2, eos_token_id=2
    ),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "llama-mid": LlamaConfig(**MID, num_key_value_heads=2),
}
PLACEMENTS: dict[str, list[dict[str, Any]]] = {
    "head_only": [],
    "full_finetuning": [{"method": "full_finetuning"}],
    "lora": [{"method": "lora"}],
    "lora everywhere": [{"method": "lora", "sites": ["q", "k", "v", "o", "up", "down"], "rank": 16}],
    "lora on top": [{"method": "lora", "layers": [2]}],
    "masked lora": [{"method": "lora", "mask": {"sparsity": 0.5}}],
    "sequential": [{"method": "sequential_adapter", "size": 16}],
    "parallel": [{"method": "parallel_adapter", "size": 16, "sites": ["attention", "ffn"], "activation": "silu"}],
    "prefix": [{"method": "prefix_tuning", "length": 16}],
    "prompt": [{"method": "prompt_tuning", "length": 16}],
    "ia3": [{"method": "ia3"}],
    "bitfit": [{"method": "bitfit"}],
    "mam": [{"method": "parallel_adapter", "size": 16}, {"method": "prefix_tuning", "length": 8}],
}
tiny = pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
families = pytest.mark.parametrize("family", CONFIGS)
methods = pytest.mark.parametrize("name", PLACEMENTS)


def design_of(name: str) -> Design:
    return Design.from_json({"placements": PLACEMENTS[name]})


class Run:
    """One lane alone in a cohort, as the search trains it."""

    def __init__(self, family: str, name: str, *, batch: int, tokens: int, dtype: str = "float32") -> None:
        self.backbone = Backbone.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype)
        ids = [np.random.default_rng(0).integers(4, 60, size=tokens) for _ in range(batch)]
        split = EncodedSplit(ids, None, np.zeros(batch, dtype=np.int64), 0, np.array([tokens] * batch))
        self.head = Head(self.backbone, kind="class", outputs=2)
        self.design = design_of(name)
        self.lane: Lane = new_lane(self.design, seed=0, steps=4, backbone=self.backbone, head=self.head)
        self.cohort = Cohort(self.backbone, self.head, split, batch_size=batch)
        self.cohort.admit(self.lane)
        self.batch = batch

    def loss(self) -> torch.Tensor:
        return self.cohort.losses([np.arange(self.batch)]).sum()


def really_kept(family: str, name: str, batch: int, tokens: int, dtype: str) -> int:
    run = Run(family, name, batch=batch, tokens=tokens, dtype=dtype)
    model = run.backbone.model
    return kept_for([*model.parameters(), *model.buffers(), *run.lane.params.values()], run.loss)[1]


@methods
@tiny
def test_kept_activations_are_what_the_cohort_keeps_and_grow_alike(family: str, name: str) -> None:
    dtype = "float32" if family == "bert" else "bfloat16"
    sites, design = site_map(CONFIGS[family].to_dict()), design_of(name)
    real, told = [], []
    for batch, tokens in ((1, 40), (3, 40), (1, 104)):
        real.append(really_kept(family, name, batch, tokens, dtype))
        found = kept(design, sites, PROFILES["peftscape"], tokens=tokens, batch=batch, dtype=dtype)
        told.append(found.backbone + found.adapters + found.copies)
    if told[0] == 0:  # the head's own, which a backbone of any size has
        assert max(real) < 8 * 3 * sites.d_model * 4
        return
    assert told == pytest.approx(real, rel=0.1)
    growth = [(r - real[0], t - told[0]) for r, t in zip(real[1:], told[1:], strict=True)]
    for there, here in growth:
        assert here == pytest.approx(there, rel=0.05)


@methods
@families
def test_flops_are_what_torch_counts(family: str, name: str) -> None:
    run = Run(family, name, batch=3, tokens=48)
    with FlopCounterMode(display=False) as forward:
        loss = run.loss()
    with FlopCounterMode(display=False) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    found = costs(run.design, run.backbone.sites, outputs=2, tokens=48, batch=3)
    assert found.train_flops == pytest.approx((forward.get_total_flops() + backward.get_total_flops()) / 3, rel=0.02)
    if not any(p.method.merges for p in run.design.placements):
        assert found.infer_flops == pytest.approx(forward.get_total_flops() / 3, rel=0.02)


@methods
@tiny
def test_counts_and_file_bytes_are_those_that_are_built_and_written(family: str, name: str, tmp_path: Path) -> None:
    run = Run(family, name, batch=1, tokens=8)
    found = costs(run.design, run.backbone.sites, outputs=2, tokens=8, batch=1)
    kept_values = sum(int(run.lane.masks[k].sum()) if k in run.lane.masks else v.numel()
                      for k, v in run.lane.params.items())  # fmt: skip
    assert found.trainable == kept_values
    for key, value in run.lane.params.items():  # no kept value may be zero: a file stores those that are not
        value.data.fill_(1.0).mul_(run.lane.masks.get(key, torch.ones(())))
    save(run.lane.adapter(), Card(design=run.design, head="class", outputs=2, max_length=64), run.backbone, run.head,
         tmp_path)  # fmt: skip
    assert found.adapter_bytes == os.path.getsize(tmp_path / "adapter.safetensors")


CAUSAL: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 352, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
# Without dropout: on the CPU its mask is kept as numbers, on CUDA as bytes (which the profile counts).
THEIRS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "lora": (peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), [{"method": "lora"}]),
    "lora on the FFN": (
        peft.LoraConfig(r=8, target_modules=["gate_proj", "up_proj", "down_proj"]),
        [{"method": "lora", "sites": ["gate", "up", "down"]}],
    ),
    "ia3": (
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        [{"method": "ia3"}],
    ),
    "prefix": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
        [{"method": "prefix_tuning", "length": 20}],
    ),
    "prompt": (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
        [{"method": "prompt_tuning", "length": 20}],
    ),
    "full": (None, [{"method": "full_finetuning"}]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.filterwarnings("ignore")
def test_the_peft_profile_keeps_what_peft_keeps(name: str, dtype: str) -> None:
    config, placements = THEIRS[name]
    shape = LlamaConfig(**CAUSAL)
    real, told = [], []
    for batch, tokens in ((2, 64), (4, 128)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        if config is not None:
            model = peft.get_peft_model(model, copy.deepcopy(config))
        model.train()
        ids = torch.randint(3, 90, (batch, tokens))
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        _, there = kept_for(
            [*model.parameters(), *model.buffers()],
            lambda m=model, ids=ids, mask=mask: m(input_ids=ids, attention_mask=mask, labels=ids).loss,  # type: ignore[misc]
        )
        setting = Setting(batch=batch, length=tokens, dtype=dtype)
        design = Design.from_json({"placements": placements})
        found = plan(design, site_map(shape.to_dict()), PROFILES["peft"], setting)
        assert found.adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)
        prompt = design.prompt_length()
        real.append(there - batch * (tokens + prompt) * 90 * 4)  # the log-softmax, which a plan counts with the logits
        told.append(found.memory.kept)
    assert told == pytest.approx(real, rel=0.1)
    assert told[1] - told[0] == pytest.approx(real[1] - real[0], rel=0.05)


def planner_errors() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "planner_errors.py"
    spec = importlib.util.spec_from_file_location("planner_errors", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_litgpts_table_is_met() -> None:
    for case, predicted, published in planner_errors().litgpt_rows():
        assert predicted == pytest.approx(published, rel=0.1), case


def test_pefts_published_runs_are_met() -> None:
    # Bytes of four of the runs (huggingface/peft, method_comparison/MetaMathQA/results); all in docs/planner.md.
    sites = read_model("llama-3.2-3b").sites
    runs: dict[str, tuple[dict[str, Any], float]] = {
        "lora": ({"method": "lora", "rank": 32}, 22.29e9),
        "ia3": ({"method": "ia3"}, 23.23e9),
        "prefix": ({"method": "prefix_tuning", "length": 200}, 21.95e9),
        "prompt": ({"method": "prompt_tuning", "length": 200}, 24.39e9),
        "full": ({"method": "full_finetuning"}, 38.87e9),
    }
    for name, (placement, published) in runs.items():
        found = plan(
            Design.from_json({"placements": [placement]}), sites, PROFILES["peft"], Setting(batch=4, length=768)
        )
        assert found.memory.peak == pytest.approx(published, rel=0.15), name


def make(model: str, word: str, profile_name: str = "peft", **setting: Any) -> Plan:
    known, design = read_model(model), read_design(word)
    assert isinstance(design, Design)
    return plan(design, known.sites, PROFILES[profile_name], Setting(**setting), model=model, tied=known.tied)


def test_falcon_needs_its_states_and_36_devices() -> None:
    found = make("falcon-180b", "full_finetuning", batch=1)
    assert found.mixed_precision_bytes == 16 * found.backbone
    assert found.mixed_precision_bytes == pytest.approx(2880e9, rel=0.01)
    of = fit(lambda n: make("falcon-180b", "full_finetuning", batch=n), 1, device("a100-80gb"))
    assert not of.fits
    assert of.largest_batch == 0
    assert of.state_devices == 36 == 2880 // 80
    assert 64 * 80 == 5120


def test_a_plan_adds_up_and_its_device_agrees_with_it() -> None:
    for word in ("lora", "houlsby", "full_finetuning", "head_only", "prompt"):
        found = make("roberta-large", word, "peftscape")
        assert sum(found.memory.parts().values()) == found.memory.peak
        assert json.loads(json.dumps(found.json()))["trainable"] == found.total
    at = lambda n: make("llama-3-8b", "lora", "peft", batch=n, length=1024)  # noqa: E731
    of = fit(at, 4, DEVICES["a100-80gb"])
    one, more = at(of.largest_batch).memory, at(of.largest_batch + 1).memory
    assert one.peak <= of.usable_bytes < more.peak
    assert of.fastest_s < of.step_s < of.slowest_s
    assert at(4).step_flops / (DEVICES["a100-80gb"].flops * UTILISATION[1]) == pytest.approx(of.step_s)


def test_precision_and_checkpointing_save_what_they_must() -> None:
    plain = make("llama-2-7b", "lora", "peft", batch=2).memory
    for smaller in ({"dtype": "nf4"}, {"checkpointing": True}, {"length": 256}, {"batch": 1}):
        found = make("llama-2-7b", "lora", "peft", **{"batch": 2, **smaller}).memory
        assert found.peak < plain.peak
    with pytest.raises(InputError, match="batch: 0"):
        make("llama-2-7b", "lora", batch=0)
    with pytest.raises(InputError, match="no causal model"):
        make("roberta-base", "lora", objective="lm")
    with pytest.raises(InputError, match='Did you mean "peft"'):
        profile("pef")
    with pytest.raises(InputError, match='Did you mean "a100-80gb"'):
        device("a100-80")


def test_an_encoder_decoder_has_a_target_of_its_own() -> None:
    short, long = (make("t5-base", "lora", length=256, target=target) for target in (16, 256))
    assert short.adapter == long.adapter == 884_736
    assert short.memory.kept < long.memory.kept
    assert short.memory.logits * 16 == long.memory.logits
    assert make("t5-base", "lora", length=256) == replace(long, setting=replace(long.setting, target=None))
    with pytest.raises(InputError, match="one stack"):
        make("gpt2", "lora", target=8)


def test_a_space_has_a_spread() -> None:
    sites = read_model("roberta-base").sites
    space = read_space("unified", sites)
    of = spread(space, sites, PROFILES["peftscape"], Setting(), draws=40, limit=1_000_000, device=device("t4"))
    assert of.designs == 40
    for values in of.quantiles.values():
        assert list(values) == sorted(values)
        assert len(values) == len(QUANTILES)
    assert 0 < of.excluded["parameters"] < 1
    assert of.search_s is not None
    assert of.search_s[0] < of.search_s[1] < of.search_s[2]
    assert of == spread(space, sites, PROFILES["peftscape"], Setting(), draws=40, limit=1_000_000, device=device("t4"))


def test_the_figure_stacks_to_the_peak() -> None:
    plans = [make("roberta-base", word, "peftscape").json() for word in ("lora", "full_finetuning")]
    figure = memory_figure(plans, limit_bytes=16 * 10**9)
    for i, one in enumerate(plans):
        assert sum(bar["y"][i] for bar in figure["data"]) == pytest.approx(one["memory"]["peak"] / 1e9)
    assert "Plotly.newPlot" in memory_page(figure)
