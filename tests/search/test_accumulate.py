"""A step in several passes: the update is that of one, and what does not fit in one is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import backbone, head, lane, move, split
from language import config
from searches import make_base, tiny

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.config_file import read_config
from peftscape.search.encoding import EncodedSplit
from peftscape.search.guarded import Guarded
from peftscape.search.head import make_head
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.search.session import design_costs, open_session
from peftscape.search.storage import Storage
from peftscape.spaces.design import Design
from peftscape.spaces.words import InputError

BATCH = 8
LORA: dict[str, Any] = {"method": "lora", "rank": 3}
MIXTURE: dict[str, Any] = {"method": "adamix", "size": 3, "agreement": 0.7}
#: What draws at random in a step, what has masks by gradients, a penalty or two passes, and what has none of it.
PLACEMENTS: list[list[dict[str, Any]]] = [
    [LORA, {"method": "sequential_adapter", "size": 4}],
    [{"method": "dylora", "rank": 5}, {"method": "lora", "sites": ["up"], "drop": 1}],
    [{"method": "diff_pruning", "sites": ["q"]}],
    [{"method": "child_tuning", "sites": ["v"]}, LORA | {"mask": {"sparsity": 0.5, "score": "snip"}}],
    [LORA | {"mask": {"sparsity": 0.5, "score": "grasp"}}],
    [{"method": "adalora", "rank": 4}, {"method": "prompt_tuning", "length": 4}],
    [MIXTURE],
]


def design(placements: list[dict[str, Any]]) -> Design:
    return Design.from_json({"placements": placements, "training": {"lr": 3e-3, "clip": 0.5}})


def assert_alike(found: Sequence[Lane], wanted: Sequence[Lane], tolerance: float = 1e-6) -> None:
    for own, other in zip(found, wanted, strict=True):
        assert own.failure is None
        np.testing.assert_allclose(own.losses, other.losses, rtol=tolerance, err_msg=own.design.label)
        assert own.masks.keys() == other.masks.keys()
        assert all(torch.equal(mask, other.masks[key]) for key, mask in own.masks.items())
        for key, value in own.params.items():
            torch.testing.assert_close(value, other.params[key], rtol=tolerance, atol=1e-9, msg=key)


def trained(cohort: Cohort, lanes: list[Lane], steps: int = 2) -> list[Lane]:
    cohort.admit(*lanes)
    for _ in range(steps):
        cohort.step()
    cohort.close()
    return lanes


def test_a_step_in_parts_is_the_step_in_one() -> None:
    def run(passes: int) -> list[Lane]:
        cohort = Cohort(backbone("bert", "float64"), head("bert", "float64"), split(), batch_size=BATCH, passes=passes)
        lanes = [lane(design(p), i, "bert") for i, p in enumerate(PLACEMENTS)]
        for own in lanes:
            prepare(own, cohort)
        move(lanes)
        return trained(cohort, lanes)

    assert_alike(run(3), run(1))  # parts of 3, 3 and 2


def test_tokens_count_alike_wherever_they_are() -> None:
    """Texts with unlike numbers of tokens to predict; one has none, and another is cut for its lane's prompt."""
    base = Backbone.from_config(config(), dtype="float64")
    random = np.random.default_rng(1)
    sizes = [3, 20, 9, 62, 5, 14]
    ids = [random.integers(4, base.sites.vocab, size=n) for n in sizes]
    scored = [np.arange(n) >= first for n, first in zip(sizes, [1, 2, 9, 3, 4, 12], strict=True)]
    texts = EncodedSplit(ids, None, np.zeros(6, dtype=np.float32), 0, np.array(sizes), scored=scored)

    def run(passes: int) -> list[Lane]:
        cohort = Cohort(base, make_head(base, kind="lm", outputs=2), texts, batch_size=6, passes=passes)
        chosen = [[{"method": "lora", "rank": 3}], [{"method": "prompt_tuning", "length": 4}], [MIXTURE]]
        lanes = [new_lane(design(p), seed=i, steps=4, backbone=base, head=cohort.head) for i, p in enumerate(chosen)]
        move(lanes)
        return trained(cohort, lanes)

    assert_alike(run(6), run(1))


