"""Fold an adapter into the backbone's weights, so that nothing is left to compute beside them.

A method that merges says so and writes nothing for it: its change of a linear is read off the module's output for
unit vectors, and that of a norm off two inputs of opposite sign.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftscape.search.fingerprint import source
from peftscape.search.folded import changed_weights
from peftscape.search.folders import replacing
from peftscape.search.forward import Forward
from peftscape.search.head import auto_class
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.adapter import Adapter
    from peftscape.search.backbone import Backbone
    from peftscape.search.lane import Lane
    from peftscape.spaces.design import Placement
    from peftscape.spaces.sites import Site


def unmergeable(placement: Placement) -> str | None:
    """Why a placement does not fold into weights; None if it does."""
    if not placement.method.merges:
        return f"{placement.method.name} computes what no weight of the backbone can"
    return f"the gate on {placement.method.name} depends on the text" if placement.gate else None


@torch.no_grad()
def merged_weights(lane: Lane, backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's parameters that a lane changes, by their names in the model's state dict.

    Raises:
        InputError: with every placement that does not fold into weights.
    """
    if errors := [reason for p in lane.design.placements if (reason := unmergeable(p))]:
        raise InputError("merge", errors)
    if backbone.quantised:
        raise InputError("merge", [f"the backbone's weights are held as {backbone.quantised}; export the adapter"])
    if any("model" in placement.sites for placement in lane.design.placements):
        return _all_weights(lane, backbone)
    if shared := [path for path in _by_module(lane) if path in backbone.sites.position_paths]:
        raise InputError("merge", [f"{shared[0]} projects the table of relative positions too, which no lane changes"])
    lane.unfold(training=False)
    found: dict[str, Tensor] = {}
    refused: list[str] = []
    norms = {site.path for site in backbone.sites.sites if site.kind == "norm"}
    forward = Forward(backbone)
    forward.arrange([lane], fold=False)
    try:
        for path, sites in _by_module(lane).items():
            module: Any = backbone.model.get_submodule(path)
            with _precise(module):
                inputs = _opposites(module) if path in norms else _units(module)
                change = _adapted(forward, module, inputs, sites) - module(inputs)[0]
                changed = _changed(module, change, inputs, path in norms)
                if getattr(module, "bias", None) is None and bool(changed.pop("bias").any()):
                    refused.append(path)
                found |= {f"{path}.{name}": getattr(module, name).detach() + value for name, value in changed.items()}
    finally:
        forward.arrange([])
    if refused:
        first = f"{len(refused)} modules, the first {refused[0]}," if len(refused) > 1 else refused[0]
        raise InputError("merge", [f"{first} without a bias cannot take the shift that training gave; export unmerged"])
    return found


@contextmanager
def _precise(module: Any) -> Iterator[None]:
    """In float32 at least: the difference of two outputs in bfloat16 would have lost what is far below a bias."""
    held = module.weight.dtype
    module.to(torch.promote_types(held, torch.float32))
    try:
        yield
    finally:
        module.to(held)


def _by_module(lane: Lane) -> dict[str, list[Site]]:
    places: dict[str, list[Site]] = {}
    for site in (site for sites in lane.sites for site in sites):
        places.setdefault(site.path, []).append(site)
    return places


def _adapted(forward: Forward, module: Any, inputs: Tensor, sites: list[Site]) -> Tensor:
    """What the lane's module gives for 1 x tokens x d_in; without a batch its hooks do nothing."""
    attending = forward.backbone.attending
    # The hooks adapt what they take for one lane with as many tokens as there are inputs.
    attending.batch = SimpleNamespace(ids=torch.empty(inputs.shape[:-1]), source=None)  # type: ignore[assignment]
    forward.read_as(inputs, [site.source for site in sites if site.source])
    try:
        out: Tensor = module(inputs)[0]
        return out
    finally:
        attending.batch = None


def _units(module: Any) -> Tensor:
    """1 x (d_in + 1) x d_in: the unit vectors, and zero for the bias."""
    rows, columns = module.weight.shape
    d_in = columns if isinstance(module, nn.Linear) else rows
    weight = module.weight
    return torch.cat([torch.eye(d_in), torch.zeros(1, d_in)]).to(weight).unsqueeze(0)


def _opposites(module: Any) -> Tensor:
    """1 x 2 x d: a vector without zeros once it is normalised, and its opposite."""
    one = torch.ones_like(module.weight)
    one[1::2] = -1
    return torch.stack([one, -one]).unsqueeze(0)


