"""Image files: which ones a folder contains, and how each is converted to 8-bit RGB.

An 8-bit RGB or grey file keeps its pixels. Others are converted, and the pack notes how many:

===========================  ====================================================================
16 bits                      their full range, 0 to 65535, becomes 0 to 255
floats                       [0, 1] becomes 0 to 255; others are refused, as their range is unknown
transparency                 blended with white
rotated by the EXIF data     upright
several frames or pages      the first
CMYK                         RGB
===========================  ====================================================================
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageOps

from robustood.data._packs import jpeg_quality

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff"}
_SKIPPED = (".", "__MACOSX")  # prefixes of system files and folders
ORIENTATION, BITS = 274, 258  # tags of EXIF and TIFF
_BACKGROUND = (255, 255, 255, 255)
SIXTEEN, FLOATS = "16 bits, converted to 8", "floats, converted to 8 bits"
LAID, UPRIGHT = "transparent, blended with white", "rotated upright by the EXIF data"
FIRST, RGB = "several frames or pages, the first used", "CMYK, converted to RGB"


# ---- which files ------------------------------------------------------------------------------


def images_in(tree: Path) -> tuple[list[Path], str]:
    """The images in a folder and its subfolders, and what was left out.

    Names that begin with a dot or ``__MACOSX`` are skipped; links are followed.

    Returns:
        The files sorted by path, and a line such as ``"3 left out: 2 .heic, 1 .txt"``, empty if there are none.

    Raises:
        ValueError: for a folder without images, a direct subfolder without images beside others
            that have some, a broken link, or a link to a folder that contains it.
    """
    if not tree.is_dir():
        raise ValueError(f"path must be a folder of images, got {str(tree)!r}")
    found, others = list[Path](), list[Path]()
    for file in _walk(tree):
        (found if file.suffix.lower() in _ENDINGS else others).append(file)
    known = f"images are files that end in {' '.join(sorted(_ENDINGS))}"
    if not found:
        raise ValueError(f"no images in {tree}; {known}{_those(others)}")
    if broken := [file for file in found if not file.is_file()]:
        raise ValueError(f"{broken[0]} is a broken link, or not a file; remove it from the folder")
    filled = {file.relative_to(tree).parts[0] for file in found}
    if tree not in {file.parent for file in found}:  # otherwise the subfolders are not classes
        for place in sorted(tree.iterdir()):
            if place.is_dir() and place.name not in filled and not _skipped(place.name):
                own = [file for file in others if place in file.parents]
                raise ValueError(
                    f"{place} contains no image, so its class would be missing; {known}{_those(own)}. "
                    "Convert them, or remove the folder"
                )
    left_out = f"{len(others)} left out{_those(others, ': ')}" if others else ""
    return sorted(found, key=lambda file: file.relative_to(tree).as_posix()), left_out


def _walk(tree: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    for place, folders, names in os.walk(tree, onerror=refuse, followlinks=True):
        here = Path(place)
        folders[:] = [name for name in folders if not _skipped(name)]
        for link in (here / name for name in folders if (here / name).is_symlink()):
            if link.resolve() in {above.resolve() for above in (here, *here.parents)}:
                raise ValueError(f"{link} is a link to a folder that contains it; remove it")
        yield from (here / name for name in names if not _skipped(name))


def _skipped(name: str) -> bool:
    return name.startswith(_SKIPPED)


def _those(files: list[Path], start: str = ", and here are ") -> str:
    """The numbers of files by ending, as the end of a sentence."""
    counts = Counter(file.suffix.lower() or "without ending" for file in files)
    told = [f"{n} {ending}" for ending, n in sorted(counts.items())]
    return start + ", ".join(told) if told else ""


# ---- conversion -------------------------------------------------------------------------------


def read_image(file: Path, size: int) -> tuple[np.ndarray, int | None, list[str]]:
    """A file as 8-bit RGB (size, size, 3): the shorter side resized, then a centre crop.

    Returns:
        The pixels; the quality of a JPEG file of exactly that size, whose blocks the pixels keep, else None; and
        the conversions besides resizing.

    Raises:
        ValueError: for a file that is not an image, has more pixels than Pillow allows, or has an unknown
            range of values; the message names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                blocks = image.format == "JPEG" and image.size == (size, size)
                quality = jpeg_quality(image) if blocks else None
                plain, changes = _rgb(image)
                return shrunk(plain, size), quality, changes
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit; make it smaller or "
            "remove it from the folder"
        ) from error
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(
            f"{file} is not a readable image ({error}); repair it or remove it from the folder"
        ) from error


def _rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A Pillow image as 8-bit RGB, upright and opaque, and the conversions that were needed.

    Raises:
        ValueError: for values of unknown range.
    """
    changes, top = [], _top(image)
    if image.mode in ("RGB", "RGBA", "LA") and any(
        "16" in str(tile[3]) for tile in getattr(image, "tile", ())
    ):
        changes.append(SIXTEEN)  # Pillow itself takes the higher byte of these
    if getattr(image, "n_frames", 1) > 1:
        changes.append(FIRST)
    if image.getexif().get(ORIENTATION, 1) in range(2, 9):
        changes.append(UPRIGHT)
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        changes.append(FLOATS if image.mode == "F" else SIXTEEN)
        image = Image.fromarray(_eight_bits(image, top))
    if image.mode == "CMYK":
        changes.append(RGB)
    if {"A", "a"} & {*image.getbands()} or "transparency" in image.info:
        layer = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        if np.asarray(layer)[..., 3].min() < 255:
            changes.append(LAID)
            image = Image.alpha_composite(Image.new("RGBA", layer.size, _BACKGROUND), layer)
        else:
            image = layer
    return image.convert("RGB"), changes


def _top(image: Image.Image) -> float:
    """The largest value that the pixels of a file may have; infinite if unknown."""
    if image.mode == "F":
        return 1.0
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return math.inf  # 32 bits
    return 2.0 ** getattr(image, "tag_v2", {}).get(BITS, (16,))[0] - 1


def _eight_bits(image: Image.Image, top: float) -> np.ndarray:
    """Grey values from 0 to ``top`` as 8 bits."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= top < math.inf:
        raise ValueError(
            f"its values lie in [{low:g}, {high:g}], and their range is unknown; save integers in "
            "8 or 16 bits, or floats in [0, 1]"
        )
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = _BACKGROUND[0]
    return grey


def shrunk(image: Any, size: int) -> np.ndarray:
    """A Pillow image with its shorter side resized to ``size``, cropped at the centre: (size, size, ...)."""
    if image.size != (size, size):
        from torchvision.transforms.functional import center_crop, resize

        image = center_crop(resize(image, [size]), [size, size])
    return np.asarray(image)
