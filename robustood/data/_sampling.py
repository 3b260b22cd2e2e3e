"""Images from wherever they lie: a folder, a file of arrays, or a set."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustood.data._files import images_in, read_image
from robustood.data._packs import read_pack
from robustood.data._sets import load
from robustood.inputs import check_count, check_path, check_seed

_SET = re.compile(r"[\w-]+(:[\w-]*)?").fullmatch


def sample(
    source: str | Path,
    n: int | None = None,
    *,
    size: int = 32,
    seed: int = 0,
    root: str | Path | None = None,
) -> Tensor:
    """Images from a folder, a file of arrays or a set, all of them or a random part, in their order.

    Args:
        source: a folder of images, with or without a subfolder per class; a ``.npy`` file, or a ``.npz`` file with one
            array, (samples, ...) of 8-bit pixels or floats; a pack; or the name of a set, as for :func:`load`.
        n: number of images, drawn without replacement; all if there are fewer, or if it is None.
        size: height and width of images from a folder: the shorter side resized, then a centre crop.
        seed: of the draw.
        root: folder of the packs.

    Returns:
        Images (samples, channel, height, width) as uint8; arrays with their own shape, floats as float32.

    Raises:
        ValueError: if nothing is there, or it cannot be read; the message names the source.
    """
    check_path(source, "source")
    if root is not None:
        check_path(root, "root")
    size, seed = check_count(size, "size", low=1), check_seed(seed)
    if n is not None:
        n = check_count(n, "n", low=1)
    place = Path(source).expanduser()
    if place.is_dir():
        files = images_in(place)[0]
        chosen = [files[i] for i in _draw(len(files), n, seed)]
        images = np.stack([read_image(file, size)[0] for file in chosen])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if place.is_file():
        found = _array(place)
    elif _SET(str(source)):
        found = load(str(source), root=root).x
    else:
        raise ValueError(
            f"source must be a folder of images, a .npy or .npz file, or the name of a set such as cifar10:test, and "
            f"there is no {str(source)!r}"
        )
    return found[_draw(len(found), n, seed)]


def _draw(there: int, n: int | None, seed: int) -> list[int]:
    """Which of the images, in their order."""
    if n is None or n >= there:
        return list(range(there))
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:n].tolist())


def _array(file: Path) -> Tensor:
    """The array in a file, or the images of a pack."""
    try:
        held = np.load(file, allow_pickle=False)
        if isinstance(held, np.lib.npyio.NpzFile):
            with held:
                if "blob" in held.files:
                    return read_pack(file).x
                if len(held.files) != 1:
                    raise ValueError(f"it holds {len(held.files)} arrays, not one")
                held = held[held.files[0]]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"source {file} is not a .npy file, nor a .npz file with one array ({error}); write it by np.save"
        ) from error
    if held.dtype not in (np.uint8, np.float32, np.float64, np.float16) or not held.ndim > 1:
        raise ValueError(
            f"source {file} must hold (samples, ...) of 8-bit pixels or floats, got {held.dtype} of shape "
            f"{held.shape}"
        )
    if not held.size:
        raise ValueError(f"source {file} is empty (shape {held.shape}); save at least one image")
    found = torch.from_numpy(held)
    return found if found.dtype == torch.uint8 else found.float()
