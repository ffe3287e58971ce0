"""LoRA's relatives compute what HF peft computes with copied weights, and over training what their papers say."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from contract import SEED, SITES, backbone, cohort, lane, train
from peft.utils.loftq_utils import _low_rank_decomposition
from peft_pair import DOWN, MODULES, Pair, close, design, families, tensor_grad
from torch import Tensor

from peftscape.search.lane import Lane
from peftscape.spaces.design import Design
from peftscape.spaces.methods.adalora import AdaLoRA
from peftscape.spaces.methods.base import Lanes
from peftscape.spaces.methods.loftq import LoftQ
from peftscape.spaces.methods.qalora import QALoRA

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK, ALPHA = 4, 12.0
#: Our placements; the entries of peft's configuration; of each tensor of ours whose gradient is compared, peft's name.
LIKE_PEFT: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "rslora": ({"method": "lora", "scaling": "rslora"}, {"use_rslora": True}, {"A": "lora_A", "B": "lora_B"}),
    "lora-fa": ({"method": "lora", "freeze_a": True}, {}, {"B": "lora_B"}),
    "dora": (
        {"method": "dora"}, {"use_dora": True}, {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"},
    ),
    "dora rslora": (
        {"method": "dora", "scaling": "rslora"}, {"use_dora": True, "use_rslora": True},
        {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"},
    ),
    "pissa": ({"method": "pissa"}, {"init_lora_weights": "pissa"}, {"dA": "lora_A", "dB": "lora_B"}),
    "adalora": (
        {"method": "adalora", "orthogonality": 0.0}, {"peft_type": "ADALORA"},
        {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
    ),
}  # fmt: skip


THEIRS = {"A": "lora_A", "B": "lora_B", "E": "lora_E", "m": "lora_magnitude_vector"}


def pair_of(family: str, name: str) -> Pair:
    placement, entries, _ = LIKE_PEFT[name]
    ada, alpha = name == "adalora", ALPHA / 2 if entries.get("use_rslora") else ALPHA  # s = 3 for all
    kind = peft.AdaLoraConfig if ada else peft.LoraConfig
    # GPT-2's q, k and v are one module to peft: its other two linears are compared.
    kinds = ["up", "down"] if family == "gpt2" else ["q", "v", "up", "down"]
    named = "|".join([*(MODULES[family][k].replace(".", r"\.") for k in kinds if k != "down"), DOWN[family]])
    size: dict[str, Any] = {"init_r": RANK, "total_step": 9} if ada else {"r": RANK}
    return Pair(
        family,
        design(rank=RANK, alpha=alpha, sites=kinds, **placement),
        kind(
            task_type="SEQ_CLS", lora_alpha=int(alpha), lora_dropout=0.0, fan_in_fan_out=family == "gpt2",
            target_modules=rf".*\.({named})",
            **size, **{k: v for k, v in entries.items() if k != "peft_type"},
        ),
        typed=family == "bert",
    )  # fmt: skip


def theirs(layer: Any, name: str) -> Tensor:
    found = getattr(layer, name).default
    return found if isinstance(found, Tensor) else found.weight


@pytest.mark.parametrize("name", LIKE_PEFT)
@families
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_it_equals_peft(family: str, name: str) -> None:
    pair, names = pair_of(family, name), LIKE_PEFT[name][2]
    layers = pair.modules()
    held = {**pair.lane.params, **pair.lane.fixed}
    sites = pair.lane.sites[0]
    assert layers.keys() == {site.path for site in sites}
    with torch.no_grad():
        for site in sites:
            mine = {key.rpartition("/")[2]: v for key, v in held.items() if f"/{site.kind}/{site.path}/" in key}
            if name == "pissa":
                mine = {own: mine[f"{own}0"] + mine[f"d{own}"] for own in "AB"}
            for own, there in THEIRS.items():
                if own in mine:
                    theirs(layers[site.path], there).copy_(mine[own])
    pair.check_outputs()
    pair.check_head()
    for site in sites:
        for own, name_there in names.items():
            close(pair.ours(f"{site.kind}/{site.path}", own).grad, theirs(layers[site.path], name_there).grad)


def test_a_frozen_a_is_stored_and_does_not_train() -> None:
    pair = pair_of("bert", "lora-fa")
    assert {key.rpartition("/")[2] for key in pair.lane.fixed} == {"A"}
    assert not any(key.endswith("/A") for key in pair.lane.params)
    assert any(key.endswith("/A") for key in pair.lane.adapter())


def test_lora_plus_moves_b_by_a_multiple_of_the_rate() -> None:
    """The first step of AdamW moves every entry by its rate, whatever the gradient's size."""
    moved = {}
    for rate in (1.0, 16.0):
        [own] = run({"method": "lora", "rank": 2, "rate": rate}, steps=1)
        moved[rate] = max(float(v.detach().abs().max()) for k, v in own.params.items() if k.endswith("/B"))
    assert moved[16.0] == pytest.approx(16 * moved[1.0], rel=1e-3)


