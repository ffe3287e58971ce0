"""Activation checkpointing: of each layer its input alone is kept, and in the backward the layer runs again.

The trade of memory for a second forward of Chen et al. 2016 (arXiv:1604.06174), by `torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Own

#: What is entered around a layer.
Context = Callable[[], AbstractContextManager[None]]


class _Again(AbstractContextManager[None]):
    """A context of which there is a new one each time: a graph that is kept runs its layers again in each backward."""

    def __init__(self, make: Context) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.current = self.make()
        self.current.__enter__()

    def __exit__(self, *why: Any) -> None:
        self.current.__exit__(*why)


class Around(nn.Module):
    """A module around another, in whose call that one's weights can be others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        return run()


@contextmanager
def rerun(
    layers: Mapping[str, nn.Module], once: Context, again: Context, weights: Mapping[str, Tensor], *, draws: bool
) -> Iterator[None]:
    """Within, these layers keep nothing for the backward but what enters them.

    Hooks on a layer itself run once, those on what is in it once more with it.

    Args:
        layers: by their paths in the model.
        once, again: what to enter around a layer when it runs, and when it runs again.
        weights: by `model.` and their names in the model, what stands in the place of the layers' own.
        draws: whether a layer draws at random; then it draws the same again.
    """
    for path, layer in layers.items():
        own = {
            f"model.{k.removeprefix(f'model.{path}.')}": w for k, w in weights.items() if k.startswith(f"model.{path}.")
        }
        run = partial(_with_weights, layer, own, layer.forward) if own else layer.forward
        # On CUDA the backward has a thread of its own, and a thread its own context variables.
        run = partial(copy_context().run, run)
        layer.forward = partial(
            checkpoint,
            run,
            use_reentrant=False,
            preserve_rng_state=draws,
            context_fn=lambda: (once(), _Again(again)),
        )
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


@contextmanager
def drawn(rows: Sequence[tuple[Own, Own]]) -> Iterator[None]:
    """Within, what sites see is what was drawn for a pass that is over: each first holds the tensors of its second."""
    later = [(row, dict(row)) for row, _ in rows]
    _put(rows)
    try:
        yield
    finally:
        _put(later)


def _put(rows: Sequence[tuple[Own, Own]]) -> None:
    for row, values in rows:
        row.clear()
        row.update(values)


def _with_weights(
    layer: nn.Module, weights: dict[str, Tensor], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return torch.func.functional_call(Around(layer), weights, (partial(forward, *args, **kwargs),))
