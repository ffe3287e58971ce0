"""Optuna's samplers by name, made anew for each trial, so that a resumed search asks as an unbroken one."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

from peftscape.spaces.words import InputError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SAMPLERS = ("tpe", "nsga2", "gp", "random", "s3delta")


def sampler(
    name: str, seed: int, number: int, fixed: Mapping[str, Any] | None = None, known: Sequence[Any] | None = None
) -> Any:
    """The sampler that suggests trial `number` of a search with this seed.

    TPE is multivariate with groups (conditional knobs are modelled together) and takes running trials for bad ones,
    since several are asked for at once.

    Args:
        fixed: parameters that are known, where the sampler is `s3delta`: TPE suggests the others, without groups, which
            would suggest these too.
        known: the study's trials, where the caller has them: TPE need not read them again.

    Raises:
        InputError: with the nearest name.
    """
    import optuna

    own = int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
    samplers = optuna.samplers
    if name == "random":
        return samplers.RandomSampler(seed=own)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=own, population_size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name in ("tpe", "s3delta"):
            from peftscape.search.tpe import TPE

            tpe = TPE(
                seed=own, multivariate=True, group=not fixed, constant_liar=True, n_startup_trials=10, known=known
            )
            return samplers.PartialFixedSampler(dict(fixed), tpe) if fixed else tpe
        if name == "gp":
            return samplers.GPSampler(seed=own)
    raise InputError("search.sampler", [f'no sampler "{name}"{nearest(name, SAMPLERS)}'])
