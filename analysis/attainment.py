"""Attainment: what a share of several searches reached, and their hypervolume as trials went by."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.front import Objective, hypervolume
from peftscape.analysis.measures import measure
from peftscape.spaces.record import Direction, Record


def attainment(sets: Sequence[ArrayLike], directions: Sequence[Direction], share: float = 0.5) -> NDArray[np.float64]:
    """The points that at least `share` of the sets attain: each dominates or equals no more than it must.

    The empirical attainment surface (Grunert da Fonseca et al. 2001) of two or three objectives, computed by
    moocore; share 0.5 is the median surface, 1 what every set reached. A point is attained by a set that has
    a point nowhere worse.

    Raises:
        ValueError: if there is no set with a point, share is not in (0, 1], or a value is not finite.
    """
    import moocore

    arrays = [np.asarray(points, dtype=np.float64).reshape(-1, len(directions)) for points in sets]
    if not any(len(a) for a in arrays) or not 0 < share <= 1:
        raise ValueError(f"expected sets with points and a share in (0, 1], found {len(arrays)} and {share}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("expected finite values")
    sign = np.where([way == "maximize" for way in directions], -1.0, 1.0)
    needed = int(np.ceil(share * len(arrays) - 1e-9))
    full = [a for a in arrays if len(a)]
    if needed > len(full):  # an empty set attains nothing
        return np.empty((0, len(directions)))
    points = np.concatenate(full) * sign
    ids = np.repeat(np.arange(1, len(full) + 1), [len(a) for a in full])
    levels = moocore.eaf(points, ids, percentiles=[100 * needed / len(full)])
    return np.asarray(levels[:, :-1] * sign)


def hypervolume_by_trial(
    records: Sequence[Record], objectives: Sequence[Objective], reference: Sequence[float]
) -> NDArray[np.float64]:
    """The hypervolume of the first 1, 2, ... records' front; records that are not complete add nothing."""
    directions = [objective.direction for objective in objectives]
    sign = np.where([way == "maximize" for way in directions], -1.0, 1.0)
    corner = np.asarray(reference, dtype=np.float64) * sign
    kept = np.empty((0, len(objectives)))
    volume, found = 0.0, []
    for record in records:
        point = np.array([measure(record, objective.name) for objective in objectives]) * sign
        able = record.state == "complete" and bool(np.isfinite(point).all() and (point < corner).all())
        if able and not (kept <= point).all(axis=1).any():
            kept = np.vstack([kept[~(point <= kept).all(axis=1)], point])
            volume = hypervolume(kept * sign, directions, reference)
        found.append(volume)
    return np.array(found)
