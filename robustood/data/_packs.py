"""Packs: a set of images in one small file, portable and verified by checksum.

A pack is an ``.npz`` of plain arrays, never a pickle, so that reading one runs no code:

==========================  =====================================================================
``blob``, ``offsets``       concatenated image files and where each begins: *mosaics* of ``per``
                            images in rows of ``cols``, as lossless WebP
``n``, ``labels``           number of images (the last mosaic is padded) and one label each
``names``, ``ids``          of the classes; may be empty
``jpeg``                    quality of an earlier JPEG compression of the pixels; 0 for none
``height`` ...              and ``width``, ``channels``; without them 32, 32 and 3
``sha256``                  of the decoded pixels (n, height, width, channels)
``source``                  a digest of the folder from which the pack was made; may be empty
``notes``                   how files of that folder were converted; may be empty
==========================  =====================================================================

Two older formats are read too: mosaics without the fields from ``jpeg`` on, which may be JPEG, and JPEG bodies
that share one header (``head``, ``blob``, ``offsets``). The quality of a JPEG is inferred from its quantisation table.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import ceil, isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from PIL import Image
from torch import Tensor

from robustood.checkpoints import write_whole
from robustood.data._base import Loaded
from robustood.inputs import check_count, check_path, check_several, check_text

Images = UInt8[Tensor, "n channel height width"] | UInt8[np.ndarray, "n height width channel"]
Labels = Integer[Tensor, " n"] | Integer[np.ndarray, " n"] | Sequence[int]
_END = b"\xff\xd9"  # closes a JPEG file
_QUALITY = "Pillow's default is 75"


# ---- writing ----------------------------------------------------------------------------------


def write_pack(
    path: str | Path,
    images: Images,
    labels: Labels,
    names: Sequence[str] = (),
    ids: Sequence[str] = (),
    jpeg: int | None = None,
    *,
    per: int = 100,
    source: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write images as a pack; equal arguments give equal bytes.

    Args:
        path: of the file; its folder is created, an existing file is replaced.
        images: 8-bit, grey or RGB; tensors are NCHW and arrays NHWC.
        labels: one per image, from 0.
        names, ids: of the classes, one per label.
        jpeg: quality of an earlier JPEG compression of the images, None for none.
        per: images per mosaic.
        source: a digest of what the pack is made from.
        notes: how the images were converted.

    Returns:
        The path.

    Raises:
        ValueError: for images that are not 8-bit, or labels that do not fit them.
        OSError: if the file cannot be written; an existing file is unchanged.
    """
    rows = _nhwc(images)
    y = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    check_text(source, "source")
    for key, given in {"names": names, "ids": ids, "notes": notes}.items():
        check_several(given, key, "strings", 0)
        for word in given:
            check_text(word, f"each of {key}")
    check_count(per, "per", low=1)
    _check_labels(y, len(rows), {"names": names, "ids": ids})
    if jpeg is not None:
        check_count(jpeg, "jpeg", 1, 100, _QUALITY)
    per = min(per, len(rows))
    cols = isqrt(per - 1) + 1
    mosaics = [_mosaic(rows[i : i + per], per, cols) for i in range(0, len(rows), per)]
    numbers = {"n": len(y), "per": per, "cols": cols, "jpeg": jpeg or 0}
    numbers |= dict(zip(("height", "width", "channels"), rows.shape[1:]))
    texts = {"names": names, "ids": ids, "notes": notes, "sha256": digest(rows), "source": source}
    arrays: dict[str, Any] = {
        "blob": np.frombuffer(b"".join(mosaics), np.uint8),
        "offsets": np.cumsum([0, *map(len, mosaics)], dtype=np.int64),
        "labels": y.astype(np.min_scalar_type(int(y.max()))),
        **{key: np.array(value, np.int64) for key, value in numbers.items()},
        **{key: np.array(value, str) for key, value in texts.items()},
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    check_path(path, "path")
    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError) -> OSError:
    """The same error with the name of the file and the fix."""
    fix = "make room, or set ROBUSTOOD_DATA to a folder that can be written"
    return OSError(error.errno, f"cannot write {path} ({error.strerror or error}); {fix}")


