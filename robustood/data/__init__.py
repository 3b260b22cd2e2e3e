"""Data at three scales: digits that every reader has, image sets that are downloaded once, your own folders.

:func:`digits` makes the digits and their outliers without a download. Larger sets are stored as packs, one
compact file each: :func:`fetch` downloads one, :func:`folder` makes one from a folder of images, :func:`load`
reads it.
"""

from __future__ import annotations

from robustood.data._base import (
    Batch,
    Data,
    Loaded,
    Split,
    check_trainable,
    counted_as,
    hold_out,
    pixels,
)
from robustood.data._batches import Augment, draw
from robustood.data._embedded import FLAT, FONTS, LETTERS, PHOTOS, digits, glyphs, noise, patches
from robustood.data._fetching import fetch
from robustood.data._packs import compress, digest, read_pack, write_pack
from robustood.data._pairs import (
    HELD_OUT,
    LEARNED,
    Drawn,
    Pairs,
    Views,
    corrupted,
    folder_of_views,
    paired,
    perturbed,
    redrawn,
)
from robustood.data._relighting import (
    REFERENCE,
    SOLIDS,
    Lights,
    Scenes,
    light_grid,
    random_lights,
    relit,
    render,
    scenes,
)
from robustood.data._sampling import sample
from robustood.data._sets import available, check, folder, load, root, without_overlap

__all__ = [
    "FLAT", "FONTS", "HELD_OUT", "LEARNED", "LETTERS", "PHOTOS", "REFERENCE", "SOLIDS", "Augment",
    "Batch", "Data", "Drawn", "Lights", "Loaded", "Pairs", "Scenes", "Split", "Views", "available",
    "check", "check_trainable", "compress", "corrupted", "counted_as", "digest", "digits", "draw",
    "fetch", "folder", "folder_of_views", "glyphs", "hold_out", "light_grid", "load", "noise",
    "paired", "patches", "perturbed", "pixels", "random_lights", "read_pack", "redrawn", "relit",
    "render", "root", "sample", "scenes", "without_overlap", "write_pack",
]  # fmt: skip
