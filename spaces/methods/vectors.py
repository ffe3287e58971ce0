"""What methods that train vectors alone have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Array


def scaled(y: Array, scale: Array, shift: Array) -> Array:
    """y * s + t: y is lanes x tokens x d, s and t are lanes x d."""
    return y * scale.unsqueeze(1) + shift.unsqueeze(1)
