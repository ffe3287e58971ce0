"""Profiles: what an implementation keeps in memory beyond the mathematics, each difference with its reason.

None of these numbers was fitted to a measurement; each follows from the code that is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peftscape.spaces.flow import Attention
from peftscape.spaces.words import InputError, nearest

#: Bytes a number by precision. Quantised backbones compute in bfloat16 unless said otherwise.
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 2, "nf4": 2, "nf4-dq": 2}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one implementation keeps.

    Args:
        attention: how it computes attention, unless asked for another.
        masters: trained values in at least float32, whatever the backbone's precision.
        full_masters: likewise where all weights train.
        casts_inputs: each adapted linear keeps an input of its own, cast to the trained values' precision.
        copies: trained matrices are kept once more in the precision of the computation.
        whole_copies: copies of all weights that full fine-tuning makes, in the precision of the computation.
        cache: keys and values of every layer are held by the model's output.
        dropout: the default of its own LoRA; a mask of bytes and the masked input are kept where it is not 0.
        shared_dropout: q, k and v have one dropout together.
        quantised_inputs: the inputs of quantised linears are kept.
        logits: bytes a logit at the end of the forward, by (bytes of the computation).
        logits_backward: bytes a logit at the height of the loss's backward.
        float_outputs: the training loop gets, and holds, logits in float32.
        loss_bytes: the most that logits and their loss take where they come in chunks and are not held; None: whole.
        objective: `lm` (next tokens of causal models) or `class`.
        step_copies: optimiser temporaries at a step, in copies of the trained values.
        reasons: why, in the order of a reader's questions, with the source.
    """

    name: str
    attention: Attention
    masters: bool
    full_masters: bool
    casts_inputs: bool = False
    copies: bool = False
    whole_copies: int = 0
    cache: bool = False
    dropout: float = 0.0
    shared_dropout: bool = False
    quantised_inputs: bool = False
    checkpoints_from_input: bool = False
    logits: tuple[int, int] = (0, 0)
    logits_backward: tuple[int, int] = (0, 0)
    float_outputs: bool = False
    loss_bytes: int | None = None
    objective: Literal["lm", "class"] = "class"
    step_copies: int = 0
    reasons: tuple[str, ...] = field(default=())

    def trained_width(self, dtype: str, *, full: bool) -> int:
        """Bytes of a trained value, of its gradient and of each moment of AdamW."""
        masters = self.full_masters if full else self.masters
        return max(4, WIDTH[dtype]) if masters else WIDTH[dtype]

    def logit_bytes(self, dtype: str) -> tuple[int, int]:
        """Bytes a logit at the end of the forward, and at the height of the loss's backward.

        The first number of a pair counts tensors in the computation's precision, the second bytes besides.
        """
        width = WIDTH[dtype]
        (a, b), (c, d) = self.logits, self.logits_backward
        return a * width + b, c * width + d


PROFILES = {
    "peftscape": Profile(
        name="peftscape",
        attention="lanes",
        masters=True,
        full_masters=True,
        copies=True,
        whole_copies=2,
        logits=(0, 12),
        logits_backward=(0, 12),
        loss_bytes=12 << 24,
        reasons=(
            "trained values, gradients and AdamW's moments are float32 (search/lane.py): 16 bytes each",
            "matrices of a lane are stacked in the precision of the computation and kept for the input's gradient"
            " (search/groups.py, _Stack)",
            "an input that several places read is kept once: it is one tensor (search/cohort.py, hooks)",
            "attention is written out; it keeps queries, keys, values and weights (search/attention.py)",
            "full fine-tuning makes delta and W + delta in the precision of the computation and keeps those of its"
            " linears (search/cohort.py, _call)",
            "a language model's loss takes chunks of 16.8 million logits, each as it comes, in float32 and its gradient"
            " (search/lm_head.py)",
            "the backbone runs without dropout",
        ),
    ),
    "peft": Profile(
        name="peft",
        attention="masked",
        masters=True,
        full_masters=False,
        casts_inputs=True,
        cache=True,
        checkpoints_from_input=True,
        logits=(1, 8),
        logits_backward=(1, 12),
        objective="lm",
        step_copies=1,
        reasons=(
            "adapter weights are float32 on a bfloat16 backbone (autocast_adapter_dtype=True, the default), gradients"
            " and moments with them; full fine-tuning has them in the model's precision",
            "each adapted linear casts its input to float32 and keeps it: q and v keep one each"
            " (peft/tuners/lora/layer.py, _cast_input_dtype; ia3/layer.py)",
            "attention through torch's fused kernel; a batch of unequal texts has a mask, with which grouped keys and"
            " values are repeated (transformers/integrations/sdpa_attention.py)",
            "use_cache is on by default: the output holds a copy of all keys and values (transformers/cache_utils.py)",
            "logits in the model's precision, in float32 and their log-softmax: 2 + 4 + 4 bytes in the forward; in the"
            " backward the log-softmax and two gradients: 2 + 4 + 4 + 4 (transformers/loss/loss_utils.py)",
            "AdamW over lists of tensors takes one temporary copy at the step (torch/optim/adamw.py, foreach)",
            "no dropout unless asked for (lora_dropout=0)",
        ),
    ),
    "litgpt": Profile(
        name="litgpt",
        attention="joint",
        masters=False,
        full_masters=False,
        dropout=0.05,
        shared_dropout=True,
        quantised_inputs=True,
        logits=(0, 8),
        logits_backward=(0, 8),
        float_outputs=True,
        objective="lm",
        step_copies=1,
        reasons=(
            "bf16-true: trained values, gradients and moments are bfloat16 too",
            "lora_dropout 0.05 keeps a mask of bytes and the masked input, once for q, k and v (litgpt/lora.py)",
            "values are a view of the joint q-k-v product, which stays alive with them (litgpt/model.py)",
            "Fabric hands the logits out in float32 (lightning/fabric/plugins/precision/half.py, convert_output); the"
            " loss goes over them in chunks of 128 tokens and keeps their log-softmax (litgpt/utils.py,"
            " chunked_cross_entropy)",
            "in 4 bits the output weights are quantised like all linears, and restored whole for their products"
            " (lightning/fabric/plugins/precision/bitsandbytes.py; bitsandbytes/autograd/_functions.py, MatMul4Bit)",
            "bitsandbytes before 0.43.2 kept the input of every 4-bit linear"
            " (bitsandbytes pull request 1270 removed it): the published table is older",
        ),
    ),
}


def profile(name: str) -> Profile:
    """The profile of that name. Raises InputError with the nearest one."""
    if name not in PROFILES:
        raise InputError("profile", [f'no profile "{name}"{nearest(name, PROFILES)}'])
    return PROFILES[name]
