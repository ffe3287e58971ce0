"""Our TPE against Optuna's own: the same suggestions, with fewer readings of the database."""

import warnings
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.samplers import TPESampler

from peftscape.search.tpe import TPE


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """Knobs of which some depend on others, as in a space of methods."""
    for method in ("adapter", "lora", "prefix"):
        if trial.suggest_categorical(method, [True, False]):
            trial.suggest_int(f"{method}.size", 1, 64, log=True)
            trial.suggest_float(f"{method}.scale", 0.1, 4.0)
    trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    return trial.params


def asked(kind: Callable[..., TPESampler], *, told: bool = False) -> tuple[list[dict[str, Any]], int]:
    """What 24 trials get, four of them running and some pruned, and how often all were read for the last eight.

    Args:
        told: whether the sampler is given the trials before it is asked.
    """
    study = optuna.create_study(directions=["maximize", "minimize"])
    found, running, readings = [], [], 0
    read = study._storage.get_all_trials

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal readings
        readings += 1
        return read(*args, **more)

    for number in range(24):
        known = {"known": study.get_trials(deepcopy=False)} if told else {}
        study.sampler = kind(
            seed=number, multivariate=True, group=True, constant_liar=True, n_startup_trials=5, **known
        )
        study._storage.get_all_trials = counted if number >= 16 else read  # type: ignore[method-assign]
        trial = study.ask()
        found.append(suggest(trial))
        running.append(trial)
        study._storage.get_all_trials = read  # type: ignore[method-assign]
        if len(running) > 4:
            done = running.pop(0)
            if done.number % 7 == 3:
                study.tell(done, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(done, [done.params["lr"] * 100, float(sum(map(bool, done.params.values())))])
    return found, readings


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_suggestions_are_optunas_with_fewer_readings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, many = asked(TPESampler)
        ours, few = asked(TPE)
        told, fewest = asked(TPE, told=True)
    assert ours == told == theirs
    assert few <= 3 * 8 < many, "a trial reads them three times, whatever its groups"
    assert fewest <= 8, "or once, where Optuna looks for trials that wait"
