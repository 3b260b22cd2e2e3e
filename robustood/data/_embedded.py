"""Data that every reader has: handwritten digits, and images that are not digits.

The in-distribution set is scikit-learn's copy of the UCI handwritten digits (Alpaydin and
Kaynak 1998): 1,797 images of 8x8 pixels with 17 grey levels, made by counting ink in 4x4 blocks
of a 32x32 bitmap. The other images are brought to the same size and grey levels:

==============  ==============================  ===============================
set             auxiliary outliers (training)   test outliers
==============  ==============================  ===============================
letters (near)  C F J M P T U W X in DejaVu     A E H K N R V Y in DejaVu
                Sans and Sans Mono              Serif, STIX and Computer Modern
photo patches   ``china.jpg``                   ``flower.jpg``
noise           none                            uniform grey levels
==============  ==============================  ===============================

Letters have the weight and proportions of their fonts. Printed strokes are thinner than a pen's and capitals
wider than digits, which makes them easier to detect; ``glyphs(.., pen=True)`` draws them as heavy and as
narrow as digits without changing their shape.

The letters B D G I L O Q S Z look like digits (a network rightly reads S as 5). They are in
neither set; with ``glyphs("lookalike", ...)`` they serve as a contaminated pool.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from robustood.data._base import Data, Split
from robustood.inputs import check_choice, check_count, check_flag, check_seed

LETTERS = {"auxiliary": "CFJMPTUWX", "test": "AEHKNRVY", "lookalike": "BDGILOQSZ"}
FONTS = {
    "auxiliary": "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold",
    "test": "DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol "
    "cmr10 cmss10 cmtt10",
}
FONTS["lookalike"] = FONTS["auxiliary"]
PHOTOS = {"auxiliary": "china.jpg", "test": "flower.jpg"}
FLAT = 0.05  # standard deviation of a patch below which two photos can give the same image


def digits(train: int = 1097, seed: int = 0) -> Data:
    """The digits with their outliers, in a fixed split.

    The 500 test digits and 200 validation digits are the same for every ``train``; a smaller
    ``train`` takes the first training digits, so that training sets are nested.

    Args:
        train: number of training digits, at most 1,097.
        seed: of the split and of the outliers; the book uses 0.

    Returns:
        Data with float32 images (samples, 1, 8, 8) in [0, 1]; ``outliers`` holds 1,000 letters
        and 1,000 photo patches, ``ood`` 500 each of ``letters``, ``patches`` and ``noise``.

    Raises:
        ValueError: if train is not in 1 .. 1,097.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    check_count(train, "train", low=1)
    if train > 1097:
        raise ValueError(
            f"train must be at most 1097, got {train}; 700 digits are kept for val and test"
        )
    raw = load_digits()
    order = np.random.default_rng(check_seed(seed)).permutation(len(raw.target))
    x = torch.tensor(raw.images[order] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(raw.target[order], dtype=torch.int64)
    everything = Split(x, y)
    return Data(
        train=everything[700 : 700 + train],
        val=everything[500:700],
        test=everything[:500],
        outliers=torch.cat(
            [glyphs("auxiliary", 1000, seed + 1), patches("auxiliary", 1000, seed + 2)]
        ),
        ood={
            "letters": glyphs("test", 500, seed + 3),
            "patches": patches("test", 500, seed + 4),
            "noise": noise(500, seed + 5),
        },
    )


def glyphs(
    which: Literal["auxiliary", "test", "lookalike"], n: int, seed: int, pen: bool = False
) -> Float[Tensor, "n 1 8 8"]:
    """Capital letters in the fonts that Matplotlib ships, rendered like the scanned digits.

    A letter fills a 32x32 bitmap, with a small random shear, rotation, scale and offset; each pixel
    is the share of ink in a 4x4 block, in sixteenths.

    Args:
        which: ``"auxiliary"``, ``"test"`` or ``"lookalike"``; see the table of the
            module for letters and fonts.
        n: number of images; letters and fonts are chosen at random.
        seed: of the draw.
        pen: with the weight of a pen and the width of a digit, closer to the digits.
    """
    check_choice(which, "which", tuple(LETTERS))
    check_count(n, "n", low=1)
    check_flag(pen, "pen")
    rng = np.random.default_rng(check_seed(seed))
    letters, fonts = [*LETTERS[which]], FONTS[which].split()
    return _images(
        [_glyph(str(rng.choice(letters)), str(rng.choice(fonts)), rng, pen) for _ in range(n)]
    )


def _glyph(letter: str, font: str, rng: np.random.Generator, pen: bool) -> np.ndarray:
    face = _font(font)
    left, top, right, bottom = face.getbbox(letter)
    canvas = Image.new("L", (96, 96), 0)
    corner = (48 - (left + right) / 2, 48 - (top + bottom) / 2)
    # Pen strokes are heavier than print; bold faces are nearly as heavy.
    weight = int(rng.integers(0, 2) if "Bol" in font else rng.integers(1, 4)) if pen else 0
    ImageDraw.Draw(canvas).text(corner, letter, fill=255, font=face, stroke_width=weight)
    across, down = right - left + 2 * weight, bottom - top + 2 * weight
    if pen:  # digits fill their boxes from top to bottom and are about two thirds as wide as high
        wide, high = rng.uniform(1.0, 1.3) * across / 24, rng.uniform(0.95, 1.1) * down / 32
    else:
        wide = high = rng.uniform(0.95, 1.1) * max(across, down) / 32
    angle, shear = np.radians(rng.uniform(-10, 10)), rng.uniform(-0.15, 0.15)
    back = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = np.diag([wide, high]) @ np.array([[1, shear], [0, 1]]) @ back
    offset = np.array([48, 48]) - back @ (np.array([16, 16]) + rng.uniform(-1, 1, 2))
    coefficients = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
    bitmap = canvas.transform(
        (32, 32), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return (np.asarray(bitmap) > 127).reshape(8, 4, 8, 4).mean(axis=(1, 3))


@lru_cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib  # only letters need it

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), 48)


