"""Runs against runs: grouped by what differs, hypervolume and attainment as brute force has them, tests at level."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import optuna
import pytest
import synthetic

from peftscape.analysis.attainment import attainment_difference
from peftscape.analysis.figures import family
from peftscape.analysis.front import ObjectiveError, hypervolume, parse_objectives
from peftscape.analysis.measures import measure
from peftscape.analysis.runs import Compared, compare, compare_runs, parse_reference
from peftscape.analysis.runs_report import _surface_figure, compared_json, compared_tables, write_comparison
from peftscape.analysis.sources import Study, from_optuna, load

AXES = parse_objectives("accuracy:max,trainable:min")


def runs(n: int = 3, *, trials: int = 25, better: float = 0.0) -> list[Study]:
    """Repeats of two samplers, the second `better`."""
    made = []
    for name, gain in (("random", 0.0), ("tpe", better)):
        for seed in range(n):
            study = synthetic.study(trials, seed=seed + 100 * (name == "tpe"))
            records = tuple(
                dataclasses.replace(
                    r, scores=tuple(dataclasses.replace(s, validation=min(1.0, s.validation + gain)) for s in r.scores)
                )
                for r in study.records
            )
            config = {"name": f"{name}-{seed}", "search": {"sampler": name, "seed": seed}}
            ended = {r.number: 10.0 * (i + 1) for i, r in enumerate(records)}
            source = f"runs/{name}-{seed}"
            made.append(dataclasses.replace(study, records=records, config=config, ended_s=ended, source=source))
    return made


def scaled(found: Compared, study: Study) -> list[list[float]]:
    """The complete records as losses from 0 (best) to 1 (reference), written out anew."""
    rows = []
    for record in study.records:
        if record.state == "complete":
            a, c = measure(record, "accuracy"), np.log1p(measure(record, "trainable"))
            best, worst = found.ideal, found.reference
            low, high = np.log1p(best["trainable"]), np.log1p(worst["trainable"])
            quality = (best["accuracy"] - a) / (best["accuracy"] - worst["accuracy"])
            rows.append([quality, (c - low) / (high - low)])
    return rows


def test_runs_that_differ_in_seed_alone_are_repeats() -> None:
    found = compare(runs(3), AXES)
    assert {group.name: len(group.runs) for group in found.groups} == {"sampler random": 3, "sampler tpe": 3}
    by = compare(runs(2), AXES, by="search.seed")
    assert [group.name for group in by.groups] == ["search.seed 0", "search.seed 1"]
    methods = compare(runs(2), AXES, by="method")
    assert {"lora", "bitfit"} < {group.name for group in methods.groups}
    with pytest.raises(ObjectiveError, match=r"no run's configuration has \"sampler\".*search\.sampler"):
        compare(runs(2), AXES, by="sampler")


def test_the_hypervolume_is_that_of_the_scaled_points() -> None:
    studies = runs(2)
    found = compare(studies, AXES)
    finals = [value for group in found.groups for value in group.finals]
    for study, final in zip(studies, finals, strict=True):
        own = hypervolume(scaled(found, study), ["minimize"] * 2, [1.0, 1.0])
        assert final == pytest.approx(own, rel=1e-9)
    first = found.groups[0]
    assert first.trials.mean[-1] == pytest.approx(np.mean(first.finals))
    assert (np.diff(first.trials.mean) >= -1e-12).all()
    assert (first.trials.low <= first.trials.mean).all()
    assert first.time is not None
    assert first.time.mean[-1] == pytest.approx(first.trials.mean[-1])
    assert first.time.mean[0] == 0  # nothing had ended yet


def test_runs_of_unequal_length_are_cut_and_single_runs_are_not_tested() -> None:
    studies = [*runs(2)[:2], synthetic.study(40)]
    studies[-1] = dataclasses.replace(studies[-1], config={"name": "x", "search": {"sampler": "gp", "seed": 0}})
    found = compare(studies, AXES)
    assert {len(group.trials.at) for group in found.groups} == {25}
    assert found.tests == {}
    text = " ".join(found.notes)
    assert "compared after 25" in text
    assert "One run each shows nothing of luck: sampler gp" in text


def test_a_better_sampler_is_found_and_says_how_many_repeats_it_needed() -> None:
    found = compare(runs(5, better=0.05), AXES)
    test = found.tests["sampler random", "sampler tpe"]
    assert test.difference < 0
    assert test.high < 0
    assert test.corrected < 0.05
    assert test.needed is not None
    assert test.needed <= 5
    same = compare(runs(5), AXES).tests["sampler random", "sampler tpe"]
    assert same.corrected > 0.05
    assert same.needed is None or same.needed > 5


def test_needed_repeats_give_the_power_they_promise() -> None:
    rng = np.random.default_rng(0)
    first = compare_runs(*rng.normal([[0.8], [0.82]], 0.02, (2, 40)).tolist())
    assert first.needed is not None
    from scipy import stats

    draws = rng.normal([[0.8], [0.8 + abs(first.difference)]], 0.02, (2000, 2, first.needed))
    power = np.mean(stats.ttest_ind(draws[:, 0], draws[:, 1], axis=1).pvalue < 0.05)
    assert power == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("objectives", [2, 3])
def test_attainment_differences_are_those_of_every_point(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    for _ in range(15):
        a, b = ([rng.integers(0, 5, (rng.integers(0, 4), objectives)).astype(float) for _ in range(3)] for _ in "ab")
        if not sum(map(len, (*a, *b))):
            continue
        found = attainment_difference(a, b)
        gaps = []
        for point in itertools.product(range(5), repeat=objectives):
            shares = [np.mean([bool((s <= np.array(point)).all(axis=1).any()) for s in group]) for group in (a, b)]
            gaps.append(shares[0] - shares[1])
        assert found.most_a == pytest.approx(max(0.0, *gaps))
        assert found.most_b == pytest.approx(max(0.0, *(-g for g in gaps)))


def test_the_attainment_test_keeps_its_level_and_sees_what_is_apart() -> None:
    rng = np.random.default_rng(4)
    false = sum(
        attainment_difference(rng.random((4, 6, 2)), rng.random((4, 6, 2)), permutations=100).p <= 0.05
        for _ in range(100)
    )
    assert false <= 11
    apart = attainment_difference(rng.random((4, 6, 2)) * 0.5, 0.5 + rng.random((4, 6, 2)) * 0.5)
    assert (apart.most_a, apart.p) == (1.0, pytest.approx(2 / 70))


def test_a_comparison_is_shown_as_json_table_and_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    studies = [
        dataclasses.replace(s, config={**s.config, "task": evil if "tpe" in s.source else "plain"}) for s in runs(3)
    ]
    found = compare(studies, AXES, reference={"accuracy": 0.5})
    assert found.reference["accuracy"] == pytest.approx(0.5)
    data = json.loads(json.dumps(compared_json(found), allow_nan=False))
    assert len(data["groups"]) == 2
    assert data["tests"][0]["repeats_needed"] is None or data["tests"][0]["repeats_needed"] > 1
    assert len(compared_tables(found)) >= 3
    text = write_comparison(found, tmp_path / "compare.html").read_text(encoding="utf-8")
    assert evil not in text.replace("plotly.js", "")
    assert "&lt;script&gt;" in text
    assert "http-equiv" in text


def test_methods_are_compared_as_far_as_each_came() -> None:
    [study, *_] = runs(1)
    found = compare([study], AXES, by="method")
    counts = {group.name: sum(family(r) == group.name for r in study.records) for group in found.groups}
    assert len(set(counts.values())) > 1
    for group in found.groups:
        own = [r for r in study.records if family(r) == group.name]
        rows = scaled(found, dataclasses.replace(study, records=tuple(own)))
        assert group.finals == pytest.approx([hypervolume(rows, ["minimize"] * 2, [1.0, 1.0])])
        assert len(group.trials.at) == max(counts.values())


def test_the_surface_shows_what_was_attained_at_each_cost() -> None:
    found = compare(runs(3), AXES)
    for line in _surface_figure(found)["data"]:
        assert list(line["x"]) == sorted(line["x"], reverse=True), "from cheap to dear"
        assert line["line"]["shape"] == "hv", "between two costs the cheaper design is what there is"


def test_what_cannot_be_compared_is_said() -> None:
    studies = runs(2)
    with pytest.raises(ObjectiveError, match=r'no objective "acuracy". Did you mean "accuracy"\?'):
        compare(studies, AXES, reference={"acuracy": 0.6})
    with pytest.raises(ObjectiveError, match="accuracy 1 is no worse than the best seen"):
        compare(studies, AXES, reference={"accuracy": 1.0})
    running = tuple(dataclasses.replace(r, state="running", scores=()) for r in studies[0].records)
    with pytest.raises(ObjectiveError, match=r"no trial of runs/random-0 has ended yet"):
        compare([dataclasses.replace(studies[0], records=running), *studies[1:]], AXES)


def test_a_reference_is_read_or_refused() -> None:
    assert parse_reference("accuracy=0.6, trainable=1e6") == {"accuracy": 0.6, "trainable": 1e6}
    with pytest.raises(ObjectiveError, match=r'expected "accuracy=0\.6", found "accuracy"'):
        parse_reference("accuracy")


def test_the_times_of_a_storage_are_read(tmp_path: Path) -> None:
    study, _ = synthetic.store(synthetic.records(4), f"sqlite:///{tmp_path / 'study.db'}")
    found = load(tmp_path)
    trials = study.get_trials(deepcopy=False)
    start = min(t.datetime_start for t in trials if t.datetime_start)
    for trial in trials:
        if trial.datetime_complete:
            assert found.ended_s[trial.number] == pytest.approx((trial.datetime_complete - start).total_seconds())
    assert from_optuna(optuna.create_study()).ended_s == {}