# -- what they do over training


def run(*placements: dict[str, Any], steps: int) -> list[Lane]:
    shared = cohort("bert")
    lanes = [lane(Design.from_json({"placements": [p]}), SEED, "bert", steps=steps) for p in placements]
    shared.admit(*lanes)
    for _ in range(steps):
        shared.step()
    shared.close()
    return lanes


def test_adaloras_penalty_is_pefts() -> None:
    pair = pair_of("bert", "adalora")
    held, far = pair.lane.own[0], []
    for row in held:
        for gram in (row["A"] @ row["A"].T, row["B"].T @ row["B"]):
            far.append((gram - torch.eye(RANK)).square().sum().sqrt())
    found = AdaLoRA(rank=RANK, orthogonality=0.5).penalty(held)
    close(found, 0.5 * torch.stack(far).sum() / len(far))


def test_adalora_keeps_what_pefts_allocator_keeps() -> None:
    """Random values and gradients go through both schedules, step by step."""
    steps, sites, rank, width = 40, 3, 4, 6
    method = AdaLoRA(rank=rank, kept=0.5, warm=0.1, hold=0.2, every=3)
    config = peft.AdaLoraConfig(init_r=rank, target_r=2, tinit=4, tfinal=8, deltaT=3, total_step=steps)
    model = torch.nn.Module()
    rows: list[dict[str, Tensor]] = []
    for i in range(sites):
        own = {"A": torch.zeros(rank, width), "B": torch.zeros(width, rank), "E": torch.zeros(rank, 1)}
        there = torch.nn.Module()
        for name, value in own.items():
            value.requires_grad_()
            copied = torch.nn.ParameterDict({"default": value.detach().clone()})
            setattr(there, f"lora_{name}", copied)
        model.add_module(f"site{i}", there)
        state = {f"{kind}_{n}": torch.zeros(v.shape) for kind in ("importance", "uncertainty") for n, v in own.items()}
        rows.append(own | state | {"alive": torch.ones(rank, 1)})
    allocator = peft.tuners.adalora.RankAllocator(model, config, "default")
    source, pattern = torch.Generator().manual_seed(0), None
    for step in range(1, steps + 1):
        for i, row in enumerate(rows):
            for name in "ABE":
                # Values carry on from what is there: E is zero where it was cut.
                step_by = torch.empty(row[name].shape).normal_(generator=source)
                gradient = torch.empty(row[name].shape).normal_(generator=source)
                parameter = getattr(model.get_submodule(f"site{i}"), f"lora_{name}")["default"]
                row[name].data.add_(step_by)
                row[name].grad = gradient
                parameter.data.add_(step_by)
                parameter.grad = gradient.clone()
        with torch.no_grad():
            method.after_step(rows, step, steps)
        if step < steps - 8:  # as peft's AdaLoraModel.update_and_allocate does
            budget, pattern = allocator.update_and_allocate(model, step)
            assert budget == method.budget(step, steps, sites)
        elif step == steps - 8:
            _, pattern = allocator.update_and_allocate(model, step, force_mask=True)
        else:
            allocator.mask_using_rank_pattern(model, pattern)
        for i, row in enumerate(rows):
            torch.testing.assert_close(row["E"].detach(), model.get_submodule(f"site{i}").lora_E["default"].detach())
    assert sum(int((row["E"] != 0).sum()) for row in rows) == 2 * sites


@pytest.mark.parametrize("kept", [0.3, 2 / 3, 1.0])
def test_adalora_ends_with_its_budget_of_triplets(kept: float) -> None:
    [own] = run({"method": "adalora", "rank": 6, "kept": kept}, steps=20)
    values = torch.cat([v.detach().flatten() for k, v in own.params.items() if k.endswith("/E")])
    assert int((values != 0).sum()) == round(kept * len(values))


