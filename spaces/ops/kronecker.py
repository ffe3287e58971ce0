"""Products with a Kronecker product that is never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kronecker(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(A kron B) x: for each token A X B^T, X being x as an a2 x b2 matrix (arXiv:2212.10650, eq. 6).

    Args:
        x: lanes x tokens x (a2 b2).
        a, b: lanes x a1 x a2 and lanes x b1 x b2.
    Returns:
        lanes x tokens x (a1 b1).
    """
    (lanes, tokens, _), (a1, a2), (b1, b2) = x.shape, a.shape[1:], b.shape[1:]
    inner = (x.reshape(lanes, tokens * a2, b2) @ b.mT).view(lanes, tokens, a2, b1)
    outer = inner.mT.reshape(lanes, tokens * b1, a2) @ a.mT
    return outer.view(lanes, tokens, b1, a1).mT.reshape(lanes, tokens, a1 * b1)


def kronecker_flops(tokens: int, a: tuple[int, int], b: tuple[int, int]) -> int:
    """Of that product, for the shapes of A and B."""
    return 2 * tokens * a[1] * b[0] * (a[0] + b[1])


def kronecker_saved(tokens: int, a: tuple[int, int], b: tuple[int, int]) -> int:
    """Numbers that autograd keeps besides x: X B^T, for the gradient of A."""
    return tokens * a[1] * b[0]
