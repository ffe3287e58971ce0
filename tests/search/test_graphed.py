"""Steps that are captured and replayed train lanes as steps that are not, whatever comes and goes beside them.

The captures are those of `recorder.py`, which keeps a CUDA graph's contract on a CPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    BATCH,
    CONFIGS,
    OUTPUTS,
    PACKED,
    SEED,
    STEPS,
    assert_trained_alike,
    backbone,
    examples,
    head,
    lane,
    smallest,
    split,
    train,
    trained_alone,
)  # fmt: skip
from recorder import recorded
from torch import Tensor

from peftscape.search.cohort import Cohort
from peftscape.search.config_file import read_config
from peftscape.search.fixed import size_class
from peftscape.search.graphed import Graphs
from peftscape.search.head import make_head
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.search.states import StateCache
from peftscape.spaces.design import Design
from peftscape.spaces.words import InputError

#: Methods whose steps are never replayed: they draw anew in each, or ask the device for a value.
NEVER = {"adamix", "child_tuning", "dylora", "diff_pruning", "intrinsic_said", "lora+drop", "sequential_adapter+drop"}
LORA: dict[str, Any] = {"method": "lora", "rank": 3}


class Counted:
    """A capture that counts how often it is asked for."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.captures += 1
        return recorded(work)


def graphed(family: str, **more: Any) -> Cohort:
    return Cohort(backbone(family), head(family), split(), batch_size=BATCH, graphs=Graphs(Counted()), **more)


def design(*placements: dict[str, Any], **training: float) -> Design:
    return Design.from_json({"placements": list(placements), "training": training})


def run(shared: Cohort, *lanes: Lane, steps: int = STEPS) -> tuple[int, int]:
    """Train; how many steps of passes were replayed, and how many captured."""
    assert shared.graphs is not None
    assert isinstance(shared.graphs.capture, Counted)
    before = shared.graphs.replayed, shared.graphs.capture.captures
    for one in lanes:
        prepare(one, shared)
    shared.admit(*lanes)
    for _ in range(steps):
        shared.step()
    return shared.graphs.replayed - before[0], shared.graphs.capture.captures - before[1]


