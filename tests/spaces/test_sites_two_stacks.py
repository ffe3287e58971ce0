"""The site maps of encoder-decoders, held against the models that transformers builds from the configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from two_stacks import CONFIGS

from peftscape.search.backbone import Backbone
from peftscape.spaces.design import Design
from peftscape.spaces.encoder_decoders import ENCODER_DECODERS
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import LINEARS, SiteError, SiteMap, site_map
from peftscape.spaces.space_file import read_space

families = pytest.mark.parametrize("family", ["t5", "t5-gated", "bart", "mbart"])


def maps(family: str) -> tuple[SiteMap, Any]:
    with torch.device("meta"):
        return site_map(CONFIGS[family].to_dict()), AutoModel.from_config(CONFIGS[family])


@families
def test_every_site_is_the_module_that_it_names(family: str) -> None:
    sites, model = maps(family)
    assert sites.parameters == sum(p.numel() for p in model.parameters())
    assert sites.prefix == model.base_model_prefix
    for site in sites.sites:
        module = model.get_submodule(site.path)
        assert site.source is None or model.get_submodule(site.source) is not None
        if site.kind in LINEARS:
            assert module.weight.shape == (site.d_out, site.d_in)
        if site.kind in ("block", "kv", "q"):
            stack, _, rest = site.path.partition(".")
            own = next(int(part) for part in rest.split(".") if part.isdigit())
            assert stack == ("encoder" if site.stack == "encoder" else "decoder")
            assert site.layer == own + (0 if stack == "encoder" else sites.layers - sites.decoder_layers)
    biases = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    norms = {name for name, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    assert {s.path for s in sites.sites if s.kind == "bias"} == biases
    assert {s.path for s in sites.sites if s.kind == "norm"} == norms
    assert ("bias" in sites.refused) == (not biases)


@families
def test_attention_calls_the_interface_at_kv_sites_with_the_widths_they_say(family: str) -> None:
    backbone = Backbone.from_config(CONFIGS[family])
    seen = {}
    for site in backbone.sites.sites:
        if site.kind == "kv":
            module = backbone.model.get_submodule(site.path)
            keys = next(m for name, m in module.named_modules() if name in ("k", "k_proj"))
            seen[site.path] = (keys.out_features, site.d_out)
    ids = torch.randint(4, 60, (2, 5))
    backbone.model(input_ids=ids, decoder_input_ids=ids)
    layers, decoder = backbone.sites.layers, backbone.sites.decoder_layers
    assert len(seen) == layers + decoder
    assert sum(backbone.attending.calls.values()) == layers + decoder
    assert all(built == said for built, said in seen.values())


@families
def test_the_head_is_that_of_the_classification_class(family: str) -> None:
    sites, _ = maps(family)
    with torch.device("meta"):
        built = AutoModelForSequenceClassification.from_config(CONFIGS[family])
    own = {n: tuple(p.shape) for n, p in built.named_parameters() if not n.startswith(f"{sites.prefix}.")}
    assert sites.head is not None
    assert sites.head.tensors(built.config.num_labels) == own


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_missing_keys_take_the_defaults_of_the_configuration_class(family: str) -> None:
    assert site_map({"model_type": family}) == site_map(AutoConfig.for_model(family).to_dict())


def test_a_design_says_which_stack() -> None:
    sites, _ = maps("t5")
    counts = {}
    for names in (["q"], ["encoder.q"], ["decoder.q"], ["cross.q"], ["cross.q", "encoder.q"]):
        design = Design.from_json({"placements": [{"method": "lora", "rank": 1, "sites": names}]})
        assert design.check(sites) == []
        assert design.json()["placements"][0]["sites"] == names
        counts[",".join(names)] = adapter_size(design, sites) // (32 + 24)  # d_model + heads x d_kv
    assert counts == {"q": 6, "encoder.q": 2, "decoder.q": 2, "cross.q": 2, "cross.q,encoder.q": 4}
    assert [s.layer for s in sites.select(["cross.q"], range(4))] == [2, 3]


def test_a_stack_that_is_not_there_is_named_in_the_error() -> None:
    t5, bert = maps("t5")[0], site_map({"model_type": "bert"})
    crossed = Design.from_json({"placements": [{"method": "lora", "sites": ["cross.q"]}]})
    assert crossed.check(bert)[0].startswith('placements[0].sites: this bert has no "cross.q". There are: attention')
    prompted = Design.from_json({"placements": [{"method": "bitfit", "sites": ["cross.bias"]}]})
    assert prompted.check(t5) == ["placements[0].sites: cross.bias: this model has no biases"]
    with pytest.raises(SiteError, match=r'no sites "cross.qq"\. Did you mean "cross.q"'):
        t5.select(["cross.qq"], [2])
    with pytest.raises(SiteError, match="unlike heads"):
        site_map({**CONFIGS["bart"].to_dict(), "decoder_attention_heads": 2})
    with pytest.raises(SiteError, match="mapped from its configuration"):
        site_map(CONFIGS["t5"].to_dict(), {"q": "encoder.block.{layer}.layer.0.SelfAttention.q"})


def test_a_space_chooses_among_stacks_and_drops_what_is_not_there() -> None:
    sites = {"choice": [["q"], ["cross.q"], ["decoder.k", "gate"]]}
    table = {"slots": [{"name": "weights", "options": [{"method": "lora", "sites": sites, "layers": ["all"]}]}]}
    space = read_space(table, maps("t5")[0])
    assert [o.sites.values for slot in space.slots for o in slot.options] == [(("q",), ("cross.q",), ("decoder.k",))]
    assert space.dropped == ("lora on gate: this model has no gate linear",)
