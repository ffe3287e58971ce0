"""Syne Tune's own MOASHA behind a pipe, for `replay.py`: run by the Python of an environment that has syne-tune.

    python benchmarks/moasha_server.py --ranks 0|1

A line `[trial, rung time, quality, cost]` in, `CONTINUE` or `STOP` out. Times are 1, factor, ..., factor^rungs (the
end). `--ranks 1` gives it a priority of ranks: 0.16's own hands the sorted indices to a place where `Bracket` reads
them as priorities.
"""

import argparse
import json
import sys
from datetime import datetime

import numpy as np
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import uniform
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA
from syne_tune.optimizer.schedulers.multiobjective.multiobjective_priority import NonDominatedPriority


class Ranks(NonDominatedPriority):
    """The place of each sample in the order, where the parent class returns the order."""

    def priority_unsafe(self, objectives: np.ndarray) -> np.ndarray:
        """See the class."""
        return np.argsort(super().priority_unsafe(objectives))


def main() -> None:
    """Answer until the pipe is closed; a line `"reset"` forgets everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--factor", type=int, default=3)
    args = parser.parse_args()
    scheduler, known = None, {}
    for line in sys.stdin:
        row = json.loads(line)
        if row == "reset":
            scheduler, known = None, {}
            continue
        if scheduler is None:
            scheduler = MOASHA(
                {"x": uniform(0, 1)},
                metrics=["loss", "cost"],
                time_attr="time",
                max_t=args.factor**args.count,
                grace_period=1,
                reduction_factor=args.factor,
                multiobjective_priority=Ranks() if args.ranks else None,
                random_seed=0,
            )
        trial, time, quality, cost = row
        if trial not in known:
            known[trial] = Trial(trial_id=trial, config={"x": 0.5}, creation_time=datetime(2000, 1, 1))
            scheduler.on_trial_add(known[trial])
        decision = scheduler.on_trial_result(
            known[trial], {"loss": -quality, "cost": float(np.log(cost)), "time": time}
        )
        print(decision, flush=True)


if __name__ == "__main__":
    main()
