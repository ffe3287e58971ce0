"""Notes: what a study's figures can and cannot show, and what it cost to make them."""

import math
from collections import Counter

from peftscape.analysis import units
from peftscape.analysis.noise import smallest_difference, validation_interval
from peftscape.analysis.predicted import training_work
from peftscape.analysis.states import saved
from peftscape.analysis.study import Study
from peftscape.spaces.record import Record


def spent(study: Study) -> list[tuple[str, str]]:
    """What the search cost to run."""
    records = study.records
    work = training_work(study, failed=True)
    seeds = [score for record in records for score in record.retests]
    spent = [
        ("Trials", f"{len(records):,}"),
        *_account(study),
        ("From the first start to the last end", units.seconds(study.elapsed_s)),
        ("Trials' shares of the time that their lanes trained", units.seconds(sum(r.wall_s for r in records))),
        ("Training work, counted as if each trained alone", units.amount(work, "FLOP") if work else "–"),
        *_stopped(study),
        ("Retests", f"{len(seeds):,} of {sum(bool(r.retests) for r in records):,} designs"),
        ("Sum of the retests' times", units.seconds(sum(score.wall_s for score in seeds))),
        ("Retests that failed", f"{len(study.failed_retests):,}" if study.failed_retests else "–"),
    ]
    return [(name, value) for name, value in spent if value != "–"]


def _stopped(study: Study) -> list[tuple[str, str]]:
    """How many trials were stopped at which rung, and the training that this saved."""
    at = Counter(record.rungs[-1].examples for record in study.records if record.state == "pruned" and record.rungs)
    rows = [
        (f"Stopped at the rung of {examples:,} examples", f"{n:,} trial{'' if n == 1 else 's'}")
        for examples, n in sorted(at.items())
    ]
    if found := saved(study.records):
        less, whole = found
        rows.append(("Training that stopping saved", f"{less:,} of {whole:,} examples ({less / whole:.0%})"))
    return rows


_PARTS = (
    ("loading_s", "Loading model and data"),
    ("training_s", "Training trials"),
    ("evaluation_s", "Evaluating trials"),
    ("retest_s", "Training and scoring retests"),
    ("waiting_s", "Waiting for other workers"),
    ("report_s", "Writing reports"),
    ("lost_s", "Lost to failures"),
)


def _account(study: Study) -> list[tuple[str, str]]:
    """The accounts of the search's own sessions, where it kept them (`Study.spent`)."""
    spent = study.spent
    if not spent:
        return []
    sessions = int(spent["sessions"])
    return [
        ("Sessions", f"{sessions:,}"),
        ("Time of all sessions" + (", side by side once" if sessions > 1 else ""), units.seconds(spent["wall_s"])),
        *((words, units.seconds(spent.get(name, 0.0))) for name, words in _PARTS),
        ("Computing, trials and retests", units.seconds(spent.get("device_s", 0.0))),
        ("Training examples", f"{int(spent.get('examples', 0)):,}"),
    ]


def failed_runs(study: Study) -> list[tuple[str, str, str, str, str]]:
    """Trials and retests that gave no score: number, what it was, the kind of failure, its message, and the step."""
    runs = [(r.number, r.label, r.failure) for r in study.records if r.state == "failed"]
    labels = {record.number: record.label for record in study.records}
    runs += [(r.of, f"{labels[r.of]}, retest with seed {r.seed}", r.failure) for r in study.failed_retests]
    return [
        (str(number), label, why.kind, why.message, "–" if why.step is None else str(why.step))
        if why
        else (str(number), label, "", "", "–")
        for number, label, why in runs
    ]


def notes(study: Study) -> list[str]:
    """What the figures can and cannot show, with the numbers of this study."""
    complete = [record for record in study.records if record.state == "complete"]
    retested = [record for record in complete if record.retests]
    if study.imported and complete:
        return _imported(study, complete)
    found = [
        "Designs were selected by validation scores alone. The best of many looks better in validation than "
        "it is; the test scores come from retests on data that no selection saw, and the front was not "
        "formed again on them."
    ]
    if not complete:
        return ["No trial is complete, so there is no front yet."]
    seeds = sorted({len(record.retests) for record in retested})
    if not retested:
        found.append("No design was retested: every score is of the seeds of its one trial, on validation data.")
    else:
        span = f"{seeds[0]} to {seeds[-1]} further" if len(seeds) > 1 else f"{seeds[0]} further"
        found.append(
            f"{len(retested)} designs were retested with {span} seed{'s' if seeds != [1] else ''} each. "
            "A test interval is a 95 % t-interval of the mean over seeds: it holds the luck of training, not "
            "of which test examples were drawn."
        )
        found += _resolution(retested)
    bounded = [record for record in complete if validation_interval(record)]
    if sizes := sorted({record.n_validation for record in bounded}):
        found.append(
            f"Validation has {' or '.join(f'{n:,}' for n in sizes)} examples. Bars on the front are the 95 % "
            "interval that this number leaves (Wilson's for shares); they say nothing about seeds."
        )
    found.append(
        "A design's costs are its costs when trained alone, whatever shared its cohort. Seconds are a note "
        "of what happened on this machine, not a cost."
    )
    return found


def _imported(study: Study, complete: list[Record]) -> list[str]:
    """What can be said of other people's runs, whose selection and costs are not known here."""
    name = study.quality.name
    found = [
        "How these designs were chosen is not known here: if their settings were tuned on the same scores, the "
        "best of them look better than they are."
    ]
    seeds = sorted({len(record.scores) for record in complete})
    if seeds == [1]:
        found.append("Every run has one seed: nothing here says how much another seed would change it.")
    elif seeds:
        found.append(f"Runs have {seeds[0]} to {seeds[-1]} seeds; a score is their mean.")
    sizes = sorted({record.n_validation for record in complete if record.n_validation})
    if len(sizes) == 1 and 0 < (best := max(record.validation for record in complete)) < 1:
        alike, apart = (100 * smallest_difference(sizes[0], best, correlation=c) for c in (0.5, 0.0))
        found.append(
            f"On {sizes[0]:,} examples {name} {best:.3f} differs from another design's only from about "
            f"{alike:.1f} points ({apart:.1f} if two designs err independently); closer designs are not told apart."
        )
    elif not sizes:
        found.append(f"On how many examples {name} was measured is not known, so scores stand without intervals.")
    return found


def _resolution(retested: list[Record]) -> list[str]:
    """What difference the test set's size can show at all, for metrics that are shares."""
    sizes = {score.n_test for record in retested for score in record.retests if score.n_test}
    best = max((record.test for record in retested if math.isfinite(record.test)), default=math.nan)
    if len(sizes) != 1 or not 0 < best < 1 or retested[0].metric not in ("accuracy", "balanced_accuracy"):
        return []
    n = sizes.pop()
    alike, apart = (100 * smallest_difference(n, best, correlation=c) for c in (0.5, 0.0))
    return [
        f"The test set has {n:,} examples. At a score of {best:.3f} it shows a difference between two "
        f"designs only from about {alike:.1f} points ({apart:.1f} if they err independently): "
        "1.96 √(2p(1 − p)(1 − ρ)/n) with ρ = 0.5. Designs closer than that are not told apart by this test."
    ]
