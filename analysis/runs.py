"""Runs against runs: what repeated searches reached by trials and by time, with tests and the repeats they need."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.attainment import AttainmentDifference, attainment_difference, volumes
from peftscape.analysis.compare import holm
from peftscape.analysis.designs import settings
from peftscape.analysis.figures import family
from peftscape.analysis.front import Objective, ObjectiveError
from peftscape.analysis.measures import is_cost, measure
from peftscape.analysis.noise import t_interval
from peftscape.analysis.study import Study
from peftscape.spaces.words import nearest

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunComparison:
    """Final values (hypervolumes, or best scores) of two groups of repeated runs.

    `p` is of the exact or sampled permutation test of the difference of means, `corrected` after Holm's
    correction for all pairs of groups; `needed` the repeats a side that a difference of this size, if true,
    would need to be found at 5 % with probability 0.8.
    """

    difference: float
    low: float
    high: float
    p: float
    needed: int | None
    corrected: float = math.nan


@dataclass(frozen=True, eq=False)
class Progress:
    """Hypervolume as a search went on: the mean over repeats at each of `at`, with a 95 % t-interval (NaN: one run)."""

    at: Floats
    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seed.

    `points` are each run's complete records as losses between 0 (the best seen anywhere) and 1 (the reference);
    `spent` what each run spent and on what (`Study.spent`), empty where it kept no account.
    """

    name: str
    runs: tuple[str, ...]
    finals: tuple[float, ...]
    points: tuple[Floats, ...]
    trials: Progress
    time: Progress | None
    spent: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Compared:
    """Groups of runs against each other; `tests` and `attained` have a pair of groups each, or nothing to say."""

    objectives: tuple[Objective, ...]
    reference: Mapping[str, float]
    ideal: Mapping[str, float]
    groups: tuple[Group, ...]
    tests: Mapping[tuple[str, str], RunComparison]
    attained: Mapping[tuple[str, str], AttainmentDifference]
    notes: tuple[str, ...]


def compare(
    studies: Sequence[Study],
    objectives: Sequence[Objective] | None = None,
    *,
    by: str | None = None,
    reference: Mapping[str, float] | None = None,
) -> Compared:
    """Groups the runs and compares the hypervolume that each reached, by trials, by time and at the end.

    The hypervolume is a share of the box from the best value seen in any run to the reference, with costs on a
    log axis. A run of more trials than the shortest is cut there: all are compared at an equal number. Methods of a
    run are compared as far as each came.

    Args:
        by: a key of the configurations ("search.sampler") to group by, or "method", which takes each run's
            records apart by method. Without it runs whose configurations differ in name and seed alone are
            one group.
        reference: of an objective the value beyond which nothing counts; else the worst seen.

    Raises:
        ObjectiveError: if a run lacks an objective, none was named and none is common, `by` is in no run, the
            reference names no objective or is better than what was seen, or no trial of a run has ended.
    """
    axes = tuple(objectives or studies[0].objectives)
    sources = [study.aimed(axes) for study in studies]
    parted = _parted(sources) if by == "method" else [(study, name) for study, name in _grouped(sources, by)]
    raw = [_raw(study, axes) for study, _ in parted]
    if none := [study.source for (study, _), values in zip(parted, raw, strict=True) if not len(values)]:
        raise ObjectiveError(f"no trial of {', '.join(none)} has ended yet")
    everything = np.concatenate([np.empty((0, len(axes))), *(v[np.isfinite(v).all(axis=1)] for v in raw)])
    if not len(everything):
        raise ObjectiveError("no run has a complete record with all of " + ", ".join(axis.name for axis in axes))
    best, worst = everything.min(axis=0), everything.max(axis=0)
    names = [axis.name for axis in axes]
    for name, value in (reference or {}).items():
        if name not in names:
            raise ObjectiveError(f'reference: no objective "{name}"{nearest(name, names)}')
        i = names.index(name)
        worst[i] = _loss(value, axes[i])
        if worst[i] <= best[i]:
            seen = f"the best seen, {_value(best[i], axes[i]):g}"
            raise ObjectiveError(f"reference: {name} {value:g} is no worse than {seen}")
    spread = np.where(worst > best, worst - best, 1.0)
    scaled = [(values - best) / spread for values in raw]
    lengths = [len(values) for values in scaled]
    shortest = max(lengths) if by == "method" else min(lengths)
    members: dict[str, list[int]] = {}
    for i, (_, name) in enumerate(parted):
        members.setdefault(name, []).append(i)
    curves = [volumes(values, [1.0] * len(axes)) for values in scaled]
    groups = tuple(
        _group(name, which, [s for s, _ in parted], scaled, curves, shortest) for name, which in members.items()
    )
    tests, attained = _tests(groups)
    return Compared(
        axes,
        {axis.name: _value(worst[i], axis) for i, axis in enumerate(axes)},
        {axis.name: _value(best[i], axis) for i, axis in enumerate(axes)},
        groups,
        tests,
        attained,
        tuple(_notes(groups, lengths, shortest)),
    )


