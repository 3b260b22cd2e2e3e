"""Data for three scales: digits that every reader has, image sets that are fetched once, your own folders.

:mod:`robustood.data.embedded` makes the digits and what is no digit without a download. Larger sets are
kept as packs, one compact file each (:mod:`robustood.data.packs`), and are loaded or made from a folder
of images by :mod:`robustood.data.sets`, and downloaded by :mod:`robustood.data.fetching`.
"""

from __future__ import annotations

from robustood.data.base import Batch, Data, Loaded, Split, kept, pixels
from robustood.data.batches import Augment, Shared, draw, drawn, each, place
from robustood.data.embedded import FLAT, FONTS, LETTERS, PHOTOS, digits, glyphs, noise, patches
from robustood.data.fetching import fetch
from robustood.data.packs import compress, digest, read_pack, write_pack
from robustood.data.sets import available, check, folder, load, root, without_overlap

__all__ = [
    "FLAT", "FONTS", "LETTERS", "PHOTOS", "Augment", "Batch", "Data", "Loaded", "Shared", "Split",
    "available", "check", "compress", "digest", "digits", "draw", "drawn", "each", "fetch",
    "folder", "glyphs", "kept", "load", "noise", "patches", "pixels", "place", "read_pack", "root",
    "without_overlap", "write_pack",
]  # fmt: skip
