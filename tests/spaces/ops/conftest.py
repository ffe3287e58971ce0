"""Kernels run on the GPU where there is one, and in Triton's interpreter on the CPU elsewhere.

Whoever imports Triton first decides: its own library is compiled or interpreted from then on, and transformers may
have been that one. The interpreter is therefore also put under a library that was imported already.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("kernel_checks")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted: dict[int, Any] = {}
    for module in (triton.language.standard, triton.language):
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                setattr(module, name, interpreted.setdefault(id(member), InterpretedFunction(member.fn)))

    prepared: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function within a kernel. Triton prepares its library anew for each such call, which takes most of the
        time; the kernel's own start has done that for `tl`, and once is enough for what Triton's functions see."""
        home = self.fn.__module__
        if home.startswith("triton.") and home not in prepared:
            prepared.add(home)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN: what a kernel leaves unwritten, or reads before writing, shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args: Any, make: Any = make, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)
