"""The forward pass of lanes: the frozen model runs once over all of them, hooks let each group adapt its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftscape.search.attention import Prefix
from peftscape.search.groups import Group, Stage, stages

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.lane import Lane
    from peftscape.search.packing import Batch


class _Around(nn.Module):
    """A module around the backbone, in whose call the backbone's weights can be others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        return run()


class Forward:
    """The backbone with the changes of some lanes."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.lanes = 0
        self._stages: list[Stage] = []
        self._hooks: list[RemovableHandle] = []
        self._inputs: dict[str, Tensor] = {}
        self._read: Tensor | None = None
        self._model = backbone.model
        self._blocks = [site.path for site in backbone.sites.sites if site.kind == "block"]

    def states(self, batch: Batch, start: int = 0, given: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        """The last hidden states of all tokens, or of those that are read, flat.

        Args:
            start, given: the layer to begin with and the states that enter it; the layers below do not run.
            read: flat numbers of the tokens that the head reads, as many of each lane.
        """
        if read is not None and start < len(self._blocks) and (path := self._after_attention()):
            return self._run_reading(batch, start, given, read, path)
        found = self._run_from(batch, start, given)
        return found if read is None else found[read]

    def _after_attention(self) -> str | None:
        """Where the last layer has mixed its tokens for the last time and what follows takes them one by one.

        Known for post-norm layers like BERT's, whose attention.output adds the residual itself. None elsewhere, and
        where a method looks at a whole text after it.
        """
        sites = self.backbone.sites
        own = [s.path for s in sites.sites if s.kind == "o" and s.layer == sites.layers - 1]
        if sites.norm_place != "post" or not own or not own[0].endswith("attention.output.dense"):
            return None
        for stage in self._stages:
            late = stage.site.layer == sites.layers - 1 and stage.site.kind not in ("q", "k", "v", "kv")
            if late and any(g.placement.gate or g.method.needs_text for g in stage.groups):
                return None
        return own[0].removesuffix(".dense")

    def _run_reading(self, batch: Batch, start: int, given: Tensor | None, read: Tensor, path: str) -> Tensor:
        def only_read(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(self._picked(x) for x in args)

        hook = self._model.get_submodule(path).register_forward_pre_hook(only_read, prepend=True)
        self._read = read
        try:
            return self._run_from(batch, start, given)
        finally:
            self._read = None
            hook.remove()

    def _picked(self, x: Tensor) -> Tensor:
        """lanes x tokens read x width."""
        assert self._read is not None
        flat = x.reshape(-1, x.shape[-1]).index_select(0, self._read)
        return flat.view(len(x), -1, x.shape[-1])

    def _run_from(self, batch: Batch, start: int, given: Tensor | None) -> Tensor:
        if given is None:
            return self.model_states(batch)
        skipped = [self.backbone.model.get_submodule(path) for path in self._blocks[:start]]
        try:
            for module in skipped:
                module.forward = lambda *args, **kwargs: given
            return self.model_states(batch)
        finally:
            for module in skipped:
                del module.forward

    def model_states(self, batch: Batch) -> Tensor:
        """The last hidden states of all tokens, flat, with all layers run that are not replaced."""
        model, attending = self._model, self.backbone.attending
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
        attending.batch, attending.prefixes = batch, self._prefixes(batch)
        try:
            out = model(**inputs)
        finally:
            attending.batch, attending.prefixes = None, {}
            self._inputs.clear()
        states: Tensor = out.last_hidden_state
        return states.reshape(-1, states.shape[-1])

    def with_own_weights(self, run: Callable[[], Tensor]) -> Tensor:
        """Run with the changed weights of a lane that trains them all, the pooler that its head reads among them."""
        whole = self._groups("model")
        if not whole:
            return run()
        delta, weights, start = whole[0].members[0]["delta"].to(self.backbone.dtype), {}, 0
        for name, weight in self.backbone.model.named_parameters():
            weights[f"model.{name}"] = weight + delta[start : start + weight.numel()].view(weight.shape)
            start += weight.numel()
        out: Tensor = torch.func.functional_call(_Around(self.backbone.model), weights, (run,))
        return out

    def _with_prompts(self, groups: list[Group], batch: Batch) -> Tensor:
        """The embedded tokens with each lane's virtual tokens in their places."""
        embedded: Tensor = self.backbone.embedding(batch.ids)
        flat = embedded.reshape(-1, embedded.shape[-1])
        used = [0] * self.lanes
        for group in groups:
            vectors = group.method.virtual_tokens(group.values(self.backbone.dtype))
            for i, lane in enumerate(range(group.first, group.first + group.count)):
                places = batch.prompts[lane]
                assert places is not None
                length = len(group.members[i]["prompt"])
                mine = places[:, used[lane] : used[lane] + length]
                used[lane] += length
                rows = vectors[i, :length].repeat(len(mine), 1)
                flat = flat.index_copy(0, mine.reshape(-1), rows)
        return flat.view_as(embedded)

    def _prefixes(self, batch: Batch) -> dict[int, list[Prefix]]:
        prefixes: dict[int, list[Prefix]] = {}
        dtype = self.backbone.dtype
        for group in self._groups("kv"):
            keys, values = group.method.prefix(group.values(dtype))
            lengths = torch.tensor([len(m["keys"]) for m in group.members], device=keys.device)
            gate = partial(self._gate, group, batch) if group.placement.gate else None
            prefixes.setdefault(group.site.layer, []).append(
                Prefix(group.first, group.first + group.count, keys, values, lengths, gate)
            )
        return prefixes

    def _gate(self, group: Group, batch: Batch) -> Tensor:
        x = self._by_lane(self._inputs[group.site.path]).narrow(0, group.first, group.count)
        return group.gate(x, x.dtype, batch)

    def _groups(self, kind: str) -> list[Group]:
        return [group for stage in self._stages if stage.site.kind == kind for group in stage.groups]

    # -- hooks ------------------------------------------------------------------------------------------------------

    def arrange(self, lanes: list[Lane]) -> None:
        """Take the changes of these lanes, in their order, instead of those before; hooks go where they adapt."""
        self.lanes = len(lanes)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stages = stages(lanes, self.backbone)
        self._model = next((lane.model for lane in lanes if lane.model is not None), self.backbone.model)
        inputs: dict[str, list[Stage]] = {}
        outputs: dict[str, list[Stage]] = {}
        read: dict[str, None] = {}
        for stage in self._stages:
            if stage.site.kind == "kv" and any(group.placement.gate for group in stage.groups):
                read[stage.site.path] = None
            if stage.site.kind in ("kv", "input", "model"):
                continue
            side = stage.groups[0].method.side(stage.site)
            if side != "output":
                inputs.setdefault(stage.site.path, []).append(stage)
            if side != "input":
                outputs.setdefault(stage.site.path, []).append(stage)
        for path, here in inputs.items():
            self._hooks.append(self._module(path).register_forward_pre_hook(self._change_input(here)))
        read |= {stage.site.source: None for here in outputs.values() for stage in here if stage.site.source}
        for source in read:
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
            batch = self.backbone.attending.batch
            if batch is None or self._is_shared(args[0]):
                return args
            x = self._by_lane(args[0])
            for stage in here:
                sizes, who = stage.segments(len(x))
                x = _join(
                    part if group is None else group.input(part, batch)
                    for group, part in zip(who, torch.split(x, sizes), strict=True)
                )
            return (x.view(args[0].shape), *args[1:])

        return hook

    def _change_output(self, here: list[Stage]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            batch = self.backbone.attending.batch
            if batch is None or self._is_shared(first):
                return output
            y = self._by_lane(first)
            for stage in here:
                x = self._by_lane(self._inputs[stage.site.source] if stage.site.source else args[0])
                if x.shape[1] != y.shape[1]:  # what it read before the tokens that no head reads were left out
                    x = self._picked(x)
                if stage.site.span is None:
                    y = _adapt(stage, x, y, batch)
                else:  # this site's columns of a fused linear
                    start, stop = stage.site.span
                    left, mine, right = torch.split(y, [start, stop - start, y.shape[-1] - stop], dim=-1)
                    y = torch.cat([left, _adapt(stage, x, mine, batch), right], dim=-1)
            y = y.view(first.shape)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _is_shared(self, x: Tensor) -> bool:
        """Whether a call belongs to no lane: DeBERTa-v2 sends its table of positions through q and k too."""
        batch = self.backbone.attending.batch
        shape = x.shape[:-2] if x.ndim == 4 else x.shape[:-1]  # a norm of single heads reads tokens x heads x width
        read = None if self._read is None else len(self._read)
        return batch is not None and shape.numel() not in (batch.ids.numel(), read)

    def _by_lane(self, x: Tensor) -> Tensor:
        """lanes x tokens x width, whatever the layout."""
        return x.reshape(self.lanes, -1, x.shape[-1])


def _adapt(stage: Stage, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    """The site's output with every group's change, cut into lanes once and joined once."""
    sizes, who = stage.segments(len(y))
    return _join(
        mine if group is None else group.output(read, mine, batch)
        for group, read, mine in zip(who, torch.split(x, sizes), torch.split(y, sizes), strict=True)
    )


def _join(parts: Iterable[Tensor]) -> Tensor:
    joined = list(parts)
    return torch.cat(joined) if len(joined) > 1 else joined[0]
