"""An embedded backbone that lies in its package as GGUF: converted once into a folder that transformers loads at once.

    folder = converted(gguf, "smollm2", "0.1.2")

The weights are float32, as they come out of their quantisation: a copy of the model that the file holds, not of the
one that was quantised.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from peftscape.spaces.words import InputError

_WHOLE = "model.safetensors"


def cache_folder() -> Path:
    """Where converted models lie: `PEFTSCAPE_CACHE`, else in the user's cache."""
    if own := os.environ.get("PEFTSCAPE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftscape"


def converted(gguf: Path, name: str, version: str) -> Path:
    """The folder with the model's weights, configuration and tokenizer, written if it is not there (half a minute).

    Raises:
        InputError: the package `gguf`, which reads such files, is not installed.
    """
    folder = cache_folder() / f"{name}-{version}"
    if (folder / _WHOLE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        _convert(gguf, part)
        if not folder.exists():  # another process may have been faster
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if find_spec("gguf") is None:
        raise InputError(str(gguf), ["reading it needs the package gguf: pip install gguf"])
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where)
    config = loaded.config
    # The weights are dense from here on; a model that believes itself quantised does not save them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(**where).save_pretrained(str(folder))
