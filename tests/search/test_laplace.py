"""Laplace-LoRA: its parts against brute force, and what it does to a model that is too sure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import OUTPUTS, backbone, cohort, head, lane, split
from plain import design

from peftscape.search.adapter import Adapter
from peftscape.search.encoding import EncodedSplit
from peftscape.search.export import Card
from peftscape.search.laplace import (
    PRECISIONS,
    Calibration,
    _jacobians,
    calibrate,
    evidence_precision,
    expected_calibration_error,
    nll,
)
from peftscape.spaces.words import InputError

ROW = {"method": "lora", "rank": 2, "sites": ["q", "v", "down"]}


def part(start: int, stop: int) -> EncodedSplit:
    whole = split()
    return EncodedSplit(whole.ids[start:stop], None, whole.targets[start:stop], 0, whole.lengths[start:stop])


@pytest.fixture(scope="module")
def sure() -> Adapter:
    """Trained until it knows random labels by heart."""
    of, train = design(ROW, lr=3e-2), part(0, 16)
    own, shared = lane(of, 0, "bert", steps=40), cohort("bert")
    shared.train, shared.batch_size = train, 8
    shared.admit(own)
    for _ in range(40):
        shared.step()
    shared.close()
    assert np.mean(own.losses[-5:]) < 0.2
    card = Card(design=of, head="class", outputs=OUTPUTS, max_length=40)
    return Adapter(card, backbone("bert"), head("bert"), own.adapter())


def test_a_model_that_knows_noise_by_heart_is_told_to_doubt(sure: Adapter) -> None:
    found = calibrate(sure, part(0, 16), part(16, 32))
    assert isinstance(found, Calibration)
    assert found.nll[1] < 0.8 * found.nll[0]
    assert found.ece[1] < found.ece[0]
    assert found.probabilities.shape == (16, OUTPUTS)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    # Its own answers are what the adapter gives.
    plain = torch.from_numpy(sure.encoded_logits(part(16, 32))).double().softmax(dim=1).numpy()
    assert found.nll[0] == pytest.approx(nll(plain, part(16, 32).targets), rel=1e-4)
    assert found.ece[0] == pytest.approx(expected_calibration_error(plain, part(16, 32).targets), abs=1e-4)


def test_derivatives_are_differences(sure: Adapter) -> None:
    text = part(3, 4)
    [(logits, jacobian, held)] = list(_jacobians(sure, text))
    flat = [(k, i) for k, v in sure.lane().params.items() if k[0] == "0" for i in range(v.numel())]
    assert jacobian.shape == (OUTPUTS, len(flat))
    for n in np.random.default_rng(0).choice(len(flat), size=8, replace=False):
        key, i = flat[n]
        assert float(sure.tensors[key].reshape(-1)[i]) == float(held[n])
        ends = []
        for step in (1e-5, -1e-5):
            moved = {k: v.clone() for k, v in sure.tensors.items()}
            moved[key].view(-1)[i] += step
            [(there, _, _)] = list(_jacobians(Adapter(sure.card, sure.backbone, sure.head, moved), text))
            ends.append(there)
        np.testing.assert_allclose(jacobian[:, n], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-7)
    assert torch.isfinite(logits).all()


def test_the_precision_is_that_of_the_largest_evidence() -> None:
    """Against the density of data under a linear model, where Laplace's approximation is exact."""
    random = np.random.default_rng(0)
    theta = random.normal(0, 0.1, size=400)  # a prior precision of 100
    noise = 25.0
    seen = theta + random.normal(0, noise**-0.5, size=400)
    wanted = max(PRECISIONS, key=lambda x: float(-(seen**2 / (1 / x + 1 / noise) + np.log(1 / x + 1 / noise)).sum()))
    at = [evidence_precision(np.full(400, noise), seen * noise / (noise + x)) for x in PRECISIONS]
    [fixed] = [x for x, found in zip(PRECISIONS, at, strict=True) if found == x][:1]
    assert np.log10(fixed / wanted) == pytest.approx(0, abs=0.3)


def test_calibration_error_is_its_definition() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    truth = np.array([0, 1, 1, 1])
    # Three bins: 0.9 twice (half right), 0.6 (wrong), 0.8 (right).
    assert expected_calibration_error(p, truth) == pytest.approx((0.8 + 0.6 + 0.2) / 4)
    assert nll(p, truth) == pytest.approx(-np.log([0.9, 0.1, 0.4, 0.8]).mean())


def test_a_head_alone_has_nothing_to_doubt(sure: Adapter) -> None:
    of = design()
    own = lane(of, 0, "bert")
    card = Card(design=of, head="class", outputs=OUTPUTS, max_length=40)
    with pytest.raises(InputError, match="more than its head"):
        calibrate(Adapter(card, backbone("bert"), head("bert"), own.adapter()), part(0, 2), part(2, 4))
