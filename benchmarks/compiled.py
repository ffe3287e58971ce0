"""What `torch.compile` gives on this processor: a step through six layers of MiniLM's shape, plain and compiled.

    python benchmarks/compiled.py [--tokens 3608] [--repeats 15]

The layers have BERT's products, GELU, norms and residuals; attention's inner part, which is our own, is left out, and
so are the lanes. Forward and backward to the input, weights frozen. Writes `results/compiled.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftscape.search.backbone import has_bfloat16
from peftscape.search.environment import processor

WIDTH, FEED_FORWARD, LAYERS = 384, 1536, 6


class Layer(nn.Module):
    """A layer of BERT whose attention adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, FEED_FORWARD), nn.Linear(FEED_FORWARD, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens x width, as it came in."""
        x = self.first(x + self.o(self.q(x) + self.k(x) + self.v(x)))
        out: Tensor = self.second(x + self.down(nn.functional.gelu(self.up(x))))
        return out


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=3608, help="of 8 lanes with 32 texts of TREC-6")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "bfloat16 in hardware": has_bfloat16()},
        "versions": {"torch": torch.__version__},
        "rows": [measured(dtype, args.tokens, args.repeats) for dtype in dtypes],
    }
    (Path(__file__).parent / "results" / "compiled.json").write_text(json.dumps(result, indent=2) + "\n")


def measured(dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians of both, taken in turn."""
    plain = nn.Sequential(*(Layer() for _ in range(LAYERS))).to(dtype).requires_grad_(False)
    sides = {"plain, ms": plain, "compiled, ms": torch.compile(plain)}
    x, grad = (torch.randn(tokens, WIDTH).to(dtype) for _ in range(2))
    x.requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 3):
        for name, run in sides.items():
            started = time.perf_counter()
            run(x).backward(grad)
            x.grad = None
            seconds[name].append(time.perf_counter() - started)
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    row |= {name: 1000 * statistics.median(each[3:]) for name, each in seconds.items()}
    row |= {"ratio": row["plain, ms"] / row["compiled, ms"], "compiling, s": seconds["compiled, ms"][0]}
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