def _nhwc(images: Images) -> np.ndarray:
    """8-bit images, a tensor NCHW or an array NHWC, as an array (n, height, width, channels)."""
    if isinstance(images, Tensor):
        images = images.cpu().numpy()
        images = images.transpose(0, 2, 3, 1) if images.ndim == 4 else images
    if not isinstance(images, np.ndarray):
        raise ValueError(
            f"images must be a uint8 tensor or array, got {type(images).__name__}; use np.stack"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 with 1 or 3 channels, got {images.dtype} of shape "
            f"{images.shape} as (n, height, width, channels); tensors are NCHW, arrays NHWC"
        )
    if not images.size:
        raise ValueError(f"images is empty (shape {images.shape}); pass at least one image")
    return np.ascontiguousarray(images)


def digest(images: Images) -> str:
    """sha256 of the pixels in the order (n, height, width, channels)."""
    return hashlib.sha256(_nhwc(images).data).hexdigest()


def _mosaic(tiles: np.ndarray, per: int, cols: int) -> bytes:
    n, height, width, channels = tiles.shape
    rows = ceil(per / cols)
    sheet = np.zeros((rows * cols, height, width, channels), np.uint8)
    sheet[:n] = tiles
    sheet = sheet.reshape(rows, cols, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, cols * width, channels).repeat(3 // channels, axis=2)
    buffer = io.BytesIO()
    # method=0 takes seconds for the training set of CIFAR-10; thorough methods take minutes and save 8 %.
    Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


def _check_labels(y: np.ndarray, n: int, classes: Mapping[str, Sequence[str]]) -> None:
    if y.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one per image, got {y.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        seen = f" from {y.min()}" if np.issubdtype(y.dtype, np.number) else ""
        raise ValueError(f"labels must be integers of at least 0, got {y.dtype}{seen}")
    for key, given in classes.items():
        if given and len(given) <= y.max():
            raise ValueError(
                f"{key} must have one entry per class, {y.max() + 1}, got {len(given)}"
            )


# ---- reading ----------------------------------------------------------------------------------


def read_pack(path: str | Path) -> Loaded:
    """Read a pack and verify its sha256, if it has one.

    Returns:
        The images as uint8 (n, channel, height, width), named like the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged.
    """
    check_path(path, "path")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"path {path} is not a file; make one with `robustood data pack FOLDER`"
        )
    held = _held(path)
    with _whole(path):
        return _loaded(path.stem, held)


def made_from(path: Path) -> str:
    """The digest of what a pack was made from; empty if the pack has none."""
    return str(_held(path).get("source", ""))


def _held(path: Path) -> dict[str, np.ndarray]:
    content = io.BytesIO(path.read_bytes())
    with _whole(path):
        if not zipfile.is_zipfile(content):
            raise ValueError("it is truncated, or not a .npz file")
        with np.load(content, allow_pickle=False) as pack:
            return {key: pack[key] for key in pack.files}


@contextmanager
def _whole(path: Path) -> Generator[None]:
    """Turn any error while decoding a file into one that says that the file is damaged, and the fix."""
    try:
        yield
    except Exception as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or repr(error)
        raise ValueError(
            f"{path} is damaged: {what}. Delete it, then copy, fetch or make it again"
        ) from error


def _loaded(name: str, held: dict[str, np.ndarray]) -> Loaded:
    labels, offsets, blob = held["labels"], held["offsets"], held["blob"].tobytes()
    classes = {key: tuple(map(str, held.get(key, ()))) for key in ("names", "ids")}
    classes["ids"] = classes["ids"] or tuple(map(str, held.get("wnids", ())))
    n = int(held.get("n", len(labels)))
    _check_labels(labels, n, classes)
    head = held["head"].tobytes() if "head" in held else b""
    if offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets) <= 0).any():
        raise ValueError("its offsets do not divide its blob into images")
    files = (
        io.BytesIO(head + blob[a:b] + (_END if head else b"")) for a, b in zip(offsets, offsets[1:])
    )
    size = tuple(
        int(held.get(key, v)) for key, v in {"height": 32, "width": 32, "channels": 3}.items()
    )
    per, cols = (1, 1) if head else (int(held["per"]), int(held["cols"]))
    if per < 1 or cols < 1 or len(offsets) - 1 != ceil(n / per):
        raise ValueError(f"{len(offsets) - 1} mosaics of {per} cannot hold {n} images")
    x, found = np.empty((n, *size), np.uint8), None
    for i, file in enumerate(files):
        with Image.open(file, formats=("WEBP", "JPEG")) as sheet:
            found = found or (jpeg_quality(sheet) if sheet.format == "JPEG" else None)
            space = x[i * per : (i + 1) * per]
            space[:] = _tiles(sheet, cols, size, len(space))
    if "sha256" in held and (wanted := str(held["sha256"])) != (sha := digest(x)):
        raise ValueError(f"its pixels have sha256 {sha[:12]}…, but it records {wanted[:12]}…")
    return Loaded(
        torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels.astype(np.int64)),
        name=name,
        jpeg=int(held.get("jpeg", 0)) or found,
        notes=tuple(map(str, held.get("notes", ()))),
        **classes,
    )