def parse_reference(text: str) -> dict[str, float]:
    """The values in text such as "accuracy=0.6,trainable=1e7".

    Raises:
        ObjectiveError: if a part is no name with a number.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ObjectiveError(f'reference: expected "accuracy=0.6", found "{part}"') from None
    return found


def compare_runs(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> RunComparison:
    """Whether runs of one kind end higher than those of another: Welch's interval and a permutation test.

    needed = 2 (z_0.975 + z_0.8)^2 s^2 / d^2 + 1, with s^2 the pooled variance.

    Raises:
        ValueError: if a group has fewer than two runs.
    """
    from scipy import stats

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"expected at least two runs a group, found {len(x)} and {len(y)}")
    gap = float(x.mean() - y.mean())
    spread = (float(x.var(ddof=1)) * (len(x) - 1) + float(y.var(ddof=1)) * (len(y) - 1)) / (len(x) + len(y) - 2)
    if spread == 0:
        return RunComparison(gap, gap, gap, float(gap == 0), None if gap == 0 else 2)
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(level)
    tested = stats.permutation_test(
        (x, y),
        lambda p, q, axis: p.mean(axis=axis) - q.mean(axis=axis),
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    needed = None if gap == 0 else math.ceil(2 * (1.959964 + 0.841621) ** 2 * spread / gap**2 + 1)
    return RunComparison(gap, float(interval.low), float(interval.high), float(tested.pvalue), needed)


def _grouped(studies: Sequence[Study], by: str | None) -> list[tuple[Study, str]]:
    """Each study with its group's name: what its configuration says where they differ."""
    flat = [settings(study.config) for study in studies]
    if by is not None:
        if not any(by in own for own in flat):
            known = ", ".join(sorted({key for own in flat for key in own})) or "none"
            raise ObjectiveError(f'--by: no run\'s configuration has "{by}". They have: {known}')
        return [(study, f"{by} {own.get(by, 'not set')}") for study, own in zip(studies, flat, strict=True)]
    if not all(flat):  # other people's results have no configuration that could make them repeats
        return [(study, f"{study.name} ({study.source})") for study in studies]
    keys = sorted({key for own in flat for key in own} - {"name", "search.seed", "seed"})
    differ = [key for key in keys if len({own.get(key) for own in flat}) > 1]
    names = [", ".join(f"{key.rpartition('.')[2]} {own.get(key, 'not set')}" for key in differ) for own in flat]
    return [(study, name or "all runs") for study, name in zip(studies, names, strict=True)]


def _parted(studies: Sequence[Study]) -> list[tuple[Study, str]]:
    """Each run taken apart by method."""
    found = []
    for study in studies:
        names = sorted({family(record) for record in study.records if record.state == "complete"})
        for name in names:
            own = tuple(record for record in study.records if family(record) == name)
            found.append((dataclasses.replace(study, records=own), name))
    return found


