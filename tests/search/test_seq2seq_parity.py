"""Lanes on encoder-decoders against transformers' own class with HF peft: copied weights, one batch, loss, gradients.

No pretrained encoder-decoder is at hand: the models are tiny, with random weights far from a fresh start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_pair import close, lively
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM
from two_stacks import CONFIGS, PAD, pairs

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import make_head
from peftscape.search.lane import Lane, new_lane
from peftscape.spaces.design import Design

pytestmark = [  # peft 0.21's, of transformers 5 and of T5's own norm
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
Pair = Callable[[Tensor, Tensor], Any]
Match = Callable[[Lane, Any, Pair], None]
families = pytest.mark.parametrize("family", ["t5", "t5-gated", "bart", "mbart"])


def opened(family: str) -> tuple[Backbone, Cohort]:
    backbone = Backbone.from_config(copy.deepcopy(CONFIGS[family]))
    lively(backbone.model.parameters(), seed=1)
    head = make_head(backbone, kind="lm", outputs=2)
    return backbone, Cohort(backbone, head, pairs(), batch_size=4)


def theirs(backbone: Backbone, family: str) -> Any:
    """transformers' own class on the same weights."""
    config = copy.deepcopy(CONFIGS[family])
    config._attn_implementation = "eager"
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    base = model.model if hasattr(model, "model") else model
    missing, unexpected = base.load_state_dict(backbone.model.state_dict(), strict=False)
    assert (set(missing) <= {"lm_head.weight"}, unexpected) == (True, [])
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def batch(split: EncodedSplit, language: str | None = None) -> dict[str, Tensor]:
    """The examples as transformers takes them."""
    assert split.sources is not None
    sources, targets = (
        torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True, value)
        for rows, value in ((split.sources, PAD), (split.ids, -100))
    )
    return {"input_ids": sources, "attention_mask": (sources != PAD).long(), "labels": targets}


def lane_of(cohort: Cohort, **placement: Any) -> Lane:
    design = Design.from_json({"placements": [placement] if placement else []})
    assert design.check(cohort.backbone.sites) == []
    lane = new_lane(design, seed=0, steps=1, backbone=cohort.backbone, head=cohort.head)
    lively(lane.params.values(), seed=2)
    cohort.admit(lane)
    return lane


def check_gradients(family: str, config: peft.PeftConfig, placement: dict[str, Any], match: Match) -> None:
    """Both losses are alike; `match` copies the lane's tensors to peft's, or compares their gradients."""
    backbone, cohort = opened(family)
    lane = lane_of(cohort, **placement)
    model = peft.get_peft_model(theirs(backbone, family), config).eval()
    with torch.no_grad():
        match(lane, model, lambda own, other: other.data.copy_(own))
    found, wanted = cohort.losses([np.arange(4)])[0], model(**batch(cohort.train)).loss
    close(found, wanted)
    found.backward()
    wanted.backward()
    match(lane, model, lambda own, other: close(own.grad, other.grad))


@families
def test_the_bare_lane_gives_transformers_own_loss(family: str) -> None:
    backbone, cohort = opened(family)
    lane_of(cohort)
    with torch.no_grad():
        close(cohort.losses([np.arange(4)])[0], theirs(backbone, family)(**batch(cohort.train)).loss)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_lora_in_all_stacks_has_pefts_loss_and_gradients(family: str) -> None:
    names = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, task_type="SEQ_2_SEQ_LM")
    adapted: list[str] = []

    def match(lane: Lane, model: Any, pair: Pair) -> None:
        modules = dict(model.named_modules())
        at = next(n for n in modules if n.endswith("encoder"))[: -len("encoder")]
        for site in lane.sites[0]:
            adapted.append(site.stack)
            for ours, name in (("A", "lora_A"), ("B", "lora_B")):
                other = getattr(modules[at + site.path], name).default.weight
                pair(lane.params[f"0/{site.kind}/{site.path}/{ours}"], other)

    check_gradients(family, config, {"method": "lora", "rank": 3, "alpha": 6, "sites": ["q", "v"]}, match)
    assert set(adapted) == {"encoder", "decoder", "cross"}


