"""A search from its first trial to its report, on a tiny model and a task that a keyword decides."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

from peftscape.search import account as account_module
from peftscape.search import budget as budget_module
from peftscape.search import loop as loop_module
from peftscape.search import retest as retest_module
from peftscape.search import study as study_module
from peftscape.search.cohort import Cohort
from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings, TaskConfig
from peftscape.search.export import load
from peftscape.search.session import open_session
from peftscape.search.storage import Storage
from peftscape.search.study import run_search
from peftscape.spaces.design import Design
from peftscape.spaces.presets import textbook
from peftscape.spaces.price import costs
from peftscape.spaces.words import InputError

TRIALS, BATCH, EXAMPLES, SEEDS = 8, 8, 64, 2
KEYS = {"person": "who", "place": "where", "time": "when"}
FILL = ["the", "a", "of", "in", "city", "river", "year", "man", "is", "was"]
#: One slot that is quick to train; what it suggests is always possible.
SPACE: dict[str, Any] = {
    "slots": [{"name": "w", "options": [{"method": "lora", "rank": {"ladder": [1, 16]}, "layers": ["all", "top"]}]}],
    "training": {"lr": {"log": [1e-3, 1e-2]}},
}
#: The space of all methods, textbook designs first.
FULL: dict[str, Any] = {"space": "unified", "search": {"textbook": True}}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *KEYS.values(), *FILL]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with words for tokens, and `task.csv` beside it."""
    path = tmp_path_factory.mktemp("base")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(BertConfig(vocab_size=len(WORDS), hidden_size=64, **shape))
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0, 0.05)
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    random = np.random.default_rng(0)
    rows = ["text,label"]
    for i in range(320):
        label = list(KEYS)[i % 3]
        text = [*random.choice(FILL, size=random.integers(1, 5)), KEYS[label], KEYS[label]]
        rows.append(f"{' '.join(random.permutation(text))} {i % 7},{label}")
    (path / "task.csv").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(autouse=True)
