"""Image sets by name: found in a folder of packs, fetched once, or made from your own images.

The folder is the argument ``root``, else the environment's ``ROBUSTOOD_DATA``, else ``data/cache``. A set
``NAME`` with a split is the file ``NAME_SPLIT.npz``, or ``NAME32_SPLIT.npz`` where the images were shrunk
to 32x32; longer names, ``NAME_SPLIT_PART.npz``, are parts of one set, in alphabetical order.

Nothing is downloaded here; :mod:`robustood.data.fetching` does that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from tqdm import tqdm

from robustood.data.base import Loaded
from robustood.data.files import images_in, read_image
from robustood.data.packs import digest, made_from, read_idx, read_pack, write_pack
from robustood.inputs import check_count, check_instance, check_path, check_text

# Sets that torchvision downloads: its class, the size of our images, and the arguments for each split.
_TWO = {"train": [{"train": True}], "test": [{"train": False}]}
_NAMED = {"train": [{"split": "train"}], "test": [{"split": "test"}]}
OFFICIAL: dict[str, tuple[str, int, dict[str, list[dict[str, Any]]]]] = {
    "cifar10": ("CIFAR10", 32, _TWO),
    "cifar100": ("CIFAR100", 32, _TWO),
    "gtsrb": ("GTSRB", 32, _NAMED),
    "svhn": ("SVHN", 32, _NAMED),
    "mnist": ("MNIST", 28, _TWO),
    "textures": ("DTD", 32, {"": [{"split": part} for part in ("train", "val", "test")]}),
}
IDX = {"train": "train", "test": "t10k"}
WORDNET = re.compile(r"n\d{8}").fullmatch  # such as n02085620
RULES = 2  # of reading files of images; a pack that was made by others is made again


def root(path: str | Path | None = None) -> Path:
    """The folder of the packs: the argument, else ``ROBUSTOOD_DATA``, else ``data/cache``."""
    if path is not None:
        check_path(path, "path: root")
    if path := path or os.environ.get("ROBUSTOOD_DATA"):
        return Path(path).expanduser()
    checkout = Path(__file__).parents[2]
    base = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return base / "data" / "cache"


_root = root  # below, root is an argument


# ---- loading ----------------------------------------------------------------------------------


def load(name: str, split: str | None = None, root: str | Path | None = None) -> Loaded:
    """A set of images from its packs; downloads nothing.

    Args:
        name: such as ``"cifar10"``, or with the split ``"cifar10:test"``.
        split: such as ``"train"``; None for a set without splits.
        root: folder of the packs.

    Returns:
        Images as uint8 (n, channel, height, width) and labels; ``jpeg`` says if they were compressed.

    Raises:
        ValueError: if the set is not there (the message says how to get it), or is damaged.
    """
    name, split = named(name, split)
    place = _root(root)
    if files := _find(name, split, place):
        return replace(_joined(files), name=name)
    if name == "mnist" and split in IDX and (place / "mnist").is_dir():
        return _mnist(place / "mnist", split)
    wanted = f"{name}:{split}" if split else name
    raise ValueError(
        f"no set {wanted!r} in {place}; there are: {', '.join(available(place)) or 'none'}. "
        f"{advice(wanted)}, or name another folder in ROBUSTOOD_DATA"
    )


def available(root: str | Path | None = None) -> list[str]:
    """The sets in a folder, as :func:`load` takes them: ``["cifar10:test", "cifar10:train"]``."""
    place = _root(root)
    stems = [
        re.fullmatch(r"(.+?)(?:32)?(?:_([^_]+)(?:_.*)?)?", p.stem) for p in place.glob("*.npz")
    ]
    found = {f"{m[1]}:{m[2]}" if m[2] else m[1] for m in stems if m}
    found |= {f"mnist:{s}" for s, p in IDX.items() if any(place.glob(f"mnist/{p}-images*.gz"))}
    return sorted(found)


def check(name: str, split: str | None = None, root: str | Path | None = None) -> dict[str, Any]:
    """Read a set in full and say what it holds, for a look or a comparison between machines."""
    found = load(name, split, root)
    return {
        "n": len(found),
        "shape": tuple(found.x.shape[1:]),
        "classes": len(found.names) or int(found.y.max()) + 1,
        "counts": torch.bincount(found.y, minlength=len(found.names)).tolist(),
        "jpeg": found.jpeg,
        "notes": found.notes,
        "sha256": digest(found.x),
    }


def named(name: str, split: str | None) -> tuple[str, str | None]:
    """Name and split, whether written as one or as two."""
    if not isinstance(name, str) or not isinstance(split, str | None):
        raise ValueError(
            f"name and split must be texts such as 'mine', 'test', got {name!r}, {split!r}"
        )
    name, _, second = name.partition(":")
    if split and second and split != second:
        raise ValueError(f"split must be named once, got {second!r} in the name and {split!r}")
    for key, value in {"name": name, "split": split or second}.items():
        if not re.fullmatch(r"[\w-]+" if key == "name" else r"[\w-]*", value):
            raise ValueError(f"{key} must be of letters, digits, - and _, got {value!r}")
    return name, split or second or None


def _find(name: str, split: str | None, place: Path) -> list[Path]:
    """A set's only file, or its parts in alphabetical order."""
    stem = f"{re.escape(name)}(32)?" + (f"_{re.escape(split)}" if split else "")
    files = sorted(place.glob("*.npz"))
    whole = [file for file in files if re.fullmatch(stem, file.stem)]
    if len(whole) > 1:
        raise ValueError(f"{whole[0]} and {whole[1].name} are the same set: delete one of them")
    # A whole set comes before the parts of one: "_train" holds what "_train_first1000" does.
    return whole or [file for file in files if split and re.fullmatch(f"{stem}_.+", file.stem)]