class Scarce(Guarded):
    """So many examples fit in a training pass, and so many in an evaluation's."""

    fits, evaluated = 2, 20

    def logits(self, examples: Any, split: Any, *, training: bool = False, again: int = 0) -> torch.Tensor:
        count = len(examples) * len(examples[0])
        self.tried = [*getattr(self, "tried", []), (len(examples), len(examples[0]))]
        if count > (self.fits if training else self.evaluated):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().logits(examples, split, training=training, again=again)


def test_a_lane_that_does_not_fit_alone_runs_in_parts() -> None:
    def run(kind: type[Guarded]) -> tuple[Guarded, list[Lane], np.ndarray[Any, Any]]:
        cohort = kind(backbone("bert", "float64"), head("bert", "float64"), split(), batch_size=BATCH)
        lanes = [lane(design(p), i, "bert") for i, p in enumerate(PLACEMENTS[:2])]
        cohort.admit(*lanes)
        cohort.step()
        cohort.tried = []  # type: ignore[attr-defined]
        cohort.step()
        logits = cohort.predict(split())
        cohort.close()
        return cohort, lanes, logits

    (_, wanted, logits), (cohort, found, scarce) = run(Guarded), run(Scarce)
    assert_alike(found, wanted)
    np.testing.assert_allclose(scarce, logits, rtol=1e-9)
    assert cohort.tried[:8] == [(1, 2)] * 8, "what did not fit is not tried again"  # type: ignore[attr-defined]
    both, *alone = [texts for _, texts in cohort.tried[8:]]  # type: ignore[attr-defined]
    halvings = sum(texts > Scarce.evaluated for texts in alone) // 2
    assert both == len(split())
    assert sorted(cohort.memory.cuts.values()) == [4, 4, 2**halvings, 2**halvings]
    assert sum(texts for texts in alone if texts <= Scarce.evaluated) == 2 * len(split()), "each text once a lane"
    assert cohort.memory.width is None


@pytest.mark.parametrize(("batch", "tried"), [(BATCH, (8, 4, 2, 1)), (6, (6, 3, 2, 1))])
def test_a_lane_of_which_no_example_fits_fails(
    batch: int, tried: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scarce, "fits", 0)
    cohort = Scarce(backbone("bert", "float64"), head("bert", "float64"), split(), batch_size=batch)
    own = lane(design(PLACEMENTS[0]), 0, "bert")
    cohort.admit(own)
    cohort.step()
    cohort.close()
    assert own.failure is not None
    assert (own.failure.kind, own.step) == ("out of memory", 0)
    assert cohort.tried == [(1, n) for n in tried]
    assert all(value.grad is None for value in own.params.values())


def test_a_search_takes_both_settings_and_goes_on_with_others(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    plain = tiny(base)
    thrifty = replace(plain, search=replace(plain.search, gradient_accumulation_steps=4, gradient_checkpointing=True))
    sessions = [open_session(of) for of in (plain, thrifty)]
    found = []
    for session in sessions:
        of = design(PLACEMENTS[0])
        own = new_lane(of, seed=0, steps=2, backbone=session.backbone, head=session.head)
        found.append(trained(session.cohort(), [own]))
    assert_alike(found[1], found[0], 1e-3)
    assert sessions[1].cohort().passes == 4
    assert sessions[1].cohort().forward.checkpointing
    peaks = [design_costs(session, design(PLACEMENTS[0])) for session in sessions]
    assert peaks[1].peak_bytes < peaks[0].peak_bytes
    assert replace(peaks[1], peak_bytes=peaks[0].peak_bytes) == peaks[0]

    with pytest.raises(InputError, match=r"steps: at most search\.batch_size, 4, was expected, not 5"):
        read_config({"task": {"name": "trec6"}, "search": {"batch_size": 4}}, ["search.gradient_accumulation_steps=5"])

    Storage(tmp_path / "run", plain).close()
    Storage(tmp_path / "run", thrifty).close()
    plain, thrifty = (
        replace(of, search=replace(of.search, objectives="accuracy:max,peak_bytes:min")) for of in (plain, thrifty)
    )
    Storage(tmp_path / "costly", plain).close()
    with pytest.raises(InputError, match="gradient_checkpointing: was False, is True"):
        Storage(tmp_path / "costly", thrifty)
