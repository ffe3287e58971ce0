"""What all tests share: the modules beside this one can be imported, Optuna is quiet."""

import sys
from pathlib import Path

import optuna
import pytest

pytest.register_assert_rewrite("contract", "exported", "peft_pair")
sys.path.insert(0, str(Path(__file__).parent))
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Commands run in an empty folder, on a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def float32():
    """What is not said is float32 on every processor: `dtype = "auto"` would be bfloat16 where products of it are fast,
    and what is compared to 1e-5 would fail there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftscape.search.backbone.has_bfloat16", lambda: False)
        yield
