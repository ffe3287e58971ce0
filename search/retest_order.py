"""In which order designs are retested, so that the time there is goes where it says most."""

from __future__ import annotations

from collections.abc import Collection, Sequence

# An interval of two seeds is hardly one: of three it says something.
FIRST_SEEDS = 3

Job = tuple[int, int]


def retest_order(numbers: Sequence[int], seeds: Sequence[int], known: Collection[Job], fit: float) -> list[Job]:
    """(trial, seed) of all retests to do, the first ones first; the time may end anywhere in the list.

    As many of the designs as the time allows get three seeds, the most important first; what is left goes to
    further seeds of these, a seed for each in turn. Designs for which there is no time are left out: one or two
    seeds would make no interval.

    Args:
        numbers: trials, the most important first.
        known: what is done already.
        fit: how many retests the time allows.
    """
    first, more = seeds[:FIRST_SEEDS], seeds[FIRST_SEEDS:]
    heads = {number: [(number, s) for s in first if (number, s) not in known] for number in numbers}
    chosen: list[int] = []
    needed = 0
    for number in numbers:
        needed += len(heads[number])
        if chosen and needed > fit:
            break
        chosen.append(number)
    jobs = [job for number in chosen for job in heads[number]]
    jobs += [(number, s) for s in more for number in chosen]
    return [job for job in jobs if job not in known]
