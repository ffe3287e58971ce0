"""S3Delta's searches: which structures are found, what finding them may take, and whose turn it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
import torch
from commands import run
from searches import make_base, tiny
from transformers import AutoModel

from peftscape.search.account import Account
from peftscape.search.asking import Asking
from peftscape.search.budget import REPORT_S, Budget
from peftscape.search.cohort import Cohort
from peftscape.search.config import ModelConfig, S3DeltaSettings, SearchConfig
from peftscape.search.guarded import Memory
from peftscape.search.progress import SearchProgress
from peftscape.search.s3delta import HOLDER, find_structures, middle
from peftscape.search.s3delta_net import super_net
from peftscape.search.s3delta_space import STRUCTURES, Modules, params_of
from peftscape.search.session import Session, design_costs, open_session
from peftscape.search.stopping import Stop
from peftscape.search.storage import Storage
from peftscape.search.study import _limits
from peftscape.search.workers import Workers
from peftscape.spaces.space_file import read_space


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which no token reads another, so that [CLS] knows no word, and FFNs give nothing whatever they do."""
    path = make_base(tmp_path_factory.mktemp("s3delta"))
    model = AutoModel.from_pretrained(path)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.output.dense.weight.zero_()
            layer.output.dense.weight.zero_()
    model.save_pretrained(path)
    return path


#: Of these modules the two on `o` alone can let [CLS] know its text; they take 64 parameters each, the others 80.
PLANTED = {
    "slots": [
        {"name": name, "options": [{"method": "lora", "sites": [site], "rank": 1, "layers": ["bits"]}]}
        for name, site in (("lora_up", "up"), ("lora_up_2", "up"), ("lora_o", "o"), ("lora_up_3", "up"))
    ],
    "training": {"lr": {"log": [1e-2, 1e-1]}},
}


def planted(base: Path, examples: int, lanes: int = 4) -> SearchConfig:
    settings = {
        "sampler": "s3delta", "batch_size": 16, "lanes": lanes,
        "s3delta": S3DeltaSettings(budgets="144", seeds=4, examples=examples),
    }  # fmt: skip
    return tiny(base, search=settings, space=PLANTED, model=ModelConfig(source=str(base), dtype="float32"))


Opened = tuple[Session, Storage, Workers, Budget]


def opened(of: SearchConfig, out: Path, **limits: Any) -> Opened:
    session = open_session(of)
    session.guards.update(stop=Stop(), memory=Memory())
    storage, account = Storage(out, of), Account()
    workers = Workers(storage.attrs, storage.set_attr, storage.lock, None, account, lease_s=0.1)
    every: dict[str, Any] = {"trials": 4, "time_s": None, "trainable": None, **limits}
    return session, storage, workers, Budget(**every, batch=of.search.batch_size, account=account)


def found(of: SearchConfig, out: Path, **limits: Any) -> tuple[list[dict[str, Any]], Budget]:
    """The structures of a search that trains no trial, from four super-nets, of which two fit in memory.

    Another worker dies looking for them, which has spent 1,000 examples.
    """
    session, storage, workers, budget = opened(of, out, **limits)
    account, step = budget.account, Cohort.step
    storage.set_attr(HOLDER, "another")
    storage.set_attr("worker/another", {"beat": 7, "ended": False, "examples": 1000})

    def narrow(self: Cohort) -> list[float]:
        if len(self.lanes) > 2:
            raise RuntimeError("out of memory")
        return step(self)

    with SearchProgress(quiet=True) as progress, patch.object(Cohort, "step", narrow):
        find_structures(session, storage, workers, budget, progress)
        spent, structures = account.examples, storage.attr("s3delta")
        find_structures(session, storage, workers, budget, progress)
    assert 0.4 < account.waiting_s < 2, "until the other's lease has ended"
    assert (account.examples, storage.attr("s3delta")) == (spent, structures), "once found, they stay"
    assert session.guards["memory"].width is None, "trials are others"
    storage.close()
    return structures, budget


def test_the_modules_that_can_help_are_found(base: Path) -> None:
    session = open_session(planted(base, 640))
    space = read_space(PLANTED, session.backbone.sites)
    modules, shared = Modules(space), session.cohort()
    which = [
        super_net(
            modules, S3DeltaSettings(), middle(space), budget=144, seed=seed, steps=40,
            backbone=session.backbone, head=session.head,
        )
        for seed in range(4)
    ]  # fmt: skip
    shared.admit(*which)
    for _ in range(40):
        shared.step()
    shared.close()
    kept = [modules.by_slot(modules.chosen(net.probabilities().tolist(), 144)) for net in which]
    assert sum(row["lora_o"] == [0, 1] for row in kept) >= 3, "by chance one structure in 28 has both"


