"""Shipped shapes: parameters as published and as transformers builds them, counts as the papers have them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from peftscape.spaces.design import Design
from peftscape.spaces.plan_input import read_design, read_model
from peftscape.spaces.price import adapter_size, head_size
from peftscape.spaces.shapes import shape, shape_names
from peftscape.spaces.words import InputError

# With their output weights, as the hub's model cards (safetensors) and papers count them.
PUBLISHED = {
    "roberta-base": 124_645_632, "roberta-large": 355_359_744, "gpt2": 124_439_808, "t5-base": 222_903_552,
    "flan-t5-base": 247_577_856, "bart-base": 139_420_416, "bart-large": 406_291_456,
    "t5-large": 737_668_096, "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648, "gemma-7b": 8_537_680_896, "gemma-2-9b": 9_241_705_984,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    model = read_model(name)
    assert model.sites.parameters + (0 if model.tied else model.sites.vocab * model.sites.d_model) == PUBLISHED[name]


@pytest.mark.parametrize("name", shape_names())
def test_parameters_are_those_that_transformers_builds(name: str) -> None:
    config: dict[str, Any] = dict(shape(name))
    with torch.device("meta"):
        built = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    assert read_model(name).sites.parameters == sum(p.numel() for p in built.parameters())


LORA: dict[str, Any] = {"method": "lora", "sites": ["q", "v"], "rank": 8}
SEVEN = ["q", "k", "v", "o", "gate", "up", "down"]


# ../shared/reference/methods.md; RoBERTa's head of 592,130 is in all of its rows but the adapters'.
@pytest.mark.parametrize(
    ("model", "placement", "head", "expected"),
    [
        ("roberta-base", None, True, 592_130),
        ("roberta-base", {"method": "prompt_tuning", "length": 20}, True, 607_490),
        ("roberta-base", {"method": "prefix_tuning", "length": 20}, True, 960_770),
        ("roberta-base", {"method": "bitfit"}, True, 694_274),
        ("roberta-base", LORA, True, 887_042),
        ("t5-base", LORA, False, 884_736),
        ("llama-7b", {"method": "lora", "sites": SEVEN, "rank": 64}, False, 159_907_840),
        ("llama-7b", {"method": "ia3", "sites": SEVEN}, False, 1_581_056),
        ("llama-3.2-3b", LORA | {"rank": 32}, False, 9_175_040),
        ("llama-3.2-3b", {"method": "prefix_tuning", "length": 200}, False, 11_468_800),
        ("llama-3.2-3b", {"method": "ia3"}, False, 286_720),
    ],
    ids=str,
)
def test_trained_counts_are_those_of_the_papers(
    model: str, placement: dict[str, Any] | None, head: bool, expected: int
) -> None:
    sites = read_model(model).sites
    design = Design.from_json({"placements": [placement] if placement else []})
    assert adapter_size(design, sites) + (head_size(sites, 2, "class") if head else 0) == expected


def test_encoder_decoders_have_three_attentions() -> None:
    found = read_model("t5-base")
    assert {s.stack for s in found.sites.sites if s.kind == "q"} == {"encoder", "decoder", "cross"}


def test_falcon_refuses_what_lies_in_turns() -> None:
    assert "turns" in read_model("falcon-180b").sites.refused["q"]
    assert [s.span for s in read_model("falcon-7b").sites.select("qkv", [0])] == [(0, 4544), (4544, 4608), (4608, 4672)]


@pytest.mark.parametrize(("word", "hint"), [("roberta-larg", "roberta-large"), ("lama-7b", "llama-7b")])
def test_a_wrong_model_names_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(InputError, match=f'Did you mean "{hint}"'):
        read_model(word)


def test_a_design_is_a_name_json_or_a_file(tmp_path: Any) -> None:
    written = tmp_path / "d.json"
    written.write_text('{"placements": [{"method": "ia3"}]}')
    texts = ("ia3", '{"placements": [{"method": "ia3"}]}', str(written))
    assert len({d.placements for word in texts if isinstance(d := read_design(word), Design)}) == 1
    assert read_design("unified") == "unified"
    assert read_design("space:lora") == "lora"
    assert isinstance(read_design("lora"), Design)
    for wrong in ("lorra", "{not", "space:unifid"):
        with pytest.raises(InputError):
            read_design(wrong)


def test_the_largest_is_planned_in_a_second_without_torch() -> None:
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from peftscape.spaces.plan_input import read_design, read_model\n"
        "from peftscape.spaces.plan import Setting, plan\n"
        "from peftscape.spaces.profiles import PROFILES\n"
        "m = read_model('falcon-180b')\n"
        "plan(read_design('full_finetuning'), m.sites, PROFILES['peft'], Setting())\n"
        "assert not {'torch', 'transformers', 'optuna'} & set(sys.modules)\n"
        "print(time.perf_counter() - t)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1
