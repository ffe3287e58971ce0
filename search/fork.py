"""A new study that knows what an old one found: its results guide the sampler, its front is tried again.

Old scores are no results of the new study: its data, model or libraries may differ. They are trials that only the
sampler sees; they have no record, and neither the front nor the report shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peftscape.analysis.front import front
from peftscape.analysis.sources import load
from peftscape.spaces.design import Design
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.storage import Storage
    from peftscape.spaces.space import Space


def learn(old: Path, storage: Storage, space: Space, say: Callable[[str], None]) -> None:
    """Tell a new study of the results in an old run's folder, as far as its space and objectives hold them."""
    from optuna.trial import FixedTrial, create_trial

    study = load(old)
    known = [record for record in study.records if record.state == "complete"]
    told = 0
    for record in known:
        try:
            params = space.params(Design.from_json(dict(record.design)))
            fixed = FixedTrial(params)
            space.suggest(fixed)
            values = [float(objective.value(record)) for objective in storage.objectives]
        except (ValueError, KeyError, AttributeError, InputError):
            continue  # this space has no such design, or the old study never measured this
        attrs = {"known": {"study": study.name, "trial": record.number}}
        # Only what the design uses: a parameter of another branch would have no distribution.
        used = {name: params[name] for name in fixed.distributions}
        storage.add(create_trial(params=used, distributions=fixed.distributions, values=values, user_attrs=attrs))
        told += 1
    best = front(known, study.objectives) if known else ()
    for record in best:
        try:
            storage.enqueue(space.params(Design.from_json(dict(record.design))), again=True)
        except (ValueError, KeyError):
            continue
    say(f"{told} results of {old} are known; the {len(best)} designs of its front are tried again first")
