"""A search's configuration: what a file may say, what it says when it cannot be, and what the command line sets."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import get_args, get_type_hints

import pytest

from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings
from peftscape.search.config_file import DEFAULT, config_from_json, config_json, read_config
from peftscape.search.config_values import value_errors
from peftscape.search.samplers import SAMPLERS
from peftscape.search.task_config import TaskConfig
from peftscape.spaces.sites import site_map
from peftscape.spaces.words import InputError

TASK = {"task": {"name": "trec6"}}


def write(folder, text, name="search.toml"):
    path = folder / name
    path.write_text(text)
    return path


def errors(source, *overrides):
    with pytest.raises(InputError) as found:
        read_config(source, overrides)
    return list(found.value.errors)


def test_a_file_says_what_a_search_is(tmp_path):
    config = read_config(
        write(
            tmp_path,
            """
            space = "lora"
            [model]
            source = "minilm"
            head = "mean"
            [task]
            name = "rotten_tomatoes"
            max_train = 1000
            [search]
            objectives = "accuracy:max,peak_bytes:min"
            sampler = "nsga2"
            epochs = 3
            [budget]
            time = "1h30m"
            trainable = "2%"
            """,
            "tomatoes.toml",
        )
    )
    assert config.name == "tomatoes"  # the file's
    assert (config.model.head, config.model.dtype, config.model.max_length) == ("mean", "auto", 256)
    assert (config.task.name, config.task.max_train, config.task.metric) == ("rotten_tomatoes", 1000, "accuracy")
    assert (config.search.sampler, config.search.lanes, config.search.examples) == ("nsga2", 8, None)
    assert config.search.epochs == 3.0
    assert isinstance(config.search.epochs, float)
    assert (config.budget.time, config.budget.trials, config.budget.trainable) == ("1h30m", None, "2%")
    assert config.space == "lora"


def test_all_errors_of_a_file_come_at_once_in_the_order_of_its_tables(tmp_path):
    path = write(
        tmp_path,
        """
        lanes = 3
        spcae = "lora"
        [model]
        sorce = "minilm"
        dtype = "float3"
        max_length = 0
        [task]
        name = "trec7"
        [space]
        [[space.slots]]
        name = "weights"
        options = [{method = "lroa"}]
        [search]
        objectives = "accuracy:max,trainabel:min"
        sampler = "tpee"
        lanes = "four"
        examples = 10
        epochs = 3
        [budget]
        tme = "30m"
        trainable = "many"
        """,
    )
    with pytest.raises(InputError) as found:
        read_config(path)
    expected = """\
