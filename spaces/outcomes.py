"""Outcomes: what each test example gave in one retest, as short text that a record carries.

Paired tests need them, and inside the record they go wherever it goes: SQLite, PostgreSQL, JSON lines. The
text is `bits:N:...` (one bit an example, 1 where right) or `f32:N:...` (a number an example), compressed by
zlib and written in base64. 500 right or wrong answers take about 100 characters.
"""

import base64
import binascii
import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_TEXT = 60_000
"""Longer texts are not kept: MySQL holds 65,535 bytes in an Optuna attribute."""


def pack(values: ArrayLike) -> str | None:
    """One value an example as text; None where it would be too long, or a value is not finite.

    Values that are all 0 or 1 take a bit each, others are rounded to float32.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        return None
    right = bool(((array == 0) | (array == 1)).all())
    raw = np.packbits(array.astype(bool)).tobytes() if right else array.astype("<f4").tobytes()
    text = base64.b64encode(zlib.compress(raw, 9)).decode("ascii")
    text = f"{'bits' if right else 'f32'}:{array.size}:{text}"
    return text if len(text) <= MOST_TEXT else None


def unpack(text: str) -> NDArray[np.float64]:
    """The values that `pack` wrote.

    Raises:
        ValueError: if the text is not of this form.
    """
    kind, _, rest = text.partition(":")
    count, _, body = rest.partition(":")
    try:
        n, packed = int(count), base64.b64decode(body, validate=True)
        raw = zlib.decompressobj().decompress(packed, max(1, 4 * n) + 1)  # a bomb is not unpacked
    except (ValueError, OverflowError, binascii.Error, zlib.error) as error:
        raise ValueError(f'expected outcomes as "bits:N:..." or "f32:N:...", found "{text[:40]}": {error}') from None
    bits = kind == "bits"
    if kind not in ("bits", "f32") or n < 1 or len(raw) != (-(-n // 8) if bits else 4 * n):
        raise ValueError(f'expected outcomes of {n} examples, found {len(raw)} bytes of "{kind}"')
    if bits:
        return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=n).astype(np.float64)
    return np.frombuffer(raw, dtype="<f4").astype(np.float64)
