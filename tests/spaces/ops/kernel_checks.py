"""How a kernel is compared: with the operation written out in float64, by relative Frobenius error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
#: The issue's bounds for float32 and bfloat16; float16 keeps three bits more than bfloat16.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Fresh:
    """Random tensors, none drawn twice; `matrix` values are exact in the precision in which a kernel multiplies."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.source = dtype, torch.Generator().manual_seed(seed)

    def state(self, *shape: int) -> Tensor:
        """Of the backbone: in its precision."""
        return self._draw(shape).to(self.dtype).to(DEVICE).requires_grad_()

    def matrix(self, *shape: int) -> Tensor:
        """Trained, float32, to be multiplied: scaled so that products stay near one."""
        value = (self._draw(shape) / shape[-1] ** 0.5).to(self.dtype).float()
        return value.to(DEVICE).requires_grad_()

    def vector(self, *shape: int) -> Tensor:
        """Trained, float32, to be added."""
        return self._draw(shape).float().to(DEVICE).requires_grad_()

    def numbers(self, *shape: int) -> Tensor:
        """Float32 between 1/2 and 3/2."""
        return (torch.rand(shape, generator=self.source, dtype=torch.float64) + 0.5).float().to(DEVICE)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.source, dtype=torch.float64)


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of their own in float64."""
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


def assert_near(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype, *, lanes: int = 1) -> None:
    """Each tensor alone in float32; below that the `lanes` neighbours of one name together.

    The sum that is a single lane's gradient may cancel to a hundredth of its terms, and their rounding stays.
    """
    assert len(found) == len(wanted)
    assert all(torch.isfinite(t).all() for t in found)
    assert [t.shape for t in found] == [t.shape for t in wanted]
    if dtype == torch.float32:
        lanes = 1
    for i in range(0, len(found), lanes):
        pairs = [
            (f.detach().double().cpu(), w.detach())
            for f, w in zip(found[i : i + lanes], wanted[i : i + lanes], strict=True)
        ]
        off = sum(float((f - w).square().sum()) for f, w in pairs)
        size = sum(float(w.square().sum()) for _, w in pairs)
        assert off**0.5 <= BOUND[dtype] * size**0.5, (i, (off / max(size, 1e-300)) ** 0.5)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """d outputs / d inputs, None made zero."""
    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]
