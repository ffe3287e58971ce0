"""The backbone's closed forms, held against torch's FLOP counter and what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted import kept_for
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN

from peftscape.spaces.cost import (
    ACTIVATION_TENSORS,
    activation_bytes,
    backward_flops,
    forward_flops,
    model_bytes,
    parameters,
    working_bytes,
)
from peftscape.spaces.sites import SiteMap, site_map

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 90,
}
LLAMA = {
    **BERT,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **BERT},
    "bert-mid": {"model_type": "bert", **BERT, "hidden_size": 128, "intermediate_size": 512},
    "electra": {"model_type": "electra", **BERT, "embedding_size": 16},
    "distilbert": {
        "model_type": "distilbert", "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 80, "vocab_size": 90
    },
    "deberta-v2": {
        "model_type": "deberta-v2", **BERT, "relative_attention": True, "pos_att_type": "p2c|c2p",
        "position_buckets": 8, "share_att_key": True, "position_biased_input": False,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 90, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2-mid": {
        "model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 90, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": {"model_type": "llama", **LLAMA},
    "llama-mid": {
        "model_type": "llama", **LLAMA, "hidden_size": 128, "intermediate_size": 352, "head_dim": 32
    },
    "qwen3": {"model_type": "qwen3", **LLAMA, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **LLAMA, "head_dim": 16},
}  # fmt: skip
DECODERS = ("gpt2", "llama", "qwen3", "gemma2")


class Run:
    """One forward of a tiny model in which something trainable is added to the output of some sites."""

    def __init__(self, config: dict[str, Any], *, dtype: torch.dtype = torch.float32, attention: str = "eager") -> None:
        torch.manual_seed(0)
        config = dict(config)
        family = config.pop("model_type")
        settings = AutoConfig.for_model(family, **config)
        self.model = AutoModel.from_config(settings, attn_implementation=attention).to(dtype).eval()
        self.model.requires_grad_(False)
        self.sites = site_map({"model_type": family, **config})
        self.kwargs = {"use_cache": False} if family in DECODERS else {}

    def at(self, layer: int, kinds: tuple[str, ...]) -> None:
        for site in self.sites.sites:
            if site.layer == layer and site.kind in kinds:
                added = torch.zeros(site.d_out, dtype=self.model.dtype, requires_grad=True)
                self.model.get_submodule(site.path).register_forward_hook(self.add(added, site.span))

    @staticmethod
    def add(added: torch.Tensor, span: tuple[int, int] | None) -> Any:
        def hook(_: Any, __: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (out[0] + added, *out[1:])
            if span is None:
                return out + added
            return out + torch.nn.functional.pad(added, (span[0], out.shape[-1] - span[1]))

        return hook

    def forward(self, batch: int, tokens: int, *, grad_at_input: bool = False) -> torch.Tensor:
        ids = torch.randint(3, 90, (batch, tokens))
        inputs: dict[str, Any] = {"input_ids": ids}
        if grad_at_input:
            inputs = {"inputs_embeds": self.model.get_input_embeddings()(ids).detach().requires_grad_()}
        out = self.model(attention_mask=torch.ones_like(ids), **inputs, **self.kwargs)
        pooled = self.sites.head is not None and self.sites.head.pooling == "pooler"
        loss: torch.Tensor = (out.pooler_output if pooled else out.last_hidden_state).float().square().sum()
        return loss


def flops(run: Run, batch: int, tokens: int, **where: Any) -> tuple[float, float]:
    """FLOPs of a forward and its backward, for each sequence."""
    with FlopCounterMode(display=False) as forward:
        loss = run.forward(batch, tokens, **where)
    if not loss.requires_grad:
        return forward.get_total_flops() / batch, 0
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() / batch, backward.get_total_flops() / batch


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODELS[request.param]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 24), (3, 50)])
def test_forward_and_full_backward_count_as_torch_does(config: dict[str, Any], batch: int, tokens: int) -> None:
    run = Run(config)
    forward, through = flops(run, batch, tokens, grad_at_input=True)
    assert forward_flops(run.sites, tokens, batch=batch) == pytest.approx(forward, rel=0.02)
    assert backward_flops(run.sites, tokens, -1) == pytest.approx(through, rel=0.02)
    run.model.requires_grad_(True)
    _, trained = flops(run, batch, tokens)
    assert backward_flops(run.sites, tokens, -1, batch=batch, full=True) == pytest.approx(trained, rel=0.02)


def with_kinds(*several: tuple[str, ...], trained: set[str]) -> list[Any]:
    """(configuration, kinds) wherever the family has them. Where a backbone attends to a table of positions, kinds in
    `trained` train that table's projections too, which is more than the closed forms of the frozen backbone say."""
    return [
        pytest.param(config, kinds, id=f"{name}-{'+'.join(kinds)}")
        for name, config in MODELS.items()
        for kinds in several
        if set(kinds) <= set((sites := site_map(config)).kinds) and not (sites.relative and trained & set(kinds))
    ]


