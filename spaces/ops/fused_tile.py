"""What all kernels share: products of tiles, rounding, activations, and how a kernel is started.

Triton 3.9's interpreter multiplies bfloat16 tiles as if their bits were integers and cuts where a GPU rounds to the
nearest; `product` and `narrow` do on the CPU what the GPU does by itself, and compile to nothing more.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: Triton's names of torch's number types, for tensors that a kernel reaches by address.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def product(a, b, total):
    """total + a b, added up in float32; float32 operands are multiplied as such, not as TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """float32 to TYPE, to the nearest and on a tie to the even one."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(TYPE)


@triton.jit
def at(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to TYPE from an address; ALIGNED promises 16 bytes, so that loads can be wide."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh(x):
    """tanh, by its series where (1 - e) / (1 + e) would cancel."""
    small = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - small) / (1.0 + small)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x >= 0, large, -large))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values. NaN stays NaN: a comparison with it is false."""
    if ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = x * _sigmoid(x)
    else:
        y = tanh(x)
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "silu":
        gate = _sigmoid(x)
        y = gate * (1.0 + x * (1.0 - gate))
    else:
        value = tanh(x)
        y = 1.0 - value * value
    return y


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel over a grid on the device of its first argument.

    Fused multiply-add is asked for by name because Triton 3.9 warns where nobody does.
    """
    if 0 in grid:
        return
    first: torch.Tensor = args[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **options)


def block(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within bounds that are powers of two."""
    return min(max(1 << (size - 1).bit_length(), least), most)


def tall(dtype: torch.dtype) -> int:
    """Rows of a tile at most: float32 is multiplied without tensor cores, whose accumulators would spill."""
    return 32 if dtype == torch.float32 else 64


def plain(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
