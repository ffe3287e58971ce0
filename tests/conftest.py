"""What all tests share: `contract.py` can be imported, Optuna is quiet, one thread where tests compare bits."""

import sys
from pathlib import Path

import optuna
import pytest

pytest.register_assert_rewrite("contract")
sys.path.insert(0, str(Path(__file__).parent))
optuna.logging.set_verbosity(optuna.logging.WARNING)
