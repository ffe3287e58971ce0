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