def no_report(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own; the first search here wrote a real one."""
    monkeypatch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))


def config(base: Path, *, search: dict[str, Any] | None = None, **more: Any) -> SearchConfig:
    settings: dict[str, Any] = {
        "examples": EXAMPLES, "batch_size": BATCH, "lanes": 4, "retest_seeds": SEEDS, "sampler": "random",
        "textbook": False, **(search or {}),
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": "tiny",
        "model": ModelConfig(source=str(base), dtype="float32", head="mean"),
        "space": SPACE,
        "task": TaskConfig(path=str(base / "task.csv"), validation_size=40, test_size=60),
        "search": SearchSettings(**settings),
        "budget": BudgetConfig(trials=TRIALS),
    }
    return SearchConfig(**{**values, **more})


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of the unified space; tests copy the folder."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_search(config(base, **FULL), out, quiet=True)
    return out


def read(base: Path, out: Path, **more: Any) -> Storage:
    return Storage(out, config(base, **more))


def dominated(rows: list[tuple[float, float]], i: int) -> bool:
    """Whether another row has at least the score for at most the cost, and one of both strictly."""
    score, cost = rows[i]
    return any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in rows)


def tree(folder: Path) -> set[str]:
    """What a folder shows; locks and checksums are hidden files."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}


# -- a finished search


def test_a_search_trains_what_was_asked_for_and_records_all_of_it(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    assert storage.trained() == len(storage.records) == TRIALS
    assert {r.state for r in storage.records} == {"complete"}
    assert [r.number for r in storage.records] == list(range(TRIALS))
    session = open_session(config(base))
    for record in storage.records:
        design = Design.from_json(dict(record.design))
        assert (record.digest, record.label) == (design.digest, design.label)
        assert (record.metric, record.n_validation) == ("accuracy", 40)
        assert [s.seed for s in record.scores] == [0]
        assert record.curve[-1][0] == EXAMPLES
        told = costs(
            design, session.backbone.sites, outputs=3, tokens=session.tokens, batch=BATCH, dtype="float32", head="mean"
        )  # fmt: skip
        assert record.costs == told
    assert max(r.validation for r in storage.records) > 0.8, "a keyword decides this task"


def test_textbook_designs_come_first_and_are_named(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    names = [r.textbook for r in storage.records]
    assert names[:2] == ["lora", "lora_all_linears"]
    for record in storage.records:
        assert record.textbook or record.label in textbook(), "a label that says it needs no second name"
    assert len({r.digest for r in storage.records}) == TRIALS


def test_the_front_is_what_nothing_dominates(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    rows = [(r.validation, float(r.costs.trainable)) for r in storage.records if r.costs]
    wanted = {r.number for i, r in enumerate(storage.records) if not dominated(rows, i)}
    assert {int(name) for name in tree(finished / "adapters")} == wanted
    assert 1 <= len(wanted) <= TRIALS


def test_every_front_design_is_retested_with_further_seeds_on_test_data(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    front = {int(name) for name in tree(finished / "adapters")}
    retested = {r.number: r.retests for r in storage.study().records if r.retests}
    assert front <= retested.keys()
    for retests in retested.values():
        assert sorted(s.seed for s in retests) == [1000, 1001]
        for score in retests:
            assert score.n_test == 60
            assert score.test is not None
            assert score.test * 60 == pytest.approx(round(score.test * 60))
    assert len(storage.retested()) == SEEDS * len(retested)


def test_adapters_of_the_front_give_the_scores_on_record(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    task = open_session(config(base)).task
    for folder in (finished / "adapters").iterdir():
        adapter = load(folder)
        labels = [row["label"] for row in adapter.predict(task.validation.texts)]
        wanted = [task.labels[int(t)] for t in task.validation.targets]
        [record] = [r for r in storage.records if r.number == int(folder.name)]
        assert np.mean([a == b for a, b in zip(labels, wanted, strict=True)]) == pytest.approx(record.validation)
        assert adapter.design.digest == record.digest


def test_a_report_lies_beside_the_study(finished: Path) -> None:
    assert tree(finished) == {"study.db", "study.db.previous", "report.html", "adapters"}
    text = (finished / "report.html").read_text()
    assert "accuracy" in text
    assert "plotly" in text.lower()


# -- going on


def test_a_finished_search_is_read_and_nothing_is_loaded(
    base: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a finished search loaded its model")

    monkeypatch.setattr("peftscape.search.session.open_session", fail)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    started = time.monotonic()
    study = run_search(config(base, **FULL), finished, quiet=True)
    assert time.monotonic() - started < 2.0
    assert len(study.records) == TRIALS
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C in a step of a cohort."""
    step, steps = Cohort.step, []

    def patched(self: Cohort) -> list[float]:
        steps.append(1)
        if len(steps) > after:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Cohort, "step", patched)


@pytest.mark.parametrize("more", [FULL, {}], ids=["textbook", "random"])
def test_an_interrupted_search_becomes_the_unbroken_one(
    more: dict[str, Any], base: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = config(base, **more)
    if more is not FULL:
        finished = tmp_path / "unbroken"
        run_search(of, finished, quiet=True)
    unbroken = read(base, finished, **more).records
    out = tmp_path / "broken"
    for after in (3, EXAMPLES // BATCH + 2):  # in the first row of lanes, and in a later one
        with monkeypatch.context() as patch:
            interrupt(patch, after=after)
            with pytest.raises(KeyboardInterrupt):
                run_search(of, out, quiet=True)
    halfway = {r.number: r for r in read(base, out, **more).records}
    assert 0 < len(halfway) < TRIALS
    assert not read(base, out, **more).attr("finished")

    study = run_search(of, out, quiet=True)
    found = [r for r in study.records if r.state != "running"]
    assert read(base, out, **more).trained() == TRIALS
    assert sum(r.state == "complete" for r in found) == TRIALS
    assert [(r.number, r.digest, r.textbook) for r in found] == [(r.number, r.digest, r.textbook) for r in unbroken]
    for record in found:
        if record.number in halfway:
            assert halfway[record.number].scores == record.scores, "what was done is not done again"
    for one, other in zip(found, unbroken, strict=True):
        if one.scores:  # beside other neighbours sums come in another order: one of 40 answers may move
            assert one.validation == pytest.approx(other.validation, abs=1 / 40 + 1e-9)
    assert (out / "report.html").exists()


def test_interrupted_retests_are_completed_and_none_is_done_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = config(base, budget=BudgetConfig(trials=3), search={"retest_seeds": 5})
    steps = EXAMPLES // BATCH
    with monkeypatch.context() as patch:
        interrupt(patch, after=2 * steps + 2)  # one row of trials, one of retests, and into the second
        with pytest.raises(KeyboardInterrupt):
            run_search(of, tmp_path, quiet=True)
    first = read(base, tmp_path, search={"retest_seeds": 5}).retested()
    assert first
    study = run_search(of, tmp_path, quiet=True)
    storage = read(base, tmp_path, search={"retest_seeds": 5})
    retested = [(r.number, s.seed) for r in study.records for s in r.retests]
    assert len(retested) == len(set(retested)) == len(storage.retested()) > len(first)
    assert all(len(r.retests) in (0, 5) for r in study.records)


def test_more_trials_extend_a_finished_search(base: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    shutil.copytree(finished, out)
    of = config(base, **FULL)
    study = run_search(of, out, more_trials=3, quiet=True)
    assert len([r for r in study.records if r.state == "complete"]) == TRIALS + 3
    # The extended budget stands: the same command again finds it finished.
    assert len(run_search(of, out, quiet=True).records) == len(study.records)
    front = {int(name) for name in tree(out / "adapters")}
    assert front <= {r.number for r in study.records if r.retests}


def test_another_configuration_is_refused_with_what_differs(base: Path, finished: Path) -> None:
    before = (finished / "study.db").stat().st_mtime_ns
    of = config(base, search={"textbook": True, "batch_size": 4}, space="lora")
    with pytest.raises(InputError) as error:
        run_search(of, finished, quiet=True)
    assert error.value.errors == (
        f"search.batch_size: was {BATCH}, is 4",
        "space: was 'unified', is 'lora'",
        "this folder holds another search; use another --out, or --fork for a new study that knows this one's results",
    )
    assert (finished / "study.db").stat().st_mtime_ns >= before


def test_a_search_without_an_end_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trials, time, device_time or examples have to be limited"):
        run_search(config(base, budget=BudgetConfig(trials=None)), tmp_path, quiet=True)


# -- limits


def test_designs_over_the_limit_are_never_trained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, trained = 1500, set()
    admit = Cohort.admit

    def watched(self: Cohort, *lanes: Any) -> None:
        trained.update(lane.design.digest for lane in lanes)
        admit(self, *lanes)

    monkeypatch.setattr(Cohort, "admit", watched)
    of = config(base, budget=BudgetConfig(trials=5, trainable=limit), search={"retest_seeds": 0})
    study = run_search(of, tmp_path, quiet=True)
    complete = [r for r in study.records if r.state == "complete"]
    refused = [r for r in study.records if r.state == "pruned"]
    assert len(complete) == 5, "refused designs are not counted"
    assert refused
    assert len(complete) + len(refused) == len(study.records)
    for record in complete:
        assert record.costs is not None
        assert record.costs.trainable <= limit
    for record in refused:
        assert record.costs is not None
        assert record.failure is not None
        assert record.failure.kind == "limit"
        too_wide = "is larger than the linear" in record.failure.message
        assert too_wide or f"over the limit of {limit:,}" in record.failure.message
        assert record.digest not in trained
        assert not record.scores
        assert not record.curve


def test_a_space_with_no_design_under_the_limit_ends(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftscape.search.asking.REFUSED_IN_A_ROW", 12)
    of = config(base, budget=BudgetConfig(trials=5, trainable=3))
    study = run_search(of, tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["pruned"] * 12


class Clock:
    """A clock on which only cohorts take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lane_step_s: float, evaluation_s: float) -> None:
        self.now = 0.0
        step, predict = Cohort.step, Cohort.predict

        def slow_step(cohort: Cohort) -> list[float]:
            self.now += lane_step_s * len(cohort.lanes)
            return step(cohort)

        def slow_predict(cohort: Cohort, split: Any, *lanes: Any) -> Any:
            self.now += evaluation_s * len(lanes) * len(split) / 40
            return predict(cohort, split, *lanes)

        monkeypatch.setattr(Cohort, "step", slow_step)
        monkeypatch.setattr(Cohort, "predict", slow_predict)
        fake = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        for module in (study_module, loop_module, retest_module, budget_module, account_module):
            monkeypatch.setattr(module, "time", fake)


@pytest.mark.parametrize("time_s", [150, 300])
def test_a_search_ends_within_its_time_and_uses_it(
    time_s: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of two seconds a lane: a trial takes 16 s and its evaluation 2."""
    clock = Clock(monkeypatch, lane_step_s=2.0, evaluation_s=2.0)
    of = config(base, budget=BudgetConfig(trials=None, time=f"{time_s}s"))
    study = run_search(of, tmp_path, quiet=True)
    assert clock.now <= time_s - 6, "the report still fits"
    assert clock.now > 0.6 * time_s
    complete = [r for r in study.records if r.state == "complete"]
    assert len(complete) >= 2
    assert {len(r.retests) for r in study.records} <= {0, SEEDS}
    assert any(r.retests for r in study.records)
    storage = read(
        base,
        tmp_path,
    )
    assert storage.attr("finished")
    assert storage.attr("spent_s") == pytest.approx(clock.now)

    extended = run_search(of, tmp_path, more_time_s=60, quiet=True)
    assert clock.now <= storage.attr("spent_s") + 60
    assert len([r for r in extended.records if r.state == "complete"]) >= len(complete)


# -- trials of all kinds


def test_a_diverging_trial_fails_and_the_others_go_on(base: Path, tmp_path: Path) -> None:
    space = {
        "slots": [{"name": "w", "options": [{"method": "lora", "rank": {"ladder": [1, 8]}}]}],
        "training": {"lr": {"choice": [1e-2, 1e30]}},
    }
    study = run_search(config(base, space=space, budget=BudgetConfig(trials=8)), tmp_path, quiet=True)
    states = {r.state for r in study.records}
    assert states == {"complete", "failed"}
    for record in study.records:
        wild = record.design["training"]["lr"] > 1
        assert (record.state == "failed") == wild
        if wild:
            assert record.failure is not None
            assert (record.failure.kind, record.scores, record.retests) == ("not finite", (), ())
    trials = Storage(tmp_path, config(base, space=space))._study.get_trials(deepcopy=False)
    assert {t.state.name for t in trials} == {"COMPLETE", "PRUNED"}, "told FAIL, TPE would ask for it again"


def test_a_search_whose_trials_all_diverge_ends(base: Path, tmp_path: Path) -> None:
    space = {"slots": [{"name": "w", "options": [{"method": "lora"}]}], "training": {"lr": 1e30}}
    study = run_search(config(base, space=space, budget=BudgetConfig(trials=3)), tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["failed"] * 3
    assert (tmp_path / "report.html").exists()


def test_designs_that_need_the_backbone_for_themselves_train_beside_no_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = []
    step = Cohort.step

    def watched(self: Cohort) -> list[float]:
        together.append([lane.design.solo for lane in self.lanes])
        return step(self)

    monkeypatch.setattr(Cohort, "step", watched)
    slot = {"name": "w", "options": [{"method": "bitfit"}, {"method": "full_finetuning"}]}
    space = {"slots": [slot], "training": {"lr": {"log": [1e-4, 1e-3]}}}
    study = run_search(config(base, space=space, budget=BudgetConfig(trials=6)), tmp_path, quiet=True)
    assert {r.state for r in study.records} == {"complete"}
    assert {r.label for r in study.records} == {"bitfit", "full_finetuning"}
    assert all(len(solo) == 1 for solo in together if any(solo))
    assert any(len(solo) > 1 for solo in together)


def test_several_seeds_a_trial_are_several_lanes(base: Path, tmp_path: Path) -> None:
    of = config(base, search={"seeds": 3, "retest_seeds": 1}, budget=BudgetConfig(trials=2))
    study = run_search(of, tmp_path, quiet=True)
    for record in study.records:
        assert [s.seed for s in record.scores] == [0, 1, 2]
        assert record.validation == pytest.approx(np.mean([s.validation for s in record.scores]))


def test_regression_with_a_mean_head_and_a_cost_of_bytes(base: Path, tmp_path: Path) -> None:
    rows = (base / "task.csv").read_text().splitlines()[1:]
    numbers = {"person": "0.5", "place": "1.5", "time": "2.75"}
    rows = [f"{text},{numbers[label]}" for text, _, label in (row.rpartition(",") for row in rows)]
    (tmp_path / "numbers.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    of = config(
        base,
        task=TaskConfig(path=str(tmp_path / "numbers.csv"), validation_size=40, test_size=60, metric="spearman"),
        model=ModelConfig(source=str(base), dtype="bfloat16", head="mean"),
        search={"objectives": "spearman:max,peak_bytes:min", "sampler": "tpe"},
        budget=BudgetConfig(trials=4),
    )
    study = run_search(of, tmp_path / "run", quiet=True)
    complete = [r for r in study.records if r.state == "complete"]
    assert len(complete) == 4
    for record in complete:
        assert record.metric == "spearman"
        assert record.costs is not None
        assert record.costs.head == 65


def test_the_same_configuration_gives_the_same_search(base: Path, tmp_path: Path) -> None:
    of = config(base, search={"sampler": "tpe"}, budget=BudgetConfig(trials=5))
    one, other = (run_search(of, tmp_path / name, quiet=True).records for name in ("one", "other"))
    assert [r.design for r in one] == [r.design for r in other]
    for first, second in zip(one, other, strict=True):
        assert (first.state, first.costs, first.curve) == (second.state, second.costs, second.curve)
        assert [(s.seed, s.validation) for s in first.scores] == [(s.seed, s.validation) for s in second.scores]
        assert sorted((s.seed, s.test) for s in first.retests) == sorted((s.seed, s.test) for s in second.retests)
