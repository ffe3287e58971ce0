"""The forward pass of lanes: the frozen model runs once over all of them, hooks let each group adapt its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftscape.search.attention import Prefix
from peftscape.search.folded import changed_weights, foldable, folded
from peftscape.search.groups import Group, Stage, stages
from peftscape.search.last_layer import after_attention
from peftscape.search.rerun import Around, drawn, rerun
from peftscape.spaces.sites import EVERYWHERE

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.lane import Lane
    from peftscape.search.packing import Batch
    from peftscape.spaces.sites import Site


class Forward:
    """The backbone with the changes of some lanes.

    Args:
        checkpointing: whether layers keep what enters them alone, and run again in the backward.
    """

    def __init__(self, backbone: Backbone, *, checkpointing: bool = False) -> None:
        self.backbone, self.checkpointing = backbone, checkpointing
        self.lanes = 0
        self.stages: list[Stage] = []
        self._known: dict[tuple[int, ...], tuple[tuple[Lane, ...], list[Stage]]] = {}
        self._folded: list[Stage] = []  # of them those that need no hook
        self._hooks: list[RemovableHandle] = []
        self._inputs: dict[str, Tensor] = {}
        self._entered: dict[int, Tensor] = {}  # states by the number of layers that they have passed
        self.rungs: list[int] = []  # of all lanes' side networks
        self._read: Tensor | None = None
        self._weights: dict[str, Tensor] = {}  # in the place of the backbone's
        self._mixed: str | None = None  # where the last layer has mixed its tokens for the last time
        self._model = backbone.model
        self._source_paths = {site.path for site in backbone.sites.sites if site.reads_source}
        self._blocks = [site.path for site in backbone.sites.sites if site.kind == "block"]

    def states(self, batch: Batch, start: int, given: Mapping[int, Tensor], read: Tensor | None) -> Tensor:
        """The last hidden states of all tokens, or of those that are read, flat.

        Args:
            start: the layer to begin with; the layers below do not run if `given` has what enters it.
            given: states by the number of layers that they have passed: those at `start`, and at the rungs below.
            read: flat numbers of the tokens that the head reads, as many of each lane.
        """
        if read is not None and start < len(self._blocks) and self._mixed:
            self._read = read
            try:
                return self._run_from(batch, start, given)
            finally:
                self._read = None
        found = self._run_from(batch, start, given)
        return found if read is None else found[read]

    def _only_read(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self._read is None else tuple(self._picked(x) for x in args)

    def _picked(self, x: Tensor) -> Tensor:
        """lanes x tokens read x width."""
        assert self._read is not None
        flat = x.reshape(-1, x.shape[-1]).index_select(0, self._read)
        return flat.view(len(x), -1, x.shape[-1])

    def _run_from(self, batch: Batch, start: int, given: Mapping[int, Tensor]) -> Tensor:
        if start not in given:
            return self.model_states(batch)
        skipped = [self.backbone.model.get_submodule(path) for path in self._blocks[:start]]
        self._entered |= given
        try:
            for module in skipped:
                module.forward = lambda *args, **kwargs: given[start]
            return self.model_states(batch)
        finally:
            for module in skipped:
                del module.forward

    def model_states(self, batch: Batch) -> Tensor:
        """The last hidden states of all tokens, flat, with all layers run that are not replaced."""
        model = self._model
        inputs: dict[str, Any] = {}
        if batch.source is None:
            inputs["position_ids"] = batch.positions
        else:  # its texts lie in rows of their own, where positions follow from the array
            inputs["decoder_input_ids"] = batch.ids
        if batch.types is not None:
            inputs["token_type_ids"] = batch.types
        if batch.mask is not None:
            inputs["attention_mask"] = batch.mask if batch.source is None else batch.source.mask
        if self.backbone.sites.causal or batch.source is not None:
            inputs["use_cache"] = False
            if batch.past is not None:
                inputs |= batch.past.inputs(batch)
        first = batch.source or batch
        if any(places is not None for places in first.prompts):
            inputs["inputs_embeds"] = self._with_prompts(self._groups("input"), first)
        else:
            inputs["input_ids"] = first.ids
        prefixes, placed = self._prefixes(batch), self._place_target(batch)
        try:
            with self._rerun(batch, prefixes), self._reading(batch, prefixes, self._read):
                states = self._climbed(model(**inputs).last_hidden_state, batch)
        finally:
            if placed is not None:
                placed.remove()
            self._entered.clear()
        return states.reshape(-1, states.shape[-1])

    @contextmanager
    def _reading(self, batch: Batch, prefixes: dict[str, list[Prefix]], read: Tensor | None) -> Iterator[None]:
        """Within, hooks and attention see these texts."""
        attending, before = self.backbone.attending, self._read
        attending.batch, attending.prefixes, self._read = batch, prefixes, read
        try:
            yield
        finally:
            attending.batch, attending.prefixes, self._read = None, {}, before
            self._inputs.clear()

    def _rerun(self, batch: Batch, prefixes: dict[str, list[Prefix]]) -> AbstractContextManager[None]:
        """Within, layers that run keep what enters them alone; when one runs again it finds all as it is now."""
        if not self.checkpointing or not torch.is_grad_enabled():
            return nullcontext()
        read = self._read
        groups = [group for stage in self.stages for group in stage.groups if group.placement.expands]
        seen = [(row, dict(row)) for group in groups for row in group.members]

        @contextmanager
        def once() -> Iterator[None]:
            try:
                yield
            finally:
                self._inputs.clear()  # what a method read in a layer would be kept until the pass ends

        @contextmanager
        def again() -> Iterator[None]:
            with self._reading(batch, prefixes, read), drawn(seen):
                yield

        layers = {path: self._model.get_submodule(path) for path in self._blocks}
        layers = {path: layer for path, layer in layers.items() if "forward" not in vars(layer)}  # not skipped
        draws = self._model is not self.backbone.model
        return rerun(layers, once, again, self._weights, draws=draws)

    def _place_target(self, batch: Batch) -> RemovableHandle | None:
        """Where an encoder-decoder learns positions: the target's own, moved behind its lane's prefix."""
        if batch.source is None or self.backbone.sites.positions != "absolute":
            return None

        def place(module: Any, args: Any, output: Tensor) -> Tensor:
            return nn.functional.embedding(batch.positions + module.offset, module.weight)

        return self._module("decoder.embed_positions").register_forward_hook(place)

    def _climbed(self, states: Tensor, batch: Batch) -> Tensor:
        """The last states, and in their place what side networks give, for the lanes that have one."""
        for stage in self.stages:
            if stage.site.kind == "ladder":
                sizes, who = stage.segments(self.lanes)
                states = _join(
                    last if group is None else self._climb(group, batch).to(last)
                    for group, last in zip(who, torch.split(self._by_lane(states), sizes), strict=True)
                )
        return states

    def _climb(self, group: Group, batch: Batch) -> Tensor:
        read = [
            self._by_lane(self._entered[n]).narrow(0, group.first, group.count).detach()
            for n in group.method.rungs(group.site)
        ]
        return group.method.ladder(group.values(read[0].dtype, batch), read, self.backbone.sites.causal)

    def with_own_weights(self, run: Callable[[], Tensor]) -> Tensor:
        """Run with the changed weights of a lane that trains them all, the pooler that its head reads among them.

        Or with those of a lane whose changes of some weights fold into them.
        """
        whole = self._groups("model")
        if whole:
            changed = changed_weights(self.backbone.model, whole[0].members[0]["delta"].to(self.backbone.dtype))
        elif self._folded:
            changed = folded(self.backbone.model, [group for stage in self._folded for group in stage.groups])
        else:
            return run()
        self._weights = weights = {f"model.{name}": weight for name, weight in changed.items()}
        try:
            out: Tensor = torch.func.functional_call(Around(self.backbone.model), weights, (run,))
        finally:
            self._weights = {}
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

    def _prefixes(self, batch: Batch) -> dict[str, list[Prefix]]:
        prefixes: dict[str, list[Prefix]] = {}
        dtype = self.backbone.dtype
        for group in self._groups("kv"):
            keys, values = group.method.prefix(group.values(dtype))
            lengths = [len(m["keys"]) for m in group.members]
            gate = partial(self._gate, group, self._texts(group.site, batch)) if group.placement.gate else None
            prefixes.setdefault(group.site.path, []).append(
                Prefix(group.first, group.first + group.count, keys, values, lengths, gate, group.ran)
            )
        return prefixes

    def _gate(self, group: Group, batch: Batch) -> Tensor:
        x = self._by_lane(self._inputs[group.site.path]).narrow(0, group.first, group.count)
        return group.gate(x, x.dtype, batch)

    def _groups(self, kind: str) -> list[Group]:
        return [group for stage in self.stages if stage.site.kind == kind for group in stage.groups]

    # -- hooks ------------------------------------------------------------------------------------------------------

    def arrange(self, lanes: list[Lane], *, fold: bool = True) -> None:
        """Take the changes of these lanes, in their order, instead of those before; hooks go where they adapt.

        Args:
            fold: whether changes that go into the weights do so, within `with_own_weights`, and have no hook.
        """
        self.lanes = len(lanes)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.stages = self._stages_of(lanes)
        self._folded = foldable(lanes, self.stages, self.backbone) if fold else []
        self._model = next((lane.model for lane in lanes if lane.model is not None), self.backbone.model)
        inputs: dict[str, list[Stage]] = {}
        outputs: dict[str, list[Stage]] = {}
        read: dict[str, None] = {}
        for stage in self.stages:
            if stage.site.kind == "kv" and any(group.placement.gate for group in stage.groups):
                read[stage.site.path] = None
            if stage.site.kind in ("kv", *EVERYWHERE) or self._folded:
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
        self.rungs = sorted({n for group in self._groups("ladder") for n in group.method.rungs(group.site)})
        for n in self.rungs:
            module = self._module(self._blocks[max(n - 1, 0)])
            if n == 0:
                hook = module.register_forward_pre_hook(self._keep_entering, with_kwargs=True)
            else:
                hook = module.register_forward_hook(self._keep_passed(n))
            self._hooks.append(hook)
        self._mixed = after_attention(self.stages, self.backbone.sites) if lanes else None
        if self._mixed is not None:
            module = self._model.get_submodule(self._mixed)
            self._hooks.append(module.register_forward_pre_hook(self._only_read, prepend=True))

    def _stages_of(self, lanes: list[Lane]) -> list[Stage]:
        """Made once for the same lanes: those that take several passes a step are arranged for each."""
        key = tuple(map(id, lanes))
        if key not in self._known:
            self._known[key] = tuple(lanes), stages(lanes, self.backbone)  # which hold them, so that no id is another's
        return self._known[key][1]

    def forget(self) -> None:
        """Hold on to no lanes that were arranged before."""
        self._known.clear()

    def _module(self, path: str) -> nn.Module:
        return self.backbone.model.get_submodule(path)

    def _keep_input(self, source: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[source] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _keep_entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_passed(self, layers: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A layer that is skipped gives what enters the first that runs; its own states are there already.
            self._entered.setdefault(layers, output[0] if isinstance(output, tuple) else output)

        return hook

    def _change_input(self, here: list[Stage]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            batch = self.backbone.attending.batch
            if batch is None or self.is_shared(args[0]):
                return args
            x = self._by_lane(args[0])
            for stage in here:
                sizes, who = stage.segments(len(x))
                x = _join(
                    part if group is None else group.input(part, self._texts(group.site, batch))
                    for group, part in zip(who, torch.split(x, sizes), strict=True)
                )
            return (x.view(args[0].shape), *args[1:])

        return hook

    def _change_output(self, here: list[Stage]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            batch = self.backbone.attending.batch
            if batch is None or self.is_shared(first):
                return output
            y = self._by_lane(first)
            for stage in here:
                x = self._by_lane(self._inputs[stage.site.source] if stage.site.source else args[0])
                if x.shape[1] != y.shape[1]:  # what it read before the tokens that no head reads were left out
                    x = self._picked(x)
                texts = self._texts(stage.site, batch)
                if stage.site.span is None:
                    y = _adapt(stage, x, y, texts)
                else:  # this site's columns of a fused linear
                    start, stop = stage.site.span
                    left, mine, right = torch.split(y, [start, stop - start, y.shape[-1] - stop], dim=-1)
                    y = torch.cat([left, _adapt(stage, x, mine, texts), right], dim=-1)
            y = y.view(first.shape)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def is_shared(self, x: Tensor) -> bool:
        """Whether a call belongs to no lane: DeBERTa-v2 sends its table of positions through q and k too."""
        batch = self.backbone.attending.batch
        if batch is None:
            return False
        # A norm of single heads reads texts x tokens x heads x width, Gemma 3's texts x heads x tokens x width.
        shapes = [x.shape[:2], x.shape[0:3:2]] if x.ndim == 4 else [x.shape[:-1]]
        known = [batch.ids.shape] + ([batch.source.ids.shape] if batch.source is not None else [])
        if self._read is not None:
            known.append(torch.Size([len(batch.ids), len(self._read) // len(batch.ids)]))
        return not any(shape in known for shape in shapes)

    def read_as(self, x: Tensor, sources: Iterable[str]) -> None:
        """Let `x` stand for what these modules have read, where one module runs by itself."""
        self._inputs |= dict.fromkeys(sources, x)

    def _texts(self, site: Site, batch: Batch) -> Batch:
        """The texts that a site sees: the source's or the target's in an encoder-decoder."""
        return batch.source if batch.source is not None and site.path in self._source_paths else batch

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