@pytest.mark.parametrize("only_last", [False, True])
def test_dylora_trains_the_first_b_ranks_of_a_step(only_last: bool) -> None:
    rank, drawn = 5, set()
    of = Design.from_json({"placements": [{"method": "dylora", "rank": rank, "alpha": 10.0, "only_last": only_last}]})
    own, shared = lane(of, SEED, "bert"), cohort("bert")
    shared.admit(own)
    key = next(k for k in own.params if k.endswith("/B")).removesuffix("B")
    for own.step in range(40):
        own.unfold(training=True)
        seen = own.seen[0][0]
        b = seen["A"].shape[0]
        drawn.add(b)
        a, up = own.params[f"{key}A"], own.params[f"{key}B"]
        torch.testing.assert_close(seen["B"] @ seen["A"] * 10 / rank, 10 / b * up[:, :b] @ a[:b])
        up.grad = None
        torch.autograd.backward(seen["B"].sum() + seen["A"].sum())
        reached = tensor_grad(up).abs().sum(dim=0) > 0
        assert reached.tolist() == [b - 1 == i if only_last else i < b for i in range(rank)]
    assert drawn == set(range(1, rank + 1))
    own.unfold(training=False)
    assert torch.equal(own.seen[0][0]["B"], own.params[f"{key}B"]), "evaluation is at full rank"
    shared.close()


def test_delta_lora_is_the_weight_that_follows() -> None:
    """Against the definition, with a weight of its own that is changed after every step."""
    steps, ratio, alpha, rank = 8, 0.7, 6.0, 3
    row = {"method": "delta_lora", "rank": rank, "alpha": alpha, "ratio": ratio, "start_at": 0.25, "sites": ["q"]}
    own, shared = lane(Design.from_json({"placements": [row]}), SEED, "bert", steps=steps), cohort("bert")
    shared.admit(own)
    site, held = own.sites[0][0], own.own[0][0]
    weight = backbone("bert").frozen(site)["weight"].clone()
    x = torch.randn(7, site.d_in, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    y = x @ weight.T
    before = (held["B"] @ held["A"]).detach().clone()
    for step in range(1, steps + 1):
        shared.step()
        after = (held["B"] @ held["A"]).detach().clone()
        if step > 2:
            weight += ratio * alpha / rank * (after - before)
        before = after
        own.unfold(training=False)
        seen = own.seen[0][0]
        found = y + alpha / rank * x @ seen["A"].T @ seen["B"].T
        torch.testing.assert_close(found.detach(), x @ (weight + alpha / rank * after).T)
    # The gradients are those of s B A x alone.
    push = torch.randn_like(found)
    a, b = torch.autograd.grad((found * push).sum(), [held["A"], held["B"]])
    wanted = torch.autograd.grad((alpha / rank * x @ held["A"].T @ held["B"].T * push).sum(), [held["A"], held["B"]])
    torch.testing.assert_close((a, b), wanted)
    shared.close()


def test_loftq_starts_as_the_best_answer_to_the_quantisation() -> None:
    [site] = [s for s in SITES["bert"].sites if s.kind == "up" and s.layer == 0]
    weight = torch.randn(site.d_out, site.d_in, generator=torch.Generator().manual_seed(0))
    lost = weight - (weight * 4).round() / 4
    method = LoftQ(rank=5, alpha=10.0)
    own = method.start(site, {"weight": weight - lost, "residual": lambda: lost}, torch.Generator())
    theirs = _low_rank_decomposition(lost, reduced_rank=5)  # peft's, which has no scaling
    torch.testing.assert_close(2 * own["B"] @ own["A"], theirs["L"] @ theirs["R"])


def test_qalora_reads_sums_over_groups() -> None:
    """Against the paper's algorithm 1: the average pool times its width, then LoRA."""
    group, alpha, rank = 8, 6.0, 3
    method = QALoRA(rank=rank, alpha=alpha, group=group)
    source = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.randn(shape, generator=source) for shape in ((2, 5, 32), (2, 5, 7), (2, rank, 4), (2, 7, rank)))
    lanes = Lanes({"A": a, "B": b, "alpha": torch.full((2, 1, 1), alpha), "rank": torch.full((2, 1, 1), float(rank))})
    pooled = torch.nn.AvgPool1d(group)(x) * group
    wanted = y + pooled @ a.mT @ b.mT * (alpha / rank)
    torch.testing.assert_close(method.apply(lanes, x, y), wanted)


def test_pissa_starts_at_the_best_approximation_of_its_rank() -> None:
    [own] = train([(Design.from_json({"placements": [{"method": "pissa", "rank": 5, "alpha": 10.0}]}), SEED)], "llama")
    for site, held in zip(own.sites[0], own.own[0], strict=True):
        weight = held["weight"]
        rest = torch.linalg.svdvals(weight - 2 * held["B0"] @ held["A0"])
        torch.testing.assert_close(rest[:-5], torch.linalg.svdvals(weight)[5:], msg=site.path)
