"""What `check` tells of a search: figures that can be worked out by hand from the model's sizes."""

from __future__ import annotations

import json

import pytest

from peftscape.search.check import check
from peftscape.search.config_file import DEFAULT, read_config

HEAD = 6 * 384 + 6  # trec6 on MiniLM
LAYERS = 6


def checked(*overrides, **tables):
    return check(read_config({**DEFAULT, **tables}, overrides))


def test_the_lora_space_on_minilm_by_hand():
    found = checked("space=lora")
    # Six layers give: all of them, the top or bottom 1 to 5, every second.
    assert found.designs == 4 * (1 + 5 + 5 + 1) * 9 * 4  # sites, layers, ranks, alphas
    assert found.continuous == 1  # the learning rate
    cheapest, dearest = found.cheapest.costs, found.dearest.costs
    assert cheapest.adapter == 2 * (384 + 384)  # rank 1 on q and v of one layer
    assert dearest.adapter == LAYERS * 256 * (4 * (384 + 384) + 2 * (384 + 1536))
    assert cheapest.head == dearest.head == HEAD
    assert found.outputs == 6


def test_empty_slots_make_the_head_alone_the_cheapest():
    found = checked()
    assert found.cheapest.design.placements == ()
    assert found.cheapest.costs.trainable == HEAD
    assert {p.method.name for p in found.dearest.design.placements} == {
        "lora", "sequential_adapter", "prefix_tuning", "bitfit"
    }  # fmt: skip


def test_the_ends_of_a_space_are_in_it():
    from peftscape.spaces.sites import site_map
    from peftscape.spaces.space_file import read_space

    config = read_config(DEFAULT)
    space = read_space("unified", site_map(config.model.path()))
    found = check(config)
    for end in (found.cheapest, found.dearest):
        assert space.params(end.design)
        assert end.design.check(space.sites) == []


@pytest.mark.parametrize(
    ("override", "examples"),
    [("search.epochs=1", 4871), ("search.epochs=0.5", 2436), ("search.examples=100", 100), ("name=a", 2 * 4871)],
)
def test_the_full_length_is_told_in_examples(override, examples):
    found = checked(override)
    assert (found.rows, found.examples) == (5371 - 500, examples)


def test_a_limit_below_the_head_is_an_error():
    [error] = checked("budget.trainable=2000").errors
    assert error == ("budget.trainable: 2,000 leaves no design; the cheapest trains 2,310 parameters (head: 2,310)")


def test_published_designs_over_the_limit_are_counted_out():
    found = checked("budget.trainable=20000")
    # LoRA r8 on q and v alone has 2 x 6 x 8 x 768 = 73,728; head_only, ia3 and bitfit are among the small ones.
    assert found.limit == 20000
    assert 3 <= found.within < found.textbook
    assert checked("budget.trainable=100%").within == found.textbook
    assert checked("budget.trainable=1%").limit == 227132  # of 22,713,216


def test_a_size_that_the_model_cannot_take_is_halved(tmp_path):
    # Two key-value heads of 8: LoRA on k and v has a rank of at most 16.
    config = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    option = {"method": "lora", "sites": ["k"], "layers": ["all"], "rank": {"ladder": [1, 256]}}
    space = {"slots": [{"name": "weights", "options": [option]}]}
    found = checked(model={"source": str(tmp_path)}, space=space)
    assert found.dearest.costs.adapter == 2 * 16 * (64 + 16)


def test_what_is_possible_alone_can_be_impossible_together(tmp_path):
    config = {"model_type": "bert", "max_position_embeddings": 64, "num_hidden_layers": 2, "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    slots = [
        {"name": name, "options": [{"method": name, "length": {"ladder": ends}}]}
        for name, ends in (("prefix_tuning", [16, 32]), ("prompt_tuning", [4, 8]))
    ]
    found = checked(model={"source": str(tmp_path)}, space={"slots": slots})
    # Virtual tokens may take half of the 64 positions: a prefix of 32 leaves no room for any prompt.
    assert [p.method.length for p in found.dearest.design.placements] == [16, 8]


def test_refused_sites_are_told(tmp_path):
    config = {"model_type": "deberta-v2", "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    found = checked(model={"source": str(tmp_path)})
    assert any(line.startswith("prefix_tuning on kv: ") for line in found.dropped)


def test_a_model_still_to_come_from_the_hub_has_no_costs_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = checked("model.source=some-body/some-model")
    assert found.errors == ()
    assert found.cheapest is None
    assert found.examples == 2 * 4871
    [note] = found.notes
    assert "not in the local hub cache" in note


def test_a_users_own_data_is_counted(tmp_path):
    rows = "".join(f"one two three {i},{'ab'[i % 2]}\n" for i in range(200))
    (tmp_path / "data.csv").write_text("text,label\n" + rows)
    found = checked(task={"path": str(tmp_path / "data.csv"), "test_size": 40, "validation_size": 32})
    assert (found.rows, found.outputs) == (200 - 40 - 32, 2)
    assert found.cheapest.costs.head == 2 * 385
    assert 5 <= found.tokens <= 6 + 2  # four words, a number that may be cut in pieces, [CLS] and [SEP]


def test_an_error_in_the_data_is_an_error(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\none,a\ntwo,a\nthree,a\n")
    assert checked(task={"path": str(tmp_path / "data.csv")}).errors


def test_the_findings_are_strict_json():
    found = checked("space=lora")
    value = json.loads(json.dumps(found.json(), allow_nan=False))
    assert value["designs"] == 1728
    assert value["cheapest"]["trainable"] == 2 * 768 + HEAD
    assert value["cheapest"]["design"]["placements"][0]["rank"] == 1
    assert value["errors"] == []
