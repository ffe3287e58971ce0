"""Plans on a quantised backbone say the precision that its machine computes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peftscape.spaces.devices import device
from peftscape.spaces.plan import Setting, plan
from peftscape.spaces.plan_input import read_design, read_model
from peftscape.spaces.profiles import PROFILES
from peftscape.spaces.rates import Rates, write_rates


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_a_measured_machine_computes_in_the_faster_precision(
    faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = {"float32": 2e11, "bfloat16": 1e11} | {faster: 3e11}
    write_rates(Rates(device="two cores", memory_bytes=10**10, flops=rates, bandwidth=1e10))
    assert (device("this", "nf4").compute, device("this", "nf4").flops) == (faster, 3e11)
    assert device("this", "bfloat16").flops == rates["bfloat16"]
    assert device("a100-80gb", "nf4").compute == "bfloat16"


def test_what_is_kept_doubles_in_float32_and_so_does_what_is_not_quantised() -> None:
    model, design = read_model("bert-base-uncased"), read_design("lora")
    assert not isinstance(design, str)
    narrow = Setting(dtype="nf4", batch=4, length=64)
    found = [
        plan(design, model.sites, PROFILES["peftscape"], setting)
        for setting in (narrow, replace(narrow, compute="float32"))
    ]
    few, many = (one.memory for one in found)
    assert many.activations == pytest.approx(2 * few.activations, rel=1e-2)  # a few are bits
    assert many.working == 2 * few.working
    linears = 12 * (4 * 768**2 + 2 * 768 * 3072)  # in 4 bits in both
    assert many.weights - few.weights == 2 * (model.sites.parameters - linears)
    assert found[0].total == found[1].total
