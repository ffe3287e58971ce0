"""The language model's own head: frozen, no parameters of its own, its loss computed a chunk of tokens at a time.

Lanes x tokens x vocabulary never exists at once. Of each chunk the gradient towards the hidden states is taken with the
loss, while its logits are there, and kept in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftscape.search.head import Head, around_nothing, given_states
from peftscape.spaces.price import LM_CHUNK
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.packing import Batch

Logits = Callable[[Tensor], Tensor]


class LMHead(Head):
    """Negative log-likelihoods from hidden states, for all lanes at once, by transformers' own causal LM class."""

    def __init__(self, backbone: Backbone, *, outputs: int = 2) -> None:
        two = backbone.sites.decoder_layers > 0
        if not backbone.sites.causal and not two:
            raise InputError(
                backbone.source, [f"{backbone.sites.family} is no decoder, and cannot predict its next token"]
            )
        self.backbone, self.kind, self.outputs = backbone, "lm", outputs
        self.shapes = {}
        self.model = around_nothing(backbone, "AutoModelForSeq2SeqLM" if two else "AutoModelForCausalLM")
        wanted = dict(self.model.named_parameters())
        tied = bool(getattr(backbone.config, "tie_word_embeddings", False))
        # transformers' `get_output_embeddings` asks the base model, which is not there.
        own = next(name for name, value in wanted.items() if value.ndim == 2)
        # T5's configuration calls all heads tied, and those of its later checkpoints are not (FLAN, v1.1).
        self.tied = own if tied and not (two and _found(backbone, {own})) else None
        self.weights = _weights(backbone, {name: value for name, value in wanted.items() if name != self.tied})
        biases = dict(self.model.named_buffers())  # BART's, zero in a checkpoint without them
        zeros = {n: torch.zeros(b.shape, dtype=backbone.dtype, device=backbone.device) for n, b in biases.items()}
        self.weights |= zeros | _found(backbone, set(biases))
        self.words = len(wanted[own])

    def frozen(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of it; a tied one is the backbone's word embedding."""
        path = self.backbone.sites.embedding
        return self.weights | ({self.tied: base[f"{path}.weight"]} if self.tied is not None else {})

    def reads(self, batch: Batch) -> Tensor | None:
        """None: lanes may have unequally many tokens to predict."""
        return None

    def logits(self, params: Mapping[str, Tensor], states: Tensor, batch: Batch, *, picked: bool = False) -> Tensor:
        """lanes x examples x 2: the negative log-likelihood of an example's tokens, and how many they are."""
        assert batch.scored is not None
        assert batch.scored_rows is not None
        read = states[batch.scored - 1].to(self.backbone.dtype)
        losses = self.token_losses(read, batch.ids.reshape(-1)[batch.scored])
        sums = losses.new_zeros(batch.lanes * batch.examples + 1, 2)  # the last is of tokens that fill a fixed shape
        both = torch.stack([losses, torch.ones_like(losses)], dim=1)
        return sums.index_add(0, batch.scored_rows, both)[:-1].view(batch.lanes, batch.examples, 2)

    def token_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """-log p(label | state) of each token, states tokens x d_model, in float32 or wider."""
        weights = dict(self.weights)
        if self.tied is not None:  # looked up at each call: a lane that trains all weights trains this one
            weights[self.tied] = self.backbone.embedding.weight
        size = max(1, LM_CHUNK // self.words)

        def logits(chunk: Tensor) -> Tensor:
            return self._words(weights, chunk)

        if any(weight.requires_grad for weight in weights.values()) and torch.is_grad_enabled():
            parts = [
                checkpoint(_losses, logits, x, y, use_reentrant=False)
                for x, y in zip(torch.split(states, size), torch.split(labels, size), strict=True)
            ]
            return torch.cat(parts)
        losses: Tensor = _ChunkedLoss.apply(states, labels, logits, size)  # type: ignore[no-untyped-call]
        return losses

    def next_words(self, states: Tensor) -> Tensor:
        """states x words: logits of the words that follow, for few states."""
        weights = dict(self.weights)
        if self.tied is not None:
            weights[self.tied] = self.backbone.embedding.weight
        return self._words(weights, states.to(self.backbone.dtype))

    def divergence(self, one: Tensor, other: Tensor, batch: Batch) -> Tensor:
        """The symmetric KL divergence of two passes' next words, for each lane a sum over the tokens that count."""
        assert batch.scored is not None
        assert batch.scored_rows is not None
        size = max(1, LM_CHUNK // self.words)
        pairs = zip(
            *(torch.split(s[batch.scored - 1].to(self.backbone.dtype), size) for s in (one, other)), strict=True
        )
        parts = [checkpoint(self._kl, a, b, use_reentrant=False) for a, b in pairs]
        lane = batch.scored_rows // batch.examples
        values = torch.cat(parts)
        return values.new_zeros(batch.lanes).index_add(0, lane, values)

    def _kl(self, one: Tensor, other: Tensor) -> Tensor:
        p, q = (torch.log_softmax(_wide(self.next_words(x)), dim=-1) for x in (one, other))
        return ((p.exp() - q.exp()) * (p - q)).sum(dim=-1) / 2

    def _words(self, weights: dict[str, Tensor], states: Tensor) -> Tensor:
        """transformers' own logits: scaled and capped as the model does."""
        assert self.model is not None
        with given_states(self.model, states.unsqueeze(0)):
            ids = torch.ones(1, len(states), dtype=torch.long, device=states.device)
            out = torch.func.functional_call(self.model, weights, (), {"input_ids": ids, "use_cache": False})
        logits: Tensor = out.logits[0]
        return logits


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _losses(logits: Logits, states: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(_wide(logits(states)), labels, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """Losses of all tokens, and with them each one's gradient towards its state: the head itself does not train."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, logits: Logits, size: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for x, y in zip(torch.split(states, size), torch.split(labels, size), strict=True):
            with torch.set_grad_enabled(wanted):
                x = x.detach().requires_grad_(wanted)
                loss = _losses(logits, x, y)
                gradients += torch.autograd.grad(loss.sum(), x) if wanted else ()
            losses.append(loss.detach())
        ctx.save_for_backward(states, labels, *([torch.cat(gradients)] if wanted else []))
        ctx.logits = logits
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        states, labels, kept = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself: masks of second order, few tokens
            (kept,) = torch.autograd.grad(_losses(ctx.logits, states, labels), states, grad, create_graph=True)
            return kept, None, None, None
        return (kept * grad.unsqueeze(1)).to(states.dtype), None, None, None


def _weights(backbone: Backbone, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's own weights from the checkpoint, of which the backbone has read the rest.

    A model made from a configuration has none: they are drawn, always the same.
    """
    if not wanted:
        return {}
    if not backbone.source:
        source = torch.Generator().manual_seed(0)
        drawn = {n: torch.empty(w.shape).normal_(0, 0.02, generator=source) for n, w in wanted.items()}
        return {name: value.to(backbone.device, backbone.dtype) for name, value in drawn.items()}
    found = _found(backbone, set(wanted))
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(backbone.source, [f"the checkpoint has no language-model head ({', '.join(missing)})"])
    return found


def _found(backbone: Backbone, names: set[str]) -> dict[str, Tensor]:
    """Those of these tensors that the checkpoint holds."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in _files(backbone.source) if names and backbone.source else ():
        with safe_open(str(file), framework="pt") as tensors:
            for name in names & set(tensors.keys()):
                found[name] = tensors.get_tensor(name).to(backbone.device, backbone.dtype)
    return found


def _files(source: str) -> list[Path]:
    """The checkpoint's safetensors files, in a folder or in the hub's cache, where the backbone has put them."""
    if Path(source).is_dir():
        return sorted(Path(source).glob("*.safetensors"))
    from huggingface_hub import snapshot_download

    folder = snapshot_download(source, allow_patterns=["*.safetensors"], local_files_only=True)
    return sorted(Path(folder).glob("*.safetensors"))
