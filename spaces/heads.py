"""The kinds of head, and the one that labels words: transformers' own, one linear layer behind every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from peftscape.spaces.sites import SiteMap

#: `class`: transformers' sequence classifier; `mean`: a linear layer on the masked mean; `lm`: a language model's own;
#: `token`: a linear layer on every token.
HeadKind = Literal["class", "mean", "lm", "token"]

#: The layer's name in the ForTokenClassification class of a family.
_NAMES = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "distilbert", "gpt2"),
    "classifier",
) | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), "score")


def layer_name(sites: SiteMap) -> str | None:
    """The layer's name in transformers' class; None where no class of the family is known."""
    return _NAMES.get(sites.family)


def token_shapes(sites: SiteMap, outputs: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's tensors, for this many labels.

    Raises:
        ValueError: an encoder-decoder, whose last states stand behind other tokens than the text's.
    """
    if sites.decoder_layers:
        raise ValueError(refusal(sites))
    name = layer_name(sites)
    start = "" if name is None else f"{name}."
    return {f"{start}weight": (outputs, sites.d_model), f"{start}bias": (outputs,)}


def refusal(sites: SiteMap) -> str:
    """Why a backbone labels no words."""
    return f"{sites.family} is an encoder-decoder: words are labelled by an encoder or a decoder alone"
