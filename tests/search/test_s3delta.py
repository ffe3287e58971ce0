"""S3Delta: gates that keep to a budget, super-nets that learn them, and the structures a search trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from commands import run
from contract import BATCH, SITES, backbone, cohort, head, split
from searches import make_base, tiny
from transformers import AutoModel

from peftscape.search.account import Account
from peftscape.search.budget import REPORT_S, Budget
from peftscape.search.config import ModelConfig, S3DeltaSettings, SearchConfig
from peftscape.search.config_file import read_config
from peftscape.search.lane import new_lane
from peftscape.search.progress import SearchProgress
from peftscape.search.s3delta import HOLDER, find_structures, middle, within
from peftscape.search.s3delta_gates import logits, sample, shift
from peftscape.search.s3delta_net import ALPHA, SuperNet, super_net
from peftscape.search.s3delta_space import Modules, budgets, params_of, space_errors
from peftscape.search.session import open_session
from peftscape.search.stopping import Stop
from peftscape.search.storage import Storage
from peftscape.search.workers import Workers
from peftscape.spaces.price import adapter_size
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError


def slot(name: str, method: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "options": [{"method": method, "layers": ["bits"], **more}]}


LR = {"lr": {"log": [1e-3, 1e-2]}}
MIXED = {
    "slots": [
        slot("q", "lora", sites=["q"], rank=2),
        slot("ffn", "sequential_adapter", sites=["ffn"], size=3),
        slot("k", "ia3", sites=["k"]),
        slot("norms", "ln_tuning"),
        slot("biases", "bitfit"),
    ],
    "training": LR,
}


# -- gates


def random_gates(seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 40))
    sizes = random.integers(1, 5000, size=count).astype(float)
    return random.normal(0, 4, size=count), sizes, float(sizes.sum() * random.choice([1e-4, 0.03, 0.5, 0.999]))


@pytest.mark.parametrize("seed", range(8))
def test_the_expected_size_is_the_budget(seed: int) -> None:
    alpha, sizes, budget = random_gates(seed)

    def expected(zeta: float) -> float:
        return float((sizes / (1 + np.exp(zeta - alpha))).sum())

    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > budget else (low, middle)
    found = float(shift(torch.tensor(alpha), torch.tensor(sizes), budget))
    assert abs(expected(found) - budget) < 1e-6
    assert found == pytest.approx(low, abs=1e-9)


def test_a_gates_gradient_counts_the_shift() -> None:
    alpha, sizes, budget = (torch.tensor(value) for value in random_gates(3))
    weights = torch.linspace(-1, 1, len(alpha), dtype=torch.float64)

    def value(a: torch.Tensor) -> torch.Tensor:
        return (weights * torch.sigmoid(logits(a, sizes, float(budget)))).sum()

    assert torch.autograd.gradcheck(value, alpha.clone().requires_grad_())
    alpha.requires_grad_()
    (sizes * torch.sigmoid(logits(alpha, sizes, float(budget)))).sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.abs().max() < 1e-6, "no alpha changes the expected size"


def test_gates_are_open_as_often_as_p_says() -> None:
    p = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    drawn = sample(torch.logit(p).expand(20_000, 3), 0.3, torch.Generator().manual_seed(0))
    assert ((drawn > 0.5).double().mean(dim=0) - p).abs().max() < 0.01


# -- structures


def suggested(space: Any, layers: dict[str, list[int]]) -> Any:
    """The design that a study would make of a structure."""
    trial = optuna.trial.FixedTrial({**params_of([{"layers": layers}], space, 7), "training.lr": 2e-3})
    return space.suggest(trial)


@pytest.mark.parametrize("family", SITES)
def test_kept_modules_are_the_greedy_ones_and_stay_within_the_budget(family: str) -> None:
    space = read_space(MIXED, SITES[family])
    modules, random = Modules(space), np.random.default_rng(0)
    count = len(modules.all)
    everything = suggested(space, modules.by_slot(range(count)))
    assert modules.parameters(range(count)) == adapter_size(everything, SITES[family])
    for share in (0.01, 0.2, 0.5, 0.8, 0.99, 1.0):
        p, budget = random.random(count), int(share * modules.parameters(range(count)))
        kept: list[int] = []
        for i in np.argsort(-p):
            if adapter_size(suggested(space, modules.by_slot([*kept, i])), SITES[family]) <= budget:
                kept.append(int(i))
        assert modules.chosen(p.tolist(), budget) == tuple(sorted(kept))


def test_budgets_are_shares_or_numbers_that_leave_a_choice() -> None:
    assert budgets("0.1%, 500,1%", 200_000) == (200, 500, 2000)
    for wrong in ("", "1%,", "-5", "0%", "many", "1e999%", "2.5"):
        with pytest.raises(ValueError, match="a list such as"):
            budgets(wrong, 200_000)
    modules = Modules(read_space(MIXED, SITES["bert"]))
    most = sum(module.size for module in modules.all)
    assert within(modules, {1, 400, most}) == [400]
    with pytest.raises(InputError, match=r"parameters were expected.*not 1"):
        within(modules, {1, most})


def test_a_space_that_cannot_be_chosen_from_says_why(tmp_path: Path) -> None:
    table = {
        "slots": [
            {"name": "a", "options": [{"method": "lora", "layers": ["all"], "rank": {"ladder": [1, 4]}}]},
            slot("b", "vera"),
            slot("c", "prefix_tuning", length=2),
            {"name": "d", "options": [*slot("", "ia3")["options"], *slot("", "lora")["options"]]},
            slot("e", "sequential_adapter", mask={"sparsity": 0.5}),
        ]
    }
    with pytest.raises(InputError) as told:
        read_config({"task": {"name": "trec6"}, "search": {"sampler": "s3delta"}, "space": table})
    wanted = [
        'space.slot "a": layers = ["bits"] was expected', 'space.slot "a": rank: one value was expected',
        'space.slot "b": vera does more than', 'space.slot "c": prefix_tuning changes no output',
        'space.slot "d": 2 options, of which', 'space.slot "e": mask: S3Delta weighs methods as they are',
        "space.training: S3Delta finds places alone; a domain was expected",
        'space: one that S3Delta can choose from is the preset "s3delta"',
    ]  # fmt: skip
    assert all(line.startswith(words) for line, words in zip(told.value.errors, wanted, strict=True))
    settings = {"sampler": "s3delta", "s3delta": {"temperature": 0, "budgets": "x"}}
    with pytest.raises(InputError, match=r"s3delta.temperature: a number above 0.*\n.*s3delta.budgets: a list"):
        read_config({"task": {"name": "trec6"}, "search": settings, "space": "s3delta"})
    assert [space_errors(read_space("s3delta", sites)) for sites in SITES.values()] == [[]] * len(SITES)


# -- super-nets


def nets(family: str, *which: tuple[int, int], steps: int = 4) -> list[SuperNet]:
    space = read_space(MIXED, SITES[family])
    return [
        super_net(
            Modules(space), S3DeltaSettings(), middle(space), budget=budget, seed=seed, steps=steps,
            backbone=backbone(family), head=head(family),
        )
        for budget, seed in which
    ]  # fmt: skip


def trained(*lanes: SuperNet, family: str) -> None:
    shared = cohort(family)
    shared.admit(*lanes)
    for _ in range(lanes[0].steps):
        shared.step()
    shared.close()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_packed_super_net_equals_the_same_alone(family: str) -> None:
    which = ((300, 0), (300, 1), (600, 0))
    together = nets(family, *which)
    trained(*together, family=family)
    for net, (budget, seed) in zip(together, which, strict=True):
        (alone,) = nets(family, (budget, seed))
        trained(alone, family=family)
        assert net.losses == pytest.approx(alone.losses, abs=1e-9)
        assert net.params.keys() == alone.params.keys()
        for key, value in net.params.items():
            torch.testing.assert_close(value, alone.params[key], rtol=0, atol=1e-8)
        assert net.params[ALPHA].abs().max() > 0.1, "the gates have learnt"


def test_gates_and_modules_learn_in_turn_on_halves_that_share_nothing() -> None:
    (net,) = nets("bert", (400, 3), steps=12)
    seen: tuple[set[int], set[int]] = (set(), set())
    shared = cohort("bert")
    shared.admit(net)
    for step in range(net.steps):
        before = {key: value.detach().clone() for key, value in net.params.items()}
        seen[step % 2].update(net.examples(BATCH, len(split())).tolist())
        shared.step()
        moved = {key for key, value in net.params.items() if not torch.equal(value, before[key])}
        if step % 2:
            assert moved == {ALPHA}
        else:
            assert ALPHA not in moved
            assert {key.partition("/")[0] for key in moved} == {"head", *(str(i) for i in range(5))}
    shared.close()
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == len(split())
    expected = (net.probabilities() * net.sizes).sum()
    assert float(expected) == pytest.approx(400, abs=1e-5)


@pytest.mark.parametrize("kept", [(), (1, 2, 6, 9)])
def test_closed_gates_are_the_backbone_and_open_ones_the_design(kept: tuple[int, ...]) -> None:
    (net,) = nets("bert", (400, 0))
    for key, value in net.params.items():
        if not key.startswith("head/"):
            value.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(key)))
    net.params[ALPHA].data = torch.tensor([40.0 if i in kept else -40.0 for i in range(len(net.sizes))]).double()
    net.budget = sum(int(net.sizes[i]) for i in kept) or 1e-30
    modules = Modules(read_space(MIXED, SITES["bert"]))
    layers = modules.by_slot(kept)
    lane = new_lane(suggested(modules.space, layers), seed=0, steps=2, backbone=backbone("bert"), head=head("bert"))
    number = [str(i) for i, row in enumerate(layers.values()) if row]  # of its placements, in the super-net
    for key, value in lane.params.items():
        own, _, name = key.partition("/")
        value.data = net.params[key if own == "head" else f"{number[int(own)]}/{name}"].detach().clone()
    outputs = []
    for one in (net, lane):
        shared = cohort("bert")
        shared.admit(one)
        outputs.append(shared.predict(split(), one)[0])
        shared.close()
    np.testing.assert_allclose(*outputs, atol=1e-6)


# -- searches


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
    "slots": [slot(f"lora_{s}", "lora", sites=[s.partition("_")[0]], rank=1) for s in ("up", "up_2", "o", "up_3")],
    "training": {"lr": {"log": [1e-2, 1e-1]}},
}


def planted(base: Path, examples: int) -> SearchConfig:
    settings = {
        "sampler": "s3delta", "batch_size": 16,
        "s3delta": S3DeltaSettings(budgets="144", seeds=4, examples=examples),
    }  # fmt: skip
    return tiny(base, search=settings, space=PLANTED, model=ModelConfig(source=str(base), dtype="float32"))


def found(base: Path, out: Path, examples: int, time_s: float | None = None) -> tuple[list[dict[str, Any]], Budget]:
    """The structures of a search that trains no trial, from four super-nets; another worker dies looking for them."""
    of = planted(base, examples)
    session = open_session(of)
    session.guards["stop"] = Stop()
    storage, account = Storage(out, of), Account()
    storage.set_attr(HOLDER, "another")
    storage.set_attr("worker/another", {"beat": 7, "ended": False})
    workers = Workers(storage.attrs, storage.set_attr, storage.lock, None, account, lease_s=0.1)
    budget = Budget(trials=4, time_s=time_s, trainable=None, batch=of.search.batch_size, account=account)
    with SearchProgress(quiet=True) as progress:
        find_structures(session, storage, workers, budget, progress)
        spent, structures = account.examples, storage.attr("s3delta")
        find_structures(session, storage, workers, budget, progress)
    assert 0.4 < account.waiting_s < 2, "until the other's lease has ended"
    assert (account.examples, storage.attr("s3delta")) == (spent, structures), "once found, they stay"
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
    (one, budget), (two, _) = (found(base, tmp_path / name, 32) for name in ("one", "two"))
    assert one == two != []
    assert budget.account.examples == 4 * 32
    nothing, budget = found(base, tmp_path / "small", 16)
    assert (nothing, budget.account.examples) == ([], 0), "one step teaches no gate"


def test_super_nets_leave_half_of_the_time(base: Path, tmp_path: Path) -> None:
    structures, budget = found(base, tmp_path, 10**6, REPORT_S + 1.6)
    assert 0.1 < budget.left_s() - budget.report_s < 0.55
    assert all(row["steps"] < 1000 for row in structures)


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
