"""Adapters against formulas straight from their papers, written on transformers' own models."""

from __future__ import annotations

import math
from collections.abc import Callable

import peft
import pytest
import torch
from contract import CONFIGS, SITES, lane, logits
from peft_pair import Pair, close, tensor_grad
from plain import Change, Params, assert_equals_plain, design, on_output
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear
from transformers import Gemma3TextConfig

from peftscape.search.backbone import Backbone
from peftscape.search.head import Head
from peftscape.search.lane import new_lane
from peftscape.spaces.design import Design

families = pytest.mark.parametrize("family", CONFIGS)
#: On every family layer 1 is the highest of two.
ABOVE = {"bert": "encoder.layer.1", "gpt2": "h.1", "llama": "layers.1"}


def tensors(params: Params, path: str) -> dict[str, Tensor]:
    """The tensors of the placement at a site, by name."""
    return {key.rsplit("/", 1)[1]: value for key, value in params.items() if f"/{path}/" in key}


def at_sites(family: str, kind: str, formula: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]) -> Change:
    """The formula of (tensors, x, y) at the sites of a kind that have tensors; x is what the site's module reads."""

    def change(model: nn.Module, params: Params) -> None:
        for site in SITES[family].sites:
            t = tensors(params, site.path) if site.kind == kind else {}
            if t:
                on_output(model.get_submodule(site.path), lambda x, y, t=t: formula(t, x, y))  # type: ignore[misc]

    return change


