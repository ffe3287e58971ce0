"""A lane computes what HF peft computes: outputs and gradients with copied weights, float32, no dropout.

peft runs on a padded batch with an attention mask and eager attention, the lane on the same texts, packed.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.search.packing import Batch
from peftscape.spaces.design import Design
from peftscape.spaces.sites import Site

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 1e-5
OUTPUTS, LENGTH, PAD = 3, 4, 1
_SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": PAD,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SHAPE),
    "roberta": RobertaConfig(**_SHAPE),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64,
        pad_token_id=PAD, bos_token_id=2, eos_token_id=2,
    ),
    "llama": LlamaConfig(**_SHAPE, num_key_value_heads=2),
}  # fmt: skip
families = pytest.mark.parametrize("family", CONFIGS)

# Our kinds of sites, by the names of the modules that peft adapts.
MODULES = {
    "bert": {"q": "self.query", "k": "self.key", "v": "self.value", "up": "intermediate.dense"},
    "roberta": {"q": "self.query", "k": "self.key", "v": "self.value", "up": "intermediate.dense"},
    "gpt2": {"q": "c_attn", "k": "c_attn", "v": "c_attn", "up": "c_fc"},
    "llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "up": "up_proj"},
}
# `down` needs the layer before it: BERT's `attention.output.dense` ends alike.
DOWN = {"bert": r"layer\.\d+\.output\.dense", "gpt2": r"mlp\.c_proj", "llama": r"mlp\.down_proj"}
DOWN["roberta"] = DOWN["bert"]


class WatchedHead(Head):
    """A head that keeps the states it was given."""

    def logits(self, params: Any, states: Tensor, batch: Batch) -> Tensor:
        self.states, self.batch = states, batch
        return super().logits(params, states, batch)


@dataclass
class Pair:
    """A lane and peft's model on one backbone, with a few texts of unequal lengths."""

    family: str
    design: Design
    config: peft.PeftConfig
    typed: bool = False
    pooled: bool = True  # whether peft pools what we pool
    lane: Lane = field(init=False)
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        lengths = [5, 17, 3, 9, 12]
        ids = [random.integers(4, 60, size=n) for n in lengths]
        types = [np.sort(random.integers(0, 2, size=n)) for n in lengths] if self.typed else None
        self.split = EncodedSplit(ids, types, np.zeros(len(ids), dtype=np.int64), 0, np.array(lengths))
        backbone = Backbone.from_config(copy.deepcopy(CONFIGS[self.family]))
        lively(backbone.model.parameters(), seed=1)
        self.backbone, self.head = backbone, WatchedHead(backbone, kind="class", outputs=OUTPUTS)
        self.lane = new_lane(self.design, seed=0, steps=1, backbone=backbone, head=self.head)
        lively(self.lane.params.values(), seed=2)
        self.model = self.peft_model()

    def peft_model(self) -> Any:
        config = copy.deepcopy(CONFIGS[self.family])
        config.num_labels, config._attn_implementation = OUTPUTS, "eager"
        model = AutoModelForSequenceClassification.from_config(config)
        weights = self.backbone.model.state_dict()
        if self.family == "roberta":  # its classifier takes no pooler
            weights = {k: v for k, v in weights.items() if not k.startswith("pooler.")}
        model.base_model.load_state_dict(weights)
        for name, value in self.params("head/").items():
            model.get_parameter(name).data.copy_(value)
        wrapped = peft.get_peft_model(model, self.config)
        assert wrapped.active_peft_config.modules_to_save
        return wrapped.eval()

    def params(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.lane.params.items() if k.startswith(prefix)}

    def ours(self, path: str, name: str) -> Tensor:
        """The lane's tensor for a module inside the base model, of one kind where several share it."""
        return self.lane.params[f"0/{path}/{name}"]

    def theirs(self) -> tuple[Tensor, Tensor]:
        """States of the text tokens, end to end, and logits."""
        longest = max(map(len, self.split.ids))
        ids = torch.full((len(self.split.ids), longest), PAD)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(self.split.ids):
            ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
            if self.split.types is not None:
                types[i, : len(row)] = torch.from_numpy(self.split.types[i])
        more = {"token_type_ids": types} if self.typed else {}
        states: list[Tensor] = []
        hook = self.model.get_base_model().base_model.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state)
        )
        out = self.model(input_ids=ids, attention_mask=mask, **more)
        hook.remove()
        text = states[0][:, -longest:]  # behind a prompt's virtual tokens
        return text[mask.bool()], out.logits

    def mine(self) -> tuple[Tensor, Tensor]:
        cohort = Cohort(self.backbone, self.head, self.split, batch_size=5)
        cohort.admit(self.lane)
        logits = cohort.logits([np.arange(len(self.split.ids))], self.split)[0]
        cohort.close()
        return self.head.states[self.head.batch.text[0]], logits

    def check_outputs(self) -> None:
        """Runs both, compares, and leaves gradients of one scalar on both sides."""
        torch.manual_seed(3)
        found, wanted = self.mine(), self.theirs()
        weights = torch.randn_like(wanted[0]) / len(wanted[0])
        close(found[0], wanted[0])
        if self.pooled:
            close(found[1], wanted[1])
        for states, logits in (found, wanted):
            loss = (states * weights).sum() + (logits.square().mean() if self.pooled else 0)
            loss.backward()  # type: ignore[no-untyped-call]

    def check_head(self) -> None:
        if not self.pooled:
            return
        for name, value in self.params("head/").items():
            module, _, leaf = name.rpartition(".")
            top, _, rest = module.partition(".")
            wrapper = self.model.get_submodule(f"{self.model_path()}{top}.modules_to_save.default")
            close(value.grad, getattr(wrapper.get_submodule(rest), leaf).grad)

    def model_path(self) -> str:
        return "base_model." if self.config.is_prompt_learning else "base_model.model."

    def modules(self) -> dict[str, Any]:
        """peft's layers by their paths in the base model."""
        start = f"{self.model_path()}{self.backbone.sites.prefix}."
        return {
            name.removeprefix(start): module
            for name, module in self.model.named_modules()
            if isinstance(module, (peft.tuners.lora.LoraLayer, peft.tuners.ia3.IA3Layer))
        }


def lively(parameters: Iterable[Tensor], *, seed: int) -> None:
    """Weights far from a fresh start, so that attention is uneven; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.empty(parameter.shape).normal_(0, 0.2, generator=generator)
        is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
        parameter.data.copy_(noise + 1 if is_norm else noise)


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    """Largest difference within 1e-5 of the largest value."""
    assert found is not None
    assert wanted is not None
    assert wanted.abs().max() > 1e-3, "nothing is compared"
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * float(wanted.detach().abs().max()))


def design(**placement: Any) -> Design:
    return Design.from_json({"placements": [placement]})


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


def columns(site: Site) -> slice:
    """The outputs of its linear that are the site's."""
    return slice(*site.span) if site.span else slice(None)


def grad(pair: Pair, site: Site, name: str) -> Tensor:
    return tensor_grad(pair.ours(f"{site.kind}/{site.path}", name))


def tensor_grad(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad
