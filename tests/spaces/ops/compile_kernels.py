"""Compiles every kernel as the operations start it, for GPUs that need not be there: registers, spills, shared bytes.

    python tests/spaces/ops/compile_kernels.py [--arch 80 90] [--dtype bfloat16 float32] [--full] [--ptx FOLDER]

Each operation runs forward and backward on the CPU with every launch turned into a compilation (Triton's ASTSource
for the launch's own arguments and a GPUTarget), so what is compiled is what would run. Registers come from the
bundled `ptxas -v`; Triton itself has no count without a driver. Run by `test_compiled.py` in a process of its own,
because a process either compiles kernels or interprets them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import CASES


class Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(arch: int, dtype: str, case: str, full: bool) -> list[tuple[Any, str]]:
    """All kernels that a case starts, forward and backward, once each, with what ptxas said of them."""
    found: dict[str, Any] = {}
    start = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = start(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            found[kernel.hash] = (kernel, log.getvalue())
        return kernel

    triton.runtime.driver.set_active(Driver(arch))
    JITFunction.run = run
    try:
        CASES[case](getattr(torch, dtype), full)
    finally:
        JITFunction.run = start
    return list(found.values())


def resources(log: str) -> dict[str, int]:
    """Registers a thread and bytes spilled, as `ptxas -v` counts them."""
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spilled is not None, log
    assert registers is not None, log
    return {"registers": int(registers[1]), "spill_stores": int(spilled[1]), "spill_loads": int(spilled[2])}


def main() -> None:
    """Compile and print one JSON object a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--case", nargs="+", default=list(CASES))
    parser.add_argument("--full", action="store_true", help="every shape that is compiled for")
    parser.add_argument("--ptx", type=Path)
    args = parser.parse_args()
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what is cached was compiled without a log
    for case in args.case:
        for dtype in args.dtype:
            for arch in args.arch:
                for kernel, log in compiled(arch, dtype, case, args.full):
                    ptx = kernel.asm["ptx"]
                    row = {"case": case, "kernel": kernel.metadata.name, "arch": arch, "dtype": dtype}
                    row |= resources(log)
                    row |= {"shared_bytes": kernel.metadata.shared, "num_warps": kernel.metadata.num_warps}
                    row |= {"cubin_bytes": len(kernel.asm["cubin"]), "wide_loads": wide(ptx)}
                    print(json.dumps(row), flush=True)
                    if args.ptx:
                        args.ptx.mkdir(exist_ok=True)
                        (args.ptx / f"{case}-{row['kernel']}-{dtype}-{arch}-{kernel.hash[:6]}.ptx").write_text(ptx)


def wide(ptx: str) -> int:
    """Loads of 16 bytes: copies to shared memory beside the registers', or four registers at once."""
    return len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10|ld\.global\S*\.v4\.b32", ptx))


if __name__ == "__main__":
    main()
