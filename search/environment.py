"""What a result was made with: versions and the machine. No names of users, hosts or variables."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone

PACKAGES = ("peftscape", "torch", "transformers", "optuna", "datasets", "scikit-learn", "plotly", "numpy")


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of what the results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(backbone: Backbone) -> dict[str, object]:
    """For a study's attributes."""
    import torch

    return {
        "versions": versions() | {"python": platform.python_version()},
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "device": str(backbone.device),
        },
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
