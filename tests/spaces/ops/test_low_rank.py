"""The grouped low-rank kernel against the equation in float64, and against the plain-torch reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_checks import BOUND, DEVICE, GPU, Fresh, assert_near, double, gradients
from torch import Tensor

from peftscape.spaces.ops import reference
from peftscape.spaces.ops.fused_low_rank import low_rank

#: (ranks by lane, tokens, d_in, d_out of each linear that reads x), precision: what the interpreter has time for.
FEW: list[tuple[Any, torch.dtype]] = [
    *((((1, 3, 17, 64, 5), 31, 77, (50,)), dtype) for dtype in BOUND),
    (((256,), 128, 72, (90,)), torch.bfloat16),
    (((3, 17, 1), 33, 64, (64, 48, 48)), torch.float32),
    ((tuple(1 + i % 4 for i in range(33)), 1, 24, (40,)), torch.float32),
]
RANKS = (1, 3, 17, 64, 256)
FULL: list[tuple[Any, torch.dtype]] = [
    ((tuple(ranks[i % len(ranks)] for i in range(lanes)), tokens, d_in, widths), dtype)
    for ranks, tokens, lanes, (d_in, widths), dtype in itertools.product(
        [*((r,) for r in RANKS), RANKS], (1, 31, 128), (1, 5, 33), [(257, (300,)), (512, (512, 128, 128))], BOUND
    )
]


class Case:
    """Inputs of one call, and the same call in float64."""

    def __init__(self, dtype: torch.dtype, ranks: Any, tokens: int, d_in: int, widths: Any) -> None:
        new, lanes = Fresh(dtype, seed=len(ranks) + tokens), len(ranks)
        self.x = new.state(lanes, tokens, d_in)
        self.ys = [new.state(lanes, tokens, d) for d in widths]
        turned = [ranks[p:] + ranks[:p] for p in range(len(widths))]
        self.a = [[new.matrix(r, d_in) for r in row] for row in turned]
        self.b = [[new.matrix(d, r) for r in row] for d, row in zip(widths, turned, strict=True)]
        self.scales = new.numbers(len(widths), lanes)
        self.grads = [new.state(*y.shape).detach() for y in self.ys]
        self.inputs = [self.x, *self.ys, *(t for row in (*self.a, *self.b) for t in row)]

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients, one lane after the other."""
        inputs = double(self.inputs)
        rest, lanes, linears = iter(inputs[1 + len(self.ys) :]), len(self.x), len(self.ys)
        a, b = ([[next(rest) for _ in range(lanes)] for _ in range(linears)] for _ in range(2))
        outputs = [
            torch.stack(
                [
                    inputs[1 + p][i] + float(self.scales[p, i]) * inputs[0][i] @ a[p][i].T @ b[p][i].T
                    for i in range(lanes)
                ]
            )
            for p in range(linears)
        ]
        return outputs, gradients(outputs, inputs, [g.double().cpu() for g in self.grads])


@pytest.mark.parametrize(("sizes", "dtype"), FULL if GPU else FEW)
def test_outputs_and_gradients_are_the_equations(sizes: Any, dtype: torch.dtype) -> None:
    case = Case(dtype, *sizes)
    outputs = low_rank(case.x, case.ys, case.a, case.b, case.scales)
    found = gradients(outputs, case.inputs, case.grads)
    wanted_outputs, wanted = case.exact()
    states = 1 + len(case.ys)
    assert_near(outputs, wanted_outputs, dtype)
    assert_near(found[:states], wanted[:states], dtype)
    assert_near(found[states:], wanted[states:], dtype, lanes=len(case.x))
    assert [g.dtype for g in found] == [t.dtype for t in case.inputs]


