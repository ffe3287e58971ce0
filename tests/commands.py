"""Commands run in this process, and records for them to read."""

from typer.testing import CliRunner

from peftscape.cli import app
from peftscape.spaces.design import Design
from peftscape.spaces.record import Costs, Record, Score


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def costs(trainable):
    return Costs(
        adapter=trainable - 10,
        head=10,
        trainable=trainable,
        train_flops=3,
        infer_flops=1,
        peak_bytes=5,
        adapter_bytes=4,
    )


def record(number, validation, trainable):
    design = Design.from_json({"placements": [{"method": "lora", "rank": 2**number}]})
    return Record(
        number=number, state="complete", design=design.json(), digest=design.digest, label=design.label,
        metric="accuracy", direction="maximize", n_validation=500,
        scores=(Score(seed=0, validation=validation),), costs=costs(trainable),
    )  # fmt: skip