@pytest.mark.parametrize(("name", "family"), PACKED)
def test_every_method_trains_as_without(name: str, family: str) -> None:
    shared = graphed(family)
    lanes = [lane(smallest(name, family), SEED, family), lane(examples(name, family)[0], 1, family)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no CUDA graph of", UserWarning)
        replayed, captured = run(shared, *lanes)
    shared.close()
    assert (replayed > captured) == (name not in NEVER)
    assert_trained_alike(lanes[0], trained_alone(lanes[0].design, SEED, family), family)


def test_a_step_that_asks_the_device_is_not_captured_and_says_so() -> None:
    shared = graphed("bert")
    own = lane(smallest("intrinsic_said", "bert"), SEED, "bert")
    with pytest.warns(UserWarning, match="no CUDA graph of intrinsic_said.*not permitted when stream is capturing"):
        assert run(shared, own) == (0, 1), "once is enough"
    shared.close()


@pytest.mark.parametrize("family", CONFIGS)
def test_lanes_take_the_slots_of_others(family: str) -> None:
    """With other numbers than theirs (alpha, rates), at other steps; whoever left has what it had."""
    shared = graphed(family)
    pairs = [(design({**LORA, "alpha": 1.0 + 3 * i, "sites": ["q", "v"]}, lr=(1 + i) * 3e-3), i) for i in range(4)]
    lanes = [lane(one, seed, family) for one, seed in pairs]
    run(shared, *lanes[:2], steps=STEPS)
    left = [{key: value.detach().clone() for key, value in one.params.items()} for one in lanes[:2]]
    shared.retire(*lanes[:2])
    replayed, captured = run(shared, *lanes[2:], steps=STEPS)
    shared.close()
    assert replayed - captured > STEPS // 2
    for one, before in zip(lanes[:2], left, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in one.params.items())
    for one, (of, seed) in zip(lanes, pairs, strict=True):
        assert_trained_alike(one, trained_alone(of, seed, family), family)


def test_a_mixed_cohort_with_coming_going_and_failing_lanes() -> None:
    """Layers that are kept, prompts in a pass of their own, penalties, a neighbour that diverges, a lane put by."""
    rows: list[list[dict[str, Any]]] = [
        [LORA], [{"method": "prompt_tuning", "length": 4}], [{"method": "prefix_tuning", "length": 2, "gate": True}],
        [{"method": "adalora", "rank": 2}], [{**LORA, "layers": [1]}], [{"method": "lst", "size": 4}],
    ]  # fmt: skip
    designs = [design(*row, lr=5e-3) for row in rows]
    shared = graphed("bert", cache=StateCache(backbone("bert")), checkpointing=True)
    lanes = [lane(one, i, "bert") for i, one in enumerate(designs)]
    wild = lane(design(LORA), 9, "bert")
    next(iter(wild.params.values())).data.fill_(math.nan)
    replayed, captured = run(shared, *lanes[:4], wild, steps=5)
    shared.retire(wild, lanes[0])
    more = run(shared, *lanes[4:], steps=STEPS - 5)
    shared.retire(*lanes[1:4])
    again = run(shared, lanes[0], steps=5)
    shared.retire(*lanes[4:])
    last = run(shared, steps=2)
    shared.close()
    assert replayed + more[0] + again[0] + last[0] > captured + more[1] + again[1] + last[1] > 0
    assert wild.failure is not None
    assert wild.failure.kind == "not finite"
    for i, one in enumerate(lanes):
        assert_trained_alike(one, trained_alone(designs[i], i, "bert"), "bert")


def test_lanes_move_between_layouts() -> None:
    """One that is alone at times, in a slot of each layout, while others have its slot in the first."""
    shared = graphed("bert")
    a, b, c, d = lanes = [lane(design({**LORA, "rank": r}), i, "bert") for i, r in enumerate([3, 2, 3, 2])]
    replayed, captured = zip(
        *(
            (run(shared, *chosen, steps=4), shared.retire(*chosen))[0]
            for chosen in ((a, b), (a,), (c, d), (a,), (c, d), (c, d), (b,), (b,))
        ),
        strict=True,
    )
    shared.close()
    assert sum(replayed) > sum(captured)
    for i, one in enumerate(lanes):
        assert_trained_alike(one, trained_alone(one.design, i, "bert"), "bert")


@pytest.mark.parametrize("kind", ["mean", "lm"])
def test_heads_that_read_all_tokens(kind: Any) -> None:
    """The language model's has another number of tokens to predict in each batch."""
    family = "llama"
    texts = split()
    if kind == "lm":
        texts = replace(texts, scored=[np.arange(len(row)) > len(row) // 3 for row in texts.ids])
    on_top = make_head(backbone(family), kind=kind, outputs=OUTPUTS)
    losses = []
    for graphs in (None, Graphs(Counted())):
        shared = Cohort(backbone(family), on_top, texts, batch_size=BATCH, graphs=graphs)
        lanes = [
            new_lane(design(row, lr=5e-3), seed=i, steps=STEPS, backbone=backbone(family), head=on_top)
            for i, row in enumerate([LORA, {"method": "prefix_tuning", "length": 3}])
        ]
        shared.admit(*lanes)
        for _ in range(STEPS):
            shared.step()
        shared.close()
        losses.append([one.losses for one in lanes])
        assert graphs is None or graphs.replayed > STEPS // 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)


def test_graphs_that_are_no_longer_used_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftscape.search.graphed.KEPT", 2)
    shared = graphed("bert")
    first, second = (lane(design({**LORA, "rank": rank}), 0, "bert") for rank in (2, 3))
    run(shared, first)
    shared.retire(first)
    run(shared, second)
    assert shared.graphs is not None
    assert len(shared.graphs._steps) == 2
    assert len(shared.graphs._slots) == 1
    shared.close()
    [alone] = train([(second.design, 0)], "bert")
    assert_trained_alike(second, alone, "bert")


def test_size_classes() -> None:
    sizes = [size_class(n) for n in range(1, 5000)]
    assert all(n <= size <= max(n + 1, 1.25 * n) for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 4 * math.log2(5000)
    assert all(size_class(size) == size for size in sizes)


def test_graphs_need_cuda() -> None:
    with pytest.raises(InputError, match=r'search\.cuda_graphs: they need model\.device = "cuda", not "cpu"'):
        read_config({"task": {"name": "trec6"}, "search": {"cuda_graphs": True}})
