"""AdaMix (arXiv:2205.12410): how it draws experts, what it asks of two passes, and what is left of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from contract import CONFIGS, cohort, lane, logits, move, split
from plain import ROWS, close, design
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from peftscape.search.lane import Lane

families = pytest.mark.parametrize("family", CONFIGS)
EXPERTS, SIZE = 3, 4
MIXTURE = {"method": "adamix", "size": SIZE, "experts": EXPERTS}


def drawn(own: Lane, again: int = 0) -> list[tuple[int, int]]:
    """The (down, up) experts that each site sees in this step, told by their values."""
    own.unfold(True, again)
    found = []
    for row, seen in zip(own.own[0], own.seen[0], strict=True):
        pair = []
        for half in ("down", "up"):
            equal = [torch.equal(seen[half], expert) for expert in row[f"{half}_experts"]]
            biases = [torch.equal(seen[f"{half}_bias"], expert) for expert in row[f"{half}_bias_experts"]]
            assert equal == biases, "a bias goes with its matrix"
            pair.append(equal.index(True))
        found.append((pair[0], pair[1]))
    return found


def test_experts_are_drawn_for_each_module_half_pass_and_step() -> None:
    own = lane(design({**MIXTURE, "sites": ["attention", "ffn"]}), 3, "bert")
    move([own])
    table = []
    for own.step in range(200):
        first, second = drawn(own), drawn(own, again=1)
        assert first == drawn(own), "a step can be run again"
        table.append([*first, *second])
    choices = np.array(table)  # steps x (sites of both passes) x halves
    for column in choices.reshape(len(table), -1).T:
        assert min(Counter(column.tolist()).get(i, 0) for i in range(EXPERTS)) > 40
    columns = choices.reshape(len(table), -1)
    for i in range(columns.shape[1]):
        for j in range(i):  # independent: two columns agree a third of the time
            assert 0.2 < (columns[:, i] == columns[:, j]).mean() < 0.47


def one_adapter(family: str, own: Lane, pairs: list[tuple[int, int]] | None) -> Tensor:
    """Logits of a plain adapter that has these experts, or their mean."""
    plain = lane(design({"method": "sequential_adapter", "size": SIZE, "sites": ["ffn"]}), 3, family)
    with torch.no_grad():
        for i, (row, target) in enumerate(zip(own.own[0], plain.own[0], strict=True)):
            for name, value in target.items():
                experts = row[f"{name}_experts"]
                which = None if pairs is None else pairs[i][0 if name.startswith("down") else 1]
                value.copy_(experts.mean(dim=0) if which is None else experts[which])
        for key, value in plain.params.items():
            if key.startswith("head/"):
                value.copy_(own.params[key])
    alone = cohort(family)
    alone.admit(plain)
    with torch.no_grad():
        found = alone.logits([ROWS], split())[0]
    alone.close()
    return found


@families
def test_the_loss_is_that_of_two_passes_and_their_symmetric_divergence(family: str) -> None:
    own, shared = lane(design({**MIXTURE, "agreement": 0.7}), 3, family), cohort(family)
    move([own])
    shared.admit(own)
    with torch.no_grad():
        found = shared.losses([ROWS])[0]
    shared.close()
    one, other = (one_adapter(family, own, drawn(own, again)) for again in (0, 1))
    targets = torch.from_numpy(split().targets[ROWS])
    p, q = log_softmax(one, -1), log_softmax(other, -1)
    divergence = sum(kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))) / 2
    wanted = (cross_entropy(one, targets) + cross_entropy(other, targets)) / 2 + 0.7 * divergence
    assert divergence > 1e-4
    close(found, wanted, family)


@families
def test_the_mean_of_the_experts_is_evaluated_and_kept(family: str) -> None:
    own, shared = lane(design(MIXTURE, lr=1e-2), 3, family, steps=5), cohort(family)
    shared.admit(own)
    for _ in range(5):
        shared.step()
        close(logits(own, family)[: len(ROWS)], one_adapter(family, own, None), family)
    shared.close()
    kept = {key: value for key, value in own.adapter().items() if key.startswith("0/")}
    assert {key.rsplit("/", 1)[1] for key in kept} == {"down", "down_bias", "up", "up_bias"}
    assert not torch.equal(*own.own[0][0]["up_experts"][:2]), "experts have gone their own ways"
    d = 32
    assert sum(v.numel() for v in kept.values()) == 2 * (2 * d * SIZE + SIZE + d)


def test_without_agreement_there_is_one_pass() -> None:
    own, shared = lane(design({**MIXTURE, "agreement": 0.0}), 3, "bert"), cohort("bert")
    move([own])
    shared.admit(own)
    with torch.no_grad():
        found = shared.losses([ROWS])[0]
    shared.close()
    targets = torch.from_numpy(split().targets[ROWS])
    close(found, cross_entropy(one_adapter("bert", own, drawn(own)), targets))
