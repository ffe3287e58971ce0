"""Which backbone an adapter belongs to, and how to tell that another one is not it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.spaces.heads import HeadKind

# What a configuration says about a run, a task or the library, not about what the backbone computes.
_NOT_THE_BACKBONE = {
    "architectures", "attn_implementation", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "name_or_path", "classifier_dropout",
}  # fmt: skip


def describe(backbone: Backbone, head: HeadKind) -> dict[str, Any]:
    """Which backbone an adapter belongs to: its source, its configuration, a fingerprint of its weights."""
    config = json.loads(json.dumps(backbone.config.to_dict(), default=str))
    return {
        "source": source(backbone),
        "dtype": backbone.precision,
        "config": {k: v for k, v in config.items() if k not in _NOT_THE_BACKBONE and not k.startswith("_")},
        "weights": fingerprint(backbone, head),
    }


def source(backbone: Backbone) -> str:
    """Where a backbone came from: a whole path, so that it is found from anywhere, or a hub id."""
    local = bool(backbone.source) and Path(backbone.source).is_dir()
    return str(Path(backbone.source).resolve()) if local else backbone.source


def fingerprint(backbone: Backbone, head: HeadKind) -> str:
    """SHA-256 of the weights' names, shapes and first 4,096 values each, the same in every precision.

    A pooler counts only where the head uses it: without, transformers may have made it up.
    """
    pooled = head == "class" and backbone.sites.head is not None and backbone.sites.head.pooling == "pooler"
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.model.named_parameters()):
        if name.startswith("pooler.") and not pooled:
            continue
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        start = weight.detach().reshape(-1)[:4096].cpu()
        digest.update(start.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def differences(value: Mapping[str, Any], backbone: Backbone, head: HeadKind) -> list[str]:
    """What tells a backbone from the one that an adapter was trained on, one line each."""
    here, there = describe(backbone, head), value["backbone"]
    # A key that only one of the two knows is one that transformers added or dropped since.
    both = sorted(here["config"].keys() & there["config"].keys())
    errors = [
        f"backbone: {key} is {here['config'][key]!r}, {there['config'][key]!r} was expected"
        for key in both
        if here["config"][key] != there["config"][key]
    ]
    if not errors and here["weights"] != there["weights"]:
        was = f" ({there['source']})" if there["source"] else ""
        errors.append(f"backbone: other weights than those that the adapter was trained on{was}")
    return errors
