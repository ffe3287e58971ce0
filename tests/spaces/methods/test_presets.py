"""Presets by their papers: what the published designs are, what they count, and where a search starts with them."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from plain import design

from peftscape.spaces.design import Design
from peftscape.spaces.plan_input import read_design
from peftscape.spaces.presets import DESIGNS, designs, preset_names, textbook
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import site_map
from peftscape.spaces.space_file import read_space

D, F, L, M = 768, 3072, 12, 48
ROBERTA = site_map(
    {
        "model_type": "roberta", "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 12,
        "intermediate_size": F, "vocab_size": 50265, "max_position_embeddings": 514,
    }
)  # fmt: skip
ONE = 2 * D * M + M + D  # an adapter of reduction 16
LORA = 2 * 8 * 2 * D  # rank 8 on two linears


def mlp(length: int, hidden: int) -> int:
    return length * D + (D * hidden + hidden) + (hidden + 1) * 2 * L * D


COUNTS = {
    "houlsby": 2 * L * (2 * D * 64 + 64 + D),
    "houlsby_ln": 2 * L * (2 * D * 64 + 64 + D) + 4 * D * L + 2 * D,  # and the embeddings' LayerNorm
    "pfeiffer": L * ONE,
    "residual": L * (2 * D * 64 + 64 + 3 * D),
    "adapterdrop": (L - 5) * ONE,
    "adapterdrop_robust": L * ONE,
    "compacter": 2 * L * (2 * (D + 24) + 24 + D) + 4**3,
    "compacter_pp": L * (2 * (D + 24) + 24 + D) + 4**3,
    # Twelve side layers of 96, thirteen projections down to them and one up, with biases.
    "lst": L * (12 * 96**2 + 2 * 96 + 1) + 13 * (D * 96 + 96) + 96 + D * 96 + D,
    "prefix_mlp": mlp(20, 512),
    "hadamard": 2 * D * L + 2 * D * L,
    "mam": L * (2 * D * 512 + 512 + D) + mlp(30, 512),
    "mam_small": L * (2 * D * 16 + 16 + D) + 2 * L * 16 * D,
    # Gates: a vector and a number for the prefix, the adapter and each of the two linears of a layer.
    "unipelt": 2 * L * 10 * D + L * ONE + L * LORA + 4 * L * (D + 1),
    "s4": 10 * (2 * D * 16 + 16 + D) + 4 * LORA + 2 * D * (4 * 16 + 4 * 10 + 2 * 11) + 6 * (7 * D + F),
    "adamix": 4 * L * (2 * D * 16 + 16 + D),
    "sparse_adapter": L * (ONE - 2 * round(0.8 * D * M)),
    "sparse_adapter_large": L * (2 * D * M + 4 * M + D),
    # One prototype, and a score for each of its matrices' entries in every layer.
    "propetl": ONE + L * 2 * D * M,
    "propetl_lora": 2 * (1 + L) * 32 * 2 * D,
    "propetl_prefix": (1 + L) * 2 * 64 * D,
    # Twelve heads of 64 on q, v and o, and the LoRA that they share.
    "kernel_mix": L * (12 * (1 + 2 + 2) * (D + 64) + (2 + 4 + 4) * 2 * D),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_design_counts_what_its_paper_says(name: str) -> None:
    assert adapter_size(textbook()[name], ROBERTA) == COUNTS[name]


def test_every_further_design_is_counted_here() -> None:
    assert set(designs("published")) <= set(COUNTS)
    assert len(textbook()) == sum(len(designs(file)) for file in DESIGNS), "no name stands twice"
    assert not set(preset_names()) & set(DESIGNS)


@pytest.mark.parametrize("name", textbook())
def test_a_published_design_has_a_name_for_plans(name: str) -> None:
    found = read_design(name)
    assert isinstance(found, Design)
    assert found.digest == textbook()[name].digest
    assert found.check(ROBERTA) == []


def parts(of: Design) -> list[tuple[Any, ...]]:
    return [(p.method.name, p.sites, p.layers, p.gate) for p in of.placements]


def test_s4_is_a_spindle_with_a_strategy_for_each_group() -> None:
    """G1 adapter and LoRA, G2 adapter and prefix, G3 adapter, prefix and BitFit, G4 prefix, BitFit and LoRA."""
    groups: dict[tuple[int, ...], set[str]]
    groups = {(0, 1): {"sequential_adapter", "lora"}, (2, 3, 4, 5): {"sequential_adapter", "prefix_tuning"}}
    groups |= {
        (6, 7, 8, 9): {"sequential_adapter", "prefix_tuning", "bitfit"},
        (10, 11): {"prefix_tuning", "bitfit", "lora"},
    }
    sizes = []
    for layers, methods in groups.items():
        for layer in layers:
            here = [p for p in textbook()["s4"].placements if p.layers == "all" or layer in p.layers]
            assert {p.method.name for p in here} == methods
            sizes.append(
                sum(t.size for p in here for _, site, _, t in p.tensors(ROBERTA) if site.layer == layer and t.trains)
            )
    assert max(sizes) / min(sizes) < 1.02, "as many parameters in every layer"
    assert sum(sizes) / ROBERTA.parameters == pytest.approx(0.005, rel=0.1)


def test_unipelt_gates_all_three_and_mam_is_as_he_et_al_set_it() -> None:
    assert [p.gate for p in textbook()["unipelt"].placements] == [True] * 3
    knobs = [p.method.knobs() for p in textbook()["mam"].placements]
    assert (knobs[0]["size"], knobs[0]["scale"], knobs[1]["length"]) == (512, 4.0, 30)
    small = [p.method.knobs() for p in textbook()["mam_small"].placements]
    assert (small[0]["size"], small[0]["scale"], small[1]["length"]) == (16, 2.0, 16)


def held(space: str) -> set[str]:
    """The published designs that a search of this space starts with on a RoBERTa."""
    found, of = set(), read_space(space, ROBERTA)
    for name, design_of in textbook().items():
        try:
            params = of.params(design_of)
        except ValueError:
            continue
        assert of.suggest(optuna.trial.FixedTrial(params)).digest == design_of.digest
        found.add(name)
    return found


def test_a_search_starts_with_the_published_designs_that_its_space_has() -> None:
    assert held("unified") >= set(designs("textbook"))
    assert held("composed") >= {
        "head_only", "houlsby", "pfeiffer", "adapterdrop", "adapterdrop_robust", "parallel", "mam", "mam_small",
        "unipelt", "prefix", "prefix_mlp", "lora", "propetl", "propetl_lora", "propetl_prefix",
    }  # fmt: skip
    assert held("lora") == {"lora", "lora_all_linears"}


def test_houlsby_with_a_layernorm_a_layer_is_the_surveys_count() -> None:
    of = design({"method": "sequential_adapter", "size": 200}, {"method": "ln_tuning", "after": "attention"})
    assert adapter_size(of, ROBERTA) == 7_414_464