def _changed(module: Any, change: Tensor, inputs: Tensor, norm: bool) -> dict[str, Tensor]:
    """The change of the module's weight and bias that changes its output so for these inputs."""
    if norm:
        gain = module.weight.new_zeros(module.weight.shape) if not change.any() else _gain(module, change, inputs)
        return {"weight": gain, "bias": (change[0] + change[1]) / 2}
    weight = change[:-1] - change[-1]
    return {"weight": weight.T if isinstance(module, nn.Linear) else weight, "bias": change[-1]}


def _gain(module: Any, change: Tensor, inputs: Tensor) -> Tensor:
    """Half the difference of opposite inputs is normalised input times gain."""
    from peftscape.search.backbone import normaliser

    normal = normaliser(module)(inputs)[0, 0]
    return (change[0] - change[1]) / 2 / normal


def _all_weights(lane: Lane, backbone: Backbone) -> dict[str, Tensor]:
    """Of a lane that trains them all, under every name that a shared one has; none where the head alone trains."""
    if not lane.own[0]:
        return {}
    trained = changed_weights(backbone.model, lane.own[0][0]["delta"].detach().to(backbone.dtype))
    first = {weight: name for name, weight in backbone.model.named_parameters()}
    return {name: trained[first[weight]] for name, weight in backbone.model.named_parameters(remove_duplicate=False)}


def _untie(model: Any, state: dict[str, Tensor]) -> None:
    """T5's class ties its head to the word embedding at the start, and FLAN's checkpoints have one of their own."""
    output, words = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(n for n, w in model.named_parameters(remove_duplicate=False) if w is output.weight and "head" in n)
    if output.weight is words.weight and not torch.equal(state[name], state[_name(model, words)]):
        output.weight = nn.Parameter(output.weight.detach().clone())


def _name(model: nn.Module, words: nn.Module) -> str:
    return next(f"{path}.weight" for path, module in model.named_modules() if module is words)


def export_merged(adapter: Adapter, directory: str | Path) -> Path:
    """Write a whole transformers model, the adapter folded in: `AutoModelForSequenceClassification` reads it, of
    labelled words `AutoModelForTokenClassification`, of a language model `AutoModelForCausalLM`
    (`AutoModelForSeq2SeqLM`).

    Raises:
        InputError: a placement does not fold in, the head is none of transformers', or the folder is the backbone's.
        DiskError: there is no room.
    """
    import transformers

    if Path(directory).resolve() == Path(source(adapter.backbone)).resolve():
        raise InputError(str(directory), ["the backbone's own folder, which is never written; name another"])
    if adapter.card.head == "mean":
        head = adapter.card.head
        raise InputError("merge", [f'head = "{head}": only a head of transformers (head = "class") is written whole'])
    changed = merged_weights(adapter.lane(), adapter.backbone)
    config = type(adapter.backbone.config).from_dict(adapter.backbone.config.to_dict())
    config._attn_implementation = "eager"
    if adapter.card.head in ("class", "token"):
        config.num_labels = adapter.card.outputs
        if adapter.labels:
            config.id2label = dict(enumerate(adapter.labels))
            config.label2id = {label: i for i, label in enumerate(adapter.labels)}
    model = getattr(transformers, auto_class(adapter.card, adapter.backbone)).from_config(config)
    start = adapter.backbone.sites.within(lm=adapter.card.head == "lm")
    base = {**adapter.backbone.model.state_dict(), **changed}
    state = {start + name: value for name, value in base.items()}
    state |= {key.removeprefix("head/"): value for key, value in adapter.tensors.items() if key.startswith("head/")}
    state |= adapter.head.frozen(base)
    known = model.state_dict().keys()
    state = {name: value for name, value in state.items() if name in known}
    if missing := sorted(known - state.keys()):
        raise InputError(
            "merge", [f"{type(model).__name__} has weights that the adapter lacks: {', '.join(missing[:3])}"]
        )
    if adapter.head.kind == "lm":
        _untie(model, state)
    model.load_state_dict(state)
    tokenizer = copy.deepcopy(adapter.backbone.tokenizer)
    if (
        adapter.card.head == "class"
        and adapter.head.pooling == "last"
        and config.pad_token_id is None
        and tokenizer is not None
    ):
        # transformers' classifier looks for the last token before the padding, and refuses batches without one.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    with replacing(Path(directory), ("config.json",), last="config.json") as folder:
        model.to(adapter.backbone.dtype).save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    return Path(directory)
