"""Studies whose truth is known: quality saturates with parameters, and scores carry sampling noise."""

from typing import Any

import numpy as np
import optuna

from peftscape.analysis.sources import RETEST, Study, from_optuna
from peftscape.spaces.record import Costs, Failure, Record, Rung, Score

METHODS = ("lora", "prefix_tuning", "sequential_adapter", "ia3", "bitfit", "prompt_tuning")
CONFIG = {
    "model": {"name": "minilm"},
    "task": {"name": "trec6"},
    "seed": 0,
    "objectives": "accuracy:max,trainable:min",
}


def costs(adapter: int, head: int = 2310) -> Costs:
    return Costs(
        adapter=adapter,
        head=head,
        trainable=adapter + head,
        train_flops=1_400_000_000 + 4000 * adapter,
        infer_flops=690_000_000 + 60 * adapter,
        peak_bytes=180_000_000 + 16 * adapter,
        adapter_bytes=4 * adapter,
    )


def record(number: int, validation: float | None = 0.9, adapter: int = 1000, **changes: Any) -> Record:
    """A record of a LoRA; complete with `validation`, failed without."""
    fields: dict[str, Any] = {
        "number": number,
        "state": "failed" if validation is None else "complete",
        "design": {"placements": [{"method": "lora", "sites": ["q", "v"], "layers": "all", "rank": 8}]},
        "digest": f"d{number}",
        "label": f"lora r8 q,v ({number})",
        "metric": "accuracy",
        "direction": "maximize",
        "n_validation": 537,
        "scores": () if validation is None else (Score(seed=0, validation=validation),),
        "costs": costs(adapter),
        "failure": Failure(kind="diverged", message="the loss was nan", step=7) if validation is None else None,
    }
    return Record(**fields | changes)


def records(n: int, seed: int = 0) -> list[Record]:
    """`n` records of several methods: complete, one in eight stopped at a rung, one in twenty failed."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        method = str(rng.choice(METHODS)) if number else "head_only"
        adapter = 0 if number == 0 else int(np.exp(rng.uniform(np.log(400), np.log(3e6))))
        truth = 0.955 - 0.8 * (adapter + 500) ** -0.28 - rng.gamma(1.2, 0.012) * bool(number)
        validation = rng.binomial(537, float(np.clip(truth, 0.2, 0.99))) / 537
        state = "complete" if number < 2 else rng.choice(["complete", "pruned", "failed"], p=[0.82, 0.13, 0.05])
        two = method == "lora" and number % 3 == 0
        placements = [] if number == 0 else [{"method": method, "sites": ["q", "v"], "layers": "0-5", "rank": 8}]
        placements += [{"method": "ia3", "sites": ["k", "v", "down"], "layers": [0, 2, 4]}] * two
        label = "head only" if number == 0 else f"{method} {adapter // 3072 or 1} q,v" + " + ia3" * two
        seen = 16_000 if state == "complete" else 4_000
        rung = Rung(examples=4_000, validation=validation - 0.03)
        made.append(
            record(
                number,
                validation if state == "complete" else None,
                adapter,
                state=str(state),
                design={"placements": placements, "training": {"lr": 0.001}},
                label=label,
                textbook={0: "head only", 1: "Hu et al. 2021"}.get(number),
                curve=tuple((seen * i // 4, 1.7 / i) for i in range(1, 5)),
                rungs=() if state == "failed" else (rung,),
                failure=Failure(kind="diverged", message="the loss was nan", step=7) if state == "failed" else None,
                wall_s=float(rng.uniform(5, 25)),
            )
        )
    return made


def store(
    made: list[Record], storage: Any, *, name: str = "demo", retested: tuple[int, ...] = (), seeds: int = 5
) -> tuple[optuna.Study, optuna.Study | None]:
    """The records as an Optuna study as the search writes it, with retests of the given trials."""
    study = optuna.create_study(study_name=name, storage=storage, directions=["maximize", "minimize"])
    study.set_user_attr("config", CONFIG)
    study.set_user_attr("environment", {"versions": {"torch": "2.8.0"}, "processors": 2})
    states = optuna.trial.TrialState
    known = {
        "complete": states.COMPLETE,
        "pruned": states.PRUNED,
        "failed": states.FAIL,
        "running": states.RUNNING,
    }
    study.add_trials([_trial({"record": r.to_json()}, known[r.state], r) for r in made])
    if not retested:
        return study, None
    retests = optuna.create_study(study_name=name + RETEST, storage=storage)
    rng = np.random.default_rng(1)
    for number in retested:
        for seed in range(1, seeds + 1):
            test = rng.binomial(500, max(0.0, made[number].validation - 0.01)) / 500
            data = {
                "of": number,
                "seed": seed,
                "validation": test,
                "test": test,
                "n_test": 500,
                "wall_s": 11.0,
            }
            retests.add_trial(_trial({"retest": data}, states.COMPLETE))
    return study, retests


def _trial(attrs: dict[str, Any], state: Any, of: Record | None = None) -> optuna.trial.FrozenTrial:
    values = None
    if state == optuna.trial.TrialState.COMPLETE:
        values = [of.validation, float(of.costs.trainable if of.costs else 0)] if of else [attrs["retest"]["test"]]
    return optuna.trial.create_trial(state=state, values=values, user_attrs=attrs)


def study(n: int = 60, *, retested: int = 0, seed: int = 0) -> Study:
    """A synthetic study in memory, with its first front members retested."""
    from peftscape.analysis.noise import candidates

    made = records(n, seed)
    chosen: tuple[int, ...] = ()
    if retested:
        bare = from_optuna(store(made, optuna.storages.InMemoryStorage())[0])
        chosen = tuple(r.number for r in candidates(bare.records, bare.objectives, retested))
    return from_optuna(*store(made, optuna.storages.InMemoryStorage(), retested=chosen), source="runs/demo")
