"""Records: their JSON form is strict, complete and refuses what it does not know."""

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest

from peftscape.spaces.record import COSTS, SCHEMA, Costs, Failure, Record, RecordError, Score


def make(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "number": 3,
        "state": "complete",
        "design": {
            "placements": [{"method": "lora", "sites": ["q", "v"], "rank": 8}],
            "training": {"lr": 1e-3},
        },
        "digest": "ab12",
        "label": "lora r8 q,v",
        "metric": "accuracy",
        "direction": "maximize",
        "n_validation": 537,
        "scores": (Score(seed=0, validation=0.9), Score(seed=1, validation=0.94)),
        "costs": Costs(**dict.fromkeys(COSTS, 0) | {"adapter": 5, "head": 2, "trainable": 7}),
        "curve": ((16, 1.7), (32, 0.4)),
        "retests": (Score(seed=7, validation=0.9, test=0.91, n_test=500, wall_s=2.5),),
    }
    return Record(**fields | changes)


def test_a_record_survives_strict_json() -> None:
    record = make()
    assert Record.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record


def test_a_diverged_loss_survives_strict_json() -> None:
    curve = ((16, math.inf), (32, math.nan))
    failed = make(state="failed", scores=(), costs=None, curve=curve, failure=Failure(kind="diverged", message="nan"))
    back = Record.from_json(json.loads(json.dumps(failed.to_json(), allow_nan=False)))
    assert back.curve[0] == (16, math.inf)
    assert math.isnan(back.curve[1][1])
    assert back.failure == failed.failure


def test_validation_is_the_mean_over_seeds_and_test_over_retests() -> None:
    assert make().validation == pytest.approx(0.92)
    assert make().test == pytest.approx(0.91)
    assert math.isnan(make(retests=()).test)


def test_a_newer_schema_says_to_upgrade() -> None:
    with pytest.raises(RecordError, match=rf"schema {SCHEMA + 1} is newer.*upgrade"):
        Record.from_json(make().to_json() | {"schema": SCHEMA + 1, "colour": "blue"})


def test_all_errors_are_listed_with_the_nearest_name() -> None:
    data = make().to_json() | {
        "labl": "x",
        "n_validation": "many",
        "scores": [{"seed": True, "validation": 1}],
    }
    del data["digest"]
    data["costs"] = {**data["costs"], "peak_byte": 1}
    with pytest.raises(RecordError) as error:
        Record.from_json(data)
    for part in ('"labl". Did you mean "label"', "n_validation: expected a whole number", "digest: missing"):
        assert part in str(error.value)
    for part in (
        "scores[0].seed: expected a whole number",
        'costs.no such key "peak_byte". Did you mean "peak_bytes"',
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", math.nan, math.inf])
@pytest.mark.parametrize("field", ["validation", "test"])
def test_a_complete_record_has_finite_scores(bad: object, field: str) -> None:
    data = make().to_json()
    data["scores"][1][field] = bad
    with pytest.raises(RecordError, match=rf"scores\[1\].{field}"):
        Record.from_json(data)
    assert Record.from_json(data | {"state": "failed"}).state == "failed"


def test_a_complete_record_has_a_score() -> None:
    with pytest.raises(RecordError, match="at least one"):
        make(scores=())


def test_trained_parameters_are_adapter_and_head() -> None:
    with pytest.raises(RecordError, match="trainable is 8, not adapter \\+ head = 7"):
        Costs(**dict.fromkeys(COSTS, 0) | {"adapter": 5, "head": 2, "trainable": 8})


def test_an_unknown_state_names_the_nearest() -> None:
    with pytest.raises(RecordError, match='Did you mean "complete"'):
        make(state="completed")


def test_importing_records_loads_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'optuna')"
    code = f"import sys, peftscape.spaces.record; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_records_of_the_first_schema_are_read() -> None:
    data = make().to_json() | {"schema": 1}
    for score in (*data["scores"], *data["retests"]):
        del score["outcomes"]
    assert dataclasses.replace(Record.from_json(data), schema=SCHEMA) == make()
