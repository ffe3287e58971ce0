"""`peftscape plan` and the doctor's rates, as a person and a program see them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftscape.cli import app
from peftscape.spaces.rates import Rates, write_rates

RATES = Rates(device="a processor", memory_bytes=16 * 10**9, flops={"float32": 1e11, "bfloat16": 1e10}, bandwidth=1e10)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "140")


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_several_designs_are_tables_json_and_a_figure(tmp_path: Path) -> None:
    words = ("--model", "llama-3-8b", "--design", "lora", "--design", '{"placements": [{"method": "ia3"}]}')
    words = (*words, "--profile", "peft", "--device", "a100-80gb", "--length", "256")
    output = run(*words, "--why")
    for said in ("3,407,872", "peak memory", "activations of the backbone", "a100-80gb", "what peft keeps"):
        assert said in output
    found = json.loads(run(*words, "--json", "--figure", str(tmp_path / "memory.html")))
    assert [row["design"] for row in found] == ["lora r8 q,v", "ia3 k,v,down"]
    for row in found:
        assert sum(row["memory"]["parts"].values()) == row["memory"]["peak"]
        assert row["device"]["fits"]
        assert row["device"]["fastest_s"] < row["device"]["step_s"] < row["device"]["slowest_s"]
    assert "Plotly.newPlot" in (tmp_path / "memory.html").read_text()


def test_a_space_an_encoder_decoder_and_the_largest() -> None:
    spread = run("--model", "roberta-base", "--design", "unified", "--limit", "700000", "--device", "t4")
    assert "excluded by parameters" in spread
    assert "each trial alone" in spread
    assert "64 tokens to 8" in run("--model", "t5-large", "--design", "lora", "--length", "64", "--target", "8")
    whole = " ".join(run("--model", "falcon-180b", "--design", "full_finetuning", "--batch", "1").split())
    assert "2,880 GB at 180 billion parameters" in whole
    assert "36 devices of 80 GB hold it" in whole
    assert "5,120 GB is the capacity of 64" in whole


def test_a_measured_machine_is_the_default_device() -> None:
    words = ("--model", "roberta-base", "--design", "lora", "--dtype", "float32", "--json")
    assert json.loads(run(*words))["device"] is None
    write_rates(RATES)
    slow = json.loads(run(*words))
    assert slow["device"]["device"] == "a processor"
    assert slow["device"]["measured"] is True
    assert slow["device"]["step_s"] == pytest.approx(slow["step_flops"] / 1e11 / 0.6)
    write_rates(replace(RATES, flops={"float32": 2e11, "bfloat16": 1e10}))
    assert json.loads(run(*words))["device"]["step_s"] == pytest.approx(slow["device"]["step_s"] / 2)
    assert json.loads(run(*words, "--device", "t4"))["device"]["measured"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "roberta-larg", "--design", "lora"), 'Did you mean "roberta-large"'),
        (("--model", "gpt2", "--design", "lorra"), 'Did you mean "lora"'),
        (("--model", "gpt2", "--design", "lora", "--device", "a100"), "There are: a100-40gb, a100-80gb"),
        (("--model", "gpt2", "--design", "lora", "--device", "this"), "run peftscape doctor once"),
        (("--model", "gpt2", "--design", "lora", "--dtype", "bf16"), 'Did you mean "bfloat16"'),
        (("--model", "gpt2", "--design", "lora", "--target", "4"), "one stack"),
        (("--model", "gpt2", "--design", '{"placements": [{"method": "lora", "rank": 0}]}'), "rank"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_error_names_what_was_wrong_and_the_nearest(words: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code != 0
    assert said in " ".join(f"{result.output} {result.stderr} {result.exception or ''}".split())
