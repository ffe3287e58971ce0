"""The report's findings as rows of text: what noise leaves, fitted curves, the ablation path."""

from typing import Any

from peftscape.analysis import units
from peftscape.analysis.ablation import Step, missing
from peftscape.analysis.findings import Findings
from peftscape.analysis.fit import Curve, leaders
from peftscape.analysis.report_rows import limit_text, row, steps
from peftscape.analysis.study import Study
from peftscape.analysis.table import cost_text

FLOOR = 0.02
"""Interactions below this share are the forest's own noise, and not shown."""


def findings_rows(study: Study, found: Findings) -> dict[str, Any]:
    """What the template shows of the findings, as rows of text."""
    belief = found.belief
    likely = [d for d in belief.designs if d.member or d.on_front >= 0.2] if belief else []
    inside = {r.number: i for i, r in enumerate(found.members)}
    likely.sort(key=lambda d: (study.cost.value(d.record), inside.get(d.record.number, 0)))
    cost = next(iter(units.shown([study.cost.name])), units.SHOWN[0])
    whole = found.curves.get("all methods")
    fits = [
        (
            name,
            curve.text(),
            f"{units.amount(curve.low, cost.unit)} to {units.amount(curve.high, cost.unit)}",
            str(curve.sizes),
            f"{curve.errors[curve.kind]:.3f}",
        )
        for name, curve in found.curves.items()
    ]
    return {
        "kind": belief.kind if belief else "",
        "likely": [
            {
                **row(d.record, study),
                "member": d.member,
                "chance": f"{d.on_front:.0%}",
                "shrunken": f"{units.score(d.score.mean)} ({units.score(d.score.low)} to {units.score(d.score.high)})",
                "cost": cost_text(d.record, cost),
            }
            for d in likely[:40]
        ],
        "alike": [row(record, study) for record in found.alike],
        "fits": fits,
        "refused": _refused(found),
        "expected": _expected(whole, study) if whole else [],
        "prices": _prices(whole, cost.unit) if whole else [],
        "leaders": [
            (name, units.amount(low, cost.unit), units.amount(high, cost.unit))
            for name, low, high in leaders(found.curves)
        ],
        "path": [
            (step.change, f"{units.score(step.score)} ± {units.score(1.96 * step.error)}", _origin(step))
            for step in found.path
        ],
        "gaps": len(missing(found.path)),
        "pairs": [(" and ".join(i.knobs), f"{i.share:.0%}") for i in found.interactions if i.share >= FLOOR][:6],
        "paired": bool(found.interactions),
        "hours": _hours(found),
    }


def _refused(found: Findings) -> list[tuple[str, str]]:
    """Each reason for no curve, with those whom it concerns."""
    reasons: dict[str, list[str]] = {}
    for name, why in found.refused.items():
        reasons.setdefault(why, []).append(name)
    return [(", ".join(names), why) for why, names in reasons.items()]


def _expected(curve: Curve, study: Study) -> list[tuple[str, str, str, str]]:
    """The quality expected at round costs within the data and at ten times beyond, with both intervals."""
    limits = steps(curve.low, curve.high)
    costs = [float(limit) for limit in limits if curve.low <= limit <= curve.high][:7]
    rows = []
    for cost in [*costs, 10 * curve.high]:
        found = curve.at(cost)
        curve_text, new_text = (
            f"{units.score(low)} to {units.score(high)}"
            for low, high in ((found.low, found.high), (found.new_low, found.new_high))
        )
        said = limit_text(study, cost) + (" (extrapolated)" if found.extrapolated else "")
        rows.append((said, units.score(found.value), curve_text, new_text))
    return rows


def _prices(curve: Curve, unit: str) -> list[tuple[str, str, str]]:
    """The cost expected for qualities between the curve's ends, and one above."""
    low, high = (curve.at(end).value for end in (curve.low, curve.high))
    rows = []
    for share in (0.25, 0.5, 0.75, 1.1):
        found = curve.cost_for(low + share * (high - low))
        ends = [units.amount(end, unit) if end is not None else "not reached" for end in (found.low, found.high)]
        said = "not reached" if found.cost is None else units.amount(found.cost, unit)
        said += " (extrapolated)" if found.cost is not None and found.extrapolated else ""
        rows.append((units.score(low + share * (high - low)), said, " to ".join(ends)))
    return rows if high != low else []


def _origin(step: Step) -> str:
    if step.number is None:
        return "predicted"
    return f"recorded for this path ({step.number})" if step.ablation else f"recorded, #{step.number}"


def _hours(found: Findings) -> list[tuple[str, list[str]]]:
    """The best score to expect of each method within a few budgets of device time."""
    budgets = (600.0, 3600.0, 36_000.0)
    rows = []
    for name, curve in found.tuning.items():
        longest = curve.seconds_each * len(curve.trials)
        cells = [units.score(curve.after(b)) if b <= longest else "–" for b in budgets]
        if any(cell != "–" for cell in cells):
            rows.append((name, cells))
    return rows
