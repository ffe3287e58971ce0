"""Reference values made with the `adapters` library, which needs an older transformers than peftscape runs on.

    python -m venv /tmp/reference && /tmp/reference/bin/pip install torch numpy adapters==1.2.0 transformers==4.51.3
    /tmp/reference/bin/python tests/data/adapters_reference.py

writes adapters_reference.npz beside this file: for each case the last hidden states of a tiny BERT with the adapter,
and the gradients of their weighted sum, by the library's own names. All weights follow from their names (`value`), so
that the test makes the same ones; it imports this file for that and for the shapes, never the library.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_suffix(".npz")
SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 40, size=(2, 7))


def value(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A weight, from its name alone; a LayerNorm's gain is near one."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.3, size=shape)
    return drawn + 1 if name.endswith("LayerNorm.weight") else drawn


def cases() -> dict[str, Any]:
    """The library's configurations."""
    from adapters import (
        CompacterConfig,
        ConfigUnion,
        DoubleSeqBnConfig,
        LoRAConfig,
        ParBnConfig,
        PrefixTuningConfig,
        SeqBnConfig,
    )

    prefix = PrefixTuningConfig(prefix_length=3, bottleneck_size=5)
    parallel = ParBnConfig(reduction_factor=4, scaling=3.0)
    return {
        "pfeiffer": SeqBnConfig(reduction_factor=4, non_linearity="gelu"),
        "houlsby": DoubleSeqBnConfig(reduction_factor=4, non_linearity="silu"),
        "parallel": parallel,
        "compacter": CompacterConfig(reduction_factor=2, phm_dim=4),
        "mam": ConfigUnion(prefix, parallel),
        # Its gates: an adapter's reads what the adapter reads, which for a parallel one is the sub-layer's input.
        "unipelt": ConfigUnion(
            PrefixTuningConfig(prefix_length=3, flat=True, use_gating=True),
            LoRAConfig(r=2, alpha=2, use_gating=True),
            ParBnConfig(reduction_factor=4, scaling=3.0, use_gating=True),
        ),
    }


def main() -> None:
    """Run the library and write the file."""
    import adapters
    import torch
    from transformers import BertConfig, BertModel

    found: dict[str, NDArray[np.float64]] = {}
    for case, config in cases().items():
        model: Any = BertModel(BertConfig(**SHAPE, attn_implementation="eager"))
        adapters.init(model)
        model.add_adapter("a", config=config)
        model.train_adapter("a")
        model = model.double().eval()
        for name, weight in model.named_parameters():
            weight.data.copy_(torch.from_numpy(value(name, tuple(weight.shape))))
        states = model(torch.from_numpy(IDS)).last_hidden_state
        (states * torch.from_numpy(value("loss", tuple(states.shape)))).sum().backward()
        found[f"{case}/states"] = states.detach().numpy()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                found[f"{case}/{name}"] = weight.grad.numpy()
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
