"""Findings: everything that the report says beyond the records, computed once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peftscape.analysis import units
from peftscape.analysis.ablation import Step, ablation, ends
from peftscape.analysis.belief import CORRELATION, Belief, believe, evidence
from peftscape.analysis.compare import Difference, as_good_as_best, better_than, optimism
from peftscape.analysis.figures import family
from peftscape.analysis.fit import Curve, curves
from peftscape.analysis.front import Objective, finite, front
from peftscape.analysis.heat import Heat, heat_map
from peftscape.analysis.importance import MOST, Importance, Interaction, Level, importances, interactions, marginal
from peftscape.analysis.measures import is_cost
from peftscape.analysis.notes import notes
from peftscape.analysis.study import Study
from peftscape.analysis.tuning import TuningCurve, tuning_curves
from peftscape.spaces.record import Record

METHODS = 8
"""Curves are drawn for so many methods, those with the most complete trials."""


@dataclass(frozen=True)
class Findings:
    """What a study's records support."""

    members: tuple[Record, ...]
    belief: Belief | None
    alike: tuple[Record, ...]
    differences: tuple[Difference, ...]
    claims: tuple[str, ...]
    curves: Mapping[str, Curve]
    refused: Mapping[str, str]
    tuning: Mapping[str, TuningCurve]
    importances: Mapping[str, tuple[Importance, ...]]
    marginals: Mapping[str, tuple[Level, ...]]
    interactions: tuple[Interaction, ...]
    heat: Heat | None
    path: tuple[Step, ...]

    def chance(self, number: int) -> str:
        """How probable a trial is on the front, as text."""
        known = self.belief.by_number.get(number) if self.belief else None
        return f"{known.on_front:.0%}" if known else "–"


def find(study: Study) -> Findings:
    """Everything the report shows; parts that the records do not support are empty."""
    records, axes = study.records, study.objectives
    complete = [record for record in records if record.state == "complete"]
    belief = believe(records, axes) if any(not is_cost(axis.name) for axis in axes) else None
    members = front(records, axes) if axes else ()
    likeness = belief.correlation if belief else CORRELATION
    alike = indistinguishable(records, study.quality, study.cost.name, likeness)
    sign = 1 if study.quality.direction == "maximize" else -1
    retested = sorted((r for r in complete if len(r.retests) > 1), key=lambda r: -sign * r.test)[:12]
    differences = better_than(retested, correlation=likeness)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(family(record), []).append(record)
    groups.pop("unknown", None)
    groups.pop("head only", None)
    ranked = sorted(groups, key=lambda name: (-sum(r.state == "complete" for r in groups[name]), name))
    chosen = {name: groups[name] for name in ranked[:METHODS]}
    lines, refused = curves(records, study.cost.name, belief, chosen)
    targets = {
        study.quality.name: importances(records, study.quality),
        study.cost.name: importances(records, study.cost),
    }
    targets["being on the front"] = importances(records, "front", cost=study.cost.name)
    first = [i.knob for i in targets[study.quality.name] if i.variance > 0.02][:4]
    return Findings(
        members,
        belief,
        alike,
        differences,
        tuple(claims(study, belief, alike, differences, members)),
        lines,
        refused,
        tuning_curves(records, chosen),
        {name: found for name, found in targets.items() if found},
        {knob: marginal(records, knob) for knob in first},
        interactions(records, first),
        heat_map(records, study.cost.name),
        _path(study),
    )


def indistinguishable(
    records: Sequence[Record], quality: Objective, cost: str, correlation: float = CORRELATION
) -> tuple[Record, ...]:
    """The designs that no other beats significantly in quality, whatever they cost, the cheapest first.

    With probability 0.95 the truly best is among them (`compare.as_good_as_best`), as far as the errors of the
    scores are known: those of seeds only where seeds were repeated.
    """
    able, _values = finite(records, (quality,)) if records else ((), np.empty((0, 1)))
    found = evidence(able, correlation=correlation) if able else None
    if found is None:
        return ()
    sign = 1 if quality.direction == "maximize" else -1
    freedom = found[4] or math.inf
    keep = as_good_as_best([sign * e.score for e in found[0]], [e.error for e in found[0]], freedom)
    price = Objective(cost, "minimize")
    return tuple(sorted((r for r, k in zip(able, keep, strict=True) if k), key=lambda r: (price.value(r), r.number)))