def patches(which: Literal["auxiliary", "test"], n: int, seed: int) -> Float[Tensor, "n 1 8 8"]:
    """Grey patches of one photograph that ships with scikit-learn.

    A square of 16 to 96 pixels is downsampled to 8x8 by averaging and rounded to sixteenths. Flat patches
    are rejected: a patch of sky is the same image in any photograph.

    Args:
        which: ``"auxiliary"`` cuts from ``china.jpg``, ``"test"`` from ``flower.jpg``.
        n: number of images.
        seed: of the draw.
    """
    from sklearn.datasets import load_sample_image

    check_choice(which, "which", tuple(PHOTOS))
    check_count(n, "n", low=1)
    rng = np.random.default_rng(check_seed(seed))
    photo = Image.fromarray(load_sample_image(PHOTOS[which])).convert("L")
    cut: list[np.ndarray] = []
    while len(cut) < n:
        side = int(rng.integers(16, 97))
        left = int(rng.integers(photo.width - side + 1))
        top = int(rng.integers(photo.height - side + 1))
        box = (left, top, left + side, top + side)
        square = np.asarray(photo.resize((8, 8), Image.Resampling.BOX, box)) / 255
        if square.std() >= FLAT:
            cut.append(square)
    return _images(cut)


def noise(n: int, seed: int) -> Float[Tensor, "n 1 8 8"]:
    """Independent pixels, uniform over the 17 grey levels of the digits."""
    check_count(n, "n", low=1)
    levels = np.random.default_rng(check_seed(seed)).integers(0, 17, (n, 8, 8))
    return _images(list(levels / 16))


def _images(cut: list[np.ndarray]) -> Float[Tensor, "n 1 8 8"]:
    """Stack to float32 (n, 1, 8, 8) with the 17 grey levels of the digits."""
    return torch.tensor(np.round(np.stack(cut)[:, None] * 16) / 16, dtype=torch.float32)
