"""What a run is made of: splits and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from robustood.inputs import (
    check_count,
    check_device,
    check_images,
    check_instance,
    check_labels,
    check_mapping,
    check_number,
    check_seed,
    check_several,
    check_text,
    check_values,
)
from robustood.inputs import pixels as pixels  # shown as data.pixels

S = TypeVar("S", bound="Split")


@dataclass(frozen=True)
class Split:
    """Inputs (samples, ...) with one target each: labels (samples,), or images."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        such_as = "a tensor (samples, ...), such as torch.as_tensor(...)"
        for name in ("x", "y"):
            check_instance(getattr(self, name), name, Tensor, such_as)
        if self.x.ndim == 0 or self.y.ndim == 0:
            raise ValueError(
                "x and y must have an axis of samples; use x[None] and y[None] for one sample"
            )
        if len(self.x) != len(self.y):
            raise ValueError(
                f"x and y must have the same length, got {len(self.x)} and {len(self.y)}"
            )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self: S, index: slice | Tensor) -> S:
        return replace(self, x=self.x[index], y=self.y[index])

    def to(self: S, device: torch.device | str) -> S:
        check_device(device)
        return replace(self, x=self.x.to(device), y=self.y.to(device))


@dataclass(frozen=True)
class Loaded(Split):
    """A set of 8-bit images (samples, channel, height, width) with the metadata of its pack.

    Attributes:
        name: of the set, such as ``"cifar10"``.
        names: of the classes; may be empty.
        ids: of the classes in another system, such as WordNet ids; may be empty.
        jpeg: quality, if the pixels are decoded JPEG files; None if they were never compressed.
        notes: how unusual files were converted, and which were left out.
    """

    name: str = ""
    names: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    jpeg: int | None = None
    notes: tuple[str, ...] = ()


