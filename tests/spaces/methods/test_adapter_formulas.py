"""Bottlenecks beside the attention and behind a gate, against formulas at modules that are named by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import CONFIGS, LAYERS
from plain import Change, Params, assert_equals_plain, design, on_output
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

families = pytest.mark.parametrize("family", CONFIGS)
#: By family and sub-layer: a module that reads what the sub-layer reads, and the one whose output is its output.
PLACES = {
    "bert": {
        "attention": ("encoder.layer.{}.attention.self.value", "encoder.layer.{}.attention.output.dense"),
        "ffn": ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
    },
    "gpt2": {
        "attention": ("h.{}.attn.c_attn", "h.{}.attn.c_proj"),
        "ffn": ("h.{}.mlp.c_fc", "h.{}.mlp.c_proj"),
    },
    "llama": {
        "attention": ("layers.{}.self_attn.v_proj", "layers.{}.self_attn.o_proj"),
        "ffn": ("layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj"),
    },
}


def at(family: str, kinds: list[str], formula: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]) -> Change:
    """The formula of (tensors, what the sub-layer reads, what it gives) in all layers."""

    def change(model: nn.Module, params: Params) -> None:
        for kind in kinds:
            for reads, gives in ([path.format(i) for path in PLACES[family][kind]] for i in range(LAYERS)):
                start, read = f"0/{kind}/{gives}/", []
                t = {key.removeprefix(start): value for key, value in params.items() if key.startswith(start)}
                _keep(model.get_submodule(reads), read)
                on_output(model.get_submodule(gives), lambda _, y, t=t, read=read: formula(t, read[0], y))  # type: ignore[misc]

    return change


def _keep(module: nn.Module, read: list[Tensor]) -> None:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        read[:] = args[:1]

    module.register_forward_pre_hook(hook)


@families
def test_a_parallel_adapter_reads_what_the_attention_reads(family: str) -> None:
    """y + s (W_up ReLU(W_down x + b_down) + b_up) before the residual sum (arXiv:2110.04366, table 1)."""

    def formula(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y + 2.5 * linear(torch.relu(linear(x, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    of = design({"method": "parallel_adapter", "size": 5, "scale": 2.5, "sites": ["attention"]})
    assert_equals_plain(of, family, at(family, ["attention"], formula))


@families
def test_a_gated_sequential_adapter_reads_the_output_and_its_gate_the_input(family: str) -> None:
    """y + G (W_up GELU(W_down y + b_down) + b_up), G the mean over a text of sigmoid(w x + b) (arXiv:2110.07577)."""

    def formula(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        gate = torch.sigmoid(linear(x, t["gate"][None], t["gate_bias"])).mean(dim=1, keepdim=True)
        return y + gate * linear(gelu(linear(y, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    of = design({"method": "sequential_adapter", "size": 5, "gate": True})
    assert_equals_plain(of, family, at(family, ["attention", "ffn"], formula))
