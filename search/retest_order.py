"""In which order designs are retested, so that the time there is goes where it says most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

# An interval of two seeds is hardly one: of three it says something.
FIRST_SEEDS = 3

Job = tuple[int, int]


def first_retests(numbers: Sequence[int], seeds: Sequence[int], known: Collection[Job], fit: float) -> list[Job]:
    """(trial, seed) of the first three seeds of as many designs as the time allows, the most important first.

    Designs for which there is no time are left out: one or two seeds would make no interval.

    Args:
        numbers: trials, the most important first.
        seeds: of each trial, in their order.
        known: what is done already.
        fit: how many retests the time allows.
    """
    jobs: list[Job] = []
    for number in numbers:
        more = [(number, seed) for seed in seeds[:FIRST_SEEDS] if (number, seed) not in known]
        if jobs and len(jobs) + len(more) > fit:
            break
        jobs += more
    return jobs


def next_retest(doubt: Mapping[int, float], taken: Mapping[int, int], own: int, further: int) -> int | None:
    """The trial that gets the next seed: where it says most about a place on the front.

    With p the probability of the place and k seeds so far, argmax of p (1 - p) / (k (k + 1)): how open the place is,
    times how much one more seed narrows the mean's variance, s^2 / k - s^2 / (k + 1). Every trial may have its `own`
    number of seeds, whatever p; beyond them there are `further` ones for all together, which go to open places alone.

    Args:
        doubt: p (1 - p) of each trial, the most important first.
        taken: how many seeds each has, or has in flight.
    """
    spent = sum(max(0, taken[number] - own) for number in doubt)
    able = [n for n, open_ in doubt.items() if taken[n] < own or (spent < further and open_ > 0)]
    return max(able, key=lambda n: (doubt[n] / max(1, taken[n] * (taken[n] + 1)), -taken[n]), default=None)
