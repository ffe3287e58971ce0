"""The bottleneck kernel against the equation in float64, and against the plain-torch reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_checks import BOUND, DEVICE, GPU, Fresh, assert_near, double, gradients
from torch import Tensor

from peftscape.spaces.ops import reference
from peftscape.spaces.ops.fused_bottleneck import bottleneck

ACTIVATIONS = {
    "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, "tanh": torch.tanh,
}  # fmt: skip
#: (sizes by lane, tokens, width, activation, parallel), and the precision: what the interpreter has time for.
FEW: list[tuple[Any, torch.dtype]] = [
    (((1, 17, 3), 31, 77, "gelu", True), torch.float32),
    (((3, 64), 31, 40, "tanh", False), torch.float32),
    (((17, 5), 9, 33, "relu", False), torch.float32),
    (((17, 5), 9, 33, "silu", True), torch.float16),
    (((256, 1), 18, 36, "gelu", False), torch.bfloat16),
    (((3, 17), 31, 40, "tanh", True), torch.bfloat16),
]
SIZES = (1, 3, 17, 64, 256)
FULL: list[tuple[Any, torch.dtype]] = [
    ((tuple(sizes[i % len(sizes)] for i in range(lanes)), tokens, width, activation, parallel), dtype)
    for sizes, tokens, lanes, width, activation, parallel, dtype in itertools.product(
        [(1,), (64,), (256,), SIZES], (1, 31, 128), (1, 5, 33), (257, 512), ACTIVATIONS, (True, False), BOUND
    )
]


class Case:
    """Inputs of one call, and the same call in float64."""

    def __init__(
        self, dtype: torch.dtype, sizes: Any, tokens: int, width: int, activation: str, parallel: bool
    ) -> None:
        new, lanes = Fresh(dtype, seed=len(sizes) + tokens), len(sizes)
        self.activation, self.lanes = activation, lanes
        self.states = [new.state(lanes, tokens, width) for _ in range(1 + parallel)]
        self.down, self.up = [new.matrix(m, width) for m in sizes], [new.matrix(width, m) for m in sizes]
        self.down_bias, self.up_bias = [new.vector(m) for m in sizes], [new.vector(width) for _ in sizes]
        self.scale, self.grad = new.numbers(lanes), new.state(lanes, tokens, width).detach()
        self.inputs = [*self.states, *self.down, *self.down_bias, *self.up, *self.up_bias]

    def run(self) -> Tensor:
        x = self.states[0] if len(self.states) > 1 else None
        own = (self.down, self.down_bias, self.up, self.up_bias)
        return bottleneck(x, self.states[-1], *own, self.activation, self.scale)

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients, one lane after the other."""
        inputs = double(self.inputs)
        n, act = self.lanes, ACTIVATIONS[self.activation]
        own = [inputs[len(self.states) + i * n :][:n] for i in range(4)]
        rows = []
        for i, (down, down_bias, up, up_bias) in enumerate(zip(*own, strict=True)):
            change = act(inputs[0][i] @ down.T + down_bias) @ up.T + up_bias
            rows.append(inputs[len(self.states) - 1][i] + float(self.scale[i]) * change)
        out = torch.stack(rows)
        return out, gradients([out], inputs, [self.grad.double().cpu()])


@pytest.mark.parametrize(("sizes", "dtype"), FULL if GPU else FEW)
def test_output_and_gradients_are_the_equations(sizes: Any, dtype: torch.dtype) -> None:
    case = Case(dtype, *sizes)
    out = case.run()
    found = gradients([out], case.inputs, [case.grad])
    wanted_out, wanted = case.exact()
    states = len(case.states)
    assert_near([out], [wanted_out], dtype)
    assert_near(found[:states], wanted[:states], dtype)
    assert_near(found[states:], wanted[states:], dtype, lanes=case.lanes)
    assert [g.dtype for g in found] == [t.dtype for t in case.inputs]


@pytest.mark.parametrize("known", [True, False])
def test_stacked_tensors_with_their_sizes_give_what_the_reference_gives(known: bool) -> None:
    sizes, new = (1, 17), Fresh(torch.float32, seed=2)
    y = new.state(2, 9, 20)
    shapes = [[(m, 20) for m in sizes], [(m,) for m in sizes], [(20, m) for m in sizes], [(20,) for _ in sizes]]
    own = [reference.stacked([new.vector(*s).detach() for s in row], torch.float32).requires_grad_() for row in shapes]
    inputs, grad = [y, *own], new.state(2, 9, 20).detach()
    count = torch.tensor(sizes, device=DEVICE) if known else None
    out = bottleneck(None, y, own[0], own[1], own[2], own[3], "silu", None, count)
    exact = double(inputs)
    wanted = exact[0] + reference.bottleneck(exact[0], exact[1], exact[2], exact[3], exact[4], "silu")
    assert_near([out], [wanted], torch.float32)
    found = gradients([out], inputs, [grad])
    assert_near(found, gradients([wanted], exact, [grad.double().cpu()]), torch.float32)


@pytest.mark.parametrize("where", ["state", "down", "down_bias", "up", "up_bias"])
def test_nan_in_a_lane_stays_in_it(where: str) -> None:
    case = Case(torch.float32, (17, 3, 17), 7, 24, "relu", False)
    clean = case.run()
    wanted = gradients([clean], case.inputs, [case.grad])
    with torch.no_grad():
        place = case.states[0][1] if where == "state" else getattr(case, where)[1]
        place.view(-1)[-1] = float("nan")
    out = case.run()
    found = gradients([out], case.inputs, [case.grad])
    assert not torch.isfinite(out[1]).all()
    for lane in (0, 2):
        assert torch.equal(out[lane], clean[lane])
        assert torch.equal(found[0][lane], wanted[0][lane])
        assert all(torch.equal(found[i + lane], wanted[i + lane]) for i in (1, 4, 7, 10))
