"""Image sets by name: found in a folder of packs, or made from your own images.

The folder is the argument ``root``, else the environment variable ``ROBUSTOOD_DATA``, else ``data/cache``. A set
``NAME`` with a split is the file ``NAME_SPLIT.npz``, or ``NAME32_SPLIT.npz`` if the images were resized
to 32x32; files with longer names, ``NAME_SPLIT_PART.npz``, are parts of one set, in alphabetical order.

:mod:`robustood.data._fetching` downloads sets.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from tqdm import tqdm

from robustood.checkpoints import Json
from robustood.data._base import Loaded
from robustood.data._files import images_in, read_image
from robustood.data._packs import digest, made_from, read_idx, read_pack, write_pack
from robustood.inputs import check_count, check_instance, check_path, check_text

# Sets that torchvision downloads: its class, the size of our images, and the arguments for each split.
_TWO = {"train": [{"train": True}], "test": [{"train": False}]}
_NAMED = {"train": [{"split": "train"}], "test": [{"split": "test"}]}
OFFICIAL: dict[str, tuple[str, int, Mapping[str, Sequence[Mapping[str, object]]]]] = {
    "cifar10": ("CIFAR10", 32, _TWO),
    "cifar100": ("CIFAR100", 32, _TWO),
    "gtsrb": ("GTSRB", 32, _NAMED),
    "svhn": ("SVHN", 32, _NAMED),
    "mnist": ("MNIST", 28, _TWO),
    "textures": ("DTD", 32, {"": [{"split": part} for part in ("train", "val", "test")]}),
}
_IDX = {"train": "train", "test": "t10k"}
_WORDNET = re.compile(r"n\d{8}").fullmatch  # such as n02085620
_RULES = 2  # version of the conversion of images; a pack made by another version is made again


def root(path: str | Path | None = None) -> Path:
    """The folder of the packs: the argument, else ``ROBUSTOOD_DATA``, else ``data/cache``."""
    if path is not None:
        check_path(path, "root")
    if path := path or os.environ.get("ROBUSTOOD_DATA"):
        return Path(path).expanduser()
    checkout = Path(__file__).parents[2]
    base = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return base / "data" / "cache"


_root = root  # below, root is an argument


# ---- loading ----------------------------------------------------------------------------------


def load(name: str, split: str | None = None, root: str | Path | None = None) -> Loaded:
    """A set of images from its packs, without a download.

    Args:
        name: such as ``"cifar10"``, or with the split ``"cifar10:test"``.
        split: such as ``"train"``; None for a set without splits.
        root: folder of the packs.

    Returns:
        Images as uint8 (n, channel, height, width) and labels; ``jpeg`` is the quality of an earlier compression.

    Raises:
        ValueError: if the set is missing (the message says how to get it) or damaged.
    """
    name, split = named(name, split)
    place = _root(root)
    if files := _find(name, split, place):
        return replace(_joined(files), name=name)
    if name == "mnist" and split in _IDX and (place / "mnist").is_dir():
        return _mnist(place / "mnist", split)
    wanted = f"{name}:{split}" if split else name
    raise ValueError(
        f"no set {wanted!r} in {place}; there are: {', '.join(available(place)) or 'none'}. "
        f"{advice(wanted)}, or set ROBUSTOOD_DATA to another folder"
    )


def available(root: str | Path | None = None) -> list[str]:
    """The sets in a folder, as :func:`load` takes them: ``["cifar10:test", "cifar10:train"]``."""
    place = _root(root)
    found = {":".join(_parted(pack.stem)) for pack in place.glob("*.npz")}
    found |= {f"mnist:{s}" for s, p in _IDX.items() if any(place.glob(f"mnist/{p}-images*.gz"))}
    return sorted(found)


def _parted(stem: str) -> list[str]:
    """Name and split, if any, of a file such as ``tiny_imagenet32_train_a``: a size, if there is one, ends the name."""
    split = "(?:_([^_]+)(?:_.*)?)?"
    kinds = (f"(.+?)32{split}", r"(.+?\d)_([^_]+)(?:_.*)?", f"([^_]+){split}")
    found = next(filter(None, (re.fullmatch(kind, stem) for kind in kinds)), None)
    return [part for part in found.groups() if part] if found else [stem]


def check(name: str, split: str | None = None, root: str | Path | None = None) -> Json:
    """Read a whole set and summarise it, for inspection or a comparison between machines."""
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
    """Name and split, whether given together or apart."""
    if not isinstance(name, str) or not isinstance(split, str | None):
        raise ValueError(
            f"name and split must be strings such as 'mine', 'test', got {name!r}, {split!r}"
        )
    name, _, second = name.partition(":")
    if split and second and split != second:
        raise ValueError(f"split must be given once, got {second!r} in the name and {split!r}")
    for key, value in {"name": name, "split": split or second}.items():
        if not re.fullmatch(r"[\w-]+" if key == "name" else r"[\w-]*", value):
            raise ValueError(f"{key} must consist of letters, digits, - and _, got {value!r}")
    return name, split or second or None


def _find(name: str, split: str | None, place: Path) -> list[Path]:
    """The only file of a set, or its parts in alphabetical order."""
    stem = f"{re.escape(name)}(32)?" + (f"_{re.escape(split)}" if split else "")
    files = sorted(place.glob("*.npz"))
    whole = [file for file in files if re.fullmatch(stem, file.stem)]
    if len(whole) > 1:
        raise ValueError(f"{whole[0]} and {whole[1].name} are the same set; delete one of them")
    # A whole set takes precedence over parts: "_train" contains "_train_first1000".
    return whole or [file for file in files if split and re.fullmatch(f"{stem}_.+", file.stem)]


def _joined(files: list[Path]) -> Loaded:
    parts = [read_pack(file) for file in files]
    first = parts[0]
    for part, file in zip(parts, files):
        for key in ("names", "ids", "jpeg"):
            if getattr(part, key) != getattr(first, key):
                raise ValueError(
                    f"{files[0]} and {file.name} differ in {key}, so they cannot be parts of one set; "
                    "rename or delete one of them"
                )
        if part.x.shape[1:] != first.x.shape[1:]:
            raise ValueError(
                f"{files[0]} and {file.name} have images of different sizes; delete one of them"
            )
    if len(parts) == 1:
        return first
    return replace(
        first,
        x=torch.cat([part.x for part in parts]),
        y=torch.cat([part.y for part in parts]),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _mnist(place: Path, split: str) -> Loaded:
    images = read_idx(place / f"{_IDX[split]}-images-idx3-ubyte.gz")
    labels = read_idx(place / f"{_IDX[split]}-labels-idx1-ubyte.gz")
    x, y = torch.tensor(images)[:, None], torch.tensor(labels).long()
    return Loaded(x, y, name="mnist", names=tuple("0123456789"))


def advice(name: str) -> str:
    """How to get a missing set."""
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

    The folders directly under ``path`` are the classes, in alphabetical order; if there are none, all labels
    are 0. Images are sorted by path, converted to 8-bit RGB (see ``data/files.py``), resized
    to ``size`` (shorter side, then a centre crop) and stored as a pack ``NAME32_SPLIT.npz``, which the next call
    reads if the tree has not changed.

    Args:
        path: the tree.
        name, split: of the set, for :func:`load`.
        size: height and width in pixels; it becomes part of the file name.
        root: folder of the packs.

    Returns:
        The set. ``jpeg`` is the most common quality if most images are JPEG files of exactly that size; resized
        photographs no longer show JPEG blocks. ``notes`` says how unusual files were converted, and which were
        left out.

    Raises:
        ValueError: for a folder or a class without images, an image that cannot be read, or a name that
            is in use.
    """
    check_path(path, "path")
    name, split = named(name, split)
    check_count(size, "size", low=1)
    tree = Path(path).expanduser()
    files, left_out = images_in(tree)
    listed = [(file.relative_to(tree).as_posix(), file.stat()) for file in files]
    stamps = [[str(size), _RULES, left_out], *([n, s.st_size, s.st_mtime_ns] for n, s in listed)]
    source = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    target = _root(root) / f"{name}{size}{'_' if split else ''}{split or ''}.npz"
    made = made_from(target) if target.exists() else None
    if made == "":
        raise ValueError(f"{target} exists and was not made from a folder; choose another name")
    if made != source:
        # macOS may encode the same letters differently.
        classes = [normalize("NFC", n.partition("/")[0]) if "/" in n else "" for n, _ in listed]
        names = sorted(set(classes))
        if "" in names and len(names) > 1:
            raise ValueError(
                f"{tree} contains images beside folders of images; move them into a folder"
            )
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
    """A note for classes whose names differ only in case."""
    by_letters: dict[str, list[str]] = {}
    for name in names:
        by_letters.setdefault(name.casefold(), []).append(name)
    twins = [", ".join(same) for same in by_letters.values() if len(same) > 1]
    return [f"separate classes, though their names differ only in case: {t}" for t in twins]


