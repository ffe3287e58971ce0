"""Attention beside prefixes against the definition in float64, row by row, and against the plain-torch reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_checks import BOUND, DEVICE, GPU, Fresh, assert_near, double, gradients
from torch import Tensor

from peftscape.spaces.ops import reference
from peftscape.spaces.ops.fused_attention import prefix_attention

#: (prefix lengths by lane, the lane of each row, tokens, heads, kv heads, head width, causal, window), precision.
FEW: list[tuple[Any, torch.dtype]] = [
    (((1, 17, 3), (1, -1, 2, 2), 19, 2, 1, 24, False, None), torch.float32),
    (((3, 17), (0, 1), 35, 2, 2, 16, True, None), torch.float32),
    (((2,), (0, -1), 40, 1, 1, 16, True, 17), torch.float32),
    (((1, 17), (0, 1), 31, 2, 1, 16, True, None), torch.bfloat16),
    (((1, 17), (0, 1), 31, 2, 1, 16, False, None), torch.float16),
]
LENGTHS = (1, 3, 17, 64)
FULL: list[tuple[Any, torch.dtype]] = [
    ((lengths, owner, tokens, heads, kv_heads, width, causal, window), dtype)
    for (lengths, owner), tokens, (heads, kv_heads), width, (causal, window), dtype in itertools.product(
        [((1,), (0, -1)), (LENGTHS, (0, 1, -1, 1, 2, 3, 3)), (LENGTHS * 8, tuple(range(32)))],
        (1, 31, 128, 200), ((4, 4), (8, 2)), (40, 64, 128), ((False, None), (True, None), (True, 33)), BOUND,
    )
]  # fmt: skip


class Case:
    """Inputs of one call, padded at the end of some rows, and the same call in float64."""

    def __init__(self, dtype: torch.dtype, lengths: Any, owner: Any, tokens: int, heads: int, kv_heads: int, width: int,
                 causal: bool, window: int | None) -> None:  # fmt: skip
        new, self.owner, self.lengths = Fresh(dtype, seed=tokens + width), owner, lengths
        self.q, self.k, self.v = (new.state(len(owner), tokens, h, width) for h in (heads, kv_heads, kv_heads))
        self.keys, self.values = ([new.matrix(n, kv_heads * width) for n in lengths] for _ in range(2))
        real = torch.tensor([max(1, tokens - 5 * i) for i in range(len(owner))])
        self.valid = (torch.arange(tokens) < real[:, None]).to(DEVICE)
        self.how = {"valid": self.valid, "causal": causal, "window": window}
        self.grad = new.state(len(owner), tokens, heads, width).detach()
        self.inputs = [self.q, self.k, self.v, *self.keys, *self.values]

    def run(self) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (self.q, self.k, self.v))
        return prefix_attention(q, k, v, self.keys, self.values, self.owner, **self.how)  # type: ignore[arg-type]

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients, one row and head after the other."""
        inputs = double(self.inputs)
        q, k, v = inputs[:3]
        keys, values = inputs[3 : 3 + len(self.keys)], inputs[3 + len(self.keys) :]
        tokens, heads, width = q.shape[1:]
        rows = []
        for r, lane in enumerate(self.owner):
            place = torch.arange(tokens)
            seen = self.valid[r].cpu().expand(tokens, -1)
            if self.how["causal"]:
                seen = seen & (place[:, None] >= place)
            if self.how["window"]:
                seen = seen & (place[:, None] - place < self.how["window"])
            found = []
            for h in range(heads):
                g = h * k.shape[2] // heads
                mine, theirs, allowed = k[r, :, g], v[r, :, g], seen
                if lane >= 0:
                    part = slice(g * width, (g + 1) * width)
                    mine, theirs = torch.cat([keys[lane][:, part], mine]), torch.cat([values[lane][:, part], theirs])
                    allowed = torch.cat([torch.ones(tokens, len(keys[lane]), dtype=torch.bool), seen], dim=1)
                scores = (q[r, :, h] @ mine.T * width**-0.5).masked_fill(~allowed, -1e300)
                found.append(torch.softmax(scores, dim=-1) * allowed @ theirs)
            rows.append(torch.stack(found, dim=1))
        out = torch.stack(rows)
        return out, gradients([out], inputs, [self.grad.double().cpu()])


@pytest.mark.parametrize(("sizes", "dtype"), FULL if GPU else FEW)
def test_output_and_gradients_are_the_definition(sizes: Any, dtype: torch.dtype) -> None:
    case = Case(dtype, *sizes)
    out = case.run()
    found = gradients([out], case.inputs, [case.grad])
    wanted_out, wanted = case.exact()
    assert_near([out], [wanted_out], dtype)
    assert_near(found[:3], wanted[:3], dtype)
    assert_near(found[3:], wanted[3:], dtype, lanes=len(case.keys))
    assert [g.dtype for g in found] == [t.dtype for t in case.inputs]


def test_stacked_prefixes_with_their_lengths_give_what_the_reference_gives() -> None:
    case = Case(torch.float32, (1, 17), (0, 1), 9, 2, 1, 16, True, None)
    stacked = [reference.stacked([t.detach() for t in own], torch.float32) for own in (case.keys, case.values)]
    inputs = [t.requires_grad_() for t in (case.q, case.k, case.v, *stacked)]
    lengths = torch.tensor(case.lengths, device=DEVICE)
    q, k, v = (t.transpose(1, 2) for t in inputs[:3])
    out = prefix_attention(q, k, v, inputs[3], inputs[4], case.owner, lengths=lengths, causal=True, valid=case.valid)
    exact = double(inputs)
    q, k, v = (t.transpose(1, 2) for t in exact[:3])
    mask, count = case.valid.cpu(), lengths.cpu()
    wanted = reference.prefix_attention(q, k, v, exact[3], exact[4], case.owner, lengths=count, causal=True, valid=mask)
    assert_near([out], [wanted], torch.float32)
    found = gradients([out], inputs, [case.grad])
    assert_near(found, gradients([wanted], exact, [case.grad.double().cpu()]), torch.float32)


@pytest.mark.parametrize("where", ["q", "k", "keys", "values"])
def test_nan_in_a_lane_stays_in_it(where: str) -> None:
    case = Case(torch.float32, (3, 5), (0, 1, 1), 9, 1, 1, 16, False, None)
    clean = case.run()
    wanted = gradients([clean], case.inputs, [case.grad])
    with torch.no_grad():
        getattr(case, where)[0].view(-1)[0] = float("nan")
    out = case.run()
    found = gradients([out], case.inputs, [case.grad])
    assert not torch.isfinite(out[0]).all()
    assert torch.equal(out[1:], clean[1:])
    assert all(torch.equal(f[1:], w[1:]) for f, w in zip(found[:3], wanted[:3], strict=True))
    assert torch.equal(found[4], wanted[4])
    assert torch.equal(found[6], wanted[6])


def test_a_lane_without_rows_gets_a_gradient_of_zero_and_a_row_that_sees_nothing_gives_zero() -> None:
    case = Case(torch.float32, (3, 5), (1, -1), 4, 1, 1, 16, False, None)
    case.valid[1] = False
    out = case.run()
    assert not out[1].any()
    found = gradients([out], case.inputs, [case.grad])
    assert all(not found[i].any() for i in (3, 5))
    assert all(torch.isfinite(g).all() for g in found)
