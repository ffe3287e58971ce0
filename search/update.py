"""How the lanes of a cohort take their step: all in one AdamW where that kernel runs, elsewhere each by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftscape.spaces import ops
from peftscape.spaces.methods.base import Method
from peftscape.spaces.ops.choose import noting, possible
from peftscape.spaces.ops.device import upload
from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from peftscape.search.lane import Lane

UNEQUAL = -1


def update(lanes: Sequence[Lane], losses: Tensor) -> list[float]:
    """Take the step of every lane whose gradients are there, and say the losses.

    A lane whose loss or gradient is not finite fails instead. The device is waited for once: with the kernel when every
    lane's step is under way, without it when every gradient's norm is.

    Args:
        losses: one a lane.
    """
    everyone = range(len(lanes))
    plain = [i for i in everyone if _plain(lanes[i])] if possible(losses.device) else []
    together = plain if _is_fused([lanes[i] for i in plain]) else []
    apart = [i for i in everyone if i not in together]
    norms = [_step(lanes, together, losses.detach())] if together else []
    own = [lanes[i].gradient_norm() for i in apart]
    numbers: list[float] = torch.cat([losses.detach(), *norms, *(n.view(1).to(losses) for n in own)]).tolist()
    values, rest = numbers[: len(lanes)], iter(numbers[len(lanes) :])
    for i in together:
        _settle(lanes[i], values[i], next(rest))
    for i, norm in zip(apart, own, strict=True):
        finite = math.isfinite(next(rest))
        if math.isfinite(values[i]):
            lanes[i].losses.append(values[i])
            taken = (lanes[i].taken or 0) + 1
            lanes[i].move(norm, finite=finite)
            lanes[i].taken = taken if finite and i in plain else None
        else:
            _fail(lanes[i], values[i])
    return values


def _is_fused(lanes: Sequence[Lane]) -> bool:
    """Whether one kernel updates these lanes together."""
    with noting([lane.kernels for lane in lanes]):
        return ops.updates_fused([list(lane.params.values()) for lane in lanes]) if lanes else False


def _plain(lane: Lane) -> bool:
    """Whether all its tensors move, as often as one another, by AdamW alone: nothing looks at clipped gradients."""
    if not lane.params or any(type(p.method).after_step is not Method.after_step for p in lane.design.placements):
        return False
    if any(p.grad is None or p.grad.dtype != p.dtype or not p.grad.is_contiguous() for p in lane.params.values()):
        return False
    if lane.taken is None:
        taken = {int(state["step"]) for state in lane.optimizer.state.values() if state}
        some = len(lane.optimizer.state) not in (0, len(lane.params))
        lane.taken = UNEQUAL if some or len(taken) > 1 else max(taken, default=0)
    return lane.taken != UNEQUAL


def _step(everyone: Sequence[Lane], chosen: Sequence[int], losses: Tensor) -> Tensor:
    """The norms of the gradients of the lanes that were chosen; their tensors have moved."""
    lanes, device = [everyone[i] for i in chosen], losses.device
    if len(lanes) < len(everyone):
        losses = losses.index_select(0, upload(chosen, torch.int64, device))
    params = [list(lane.params.values()) for lane in lanes]
    states = [[_state(lane, p) for p in row] for lane, row in zip(lanes, params, strict=True)]
    training = [lane.design.training for lane in lanes]
    numbers = [
        *(float(lane.taken or 0) for lane in lanes), *(lane.rate() for lane in lanes),
        *(t.weight_decay for t in training), *(t.clip for t in training),
    ]  # fmt: skip
    steps, lr, decay, clip = upload(numbers, torch.float32, device).view(4, -1)
    multiples = [float(multiple) for lane in lanes for multiple in _multiples(lane)]
    rates = upload(multiples, torch.float32, device) if {*multiples} != {1.0} else None
    masked = any(lane.masks for lane in lanes)
    for lane in lanes:
        lane.losses.append(math.nan)  # until it is known: more losses than steps tell of an interrupted update
    norms = ops.adamw(
        params, [[p.grad for p in row if p.grad is not None] for row in params],
        [[s["exp_avg"] for s in row] for row in states], [[s["exp_avg_sq"] for s in row] for row in states],
        steps, lr, decay, clip, rates=rates, losses=losses.float(),
        masks=[[lane.masks.get(key) for key in lane.params] for lane in lanes] if masked else None,
    )  # fmt: skip
    with torch.no_grad():
        torch._foreach_add_([s["step"] for row in states for s in row], 1.0)
    return norms


def _state(lane: Lane, param: Tensor) -> dict[str, Tensor]:
    """What the optimiser remembers of a tensor, as torch's fused AdamW begins it."""
    state: dict[str, Tensor] = lane.optimizer.state[param]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
    return state


def _multiples(lane: Lane) -> list[float]:
    """Of every tensor its learning rate over the lane's."""
    groups = lane.optimizer.param_groups
    found = {id(p): group["multiple"] for group in groups for p in group["params"]}
    return [found[id(p)] for p in lane.params.values()]


def _settle(lane: Lane, loss: float, norm: float) -> None:
    """What is written down of a step once its numbers are known."""
    lane.losses.pop()
    if not math.isfinite(loss):
        _fail(lane, loss)
        return
    lane.losses.append(loss)
    if math.isfinite(norm):
        lane.taken = (lane.taken or 0) + 1
        lane.advance()
    else:
        lane.failure = Failure(kind="not finite", message="the gradient is not finite", step=lane.step)
    lane.optimizer.zero_grad()


def _fail(lane: Lane, loss: float) -> None:
    lane.failure = Failure(kind="not finite", message=f"the loss is {loss}", step=lane.step)
    lane.optimizer.zero_grad()