def _joined(files: list[Path]) -> Loaded:
    parts = [read_pack(file) for file in files]
    first = parts[0]
    for part, file in zip(parts, files):
        for key in ("names", "ids", "jpeg"):
            if getattr(part, key) != getattr(first, key):
                raise ValueError(
                    f"{files[0]} and {file.name} differ in {key}: they cannot be parts of one set; "
                    "rename or delete one of them"
                )
        if part.x.shape[1:] != first.x.shape[1:]:
            raise ValueError(f"{files[0]} and {file.name} hold images of different sizes")
    if len(parts) == 1:
        return first
    return replace(
        first,
        x=torch.cat([part.x for part in parts]),
        y=torch.cat([part.y for part in parts]),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _mnist(place: Path, split: str) -> Loaded:
    images = read_idx(place / f"{IDX[split]}-images-idx3-ubyte.gz")
    labels = read_idx(place / f"{IDX[split]}-labels-idx1-ubyte.gz")
    x, y = torch.tensor(images)[:, None], torch.tensor(labels).long()
    return Loaded(x, y, name="mnist", names=tuple("0123456789"))


def advice(name: str) -> str:
    """How to get a set that is not there."""
    if (whole := name.partition(":")[0]) in OFFICIAL:
        return f"Get it with `robustood data fetch {whole}`"
    return f"Make it from a folder of images with `robustood data pack FOLDER --name {name}`"


# ---- your own images --------------------------------------------------------------------------


def folder(
    path: str | Path,
    name: str,
    size: int = 32,
    root: str | Path | None = None,
    split: str | None = None,
) -> Loaded:
    """Any tree of images as a set: Places365, LSUN, Tiny-ImageNet, your own.

    The folders directly under ``path`` are the classes, in alphabetical order; without any, all labels
    are 0. Images are sorted by their path, brought to 8-bit RGB (``data/files.py`` says how), shrunk
    to ``size`` (shorter side, then the middle) and kept as a pack ``NAME32_SPLIT.npz``, which the next call
    reads if the tree has not changed since.

    Args:
        path: the tree.
        name, split: of the set, for :func:`load`.
        size: height and width in pixels; another one than 32 becomes part of the name.
        root: folder of the packs.

    Returns:
        The set. ``jpeg`` is the usual quality if most images are JPEG files of that very size; shrunk
        photographs no longer carry their blocks. ``notes`` says what was done to files that are not
        ordinary, and which were left out.

    Raises:
        ValueError: for a folder or a class without images, an image that cannot be read, or a name that
            is taken.
    """
    check_path(path, "path")
    name, split = named(name, split)
    check_count(size, "size", low=1)
    tree = Path(path).expanduser()
    files, left_out = images_in(tree)
    listed = [(file.relative_to(tree).as_posix(), file.stat()) for file in files]
    stamps = [[str(size), RULES, left_out], *([n, s.st_size, s.st_mtime_ns] for n, s in listed)]
    source = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    target = _root(root) / f"{name}{size}{'_' if split else ''}{split or ''}.npz"
    made = made_from(target) if target.exists() else None
    if made == "":
        raise ValueError(f"{target} is there and was made of no folder; choose another name")
    if made != source:
        # A Mac may write the same letters in another way.
        classes = [normalize("NFC", n.partition("/")[0]) if "/" in n else "" for n, _ in listed]
        names = sorted(set(classes))
        if "" in names and len(names) > 1:
            raise ValueError(f"{tree} holds images beside folders of images; move them into one")
        read = [read_image(file, size) for file in tqdm(files, desc=name, disable=None)]
        blocks = Counter(jpeg for _, jpeg, _ in read if jpeg)
        changes = Counter(change for *_, changes in read for change in changes)
        notes = [f"{n} of {len(read)} images: {change}" for change, n in sorted(changes.items())]
        write_pack(
            target,
            np.stack([image for image, *_ in read]),
            [names.index(c) for c in classes],
            [n for n in names if n],
            jpeg=blocks.most_common(1)[0][0] if 2 * blocks.total() > len(read) else None,
            source=source,
            notes=[*notes, *_alike(names), *([left_out] if left_out else [])],
        )
    return replace(read_pack(target), name=name)


def _alike(names: list[str]) -> list[str]:
    """A note for classes whose names differ in capitals alone."""
    by_letters: dict[str, list[str]] = {}
    for name in names:
        by_letters.setdefault(name.casefold(), []).append(name)
    twins = [", ".join(same) for same in by_letters.values() if len(same) > 1]
    return [f"classes of their own, though they differ in capitals alone: {t}" for t in twins]


# ---- outliers that are none -------------------------------------------------------------------


def without_overlap(outliers: Loaded, known: str) -> Loaded:
    """Drop the outlier classes that show what the in-distribution set shows.

    The classes are listed in ``overlap.toml``, by their ids or, where a set has none, by their names.

    Args:
        outliers: with ``ids`` or ``names``; labels and names of the other classes stay as they are.
        known: name of the in-distribution set, such as ``"cifar100"``.

    Raises:
        ValueError: if no list says how the two sets overlap, or names the classes in another way, or if
            nothing would be left.
    """
    check_instance(outliers, "outliers", Loaded, "a set with its classes' names; use load(..)")
    check_instance(outliers, "outliers", Loaded, "a set, such as load(name) gives")
    check_text(known, "known")
    file = Path(__file__).with_name("overlap.toml")
    lists = tomllib.loads(file.read_text("utf-8")).get(outliers.name, {})
    labels = outliers.ids or outliers.names
    if known not in lists or not labels:
        raise ValueError(
            f"no list says which classes of {outliers.name!r} are in {known!r}: add "
            f"[{outliers.name}] {known} = [..] with their ids or names to {file} (an empty list for "
            "none), and give the outlier set ids or names"
        )
    listed = lists[known]
    if listed and all(map(WORDNET, listed)) and not all(map(WORDNET, labels)):
        raise ValueError(
            f"the classes of {outliers.name!r} ({', '.join(labels[:3])}, ...) must be named by WordNet id, as "
            f"in the list of those that are in {known!r}: sort its images into one folder a class, such as "
            f"{listed[0]}, and pack them again"
        )
    dropped = torch.tensor([label in listed for label in labels])
    kept = ~dropped[outliers.y]
    if not kept.any():
        raise ValueError(
            f"all images of {outliers.name!r} show classes of {known!r}; name another set of outliers"
        )
    return replace(outliers, x=outliers.x[kept], y=outliers.y[kept])
