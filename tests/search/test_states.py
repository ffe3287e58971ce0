"""Hidden states that are kept: lanes train as without, whatever their layers, neighbours and the limits are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from contract import BATCH, CONFIGS, SITES, STEPS, backbone, head, lane, split

from peftscape.search.cohort import PASS_TOKENS, Cohort, by_start
from peftscape.search.lane import Lane
from peftscape.search.states import StateCache
from peftscape.spaces.design import Design

LAYERS = 2


def designs(family: str) -> list[Design]:
    """On both layers, on the upper one, on none; with a prefix that moves the text, and one that does not."""
    rows: list[list[dict[str, Any]]] = [
        [],
        [{"method": "lora", "rank": 3}],
        [{"method": "lora", "rank": 2, "layers": [1]}],
        [{"method": "sequential_adapter", "size": 4, "layers": [1]}],
        [{"method": "prefix_tuning", "length": 3, "layers": [1], "positions": "keep"}],
        [{"method": "prefix_tuning", "length": 3, "layers": [1], "positions": "shift"}],
        [{"method": "prompt_tuning", "length": 2}],
        # Each place after the last attention, and methods that look at a whole text there.
        [{"method": "lora", "rank": 2, "sites": ["o", "up", "down"]}, {"method": "bitfit"}],
        [{"method": "parallel_adapter", "size": 3, "sites": ["attention", "ffn"]}],
        [{"method": "sequential_adapter", "size": 3, "sites": ["attention", "ffn"], "gate": True}],
    ]
    found = [Design.from_json({"placements": row, "training": {"lr": 1e-2}}) for row in rows]
    return [d for d in found if not d.check(SITES[family])]


def run(family: str, cache: StateCache | None, which: slice = slice(None)) -> tuple[list[Lane], np.ndarray[Any, Any]]:
    base, on_top = backbone(family, "float64"), head(family, "float64")
    shared = Cohort(base, on_top, split(), batch_size=BATCH, cache=cache)
    lanes = [lane(design, seed, family) for seed, design in enumerate(designs(family)[which])]
    shared.admit(*lanes)
    for _ in range(STEPS):
        shared.step()
    predicted = shared.predict(split(), *lanes)
    shared.close()
    return lanes, predicted


@pytest.mark.parametrize(
    ("family", "limits", "which"),
    [
        *((family, {}, slice(None)) for family in CONFIGS),
        ("bert", {"memory_limit": 0}, slice(None)),
        ("gpt2", {"memory_limit": 0, "disk_limit": 0}, slice(None)),
        *((family, {}, slice(-1)) for family in ("bert", "llama")),  # without the gate, which reads whole texts
    ],
)
def test_lanes_train_as_if_nothing_were_kept(family: str, limits: dict[str, int], which: slice) -> None:
    cache = StateCache(backbone(family, "float64"), **limits)
    kept, found = run(family, cache, which)
    plain, wanted = run(family, None, which)
    for one, other in zip(kept, plain, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-9, err_msg=one.design.label)
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)
    assert (cache.hits > 0) == (limits.get("disk_limit") != 0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lanes_that_come_and_go_train_as_if_alone_and_nothing_were_kept(family: str) -> None:
    base, on_top = backbone(family, "float64"), head(family, "float64")
    cache = StateCache(base)
    shared = Cohort(base, on_top, split(), batch_size=BATCH, cache=cache)
    lanes = [lane(design, seed, family) for seed, design in enumerate(designs(family))]
    for joining in [*lanes, *[None] * STEPS]:  # each a step after the one before it
        shared.admit(*([joining] if joining else []))
        shared.step()
        shared.retire(*(own for own in shared.lanes if own.done))
    shared.close()
    assert cache.hits > 0
    for seed, own in enumerate(lanes):
        assert own.step == STEPS
        alone = Cohort(base, on_top, split(), batch_size=BATCH)
        wanted = lane(own.design, seed, family)
        alone.admit(wanted)
        while not wanted.done:
            alone.step()
        alone.close()
        np.testing.assert_allclose(own.losses, wanted.losses, rtol=1e-9, err_msg=own.design.label)


def test_what_is_kept_is_not_computed_again() -> None:
    """Each example is one miss at each of the two layers that lanes begin with, and no more."""
    cache = StateCache(backbone("bert", "float64"))
    run("bert", cache, slice(0, 3, 2))  # the head alone, and the upper layer
    assert cache.misses == 2 * len(split())


def test_the_layers_below_are_not_run() -> None:
    base = backbone("bert", "float64")
    cache = StateCache(base)
    shared = Cohort(base, head("bert", "float64"), split(), batch_size=BATCH, cache=cache)
    own = lane(designs("bert")[2], 0, "bert")
    shared.admit(own)
    shared.predict(split())  # all states are there now
    calls: list[int] = []
    seen: list[int] = []
    count = base.model.get_submodule("encoder.layer.1.output").register_forward_hook(
        lambda _, args, out: seen.append(out.numel() // out.shape[-1])
    )
    hooks = [
        base.model.get_submodule(f"encoder.layer.{n}.attention.self.query").register_forward_hook(
            lambda *_, n=n: calls.append(n)
        )
        for n in range(LAYERS)
    ]
    shared.step()
    for hook in [*hooks, count]:
        hook.remove()
    shared.close()
    assert calls == [1]
    assert seen == [BATCH], "one token a text is left after the last attention"


def test_a_step_that_fails_leaves_the_model_whole() -> None:
    base = backbone("bert", "float64")
    shared = Cohort(base, head("bert", "float64"), split(), batch_size=BATCH, cache=StateCache(base))
    own = lane(designs("bert")[2], 0, "bert")
    shared.admit(own)
    before = torch.tensor(shared.predict(split()))

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = base.model.get_submodule("encoder.layer.1").register_forward_hook(fail)
    with pytest.raises(MemoryError):
        shared.step()
    hook.remove()
    assert torch.equal(torch.tensor(shared.predict(split())), before)
    shared.close()


def test_passes_are_cut_where_that_is_the_least_work() -> None:
    """Against all ways to give lanes to passes."""
    random = np.random.default_rng(0)
    lanes: list[Any] = list("abcde")
    for _ in range(60):
        layers, tokens = int(random.integers(1, 12)), float(random.choice([10, 300, 4000]))
        starts = random.integers(0, layers + 1, size=5).tolist()

        def work(passes: list[list[int]], layers: int = layers, starts: Any = starts, tokens: float = tokens) -> float:
            return sum((layers - min(starts[i] for i in p)) * (len(p) * tokens + PASS_TOKENS) for p in passes)

        least = min(
            work([[i for i in range(5) if to[i] == p] for p in set(to)]) for to in itertools.product(range(5), repeat=5)
        )
        found = [[lanes.index(x) for x in p] for p in by_start(lanes, starts, layers, tokens)]
        assert sorted(itertools.chain(*found)) == list(range(5))
        assert work(found) == pytest.approx(least)


def test_passes_keep_their_arrays_small_and_train_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five lanes in one pass, and in three where two lanes' arrays are the most."""
    base, on_top = backbone("bert", "float64"), head("bert", "float64")
    array = BATCH * float(split().lengths.mean()) * base.sites.d_ff * base.dtype.itemsize
    trained, passes = [], []
    for most in (5, 2):
        monkeypatch.setattr("peftscape.search.cohort.LARGEST", most * array + 1)
        shared = Cohort(base, on_top, split(), batch_size=BATCH)
        lanes = [lane(designs("bert")[1], seed, "bert") for seed in range(5)]
        shared.admit(*lanes)
        passes.append([len(part) for part in shared._passes(shared.lanes)])
        for _ in range(STEPS):
            shared.step()
        shared.close()
        trained.append([value for one in lanes for value in one.losses])
    assert passes[0] == [5]
    assert len(passes[1]) == 3
    assert max(passes[1]) == 2
    assert trained[1] == pytest.approx(trained[0], rel=1e-9)


def test_evaluation_keeps_its_arrays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of three lanes where the longest text of each just fits: logits are those of one pass."""
    base, on_top, texts = backbone("bert", "float64"), head("bert", "float64"), split()
    token = base.sites.d_ff * base.dtype.itemsize
    shared = Cohort(base, on_top, texts, batch_size=BATCH)
    shared.admit(*(lane(designs("bert")[1], seed, "bert") for seed in range(3)))
    whole = shared.predict(texts)
    monkeypatch.setattr("peftscape.search.cohort.LARGEST", 3 * int(texts.lengths.max()) * token)
    seen: list[int] = []
    packed = shared.packed

    def counted(examples: Any, texts: Any) -> Any:
        batch = packed(examples, texts)
        seen.append(batch.ids.numel())
        return batch

    monkeypatch.setattr(shared, "packed", counted)
    assert shared.predict(texts) == pytest.approx(whole, rel=1e-9)
    shared.close()
    assert max(seen) <= 3 * int(texts.lengths.max())
    assert 1 < len(seen) < len(texts)  # short texts still go together
