"""How sure an adapter may be: a Laplace approximation around its trained tensors (Laplace-LoRA, arXiv:2308.13111).

theta ~ N(theta*, (H + l I)^-1), H the diagonal of the generalised Gauss-Newton matrix of the training loss, l the
precision of a Gaussian prior around zero, which maximises the evidence. The network is taken as linear in theta, so
that logits are N(f(x), J diag(H + l)^-1 J^T), and probabilities are means of their softmax. The head stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftscape.search.cohort import Cohort
from peftscape.search.lane import HEAD
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.adapter import Adapter
    from peftscape.search.encoding import EncodedSplit

#: Prior precisions that are tried.
PRECISIONS = np.logspace(-4, 6, 101)
#: Draws of an example's logits.
DRAWS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Scores of an adapter's probabilities (before) and of their means over the approximate posterior (after).

    Args:
        nll: mean negative log-likelihood in nats, (before, after).
        ece: expected calibration error in 15 bins, (before, after).
        precision: of the prior.
        probabilities: examples x classes, after.
    """

    nll: tuple[float, float]
    ece: tuple[float, float]
    precision: float
    probabilities: Floats


def calibrate(adapter: Adapter, train: EncodedSplit, test: EncodedSplit, *, seed: int = 0) -> Calibration:
    """Score an adapter's probabilities on `test` before and after the approximation made on `train`.

    A backward pass is run for each class of each example.

    Raises:
        InputError: there are no classes, or nothing but the head has trained.
    """
    _check(adapter)
    curvature, values = torch.zeros(()), torch.zeros(())
    for logits, jacobian, held in _jacobians(adapter, train):
        p = logits.softmax(dim=0)
        # J^T (diag(p) - p p^T) J, of which the diagonal is kept (arXiv:2308.13111, eq. 11).
        curvature = curvature + (p[:, None] * jacobian.square()).sum(dim=0) - (p @ jacobian).square()
        values = held
    precision = evidence_precision(curvature.numpy(), values.numpy())
    variance = 1 / (curvature.clamp(min=0) + precision)
    source = torch.Generator().manual_seed(seed)
    before, after = [], []
    for logits, jacobian, _ in _jacobians(adapter, test):
        spread = (jacobian * variance) @ jacobian.T
        root = torch.linalg.cholesky(spread + 1e-9 * (1 + spread.trace()) * torch.eye(len(spread)).to(spread))
        noise = torch.empty(DRAWS, len(logits), dtype=logits.dtype).normal_(generator=source)
        before.append(logits.softmax(dim=0).numpy())
        after.append((logits + noise @ root.T).softmax(dim=1).mean(dim=0).numpy())
    one, other = np.stack(before), np.stack(after)
    truth = np.asarray(test.targets)
    return Calibration(
        nll=(nll(one, truth), nll(other, truth)),
        ece=(expected_calibration_error(one, truth), expected_calibration_error(other, truth)),
        precision=precision,
        probabilities=other,
    )


def evidence_precision(curvature: Floats, values: Floats) -> float:
    """The prior precision l of the largest evidence: sum log l / (H_i + l) - l theta^2, each over two."""
    kept = np.maximum(curvature, 0)
    evidence = [float((np.log(x / (kept + x)) - x * values**2).sum()) for x in PRECISIONS]
    return float(PRECISIONS[int(np.argmax(evidence))])


def nll(probabilities: Floats, truth: NDArray[Any]) -> float:
    """Mean negative log-likelihood, nats."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-12)).mean())


def expected_calibration_error(probabilities: Floats, truth: NDArray[Any], bins: int = 15) -> float:
    """sum over bins of confidence |B| / N * |accuracy(B) - confidence(B)|, bins of equal width (arXiv:1706.04599)."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    off = np.bincount(which, weights=right - confidence, minlength=bins)
    return float(np.abs(off).sum() / len(truth))


def _check(adapter: Adapter) -> None:
    if adapter.language is not None:
        raise InputError("laplace", ["an adapter with a trained classifier was expected, not a language model"])
    if adapter.card.head == "token":
        raise InputError("laplace", ["one label a text was expected, not one a word"])
    if adapter.card.outputs < 2:
        raise InputError("laplace", ["classes were expected; a regression has no probabilities"])
    if all(key.startswith(f"{HEAD}/") for key in adapter.lane().params):
        raise InputError("laplace", ["a design that trains more than its head was expected"])


def _jacobians(adapter: Adapter, split: EncodedSplit) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each example its logits, their derivatives (classes x values) and the values themselves, in float64."""
    lane = adapter.lane()
    cohort = Cohort(adapter.backbone, adapter.head, split, batch_size=1)
    cohort.admit(lane)
    trained = [value for key, value in lane.params.items() if not key.startswith(f"{HEAD}/")]
    held = torch.cat([value.detach().reshape(-1) for value in trained]).double().cpu()
    try:
        for i in range(len(split)):
            logits = cohort.logits([np.array([i])], split)[0, 0]
            rows = []
            for c in range(len(logits)):
                found = torch.autograd.grad(logits[c], trained, retain_graph=c + 1 < len(logits), allow_unused=True)
                parts = [torch.zeros_like(t) if g is None else g for g, t in zip(found, trained, strict=True)]
                rows.append(torch.cat([part.reshape(-1) for part in parts]).double().cpu())
            yield logits.detach().double().cpu(), torch.stack(rows), held
    finally:
        cohort.close()