def hold_out(split: S, n: int, seed: int = 0) -> tuple[S, S]:
    """A labelled split in two: the rest, and n samples in which each class has its share.

    Args:
        split: with integer labels.
        n: number of samples to hold out.
        seed: of the draw; the same seed holds out the same samples.

    Returns:
        The rest and the samples held out, both in the order of the split.

    Raises:
        ValueError: if nothing would be left.
    """
    check_instance(split, "split", Split, "a Split(x, y) with labels")
    check_count(n, "n")
    check_labels(split.y, split.x, name="split.y")
    if n >= len(split):
        raise ValueError(f"n must be below the number of samples, {len(split)}, got {n}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(check_seed(seed)))
    y = split.y.cpu()[order]
    by_class, counts = y.argsort(stable=True), y.bincount()
    # The rank of a sample within its class, scaled to [0, 1]: the n lowest ranks give each class its share.
    rank = torch.empty(len(y), dtype=torch.float64)
    rank[by_class] = torch.arange(len(y), dtype=torch.float64)
    place = (rank - (counts.cumsum(0) - counts)[y] + 0.5) / counts[y]
    held = torch.zeros(len(y), dtype=torch.bool)
    held[order[place.argsort(stable=True)[:n]]] = True
    return split[~held], split[held]


def counted_as(loaded: Loaded, names: Sequence[str], by: str) -> Loaded:
    """A set with its labels renumbered like the classes of another set, matched by name.

    In a folder that lacks a class all later classes have other numbers. Sets without names are unchanged.

    Args:
        loaded: the set.
        names: of the other set's classes, in the order of its labels.
        by: name of the other set.

    Raises:
        ValueError: for a class that the other set does not have.
    """
    check_instance(loaded, "loaded", Loaded, "a set, such as data.load(name) returns")
    check_several(names, "names", "strings", 0)
    for name in names:
        check_text(name, "each of names")
    check_text(by, "by")
    if not names or not loaded.names or loaded.names == tuple(names):
        return loaded
    if unknown := [name for name in loaded.names if name not in names]:
        raise ValueError(
            f"{loaded.name} has classes that {by} does not have: {_listed(unknown)}; known are: "
            f"{_listed(names)}. Rename their folders to match, or remove them, and pack the images again"
        )
    if len({*names}) < len(names):
        raise ValueError(
            f"{loaded.name} and {by} have different classes, and two of the same name: give each a unique "
            "name, and pack the images again"
        )
    places = torch.tensor([tuple(names).index(name) for name in loaded.names])
    return replace(loaded, y=places.to(loaded.y.device)[loaded.y], names=tuple(names))


def _listed(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    return ", ".join(map(repr, names[:10])) + (
        f" and {len(names) - 10} more" if len(names) > 10 else ""
    )


@dataclass(frozen=True)
class Data:
    """All the data of a run.

    Attributes:
        train, val, test: in-distribution images with labels.
        outliers: auxiliary outliers for training (samples, ...); may be empty.
        ood: test outliers by name, never seen in training.
        notes: numbers about the data of one epoch, for the run's log.
        compressed: ``train.x`` compressed like the outliers, or None; an epoch takes each image from one
            of the two at random, so that compression does not reveal outliers.
    """

    train: Split
    val: Split
    test: Split
    outliers: Tensor
    ood: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    compressed: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            check_instance(getattr(self, name), name, Split, "a Split(x, y)")
        check_instance(self.outliers, "outliers", Tensor, "a tensor (samples, ...), x[:0] for none")
        check_mapping(self.ood, "ood", "{name: images}")
        for name, x in self.ood.items():
            check_instance(x, f"ood[{name!r}]", Tensor, "a tensor of images")
        shape, other = self.train.x.shape, self.outliers
        if other.ndim == 0 or (len(other) and other.shape[1:] != shape[1:]):
            raise ValueError(
                f"data.outliers must have samples shaped like those of data.train.x, {tuple(shape[1:])}, got "
                f"{tuple(other.shape[1:])}"
            )
        check_mapping(self.notes, "notes", "{name: number}")
        for name, value in self.notes.items():
            check_number(value, f"notes[{name!r}]", -math.inf, math.inf)
        if self.compressed is not None:
            check_instance(self.compressed, "compressed", Tensor, "a tensor shaped like train.x")
            if self.compressed.shape != shape:
                raise ValueError(
                    f"compressed must be shaped like train.x {tuple(shape)}, got "
                    f"{tuple(self.compressed.shape)}"
                )

    def to(self, device: torch.device | str) -> Data:
        check_device(device)
        kinds = (Split, Tensor)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value for name, value in values.items() if isinstance(value, kinds)}
        return replace(
            self,
            **{name: value.to(device) for name, value in moved.items()},
            ood={name: x.to(device) for name, x in self.ood.items()},
        )


@dataclass(frozen=True)
class Batch:
    """What an objective sees at one step.

    Attributes:
        x, y: inputs and labels; y may be an image.
        outliers: auxiliary outliers, or None.
        generator: the run's source of random numbers, on the device of x.
        progress: share of the training that is done, in [0, 1].
        climb: how an attack climbs, if the engine has its own way (:func:`robustood.attacks.search`).
    """

    x: Tensor
    y: Tensor
    outliers: Tensor | None = None
    generator: torch.Generator | None = None
    progress: float = 1.0
    climb: Callable[..., tuple[Tensor, Tensor]] | None = None


def check_trainable(data: Data, classes: int | None) -> None:
    """Refuse inputs, outliers and targets that no training step could use.

    Args:
        data: of the run. Inputs are images, 8-bit or in [0, 1], or vectors; targets are labels, numbers, or such
            images.
        classes: number of classes of the labels; None if unknown.
    """

    def check_floats(x: Tensor, name: str) -> None:
        if x.ndim == 4:
            check_images(x, name)
        else:
            check_values(x, None, name)  # vectors have no box

    x, y, outliers = data.train.x, data.train.y, data.outliers
    if x.dtype != torch.uint8:
        check_floats(x, "data.train.x")
    if len(outliers) and outliers.dtype != torch.uint8:
        check_floats(outliers, "data.outliers")
    if y.is_floating_point() or (y.ndim == 4 and y.dtype != torch.uint8):
        check_floats(y, "data.train.y")
    elif y.ndim != 4:
        check_labels(y, x, classes, "data.train.y")