@pytest.mark.parametrize("known", [True, False])
def test_stacked_tensors_with_their_ranks_give_what_the_reference_gives(known: bool) -> None:
    ranks = (1, 17, 3)
    new = Fresh(torch.float32, seed=1)
    x, y = new.state(3, 9, 20), new.state(3, 9, 33)
    a = reference.stacked([new.matrix(r, 20).detach() for r in ranks], torch.float32).requires_grad_()
    b = reference.stacked([new.matrix(33, r).detach() for r in ranks], torch.float32).requires_grad_()
    scale = new.numbers(3, 1, 1)
    inputs, grad = [x, y, a, b], [new.state(3, 9, 33).detach()]
    count = torch.tensor(ranks, device=DEVICE, dtype=torch.float32).view(3, 1, 1) if known else None
    out = low_rank(x, [y], [a], [b], scale.view(1, 3), count)
    wanted = reference.low_rank(x.double(), y.double(), a.double(), b.double(), scale.double())
    assert_near(out, [wanted.cpu()], torch.float32)
    pairs = gradients(out, inputs, grad), gradients([wanted], inputs, [grad[0].double()])
    assert_near(pairs[0], [g.double().cpu() for g in pairs[1]], torch.float32)


@pytest.mark.parametrize("where", ["x", "y", "a", "b", "scale"])
def test_nan_in_a_lane_stays_in_it(where: str) -> None:
    case = Case(torch.float32, (3, 17, 20), 18, 40, (35,))
    clean = low_rank(case.x, case.ys, case.a, case.b, case.scales)
    wanted = gradients(clean, case.inputs, case.grads)
    with torch.no_grad():
        place = {"x": case.x[1], "y": case.ys[0][1], "a": case.a[0][1], "b": case.b[0][1], "scale": case.scales[0, 1:2]}
        place[where].view(-1)[-1] = float("nan")
    (out,) = low_rank(case.x, case.ys, case.a, case.b, case.scales)
    found = gradients([out], case.inputs, case.grads)
    assert not torch.isfinite(out[1]).all()
    for lane in (0, 2):
        assert torch.equal(out[lane], clean[0][lane])
        for mine, theirs in zip(found[:2], wanted[:2], strict=True):
            assert torch.equal(mine[lane], theirs[lane])
        for first in (2, 5):
            assert torch.equal(found[first + lane], wanted[first + lane])


def test_columns_of_a_wider_tensor_are_read_where_they_lie() -> None:
    """GPT-2 has q, k and v in one tensor."""
    case = Case(torch.float32, (2, 5), 7, 16, (24,))
    fused = torch.cat([case.ys[0], case.ys[0] * 2, case.ys[0]], dim=-1)
    (part,) = low_rank(case.x, [fused[..., 24:48]], case.a, case.b, case.scales)
    (whole,) = low_rank(case.x, [case.ys[0] * 2], case.a, case.b, case.scales)
    assert torch.equal(part, whole)


def test_in_place_writes_over_y() -> None:
    case = Case(torch.float32, (2, 5), 7, 16, (24,))
    (wanted,) = low_rank(case.x, case.ys, case.a, case.b, case.scales)
    y = case.ys[0] * 1
    (out,) = low_rank(case.x, [y], case.a, case.b, case.scales, inplace=True)
    assert out.data_ptr() == y.data_ptr()
    assert torch.equal(out, wanted)
    found, want = gradients([out], case.inputs, case.grads), gradients([wanted], case.inputs, case.grads)
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize("wanted", [{"x"}, {"a"}, {"b"}, {"x", "b"}], ids=lambda names: " ".join(sorted(names)))
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(wanted: set[str]) -> None:
    """LoRA-FA keeps A; the lowest adapted layer needs no dx."""
    case = Case(torch.float32, (2, 5), 7, 16, (24,))
    own = {"x": [case.x], "a": case.a[0], "b": case.b[0]}
    used = {k: v if k in wanted else [t.detach() for t in v] for k, v in own.items()}
    out = low_rank(used["x"][0], [case.ys[0].detach()], [used["a"]], [used["b"]], case.scales)
    _, every = case.exact()
    exact = {"x": every[:1], "a": every[2:4], "b": every[4:]}
    names = sorted(wanted)
    found = gradients(out, [t for k in names for t in own[k]], case.grads)
    assert_near(found, [t for k in names for t in exact[k]], torch.float32)
