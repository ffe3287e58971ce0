"""How values read: scores, counts, bytes, FLOPs and seconds as people write them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """How one cost is shown: a title, a short one for table heads, and its unit."""

    name: str
    title: str
    short: str
    unit: str


SHOWN = (
    Cost("trainable", "Trained parameters (adapter and head)", "Parameters", ""),
    Cost("train_flops", "Training FLOPs an example (forward and backward)", "Training", "FLOP"),
    Cost("infer_flops", "Inference FLOPs an example", "Inference", "FLOP"),
    Cost("peak_bytes", "Peak memory in training", "Memory", "B"),
    Cost("adapter_bytes", "Size of the saved adapter", "Adapter file", "B"),
)
"""The costs that reports show, in this order."""

OTHERS = (
    Cost("train_s", "Training time", "Training time", "s"),
    Cost("wall_s", "Wall time", "Wall time", "s"),
)
"""Costs that only imported runs have."""


def shown(names: Iterable[str]) -> tuple[Cost, ...]:
    """How the costs of these names are shown, in the order of reports."""
    wanted = set(names)
    return tuple(cost for cost in (*SHOWN, *OTHERS) if cost.name in wanted)


_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def amount(value: float, unit: str = "", digits: int = 3) -> str:
    """`value` with `digits` significant digits and a decimal prefix: 1.23M, 45.6 MB, 0."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    power = 0 if size < 1 else min(int(math.log10(size)) // 3, len(_PREFIXES) - 1)
    scaled = value / 1000**power
    if size >= 1 and float(f"{abs(scaled):.{digits}g}") >= 1000 and power < len(_PREFIXES) - 1:
        power, scaled = power + 1, scaled / 1000  # 999,999 is 1M, not 1000k
    before = len(str(int(abs(scaled))))
    number = f"{scaled:.{max(0, digits - before)}f}"
    number = number.rstrip("0").rstrip(".") if "." in number else number
    # A bare count takes its prefix directly (12.3k), a unit after a space (12.3 kB).
    return f"{number}{_PREFIXES[power]}" if not unit else f"{number} {_PREFIXES[power]}{unit}"


def score(value: float) -> str:
    """A metric's value to three decimals, or four significant digits where it is large."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def seconds(value: float | None) -> str:
    """Seconds as 45 s, 12 min 30 s, or 3 h 5 min."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def round_limits(low: float, high: float, most: int = 9) -> tuple[int, ...]:
    """Round numbers (1, 2 or 5 times a power of ten) that span low to high: each is at least `low`.

    The first is the smallest that admits `low`, the last the smallest that admits `high`; where there are too
    many, only 1 and 3 times, then only powers of ten, are taken.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        return ()
    low = max(low, 1.0)
    high = max(high, low)
    found: list[int] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
        ladder = [step * 10**power for power in powers for step in steps]
        last = next(value for value in ladder if value >= high)
        found = [value for value in ladder if low <= value <= last]
        if len(found) <= most:
            break
    return tuple(found)


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks with labels for a log axis from low to high (both above 0): decades, 1-2-5, or evenly spaced."""
    decades = math.log10(high / low)
    if decades >= 0.9:
        steps = (1,) if decades > 4 else (1, 3) if decades > 1.8 else (1, 2, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = max(1, round(len(powers) / 7))
        values = [float(step * 10**power) for power in list(powers)[::every] for step in steps]
        return [v for v in values if low <= v <= high], [amount(v) for v in values if low <= v <= high]
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.ceil(low / step), math.floor(high / step)
    digits = max(3, math.ceil(math.log10(high / step)) + 1)
    values = [i * step for i in range(first, last + 1)]
    return values, [amount(v, digits=digits) for v in values]
