"""What runs where: plain torch on a CPU and where nobody measured, a kernel where the table says that it wins."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, Fresh, assert_near, double, gradients

from peftscape.spaces import ops
from peftscape.spaces.ops import choose, fused_attention, fused_bottleneck, fused_low_rank, reference
from peftscape.spaces.ops.choose import Call, Choice, Measured, by_table

CALL = Call("low_rank", "bfloat16", lanes=8, size=16, tokens=512, width=4096)
WINS = Measured("GPU", CALL, kernel_s=1e-3, torch_s=2e-3)
LOSES = Measured("GPU", replace(CALL, lanes=1), kernel_s=2e-3, torch_s=1e-3)


@pytest.mark.parametrize(
    ("call", "device", "kernel"),
    [
        (CALL, "GPU", True),
        (replace(CALL, lanes=1), "GPU", False),
        (replace(CALL, lanes=16, size=24), "GPU", True),
        (replace(CALL, width=64), "GPU", False),  # nothing like it was measured
        (replace(CALL, dtype="float32"), "GPU", False),
        (replace(CALL, op="bottleneck"), "GPU", False),
        (CALL, "another GPU", False),
    ],
)
def test_the_nearest_measurement_decides_and_without_one_torch_runs(call: Call, device: str, kernel: bool) -> None:
    assert by_table(call, device, (WINS, LOSES)).kernel is kernel


def test_a_gain_within_the_noise_is_none() -> None:
    assert not by_table(CALL, "GPU", (replace(WINS, kernel_s=1.98e-3),)).kernel


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_CHOSEN", {})
    choose.table.cache_clear()


@pytest.mark.parametrize(
    ("setting", "interpreter", "kernel"),
    [("auto", "1", False), ("on", "0", False), ("off", "1", False), ("on", "1", True)],
)
def test_on_a_cpu_torch_runs_unless_the_interpreter_is_asked_for(
    setting: str, interpreter: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTSCAPE_KERNELS", setting)
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    device = torch.device("cpu")
    assert choose.possible(device) is kernel
    assert choose.choice(CALL, device).kernel is kernel
    with choose.without_kernels():
        assert not choose.possible(device)
        assert not choose.choice(CALL, device).kernel


def test_lanes_note_the_kernels_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lanes: list[set[str]] = [set(), set()]
    for setting, wanted in (("off", set()), ("on", {"low_rank"})):
        monkeypatch.setenv("PEFTSCAPE_KERNELS", setting)
        with choose.noting(lanes):
            choose.choice(CALL, torch.device("cpu"))
        choose.choice(replace(CALL, op="bottleneck"), torch.device("cpu"))
        assert lanes == [wanted, wanted]


@pytest.mark.parametrize(
    ("setting", "unable", "kernel"),
    [
        ("on", "", True),
        ("off", "", False),
        ("auto", "", True),
        ("on", "no Triton", False),
        ("auto", "no Triton", False),
    ],
)
def test_on_cuda_the_setting_comes_before_the_table(
    setting: str, unable: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTSCAPE_KERNELS", setting)
    monkeypatch.setattr(choose, "_unable", lambda index: unable)
    monkeypatch.setattr(choose, "_name", lambda index: "GPU")
    monkeypatch.setattr(choose, "table", lambda: (WINS,))
    assert choose.possible(torch.device("cuda", 0)) is (setting != "off")
    found = choose.choice(CALL, torch.device("cuda", 0))
    assert found.kernel is kernel
    assert {"op": "low_rank", "kernel": kernel, "why": found.why}.items() <= choose.decisions()[-1].items()


def test_a_misspelt_setting_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTSCAPE_KERNELS", "of")
    with pytest.raises(ValueError, match=r'PEFTSCAPE_KERNELS: no setting "of"\. Did you mean "off"\?'):
        choose.choice(CALL, torch.device("cpu"))


def test_the_packaged_table_is_readable() -> None:
    text = (resources.files("peftscape.spaces.ops") / "measured.json").read_text()
    assert all(row.kernel_s > 0 and row.torch_s > 0 for row in choose.read(text, "measured.json"))


def test_what_was_measured_here_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PEFTSCAPE_KERNELS", "auto")
    monkeypatch.setattr(choose, "_unable", lambda index: "")
    monkeypatch.setattr(choose, "_name", lambda index: "GPU")
    gpu = torch.device("cuda", 0)
    never = choose.choice(CALL, gpu)
    assert not never.kernel
    assert never.why.endswith("never measured on GPU; benchmarks/kernel_times.py --save measures it")
    choose.saved().parent.mkdir()
    choose.saved().write_text(json.dumps({"rows": [asdict(WINS), asdict(LOSES)]}))
    choose.table.cache_clear()
    choose._CHOSEN.clear()
    assert choose.choice(CALL, gpu) == Choice(True, "measured on GPU: 2.00 times as fast as torch")
    assert not choose.choice(replace(CALL, lanes=1), gpu).kernel
    choose.saved().write_text('{"rows": [{"device": "GPU"}]}')
    choose.table.cache_clear()
    with pytest.raises(ValueError, match=r"kernels\.json is no table of measured kernels .*'call'.*: remove it"):
        choose.table()


def test_operations_import_neither_torch_nor_triton() -> None:
    code = "import sys, peftscape.spaces.ops, peftscape.spaces; print({'torch', 'triton'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# -- the entry points give the same whichever runs


@pytest.fixture(params=["kernel", "torch"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTSCAPE_KERNELS", "on" if request.param == "kernel" else "off")


@pytest.mark.usefixtures("_either")
def test_low_rank_takes_lists_and_stacks() -> None:
    new = Fresh(torch.float32, seed=7)
    x, y, scale = new.state(2, 5, 12), new.state(2, 5, 9), new.numbers(2, 1, 1)
    a, b = [new.matrix(r, 12) for r in (3, 1)], [new.matrix(9, r) for r in (3, 1)]
    exact = double([x, y, *a, *b])
    wanted = torch.stack(
        [exact[1][i] + float(scale[i]) * exact[0][i] @ exact[2 + i].T @ exact[4 + i].T for i in (0, 1)]
    )
    out = ops.low_rank(x, y, a, b, scale)
    grad = new.state(2, 5, 9).detach()
    assert_near([out], [wanted], torch.float32)
    inputs = [x, y, *a, *b]
    assert_near(gradients([out], inputs, [grad]), gradients([wanted], exact, [grad.double().cpu()]), torch.float32)
    stacks = [reference.stacked(t, torch.float32) for t in (a, b)]
    rank = torch.tensor([3.0, 1.0], device=DEVICE).view(2, 1, 1)
    assert_near([ops.low_rank(x, y, *stacks, scale, rank)], [wanted], torch.float32)


@pytest.mark.usefixtures("_either")
def test_one_scale_may_stand_for_all_lanes() -> None:
    new = Fresh(torch.float32, seed=11)
    x, y, one = new.state(2, 3, 4), new.state(2, 3, 4), torch.full((1, 1, 1), 0.5, device=DEVICE)
    a, b = [new.matrix(1, 4), new.matrix(2, 4)], [new.matrix(4, 1), new.matrix(4, 2)]
    every = ops.low_rank(x, y, a, b, one.expand(2, 1, 1))
    assert torch.equal(ops.low_rank(x, y, a, b, one), every)


@pytest.mark.usefixtures("_either")
def test_an_adapter_takes_lists_and_stacks() -> None:
    new = Fresh(torch.float32, seed=8)
    x, y, scale = new.state(2, 5, 9), new.state(2, 5, 9), new.numbers(2, 1, 1)
    own = [[new.vector(*s) for s in row] for row in ([(3, 9), (1, 9)], [(3,), (1,)], [(9, 3), (9, 1)], [(9,), (9,)])]
    stacks = [reference.stacked(t, torch.float64) for t in own]
    wanted = y.double() + scale.double() * reference.bottleneck(x.double(), *stacks, "gelu")
    assert_near([ops.adapter(y, *own, "gelu", x=x, scale=scale)], [wanted.cpu()], torch.float32)
    size = torch.tensor([3.0, 1.0], device=DEVICE)
    padded = [reference.stacked(t, torch.float32) for t in own]
    assert_near([ops.adapter(y, *padded, "gelu", x=x, scale=scale, size=size)], [wanted.cpu()], torch.float32)


@pytest.mark.usefixtures("_either")
def test_attention_takes_lists_and_stacks() -> None:
    new = Fresh(torch.float32, seed=9)
    q, k, v = (new.state(2, 1, 4, 8) for _ in range(3))
    keys, values = ([new.matrix(n, 8) for n in (3, 1)] for _ in range(2))
    stacks = [reference.stacked(t, torch.float64) for t in (keys, values)]
    lengths = torch.tensor([3, 1], device=DEVICE)
    wanted = reference.prefix_attention(q.double(), k.double(), v.double(), *stacks, [1, 0], lengths=lengths)
    assert_near([ops.prefix_attention(q, k, v, keys, values, [1, 0])], [wanted.cpu()], torch.float32)
    padded = [reference.stacked(t, torch.float32) for t in (keys, values)]
    out = ops.prefix_attention(q, k, v, *padded, [1, 0], lengths=lengths)
    assert_near([out], [wanted.cpu()], torch.float32)


def test_float64_and_scales_that_train_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTSCAPE_KERNELS", "on")
    for module, name in (
        (fused_low_rank, "low_rank"),
        (fused_bottleneck, "bottleneck"),
        (fused_attention, "prefix_attention"),
    ):
        monkeypatch.setattr(module, name, None)
    new = Fresh(torch.float64, seed=10)
    x, y = new.state(1, 2, 4), new.state(1, 2, 4)
    a, b = [new.matrix(1, 4).double()], [new.matrix(4, 1).double()]
    assert ops.low_rank(x, y, a, b, torch.ones(1, device=DEVICE)).dtype == torch.float64
    scale = torch.ones(1, device=DEVICE, requires_grad=True)
    ops.low_rank(x.float(), y.float(), [a[0].float()], [b[0].float()], scale).sum().backward()
    assert scale.grad is not None


def test_ranks_that_their_precision_cannot_count_are_not_trusted() -> None:
    rank = torch.tensor([300.0], dtype=torch.bfloat16)
    assert ops._exact(torch.zeros(1, 300, 4), rank) is None
    assert ops._exact(torch.zeros(1, 256, 4), rank) is rank
    assert ops._exact([torch.zeros(3, 4)], rank) is None