def _tiles(sheet: Image.Image, cols: int, size: tuple[int, ...], n: int) -> np.ndarray:
    height, width, channels = size
    pixels = np.asarray(sheet.convert("RGB"))
    rows, rest = divmod(len(pixels), height)
    if pixels.shape[1] != cols * width or rest or rows * cols < n:
        raise ValueError(f"a mosaic of {sheet.size} pixels cannot hold {n} images of {size}")
    pixels = pixels.reshape(-1, height, cols, width, 3).swapaxes(1, 2)
    return pixels.reshape(-1, height, width, 3)[:n, ..., :channels]


def read_idx(path: str | Path) -> UInt8[np.ndarray, "..."]:
    """An array from a gzipped idx file, the format in which MNIST is published.

    Raises:
        ValueError: if the file is damaged.
    """
    packed = Path(path).read_bytes()
    with _whole(Path(path)):
        content = gzip.decompress(packed)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not contain 8-bit numbers")
        shape = np.frombuffer(content, ">i4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


# ---- JPEG -------------------------------------------------------------------------------------


def compress(
    images: UInt8[Tensor, "n channel height width"], quality: int
) -> UInt8[Tensor, "n channel height width"]:
    """Images after JPEG compression and decompression, with Pillow's chroma subsampling (4:2:0).

    Outliers that are JPEG files show its 8x8 blocks. A network that is trained to tell them from
    lossless images learns the blocks; copies of its own images with the same blocks prevent that.

    Args:
        images: 8-bit, grey or RGB.
        quality: from 1 to 100; ``Loaded.jpeg`` is that of a set.
    """
    check_count(quality, "quality", 1, 100, _QUALITY)
    rows = _nhwc(images)
    out = np.empty_like(rows)
    for image, copy in zip(rows, out):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
            buffer, "JPEG", quality=int(quality)
        )
        copy[:] = np.asarray(Image.open(buffer)).reshape(copy.shape)
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def jpeg_quality(image: Image.Image) -> int:
    """Quality, from 1 to 100, of Pillow's quantisation table that is closest to that of the file."""
    table = np.array(_tables(image)[0])
    return 1 + int(np.abs(_pillows() - table).sum(1).argmin())


@lru_cache(1)
def _pillows() -> np.ndarray:
    tables = []
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "JPEG", quality=int(quality))
        with Image.open(buffer) as image:
            tables.append(_tables(image)[0])
    return np.array(tables)


def _tables(image: Any) -> dict[int, list[int]]:
    return image.quantization  # of JPEG files only
