"""What a run is made of: splits, batches, and the results that ship with the project."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustood.inputs import pixels as pixels  # shown as data.pixels


@dataclass(frozen=True)
class Split:
    """Inputs (samples, ...) with one target each: labels (samples,), or images."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"x and y must be of one length, got {len(self.x)} and {len(self.y)}")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> Split:
        return replace(self, x=self.x[index], y=self.y[index])

    def to(self, device: torch.device | str) -> Split:
        return replace(self, x=self.x.to(device), y=self.y.to(device))


@dataclass(frozen=True)
class Loaded(Split):
    """A set of 8-bit images (samples, channel, height, width) with what its pack says about it.

    Attributes:
        name: of the set, such as ``"cifar10"``.
        names: of the classes; empty where the pack has none.
        ids: of the classes in another system, such as WordNet ids; may be empty.
        jpeg: quality, if the pixels are decoded JPEG files; None if they never were compressed.
    """

    name: str = ""
    names: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    jpeg: int | None = None


@dataclass(frozen=True)
class Data:
    """All that a run needs.

    Attributes:
        train, val, test: in-distribution images with labels.
        outliers: auxiliary outliers for training (samples, ...); may be empty.
        ood: test outliers by name, never seen in training.
        notes: numbers about the data of one epoch that a run should log.
        compressed: ``train.x`` after the outliers' compression, or None; an epoch takes each image from one
            of the two at random, so that compression does not tell outliers.
    """

    train: Split
    val: Split
    test: Split
    outliers: Tensor
    ood: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    compressed: Tensor | None = None

    def to(self, device: torch.device | str) -> Data:
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
        generator: the run's source of randomness, on the device of x.
        progress: share of the training that is done, in [0, 1].
    """

    x: Tensor
    y: Tensor
    outliers: Tensor | None = None
    generator: torch.Generator | None = None
    progress: float = 1.0

    def at(self, progress: float) -> Batch:
        """The same batch at another time of the training."""
        return replace(self, progress=progress)


def kept(name: str) -> dict[str, Any]:
    """A result that ships with the project: what one run of it measured.

    Looked for in ``data/results`` of a checkout, then in the installed package.

    Args:
        name: file name without ``.json``.

    Raises:
        ValueError: if there is no such result; the message says which there are.
    """
    here = Path(__file__).parents[1]
    folders = [here.parent / "data" / "results", here / "kept" / "results"]
    for folder in folders:
        if (file := folder / f"{name}.json").is_file():
            return json.loads(file.read_text("utf-8"))
    known = sorted({file.stem for folder in folders for file in folder.glob("*.json")})
    raise ValueError(f"no kept result {name!r}; there are: {', '.join(known) or 'none'}")
