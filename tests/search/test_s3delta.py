"""S3Delta: gates that keep to a budget, super-nets that learn them, and what is chosen by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from contract import BATCH, CONFIGS, SITES, backbone, cohort, head, split
from counted import kept_for

from peftscape.search.backbone import Backbone
from peftscape.search.check import check
from peftscape.search.cohort import Cohort
from peftscape.search.config import S3DeltaSettings
from peftscape.search.config_file import read_config
from peftscape.search.encoding import EncodedSplit
from peftscape.search.head import Head
from peftscape.search.lane import new_lane
from peftscape.search.s3delta import middle
from peftscape.search.s3delta_gates import logits, sample, shift
from peftscape.search.s3delta_net import ALPHA, SuperNet, super_net
from peftscape.search.s3delta_space import Modules, budgets, params_of, space_errors, within
from peftscape.spaces.kept import kept as planned
from peftscape.spaces.price import adapter_size
from peftscape.spaces.profiles import PROFILES
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
    least = min(module.size for module in modules.all)
    limits, (note,) = within(modules, (1, 400, most))
    assert limits == [400]
    assert f"modules have: 1, {most:,} left out" in note
    assert within(modules, (400, 500, most), room=500) == ([400, 500], [])
    with pytest.raises(InputError, match=rf"s3delta.budgets.*\n.*{least} to below .*not 1"):
        within(modules, (1, most))
    with pytest.raises(InputError, match=rf"budget.trainable.*\n.*leaves {least - 1} parameters.*has {least}"):
        within(modules, (400,), room=least - 1)


def test_a_check_finds_budgets_that_leave_no_choice() -> None:
    table = {"task": {"name": "trec6"}, "space": "s3delta", "search": {"sampler": "s3delta"}}
    with pytest.raises(InputError, match=r"search.s3delta.budgets: .* were expected.*not 1"):
        read_config({**table, "search": {"sampler": "s3delta", "s3delta": {"budgets": "1"}}})
    settings = {"sampler": "s3delta", "s3delta": {"budgets": "1, 2000"}}
    config = read_config({**table, "search": settings})
    (note,) = (line for line in check(config).notes if "s3delta" in line)
    assert "modules have: 1 left out" in note
    head = check(config).cheapest
    assert head is not None
    (error,) = check(read_config({**table, "search": settings, "budget": {"trainable": head.costs.head + 9}})).errors
    assert error.startswith("budget.trainable: it leaves 9 parameters beside the head")


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


def test_a_super_net_keeps_no_more_than_is_planned() -> None:
    shape = Backbone.from_config(CONFIGS["bert"])
    first = Head(shape, kind="class", outputs=2)
    modules, real, told = Modules(read_space(MIXED, shape.sites)), [], []
    for count, size in ((1, 20), (3, 20), (1, 28)):
        ids = [np.random.default_rng(0).integers(3, 60, size=size) for _ in range(count)]
        texts = EncodedSplit(ids, None, np.zeros(count, dtype=np.int64), 0, np.array([size] * count))
        shared = Cohort(shape, first, texts, batch_size=count)
        net = super_net(
            modules, S3DeltaSettings(), middle(modules.space), budget=400, seed=0, steps=4, backbone=shape, head=first
        )
        shared.admit(net)
        own = [*shape.model.parameters(), *shape.model.buffers(), *net.params.values()]
        halves = []
        for net.step in (0, 1):
            halves.append(kept_for(own, lambda: shared.losses([np.arange(count)]).sum())[1])  # noqa: B023
        shared.close()
        real.append(max(halves))
        profile = PROFILES["peftscape"]
        told.append(planned(net.design, shape.sites, profile, tokens=size, batch=count, dtype="float32").total)
    for there, here in zip(real[1:], told[1:], strict=True):
        assert 1 <= (here - told[0]) / (there - real[0]) < 1.3


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
