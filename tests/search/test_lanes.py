"""Lanes on one backbone do not touch each other, whatever they are and whenever they come and go."""

from __future__ import annotations

from contract import MethodContract


class TestEveryMethod(MethodContract):
    """The suite of `contract.py` on all that is found in `spaces/methods/`."""
