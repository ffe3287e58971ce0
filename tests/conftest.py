"""What all tests share: the modules beside this one can be imported, Optuna is quiet."""

import sys
from pathlib import Path

import optuna
import pytest

pytest.register_assert_rewrite("contract", "exported", "peft_pair")
sys.path.insert(0, str(Path(__file__).parent))
optuna.logging.set_verbosity(optuna.logging.WARNING)