@families
def test_a_residual_adapter_is_its_formula(family: str) -> None:
    """x + W_up ReLU(W_down LN(x)) at the block's end (arXiv:2004.03829, sec. 3.1)."""

    def formula(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        read = layer_norm(y, y.shape[-1:], t["gain"], t["shift"])
        return y + linear(torch.relu(linear(read, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    of = design({"method": "residual_adapter", "size": 5})
    assert_equals_plain(of, family, at_sites(family, "block", formula))


def pfeiffer(family: str) -> Change:
    """Before the last LayerNorm of a post-norm layer, and where nothing follows the sum in a pre-norm one."""

    def change(model: nn.Module, params: Params) -> None:
        for layer in range(2):
            if family == "bert":
                place = model.get_submodule(f"encoder.layer.{layer}.output")
                place.forward = _bert_output(place, tensors(params, f"encoder.layer.{layer}.output.LayerNorm"))  # type: ignore[assignment]
            else:
                path = f"{ABOVE[family][:-1]}{layer}"
                t = tensors(params, path)
                on_output(model.get_submodule(path), lambda x, y, t=t: y + _change(t, y))  # type: ignore[misc]

    return change


def _change(t: dict[str, Tensor], x: Tensor) -> Tensor:
    return linear(torch.relu(linear(x, t["down"], t["down_bias"])), t["up"], t["up_bias"])


def _bert_output(module: nn.Module, t: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def forward(hidden: Tensor, residual: Tensor) -> Tensor:
        h = module.dense(hidden)  # type: ignore[operator]
        read = module.LayerNorm(h + residual)  # type: ignore[operator]
        out: Tensor = module.LayerNorm(h + _change(t, read) + residual)  # type: ignore[operator]
        return out

    return forward


@families
def test_a_pfeiffer_adapter_reads_the_normed_sum_and_adds_before_the_norm(family: str) -> None:
    assert_equals_plain(design({"method": "pfeiffer_adapter", "size": 6}), family, pfeiffer(family))


def test_a_houlsby_adapter_reads_the_sub_layers_output_alone() -> None:
    """Houlsby's and Pfeiffer's forms are two: what one gives the other does not."""

    def formula(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y + linear(gelu(linear(y, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    def both(model: nn.Module, params: Params) -> None:
        for kind in ("attention", "ffn"):
            at_sites("bert", kind, formula)(model, {k: v for k, v in params.items() if k.startswith(f"0/{kind}/")})

    assert_equals_plain(design({"method": "sequential_adapter", "size": 6}), "bert", both)


@pytest.mark.parametrize(("family", "kind"), [("bert", "norm"), ("gpt2", "block"), ("llama", "block")])
def test_a_pfeiffer_adapter_sits_once_a_layer_where_its_backbone_sums(family: str, kind: str) -> None:
    [placement] = design({"method": "pfeiffer_adapter"}).placements
    assert [(s.kind, s.layer) for s in placement.where(SITES[family])] == [(kind, 0), (kind, 1)]
    other = design({"method": "pfeiffer_adapter", "sites": ["block" if kind == "norm" else "norm"]})
    assert other.check(SITES[family]) == [
        f"placements[0].sites: pfeiffer_adapter takes no {other.placements[0].sites[0]} of this {family}"
    ]


# -- prefix tuning with the MLP

LENGTH, HIDDEN = 4, 12


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_prefix_tuning_with_an_mlp_equals_peft(family: str) -> None:
    pair = Pair(
        family,
        design({"method": "prefix_tuning_mlp", "length": LENGTH, "hidden": HIDDEN}),
        peft.PrefixTuningConfig(
            task_type="SEQ_CLS", num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=HIDDEN
        ),
        typed=family == "bert",
    )
    encoder = pair.model.prompt_encoder.default
    paths = [s.path for s in pair.backbone.sites.sites if s.kind == "kv"]
    ups = [pair.ours(f"kv/{path}", "up") for path in paths]  # one row of peft's output: keys, values, next layer ...
    biases = [pair.ours(f"kv/{path}", "up_bias") for path in paths]
    theirs = [encoder.embedding.weight, encoder.transform[0].weight, encoder.transform[0].bias]
    ours = [pair.lane.params[f"0/{name}"] for name in ("embedding", "down", "down_bias")]
    with torch.no_grad():
        for value, own in zip(theirs, ours, strict=True):
            value.copy_(own)
        encoder.transform[2].weight.copy_(torch.cat(ups))
        encoder.transform[2].bias.copy_(torch.cat(biases))
    pair.check_outputs()
    pair.check_head()
    for value, own in zip(theirs, ours, strict=True):
        close(own.grad, value.grad)
    close(torch.cat([tensor_grad(up) for up in ups]), encoder.transform[2].weight.grad)
    close(torch.cat([tensor_grad(b) for b in biases]), encoder.transform[2].bias.grad)


@families
def test_the_mlp_of_a_prefix_is_gone_after_training(family: str) -> None:
    """What is kept is a plain prefix, and gives what the MLP gave."""
    from contract import cohort

    of = design({"method": "prefix_tuning_mlp", "length": LENGTH, "hidden": HIDDEN})
    own, shared = lane(of, 1, family, steps=3), cohort(family)
    shared.admit(own)
    untrained = [{n: v.clone() for n, v in row.items()} for row in _seen(own.design, own, training=False)]
    for row, drawn in zip(untrained, _seen(own.design, own, training=True), strict=True):
        assert all(torch.equal(row[name], drawn[name]) for name in row), "before the first step as well"
    for _ in range(3):
        shared.step()
    shared.close()
    kept = own.adapter()
    assert {key.rsplit("/", 1)[1] for key in kept if key.startswith("0/")} == {"keys", "values"}
    plain = lane(design({"method": "prefix_tuning", "length": LENGTH}), 1, family)
    with torch.no_grad():
        for key, value in plain.params.items():
            value.copy_(kept[key])
    assert torch.equal(logits(own, family), logits(plain, family))
    for row, made in zip(own.own[0], _seen(own.design, own, training=True), strict=True):
        torch.testing.assert_close(row["keys"], made["keys"], rtol=1e-12, atol=1e-14)


def _seen(of: Design, own: object, *, training: bool) -> list[dict[str, Tensor]]:
    own.unfold(training)  # type: ignore[attr-defined]
    return [dict(row) for row in own.seen[0]]  # type: ignore[attr-defined]


# -- counts

D, L = 768, 12
ROBERTA = {
    "model_type": "roberta", "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 12,
    "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514,
}  # fmt: skip
M, N, HID = 48, 20, 512


@pytest.mark.parametrize(
    ("placement", "trained", "deployed"),
    [
        ({"method": "sequential_adapter", "size": M}, 2 * L * (2 * D * M + M + D), None),
        ({"method": "pfeiffer_adapter", "size": M}, L * (2 * D * M + M + D), None),
        ({"method": "residual_adapter", "size": M}, L * (2 * D * M + M + 3 * D), None),
        ({"method": "parallel_adapter", "size": M}, L * (2 * D * M + M + D), None),
        # AdapterDrop: no adapters in the first five layers.
        ({"method": "pfeiffer_adapter", "size": M, "layers": "5-11"}, (L - 5) * (2 * D * M + M + D), None),
        (
            {"method": "prefix_tuning_mlp", "length": N, "hidden": HID},
            N * D + (D * HID + HID) + (HID + 1) * 2 * L * D,
            2 * L * N * D,
        ),
        ({"method": "tiny_attention", "size": 2}, L * 4 * D * 2, None),
        ({"method": "adamix", "size": 16}, 4 * L * (2 * D * 16 + 16 + D), L * (2 * D * 16 + 16 + D)),
    ],
)
def test_counts_are_those_of_the_papers(placement: dict[str, object], trained: int, deployed: int | None) -> None:
    from peftscape.spaces.price import adapter_size
    from peftscape.spaces.sites import site_map

    of, sites = design(placement), site_map(ROBERTA)
    assert adapter_size(of, sites) == trained
    kept = sum(t.size for p in of.placements for _, _, _, t in p.tensors(sites) if t.deployed)
    assert kept == (trained if deployed is None else deployed)
    stored = sum(t.size for p in of.placements for _, _, _, t in p.tensors(sites) if t.stored)
    assert stored == kept


@families
def test_a_tiny_attention_is_its_formula(family: str) -> None:
    """One head on the attention's output, of the text alone (arXiv:2211.01979, sec. 2)."""

    def formula(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        query, key, value = (linear(y, t[name]) for name in ("query", "key", "value"))
        scores = query @ key.mT / math.sqrt(len(t["query"]))
        if SITES[family].causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        return y + linear(scores.softmax(-1) @ value, t["out"])

    of = design({"method": "tiny_attention", "size": 3})
    assert_equals_plain(of, family, at_sites(family, "attention", formula))


def test_a_prompt_starts_at_what_the_embedding_module_gives() -> None:
    """Gemma 3's multiplies by sqrt(d)."""
    shape = {k: v for k, v in CONFIGS["llama"].to_dict().items() if k.endswith(("_size", "_layers", "_heads"))}
    base = Backbone.from_config(Gemma3TextConfig(**shape, head_dim=8), dtype="float32")
    on_top = Head(base, kind="mean", outputs=2)
    own = new_lane(design({"method": "prompt_tuning", "length": 5}), seed=0, steps=1, backbone=base, head=on_top)
    [prompt] = own.own[0][0].values()
    with torch.no_grad():
        words = base.embedding(torch.arange(shape["vocab_size"]))
    assert all(bool((words == row).all(dim=1).any()) for row in prompt)