# ---- outliers that are not --------------------------------------------------------------------


def without_overlap(outliers: Loaded, known: str) -> Loaded:
    """Drop the outlier classes that also occur in the in-distribution set.

    The classes are listed in ``overlap.toml``, by their ids or, if a set has none, by their names.

    Args:
        outliers: with ``ids`` or ``names``; labels and names of the other classes are unchanged.
        known: name of the in-distribution set, such as ``"cifar100"``.

    Raises:
        ValueError: if there is no list for the two sets, if it names the classes in another way, or if
            nothing would be left.
    """
    check_instance(outliers, "outliers", Loaded, "a set, such as load(name) returns")
    check_text(known, "known")
    file = Path(__file__).with_name("overlap.toml")
    lists = tomllib.loads(file.read_text("utf-8")).get(outliers.name, {})
    labels = outliers.ids or outliers.names
    if known not in lists or not labels:
        raise ValueError(
            f"there is no list of the classes of {outliers.name!r} that are in {known!r}: add "
            f"[{outliers.name}] {known} = [..] with their ids or names to {file} (an empty list for "
            "none), and give the outlier set ids or names"
        )
    listed = lists[known]
    if listed and all(map(_WORDNET, listed)) and not all(map(_WORDNET, labels)):
        raise ValueError(
            f"the classes of {outliers.name!r} ({', '.join(labels[:3])}, ...) must be named by WordNet id, as "
            f"in the list of those that are in {known!r}: sort its images into one folder per class, such as "
            f"{listed[0]}, and pack them again"
        )
    dropped = torch.tensor([label in listed for label in labels])
    kept = ~dropped[outliers.y]
    if not kept.any():
        raise ValueError(
            f"all images of {outliers.name!r} show classes of {known!r}; choose another set of outliers"
        )
    return replace(outliers, x=outliers.x[kept], y=outliers.y[kept])
