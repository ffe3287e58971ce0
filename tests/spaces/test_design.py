"""Designs as people write them: one canonical form, one digest, all mistakes at once with the nearest names."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from peftscape.spaces.design import Design
from peftscape.spaces.methods import methods
from peftscape.spaces.sites import site_map
from peftscape.spaces.words import InputError

SITES = site_map(
    {
        "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512,
    }
)  # fmt: skip
LLAMA = site_map(
    {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 99,
    }
)  # fmt: skip
WRITTEN = {
    "placements": [
        {"method": "lora", "sites": ["q", "v"], "layers": "all", "rank": 8, "alpha": 16},
        {
            "method": "sequential_adapter", "sites": ["ffn"], "layers": "3-5", "size": 64,
            "mask": {"sparsity": 0.5, "score": "random"},
        },
        {"method": "prefix_tuning", "layers": [0, 1, 2], "length": 8},
    ],
    "training": {"lr": 0.001, "epochs": 2},
}  # fmt: skip


def digest(**placement: Any) -> str:
    return Design.from_json({"placements": [{"method": "lora", **placement}]}).digest


def errors(value: Any) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        Design.from_json(value)
    assert str(error.value) == "\n".join(
        [f"design: {len(error.value.errors)} error{'s' if len(error.value.errors) > 1 else ''}"]
        + [f"  {line}" for line in error.value.errors]
    )
    return error.value.errors


# -- one form


def test_the_issues_example_is_a_design_and_comes_back() -> None:
    design = Design.from_json(WRITTEN)
    assert design.check(SITES) == []
    canonical = design.json()
    assert Design.from_json(canonical) == design
    assert Design.from_json(json.loads(json.dumps(canonical))).json() == canonical
    assert canonical["placements"][1]["layers"] == [3, 4, 5]
    assert canonical["placements"][0]["alpha"] == 16.0
    assert canonical["placements"][0] == {
        "method": "lora", "sites": ["q", "v"], "layers": "all", "rank": 8, "alpha": 16.0, "scaling": "standard",
        "rate": 1.0, "freeze_a": False,
    }  # fmt: skip
    assert design.label == "lora r8 q,v + sequential_adapter m64 ffn 3-5 50% random-masked + prefix_tuning l8 0-2"


def test_canonical_json_has_every_knob_so_that_a_new_default_changes_no_old_design() -> None:
    for name, kind in methods().items():
        row = Design.from_json({"placements": [{"method": name}]}).json()["placements"][0]
        assert set(row) == {"method", "sites", "layers", *kind().knobs()}
    training = Design.from_json({}).json()["training"]
    assert set(training) == {"lr", "weight_decay", "warmup", "decay", "clip"}


def test_a_digest_is_stable_under_what_means_the_same() -> None:
    assert digest(rank=4, layers="0-2") == digest(layers=[0, 1, 2], rank=4) == digest(rank=4, layers=[2, 0, 1, 1])
    assert digest(layers="0,2-3") == digest(layers=[3, 2, 0])
    assert digest(layers=3) == digest(layers=[3]) == digest(layers="3")
    assert digest() == digest(rank=8, alpha=16, sites=["q", "v"], layers="all")
    assert digest(alpha=16) == digest(alpha=16.0)
    assert digest(sites="q") == digest(sites=["q"]) == digest(sites=["q", "q"])
    assert digest(mask={"sparsity": 0}) == digest(mask=None) == digest()
    whole = Design.from_json({"placements": [], "training": {"lr": 1}})
    assert whole.digest == Design.from_json({"training": {"lr": 1.0}}).digest


def test_a_digest_tells_designs_apart() -> None:
    rows: list[dict[str, Any]] = [
        {}, {"rank": 4}, {"alpha": 8}, {"sites": ["q"]}, {"layers": [0]}, {"mask": {"sparsity": 0.5}},
        {"mask": {"sparsity": 0.5, "score": "snip"}},
    ]  # fmt: skip
    found = {digest(**row) for row in rows}
    assert len(found) == len(rows)
    two = [{"method": "lora"}, {"method": "bitfit"}]
    assert Design.from_json({"placements": two}).digest != Design.from_json({"placements": two[::-1]}).digest


def test_a_digest_is_the_same_in_another_process() -> None:
    code = f"from peftscape.spaces.design import Design; print(Design.from_json({WRITTEN!r}).digest)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert ran.stdout.strip() == Design.from_json(WRITTEN).digest
    assert len(ran.stdout.strip()) == 16


def test_designs_can_be_keys() -> None:
    assert len({Design.from_json(WRITTEN), Design.from_json(Design.from_json(WRITTEN).json())}) == 1


# -- mistakes


def test_all_mistakes_of_a_design_come_at_once_with_the_nearest_names() -> None:
    found = errors(
        {
            "placement": [],
            "placements": [
                {"method": "prefix"},
                {"method": "lora", "rnk": 4, "sites": ["q", "atention"], "layers": "1-x"},
                {"method": "lora", "rank": "eight", "alpha": -1},
                {"method": "sequential_adapter", "activation": "rellu", "mask": {"sparsity": 1.0}},
                {"method": "ia3", "mask": {"sparsity": 0.5}},
                {"method": "lora", "mask": {"sparsity": 0.5, "scor": "snip"}},
                {"method": "lora", "mask": {"sparsity": 0.5, "score": "snipp"}},
                {"sites": ["q"]},
            ],
            "training": {"lr": 0, "wramup": 0.1, "decay": 1.5},
        }
    )  # fmt: skip
    assert found == (
        'placement: no such key. Did you mean "placements"?',
        'placements[0].method: no method "prefix". Did you mean "prefix_tuning"?',
        'placements[1].rnk: no such key. Did you mean "rank"?',
        'placements[1].sites: lora cannot adapt "atention". Did you mean "gate"?',
        'placements[1].layers: \'1-x\' is not "all", a list of numbers, or like "0-5"',
        "placements[2].rank: int expected, not 'eight'",
        "placements[2].alpha: -1.0 is not larger than 0",
        "placements[3].activation: 'rellu' is not one of relu, gelu, silu, tanh. Did you mean \"relu\"?",
        "placements[3].mask.sparsity: the zeroed fraction, from 0 to below 1, was expected, not 1.0",
        "placements[4].mask: ia3 has no matrix to mask",
        'placements[5].mask.scor: no such key. Did you mean "score"?',
        'placements[6].mask.score: no score "snipp". Did you mean "snip"?',
        'placements[7]: a table with a "method" was expected',
        'training.wramup: no such key. Did you mean "warmup"?',
        "training.lr: a number above 0 was expected, not 0",
        "training.decay: a fraction of the steps was expected, not 1.5",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a design is a table with placements and training, not []"),
        ({"placements": {}}, "placements: a list of tables was expected"),
        ({"training": 3}, "training: a table was expected"),
        ({"placements": [{"method": "lora", "layers": []}]}, "placements[0].layers: no layer is named"),
        (
            {"placements": [{"method": "lora", "sites": []}]},
            "placements[0].sites: a list of names was expected, not []",
        ),
        ({"placements": [{"method": "lora", "rank": 0}]}, "placements[0].rank: 0 is not larger than 0"),
        ({"placements": [{"method": "lora", "rank": True}]}, "placements[0].rank: int expected, not True"),
        (
            {"placements": [{"method": "head_only"}, {"method": "lora"}]},
            "placements: head_only stands alone, it cannot be combined",
        ),
    ],
)
def test_a_mistake_in_a_design_is_named(value: Any, message: str) -> None:
    assert errors(value) == (message,)


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        (
            [{"method": "lora", "rank": 2048}],
            "placements[0].rank: 2048 is larger than the linear it adapts (q: 384 x 384)",
        ),
        (
            [{"method": "sequential_adapter", "size": 400}],
            "placements[0].size: 400 is wider than the attention output (384)",
        ),
        ([{"method": "lora", "sites": ["gate"]}], "placements[0].sites: gate: this model has no gate linear"),
        ([{"method": "lora", "layers": "4-7"}], "placements[0].layers: [6, 7] of a backbone with layers 0 to 5"),
        (
            [{"method": "prefix_tuning", "length": 4}, {"method": "prefix_tuning", "length": 2, "layers": [3]}],
            "placements: two prefixes on one layer; use one of their joint length",
        ),
        (
            [{"method": "prompt_tuning", "length": 200}, {"method": "prefix_tuning", "length": 100}],
            "prompts and prefixes take 300 of the backbone's 512 positions",
        ),
    ],
)
def test_what_a_backbone_cannot_do_is_named(placements: list[dict[str, Any]], message: str) -> None:
    assert message in Design.from_json({"placements": placements}).check(SITES)


def test_all_that_a_backbone_cannot_do_comes_at_once() -> None:
    design = Design.from_json(
        {
            "placements": [
                {"method": "bitfit"},
                {"method": "lora", "rank": 40, "sites": ["q", "k"]},
                {"method": "lora", "layers": [9]},
            ]
        }
    )
    assert design.check(LLAMA) == [
        "placements[0].sites: bias: this model has no biases",
        "placements[1].rank: 40 is larger than the linear it adapts (k: 64 x 32)",
        "placements[2].layers: [9] of a backbone with layers 0 to 1",
    ]


# -- what a design says of itself


@pytest.mark.parametrize(
    ("placements", "lowest"),
    [
        ([], 6),
        ([{"method": "lora", "layers": [4, 2]}], 2),
        ([{"method": "lora", "layers": [4]}, {"method": "ia3", "layers": [3]}], 3),
        ([{"method": "prompt_tuning"}], -1),
        ([{"method": "bitfit"}], -1),  # the embeddings' LayerNorm
        ([{"method": "bitfit", "layers": "0-5"}], 0),
        ([{"method": "full_finetuning"}], -1),
    ],
)
def test_the_lowest_adapted_layer(placements: list[dict[str, Any]], lowest: int) -> None:
    assert Design.from_json({"placements": placements}).lowest_layer(SITES) == lowest


def test_prompts_and_prefixes_move_the_text() -> None:
    design = Design.from_json(
        {"placements": [{"method": "prompt_tuning", "length": 3}, {"method": "prefix_tuning", "length": 5}]}
    )
    assert (design.prompt_length(), design.position_shift()) == (3, 8)
    kept = Design.from_json({"placements": [{"method": "prefix_tuning", "length": 5, "positions": "keep"}]})
    assert kept.position_shift() == 0