def test_ia3_in_cross_attention_has_pefts_loss_and_gradients() -> None:
    config = peft.IA3Config(
        target_modules=r".*(EncDecAttention\.[kv]|DenseReluDense\.wo)", feedforward_modules=r".*DenseReluDense\.wo",
        task_type="SEQ_2_SEQ_LM",
    )  # fmt: skip

    def match(lane: Lane, model: Any, pair: Pair) -> None:
        for site in lane.sites[0]:
            vector = model.base_model.model.get_submodule(site.path).ia3_l["default"]
            own = lane.params[f"0/{site.kind}/{site.path}/s"]
            if own.grad is None:
                pair(own.view(vector.shape), vector)
            else:
                close(own.grad.view(vector.shape), vector.grad)

    check_gradients("t5", config, {"method": "ia3", "sites": ["cross.k", "cross.v", "down"]}, match)


def test_a_prefix_on_the_decoder_has_pefts_loss_and_gradients() -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, token_dim=24, task_type="SEQ_2_SEQ_LM")  # heads x d_kv

    def match(lane: Lane, model: Any, pair: Pair) -> None:
        # A row: keys of a layer, its values, keys of the next ... peft 0.21 writes the row twice and gives each layer
        # the next four parts, so that layer i reads what stands 2i-th.
        table = model.prompt_encoder.default.embedding.weight
        sites = [lane.sites[0][2 * i % 3] for i in range(3)]
        parts = [lane.params[f"0/kv/{s.path}/{name}"] for s in sites for name in ("keys", "values")]
        whole = torch.cat(parts, dim=1)
        if parts[0].grad is not None:
            whole.grad = torch.cat([part.grad for part in parts if part.grad is not None], dim=1)
        pair(whole, table)

    check_gradients("t5-deep", config, {"method": "prefix_tuning", "length": 5, "sites": ["decoder.kv"]}, match)


def test_a_prompt_stands_before_what_the_encoder_reads_as_in_peft() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM")

    def match(lane: Lane, model: Any, pair: Pair) -> None:
        table = model.prompt_encoder.default.embedding.weight  # peft has rows for a decoder that it never reads
        own = lane.params["0/input/prompt"]
        if own.grad is None:
            pair(own, table[:5])
        else:
            close(own.grad, table.grad[:5])

    check_gradients("t5", config, {"method": "prompt_tuning", "length": 5}, match)


def test_norms_have_pefts_gradients() -> None:
    config = peft.LNTuningConfig(target_modules=["layer_norm", "final_layer_norm"], task_type="SEQ_2_SEQ_LM")

    def match(lane: Lane, model: Any, pair: Pair) -> None:
        for site in lane.sites[0]:
            own = lane.params[f"0/norm/{site.path}/gain"]
            theirs = model.base_model.model.get_submodule(site.path).ln_tuning_layers["default"].weight
            if own.grad is None:
                theirs.data.add_(own)
            else:
                close(own.grad, theirs.grad)

    check_gradients("t5", config, {"method": "ln_tuning"}, match)


def test_bitfit_has_the_gradients_of_transformers_own_biases() -> None:
    backbone, cohort = opened("bart")
    lane = lane_of(cohort, method="bitfit")
    model = theirs(backbone, "bart")
    for site in lane.sites[0]:
        model.model.get_submodule(site.path).bias.data.add_(lane.params[f"0/bias/{site.path}/b"].detach())
    found, wanted = cohort.losses([np.arange(4)])[0], model(**batch(cohort.train)).loss
    close(found, wanted)
    found.backward()
    wanted.backward()
    assert {site.stack for site in lane.sites[0]} == {"encoder", "decoder", "cross"}
    keys = {site.path for site in backbone.sites.sites if site.kind == "k"}  # a softmax does not see their biases
    for site in lane.sites[0]:
        if site.path not in keys:
            close(lane.params[f"0/bias/{site.path}/b"].grad, model.model.get_submodule(site.path).bias.grad)


def test_a_sequential_adapter_computes_its_equation_in_every_sub_layer() -> None:
    backbone, cohort = opened("t5")
    lane = lane_of(cohort, method="sequential_adapter", size=4, activation="relu")
    model = theirs(backbone, "t5")

    def adapt(path: str, kind: str) -> Callable[..., Tensor]:
        own = {n: lane.params[f"0/{kind}/{path}/{n}"].detach() for n in ("down", "down_bias", "up", "up_bias")}

        def hook(module: Any, args: Any, y: Tensor) -> Tensor:
            inner = torch.relu(y @ own["down"].T + own["down_bias"])
            return y + inner @ own["up"].T + own["up_bias"]

        return hook

    for site in lane.sites[0]:
        model.get_submodule(site.path).register_forward_hook(adapt(site.path, site.kind))
    with torch.no_grad():
        close(cohort.losses([np.arange(4)])[0], model(**batch(cohort.train)).loss)
