"""Outcomes survive as text, short where they are right or wrong, and nothing else is taken for them."""

import base64
import zlib

import numpy as np
import pytest

from peftscape.spaces.outcomes import MOST_TEXT, pack, unpack


@pytest.mark.parametrize("n", [1, 7, 8, 9, 500])
def test_right_and_wrong_take_a_bit_each(n: int) -> None:
    values = (np.random.default_rng(n).random(n) < 0.7).astype(float)
    text = pack(values)
    assert text is not None
    assert (unpack(text) == values).all()
    assert len(text) < 40 + n / 4


def test_numbers_are_float32() -> None:
    values = np.random.default_rng(0).normal(3, 2, 200)
    text = pack(values)
    assert text is not None
    assert unpack(text) == pytest.approx(values, rel=1e-6)


def test_what_cannot_be_kept_is_none() -> None:
    for bad in ([], [np.nan, 1.0], [[0.0, 1.0]], np.random.default_rng(0).normal(size=MOST_TEXT)):
        assert pack(bad) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bits",
        "bits:3:!!",
        f"bits:{10**20}:eJw=",
        "bits:x:eJw=",
        "b:1:eJw=",
        "f32:2:" + base64.b64encode(zlib.compress(b"abc")).decode(),
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected outcomes"):
        unpack(text)