search.toml: 13 errors
  lanes: no such key. Did you mean "search.lanes"?
  spcae: no such key. Did you mean "space"?
  model.sorce: no such key. Did you mean "source"?
  model.dtype: no such dtype "float3". Did you mean "float32"?
  model.max_length: 0 is not a whole number of 1 or more
  task.name: no embedded task "trec7". Did you mean "trec6"?
  space.slots[0].options[0].method: no method "lroa". Did you mean "lora"?
  search.sampler: no such sampler "tpee". Did you mean "tpe"?
  search.lanes: a whole number was expected, not "four"
  search.objectives: no objective "trainabel". Did you mean "trainable"?
  search.epochs: the length is given as search.examples already; give one of the two
  budget.tme: no such key. Did you mean "time"?
  budget.trainable: a number such as 20000 or a share such as "2%" was expected, not 'many'"""
    assert str(found.value) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name = 'a'\nname = 'b'\n", "line 2: \"name\" is given twice (name = 'b')"),
        ("[task]\n[model]\n[task]\n", "line 3: the table [task] is there twice ([task])"),
        ("name = 'a'\n\nsampler = tpe\n", "line 3: not TOML: invalid value (sampler = tpe)"),
        ("name = 'a'\nspace = [1,\n", "line 2: not TOML: invalid value at the end of the file"),
    ],
)
def test_what_is_not_toml_is_named_with_its_line(tmp_path, text, line):
    assert errors(write(tmp_path, text)) == [line]


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    write(tmp_path, "", "search.toml")
    with pytest.raises(InputError, match=r'no such file\. Did you mean "search\.toml"\?'):
        read_config(tmp_path / "serch.toml")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("search.lanes=4", "search.lanes", 4),
        ("search.lanes = 4", "search.lanes", 4),
        ("search.epochs=2", "search.epochs", 2.0),
        ("task.name=disaster_tweets", "task.name", "disaster_tweets"),
        ('task.name="disaster_tweets"', "task.name", "disaster_tweets"),
        ("task.validation_size=0.1", "task.validation_size", 0.1),
        ("budget.time=30m", "budget.time", "30m"),
        ("budget.trainable=2%", "budget.trainable", "2%"),
        ("budget.trainable=20000", "budget.trainable", 20000),
        ("search.textbook=false", "search.textbook", False),
        ("name=2024", "name", "2024"),  # text was wanted
        ("name=2024-01-01", "name", "2024-01-01"),
        ("space=lora", "space", "lora"),
        ("space={preset = 'lora', name = 'mine'}", "space", {"preset": "lora", "name": "mine"}),
        (
            "space.training.lr={log = [1e-4, 1e-3]}",
            "space",
            {"preset": "autopeft", "training": {"lr": {"log": [1e-4, 1e-3]}}},
        ),
    ],
)
def test_the_command_line_sets_any_key(override, key, value):
    found = read_config({**TASK, "space": "autopeft"}, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_table_that_is_handed_over_stays_as_it_is():
    table = {"task": {"name": "trec6"}, "search": {"lanes": 2}, "budget": {"trials": 3}}
    before = json.dumps(table)
    read_config(table, ["search.lanes=4", "budget.time=1h", "model.head=mean"])
    assert json.dumps(table) == before


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("search.lanes=true", "search.lanes: a whole number was expected, not true"),
        ("search.lanes=0", "search.lanes: 0 is not a whole number of 1 or more"),
        ("search.seed=-1", "search.seed: -1 is not a whole number from 0 to 4294967295"),
        ("search.epochs=0", "search.epochs: a number above 0 was expected, not 0.0"),
        ("search.textbook=1", "search.textbook: true or false was expected, not 1"),
        ("model.head=men", 'model.head: no such head "men". Did you mean "mean"?'),
        ("model.device=cdua", 'model.device: no device "cdua". Did you mean "cuda"?'),
        ("model.source=minlm", 'model.source: no model "minlm". Did you mean "minilm"?'),
        ("task=3", "task: a table was expected, not 3"),
        ("task.kind=classify", 'task.kind: no such kind "classify". Did you mean "classification"?'),
        ("space=lor", 'space: no preset "lor". Did you mean "lora"?'),
        ("space.layer=all", 'space.layer: no such key. Did you mean "layers"?'),
        ("budget.time=600", 'budget.time: "600" is not a time like "90s", "30m", "2h" or "1h30m"'),
        ("budget.time=0s", 'budget.time: "0s" is no time at all'),
        ("budget.trials=0", "budget.trials: 0 is not a whole number of 1 or more"),
        ("name=a/b", 'name: "a/b" cannot name a study; take letters, digits, " ", ".", "_", "-"'),
        ("lanes", '"lanes": key=value was expected, as in search.lanes=4'),
    ],
)
def test_an_impossible_value_is_one_error(override, error):
    assert errors(DEFAULT, override) == [error]


def test_a_number_of_seconds_is_asked_for_with_its_unit():
    table = {**TASK, "budget": {"time": 600}}
    assert errors(table) == ['budget.time: a value such as "30m" was expected, not 600']


@pytest.mark.parametrize("limit", ["10", "-1%", "%", "many"])
def test_a_limit_is_a_number_or_a_share(limit):
    [error] = errors({**TASK, "budget": {"trials": 3, "trainable": limit}})
    assert error.startswith("budget.trainable: a number such as 20000 or a share")


def test_a_search_always_has_an_end():
    for budget in ({}, {"trainable": 20000}):
        assert read_config({**TASK, "budget": budget}).budget.trials == 30
    assert read_config({**TASK, "budget": {"time": "1h"}}).budget.trials is None
    endless = SearchConfig(task=TaskConfig(name="trec6"), budget=BudgetConfig())
    assert value_errors(endless) == ["budget: give trials, time, device_time or examples, or the search never ends"]


def test_a_task_is_needed():
    [first, *_] = errors({"name": "a"})
    assert first.startswith("task: missing")


@pytest.mark.parametrize(
    ("objectives", "error"),
    [
        ("accuracy:min,trainable:min", 'accuracy is better when larger; write "accuracy:max"'),
        ("accuracy:max,trainable:max", 'trainable is better when smaller; write "trainable:min"'),
        ("accuracy:max", 'one metric and at least one cost were expected, as in "accuracy:max,trainable:min"'),
        ("trainable:min,accuracy:max", "the metric, accuracy, comes first"),
        ("macro_f1:max,trainable:min", "macro_f1 is not the task's metric, accuracy; they must be the same"),
    ],
)
def test_objectives_are_the_tasks_metric_and_costs(objectives, error):
    table = {"task": {"name": "trec6", "metric": "accuracy"}, "search": {"objectives": objectives}}
    assert errors(table) == [f"search.objectives: {error}"]


@pytest.mark.parametrize(
    ("task", "search", "metric", "objectives"),
    [
        ({}, {}, "accuracy", "accuracy:max,trainable:min"),
        ({"metric": "macro_f1"}, {}, "macro_f1", "macro_f1:max,trainable:min"),
        ({"metric": "log_loss"}, {}, "log_loss", "log_loss:min,trainable:min"),
        ({}, {"objectives": "matthews:max,adapter:min"}, "matthews", "matthews:max,adapter:min"),
    ],
)
def test_metric_and_objectives_follow_from_each_other(task, search, metric, objectives):
    config = read_config({"task": {"name": "trec6", **task}, "search": search})
    assert (config.task.metric, config.search.objectives) == (metric, objectives)


def test_regression_is_told_by_its_kind(tmp_path):
    data = write(tmp_path, "text,label\na b,0.5\nc d,1.5\n", "data.csv")
    config = read_config({"task": {"path": str(data), "kind": "regression"}})
    assert config.search.objectives == "pearson:max,trainable:min"


def test_the_tasks_own_errors_are_among_the_others(tmp_path):
    data = write(tmp_path, "text,lable\na b,x\n", "data.csv")
    found = errors({"task": {"path": str(data)}, "search": {"lanes": 0}})
    assert len(found) == 2
    assert 'Did you mean "lable"?' in found[0]


def test_a_model_is_an_embedded_one_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for source in ("minilm", "google-bert/bert-base-uncased", "gpt2"):
        assert read_config({**TASK, "model": {"source": source}}).model.source == source
    assert errors({**TASK, "model": {"source": "a/b/c"}}) == [
        'model.source: no folder "a/b/c", and not the id of a model of the hub'
    ]
    [error] = errors({**TASK, "model": {"source": str(tmp_path)}})
    assert error == f"model.source: {tmp_path}: no config.json in this folder"


def test_a_head_that_the_family_has_not_is_refused(monkeypatch):
    headless = replace(site_map({"model_type": "bert"}), head=None)
    monkeypatch.setattr(ModelConfig, "site_map", lambda self: headless)
    assert errors(DEFAULT) == ['model.head: transformers has no sequence classifier for bert; use head = "mean"']
    assert read_config(DEFAULT, ["model.head=mean"]).model.head == "mean"


@pytest.mark.parametrize(
    "table",
    [
        DEFAULT,
        {**TASK, "space": {"preset": "lora", "training": {"lr": {"log": [1e-4, 1e-3]}}}, "search": {"epochs": 1}},
    ],
)
def test_a_stored_configuration_comes_back_equal(table):
    config = read_config(table)
    assert config_from_json(json.loads(json.dumps(config_json(config)))) == config
    # What a study stores holds None for what is not set.
    assert config_from_json(json.loads(json.dumps(asdict(config)))) == config
    assert read_config(json.loads(json.dumps(asdict(config)))) == config


def test_a_stored_configuration_of_another_version_says_so():
    with pytest.raises(InputError, match=r"search\.lnes: no such key"):
        config_from_json({**TASK, "search": {"lnes": 3}})


def test_every_key_of_every_table_is_read():
    hints = get_type_hints(SearchConfig)
    for table in ("model", "search", "budget"):
        given = {k: v for k, v in asdict(hints[table]()).items() if v is not None}
        assert getattr(config_from_json({**TASK, table: given}), table) == hints[table]()
    assert config_from_json({"task": asdict(TaskConfig(name="trec6"))}).task == TaskConfig(name="trec6")


def test_the_samplers_of_a_file_are_those_there_are():
    assert set(get_args(get_type_hints(SearchSettings)["sampler"])) == set(SAMPLERS)


@pytest.mark.parametrize(
    ("search", "rows", "examples"),
    [({}, 100, 200), ({"epochs": 0.5}, 101, 50), ({"examples": 7}, 100, 7), ({"epochs": 0.001}, 10, 1)],
)
def test_the_full_length_is_examples_or_epochs_or_two_epochs(search, rows, examples):
    assert SearchSettings(**search).full_length(rows) == examples
