"""The fused AdamW of all lanes against torch.optim.AdamW in float64, a lane at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, Fresh, assert_near, double

from peftscape.spaces.ops import reference
from peftscape.spaces.ops.fused_adamw import adamw

SHAPES = [[(3,), (77, 5)], [(4000,)], [(1,), (17, 31), (2048, 2)], [(9,)]]
STEPS = 3


class Lanes:
    """Four lanes with numbers of their own, the first partly masked, and the same ones under torch's optimiser."""

    def __init__(self) -> None:
        self.new = Fresh(torch.float32, seed=5)
        self.params = [[self.new.vector(*s).detach() for s in row] for row in SHAPES]
        self.first, self.second = ([[torch.zeros_like(p) for p in row] for row in self.params] for _ in range(2))
        self.lr, self.decay = self._numbers(1e-2, 3e-3, 1e-1, 1e-2), self._numbers(0.1, 0, 0.01, 0.5)
        self.clip, self.steps = self._numbers(1.0, 1e9, 0.1, 1.0), self._numbers(0, 0, 0, 0)
        mask = (torch.rand(77, 5, generator=self.new.source) > 0.5).float().to(DEVICE)
        self.masks: Any = [[None, mask], [None], [None, None, None], [None]]
        self.rates = self._numbers(1, 1, 1, 4, 1, 1, 1)  # of seven tensors
        self.exact = [double(row) for row in self.params]
        rates = iter(self.rates.tolist())
        self.optimizers = [
            torch.optim.AdamW(
                [{"params": [p], "lr": lr * next(rates)} for p in row], weight_decay=decay, betas=(0.9, 0.999)
            )
            for row, lr, decay in zip(self.exact, self.lr.tolist(), self.decay.tolist(), strict=True)
        ]

    def step(self, how: Callable[..., torch.Tensor], grads: list[list[torch.Tensor]]) -> torch.Tensor:
        return how(
            self.params, grads, self.first, self.second, self.steps, self.lr, self.decay, self.clip, masks=self.masks,
            rates=self.rates,
        )  # fmt: skip

    def exact_step(self, grads: list[list[torch.Tensor]]) -> list[float]:
        norms = []
        rows = zip(self.exact, grads, self.masks, self.clip.tolist(), self.optimizers, strict=True)
        for params, row, masks, clip, optimizer in rows:
            for p, g, m in zip(params, row, masks, strict=True):
                p.grad = g.double().cpu() * (1 if m is None else m.cpu())
            norms.append(float(torch.nn.utils.clip_grad_norm_(params, clip)))
            optimizer.step()
        return norms

    def grads(self, size: float = 1.0) -> list[list[torch.Tensor]]:
        return [[self.new.vector(*s).detach() * size for s in row] for row in SHAPES]

    def _numbers(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("how", [adamw, reference.adamw])
def test_steps_are_those_of_torchs_optimiser_a_lane_at_a_time(how: Callable[..., torch.Tensor]) -> None:
    lanes = Lanes()
    for i in range(STEPS):
        grads = lanes.grads(1.0 + i)
        norms = lanes.step(how, grads)
        wanted = lanes.exact_step(grads)
        torch.testing.assert_close(norms.cpu().double(), torch.tensor(wanted).double(), rtol=1e-5, atol=0)
    assert lanes.steps.tolist() == [STEPS] * 4
    for row, exact in zip(lanes.params, lanes.exact, strict=True):
        assert_near(row, exact, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_lane_whose_gradient_is_not_finite_stays_as_it_is_and_the_others_go_on(bad: float) -> None:
    lanes, alone = Lanes(), Lanes()
    grads = lanes.grads()
    alone.step(adamw, grads)
    spoilt = [[g.clone() for g in row] for row in grads]
    spoilt[2][1].view(-1)[7] = bad
    before = [p.clone() for p in lanes.params[2]]
    norms = lanes.step(adamw, spoilt)
    assert lanes.steps.tolist() == [1, 1, 0, 1]
    assert torch.isfinite(norms).tolist() == [True, True, False, True]
    assert all(torch.equal(p, b) for p, b in zip(lanes.params[2], before, strict=True))
    assert not any(t.any() for t in (*lanes.first[2], *lanes.second[2]))
    for i in (0, 1, 3):
        assert all(torch.equal(p, q) for p, q in zip(lanes.params[i], alone.params[i], strict=True))


@pytest.mark.parametrize("how", [adamw, reference.adamw])
def test_a_lane_whose_loss_is_not_finite_stays_as_it_is_too(how: Callable[..., torch.Tensor]) -> None:
    lanes = Lanes()
    before = [p.clone() for p in lanes.params[1]]
    losses = torch.tensor([1.0, -torch.inf, 0.0, torch.nan], device=DEVICE)
    numbers = (lanes.steps, lanes.lr, lanes.decay, lanes.clip)
    how(lanes.params, lanes.grads(), lanes.first, lanes.second, *numbers, losses=losses)
    assert lanes.steps.tolist() == [1, 0, 1, 0]
    assert all(torch.equal(p, b) for p, b in zip(lanes.params[1], before, strict=True))


def test_a_masked_number_may_have_any_gradient() -> None:
    lanes, alone = Lanes(), Lanes()
    grads = lanes.grads()
    alone.step(adamw, grads)
    grads[0][1][lanes.masks[0][1] == 0] = float("nan")
    lanes.step(adamw, grads)
    assert all(torch.equal(p, q) for p, q in zip(lanes.params[0], alone.params[0], strict=True))
