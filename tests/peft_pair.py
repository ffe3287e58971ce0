"""A lane and HF peft's model on one backbone: outputs and gradients with copied weights, float32, no dropout.

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

    def logits(self, params: Any, states: Tensor, batch: Batch, **more: Any) -> Tensor:
        self.states, self.batch = states, batch
        return super().logits(params, states, batch, **more)


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
        return self.head.states[self.head.batch.text_rows < len(self.split.ids)], logits

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
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
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


def columns(site: Site) -> slice:
    """The outputs of its linear that are the site's."""
    return slice(*site.span) if site.span else slice(None)


def grad(pair: Pair, site: Site, name: str) -> Tensor:
    return tensor_grad(pair.ours(f"{site.kind}/{site.path}", name))


def tensor_grad(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad
