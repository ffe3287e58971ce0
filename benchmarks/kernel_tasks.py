"""What `kernel_times.py` measures: each operation at one size, and the ways to do it.

The same equation as the kernel computes in plain torch (`torch`), `torch.compile` of that, and what HF peft's users run
(`peft`): its own module, lane after lane.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftscape.spaces.ops import reference
from peftscape.spaces.ops.choose import Call
from peftscape.spaces.ops.fused_adamw import adamw
from peftscape.spaces.ops.fused_attention import prefix_attention
from peftscape.spaces.ops.fused_bottleneck import bottleneck
from peftscape.spaces.ops.fused_low_rank import low_rank

INTERPRET = "--interpret" in sys.argv
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu")
MIXED = (4, 8, 16, 64)
Stacked = Callable[[Any, torch.dtype], Tensor]


@dataclass
class Task:
    """One operation at one size, and the ways to do it; `ways` give outputs from nothing.

    Args:
        forward_bytes, backward_bytes: the least that must move, by the kernel's docstring.
        leaves, grads: what is differentiated, and the outputs' gradients; none for the optimiser.
    """

    call: Call
    ways: dict[str, Callable[[], Sequence[Tensor]]]
    forward_bytes: int
    backward_bytes: int = 0
    leaves: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    note: str = ""


def compiled(way: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """torch.compile of plain torch; the smoke test traces it and leaves the code generator out."""
    torch._dynamo.reset()  # after eight sizes of one function it would give up
    return torch.compile(way, backend="eager" if INTERPRET else "inductor", dynamic=False)  # type: ignore[no-any-return]


def padded(own: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """As `reference.stacked`, in operations that torch.compile can fuse with what follows."""
    most = [max(sizes) for sizes in zip(*(t.shape for t in own), strict=True)]
    pads = [[n for d in reversed(range(t.ndim)) for n in (0, most[d] - t.shape[d])] for t in own]
    return torch.stack([functional.pad(t.to(dtype), pad) for t, pad in zip(own, pads, strict=True)])


def states(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def own(*shape: int) -> Tensor:
    return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).requires_grad_()


def spread(sizes: int | tuple[int, ...], lanes: int) -> list[int]:
    return [sizes] * lanes if isinstance(sizes, int) else [sizes[i % len(sizes)] for i in range(lanes)]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def low_rank_task(dtype: torch.dtype, lanes: int, rank: Any, tokens: int, d_in: int, widths: Sequence[int]) -> Task:
    """One linear, or q, k and v of a model with grouped queries."""
    ranks = spread(rank, lanes)
    x, ys = states(lanes, tokens, d_in, dtype=dtype), [states(lanes, tokens, d, dtype=dtype) for d in widths]
    a, b = [[own(r, d_in) for r in ranks] for _ in widths], [[own(d, r) for r in ranks] for d in widths]
    scales, one = torch.ones(len(widths), lanes, device=DEVICE), torch.ones(lanes, 1, 1, dtype=dtype, device=DEVICE)

    def plain(stacked: Stacked = reference.stacked) -> Sequence[Tensor]:
        return [
            reference.low_rank(x, y, stacked(p, dtype), stacked(q, dtype), one)
            for y, p, q in zip(ys, a, b, strict=True)
        ]

    def kernel() -> Sequence[Tensor]:
        return low_rank(x, ys, a, b, scales)

    size, weights = x.element_size(), 4 * sum(ranks) * sum(d_in + d for d in widths)
    return Task(
        Call("low_rank", name(dtype), lanes, -(-sum(ranks) // lanes), tokens, d_in),
        {
            "torch": plain, "kernel": kernel, "torch.compile": compiled(lambda: plain(padded)),
            "peft": peft_lora(x, ys, a, b),
        },
        size * lanes * tokens * (d_in + 2 * sum(widths)) + weights,
        size * lanes * tokens * (2 * d_in + sum(widths)) + 2 * weights,
        [x, *ys, *(t for row in (*a, *b) for t in row)], [torch.randn_like(y) for y in ys],
        f"ranks {rank}, {len(widths)} linear(s) of {widths}",
    )  # fmt: skip


def peft_lora(x: Tensor, ys: Sequence[Tensor], a: Any, b: Any) -> Callable[[], Sequence[Tensor]]:
    """peft's LoRA layer, lane after lane, around a linear whose product is there already."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    class Given(torch.nn.Linear):
        """A frozen linear that costs nothing."""

        def forward(self, x: Tensor) -> Tensor:
            return self.given  # type: ignore[return-value]

    def layer(base: Any, rank: int) -> Any:
        return Linear(base, "default", config=LoraConfig(r=rank, lora_alpha=rank), r=rank, lora_alpha=rank)

    bases = [Given(x.shape[2], y.shape[2], bias=False, device=DEVICE, dtype=x.dtype) for y in ys]
    layers = [[layer(base, len(t)) for t in p] for base, p in zip(bases, a, strict=True)]

    def run() -> Sequence[Tensor]:
        outputs = []
        for row, y, p, q in zip(layers, ys, a, b, strict=True):
            lanes = []
            for i, one in enumerate(row):
                one.base_layer.given = y[i]
                weights = {"lora_A.default.weight": p[i], "lora_B.default.weight": q[i]}
                lanes.append(torch.func.functional_call(one, weights, (x[i],)))
            outputs.append(torch.stack(lanes))
        return outputs

    return run


def bottleneck_task(dtype: torch.dtype, lanes: int, size: Any, tokens: int, width: int) -> Task:
    """Sequential adapters; peft has none, so a loop over lanes in plain torch stands for it."""
    sizes = spread(size, lanes)
    y = states(lanes, tokens, width, dtype=dtype)
    down, up = [own(m, width) for m in sizes], [own(width, m) for m in sizes]
    parts = (down, [own(m) for m in sizes], up, [own(width) for _ in sizes])

    def plain(stacked: Stacked = reference.stacked) -> Sequence[Tensor]:
        return [y + reference.bottleneck(y, *(stacked(t, dtype) for t in parts), "gelu")]

    def kernel() -> Sequence[Tensor]:
        return [bottleneck(None, y, *parts, "gelu")]

    def loop() -> Sequence[Tensor]:
        rows = []
        for row, *weights in zip(y, *parts, strict=True):
            d, e, u, c = (w.to(dtype) for w in weights)
            rows.append(row + functional.linear(functional.gelu(functional.linear(row, d, e)), u, c))
        return [torch.stack(rows)]

    moved, weights = y.element_size() * y.numel(), 4 * 2 * sum(sizes) * width
    return Task(
        Call("bottleneck", name(dtype), lanes, -(-sum(sizes) // lanes), tokens, width),
        {"torch": plain, "kernel": kernel, "torch.compile": compiled(lambda: plain(padded)), "loop over lanes": loop},
        2 * moved + weights, 3 * moved + 2 * weights,
        [y, *(t for row in parts for t in row)], [torch.randn_like(y)], f"sizes {size}, sequential, gelu",
    )  # fmt: skip


def attention_task(dtype: torch.dtype, lanes: int, rows: int, length: Any, tokens: int, heads: int, kv_heads: int,
                   width: int) -> Task:  # fmt: skip
    """Causal, grouped queries; "peft" is what its prefix tuning does: a cache before the keys, torch's attention."""
    lengths = spread(length, lanes)
    q, k, v = (states(lanes * rows, h, tokens, width, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    keys, values = ([own(n, kv_heads * width) for n in lengths] for _ in range(2))
    owner, count = [i // rows for i in range(lanes * rows)], torch.tensor(lengths, device=DEVICE)

    def plain(stacked: Stacked = reference.stacked) -> Sequence[Tensor]:
        prefixes = [stacked(t, dtype) for t in (keys, values)]
        return [reference.prefix_attention(q, k, v, *prefixes, owner, causal=True, lengths=count)]

    def kernel() -> Sequence[Tensor]:
        return [prefix_attention(q, k, v, keys, values, owner, causal=True)]

    def before(prefix: Tensor, sequence: Tensor) -> Tensor:
        heads_first = prefix.to(dtype).view(len(prefix), kv_heads, width).transpose(0, 1)
        return torch.cat([heads_first.expand(rows, -1, -1, -1), sequence], dim=2)

    def peft() -> Sequence[Tensor]:
        outputs = []
        for i, prefix in enumerate(zip(keys, values, strict=True)):
            mine = slice(i * rows, (i + 1) * rows)
            first, second = before(prefix[0], k[mine]), before(prefix[1], v[mine])
            seen = torch.ones(tokens, first.shape[2], dtype=torch.bool, device=DEVICE).tril(len(prefix[0]))
            attend = functional.scaled_dot_product_attention
            outputs.append(attend(q[mine], first, second, attn_mask=seen, enable_gqa=True))
        return [torch.cat(outputs).transpose(1, 2)]

    size, seen = q.element_size() * lanes * rows * tokens * width, 2 * 4 * sum(lengths) * kv_heads * width
    norms = 4 * lanes * rows * tokens * heads
    return Task(
        Call("prefix_attention", name(dtype), lanes, -(-sum(lengths) // lanes), tokens, width),
        {"torch": plain, "kernel": kernel, "torch.compile": compiled(lambda: plain(padded)), "peft": peft},
        size * 2 * (heads + kv_heads) + seen + norms, size * 4 * (heads + kv_heads) + 2 * seen + 3 * norms,
        [q, k, v, *keys, *values],
        [torch.randn(lanes * rows, tokens, heads, width, device=DEVICE).to(dtype)],
        f"prefixes {length}, {rows} rows a lane, {heads} heads, {kv_heads} of keys, causal",
    )  # fmt: skip


def adamw_task(dtype: torch.dtype, lanes: int, tensors: int, rank: int, width: int) -> Task:
    """LoRA of q and v in all layers, float32 whatever the backbone. "peft" clips and steps lane after lane.

    The plain-torch reference asks the device whether norms are finite, so torch.compile has nothing to fuse in it.
    """
    made = ([[torch.randn(rank, width, device=DEVICE) for _ in range(tensors)] for _ in range(lanes)] for _ in range(4))
    params, grads, first, second = made
    second = [[t.abs() for t in row] for row in second]
    numbers = [torch.full((lanes,), value, device=DEVICE) for value in (9.0, 1e-4, 0.01, 1.0)]
    theirs = [[torch.nn.Parameter(t.clone()) for t in row] for row in params]
    for row, gradients in zip(theirs, grads, strict=True):
        for p, g in zip(row, gradients, strict=True):
            p.grad = g.clone()
    loop = [torch.optim.AdamW(row, lr=1e-4, weight_decay=0.01, fused=True) for row in theirs]

    def kernel() -> Sequence[Tensor]:
        return [adamw(params, grads, first, second, *numbers)]

    def plain() -> Sequence[Tensor]:
        return [reference.adamw(params, grads, first, second, *numbers)]

    def peft() -> Sequence[Tensor]:
        norms = []
        for row, optimizer in zip(theirs, loop, strict=True):
            norms.append(torch.nn.utils.clip_grad_norm_(row, 1.0))
            optimizer.step()
        return [torch.stack(norms)]

    count = lanes * tensors * rank * width
    note = f"{tensors} tensors of {rank} x {width} a lane"
    ways = {"torch": plain, "kernel": kernel, "peft": peft}
    return Task(Call("adamw", "float32", lanes, count // lanes, lanes * tensors, 1), ways, 32 * count, note=note)


#: What makes a task of sizes, the sizes for a GPU, and those for a smoke test.
TASKS: dict[str, tuple[Callable[..., Task], list[Sequence[Any]], Sequence[Any]]] = {
    "low_rank": (low_rank_task, [(1, 8, 32), (8, 64, MIXED), (256,), (4096,), ((4096,), (4096, 1024, 1024))],
                 (2, 3, 8, 32, (32,))),
    "bottleneck": (bottleneck_task, [(1, 8, 32), (16, 64, (*MIXED, 256)), (256,), (1024, 4096)], (2, 3, 8, 32)),
    "prefix_attention": (attention_task, [(1, 8, 32), (1, 8), (16, MIXED), (256,), (32,), (8,), (64,)],
                         (2, 1, 3, 8, 2, 1, 16)),
    "adamw": (adamw_task, [(1, 8, 32), (64,), (8, 64), (2048,)], (2, 2, 3, 8)),
}  # fmt: skip


def tasks(op: str, dtype: torch.dtype) -> Iterator[Task]:
    """One after the other, so that one's tensors are gone before the next one's are made."""
    make, full, smoke = TASKS[op]
    for sizes in [smoke] if INTERPRET else itertools.product(*full):
        yield make(dtype, *sizes)