def _raw(study: Study, axes: Sequence[Objective]) -> Floats:
    """A row of losses a record, in the order in which they ended; NaN where it is not complete."""
    ended = study.ended_s
    ordered = sorted(study.records, key=lambda record: (ended.get(record.number, math.inf), record.number))
    rows = [
        [_loss(measure(record, axis.name), axis) if record.state == "complete" else math.nan for axis in axes]
        for record in ordered
        if record.state != "running"
    ]
    values = np.array(rows, dtype=np.float64).reshape(len(rows), len(axes))
    values[~np.isfinite(values).all(axis=1)] = math.nan
    return values


def _loss(value: float, axis: Objective) -> float:
    signed = math.log1p(value) if is_cost(axis.name) and value >= 0 else value
    return signed if axis.direction == "minimize" else -signed


def _value(loss: float, axis: Objective) -> float:
    signed = float(loss) if axis.direction == "minimize" else -float(loss)
    return math.expm1(signed) if is_cost(axis.name) else signed


def _group(
    name: str,
    which: Sequence[int],
    studies: Sequence[Study],
    scaled: Sequence[Floats],
    curves: Sequence[Floats],
    shortest: int,
) -> Group:
    at_most = [np.pad(curves[i], (0, max(0, shortest - len(curves[i]))), mode="edge")[:shortest] for i in which]
    trials = _progress(np.arange(1.0, shortest + 1), np.array(at_most))
    ends = [sorted(studies[i].ended_s.get(r.number, math.inf) for r in studies[i].records) for i in which]
    time = None
    if all(end and math.isfinite(end[len(curves[i]) - 1]) for end, i in zip(ends, which, strict=True)):
        last = min(end[len(curves[i]) - 1] for end, i in zip(ends, which, strict=True))
        at = np.linspace(0, last, 60)
        rows = []
        for end, i in zip(ends, which, strict=True):
            done = np.searchsorted(np.array(end[: len(curves[i])]), at, side="right")
            rows.append(np.concatenate([[0.0], curves[i]])[done])
        time = _progress(at, np.array(rows))
    cut = tuple(scaled[i][:shortest][np.isfinite(scaled[i][:shortest]).all(axis=1)] for i in which)
    finals = tuple(float(curve[-1]) for curve in at_most)
    spent = tuple(studies[i].spent for i in which)
    return Group(name, tuple(studies[i].source for i in which), finals, cut, trials, time, spent)


def _progress(at: Floats, rows: Floats) -> Progress:
    if len(rows) < 2:
        unknown = np.full(len(at), math.nan)
        return Progress(at, rows.mean(axis=0), unknown, unknown)
    bounds = [t_interval(column.tolist()) for column in rows.T]
    return Progress(at, rows.mean(axis=0), np.array([b.low for b in bounds]), np.array([b.high for b in bounds]))


def _tests(
    groups: Sequence[Group],
) -> tuple[dict[tuple[str, str], RunComparison], dict[tuple[str, str], AttainmentDifference]]:
    tests: dict[tuple[str, str], RunComparison] = {}
    attained: dict[tuple[str, str], AttainmentDifference] = {}
    for a, b in itertools.combinations(groups, 2):
        if min(len(a.finals), len(b.finals)) < 2:
            continue
        tests[a.name, b.name] = compare_runs(a.finals, b.finals)
        attained[a.name, b.name] = attainment_difference(a.points, b.points)
    corrected = holm([test.p for test in tests.values()]) if tests else ()
    return {
        key: dataclasses.replace(test, corrected=float(p))
        for (key, test), p in zip(tests.items(), corrected, strict=True)
    }, attained


def _notes(groups: Sequence[Group], lengths: Sequence[int], shortest: int) -> list[str]:
    found = []
    if max(lengths) > shortest:
        found.append(f"Runs have {shortest:,} to {max(lengths):,} trials; all are compared after {shortest:,}.")
    single = [group.name for group in groups if len(group.finals) == 1]
    if single and len(groups) > 1:
        found.append(
            f"One run each shows nothing of luck: {', '.join(single)}. Nothing is tested against "
            f"{'it' if len(single) == 1 else 'them'}; repeat with other seeds."
        )
    if len(groups) == 1:
        found.append("All runs are repeats of one configuration: there is nothing to compare, only their spread.")
    return found
