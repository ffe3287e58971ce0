"""What a design will cost on a model and a device, before anything is trained and without weights.

    peak = max over the phases of a step of (weights + optimiser + gradients + kept + what the phase itself needs)

Every term is a closed form of `cost.py`, `activations.py` and `kept.py`, or stands in a profile with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peftscape.spaces.cost import QUANTISED, WEIGHT_BYTES, model_bytes, restored_bytes, working_bytes
from peftscape.spaces.file_size import file_bytes, stored_tensors
from peftscape.spaces.flow import Attention
from peftscape.spaces.heads import HeadKind
from peftscape.spaces.kept import kept
from peftscape.spaces.price import (
    adapter_size,
    head_bytes,
    head_flops,
    head_size,
    infer_flops,
    optimised_size,
    train_flops,
)
from peftscape.spaces.profiles import WIDTH, Profile
from peftscape.spaces.two_stacks import is_two_stacks
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.spaces.design import Design
    from peftscape.spaces.sites import SiteMap

#: Model states of mixed-precision Adam: two bytes each for weight and gradient, 12 for the float32 master and both
#: moments (arXiv:1910.02054, sec. 3.1).
MIXED_PRECISION = 16

Objective = HeadKind


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a design is trained.

    Args:
        batch, length: texts a step, and tokens of the longest, to which the others are padded.
        target: tokens of an encoder-decoder's longest target; None for `length`.
        dtype: of the frozen weights, one of `WEIGHT_BYTES`.
        compute: precision of the computation with quantised weights; None for bfloat16.
        attention: None for the profile's own.
        checkpointing: layers are run again in the backward.
        dropout: of the adapters; None for the profile's own.
        objective: `lm` (next tokens), `class` (transformers' own head), `mean` or `token` (a label for every token);
            None for the profile's own.
        outputs: of a classification head.
    """

    batch: int = 8
    length: int = 512
    target: int | None = None
    dtype: str = "bfloat16"
    compute: str | None = None
    attention: Attention | None = None
    checkpointing: bool = False
    dropout: float | None = None
    objective: Objective | None = None
    outputs: int = 2

    @property
    def computed(self) -> str:
        """The precision of the computation, by which `WIDTH` tells its bytes a number."""
        return self.compute or self.dtype


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by what they hold; `peak` is the most that a step has at once, as the allocator counts it.

    Args:
        weights: the backbone, its language-model head included; `trained` the values that train beside it.
        logits, working: at the height of the loss and of a layer; they do not meet, and `peak` takes one.
        early: gradients that are there at the loss and in the backward: all of an adapter's, which are small; of a
            whole model's that of the output weights, since the others come as the activations go.
        outputs: the logits that the training loop holds through the backward.
        step: temporaries of the optimiser's step, after the activations went.
    """

    weights: int
    trained: int
    gradients: int
    optimiser: int
    activations: int
    adapters: int
    copies: int
    held: int
    logits: int
    working: int
    early: int
    outputs: int
    step: int
    peak: int
    phase: str

    @property
    def states(self) -> int:
        """Weights, gradients and moments."""
        return self.weights + self.trained + self.gradients + self.optimiser

    @property
    def kept(self) -> int:
        """What autograd keeps."""
        return self.activations + self.adapters + self.copies

    def parts(self) -> dict[str, int]:
        """What is there at the peak; the parts add up to it."""
        always = {"weights": self.weights, "trained": self.trained, "optimiser": self.optimiser}
        if self.phase == "the optimiser's step":
            found = always | {"gradients": self.gradients, "step": self.step}
        else:
            found = always | {"gradients": self.early, "activations": self.activations, "adapters": self.adapters}
            found |= {"copies": self.copies, "held": self.held}
            found |= {"logits": self.logits} if self.phase == "the loss" else {
                "logits": self.outputs, "working": self.working
            }  # fmt: skip
        return {name: size for name, size in found.items() if size}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A design's costs on one model in one setting. FLOPs are for a token unless said otherwise.

    Args:
        backbone: parameters, a language-model head included where it is used.
        frozen_bytes: of the backbone by precision.
        infer_extra_flops, infer_extra_bytes: a token's, where the change stays beside the weights.
        mixed_precision_bytes: model states of full fine-tuning at 16 bytes a parameter.
        two_stacks: an encoder-decoder, whose FLOPs are for a token of the source.
    """

    model: str
    design: str
    profile: str
    setting: Setting
    backbone: int
    adapter: int
    head: int
    adapter_bytes: int
    frozen_bytes: Mapping[str, int]
    memory: Memory
    forward_flops: float
    train_flops: float
    step_flops: float
    infer_extra_flops: float
    infer_extra_bytes: int
    mixed_precision_bytes: int | None = None
    two_stacks: bool = False

    @property
    def total(self) -> int:
        """All trained parameters."""
        return self.adapter + self.head

    def json(self) -> dict[str, Any]:
        """All of it for JSON, with the sums."""
        out = asdict(self) | {"trainable": self.total, "trainable_percent": 100 * self.total / self.backbone}
        out["memory"] |= {"states": self.memory.states, "kept": self.memory.kept, "parts": self.memory.parts()}
        return out


