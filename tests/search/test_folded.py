"""A lane alone has its changes of whole weights in the weights: the same logits and gradients with fewer products."""

from typing import Any

import pytest
import torch
from contract import HEAD_ONLY, backbone, cohort, lane, split
from torch import Tensor

from peftscape.search.lane import Lane
from peftscape.spaces.design import Design
from peftscape.spaces.ops import weights

METHODS = ("child_tuning", "diff_pruning", "intrinsic_said", "lt_sft", "threshold_mask")


def changed(method: str, family: str, dtype: str = "float64", **row: Any) -> Lane:
    own = lane(Design.from_json({"placements": [{"method": method, **row}]}), 3, family, dtype)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in own.params.values():
            value.add_(torch.empty(value.shape, dtype=torch.float64).normal_(0, 0.1, generator=source))
    return own


def run(*lanes: Lane, family: str, dtype: str = "float64") -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the first of the lanes, which read the same texts, and the gradients of their sum."""
    shared = cohort(family, dtype)
    shared.admit(*lanes)
    lanes[0].optimizer.zero_grad()
    try:
        logits = shared.logits([torch.arange(6).numpy()] * len(lanes), split())[shared.lanes.index(lanes[0])]
        logits.sum().backward()
    finally:  # the suite's backbone is everyone's
        shared.close()
    grads = {key: value.grad.clone() for key, value in lanes[0].params.items() if value.grad is not None}
    return logits.detach(), grads


def refuse(*_: Any) -> Tensor:
    raise AssertionError("a product with a change")


@pytest.mark.parametrize(("family", "sites"), [("bert", ["q", "o", "up"]), ("llama", ["v", "gate"]), ("gpt2", ["up"])])
@pytest.mark.parametrize("method", METHODS)
def test_alone_is_as_beside_another(
    method: str, family: str, sites: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = changed(method, family, sites=sites)
    logits, grads = run(own, lane(HEAD_ONLY, 1, family), family=family)
    monkeypatch.setattr(weights, "dense", refuse)
    folded, own_grads = run(own, family=family)
    torch.testing.assert_close(folded, logits, rtol=1e-9, atol=1e-9)
    assert own_grads.keys() == grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(own_grads[key], grad, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize(
    ("family", "dtype", "row"),
    [
        ("gpt2", "float64", {"sites": ["q"]}),  # a part of a fused linear
        ("bert", "bfloat16", {}),  # W + D would be rounded as W is
        ("bert", "float64", {"gate": True}),
    ],
)
def test_what_does_not_fold_is_a_product(
    family: str, dtype: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = changed("lt_sft", family, dtype, **row)
    assert backbone(family, dtype).dtype == getattr(torch, dtype)
    monkeypatch.setattr(weights, "dense", refuse)
    with pytest.raises(AssertionError, match="a product with a change"):
        run(own, family=family, dtype=dtype)
