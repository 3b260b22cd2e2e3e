"""Data for three scales: digits that every reader has, image sets that are fetched once, your own folders.

:mod:`robustood.data.embedded` makes the digits and what is no digit without a download. Larger sets are
kept as packs, one compact file each (:mod:`robustood.data.packs`), and are loaded, fetched or made from a
folder of images by :mod:`robustood.data.sets`.
"""

from __future__ import annotations

from robustood.data.base import Batch, Data, Split, kept, pixels
from robustood.data.embedded import FLAT, FONTS, LETTERS, PHOTOS, digits, glyphs, noise, patches

__all__ = [
    "FLAT", "FONTS", "LETTERS", "PHOTOS", "Batch", "Data", "Split", "digits", "glyphs", "kept", "noise",
    "patches", "pixels",
]  # fmt: skip
