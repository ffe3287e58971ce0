"""The tests here share `synthetic.py`, which pytest's importlib mode does not put on the path."""

import sys
from pathlib import Path

import optuna

sys.path.insert(0, str(Path(__file__).parent))
optuna.logging.set_verbosity(optuna.logging.WARNING)