def plan(
    design: Design, sites: SiteMap, profile: Profile, setting: Setting, *, model: str = "", tied: bool = True
) -> Plan:  # fmt: skip
    """The plan of a design.

    Args:
        tied: whether a language-model head shares the embedding's weights.

    Raises:
        InputError: the design does not fit the model, or the setting is impossible.
    """
    if errors := [*_wrong(setting), *design.check(sites)]:
        raise InputError("plan", errors)
    two = is_two_stacks(sites)
    objective = setting.objective or ("lm" if two else profile.objective if sites.causal else "class")
    if objective == "lm" and not (sites.causal or two):
        raise InputError("plan", [f"objective: {sites.family} is no causal model, it has no next token to learn"])
    if setting.target is not None and not two:
        raise InputError("plan", [f"target: {sites.family} has one stack, with no target apart from its text"])
    output_head = 0 if tied or objective != "lm" else sites.vocab * sites.d_model
    head = None if objective == "lm" else objective
    try:
        on_head = head_size(sites, setting.outputs, head) if head else 0
    except ValueError as error:
        raise InputError("plan", [str(error)]) from None
    adapter, full = adapter_size(design, sites), design.full
    adapter += output_head if full else 0
    frozen = {dtype: _weights(sites, dtype, setting.compute, output_head, profile) for dtype in WEIGHT_BYTES}
    file = file_bytes(stored_tensors(design, sites, setting.outputs, head))
    parameters = sites.parameters + output_head
    memory = _memory(design, sites, profile, setting, objective, output_head, on_head)
    flops = _flops(design, sites, profile, setting, objective, on_head)
    longer = setting.length + design.prompt_length()
    target = setting.target or setting.length
    adapted = infer_flops(design, sites, longer, target=target)
    bare = infer_flops(type(design)(), sites, setting.length, target=target)
    beside = [p for p in design.placements if not p.merges]
    deployed = sum(t.size for p in beside for _, _, _, t in p.tensors(sites) if t.deployed)
    return Plan(
        model=model, design=design.label, profile=profile.name, setting=setting, backbone=parameters, adapter=adapter,
        head=on_head, adapter_bytes=file, frozen_bytes=frozen, memory=memory, forward_flops=flops[0],
        train_flops=flops[1], step_flops=flops[2], infer_extra_flops=(adapted - bare) / setting.length,
        infer_extra_bytes=deployed * WIDTH[setting.computed],
        mixed_precision_bytes=MIXED_PRECISION * parameters if full else None, two_stacks=two,
    )  # fmt: skip


