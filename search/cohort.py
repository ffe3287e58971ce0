"""A cohort: the lanes that share a training step on one frozen backbone.

One step, from top to bottom: every lane names its next examples; they are packed into one input; the frozen model
runs once over all of them while hooks let each group of lanes adapt its sites; each lane's loss gives gradients to
its own tensors alone; each lane clips and updates itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftscape.search.attention import Prefix
from peftscape.search.groups import Group, Stage, stages
from peftscape.search.lane import HEAD, Lane
from peftscape.search.packing import Batch, LaneBatch, pack
from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.search.task import EncodedSplit

# Evaluation has no backward to keep activations for; this many sequences at once keep two cores busy.
EVALUATION_ROWS = 512


class _Around(nn.Module):
    """A module around the backbone, in whose call the backbone's weights can be others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        return run()


class Cohort:
    """Lanes on one backbone. A lane may come or go between any two steps.

    Args:
        backbone, head: shared by all lanes; nothing of them changes.
        train: the examples lanes learn from.
        batch_size: examples of a lane in a step, the same for all lanes.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        train: EncodedSplit,
        *,
        batch_size: int,
        regression: bool = False,
    ) -> None:
        self.backbone, self.head, self.train = backbone, head, train
        self.batch_size, self.regression = batch_size, regression
        self.lanes: list[Lane] = []
        self._stages: list[Stage] = []
        self._hooks: list[RemovableHandle] = []
        self._inputs: dict[str, Tensor] = {}

    def admit(self, *lanes: Lane) -> None:
        """Take lanes in."""
        self._arrange([*self.lanes, *lanes])

    def retire(self, *lanes: Lane) -> None:
        """Let lanes go; they keep their parameters and optimiser and may come back."""
        gone = {id(lane) for lane in lanes}
        self._arrange([lane for lane in self.lanes if id(lane) not in gone])

    def step(self) -> list[float]:
        """Train every lane for one step; its loss in the order of `lanes`. A lane whose loss is not finite fails."""
        everyone = self.lanes
        losses: dict[int, float] = {}
        parts = _alike(everyone)
        for part in parts:
            if len(parts) > 1:
                self._arrange(part)
            losses |= dict(zip(map(id, self.lanes), self._step(), strict=True))
        if len(parts) > 1:
            self._arrange(everyone)
        return [losses[id(lane)] for lane in self.lanes]

    def _step(self) -> list[float]:
        started = time.perf_counter()
        examples = [lane.examples(self.batch_size, len(self.train.ids)) for lane in self.lanes]
        losses = self.losses(examples)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        values: list[float] = losses.detach().tolist()
        share = (time.perf_counter() - started) / len(self.lanes)
        for lane, loss in zip(self.lanes, values, strict=True):
            if np.isfinite(loss):
                lane.losses.append(loss)
                lane.update()
            else:
                lane.failure = Failure(kind="not finite", message=f"the loss is {loss}", step=lane.step)
                lane.optimizer.zero_grad()
            lane.wall_s += share
        return values

    def losses(self, examples: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        """The mean loss of each lane on training examples of its own."""
        logits = self.logits(examples, self.train)
        targets = torch.from_numpy(self.train.targets[np.stack(examples)]).to(logits.device)
        if self.regression:
            return (logits[..., 0] - targets).square().mean(dim=1)
        flat = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view_as(targets).mean(dim=1)

    def logits(self, examples: Sequence[np.ndarray[Any, Any]], split: EncodedSplit) -> Tensor:
        """lanes x examples x outputs: every lane's logits for its own examples."""
        batch = pack(
            [
                LaneBatch(e, lane.design.prompt_length(), lane.design.position_shift())
                for lane, e in zip(self.lanes, examples, strict=True)
            ],
            split,
            self.backbone.sites,
            padded=not self.backbone.sites.attention_interface,
        ).to(self.backbone.device)
        names = [key for key in self.lanes[0].params if key.startswith(f"{HEAD}/")]
        params = {key.removeprefix(f"{HEAD}/"): torch.stack([lane.params[key] for lane in self.lanes]) for key in names}

        def run() -> Tensor:
            states = self._forward(batch)
            # The head is small and its loss is a result: it is computed in the precision of the trained tensors.
            return self.head.logits(params, states.to(self.backbone.master_dtype), batch)

        return self._with_own_weights(run)

    def predict(self, split: EncodedSplit, *lanes: Lane) -> np.ndarray[Any, Any]:
        """Logits on a whole split, lanes x examples x outputs: of these lanes, or of all in the order of `lanes`."""
        everyone, chosen = self.lanes, lanes or tuple(self.lanes)
        found: dict[int, np.ndarray[Any, Any]] = {}
        try:
            for part in _alike(chosen):
                self._arrange(part)
                found |= dict(zip(map(id, self.lanes), self._predict(split), strict=True))
        finally:
            self._arrange(everyone)
        return np.stack([found[id(lane)] for lane in chosen])

    @torch.no_grad()
    def _predict(self, split: EncodedSplit) -> np.ndarray[Any, Any]:
        order = np.argsort([len(ids) for ids in split.ids], kind="stable")
        count = max(1, EVALUATION_ROWS // len(self.lanes))
        parts = [self.logits([order[i : i + count]] * len(self.lanes), split) for i in range(0, len(order), count)]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        out: np.ndarray[Any, Any] = torch.cat(parts, dim=1).float().cpu().numpy()[:, back]
        return out

    def close(self) -> None:
        """Take all hooks off the backbone."""
        self._arrange([])

    # -- the forward pass -------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> Tensor:
        """The last hidden states of all tokens, flat."""
        model, attending = self.backbone.model, self.backbone.attending
        inputs: dict[str, Any] = {"position_ids": batch.positions}
        if batch.types is not None:
            inputs["token_type_ids"] = batch.types
        if batch.mask is not None:
            inputs["attention_mask"] = batch.mask
        if self.backbone.sites.causal:
            inputs["use_cache"] = False
        prompts = self._groups("input")
        if prompts:
            inputs["inputs_embeds"] = self._with_prompts(prompts, batch)
        else:
            inputs["input_ids"] = batch.ids
        attending.batch, attending.prefixes = batch, self._prefixes()
        try:
            out = model(**inputs)
        finally:
            attending.batch, attending.prefixes = None, {}
            self._inputs.clear()
        states: Tensor = out.last_hidden_state
        return states.reshape(-1, states.shape[-1])

    def _with_own_weights(self, run: Callable[[], Tensor]) -> Tensor:
        """Run with the changed weights of a lane that trains them all, the pooler that its head reads among them."""
        whole = self._groups("model")
        if not whole:
            return run()
        delta, weights, start = whole[0].tensors["delta"][0].to(self.backbone.dtype), {}, 0
        for name, weight in self.backbone.model.named_parameters():
            weights[f"model.{name}"] = weight + delta[start : start + weight.numel()].view(weight.shape)
            start += weight.numel()
        out: Tensor = torch.func.functional_call(_Around(self.backbone.model), weights, (run,))
        return out

    def _with_prompts(self, groups: list[Group], batch: Batch) -> Tensor:
        """The embedded tokens with each lane's virtual tokens in their places."""
        embedded: Tensor = self.backbone.embedding(batch.ids)
        flat = embedded.reshape(-1, embedded.shape[-1])
        used = [0] * len(self.lanes)
        for group in groups:
            vectors = group.method.virtual_tokens(group.values(self.backbone.dtype))
            for i, lane in enumerate(range(group.first, group.first + group.count)):
                places = batch.prompts[lane]
                assert places is not None
                length = len(group.tensors["prompt"][i])
                mine = places[:, used[lane] : used[lane] + length]
                used[lane] += length
                rows = vectors[i, :length].repeat(len(mine), 1)
                flat = flat.index_copy(0, mine.reshape(-1), rows)
        return flat.view_as(embedded)

    def _prefixes(self) -> dict[int, list[Prefix]]:
        prefixes: dict[int, list[Prefix]] = {}
        for group in self._groups("kv"):
            keys, values = group.method.prefix(group.values(self.backbone.dtype))
            lengths = torch.tensor([len(t) for t in group.tensors["keys"]], device=keys.device)
            prefixes.setdefault(group.site.layer, []).append(
                Prefix(group.first, group.first + group.count, keys, values, lengths)
            )
        return prefixes

    def _groups(self, kind: str) -> list[Group]:
        return [group for stage in self._stages if stage.site.kind == kind for group in stage.groups]

    # -- hooks ------------------------------------------------------------------------------------------------------

    def _arrange(self, lanes: list[Lane]) -> None:
        """Set the cohort's lanes: like designs side by side, so that most groups are views; hooks where they adapt."""
        self.lanes = sorted(lanes, key=lambda lane: lane.design.label)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        backbone = self.backbone
        self._stages = stages(self.lanes, backbone.sites, backbone.dtype, backbone.device)
        inputs: dict[str, list[Stage]] = {}
        outputs: dict[str, list[Stage]] = {}
        for stage in self._stages:
            if stage.site.kind in ("kv", "input", "model"):
                continue
            before = stage.groups[0].method.side(stage.site) == "input"
            (inputs if before else outputs).setdefault(stage.site.path, []).append(stage)
        for path, here in inputs.items():
            self._hooks.append(self._module(path).register_forward_pre_hook(self._change_input(here)))
        sources = {stage.site.source for here in outputs.values() for stage in here if stage.site.source}
        for source in sources:
            hook = self._module(source).register_forward_pre_hook(self._keep_input(source), with_kwargs=True)
            self._hooks.append(hook)
        for path, here in outputs.items():
            self._hooks.append(self._module(path).register_forward_hook(self._change_output(here)))

    def _module(self, path: str) -> nn.Module:
        return self.backbone.model.get_submodule(path)

    def _keep_input(self, source: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[source] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _change_input(self, here: list[Stage]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if self._is_shared(args[0]):
                return args
            x = self._by_lane(args[0])
            for stage in here:
                sizes, who = stage.segments(len(x))
                x = _join(
                    part if group is None else group.method.apply_input(group.values(x.dtype), part)
                    for group, part in zip(who, torch.split(x, sizes), strict=True)
                )
            return (x.view(args[0].shape), *args[1:])

        return hook

    def _change_output(self, here: list[Stage]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if self._is_shared(first):
                return output
            y = self._by_lane(first)
            for stage in here:
                x = self._by_lane(self._inputs[stage.site.source] if stage.site.source else args[0])
                if stage.site.span is None:
                    y = _adapt(stage, x, y)
                else:  # this site's columns of a fused linear
                    start, stop = stage.site.span
                    left, mine, right = torch.split(y, [start, stop - start, y.shape[-1] - stop], dim=-1)
                    y = torch.cat([left, _adapt(stage, x, mine), right], dim=-1)
            y = y.view(first.shape)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _is_shared(self, x: Tensor) -> bool:
        """Whether a call belongs to no lane: DeBERTa-v2 sends its table of positions through q and k too."""
        batch = self.backbone.attending.batch
        return batch is not None and x.numel() != batch.ids.numel() * x.shape[-1]

    def _by_lane(self, x: Tensor) -> Tensor:
        """lanes x tokens x width, whatever the layout."""
        return x.reshape(len(self.lanes), -1, x.shape[-1])


def _alike(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Lanes that run in one pass: each is padded to the longest, so prompts of like length go together."""
    parts: dict[int, list[Lane]] = {}
    for lane in lanes:
        parts.setdefault(lane.design.prompt_length().bit_length(), []).append(lane)
    return list(parts.values())


def _adapt(stage: Stage, x: Tensor, y: Tensor) -> Tensor:
    """The site's output with every group's change, cut into lanes once and joined once."""
    sizes, who = stage.segments(len(y))
    return _join(
        mine if group is None else group.method.apply(group.values(y.dtype), read, mine)
        for group, read, mine in zip(who, torch.split(x, sizes), torch.split(y, sizes), strict=True)
    )


def _join(parts: Iterable[Tensor]) -> Tensor:
    joined = list(parts)
    return torch.cat(joined) if len(joined) > 1 else joined[0]
