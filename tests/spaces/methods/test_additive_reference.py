"""Bottlenecks, Compacter, MAM and UniPELT's gates give what the `adapters` library gave (tests/data)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import close, design
from torch import Tensor
from transformers import BertConfig

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import Head
from peftscape.search.lane import new_lane

_path = Path(__file__).parents[2] / "data" / "adapters_reference.py"
_spec = importlib.util.spec_from_file_location("adapters_reference", _path)
assert _spec is not None
assert _spec.loader is not None
reference: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

D, LAYERS, LENGTH = 16, 2, 3
#: The library's name of a tensor, its shape, and how theirs (or its gradient) becomes ours.
Theirs = tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]
PARALLEL = {"method": "parallel_adapter", "size": 4, "scale": 3.0}
CASES: dict[str, list[dict[str, Any]]] = {
    "pfeiffer": [{"method": "pfeiffer_adapter", "size": 4, "activation": "gelu"}],
    "houlsby": [{"method": "sequential_adapter", "size": 4, "activation": "silu"}],
    "parallel": [PARALLEL],
    "compacter": [{"method": "compacter", "size": 8, "n": 4, "rank": 1}],
    "mam": [
        {"method": "prefix_tuning_mlp", "length": LENGTH, "hidden": 5, "positions": "keep"},
        PARALLEL,
    ],
    "unipelt": [
        {"method": "prefix_tuning", "length": LENGTH, "positions": "keep", "gate": True},
        {"method": "lora", "rank": 2, "alpha": 2.0, "gate": True},
        {**PARALLEL, "gate": True},
    ],
}
PREFIX = "encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.a.self_prefix"


def same(value: Tensor) -> Tensor:
    return value


def theirs(key: str) -> Theirs:
    """What a tensor of ours is called there."""
    *place, name = key.split("/")[1:]
    kind, path = (*place, "", "")[:2]
    layer = int(path.split(".")[2]) if path else 0
    if kind in ("q", "v"):
        return _lora(name, f"{path}.loras.a")
    if kind in ("", "kv"):
        return _prefix(name, layer)
    return _bottleneck(name, f"encoder.layer.{layer}{'.attention' * (kind == 'attention')}.output.adapters.a")


def _lora(name: str, at: str) -> Theirs:
    rows: dict[str, Theirs] = {"A": (f"{at}.lora_A", (2, D), same), "B": (f"{at}.lora_B", (D, 2), same)}
    return (rows | _gate(f"{at}.gate"))[name]


def _gate(at: str) -> dict[str, Theirs]:
    return {"gate": (f"{at}.weight", (1, D), lambda t: t[0]), "gate_bias": (f"{at}.bias", (1,), same)}


def _prefix(name: str, layer: int) -> Theirs:
    """Shared tensors as well: those of the MLP, and Compacter's."""
    rows, size = slice(layer * 2 * D, (layer + 1) * 2 * D), LAYERS * 2 * D
    mlp = f"{PREFIX}.control_trans"
    found: dict[str, Theirs] = {
        "keys": (mlp, (LENGTH * size,), lambda t: t.view(LENGTH, LAYERS * 2, D)[:, 2 * layer]),
        "values": (mlp, (LENGTH * size,), lambda t: t.view(LENGTH, LAYERS * 2, D)[:, 2 * layer + 1]),
        "embedding": (f"{PREFIX}.wte.weight", (LENGTH, D), same),
        "down": (f"{mlp}.0.weight", (5, D), same),
        "down_bias": (f"{mlp}.0.bias", (5,), same),
        "up": (f"{mlp}.2.weight", (size, 5), lambda t: t[rows]),
        "up_bias": (f"{mlp}.2.bias", (size,), lambda t: t[rows]),
        "A": ("shared_parameters.a.phm_rule", (4, 4, 4), lambda t: t.mT),  # theirs is x W, ours W x
    }
    return (found | _gate(f"encoder.layer.{layer}.attention.self.prefix_tuning.prefix_gates.a"))[name]


def _bottleneck(name: str, at: str) -> Theirs:
    down, up = f"{at}.adapter_down.0", f"{at}.adapter_up"
    found: dict[str, Theirs] = {
        "down": (f"{down}.weight", (4, D), same), "down_bias": (f"{down}.bias", (4,), same),
        "up": (f"{up}.weight", (D, 4), same), "up_bias": (f"{up}.bias", (D,), same),
        "down_s": (f"{down}.W_left", (4, D // 4, 1), lambda t: t.mT),
        "down_t": (f"{down}.W_right", (4, 1, 2), lambda t: t.mT),
        "up_s": (f"{up}.W_left", (4, 2, 1), lambda t: t.mT),
        "up_t": (f"{up}.W_right", (4, 1, D // 4), lambda t: t.mT),
    }  # fmt: skip
    return (found | _gate(f"{at}.gate"))[name]


def named(case: str, key: str) -> Theirs:
    name, shape, into = theirs(key)
    if case == "compacter" and name.endswith(".bias"):
        return name.replace(".bias", ".b"), (D if "up" in name else 8,), into
    return name, shape, into


@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients_are_those_of_the_adapters_library(case: str) -> None:
    values = np.load(reference.FILE)
    backbone = Backbone.from_config(BertConfig(**reference.SHAPE), dtype="float64")
    for path, weight in backbone.model.named_parameters():
        weight.data.copy_(torch.from_numpy(reference.value(path, tuple(weight.shape))))
    ids = list(reference.IDS)
    texts = EncodedSplit(ids, None, np.zeros(len(ids), dtype=np.int64), 0, np.array([len(row) for row in ids]))
    mean = Head(backbone, kind="mean", outputs=2)
    own = new_lane(design(*CASES[case]), seed=0, steps=1, backbone=backbone, head=mean)
    trained = {key: value for key, value in own.params.items() if not key.startswith("head/")}
    with torch.no_grad():
        for key, value in trained.items():
            name, shape, into = named(case, key)
            value.copy_(into(torch.from_numpy(reference.value(name, shape))).reshape(value.shape))
    shared, states = Cohort(backbone, mean, texts, batch_size=len(ids)), []
    shared.admit(own)
    hook = backbone.model.register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state))
    shared.logits([np.arange(2)], texts, training=True)
    hook.remove()
    shared.close()

    found = states[0].view(*reference.IDS.shape, D)
    close(found, torch.from_numpy(values[f"{case}/states"]))
    (found * torch.from_numpy(reference.value("loss", tuple(found.shape)))).sum().backward()
    compared = {f"{case}/states"}
    for key, value in trained.items():
        name, shape, into = named(case, key)
        gradient = torch.from_numpy(values[f"{case}/{name}"])
        assert tuple(gradient.shape) == shape
        assert value.grad is not None
        close(value.grad, into(gradient).reshape(value.shape), what=key)
        compared.add(f"{case}/{name}")
    assert compared == {name for name in values.files if name.startswith(f"{case}/")}