def test_what_was_interrupted_is_found_anew_as_it_would_have_been(base: Path, tmp_path: Path) -> None:
    # Half of 256 examples are two steps of four super-nets; the others the dead worker has spent.
    of = planted(base, 320)
    (one, budget), (two, _) = (found(of, tmp_path / name, examples=1256) for name in ("one", "two"))
    assert one == two != []
    assert budget.account.examples == 4 * 32
    nothing, budget = found(of, tmp_path / "small", examples=1192)
    assert (nothing, budget.account.examples) == ([], 0), "one step teaches no gate"
    for name, kept in (("one", one), ("small", None)):
        storage = Storage(tmp_path / name, of)
        _limits(storage, of, 8, None)
        assert storage.attr(STRUCTURES) == kept, "where there was no room, a larger budget may have some"
        storage.close()


def test_super_nets_leave_half_of_the_time(base: Path, tmp_path: Path) -> None:
    structures, budget = found(planted(base, 10**6, lanes=1), tmp_path, time_s=REPORT_S + 1.6)
    assert 0.1 < budget.left_s() - budget.report_s < 0.55
    assert budget.account.device_s < (1.6 - budget.account.waiting_s) / 2 + 0.1, "all parts together"
    assert all(row["steps"] < 1000 for row in structures)


def test_what_a_finder_trained_in_vain_is_lost_and_no_other_is_overwritten(base: Path, tmp_path: Path) -> None:
    session, storage, workers, budget = opened(planted(base, 64), tmp_path)
    step, theirs = Cohort.step, [{"layers": {}}]

    def broken(self: Cohort) -> list[float]:
        if self.lanes[0].step == 2:
            raise RuntimeError("broken")
        return step(self)

    def late(self: Cohort) -> list[float]:
        storage.set_attr(HOLDER, "another")
        storage.set_attr(STRUCTURES, theirs)
        return step(self)

    with SearchProgress(quiet=True) as progress:
        with patch.object(Cohort, "step", broken), pytest.raises(RuntimeError, match="broken"):
            find_structures(session, storage, workers, budget, progress)
        spent = budget.account
        assert spent.lost_s > 0.8 * spent.device_s > 0
        assert spent.training_s < 0.2 * spent.device_s
        storage.set_attr(HOLDER, None)
        with patch.object(Cohort, "step", late):
            find_structures(session, storage, workers, budget, progress)
    assert storage.attr(STRUCTURES) == theirs
    storage.close()


def test_a_structure_over_the_limits_takes_no_others_turn(base: Path, tmp_path: Path) -> None:
    session, storage, workers, budget = opened(planted(base, 64), tmp_path)
    names = [slot["name"] for slot in PLANTED["slots"]]
    large, small = ({name: [0, 1] if name in kept else [] for name in names} for kept in (names, names[2:]))
    storage.set_attr(STRUCTURES, [{"layers": large}, {"layers": small}])
    space = read_space(PLANTED, session.backbone.sites)
    fixed = optuna.trial.FixedTrial({**params_of([{"layers": small}], space, 0), "training.lr": 2e-2})
    design = space.suggest(fixed)
    budget.adapter_bytes = design_costs(session, design).adapter_bytes
    with SearchProgress(quiet=True) as progress:
        asking = Asking(session, storage, workers, budget, progress)
        trials = [asking.next(0, 0) for _ in range(2)]
    placed = [(trial.number, trial.design.placements) for trial in trials if trial is not None]
    assert placed == [(1, design.placements), (3, design.placements)]
    storage.close()


SEARCH = """
model = {{source = "{base}", dtype = "float32"}}
task = {{path = "{base}/task.csv", validation_size = 20, test_size = 30}}
[search]
sampler = "s3delta"
examples = 32
batch_size = 8
lanes = 2
retest_seeds = 0
textbook = false
s3delta = {{budgets = "70, 150, 300", examples = 200}}
[budget]
trials = 4
examples = 544
[space.training]
lr = {{log = [1e-3, 1e-2]}}
[[space.slots]]
name = "up"
options = [{{method = "lora", sites = ["up"], rank = 1, layers = ["bits"]}}]
[[space.slots]]
name = "o"
options = [{{method = "lora", sites = ["o"], rank = 1, layers = ["bits"]}}]
[[space.slots]]
name = "k"
options = [{{method = "ia3", sites = ["k"], layers = ["bits"]}}]
"""


def test_a_search_trains_each_structure_in_its_turn_and_keeps_its_budgets(base: Path, folder: Path) -> None:
    (folder / "s.toml").write_text(SEARCH.format(base=base))
    run("search", "s.toml", "--out", "run")
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'run' / 'study.db'}")
    structures, first = study.user_attrs["s3delta"], study.trials
    assert len({json.dumps(row["layers"]) for row in structures}) == len(structures) >= 2
    assert len(first) == 4
    for trial in first:
        row = structures[trial.number % len(structures)]
        assert trial.user_attrs["record"]["costs"]["adapter"] == row["parameters"] <= row["budget"]
    assert len({trial.params["training.lr"] for trial in first}) == 4, "TPE suggests what is left"
    (worker,) = (value for key, value in study.user_attrs.items() if key.startswith("worker/"))
    # Half of 544 is 11 steps of three super-nets, of which one fits in ten: 8 examples each, and the trials' 32.
    assert [row["steps"] for row in structures] == [10] * len(structures)
    assert worker["examples"] == 3 * 10 * 8 + 4 * 32
