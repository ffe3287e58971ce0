"""Heat maps: at which layers and sites parameters pay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.designs import layer_count, layer_list
from peftscape.analysis.front import Objective, finite
from peftscape.spaces.record import Record


@dataclass(frozen=True, eq=False)
class Heat:
    """Layers by sites: how much better than expected at their cost designs are that adapt there (NaN: unknown)."""

    layers: tuple[str, ...]
    sites: tuple[str, ...]
    gain: NDArray[np.float64]
    error: NDArray[np.float64]
    count: NDArray[np.int64]


def heat_map(records: Sequence[Record], cost: str = "trainable", fewest: int = 4) -> Heat | None:
    """Where parameters pay: at each layer and site, the mean gain of designs that adapt it minus that of the rest.

    A design's gain is its score minus a parabola in log cost fitted to all designs. Cells with fewer than
    `fewest` designs on either side are NaN; None where no cell is left. An association, not an experiment:
    sites that are adapted together share their gain.
    """
    placed = [r for r in records if r.state == "complete" and r.design.get("placements")]
    if len(placed) < 2 * fewest:
        return None
    quality = Objective(placed[0].metric, placed[0].direction)
    able, values = finite(placed, (quality, Objective(cost, "minimize")))
    if len(able) < 2 * fewest:
        return None
    x = np.log1p(values[:, 1])
    rest = values[:, 0].copy()
    if np.ptp(x) > 0:
        x = (x - x.mean()) / x.std()
        basis = np.column_stack([np.ones(len(x)), x, x * x])
        rest = rest - basis @ np.linalg.lstsq(basis, rest, rcond=None)[0]
    if quality.direction == "minimize":
        rest = -rest
    count = layer_count(able)
    cells: dict[tuple[int, str], set[int]] = {}
    for i, record in enumerate(able):
        for placement in record.design["placements"]:
            if isinstance(placement, Mapping) and isinstance(placement.get("sites"), (list, tuple)):
                for layer in layer_list(placement.get("layers", "all"), count):
                    for site in placement["sites"]:
                        cells.setdefault((layer, str(site)), set()).add(i)
    sites = sorted({site for _, site in cells})
    shape = (count, len(sites))
    gain, error, counts = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, dtype=np.int64)
    for (layer, site), inside in cells.items():
        mask = np.zeros(len(able), dtype=bool)
        mask[list(inside)] = True
        at = (layer, sites.index(site))
        counts[at] = mask.sum()
        if min(mask.sum(), (~mask).sum()) >= fewest:
            gain[at] = rest[mask].mean() - rest[~mask].mean()
            error[at] = math.sqrt(rest[mask].var(ddof=1) / mask.sum() + rest[~mask].var(ddof=1) / (~mask).sum())
    if not np.isfinite(gain).any():
        return None
    names = ("all",) if count == 1 else tuple(str(i) for i in range(count))
    return Heat(names, tuple(sites), gain, error, counts)
