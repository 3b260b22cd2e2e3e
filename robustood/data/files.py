"""Files of images: which ones a folder holds, and what becomes of each as 8-bit RGB.

An ordinary file keeps its pixels. What else comes is brought into the same form, and the pack says how often:

===========================  ====================================================================
16 bits                      their full range, 0 to 65535, becomes 0 to 255
floats                       [0, 1] becomes 0 to 255; others are refused, since nobody knows their range
transparency                 laid on white
turned by the EXIF data      upright
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

from robustood.data.packs import jpeg_quality

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff"}
PASSED_OVER = (".", "__MACOSX")  # how files and folders of the system begin
ORIENTATION, BITS = 274, 258  # tags of EXIF and TIFF
BACKGROUND = (255, 255, 255, 255)
SIXTEEN, FLOATS = "16 bits, brought to 8", "floats, brought to 8 bits"
LAID, UPRIGHT = "transparent, laid on white", "turned upright as the EXIF data say"
FIRST, RGB = "several frames or pages, the first taken", "CMYK, turned into RGB"


# ---- which files ------------------------------------------------------------------------------


def images_in(tree: Path) -> tuple[list[Path], str]:
    """The images in a folder and in the folders inside it, and what was left out.

    What begins with a dot or ``__MACOSX`` is passed over; links are followed.

    Returns:
        The files sorted by their path, and a line such as ``"3 left out: 2 .heic, 1 .txt"``, empty for none.

    Raises:
        ValueError: for a folder without images, a folder directly inside it without images beside others
            that have some, a link to nothing, or a link to a folder that holds it.
    """
    if not tree.is_dir():
        raise ValueError(f"path must be a folder of images, got {str(tree)!r}")
    found, others = list[Path](), list[Path]()
    for file in _walk(tree):
        (found if file.suffix.lower() in ENDINGS else others).append(file)
    known = f"files that end in {' '.join(sorted(ENDINGS))} count"
    if not found:
        raise ValueError(f"no images in {tree}; {known}{_those(others)}")
    if broken := [file for file in found if not file.is_file()]:
        raise ValueError(f"{broken[0]} is a link to nothing, or no file; take it out of the folder")
    filled = {file.relative_to(tree).parts[0] for file in found}
    if tree not in {file.parent for file in found}:  # otherwise the folders inside are no classes
        for place in sorted(tree.iterdir()):
            if place.is_dir() and place.name not in filled and not _passed_over(place.name):
                own = [file for file in others if place in file.parents]
                raise ValueError(
                    f"{place} holds no image, so its class would be lost; {known}{_those(own)}. "
                    "Convert them, or take the folder out"
                )
    left_out = f"{len(others)} left out{_those(others, ': ')}" if others else ""
    return sorted(found, key=lambda file: file.relative_to(tree).as_posix()), left_out


def _walk(tree: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    for place, folders, names in os.walk(tree, onerror=refuse, followlinks=True):
        here = Path(place)
        folders[:] = [name for name in folders if not _passed_over(name)]
        for link in (here / name for name in folders if (here / name).is_symlink()):
            if link.resolve() in {above.resolve() for above in (here, *here.parents)}:
                raise ValueError(f"{link} is a link to a folder that holds it; take it out")
        yield from (here / name for name in names if not _passed_over(name))


def _passed_over(name: str) -> bool:
    return name.startswith(PASSED_OVER)


def _those(files: list[Path], start: str = ", and here are ") -> str:
    """Files counted by their ending, as the end of a sentence."""
    counts = Counter(file.suffix.lower() or "without ending" for file in files)
    told = [f"{n} {ending}" for ending, n in sorted(counts.items())]
    return start + ", ".join(told) if told else ""


# ---- what becomes of one ----------------------------------------------------------------------


def read_image(file: Path, size: int) -> tuple[np.ndarray, int | None, list[str]]:
    """A file as 8-bit RGB (size, size, 3): shorter side shrunk, then the middle.

    Returns:
        The pixels; the quality of a JPEG file of that very size, whose blocks the pixels carry, else None; and
        what was done beyond shrinking.

    Raises:
        ValueError: for a file that is no image, one with more pixels than Pillow allows, or one whose range
            of values nobody knows; the message names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                blocks = image.format == "JPEG" and image.size == (size, size)
                quality = jpeg_quality(image) if blocks else None
                plain, changes = rgb(image)
                return shrunk(plain, size), quality, changes
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit; make it smaller or "
            "take it out of the folder"
        ) from error
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(
            f"{file} is no readable image ({error}); mend it or take it out of the folder"
        ) from error


def rgb(image: Any) -> tuple[Any, list[str]]:
    """A Pillow image as 8-bit RGB, upright and opaque, and what was done for it.

    Raises:
        ValueError: for values whose range nobody knows.
    """
    changes, top = [], _top(image)
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
            image = Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer)
        else:
            image = layer
    return image.convert("RGB"), changes


def _top(image: Any) -> float:
    """The largest value that a file's pixels may have; infinite where nobody knows."""
    if image.mode == "F":
        return 1.0
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return math.inf  # 32 bits
    return 2.0 ** getattr(image, "tag_v2", {}).get(BITS, (16,))[0] - 1


def _eight_bits(image: Any, top: float) -> np.ndarray:
    """Grey values from 0 to ``top`` as 8 bits."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= top < math.inf:
        raise ValueError(
            f"its values lie in [{low:g}, {high:g}], and nobody knows their range; save whole numbers in "
            "8 or 16 bits, floats in [0, 1]"
        )
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = BACKGROUND[0]
    return grey


def shrunk(image: Any, size: int) -> np.ndarray:
    """A Pillow image with its shorter side shrunk to ``size``, then its middle: (size, size, ...)."""
    if image.size != (size, size):
        from torchvision.transforms.functional import center_crop, resize

        image = center_crop(resize(image, [size]), [size, size])
    return np.asarray(image)
