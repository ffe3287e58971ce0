"""Attention of padded rows against torch's own, and its moves against loops."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from peftscape.search.row_attention import move, row_attention
from peftscape.spaces.ops.choose import without_kernels


def parts(dtype: torch.dtype = torch.float64, rows: int = 3) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, more keys than queries, and a bias that hides some keys of each row."""
    torch.manual_seed(0)
    q = torch.randn(rows, 2, 4, 8, dtype=dtype).requires_grad_()
    k, v = (torch.randn(rows, 2, 6, 8, dtype=dtype).requires_grad_() for _ in range(2))
    hidden = torch.arange(6) >= torch.arange(rows)[:, None, None, None] + 4
    return q, k, v, torch.zeros((), dtype=dtype).where(~hidden, torch.finfo(dtype).min)


def test_equals_torchs_attention_and_so_do_its_derivatives() -> None:
    q, k, v, bias = parts()
    weight = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    found, wanted = row_attention(q, k, v, bias, 0.3), scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    torch.testing.assert_close(found, wanted)
    for own, theirs in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(own, theirs)
    with without_kernels():
        torch.autograd.gradgradcheck(lambda *x: row_attention(*x, bias, 0.3), (q, k, v))


@pytest.mark.parametrize("wanted", range(3))
def test_a_gradient_of_one_input_alone(wanted: int) -> None:
    *inputs, bias = parts()
    for i, x in enumerate(inputs):
        x.requires_grad_(i == wanted)
    torch.autograd.gradcheck(
        lambda x: row_attention(*inputs[:wanted], x, *inputs[wanted + 1 :], bias, 0.3), inputs[wanted]
    )


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    q, k, v, _ = parts()
    bias = torch.randn(1, 2, 4, 6, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda b: row_attention(q, k, v, b, 0.3), bias)


def test_bfloat16_is_as_close_to_the_exact_result_as_torchs() -> None:
    """Its softmax is exact, so it may not be further off than torch's, which computes in float32 throughout."""
    q, k, v, bias = (x.detach() for x in parts(torch.bfloat16, rows=64))
    exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=bias.double(), scale=0.3)
    theirs = (scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3) - exact).abs().mean()
    assert (row_attention(q, k, v, bias, 0.3) - exact).abs().mean() < 2 * theirs


def test_rows_move_there_and_back_and_gaps_are_zero() -> None:
    there = torch.tensor([2, 4]), torch.tensor([0, 4, 3])  # 4 is behind the last: nothing; row 1 goes nowhere
    back = (torch.tensor([2, 5, 0, 4]),)
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    for out, where in zip(move([x], there, back), there, strict=True):
        assert out.tolist() == [x[i].tolist() if i < 4 else [0.0] * 3 for i in where.tolist()]
    (again,) = move(move([x], there, back), back, there)
    assert again.tolist() == [row.tolist() if i != 1 else [0.0] * 3 for i, row in enumerate(x)]
    torch.autograd.gradcheck(lambda x: move([x], there, back), x)
    torch.autograd.gradgradcheck(lambda x: move([x], there, back), x)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 3).index_fill(0, torch.tensor(0), torch.nan)
    (out,) = move([x], [torch.tensor([2, 4, 0])], [torch.tensor([2, 3, 0, 3])])
    assert out.isnan().any(dim=1).tolist() == [False, False, True]
