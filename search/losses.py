"""The losses of lanes: each the mean over its own examples, or tokens, of one pass or of the parts of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from peftscape.spaces.ops.device import on_device, upload

if TYPE_CHECKING:
    from peftscape.search.cohort import Cohort

#: Examples of a lane in a pass, by their numbers.
Examples = np.ndarray[Any, Any]


def gradients(cohort: Cohort, examples: Sequence[Examples], passes: int) -> Tensor:
    """Add the gradients of a step on these examples to the lanes' tensors; the losses of the lanes.

    Each lane's loss is the mean over all examples (tokens) of the step, in however many passes they run; what its
    methods draw is the same in all of them, and penalties count once.
    """
    total: Tensor | None = None
    for losses in in_parts(cohort, examples, passes):
        penalties = [] if total is not None else [p for lane in cohort.lanes if (p := lane.penalty()) is not None]
        whole = torch.stack([losses.sum(), *penalties]).sum()
        if whole.requires_grad:  # a design without a tensor to train, behind a frozen head, is only measured
            whole.backward()  # type: ignore[no-untyped-call]
        total = losses.detach() if total is None else total + losses.detach()
    assert total is not None
    return total


def in_parts(cohort: Cohort, examples: Sequence[Examples], passes: int) -> Iterator[Tensor]:
    """What each pass adds to the lanes' losses; the next pass runs once this one's graph can go."""
    parts = cut(examples, passes)
    whole = None if len(parts) == 1 else _counts(cohort, parts)
    return (mean_losses(cohort, part, whole) for part in parts)


def cut(examples: Sequence[Examples], passes: int) -> list[list[Examples]]:
    """The lanes' examples, as many of each, in so many parts as alike as can be; no part is empty."""
    count = max(1, min(passes, len(examples[0])))
    return [list(part) for part in zip(*(np.array_split(own, count) for own in examples), strict=True)]


def mean_losses(cohort: Cohort, examples: Sequence[Examples], whole: Tensor | None = None) -> Tensor:
    """The mean loss of each lane on training examples of its own; a language model's is the mean of all tokens.

    Args:
        whole: of each lane how many examples (tokens) the mean is over, of which these are a part; None where they are
            all.
    """
    weights = [lane.consistency for lane in cohort.lanes]
    of = _words if cohort.train.words is not None else _examples if cohort.train.scored is None else _tokens
    sums, counts, divergences = of(cohort, examples, twice=any(weights))
    if divergences is not None:
        sums = sums + upload(weights, sums.dtype, sums.device) * divergences
    return sums / (counts if whole is None else whole)


#: Of each lane: the sum of its losses, over how many, and the sum of how far two passes are apart, where there are two.
_Sums = tuple[Tensor, Tensor, Tensor | None]


def _examples(cohort: Cohort, examples: Sequence[Examples], *, twice: bool) -> _Sums:
    targets = cohort.targets(examples)
    logits = cohort.logits(examples, cohort.train, training=True)
    losses = _sums(logits, targets, regression=cohort.regression)
    counts = losses.new_full(losses.shape, targets.shape[1])
    if not twice:
        return losses, counts, None
    again = cohort.logits(examples, cohort.train, training=True, again=1)
    both = (losses + _sums(again, targets, regression=cohort.regression)) / 2
    return both, counts, _divergence(logits, again)


def _sums(logits: Tensor, targets: Tensor, *, regression: bool) -> Tensor:
    if regression:
        return (logits[..., 0] - targets).square().sum(dim=1)
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view_as(targets).sum(dim=1)


def _words(cohort: Cohort, examples: Sequence[Examples], *, twice: bool) -> _Sums:
    from peftscape.search.token_words import labels_of, word_divergence, word_losses

    labels = on_device(labels_of(cohort.train.targets, np.stack(examples)), cohort.backbone.device)
    logits = cohort.logits(examples, cohort.train, training=True)
    losses = word_losses(logits, labels)
    counts = (labels >= 0).flatten(1).sum(dim=1)
    if not twice:
        return losses, counts, None
    again = cohort.logits(examples, cohort.train, training=True, again=1)
    return (losses + word_losses(again, labels)) / 2, counts, word_divergence(logits, again, labels)


def _tokens(cohort: Cohort, examples: Sequence[Examples], *, twice: bool) -> _Sums:
    if not twice:
        sums, counts = cohort.logits(examples, cohort.train, training=True).sum(dim=1).unbind(dim=1)
        return sums, counts, None
    from peftscape.search.lm_head import LMHead

    assert isinstance(cohort.head, LMHead)
    passes = [cohort.passing(examples, cohort.train, True, i)() for i in (0, 1)]
    both = torch.stack([cohort.head.logits({}, states, batch).sum(dim=1) for states, batch, _ in passes])
    sums, counts = both.mean(dim=0).unbind(dim=1)
    (one, batch, _), (other, *_) = passes
    return sums, counts, cohort.head.divergence(one, other, batch)


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """The symmetric KL divergence of two passes, a sum over examples; of single outputs their squared distance."""
    if one.shape[-1] == 1:
        return (one - other).square().sum(dim=(1, 2))
    p, q = torch.log_softmax(one, dim=-1), torch.log_softmax(other, dim=-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(dim=(1, 2)) / 2


def _counts(cohort: Cohort, parts: Sequence[Sequence[Examples]]) -> Tensor:
    """Of each lane the examples, words or tokens that the mean of a whole step's loss is over."""
    if cohort.train.words is not None:
        texts = [np.concatenate(own) for own in zip(*parts, strict=True)]
        counts = np.array([sum(map(len, cohort.train.targets[own])) for own in texts])
    elif cohort.train.scored is None:
        counts = np.array([sum(map(len, own)) for own in zip(*parts, strict=True)])
    else:
        counts = np.sum([_scored(cohort, part) for part in parts], axis=0)
    return on_device(counts, cohort.backbone.device).to(cohort.backbone.master_dtype)


def _scored(cohort: Cohort, examples: Sequence[Examples]) -> np.ndarray[Any, Any]:
    """Of each lane the tokens to predict, once texts that are too long are cut."""
    batch = cohort.packed(examples, cohort.train)
    assert batch.scored_rows is not None
    return np.bincount(batch.scored_rows.numpy() // batch.examples, minlength=batch.lanes)