@pytest.mark.parametrize(
    ("config", "kinds"),
    with_kinds(
        ("q",), ("k",), ("v",), ("q", "v"), ("o",), ("up",), ("down",), ("attention",), ("ffn",), ("block",),
        ("bias",), ("norm",), ("q", "ffn"),
        trained={"q", "k", "bias"},
    ),
)  # fmt: skip
def test_backward_stops_at_the_lowest_adapted_site(config: dict[str, Any], kinds: tuple[str, ...]) -> None:
    run = Run(config)
    run.at(1, kinds)
    _, through = flops(run, 2, 40)
    assert backward_flops(run.sites, 40, 1, kinds=kinds) == pytest.approx(through, rel=0.02)


def test_the_head_alone_needs_no_backward(config: dict[str, Any]) -> None:
    sites = site_map(config)
    assert backward_flops(sites, 32, sites.layers) == activation_bytes(sites, 32, 4, sites.layers, 4) == 0


def kept(run: Run, batch: int, tokens: int, **where: Any) -> int:
    """Bytes that autograd keeps, storages counted once, parameters and buffers left out."""
    own = [*run.model.parameters(), *run.model.buffers()]
    _, found = kept_for(own, lambda: run.forward(batch, tokens, **where))
    # What this test's own loss keeps is not the backbone's.
    width = 1 if run.sites.head is not None and run.sites.head.pooling == "pooler" else tokens
    return found - batch * width * run.sites.d_model * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("config", "attention"),
    [
        pytest.param(config, attention, id=f"{name}-{attention}")
        for name, config in MODELS.items()
        for attention in ("eager", "sdpa")
        if attention == "eager" or config["model_type"] not in ("deberta-v2", "gemma2")  # they have no sdpa
    ],
)
def test_kept_activations_are_what_autograd_keeps(config: dict[str, Any], dtype: torch.dtype, attention: str) -> None:
    run = Run(config, dtype=dtype, attention=attention)
    how: Any = {"attention": "eager" if attention == "eager" else "fused"}
    for batch, tokens in ((2, 32), (6, 96)):
        real = kept(run, batch, tokens, grad_at_input=True)
        assert activation_bytes(run.sites, tokens, batch, -1, dtype.itemsize, **how) == pytest.approx(real, rel=0.05)
    run.model.requires_grad_(True)
    real = kept(run, 6, 96)
    full = activation_bytes(run.sites, 96, 6, -1, dtype.itemsize, full=True, **how)
    assert full == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    ("config", "kinds"),
    with_kinds(("q", "k", "v"), ("o",), ("up",), ("down",), ("ffn",), ("block",), trained={"q"}),
)
def test_nothing_is_kept_below_the_lowest_adapted_site(config: dict[str, Any], kinds: tuple[str, ...]) -> None:
    run = Run(config)
    run.at(1, kinds)
    real = kept(run, 4, 64)
    assert activation_bytes(run.sites, 64, 4, 1, 4, kinds=kinds) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("name", [*ACTIVATION_TENSORS, "gelu", "gelu_pytorch_tanh", "silu", "relu", "tanh"])
def test_an_activation_function_keeps_what_the_table_says(name: str) -> None:
    x, held = torch.randn(7, 11, requires_grad=True) + 0, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        ACT2FN[name](x)
    assert len(held) == ACTIVATION_TENSORS.get(name, 1)


def test_weights_take_the_bytes_of_their_precision() -> None:
    llama = site_map({"model_type": "llama"})
    count = parameters(llama)
    assert count == 6_607_343_616
    assert model_bytes(llama) == 4 * count
    assert model_bytes(llama, "bfloat16") == 2 * count
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert model_bytes(llama, "nf4") == linears * 4.5 / 8 + 2 * (count - linears)
    assert model_bytes(llama, "nf4-dq") == pytest.approx(linears * 4.127 / 8 + 2 * (count - linears), rel=1e-4)
    with pytest.raises(ValueError, match='Did you mean "bfloat16"'):
        model_bytes(llama, "bfloat")


def test_costs_grow_as_they_must(config: dict[str, Any]) -> None:
    sites: SiteMap = site_map(config)
    backward = [backward_flops(sites, 64, layer) for layer in range(-1, sites.layers + 1)]
    assert backward == sorted(backward, reverse=True)
    held = [activation_bytes(sites, 64, 2, layer, 2) for layer in range(-1, sites.layers + 1)]
    assert held == sorted(held, reverse=True)
    assert working_bytes(sites, 64, 4, 2) == 2 * working_bytes(sites, 64, 2, 2)
    with pytest.raises(ValueError, match="lowest_layer"):
        backward_flops(sites, 64, sites.layers + 1)