def claims(
    study: Study,
    belief: Belief | None,
    alike: Sequence[Record],
    differences: Sequence[Difference],
    members: Sequence[Record],
) -> list[str]:
    """What the data support and what they do not, in sentences with their numbers, before the notes."""
    said: list[str] = []
    label = {record.number: f"#{record.number} {record.label}" for record in study.records}
    if belief:
        sure = [m for m in members if belief.by_number[m.number].on_front >= 0.9]
        weak = [m for m in members if belief.by_number[m.number].on_front < 0.5]
        off = [d for d in belief.designs if not d.member and d.on_front >= 0.3]
        what = "are on the front with probability" if belief.kind == "probability" else "stay on the front in a share"
        said.append(
            f"Supported: {len(sure)} of {len(members)} members {what} of 0.9 or more"
            + (": " + ", ".join(label[m.number] for m in sure[:8]) if sure else "")
            + ("" if belief.kind == "probability" else ", when scores vary as the examples drawn would make them")
            + "."
        )
        if weak:
            said.append(
                f"Not supported: {len(weak)} member{'s are' if len(weak) > 1 else ' is'} less likely on the front "
                "than off it: "
                + ", ".join(f"{label[m.number]} ({belief.by_number[m.number].on_front:.0%})" for m in weak[:8])
                + "."
            )
        if off:
            which = "designs that are not members" if len(off) > 1 else "design that is not a member"
            said.append(
                f"{len(off)} {which} could well be one (0.3 or more): "
                + ", ".join(f"{label[d.record.number]} ({d.on_front:.0%})" for d in off[:8])
                + "."
            )
        if belief.kind == "sensitivity":
            said.append(
                "Scores are single ones, so these shares are a sensitivity, not a probability: they hold the error "
                "of the examples drawn, with designs taken as half alike on them, and nothing of the luck of training."
            )
        if belief.rough:
            said.append(
                "Scores are too few, or err by nearly as much as designs of like cost lie apart, to show how true "
                "scores are spread. The shares in the middle are rough for that: in simulations designs given 0.2 to "
                "0.4 were members in 0.2 to 0.5 of cases. More examples or seeds make them sharper."
            )
        if not belief.drawn:
            said.append(
                f"How far {study.quality.name} depends on which examples were drawn is not known (no retest kept what "
                "each example gave): these figures hold the luck of training alone."
            )
        if belief.measured:
            said.append(
                f"On the same test examples the outcomes of two designs have a correlation of {belief.correlation:.2f} "
                "(measured on the retests): what all designs find hard is not held against any of them."
            )
    if len(alike) == 1:
        said.append(f"{label[alike[0].number]} is better than every other design (95 %, corrected for comparing all).")
    elif alike:
        best = max(alike, key=lambda r: r.validation if r.direction == "maximize" else -r.validation)
        cheap = alike[0]
        said.append(
            f"{len(alike)} designs are indistinguishable from the best (95 %, corrected for comparing all): the data "
            f"do not show that {label[best.number]} is better than any of them. The cheapest is {label[cheap.number]}."
        )
    if differences:
        found = [d for d in differences if d.corrected < 0.05]
        how = "by example and seed" if all(d.by_example for d in differences) else "by seed"
        said.append(
            f"Of {len(differences)} pairs of retested designs, paired {how}, {len(found)} differ at 5 % after "
            "Holm's correction" + (": " + ", ".join(_pair(d) for d in found[:6]) if found else "") + "."
        )
    gap = optimism(study.records)
    if gap:
        i = gap.interval
        around = f" ({i.low:+.3f} to {i.high:+.3f})" if math.isfinite(i.low) else ""
        said.append(
            f"Optimism of selection: the {gap.designs} retested designs scored {i.mean:+.3f}{around} better in "
            "validation, where they were selected, than on test."
        )
    if len(study.records) > MOST:
        said.append(
            f"Bounded for speed: importances, interactions and predicted steps of the ablation path are computed on "
            f"the last {MOST} complete designs."
        )
    return [*said, *notes(study), *study.notes]


def _pair(d: Difference) -> str:
    first, second = (d.a, d.b) if d.probability >= 0.5 else (d.b, d.a)
    return f"#{first} over #{second} ({units.score(abs(d.interval.mean))}, p {d.corrected:.2g})".replace(
        "p 0)", "p < 1e-300)"
    )


def _path(study: Study) -> tuple[Step, ...]:
    """The ablation path from the best textbook design to the best design."""
    found = ends(study.records)
    return ablation(study.records, *found, study.ablations) if found else ()
