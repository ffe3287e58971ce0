"""An oracle for methods: transformers' own model, one text at a time, with a formula of the test's at its modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from contract import CONFIGS, OUTPUTS, backbone, cohort, lane, move, split
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peftscape.search.lane import Lane
from peftscape.spaces.design import Design

Params = dict[str, Tensor]
Change = Callable[[nn.Module, Params], None]
#: Largest difference, relative to the largest value. Llama's own attention takes its softmax in float32.
TOLERANCE = {"bert": 1e-10, "gpt2": 1e-10, "llama": 1e-5}
ROWS = np.arange(6)


def design(*placements: dict[str, Any], **training: float) -> Design:
    return Design.from_json({"placements": list(placements), "training": training})


def plain_model(family: str) -> Any:
    """The suite's backbone under transformers' own classifier."""
    config: Any = copy.deepcopy(CONFIGS[family])
    config.num_labels, config._attn_implementation = OUTPUTS, "eager"
    model: Any = AutoModelForSequenceClassification.from_config(config).to(torch.float64).eval()
    model.base_model.load_state_dict(backbone(family).model.state_dict())
    return model.requires_grad_(False)


def plain_logits(family: str, params: Params, change: Change, rows: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    """Texts x outputs. `change` gets the base model, whose modules have the backbone's paths, and puts hooks on it."""
    model = plain_model(family)
    for name, value in params.items():
        if name.startswith("head/"):
            model.get_parameter(name.removeprefix("head/")).data.copy_(value.detach())
    change(model.base_model, params)
    return torch.cat([model(input_ids=torch.from_numpy(split().ids[i])[None]).logits for i in rows])


def lane_logits(own: Lane, family: str, *, training: bool = False) -> Tensor:
    """The same from a lane whose texts are packed."""
    alone = cohort(family)
    alone.admit(own)
    found = alone.logits([ROWS], split(), training=training)[0]
    alone.close()
    return found


def assert_equals_plain(of: Design, family: str, change: Change, *, size: float = 0.2) -> Lane:
    """Outputs and the gradients of all tensors at a random point, against the formula; returns the lane."""
    own = lane(of, 3, family)
    move([own], size=size)
    params = {
        key: value.detach().clone().requires_grad_(not key.startswith("head/")) for key, value in own.params.items()
    }
    params |= {key: value.clone() for key, value in own.fixed.items()}
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(len(ROWS), OUTPUTS)))
    found, wanted = lane_logits(own, family), plain_logits(family, params, change, ROWS)
    close(found, wanted, family)
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    (wanted * weights).sum().backward()  # type: ignore[no-untyped-call]
    for key, value in own.params.items():
        if not key.startswith("head/"):
            close(value.grad, params[key].grad, family, key)
    return own


def close(found: Tensor | None, wanted: Tensor | None, family: str = "bert", what: str = "") -> None:
    """Within the family's tolerance of the largest value."""
    assert found is not None, what
    assert wanted is not None, what
    assert wanted.abs().max() > 1e-6, f"{what}: nothing is compared"
    difference = (found - wanted).abs().max() / wanted.abs().max()
    assert difference < TOLERANCE[family], (what, float(difference))


def on_output(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """y <- change(x, y) at a module, x its first input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        return (change(x, y), *output[1:]) if isinstance(output, tuple) else change(x, y)

    module.register_forward_hook(hook, with_kwargs=True)
