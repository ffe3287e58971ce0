"""A lane computes what HF peft computes: outputs and gradients with copied weights, float32, no dropout."""

import peft
import pytest
import torch
from peft_pair import DOWN, LENGTH, MODULES, Pair, close, columns, design, families, grad, tensor_grad

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@families
def test_lora_equals_peft(family: str) -> None:
    kinds = ("q", "k", "v", "up") if family == "gpt2" else ("q", "v", "up")  # GPT-2's c_attn holds all three
    pair = Pair(
        family,
        design(method="lora", rank=4, alpha=12.0, sites=list(kinds)),
        peft.LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=12, lora_dropout=0.0, fan_in_fan_out=family == "gpt2",
            target_modules=sorted({MODULES[family][k] for k in kinds}),
        ),
        typed=family == "bert",
    )  # fmt: skip
    sites = [s for s in pair.backbone.sites.sites if s.kind in kinds]
    layers = pair.modules()
    with torch.no_grad():
        for site in sites:
            if site.span and site.span[0]:  # peft has one A for all three
                pair.ours(f"{site.kind}/{site.path}", "A").copy_(pair.ours(f"q/{site.path}", "A"))
        for site in sites:
            layer = layers[site.path]
            layer.lora_A.default.weight.copy_(pair.ours(f"{site.kind}/{site.path}", "A"))
            layer.lora_B.default.weight[columns(site)] = pair.ours(f"{site.kind}/{site.path}", "B")
    pair.check_outputs()
    pair.check_head()
    assert len(layers) == len({s.path for s in sites})
    for path, layer in layers.items():
        here = [s for s in sites if s.path == path]
        close(torch.cat([grad(pair, s, "B") for s in here]), layer.lora_B.default.weight.grad)
        close(torch.stack([grad(pair, s, "A") for s in here]).sum(0), layer.lora_A.default.weight.grad)


@families
def test_ia3_equals_peft(family: str) -> None:
    kinds = ("k", "v", "down")
    pair = Pair(
        family,
        design(method="ia3"),
        peft.IA3Config(
            task_type="SEQ_CLS", fan_in_fan_out=family == "gpt2", feedforward_modules=f".*{DOWN[family]}",
            target_modules=rf".*({'|'.join(sorted({MODULES[family][k] for k in 'kv'}))}|{DOWN[family]})",
        ),
        typed=family == "bert",
    )  # fmt: skip
    sites = [s for s in pair.backbone.sites.sites if s.kind in kinds]
    layers = pair.modules()
    with torch.no_grad():
        for layer in layers.values():
            layer.ia3_l.default.fill_(1.0)
        for site in sites:
            scale = layers[site.path].ia3_l.default.view(-1)
            scale[columns(site)] = pair.ours(f"{site.kind}/{site.path}", "s")
    pair.check_outputs()
    pair.check_head()
    assert len(layers) == len({s.path for s in sites})
    for site in sites:
        theirs = layers[site.path].ia3_l.default.grad.view(-1)
        close(grad(pair, site, "s"), theirs[columns(site)])


@families
def test_prefix_tuning_equals_peft(family: str) -> None:
    pair = Pair(
        family,
        design(method="prefix_tuning", length=LENGTH),
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH),
        typed=family == "bert",
    )
    # One row a virtual token: the keys of layer 0, its values, the keys of layer 1 ...
    sites = [s for s in pair.backbone.sites.sites if s.kind == "kv"]
    keys = [f"0/kv/{s.path}/{name}" for s in sites for name in ("keys", "values")]
    table = pair.model.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        table.copy_(torch.cat([pair.lane.params[k] for k in keys], dim=1))
    pair.check_outputs()
    pair.check_head()
    close(torch.cat([tensor_grad(pair.lane.params[k]) for k in keys], dim=1), table.grad)


@families
def test_prompt_tuning_equals_peft(family: str) -> None:
    pair = Pair(
        family,
        design(method="prompt_tuning", length=LENGTH),
        peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH),
        typed=family == "bert",
        pooled=False,  # it pools virtual token 0, and padding where the last token is pooled
    )
    table = pair.model.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        table.copy_(pair.lane.params["0/input/prompt"])
    pair.check_outputs()
    close(pair.lane.params["0/input/prompt"].grad, table.grad)


def test_a_prefix_that_keeps_positions_differs_from_peft() -> None:
    """The shift is what peft does: without it the parity above would not hold."""
    shifted, kept = (
        Pair(
            "bert",
            design(method="prefix_tuning", length=LENGTH, positions=positions),
            peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH),
        ).mine()[0]
        for positions in ("shift", "keep")
    )
    assert (shifted - kept).abs().max() > 1e-2
