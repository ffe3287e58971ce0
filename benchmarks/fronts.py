"""How long fronts and hypervolumes take: python benchmarks/fronts.py.

Asked for: 100,000 points of two objectives in under 0.2 s, the hypervolume of 200 points of four objectives in
under 10 ms. The least of five runs, after one that imports. The results go to benchmarks/results/fronts.json.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from peftscape.analysis.front import hypervolume, non_dominated


def least(run: Callable[[], object], times: int = 5) -> float:
    """The least seconds of several runs, the first not counted."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Prints a line a case, and writes them all."""
    results = {}
    rng = np.random.default_rng(0)
    square = rng.random((100_000, 2))
    x = rng.random(100_000)
    curve = np.column_stack([x, 1 - x])
    sphere = rng.random((200, 4))
    sphere /= np.linalg.norm(sphere, axis=1)[:, None]
    four = rng.random((5_000, 4))
    two, many = ["minimize"] * 2, ["minimize"] * 4
    for name, limit, run in (
        ("front of 100,000 points, 2 objectives, few members", 0.2, lambda: non_dominated(square, two)),
        ("front of 100,000 points, 2 objectives, all members", 0.2, lambda: non_dominated(curve, two)),
        ("front of 5,000 points, 4 objectives", None, lambda: non_dominated(four, many)),
        ("hypervolume of 200 points, 4 objectives", 0.01, lambda: hypervolume(1 - sphere, many, [1.1] * 4)),
    ):
        took = least(run)
        results[name] = {"ms": round(1000 * took, 3), "limit_ms": None if limit is None else round(1000 * limit, 3)}
        said = "" if limit is None else f" (limit {1000 * limit:g} ms: {'kept' if took < limit else 'MISSED'})"
        print(f"{name}: {1000 * took:.2f} ms{said}")
    target = Path(__file__).parent / "results" / "fronts.json"
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