def _memory(
    design: Design, sites: SiteMap, profile: Profile, setting: Setting, objective: Objective, output_head: int,
    on_head: int,
) -> Memory:  # fmt: skip
    full, width = design.full, WIDTH[setting.computed]
    of_trained = profile.trained_width(setting.computed, full=full)
    optimised = optimised_size(design, sites) + on_head + (output_head if full else 0)
    # Where all weights train in place they are the backbone; peftscape trains a change beside it.
    in_place = full and not profile.full_masters
    weights = 0 if in_place else _weights(sites, setting.dtype, setting.compute, output_head, profile)
    trained, gradients, optimiser = optimised * of_trained, optimised * of_trained, 2 * optimised * of_trained
    held = kept(
        design, sites, profile, tokens=setting.length, batch=setting.batch, dtype=setting.dtype,
        compute=setting.compute, attention=setting.attention, checkpointing=setting.checkpointing,
        dropout=setting.dropout, target=setting.target,
    )  # fmt: skip
    length = setting.length + design.prompt_length()
    predicted = (setting.target or setting.length) if is_two_stacks(sites) else length
    # The loss of transformers' encoder-decoders stays in the logits' precision: with them live the log-softmax and
    # two gradients (models/t5/modeling_t5.py, CrossEntropyLoss).
    whole = is_two_stacks(sites) and profile.loss_bytes is None
    a_logit = 4 * width if whole else max(profile.logit_bytes(setting.computed))
    count = setting.batch * predicted * sites.vocab if objective == "lm" else 0
    logits = min(a_logit * count, profile.loss_bytes or a_logit * count)
    logits += head_bytes(sites, setting.batch * length, setting.outputs) if objective == "token" else 0
    working = working_bytes(
        sites, max(length, predicted), setting.batch, width, attention=setting.attention or profile.attention
    )
    working = held.beyond(working)
    # The training loop still holds the model's output while the backward runs.
    outputs = (4 if profile.float_outputs else width) * count if profile.loss_bytes is None else 0
    working += restored_bytes(sites, setting.dtype, width)
    logits += width * output_head if profile.quantised_inputs and setting.dtype in QUANTISED else 0
    step = profile.step_copies * optimised * of_trained
    base = weights + trained + optimiser
    # The gradients of a whole model come as its activations go; those of an adapter are small and counted throughout.
    early = gradients if not full else sites.vocab * sites.d_model * of_trained if objective == "lm" else 0
    phases = {
        "the loss": base + early + held.total + logits,
        "the backward": base + early + held.total + working + outputs,
        "the optimiser's step": base + gradients + step,
    }
    phase = max(phases, key=lambda name: phases[name])
    return Memory(
        weights=weights, trained=trained, gradients=gradients, optimiser=optimiser, activations=held.backbone,
        adapters=held.adapters, copies=held.copies, held=held.held, logits=logits, working=working, early=early,
        outputs=outputs, step=step, peak=phases[phase], phase=phase,
    )  # fmt: skip


def _flops(
    design: Design, sites: SiteMap, profile: Profile, setting: Setting, objective: Objective, on_head: int
) -> tuple[float, float, float]:
    """A token's forward, its forward and backward, and a step's; of an encoder-decoder a token of the source."""
    length = setting.length + design.prompt_length()
    target = setting.target or setting.length
    forward, backward = train_flops(
        design, sites, length, batch=setting.batch, attention=setting.attention or profile.attention, target=target
    )
    if objective == "lm":
        product = 2 * (target if is_two_stacks(sites) else length) * sites.vocab * sites.d_model
        forward += product
        backward += product * (2 if design.full else 1 if design.lowest_layer(sites) < sites.layers else 0)
    else:
        head = head_flops(design, sites, on_head, read=length if objective == "token" else 1)
        forward, backward = forward + head[0], backward + head[1] - head[0]
    if setting.checkpointing:
        backward += forward  # once more, layer by layer
    return forward / setting.length, (forward + backward) / setting.length, setting.batch * (forward + backward)


def _weights(sites: SiteMap, dtype: str, compute: str | None, output_head: int, profile: Profile) -> int:
    """Bytes of the frozen model; a language-model head is held as the computation is unless it is quantised too."""
    whole = profile.quantised_inputs or dtype not in QUANTISED
    width = WEIGHT_BYTES[dtype if whole else compute or "bfloat16"]
    return model_bytes(sites, dtype, compute) + round(output_head * width)


def _wrong(setting: Setting) -> list[str]:
    sizes = {name: getattr(setting, name) for name in ("batch", "length", "target", "outputs")}
    errors = [f"{name}: {size} is not at least 1" for name, size in sizes.items() if size is not None and size < 1]
    if setting.dropout is not None and not 0 <= setting.dropout < 1:
        errors.append(f"dropout: {setting.dropout} is not from 0 to below 1")
    return errors
