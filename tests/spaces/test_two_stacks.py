"""Encoder-decoders: FLOPs and kept bytes against what torch counts and autograd keeps of transformers' models."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from counted import kept_for
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from peftscape.spaces.design import Design
from peftscape.spaces.plan import Setting, plan
from peftscape.spaces.price import costs, train_flops
from peftscape.spaces.profiles import PROFILES
from peftscape.spaces.sites import site_map

VOCABULARY, WIDTH = 90, 64
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 160, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "t5": T5Config(**_T5),
    "flan-t5": T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=160, decoder_ffn_dim=160, max_position_embeddings=256, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    ),
}  # fmt: skip
ATTENTION = {"t5": ["q", "v"], "flan-t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}
EVERYWHERE = r".*\.(q|k|v|o|wi|wo|q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "lora": (peft.LoraConfig(r=8), [{"method": "lora"}]),
    "everywhere": (
        peft.LoraConfig(r=8, target_modules=EVERYWHERE),
        [{"method": "lora", "sites": ["q", "k", "v", "o", "up", "down"]}],
    ),
    "encoder": (
        peft.LoraConfig(r=8, target_modules=r".*encoder\..*\.(q|v|q_proj|v_proj)"),
        [{"method": "lora", "layers": [0, 1, 2]}],
    ),
    "decoder's end": (
        peft.LoraConfig(r=8, target_modules=r".*decoder\.(block|layers)\.1\..*\.(wo|fc2)"),
        [{"method": "lora", "layers": [4], "sites": ["down"]}],
    ),
    "prompt": (
        peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=10, num_transformer_submodules=1),
        [{"method": "prompt_tuning", "length": 10}],
    ),
    "full": (None, [{"method": "full_finetuning"}]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name", "dtype", "attention"),
    [
        *(("t5", name, "float32", "eager") for name in CASES),
        *(("t5", name, "bfloat16", "sdpa") for name in CASES if name != "full"),
        *(("flan-t5", name, "bfloat16", "eager") for name in ("lora", "full")),
        *(("bart", name, "bfloat16", "eager") for name in ("everywhere", "full")),
        ("bart", "everywhere", "float32", "sdpa"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_flops_and_kept_bytes_are_those_of_transformers_models(
    family: str, name: str, dtype: str, attention: str
) -> None:
    # All weights of a T5 with torch's fused attention: its biases then have gradients, which on the CPU another kernel
    # makes than on CUDA; so that is not compared.
    config, (theirs, placements) = CONFIGS[family], CASES[name]
    theirs = copy.deepcopy(theirs)
    if name == "lora":
        theirs.target_modules = set(ATTENTION[family])
    kind = BartForConditionalGeneration if family == "bart" else T5ForConditionalGeneration
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
    model = (model if theirs is None else peft.get_peft_model(model, theirs)).train()
    design, sites = Design.from_json({"placements": placements}), site_map(config.to_dict())
    how: Any = "eager" if attention == "eager" else "masked"
    real, told = [], []
    for batch, source, target in ((2, 64, 32), (3, 96, 80)):
        ids, labels = torch.randint(3, VOCABULARY, (batch, source)), torch.randint(3, VOCABULARY, (batch, target))
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        with FlopCounterMode(display=False) as forward:
            loss, there = kept_for(
                [*model.parameters(), *model.buffers()],
                lambda x=ids, m=mask, y=labels: model(input_ids=x, attention_mask=m, labels=y).loss,  # type: ignore[misc]
            )
        with FlopCounterMode(display=False) as backward:
            loss.backward()  # type: ignore[no-untyped-call]
        setting = Setting(batch=batch, length=source, target=target, dtype=dtype, attention=how)
        found = plan(design, sites, PROFILES["peft"], setting)  # a T5 built from a configuration is always tied
        if attention == "eager":  # torch does not count the CPU's fused kernel
            both = forward.get_total_flops() + backward.get_total_flops()
            assert found.step_flops == pytest.approx(both, rel=0.02)
        real.append(there - batch * target * VOCABULARY * loss.dtype.itemsize)  # the log-softmax
        told.append(found.memory.kept)
        assert found.adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)
        for parameter in model.parameters():
            parameter.grad = None
    assert told == pytest.approx(real, rel=0.1)
    assert told[1] - told[0] == pytest.approx(real[1] - real[0], rel=0.05)


def test_what_stays_beside_the_weights_costs_at_inference() -> None:
    sites = site_map(CONFIGS["t5"].to_dict())

    def at(placement: dict[str, Any]) -> int:
        design = Design.from_json({"placements": [placement]})
        return costs(design, sites, outputs=2, tokens=32, target=8, batch=2, head="mean").infer_flops

    merged = at({"method": "lora"})
    beside = at({"method": "sequential_adapter", "size": 4, "sites": ["ffn"]})
    d, m = WIDTH, 4
    assert beside - merged == 2 * 2 * d * m * (3 * 32 + 2 * 8)  # three layers read the source, two the target
    bare = Design()
    assert train_flops(bare, sites, 32, target=8)[1] == 0
    assert train_flops(bare, sites, 32, target=8)[0] < train_flops(bare, sites, 32)[0]
