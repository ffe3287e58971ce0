"""Mistakes in a space's file are named all at once, each with the nearest name."""

from __future__ import annotations

from typing import Any

import pytest

from peftscape.spaces.sites import site_map
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError

BERT = site_map(
    {
        "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512,
    }
)  # fmt: skip


def test_all_mistakes_of_a_space_come_at_once_with_the_nearest_names() -> None:
    table = {
        "nmae": "mine",
        "training": {"lr": {"log": [0.1, 0.01]}, "warmpu": 0.1},
        "slots": [
            {"name": "a", "optinal": True, "options": [{"method": "prefix"}]},
            {
                "name": "b",
                "options": [
                    {"method": "lora", "rnak": 4, "rank": {"lader": [1, 4]}, "sites": ["q", "dwon"], "layers": "tops"},
                    {"method": "lora", "rank": {"choice": [4, -2]}, "mask": {"sparsity": 1.5, "score": "randm"}},
                ],
            },
        ],
    }  # fmt: skip
    with pytest.raises(InputError) as error:
        read_space(table, BERT)
    found = "\n".join(error.value.errors)
    for part in (
        'nmae: no such key. Did you mean "name"?',
        'training.warmpu: no such key. Did you mean "warmup"?',
        "training.lr: log = [0.1, 0.01] is not a range",
        'slots[0].optinal: no such key. Did you mean "optional"?',
        'slots[0].options[0].method: no method "prefix". Did you mean "prefix_tuning"?',
        'slots[1].options[0].rnak: no such key. Did you mean "rank"?',
        'slots[1].options[0].rank: no domain "lader". Did you mean "ladder"?',
        'slots[1].options[0].sites: lora cannot adapt "dwon". Did you mean "down"?',
        'slots[1].options[0].layers: no choice of layers "tops". Did you mean "top"?',
        "slots[1].options[1].rank: -2 is below 0",
        "slots[1].options[1].mask.sparsity: the zeroed fraction, from 0 to below 1, not 1.5",
        'slots[1].options[1].mask.score: no score "randm". Did you mean "random"?',
    ):
        assert part in found
    assert len(error.value.errors) == 12
    assert str(error.value).startswith("space: 12 errors\n  ")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("unifed", 'no preset "unifed". Did you mean "unified"?'),
        ({}, "slots: a list of tables was expected"),
        ({"slots": [{"name": "a"}]}, "slots[0]: a table with name and options was expected"),
        ({"preset": "lorra"}, 'no preset "lorra". Did you mean "lora"?'),
        (
            {"layers": "bits", "slots": [{"name": "a", "options": [{"method": "lora", "layers": "all"}]}]},
            "slots[0].options[0].layers: the whole space shares its layers",
        ),
        (
            {"slots": [{"name": "a", "options": [{"method": "lora", "rank": {"ladder": [1, 3]}}]}]},
            "a ladder runs between powers of two, not from 1 to 3",
        ),
        (
            {"slots": [{"name": "a", "options": [{"method": "ia3", "mask": {"sparsity": 0.5}}]}]},
            "slots[0].options[0].mask: ia3 has no matrix to mask",
        ),
        (
            {"slots": [{"name": "a", "options": [{"method": "lora", "rank": {"int": [9, 2]}}]}]},
            "int = [9, 2] is not a range",
        ),
    ],
)
def test_a_mistake_in_a_space_is_named(table: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_space(table, BERT)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("rank", {"log": [1, 64]}, "int expected, not a float between 1 and 64"),
        ("rank", {"choice": [4, 8.5]}, "int expected, not 8.5"),
        ("rank", 2.0, "int expected, not 2.0"),
        ("rank", True, "int expected, not True"),
        ("rank", {"int": [-3, 2]}, "-3 is below 0"),
        ("alpha", {"choice": [1, "two"]}, "float expected, not 'two'"),
    ],
)
def test_a_number_of_the_wrong_kind_is_named(knob: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_space({"slots": [{"name": "a", "options": [{"method": "lora", knob: value}]}]}, BERT)
    assert error.value.errors == (f"slots[0].options[0].{knob}: {message}",)
